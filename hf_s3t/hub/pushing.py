"""The repository of a system on the Hub: reading it, and bringing a system there in one commit."""

import contextlib
import hashlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    RepoFile,
    constants,
    hf_hub_download,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id
from huggingface_hub.utils.sha import git_hash
from yaml import YAMLError

from ..errors import ConfigError, FolderError, HubError, MergeNeededError, S3TError, TransferError
from ..folder.files import digested_json, make_folders, read_checked_json, write_atomically
from ..folder.system import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    LEDGER_FILE,
    STAGE_FILE,
    STAGES,
    TABLE_FILE,
    SystemFolder,
    is_stage_record,
)
from ..folder.table_file import pin_of, write_table
from ..plan.stages import StageKey
from ..records.examples import PUBLIC_SECRET, DigestKey
from ..records.ledger import Ledger
from .git_attributes import ATTRIBUTES_FILE, state_of


INDEX_FILE = f"{STAGES}/index.json"
CARD_FILE = "README.md"
_LARGE = "filter=lfs diff=lfs merge=lfs -text"
_STAGE_FILES = (ADAPTER_CONFIG_FILE, ADAPTER_FILE, STAGE_FILE)
# What the index repeats of each stage's record: all that choosing and checking stages needs.
_INDEXED = ("files", "slices", "below", "recipe")
_INDEXED_METRICS = ("eval_loss", "train_runtime")
_ATTEMPTS = 6
_LONGEST_WAIT = 8.0
_CONFLICT = 412
# What two copies of one system have in common.
_OF_A_SYSTEM = ("key_check", "s3t_config", "base_model", "peft_config", "layers", "head")
_Result = TypeVar("_Result")
# From the folder, the card so far and whether nothing was deleted since it, to files beside the system by their names.
Describe = Callable[[SystemFolder, str | None, bool], Mapping[str, bytes]]


def state_folder(repo_id: str, record: Mapping[str, Any] | None = None) -> Path:
    """
    Where this machine remembers the deletions of a repository: a folder without weights, outside the Hub's cache.

    Each system has its own: where a repository was deleted and another system pushed under its name, the deletions of
    the former stay remembered, for its revisions, and those of the two never mix.

    Args:
        repo_id (`str`): The repository, such as `"me/llama-s3t"`.
        record (mapping, *optional*):
            What `s3t_config.json` says of the system, which is known by the check of its secret. Without it, the
            folder that holds those of all systems which were ever in the repository.
    """
    home = os.environ.get("HF_S3T_HOME") or Path(constants.HF_HOME) / "s3t"
    host = urlsplit(constants.ENDPOINT).netloc.replace(":", "_")
    folder = Path(home) / host / repo_folder_name(repo_id=repo_id, repo_type="model")
    if record is None:
        return folder
    check = record.get("key_check")
    if not isinstance(check, str):
        raise FolderError(
            f"{CONFIG_FILE} of {repo_id} has the key_check {check!r}, expected a digest. Push the system again from "
            "its folder."
        )
    # Hashed: what comes from the Hub does not name folders here.
    return folder / hashlib.sha256(check.encode()).hexdigest()[:16]


def warn_of_other_systems(repo_id: str, record: Mapping[str, Any]) -> None:
    """Say where deletions are remembered of other systems that were in a repository, and that they stay theirs."""
    ours = state_folder(repo_id, record)
    for ledger in sorted(state_folder(repo_id).glob(f"*/{LEDGER_FILE}")):
        if ledger.parent != ours and read_ledger(ledger).num_deletions:
            warnings.warn(
                f"{repo_id} held another system, of which this machine remembers deletions ({ledger.parent}). They "
                "stay in force for its revisions; of the system that is there now they delete nothing. Unlearn there "
                "what it must forget too.",
                stacklevel=2,
            )


def is_repo_id(path: str | os.PathLike) -> bool:
    """Whether a text can name a repository on the Hub: an owner and a name."""
    if not isinstance(path, str) or path.count("/") != 1:
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def patiently(call: Callable[..., _Result], *args, **kwargs) -> _Result:
    """
    Call the Hub again where it fails for a moment (5xx, 429, a broken connection). For calls that may be repeated.

    Args:
        call (callable): A method of the client.
        *args: For the call.
        **kwargs: For the call.
    """
    for attempt in range(_ATTEMPTS - 1):
        try:
            return asked(call, *args, **kwargs)
        except (HTTPError, TransferError) as error:
            if not is_passing(error):
                raise
        time.sleep(min(0.5 * 2**attempt, _LONGEST_WAIT))
    return asked(call, *args, **kwargs)


