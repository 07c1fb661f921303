"""Bringing a system to the Hub, in one commit on top of what is there."""

import hashlib
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, RepoFile
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils.sha import git_hash

from ..errors import ConfigError, FolderError, HubError, MergeNeededError, TransferError, counted
from ..folder.config_file import settings_of
from ..folder.earlier_slices import EarlierSlices
from ..folder.files import check_digest, digested_json, read_checked, stamp
from ..folder.gate_file import gate_bytes
from ..folder.identity import damaged_parts, differing_parts, is_same_system
from ..folder.layout import (
    ADAPTER_FILE,
    CONFIG_FILE,
    GATE_FILE,
    LEDGER_FILE,
    SIGNATURES_FILE,
    STAGE_FILES,
    STAGES,
    TABLE_FILE,
)
from ..folder.signatures_file import Signatures
from ..folder.signed_ledger import take_in_signatures
from ..folder.stage_record import adapter_of
from ..folder.system import SystemFolder
from ..folder.table_file import read_table, table_bytes
from ..plan.stages import StageKey, is_stage_of
from ..records.digests import PUBLIC_SECRET, DigestKey
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from ..records.validity import fits, is_current
from .client import (
    ATTEMPTS,
    LONGEST_WAIT,
    HTTPError,
    call_once,
    call_with_retries,
    http_status,
    hub_errors_as_sentences,
    is_passing,
)
from .large_files import must_be_erasable, refuse_what_git_would_keep
from .memory import remember
from .merged_gate import take_in_words
from .repository import INDEX_FILE, HubRepo, HubState, stage_index


_CONFLICT = 412
# From the folder, the card so far, whether nothing was deleted since it, and whether the gate goes with it, to files
# beside the system by their names.
Describe = Callable[[SystemFolder, str | None, bool, bool], Mapping[str, bytes]]


@dataclass(frozen=True)
class PushReport:
    """
    What a push did.

    Args:
        repo_id (`str`): The repository.
        commit (`str`): The commit that holds the system now.
        added (`tuple[str, ...]`): Files that were new or changed.
        deleted (`tuple[str, ...]`): Files that were removed from the branch; older commits still have them.
        forgotten (`int`): Examples that the folder forgot because the Hub knew of their deletion.
        stages_removed (`tuple[str, ...]`): The stages that the folder lost by this, as `shard-0/2-0-1`.
    """

    repo_id: str
    commit: str
    added: tuple[str, ...]
    deleted: tuple[str, ...]
    forgotten: int = 0
    stages_removed: tuple[str, ...] = ()


def push(
    folder: SystemFolder,
    repo: HubRepo,
    describe: Describe,
    *,
    private: bool | None = None,
    commit_message: str | None = None,
    merge: bool = False,
    on_merge: Callable[[], object] | None = None,
    include_gate: bool | None = None,
    dry_run: bool = False,
) -> PushReport:
    """
    Bring a system to the Hub: one commit, of what is not there yet, on top of what is.

    Repeating it uploads nothing. If somebody else pushed meanwhile, both ledgers are merged and it is tried again: no
    deletion that the Hub knows is lost.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        repo ([`HubRepo`]): Where to.
        describe (callable): Makes the card and what it shows; see [`Describe`].
        private (`bool`, *optional*): Whether a new repository is private; the owner's default if not given.
        commit_message (`str`, *optional*): Title of the commit.
        merge (`bool`, defaults to `False`): Take in deletions that the Hub knows and the folder does not.
        on_merge (callable, *optional*): Called when the folder has taken in deletions, before anything is uploaded.
        include_gate (`bool`, *optional*):
            Whether the repository gets, or keeps, the system's gate. Left out, one that has it keeps it, in step with
            the deletions, unless the folder has none, and no other gets it.
        dry_run (`bool`, defaults to `False`): Report what would be done, and do nothing.

    Returns:
        [`PushReport`]: What was done.

    Raises:
        [`~hf_s3t.errors.MergeNeededError`]: If the Hub knows deletions that the folder does not, and `merge` is false.
        [`~hf_s3t.errors.HubError`]: If the Hub refuses, cannot be reached, or holds another system there.
        [`~hf_s3t.errors.ConfigError`]: If the folder holds a baseline.
    """
    _refuse_baseline(folder, repo.repo_id)
    _warn_of_base_of_this_machine(folder, repo.repo_id)
    _warn_of_what_tells_who(folder, repo.repo_id)
    with hub_errors_as_sentences(repo.repo_id, "The push ended"):
        if not dry_run:
            call_with_retries(repo.api.create_repo, repo.repo_id, private=private, exist_ok=True)
        elif not call_with_retries(repo.api.repo_exists, repo.repo_id):
            changes = _operations(folder, HubState("", {}), describe, None, include_gate)
            return _report(repo, "", changes, _Merged())
        return _commit_upon_what_is_there(
            folder, repo, describe, commit_message, merge, on_merge, include_gate, dry_run
        )


