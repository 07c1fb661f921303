"""What a system's folder says: settings, ledger, table, stages; every read is checked (see `docs/format.md`)."""

import contextlib
import os
import threading
from collections.abc import Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from ..errors import FolderError
from ..plan.growth import Growth
from ..plan.stages import StageKey
from ..records.digests import DigestKey, KeptNames
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from ..records.validity import fits, is_current, saw_what_is_in
from .checkpoints import Checkpoints, read_checkpoint_adapter, read_checkpoint_file, read_checkpoint_record
from .claims import Claims
from .config_file import FORMAT_VERSION, base_id_of, plan_of, read_record, settings_of
from .earlier_slices import EarlierSlices
from .files import Stamp, check_digest, read_checked, stamp
from .foreign import forgeries_told
from .identity import identity_of, is_same_system
from .known_stages import KnownStages
from .layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    LEDGER_FILE,
    STAGES,
)
from .ledger_file import pin_of
from .scratch import folders_of
from .secret import load_key
from .signatures_file import NewLines, Signatures
from .stage_record import adapter_of, read_files
from .table_view import TableView
from .versions import library_versions


class FolderView(TableView):
    """
    What the folder of one system says: settings, table, ledger, and which stages are valid. It is not written to.

    Holds no tensors. What was read stays as it was read until it is refreshed, whole or in parts.

    Args:
        path (`str` or `os.PathLike`): The folder. It must hold a system.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If a file is missing, truncated or altered.
    """

    def __init__(self, path: str | os.PathLike[str]):
        # What is done later, such as compacting after a deletion, is done here, wherever the process is by then.
        self.path = Path(path).absolute()
        if not (self.path / CONFIG_FILE).is_file():
            raise FolderError(
                f"{path} holds no S3T system: there is no {CONFIG_FILE}. Give the `output_dir` of a training run "
                "or the folder of `save_pretrained`."
            )
        with forgeries_told(self.path, "`hf-s3t check` says where; restore the folder from a backup."):
            self._begin(self.path, read_record(self.path / CONFIG_FILE), self.path / CONFIG_FILE)
            self._use(load_key(self.path, self.record))
            self.refresh()

    def _begin(self, path: Path, record: dict[str, Any], read_from: Path) -> None:
        self.path = path
        # What `s3t_config.json` says.
        self.record = record
        # With the shards that were added to those that the user asked for.
        self.config = settings_of(record)
        self.plan = plan_of(read_from, record, self.config)
        self.ledger = Ledger()
        self._ledger_stamp: Stamp | None = None
        # By which what was written in format 1 is understood; where that is the folder's still, of slices as they are.
        self._earlier = EarlierSlices(record.get("earlier_slices", {}))
        self._stages = KnownStages(path, self.config, self._earlier)
        self._checkpoints = Checkpoints(path, self.config, self._earlier)
        # How many lines of the ledger are known to be synced, and the lines that the table on the disk goes by.
        self._settled = 0
        self._table_pin = ""
        # By which a table that was read is told from one that was written since.
        self._table_stamp: Stamp | None = None
        self._new_lines = NewLines()
        self._begin_gate()
        # Held while ledger and table are read and taken over: of two threads the one that read less must not win. Who
        # holds it waits for nothing, so that it may be taken inside the folder's lock.
        self._reading = threading.RLock()

    @property
    def identity(self) -> str:
        """The identity of the system."""
        return str(identity_of(self.record))

    @property
    def signatures(self) -> Signatures:
        """What was signed of the lines of the ledger, by whoever had a key."""
        return Signatures.read(self.path)

    def _use_record(self, record: dict[str, Any]) -> None:
        """Take over what `s3t_config.json` says; shards that it was read to have are never fewer later."""
        config = settings_of(record)
        if config.num_shards < self.config.num_shards:
            return
        if config.num_shards > self.config.num_shards:
            self.plan = plan_of(self.path / CONFIG_FILE, record, config)
            for name in ("growth", "_shard_folders"):
                self.__dict__.pop(name, None)
        self.record, self.config = record, config
        self._stages.config = self._checkpoints.config = config

    def _use(self, key: DigestKey) -> None:
        self.key = key
        self.names = KeptNames(key, self.config.keep_ids)

    def refresh(self) -> None:
        """
        Read ledger, table and stages again.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a file is damaged, or the ledger no longer holds what was read before.
        """
        self._read_all()

    def _read_all(self) -> None:
        with self._reading:
            # The table first: the ledger is never behind it, whatever another process does between the two reads.
            head, table = self._look_at_table(), None
            if head is not None:
                ledger, pin = self._read_ledger(), head.pin
                table = self._known_table(head, ledger)
            if table is None:
                table, ledger, pin = self._read_table()
            # A compaction in another thread may see one of the two before the other: rows leave before a line says so.
            self.table = table
            self.ledger = ledger
            self._table_pin = pin
            self._learn_slices()
        self.refresh_stages()

    # The ledger, and the table that goes by it

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
                if self._has_new_rows(ledger):
                    table, ledger, self._table_pin = self._read_table()
                else:
                    table = self._masked(self.table, ledger, len(self.ledger.lines))
                self.table, self.ledger = table, ledger
                self._learn_slices()
                self._settle()

    @property
    def is_migrated(self) -> bool:
        """Whether the folder is of the newest format, as far as is known: another process may have migrated it."""
        return bool(self.record["format_version"] >= FORMAT_VERSION)

    def _learn_slices(self) -> None:
        if not self.is_migrated:
            # Unless another process did so: from then on nothing new is written in format 1.
            with contextlib.suppress(FolderError):
                self._follow_migration(read_record(self.path / CONFIG_FILE))
        # A process of an earlier release may delete, and write down what slices are then as it always did.
        if not self.is_migrated and self._earlier.learn(self.table):
            self._stages.translate()

    def _follow_migration(self, found: dict[str, Any]) -> None:
        """Take over what `s3t_config.json` says, if it is of the newest format."""
        if found["format_version"] >= FORMAT_VERSION and is_same_system(found, self.record):
            self._earlier.take_in(found.get("earlier_slices", {}))
            self._use_record(found)
            self._stages.translate()

    def earlier_slices(self) -> EarlierSlices:
        """By which what was written of this system in format 1 is understood; a copy."""
        return self._earlier.copy()

    def has_news(self) -> bool:
        """Whether someone wrote to the ledger since it was read: one look at the file's size and time."""
        return stamp(self.path / LEDGER_FILE) != self._ledger_stamp

    def is_deleted(self, example_id: int | str) -> bool:
        """Whether the ledger knows the id as deleted."""
        return self.names.id_digest(self.names.of_id(example_id)) in self.ledger.deleted

    @property
    def is_table_behind(self) -> bool:
        """Whether lines came to the ledger since the table on the disk was written: it may hold deleted rows."""
        return self._table_pin != pin_of(self.ledger)

    def as_of_one_time(self) -> tuple[ExampleTable, Ledger, dict[StageKey, dict[str, Any]]]:
        """
        Table, ledger and the records of the valid stages: of what is written, the table has to go by the lines that
        stand beside it, and the stages by both.
        """
        with self._reading:
            return self.table, self.ledger, self.valid_records

    def prepare(self) -> None:
        """Find out now what the first deletion would otherwise wait for."""
        self.table.index()
        # Read from the files of each library, once in a process.
        library_versions()

    @property
    def holds_deleted_rows(self) -> bool:
        """Whether rows that were deleted are still in memory, masked."""
        return not self.table.is_settled or self._gate_holds_deleted_rows

    def let_go_of_deleted_rows(self) -> None:
        """Hold no masked rows any more, unless more are masked meanwhile. Nothing is waited for, nor written."""
        table = self.table
        settled = table.settled().index()
        with self._reading:
            if self.table is table:
                self.table = settled
        self._let_go_of_deleted_terms()

    # The stages

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
        # One thread at a time: what another notes meanwhile, or removes, must not be taken back.
        with self._reading:
            return self._stages.look()

    def stages_stamp(self) -> tuple[Stamp | None, ...]:
        """What changes when a stage comes or goes, at one look at the folder of each shard: every call takes one."""
        return tuple(map(stamp, self._shard_folders))

    @cached_property
    def _shard_folders(self) -> tuple[str, ...]:
        return tuple(f"{self.path / STAGES}/shard-{shard}" for shard in range(self.plan.num_shards))

    @property
    def stages(self) -> list[StageKey]:
        """The stages that have a folder, valid or not. What a system of these settings cannot have is none."""
        return list(self._stages.records)

    def stage_record(self, key: StageKey) -> dict[str, Any]:
        """
        What `stage.json` says.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the stage is not there, or not any more.
        """
        record = self._stages.records.get(key)
        if record is None:
            raise FolderError(f"{self.path / key.path} is not there: it was never trained, or removed since.")
        return record

    @property
    def stage_records(self) -> Mapping[StageKey, dict[str, Any]]:
        """What `stage.json` says of each stage that has a folder."""
        return self._stages.records

    def slice_digests(self, key: StageKey) -> list[str]:
        """The digests of the slices of a stage as they are now."""
        return self.table.slice_digests(key.shard, key.prefix)

    def slice_digests_ever(self, key: StageKey) -> list[tuple[str, ...]]:
        """Of each slice of a stage the digests that its remaining rows ever had, the one that they have now first."""
        return [self.table.slice_digests_of(key.shard, s, self._generations) for s in key.prefix]

    @property
    def _generations(self) -> tuple[frozenset[int], ...]:
        return self.ledger.generations

    def adapter_digest(self, key: StageKey) -> str:
        """The digest of a stage's adapter file, as it was written."""
        return adapter_of(self.stage_record(key))

    def is_valid(self, key: StageKey) -> bool:
        """Whether the stage exists, all examples that it saw are in, and it stands on the stages that are there."""
        records = self._stages.records
        return all(stage in records and self._fits(stage, records) for stage in key.lineage)

    def _fits(self, key: StageKey, records: Mapping[StageKey, dict[str, Any]]) -> bool:
        below = None if key.parent is None else adapter_of(records[key.parent])
        return fits(records[key], self.slice_digests_ever(key), below)

    @property
    def valid_stages(self) -> frozenset[StageKey]:
        """The stages that are valid, whether they are planned or not."""
        return frozenset(self.valid_records)

    @property
    def current_stages(self) -> frozenset[StageKey]:
        """The valid stages that saw all that their slices hold. The others serve too, until they are grown again."""
        valid = self.valid_records
        if not self.ledger.additions:
            return frozenset(valid)
        current: set[StageKey] = set()
        for key, record in valid.items():
            if (key.parent is None or key.parent in current) and is_current(record, self.slice_digests(key)):
                current.add(key)
        return frozenset(current)

    def served(self, valid: Collection[StageKey] | None = None) -> tuple[tuple[StageKey, ...], ...]:
        """
        Which stacks answer, by the folder's plan, its selection and the losses that are recorded.

        Args:
            valid (collection of [`~hf_s3t.plan.stages.StageKey`], *optional*): Those that are left, if not all.

        Returns:
            `tuple[tuple[StageKey, ...], ...]`: Per shard the last stages of its stacks; empty if none is left.
        """
        valid = self.valid_stages if valid is None else valid
        behind = frozenset(valid) - self.current_stages if self.ledger.additions else frozenset[StageKey]()
        return self.plan.served(valid, self.config.select, self.losses(), behind)

    @property
    def valid_records(self) -> dict[StageKey, dict[str, Any]]:
        """What `stage.json` says of each valid stage, parents first, as of one time."""
        # Another thread may take in what others removed or grew meanwhile.
        records = self._stages.records
        valid: dict[StageKey, dict[str, Any]] = {}
        # Parents come first, so one look at the parent stands for the whole lineage.
        for key in sorted(records, key=lambda key: len(key.prefix)):
            if (key.parent is None or key.parent in valid) and self._fits(key, records):
                valid[key] = records[key]
        return valid

    def missing_stages(self) -> list[StageKey]:
        """The stages that the plan still lacks; see `Plan.missing`."""
        return self.plan.missing(self.current_stages, self.table.empty)

    @cached_property
    def growth(self) -> Growth:
        """In which order what is missing is worth growing."""
        return Growth(self.plan, self.config)

    def condemned_stages(self) -> list[StageKey]:
        """
        The stages that saw an example which was deleted since; and those whose parent was grown anew with rows that
        came, on which they do not stand.
        """
        records = self._stages.records
        found = [key for key, record in records.items() if self._saw_deleted(key, record)]
        if self.ledger.additions:
            found += [key for key in records if self._lost_its_parent(key, records)]
        return sorted({*self._stages.condemned, *found})

    def _saw_deleted(self, key: StageKey, record: Mapping[str, Any]) -> bool:
        # Only a deletion condemns a stage; one that is invalid for another reason is left for the user to look at.
        return bool(self.ledger.num_deletions) and not saw_what_is_in(record, self.slice_digests_ever(key))

    def _lost_its_parent(self, key: StageKey, records: Mapping[StageKey, dict[str, Any]]) -> bool:
        """Whether another stage lies where one stands on; of what is missing, nobody grew another."""
        pairs = zip(key.lineage, key.lineage[1:], strict=False)
        return any(
            below in records and above in records and records[above]["below"] != adapter_of(records[below])
            for below, above in pairs
        )

    def losses(self) -> dict[StageKey, float]:
        """The evaluation loss recorded with each stage that has one."""
        return {
            key: record["metrics"]["eval_loss"]
            for key, record in self._stages.records.items()
            if "eval_loss" in record["metrics"]
        }

    def adapter_path(self, key: StageKey) -> Path:
        """
        The folder of a stage whose files are as they were written.

        What is loaded from it by name may have changed since: load what `read_adapter` returns.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a file is missing, truncated or altered.
        """
        files = self.stage_record(key)["files"]
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            check_digest(self._stage_file(key, name), files[name])
        return self._stage_file(key, ADAPTER_FILE).parent

    def read_other_files(self, key: StageKey, record: Mapping[str, Any]) -> dict[str, bytes]:
        """
        The bytes of a stage's files besides its adapter, by their names.

        Args:
            key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
            record (mapping): What its `stage.json` said.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a file is missing or altered, or another stage is there now.
        """
        return read_files(self.path, key, record, self._earlier)

    def read_adapter(self, key: StageKey) -> bytes:
        """
        The bytes of a stage's adapter file, as it was written, read once.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a file of the stage is missing, truncated or altered.
        """
        files = self.stage_record(key)["files"]
        check_digest(self._stage_file(key, ADAPTER_CONFIG_FILE), files[ADAPTER_CONFIG_FILE])
        return read_checked(self._stage_file(key, ADAPTER_FILE), files[ADAPTER_FILE])

    def _stage_file(self, key: StageKey, name: str) -> Path:
        return self.path / key.path / name

    # Stages in training

    @cached_property
    def claims(self) -> Claims:
        """Who trains which stage."""
        return Claims(self.path, self.config, self.plan.by_sets)

    # Their checkpoints

    def checkpoints(self, key: StageKey) -> Path:
        """Where the checkpoints of a stage in training lie; beside it those of a second trainer, see `scratch`."""
        return self._checkpoints.of(key)

    def folders_of_checkpoints(self, key: StageKey) -> list[Path]:
        """The folders for checkpoints of a stage that are there, one for each trainer that came to it."""
        return folders_of(self.checkpoints(key))

    def has_checkpoints(self, key: StageKey) -> bool:
        """Whether there is a folder for checkpoints of a stage, or was a moment ago."""
        return self._checkpoints.are_there(key)

    def finished_checkpoints(self) -> dict[Path, StageKey]:
        """
        Folders for checkpoints of what is there: training died between writing a stage and removing them, or, in a
        plan by sets, their set was grown in another order since.
        """
        if not self.plan.by_sets:
            return self._checkpoints.finished(self.current_stages.__contains__)
        sets = {key.slices for key in self.current_stages}
        return self._checkpoints.finished(lambda key: key.slices in sets)

    def _stale_checkpoints(self) -> list[Path]:
        return self._checkpoints.stale(self.slice_digests_ever, self.ledger)

    def read_checkpoint_record(self, folder: Path) -> dict[str, Any]:
        """
        What is written down of a checkpoint of a stage in training.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the record or a file of the checkpoint is missing or altered.
        """
        return read_checkpoint_record(folder, self._earlier)

    read_checkpoint_adapter = staticmethod(read_checkpoint_adapter)
    read_checkpoint_file = staticmethod(read_checkpoint_file)

    # The base

    @property
    def base_id(self) -> str | None:
        """The id that others can load the base by; `None` if it is a folder of this machine, or was made in memory."""
        return base_id_of(self.record)

    @property
    def base_revision(self) -> str | None:
        """The revision of the base that others can load by `base_id`, if it came from a repository."""
        revision: str | None = self.record["base_model"].get("revision")
        return revision if self.base_id is not None else None
