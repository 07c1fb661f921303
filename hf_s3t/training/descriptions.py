"""How objects, classes, functions and code are described as JSON types, the same in every process."""

import collections
import functools
import inspect
import json
import logging
import math
import os
import re
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from enum import Enum
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers import (
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)

from ..model.marks import GENERATORS
from ..model.tensor_files import tensors_digest
from ..records.digests import DigestKey, encode
from .bytecode import (
    COMPILER,
    CONSTANTS,
    defaults_of,
    free_names,
    function_of,
    functions_in,
    is_constant,
    members_of,
    names_in,
    plain_code,
    unstable_kind,
)
from .library_code import is_of_library, is_of_user, qualified


# How deep objects are looked into, and how many elements a list may have to be shown one by one.
_DEEP = 8
_MANY = 16
_PROCESSORS = (PreTrainedTokenizerBase, ProcessorMixin, FeatureExtractionMixin, ImageProcessingMixin)
_CONTAINERS = (list, tuple, collections.deque)
# Told apart by kind alone: paths and loggers decide nothing, datasets are compared by themselves, and modules reach
# everything there is.
_OPAQUE = (
    types.ModuleType, os.PathLike, datasets.Dataset, torch.utils.data.Dataset, logging.Logger, logging.Handler,
    type(os.environ),
)  # fmt: skip
# The weights of large models that others hold, a teacher's, are digested once.
_WEIGHTS: "weakref.WeakKeyDictionary[PreTrainedModel, str]" = weakref.WeakKeyDictionary()


