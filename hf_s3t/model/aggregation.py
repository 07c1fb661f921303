"""How the answers of an ensemble's members become one."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from ..errors import ConfigError, S3TError
from .batches import fields_of_output


# The fields of an answer that hold its logits: those of one head, or of two that say where a span begins and ends.
_HEADS = (("logits",), ("start_logits", "end_logits"))
# How many numbers of the answer to make at once: on a CPU what its caches hold, elsewhere few kernels.
_AT_ONCE = {"cpu": 2**18, "other": 2**26}
_VANISHING = 1e-30
_DISTRIBUTIONS = ("mean_probabilities", "majority_vote")
# Kinds of problems whose logits are no distribution over classes of which one is right.
NOT_OF_EXCLUSIVE_CLASSES = ("regression", "multi_label_classification")


def logit_fields(names: Collection[str]) -> tuple[str, ...]:
    """Which of the fields of an answer members are aggregated by; none if it has no logits."""
    return next((fields for fields in _HEADS if set(fields) <= set(names)), ())


def answers_of(
    outputs: Sequence[Mapping[str, Any]], make: Callable[[torch.Tensor], torch.Tensor]
) -> dict[str, torch.Tensor]:
    """
    What a route answers, by field, from what the base did: once for all members, or once for each.

    Args:
        outputs (sequence of mappings):
            What the base answered, members one after the other: logits of shape `(members * rows, ..., classes)` in
            one output, or of shape `(rows, ..., classes)` in one for each.
        make (callable): Makes one answer of the members' logits, as `answer_of` does.

    Returns:
        `dict` of `torch.Tensor` of shape `(rows, ..., classes)`, in at least single precision.

    Raises:
        [`~hf_s3t.errors.S3TError`]: If there are no logits among it.
    """
    fields = logit_fields(outputs[0].keys())
    if not fields:
        raise S3TError(
            f"The base model answered with {', '.join(outputs[0].keys())}, and an ensemble aggregates `logits`. Use a "
            "model whose forward returns these."
        )
    if len(outputs) == 1:
        return {name: make(outputs[0][name]) for name in fields}
    return {name: make(torch.cat([output[name] for output in outputs])) for name in fields}


def answer_of(logits: torch.Tensor, weights: torch.Tensor, how: str) -> torch.Tensor:
    """
    The answer of a route: that of its members together, or of the one there is, as it gave it.

    Some of what chooses the next token looks at a logit's sign: one member shall answer as its adapter in plain PEFT.

    Args:
        logits (`torch.Tensor` of shape `(members * rows, ..., classes)`): As for `aggregate`.
        weights (`torch.Tensor` of shape `(members,)` or `(members, rows)`): As for `aggregate`.
        how (`str`): As for `aggregate`; a vote is a vote also where only one votes.

    Returns:
        `torch.Tensor` of shape `(rows, ..., classes)`, in at least single precision.
    """
    if len(weights) == 1 and how != "majority_vote":
        return logits.to(_precision(logits))
    return aggregate(logits, weights, how)


def aggregate(logits: torch.Tensor, weights: torch.Tensor, how: str) -> torch.Tensor:
    """
    One answer from those of the members.

    Args:
        logits (`torch.Tensor` of shape `(members * rows, ..., classes)`): One block of rows per member.
        weights (`torch.Tensor` of shape `(members,)` or `(members, rows)`):
            Weight of each member, for all rows or for each, summing to one.
        how (`str`):
            `"mean_logits"`; `"mean_probabilities"`: the logarithm of the mean of the members' probabilities;
            `"majority_vote"`: the share of votes per class.

    Returns:
        `torch.Tensor` of shape `(rows, ..., classes)`, in at least single precision.

    Example:

    ```python
    >>> import torch
    >>> from hf_s3t.model.aggregation import aggregate

    >>> logits = torch.tensor([[0.0, 2.0], [4.0, 0.0]])  # two members, one row
    >>> aggregate(logits, torch.tensor([0.5, 0.5]), "mean_logits")
    tensor([[2., 1.]])
    ```
    """
    members = len(weights)
    stacked = torch.unflatten(logits, 0, (members, -1))
    weights = weights.to(stacked.device, _precision(logits))
    weights = weights.view(*weights.shape, *[1] * (stacked.dim() - weights.dim()))
    if how == "mean_logits":
        return torch.sum(stacked * weights, 0)
    if how == "mean_probabilities":
        return _log_of_mean(stacked, weights)
    votes = nn.functional.one_hot(stacked.argmax(-1), stacked.shape[-1])
    return torch.sum(votes * weights, 0)


def _precision(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _log_of_mean(stacked: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """
    The logarithm of the mean of the members' probabilities.

    Args:
        stacked (`torch.Tensor` of shape `(members, rows, ..., classes)`): Their logits.
        weights (`torch.Tensor` of shape `(members, 1 or rows, 1, ..., 1)`):
            Their weights, in the precision of the answer.

    Returns:
        `torch.Tensor` of shape `(rows, ..., classes)`.
    """
    if stacked.requires_grad:
        return _exact_log_of_mean(stacked, weights)
    members, classes = len(stacked), stacked.shape[-1]
    answer = torch.empty(stacked.shape[1:], dtype=weights.dtype, device=stacked.device)
    # A vocabulary is long: piece by piece, what lies between stays in a processor's cache, and little of it in memory.
    rows = max(1, _AT_ONCE["cpu" if stacked.device.type == "cpu" else "other"] // classes)
    pieces = torch.split(stacked.reshape(members, -1, classes), rows, dim=1)
    parts = torch.split(answer.view(-1, classes), rows)
    for piece, part, of_piece in zip(
        pieces, parts, _weights_of_pieces(stacked, weights, rows, len(parts)), strict=True
    ):
        part.zero_()
        for logits, weight in zip(piece, of_piece, strict=True):
            part.addcmul_(logits.softmax(-1, dtype=part.dtype), weight)
        # Probabilities so small that single precision has few bits for them, or none.
        vanishing = part.amin(-1) < _VANISHING
        part.log_()
        if vanishing.any():
            of_vanishing = of_piece.expand(-1, len(part), -1)[:, vanishing]
            part[vanishing] = _exact_log_of_mean(piece[:, vanishing], of_vanishing)
    return answer


def _weights_of_pieces(stacked: torch.Tensor, weights: torch.Tensor, rows: int, count: int) -> Sequence[torch.Tensor]:
    """Weights of shape `(members, 1 or rows of the piece, 1)`; shapes as for `_log_of_mean`."""
    if weights.shape[1] == 1:
        return [weights.view(-1, 1, 1)] * count
    of_rows = weights.expand(-1, *stacked.shape[1:-1], 1).reshape(len(weights), -1, 1)
    return torch.split(of_rows, rows, dim=1)


def _exact_log_of_mean(stacked: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The same, of probabilities of any size; shapes as for `_log_of_mean`."""
    return torch.logsumexp(stacked.log_softmax(-1, dtype=weights.dtype) + weights.log(), dim=0)


