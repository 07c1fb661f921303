"""The rows of a training dataset: their ids, groups and digests, and the selection a stage trains on."""

import difflib
import hashlib
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Audio, Image
from datasets.table import embed_table_storage
from torch import nn
from torch.utils.data import IterableDataset, Sampler, Subset
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from ..config import S3TConfig
from ..errors import ConfigError, EmptySliceError, ExampleIdError, IsolationError
from ..model.fresh_copies import fresh_copy, fresh_dataset
from ..model.marks import mark
from ..model.randomness import preserved_randomness, seed_all
from ..plan.partition import assign, check_ids, units_of
from ..plan.stages import StageKey
from ..records.digests import DigestKey, KeptNames, encode
from ..records.examples import Example, ExampleTable


logger = logging.get_logger(__name__)

# Carries the number of a row through tokenisation and filtering.
ROW_COLUMN = "__s3t_row__"


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

    def _column(self, name: str) -> list:
        return self.dataset.with_format(None)[name][:]

    def digests(self, key: DigestKey) -> list[str]:
        """The keyed digest of every row's content: of what is trained on, its id, group and place aside."""
        rows = stored_rows(self.dataset) if isinstance(self.dataset, datasets.Dataset) else shown_rows(self.dataset)
        return [key.of_content(self._anonymous(row)) for row in rows]

    @property
    def own_columns(self) -> set[str]:
        """The columns that say which example a row is and where it goes; no model reads them."""
        config = self.config
        named = (config.id_column, config.group_column, config.shard_column, config.slice_column)
        return {name for name in named if name is not None}

    def _anonymous(self, row: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in row.items() if name not in self.own_columns}

    def partition(
        self, digests: Sequence[str], names: KeptNames | None = None, key: DigestKey | None = None
    ) -> dict[int | str, Example]:
        """
        Put every row into its shard and slice: what becomes the table of examples.

        Args:
            digests (sequence of `str`): The keyed content digest of each row.
            names ([`~hf_s3t.records.digests.KeptNames`], *optional*):
                How ids and groups shall stand in the table; as they are if not given.
            key ([`~hf_s3t.records.digests.DigestKey`], *optional*):
                The system's secret, without which places of a balanced partition follow from ids and seed alone.

        Raises:
            [`~hf_s3t.errors.EmptySliceError`]: If a slice would be empty.
        """
        config = self.config
        by_column = config.partition == "column"
        places = assign(
            self.ids,
            num_shards=config.num_shards,
            num_slices=config.num_slices,
            method=config.partition,
            seed=config.seed,
            groups=units_of(self.ids, self.groups, digests) if config.colocate_duplicates else self.groups,
            shards=self._column(config.shard_column) if by_column else None,
            slices=self._column(config.slice_column) if by_column else None,
            key=None if key is None else key.for_places,
        )
        groups = self.groups if self.groups is not None else [None] * len(self.ids)
        table = {
            example_id: Example(shard, slice_, digest, group)
            for example_id, (shard, slice_), digest, group in zip(self.ids, places, digests, groups, strict=True)
        }
        if names is None or not names.are_digests:
            return table
        # Sorted: the dataset's order would tell which digest is whose.
        kept = {names.of_id(i): replace(row, group=names.of_group(row.group)) for i, row in table.items()}
        return dict(sorted(kept.items()))