def _commit_upon_what_is_there(
    folder: SystemFolder,
    repo: HubRepo,
    describe: Describe,
    message: str | None,
    merge: bool,
    on_merge: Callable[[], object] | None,
    include_gate: bool | None,
    dry_run: bool,
) -> PushReport:
    """Look at the main branch, take in its deletions, and commit what it lacks; again, where somebody was first."""
    merged = _Merged()
    for attempt in range(ATTEMPTS):
        state = repo.state()
        merged += _take_in(folder, state, merge, repo, on_merge, dry_run)
        signed = repo.signatures(state)
        if not dry_run:
            take_in_signatures(folder, signed)
        if attempt == 0 and include_gate is None and folder.has_gate and GATE_FILE not in state.tree:
            _warn_of_gate_that_stays(repo.repo_id)
        card = repo.card(state)
        stages = folder.stage_records
        try:
            changes = _operations(folder, state, describe, card, include_gate, signed)
            refuse_what_git_would_keep(repo, state, changes.added)
            if not dry_run:
                remember(repo.repo_id, folder.record, folder.ledger)
            if dry_run or not (changes.added or changes.deleted):
                if dry_run or _is_last(folder, changes.ledger):
                    return _report(repo, state.commit, changes, merged)
                continue
            commit = _commit(folder, repo, state, changes, message or _message(folder))
        except (FileNotFoundError, FolderError) as error:
            # Another process deleted examples meanwhile, and with them stages, or grew some again; or one is damaged.
            folder.refresh()
            if folder.stage_records == stages and isinstance(error, FolderError):
                raise
            continue
        if commit is not None:
            return _report(repo, commit, changes, merged)
        # Somebody was first, here or there, or the answer was lost and this commit may be there: look again.
        merge = True
        folder.refresh()
        time.sleep(min(0.25 * 2**attempt, LONGEST_WAIT))
    raise HubError(
        f"{repo.repo_id} changed, or failed, at each of {ATTEMPTS} attempts to push. Call again; what was uploaded "
        "is not uploaded twice."
    )


# Before anything is sent


def _refuse_baseline(folder: SystemFolder, repo_id: str) -> None:
    if "baseline" in folder.record:
        raise ConfigError(
            f"{folder.path} holds a baseline, which is for comparing: who loads it from {repo_id} would take it for "
            "an S3T system. Keep its folder, or push an S3T system."
        )


def _warn_of_base_of_this_machine(folder: SystemFolder, repo_id: str) -> None:
    if folder.base_id is None and folder.record["base_model"].get("id"):
        warnings.warn(
            f"The base model is a folder of this machine: who loads {repo_id} must give `base_model`, and learns "
            "the folder's name alone. Push the base to the Hub and train on it by its id to spare them that.",
            stacklevel=3,
        )


def _warn_of_gate_that_stays(repo_id: str) -> None:
    warnings.warn(
        f"The system's gate stays here, because it tells of the words of rows: who loads {repo_id} is answered by the "
        "mean of all shards. Push with `include_gate=True` to have it there too, or with `False` if it shall not be.",
        stacklevel=4,
    )


def _warn_of_what_tells_who(folder: SystemFolder, repo_id: str) -> None:
    """Say where somebody without the secret can tell from a system's files who was deleted from it."""
    public = folder.record.get("key_check") == DigestKey(PUBLIC_SECRET.encode()).check
    plain = folder.config.keep_ids == "plain" and bool(folder.ledger.deleted)
    if public:
        why = "its secret is the one for comparisons, which everybody knows"
        remedy = "Unless its data is public or invented, train a system with a secret of its own"
    elif plain and _is_dense(folder.table, len(folder.ledger.deleted)):
        why = "its ids are numbers in a row, and each that is missing names a deleted one"
        remedy = 'Where nobody shall know, train a system with `keep_ids="digest"`'
    elif plain and folder.config.partition == "balanced" and not folder.record.get("keyed_places"):
        why = "it was made when places were dealt without the secret, and gaps show where deleted ids were"
        remedy = "Where nobody shall know, train a new system in another `output_dir`"
    else:
        return
    warnings.warn(f"Who reads {repo_id} can tell who was deleted: {why}. {remedy}.", stacklevel=3)


