"""The repository of a system on the Hub: reading it, and bringing a system there in one commit."""

import hashlib
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, RepoFile
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from huggingface_hub.utils.sha import git_hash

from ..errors import ConfigError, HubError, MergeNeededError, TransferError
from ..folder.files import digested_json
from ..folder.layout import (
    ADAPTER_FILE,
    CONFIG_FILE,
    LEDGER_FILE,
    STAGE_FILES,
    STAGES,
    TABLE_FILE,
)
from ..folder.stage_record import adapter_of
from ..folder.system import SystemFolder
from ..folder.table_file import write_table
from ..plan.stages import StageKey
from ..records.digests import PUBLIC_SECRET, DigestKey
from ..records.validity import fits
from .client import ATTEMPTS, LONGEST_WAIT, asked, is_passing, patiently, status_of, told
from .git_attributes import ATTRIBUTES_FILE, state_of
from .memory import remember
from .repository import INDEX_FILE, HubRepo, HubState, index_of


_LARGE = "filter=lfs diff=lfs merge=lfs -text"
_CONFLICT = 412
# What two copies of one system have in common.
_OF_A_SYSTEM = ("key_check", "s3t_config", "base_model", "peft_config", "layers", "head")
# From the folder, the card so far and whether nothing was deleted since it, to files beside the system by their names.
Describe = Callable[[SystemFolder, str | None, bool], Mapping[str, bytes]]


# Pushing


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
    on_merge: Callable[[], Any] | None = None,
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
        dry_run (`bool`, defaults to `False`): Report what would be done, and do nothing.

    Returns:
        [`PushReport`]: What was done.

    Raises:
        [`~hf_s3t.errors.MergeNeededError`]: If the Hub knows deletions that the folder does not, and `merge` is false.
        [`~hf_s3t.errors.HubError`]: If the Hub refuses, cannot be reached, or holds another system there.
        [`~hf_s3t.errors.ConfigError`]: If the folder holds a baseline.
    """
    if "baseline" in folder.record:
        raise ConfigError(
            f"{folder.path} holds a baseline, which is for comparing: who loads it from {repo.repo_id} would take it "
            "for an S3T system. Keep its folder, or push an S3T system."
        )
    if folder.base_id is None and folder.record["base_model"].get("id"):
        warnings.warn(
            f"The base model is a folder of this machine: who loads {repo.repo_id} must give `base_model`, and learns "
            "the folder's name alone. Push the base to the Hub and train on it by its id to spare them that.",
            stacklevel=2,
        )
    _warn_of_what_tells_who(folder, repo.repo_id)
    with told(repo.repo_id, "The push ended"):
        if dry_run and not patiently(repo.api.repo_exists, repo.repo_id):
            return _report(repo, HubState("", {}), *_operations(folder, HubState("", {}), describe, None), _Merged())
        if not dry_run:
            patiently(repo.api.create_repo, repo.repo_id, private=private, exist_ok=True)
        merged = _Merged()
        for attempt in range(ATTEMPTS):
            state = repo.state()
            known = folder.ledger.deleted
            merged += _take_in(folder, state, merge, repo.repo_id, dry_run)
            if on_merge is not None and folder.ledger.deleted != known:
                on_merge()
            card = repo.card(state)
            try:
                added, deleted = _operations(folder, state, describe, card)
            except FileNotFoundError:
                # Another process deleted examples meanwhile, and with them stages.
                folder.refresh()
                continue
            _refuse_what_git_would_keep(repo, state, added)
            if not dry_run:
                remember(repo.repo_id, folder.record, folder.ledger)
            if dry_run or not (added or deleted):
                return _report(repo, state, added, deleted, merged)
            commit = _commit(repo, state, added, deleted, commit_message or _message(folder))
            if commit is not None:
                return _report(repo, HubState(commit, {}), added, deleted, merged)
            # Somebody was first, or the answer was lost and this commit may be there: look again.
            merge = True
            folder.refresh()
            time.sleep(min(0.25 * 2**attempt, LONGEST_WAIT))
    raise HubError(
        f"{repo.repo_id} changed, or failed, at each of {ATTEMPTS} attempts to push. Call again; what was uploaded "
        "is not uploaded twice."
    )


def _warn_of_what_tells_who(folder: SystemFolder, repo_id: str) -> None:
    """Say where somebody without the secret can tell from a system's files who was deleted from it."""
    public = folder.record.get("key_check") == DigestKey(PUBLIC_SECRET.encode()).check
    plain = folder.config.keep_ids == "plain" and bool(folder.ledger.deleted)
    if public:
        why = "its secret is the one for comparisons, which everybody knows"
        remedy = "Unless its data is public or invented, train a system with a secret of its own"
    elif plain and _is_dense(folder.table.rows, len(folder.ledger.deleted)):
        why = "its ids are numbers in a row, and each that is missing names a deleted one"
        remedy = 'Where nobody shall know, train a system with `keep_ids="digest"`'
    elif plain and folder.config.partition == "balanced" and not folder.record.get("keyed_places"):
        why = "it was made when places were dealt without the secret, and gaps show where deleted ids were"
        remedy = "Where nobody shall know, train a new system in another `output_dir`"
    else:
        return
    warnings.warn(f"Who reads {repo_id} can tell who was deleted: {why}. {remedy}.", stacklevel=3)


