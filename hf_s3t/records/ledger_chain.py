"""What ledgers that go on from each other have in common: their lines, kept once, and what is asked of them."""

import threading
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping

from ..errors import FolderError
from .digest_log import DigestLog
from .ledger_line import LedgerEntry, line_hash
from .stage_history import StageHistory


class LedgerChain:
    """
    Lines, each of which was checked to continue others. It only grows, and under its lock.

    A ledger is the first so many lines of one. Nothing here is read again, hashed again or copied when a line comes.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.hashes: list[str] = []
        self.index_of: dict[str, int] = {}
        self.deleted, self.groups = DigestLog(), DigestLog()
        self.history = StageHistory(self.entry)
        self._lines: list[str | tuple[str, ...]] = []
        # Of lines of version 1, which list every stage that stays: each part of theirs once.
        self._parts: dict[str, str] = {}
        # Up to each line: bytes in the file, deletions, and how many lines no other continues.
        self._ends, self._deletions, self._loose = array("q", [0]), array("q", [0]), array("q", [0])
        self._continued = bytearray()
        # The lines that added rows; and up to each line since the first of them, which of these it knows, as bits.
        self.additions: list[int] = []
        self._known_additions: dict[int, int] = {}
        # Lines that do not follow just the one before them, and those that they follow.
        self._joints: dict[int, tuple[int, ...]] = {}

    def __len__(self) -> int:
        return len(self.hashes)

    def line(self, index: int) -> str:
        """The text of a line, without the line break."""
        line = self._lines[index]
        return line if isinstance(line, str) else ",".join(line)

    def entry(self, index: int) -> LedgerEntry:
        """What a line says."""
        return LedgerEntry.from_line(self.line(index))

    def size(self, lines: int) -> int:
        """Bytes of so many first lines in the file."""
        return self._ends[lines]

    def num_deletions(self, lines: int) -> int:
        """How many of so many first lines are deletions."""
        return self._deletions[lines]

    def is_whole(self, lines: int) -> bool:
        """Whether so many first lines are a ledger: the last of them continues all the others."""
        return self._loose[lines] <= 1

    def add(self, line: str, entry: LedgerEntry, found: str) -> None:
        """Add a line that was checked, and its hash."""
        previous = [self.index_of[one] for one in entry.previous]
        loose = self._loose[-1] + 1 - sum(not self._continued[index] for index in set(previous))
        for index in previous:
            self._continued[index] = True
        self._continued.append(False)
        split = entry.version == 1
        self._lines.append(tuple(self._parts.setdefault(p, p) for p in line.split(",")) if split else line)
        self._ends.append(self._ends[-1] + len(line.encode()) + 1)
        self._deletions.append(self._deletions[-1] + entry.deletes)
        self._loose.append(loose)
        if previous != [len(self) - 1]:
            self._joints[len(self)] = tuple(previous)
        knows = self._knowing(len(self)) if entry.back or entry.again_groups else _everything
        self.deleted.add(entry.ids if entry.deletes else (), entry.back, knows)
        self.groups.add(entry.groups, entry.again_groups, knows)
        self._note_additions(entry.adds, previous)
        self.history.add(entry, previous[0] if previous else -1)
        self.index_of[found] = len(self.hashes)
        self.hashes.append(found)

    def _note_additions(self, adds: bool, previous: list[int]) -> None:
        known = 0
        for index in previous:
            known |= self._known_additions.get(index, 0)
        if adds:
            known |= 1 << len(self.additions)
            self.additions.append(len(self))
        if known:
            self._known_additions[len(self)] = known

    def _knowing(self, index: int) -> Callable[[int], bool]:
        """Which lines, counted from 1, a line that is about to be added goes on from, itself among them."""
        known, waiting = {index}, [index]
        while waiting:
            at = waiting.pop()
            for one in self._joints.get(at, (at - 1,)):
                if one >= 0 and one not in known:
                    known.add(one)
                    waiting.append(one)
        return lambda line: line - 1 in known

    def generations(self, lines: int) -> tuple[frozenset[int], ...]:
        """
        Which additions a copy of the system had at one time or another, the newest state first and the one before any
        addition last. Additions are counted from 1.
        """
        found = {known: None for at, known in self._known_additions.items() if at < lines}
        return tuple(_bits(known) for known in (*reversed(found), 0))

    def first(self, lines: int) -> "LedgerChain":
        """Another chain that begins with so many lines of this one, to go on otherwise."""
        other = LedgerChain()
        for index in range(lines):
            other.add(self.line(index), self.entry(index), self.hashes[index])
        return other

    def checked(self, lines: Iterable[str]) -> Iterator[tuple[str, LedgerEntry, str]]:
        """
        Lines that continue this chain, each with what it says and its hash, as `add` takes them.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a line is corrupt or the chain is broken; after the last line, too.
        """
        known, start = self.index_of, len(self)
        new: dict[str, int] = {}
        # What no line continues yet; after the last line that is the last line alone.
        loose = set(self.hashes[-1:])
        for number, line in enumerate(lines, start=start + 1):
            entry, found = LedgerEntry.from_line(line), line_hash(line)
            if not all(one in known or one in new for one in entry.previous) or found in known or found in new:
                raise broken(number)
            loose.difference_update(entry.previous)
            loose.add(found)
            yield line, entry, found
            new[found] = number
        if len(loose) > 1:
            # Two processes' lines stand side by side only where a merge follows them.
            raise broken(min(new[one] if one in new else known[one] + 1 for one in loose) + 1)


def _everything(line: int) -> bool:
    return True


def _bits(number: int) -> frozenset[int]:
    return frozenset(at + 1 for at in range(number.bit_length()) if number >> at & 1)


def broken(number: int) -> FolderError:
    """The error for a line that does not continue those before it."""
    return FolderError(
        f"ledger.jsonl line {number} does not continue line {number - 1}: a line was edited or dropped. Restore the "
        "ledger from a backup; do not serve this system."
    )


def changes_between(
    known: Mapping[str, str], now: Mapping[str, str], removed: Mapping[str, str]
) -> tuple[dict[str, str], tuple[str, ...]]:
    """What a line has to say of stages besides those it removes: those grown since, and those missing since."""
    if known == now:
        return {}, ()
    other = {name: digest for name, digest in now.items() if known.get(name) != digest}
    in_both = len(now) - sum(name not in known for name in other)
    gone = [name for name in known if name not in now] if in_both < len(known) else []
    grown = {name: digest for name, digest in other.items() if name not in removed}
    return grown, tuple(sorted(name for name in gone if name not in removed))