class StageRows:
    """
    Which rows of the prepared dataset each stage trains on, in an order that depends on ids and the seed alone.

    Args:
        prepared: The dataset as the trainer will feed it, perhaps tokenised and filtered.
        rows ([`TrainingRows`]): The dataset it was prepared from.
        names ([`~hf_s3t.records.digests.KeptNames`], *optional*):
            How ids stand in the table; as they are if not given.
    """

    def __init__(self, prepared: Any, rows: TrainingRows, names: KeptNames | None = None):
        columns = getattr(prepared, "column_names", None) or ()
        if ROW_COLUMN in columns:
            numbers = prepared.with_format(None)[ROW_COLUMN][:]
            prepared = prepared.remove_columns([ROW_COLUMN])
        else:
            numbers = range(len(prepared))
        config = rows.config
        ours = {config.id_column, config.group_column, config.shard_column, config.slice_column} & set(columns)
        if ours and prepared.format["type"] != "custom":
            prepared = prepared.remove_columns(sorted(ours))
        self._prepared = prepared
        self._config = config
        kept = rows.ids if names is None else [names.of_id(i) for i in rows.ids]
        self._position = {kept[number]: position for position, number in enumerate(numbers)}
        self._original = dict(zip(kept, rows.ids, strict=True))
        self._row_digests: list[str] | None = None

    def slices(self, key: StageKey) -> tuple[int, ...]:
        """The slices whose examples a stage is trained on."""
        return self._config.slices_trained_on(key.prefix)

    def dropped(self, table: ExampleTable) -> int:
        """How many examples of the table preparation dropped (they stay in the table and can be unlearned)."""
        return sum(example_id not in self._position for example_id in table.rows)

    def empty(self, table: ExampleTable) -> frozenset[tuple[int, int]]:
        """The (shard, slice) pairs without an example that preparation left something of."""
        if not self.dropped(table):
            return table.empty
        places = itertools.product(range(table.num_shards), range(table.num_slices))
        return frozenset(
            (shard, slice_)
            for shard, slice_ in places
            if not any(i in self._position for i in table.members(shard, slice_))
        )

    def positions(self, key: StageKey, table: ExampleTable) -> list[int]:
        """Positions of a stage's examples in the prepared dataset: slice by slice, in a slice by hash of the id."""
        ids = [i for slice_ in self.slices(key) for i in table.members(key.shard, slice_, self._original)]
        return [self._position[i] for i in ids if i in self._position]

    def digest(self, key: StageKey, table: ExampleTable, secret: DigestKey) -> str | None:
        """
        Keyed digest of what a stage is fed: its rows as they are stored after preparation, in their order.

        Another tokenizer or template shows here. `None` for a dataset that is no [`~datasets.Dataset`].
        """
        if not isinstance(self._prepared, datasets.Dataset):
            return None
        if self._row_digests is None:
            self._row_digests = [hashlib.sha256(encode(row)).hexdigest() for row in stored_rows(self._prepared)]
        return secret.of_content({"rows": [self._row_digests[p] for p in self.positions(key, table)]})

    def select(self, key: StageKey, table: ExampleTable) -> Any:
        """The dataset of a stage."""
        positions = self.positions(key, table)
        if isinstance(self._prepared, datasets.Dataset):
            return self._prepared.select(positions)
        return Subset(self._prepared, positions)

    def check_slices(self, table: ExampleTable) -> None:
        """
        Refuse a preparation that leaves nothing of a slice.

        Raises:
            [`~hf_s3t.errors.EmptySliceError`]: Naming the slices.
        """
        empty = [
            (shard, slice_)
            for shard in range(table.num_shards)
            for slice_ in range(table.num_slices)
            if table.size(shard, slice_) and not self.positions(StageKey(shard, (slice_,)), table)
        ]
        if empty:
            raise EmptySliceError(
                f"Preparing the dataset (truncation, filtering) dropped every example of the (shard, slice) pairs "
                f"{empty[:5]}. Raise `max_length`, or use fewer slices."
            )