def _is_dense(ids: Collection[int | str], deleted: int) -> bool:
    """Whether ids are numbers among which none is missing that was not deleted."""
    numbers = [i for i in ids if isinstance(i, int)]
    return bool(numbers) and max(numbers) - min(numbers) + 1 - len(numbers) <= deleted


def _message(folder: SystemFolder) -> str:
    deletions = folder.ledger.num_deletions
    return f"S3T system, {len(folder.valid_stages)} stages" + (f", {deletions} deletions" if deletions else "")


@dataclass(frozen=True)
class _Merged:
    """What a folder forgot, or would forget, because the Hub knew of it."""

    forgotten: int = 0
    stages: tuple[StageKey, ...] = ()

    def __add__(self, other: "_Merged") -> "_Merged":
        return _Merged(self.forgotten + other.forgotten, (*self.stages, *other.stages))


def _report(repo: HubRepo, state: HubState, added: Mapping[str, Any], deleted, merged: _Merged) -> PushReport:
    files = tuple(sorted(added)), tuple(sorted(deleted))
    return PushReport(repo.repo_id, state.commit, *files, merged.forgotten, tuple(map(str, merged.stages)))


def _take_in(folder: SystemFolder, state: HubState, merge: bool, repo_id: str, dry_run: bool) -> _Merged:
    if state.record is None:
        return _Merged()
    other = differing_parts(state.record, folder.record)
    if other:
        raise HubError(f"{repo_id} holds another system ({', '.join(other)} differ). Choose another repository.")
    missing = state.ledger.deleted - folder.ledger.deleted
    if missing and not merge:
        raise MergeNeededError(
            f"{repo_id} knows of {len(missing)} deleted examples that are still in {folder.path}: a push would bring "
            "them back. Push with merge=True (`hf-s3t push --merge`) to forget them here too."
        )
    before = folder.valid_stages if missing else frozenset()
    if dry_run:
        return _Merged(len(missing), _stages_that_saw(folder, missing, before))
    folder.merge_ledger(state.ledger)
    return _Merged(len(missing), tuple(sorted(before - folder.valid_stages)) if missing else ())


def _stages_that_saw(
    folder: SystemFolder, digests: frozenset[str], stages: frozenset[StageKey]
) -> tuple[StageKey, ...]:
    gone = [i for i in folder.table.rows if folder.names.id_digest(i) in digests] if digests else []
    return tuple(sorted(folder.plan.removed_by(folder.table.places(gone), stages)))


def differing_parts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What tells two systems apart by their configs; nothing if they are copies of one."""
    return [name for name in _OF_A_SYSTEM if _of(one, name) != _of(other, name)]


def _of(record: Mapping[str, Any], name: str) -> Any:
    """A part of a system's record; of the base, what its tensors are."""
    value = record.get(name)
    return value.get("digest") if name == "base_model" and isinstance(value, Mapping) else value


def _operations(
    folder: SystemFolder, state: HubState, describe: Describe, card: str | None
) -> tuple[dict[str, bytes | Path], list[str]]:
    """The files to add, and the paths to delete."""
    ours, stages = folder.valid_stages, _stages_to_be(folder, state)
    wanted: dict[str, bytes | Path] = {}
    for key in stages:
        if key in ours and folder.stage_record(key)["files"] == stages[key]["files"]:
            wanted |= {f"{key.path}/{name}": path for name, path in folder.stage_paths(key).items()}
    wanted |= folder.companions()
    wanted[CONFIG_FILE] = folder.config_bytes()
    wanted[LEDGER_FILE] = folder.ledger.text.encode()
    wanted[TABLE_FILE] = _table_bytes(folder)
    wanted[INDEX_FILE] = digested_json(index_of(folder, stages))
    wanted |= describe(folder, card, state.record is not None and state.ledger.deleted == folder.ledger.deleted)
    kept = {f"{key.path}/{name}" for key in stages for name in STAGE_FILES}
    added = {path: content for path, content in wanted.items() if not _is_there(state.tree.get(path), path, content)}
    deleted = [
        path for path in state.tree if path.startswith(f"{STAGES}/") and path not in kept and path != INDEX_FILE
    ]
    return added, deleted


