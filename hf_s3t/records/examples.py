"""The table of examples: which id lies in which slice, and the keyed digests that pin slices to their content."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..errors import ContentChangedError, ExampleIdError, UnknownExampleError, counted
from ..plan.partition import in_order
from .buffers import DIGEST_BYTES, MODULUS, arrow_texts, digests_of, from_hexadecimal, hexadecimal, sums_of
from .columns import Columns
from .digests import KeptNames
from .ledger import Ledger
from .request import some


# Rows that are made objects of at once by who goes through all.
_AT_ONCE = 10_000


@dataclass(frozen=True)
class Example:
    """Where one example lies, its group, and the keyed digest of its content."""

    shard: int
    slice: int
    digest: str
    group: int | str | None = None


class Rows(Mapping[int | str, Example]):
    """
    The rows of a table by id, as they stand there: read from the columns, one or many at a time.

    Args:
        table ([`ExampleTable`]): The table.
    """

    def __init__(self, table: "ExampleTable"):
        self.table = table

    def __getitem__(self, kept: int | str) -> Example:
        (row,) = self.table.rows_of([kept])
        if row < 0:
            raise KeyError(kept)
        return self.table.example(row)

    def __contains__(self, kept: object) -> bool:
        return bool(self.table.rows_of([kept])[0] >= 0)

    def __iter__(self) -> Iterator[int | str]:
        rows = self.table.row_numbers
        for begin in range(0, len(rows), _AT_ONCE):
            yield from self.table.columns.kept(rows[begin : begin + _AT_ONCE])

    def __len__(self) -> int:
        return len(self.table)


class Groups(Mapping[int | str, list[int | str]]):
    """
    The ids of every group of a table, found when they are asked for.

    Args:
        table ([`ExampleTable`]): The table.
    """

    def __init__(self, table: "ExampleTable"):
        self.table = table

    def __getitem__(self, group: int | str) -> list[int | str]:
        rows = self.table.rows_of_groups([group])
        if not len(rows):
            raise KeyError(group)
        return self.table.columns.kept(rows)

    def __contains__(self, group: object) -> bool:
        return bool(self.table.sizes_of_groups([group])[0])

    def __iter__(self) -> Iterator[int | str]:
        codes = np.flatnonzero(self.table._group_sizes)
        for begin in range(0, len(codes), _AT_ONCE):
            yield from self.table.columns.named_groups(codes[begin : begin + _AT_ONCE])

    def __len__(self) -> int:
        return int(np.count_nonzero(self.table._group_sizes))


class ExampleTable:
    """
    The examples that are in, immutable: removing examples gives a new table, which shares the columns of this one.

    Args:
        columns ([`~hf_s3t.records.columns.Columns`]): What is known of each example.
        num_shards (`int`): Number of shards.
        num_slices (`int`): Number of slices per shard.
        seed (`int`): The system's seed, which orders the examples inside a slice.
        slice_digests (mapping from (shard, slice) to `str`, *optional*):
            The digests of slices, as far as they are known; see [`ExampleTable.slice_digest`].
    """

    def __init__(
        self,
        columns: Columns,
        num_shards: int,
        num_slices: int,
        seed: int,
        slice_digests: Mapping[tuple[int, int], str] | None = None,
    ):
        self.columns = columns
        self.num_shards = num_shards
        self.num_slices = num_slices
        self.seed = seed
        # Which rows are in.
        self._is_in = np.ones(len(columns), bool)
        self._sizes = np.bincount(self._cells, minlength=num_shards * num_slices)
        # The sums that are the digests of slices, as far as they are known.
        self._sums = {self._cell(*place): int(digest, 16) for place, digest in (slice_digests or {}).items()}
        # Per slice and addition what its rows have part in these, once it was asked for.
        self._parts: dict[int, dict[int, int]] | None = None

    @classmethod
    def of(
        cls, rows: Mapping[int | str, Example], num_shards: int, num_slices: int, seed: int, names: KeptNames
    ) -> "ExampleTable":
        """
        A table of rows by id, as ids stand in the table.

        Args:
            rows (mapping from id to [`Example`]): The rows.
            num_shards (`int`): Number of shards.
            num_slices (`int`): Number of slices per shard.
            seed (`int`): The system's seed.
            names ([`~hf_s3t.records.digests.KeptNames`]): How ids and groups stand in the table.
        """
        found = list(rows.values())
        columns = Columns.of(
            names,
            from_hexadecimal(list(rows))[0] if names.are_digests else list(rows),
            np.array([row.shard for row in found], np.int32),
            np.array([row.slice for row in found], np.int32),
            digests_of(arrow_texts([row.digest for row in found])),
            [row.group for row in found],
        )
        return cls(columns, num_shards, num_slices, seed)

    def __len__(self) -> int:
        return int(self._sizes.sum())

    @property
    def names(self) -> KeptNames:
        """How ids and groups stand in the table."""
        return self.columns.names

    @property
    def rows(self) -> Rows:
        """The rows by id, as ids stand in the table."""
        return Rows(self)

    @property
    def groups(self) -> Groups:
        """The ids of every group."""
        return Groups(self)

    # Rows by their numbers in the columns

    @property
    def row_numbers(self) -> np.ndarray:
        """The numbers of the rows that are in, in the order of the table."""
        return np.flatnonzero(self._is_in)

    @cached_property
    def _cells(self) -> np.ndarray:
        """The number of each row's slice among all slices."""
        return np.asarray(self.columns.shards * np.int32(self.num_slices) + self.columns.slices)

    def rows_of(self, kept: Sequence[Any]) -> np.ndarray:
        """The numbers of the rows of ids, as these stand in the table; -1 where one is not in."""
        return self._if_in(self.columns.rows_of(kept))

    def rows_of_digests(self, digests: Iterable[str]) -> np.ndarray:
        """The numbers of the rows that are in whose ids have these keyed digests, in the order of the table."""
        wanted, no_digest = from_hexadecimal(list(digests))
        found = self._if_in(self.columns.rows_of_digests(wanted[~no_digest]))
        return np.unique(found[found >= 0])

    def _if_in(self, rows: np.ndarray) -> np.ndarray:
        if len(self.columns):
            rows[~self._is_in[rows]] = -1
        return rows

    def example(self, row: int) -> Example:
        """The row of a number."""
        columns = self.columns
        code = -1 if columns.group_of is None else columns.group_of[row]
        (group,) = columns.named_groups(np.array([code])) if code >= 0 else (None,)
        digest = columns.digests[row].tobytes().hex()
        return Example(int(columns.shards[row]), int(columns.slices[row]), digest, group)

    @cached_property
    def _group_sizes(self) -> np.ndarray:
        """How many rows each of the distinct groups has."""
        codes = self.columns.group_of
        if codes is None or self.columns.group_names is None:
            return np.zeros(0, np.int64)
        return np.bincount(codes[self._is_in & (codes >= 0)], minlength=len(self.columns.group_names))

    def sizes_of_groups(self, groups: Sequence[Any]) -> np.ndarray:
        """How many rows each of these groups has."""
        codes = self.columns.codes_of_groups(groups)
        return np.asarray(np.append(self._group_sizes, 0)[codes])

    def rows_of_groups(self, groups: Sequence[Any]) -> np.ndarray:
        """The numbers of the rows of some groups, group by group."""
        codes = self.columns.codes_of_groups(groups)
        codes = codes[codes >= 0]
        if self.columns.group_of is None or not len(codes):
            return np.zeros(0, np.int64)
        ranks = np.full(len(self._group_sizes) + 1, -1, np.int64)
        ranks[codes[::-1]] = np.arange(len(codes))[::-1]
        found = ranks[self.columns.group_of]
        rows = np.flatnonzero((found >= 0) & self._is_in)
        return rows[np.argsort(found[rows], kind="stable")]

    def groups_of(self, kept: Sequence[int | str]) -> list[int | str]:
        """The distinct groups of some ids that are in, in the order of these."""
        rows = self.rows_of(kept)
        if self.columns.group_of is None:
            return []
        codes = self.columns.group_of[rows]
        return self.columns.named_groups(np.array([*dict.fromkeys(codes[codes >= 0].tolist())], np.int64))

    def emptied_by(self, kept: Sequence[int | str]) -> list[int | str]:
        """The groups of which nothing would be left without some ids that are in."""
        if self.columns.group_of is None:
            return []
        codes = self.columns.group_of[self.rows_of(kept)]
        distinct, first, sizes = np.unique(codes[codes >= 0], return_index=True, return_counts=True)
        emptied = self._group_sizes[distinct] == sizes
        return self.columns.named_groups(distinct[emptied][np.argsort(first[emptied])].astype(np.int64))

    # Slices

    @property
    def empty(self) -> frozenset[tuple[int, int]]:
        """The (shard, slice) pairs without examples."""
        return frozenset(map(self._place, np.flatnonzero(self._sizes == 0).tolist()))

    def _place(self, cell: int) -> tuple[int, int]:
        return int(cell) // self.num_slices, int(cell) % self.num_slices

    def _cell(self, shard: int, slice_: int) -> int:
        return shard * self.num_slices + slice_

    def rows_in(self, shard: int, slice_: int) -> np.ndarray:
        """The numbers of the rows of a slice, in the order of the table."""
        return np.flatnonzero(self._is_in & (self._cells == self._cell(shard, slice_)))

    def ids_in(self, shard: int, slice_: int) -> list[int | str]:
        """The ids of a slice, in the order of the table."""
        return self.columns.kept(self.rows_in(shard, slice_))

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
        kept = self.ids_in(shard, slice_)
        ids = kept if original is None else [original.get(one, one) for one in kept]
        return [kept[position] for position in in_order(ids, self.seed).tolist()]

    def size(self, shard: int, slice_: int) -> int:
        """Number of examples in a slice."""
        return int(self._sizes[self._cell(shard, slice_)])

    def duplicates_of(self, ids: Iterable[int | str]) -> list[int | str]:
        """The other examples whose content equals that of one of the ids."""
        rows = self.rows_of([*dict.fromkeys(ids)])
        alike = self.columns.rows_of_contents(rows)
        is_named = np.zeros(len(self.columns), bool)
        is_named[rows] = True
        return self.columns.kept(alike[self._is_in[alike] & ~is_named[alike]])

    def index(self) -> "ExampleTable":
        """Compute now what the first deletion would otherwise wait for."""
        if len(self.columns):
            _ = self.columns._index, self.columns._first_of_contents, self._group_sizes
        self._know_sums()
        return self

    def slice_digest(self, shard: int, slice_: int) -> str:
        """
        Digest of a slice's remaining ids and contents: the sum, modulo 2^256, of a keyed digest of each of its rows.

        A row that comes or goes changes it by one digest, however many others there are. Only who has the secret can
        find other rows with the same sum.
        """
        if self._cell(shard, slice_) not in self._sums:
            self._know_sums()
        return f"{self._sums[self._cell(shard, slice_)]:0{2 * DIGEST_BYTES}x}"

    def _know_sums(self) -> None:
        """Compute the digests of slices that are not known."""
        unknown = [cell for cell in range(len(self._sizes)) if cell not in self._sums]
        if unknown:
            rows = np.flatnonzero(self._is_in & np.isin(self._cells, unknown))
            self._sums |= {**dict.fromkeys(unknown, 0), **self._sums_of(rows)}

    def _sums_of(self, rows: np.ndarray) -> dict[int, int]:
        """What rows add to the sums that are the digests of slices."""
        columns = self.columns
        sums: dict[int, int] = {}
        for begin in range(0, len(rows), _AT_ONCE):
            part = rows[begin : begin + _AT_ONCE]
            digests = self.names.key.of_rows(columns.id_digests[part], columns.digests[part])
            for cell, value in sums_of(digests, self._cells[part]).items():
                sums[cell] = (sums.get(cell, 0) + value) % MODULUS
        return sums

    @property
    def is_as_digested(self) -> bool:
        """Whether the digests of ids and slices that the table was read with are those of its rows: computed anew."""
        fresh = ExampleTable(self.columns, self.num_shards, self.num_slices, self.seed)
        fresh._is_in, fresh._sizes = self._is_in, self._sizes
        return self.columns.are_digested and all(
            self.slice_digest(*place) == fresh.slice_digest(*place)
            for place in map(self._place, range(len(self._sizes)))
        )

    def slice_digests_of(self, shard: int, slice_: int, generations: Sequence[frozenset[int]]) -> tuple[str, ...]:
        """
        The digests that a slice's remaining rows had at one time or another, the one that it has now first.

        Args:
            shard (`int`): Number of the shard.
            slice_ (`int`): Number of the slice.
            generations (sequence of `frozenset[int]`): Which additions were in then; see `Ledger.generations`.
        """
        now = self.slice_digest(shard, slice_)
        parts = self._parts_of_additions.get(self._cell(shard, slice_))
        if not parts:
            return (now,)
        whole = int(now, 16)
        lacking = (sum(part for number, part in parts.items() if number not in were_in) for were_in in generations)
        found = (f"{(whole - part) % MODULUS:0{2 * DIGEST_BYTES}x}" for part in lacking)
        return tuple(dict.fromkeys((now, *found)))

    @property
    def has_additions(self) -> bool:
        """Whether rows came after the first partition, and are in."""
        return self.columns.additions is not None and bool((self.columns.additions[self._is_in] > 0).any())

    @property
    def _parts_of_additions(self) -> dict[int, dict[int, int]]:
        if self._parts is None:
            additions, parts = self.columns.additions, dict[int, dict[int, int]]()
            numbers = [] if additions is None else np.unique(additions[self._is_in]).tolist()
            for number in filter(None, numbers):
                for cell, part in self._sums_of(np.flatnonzero(self._is_in & (additions == number))).items():
                    parts.setdefault(cell, {})[number] = part
            self._parts = parts
        return self._parts

    def slice_digests(self, shard: int, slices: Iterable[int]) -> list[str]:
        """The digests of some slices of a shard, in their order."""
        return [self.slice_digest(shard, slice_) for slice_ in slices]

    def places(self, ids: Iterable[int | str]) -> set[tuple[int, int]]:
        """The (shard, slice) pairs that hold any of the ids."""
        kept = list(ids)
        rows = self.rows_of(kept)
        if (rows < 0).any():
            raise KeyError(kept[int(np.argmin(rows))])
        return set(map(self._place, np.unique(self._cells[rows]).tolist()))

    def of_digests(self, digests: Iterable[str]) -> list[int | str]:
        """The ids that are in and have these keyed digests, in the order of the table."""
        return self.columns.kept(self.rows_of_digests(digests))

    def places_of(self, kept: Sequence[int | str]) -> list[tuple[int, int] | None]:
        """The (shard, slice) pair of each of some ids; `None` of one that is not in."""
        rows = self.rows_of(kept)
        cells = np.where(rows < 0, -1, self._cells[rows]) if len(self.columns) else rows
        return [None if cell < 0 else self._place(cell) for cell in cells.tolist()]

    def place_of_row(self, row: int) -> tuple[int, int]:
        """The (shard, slice) pair of the row of a number."""
        return self._place(int(self._cells[row]))

    @property
    def sizes_of_slices(self) -> dict[tuple[int, int], int]:
        """How many rows each (shard, slice) pair has."""
        return {self._place(cell): size for cell, size in enumerate(self._sizes.tolist())}

    def places_of_contents(self, digests: np.ndarray) -> dict[int, tuple[int, int]]:
        """
        Where rows lie whose content is one of these: of each that has such a row its number here, and the place.

        Args:
            digests (`numpy.ndarray`): Keyed content digests, 32 bytes in each row.
        """
        rows = self.row_numbers
        known = dict(zip(map(bytes, self.columns.digests[rows]), self._cells[rows].tolist(), strict=True))
        found = ((number, known.get(bytes(digest))) for number, digest in enumerate(digests))
        return {number: self._place(cell) for number, cell in found if cell is not None}

    def rows_with(self, ids: Sequence[int | str], names: KeptNames) -> tuple[np.ndarray, np.ndarray]:
        """
        The numbers of the rows that have some ids of a dataset, -1 where none has; and the digests of the ids.

        Args:
            ids (sequence): The ids, as the dataset has them.
            names ([`KeptNames`]): How the system keeps ids and groups.
        """
        known = names.key.of_ids(ids)
        return self._if_in(self.columns.rows_of_digests(known)), known

    def are_as(
        self, rows: np.ndarray, digests: np.ndarray, groups: Sequence[int | str | None] | None, names: KeptNames
    ) -> np.ndarray:
        """
        Which of some rows have the content, and the group, that is given for them.

        Args:
            rows (`numpy.ndarray`): Their numbers.
            digests (`numpy.ndarray`): Keyed content digests, 32 bytes in each row.
            groups (sequence, *optional*): The groups, where the system has groups.
            names ([`KeptNames`]): How the system keeps ids and groups.
        """
        are_same: np.ndarray = (self.columns.digests[rows] == digests).all(axis=1)
        return are_same if groups is None else are_same & self._are_in_groups(rows, groups, names)

    def examples(self, kept: Sequence[int | str]) -> list[Example | None]:
        """The rows of some ids; `None` of one that is not in."""
        return [None if row < 0 else self.example(row) for row in self.rows_of(kept).tolist()]

    @property
    def ends_of_ids(self) -> tuple[int, int] | None:
        """The lowest id that is in and the highest; `None` where ids are texts, or none is in."""
        if self.columns.are_texts or not len(self):
            return None
        ids = self.columns.ids[self._is_in]  # type: ignore[index]
        return int(ids.min()), int(ids.max())

    def without(self, ids: Iterable[int | str]) -> "ExampleTable":
        """The table less some of its ids."""
        kept = list(dict.fromkeys(ids))
        rows = self.rows_of(kept)
        if (rows < 0).any():
            raise KeyError(kept[int(np.argmin(rows))])
        return self._without_rows(rows)

    def without_digests(self, digests: Iterable[str]) -> "ExampleTable":
        """The table less the ids of some keyed digests; those that are not in are passed over."""
        rows = self.rows_of_digests(digests)
        return self._without_rows(rows) if len(rows) else self

    def _without_rows(self, rows: np.ndarray) -> "ExampleTable":
        table = ExampleTable.__new__(ExampleTable)
        table.__dict__.update(self.__dict__)
        # Copied at once: another thread may come to know more of them meanwhile.
        known = table._sums = dict(self._sums)
        table._parts = self._parts if self.columns.additions is None else None
        table._is_in = self._is_in.copy()
        table._is_in[rows] = False
        gone = np.bincount(self._cells[rows], minlength=len(self._sizes))
        table._sizes = self._sizes - gone
        if "_group_sizes" in self.__dict__ and self.columns.group_of is not None:
            codes = self.columns.group_of[rows]
            # A cached property lives in the instance's dictionary.
            table.__dict__["_group_sizes"] = self._group_sizes.copy()
            np.subtract.at(table._group_sizes, codes[codes >= 0], 1)
        if any(cell in known for cell in np.flatnonzero(gone).tolist()):
            changes = self._sums_of(rows)
            table._sums = {cell: (value - changes.get(cell, 0)) % MODULUS for cell, value in known.items()}
        return table

    @property
    def is_settled(self) -> bool:
        """Whether nothing is held of what `without` left out."""
        return bool(self._is_in.all())

    def settled(self) -> "ExampleTable":
        """The same table without a trace of what `without` left out."""
        if self.is_settled:
            return self
        table = ExampleTable(self.columns.taken(self.row_numbers), self.num_shards, self.num_slices, self.seed)
        table._sums = dict(self._sums)
        return table

    def with_more(self, rows: Columns, addition: int | None, num_shards: int) -> "ExampleTable":
        """
        The table with rows that come with an addition, less what `without` left out. The ids of none of them are in.

        Args:
            rows ([`~hf_s3t.records.columns.Columns`]): The rows that come.
            addition (`int`, *optional*): The number of the addition; those that they have if `None`.
            num_shards (`int`): Number of shards by then.
        """
        settled = self.settled()
        columns = settled.columns.with_more(rows, addition)
        table = ExampleTable(columns, num_shards, self.num_slices, self.seed)
        new = table._sums_of(np.arange(len(settled.columns), len(columns)))
        table._sums = {cell: (part + new.get(cell, 0)) % MODULUS for cell, part in settled._sums.items()}
        return table

    def of_additions(self, number_of: Mapping[int, int]) -> "ExampleTable":
        """The rows that came with some additions, by other numbers: those that another copy of the system has."""
        additions = self.columns.additions
        came = np.zeros(len(self.columns), bool) if additions is None else np.isin(additions, [*number_of])
        table = copy.copy(self._without_rows(np.flatnonzero(self._is_in & ~came)).settled())
        own = table.columns.additions
        if own is not None:
            table.columns, table._parts = copy.copy(table.columns), None
            table.columns.additions = np.array([number_of[number] for number in own.tolist()], np.int32)
        return table

    def check_dataset(
        self,
        ids: Sequence[int | str],
        digests: np.ndarray,
        ledger: Ledger,
        names: KeptNames,
        groups: Sequence[int | str | None] | None = None,
    ) -> list[int]:
        """
        Match a dataset's rows with the table: which row numbers to train on.

        Rows that the ledger knows as deleted are passed over.

        Args:
            ids (sequence): The id of each row.
            digests (`numpy.ndarray`): The keyed content digest of each row, as 32 bytes.
            ledger ([`~hf_s3t.records.ledger.Ledger`]): What was deleted.
            names ([`KeptNames`]): How the system keeps ids and groups.
            groups (sequence, *optional*): The group of each row, where the system has groups.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If a row is new to the system.
            [`~hf_s3t.errors.ContentChangedError`]: If the content of a row is not what it was.
            [`~hf_s3t.errors.ExampleIdError`]: If an example of the table is not in the dataset.
        """
        rows, known = self.rows_with(ids, names)
        absent = np.flatnonzero(rows < 0)
        new = [
            ids[number]
            for number, digest in zip(absent.tolist(), hexadecimal(known[absent]), strict=True)
            if digest not in ledger.deleted
        ]
        there = np.flatnonzero(rows >= 0)
        rows = rows[there]
        own = None if groups is None else [groups[number] for number in there.tolist()]
        is_same = self.are_as(rows, digests[there], own, names)
        changed = [ids[number] for number in there[~is_same].tolist()]
        if new:
            raise UnknownExampleError(
                f"The dataset has {counted(len(new), 'example')} that this system does not know: {some(new)}. Leave "
                "them out, make the trainer with the rest and add them by `trainer.add_examples` (`--add_file` of the "
                "recipes), or train a new system in another `output_dir`."
            )
        if changed:
            raise ContentChangedError(
                f"The content of {counted(len(changed), 'example')} is not what it was at the first training: "
                f"{some(changed)}. Restore the rows, or have those that were edited take the place of the old ones by "
                "`trainer.replace_examples`. If ids are row numbers, they shift when rows leave the dataset: give it "
                "as it was, deleted rows included, or make systems with an `id_column`."
            )
        if len(rows) != len(self):
            is_missing = self._is_in.copy()
            is_missing[rows] = False
            missing = self.columns.kept(np.flatnonzero(is_missing))
            raise ExampleIdError(
                f"The dataset lacks {counted(len(missing), 'example')} that this system holds: "
                f"{some(sorted(missing, key=str))}. If they are to be forgotten, call `unlearn` "
                "with these ids; otherwise give the full dataset."
            )
        found: list[int] = there.tolist()
        return found

    def _are_in_groups(self, rows: np.ndarray, groups: Sequence[int | str | None], names: KeptNames) -> np.ndarray:
        """Which of some rows have the group that is given for them."""
        distinct = list(dict.fromkeys(groups))
        codes = self.columns.codes_of_groups([names.of_group(group) for group in distinct])
        # A group that no row ever had is none of a row without one either.
        code_of = {g: -1 if g is None else int(c) if c >= 0 else -2 for g, c in zip(distinct, codes, strict=True)}
        expected = np.fromiter((code_of[group] for group in groups), np.int64, len(groups))
        return np.equal(expected, -1 if self.columns.group_of is None else self.columns.group_of[rows])