def _is_dense(table: ExampleTable, deleted: int) -> bool:
    """Whether ids are numbers among which none is missing that was not deleted."""
    ends = table.ends_of_ids
    return ends is not None and ends[1] - ends[0] + 1 - len(table) <= deleted


def _message(folder: SystemFolder) -> str:
    deletions = folder.ledger.num_deletions
    return f"S3T system, {counted(len(folder.valid_stages), 'stage')}" + (
        f", {counted(deletions, 'deletion')}" if deletions else ""
    )


@dataclass(frozen=True)
class _Adapter:
    """The adapter file of a stage, and the digest that the record of the stage has of it."""

    path: Path
    digest: str

    def read_bytes(self) -> bytes:
        """What is in it, as it was written."""
        return read_checked(self.path, self.digest)


class _Changes(NamedTuple):
    """What a commit changes: the files it adds, and the paths it deletes; and the ledger that all of it goes by."""

    added: dict[str, bytes | Path | _Adapter]
    deleted: list[str]
    ledger: Ledger


@dataclass(frozen=True)
class _Merged:
    """What a folder forgot, or would forget, because the Hub knew of it."""

    forgotten: int = 0
    stages: tuple[StageKey, ...] = ()

    def __add__(self, other: "_Merged") -> "_Merged":
        return _Merged(self.forgotten + other.forgotten, (*self.stages, *other.stages))


def _report(repo: HubRepo, commit: str, changes: _Changes, merged: _Merged) -> PushReport:
    files = tuple(sorted(changes.added)), tuple(sorted(changes.deleted))
    return PushReport(repo.repo_id, commit, *files, merged.forgotten, tuple(map(str, merged.stages)))


# What the Hub knows, and what it lacks


def _take_in(
    folder: SystemFolder,
    state: HubState,
    merge: bool,
    repo: HubRepo,
    on_merge: Callable[[], object] | None,
    dry_run: bool,
) -> _Merged:
    """Forget in the folder what the Hub knows as deleted, and have in it the rows that came there."""
    if state.record is None:
        return _Merged()
    repo_id = repo.repo_id
    _refuse_another(state.record, folder, repo_id)
    lacking = folder.lines_of_rows_not_here(state.ledger)
    if lacking and not merge:
        raise MergeNeededError(
            f"{repo_id} knows of {counted(len(lacking), 'addition')} of rows that {folder.path} lacks: a push would "
            "take them from whoever loads it. Push with merge=True (`hf-s3t push --merge`) to have them here too."
        )
    missing = state.ledger.deleted - folder.ledger.deleted
    if missing and not merge:
        raise MergeNeededError(
            f"{repo_id} knows of {len(missing)} deleted examples that are still in {folder.path}: a push would bring "
            "them back. Push with merge=True (`hf-s3t push --merge`) to forget them here too."
        )
    before = folder.valid_stages if missing else frozenset()
    if dry_run:
        return _Merged(len(missing), _stages_that_saw(folder, missing, before))
    known = folder.ledger.deleted
    weights = state.record.get("added", {}).get("weights")
    table = partial(_table_of, repo, state, folder)
    folder.merge_ledger(state.ledger, table() if lacking else None, weights)
    take_in_words(folder, repo, state, table, bool(lacking))
    gone = tuple(sorted(before - folder.valid_stages)) if missing else ()
    if on_merge is not None and folder.ledger.deleted != known:
        on_merge()
    return _Merged(len(missing), gone)


def _table_of(repo: HubRepo, state: HubState, folder: SystemFolder) -> ExampleTable:
    """The rows of a repository."""
    record = state.record or folder.record
    return read_table(repo.download(TABLE_FILE, state.commit)).examples(settings_of(record), folder.names)


def _refuse_another(there: Mapping[str, Any], folder: SystemFolder, repo_id: str) -> None:
    if not is_same_system(there, folder.record):
        other = ", ".join(differing_parts(there, folder.record))
        raise HubError(f"{repo_id} holds another system ({other} differ). Choose another repository.")
    damaged = ", ".join(damaged_parts(there, folder.record))
    if damaged:
        raise HubError(
            f"{repo_id} and {folder.path} are copies of one system and differ in what no two copies differ in "
            f"({damaged}): one of them is damaged. Restore {CONFIG_FILE} from a backup."
        )


