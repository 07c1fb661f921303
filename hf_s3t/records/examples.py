"""The table of examples: which id lies in which slice, and the keyed digests that pin slices to their content."""

import hashlib
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..errors import ContentChangedError, ExampleIdError, UnknownExampleError
from ..plan.partition import order_key
from .digests import KeptNames, encode
from .ledger import Ledger
from .request import RequestedExamples


@dataclass(frozen=True)
class Example:
    """Where one example lies, its group, and the keyed digest of its content."""

    shard: int
    slice: int
    digest: str
    group: int | str | None = None


class Remaining(Mapping[int | str, Example]):
    """
    The rows of a table less some, without a copy of the others, for which a deletion would have to wait.

    Args:
        rows (mapping): All rows.
        gone (`frozenset`): The keys that are left out.
    """

    def __init__(self, rows: Mapping[int | str, Example], gone: frozenset[int | str]):
        self._rows, self._gone = rows, gone

    @classmethod
    def of(cls, rows: Mapping[int | str, Example], gone: frozenset[int | str]) -> "Remaining":
        """The rows less some more; every one of these must be there."""
        if isinstance(rows, cls):
            return cls(rows._rows, rows._gone | gone)
        return cls(rows, gone)

    def __getitem__(self, key: int | str) -> Example:
        if key in self._gone:
            raise KeyError(key)
        return self._rows[key]

    def __contains__(self, key: object) -> bool:
        return key not in self._gone and key in self._rows

    def __iter__(self) -> Iterator[int | str]:
        return (key for key in self._rows if key not in self._gone)

    def __len__(self) -> int:
        return len(self._rows) - len(self._gone)


