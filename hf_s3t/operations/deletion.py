"""A deletion as applied to a folder, by any process and without a model: what it would do, and doing it."""

import re
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ..config import require_choice
from ..errors import ConfigError, ExampleIdError, UnknownExampleError
from ..folder.status import deletions_left, serving_depths
from ..folder.system import SystemFolder
from ..folder.versions import library_versions
from ..plan.stages import StageKey
from ..records.examples import Request
from ..records.report import UnlearningReport


MISSING = ("error", "ignore")
# One way only to write each number, so that a text names one id; 20 digits hold every 64-bit integer.
_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,19}")


@dataclass(frozen=True)
class DeletionPreview:
    """
    What a deletion would do, found without doing it.

    Args:
        requested (`int`): Number of distinct ids asked for, groups resolved to their members.
        present (`tuple[int | str, ...]`): The ids among them that are in and would be deleted.
        already_deleted (`int`): How many the ledger knows as deleted.
        duplicates (`tuple[int | str, ...]`): Examples that would stay, and whose content equals that of one of these.
        stages_removed (`tuple[str, ...]`): The stages that would go, as `shard-0/2-0-1`.
        depths_before (`list[int]`): Per shard the depth of the stack that serves now.
        depths_after (`list[int]`): The same after the deletion; 0 means the shard would leave the ensemble.
        would_exhaust (`bool`): Whether no shard would be left.
        deletions_left_before (`float`): Expected number of requests until the system is exhausted, as it is now.
        deletions_left_after (`float`): The same after the deletion.
        deleted_groups (`tuple[int | str, ...]`): The groups among those asked for that were deleted before.
        unknown (`int`): How many ids were never trained on, and are passed over by `missing="ignore"`.
        unknown_groups (`int`): The same of groups.
    """

    requested: int
    present: tuple[int | str, ...]
    already_deleted: int
    duplicates: tuple[int | str, ...]
    stages_removed: tuple[str, ...]
    depths_before: list[int]
    depths_after: list[int]
    would_exhaust: bool
    deletions_left_before: float
    deletions_left_after: float
    deleted_groups: tuple[int | str, ...] = ()
    unknown: int = 0
    unknown_groups: int = 0


def preview(
    folder: SystemFolder,
    ids: Sequence[int | str] | None = None,
    groups: Sequence[int | str] | None = None,
    missing: str = "error",
    include_duplicates: bool = False,
) -> DeletionPreview:
    """
    What [`apply`] would do now. Nothing is written.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        ids (sequence of `int` or `str`, *optional*): Ids of the examples.
        groups (sequence of `int` or `str`, *optional*): Groups whose examples are all meant.
        missing (`str`, defaults to `"error"`): `"ignore"` passes over ids this system never saw.
        include_duplicates (`bool`, defaults to `False`):
            The examples whose content equals that of one of these are meant too; of ids that were deleted before the
            content is not known any more.

    Returns:
        [`DeletionPreview`]: What would go, and what would be left.

    Raises:
        [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
        [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
        [`~hf_s3t.errors.ConfigError`]: If neither is given.
    """
    folder.refresh_ledger()
    folder.refresh_stages()
    request, duplicates = resolve(folder, ids, groups, missing, include_duplicates)
    removed = _touched(folder, request, folder.condemned_stages())
    before = folder.valid_stages
    after = before.difference(removed)
    depths = serving_depths(folder, after)
    return DeletionPreview(
        requested=len(request.present) + request.already_deleted,
        present=tuple(request.present),
        already_deleted=request.already_deleted,
        duplicates=duplicates,
        stages_removed=tuple(str(key) for key in removed),
        depths_before=serving_depths(folder, before),
        depths_after=depths,
        would_exhaust=not any(depths),
        deletions_left_before=deletions_left(folder, before),
        deletions_left_after=deletions_left(folder, after),
        deleted_groups=request.deleted_groups,
        unknown=request.unknown,
        unknown_groups=request.unknown_groups,
    )


