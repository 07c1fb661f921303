"""The rows of a call: how many there are, repeated for every member of an ensemble."""

import dataclasses
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, get_args, get_type_hints

import torch
from torch import nn
from transformers import GenerationMixin
from transformers.utils.generic import ModelOutput

from ..errors import S3TError
from .caches import CACHES, has_cache


# Inputs that are not one row per example even if their length says so.
NOT_ROWS = {"labels", "cache_position", "logits_to_keep", "num_items_in_batch", *CACHES}
# One for all rows of these is common.
_SHARED = {"attention_mask", "position_ids"}
# Fields of the pictures that `generate` encoded and hands on: one entry each, in the order of the batch; or one list
# of such per layer.
_ENCODED, _ENCODED_BY_LAYER = "pooler_output", "deepstack_features"


def fields_of_output(base: type[nn.Module]) -> list[str]:
    """The fields of what a class of model says that it returns."""
    try:
        returned = get_type_hints(base.forward).get("return")
    except (NameError, TypeError, AttributeError):
        # Code that came with a model need not say it, or not so that it can be read.
        return []
    outputs = filter(dataclasses.is_dataclass, get_args(returned) or (returned,))
    return [field.name for output in outputs for field in dataclasses.fields(output)]


def bind(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a call by name."""
    if not args:
        return dict(kwargs)
    names = [p for p in inspect.signature(type(base).forward).parameters if p != "self"]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def num_rows(inputs: dict[str, Any], main_input: str) -> int:
    """
    Number of examples in a batch.

    Args:
        inputs (`dict`): The inputs of a call by name, tensors of shape `(rows, ...)`.
        main_input (`str`): Name of the one that the base is mainly called with.

    Raises:
        [`~hf_s3t.errors.S3TError`]: If none is there that tells.
    """
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

    Args:
        inputs (`dict`): The inputs of a call by name, tensors of shape `(rows, ...)` or of others.
        rows (`int`): Number of examples.
    """
    return all(name in NOT_ROWS or _knows_rows(name, value, rows) for name, value in inputs.items())


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


def first_rows(inputs: dict[str, Any], rows: int, count: int = 1) -> dict[str, Any]:
    """
    The inputs of the first examples alone.

    Args:
        inputs (`dict`): The inputs of a call by name, tensors of shape `(rows, ...)`.
        rows (`int`): Number of examples.
        count (`int`, defaults to 1): Number of those to keep.

    Returns:
        `dict`: The same, tensors of shape `(count, ...)`.
    """
    return {n: v if n in NOT_ROWS else _first_of_rows(v, rows, count) for n, v in inputs.items()}


def _first_of_rows(value: Any, rows: int, count: int) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0 and value.shape[0] == rows:
        return value[:count]
    if isinstance(value, dict) and not isinstance(value, ModelOutput):
        return {k: _first_of_rows(v, rows, count) for k, v in value.items()}
    return value


def repeat_rows(inputs: dict[str, Any], rows: int, members: int) -> dict[str, Any]:
    """
    The inputs with one block of rows per member; what has no row per example stays as it is.

    Args:
        inputs (`dict`): The inputs of a call by name, tensors of shape `(rows, ...)`.
        rows (`int`): Number of examples.
        members (`int`): Number of members.

    Returns:
        `dict`: The same, tensors of shape `(members * rows, ...)`.
    """
    if members == 1:
        return inputs
    take = partial(_repeat_along, members)
    return {n: v if n in NOT_ROWS else _take_of_value(n, v, rows, take, members) for n, v in inputs.items()}


def select_rows(inputs: dict[str, Any], rows: int, index: torch.Tensor) -> dict[str, Any]:
    """
    The inputs of some examples, in some order; what has no row per example stays as it is.

    Args:
        inputs (`dict`): The inputs of a call by name, tensors of shape `(rows, ...)`, which `can_be_selected`.
        rows (`int`): Number of examples.
        index (`torch.Tensor` of shape `(entries,)`): Which rows, each as often as it is named.

    Returns:
        `dict`: The same, tensors of shape `(entries, ...)`.
    """

    def take(value: torch.Tensor, dimension: int) -> torch.Tensor:
        return value.index_select(dimension, index.to(value.device))

    return {n: v if n in NOT_ROWS else _take_of_value(n, v, rows, take, 1) for n, v in inputs.items()}


def can_be_selected(value: Any) -> bool:
    """Whether it is known which part of an input, or of all inputs, is of which row: not so of encoded pictures."""
    if isinstance(value, ModelOutput):
        return False
    return all(map(can_be_selected, value.values())) if isinstance(value, dict) else True


def _take_of_value(
    name: str, value: Any, rows: int, take: Callable[[torch.Tensor, int], torch.Tensor], members: int
) -> Any:
    if isinstance(value, torch.Tensor) and value.dim() > 0:
        dimension = _dimension_of_rows(name, value)
        return take(value, dimension) if value.shape[dimension] == rows else value
    if isinstance(value, ModelOutput):
        return _repeat_encoded(value, members)
    if isinstance(value, dict):
        return {k: _take_of_value(name, v, rows, take, members) for k, v in value.items()}
    return value


def _repeat_encoded(encoded: ModelOutput, members: int) -> ModelOutput:
    """Pictures, of shape `(pictures, ...)`, once per member: in the order of the rows, however many a row has."""
    repeated = dict(encoded)
    if _ENCODED in repeated:
        repeated[_ENCODED] = _repeat_along(members, repeated[_ENCODED])
    if _ENCODED_BY_LAYER in repeated:
        repeated[_ENCODED_BY_LAYER] = [_repeat_layer(layer, members) for layer in repeated[_ENCODED_BY_LAYER]]
    return type(encoded)(**repeated)


def _repeat_layer(features: Any, members: int) -> Any:
    # Some put the number of the layer before its features.
    if isinstance(features, tuple) and isinstance(features[0], int):
        return features[0], _repeat_along(members, features[1])
    return _repeat_along(members, features)


def _repeat_along(members: int, value: Any, dimension: int = 0) -> Any:
    if isinstance(value, torch.Tensor):
        return value.repeat([members if d == dimension else 1 for d in range(value.dim())])
    return value * members


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
