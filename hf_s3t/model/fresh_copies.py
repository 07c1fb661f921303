"""Copies of collators, losses, callbacks and datasets, so that each stage has its own."""

import copy
import functools
import types
from collections.abc import Iterator, Sequence
from typing import Any

import datasets
import numpy as np
import torch

from ..errors import IsolationError
from .marks import CONTAINERS, DATA_LIBRARIES, DEEP, MANY, MANY_BYTES, OPAQUE, held_by


def fresh_copy(part: Any, shared: Sequence[Any]) -> Any:
    """
    A copy of a collator, loss, dataset or callback, state and all, also of what closures hold.

    Args:
        part: What to copy.
        shared (sequence): What the copy holds as it is. So it does data, tokenizers and pretrained models, which are
            large and keep no state.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: If it cannot be copied.
    """
    memo = {id(one): one for one in shared if one is not None}
    try:
        found = list(held_as_it_is(part, memo))
        memo |= {id(one): one for one in found if not isinstance(one, types.FunctionType)}
        # Functions come last: what they share must be in the memo by then.
        for one in found:
            if isinstance(one, types.FunctionType):
                _copy_function(one, memo)
        return memo[id(part)] if id(part) in memo else copy.deepcopy(part, memo)
    except Exception as error:
        raise IsolationError(
            f"{type(part).__name__} cannot be copied ({error}), and each stage needs its own, so that no state goes "
            "from one to the next. Give one that `copy.deepcopy` copies."
        ) from error


def held_as_it_is(value: Any, shared: dict[int, Any], depth: int = 0, seen: set[int] | None = None) -> Iterator[Any]:
    """What a copy holds as it is, and the functions that have a closure, which `copy.deepcopy` does not copy."""
    seen = seen if seen is not None else set()
    if id(value) in seen or id(value) in shared or depth > DEEP:
        return
    seen.add(id(value))
    if _is_data(value) or (isinstance(value, types.FunctionType) and value.__closure__):
        yield value
    for _, part in held_by(value):
        yield from held_as_it_is(part, shared, depth + 1, seen)


def _is_data(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size() > MANY_BYTES
    if isinstance(value, np.ndarray):
        return value.nbytes > MANY_BYTES
    if isinstance(value, datasets.Dataset):
        return bool(value.format["type"] != "custom")
    if isinstance(value, CONTAINERS):
        return len(value) > MANY
    if isinstance(value, OPAQUE):
        return not isinstance(value, type)
    return type(value).__module__.split(".")[0] in DATA_LIBRARIES


def _copy_function(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """A function whose closure is its own. What cannot be copied is shared, and what shows of it is watched."""
    if id(function) in memo:
        known: types.FunctionType = memo[id(function)]
        return known
    closure = function.__closure__ or ()
    cells = tuple(types.CellType() for _ in closure)
    copied = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    functools.update_wrapper(copied, function, updated=("__dict__",))
    vars(copied).pop("__wrapped__", None)
    copied.__kwdefaults__ = function.__kwdefaults__
    # Before its cells are filled: it may be in one of them.
    memo[id(function)] = copied
    for cell, given in zip(cells, closure, strict=True):
        try:
            content = given.cell_contents
        except ValueError:
            continue
        try:
            cell.cell_contents = (
                _copy_function(content, memo)
                if isinstance(content, types.FunctionType) and content.__closure__
                else copy.deepcopy(content, memo)
            )
        except Exception:
            cell.cell_contents = content
    return copied


def fresh_dataset(dataset: Any, shared: Sequence[Any] = ()) -> Any:
    """
    A dataset in the state it is in, for one stage: what it draws or counts, and what its transform does, moves no
    other. Rows are shared. One that cannot be copied is returned as it is.

    Args:
        dataset ([`~datasets.Dataset`] or map-style `torch.utils.data.Dataset`, or a dict of such): The dataset.
        shared (sequence, *optional*): What the copy holds as it is.
    """
    if isinstance(dataset, dict):
        return type(dataset)({name: fresh_dataset(one, shared) for name, one in dataset.items()})
    try:
        if not isinstance(dataset, datasets.Dataset):
            return fresh_copy(dataset, shared)
        if dataset.format["type"] != "custom":
            return dataset
        form = dict(dataset.format)
        return dataset.with_format(**fresh_copy(form.pop("format_kwargs"), shared), **form)
    except IsolationError:
        return dataset