class Description:
    """
    Describes objects as JSON types, the same in every process.

    Args:
        key ([`~hf_s3t.records.digests.DigestKey`]): With which texts and contents are digested.
        shared (sequence): What is told by its class alone: the trainer itself and what it is made on.
    """

    def __init__(self, key: DigestKey, shared: Sequence[Any]):
        self._key = key
        self._shared = {id(one) for one in shared if one is not None}
        self._within: list[int] = []
        # Names of what cannot be told from another of the same name.
        self.unstable: list[str] = []

    def digest(self, value: Any) -> str:
        """Keyed digest of JSON types and bytes, short since records have many."""
        return self._key.of_part(encode(value))[:32]

    def named(self, values: Mapping[str, Any], name: str) -> dict[str, Any]:
        """Descriptions of values by name."""
        return {str(part): self.of(value, f"{name}.{part}") for part, value in sorted(values.items(), key=str)}

    def of(self, value: Any, name: str) -> Any:
        """
        The description of an object.

        Args:
            value: The object.
            name (`str`): By which a message names it.
        """
        if isinstance(value, Enum):
            return f"{qualified(type(value))}.{value.name}"
        if value is None or isinstance(value, (bool, int)):
            return value
        if isinstance(value, float):
            return value if math.isfinite(value) else repr(value)
        if isinstance(value, np.generic):
            return self.of(value.item(), name)
        if isinstance(value, (complex, torch.dtype, torch.Size, slice, range, types.EllipsisType)):
            return str(value)
        if isinstance(value, (str, bytes, date, time, timedelta)):
            return self.digest(value)
        if id(value) in self._within or len(self._within) > _DEEP:
            return f"{qualified(type(value))} again"
        if id(value) in self._shared or isinstance(value, _OPAQUE):
            return qualified(type(value))
        self._within.append(id(value))
        try:
            return self._of_object(value, name)
        finally:
            self._within.pop()

    def _of_object(self, value: Any, name: str) -> Any:
        if isinstance(value, type):
            return self._class(value, name)
        if isinstance(value, types.FunctionType):
            return self._function(value, name)
        if isinstance(value, types.MethodType):
            return {"function": self.of(value.__func__, name), "self": self.of(value.__self__, name)}
        if isinstance(value, functools.partial):
            return {
                "function": self.of(value.func, name),
                "arguments": [self.of(part, name) for part in value.args],
                "attributes": self.named(value.keywords, name),
            }
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return self._tensor(value)
        if isinstance(value, GENERATORS):
            self.unstable.append(f"`{name}`, a {type(value).__name__}")
            return qualified(type(value))
        if isinstance(value, _PROCESSORS):
            return self._processor(value, name)
        if isinstance(value, re.Pattern):
            return self.digest([value.pattern, value.flags])
        if isinstance(value, (*_CONTAINERS, Mapping, set, frozenset)):
            return self._container(value, name)
        if isinstance(value, nn.Module):
            return self._module(value, name)
        if hasattr(value, "__name__") and not hasattr(value, "__dict__"):
            # Compiled code has nothing to look into.
            return qualified(value)
        attributes = {**getattr(value, "__dict__", {}), **dict(_slots(value))}
        return {"class": self._class(type(value), name), "attributes": self.named(attributes, name)}

    def _container(self, value: Any, name: str) -> Any:
        if isinstance(value, Mapping):
            parts = [[self.of(k, name), self.of(v, f"{name}[…]")] for k, v in value.items()]
        else:
            parts = [self.of(one, f"{name}[…]") for one in value]
        if isinstance(value, _CONTAINERS) and len(parts) <= _MANY:
            return parts
        parts = parts if isinstance(value, _CONTAINERS) else sorted(parts, key=json.dumps)
        return {"length": len(parts), "content": self.digest(json.dumps(parts))}

    def _tensor(self, value: torch.Tensor | np.ndarray) -> dict[str, Any]:
        about = {"dtype": str(value.dtype), "shape": list(value.shape)}
        if isinstance(value, np.ndarray):
            content = value.tolist() if value.dtype.hasobject else np.ascontiguousarray(value).tobytes()
            return {**about, "content": self.digest(content if isinstance(content, bytes) else repr(content))}
        if value.layout is not torch.strided or value.is_meta:
            return {**about, "layout": str(value.layout)}
        return {**about, "content": self.digest(tensors_digest({"": value}))}

    def _module(self, value: nn.Module, name: str) -> dict[str, Any]:
        """A module by what it holds: a loss with weights, a teacher."""
        about: dict[str, Any] = {"class": self._class(type(value), name)}
        if isinstance(value, PreTrainedModel):
            if value not in _WEIGHTS:
                _WEIGHTS[value] = _weights_digest(value)
            return {**about, "content": self.digest(_WEIGHTS[value])}
        about["content"] = self.digest(_weights_digest(value))
        own = {n: v for n, v in vars(value).items() if n not in vars(nn.Module()) and not n.startswith("_")}
        inside = dict(value.named_children())
        return {**about, "attributes": {**self.named(own, name), **self.named(inside, name)}}

    def _processor(self, value: Any, name: str) -> dict[str, Any]:
        about: dict[str, Any] = {"class": self._class(type(value), name)}
        if getattr(value, "chat_template", None) is not None:
            about["chat_template"] = self.of(value.chat_template, name)
        if isinstance(value, PreTrainedTokenizerBase):
            return {**about, **self._tokenizer(value)}
        if isinstance(value, ProcessorMixin):
            own = {n: v for n, v in vars(value).items() if not n.startswith("_") and isinstance(v, CONSTANTS)}
            inside = {part: getattr(value, part, None) for part in value.get_attributes()}
            return {**about, "attributes": self.named({**own, **inside}, name)}
        settings = {n: v for n, v in value.to_dict().items() if not n.startswith("_") and "processor" not in n}
        return {**about, "attributes": self.named(settings, name)}

    def _tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        about = {
            "special_tokens": {n: str(t) for n, t in tokenizer.special_tokens_map.items() if isinstance(t, str)},
            "padding_side": tokenizer.padding_side,
            "truncation_side": tokenizer.truncation_side,
            "model_max_length": min(tokenizer.model_max_length, 2**53),
            "added_tokens": self.digest([[i, str(t)] for i, t in sorted(tokenizer.added_tokens_decoder.items())]),
        }
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            return {**about, "vocabulary": self.digest(sorted(tokenizer.get_vocab().items(), key=str))}
        # Not the whole backend: its truncation and padding are left over from its last call.
        ways = ("model", "normalizer", "pre_tokenizer", "post_processor")
        states = [getattr(backend, way).__getstate__() if getattr(backend, way) is not None else None for way in ways]
        return {**about, "vocabulary": self.digest(states)}

    def _class(self, kind: type, name: str) -> Any:
        return qualified(kind) if all(map(is_of_library, kind.__mro__)) else self._code(kind, name)

    def _function(self, function: types.FunctionType, name: str) -> Any:
        if is_of_library(function):
            return qualified(function)
        kind = unstable_kind(function)
        if kind is not None:
            self.unstable.append(f"`{name}`, the {kind} {qualified(function)}")
            return qualified(function)
        return self._code(function, name)

    def member(self, value: Any, name: str) -> Any:
        """What a class holds under a name; see `members_of`."""
        if isinstance(value, property):
            return [self.of(part, name) for part in (value.fget, value.fset)]
        return self.of(function_of(value), name)

    def _code(self, root: types.FunctionType | type, name: str) -> dict[str, Any]:
        """
        Code of the user's by its name, a digest of it and of what other code of the user's it names, and the
        constants that it goes by.
        """
        found: dict[Any, Any] = {}
        constants: dict[str, Any] = {}
        waiting: list[Any] = [root]
        while waiting:
            part = waiting.pop()
            if part in found:
                continue
            functions = [inspect.unwrap(part)] if isinstance(part, types.FunctionType) else list(functions_in(part))
            found[part] = [part.__qualname__, self._own(part, name)]
            for function in functions:
                named = {n: function.__globals__.get(n) for n in names_in(function.__code__)}
                waiting += [value for value in named.values() if is_of_user(value)]
                constants |= {n: v for n, v in named.items() if is_constant(n, v)}
            if isinstance(part, type):
                waiting += [base for base in part.__mro__ if is_of_user(base)]
        content = json.dumps(sorted(found.values(), key=json.dumps))
        about = {"name": root.__qualname__, "code": f"{COMPILER}:{self.digest(content)}"}
        return {**about, "attributes": self.named(constants, name)} if constants else about

    def _own(self, part: types.FunctionType | type, name: str) -> Any:
        """What a function or class says itself."""
        if isinstance(part, types.FunctionType):
            return self._own_function(part, name)
        bases = [qualified(base) for base in part.__bases__ if is_of_library(base)]
        return [bases, {n: self._own_member(value, name) for n, value in sorted(members_of(part).items())}]

    def _own_function(self, function: types.FunctionType, name: str) -> Any:
        if free_names(function) and function is not inspect.unwrap(function):
            function = inspect.unwrap(function)
        elif free_names(function):
            self.unstable.append(f"`{name}`, which goes by the closure {qualified(function)}")
        defaults = [[n, self.of(value, name)] for n, value in defaults_of(function).items()]
        return [self.digest(plain_code(function.__code__)), defaults]

    def _own_member(self, value: Any, name: str) -> Any:
        if isinstance(value, property):
            return [self._own_member(part, name) for part in (value.fget, value.fset)]
        value = function_of(value)
        if isinstance(value, types.FunctionType):
            return qualified(value) if is_of_library(value) else self._own(value, name)
        return self.member(value, name)


def _weights_digest(module: nn.Module) -> str:
    tensors = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}
    return tensors_digest({name: tensor for name, tensor in tensors.items() if not tensor.is_meta})


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            if not name.startswith("__") and hasattr(value, name):
                yield name, getattr(value, name)
