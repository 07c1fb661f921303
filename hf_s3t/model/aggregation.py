"""One batched pass for all members of the ensemble, and how their answers become one."""

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, get_args, get_type_hints

import torch
from torch import nn
from transformers import Cache, GenerationMixin
from transformers.utils import ModelOutput

from ..errors import ConfigError, S3TError, StaleCacheError
from .route import Route


# The names under which models take and return a `Cache`.
CACHES = ("past_key_values", "cache_params")
# Inputs that are not one row per example even if their length says so.
_NOT_ROWS = {"labels", "cache_position", "logits_to_keep", "num_items_in_batch", *CACHES}
# One for all rows of these is common.
_SHARED = {"attention_mask", "position_ids"}
# What `generate` hands on of pictures that it encoded: entries in the order of the batch, and those once per layer.
_ENCODED, _ENCODED_BY_LAYER = "pooler_output", "deepstack_features"
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


def check_one_answer_can_be_made(base: nn.Module, num_shards: int, select: str) -> None:
    """
    Refuse several members where each answers with a set of predictions: queries find objects in an order of their own,
    so that the first of one member is another object than the first of the next.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming what cannot be averaged, and the way out.
    """
    members = 2 if select == "all" else num_shards
    check_is_no_set(_fields_of_output(type(base)), type(base), members)


def check_is_no_set(fields: Iterable[str], base: type, members: int) -> None:
    """The same, of what a base answered: not all say beforehand what they return."""
    sets = of_sets(fields)
    if sets and members > 1:
        raise ConfigError(
            f"{base.__name__} answers with `{sets[0]}`, a set of predictions in no order: those of several members do "
            'not correspond and cannot be averaged. Use num_shards=1, with select="longest" or "metric".'
        )


def of_sets(fields: Iterable[str]) -> list[str]:
    """Which fields of an output hold one entry per query, in no order."""
    return [name for name in fields if name in ("pred_boxes", "pred_masks") or "_queries_" in name]


def _fields_of_output(base: type) -> list[str]:
    """The fields of what a class of model says that it returns."""
    try:
        returned = get_type_hints(base.forward).get("return")
    except (NameError, TypeError, AttributeError):
        # Code that came with a model need not say it, or not so that it can be read.
        return []
    outputs = filter(dataclasses.is_dataclass, get_args(returned) or (returned,))
    return [field.name for output in outputs for field in dataclasses.fields(output)]


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


def knows_rows(inputs: dict[str, Any], rows: int) -> bool:
    """
    Whether every input is seen to have one entry per row, or to be the same for all.

    Patches of all pictures in one list, fewer pictures than rows, or sequences packed into one have none: which entry
    is of which row, only the base knows.
    """
    return all(name in _NOT_ROWS or _knows_rows(name, value, rows) for name, value in inputs.items())


def _knows_rows(name: str, value: Any, rows: int) -> bool:
    if isinstance(value, torch.Tensor):
        if value.dim() == 0:
            return True
        length = value.shape[_dimension_of_rows(name, value)]
        return length == rows or (length == 1 and name in _SHARED)
    if isinstance(value, ModelOutput):
        return _ENCODED in value or _ENCODED_BY_LAYER in value
    if isinstance(value, dict):
        return all(_knows_rows(name, v, rows) for v in value.values())
    if isinstance(value, (list, tuple)):
        return not any(isinstance(v, (torch.Tensor, dict, list, tuple)) for v in value)
    return True


def _dimension_of_rows(name: str, value: torch.Tensor) -> int:
    # Positions in time, height and width come before the rows, as Transformers has it when it expands them for beams.
    return 1 if name == "position_ids" and value.dim() == 3 else 0


def without_cache(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without a cache and the masks and positions that may go with it."""
    return {name: value for name, value in inputs.items() if name not in _WITH_A_CACHE}


def first_row(inputs: dict[str, Any], rows: int) -> dict[str, Any]:
    """The inputs of the first example alone."""
    return {n: v if n in _NOT_ROWS else _first(v, rows) for n, v in inputs.items()}


def _first(value: Any, rows: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows:
        return value[:1]
    if isinstance(value, dict) and not isinstance(value, ModelOutput):
        return {k: _first(v, rows) for k, v in value.items()}
    return value


def repeat_rows(inputs: dict[str, Any], rows: int, members: int) -> dict[str, Any]:
    """The inputs with one block of rows per member; what has no row per example stays as it is."""
    if members == 1:
        return inputs
    return {n: v if n in _NOT_ROWS else _repeat(n, v, rows, members) for n, v in inputs.items()}


def _repeat(name: str, value: Any, rows: int, members: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        dimension = _dimension_of_rows(name, value)
        return _times(value, members, dimension) if value.shape[dimension] == rows else value
    if isinstance(value, ModelOutput):
        return _repeat_encoded(value, members)
    if isinstance(value, dict):
        return {k: _repeat(name, v, rows, members) for k, v in value.items()}
    return value


def _repeat_encoded(encoded: ModelOutput, members: int) -> ModelOutput:
    """Encoded pictures once per member: they come in the order of the rows, however many a row has."""
    repeated = dict(encoded)
    if _ENCODED in repeated:
        repeated[_ENCODED] = _times(repeated[_ENCODED], members)
    if _ENCODED_BY_LAYER in repeated:
        repeated[_ENCODED_BY_LAYER] = [_repeat_layer(layer, members) for layer in repeated[_ENCODED_BY_LAYER]]
    return type(encoded)(**repeated)


def _repeat_layer(features: Any, members: int) -> Any:
    # Some put the number of the layer before its features.
    if isinstance(features, tuple) and isinstance(features[0], int):
        return features[0], _times(features[1], members)
    return _times(features, members)


def _times(value: Any, members: int, dimension: int = 0) -> Any:
    if isinstance(value, torch.Tensor):
        return value.repeat([members if d == dimension else 1 for d in range(value.dim())])
    return value * members


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


def refuse_unknown_positions(base: nn.Module, inputs: dict[str, Any], rows: int) -> None:
    """
    Refuse to go on from a cache where the base counts positions by what it noted of the pictures: one note per row
    that it saw, which it would take for those of the members' rows in another order.

    Raises:
        [`~hf_s3t.errors.S3TError`]: With what to give.
    """
    own, name = type(base), "_prepare_position_ids_for_generation"
    usual = getattr(GenerationMixin, name)
    counts_itself = getattr(own, name, usual) is not usual
    if rows > 1 and counts_itself and has_cache(inputs) and inputs.get("position_ids") is None:
        raise S3TError(
            f"{own.__name__} goes on from `past_key_values` by positions that it counted for each row of one member. "
            "Give `position_ids` with them, as `generate` does."
        )


def reorder_cache(cache: Any, beam_idx: torch.Tensor, members: int) -> Any:
    """Reorder a cache for beam search: the same beams in every member's block."""
    rows = len(beam_idx)
    cache.reorder_cache(torch.cat([beam_idx + member * rows for member in range(members)]))
    return cache
