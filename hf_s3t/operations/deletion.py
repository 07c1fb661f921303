"""A deletion as applied to a folder, by any process and without a model: what it would do, and doing it."""

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..errors import UnknownExampleError
from ..folder.status import deletions_left, serving_depths
from ..folder.system import SystemFolder
from ..folder.versions import library_versions
from ..plan.stages import StageKey
from ..records.naming import resolve_names
from ..records.report import UnlearningReport
from ..records.request import DeletionRequest, RequestedExamples
from ..records.validity import saw_what_is_in


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


def preview(folder: SystemFolder, request: DeletionRequest) -> DeletionPreview:
    """
    What [`apply`] would do now. Nothing is written.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        request ([`~hf_s3t.records.request.DeletionRequest`]): What to forget.

    Returns:
        [`DeletionPreview`]: What would go, and what would be left.

    Raises:
        [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
        [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
    """
    folder.refresh_ledger()
    folder.refresh_stages()
    examples, duplicates = resolve(folder, request)
    removed = _touched(folder, examples, folder.condemned_stages())
    before = folder.valid_stages
    after = before.difference(removed)
    depths = serving_depths(folder, after)
    return DeletionPreview(
        requested=len(examples.present) + examples.already_deleted,
        present=tuple(examples.present),
        already_deleted=examples.already_deleted,
        duplicates=duplicates,
        stages_removed=tuple(str(key) for key in removed),
        depths_before=serving_depths(folder, before),
        depths_after=depths,
        would_exhaust=not any(depths),
        deletions_left_before=deletions_left(folder, before),
        deletions_left_after=deletions_left(folder, after),
        deleted_groups=examples.deleted_groups,
        unknown=examples.unknown,
        unknown_groups=examples.unknown_groups,
    )


def apply(folder: SystemFolder, request: DeletionRequest) -> UnlearningReport:
    """
    Forget examples: remove from the folder every stage that saw one (Algorithm 4). No model, no training.

    All ids are checked first; a refused call changes nothing. The deletion is in the ledger, and synced, before
    anything else changes: whatever dies afterwards, the next load finishes the removal. Processes that serve the
    folder notice the new line before their next call. Ids that were deleted before are no error.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        request ([`~hf_s3t.records.request.DeletionRequest`]): What to forget.

    Returns:
        [`~hf_s3t.records.report.UnlearningReport`]:
            What went, and what is left. `lock_seconds` is 0: a folder answers nobody.

    Raises:
        [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
        [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
    """
    started = time.perf_counter()
    # Before the lock, for which others wait: finding them out imports and reads files, once in a process.
    library_versions()
    with folder.lock():
        folder.refresh()
        before = serving_depths(folder, folder.valid_stages)
        deletion = record_request(folder, request)
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
        examples ([`~hf_s3t.records.request.RequestedExamples`]): What was deleted.
        duplicates (`tuple[int | str, ...]`): Examples of equal content that are still in.
        condemned (`list[StageKey]`): The stages to remove, those included that an earlier call did not live to remove.
    """

    examples: RequestedExamples
    duplicates: tuple[int | str, ...]
    condemned: list[StageKey]

    def report(
        self, before: list[int], after: list[int], seconds: float, lock_seconds: float = 0.0
    ) -> UnlearningReport:
        """The report of the call that recorded it, from the depths before and after and how long it took."""
        return UnlearningReport(
            requested=len(self.examples.present) + self.examples.already_deleted,
            deleted=len(self.examples.present),
            already_deleted=self.examples.already_deleted,
            stages_removed=tuple(map(str, self.condemned)),
            depths_before=before,
            depths_after=after,
            is_exhausted=not any(after),
            seconds=seconds,
            lock_seconds=lock_seconds,
            duplicates=self.duplicates,
            deleted_groups=self.examples.deleted_groups,
            unknown=self.examples.unknown,
            unknown_groups=self.examples.unknown_groups,
        )


def record_request(folder: SystemFolder, request: DeletionRequest) -> RecordedDeletion:
    """
    Check a request and put it into the ledger: the step that [`apply`] and a model's `unlearn` have in common.

    The folder's lock must be held, and what the folder says must be as it is on the disk. Removing is for the caller.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        request ([`~hf_s3t.records.request.DeletionRequest`]): What to forget.

    Returns:
        [`RecordedDeletion`]: What was recorded. A request of which nothing is in writes nothing.
    """
    examples, duplicates = resolve(folder, request)
    condemned = folder.condemned_stages()
    if examples.present:
        # Of a group of which nothing is left: naming it again is as little an error as naming its ids.
        groups = dict.fromkeys([*examples.groups, *folder.table.emptied_by(examples.present)])
        touched = _touched(folder, examples, condemned)
        folder.record_deletion(examples.present, touched, library_versions(), groups)
        condemned = sorted({*condemned, *touched})
    return RecordedDeletion(examples, duplicates, condemned)


def resolve(folder: SystemFolder, request: DeletionRequest) -> tuple[RequestedExamples, tuple[int | str, ...]]:
    """
    The examples that a request names, all checked, and those of equal content that it leaves.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        request ([`~hf_s3t.records.request.DeletionRequest`]): What to forget.
    """
    table, passes_over = folder.table, request.passes_over_unknown
    try:
        examples = resolve_names(table, request.ids, request.groups, folder.ledger, folder.names, passes_over)
    except UnknownExampleError as error:
        raise UnknownExampleError(
            f'{error} Nothing was deleted; missing="ignore" (`--missing ignore`) passes over what was never trained '
            "on."
        ) from None
    duplicates = tuple(table.duplicates_of(examples.present))
    return (examples.with_ids(duplicates), ()) if request.include_duplicates else (examples, duplicates)


def _touched(folder: SystemFolder, examples: RequestedExamples, condemned: Collection[StageKey]) -> list[StageKey]:
    # What an earlier deletion condemned goes in its name, not in that of this one.
    standing = set(folder.stages).difference(condemned)
    return stages_that_saw(folder, examples.present, standing)


def stages_that_saw(
    folder: SystemFolder, present: Sequence[int | str], stages: Collection[StageKey]
) -> list[StageKey]:
    """
    The stages that saw any of some examples that are in: those of their slices, but for what is older than they.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        present (sequence of ids): The examples, as ids stand in the table.
        stages (collection of [`~hf_s3t.plan.stages.StageKey`]): The stages that there are.
    """
    table = folder.table
    touched = folder.plan.removed_by(table.places(present), stages)
    if not table.has_additions:
        return sorted(touched)
    left, generations = table.without(present), folder.ledger.generations
    return sorted(
        key
        for key in touched
        if not saw_what_is_in(
            folder.stage_record(key), [left.slice_digests_of(key.shard, s, generations) for s in key.prefix]
        )
    )
