"""The rows of a training dataset: their ids, groups and digests, and the selection a stage trains on."""

import difflib
import hashlib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Subset

from ..config import S3TConfig
from ..errors import ConfigError, EmptySliceError, ExampleIdError, IsolationError
from ..plan.partition import check_ids, shards_and_slices, units_of
from ..plan.stages import StageKey
from ..records.buffers import DIGEST_BYTES, hexadecimal, in_order
from ..records.columns import Columns
from ..records.contents import encode_rows, said
from ..records.digests import DigestKey, KeptNames, encode
from ..records.examples import ExampleTable
from .dataset_rows import shown_rows, stored_batches
from .own_fields import with_own_fields


# Carries the number of a row through tokenisation and filtering.
ROW_COLUMN = "__s3t_row__"


def numbered(dataset: Any) -> Any:
    """
    Rows that carry their number through preparation, as far as a dataset can have a column more; in each is what it
    says by itself.

    Args:
        dataset: The dataset as it was given.
    """
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return dataset
    return with_own_fields(dataset).add_column(ROW_COLUMN, list(range(len(dataset))))


def check_numbered(prepared: Any, given: Any, by: str) -> None:
    """
    Refuse rows of which nobody can tell any more which example they were made from.

    Args:
        prepared: The dataset as a trainer class has prepared it.
        given: The dataset as it was given to the class.
        by (`str`): The name of the class.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: With the way out.
    """
    if prepared is given or ROW_COLUMN in (getattr(prepared, "column_names", None) or ()):
        return
    raise IsolationError(
        f"{by} made other rows of `train_dataset` than it was given, without the column that says from which of them: "
        "nobody could tell which stages saw an example. Have its preparation keep the columns that it does not know "
        "(`map` without `remove_columns`), or give it rows that are prepared."
    )