class FedRows:
    """
    Rows as a model gets them, whatever they are stored as: as lists, arrays or tensors, of one width or another, with
    columns beside them, padded or not.

    Args:
        model (`nn.Module`): The model that reads them.
        collate (`Callable`, *optional*):
            What makes a batch of rows; for rows that are no inputs of the model by themselves.
    """

    def __init__(self, model: nn.Module, collate: Callable | None = None):
        self._inputs = set(inspect.signature(model.forward).parameters) - set(_LABELS)
        self._collate = collate

    def refuse_shared(self, train_dataset: Any, eval_dataset: Any, besides: Collection[str] = ()) -> bool:
        """
        Refuse an evaluation set with training examples in it, where evaluation chooses the model.

        Args:
            train_dataset: The training examples.
            eval_dataset: One dataset, or a dict of them.
            besides (collection of `str`, *optional*): Columns that are no part of an example.

        Returns:
            `bool`: Whether nothing is left to compare once the datasets are prepared.

        Raises:
            [`~hf_s3t.errors.IsolationError`]: With the number of shared rows.
        """
        sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        sets = [dataset for dataset in sets if dataset is not None]
        own: dict[tuple[str, ...], set[bytes]] = {}
        for dataset in sets:
            ways = [()]
            if not (self._holds_inputs(train_dataset) and self._holds_inputs(dataset)):
                # Before any transform, too: it may draw, or be another one.
                ways += filter(None, [_common_columns(train_dataset, dataset, besides)])
            for columns in ways:
                if columns not in own:
                    own[columns] = set(self._digests(train_dataset, columns))
                shared = sum(row in own[columns] for row in self._digests(dataset, columns))
                if shared:
                    raise IsolationError(
                        f"{shared} rows of `eval_dataset` are training examples, and evaluation chooses the model "
                        '(`load_best_model_at_end` or select="metric"). Take them out of `eval_dataset`.'
                    )
        return all(map(self._holds_inputs, [train_dataset, *sets]))

    def _holds_inputs(self, dataset: Any) -> bool:
        """Whether what is stored is what the model gets."""
        is_stored = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
        return is_stored and bool(self._inputs & set(dataset.column_names))

    def _digests(self, dataset: Any, columns: tuple[str, ...]) -> Iterator[bytes]:
        """A digest of each row: of the columns as they are stored, or without any of what the model gets."""
        if columns:
            rows = stored_rows(dataset, columns)
            return (_row_digest({name: _canonical(value) for name, value in row.items()}) for row in rows)
        return map(_row_digest, self._fed(dataset))

    def _fed(self, dataset: Any) -> Iterator[dict[str, Any]]:
        if self._holds_inputs(dataset):
            names = [name for name in dataset.column_names if name in self._inputs or name in _LABELS]
            yield from map(self._of, stored_rows(dataset, names))
            return
        for row in shown_rows(dataset):
            inputs = self._of(row)
            if inputs is None and self._collate is not None:
                with preserved_randomness():
                    seed_all(0)
                    inputs = self._of(_collated(self._collate, row))
            if inputs is not None:
                yield inputs

    def _of(self, row: Any) -> dict[str, Any] | None:
        """What of a row a model reads, without what goes without saying; `None` for a row that it cannot read."""
        if not hasattr(row, "keys") or not self._inputs & set(row.keys()):
            return None
        inputs = {name: _canonical(row[name]) for name in row.keys() if name in self._inputs}
        labels = next((_canonical(row[name]) for name in _LABELS if name in row.keys()), None)
        if labels is not None:
            inputs["labels"] = labels
        mask = inputs.pop("attention_mask", None)
        if isinstance(mask, np.ndarray) and mask.ndim == 1:
            read = mask != 0
            inputs = {
                name: value[read] if isinstance(value, np.ndarray) and value.shape[:1] == read.shape else value
                for name, value in inputs.items()
            }
        words = inputs.get("input_ids")
        if _repeats(inputs.get("labels"), words):
            del inputs["labels"]
        implied = {"token_type_ids": np.zeros_like(words), "position_ids": np.arange(np.size(words))}
        return {
            name: value
            for name, value in inputs.items()
            if value is not None and (words is None or name not in implied or not _equal(value, implied[name]))
        }


# What collators and models call the answer.
_LABELS = ("labels", "label", "label_ids")


def _collated(collate: Callable, row: dict[str, Any]) -> Any:
    try:
        return fresh_copy(collate, ())([row])
    except Exception as error:
        # Of other columns than the trainer's loader leaves, say: nothing can be told then.
        logger.debug(f"A row could not be collated by itself: {error}")
        return None


def _repeats(labels: Any, words: Any) -> bool:
    """Whether labels say the words again, whichever of them the loss is told to pass over."""
    if not isinstance(labels, np.ndarray) or not isinstance(words, np.ndarray) or labels.shape != words.shape:
        return False
    return bool(np.all((labels == words) | (labels == -100)))


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, np.ndarray) and isinstance(other, np.ndarray) and np.array_equal(one, other)


