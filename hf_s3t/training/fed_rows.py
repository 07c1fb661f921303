"""Rows as a model gets them, by which an evaluation set is compared with the training examples."""

import hashlib
import inspect
from collections.abc import Callable, Collection, Iterator
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers.utils import logging

from ..errors import IsolationError, counted
from ..model.ensemble_loss import IGNORED_LABEL
from ..model.fresh_copies import fresh_copy
from ..model.randomness import preserved_randomness, seed_all
from ..records.digests import encode
from .dataset_rows import LABELS, shown_rows, stored_rows


logger = logging.get_logger(__name__)


class FedRows:
    """
    Rows as a model gets them, whatever they are stored as: as lists, arrays or tensors, of one width or another, with
    columns beside them, padded or not.

    Args:
        model (`nn.Module`): The model that reads them.
        collate (`Callable`, *optional*):
            What makes a batch of rows; for rows that are no inputs of the model by themselves.
    """

    def __init__(self, model: nn.Module, collate: Callable[[list[Any]], Any] | None = None):
        self._inputs = set(inspect.signature(model.forward).parameters) - set(LABELS)
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
            ways: list[tuple[str, ...]] = [()]
            if not (self._holds_inputs(train_dataset) and self._holds_inputs(dataset)):
                # As stored, too: a transform may draw at random, or differ between the datasets.
                ways += filter(None, [_common_columns(train_dataset, dataset, besides)])
            for columns in ways:
                if columns not in own:
                    own[columns] = set(self._digests(train_dataset, columns))
                shared = sum(row in own[columns] for row in self._digests(dataset, columns))
                if shared:
                    raise IsolationError(
                        f"`eval_dataset` holds {counted(shared, 'training example')}, and evaluation chooses the "
                        'model (`load_best_model_at_end` or select="metric"). Take them out of `eval_dataset`.'
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
            names = [name for name in dataset.column_names if name in self._inputs or name in LABELS]
            yield from map(self._inputs_of, stored_rows(dataset, names))
            return
        for row in shown_rows(dataset):
            inputs = self._inputs_of(row)
            if inputs is None and self._collate is not None:
                with preserved_randomness():
                    seed_all(0)
                    inputs = self._inputs_of(_collated(self._collate, row))
            if inputs is not None:
                yield inputs

    def _inputs_of(self, row: Any) -> dict[str, Any] | None:
        """What of a row a model reads, without what goes without saying; `None` for a row that it cannot read."""
        if not hasattr(row, "keys") or not self._inputs & set(row.keys()):
            return None
        inputs = {name: _canonical(row[name]) for name in row.keys() if name in self._inputs}
        labels = next((_canonical(row[name]) for name in LABELS if name in row.keys()), None)
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
        implied = {
            "token_type_ids": np.zeros_like(words),
            "position_ids": np.arange(0 if words is None else np.size(words)),
        }
        return {
            name: value
            for name, value in inputs.items()
            if value is not None and (words is None or name not in implied or not _equal(value, implied[name]))
        }


def _collated(collate: Callable[[list[Any]], Any], row: dict[str, Any]) -> Any:
    try:
        return fresh_copy(collate, ())([row])
    except Exception as error:
        # It may need columns that the trainer leaves out: then this row is not compared.
        logger.debug(f"A row could not be collated by itself: {error}")
        return None


def _repeats(labels: Any, words: Any) -> bool:
    """Whether labels say the words again, whichever of them the loss is told to pass over."""
    if not isinstance(labels, np.ndarray) or not isinstance(words, np.ndarray) or labels.shape != words.shape:
        return False
    return bool(np.all((labels == words) | (labels == IGNORED_LABEL)))


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
        # A list of lists of several lengths.
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
