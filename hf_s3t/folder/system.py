"""A system's folder, to be written to: each change atomic and synced (the format of `docs/format.md`)."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config import OF_SERVING, S3TConfig
from ..errors import FolderError
from ..plan.stages import Plan, StageKey
from ..records.digests import DigestKey
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from ..records.validity import fits, saw_what_is_in
from ..signing.keys import current_signer
from .adding import AddingFolder
from .claims import HeldClaim
from .config_file import (
    FORMAT_VERSION,
    config_for_others,
    holds_system,
    in_newest_format,
    read_record,
    write_record,
)
from .copying import Snapshot, check_target, copy_system
from .earlier_slices import EarlierSlices
from .files import (
    explained,
    is_read_only,
    make_folders,
    remove,
    stamp,
    sync,
    sync_above,
    temporary_beside,
    write_atomically,
)
from .gate_file import StoredGate, write_gate
from .identity import is_same_system, new_identity
from .layout import (
    ADDITION_FILE,
    ATTRIBUTES_FILE,
    CARD_FILE,
    COMPANIONS,
    CONFIG_FILE,
    DIAGRAM_FILE,
    GATE_FILE,
    IGNORE_FILE,
    LEDGER_FILE,
    STAGE_FILES,
    STAGES,
    TABLE_FILE,
)
from .ledger_file import append_line, pin_of, write_head
from .lock import locked, making
from .removal import discard, leftovers, remove_leftovers
from .signatures_file import sign_merge
from .stage_record import adapter_of, fill_stage, read_intact_stage, read_stage
from .table_file import write_table
from .versions import library_versions


_IN_FORCE = (
    "The deletions in the ledger are in force. Make room, or make the folder writable, then load it again: that "
    "finishes the removal."
)
_NOTHING_REMOVED = "Nothing was removed. Make room, or make it writable, then call again."


class SystemFolder(AddingFolder):
    """
    The folder of one system, to be written to: stages, deletions, and the removals that these ask for.

    Every write is synced and renamed into place. Opening a folder finishes a removal that was interrupted.

    Args:
        path (`str` or `os.PathLike`): The folder. It must hold a system; see [`SystemFolder.create`].

    Raises:
        [`~hf_s3t.errors.FolderError`]: If a file is missing, truncated or altered.
    """

    @classmethod
    def create(
        cls,
        path: str | os.PathLike[str],
        record: Mapping[str, Any],
        table: ExampleTable,
        key: DigestKey,
        gate: StoredGate | None = None,
    ) -> "SystemFolder":
        """
        Make a new system: the table, an empty ledger, and last the config, whose presence makes it a system.

        Args:
            path (`str` or `os.PathLike`): The folder, which may exist.
            record (mapping): What `s3t_config.json` says besides identity and versions. Where it says no plan, that is
                the one that its settings ask for.
            table ([`~hf_s3t.records.examples.ExampleTable`]): Its examples.
            key ([`~hf_s3t.records.digests.DigestKey`]): The secret these were digested with.
            gate ([`~hf_s3t.folder.gate_file.StoredGate`], *optional*): The terms of their prompts.
        """
        path = Path(path)
        make_folders(path / STAGES)
        # Whoever made the folder did so for this system, a moment ago.
        sync_above(path)
        write_table(path / TABLE_FILE, table, Ledger())
        if gate is not None:
            write_gate(path / GATE_FILE, gate, Ledger(), key.check)
        write_atomically(path / LEDGER_FILE, b"")
        write_head(path, Ledger())
        written = {
            "key_check": key.check,
            "system_id": new_identity(),
            "row_digests": 2,
        }
        if "plan" not in record:
            written["plan"] = Plan.from_config(S3TConfig.from_dict(record["s3t_config"])).to_record()
        write_record(path / CONFIG_FILE, {**written, **record})
        return cls(path)

    @staticmethod
    def exists(path: str | os.PathLike[str]) -> bool:
        """
        Whether the folder holds a system.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If it holds stages or deletions of a system whose config is missing.
        """
        return holds_system(Path(path))

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """
        The lock under which deletions are recorded and stages renamed into place.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the folder cannot be written to.
        """
        with locked(self.path):
            try:
                yield
            finally:
                self._new_lines.sign(self.path, self.ledger, self.identity)

    making = staticmethod(making)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """
        The folder's lock, for who writes a file of the system besides stages, table and ledger.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the folder cannot be written to.
        """
        with self.lock():
            self._migrate()
            yield

    def _migrate(self) -> None:
        """
        Have the folder be of the newest format before anything of that is written into it. The folder's lock must be
        held.

        One file is replaced, the config: a crash leaves the folder as it was, or migrated. All others are read in
        either format.
        """
        if self.is_migrated:
            return
        found = read_record(self.path / CONFIG_FILE)
        self._refuse_another_system(found)
        with self._reading:
            # What slices are now, whoever wrote to the ledger last.
            self.refresh_ledger()
            if found["format_version"] < FORMAT_VERSION:
                found = self._migrated_record(self._earlier)
                with explained(f"{self.path / CONFIG_FILE} could not be written", _NOTHING_REMOVED):
                    write_record(self.path / CONFIG_FILE, found)
            self._follow_migration(found)

    def _refuse_another_system(self, found: dict[str, Any]) -> None:
        if not is_same_system(found, self.record):
            raise FolderError(f"{self.path} holds another system now. Open it anew.")

    def _migrated_record(self, earlier: EarlierSlices) -> dict[str, Any]:
        """What `s3t_config.json` says in the newest format."""
        record = {**self.record, "plan": self.plan.to_record()}
        known = earlier.to_record()
        return in_newest_format({**record, "earlier_slices": known} if known else record)

    def refresh(self) -> None:
        """
        Read ledger, table and stages again, and finish a removal that something interrupted.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a file is damaged, or the ledger no longer holds what was read before.
        """
        self._read_all()
        self._finish_removal()

    # Stages

    def write_stage(
        self,
        key: StageKey,
        record: Mapping[str, Any],
        fill: Callable[[Path], None],
        claim: HeldClaim | None = None,
    ) -> bool:
        """
        Write a stage: to a temporary folder, synced, then renamed, after the ledger was read again.

        Args:
            key ([`StageKey`]): The stage.
            record (mapping): What `stage.json` shall say; `slices` are the digests it was trained on.
            fill (callable): Called with the temporary folder to write the adapter into.
            claim ([`~hf_s3t.folder.claims.HeldClaim`], *optional*): The claim under which it was trained. It ends when
                the stage is there; one that was lost meanwhile writes nothing.

        Returns:
            `bool`: False if a deletion that came meanwhile touches the stage, what it stands on is not there any more,
                or the claim was lost; it is then discarded. Where another process made the same stage first, that one
                stays, and `stage_record` says what is there.
        """
        target = self.path / key.path
        temporary = temporary_beside(target)
        # Under the lock from the start: who finds a temporary folder while holding it knows that its writer is dead.
        with self.lock():
            if claim is not None and not claim.is_held():
                return False
            self._migrate()
            make_folders(target.parent)
            temporary.mkdir()
            try:
                written = fill_stage(temporary, key, record, fill)
                self.refresh_ledger()
                if not self._stands(key, written):
                    self.remove_checkpoints(key)
                    return False
                # Again: a machine that the server took for dead meanwhile has lost the lock, too.
                if claim is not None and not claim.is_held():
                    return False
                there = read_intact_stage(self.path, key, self._earlier)
                if there is None or not self._goes_before(key, there, written):
                    discard([target])
                    os.rename(temporary, target)
                    sync(target.parent)
                else:
                    # Another process made the same stage meanwhile, or one with more rows; others may stand on it.
                    written = there
                with self._reading:
                    self._stages.note(key, written)
                if self.ledger.additions:
                    self._remove_what_lost_its_parent(key)
                self.remove_checkpoints(key)
                if claim is not None:
                    claim.end()
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _stands(self, key: StageKey, written: Mapping[str, Any]) -> bool:
        """Whether a stage is valid on the stages that lie under it on the disk now, down to the base."""
        below = None
        for stage in key.lineage:
            try:
                record = written if stage == key else read_stage(self.path, stage, self._earlier)
            except FolderError:
                return False
            if not fits(record, self.slice_digests_ever(stage), below):
                return False
            below = adapter_of(record)
        return True

    def remove_stages(self, keys: Iterable[StageKey]) -> None:
        """
        Remove stages that a deletion condemned; each goes by one rename first. The folder's lock must be held.

        What another process grew again under a condemned name, on what is left, stays.
        """
        keys = list(keys)
        grown = {key: record for key in keys if (record := self._grown_again(key)) is not None}
        with explained(f"Stages of {self.path} could not be removed", _IN_FORCE):
            discard(self.path / key.path for key in keys if key not in grown)
        with self._reading:
            self._stages.forget(keys)
            for key, record in grown.items():
                self._stages.note(key, record)

    def _grown_again(self, key: StageKey) -> dict[str, Any] | None:
        """The record of what lies under the name of a condemned stage, if that saw nothing that was deleted."""
        with contextlib.suppress(FolderError):
            record = read_stage(self.path, key, self._earlier)
            if self.ledger.additions:
                return record if self._stands(key, record) else None
            return record if saw_what_is_in(record, self.slice_digests_ever(key)) else None
        return None

    def stage_paths(self, key: StageKey) -> dict[str, Path]:
        """The files of a stage by their names."""
        return {name: self.path / key.path / name for name in STAGE_FILES}

    # Deletions, and what else the ledger notes

    def record_deletion(
        self,
        ids: Iterable[int | str],
        removed: list[StageKey],
        versions: Mapping[str, str],
        groups: Iterable[int | str] = (),
    ) -> None:
        """Append a deletion to the ledger and sync it. After this the deletion is in force, whatever happens."""
        if self.has_gate:
            # One that cannot be written without these rows is told of before they are in the ledger.
            self.gate_head()
        ids, digests = list(ids), dict(self._stages.adapters)
        line = self.ledger.append(
            "deletion",
            ids=self.names.id_digests(ids),
            groups=[self.names.group_digest(group) for group in groups],
            removed={str(key): digests[str(key)] for key in removed},
            stages_now=digests,
            versions=versions,
        )
        # Nobody may see the line and rows that it took: a table is not masked again by lines that it goes by.
        with self._reading:
            self._append(line)
            self.table = self.table.without(ids)
            self._stages.condemn(removed)

    def record_export(self, key: StageKey, versions: Mapping[str, str]) -> None:
        """Note in the ledger that a stack was handed out as a plain adapter, which must be revoked by hand."""
        self.record_handing_out(key.lineage, versions)

    def record_handing_out(self, keys: Iterable[StageKey], versions: Mapping[str, str]) -> None:
        """Note in the ledger that stages were handed out. The folder's lock must be held."""
        self.refresh_ledger()
        digests = {str(key): self.adapter_digest(key) for key in keys}
        self._append(self.ledger.append("export", removed=digests, versions=versions))

    def merge_ledger(
        self, other: Ledger, rows: ExampleTable | None = None, weights: str | None = None
    ) -> list[StageKey]:
        """
        Take in what another copy of the system recorded (on the Hub, say); its deletions are in force on return.

        Args:
            other ([`~hf_s3t.records.ledger.Ledger`]): The other copy's ledger.
            rows ([`~hf_s3t.records.examples.ExampleTable`], *optional*): Its table, if rows came there.
            weights (`str`, *optional*): How members weigh there, if it is known.

        Returns:
            `list[StageKey]`: The stages that went because of it.
        """
        with self.lock():
            self.refresh()
            merged = self.ledger.merge(other)
            if merged is self.ledger:
                return []
            current_signer()
            self.take_rows_of_another(other, rows, merged, weights)
            self._replace_ledger(merged)
            sign_merge(self.path, merged, other, self.identity)
            condemned = self.condemned_stages()
            self.remove_stages(condemned)
            self.remove_stale_checkpoints()
            self._compact()
        return condemned

    def _append(self, ledger: Ledger) -> None:
        # A key that cannot be read is told of before anything is written.
        signer = current_signer()
        self._migrate()
        with self._reading, explained(f"{self.path / LEDGER_FILE} could not be written", _NOTHING_REMOVED):
            append_line(self.path, ledger)
            self.ledger = ledger
            self._settled = len(ledger.lines)
            self._ledger_stamp = stamp(self.path / LEDGER_FILE)
        self._write_head()
        self._new_lines.note(len(ledger.lines), signer)

    def _replace_ledger(self, ledger: Ledger) -> None:
        self._migrate()
        with self._reading:
            with explained(f"{self.path / LEDGER_FILE} could not be written", _NOTHING_REMOVED):
                write_atomically(self.path / LEDGER_FILE, ledger.text.encode())
            if self._has_new_rows(ledger):
                self.table, ledger, self._table_pin = self._read_table()
            else:
                self.table = self._masked(self.table, ledger, len(self.ledger.lines))
            self.ledger = ledger
            self._settled = len(ledger.lines)
            self._ledger_stamp = stamp(self.path / LEDGER_FILE)
        self._write_head()

    def _write_head(self) -> None:
        # One that is behind says nothing wrong: where there is no room, the removal that makes some goes first.
        with contextlib.suppress(OSError):
            write_head(self.path, self.ledger)

    # The table, without the deleted rows

    def compact(self) -> None:
        """Write the table without the rows that the ledger masks (E5)."""
        with self.lock():
            self._compact()

    def _compact(self) -> None:
        self.refresh_ledger()
        self._settle()
        self._migrate()
        self._take_in_columns()
        # Before it is written: what is made for that is what stays.
        table, ledger = self.table.settled(), self.ledger
        if ledger.additions:
            self._record_additions()
        with explained(f"{self.path / TABLE_FILE} could not be written without the deleted rows", _IN_FORCE):
            write_table(self.path / TABLE_FILE, table, ledger)
            if ledger.additions:
                remove(self.path / ADDITION_FILE)
        with self._reading:
            self._table_pin = pin_of(ledger)
            self._table_stamp = stamp(self.path / TABLE_FILE)
            self.table = table
        # Last: a gate that is damaged keeps no deleted row in the table.
        self._compact_gate(ledger)

    def _compact_gate(self, ledger: Ledger) -> None:
        """Write the gate without the rows that the ledger masks."""
        if not self.is_gate_behind:
            return
        gate = self.load_gate().settled()
        with explained(f"{self.path / GATE_FILE} could not be written without the deleted rows", _IN_FORCE):
            write_gate(self.path / GATE_FILE, gate, ledger, self.record["key_check"])
        self._has_written(gate, ledger)

    def _has_written(self, gate: StoredGate, ledger: Ledger) -> None:
        with self._reading:
            self._gate_stamp = stamp(self.path / GATE_FILE)
            self._gate, self._gate_ledger = gate, ledger

    def put_gate(
        self,
        gate: StoredGate,
        settings: Mapping[str, Any],
        lacking: Callable[[ExampleTable], Sequence[int | str]] | None = None,
        have_tokenizer: Callable[[], object] = lambda: None,
    ) -> None:
        """
        Write a gate that was made of the rows of the system, without those that are not in, and record its settings.

        Args:
            gate ([`~hf_s3t.folder.gate_file.StoredGate`]): The gate, of the rows that are in and perhaps more.
            settings (mapping): What of [`~hf_s3t.S3TConfig`] says how it is used, by the names of its fields.
            lacking (callable, *optional*):
                Table -> its rows that were not there, or other ones, where the gate was made: somebody else brought
                them. Of these the words stay that the gate here has.
            have_tokenizer (callable):
                Called before it is written, has its tokenizer lie here. Whatever dies in between, prompts are refused
                then, and not read as other words.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If another system lies there now, or the folder cannot be written to.
        """
        with self.writing():
            self._refuse_another_system(read_record(self.path / CONFIG_FILE))
            self.refresh_ledger()
            self._settle()
            ledger = self.ledger
            gate = gate.without(ledger.deleted).of_shards(self.config.num_shards)
            if lacking is not None:
                others = lacking(self.table)
                gate = self._with_words_of_others(gate, self.table.columns.id_digests[self.table.rows_of(others)])
            gate = gate.settled()
            have_tokenizer()
            with explained(f"{self.path / GATE_FILE} could not be written", _NOTHING_REMOVED):
                write_gate(self.path / GATE_FILE, gate, ledger, self.record["key_check"])
                self._has_written(gate, ledger)
                self._record_settings(settings)

    def _record_settings(self, settings: Mapping[str, Any]) -> None:
        record = read_record(self.path / CONFIG_FILE)
        record["s3t_config"] = {**record["s3t_config"], **settings}
        if "baseline" in record:
            given = record["baseline"]
            record["baseline"] = {**given, "s3t_config": {**given["s3t_config"], **settings}}
        write_record(self.path / CONFIG_FILE, record)
        self._take_in_settings(record)

    def refresh_settings(self) -> None:
        """Read again what `s3t_config.json` says: how a system is served may have been changed by another process."""
        self._take_in_settings(read_record(self.path / CONFIG_FILE))

    def _take_in_settings(self, record: dict[str, Any]) -> None:
        self._use_record(record)

    # What a removal that was interrupted left

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
        is_behind = self.is_table_behind or self.is_gate_behind
        is_behind = is_behind or os.path.lexists(self.path / ADDITION_FILE)
        return bool(is_behind or leftovers(self.path) or self.condemned_stages() or self._stale_checkpoints())

    def _remove_remains(self) -> None:
        # Again: while this waited for the lock, a stage may have been grown anew under its old name.
        self._read_all()
        self._settle()
        remove_leftovers(self.path)
        self.remove_stages(self.condemned_stages())
        self.remove_stale_checkpoints()
        if self.is_table_behind or self.is_gate_behind:
            self._compact()
        remove(self.path / ADDITION_FILE)

    # What others get

    def check_target(self, target: Path) -> None:
        """
        Refuse to write what is made from this system where something is, or into its own folder.

        Raises:
            [`~hf_s3t.errors.FolderError`]: Saying which.
        """
        check_target(target, self.path)

    def copy_to(self, path: str | os.PathLike[str]) -> None:
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
            self.record_handing_out(sorted(self.valid_stages), library_versions())
        copy_system(self.path, target, self.snapshot)

    def snapshot(self) -> Snapshot:
        """What the folder says now, to be copied."""
        self.refresh_ledger()
        self.refresh_stages()
        with self._reading:
            table, ledger, pin = self.table, self.ledger, self._table_pin
            gate = self.load_gate() if self.has_gate else None
        return Snapshot(table, ledger, self.valid_stages, int(pin.partition(" ")[0]), gate)

    def companions(self) -> dict[str, Path]:
        """The files of the tokenizer or processor that lie beside the system, by their names."""
        ours = {CARD_FILE, DIAGRAM_FILE, ATTRIBUTES_FILE, IGNORE_FILE}
        found = {name: self.path / name for name in sorted(COMPANIONS - ours)}
        return {name: path for name, path in found.items() if path.is_file()}

    def config_bytes(self, earlier: EarlierSlices | None = None, gated: bool = False) -> bytes:
        """
        `s3t_config.json` as others may have it: of a base that is a folder of this machine, only the name.

        Args:
            earlier ([`~hf_s3t.folder.earlier_slices.EarlierSlices`], *optional*):
                By which stages that others have are understood; the folder's own if not given.
            gated (`bool`, defaults to `False`): Whether others get the gate, without which they are told of none.
        """
        return config_for_others(self._record_for_others(earlier, gated))

    def _record_for_others(self, earlier: EarlierSlices | None, gated: bool) -> dict[str, Any]:
        record = self._migrated_record(self.earlier_slices() if earlier is None else earlier)
        if gated or self.config.gate is None:
            return record
        settings = {name: value for name, value in record["s3t_config"].items() if name not in OF_SERVING}
        return {**record, "s3t_config": settings}