def _canonical(value: Any) -> Any:
    """One form for equal values: numbers as arrays of whole numbers or of single precision, without empty axes."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().float().numpy() if value.is_floating_point() else value.detach().cpu().numpy()
    if isinstance(value, dict):
        return {str(name): _canonical(part) for name, part in value.items()}
    if value is None or isinstance(value, (str, bytes)):
        return value
    try:
        array = np.asarray(value)
    except ValueError:
        # Rows within the row, of several lengths.
        array = np.empty(0, object)
    if array.dtype.kind in "biu":
        return np.squeeze(array.astype(np.int64))
    if array.dtype.kind == "f":
        array = np.squeeze(array.astype(np.float32))
        whole = np.all(array == np.rint(array)) and np.all(np.abs(array) < 2**24)
        return array.astype(np.int64) if whole else array
    return [_canonical(part) for part in value] if isinstance(value, (list, tuple)) else repr(value)


def _row_digest(row: dict[str, Any]) -> bytes:
    return hashlib.blake2b(encode(row), digest_size=16).digest()


def _common_columns(one: Any, other: Any, besides: Collection[str]) -> tuple[str, ...]:
    """The columns by which stored rows can be compared: all of one of the datasets, if the other has them too."""
    if not (isinstance(one, datasets.Dataset) and isinstance(other, datasets.Dataset)):
        return ()
    mine, theirs = set(one.column_names) - set(besides), set(other.column_names) - set(besides)
    return tuple(sorted(mine & theirs)) if mine <= theirs or theirs <= mine else ()


def stored_rows(dataset: datasets.Dataset, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """
    The rows of a dataset as they are stored: images stay bytes, and a transform set by the user is not run. Of a file
    that is named, what it holds counts, wherever it lies.

    Args:
        dataset ([`~datasets.Dataset`]): The dataset.
        columns (sequence of `str`, *optional*): Those to read; all if not given.
    """
    dataset = dataset.with_format("arrow")
    dataset = dataset if columns is None else dataset.select_columns(list(columns))
    files = [n for n, feature in (dataset.features or {}).items() if isinstance(feature, (Audio, Image))]
    for batch in dataset.iter(batch_size=1000):
        for row in (embed_table_storage(batch) if files else batch).to_pylist():
            yield {**row, **{name: (row[name] or {}).get("bytes") for name in files}}


def shown_rows(dataset: Any) -> Iterator[dict[str, Any]]:
    """
    The rows of a dataset as it shows them. One that augments at random, by generators of its own or not, shows each as
    it does first of all.

    Args:
        dataset: A dataset of any kind.
    """
    with preserved_randomness():
        shown = fresh_dataset(dataset)
        if isinstance(dataset, (IterableDataset, datasets.IterableDataset)):
            yield from map(_as_dict, shown)
            return
        begun = mark(shown)
        for index in range(len(dataset)):
            seed_all(0)
            row = shown[index]
            if mark(shown) != begun:
                shown = fresh_dataset(dataset)
            yield _as_dict(row)


def _as_dict(row: Any) -> dict[str, Any]:
    return dict(row) if hasattr(row, "keys") else {"row": row}


class EpochSeededSampler(Sampler):
    """
    A length-grouping sampler whose order in an epoch depends on the seed and the epoch, not on what ran before.

    Args:
        sampler ([`~transformers.trainer_pt_utils.LengthGroupedSampler`]): The sampler to seed.
        seed (`int`): The stage's seed.
    """

    def __init__(self, sampler: LengthGroupedSampler, seed: int):
        self.sampler = sampler
        self.seed = seed
        self.epoch = 0
        sampler.generator = torch.Generator()

    def set_epoch(self, epoch: int) -> None:
        """Accelerate's data loader announces the epoch."""
        self.epoch = epoch

    def __len__(self):
        return len(self.sampler)

    def __iter__(self):
        self.sampler.generator.manual_seed(self.seed + self.epoch)
        return iter(self.sampler)
