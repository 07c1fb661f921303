"""The columns of a table of examples: what is known of a million rows, without a Python object for any of them."""

from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ExampleIdError
from .buffers import (
    arrow_numbers,
    arrow_texts,
    first_bytes,
    from_hexadecimal,
    hexadecimal,
    numbers_of,
)
from .digests import KeptNames


# Up to so many values are sought one by one, each in one pass over a column; more are sorted.
_FEW = 16


class Columns:
    """
    The columns of a table, in the order of its rows; a row is named by its number. Nothing in them changes.

    Args:
        names ([`~hf_s3t.records.digests.KeptNames`]): How ids and groups stand in the table.
        ids (`numpy.ndarray` of integers, or `pyarrow.Array` of texts, *optional*):
            The ids; `None` where the digests of ids stand for them.
        id_digests (`numpy.ndarray`, *optional*):
            The keyed digest of each id, 32 bytes in each row; made of the ids when they are first needed if not given.
        shards (`numpy.ndarray`): The shard of each example.
        slices (`numpy.ndarray`): The slice of each example.
        digests (`numpy.ndarray`): The keyed digest of each content, 32 bytes in each row.
        groups (`pyarrow.Array`, *optional*): The group of each example, integers or texts, if there are any.
        additions (`numpy.ndarray`, *optional*):
            The number of the addition that each example came with, 0 at the first partition; all of them 0 if not
            given.
        more (mapping, *optional*): Further columns by name, which go with their rows.
    """

    def __init__(
        self,
        names: KeptNames,
        *,
        ids: "np.ndarray | pa.Array | None",
        id_digests: np.ndarray | None,
        shards: np.ndarray,
        slices: np.ndarray,
        digests: np.ndarray,
        groups: pa.Array | None = None,
        additions: np.ndarray | None = None,
        more: Mapping[str, pa.Array] | None = None,
    ):
        self.names = names
        self.ids = ids
        self.shards = shards
        self.slices = slices
        self.digests = digests
        self.additions = additions if additions is not None and additions.any() else None
        self.more = dict(more or {})
        encoded = None if groups is None else groups.dictionary_encode()
        # Which of the distinct groups each row has, -1 for none.
        self.group_of: np.ndarray | None = None if encoded is None else _codes(encoded)
        self.group_names: pa.Array | None = None if encoded is None else encoded.dictionary
        self._given_digests = id_digests

    @classmethod
    def of(
        cls,
        names: KeptNames,
        ids: "Sequence[int | str] | np.ndarray",
        shards: np.ndarray,
        slices: np.ndarray,
        digests: np.ndarray,
        groups: Sequence[int | str | None] | None = None,
    ) -> "Columns":
        """
        Columns of what shall stand in a table.

        Args:
            names ([`~hf_s3t.records.digests.KeptNames`]): How ids and groups stand in the table.
            ids (sequence, or `numpy.ndarray` of digests):
                The ids, all integers or all texts; where digests stand for them, these, 32 bytes in each row.
            shards (`numpy.ndarray`): The shard of each.
            slices (`numpy.ndarray`): The slice of each.
            digests (`numpy.ndarray`): The keyed digest of each content, 32 bytes in each row.
            groups (sequence, *optional*): The groups, as they stand in the table; `None` is none.
        """
        columns: dict[str, Any] = {"shards": shards, "slices": slices, "digests": digests}
        if groups is not None and any(group is not None for group in groups):
            columns["groups"] = _names(groups)
        if isinstance(ids, np.ndarray):
            return cls(names, ids=None, id_digests=ids, **columns)
        are_texts = bool(ids) and isinstance(ids[0], str)
        kept = arrow_texts(ids) if are_texts else np.array(ids, np.int64)  # type: ignore[arg-type]
        return cls(names, ids=kept, id_digests=None, **columns)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def are_texts(self) -> bool:
        """Whether ids are texts, as digests are, and not integers."""
        return not isinstance(self.ids, np.ndarray)

    @cached_property
    def id_digests(self) -> np.ndarray:
        """The keyed digest of each id: what the ledger says of it."""
        return self.names.key.of_ids(self._plain_ids()) if self._given_digests is None else self._given_digests

    def _plain_ids(self) -> list[int | str]:
        found: list[int | str] = [] if self.ids is None else self.ids.tolist()
        return found

    def taken(self, numbers: np.ndarray) -> "Columns":
        """The columns of some rows, in the order of their numbers."""
        where = arrow_numbers(numbers)
        digests = None if "id_digests" not in self.__dict__ and self._given_digests is None else self.id_digests
        columns = Columns(
            self.names,
            ids=None if self.ids is None else self.ids[numbers] if not self.are_texts else self.ids.take(where),
            id_digests=None if digests is None else digests[numbers],
            shards=self.shards[numbers],
            slices=self.slices[numbers],
            digests=self.digests[numbers],
            additions=None if self.additions is None else self.additions[numbers],
            more={name: column.take(where) for name, column in self.more.items()},
        )
        if self.group_of is not None:
            columns._keep_groups(self.group_of[numbers], self.group_names)
        if "_index" in self.__dict__:
            columns.__dict__["_index"] = self._index_of(numbers)
        return columns

    def with_more(self, other: "Columns", addition: int | None = None) -> "Columns":
        """
        The columns with the rows of others behind them, which come with an addition.

        Args:
            other ([`Columns`]): The rows that come, of one system with these.
            addition (`int`, *optional*): The number of the addition; those that they have if not given.
        """
        before, after = (
            np.zeros(len(columns), np.int32) if columns.additions is None else columns.additions
            for columns in (self, other)
        )
        if addition is not None:
            after = np.full(len(other), addition, np.int32)
        return Columns(
            self.names,
            ids=_joined_ids(self, other),
            id_digests=np.concatenate([self.id_digests, other.id_digests]),
            shards=np.concatenate([self.shards, other.shards]),
            slices=np.concatenate([self.slices, other.slices]),
            digests=np.concatenate([self.digests, other.digests]),
            groups=_joined_groups(self, other),
            additions=np.concatenate([before, after]),
            more={name: _joined(column, other.more.get(name), len(other)) for name, column in self.more.items()},
        )

    def _keep_groups(self, codes: np.ndarray, names: pa.Array) -> None:
        """Take over groups, of which nothing is kept that no row has."""
        used = np.flatnonzero(np.bincount(codes[codes >= 0], minlength=len(names)))
        new = np.full(len(names) + 1, -1, np.int32)
        new[used] = np.arange(len(used), dtype=np.int32)
        # The last place of `new` is where the code -1 leads.
        self.group_of, self.group_names = new[codes], names.take(arrow_numbers(used))

    def _index_of(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The index of some rows, from the one that is there, for sorting again would take longer."""
        new = np.full(len(self), -1, np.int32)
        new[numbers] = np.arange(len(numbers), dtype=np.int32)
        first, order = self._index
        order = new[order]
        return first[order >= 0], order[order >= 0]

    # By id

    @cached_property
    def _index(self) -> tuple[np.ndarray, np.ndarray]:
        """The first bytes of the digests of ids, sorted, and the numbers of their rows."""
        first = first_bytes(self.id_digests)
        order = np.argsort(first, kind="stable").astype(np.int32)
        return first[order], order

    @property
    def are_unique(self) -> bool:
        """Whether no two rows have one id."""
        if self._given_digests is None and self.ids is not None:
            # Without the secret, which may not be there.
            ids: Any = self.ids
            return len(ids.unique() if self.are_texts else np.unique(ids)) == len(self)
        first, order = self._index
        # Who would have two digests begin alike by chance?
        alike = np.flatnonzero(first[1:] == first[:-1])
        digests = {self.id_digests[order[at]].tobytes() for at in (*alike, *(alike + 1))}
        return len(digests) == len({*alike.tolist(), *(alike + 1).tolist()})

    @property
    def are_digested(self) -> bool:
        """Whether the digests of ids that were given are those of the ids."""
        if self.ids is None or self._given_digests is None:
            return True
        return bool((self.names.key.of_ids(self._plain_ids()) == self._given_digests).all())

    def rows_of_digests(self, digests: np.ndarray) -> np.ndarray:
        """The numbers of the rows whose ids have these keyed digests (bytes, one in each row); -1 where none has."""
        first, order = self._index
        wanted = first_bytes(digests)
        at = np.searchsorted(first, wanted)
        found = np.full(len(digests), -1, np.int64)
        inside = at < len(order)
        inside[inside] = first[at[inside]] == wanted[inside]
        rows = order[at[inside]]
        same = (self.id_digests[rows] == digests[inside]).all(axis=1)
        found[np.flatnonzero(inside)[same]] = rows[same]
        for which in np.flatnonzero(inside)[~same]:
            # Others begin alike.
            for row in order[at[which] : np.searchsorted(first, wanted[which], side="right")]:
                if (self.id_digests[row] == digests[which]).all():
                    found[which] = row
        return found

    def rows_of(self, kept: Sequence[Any]) -> np.ndarray:
        """The numbers of the rows of ids, as these stand in the table; -1 where none has one."""
        if self.names.are_digests:
            digests, no_id = from_hexadecimal(kept)
        else:
            no_id = np.fromiter((not isinstance(i, (int, str, np.integer)) for i in kept), bool, len(kept))
            given: Iterable[Any] = kept if not no_id.any() else (0 if no else i for i, no in zip(kept, no_id))
            digests = self.names.key.of_ids(given)
        found = self.rows_of_digests(digests)
        found[no_id] = -1
        return found

    def kept(self, numbers: np.ndarray) -> list[int | str]:
        """The ids of some rows, as they stand in the table."""
        if self.ids is None:
            return [*hexadecimal(self.id_digests[numbers])]
        found: list[int | str] = (
            self.ids.take(arrow_numbers(numbers)).to_pylist() if self.are_texts else self.ids[numbers].tolist()
        )
        return found

    # By content

    @cached_property
    def _first_of_contents(self) -> np.ndarray:
        return first_bytes(self.digests)

    def rows_of_contents(self, numbers: np.ndarray) -> np.ndarray:
        """The numbers of all rows whose content is that of one of these; content by content, in the order of these."""
        wanted = self._first_of_contents[numbers]
        distinct, first_at = np.unique(wanted, return_index=True)
        if len(distinct) <= _FEW:
            alike = np.zeros(len(self), bool)
            for one in distinct:
                alike |= self._first_of_contents == one
        else:
            alike = np.isin(self._first_of_contents, distinct)
        rows = np.flatnonzero(alike)
        owner = first_at[np.searchsorted(distinct, self._first_of_contents[rows])]
        same = (self.digests[rows] == self.digests[numbers[owner]]).all(axis=1)
        rows, owner = rows[same], owner[same]
        ordered: np.ndarray = rows[np.argsort(owner, kind="stable")]
        return ordered

    # By group

    def codes_of_groups(self, groups: Sequence[Any]) -> np.ndarray:
        """Which of the distinct groups these are; -1 where no row ever had one."""
        found = np.full(len(groups), -1, np.int64)
        if self.group_names is None:
            return found
        are_texts = not pa.types.is_integer(self.group_names.type)
        fits = _is_text if are_texts else _is_number
        which = [number for number, group in enumerate(groups) if fits(group)]
        sought = _names([groups[number] for number in which]).cast(self.group_names.type)
        if len(which) <= _FEW:
            found[which] = [pc.index(self.group_names, one).as_py() for one in sought]
        else:
            codes = pc.index_in(sought, value_set=self.group_names).to_pylist()
            found[which] = [-1 if code is None else code for code in codes]
        return found

    @property
    def groups(self) -> pa.Array | None:
        """The group of each row, as it stands in the table."""
        if self.group_of is None or self.group_names is None:
            return None
        codes = self.group_of
        valid = pa.py_buffer(np.packbits(codes >= 0, bitorder="little"))
        where = pa.Array.from_buffers(pa.int32(), len(codes), [valid, pa.py_buffer(np.maximum(codes, 0))])
        return self.group_names.take(where)

    def named_groups(self, codes: np.ndarray) -> list[int | str]:
        """The groups, as they stand in the table."""
        if self.group_names is None:
            return []
        found: list[int | str] = self.group_names.take(arrow_numbers(codes)).to_pylist()
        return found


def _joined_ids(one: Columns, other: Columns) -> "np.ndarray | pa.Array | None":
    if one.ids is None or not len(one):
        return other.ids
    if not len(other):
        return one.ids
    if one.are_texts != other.are_texts:
        kind, got = ("texts", "integers") if one.are_texts else ("integers", "texts")
        raise ExampleIdError(f"The ids of this system are {kind}, those of the rows that came {got}. Convert them.")
    if one.are_texts:
        return pa.concat_arrays([one.ids, other.ids])
    return np.concatenate([one.ids, other.ids])


def _joined_groups(one: Columns, other: Columns) -> pa.Array | None:
    groups, more = one.groups, other.groups
    if groups is None and more is None:
        return None
    kind = next(array.type for array in (groups, more) if array is not None)
    if groups is not None and more is not None and pa.types.is_integer(groups.type) != pa.types.is_integer(more.type):
        raise ExampleIdError(
            f"The groups of this system are of the type {groups.type}, those of the rows that came of {more.type}. "
            "Convert the column."
        )
    parts = [
        pa.nulls(len(columns), kind) if array is None else array.cast(kind)
        for columns, array in ((one, groups), (other, more))
    ]
    return pa.concat_arrays(parts)


def _joined(column: pa.Array, more: pa.Array | None, rows: int) -> pa.Array:
    return pa.concat_arrays([column, pa.nulls(rows, column.type) if more is None else more.cast(column.type)])


def _names(values: Sequence[int | str | None]) -> pa.Array:
    """Integers or texts, some of which may be none, as an Arrow array."""
    missing = [value is None for value in values]
    if any(isinstance(value, str) for value in values):
        return arrow_texts(["" if value is None else str(value) for value in values], missing)
    numbers = np.array([0 if value is None else value for value in values], np.int64)
    valid = pa.py_buffer(np.packbits(~np.array(missing, bool), bitorder="little"))
    return pa.Array.from_buffers(pa.int64(), len(numbers), [valid, pa.py_buffer(numbers)])


def _codes(encoded: pa.DictionaryArray) -> np.ndarray:
    codes = numbers_of(encoded.indices)
    if not encoded.null_count:
        return codes
    valid = encoded.indices.is_valid().buffers()[1]
    flags = np.unpackbits(np.frombuffer(valid, np.uint8), count=len(codes), bitorder="little").astype(bool)
    return np.where(flags, codes, np.int32(-1))


def _is_text(value: Any) -> bool:
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and bool(-(2**63) <= value < 2**63)
