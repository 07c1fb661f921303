"""Rows that come to a folder: how they get there whatever dies meanwhile, and what becomes of stages without them."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..errors import FolderError, counted
from ..plan.stages import StageKey
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from ..records.validity import fits, is_current
from ..signing.keys import current_signer
from .addition_file import StoredAddition, write_addition
from .checkpointing import CheckpointingFolder
from .config_file import read_record, with_additions, write_record
from .files import explained
from .layout import ADDITION_FILE, CONFIG_FILE
from .removal import discard


_IN = "The rows in the ledger are in. Make room, or make the folder writable, then load it again."
_NOTHING_ADDED = "Nothing was added. Make room, or make the folder writable, then call again."
_SERVES = "What serves is valid. Make room, or make the folder writable, then load it again."


class AddingFolder(CheckpointingFolder):
    """The part of [`~hf_s3t.folder.system.SystemFolder`] that adds rows."""

    if TYPE_CHECKING:

        def _append(self, ledger: Ledger) -> None:
            """Write the last line of a ledger, synced."""

        def _compact(self) -> None:
            """Write the table as the ledger has it."""

        def remove_stages(self, keys: Iterable[StageKey]) -> None:
            """Remove stages."""

    def _goes_before(self, key: StageKey, there: Mapping[str, Any], written: Mapping[str, Any]) -> bool:
        """Whether a stage that is there stays: it is the one that was written, or that one lacks rows that came."""
        if is_current(there, written["slices"]):
            return bool(there["below"] == written["below"])
        now = self.slice_digests(key)
        return not is_current(written, now) and fits(there, self.slice_digests_ever(key), written["below"])

    def _remove_what_lost_its_parent(self, key: StageKey) -> None:
        """Remove what stood on the stage that one took the place of. The folder's lock must be held."""
        self.refresh_stages()
        records = self._stages.records
        lost = [one for one in records if one.shard == key.shard and self._lost_its_parent(one, records)]
        with explained(f"Stages of {self.path} could not be removed", _SERVES):
            discard(self.path / one.path for one in lost)
        with self._reading:
            self._stages.forget(lost)

    def lines_of_rows_not_here(self, other: Ledger) -> list[int]:
        """The lines of another copy's ledger that tell of rows which never came here."""
        return _not_in(self._lines_of_rows, other)

    @property
    def _lines_of_rows(self) -> Ledger:
        """The lines whose rows the table has."""
        return self.ledger

    def take_rows_of_another(
        self, other: Ledger, rows: ExampleTable | None, merged: Ledger, weights: str | None = None
    ) -> None:
        """
        Write down the rows that another copy has and this one lacks, before the ledger has its lines: those that no
        line of either deleted, and whose ids are not in use here. Of a row that both put another in the place of, that
        of the other copy stays, unless it was replaced here since. The folder's lock must be held.

        Args:
            other ([`~hf_s3t.records.ledger.Ledger`]): The ledger of the other copy.
            rows ([`~hf_s3t.records.examples.ExampleTable`], *optional*): Its table.
            merged ([`~hf_s3t.records.ledger.Ledger`]): Both ledgers together.
            weights (`str`, *optional*): How members weigh there.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If rows came there and its table is not given.
        """
        lacking = self.lines_of_rows_not_here(other)
        if not lacking:
            return
        if rows is None:
            raise FolderError(
                f"The other ledger tells of {counted(len(lacking), 'addition')} of rows that {self.path} lacks, and "
                "holds none of them. Merge it by a push (`hf-s3t push --merge`), which brings them."
            )
        self._migrate()
        came = self._rows_that_come(other, rows, merged)
        first = self.record["s3t_config"]["num_shards"]
        known = self.record.get("added", {"weights": "equal"})
        added = {
            **known,
            "shards": max(self.config.num_shards, rows.num_shards) - first,
            "weights": self._weights_with(other, known["weights"], weights or known["weights"]),
        }
        addition = StoredAddition(came, added, merged.hashes[-1])
        with explained(f"{self.path / ADDITION_FILE} could not be written", _NOTHING_ADDED):
            write_addition(self.path, addition, self.ledger)

    def _rows_that_come(self, other: Ledger, rows: ExampleTable, merged: Ledger) -> ExampleTable:
        """The rows to be written down: see `take_rows_of_another`."""
        place_of = {merged.hashes[line - 1]: number for number, line in enumerate(merged.additions, start=1)}
        heard_here, heard_there = frozenset(self.ledger.hashes), frozenset(other.hashes)

        def brought(table: ExampleTable, ledger: Ledger, heard: Collection[str], is_heard: bool) -> ExampleTable:
            """The rows of a table that lines brought of which the other copy has heard, or has not."""
            hashes = [(number, ledger.hashes[line - 1]) for number, line in enumerate(ledger.additions, start=1)]
            return table.of_additions({n: place_of[found] for n, found in hashes if (found in heard) == is_heard})

        # What the other replaced, and deleted, is out here by then: also what it has all the same, because it is what
        # took the place, or came after. Not what was replaced here since, of which the other has not heard.
        masked = frozenset(merged.deleted_since(len(self.ledger.lines)))
        lines = zip(self.ledger.entries, self.ledger.hashes, strict=True)
        gone_here = {one for entry, found in lines if found not in heard_there for one in entry.ids}
        both_know = brought(rows, other, heard_here, True)
        both_know = both_know.without_digests(self._ids_but(both_know, masked - gone_here))
        came = both_know.with_more(brought(rows, other, heard_here, False).settled().columns, None, rows.num_shards)
        came = came.without_digests(merged.deleted)
        came = came.without_digests(self._digests_of(self.table.without_digests(masked))).settled()
        own = brought(self.table, self.ledger, heard_there, False).without_digests(merged.deleted)
        own = own.without_digests(self._ids_but(own, masked)).without_digests(self._digests_of(came)).settled()
        return came.with_more(own.columns, None, rows.num_shards) if len(own) else came

    def _digests_of(self, table: ExampleTable) -> list[str]:
        return self.names.id_digests(list(table.rows))

    def _ids_but(self, table: ExampleTable, wanted: Collection[str]) -> set[str]:
        """The keyed digests of a table's ids, but some."""
        return {*self._digests_of(table)}.difference(wanted)

    def _weights_with(self, other: Ledger, here: str, there: str) -> str:
        """
        How members weigh after a merge: as the copy says that knows all additions of both. Where each knows some that
        the other does not, and they differ, by size, which somebody asked for; alike is what holds unasked.
        """
        if not _not_in(other, self.ledger) or here == there:
            return there
        return "size"

    def record_addition(
        self,
        addition: StoredAddition,
        versions: Mapping[str, str],
        replaced: Collection[int | str] = (),
        removed: Sequence[StageKey] = (),
        again: Iterable[int | str] = (),
        again_groups: Iterable[int | str] = (),
    ) -> None:
        """
        Add rows: they are in from the ledger's line on, whatever happens. The folder's lock must be held, and what the
        folder says be as it is on the disk.

        Args:
            addition ([`~hf_s3t.folder.addition_file.StoredAddition`]): The rows, whose ids are not in, or replaced.
            versions (mapping): Library versions, for what is replaced.
            replaced (collection of ids): What goes by the same line, as ids stand in the table.
            removed (sequence of [`~hf_s3t.plan.stages.StageKey`]): The stages that saw these.
            again (iterable of ids): Ids that were deleted before and come back, as they stand in the table.
            again_groups (iterable of groups): The same of groups.

        Raises:
            [`~hf_s3t.errors.ExampleIdError`]: If their ids are of another type than those that are in.
            [`~hf_s3t.errors.FolderError`]: If it cannot be written: saying whether the rows are in.
        """
        # A key that cannot sign the line is told of before anything is written.
        current_signer()
        self._migrate()
        if self.has_gate:
            self.gate_head()
        adapters = dict(self._stages.adapters)
        # Before the line is written: after it, a table that cannot be made could not be loaded either.
        rows, number = addition.rows.settled().columns, len(self.ledger.additions) + 1
        table = self.table.without(replaced).with_more(rows, number, addition.rows.num_shards)
        with explained(f"{self.path / ADDITION_FILE} could not be written", _NOTHING_ADDED):
            written = write_addition(self.path, addition, self.ledger)
        line = self.ledger.append(
            "replacement" if replaced else "addition",
            ids=self.names.id_digests([*replaced]),
            removed={str(key): adapters[str(key)] for key in removed},
            stages_now=adapters if replaced else None,
            versions=versions if replaced else None,
            rows=len(addition.rows),
            rows_sha256=written,
            again=self.names.id_digests([*again]),
            again_groups=[self.names.group_digest(group) for group in again_groups],
        )
        with self._reading:
            self._append(line)
            self._use_record(with_additions(self.record, addition.added))
            self.table = table
            self._stages.condemn(removed)
        self.remove_stages(removed)
        self.remove_stale_checkpoints()
        self._compact()

    def _record_additions(self) -> None:
        """Have the config tell of the rows that the table is about to have."""
        found = read_record(self.path / CONFIG_FILE)
        if "added" in self.record and found.get("added") != self.record["added"]:
            with explained(f"{self.path / CONFIG_FILE} could not be written", _IN):
                write_record(self.path / CONFIG_FILE, with_additions(found, self.record["added"]))


def _not_in(ledger: Ledger, other: Ledger) -> list[int]:
    """The lines of another ledger that added rows, or said how members weigh, and are not in one."""
    known = {ledger.hashes[line - 1] for line in ledger.additions}
    return [line for line in other.additions if other.hashes[line - 1] not in known]