def check_aggregation(how: str, config: PreTrainedConfig) -> None:
    """Refuse to average probabilities, or vote, where the logits are no distribution over classes."""
    problem = getattr(config, "problem_type", None)
    if how in _DISTRIBUTIONS and (problem in NOT_OF_EXCLUSIVE_CLASSES):
        raise S3TError(
            f'aggregation="{how}" needs exclusive classes, and the task is {problem}. Use aggregation="mean_logits".'
        )


def check_one_answer_can_be_made(base: nn.Module, num_shards: int, select: str) -> None:
    """
    Refuse several members where each answers with a set of predictions: queries find objects in an order of their own,
    so that the first of one member is another object than the first of the next.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming what cannot be averaged, and the way out.
    """
    members = 2 if select == "all" else num_shards
    check_is_no_set(fields_of_output(type(base)), type(base), members)


def check_is_no_set(fields: Iterable[str], base: type, members: int) -> None:
    """The same, of what a base answered: not all say beforehand what they return."""
    sets = fields_of_sets(fields)
    if sets and members > 1:
        raise ConfigError(
            f"{base.__name__} answers with `{sets[0]}`, a set of predictions in no order: those of several members do "
            'not correspond and cannot be averaged. Use num_shards=1, with select="longest" or "metric".'
        )


def fields_of_sets(fields: Iterable[str]) -> list[str]:
    """Which fields of an output hold one entry per query, in no order."""
    return [name for name in fields if name in ("pred_boxes", "pred_masks") or "_queries_" in name]
