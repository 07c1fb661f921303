"""Digests of what was deleted, in the order of the lines that did it, and which of them somebody brought back."""

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from itertools import islice


class DigestLog:
    """
    Digests in the order in which lines deleted them, and by which lines. Lines are counted from 1.

    What was deleted may come back, by a line that names it: then it counts as deleted no more, as far as that line
    knew of the deletions. Where two histories meet, a deletion that the other did not know of stays in force.

    One thread at a time adds to it; readers ask for what came with the first lines, whatever is added meanwhile.
    """

    def __init__(self) -> None:
        self.order: list[str] = []
        self.line_of: dict[str, int] = {}
        # Of what ever came back: by which lines it was deleted, each with the line that brought it back, 0 if none.
        self.spells: dict[str, list[tuple[int, int]]] = {}
        # Of what was deleted by more than one line, the further ones.
        self._more: dict[str, list[int]] = {}
        self._counts = array("q", [0])

    def add(
        self, digests: Iterable[str], back: Iterable[str] = (), knows: Callable[[int], bool] = lambda line: True
    ) -> None:
        """
        Add those of one more line.

        Args:
            digests (iterable of `str`): What the line deletes.
            back (iterable of `str`): What it brings back.
            knows (callable): Whether the line knows of another one, or is that one.
        """
        number = len(self._counts)
        for digest in digests:
            if digest not in self.line_of:
                self.order.append(digest)
                self.line_of[digest] = number
                continue
            self._more.setdefault(digest, []).append(number)
            if digest in self.spells:
                # Rows that came back go again.
                self.order.append(digest)
                self.spells[digest] = [*self.spells[digest], (number, 0)]
        for digest in back:
            if digest in self.line_of:
                first = [(line, 0) for line in (self.line_of[digest], *self._more.get(digest, ()))]
                known = self.spells.get(digest, first)
                self.spells[digest] = [(gone, came or (number if knows(gone) else 0)) for gone, came in known]
        self._counts.append(len(self.order))

    def count(self, lines: int) -> int:
        """How many came with so many first lines."""
        return self._counts[lines]

    def is_in_force(self, digest: str, lines: int) -> bool:
        """Whether something counts as deleted after so many first lines."""
        spells = self.spells.get(digest)
        if spells is None:
            return self.line_of.get(digest, lines + 1) <= lines
        return any(gone <= lines and not 0 < came <= lines for gone, came in spells)

    def last_line_of(self, digest: str, lines: int) -> int | None:
        """The last of so many first lines that deleted something; `None` if none did."""
        found = [self.line_of[digest], *self._more.get(digest, ())] if digest in self.line_of else []
        return max((line for line in found if line <= lines), default=None)


class Digests(Set[str]):
    """The digests that count as deleted after the first lines of a ledger, as a set that costs nothing to make."""

    def __init__(self, log: DigestLog, lines: int):
        self._log, self._lines, self._count = log, lines, log.count(lines)

    @classmethod
    def _from_iterable(cls, it: Iterable[str]) -> frozenset[str]:  # type: ignore[override]
        return frozenset(it)

    @property
    def _is_plain(self) -> bool:
        """Whether nothing ever came back: then all that was deleted counts."""
        return not self._log.spells

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, str) and self._log.is_in_force(digest, self._lines)

    def __iter__(self) -> Iterator[str]:
        first = islice(self._log.order, self._count)
        return first if self._is_plain else iter([one for one in dict.fromkeys(first) if one in self])

    def __len__(self) -> int:
        return self._count if self._is_plain else sum(1 for _ in self)

    def __le__(self, other: Set[object]) -> bool:
        if not self._is_plain:
            return all(digest in other for digest in self)
        if isinstance(other, Digests) and self._log is other._log:
            return self._count <= other._count
        if isinstance(other, Digests) and other._is_plain and other._count == len(other._log.order):
            return all(map(other._log.line_of.__contains__, self))
        return self._count <= len(other) and all(digest in other for digest in self)

    def __sub__(self, other: Iterable[object]) -> frozenset[str]:
        if isinstance(other, Digests) and self._log is other._log and self._is_plain:
            return frozenset(self._log.order[other._count : self._count])
        gone = other if isinstance(other, Set) else frozenset(other)
        return frozenset(digest for digest in self if digest not in gone)

    def __ge__(self, other: Set[object]) -> bool:
        return other <= self if isinstance(other, Digests) else super().__ge__(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return repr(set(self))

    def line_of(self, digest: object) -> int | None:
        """Number of the last line, counted from 1, that deleted something, whether it came back or not."""
        return self._log.last_line_of(digest, self._lines) if isinstance(digest, str) else None

    def since(self, lines: int) -> Sequence[str]:
        """Those that lines after the first so many deleted, whether they came back or not."""
        return self._log.order[self._log.count(lines) : self._count]
