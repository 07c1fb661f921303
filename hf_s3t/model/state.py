"""State that is in no parameter: seen in models, data and functions, compared, copied for each stage, put back."""

import collections
import contextlib
import copy
import functools
import hashlib
import inspect
import logging
import random
import types
import weakref
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import (
    FeatureExtractionMixin,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..errors import IsolationError
from .turns import PREPARED, Turns


# Elements of a container, and bytes of a tensor or array, from which on it is data: shared by copies, not looked into.
_MANY = 64
_MANY_BYTES = 2**20
# Characters from which on a text is told by its hash, which it keeps.
_LONG_TEXT = 1000
# How deep objects are looked into.
_DEEP = 12
# How often in a row something may seem to be left in a model that several threads call at once.
_DOUBTS = 3

# What draws by itself, whatever the global random states are.
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
# What is shared as it is: large, and without state that could matter; or reaching everything there is.
_OPAQUE = (
    type, types.ModuleType, types.BuiltinFunctionType, logging.Logger, logging.Handler, PreTrainedModel,
    PreTrainedTokenizerBase, ProcessorMixin, FeatureExtractionMixin,
)  # fmt: skip
# Libraries of tables and files, whose objects are data, and of quantisation, which keeps its own with the weights.
_DATA_LIBRARIES = {"pandas", "pyarrow", "polars", "PIL", "h5py", "zarr", "lmdb"}
_QUANTIZERS = {"bitsandbytes", "hqq", "torchao", "optimum", "eetq"}

# Attributes of modules that say how they are run and wrapped, not what they compute.
_ASIDE = {
    *PREPARED, "training", "generation_config", "warnings_issued", "peft_config", "gradient_checkpointing",
    "_gradient_checkpointing_func", "neftune_noise_alpha", "_parameters", "_modules", "_buffers", "_hf_hook",
    "_old_forward", "_compiled_call_impl", "_is_accelerate_prepared", "_hf_peft_config_loaded",
}  # fmt: skip


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


_UNSET = Mark("NoneType")


def mark(value: Any, shared: Iterable[Any] = (), opaque: tuple[type, ...] = ()) -> Mark:
    """
    Look at an object, and at what it holds: attributes, elements, cells of closures, states of generators.

    Args:
        value: The object.
        shared (iterable, *optional*): What is not looked into.
        opaque (`tuple[type, ...]`, *optional*): Types whose objects are not looked into.
    """
    return _mark(value, {id(one) for one in shared}, opaque, {}, 0)


def _mark(value: Any, shared: set[int], opaque: tuple[type, ...], seen: dict[int, int], depth: int) -> Mark:
    kind = f"{type(value).__module__}.{type(value).__qualname__}"
    if value is None:
        return _UNSET
    if isinstance(value, (str, bytes)) and len(value) > _LONG_TEXT:
        return Mark(kind, (len(value), hash(value)))
    if isinstance(value, (bool, int, float, complex, str, bytes, np.generic, torch.dtype, torch.device)):
        return Mark(kind, repr(value))
    if isinstance(value, _GENERATORS):
        return Mark(kind, _digest(repr(_state_of_generator(value)).encode()))
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return Mark(kind, _content(value))
    if id(value) in seen:
        return Mark("again", seen[id(value)])
    seen[id(value)] = len(seen)
    if id(value) in shared or isinstance(value, opaque) or depth > _DEEP:
        return Mark(kind)
    parts = tuple((name, _mark(part, shared, opaque, seen, depth + 1)) for name, part in _parts(value))
    return Mark(kind, len(value) if isinstance(value, _CONTAINERS) else None, parts)


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


def _content(value: torch.Tensor | np.ndarray) -> tuple:
    is_plain = not isinstance(value, torch.Tensor) or (value.layout is torch.strided and not value.is_nested)
    about = str(value.dtype), tuple(value.shape) if is_plain else str(value.layout)
    if isinstance(value, torch.Tensor):
        if not is_plain or value.is_meta or value.numel() * value.element_size() > _MANY_BYTES:
            # Counts what is done to it in place.
            return *about, None if value.is_inference() else value._version
        value = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        value = value.view(torch.uint8).numpy() if value.numel() else None
    elif value.nbytes > _MANY_BYTES or value.dtype.hasobject:
        value = None
    return *about, _digest(np.ascontiguousarray(value).tobytes()) if value is not None else None


_CONTAINERS = (dict, list, tuple, set, frozenset, collections.deque)


def _parts(value: Any) -> list[tuple[str, Any]]:
    """What an object holds, by name; nothing where it is data, or reaches everything there is."""
    if isinstance(value, _OPAQUE) or type(value).__module__.split(".")[0] in _DATA_LIBRARIES:
        return []
    if isinstance(value, _CONTAINERS):
        if len(value) > _MANY:
            return []
        if isinstance(value, dict):
            return [(f"[{name!r}]", part) for name, part in value.items()]
        elements = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
        return [(f"[{number}]", part) for number, part in enumerate(elements)]
    if isinstance(value, types.FunctionType):
        names = value.__code__.co_freevars
        cells = [(name, _inside(cell)) for name, cell in zip(names, value.__closure__ or (), strict=True)]
        defaults = {**dict(enumerate(value.__defaults__ or ())), **(value.__kwdefaults__ or {})}
        return [*cells, *((f"default {name}", part) for name, part in defaults.items()), *vars(value).items()]
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


def _inside(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        # Of a variable that has no value yet.
        return None


def _slots(value: Any) -> list[tuple[str, Any]]:
    names = [name for cls in type(value).__mro__ for name in _names(vars(cls).get("__slots__", ()))]
    return [(name, getattr(value, name)) for name in names if hasattr(value, name)]


def _names(slots: str | Iterable[str]) -> list[str]:
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
        if id(one) in seen or depth > _DEEP:
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, (torch.Tensor, np.ndarray, *ends)):
            continue
        parts = [part for _, part in _parts(one)]
        if isinstance(one, _CONTAINERS):
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


# Tokenizers


class TokenizerSettings:
    """
    How the tokenizers of some objects are set: on which side they pad, which a callback that generates may change.

    Args:
        parts (sequence): Tokenizers, processors, and what holds them, such as collators.
    """

    def __init__(self, parts: Sequence[Any]):
        self._found: dict[int, tuple[PreTrainedTokenizerBase, dict[str, Any]]] = {}
        for part in parts:
            for one in _walk(part, {}):
                inside = vars(one).values() if isinstance(one, ProcessorMixin) else (one,)
                for tokenizer in (each for each in inside if isinstance(each, PreTrainedTokenizerBase)):
                    self._found[id(tokenizer)] = tokenizer, _plain_settings(tokenizer)

    def have_changed(self) -> bool:
        """Whether one is set otherwise than it was."""
        return any(_plain_settings(tokenizer) != settings for tokenizer, settings in self._found.values())

    def put_back(self) -> None:
        """Set all as they were."""
        for tokenizer, settings in self._found.values():
            vars(tokenizer).update(settings)


def _plain_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: value for name, value in vars(tokenizer).items() if isinstance(value, (bool, int, float, str))}


