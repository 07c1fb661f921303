"""Looks at a system's folder without changing it: what is wrong, and what the next load would remove."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import FORMAT_VERSION, S3TConfig
from ..errors import ConfigError, FolderError, FormatVersionError, S3TError
from ..folder.checkpoints import is_checkpoint_current
from ..folder.files import REGROW, check_digest, read_checked, read_checked_json, stamp
from ..folder.finite import NOT_FINITE, named, non_finite_tensors
from ..folder.foreign import entries, foreign_parts, foreign_problem, is_foreign, printable
from ..folder.layout import (
    ADAPTER_FILE,
    CHECKPOINTS,
    COMPANIONS,
    CONFIG_FILE,
    HEAD_FILE,
    HISTORY,
    KEY_FILE,
    LEDGER_FILE,
    LEFTOVER_PREFIXES,
    LOCK_FILE,
    PARTS,
    PENDING_FILE,
    STAGE_FILE,
    STAGE_FILES,
    STAGES,
    TABLE_FILE,
    TRACKER_LOGS,
)
from ..folder.ledger_file import pin_of, pin_problem, read_head
from ..folder.opening import ReadOnlyFolder
from ..folder.scratch import stage_of
from ..folder.secret import load_key
from ..folder.stage_record import checked_stage
from ..folder.table_file import check_rows, read_table
from ..plan.stages import Plan, StageKey
from ..records.digests import DigestKey, KeptNames
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from .pending import PendingRequests


_ATTEMPTS = 3


@dataclass(frozen=True)
class Pending:
    """
    Something that a deletion condemned, or an interrupted write left behind: the next load removes it.

    Args:
        path (`Path`): Where it lies.
        kind (`str`): `"stage"`, `"checkpoint"`, `"leftover"`, or `"rows"` for the table of examples.
    """

    path: Path
    kind: str


@dataclass(frozen=True)
class Inspection:
    """
    What a look at a folder found.

    Args:
        problems (`tuple[str, ...]`): One sentence per problem, with the remedy; empty if all is well.
        notes (`tuple[str, ...]`): What is no problem, but good to know.
        pending (`tuple[Pending, ...]`): What the next load removes; each is among the problems too.
        checkpoints (`tuple[Path, ...]`): Unfinished checkpoints that hold nothing deleted and can be resumed.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    pending: tuple[Pending, ...]
    checkpoints: tuple[Path, ...]


def inspect(path: str | os.PathLike[str], adapters: bool = True) -> Inspection:
    """
    Read everything in a folder and say what is wrong with it: ledger, digests, validity, what does not belong there.

    Nothing is changed, no lock is taken, and no damage raises.

    Args:
        path (`str` or `os.PathLike`): The folder of the system.
        adapters (`bool`, defaults to `True`): Read the adapters too, which are nearly all of the folder's bytes.

    Returns:
        [`Inspection`]: What was found.
    """
    path = Path(path)
    for _ in range(_ATTEMPTS):
        before = stamp(Path(path) / LEDGER_FILE)
        inspector = _Inspector(path, adapters)
        inspector.run()
        if stamp(Path(path) / LEDGER_FILE) == before:
            break
        # Someone deleted meanwhile, and what was read belongs to two states of the folder.
    return inspector.result()