@dataclass(frozen=True)
class ExampleTable:
    """
    The examples that are in, immutable: removing examples gives a new table.

    Args:
        rows (mapping from id to [`Example`]): The examples by id.
        num_shards (`int`): Number of shards.
        num_slices (`int`): Number of slices per shard.
        seed (`int`): The system's seed, which orders the examples inside a slice.
    """

    rows: Mapping[int | str, Example]
    num_shards: int
    num_slices: int
    seed: int

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def _members(self) -> dict[tuple[int, int], list[int | str]]:
        members: dict[tuple[int, int], list[int | str]] = {
            (k, s): [] for k in range(self.num_shards) for s in range(self.num_slices)
        }
        for example_id, row in self.rows.items():
            members[row.shard, row.slice].append(example_id)
        return members

    @cached_property
    def _digests(self) -> dict[tuple[int, int], str]:
        return {}

    @cached_property
    def groups(self) -> dict[int | str, list[int | str]]:
        """The ids of every group."""
        groups: dict[int | str, list[int | str]] = {}
        for example_id, row in self.rows.items():
            if row.group is not None:
                groups.setdefault(row.group, []).append(example_id)
        return groups

    @property
    def empty(self) -> frozenset[tuple[int, int]]:
        """The (shard, slice) pairs without examples."""
        return frozenset(place for place, members in self._members.items() if not members)

    def members(
        self, shard: int, slice_: int, original: Mapping[int | str, int | str] | None = None
    ) -> list[int | str]:
        """
        The ids of a slice, ordered by a hash of the id: the order of the dataset's rows does not matter.

        Args:
            shard (`int`): Number of the shard.
            slice_ (`int`): Number of the slice.
            original (mapping, *optional*): The dataset's ids by those of the table, where those are digests and the
                order shall be the same as without.
        """

        def order(kept: int | str) -> tuple[Any, str]:
            example_id = kept if original is None else original.get(kept, kept)
            return order_key(example_id, self.seed), str(example_id)

        return sorted(self._members[shard, slice_], key=order)

    def size(self, shard: int, slice_: int) -> int:
        """Number of examples in a slice."""
        return len(self._members[shard, slice_])

    def duplicates_of(self, ids: Iterable[int | str]) -> list[int | str]:
        """The other examples whose content equals that of one of the ids."""
        named = dict.fromkeys(ids)
        contents = dict.fromkeys(self.rows[i].digest for i in named)
        return [
            i for content in contents for i in self._by_content.get(content, ()) if i in self.rows and i not in named
        ]

    @cached_property
    def _by_content(self) -> dict[str, list[int | str]]:
        """The ids of every content that more than one example had when this was first asked for."""
        ids: dict[str, list[int | str]] = {}
        for example_id, row in self.rows.items():
            ids.setdefault(row.digest, []).append(example_id)
        return {content: same for content, same in ids.items() if len(same) > 1}

    def index(self) -> "ExampleTable":
        """Compute now what the first deletion would otherwise wait for."""
        _ = self._members, self._by_content, self.groups
        for place in self._members:
            self.slice_digest(*place)
        return self

    def slice_digest(self, shard: int, slice_: int) -> str:
        """
        Digest of a slice's remaining ids and contents. It needs no secret, and without it says nothing, because the
        contents enter as keyed digests.
        """
        place = (shard, slice_)
        if place not in self._digests:
            lines = sorted(encode(i) + self.rows[i].digest.encode() for i in self._members[place])
            self._digests[place] = hashlib.sha256(b"\n".join(lines)).hexdigest()
        return self._digests[place]

    def slice_digests(self, shard: int, slices: Iterable[int]) -> list[str]:
        """The digests of some slices of a shard, in their order."""
        return [self.slice_digest(shard, slice_) for slice_ in slices]

    def places(self, ids: Iterable[int | str]) -> set[tuple[int, int]]:
        """The (shard, slice) pairs that hold any of the ids."""
        return {(self.rows[i].shard, self.rows[i].slice) for i in ids}

    def without(self, ids: Iterable[int | str]) -> "ExampleTable":
        """The table less some of its ids. Slices that lose nothing keep their computed digests."""
        gone = frozenset(ids)
        touched = self.places(gone)
        table = ExampleTable(Remaining.of(self.rows, gone), self.num_shards, self.num_slices, self.seed)
        members = {
            place: [i for i in ids_ if i not in gone] if place in touched else ids_
            for place, ids_ in self._members.items()
        }
        # cached_property stores in the instance's dictionary, which a frozen dataclass leaves open.
        table.__dict__["_members"] = members
        table.__dict__["_by_content"] = self._by_content
        table.__dict__["_digests"] = {p: d for p, d in self._digests.items() if p not in touched}
        return table

    def settled(self) -> "ExampleTable":
        """The same table without a trace of what `without` left out."""
        if isinstance(self.rows, dict):
            return self
        table = ExampleTable(dict(self.rows), self.num_shards, self.num_slices, self.seed)
        table.__dict__["_members"], table.__dict__["_digests"] = self._members, self._digests
        return table

    def resolve(
        self,
        ids: Iterable[int | str] | None,
        groups: Iterable[int | str] | None,
        ledger: Ledger,
        names: KeptNames,
        ignore_unknown: bool = False,
    ) -> RequestedExamples:
        """
        The examples that a request names, checked all before any is acted on.

        Args:
            ids (iterable, *optional*): Example ids.
            groups (iterable, *optional*): Group names; all members are meant.
            ledger ([`~hf_s3t.records.ledger.Ledger`]): What was deleted before.
            names ([`KeptNames`]): How the system keeps ids and groups.
            ignore_unknown (`bool`, defaults to `False`): Pass over ids and groups that were never trained on.

        Raises:
            [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
            [`~hf_s3t.errors.UnknownExampleError`]: If an id or group was never trained on.
        """
        wanted = {self.find(i, ledger, names): i for i in listed(ids, "ids")}
        named = {self._find_group(g, ledger, names): g for g in listed(groups, "groups")}
        deleted_groups, unknown_groups = _parted(
            named, self.groups, lambda kept: names.group_digest(kept) in ledger.deleted_groups
        )
        if unknown_groups and not ignore_unknown:
            has_any = self.groups or ledger.deleted_groups
            hint = "name them as there" if has_any else "this system has none, so name examples by their ids"
            raise UnknownExampleError(
                f"Unknown groups: {_some(unknown_groups)}. Groups are the values of `group_column` at the first "
                f"training: {hint}."
            )
        for group in named:
            wanted |= {member: member for member in self.groups.get(group, ()) if member not in wanted}
        present = [kept for kept in wanted if kept in self.rows]
        deleted, unknown = _parted(wanted, self.rows, lambda kept: names.id_digest(kept) in ledger.deleted)
        if unknown and not ignore_unknown:
            raise UnknownExampleError(
                f"Unknown ids: {_some(unknown)}. {'' if names.are_digests else self._id_hint()}Name examples by the "
                "ids that they had at the first training."
            )
        return RequestedExamples(
            present,
            len(deleted),
            [group for group in named if group in self.groups],
            tuple(deleted_groups),
            len(unknown),
            len(unknown_groups),
        )

    def find(self, given: int | str, ledger: Ledger, names: KeptNames) -> int | str:
        """What stands in the table, or stood there, for an id. Where that is a digest, it may be given itself."""
        if names.are_digests and (given in self.rows or given in ledger.deleted):
            return given
        return names.of_id(given)

    def _find_group(self, given: int | str, ledger: Ledger, names: KeptNames) -> int | str:
        if names.are_digests and (given in self.groups or given in ledger.deleted_groups):
            return given
        return names.of_group(given)

    def _id_hint(self) -> str:
        sample = next(iter(self.rows), None)
        if sample is None:
            return ""
        # A text may be somebody's name or address.
        kind = "texts" if isinstance(sample, str) else f"integers such as {sample}"
        return f"The ids of this system are {kind}. "

    def check_dataset(
        self,
        ids: Sequence[int | str],
        digests: Sequence[str],
        ledger: Ledger,
        names: KeptNames,
        groups: Sequence[int | str | None] | None = None,
    ) -> list[int]:
        """
        Match a dataset's rows with the table: which row numbers to train on.

        Rows that the ledger knows as deleted are passed over.

        Args:
            ids (sequence): The id of each row.
            digests (sequence of `str`): The keyed content digest of each row.
            ledger ([`~hf_s3t.records.ledger.Ledger`]): What was deleted.
            names ([`KeptNames`]): How the system keeps ids and groups.
            groups (sequence, *optional*): The group of each row, where the system has groups.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If a row is new to the system.
            [`~hf_s3t.errors.ContentChangedError`]: If the content of a row is not what it was.
            [`~hf_s3t.errors.ExampleIdError`]: If an example of the table is not in the dataset.
        """
        new: list[int | str] = []
        changed: list[int | str] = []
        found: dict[int | str, int] = {}
        for number, (example_id, digest) in enumerate(zip(ids, digests, strict=True)):
            kept = names.of_id(example_id)
            row = self.rows.get(kept)
            if row is None:
                if names.id_digest(kept) not in ledger.deleted:
                    new.append(example_id)
            elif row.digest != digest or (groups is not None and row.group != names.of_group(groups[number])):
                changed.append(example_id)
            else:
                found[kept] = number
        if new:
            raise UnknownExampleError(
                f"The dataset has {len(new)} examples that this system was not partitioned with: {_some(new)}. Leave "
                "them out, or train a new system in another `output_dir`."
            )
        if changed:
            raise ContentChangedError(
                f"The content of {len(changed)} examples is not what it was at the first training: {_some(changed)}. "
                "Restore the rows. If ids are row numbers, they shift when rows leave the dataset: give it as it was, "
                "deleted rows included, or make systems with an `id_column`."
            )
        if len(found) != len(self):
            missing = set(self.rows) - set(found)
            raise ExampleIdError(
                f"The dataset lacks {len(missing)} examples that this system holds: {_some(sorted(missing, key=str))}."
                " If they are to be forgotten, call `unlearn` with these ids; otherwise give the full dataset."
            )
        return list(found.values())


