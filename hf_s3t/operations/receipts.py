"""Receipts of deletions: what a line of the ledger proves, in words and in a schema that machines can rely on."""

import os
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import FolderError, UnknownExampleError
from ..folder.foreign import foreign_problem, is_foreign
from ..folder.layout import HEAD_FILE, LEDGER_FILE, SIGNATURES_FILE, TABLE_FILE
from ..folder.ledger_file import pin_problem, read_head, read_ledger_text
from ..folder.signatures_file import Signatures
from ..folder.table_file import read_pin
from ..plan.stages import StageKey
from ..records.digests import DigestKey
from ..records.ledger import Ledger, LedgerEntry, PerLine, line_hash
from ..records.stage_history import StageHistory
from .written_ids import candidates


RECEIPT_VERSION = 1


@dataclass(frozen=True)
class Receipt:
    """
    One line of the ledger as a receipt. It names nobody: ids and groups are digests keyed with the system's secret.

    Args:
        line (`int`): Number of the line, counted from 1.
        hash (`str`): SHA-256 of the line, by which the next line refers to it.
        entry ([`~hf_s3t.records.ledger.LedgerEntry`]): What the line says, with all stages that stay.
        chain_verified (`bool`): Whether the ledger, read as a whole, is the unbroken chain that it was written as.
    """

    line: int
    hash: str
    entry: LedgerEntry
    chain_verified: bool

    def to_dict(self) -> dict[str, Any]:
        """The receipt as plain JSON types; the schema is that of `docs/cli.md`."""
        entry = self.entry
        return {
            "receipt_version": RECEIPT_VERSION,
            "line": self.line,
            "hash": self.hash,
            "previous": list(entry.previous),
            "chain_verified": self.chain_verified,
            "kind": entry.kind,
            "time": entry.time,
            "ids": list(entry.ids),
            "groups": list(entry.groups),
            "stages_removed": _stages(entry.removed if entry.deletes else {}),
            "stages_exported": _stages(entry.removed if entry.kind == "export" else {}),
            "stages_left": _stages(entry.left),
            "versions": dict(entry.versions or {}),
            **({"rows_added": entry.rows} if entry.adds else {}),
        }


@dataclass(frozen=True)
class Receipts:
    """
    The receipts of a whole ledger.

    Args:
        receipts (sequence of [`Receipt`]): One per readable line, oldest first; made when it is asked for.
        problem (`str`, *optional*): What is wrong with the chain; `None` if it is verified.
        ledger ([`~hf_s3t.records.ledger.Ledger`], *optional*): The ledger; `None` if it is no chain.
        signatures ([`~hf_s3t.folder.signatures_file.Signatures`]): What was signed of its lines.
    """

    receipts: Sequence[Receipt]
    problem: str | None = None
    ledger: Ledger | None = field(default=None, compare=False)
    signatures: Signatures = field(default_factory=Signatures, compare=False)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "Receipts":
        """
        The receipts of a system's folder. Only reads, and reads a damaged ledger too: that it is, shows on each.

        Args:
            path (`str` or `os.PathLike`): The folder of the system.

        Returns:
            [`Receipts`]: All that can be read.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If there is no ledger, it is not text, or a link or pipe.
        """
        for part in (Path(path) / name for name in (TABLE_FILE, HEAD_FILE, LEDGER_FILE, SIGNATURES_FILE)):
            if is_foreign(part):
                raise FolderError(foreign_problem(part))
        # The ledger last: whatever another process deletes between two reads, it is never behind the others.
        pins = {TABLE_FILE: _pin_or_error(_table_pin, path), HEAD_FILE: _pin_or_error(read_head, path)}
        text = read_ledger_text(Path(path) / LEDGER_FILE, "Give the folder of a system, or restore it from a backup")
        signatures = Signatures.read(Path(path))
        try:
            ledger = Ledger.parse(text)
        except FolderError as error:
            return cls(_of_damaged(text), str(error), None, signatures)
        problem, hashes, entries = _pin_problem(ledger, pins), ledger.hashes, ledger.entries
        return cls(
            PerLine(len(hashes), lambda n: Receipt(n + 1, hashes[n], entries[n], problem is None)),
            problem,
            ledger,
            signatures,
        )

    def of_line(self, number: int) -> Receipt:
        """
        The receipt of a line.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If there is no such line, or it cannot be read.
        """
        lines = PerLine(len(self.receipts), lambda n: self.receipts[n].line)
        at = bisect_left(lines, number)
        if at < len(lines) and lines[at] == number:
            return self.receipts[at]
        held = f"lines {lines[0]} to {lines[-1]}" if lines else "no line"
        raise UnknownExampleError(f"Got line {number}; the ledger holds {held} that can be read. Choose one of them.")

    def of_id(self, text: str, key: DigestKey) -> tuple[Receipt, ...]:
        """
        The receipts of the deletions of an id.

        Args:
            text (`str`): The id as a text; an integer is recognised too.
            key ([`~hf_s3t.records.digests.DigestKey`]): The system's secret.

        Returns:
            `tuple[Receipt, ...]`: Empty if the ledger knows of no deletion of this id.
        """
        digests = {key.of_id(value) for value in candidates(text)}
        return tuple(r for r in self.receipts if r.entry.deletes and digests.intersection(r.entry.ids))


def _table_pin(path: Path) -> str:
    return read_pin(path / TABLE_FILE)


def _pin_or_error(read: Callable[[Path], str | None], path: str | os.PathLike[str]) -> str | FolderError | None:
    try:
        return read(Path(path))
    except FolderError as error:
        return error


def _pin_problem(ledger: Ledger, pins: Mapping[str, str | FolderError | None]) -> str | None:
    """What is wrong with a ledger whose chain holds: lines missing that other files were written with."""
    for file, pin in pins.items():
        if isinstance(pin, FolderError):
            return f"Whether the ledger lost its last lines cannot be told, because {file} cannot be read: {pin}"
        problem = None if pin is None else pin_problem(ledger, pin, file)
        if problem is not None:
            return problem
    return None


def _of_damaged(text: str) -> Sequence[Receipt]:
    """The receipts of what can be read in a ledger that is no chain: a line follows that before it, if no other."""
    lines: list[tuple[int, str]] = []
    found: dict[str, int] = {}
    history = StageHistory(lambda n: LedgerEntry.from_line(lines[n][1]))
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        try:
            entry = LedgerEntry.from_line(line)
        except FolderError:
            # The problem tells of it; the other lines are still worth showing.
            continue
        history.add(entry, found.get(entry.previous[0] if entry.previous else "", len(lines) - 1))
        found[line_hash(line)] = len(lines)
        lines.append((number, line))
    return PerLine(len(lines), lambda n: Receipt(lines[n][0], line_hash(lines[n][1]), history.in_full(n), False))


def _stages(digests: Mapping[str, str]) -> list[dict[str, Any]]:
    return [{"stage": stage, **_place(stage), "adapter_sha256": digest} for stage, digest in sorted(digests.items())]


def _place(stage: str) -> dict[str, Any]:
    """The shard of a stage and the slices it was trained on; nulls where a foreign line names none."""
    try:
        key = StageKey.from_path(f"stages/{stage}")
    except FolderError:
        return {"shard": None, "slices": None}
    return {"shard": key.shard, "slices": list(key.prefix)}
