"""What there is to see of an object and of all that it holds: looked at, and compared with an earlier look."""

import collections
import functools
import hashlib
import inspect
import logging
import random
import types
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from torch import nn
from transformers import FeatureExtractionMixin, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin


# Elements of a container, and bytes of a tensor or array, from which on it is data: shared by copies, not looked into.
MANY = 64
MANY_BYTES = 2**20
# Characters from which on a text is told by its hash, which it keeps.
_LONG_TEXT = 1000
# How deep objects are looked into.
DEEP = 12
# Random generators with a state of their own: seeding the global ones does not set these back.
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# What is shared as it is: large, and without state that could matter; or reaching everything there is.
OPAQUE = (
    type, types.ModuleType, types.BuiltinFunctionType, logging.Logger, logging.Handler, PreTrainedModel,
    PreTrainedTokenizerBase, ProcessorMixin, FeatureExtractionMixin,
)  # fmt: skip
# Libraries of tables and files, whose objects are data.
DATA_LIBRARIES = {"pandas", "pyarrow", "polars", "PIL", "h5py", "zarr", "lmdb"}
CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)


class Mark(NamedTuple):
    """
    What there is to see of an object: two marks are equal if nothing that can be seen differs.

    Args:
        kind (`str`): Its type.
        content (*optional*): What it says by itself.
        parts (`tuple`): Marks of what it holds, by name.
    """

    kind: str
    content: Any = None
    parts: tuple[tuple[str, "Mark"], ...] = ()

    @property
    def is_unset(self) -> bool:
        """Whether it is `None`, or not there."""
        return self.kind == "NoneType"


UNSET = Mark("NoneType")


def mark(value: Any, shared: Iterable[Any] = (), opaque: tuple[type, ...] = ()) -> Mark:
    """
    Look at an object, and at what it holds: attributes, elements, cells of closures, states of generators.

    Args:
        value: The object.
        shared (iterable, *optional*): What is not looked into.
        opaque (`tuple[type, ...]`, *optional*): Types whose objects are not looked into.
    """
    return _look_into(value, {id(one) for one in shared}, opaque, {}, 0)


def _look_into(value: Any, shared: set[int], opaque: tuple[type, ...], seen: dict[int, int], depth: int) -> Mark:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None:
        return UNSET
    if isinstance(value, (str, bytes)) and len(value) > _LONG_TEXT:
        return Mark(kind, (len(value), hash(value)))
    if isinstance(value, (bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device)):
        return Mark(kind, repr(value))
    if isinstance(value, GENERATORS):
        return Mark(kind, _digest(repr(_state_of_generator(value)).encode()))
    if isinstance(value, torch.Tensor):
        return Mark(kind, _content_of_tensor(value))
    if isinstance(value, np.ndarray):
        return Mark(kind, _content_of_array(value))
    if id(value) in seen:
        return Mark("again", seen[id(value)])
    seen[id(value)] = len(seen)
    if id(value) in shared or isinstance(value, opaque) or depth > DEEP:
        return Mark(kind)
    parts = tuple((name, _look_into(part, shared, opaque, seen, depth + 1)) for name, part in held_by(value))
    return Mark(kind, len(value) if isinstance(value, CONTAINERS) else None, parts)


def _digest(content: bytes | memoryview) -> str:
    return hashlib.sha256(content).hexdigest()


def _state_of_generator(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state().tolist()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.RandomState):
        return [part.tolist() if isinstance(part, np.ndarray) else part for part in generator.get_state()]
    return generator.getstate()


def _content_of_tensor(value: torch.Tensor) -> tuple[Any, ...]:
    is_plain = value.layout is torch.strided and not value.is_nested
    about = str(value.dtype), tuple(value.shape) if is_plain else str(value.layout)
    if not is_plain or value.is_meta or value.numel() * value.element_size() > MANY_BYTES:
        # Counts what is done to it in place.
        return *about, None if value.is_inference() else value._version
    flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
    return *about, _digest(flat.view(torch.uint8).numpy().tobytes()) if flat.numel() else None


def _content_of_array(value: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    about = str(value.dtype), tuple(value.shape)
    if value.nbytes > MANY_BYTES or value.dtype.hasobject:
        return *about, None
    return *about, _digest(np.ascontiguousarray(value).tobytes())


def held_by(value: Any) -> list[tuple[str, Any]]:
    """What an object holds, by name; nothing where it is data, or reaches everything there is."""
    if isinstance(value, OPAQUE) or type(value).__module__.split(".")[0] in DATA_LIBRARIES:
        return []
    if isinstance(value, CONTAINERS):
        if len(value) > MANY:
            return []
        if isinstance(value, dict):
            return [(f"[{name!r}]", part) for name, part in value.items()]
        elements = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [(f"[{number}]", part) for number, part in enumerate(elements)]
    if isinstance(value, types.FunctionType):
        names = value.__code__.co_freevars
        cells = [(name, _content_of_cell(cell)) for name, cell in zip(names, value.__closure__ or (), strict=True)]
        defaults = [*enumerate(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).items()]
        return [*cells, *((f"default {name}", part) for name, part in defaults), *vars(value).items()]
    if isinstance(value, types.MethodType):
        return [("self", value.__self__), ("function", value.__func__)]
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords), *vars(value).items()]
    if isinstance(value, types.GeneratorType):
        return [("at", value.gi_frame and value.gi_frame.f_lasti), ("locals", inspect.getgeneratorlocals(value))]
    if isinstance(value, datasets.Dataset):
        return [("format", value.format["format_kwargs"])]
    return [
        (name, part)
        for name, part in [*getattr(value, "__dict__", {}).items(), *_slots(value)]
        if not (isinstance(value, nn.Module) and (name == "training" or "_hooks" in name))
    ]


def _content_of_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        # Of a variable that has no value yet.
        return None


def _slots(value: Any) -> list[tuple[str, Any]]:
    names = [name for cls in type(value).__mro__ for name in _slot_names(vars(cls).get("__slots__", ()))]
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def _slot_names(slots: str | Iterable[str]) -> list[str]:
    return [slots] if isinstance(slots, str) else [name for name in slots if not name.startswith("__")]


def reached(value: Any, around: Sequence[Any] = (), ends: tuple[type, ...] = ()) -> Iterator[Any]:
    """
    An object and all that it holds, of containers every element and key.

    Args:
        value: The object.
        around (sequence, *optional*): What is passed over.
        ends (`tuple[type, ...]`, *optional*): Types whose objects are not looked into.
    """
    seen = {id(one) for one in around}
    waiting = [(value, 0)]
    while waiting:
        one, depth = waiting.pop()
        if isinstance(one, (bool, int, float, complex, str, bytes)):
            # Python may keep one object for all that are equal.
            yield one
            continue
        if id(one) in seen or depth > DEEP:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, (torch.Tensor, np.ndarray, *ends)):
            continue
        parts = [part for _, part in held_by(one)]
        if isinstance(one, CONTAINERS):
            parts = [*one, *one.values()] if isinstance(one, dict) else list(one)
        waiting += [(part, depth + 1) for part in reversed(parts)]


def difference(one: Mark, other: Mark, name: str = "") -> str | None:
    """Where two marks differ, as far inside as can be said; `None` if they do not."""
    if one == other:
        return None
    mine, theirs = dict(one.parts), dict(other.parts)
    if (one.kind, one.content) == (other.kind, other.content) and mine.keys() == theirs.keys():
        for part in mine:
            found = difference(mine[part], theirs[part], f"{name}{part}" if part[0] == "[" else f"{name}.{part}")
            if found is not None:
                return found
    return name.removeprefix(".")
