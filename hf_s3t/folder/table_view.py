"""How ledger and table of a folder are read: one goes by the other, and rows that are being added lie beside both."""

import errno
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FolderError
from ..records.digests import KeptNames
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from .addition_file import read_addition
from .config_file import read_record, with_additions
from .files import Stamp, stamp, sync
from .gate_view import GateView
from .layout import CONFIG_FILE, HEAD_FILE, LEDGER_FILE, TABLE_FILE
from .ledger_file import pin_of, read_head, read_ledger, read_on, require_pinned
from .table_file import StoredTable, TableHead, read_head_of_table, read_table


# How often a table is read whose rows are being added meanwhile.
_ATTEMPTS = 10


class TableView(GateView):
    """The part of [`~hf_s3t.folder.view.FolderView`] that reads ledger and table."""

    path: Path
    record: dict[str, Any]
    names: KeptNames
    table: ExampleTable
    ledger: Ledger
    _reading: threading.RLock
    _ledger_stamp: Stamp | None
    _table_stamp: Stamp | None
    _table_pin: str
    _settled: int

    if TYPE_CHECKING:

        def _use_record(self, record: dict[str, Any]) -> None:
            """Take over what `s3t_config.json` says."""

    def _read_ledger(self, known: Ledger | None = None) -> Ledger:
        # The head before the ledger, ahead of which it never is; the stamp before reading, so that a line which comes
        # meanwhile is news again.
        head = read_head(self.path)
        found = stamp(self.path / LEDGER_FILE)
        ledger = read_on(self.path / LEDGER_FILE, self.ledger, self._ledger_stamp)
        if ledger is None:
            ledger = read_ledger(self.path / LEDGER_FILE, known=known or self.ledger)
        if not ledger.starts_with(self.ledger):
            raise FolderError(
                f"{self.path / LEDGER_FILE} lacks lines that it had, or holds others: deletions would be forgotten. "
                "Restore it from a backup."
            )
        if head is not None:
            require_pinned(self.path / LEDGER_FILE, ledger, head, HEAD_FILE)
        self._ledger_stamp = found
        return ledger

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

    def _read_rows(self) -> StoredTable:
        found = stamp(self.path / TABLE_FILE)
        stored = read_table(self.path / TABLE_FILE)
        self._table_stamp = found
        return stored

    def _look_at_table(self) -> TableHead | None:
        """What the table's file says of it as a whole, where some table was read before."""
        if self._table_stamp is None:
            return None
        found = stamp(self.path / TABLE_FILE)
        if found == self._table_stamp:
            return TableHead(self._table_pin, found)
        return read_head_of_table(self.path / TABLE_FILE, found)

    def _known_table(self, head: TableHead, ledger: Ledger) -> ExampleTable | None:
        """
        The table as the ledger has it now, from the rows that were read before; `None` if the file holds others.

        A table that another process wrote holds nothing new, as a rule: a deletion went through it. What it says of
        its slices shows that, and a million rows need not be read again.
        """
        if self._has_new_rows(ledger):
            return None
        known = len(self.ledger.lines)
        if head.slices is not None:
            require_pinned(self.path / LEDGER_FILE, ledger, head.pin, TABLE_FILE)
            lines = int(head.pin.partition(" ")[0])
            gone, later = ledger.deleted_since(known), ledger.deleted_since(lines)
            then = self.table.without_digests(gone[: len(gone) - len(later)])
            if lines < known or not head.says_of(then):
                return None
            self._table_stamp = head.stamp
        return self._masked(self.table, ledger, known)

    def _take_in_columns(self) -> None:
        """Read the table again where a later version added columns to it: who writes it anew carries them along."""
        with self._reading:
            head = self._look_at_table()
            if head is not None and head.says_more_than(self.table):
                self.table = self._read_table()[0]

    def _has_new_rows(self, ledger: Ledger) -> bool:
        """Whether a ledger that was read tells of rows that came since."""
        return len(ledger.additions) != len(self.ledger.additions)

    def _read_table(self) -> tuple[ExampleTable, Ledger, str]:
        """
        The table as the ledger has it now, the ledger, and the lines that the table on the disk goes by.

        Rows that are being added are in from the line on that tells of them, wherever they lie until the table has
        them.
        """
        for _ in range(_ATTEMPTS):
            stored = self._read_rows()
            ledger, pin = self._read_ledger(), stored.pin
            if ledger.additions:
                # Written before the table: it knows of no fewer shards.
                self._use_record(read_record(self.path / CONFIG_FILE))
            table = self._table_of(stored, ledger)
            if stored.version == 1 and not table.is_settled:
                # To be written anew, whatever it says of itself.
                pin = pin_of(Ledger())
            whole = self._with_rows_that_come(table, ledger, int(stored.pin.partition(" ")[0]))
            if whole is not None:
                return whole, ledger, pin
        raise FolderError(
            f"{self.path / TABLE_FILE} lacks rows that the ledger tells of, and they are not beside it: it is older "
            "than the ledger. Restore the newest from a backup."
        )

    def _with_rows_that_come(self, table: ExampleTable, ledger: Ledger, lines: int) -> ExampleTable | None:
        """A table that goes by so many lines, with the rows that lines after these added; `None` if they moved."""
        coming = [line for line in ledger.additions if line > lines]
        if not coming:
            return table
        line = coming[0]
        addition = read_addition(self.path, ledger, line, self.config, self.names)
        if addition is None or (addition.merged is None and len(coming) > 1):
            # Whoever added them has written the table meanwhile.
            return None
        self._use_record(with_additions(self.record, addition.added))
        # Of another copy they are without what its lines and those here delete.
        lines = line if addition.merged is None else list(ledger.hashes).index(addition.merged) + 1
        rows = self._masked(addition.rows, ledger, lines).settled().columns
        number = len(ledger.additions) if addition.merged is None else None
        return table.with_more(rows, number, self.config.num_shards)

    def _table_of(self, stored: StoredTable, ledger: Ledger) -> ExampleTable:
        table = stored.examples(self.config, self.names)
        require_pinned(self.path / LEDGER_FILE, ledger, stored.pin, TABLE_FILE)
        # Whoever copied a folder in format 1 while a deletion was recorded could write a pin that counted its line,
        # with rows that it had deleted. No row came back then, so all lines hold.
        lines = 0 if stored.version == 1 else int(stored.pin.partition(" ")[0])
        return self._masked(table, ledger, lines)

    def _masked(self, table: ExampleTable, ledger: Ledger, lines: int) -> ExampleTable:
        """A table that goes by so many lines of the ledger, without what the lines after these deleted."""
        return table.without_digests(ledger.deleted_since(lines))