def _earlier_slices(folder: SystemFolder, state: HubState) -> EarlierSlices:
    """By which the records of format 1 are understood that a repository holds, or will hold."""
    earlier = folder.earlier_slices()
    if state.record is not None:
        earlier.take_in(state.record.get("earlier_slices", {}))
        if state.record["format_version"] == 1:
            # What is there may have been grown after the folder was migrated, on what is left now.
            earlier.learn(folder.table)
    return earlier


def _stages_that_saw(
    folder: SystemFolder, digests: frozenset[str], stages: frozenset[StageKey]
) -> tuple[StageKey, ...]:
    table = folder.table
    gone = table.places(table.of_digests(digests)) if digests else set()
    return tuple(sorted(folder.plan.removed_by(gone, stages)))


def _operations(
    folder: SystemFolder,
    state: HubState,
    describe: Describe,
    card: str | None,
    include_gate: bool | None = None,
    signed: Signatures | None = None,
) -> _Changes:
    """What brings a repository from a state to the one of the folder."""
    folder.refresh_ledger()
    folder.refresh_stages()
    # A live model may follow other processes meanwhile, in threads of its own.
    table, ledger, valid = folder.as_of_one_time()
    # What a system on the Hub serves is there already, or it is not: it has no files to bring.
    ours = {key: record for key, record in valid.items() if folder.stage_paths(key)}
    earlier = _earlier_slices(folder, state)
    stages = _stages_to_be(folder, ours, _Slices(table, ledger), state, earlier)
    wanted: dict[str, bytes | Path | _Adapter] = {}
    for key, record in stages.items():
        if record is ours.get(key):
            wanted |= _files_of(folder, key, record)
    wanted |= folder.companions()
    # Of one that the folder lacks nobody takes the deleted rows: it goes.
    gated = GATE_FILE in state.tree and folder.has_gate if include_gate is None else include_gate
    wanted[CONFIG_FILE] = folder.config_bytes(earlier, gated)
    wanted[LEDGER_FILE] = ledger.text.encode()
    signatures = folder.signatures.text_for(ledger, signed)
    if signatures:
        wanted[SIGNATURES_FILE] = signatures.encode()
    wanted[TABLE_FILE] = bytes(table_bytes(table, ledger))
    if gated:
        wanted[GATE_FILE] = bytes(gate_bytes(folder.load_gate(), ledger, folder.record["key_check"]))
    wanted[INDEX_FILE] = digested_json(stage_index(table, ledger, stages))
    wanted |= describe(folder, card, state.record is not None and state.ledger.deleted == ledger.deleted, gated)
    kept = {f"{key.path}/{name}" for key in stages for name in STAGE_FILES}
    added = {path: content for path, content in wanted.items() if not _is_there(state.tree.get(path), path, content)}
    deleted = [
        path for path in state.tree if path.startswith(f"{STAGES}/") and path not in kept and path != INDEX_FILE
    ]
    deleted += [GATE_FILE] if GATE_FILE in state.tree and not gated else []
    return _Changes(added, deleted, ledger)


def _files_of(folder: SystemFolder, key: StageKey, record: Mapping[str, Any]) -> dict[str, bytes | _Adapter]:
    """The files of a stage by their paths, as its record has them, whatever takes its place meanwhile."""
    adapter = _Adapter(folder.stage_paths(key)[ADAPTER_FILE], adapter_of(record))
    files: dict[str, bytes | _Adapter] = {ADAPTER_FILE: adapter, **folder.read_other_files(key, record)}
    return {f"{key.path}/{name}": content for name, content in files.items()}


def _stages_to_be(
    folder: SystemFolder,
    ours: Mapping[StageKey, Mapping[str, Any]],
    slices: "_Slices",
    state: HubState,
    earlier: EarlierSlices,
) -> dict[StageKey, Mapping[str, Any]]:
    """
    The valid stages of folder and Hub together; where both have one that differs, the one that lacks no rows which
    came, else the folder's.
    """
    there = {key: earlier.translated(r) for key, r in state.stages.items() if _is_whole(state, key, r)}
    chosen: dict[StageKey, Mapping[str, Any]] = {}
    # Parents first, whether they are planned or not.
    for key in sorted({*ours, *there}, key=lambda key: (key.depth, key)):
        if not is_stage_of(key, folder.config):
            continue
        fit = [r for r in (ours.get(key), there.get(key)) if r is not None and _fits(slices, key, r, chosen)]
        if fit:
            chosen[key] = min(fit, key=lambda record: not is_current(record, slices.now(key)))
    return chosen