@dataclass
class _Inspector:
    """One look at a folder. What could be read is kept; what depends on something unreadable is passed over."""

    path: Path
    adapters: bool
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    pending: list[Pending] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)
    config: S3TConfig | None = None
    plan: Plan | None = None
    key: DigestKey | None = None
    ledger: Ledger | None = None
    table: ExampleTable | None = None
    stages: dict[StageKey, dict[str, Any]] = field(default_factory=dict)

    def result(self) -> Inspection:
        # Names from a foreign folder stand in the sentences.
        problems = tuple(dict.fromkeys(map(printable, self.problems)))
        notes = tuple(map(printable, self.notes))
        return Inspection(problems, notes, tuple(self.pending), tuple(self.checkpoints))

    def run(self) -> None:
        with self._reading(self.path):
            if not (self.path / CONFIG_FILE).is_file():
                raise FolderError(
                    f"{self.path} holds no S3T system: there is no {CONFIG_FILE}. Give the `output_dir` of a "
                    "training run."
                )
            self.problems.extend(map(foreign_problem, foreign_parts(self.path)))
            self._check_root()
            for step in (self._read_config, self._read_key, self._read_table_and_ledger):
                with self._reading(self.path):
                    step()
            with self._reading(self.path / STAGES):
                self._check_stages()
            with self._reading(self.path / CHECKPOINTS):
                self._check_checkpoints()
            with self._reading(self.path / PENDING_FILE):
                self._check_requests()

    @contextmanager
    def _reading(self, what: Path) -> Iterator[None]:
        """Turns whatever reading may raise into a sentence."""
        try:
            yield
        except S3TError as error:
            self.problems.append(str(error))
        except OSError as error:
            where = error.filename or what
            self.problems.append(f"{where} cannot be read: {error.strerror or error}. Check its permissions.")
        # A digest needs no secret: who edits a file can make it match, so that its contents may be anything. A check
        # that ends in a traceback would say less than this.
        except Exception as error:
            self.problems.append(
                f"{what} holds values that no version of hf_s3t writes ({type(error).__name__}: {error}). "
                "Restore it from a backup; do not serve this system."
            )

    # The root

    def _check_root(self) -> None:
        for entry in entries(self.path):
            name = entry.name
            if is_foreign(entry):
                self.problems.append(foreign_problem(entry))
            elif name.startswith(".tmp-"):
                self._pend(entry, "leftover")
            elif name in TRACKER_LOGS or ".tfevents." in name:
                self.notes.append(f"{entry} holds logs of training, which no deletion reaches. See `hf-s3t purge`.")
            elif name == HISTORY:
                self.notes.append(f"{entry} may hold earlier versions of the folder's files. See `hf-s3t purge`.")
            elif name not in PARTS and name not in COMPANIONS:
                self._unknown(entry)

    def _unknown(self, entry: Path) -> None:
        self.problems.append(
            f"{entry} is no part of a system: no deletion reaches what it may hold. Move it out of the folder, "
            "or remove it."
        )

    def _pend(self, path: Path, kind: str) -> None:
        self.pending.append(Pending(path, kind))
        self.problems.append(f"{path} {_PENDING[kind]}")

    # Config, key, table, ledger

    def _read_config(self) -> None:
        _require_file(self.path / CONFIG_FILE)
        record = read_checked_json(self.path / CONFIG_FILE)
        version = record.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"{self.path / CONFIG_FILE} has format version {version!r}; this hf_s3t reads version "
                f"{FORMAT_VERSION}. Install the version of hf_s3t that wrote it."
            )
        try:
            self.config = S3TConfig.from_dict(record["s3t_config"])
        except ConfigError as error:
            raise FolderError(f"{self.path / CONFIG_FILE}: {error} Restore it from a backup.") from error
        self.plan = Plan.from_config(self.config)

    def _read_key(self) -> None:
        path = self.path / KEY_FILE
        if _exists(path):
            _require_file(path)
            mode = stat.S_IMODE(os.lstat(path).st_mode)
            if os.name == "posix" and mode != 0o600:
                self.problems.append(
                    f"{path} has mode {mode:03o}, expected 600: others could test who was deleted. Run "
                    "`chmod 600` on it."
                )
        if self.config is not None:
            self.key = load_key(self.path)

    def _read_table_and_ledger(self) -> None:
        # In the order of SystemFolder: the ledger is never behind the table, nor behind its head.
        rows = pin = head = None
        with self._reading(self.path / TABLE_FILE):
            _require_file(self.path / TABLE_FILE)
            rows, pin = read_table(self.path / TABLE_FILE)
        with self._reading(self.path / HEAD_FILE):
            # Folders of earlier versions have none.
            if _exists(self.path / HEAD_FILE):
                _require_file(self.path / HEAD_FILE)
                head = read_head(self.path)
        with self._reading(self.path / LEDGER_FILE):
            self._read_ledger()
        for file, known in ((TABLE_FILE, pin), (HEAD_FILE, head)):
            problem = None if self.ledger is None or known is None else pin_problem(self.ledger, known, file)
            if problem is not None:
                self.ledger = None
                raise FolderError(problem)
        if rows is not None and self.config is not None:
            with self._reading(self.path / TABLE_FILE):
                self._mask(rows, behind=self.ledger is not None and pin != pin_of(self.ledger))

    def _read_ledger(self) -> None:
        path = self.path / LEDGER_FILE
        _require_file(path)
        try:
            text = path.read_bytes().decode()
        except UnicodeDecodeError as error:
            raise FolderError(f"{path} is not text: {error}. Restore it from a backup.") from error
        try:
            self.ledger = Ledger.parse(text)
        except FolderError as error:
            remedy = "" if str(error).endswith(".") else ". Restore it from a backup; do not serve this system."
            raise FolderError(f"{path}: {error}{remedy}") from error
        if not text.endswith("\n") and text:
            self.notes.append(
                f"{path} ends within a line. That deletion was never acknowledged; the next one takes its place."
            )

    def _mask(self, rows, behind: bool) -> None:
        config = self.config
        check_rows(self.path / TABLE_FILE, rows, config)
        table = ExampleTable(rows, config.num_shards, config.num_slices, config.seed)
        known_by_key = config.keep_ids == "plain"
        if self.ledger is None or (self.key is None and known_by_key and self.ledger.deleted):
            # Which rows are deleted cannot be told, and with it not which stages are valid.
            return
        names = KeptNames(self.key, config.keep_ids)
        deleted = [i for i in rows if names.id_digest(i) in self.ledger.deleted] if self.ledger.deleted else []
        if deleted and not behind:
            self.problems.append(
                f"{self.path / TABLE_FILE} still holds {_count(len(deleted), 'deleted example')}, though it "
                "says that it was written without. Restore it from a backup."
            )
        elif behind:
            self._pend(self.path / TABLE_FILE, "rows")
        self.table = table.without(deleted)

    # Stages

    def _check_stages(self) -> None:
        root = self.path / STAGES
        if root.is_symlink():
            return
        if not root.is_dir():
            raise FolderError(f"{root} is missing. Restore it, or make an empty folder and call `train()`.")
        for shard in entries(root):
            if shard.name == LOCK_FILE and shard.is_file():
                continue
            if not shard.name.startswith("shard-") or shard.is_symlink() or not shard.is_dir():
                self._unless_foreign(shard)
                continue
            for folder in entries(shard):
                with self._reading(folder):
                    self._check_stage_folder(folder)
        self._check_validity()

    def _unless_foreign(self, entry: Path) -> None:
        # Links and the like are told of already.
        if not is_foreign(entry):
            self._unknown(entry)

    def _check_stage_folder(self, folder: Path) -> None:
        if folder.is_symlink():
            return
        if _is_leftover(folder):
            self._pend(folder, "leftover")
            return
        key = _key_of(folder)
        if key is None or not folder.is_dir() or (self.plan is not None and key not in self.plan):
            self._unknown(folder)
            return
        for entry in entries(folder):
            if entry.name not in STAGE_FILES:
                self._unless_foreign(entry)
        _require_file(folder / STAGE_FILE, REGROW)
        record = checked_stage(folder, key, read_checked_json(folder / STAGE_FILE, REGROW))
        self.stages[key] = record
        for name, digest in record["files"].items():
            with self._reading(folder / name):
                _require_file(folder / name, REGROW)
                if self.adapters and name == ADAPTER_FILE:
                    self._check_numbers(folder, read_checked(folder / name, digest))
                elif self.adapters:
                    check_digest(folder / name, digest)

    def _check_numbers(self, folder: Path, data: bytes) -> None:
        found = non_finite_tensors(data)
        if found:
            self.problems.append(f"{folder} is NaN or infinite, in {named(found)}. {NOT_FINITE}")

    def _check_validity(self) -> None:
        if self.table is None:
            return
        for key, record in sorted(self.stages.items()):
            folder = self.path / key.path
            if record["slices"] != [self.table.slice_digest(key.shard, s) for s in key.prefix]:
                self._check_mismatch(folder)
            elif key.parent is not None and key.parent not in self.stages:
                self.problems.append(
                    f"{folder} stands on {key.parent}, which is missing. Restore it, or call `train()` to grow "
                    "it again."
                )
            elif record["below"] != self._adapter_below(key):
                self.problems.append(
                    f"{folder} was trained on another stage {key.parent} than the one that is there. Remove "
                    "its folder and call `train()` to grow it again."
                )

    def _adapter_below(self, key: StageKey) -> str | None:
        return None if key.parent is None else self.stages[key.parent]["files"][ADAPTER_FILE]

    def _check_mismatch(self, folder: Path) -> None:
        if self.ledger.num_deletions:
            self._pend(folder, "stage")
        else:
            self.problems.append(
                f"{folder} was trained on other examples than those of its slices. Remove its folder and call "
                "`train()` to grow it again."
            )

    # Checkpoints

    def _check_checkpoints(self) -> None:
        root = self.path / CHECKPOINTS
        if root.is_symlink() or not _exists(root):
            return
        for shard in entries(root):
            if shard.is_symlink() or not shard.is_dir():
                self._unless_foreign(shard)
                continue
            for folder in entries(shard):
                with self._reading(folder):
                    self._check_checkpoint_folder(folder)

    def _check_checkpoint_folder(self, folder: Path) -> None:
        key = _trained_in(folder)
        if folder.is_symlink():
            return
        if key is None or not folder.is_dir() or (self.plan is not None and key not in self.plan):
            self._unknown(folder)
            return
        for entry in entries(folder):
            if entry.is_symlink():
                continue
            is_checkpoint = entry.name.startswith("checkpoint-")
            if not is_checkpoint and entry.name != STAGE_FILE:
                if entry.name not in TRACKER_LOGS and entry.name != LOCK_FILE:
                    self._unknown(entry)
            elif not self._is_current(entry, key):
                self._pend(entry, "checkpoint")
            elif is_checkpoint:
                self.checkpoints.append(entry)

    def _is_current(self, checkpoint: Path, key: StageKey) -> bool:
        if self.table is None:
            # Whether it is cannot be told; what is wrong with the table is said already.
            return True
        slices = [self.table.slice_digest(key.shard, s) for s in key.prefix]
        return is_checkpoint_current(checkpoint, slices, self.ledger)

    # Requests that wait

    def _check_requests(self) -> None:
        # A folder that cannot be opened has problems enough, which are told already.
        if not _exists(self.path / PENDING_FILE) or len(self.problems) > len(self.pending):
            return
        _require_file(self.path / PENDING_FILE)
        requests = PendingRequests(ReadOnlyFolder(self.path))
        due, waiting = requests.apply_by(), len(requests.ids())
        if waiting:
            by = "" if due is None else f" by the first load of the model after {due.isoformat(timespec='seconds')}"
            self.notes.append(f"{self.path / PENDING_FILE}: {_count(waiting, 'example')} wait to be deleted{by}.")


