"""Whether the members of an ensemble can share one pass of their base."""

from typing import Any

import torch
from transformers import PreTrainedModel

from .batches import first_rows, knows_rows, repeat_rows
from .caches import without_cache
from .route import noting_lengths, routed


class SharedPass:
    """
    Whether every adapted module of a base takes rows in its first dimension, so that members can share a pass.

    Sequence-first models, and projections of positions that all rows share, do not. Two passes of the base over one
    row and over two tell; they are run once for each choice of inputs, for pictures go through other modules than
    text does.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model.
    """

    def __init__(self, base: PreTrainedModel):
        self._base = base
        self._found: dict[frozenset[str], bool] = {}

    def is_possible(self, inputs: dict[str, Any], rows: int) -> bool:
        """
        Whether members can share a pass over some inputs.

        Args:
            inputs (`dict`): The inputs by name, tensors of shape `(rows, ...)`.
            rows (`int`): Number of examples.
        """
        return knows_rows(inputs, rows) and self._keeps_rows_first(inputs, rows)

    @torch.no_grad()
    def _keeps_rows_first(self, inputs: dict[str, Any], rows: int) -> bool:
        given = frozenset(name for name, value in inputs.items() if value is not None)
        if given not in self._found:
            inputs = without_cache(inputs)
            try:
                once, twice = self._lengths(first_rows(inputs, rows), 1)
            except Exception:
                # Some cannot be cut: the first row's pictures may not be the first one. Then over all rows.
                once, twice = self._lengths(inputs, rows)
            self._found[given] = twice == [2 * length for length in once]
        return self._found[given]

    def _lengths(self, inputs: dict[str, Any], rows: int) -> tuple[list[int], list[int]]:
        """What length the base gives its adapted modules, for the rows and for twice the rows."""
        with routed(None), noting_lengths() as once:
            self._base(**inputs, return_dict=True)
        with routed(None), noting_lengths() as twice:
            self._base(**repeat_rows(inputs, rows, 2), return_dict=True)
        return once, twice
