"""One batched pass for all members of the ensemble, and how their answers become one."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers import Cache

from .errors import S3TError, StaleCacheError
from .route import Route


# The names under which models take and return a `Cache`.
CACHES = ("past_key_values", "cache_params")
# Inputs that are not one row per example even if their length says so.
_NOT_ROWS = {"labels", "cache_position", "logits_to_keep", "num_items_in_batch", *CACHES}
_WITH_A_CACHE = {"use_cache", "cache_position", "attention_mask", "position_ids", *CACHES}
# The fields of an answer that hold its logits: those of one head, or of two that say where a span begins and ends.
_HEADS = (("logits",), ("start_logits", "end_logits"))
# How many numbers of the answer to make at once: on a CPU what its caches hold, elsewhere few kernels.
_AT_ONCE = {"cpu": 2**18, "other": 2**26}
_VANISHING = 1e-30
_DISTRIBUTIONS = ("mean_probabilities", "majority_vote")


def logit_fields(names: Collection[str]) -> tuple[str, ...]:
    """Which of the fields of an answer members are aggregated by; none if it has no logits."""
    return next((fields for fields in _HEADS if set(fields) <= set(names)), ())


def answers_of(outputs: Sequence[Mapping[str, Any]], weights: torch.Tensor, how: str) -> dict[str, torch.Tensor]:
    """
    What a route answers, by field, from what the base did: once for all members, or once for each.

    Args:
        outputs (sequence of mappings): What the base answered, members one after the other.
        weights (`torch.Tensor` of shape `(members,)`): As for `aggregate`.
        how (`str`): As for `answer_of`.

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
        return {name: answer_of(outputs[0][name], weights, how) for name in fields}
    return {name: answer_of(torch.cat([output[name] for output in outputs]), weights, how) for name in fields}


def answer_of(logits: torch.Tensor, weights: torch.Tensor, how: str) -> torch.Tensor:
    """
    The answer of a route: that of its members together, or of the one there is, as it gave it.

    Some of what chooses the next token looks at a logit's sign: one member shall answer as its adapter in plain PEFT.

    Args:
        logits (`torch.Tensor` of shape `(members * rows, ..., classes)`): As for `aggregate`.
        weights (`torch.Tensor` of shape `(members,)`): As for `aggregate`.
        how (`str`): As for `aggregate`; a vote is a vote also where only one votes.
    """
    if len(weights) == 1 and how != "majority_vote":
        return logits.to(_precision(logits))
    return aggregate(logits, weights, how)


def aggregate(logits: torch.Tensor, weights: torch.Tensor, how: str) -> torch.Tensor:
    """
    One answer from those of the members.

    Args:
        logits (`torch.Tensor` of shape `(members * rows, ..., classes)`): One block of rows per member.
        weights (`torch.Tensor` of shape `(members,)`): Weight of each member, summing to one.
        how (`str`):
            `"mean_logits"`; `"mean_probabilities"`: the logarithm of the mean of the members' probabilities;
            `"majority_vote"`: the share of votes per class.

    Returns:
        `torch.Tensor` of shape `(rows, ..., classes)`, in at least single precision.

    Example:

    ```python
    >>> import torch
    >>> from hf_s3t.ensemble import aggregate

    >>> logits = torch.tensor([[0.0, 2.0], [4.0, 0.0]])  # two members, one row
    >>> aggregate(logits, torch.tensor([0.5, 0.5]), "mean_logits")
    tensor([[2., 1.]])
    ```
    """
    members = len(weights)
    stacked = logits.unflatten(0, (members, -1))
    weights = weights.to(stacked.device, _precision(logits)).view(-1, *[1] * (stacked.dim() - 1))
    if how == "mean_logits":
        return (stacked * weights).sum(0)
    if how == "mean_probabilities":
        return _log_of_mean(stacked, weights)
    votes = nn.functional.one_hot(stacked.argmax(-1), stacked.shape[-1])
    return (votes * weights).sum(0)