def _parted(
    named: Mapping[int | str, int | str], there: Container[int | str], is_deleted: Callable[[int | str], bool]
) -> tuple[list[int | str], list[int | str]]:
    """What was named, by what would stand for it in the table, and is not there: the deleted, and the unknown."""
    absent = [(is_deleted(kept), given) for kept, given in named.items() if kept not in there]
    return [given for was_in, given in absent if was_in], [given for was_in, given in absent if not was_in]


def listed(values: Any, name: str) -> list[int | str]:
    """
    The ids or groups of a request as plain integers and strings: of a list, an array, a series, a tensor or a column.

    Args:
        values: What was given; `None` is nothing.
        name (`str`): What it was given as, `"ids"` or `"groups"`.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If it is no list of ids: saying what to give.
    """
    if values is None:
        return []
    expected = f"`{name}` must be a list of integers or strings, got"
    if hasattr(values, "columns") or hasattr(values, "column_names"):
        # A table goes over its columns' names, and a name may be an id.
        kind = type(values).__name__
        column = "id" if name == "ids" else "group"
        raise ExampleIdError(f"{expected} a {kind}. Give one column of it, such as `{kind.lower()}['{column}']`.")
    for method in ("tolist", "to_pylist"):
        if hasattr(values, method):
            values = getattr(values, method)()
    if isinstance(values, (bool, float)):
        raise ExampleIdError(f"{expected} {values!r}. {_remedy(values)}")
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ExampleIdError(f"{expected} {values!r}. A single one is a list of one.")
    # What an array or a tensor holds when it has no axis.
    found = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    wrong = [value for value in found if isinstance(value, bool) or not isinstance(value, (int, str))]
    if wrong:
        raise ExampleIdError(f"{expected} among others {_some(wrong)}. {_remedy(wrong[0])}")
    return found


def _remedy(value: Any) -> str:
    """What to do about a value that is no id."""
    if isinstance(value, bool):
        return "A truth names nobody: give the ids of the rows that are meant."
    if isinstance(value, float):
        return "Convert them by `int`; missing values, which turn integers into fractions, have to be dropped first."
    if isinstance(value, (Mapping, list, tuple)):
        return "Give the ids alone, such as `[row['id'] for row in rows]`."
    return "Give the ids as they were at the first training, and leave out what is missing."


def _some(values: Sequence[Any], limit: int = 5) -> str:
    shown = ", ".join(map(repr, list(values)[:limit]))
    return shown + (f" and {len(values) - limit} more" if len(values) > limit else "")
