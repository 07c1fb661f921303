"""A pass in which each member computes only the rows that it is to answer: what goes in, and what each row gets."""

from typing import Any

import torch

from .aggregation import answer_of
from .batches import repeat_rows, select_rows
from .gating import Gating


def batch_for(gating: Gating, inputs: dict[str, Any]) -> dict[str, Any]:
    """
    The inputs of the base, one block of rows per member that is needed.

    Args:
        gating ([`~hf_s3t.model.gating.Gating`]): Who answers which rows.
        inputs (`dict`): The inputs of a call by name, tensors of shape `(rows, ...)`.

    Example:

    ```python
    >>> import torch
    >>> from hf_s3t.model.gated_pass import answer_by, batch_for
    >>> from hf_s3t.model.gating import Gating
    >>> from hf_s3t.model.route import Route
    >>> from hf_s3t.plan import StageKey

    >>> route = Route(tuple(StageKey(shard, (0,)) for shard in range(3)))
    >>> gating = Gating(route, torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.5]]))
    >>> batch_for(gating, {"input_ids": torch.tensor([[7], [8]])})["input_ids"].tolist()
    [[7], [8], [8]]
    >>> answer_by(gating, torch.tensor([[0.0, 4.0], [2.0, 0.0], [0.0, 6.0]]), "mean_logits").tolist()
    [[0.0, 4.0], [1.0, 3.0]]
    ```
    """
    if gating.is_of_one:
        return inputs
    if gating.is_full or not gating.is_apart:
        return repeat_rows(inputs, gating.num_rows, len(gating.route_of_pass))
    return select_rows(inputs, gating.num_rows, gating.rows_of_entries)


def answer_by(gating: Gating, logits: torch.Tensor, how: str) -> torch.Tensor:
    """
    One answer for each row, from those of its members.

    Args:
        gating ([`~hf_s3t.model.gating.Gating`]): Who answered which rows.
        logits (`torch.Tensor` of shape `(entries, ..., classes)`): What the base answered to the batch.
        how (`str`): See [`~hf_s3t.model.aggregation.answer_of`].

    Returns:
        `torch.Tensor` of shape `(rows, ..., classes)`, in at least single precision.
    """
    answers = [
        answer_of(logits if part.entries is None else logits[part.entries.to(logits.device)], part.weights, how)
        for part in gating.parts
    ]
    if len(answers) == 1:
        return answers[0]
    answer = answers[0].new_empty(gating.num_rows, *answers[0].shape[1:])
    for part, of_part in zip(gating.parts, answers, strict=True):
        answer[part.rows.to(logits.device)] = of_part
    return answer