def _precision(logits: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _log_of_mean(stacked: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The logarithm of the mean of the members' probabilities."""
    if stacked.requires_grad:
        return _exact_log_of_mean(stacked, weights)
    members, classes = len(stacked), stacked.shape[-1]
    answer = torch.empty(stacked.shape[1:], dtype=weights.dtype, device=stacked.device)
    # A vocabulary is long: piece by piece, what lies between stays in a processor's cache, and little of it in memory.
    rows = max(1, _AT_ONCE["cpu" if stacked.device.type == "cpu" else "other"] // classes)
    weights = weights.view(members, 1, 1)
    pieces = stacked.reshape(members, -1, classes).split(rows, dim=1)
    for piece, part in zip(pieces, answer.view(-1, classes).split(rows), strict=True):
        part.zero_()
        for logits, weight in zip(piece, weights, strict=True):
            part.addcmul_(logits.softmax(-1, dtype=part.dtype), weight)
        # Probabilities so small that single precision has few bits for them, or none.
        vanishing = part.amin(-1) < _VANISHING
        part.log_()
        if vanishing.any():
            part[vanishing] = _exact_log_of_mean(piece[:, vanishing], weights)
    return answer


def _exact_log_of_mean(stacked: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return torch.logsumexp(stacked.log_softmax(-1, dtype=weights.dtype) + weights.log(), dim=0)


def check_aggregation(how: str, config) -> None:
    """Refuse to average probabilities, or vote, where the logits are no distribution over classes."""
    problem = getattr(config, "problem_type", None)
    if how in _DISTRIBUTIONS and (problem in ("regression", "multi_label_classification")):
        raise S3TError(
            f'aggregation="{how}" needs exclusive classes, and the task is {problem}. Use aggregation="mean_logits".'
        )


def bind(base: nn.Module, args: tuple, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a call by name."""
    if not args:
        return dict(kwargs)
    names = [p for p in inspect.signature(type(base).forward).parameters if p != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def num_rows(inputs: dict[str, Any], main_input: str) -> int:
    """Number of examples in a batch."""
    for name in (main_input, "input_ids", "inputs_embeds", "pixel_values"):
        if inputs.get(name) is not None:
            return len(inputs[name])
    raise S3TError(
        f"The model was called without {main_input}. Pass the inputs that the base model's `forward` takes."
    )


def first_row(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The inputs of the first example alone, without a cache and the masks and positions that may go with it."""
    kept = {n: v for n, v in inputs.items() if n not in _WITH_A_CACHE}
    return {n: v if n in _NOT_ROWS else _first(v, rows) for n, v in kept.items()}


def _first(value: Any, rows: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows:
        return value[:1]
    if isinstance(value, dict):
        return {k: _first(v, rows) for k, v in value.items()}
    return value


def repeat_rows(inputs: dict[str, Any], rows: int, members: int) -> dict[str, Any]:
    """The inputs with one block of rows per member; what has no row per example stays as it is."""
    if members == 1:
        return inputs
    return {name: value if name in _NOT_ROWS else _repeat(value, rows, members) for name, value in inputs.items()}


def _repeat(value: Any, rows: int, members: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows:
        return value.repeat(members, *[1] * (value.dim() - 1))
    if isinstance(value, dict):
        return {k: _repeat(v, rows, members) for k, v in value.items()}
    return value


def caches_in(values: Mapping[str, Any]) -> dict[str, Cache]:
    """What of a call's inputs or outputs is a cache of keys and values, or of states, by name."""
    return {name: values[name] for name in CACHES if isinstance(values.get(name), Cache)}


def cache_of(values: Mapping[str, Any]) -> Cache | None:
    """The cache among a call's inputs or outputs."""
    return next(iter(caches_in(values).values()), None)


def has_cache(values: Mapping[str, Any]) -> bool:
    """Whether there is one with something in it."""
    cache = cache_of(values)
    return cache is not None and not _is_empty(cache)


def stamp_cache(cache: Cache | None, route: Route) -> None:
    """Remember which stacks filled a cache."""
    if cache is not None:
        cache._s3t_route = route


def check_cache(cache: Any, route: Route) -> None:
    """
    Refuse a filled cache that other stacks than the route's made.

    Raises:
        [`~hf_s3t.errors.StaleCacheError`]: With what to do.
    """
    if cache is None or _is_empty(cache):
        return
    if getattr(cache, "_s3t_route", None) is not route:
        raise StaleCacheError(
            "`past_key_values` was made before a deletion changed the stacks that answer, or by another model. Start "
            "again without it, from the full prompt."
        )


def _is_empty(cache: Cache) -> bool:
    # Some models add a store of their own, beside layers that stay empty.
    stores = [value for name, value in vars(cache).items() if name != "layers"]
    return not any(map(_is_filled, cache.layers)) and not any(map(_holds_tensors, stores))


def _is_filled(layer: Any) -> bool:
    states = getattr(layer, "has_previous_state", {})
    return any(states.values()) or (hasattr(layer, "get_seq_length") and bool(layer.get_seq_length() > 0))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor) and value.numel() > 0


def refuse_other_state(inputs: dict[str, Any]) -> None:
    """
    Refuse what recurrent models carry from call to call: nobody could tell which stacks it was made with.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Naming it.
    """
    names = [*(name for name in CACHES if not isinstance(inputs.get(name), Cache)), "mems", "state"]
    given = [name for name in names if inputs.get(name) is not None]
    if given:
        raise S3TError(
            f"`{given[0]}` holds state that an ensemble cannot tell fresh from stale. Call without it, with "
            "use_cache=False."
        )


def reorder_cache(cache: Any, beam_idx: torch.Tensor, members: int) -> Any:
    """Reorder a cache for beam search: the same beams in every member's block."""
    rows = len(beam_idx)
    cache.reorder_cache(torch.cat([beam_idx + member * rows for member in range(members)]))
    return cache