def _is_whole(state: HubState, key: StageKey, record: Mapping[str, Any]) -> bool:
    """Whether the repository holds all files of a stage, and its adapter is the one of the record."""
    files = {name: state.tree.get(f"{key.path}/{name}") for name in STAGE_FILES}
    adapter = files[ADAPTER_FILE]
    if adapter is None or not all(files.values()):
        return False
    return adapter.lfs is None or adapter.lfs.sha256 == record["files"][ADAPTER_FILE]


@dataclass(frozen=True)
class _Slices:
    """The rows that a push goes by, and which of them came when."""

    table: ExampleTable
    ledger: Ledger

    def now(self, key: StageKey) -> list[str]:
        """The digests of a stage's slices."""
        return self.table.slice_digests(key.shard, key.prefix)

    def ever(self, key: StageKey) -> list[tuple[str, ...]]:
        """Those that their remaining rows ever had."""
        return [self.table.slice_digests_of(key.shard, s, self.ledger.generations) for s in key.prefix]


def _fits(slices: _Slices, key: StageKey, record: Mapping[str, Any], chosen: Mapping[StageKey, Any]) -> bool:
    if key.parent is not None and key.parent not in chosen:
        return False
    below = None if key.parent is None else adapter_of(chosen[key.parent])
    return fits(record, slices.ever(key), below)


def _is_there(entry: RepoFile | None, path: str, content: bytes | Path | _Adapter) -> bool:
    if entry is None or (entry.lfs is None and must_be_erasable(path)):
        return False
    if entry.lfs is not None and isinstance(content, _Adapter):
        return entry.lfs.sha256 == content.digest
    data = content if isinstance(content, bytes) else content.read_bytes()
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return entry.blob_id == git_hash(data)


def _commit(folder: SystemFolder, repo: HubRepo, state: HubState, changes: _Changes, message: str) -> str | None:
    """The new commit, or `None` if what is there must be looked at again first."""
    try:
        with warnings.catch_warnings():
            # A table in a model's repository is meant here.
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            commit = call_once(_create_commit, folder, repo, state, changes, message)
            return None if commit is None else commit.oid
    except (HTTPError, TransferError) as error:
        if not all(path.is_file() for path in _paths(changes)):
            # Another process deleted examples meanwhile, and with them stages.
            return None
        if isinstance(error, HfHubHTTPError) and http_status(error) == _CONFLICT:
            return None
        if not is_passing(error):
            raise
        return None


def _paths(changes: _Changes) -> list[Path]:
    """The files that are uploaded from the disk."""
    paths = [content.path if isinstance(content, _Adapter) else content for content in changes.added.values()]
    return [path for path in paths if isinstance(path, Path)]


def _is_last(folder: SystemFolder, ledger: Ledger) -> bool:
    """Whether no line came to the ledger since it was read."""
    folder.refresh_ledger()
    return folder.ledger == ledger


def _create_commit(
    folder: SystemFolder, repo: HubRepo, state: HubState, changes: _Changes, message: str
) -> CommitInfo | None:
    """Upload the files, then commit them; `None` if the folder is not any more what is to be committed."""
    stamps = list(map(stamp, _paths(changes)))
    additions = []
    for path, content in sorted(changes.added.items()):
        source = content.path if isinstance(content, _Adapter) else content
        additions.append(CommitOperationAdd(path, source if isinstance(source, bytes) else str(source)))
        if isinstance(content, _Adapter) and additions[-1].upload_info.sha256.hex() != content.digest:
            check_digest(content.path, content.digest)
            return None
    repo.api.preupload_lfs_files(repo.repo_id, additions, revision="main", free_memory=False)
    # That took its time: what was uploaded has to be what was read, and no deletion to have come since.
    if not _is_last(folder, changes.ledger) or list(map(stamp, _paths(changes))) != stamps:
        return None
    operations: list[CommitOperationAdd | CommitOperationCopy | CommitOperationDelete] = [
        *(CommitOperationDelete(path_in_repo=path) for path in changes.deleted),
        *additions,
    ]
    return repo.api.create_commit(
        repo.repo_id, operations, commit_message=message, parent_commit=state.commit, revision="main"
    )
