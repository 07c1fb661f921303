"""The ledger of deletions and additions: append-only lines, each carrying the hash of the line before."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, TypeVar, overload

from ..errors import counted
from .digest_log import Digests
from .ledger_chain import LedgerChain, changes_between
from .ledger_line import KINDS, LEDGER_VERSION, LedgerEntry, line_hash


__all__ = ["KINDS", "LEDGER_VERSION", "Ledger", "LedgerEntry", "line_hash"]

T = TypeVar("T")


class PerLine(Sequence[T]):
    """
    What there is for each line, found when it is asked for. Slices are tuples.

    Args:
        count (`int`): How many there are.
        get (callable): Returns that of a number, counted from 0.
    """

    def __init__(self, count: int, get: Callable[[int], T]):
        self._numbers, self._get = range(count), get

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, index: int) -> T: ...

    @overload
    def __getitem__(self, index: slice) -> tuple[T, ...]: ...

    def __getitem__(self, index: int | slice) -> T | tuple[T, ...]:
        if isinstance(index, slice):
            return tuple(map(self._get, self._numbers[index]))
        return self._get(self._numbers[index])

    def __iter__(self) -> Iterator[T]:
        return map(self._get, self._numbers)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (tuple, PerLine)) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class Ledger:
    """
    The lines of a ledger, checked as a chain. Appending gives a new ledger: nothing here writes to disk.

    Ledgers that go on from each other share their lines, so that appending to the newest, reading on behind its last
    line and comparing them cost what is new, however many lines there are.

    Args:
        lines (iterable of `str`): The lines, oldest first.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If a line is corrupt or the chain is broken.

    Example:

    ```python
    >>> from hf_s3t.records.ledger import Ledger

    >>> ledger = Ledger().append("deletion", ids=["5e0f"], removed={"shard-0/1": "a1"})
    >>> ledger.deleted
    {'5e0f'}
    >>> Ledger.parse(ledger.text) == ledger
    True
    ```
    """

    def __init__(self, lines: Iterable[str] = ()):
        self._chain = LedgerChain()
        for found in self._chain.checked(lines):
            self._chain.add(*found)
        self._count = len(self._chain)

    @classmethod
    def _of(cls, chain: LedgerChain, count: int) -> "Ledger":
        ledger = cls.__new__(cls)
        ledger._chain, ledger._count = chain, count
        return ledger

    @classmethod
    def parse(cls, text: str, known: "Ledger | None" = None) -> "Ledger":
        """
        Read a ledger and check that every line names the hash of the line before.

        An unterminated last line was never acknowledged (the line break is written and synced with it): it is left
        out.

        Args:
            text (`str`): What the file holds.
            known ([`Ledger`], *optional*): Lines of it with which the text begins are not read again.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a line is corrupt or the chain is broken.
        """
        lines = _lines_of(text)
        if known is not None and known._count and all(map(str.__eq__, lines, known.lines)):
            if len(lines) >= known._count:
                return known._with(lines[known._count :])
            if known._chain.is_whole(len(lines)):
                return cls._of(known._chain, len(lines))
        return cls(lines)

    def read_on(self, text: str) -> "Ledger":
        """
        The ledger with the lines that a text adds to it; see `parse`.

        Args:
            text (`str`): What the file holds behind these lines.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a line is corrupt or does not continue these.
        """
        return self._with(_lines_of(text))

    def _with(self, lines: Sequence[str]) -> "Ledger":
        if not lines:
            return self
        with self._chain.lock:
            # Where another went on from here already, this one goes its own way.
            is_newest = len(self._chain) == self._count
            chain = self._chain if is_newest else self._chain.first(self._count)
            # All of them are checked before the first is added.
            for found in list(chain.checked(lines)):
                chain.add(*found)
            return Ledger._of(chain, len(chain))

    def append(
        self,
        kind: str,
        *,
        ids: Iterable[str] = (),
        removed: Mapping[str, str] | None = None,
        stages_now: Mapping[str, str] | None = None,
        versions: Mapping[str, str] | None = None,
        groups: Iterable[str] = (),
        rows: int = 0,
        rows_sha256: str = "",
        again: Iterable[str] = (),
        again_groups: Iterable[str] = (),
    ) -> "Ledger":
        """
        The ledger with one more line, chained to the last. The line says what changed since the last.

        Args:
            kind (`str`): What it notes, of `KINDS`.
            ids (iterable of `str`): Keyed digests of the ids.
            removed (mapping from `str` to `str`, *optional*): Stages removed (or exported), and their digests.
            stages_now (mapping from `str` to `str`, *optional*):
                The stages of a deletion that are there, with the digests of their adapters; what is removed stays out
                of what is left. If not given, nothing else changed.
            versions (mapping from `str` to `str`, *optional*): Of libraries; as in the line before if not given.
            groups (iterable of `str`): Keyed digests of the groups that were named.
            rows (`int`, defaults to 0): How many rows it adds.
            rows_sha256 (`str`, *optional*): SHA-256 of the file that these come in.
            again (iterable of `str`): Keyed digests of ids among them that were deleted before.
            again_groups (iterable of `str`): The same of groups.
        """
        removed, history, last = dict(removed or {}), self._chain.history, self._count - 1
        grown, missing = dict[str, str](), tuple[str, ...]()
        if kind in ("deletion", "replacement") and stages_now is not None:
            grown, missing = changes_between(history.left_at(last), stages_now, removed)
        entry = LedgerEntry(
            kind=kind,
            time=_now(),
            ids=tuple(sorted(ids)),
            removed=removed,
            left={},
            previous=tuple(self.hashes[-1:]),
            versions=None if versions is None or versions == history.versions_at(last) else dict(versions),
            groups=tuple(sorted(groups)),
            grown=grown,
            missing=missing,
            rows=rows,
            rows_sha256=rows_sha256,
            again=tuple(sorted(again)),
            again_groups=tuple(sorted(again_groups)),
        )
        return self._with([entry.to_line()])

    def merge(self, other: "Ledger") -> "Ledger":
        """
        The ledger with the lines of another that it lacks: what two processes recorded apart from each other.

        The lines of this one come first, and a line that continues both comes last, unless the other went on from it.

        Args:
            other ([`Ledger`]): A ledger of the same system.

        Example:

        ```python
        >>> from hf_s3t.records.ledger import Ledger

        >>> common = Ledger().append("deletion", ids=["1"])
        >>> ours, theirs = (common.append("deletion", ids=[i]) for i in "23")
        >>> merged = ours.merge(theirs)
        >>> sorted(merged.deleted), len(merged.entries[-1].previous)
        (['1', '2', '3'], 2)
        >>> theirs.merge(merged).deleted == merged.deleted
        True
        ```
        """
        if other._chain is self._chain:
            return self if other._count <= self._count else other
        new = [n for n, found in enumerate(other.hashes) if not self._knows(found)]
        # A merge that joins what this ledger has in full already says nothing new.
        if not new:
            return self
        lines = [other.lines[n] for n in new]
        if len(other.hashes) - len(new) < self._count:
            previous = (self.hashes[-1], other.hashes[-1])
            lines.append(LedgerEntry("merge", _now(), (), {}, {}, previous).to_line())
        return self._with(lines)

    def _knows(self, found: str) -> bool:
        index = self._chain.index_of.get(found)
        return index is not None and index < self._count

    def starts_with(self, other: "Ledger") -> bool:
        """Whether this ledger has all lines of another, in its order, before any of its own."""
        if other._count > self._count or other._chain is self._chain:
            return other._count <= self._count
        return self._chain.hashes[: other._count] == other._chain.hashes[: other._count]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ledger) and self._count == other._count and self.starts_with(other)

    def __hash__(self) -> int:
        return hash(self.hashes[-1:])

    def __reduce__(self) -> tuple[Any, ...]:
        return Ledger.parse, (self.text,)

    def __repr__(self) -> str:
        return f"Ledger({counted(self._count, 'line')})"

    @property
    def lines(self) -> Sequence[str]:
        """The lines, oldest first."""
        return PerLine(self._count, self._chain.line)

    @property
    def hashes(self) -> Sequence[str]:
        """The hash of every line."""
        return PerLine(self._count, self._chain.hashes.__getitem__)

    @property
    def entries(self) -> Sequence[LedgerEntry]:
        """What the lines say, with all stages that stayed and all library versions."""
        return PerLine(self._count, self._chain.history.in_full)

    def left_at(self, number: int) -> dict[str, str]:
        """
        The stages that stayed at a line, and the digests of their adapters.

        Args:
            number (`int`): Number of the line, counted from 1; of 0, none stayed.
        """
        return self._chain.history.left_at(self._within(number))

    def versions_at(self, number: int) -> dict[str, str]:
        """The library versions at a line, counted from 1: those that were stated last before it, or in it."""
        return dict(self._chain.history.versions_at(self._within(number)))

    def _within(self, number: int) -> int:
        if not 0 <= number <= self._count:
            raise IndexError(f"Got line {number}, expected one of {counted(self._count, 'line')}.")
        return number - 1

    @property
    def additions(self) -> tuple[int, ...]:
        """Numbers of the lines, counted from 1, that added rows."""
        return tuple(line + 1 for line in self._chain.additions if line < self._count)

    @cached_property
    def generations(self) -> tuple[frozenset[int], ...]:
        """
        Which additions, counted from 1, copies of the system had at one time or another: by these a stage may have
        been trained. The newest state comes first, the one before any addition last.
        """
        return self._chain.generations(self._count)

    @cached_property
    def deleted(self) -> Digests:
        """Keyed digests of every id that was deleted and has not come back since."""
        return Digests(self._chain.deleted, self._count)

    @cached_property
    def deleted_groups(self) -> Digests:
        """Keyed digests of every group that was deleted as one and has not come back since."""
        return Digests(self._chain.groups, self._count)

    def deleted_since(self, count: int) -> Sequence[str]:
        """Keyed digests of the ids that lines after so many deleted, in their order: rows that were there are gone."""
        return self.deleted.since(min(count, self._count))

    def line_of_group(self, digest: str) -> int | None:
        """Number of the line, counted from 1, in which a group was deleted as one."""
        return self.deleted_groups.line_of(digest)

    @property
    def num_deletions(self) -> int:
        """Number of deletion requests that removed at least one example."""
        return self._chain.num_deletions(self._count)

    def num_deletions_since(self, count: int) -> int:
        """Number of those that came after so many lines."""
        return self.num_deletions - self._chain.num_deletions(min(count, self._count))

    @property
    def text(self) -> str:
        """The ledger as it stands in the file."""
        return "".join(line + "\n" for line in self.lines)

    def size(self, count: int | None = None) -> int:
        """Bytes of the ledger in the file, or of so many first lines."""
        return self._chain.size(self._count if count is None else count)


def _lines_of(text: str) -> list[str]:
    return text.split("\n")[:-1]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
