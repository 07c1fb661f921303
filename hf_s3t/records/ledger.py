"""The deletion ledger: append-only lines, each carrying the hash of the line before."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property

from ..errors import FolderError, FormatVersionError


LEDGER_VERSION = 1
KINDS = ("deletion", "export", "merge")


@dataclass(frozen=True)
class LedgerEntry:
    """
    One line of the ledger. It names nobody: ids appear as digests keyed with the system's secret.

    Args:
        kind (`str`): `"deletion"`, or `"export"` for an adapter handed out that must be revoked by hand.
        time (`str`): UTC time, ISO 8601.
        ids (`tuple[str, ...]`): Keyed digests of the ids, sorted.
        removed (`dict[str, str]`): Stages removed (or exported) and the digests of their adapters.
        left (`dict[str, str]`): Stages that stay and the digests of their adapters.
        previous (`tuple[str, ...]`): Hash of the line before; two after a merge, none in the first line.
        versions (`dict[str, str]`): Library versions.
        groups (`tuple[str, ...]`): Keyed digests of the groups that were named, sorted.
    """

    kind: str
    time: str
    ids: tuple[str, ...]
    removed: dict[str, str]
    left: dict[str, str]
    previous: tuple[str, ...]
    versions: dict[str, str] = field(default_factory=dict)
    groups: tuple[str, ...] = ()

    def to_line(self) -> str:
        """The entry as one line of JSON, without the line break."""
        return json.dumps({"version": LEDGER_VERSION, **vars(self)}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_line(cls, line: str) -> "LedgerEntry":
        """The entry of a line; raises [`~hf_s3t.errors.FolderError`] if it is none."""
        try:
            values = json.loads(line)
            version = values.pop("version")
            if version != LEDGER_VERSION:
                raise FormatVersionError(
                    f"A ledger line has version {version!r}; this hf_s3t reads version {LEDGER_VERSION}."
                )
            entry = cls(
                **{
                    **values,
                    "ids": tuple(values["ids"]),
                    "previous": tuple(values["previous"]),
                    "groups": tuple(values["groups"]),
                }
            )
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FolderError(f"A ledger line cannot be read ({error}): {line[:80]!r}") from error
        texts = (entry.time, *entry.ids, *entry.previous, *entry.groups)
        maps = (entry.removed, entry.left, entry.versions)
        if (
            entry.kind not in KINDS
            or not all(isinstance(text, str) for text in texts)
            or not all(isinstance(m, dict) for m in maps)
        ):
            raise FolderError(f"A ledger line has fields of a wrong type: {line[:80]!r}")
        return entry


def line_hash(line: str) -> str:
    """The hash by which the next line refers to this one."""
    return hashlib.sha256(line.encode()).hexdigest()


def _broken(number: int) -> FolderError:
    return FolderError(
        f"ledger.jsonl line {number} does not continue line {number - 1}: a line was edited or dropped. Restore the "
        "ledger from a backup; do not serve this system."
    )


@dataclass(frozen=True)
class Ledger:
    """
    The lines of a ledger, checked as a chain. Appending gives a new ledger: nothing here writes to disk.

    Args:
        lines (`tuple[str, ...]`): The lines, oldest first.

    Example:

    ```python
    >>> from hf_s3t.records.ledger import Ledger

    >>> ledger = Ledger().append("deletion", ids=["5e0f"], removed={"shard-0/1": "a1"}, left={})
    >>> ledger.deleted
    frozenset({'5e0f'})
    >>> Ledger.parse(ledger.text) == ledger
    True
    ```
    """

    lines: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, known: "Ledger | None" = None) -> "Ledger":
        """
        Read a ledger and check that every line names the hash of the line before.

        An unterminated last line was never acknowledged (the line break is written and synced with it): it is left
        out.

        Args:
            text (`str`): What the file holds.
            known ([`Ledger`], *optional*): Where the text begins with these lines, they are not read again.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If a line is corrupt or the chain is broken.
        """
        lines = tuple(text.split("\n")[:-1])
        if known is None or lines[: len(known.lines)] != known.lines:
            known = cls()
        entries = known.entries
        hashes = dict.fromkeys(known.hashes)
        # What no line continues yet; after the last line that is the last line alone.
        loose = set(known.hashes[-1:])
        for number, line in enumerate(lines[len(entries) :], start=len(entries) + 1):
            entry = LedgerEntry.from_line(line)
            if not hashes.keys() >= set(entry.previous):
                raise _broken(number)
            found = line_hash(line)
            if found in hashes:
                raise _broken(number)
            hashes[found] = None
            loose = (loose - set(entry.previous)) | {found}
            entries += (entry,)
        if len(loose) > 1:
            # Two processes' lines stand side by side only where a merge follows them.
            raise _broken(next(n for n, h in enumerate(hashes, start=1) if h in loose) + 1)
        return cls(lines)._with(entries)

    def _with(self, entries: tuple[LedgerEntry, ...]) -> "Ledger":
        # cached_property stores in the instance's dictionary, which a frozen dataclass leaves open.
        self.__dict__["entries"] = entries
        return self

    def append(
        self,
        kind: str,
        *,
        ids: Sequence[str],
        removed: dict[str, str],
        left: dict[str, str],
        versions: dict[str, str] | None = None,
        groups: Sequence[str] = (),
    ) -> "Ledger":
        """The ledger with one more line, chained to the last."""
        entry = LedgerEntry(
            kind=kind,
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            ids=tuple(sorted(ids)),
            removed=dict(removed),
            left=dict(left),
            previous=self.hashes[-1:],
            versions=dict(versions or {}),
            groups=tuple(sorted(groups)),
        )
        return Ledger((*self.lines, entry.to_line()))._with((*self.entries, entry))

    def merge(self, other: "Ledger") -> "Ledger":
        """
        The ledger with the lines of another that it lacks: what two processes recorded apart from each other.

        The lines of this one come first, and a line that continues both comes last, unless the other went on from it.

        Args:
            other ([`Ledger`]): A ledger of the same system.

        Example:

        ```python
        >>> from hf_s3t.records.ledger import Ledger

        >>> common = Ledger().append("deletion", ids=["1"], removed={}, left={})
        >>> ours, theirs = (common.append("deletion", ids=[i], removed={}, left={}) for i in "23")
        >>> merged = ours.merge(theirs)
        >>> sorted(merged.deleted), len(merged.entries[-1].previous)
        (['1', '2', '3'], 2)
        >>> theirs.merge(merged).deleted == merged.deleted
        True
        ```
        """
        known = set(self.lines)
        # A merge that joins what this ledger has in full already says nothing new.
        new = [line for line in other.lines if line not in known]
        if not new:
            return self
        lines = (*self.lines, *new)
        if not self.lines or set(other.lines) >= known:
            return Ledger.parse("".join(line + "\n" for line in lines))
        entry = LedgerEntry(
            kind="merge",
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            ids=(),
            removed={},
            left={},
            previous=(self.hashes[-1], other.hashes[-1]),
        )
        return Ledger.parse("".join(line + "\n" for line in (*lines, entry.to_line())))

    @cached_property
    def hashes(self) -> tuple[str, ...]:
        """The hash of every line."""
        return tuple(map(line_hash, self.lines))

    @cached_property
    def entries(self) -> tuple[LedgerEntry, ...]:
        """The lines, read."""
        return tuple(LedgerEntry.from_line(line) for line in self.lines)

    @cached_property
    def deleted(self) -> frozenset[str]:
        """Keyed digests of every id that was deleted."""
        return frozenset(digest for entry in self.entries if entry.kind == "deletion" for digest in entry.ids)

    @cached_property
    def deleted_groups(self) -> frozenset[str]:
        """Keyed digests of every group that was deleted as one."""
        return frozenset(digest for entry in self.entries for digest in entry.groups)

    def line_of_group(self, digest: str) -> int | None:
        """Number of the line, counted from 1, in which a group was deleted as one."""
        return next((n for n, entry in enumerate(self.entries, start=1) if digest in entry.groups), None)

    @property
    def num_deletions(self) -> int:
        """Number of deletion requests that removed at least one example."""
        return sum(entry.kind == "deletion" for entry in self.entries)

    @property
    def text(self) -> str:
        """The ledger as it stands in the file."""
        return "".join(line + "\n" for line in self.lines)