def apply(
    folder: SystemFolder,
    ids: Sequence[int | str] | None = None,
    groups: Sequence[int | str] | None = None,
    missing: str = "error",
    include_duplicates: bool = False,
) -> UnlearningReport:
    """
    Forget examples: remove from the folder every stage that saw one (Algorithm 4). No model, no training.

    All ids are checked first; a refused call changes nothing. The deletion is in the ledger, and synced, before
    anything else changes: whatever dies afterwards, the next load finishes the removal. Processes that serve the
    folder notice the new line before their next call. Ids that were deleted before are no error.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        ids (sequence of `int` or `str`, *optional*): Ids of the examples.
        groups (sequence of `int` or `str`, *optional*): Groups whose examples are all meant.
        missing (`str`, defaults to `"error"`): `"ignore"` passes over ids this system never saw.
        include_duplicates (`bool`, defaults to `False`):
            The examples whose content equals that of one of these are meant too; of ids that were deleted before the
            content is not known any more.

    Returns:
        [`~hf_s3t.records.report.UnlearningReport`]:
            What went, and what is left. `lock_seconds` is 0: a folder answers nobody.

    Raises:
        [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
        [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
        [`~hf_s3t.errors.ConfigError`]: If neither is given.
    """
    started = time.perf_counter()
    with folder.lock():
        folder.refresh()
        before = serving_depths(folder, folder.valid_stages)
        deletion = record(folder, ids, groups, missing, include_duplicates)
        folder.remove_stages(deletion.condemned)
        folder.remove_stale_checkpoints()
        if folder.is_table_behind:
            folder.compact()
        after = serving_depths(folder, folder.valid_stages)
    return deletion.report(before, after, time.perf_counter() - started)


@dataclass(frozen=True)
class RecordedDeletion:
    """
    A deletion that is in the ledger, and what is to be removed because of it.

    Args:
        request ([`~hf_s3t.records.examples.Request`]): What was deleted.
        duplicates (`tuple[int | str, ...]`): Examples of equal content that are still in.
        condemned (`list[StageKey]`): The stages to remove, those included that an earlier call did not live to remove.
    """

    request: Request
    duplicates: tuple[int | str, ...]
    condemned: list[StageKey]

    def report(
        self, before: list[int], after: list[int], seconds: float, lock_seconds: float = 0.0
    ) -> UnlearningReport:
        """The report of the call that recorded it, from the depths before and after and how long it took."""
        return UnlearningReport(
            requested=len(self.request.present) + self.request.already_deleted,
            deleted=len(self.request.present),
            already_deleted=self.request.already_deleted,
            stages_removed=tuple(map(str, self.condemned)),
            depths_before=before,
            depths_after=after,
            is_exhausted=not any(after),
            seconds=seconds,
            lock_seconds=lock_seconds,
            duplicates=self.duplicates,
            deleted_groups=self.request.deleted_groups,
            unknown=self.request.unknown,
            unknown_groups=self.request.unknown_groups,
        )


def record(
    folder: SystemFolder, ids, groups, missing: str = "error", include_duplicates: bool = False
) -> RecordedDeletion:
    """
    Check a request and put it into the ledger: the step that [`apply`] and a model's `unlearn` have in common.

    The folder's lock must be held, and what the folder says must be as it is on the disk. Removing is for the caller.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        ids (sequence of `int` or `str`, *optional*): As in [`apply`].
        groups (sequence of `int` or `str`, *optional*): As in [`apply`].
        missing (`str`, defaults to `"error"`): As in [`apply`].
        include_duplicates (`bool`, defaults to `False`): As in [`apply`].

    Returns:
        [`RecordedDeletion`]: What was recorded. A request of which nothing is in writes nothing.
    """
    request, duplicates = resolve(folder, ids, groups, missing, include_duplicates)
    condemned = folder.condemned_stages()
    if request.present:
        groups = dict.fromkeys([*request.groups, *_emptied(folder, request.present)])
        touched = _touched(folder, request, condemned)
        folder.record_deletion(request.present, touched, library_versions(), groups)
        condemned = sorted({*condemned, *touched})
    return RecordedDeletion(request, duplicates, condemned)


