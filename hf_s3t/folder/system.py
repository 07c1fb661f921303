"""A system's folder: its files, written atomically, checked when read (the format of `docs/format.md`)."""

import contextlib
import errno
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path, PureWindowsPath
from typing import Any

from filelock import FileLock

from ..config import FORMAT_VERSION, S3TConfig
from ..errors import FolderError, FormatVersionError, KeyMissingError
from ..plan.stages import Plan, StageKey
from ..records.digests import KEY_FILE, KEY_VARIABLE, DigestKey, KeptNames
from ..records.examples import Example, ExampleTable
from ..records.ledger import Ledger
from .checkpoints import is_checkpoint_current
from .files import (
    REGROW,
    Stamp,
    check_digest,
    digested_json,
    explained,
    file_digest,
    is_read_only,
    make_folders,
    read_checked,
    read_checked_json,
    remove,
    stamp,
    sync,
    sync_above,
    unreadable,
    write_atomically,
    write_checked_json,
)
from .foreign import forgeries_told
from .layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CHECKPOINTS,
    COMPANIONS,
    CONFIG_FILE,
    COST_FILE,
    HEAD_FILE,
    LEDGER_FILE,
    LEFTOVERS,
    PENDING_FILE,
    PROTOTYPES_FILE,
    STAGE_FILE,
    STAGES,
    TABLE_FILE,
)
from .ledger_file import holds, lines_lost, pin_of, read_head, write_head
from .scratch import LOCK_FILE, folders_below, folders_of, hold, names_in, stage_of, unused
from .stage_record import checked_stage
from .table_file import check_rows, read_table, write_table
from .versions import library_versions


_IN_FORCE = (
    "The deletions in the ledger are in force. Make room, or make the folder writable, then load it again: that "
    "finishes the removal."
)
# How often a copy is begun that a deletion, or the end of one, interrupts.
_COPIES = 5
# What is copied as it is, besides stages. Config, table and ledger are written anew, from what was read.
_COPIED = COMPANIONS - {".cache"} | {KEY_FILE, PENDING_FILE, COST_FILE, PROTOTYPES_FILE}