class TrainingRows:
    """
    A training dataset seen as rows with ids.

    Args:
        dataset ([`~datasets.Dataset`] or map-style `torch.utils.data.Dataset`): The dataset as the user gave it.
        config ([`S3TConfig`]): Names of the id, group, shard and slice columns.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If ids are missing, duplicated or of mixed type.
        [`~hf_s3t.errors.ConfigError`]: If a named column does not exist.
    """

    def __init__(self, dataset: Any, config: S3TConfig):
        self.dataset = dataset
        self.config = config
        # The evaluation set that was found to hold none of these rows, if nothing is left to compare.
        self.compared_with: Any = None
        self._check_columns()
        if len(dataset) == 0:
            raise ExampleIdError("`train_dataset` has no rows. Give at least one example per slice.")
        ids = self._column(config.id_column) if config.id_column else range(len(dataset))
        self.ids = check_ids(ids)
        self.groups = self._column(config.group_column) if config.group_column else None

    def _check_columns(self) -> None:
        config = self.config
        named = {
            f: getattr(config, f)
            for f in ("id_column", "group_column", "shard_column", "slice_column")
            if getattr(config, f)
        }
        columns = getattr(self.dataset, "column_names", None)
        for field, column in named.items():
            if columns is None:
                raise ConfigError(
                    f"`{field}={column!r}` names a column, but `train_dataset` is a {type(self.dataset).__name__}, "
                    "which has none. Give a `datasets.Dataset`, such as `Dataset.from_list(rows)`."
                )
            if column not in columns:
                near = difflib.get_close_matches(column, columns, n=1)
                raise ConfigError(
                    f"`{field}={column!r}` is no column of `train_dataset`, which has {', '.join(columns)}. "
                    + (f"Did you mean {near[0]!r}? " if near else "Name one of them. ")
                    + "If preparing the rows dropped it (`remove_columns`, `select_columns`), let it stay: no model "
                    "gets it."
                )

    def _column(self, name: str) -> list[Any]:
        values: list[Any] = self.dataset.with_format(None)[name][:]
        return values

    def digests(self, key: DigestKey, version: int = 2, numbers: Sequence[int] | None = None) -> np.ndarray:
        """
        The keyed digest of every row's content, as 32 bytes: of what is trained on, its id, group and place aside.

        Args:
            key ([`~hf_s3t.records.digests.DigestKey`]): The system's secret.
            version (`int`, defaults to 2):
                By which rows are digested: 1 as they stand in the dataset, as systems made in format 1 have it, 2 by
                what they say, whatever other rows stand there; see [`hf_s3t.records.contents`].
            numbers (sequence of `int`, *optional*): Of which rows; of all if not given.
        """
        if isinstance(self.dataset, datasets.Dataset):
            some = self.dataset if numbers is None else self.dataset.select(numbers)
            return key.of_contents(_encoded(some, version, self.own_columns))
        read = said if version == 2 else dict
        # All in their order: one that augments may show each by what it drew for those before.
        found = key.of_contents(encode(dict(read(self._anonymous(row)))) for row in shown_rows(self.dataset))
        return found if numbers is None else found[list(numbers)]

    @property
    def own_columns(self) -> set[str]:
        """The columns that say which example a row is and where it goes; no model reads them."""
        config = self.config
        named = (config.id_column, config.group_column, config.shard_column, config.slice_column)
        return {name for name in named if name is not None}

    def _anonymous(self, row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in self.own_columns}

    def partition(self, digests: np.ndarray, names: KeptNames) -> Columns:
        """
        Put every row into its shard and slice: what becomes the table of examples.

        Args:
            digests (`numpy.ndarray`): The keyed content digest of each row.
            names ([`~hf_s3t.records.digests.KeptNames`]):
                How ids and groups shall stand in the table. The secret that it has decides where rows of a balanced
                partition go, unless everybody knows it.

        Raises:
            [`~hf_s3t.errors.EmptySliceError`]: If a slice would be empty.
        """
        shards, slices = self._places(digests, names.key)
        if not names.are_digests:
            return Columns.of(names, self.ids, shards, slices, digests, self.groups)
        ids = names.key.of_ids(self.ids)
        # Sorted: the dataset's order would tell which digest is whose.
        order = in_order(ids)
        groups = self.groups
        if groups is not None:
            kept = {group: names.of_group(group) for group in dict.fromkeys(groups)}
            groups = [kept[groups[row]] for row in order.tolist()]
        return Columns.of(names, ids[order], shards[order], slices[order], digests[order], groups)

    def _places(self, digests: np.ndarray, key: DigestKey) -> tuple[np.ndarray, np.ndarray]:
        """The shard and the slice of each row."""
        config = self.config
        by_column = config.partition == "column"
        contents = digests.view(f"V{DIGEST_BYTES}").ravel() if config.colocate_duplicates else None
        return shards_and_slices(
            self.ids,
            num_shards=config.num_shards,
            num_slices=config.num_slices,
            method=config.partition,
            seed=config.seed,
            groups=self.groups if contents is None else units_of(self.ids, self.groups, contents.tolist()),
            shards=self._column(config.shard_column) if by_column and config.shard_column else None,
            slices=self._column(config.slice_column) if by_column and config.slice_column else None,
            key=key.for_places,
        )


def _encoded(dataset: datasets.Dataset, version: int, without: Collection[str] = ()) -> Iterator[bytes]:
    """The encoding of each row of a dataset, some columns aside."""
    for batch in stored_batches(dataset):
        names = [name for name in batch.column_names if name not in without]
        if version == 2:
            yield from encode_rows({name: batch[name].combine_chunks() for name in names}, batch.num_rows)
        else:
            yield from (encode({name: row[name] for name in names}) for row in batch.to_pylist())