def asked(call: Callable[..., _Result], *args, **kwargs) -> _Result:
    """
    Call the Hub. Where the transfer of a file, by Xet or LFS, raises what Python has for anything, that is told.

    Args:
        call (callable): A method of the client.
        *args: For the call.
        **kwargs: For the call.

    Raises:
        [`~hf_s3t.errors.TransferError`]: If the client raised no error of its own.
    """
    try:
        return call(*args, **kwargs)
    except (HTTPError, EntryNotFoundError, OfflineModeIsEnabled, HFValidationError, S3TError):
        raise
    except (OSError, RuntimeError, ValueError, XetDownloadError) as error:
        if isinstance(error.__cause__, HTTPError):
            # The client wraps what the upload of a file ended with.
            raise error.__cause__ from error
        raise TransferError(
            f"A file could not be transferred ({type(error).__name__}: {_sentence(error)}). See that the token is "
            "valid, the connection stands and there is room in the cache, then call again; what was done is not done "
            "twice."
        ) from error


def is_passing(error: Exception) -> bool:
    """Whether an error of the Hub may be gone when it is asked again."""
    if isinstance(error, TransferError):
        return isinstance(error.__cause__, (RuntimeError, ConnectionError, TimeoutError, XetDownloadError))
    if isinstance(error, (OfflineModeIsEnabled, EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)):
        return False
    return not isinstance(error, HfHubHTTPError) or status_of(error) >= 500 or status_of(error) == 429


def status_of(error: HfHubHTTPError) -> int:
    """The status the Hub answered with, 0 if it did not."""
    return getattr(error.response, "status_code", 0) or 0


@contextlib.contextmanager
def told(repo_id: str, doing: str) -> Iterator[None]:
    """Turn the client's errors into sentences with a remedy."""
    try:
        yield
    except HFValidationError as error:
        raise HubError(f"{repo_id} names no repository: {_sentence(error)}. Give one such as me/llama-s3t.") from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id} is not on the Hub, or your token may not see it. Check the name; for a private repository log "
            "in with `hf auth login` or give `token`."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no such revision. Give a branch, a tag or a commit id that it has.") from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{repo_id} cannot be reached, and what is needed of it is not in the cache. Go online, then call again: "
            "what is fetched once serves offline too."
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"{doing}: {repo_id} lacks a file. {_sentence(error)}") from error
    except HfHubHTTPError as error:
        raise HubError(f"{doing}: {_refusal(repo_id, error)}") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"{doing}: the Hub cannot be reached ({_sentence(error)}). Go online, then call again."
        ) from error


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = status_of(error)
    if status == 401:
        return "the Hub does not accept the token. Log in with `hf auth login`, or give a valid `token`."
    if status == 403:
        return f"the token may not write to {repo_id}. Give one with write access."
    return f"the Hub answered {status or 'nothing'} ({_sentence(error)}). Call again; what was done is not done twice."


def _sentence(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


@dataclass(frozen=True)
class HubState:
    """
    A system as it stands in one commit of a repository.

    Args:
        commit (`str`): The commit.
        tree (`dict[str, RepoFile]`): All files by their paths.
        record (`dict`, *optional*): What `s3t_config.json` says; `None` where the repository holds no system.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The ledger.
        stages (`dict`): What the index says of each stage.
    """

    commit: str
    tree: dict[str, RepoFile]
    record: dict[str, Any] | None = None
    ledger: Ledger = field(default_factory=Ledger)
    stages: dict[StageKey, dict[str, Any]] = field(default_factory=dict)


class HubRepo:
    """
    One repository, through the client of `huggingface_hub`.

    Args:
        repo_id (`str`): Such as `"me/llama-s3t"`.
        token (`str`, *optional*): The token; the one of `hf auth login` if not given.
        cache_dir (`str` or `os.PathLike`, *optional*): The Hub's cache; the usual one if not given.
    """

    def __init__(self, repo_id: str, token: str | None = None, cache_dir: str | os.PathLike | None = None):
        self.repo_id, self.token, self.cache_dir = repo_id, token, cache_dir
        self.api = HfApi(token=token)

    def download(self, name: str, revision: str | None = None) -> Path:
        """A file of the repository, from the cache where it is there; see `hf_hub_download`."""
        found = patiently(
            hf_hub_download, self.repo_id, name, revision=revision, token=self.token, cache_dir=self.cache_dir
        )
        return Path(found)

    def state(self) -> HubState:
        """What the main branch holds now."""
        commit = patiently(self.api.repo_info, self.repo_id).sha
        listed = patiently(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)))
        tree = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        if CONFIG_FILE not in tree:
            return HubState(commit, tree)
        return HubState(
            commit,
            tree,
            read_checked_json(self.download(CONFIG_FILE, commit)),
            self.ledger(commit),
            read_index(self.download(INDEX_FILE, commit))["stages"],
        )

    def ledger(self, revision: str) -> Ledger:
        """The ledger of a revision."""
        return read_ledger(self.download(LEDGER_FILE, revision))

    def card(self, state: HubState) -> str | None:
        """The card of a state; `None` where none can be read, for a deletion does not wait until it is mended."""
        if CARD_FILE not in state.tree:
            return None
        try:
            text = self.download(CARD_FILE, state.commit).read_bytes().decode()
            _ = ModelCard(text, ignore_metadata_errors=True)
        except (ValueError, YAMLError) as error:
            warnings.warn(
                f"The {CARD_FILE} of {self.repo_id} cannot be read ({_sentence(error)}), so what it said of datasets, "
                "licence and evaluation is not kept. Give `datasets`, `license` and `evaluation` with a push.",
                stacklevel=2,
            )
            return None
        return text