class SystemFolder:
    """
    The folder of one system, and what it says: settings, table, ledger, and which stages are valid.

    Holds no tensors. Every write is synced and renamed into place; every read is checked against a digest.

    Args:
        path (`str` or `os.PathLike`): The folder. It must hold a system; see [`SystemFolder.create`].

    Raises:
        [`~hf_s3t.errors.FolderError`]: If a file is missing, truncated or altered.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        if not (self.path / CONFIG_FILE).is_file():
            raise FolderError(
                f"{self.path} holds no S3T system: there is no {CONFIG_FILE}. Give the `output_dir` of a training run "
                "or the folder of `save_pretrained`."
            )
        with forgeries_told(self.path, "`hf-s3t check` says where; restore the folder from a backup."):
            self._begin(self.path / CONFIG_FILE)
            self._use(DigestKey.load(self.path))
            self.refresh()

    def _begin(self, config_file: Path) -> None:
        self.record = read_checked_json(config_file)
        version = self.record.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatVersionError(
                f"{config_file} has format version {version!r}; this hf_s3t reads version {FORMAT_VERSION}. Install "
                "the version of hf_s3t that wrote it."
            )
        self.config = S3TConfig.from_dict(self.record["s3t_config"])
        self.plan = Plan.from_config(self.config)
        self.ledger = Ledger()
        self._stages: dict[StageKey, dict[str, Any]] = {}
        # By which the record of a stage that was read is told from one that was written since.
        self._stage_stamps: dict[StageKey, Stamp | None] = {}
        # Stages that a deletion recorded through this object condemned, and that are not removed yet.
        self._condemned: dict[StageKey, dict[str, Any]] = {}
        # The folders for checkpoints that are held through this object.
        self._scratch: set[Path] = set()
        # How many lines of the ledger are known to be synced, and the lines that the table on the disk goes by.
        self._settled = 0
        self._table_pin = ""
        # Held while ledger and table are read and taken over: of two threads the one that read less must not win. Who
        # holds it waits for nothing, so that it may be taken inside the folder's lock.
        self._reading = threading.RLock()

    def _use(self, key: DigestKey) -> None:
        if key.check != self.record.get("key_check"):
            raise KeyMissingError(
                f"The secret in {KEY_VARIABLE} or {self.path / KEY_FILE} is not the one that this system's digests "
                "were made with: its deletions could not be recognised. Restore the file, or set the variable to what "
                "it was at training."
            )
        self.key = key
        self.names = KeptNames(key, self.config.keep_ids)

    @classmethod
    def create(
        cls, path: str | os.PathLike, record: Mapping[str, Any], rows: Mapping[int | str, Example], key: DigestKey
    ) -> "SystemFolder":
        """
        Make a new system: the table, an empty ledger, and last the config, whose presence makes it a system.

        Args:
            path (`str` or `os.PathLike`): The folder, which may exist.
            record (mapping): What `s3t_config.json` says besides the format version.
            rows (mapping from id to [`~hf_s3t.records.examples.Example`]): The table.
            key ([`~hf_s3t.records.digests.DigestKey`]): The secret the rows were digested with.
        """
        path = Path(path)
        make_folders(path / STAGES)
        # Whoever made the folder did so for this system, a moment ago.
        sync_above(path)
        config = S3TConfig.from_dict(record["s3t_config"])
        table = ExampleTable(dict(rows), config.num_shards, config.num_slices, config.seed)
        write_table(path / TABLE_FILE, table, Ledger())
        write_atomically(path / LEDGER_FILE, b"")
        write_head(path, Ledger())
        write_checked_json(path / CONFIG_FILE, {"format_version": FORMAT_VERSION, "key_check": key.check, **record})
        return cls(path)

    @staticmethod
    def exists(path: str | os.PathLike) -> bool:
        """
        Whether the folder holds a system.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If it holds stages or deletions of a system whose config is missing.
        """
        path = Path(path)
        if (path / CONFIG_FILE).is_file():
            return True
        ledger = path / LEDGER_FILE
        if any(path.glob(f"{STAGES}/shard-*/*")) or (ledger.is_file() and ledger.stat().st_size):
            raise FolderError(
                f"{path / CONFIG_FILE} is missing, but the folder holds stages or deletions of a system. Restore it "
                "from a backup, or choose another folder."
            )
        return False

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """
        The lock under which deletions are recorded and stages renamed into place.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the folder cannot be written to.
        """
        with _locked(self.path):
            yield

    @staticmethod
    @contextlib.contextmanager
    def making(path: str | os.PathLike) -> Iterator[None]:
        """
        The lock under which a folder becomes a system: of two trainers that begin at once, one makes it.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the folder cannot be written to.
        """
        make_folders(Path(path) / STAGES)
        with _locked(Path(path)):
            yield

    # What is there

    def refresh(self) -> None:
        """
        Read ledger, table and stages again, and finish a removal that something interrupted.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a file is damaged, or the ledger no longer holds what was read before.
        """
        self._read_all()
        self._finish_removal()

    def _read_all(self) -> None:
        with self._reading:
            # The table first: the ledger is never behind it, whatever another process does between the two reads.
            rows, pin = self._read_rows()
            ledger = self._read_ledger()
            # A compaction in another thread may see one of the two before the other: rows leave before a line says so.
            self.table = self._table_of(rows, pin, ledger)
            self.ledger = ledger
            self._table_pin = pin
        self.refresh_stages()

    @property
    def is_table_behind(self) -> bool:
        """Whether lines came to the ledger since the table on the disk was written: it may hold deleted rows."""
        return self._table_pin != pin_of(self.ledger)

    def is_deleted(self, example_id: int | str) -> bool:
        """Whether the ledger knows the id as deleted."""
        return self.names.id_digest(self.names.of_id(example_id)) in self.ledger.deleted

    @property
    def stages(self) -> list[StageKey]:
        """The stages that have a folder, valid or not."""
        return list(self._stages)

    def stage_record(self, key: StageKey) -> dict[str, Any]:
        """What `stage.json` says."""
        return self._stages[key]

    @property
    def stage_records(self) -> Mapping[StageKey, dict[str, Any]]:
        """What `stage.json` says of each stage that has a folder."""
        return self._stages

    def stages_stamp(self) -> tuple[Stamp | None, ...]:
        """What changes when a stage comes or goes, at one look at the folder of each shard: every call takes one."""
        return tuple(map(stamp, self._shard_folders))

    @cached_property
    def _shard_folders(self) -> tuple[str, ...]:
        return tuple(f"{self.path / STAGES}/shard-{shard}" for shard in range(self.plan.num_shards))

    def slice_digests(self, key: StageKey) -> list[str]:
        """The digests of the slices of a stage as they are now."""
        return [self.table.slice_digest(key.shard, s) for s in key.prefix]

    def adapter_digest(self, key: StageKey) -> str:
        """The digest of a stage's adapter file, as it was written."""
        return self._stages[key]["files"][ADAPTER_FILE]

    def is_valid(self, key: StageKey) -> bool:
        """
        Whether the stage exists, saw exactly the remaining examples of its slices, and stands on the stages that are
        there.
        """
        return all(stage in self._stages and self._fits(stage) for stage in key.lineage)

    def _fits(self, key: StageKey) -> bool:
        """Whether a stage saw what its slices hold now, and stands on the parent that is there."""
        record, parent = self._stages[key], key.parent
        return record["slices"] == self.slice_digests(key) and (
            parent is None or record["below"] == self.adapter_digest(parent)
        )

    @property
    def valid_stages(self) -> frozenset[StageKey]:
        """The planned stages that are valid."""
        valid: set[StageKey] = set()
        for key in self.plan.stages():
            # Parents come first, so one look at the parent stands for the whole lineage.
            if key in self._stages and (key.parent is None or key.parent in valid) and self._fits(key):
                valid.add(key)
        return frozenset(valid)

    def losses(self) -> dict[StageKey, float]:
        """The evaluation loss recorded with each stage that has one."""
        return {
            key: record["metrics"]["eval_loss"]
            for key, record in self._stages.items()
            if "eval_loss" in record["metrics"]
        }

    def adapter_path(self, key: StageKey) -> Path:
        """
        The folder of a stage whose files are as they were written.

        What is loaded from it by name may have changed since: load what `read_adapter` returns.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a file is missing, truncated or altered.
        """
        self.check_files(key, self._stages[key])
        return self._stage_file(key, ADAPTER_FILE).parent

    def check_files(self, key: StageKey, record: Mapping[str, Any]) -> None:
        """
        Check that the files of a stage are those that a record of it names.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If one is missing, truncated or altered.
        """
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            check_digest(self._stage_file(key, name), record["files"][name])

    def read_adapter(self, key: StageKey) -> bytes:
        """
        The bytes of a stage's adapter file, as it was written, read once.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a file of the stage is missing, truncated or altered.
        """
        files = self._stages[key]["files"]
        check_digest(self._stage_file(key, ADAPTER_CONFIG_FILE), files[ADAPTER_CONFIG_FILE])
        return read_checked(self._stage_file(key, ADAPTER_FILE), files[ADAPTER_FILE])

    def _stage_file(self, key: StageKey, name: str) -> Path:
        return self.path / key.path / name

    def stage_paths(self, key: StageKey) -> dict[str, Path]:
        """The files of a stage by their names."""
        return {name: self.path / key.path / name for name in (ADAPTER_CONFIG_FILE, ADAPTER_FILE, STAGE_FILE)}

    def companions(self) -> dict[str, Path]:
        """The files of the tokenizer or processor that lie beside the system, by their names."""
        ours = {"README.md", "stacks.svg", ".gitattributes", ".gitignore"}
        found = {name: self.path / name for name in sorted(COMPANIONS - ours)}
        return {name: path for name, path in found.items() if path.is_file()}

    def config_bytes(self) -> bytes:
        """`s3t_config.json` as others may have it: of a base that is a folder of this machine, only the name."""
        base = self.record["base_model"]
        if base.get("id") is None or self.base_id is not None:
            return (self.path / CONFIG_FILE).read_bytes()
        name = PureWindowsPath(base["id"]).name
        return digested_json({**self.record, "base_model": {**base, "id": None, "folder": name}})

    @property
    def base_id(self) -> str | None:
        """The id that others can load the base by; `None` if it is a folder of this machine, or was made in memory."""
        base = self.record["base_model"]
        base_id = base.get("id")
        # What came from the Hub came in a revision of it.
        if not base_id or base.get("revision"):
            return base_id
        is_path = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base_id) is None
        return None if is_path or os.path.isdir(base_id) else base_id

    @property
    def base_revision(self) -> str | None:
        """The revision of the base that others can load by `base_id`, if it came from a repository."""
        return self.record["base_model"].get("revision") if self.base_id is not None else None

    def prepare(self) -> None:
        """Compute now what the first deletion would otherwise wait for."""
        self.table.index()

    # Writing

    def write_stage(self, key: StageKey, record: Mapping[str, Any], fill: Callable[[Path], None]) -> bool:
        """
        Write a stage: to a temporary folder, synced, then renamed, after the ledger was read again.

        Args:
            key ([`StageKey`]): The stage.
            record (mapping): What `stage.json` shall say; `slices` are the digests it was trained on.
            fill (callable): Called with the temporary folder to write the adapter into.

        Returns:
            `bool`: False if a deletion that came meanwhile touches the stage, or what it stands on is not there any
                more; it is then discarded. Where another process made the same stage first, that one stays, and
                `stage_record` says what is there.
        """
        target = self.path / key.path
        temporary = target.with_name(f".tmp-{target.name}-{uuid.uuid4().hex[:8]}")
        # Under the lock from the start: who finds a temporary folder while holding it knows that its writer is dead.
        with self.lock():
            make_folders(target.parent)
            temporary.mkdir()
            try:
                fill(temporary)
                files = {name: file_digest(temporary / name) for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE)}
                record = {**record, "stage": str(key), "files": files}
                write_checked_json(temporary / STAGE_FILE, record)
                for file in temporary.iterdir():
                    sync(file)
                sync(temporary)
                self.refresh_ledger()
                if record["slices"] != self.slice_digests(key) or record["below"] != self._below_now(key):
                    self.remove_checkpoints(key)
                    return False
                there = self._record_there(key)
                if there is None or any(there[part] != record[part] for part in ("slices", "below")):
                    self._discard([target])
                    os.rename(temporary, target)
                    sync(target.parent)
                else:
                    # Another process made the same stage meanwhile, and others may stand on it.
                    record = there
                self._note(key, record)
                self.remove_checkpoints(key)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _record_there(self, key: StageKey) -> dict[str, Any] | None:
        """What lies in a stage's folder now; `None` if that is no intact stage."""
        try:
            record = self._read_stage(key)
            self.check_files(key, record)
        except FolderError:
            return None
        return record

    def _below_now(self, key: StageKey) -> str | None:
        """The digest of the adapter that lies now under the stage that another stands on."""
        if key.parent is None:
            return None
        below = self._record_there(key.parent)
        return None if below is None else below["files"][ADAPTER_FILE]

    def _note(self, key: StageKey, record: dict[str, Any]) -> None:
        with self._reading:
            self._stages[key], self._stage_stamps[key] = record, self._stamp_of(key)

    def _stamp_of(self, key: StageKey) -> Stamp | None:
        return stamp(f"{self.path}/{key.path}/{STAGE_FILE}")

    def record_deletion(self, ids, removed: list[StageKey], versions: Mapping[str, str], groups=()) -> None:
        """Append a deletion to the ledger and sync it. After this the deletion is in force, whatever happens."""
        gone = set(removed)
        stays = {str(k): r["files"][ADAPTER_FILE] for k, r in self._stages.items() if k not in gone}
        self._append(
            self.ledger.append(
                "deletion",
                ids=map(self.names.id_digest, ids),
                groups=map(self.names.group_digest, groups),
                removed={str(k): self._stages[k]["files"][ADAPTER_FILE] for k in removed},
                left=stays,
                versions=dict(versions),
            )
        )
        with self._reading:
            self.table = self.table.without(ids)
            # That these no longer match their slices needs no computing.
            self._condemned |= {key: self._stages.pop(key) for key in removed}

    def merge_ledger(self, other: Ledger) -> list[StageKey]:
        """
        Take in what another copy of the system recorded (on the Hub, say); its deletions are in force on return.

        Args:
            other ([`~hf_s3t.records.ledger.Ledger`]): The other copy's ledger.

        Returns:
            `list[StageKey]`: The stages that went because of it.
        """
        with self.lock():
            self.refresh()
            merged = self.ledger.merge(other)
            if merged is self.ledger:
                return []
            self._replace_ledger(merged)
            condemned = self.condemned_stages()
            self.remove_stages(condemned)
            self.remove_stale_checkpoints()
            self._compact()
        return condemned

    def _replace_ledger(self, ledger: Ledger) -> None:
        advice = "Nothing was removed. Make room, or make it writable, then call again."
        with self._reading:
            with explained(f"{self.path / LEDGER_FILE} could not be written", advice):
                write_atomically(self.path / LEDGER_FILE, ledger.text.encode())
            self.table = self._masked(self.table, ledger)
            self.ledger = ledger
            self._settled = len(ledger.lines)
            self._ledger_stamp = stamp(self.path / LEDGER_FILE)
        self._write_head()

    def record_export(self, key: StageKey, versions: Mapping[str, str]) -> None:
        """Note in the ledger that a stack was handed out as a plain adapter, which must be revoked by hand."""
        self._record_handing_out(key.lineage, versions)

    def _record_handing_out(self, keys: Iterable[StageKey], versions: Mapping[str, str]) -> None:
        self.refresh_ledger()
        digests = {str(k): self._stages[k]["files"][ADAPTER_FILE] for k in keys}
        self._append(self.ledger.append("export", ids=(), removed=digests, left={}, versions=dict(versions)))

    def remove_stages(self, keys: Iterable[StageKey]) -> None:
        """
        Remove stages that a deletion condemned; each goes by one rename first. The folder's lock must be held.

        What another process grew again under a condemned name, on what is left, stays.
        """
        keys = list(keys)
        grown = {key: record for key in keys if (record := self._grown_again(key)) is not None}
        with explained(f"Stages of {self.path} could not be removed", _IN_FORCE):
            self._discard([self.path / key.path for key in keys if key not in grown])
        with self._reading:
            for key in keys:
                self._stages.pop(key, None)
                self._condemned.pop(key, None)
            for key, record in grown.items():
                self._note(key, record)

    def _grown_again(self, key: StageKey) -> dict[str, Any] | None:
        """The record of what lies under the name of a condemned stage, if that saw nothing that was deleted."""
        with contextlib.suppress(FolderError):
            record = self._read_stage(key)
            return record if record["slices"] == self.slice_digests(key) else None
        return None

    def remove_stale_checkpoints(self) -> None:
        """
        Remove unfinished checkpoints of stages whose slices are no longer what they saw. The folder's lock must be
        held, and what the folder says be as it is on the disk.
        """
        for checkpoint in self._stale_checkpoints():
            remove(checkpoint)

    def _stale_checkpoints(self) -> list[Path]:
        stale = []
        for folder in folders_below(self.path / CHECKPOINTS):
            # What others put there is not ours to judge, and no reason to leave a deletion half done.
            with contextlib.suppress(FolderError):
                slices = self.slice_digests(stage_of(folder))
                names = (name for name in names_in(folder) if name.startswith("checkpoint-") or name == STAGE_FILE)
                stale += [c for name in names if not is_checkpoint_current(c := folder / name, slices, self.ledger)]
        return stale

    @contextlib.contextmanager
    def scratch(self, key: StageKey, slices: list[str]) -> Iterator[Path]:
        """
        A folder for the checkpoints of a stage in training that no other trainer touches.

        What a trainer that ended left there can be resumed from. The folder stays until the stage is written.

        Args:
            key ([`StageKey`]): The stage.
            slices (`list[str]`): The digests of what it is trained on.
        """
        first = self.checkpoints(key)
        # Under the lock, as every removal of such a folder.
        with self.lock():
            for folder in (*folders_of(first), *unused(first)):
                make_folders(folder)
                lock = hold(folder)
                if lock is not None:
                    break
            # By this a checkpoint without a record of its own is judged.
            write_checked_json(folder / STAGE_FILE, {"slices": slices})
            self._scratch.add(folder)
        try:
            yield folder
        finally:
            self._scratch.discard(folder)
            lock.release()

    def has_checkpoints(self, key: StageKey) -> bool:
        """Whether there is a folder for checkpoints of a stage, or was a moment ago."""
        return bool(folders_of(self.checkpoints(key)))

    def remove_checkpoints(self, key: StageKey) -> None:
        """
        Remove the unfinished checkpoints of a stage but those of another trainer at work, and the folders this leaves
        empty. The folder's lock must be held.
        """
        first = self.checkpoints(key)
        for folder in folders_of(first):
            if folder in self._scratch:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            with contextlib.suppress(OSError):
                lock = hold(folder)
                if lock is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.release()
        with contextlib.suppress(OSError):
            first.parent.rmdir()
            first.parent.parent.rmdir()

    def finished_checkpoints(self) -> dict[Path, StageKey]:
        """Folders for checkpoints of valid stages: training died between writing a stage and removing them."""
        found = {}
        for folder in folders_below(self.path / CHECKPOINTS):
            with contextlib.suppress(FolderError):
                if self.is_valid(key := stage_of(folder)):
                    found[folder] = key
        return found

    def remove_finished_checkpoints(self) -> None:
        """Remove checkpoints of valid stages, but those of trainers at work."""
        if self.finished_checkpoints():
            with self.lock():
                # A stage that was there may be in training again.
                self.refresh()
                for key in set(self.finished_checkpoints().values()):
                    self.remove_checkpoints(key)

    def checkpoints(self, key: StageKey) -> Path:
        """Where the checkpoints of a stage in training lie; beside it those of a second trainer, see `scratch`."""
        return self.path / CHECKPOINTS / key.path.removeprefix(f"{STAGES}/")

    def compact(self) -> None:
        """Write the table without the rows that the ledger masks (E5)."""
        with self.lock():
            self._compact()

    def _compact(self) -> None:
        self.refresh_ledger()
        self._settle()
        with explained(f"{self.path / TABLE_FILE} could not be written without the deleted rows", _IN_FORCE):
            write_table(self.path / TABLE_FILE, self.table, self.ledger)
        self._table_pin = pin_of(self.ledger)
        self.table = self.table.settled()

    def check_target(self, target: Path) -> None:
        """
        Refuse to write what is made from this system where something is, or into its own folder.

        Raises:
            [`~hf_s3t.errors.FolderError`]: Saying which.
        """
        is_free = target.is_dir() and not any(target.iterdir()) if target.exists() else True
        if target.is_symlink() or not is_free:
            raise FolderError(f"{target} is there and is no empty folder. Give a new one.")
        if target.resolve().is_relative_to(self.path.resolve()):
            raise FolderError(
                f"{target} is inside the system's folder, where only its own files belong. Give another."
            )

    def copy_to(self, path: str | os.PathLike) -> None:
        """
        Copy what is valid of the system into another folder; the config goes last, when the rest is synced.

        The copy is a second system with the same secret, which no deletion here reaches. The ledger notes it, as it
        notes exported adapters: with every stage that was handed out.

        Args:
            path (`str` or `os.PathLike`): A folder that is empty or not there.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If something is in the folder, or the system cannot be copied or noted.
        """
        target = Path(path)
        self.check_target(target)
        with self.lock():
            self.refresh_ledger()
            self.refresh_stages()
            self._record_handing_out(sorted(self.valid_stages), library_versions())
        # Not under the lock, for which deletions would have to wait: where one came meanwhile, it is copied again.
        for attempt in range(_COPIES):
            seen = stamp(self.path / LEDGER_FILE)
            try:
                self._copy_files(target)
            except OSError as error:
                shutil.rmtree(target, ignore_errors=True)
                if attempt == _COPIES - 1:
                    raise FolderError(
                        f"{self.path} could not be copied to {target}: {error}. Nothing is left there. Make room, or "
                        "wait until nobody writes to the system, then call again."
                    ) from error
                continue
            if stamp(self.path / LEDGER_FILE) == seen:
                break
            shutil.rmtree(target, ignore_errors=True)
        else:
            raise FolderError(
                f"{self.path} could not be copied: deletions came in all the time. Call again when there are fewer."
            )
        write_atomically(target / CONFIG_FILE, (self.path / CONFIG_FILE).read_bytes())

    def _copy_files(self, target: Path) -> None:
        self.refresh_ledger()
        self.refresh_stages()
        with self._reading:
            table, ledger = self.table, self.ledger
        make_folders(target)
        shutil.copytree(self.path, target, dirs_exist_ok=True, ignore=self._left_out_of_copies)
        # As they were read: a deletion that is under way may not have come to its files.
        write_table(target / TABLE_FILE, table, ledger)
        write_atomically(target / LEDGER_FILE, ledger.text.encode())
        write_head(target, ledger)
        for name in (TABLE_FILE, LEDGER_FILE):
            shutil.copymode(self.path / name, target / name)
        # A system whose ledger a crash cut off would have forgotten deletions.
        for file in (*target.rglob("*"), target):
            sync(file)

    def _left_out_of_copies(self, folder: str, names: list[str]) -> set[str]:
        here = Path(folder).relative_to(self.path)
        valid = {Path(key.path) for key in self.valid_stages}
        kept = valid.union(*(path.parents for path in valid), map(Path, _COPIED), [Path(STAGES)])
        lines_in_table = int(self._table_pin.partition(" ")[0])
        if any(entry.kind == "deletion" for entry in self.ledger.entries[lines_in_table:]):
            # They may have been made of what was deleted.
            kept.discard(Path(PROTOTYPES_FILE))
        return {name for name in names if here / name not in kept and here not in valid}

    # Inside

    def _append(self, ledger: Ledger) -> None:
        advice = "Nothing was removed. Make room, or make it writable, then call again."
        with (
            self._reading,
            explained(f"{self.path / LEDGER_FILE} could not be written", advice),
            open(self.path / LEDGER_FILE, "r+b") as file,
        ):
            # A torn last line was never acknowledged; the new line takes its place.
            file.truncate(len(self.ledger.text.encode()))
            file.seek(0, os.SEEK_END)
            file.write((ledger.lines[-1] + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
            self.ledger = ledger
            self._settled = len(ledger.lines)
            self._ledger_stamp = stamp(self.path / LEDGER_FILE)
        self._write_head()

    def _write_head(self) -> None:
        # One that is behind says nothing wrong: where there is no room, the removal that makes some goes first.
        with contextlib.suppress(OSError):
            write_head(self.path, self.ledger)

    def _settle(self) -> None:
        """
        Sync the ledger as it was read, before anything is done or said because of it.

        Who wrote a line may have died before syncing it: then a crash of the machine could still lose the line, and
        leave what was done because of it.
        """
        if self._settled < len(self.ledger.lines):
            try:
                sync(self.path / LEDGER_FILE)
            except OSError as error:
                # Where nothing can be written, nothing waits to be synced.
                if error.errno not in (errno.EROFS, errno.EINVAL):
                    raise
            self._settled = len(self.ledger.lines)

    def _discard(self, folders: Iterable[Path]) -> None:
        renamed = []
        for folder in folders:
            if folder.exists():
                renamed.append(folder.with_name(f".gone-{folder.name}-{uuid.uuid4().hex[:8]}"))
                os.rename(folder, renamed[-1])
        # A crash must not give a folder its name back that has lost files.
        for parent in sorted({gone.parent for gone in renamed}):
            sync(parent)
        for gone in renamed:
            shutil.rmtree(gone)

    def refresh_ledger(self) -> None:
        """
        Take in deletions that another process recorded.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the ledger no longer holds what was read from it before.
        """
        with self._reading:
            if not self.has_news():
                return
            ledger = self._read_ledger()
            if ledger != self.ledger:
                self.table = self._masked(self.table, ledger)
                self.ledger = ledger
                self._settle()

    def refresh_stages(self) -> None:
        """
        Take in stages that another process added, removed or grew again; records that did not change are kept.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If something among the stages is none, or damaged.
        """
        for problem in self.look_at_stages():
            raise problem

    def look_at_stages(self) -> list[FolderError]:
        """
        Take in what `refresh_stages` does, but for what is damaged: of that, what was known before stays known.

        Returns:
            `list[FolderError]`: What is wrong among the stages.
        """
        problems: list[FolderError] = []
        # One thread at a time: what another notes meanwhile, or removes, must not be taken back.
        with self._reading:
            stages, stamps = {}, {}
            for key in self._stage_folders(problems):
                # Before reading: a record that is replaced meanwhile is read again.
                stamps[key] = self._stamp_of(key)
                try:
                    unchanged = stamps[key] is not None and stamps[key] == self._stage_stamps.get(key)
                    is_known = unchanged and key in self._stages
                    stages[key] = self._stages[key] if is_known else self._read_stage(key)
                except FolderError as error:
                    # Between the look at the folder and at its file, another process may have removed the stage.
                    if (self.path / key.path).exists():
                        problems.append(error)
                        # To be read again, whatever its stamp.
                        del stamps[key]
                        if key in self._stages:
                            stages[key] = self._stages[key]
            self._stages, self._stage_stamps, self._condemned = stages, stamps, {}
        return problems

    def has_news(self) -> bool:
        """Whether someone wrote to the ledger since it was read: one look at the file's size and time."""
        return stamp(self.path / LEDGER_FILE) != self._ledger_stamp

    def _read_ledger(self) -> Ledger:
        # The head before the ledger, ahead of which it never is; the stamp before reading, so that a line which comes
        # meanwhile is news again.
        head = read_head(self.path)
        found = stamp(self.path / LEDGER_FILE)
        try:
            ledger = Ledger.parse((self.path / LEDGER_FILE).read_bytes().decode(), known=self.ledger)
        except FileNotFoundError:
            raise FolderError(
                f"{self.path / LEDGER_FILE} is missing: without it deletions could be forgotten. Restore it from a "
                "backup."
            ) from None
        except UnicodeDecodeError as error:
            raise FolderError(f"{self.path / LEDGER_FILE} is not text: {error}. Restore it from a backup.") from error
        except FolderError as error:
            raise type(error)(f"{self.path / LEDGER_FILE}: {error}") from error
        except OSError as error:
            raise unreadable(self.path / LEDGER_FILE, error) from error
        if ledger.lines[: len(self.ledger.lines)] != self.ledger.lines:
            raise FolderError(
                f"{self.path / LEDGER_FILE} lacks lines that it had, or holds others: deletions would be forgotten. "
                "Restore it from a backup."
            )
        if head is not None and not holds(ledger, head):
            raise lines_lost(self.path / LEDGER_FILE, HEAD_FILE, head)
        self._ledger_stamp = found
        return ledger

    def _read_rows(self) -> tuple[dict[int | str, Example], str]:
        rows, pin = read_table(self.path / TABLE_FILE)
        check_rows(self.path / TABLE_FILE, rows, self.config)
        return rows, pin

    def _table_of(self, rows: dict[int | str, Example], pin: str, ledger: Ledger) -> ExampleTable:
        if not holds(ledger, pin):
            raise lines_lost(self.path / LEDGER_FILE, TABLE_FILE, pin)
        config = self.config
        table = ExampleTable(rows, config.num_shards, config.num_slices, config.seed)
        return table if pin == pin_of(ledger) else self._masked(table, ledger)

    def _masked(self, table: ExampleTable, ledger: Ledger) -> ExampleTable:
        return table.without([i for i in table.rows if self.names.id_digest(i) in ledger.deleted])

    def _stage_folders(self, problems: list[FolderError]) -> Iterator[StageKey]:
        # Not by glob, which looks at every file's type: a deletion waits for this.
        root = f"{self.path / STAGES}"
        for shard in sorted(name for name in _names_in(root) if name.startswith("shard-")):
            try:
                for name in sorted(_names_in(f"{root}/{shard}")):
                    if not name.startswith("."):
                        try:
                            yield StageKey.from_path(f"{STAGES}/{shard}/{name}")
                        except FolderError as error:
                            problems.append(error)
            except FolderError as error:
                problems.append(error)

    def _read_stage(self, key: StageKey) -> dict[str, Any]:
        folder = self.path / key.path
        return checked_stage(folder, key, read_checked_json(folder / STAGE_FILE, REGROW))

    def _finish_removal(self) -> None:
        """
        Remove what a deletion condemned and what an interrupted write or removal left behind.

        Who may not write here serves what is valid, and leaves the removal to the next load that may.
        """
        if not self._has_remains():
            return
        with contextlib.ExitStack() as held:
            try:
                held.enter_context(self.lock())
            except FolderError as error:
                if is_read_only(error):
                    return
                raise
            with explained(f"An interrupted removal in {self.path} could not be finished", _IN_FORCE):
                self._remove_remains()

    def _has_remains(self) -> bool:
        return bool(self.is_table_behind or self._leftovers() or self.condemned_stages() or self._stale_checkpoints())

    def _leftovers(self) -> list[Path]:
        return [path for pattern in LEFTOVERS for path in self.path.glob(pattern)]

    def _remove_remains(self) -> None:
        # Again: while this waited for the lock, a stage may have been grown anew under its old name.
        self._read_all()
        self._settle()
        leftovers = self._leftovers()
        for parent in sorted({leftover.parent for leftover in leftovers} - {self.path}):
            sync(parent)
        for leftover in leftovers:
            remove(leftover)
        self.remove_stages(self.condemned_stages())
        self.remove_stale_checkpoints()
        if self.is_table_behind:
            self._compact()

    def condemned_stages(self) -> list[StageKey]:
        """The stages that saw an example which was deleted since."""
        found = (key for key, record in self._stages.items() if self._saw_deleted(key, record))
        return sorted({*self._condemned, *found})

    def _saw_deleted(self, key: StageKey, record: Mapping[str, Any]) -> bool:
        # Only a deletion condemns a stage; one that is invalid for another reason is left for the user to look at.
        return bool(self.ledger.num_deletions) and record["slices"] != self.slice_digests(key)

    def write_checkpoint_record(self, folder: Path, record: Mapping[str, Any]) -> None:
        """Mark a checkpoint, synced, with the slices it saw and its files' digests; without, it is not resumed."""
        files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != STAGE_FILE]
        for file in files:
            sync(file)
        digests = {file.relative_to(folder).as_posix(): file_digest(file) for file in files}
        write_checked_json(folder / STAGE_FILE, {**record, "files": digests})

    def read_checkpoint_record(self, folder: Path) -> dict[str, Any]:
        """
        What `write_checkpoint_record` was given.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the record or a file of the checkpoint is missing or altered.
        """
        record, files = self._checkpoint_record(folder)
        for name, digest in files.items():
            check_digest(folder / name, digest)
        return record

    def read_checkpoint_adapter(self, folder: Path) -> bytes:
        """
        The bytes of the adapter file of a checkpoint, as `write_checkpoint_record` found it, read once.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the record or the file is missing or altered.
        """
        return self.read_checkpoint_file(folder, ADAPTER_FILE)

    def read_checkpoint_file(self, folder: Path, name: str) -> bytes:
        """
        The bytes of a file of a checkpoint, as `write_checkpoint_record` found it, read once.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the record or the file is missing or altered.
        """
        _, files = self._checkpoint_record(folder)
        return read_checked(folder / name, files.get(name, ""))

    def _checkpoint_record(self, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
        record = read_checked_json(folder / STAGE_FILE)
        files = record.pop("files", None)
        if not isinstance(files, dict):
            raise FolderError(f"{folder / STAGE_FILE} names no files. Remove the checkpoint.")
        return record, files


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = FileLock(path / STAGES / LOCK_FILE, is_singleton=True)
    with explained(f"{path} cannot be changed", "Nothing was. Make it writable, then call again."):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except NotADirectoryError:
        raise FolderError(f"{folder} is a file, expected a folder of stages. Remove it.") from None
    except FileNotFoundError:
        raise FolderError(
            f"{folder} is missing. Restore it, or make an empty folder and call `train()` to grow its stages again."
        ) from None
    except OSError as error:
        raise unreadable(Path(folder), error) from error