# Copies


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
        found = list(_walk(part, memo))
        memo |= {id(one): one for one in found if not isinstance(one, types.FunctionType)}
        # After what they share.
        for one in found:
            if isinstance(one, types.FunctionType):
                _copy_function(one, memo)
        return memo[id(part)] if id(part) in memo else copy.deepcopy(part, memo)
    except Exception as error:
        raise IsolationError(
            f"{type(part).__name__} cannot be copied ({error}), and each stage needs its own, so that no state goes "
            "from one to the next. Give one that `copy.deepcopy` copies."
        ) from error


def _walk(value: Any, shared: dict[int, Any], depth: int = 0, seen: set[int] | None = None) -> Iterator[Any]:
    """What a copy holds as it is, and the functions that have a closure, which `copy.deepcopy` does not copy."""
    seen = seen if seen is not None else set()
    if id(value) in seen or id(value) in shared or depth > _DEEP:
        return
    seen.add(id(value))
    if _is_data(value) or (isinstance(value, types.FunctionType) and value.__closure__):
        yield value
    for _, part in _parts(value):
        yield from _walk(part, shared, depth + 1, seen)


def _is_data(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size() > _MANY_BYTES
    if isinstance(value, np.ndarray):
        return value.nbytes > _MANY_BYTES
    if isinstance(value, datasets.Dataset):
        return value.format["type"] != "custom"
    if isinstance(value, _CONTAINERS):
        return len(value) > _MANY
    if isinstance(value, _OPAQUE):
        return not isinstance(value, type)
    return type(value).__module__.split(".")[0] in _DATA_LIBRARIES


def _copy_function(function: types.FunctionType, memo: dict[int, Any]) -> types.FunctionType:
    """A function whose closure is its own. What cannot be copied is shared, and what shows of it is watched."""
    if id(function) in memo:
        return memo[id(function)]
    cells = tuple(types.CellType() for _ in function.__closure__)
    copied = types.FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    functools.update_wrapper(copied, function, updated=("__dict__",))
    vars(copied).pop("__wrapped__", None)
    copied.__kwdefaults__ = function.__kwdefaults__
    # Before its cells are filled: it may be in one of them.
    memo[id(function)] = copied
    for cell, given in zip(cells, function.__closure__, strict=True):
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


# Modules


# By this name buffers are seen, which are never put back.
BUFFERS = "buffers"


class Look:
    """
    What the modules of a model hold besides parameters, and its configs: seen when this is made.

    Args:
        model (`nn.Module`): The model; adapters on it are passed over.
    """

    # Of no compiled graph: it looks at what is there.
    @torch.compiler.disable
    def __init__(self, model: nn.Module):
        self._model = model
        self._tensors: dict[tuple[str, str], torch.Tensor] = {}
        self._plain: dict[tuple[str, str], bool | int | float | str] = {}
        derived = _DERIVED.get(model, ())
        self.marks: dict[tuple[str, str], Mark] = {}
        for name, attribute, _, value in _attributes(model):
            place = name, attribute
            if place in derived:
                continue
            if isinstance(value, torch.Tensor):
                self._tensors[place] = value
            elif isinstance(value, (bool, int, float, str)):
                self._plain[place] = value
            # Modules and configs that are held have attributes of their own here.
            self.marks[place] = mark(value, opaque=(nn.Module, PreTrainedConfig))

    def changed(self, since: "Look") -> dict[str, tuple[Mark, Mark]]:
        """
        What was set and is not the same any more: what it was and what it is.

        A tensor counts if it was written to, or is another one of the same shape with other fractions in it: what is
        computed with weights. Positions and the like are made by every pass for itself.
        """
        found = {}
        for place, before in since.marks.items():
            now = self.marks.get(place, _UNSET)
            if before.is_unset or now == before:
                continue
            is_other = place in since._tensors and self._tensors.get(place) is not since._tensors[place]
            if not is_other or _holds_other_fractions(before, now):
                found[f"{place[0]}.{place[1]}" if place[0] else place[1]] = before, now
        return found

    def differs(self, other: "Look") -> bool:
        """Whether anything is not the same."""
        return self.marks != other.marks

    def put_back(self, settings: bool = False) -> None:
        """
        Take from the modules what was not set, and is now, and give them the tensors they had: what each pass makes
        for itself, as it needs it.

        Args:
            settings (`bool`, defaults to `False`): Give them what else was replaced, too.
        """
        for name, attribute, owner, value in list(_attributes(self._model)):
            place = name, attribute
            if attribute == BUFFERS or place in _DERIVED.get(self._model, ()):
                continue
            if place in self._tensors:
                vars(owner)[attribute] = self._tensors[place]
            elif settings and place in self._plain:
                vars(owner)[attribute] = self._plain[place]
            elif place not in self.marks:
                vars(owner).pop(attribute)
            elif self.marks[place].is_unset and value is not None:
                vars(owner)[attribute] = None


class Derived(frozenset):
    """The attributes, as owner and name, that a pass makes from the shape of its own input, whatever came before."""

    @classmethod
    def of(cls, first: Look, between: Look, again: Look) -> "Derived":
        """
        What changes with the shape of an input, and is the same again for the same input.

        Args:
            first ([`Look`]): After a pass over some input.
            between ([`Look`]): After a pass over an input of another shape.
            again ([`Look`]): After a pass over the first input again.
        """
        places = first.marks.keys() | between.marks.keys()
        changed = {place for place in places if first.marks.get(place) != between.marks.get(place)}
        return cls(place for place in changed if first.marks.get(place) == again.marks.get(place))

    def hold_for(self, model: nn.Module) -> None:
        """Have looks at a model pass over these."""
        _DERIVED[model] = self


# Per model what looks pass over.
_DERIVED: "weakref.WeakKeyDictionary[nn.Module, Derived]" = weakref.WeakKeyDictionary()


def _holds_other_fractions(one: Mark, other: Mark) -> bool:
    if not (isinstance(one.content, tuple) and isinstance(other.content, tuple)):
        return False
    return one.content[:2] == other.content[:2] and any(kind in one.content[0] for kind in ("float", "complex"))


def _attributes(model: nn.Module) -> Iterator[tuple[str, str, Any, Any]]:
    """Attributes of the modules and configs of a model: name of the owner, name, owner and value."""
    for name, module in _bare_modules(model, ""):
        if type(module).__module__.split(".")[0] in _QUANTIZERS:
            continue
        for attribute, value in list(vars(module).items()):
            if attribute not in _ASIDE and "_hook" not in attribute and not attribute.startswith("_dynamo"):
                yield name, attribute, module, value
        yield name, BUFFERS, module, {n: b for n, b in module._buffers.items() if not n.endswith("inv_freq")}
    yield from _settings(getattr(model, "config", None), "config")


def _bare_modules(module: nn.Module, name: str, seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by their names, without those that PEFT put around or into them."""
    seen = seen if seen is not None else set()
    if isinstance(module, BaseTunerLayer):
        module = module.get_base_layer()
    elif isinstance(module, ModulesToSaveWrapper):
        module = module.original_module
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child, inner in module.named_children():
        yield from _bare_modules(inner, f"{name}.{child}" if name else child, seen)


def _settings(config: Any, name: str) -> Iterator[tuple[str, str, Any, Any]]:
    if not isinstance(config, PreTrainedConfig):
        return
    for attribute, value in list(vars(config).items()):
        yield name, attribute, config, value
        yield from _settings(value, f"{name}.{attribute}")


class CallWatch:
    """
    Watches whether calls of a model leave something in its modules: at its second call, its fourth, its eighth and so
    on, since looking takes a while. The first call may make what all need.

    Args:
        model (`nn.Module`): The base model.
        turns ([`~hf_s3t.model.turns.Turns`]): Those of the base.
    """

    def __init__(self, model: nn.Module, turns: Turns):
        self._model, self._turns = model, turns
        self._refusal: str | None = None
        self.begin_anew()

    def begin_anew(self) -> None:
        """After something else than calls had the model."""
        self._calls, self._next, self._suspicions = 0, 2, 0

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """
        Around a call.

        Raises:
            [`~hf_s3t.errors.IsolationError`]: If this call left something behind, or an earlier one did.
        """
        if self._refusal is not None:
            raise IsolationError(self._refusal)
        self._calls += 1
        alone = self._turns.is_alone
        before = Look(self._model) if self._calls >= self._next else None
        yield
        if before is None:
            return
        self._next = 2 * self._calls
        after = Look(self._model)
        left = after.changed(before)
        # What another thread's call has in hand right now may only seem to be left behind.
        self._suspicions = self._suspicions + 1 if left else 0
        if left and ((alone and self._turns.is_alone) or self._suspicions > _DOUBTS):
            self._refusal = (
                f"A call left something in the modules of {type(self._model).__name__}, {shown(left)}: it would reach "
                "into later answers, also when the stages that computed it are deleted. Use a model whose forward "
                "pass leaves nothing behind."
            )
            raise IsolationError(self._refusal)


def shown(left: dict[str, tuple[Mark, Mark]]) -> str:
    """Attributes that changed, as a message names them."""
    name, (before, after) = next(iter(left.items()))
    plain = before.content is not None and after.content is not None and not isinstance(before.content, tuple)
    values = f" (from {before.content} to {after.content})" if plain else ""
    return f"`{name}`{values}" + (f" and {len(left) - 1} more" if len(left) > 1 else "")
