"""The rows of a dataset of any kind: as they are stored, and as it shows them."""

from collections.abc import Iterator, Sequence
from typing import Any

import datasets
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