def _stages_to_be(folder: SystemFolder, state: HubState) -> dict[StageKey, Mapping[str, Any]]:
    """The valid stages of folder and Hub together; where both have one that differs, the folder's."""
    # What a system on the Hub serves is there already, or it is not: it has no files to bring.
    ours = {key: folder.stage_record(key) for key in folder.valid_stages if folder.stage_paths(key)}
    there = {key: record for key, record in state.stages.items() if _is_whole(state, key, record)}
    chosen: dict[StageKey, Mapping[str, Any]] = {}
    for key in folder.plan.stages(folder.table.empty):
        for record in (ours.get(key), there.get(key)):
            if record is not None and _fits(folder, key, record, chosen):
                chosen[key] = record
                break
    return chosen


def _is_whole(state: HubState, key: StageKey, record: Mapping[str, Any]) -> bool:
    """Whether the repository holds all files of a stage, and its adapter is the one of the record."""
    files = [state.tree.get(f"{key.path}/{name}") for name in STAGE_FILES]
    adapter = state.tree.get(f"{key.path}/{ADAPTER_FILE}")
    return all(files) and (adapter.lfs is None or adapter.lfs.sha256 == record["files"][ADAPTER_FILE])


def _fits(folder: SystemFolder, key: StageKey, record: Mapping[str, Any], chosen: Mapping[StageKey, Any]) -> bool:
    if key.parent is not None and key.parent not in chosen:
        return False
    below = None if key.parent is None else adapter_of(chosen[key.parent])
    return fits(record, folder.slice_digests(key), below)


def _table_bytes(folder: SystemFolder) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        write_table(Path(scratch) / TABLE_FILE, folder.table, folder.ledger)
        return (Path(scratch) / TABLE_FILE).read_bytes()


def must_be_erasable(path: str) -> bool:
    """Whether a file holds weights or ids, and so belongs into the large-file storage: what git keeps, it keeps."""
    return path == TABLE_FILE or path.endswith(f"/{ADAPTER_FILE}")


def _refuse_what_git_would_keep(repo: HubRepo, state: HubState, added: Iterable[str]) -> None:
    """No erasure reaches what lies in git itself, in any old commit, until the Hub collects garbage."""
    if not state.commit:
        # Of a repository that is not made yet; a new one has the Hub's own rules, under which these files are large.
        return
    paths = sorted(filter(must_be_erasable, added))
    folders = {folder for path in paths for folder in PurePosixPath(path).parents}
    names = state.tree.keys() & {str(folder / ATTRIBUTES_FILE) for folder in folders}
    rules = {name: repo.download(name, state.commit).read_bytes().decode(errors="surrogateescape") for name in names}
    top = rules.pop(ATTRIBUTES_FILE, "")
    kept = [path for path in paths if not _is_large(path, top, rules)]
    if kept:
        wanted = sorted({f"*{PurePosixPath(path).suffix} {_LARGE}" for path in kept})
        raise HubError(
            f"By the {ATTRIBUTES_FILE} of {repo.repo_id}, {kept[0]}{' and others' if len(kept) > 1 else ''} would lie "
            "in git itself, where a deletion could not be erased from old commits; expected are rules that make it a "
            f"large file. Add to {ATTRIBUTES_FILE} there: {'; '.join(wanted)}, as its last lines, and remove files of "
            "that name from the folders below. Then push again. Nothing was pushed."
        )


def _is_large(path: str, rules: str, below: Mapping[str, str] | None = None) -> bool:
    """Whether a `.gitattributes` makes a file a large one, with those in folders below by their paths."""
    return state_of("filter", path, {**(below or {}), ATTRIBUTES_FILE: rules}) == "lfs"


def _is_there(entry: RepoFile | None, path: str, content: bytes | Path) -> bool:
    if entry is None or (entry.lfs is None and must_be_erasable(path)):
        return False
    data = content.read_bytes() if isinstance(content, Path) else content
    if entry.lfs is not None:
        return entry.lfs.sha256 == hashlib.sha256(data).hexdigest()
    return entry.blob_id == git_hash(data)


def _commit(repo: HubRepo, state: HubState, added, deleted, message: str) -> str | None:
    """The new commit, or `None` if what is there must be looked at again first."""
    try:
        with warnings.catch_warnings():
            # A table in a model's repository is meant here.
            warnings.filterwarnings("ignore", message="It seems that you are about to commit a data file")
            return asked(_create_commit, repo, state, added, deleted, message).oid
    except (HTTPError, TransferError) as error:
        if not all(content.is_file() for content in added.values() if isinstance(content, Path)):
            # Another process deleted examples meanwhile, and with them stages.
            return None
        if isinstance(error, HfHubHTTPError) and status_of(error) == _CONFLICT:
            return None
        if not is_passing(error):
            raise
        return None


def _create_commit(repo: HubRepo, state: HubState, added, deleted, message: str) -> CommitInfo:
    operations = [CommitOperationDelete(path_in_repo=path) for path in deleted]
    operations += [
        CommitOperationAdd(path_in_repo=path, path_or_fileobj=str(content) if isinstance(content, Path) else content)
        for path, content in sorted(added.items())
    ]
    return repo.api.create_commit(
        repo.repo_id, operations, commit_message=message, parent_commit=state.commit, revision="main"
    )