def read_ledger(path: Path) -> Ledger:
    """
    The ledger in a file that came from the Hub, or is kept for what did.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the file is none.
    """
    try:
        return Ledger.parse(path.read_bytes().decode())
    except UnicodeDecodeError as error:
        raise FolderError(
            f"{path} is not text: {error}. Restore it from a backup, or push the system again."
        ) from error
    except FolderError as error:
        raise type(error)(f"{path}: {error}") from error


def read_index(path: Path) -> dict[str, Any]:
    """
    The index of a repository's stages: `stages` by key, `slices` by (shard, slice), and the ledger's pin.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it does not say of each stage what the record of a stage says.
    """
    index = read_checked_json(path)
    try:
        stages = {StageKey.from_path(f"{STAGES}/{name}"): dict(record) for name, record in index["stages"].items()}
        slices = {tuple(map(int, place.split("/"))): str(digest) for place, digest in index["slices"].items()}
        pin = str(index["ledger"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FolderError(
            f"{path} is no index of a system's stages ({type(error).__name__}: {error}). Push the system again "
            "from its folder."
        ) from error
    damaged = next((key for key, record in stages.items() if not is_stage_record(record)), None)
    if damaged is not None:
        raise FolderError(
            f"{path} says of {damaged} other than files, slices, below and metrics as they were written. Push the "
            "system again from its folder."
        )
    return {**index, "stages": stages, "slices": slices, "ledger": pin}


def _index_of(folder: SystemFolder, stages: Mapping[StageKey, Mapping[str, Any]]) -> dict[str, Any]:
    return {
        "ledger": pin_of(folder.ledger),
        "slices": {
            f"{shard}/{slice_}": folder.table.slice_digest(shard, slice_)
            for shard in range(folder.config.num_shards)
            for slice_ in range(folder.config.num_slices)
        },
        "stages": {str(key): _indexed(record) for key, record in sorted(stages.items())},
    }


def _indexed(record: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {name: value for name, value in record["metrics"].items() if name in _INDEXED_METRICS}
    return {**{name: record.get(name) for name in _INDEXED}, "metrics": metrics}


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
        for attempt in range(_ATTEMPTS):
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
            time.sleep(min(0.25 * 2**attempt, _LONGEST_WAIT))
    raise HubError(
        f"{repo.repo_id} changed, or failed, at each of {_ATTEMPTS} attempts to push. Call again; what was uploaded "
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
    wanted[INDEX_FILE] = digested_json(_index_of(folder, stages))
    wanted |= describe(folder, card, state.record is not None and state.ledger.deleted == folder.ledger.deleted)
    kept = {f"{key.path}/{name}" for key in stages for name in _STAGE_FILES}
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
    files = [state.tree.get(f"{key.path}/{name}") for name in _STAGE_FILES]
    adapter = state.tree.get(f"{key.path}/{ADAPTER_FILE}")
    return all(files) and (adapter.lfs is None or adapter.lfs.sha256 == record["files"][ADAPTER_FILE])


def _fits(folder: SystemFolder, key: StageKey, record: Mapping[str, Any], chosen: Mapping[StageKey, Any]) -> bool:
    if record["slices"] != folder.slice_digests(key):
        return False
    if key.parent is None:
        return True
    return key.parent in chosen and record["below"] == chosen[key.parent]["files"][ADAPTER_FILE]


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


def remember(repo_id: str, record: Mapping[str, Any], ledger: Ledger) -> Ledger:
    """
    Have every copy of a system in a repository on this machine, of whatever revision, follow a ledger's deletions.

    Args:
        repo_id (`str`): The repository.
        record (mapping): What `s3t_config.json` says of the system.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): What was recorded.

    Returns:
        [`~hf_s3t.records.ledger.Ledger`]: What this machine knows now. Where it may write nothing, that is not kept.
    """
    path = state_folder(repo_id, record)
    file = path / LEDGER_FILE
    if not may_remember(path):
        return read_ledger(file).merge(ledger) if file.exists() else ledger
    make_folders(path / STAGES)
    with FileLock(path / STAGES / ".lock", is_singleton=True):
        known = read_ledger(file) if file.exists() else None
        merged = ledger if known is None else known.merge(ledger)
        if merged is not known:
            write_atomically(file, merged.text.encode())
    return merged


def may_remember(state: Path) -> bool:
    """
    Whether deletions can be written down in a state folder.

    A server whose home is read-only serves what is valid by what it reads, and refuses to delete.
    """
    there = next(folder for folder in (state / STAGES, state, *state.parents) if folder.exists())
    return os.access(there, os.W_OK)
