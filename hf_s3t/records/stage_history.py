"""Which stages stayed at each line of a ledger, found from what the lines say of changes."""

import threading
from array import array
from collections.abc import Callable, Mapping
from dataclasses import replace

from .ledger_line import LedgerEntry


# Lines between two of which all stages are kept: no older line is further than that from one that knows.
_FAR = 256


class StageHistory:
    """
    Stages and library versions at each line. What stayed at a line is what stayed at the line before (its first
    `previous`), with those that it says were grown, without those removed and missing.

    Lines are counted from 0 here.

    Args:
        entry_of (callable): What the line of a number says; asked again for older lines.
    """

    def __init__(self, entry_of: Callable[[int], LedgerEntry]):
        self._entry_of = entry_of
        self._before = array("q")
        self._in_full = bytearray()
        self._versions: list[Mapping[str, str]] = []
        # The stages at one line, carried on from line to line; at others from time to time; where one looked last.
        self._newest, self._left = -1, dict[str, str]()
        self._kept: dict[int, dict[str, str]] = {}
        self._asked: tuple[int, dict[str, str]] = (-1, {})
        self._lock = threading.RLock()

    def add(self, entry: LedgerEntry, before: int) -> None:
        """Take in one more line, which follows that of the number `before`; -1 for the first."""
        with self._lock:
            number = len(self._before)
            self._before.append(before)
            self._in_full.append(_says_all(entry))
            # A merge says nothing of the libraries.
            stated = entry.versions if entry.kind != "merge" else None
            known = self.versions_at(before)
            self._versions.append(known if stated is None or stated == known else stated)
            if before == self._newest:
                self._newest = number
                _apply(entry, self._left)
                if number % _FAR == 0 and not self._in_full[number]:
                    self._kept[number] = dict(self._left)

    def versions_at(self, number: int) -> Mapping[str, str]:
        """The library versions that a line was written with."""
        return self._versions[number] if number >= 0 else {}

    def in_full(self, number: int) -> LedgerEntry:
        """What a line says, with the stages that stayed and the library versions."""
        entry = self._entry_of(number)
        if entry.version == 1:
            return entry
        left = self.left_at(number) if entry.deletes else {}
        versions = dict(self.versions_at(number)) if entry.deletes or entry.kind == "export" else {}
        return replace(entry, left=left, versions=versions)

    def left_at(self, number: int) -> dict[str, str]:
        """The stages that stayed at a line, and the digests of their adapters."""
        with self._lock:
            steps, at = [], number
            while (known := self._known_at(at)) is None:
                steps.append(at)
                at = self._before[at]
            left = dict(known)
            for step in reversed(steps):
                _apply(self._entry_of(step), left)
            if steps:
                # Who asks for one line after the other is told each at the cost of one.
                self._asked = (number, dict(left))
            return left

    def _known_at(self, number: int) -> dict[str, str] | None:
        if number == -1:
            return {}
        if number == self._newest:
            return self._left
        if number == self._asked[0]:
            return self._asked[1]
        if self._in_full[number]:
            return self._entry_of(number).left
        return self._kept.get(number)


def _says_all(entry: LedgerEntry) -> bool:
    return entry.version == 1 and entry.kind == "deletion"


def _apply(entry: LedgerEntry, left: dict[str, str]) -> None:
    if _says_all(entry):
        left.clear()
        left.update(entry.left)
    elif entry.deletes:
        left.update(entry.grown)
        for name in (*entry.removed, *entry.missing):
            left.pop(name, None)