def resolve(
    folder: SystemFolder, ids, groups, missing: str = "error", include_duplicates: bool = False
) -> tuple[Request, tuple[int | str, ...]]:
    """
    The examples that a request names, all checked, and those of equal content that it leaves.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        ids (sequence of `int` or `str`, *optional*): As in [`apply`].
        groups (sequence of `int` or `str`, *optional*): As in [`apply`].
        missing (`str`, defaults to `"error"`): As in [`apply`].
        include_duplicates (`bool`, defaults to `False`): As in [`apply`].
    """
    require_choice("missing", missing, MISSING)
    if ids is None and groups is None:
        raise ConfigError("A deletion was asked for with neither `ids` nor `groups`. Name what to forget.")
    try:
        request = folder.table.resolve(ids, groups, folder.ledger, folder.names, ignore_unknown=missing == "ignore")
    except UnknownExampleError as error:
        raise UnknownExampleError(
            f'{error} Nothing was deleted; missing="ignore" (`--missing ignore`) passes over what was never trained '
            "on."
        ) from None
    duplicates = tuple(folder.table.duplicates_of(request.present))
    return (request.with_ids(duplicates), ()) if include_duplicates else (request, duplicates)


def _emptied(folder: SystemFolder, ids: Sequence[int | str]) -> list[int | str]:
    """The groups of which nothing is left: naming one again is as little an error as naming its ids."""
    gone = set(ids)
    named = dict.fromkeys(folder.table.rows[i].group for i in ids)
    return [g for g in named if g is not None and gone.issuperset(folder.table.groups[g])]


def _touched(folder: SystemFolder, request: Request, condemned: Collection[StageKey]) -> list[StageKey]:
    # What an earlier deletion condemned goes in its name, not in that of this one.
    standing = set(folder.stages).difference(condemned)
    return sorted(folder.plan.removed_by(folder.table.places(request.present), standing))


# Ids as texts


def ids_from_texts(folder: SystemFolder, texts: Sequence[str]) -> list[int | str]:
    """
    Ids that were written as texts, in the type that this system's ids have.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system, whose table says what its ids are.
        texts (sequence of `str`): Ids as they stand on a command line or in a file.

    Returns:
        `list[int | str]`: The ids. Where none is left in the table to show the type, those that the ledger knows.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If ids are integers and a text is none.
    """
    deleted = folder.ledger.deleted
    if folder.names.are_digests:
        kept, digest_of = folder.table.rows, folder.key.of_id
        return [_known(text, lambda i: digest_of(i) in kept or digest_of(i) in deleted) for text in texts]
    return [_typed(text, folder.table.rows, lambda i: folder.key.of_id(i) in deleted, "ids") for text in texts]


def groups_from_texts(folder: SystemFolder, texts: Sequence[str]) -> list[int | str]:
    """
    Groups that were written as texts, in the type that this system's groups have.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system, whose table says what its groups are.
        texts (sequence of `str`): Names of groups as they stand on a command line.

    Returns:
        `list[int | str]`: The names.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If names are integers and a text is none, or the system has no groups.
    """
    if texts and folder.config.group_column is None and not folder.table.groups:
        raise ExampleIdError(
            f"Got the group {texts[0]!r}, but this system was trained without a `group_column`. Name the examples by "
            "their ids."
        )
    deleted = folder.ledger.deleted_groups
    if folder.names.are_digests:
        kept, digest_of = folder.table.groups, folder.key.of_group
        return [_known(text, lambda g: digest_of(g) in kept or digest_of(g) in deleted) for text in texts]
    return [_typed(text, folder.table.groups, lambda g: folder.key.of_group(g) in deleted, "groups") for text in texts]


def candidates(text: str) -> tuple[int | str, ...]:
    """What a text can name: the text itself, and the integer where it is written as one."""
    number = _as_number(text)
    return (text,) if number is None else (text, number)


def _typed(text: str, known: Collection[int | str], is_deleted: Callable[[int | str], bool], what: str) -> int | str:
    sample = next(iter(known), None)
    if isinstance(sample, str):
        return text
    number = _as_number(text)
    if sample is None:
        # Everything was deleted, and the table no longer shows the type; the ledger knows which it was.
        return _known(text, is_deleted)
    if number is None:
        raise ExampleIdError(
            f"Got {text!r}, but the {what} of this system are integers such as {sample}. Write each number by "
            "itself, in plain digits without leading zeros."
        )
    return number


def _known(text: str, is_known: Callable[[int | str], bool]) -> int | str:
    return next((value for value in candidates(text) if is_known(value)), text)


def _as_number(text: str) -> int | None:
    stripped = text.strip()
    return int(stripped) if _NUMBER.fullmatch(stripped) else None