_NEXT_LOAD = "The next load (`hf-s3t purge`, say) finishes the removal."
_PENDING = {
    "stage": f"saw an example that was deleted since: its removal is under way or was interrupted. {_NEXT_LOAD}",
    "checkpoint": f"saw, or may have seen, an example that was deleted since. {_NEXT_LOAD}",
    "leftover": f"is left of a write or a removal that is under way or was interrupted. {_NEXT_LOAD}",
    "rows": f"was written before the last deletion, so that deleted rows may still be in it. {_NEXT_LOAD}",
}


def _require_file(path: Path, advice: str = "Restore it from a backup.") -> None:
    if is_foreign(path):
        raise FolderError(foreign_problem(path))
    if path.is_dir():
        raise FolderError(f"{path} is a folder, expected a file. {advice}")
    if not _exists(path):
        raise FolderError(f"{path} is missing. {advice}")


def _key_of(folder: Path) -> StageKey | None:
    """The stage that a folder is the address of."""
    try:
        return StageKey.from_path(f"{STAGES}/{folder.parent.name}/{folder.name}")
    except FolderError:
        return None


def _trained_in(folder: Path) -> StageKey | None:
    """The stage whose checkpoints a folder is for."""
    try:
        return stage_of(folder)
    except FolderError:
        return None


def _is_leftover(path: Path) -> bool:
    return path.name.startswith(LEFTOVER_PREFIXES)


def _exists(path: Path) -> bool:
    return os.path.lexists(path)


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")
