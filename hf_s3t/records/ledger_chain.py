"""What ledgers that go on from each other have in common: their lines, kept once, and what is asked of them."""

import threading
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from itertools import islice

from ..errors import FolderError
from .ledger_line import LedgerEntry, line_hash
from .stage_history import StageHistory


class DigestLog:
    """
    Digests in the order in which lines brought them, and with which line each came first.

    One thread at a time adds to it; readers ask for what came with the first lines, whatever is added meanwhile.
    """

    def __init__(self) -> None:
        self.order: list[str] = []
        self.line_of: dict[str, int] = {}
        self._counts = array("q", [0])

    def add(self, digests: Iterable[str]) -> None:
        """Add those of one more line."""
        number = len(self._counts)
        for digest in digests:
            if digest not in self.line_of:
                self.order.append(digest)
                self.line_of[digest] = number
        self._counts.append(len(self.order))

    def count(self, lines: int) -> int:
        """How many came with so many first lines."""
        return self._counts[lines]


class Digests(Set[str]):
    """The digests of the first lines of a ledger, as a set that costs nothing to make."""

    def __init__(self, log: DigestLog, lines: int):
        self._log, self._lines, self._count = log, lines, log.count(lines)

    @classmethod
    def _from_iterable(cls, it: Iterable[str]) -> frozenset[str]:  # type: ignore[override]
        return frozenset(it)

    def __contains__(self, digest: object) -> bool:
        return self.line_of(digest) is not None

    def __iter__(self) -> Iterator[str]:
        return islice(self._log.order, self._count)

    def __len__(self) -> int:
        return self._count

    def __le__(self, other: Set[object]) -> bool:
        if isinstance(other, Digests) and self._log is other._log:
            return self._count <= other._count
        if isinstance(other, Digests) and other._count == len(other._log.order):
            return all(map(other._log.line_of.__contains__, self))
        return self._count <= len(other) and all(digest in other for digest in self)

    def __sub__(self, other: Iterable[object]) -> frozenset[str]:
        if isinstance(other, Digests) and self._log is other._log:
            return frozenset(self._log.order[other._count : self._count])
        return frozenset(self) - frozenset(other)

    def __ge__(self, other: Set[object]) -> bool:
        return other <= self if isinstance(other, Digests) else super().__ge__(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(set(self))

    def line_of(self, digest: object) -> int | None:
        """Number of the line, counted from 1, that brought a digest first."""
        number = self._log.line_of.get(digest)  # type: ignore[call-overload]
        return number if number is not None and number <= self._lines else None

    def since(self, lines: int) -> Sequence[str]:
        """Those that came after so many first lines."""
        return self._log.order[self._log.count(lines) : self._count]


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
        self._deletions.append(self._deletions[-1] + (entry.kind == "deletion"))
        self._loose.append(loose)
        self.deleted.add(entry.ids if entry.kind == "deletion" else ())
        self.groups.add(entry.groups)
        self.history.add(entry, previous[0] if previous else -1)
        self.index_of[found] = len(self.hashes)
        self.hashes.append(found)

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
