"""The rows of a dataset of any kind: as they are stored, and as it shows them."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa
from datasets import Audio, Image
from datasets.table import embed_table_storage
from torch.utils.data import IterableDataset

from ..model.fresh_copies import fresh_dataset
from ..model.marks import mark
from ..model.randomness import preserved_randomness, seed_all


# What collators and models call the answer.
LABELS = ("labels", "label", "label_ids")


def stored_rows(dataset: datasets.Dataset, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """
    The rows of a dataset as they are stored: images stay bytes, and a transform set by the user is not run. Of a file
    that is named, what it holds counts, wherever it lies.

    Args:
        dataset ([`~datasets.Dataset`]): The dataset.
        columns (sequence of `str`, *optional*): Those to read; all if not given.
    """
    dataset = dataset if columns is None else dataset.select_columns(list(columns))
    for batch in stored_batches(dataset):
        yield from batch.to_pylist()


def stored_batches(dataset: datasets.Dataset) -> Iterator[pa.Table]:
    """
    The rows of a dataset as `stored_rows` gives them, as tables of some of them.

    Args:
        dataset ([`~datasets.Dataset`]): The dataset.
    """
    files = [n for n, feature in (dataset.features or {}).items() if isinstance(feature, (Audio, Image))]
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        table = embed_table_storage(batch) if files else batch
        for name in files:
            held = dict(zip(("bytes", "path"), table[name].combine_chunks().flatten(), strict=True))
            table = table.set_column(table.column_names.index(name), name, held["bytes"])
        yield table


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
