"""The rows of a training dataset: their ids, groups and digests, and the selection a stage trains on."""

import contextlib
import hashlib
import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import datasets
import numpy as np
import torch
from datasets import Audio, Image
from datasets.table import embed_table_storage
from torch.utils.data import Sampler, Subset
from transformers.trainer_pt_utils import LengthGroupedSampler

from .config import S3TConfig
from .errors import ConfigError, EmptySliceError, ExampleIdError, IsolationError
from .examples import DigestKey, Example, ExampleTable, KeptNames, encode
from .partition import assign, check_ids, units_of
from .plan import StageKey


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
                    "which has none. Give a `datasets.Dataset`."
                )
            if column not in columns:
                raise ConfigError(
                    f"`{field}={column!r}` is no column of `train_dataset`, which has {', '.join(columns)}."
                )

    def _column(self, name: str) -> list:
        return self.dataset.with_format(None)[name][:]

    def digests(self, key: DigestKey) -> list[str]:
        """The keyed digest of every row's content: of what is trained on, its id, group and place aside."""
        return [key.of_content(self._anonymous(row)) for row in self._contents()]

    def _anonymous(self, row: dict[str, Any]) -> dict[str, Any]:
        config = self.config
        ours = {config.id_column, config.group_column, config.shard_column, config.slice_column}
        return {name: value for name, value in row.items() if name not in ours}

    def _contents(self) -> Iterator[dict[str, Any]]:
        if isinstance(self.dataset, datasets.Dataset):
            yield from self._stored(self.dataset)
            return
        with preserved_randomness():
            for index in range(len(self.dataset)):
                # A dataset that augments at random shows the same content for the same seed.
                _seed_all(0)
                row = self.dataset[index]
                yield dict(row) if hasattr(row, "keys") else {"row": row}

    def refuse_shared(self, eval_dataset: Any) -> None:
        """
        Refuse an evaluation set with training examples in it, where evaluation chooses the model.

        Raises:
            [`~hf_s3t.errors.IsolationError`]: With the number of shared rows.
        """
        sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
        own = None
        for dataset in sets:
            if isinstance(dataset, datasets.Dataset) and isinstance(self.dataset, datasets.Dataset):
                own = own if own is not None else set(self._encoded(self.dataset))
                shared = sum(row in own for row in self._encoded(dataset))
                if shared:
                    raise IsolationError(
                        f"{shared} rows of `eval_dataset` are training examples, and evaluation chooses the model "
                        '(`load_best_model_at_end` or select="metric"). Take them out of `eval_dataset`.'
                    )

    def _encoded(self, dataset: datasets.Dataset) -> Iterator[bytes]:
        for row in TrainingRows._stored(dataset):
            yield encode(self._anonymous(row))

    @staticmethod
    def _stored(dataset: datasets.Dataset) -> Iterator[dict[str, Any]]:
        # Arrow rows are what is stored: images stay bytes, and a transform set by the user is not run. Of a file that
        # is named, what it holds counts, wherever it lies.
        files = [n for n, feature in (dataset.features or {}).items() if isinstance(feature, (Audio, Image))]
        for batch in dataset.with_format("arrow").iter(batch_size=1000):
            for row in (embed_table_storage(batch) if files else batch).to_pylist():
                yield {**row, **{name: (row[name] or {}).get("bytes") for name in files}}

    def partition(
        self, digests: Sequence[str], names: KeptNames | None = None, key: DigestKey | None = None
    ) -> dict[int | str, Example]:
        """
        Put every row into its shard and slice: what becomes the table of examples.

        Args:
            digests (sequence of `str`): The keyed content digest of each row.
            names ([`~hf_s3t.examples.KeptNames`], *optional*): How ids and groups shall stand in the table; as they
                are if not given.
            key ([`~hf_s3t.examples.DigestKey`], *optional*):
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
        names ([`~hf_s3t.examples.KeptNames`], *optional*): How ids stand in the table; as they are if not given.
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
            self._row_digests = [
                hashlib.sha256(encode(row)).hexdigest() for row in TrainingRows._stored(self._prepared)
            ]
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


@contextlib.contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave every random state as it was: evaluation and audits must not change what training draws next."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _seed_all(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