class StageRows:
    """
    Which rows of the prepared dataset each stage trains on, in an order that depends on ids and the seed alone.

    Args:
        prepared: The dataset as the trainer will feed it, perhaps tokenised and filtered.
        rows ([`TrainingRows`]): The dataset it was prepared from.
        names ([`~hf_s3t.records.digests.KeptNames`], *optional*):
            How ids stand in the table; as they are if not given.
        row_digests (`int`, defaults to 2): By which rows are digested; see [`TrainingRows.digests`].
    """

    def __init__(self, prepared: Any, rows: TrainingRows, names: KeptNames | None = None, row_digests: int = 2):
        columns = getattr(prepared, "column_names", None) or ()
        if ROW_COLUMN in columns:
            numbers = prepared.with_format(None)[ROW_COLUMN][:]
            prepared = prepared.remove_columns([ROW_COLUMN])
        else:
            numbers = range(len(prepared))
        config = rows.config
        ours = rows.own_columns & set(columns)
        if ours and prepared.format["type"] != "custom":
            prepared = prepared.remove_columns(sorted(ours))
        self.prepared = prepared
        self.config = config
        kept: list[Any] = rows.ids
        if names is not None and names.are_digests:
            kept = hexadecimal(names.key.of_ids(rows.ids))
        # Rows that came to a table, when they were last compared with these; and what is here of their ids.
        self._compared: tuple[Any, np.ndarray] | None = None
        self._given, self._names, self._contents = rows, names, dict[Any, bytes]()
        self._position: dict[Any, int] = {}
        # Where preparation made several rows of one: the others.
        self._further: dict[Any, list[int]] = {}
        for position, number in enumerate(numbers):
            if self._position.setdefault(kept[number], position) != position:
                self._further.setdefault(kept[number], []).append(position)
        self._is_whole = len(self._position) == len(kept)
        self._dropped_ids = frozenset[Any]() if self._is_whole else frozenset(kept).difference(self._position)
        # Only where the table has digests in their place.
        self._original = None if kept is rows.ids else dict(zip(kept, rows.ids, strict=True))
        # Per (shard, slice) pair what it held, and the positions of that: ids are hashed and sorted once a slice.
        self._in_order: dict[tuple[int, int], tuple[str, list[int]]] = {}
        self._version, self._row_digests = row_digests, list[str]()

    def slices(self, key: StageKey) -> tuple[int, ...]:
        """The slices whose examples a stage is trained on."""
        return self.config.slices_trained_on(key.prefix)

    def dropped(self, table: ExampleTable) -> int:
        """How many examples of the table preparation dropped (they stay in the table and can be unlearned)."""
        if self._is_whole:
            return 0
        return sum(self._dropped_in(*place, table) for place in _places(table))

    def dropped_of(self, key: StageKey, table: ExampleTable) -> int:
        """How many examples of a stage's slices preparation dropped."""
        return sum(self._dropped_in(key.shard, slice_, table) for slice_ in self.slices(key))

    def _dropped_in(self, shard: int, slice_: int, table: ExampleTable) -> int:
        return 0 if self._is_whole else sum(i not in self._position for i in table.ids_in(shard, slice_))

    def empty(self, table: ExampleTable) -> frozenset[tuple[int, int]]:
        """
        The (shard, slice) pairs without an example that preparation left something of; and those to which examples
        came that are not here, without which nothing can be trained on them.
        """
        lacking = frozenset(place for place in table.places_of(self.lacking(table)) if place is not None)
        if self._is_whole:
            return table.empty | lacking
        return lacking | frozenset(
            place for place in _places(table) if not any(i in self._position for i in table.ids_in(*place))
        )

    def lacking(self, table: ExampleTable) -> list[int | str]:
        """The examples of a table that came after its first partition, and are not here, or otherwise than there."""
        columns = table.columns
        if columns.additions is None:
            return []
        if self._compared is None or self._compared[0] is not columns:
            came = np.flatnonzero(columns.additions)
            ids = columns.kept(came)
            self._digest_what_is_here(ids)
            # An id that came may have been in before: another process put an edited row in the place of the old one.
            there = [digest.tobytes() for digest in columns.digests[came]]
            known = [i in self._contents and self._contents[i] in (b"", d) for i, d in zip(ids, there, strict=True)]
            self._compared = columns, came[~np.array(known, bool)]
        lacking = columns.kept(self._compared[1])
        return [kept for kept, place in zip(lacking, table.places_of(lacking), strict=True) if place is not None]

    def _digest_what_is_here(self, ids: Iterable[Any]) -> None:
        """Have the digests of what some ids have here, those that are here; of rows without names nothing is said."""
        new = {i for i in ids if (i in self._position or i in self._dropped_ids) and i not in self._contents}
        if not new:
            return
        if self._names is None:
            self._contents |= dict.fromkeys(new, b"")
            return
        kept = self._given.ids if self._original is None else self._original
        numbers = {i: number for number, i in enumerate(kept) if i in new}
        digests = self._given.digests(self._names.key, self._version, list(numbers.values()))
        self._contents |= {i: digest.tobytes() for i, digest in zip(numbers, digests, strict=True)}

    def positions(self, key: StageKey, table: ExampleTable) -> list[int]:
        """Positions of a stage's examples in the prepared dataset: slice by slice, in a slice by hash of the id."""
        return [p for slice_ in self.slices(key) for p in self._positions_in(key.shard, slice_, table)]

    def sizes(self, key: StageKey, table: ExampleTable) -> list[int]:
        """How many examples a stage has of each slice that it is trained on, the new one last."""
        return [len(self._positions_in(key.shard, s, table)) for s in self.slices(key)]

    def num_per_epoch(self, key: StageKey, table: ExampleTable) -> int:
        """How many examples an epoch of a stage takes."""
        return self.config.examples_per_epoch(self.sizes(key, table))

    def positions_of(self, table: ExampleTable) -> tuple[np.ndarray, list[int]]:
        """
        The rows of a table that are here as they are there, if preparation left something of them: their numbers
        there, and their positions here.
        """
        numbers, others = table.row_numbers, {*self.lacking(table)}
        ids = table.columns.kept(numbers)
        found = [-1 if kept in others else self._position.get(kept, -1) for kept in ids]
        return numbers[np.asarray(found, np.int64) >= 0], [position for position in found if position >= 0]

    def _positions_in(self, shard: int, slice_: int, table: ExampleTable) -> list[int]:
        place, holds = (shard, slice_), table.slice_digest(shard, slice_)
        held, positions = self._in_order.get(place, ("", []))
        if held != holds:
            ids = table.members(shard, slice_, self._original)
            known = [i for i in ids if i in self._position]
            positions = [p for i in known for p in (self._position[i], *self._further.get(i, ()))]
            self._in_order[place] = holds, positions
        return positions

    def digest(
        self, key: StageKey, table: ExampleTable, secret: DigestKey, without: Collection[str] = ()
    ) -> str | None:
        """
        Keyed digest of what a stage is fed: its rows as they are stored after preparation, in their order.

        Another tokenizer or template shows here. `None` for a dataset that is no [`~datasets.Dataset`].

        Args:
            key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
            table ([`~hf_s3t.records.examples.ExampleTable`]): The examples that are in.
            secret ([`~hf_s3t.records.digests.DigestKey`]): The system's secret.
            without (collection of `str`, *optional*): Columns left out, the same in every call.
        """
        if not isinstance(self.prepared, datasets.Dataset):
            return None
        if not self._row_digests:
            encoded = _encoded(self.prepared, self._version, without)
            self._row_digests = [hashlib.sha256(row).hexdigest() for row in encoded]
        return secret.of_content({"rows": [self._row_digests[p] for p in self.positions(key, table)]})

    def select(self, key: StageKey, table: ExampleTable) -> Any:
        """The dataset of a stage."""
        positions = self.positions(key, table)
        if isinstance(self.prepared, datasets.Dataset):
            # Of an array Datasets makes a fingerprint at once, of a list number by number.
            return self.prepared.select(np.asarray(positions, np.int64))
        return Subset(self.prepared, positions)

    def check_slices(self, table: ExampleTable) -> None:
        """
        Refuse a preparation that leaves nothing of a slice.

        Raises:
            [`~hf_s3t.errors.EmptySliceError`]: Naming the slices.
        """
        empty = sorted(self.empty(table) - table.empty)
        if empty:
            raise EmptySliceError(
                f"Preparing the dataset (truncation, filtering) dropped every example of the (shard, slice) pairs "
                f"{empty[:5]}. Raise `max_length`, or use fewer slices."
            )


def _places(table: ExampleTable) -> Iterator[tuple[int, int]]:
    return itertools.product(range(table.num_shards), range(table.num_slices))
