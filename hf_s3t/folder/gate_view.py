"""What a folder says of its gate, which goes by the ledger as the table does."""

import os
import threading
import warnings
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import S3TConfig
from ..errors import FolderError, counted
from ..records.ledger import Ledger
from ..records.terms import TermCounts
from .files import Stamp, stamp
from .gate_file import GateHead, StoredGate, no_gate, read_gate, read_gate_head
from .layout import GATE_FILE, LEDGER_FILE
from .ledger_file import holds, pin_of, require_pinned


class GateView:
    """The part of [`~hf_s3t.folder.view.FolderView`] that reads the gate, when it is asked for."""

    path: Path
    record: dict[str, Any]
    config: S3TConfig
    ledger: Ledger
    _reading: threading.RLock

    if TYPE_CHECKING:

        def refresh_ledger(self) -> None:
            """Read on in the ledger."""

    def _begin_gate(self) -> None:
        # As it was last read, less what was deleted until a line of the ledger.
        self._gate: StoredGate | None = None
        self._gate_stamp: Stamp | None = None
        self._gate_ledger = Ledger()

    @property
    def has_gate(self) -> bool:
        """Whether there is a gate."""
        return os.path.lexists(self._gate_path())

    def _gate_path(self) -> Path:
        return self.path / GATE_FILE

    def gate_head(self) -> GateHead:
        """
        What the file of the gate says of it as a whole: a look at its beginning.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If there is none, or it is none of this system.
        """
        return read_gate_head(self._gate_path(), self.record["key_check"])

    @property
    def is_gate_behind(self) -> bool:
        """Whether lines came to the ledger since the gate on the disk was written: it may hold deleted rows."""
        return self.has_gate and self.gate_head().pin != pin_of(self.ledger)

    @property
    def term_counts(self) -> TermCounts:
        """
        The counts of the gate, without the rows that the ledger deleted, whoever wrote its lines.

        Raises:
            [`~hf_s3t.errors.FolderError`]: As `load_gate`.
        """
        return self.load_gate().counts

    @property
    def gate_tokenizer_digest(self) -> str:
        """
        The digest of the tokenizer that the gate read rows by; see [`~hf_s3t.records.terms.vocabulary_digest`].

        Raises:
            [`~hf_s3t.errors.FolderError`]: As `load_gate`.
        """
        return self.load_gate().tokenizer_digest

    def load_gate(self) -> StoredGate:
        """
        The gate, without the rows that the ledger deleted; read again only where another was made.

        Returns:
            [`~hf_s3t.folder.gate_file.StoredGate`]: The same object until something changes.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If there is none, or it is damaged or another system's: saying what to do.
            [`~hf_s3t.errors.FormatVersionError`]: If a newer hf_s3t wrote it.
        """
        with self._reading:
            file = self._gate_path()
            found = stamp(file)
            if found is None:
                raise no_gate(file)
            if self._gate is None or found != self._gate_stamp:
                self._read_gate(file)
                self._gate_stamp = found
            if self._gate_ledger is not self.ledger:
                self._gate = self._gate_now().without(self._deleted_since(len(self._gate_ledger.lines)))
                self._gate_ledger = self.ledger
            # Shards that were added since it was made.
            self._gate = self._gate_now().of_shards(self.config.num_shards)
            return self._gate

    def _gate_now(self) -> StoredGate:
        if self._gate is None:
            raise no_gate(self._gate_path())
        return self._gate

    def _read_gate(self, file: Path) -> None:
        known, head = self._gate, read_gate_head(file, self.record["key_check"])
        if known is not None and known.build == head.build:
            # Another process wrote it without rows that a line of the ledger deleted, as that has to be done here.
            self._require_gate_pinned(head.pin)
            return
        gate, pin = read_gate(file, self.record["key_check"], self.config)
        self._require_gate_pinned(pin)
        self._gate = gate.without(self._deleted_since(int(pin.partition(" ")[0])))
        self._gate_ledger = self.ledger

    def _require_gate_pinned(self, pin: str) -> None:
        if not holds(self.ledger, pin):
            # The ledger is never behind a gate that was written since.
            self.refresh_ledger()
        require_pinned(self.path / LEDGER_FILE, self.ledger, pin, GATE_FILE)

    def _deleted_since(self, lines: int) -> Collection[str]:
        """The digests of the ids that lines after the first so many deleted."""
        return self.ledger.deleted_since(lines)

    def _with_words_of_others(self, gate: StoredGate, others: np.ndarray) -> StoredGate:
        """Another gate with what this one has of rows that it lacks, by the keyed digests of their ids."""
        if not len(others):
            return gate
        try:
            earlier = self.load_gate()
            if earlier.tokenizer_digest == gate.tokenizer_digest:
                return gate.keeping(earlier, others)
            why = "the gate there reads rows by another tokenizer."
        except FolderError as error:
            # One that is not there or is damaged is made anew without them.
            why = str(error)
        warnings.warn(
            f"The gate lacks the words of {counted(len(others), 'row')} that another trainer brought: {why} Call "
            "`build_gate()` of a trainer that has all rows.",
            stacklevel=2,
        )
        return gate

    @property
    def _gate_holds_deleted_rows(self) -> bool:
        return self._gate is not None and not self._gate.is_settled

    def _let_go_of_deleted_terms(self) -> None:
        gate = self._gate
        if gate is not None and not gate.is_settled:
            without = gate.settled()
            with self._reading:
                if self._gate is gate:
                    self._gate = without
