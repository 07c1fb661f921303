"""
The parts of a recipe besides arguments: what was given to a trainer and decides a stage, described so that another
process can tell one from another.
"""

import collections
import dataclasses
import dis
import functools
import hashlib
import inspect
import json
import logging
import math
import os
import random
import re
import sys
import sysconfig
import types
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, time, timedelta
from enum import Enum
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers import (
    EarlyStoppingCallback,
    FeatureExtractionMixin,
    ImageProcessingMixin,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.trainer_callback import ExportableState

from ..errors import ExampleIdError
from ..model.stack import tensors_digest
from ..records.digests import DigestKey, encode
from .circumstances import evaluation_trains
from .dataset_rows import shown_rows, stored_rows


if TYPE_CHECKING:
    from .trainer import S3TTrainerMixin


# How deep objects are looked into, and how many elements a list may have to be shown one by one.
_DEEP = 8
_MANY = 16
_UNKNOWN = "something"
# Parts of a description that a message does not name.
_UNNAMED = ("attributes", "class", "code", "content", "methods")
# Bytecode is the same in all patch versions of a Python, and no further.
_COMPILER = f"{sys.implementation.cache_tag}{'-O' * sys.flags.optimize}"
_HERE = [os.path.realpath(path) for path in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}]

_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_PROCESSORS = (PreTrainedTokenizerBase, ProcessorMixin, FeatureExtractionMixin, ImageProcessingMixin)
_CONTAINERS = (list, tuple, collections.deque)
# Where things lie, what is written down, what runs, or reaches everything there is: told apart by kind alone.
_OPAQUE = (
    types.ModuleType, os.PathLike, datasets.Dataset, torch.utils.data.Dataset, logging.Logger, logging.Handler,
    type(os.environ),
)  # fmt: skip
_CONSTANTS = (bool, int, float, complex, str, bytes, types.NoneType, tuple, frozenset)
# What the interpreter, `dataclass` and `abc` put into classes.
_OF_CLASSES = {
    "__module__", "__qualname__", "__dict__", "__weakref__", "__doc__", "__annotations__", "__dataclass_fields__",
    "__dataclass_params__", "__match_args__", "__firstlineno__", "__static_attributes__", "__abstractmethods__",
    "_abc_impl", "__parameters__", "__orig_bases__", "__slots__", "__annotate_func__", "__annotations_cache__",
    "__classdictcell__", "__type_params__", "__hash__",
}  # fmt: skip
# Methods of trainers that no step of a stage goes through, unless evaluation decides what a stage ends with.
_OF_EVALUATION = {
    "evaluate", "predict", "evaluation_loop", "prediction_step", "get_eval_dataloader", "_get_eval_sampler",
    "_determine_best_metric", "_evaluate", "_maybe_log_save_evaluate",
}  # fmt: skip
# And those that only write down or show.
_ASIDE = {
    "__init__", "log", "log_metrics", "save_metrics", "save_model", "save_state", "push_to_hub", "create_model_card",
    "_save", "_save_checkpoint", "get_test_dataloader", "init_hf_repo", "store_flos", "floating_point_ops",
    "verify", "train",
}  # fmt: skip
# What a callback names that takes part in steps, or ends them, and that writes to what a model holds.
_STEPPING = {"optimizer", "lr_scheduler", "should_training_stop", "should_epoch_stop"}
_WRITING = {"grad", "data", "requires_grad", "load_state_dict"}
# The weights of large models that others hold, a teacher's, are digested once.
_WEIGHTS: "weakref.WeakKeyDictionary[PreTrainedModel, str]" = weakref.WeakKeyDictionary()


def parts_of(trainer: "S3TTrainerMixin", key: DigestKey) -> tuple[dict[str, Any], list[str]]:
    """
    What decides the stages of a trainer besides its arguments and rows: optimizer, loss, collator, tokenizer or
    processor, methods and attributes of a trainer class of the user's, callbacks that reach what is trained,
    transforms, and what Accelerate was told.

    Code of the user's (no library's, whose versions are recorded) is told by its bytecode and by what it names: other
    functions of the user's, and constants in capitals. Comments, formatting and docstrings do not count. It is the
    same in every process, and in all patch versions of a Python unless one mends its compiler. Numbers and names stand
    as they are; texts, code, tensors and what is large stand as keyed digests, since records are published.

    Args:
        trainer ([`S3TTrainer`]): The trainer.
        key ([`~hf_s3t.records.digests.DigestKey`]): The system's secret.

    Returns:
        `tuple[dict, list[str]]`: The description of each part, as JSON types; and which of them cannot be told from
        another of the same name: lambdas, closures, and generators of random numbers.
    """
    description = _Description(key, (trainer, trainer.model, trainer.args, trainer._stack))
    given = {name: getattr(trainer, name, None) for name in ("compute_loss_func", "data_collator", "label_smoother")}
    if evaluation_trains(trainer.args):
        given |= {name: getattr(trainer, name) for name in ("compute_metrics", "preprocess_logits_for_metrics")}
    parts = {name: description.of(part, name) for name, part in given.items()}
    parts["optimizer_cls_and_kwargs"] = _optimizer(trainer.optimizer_cls_and_kwargs, description)
    parts["arguments"] = _special_tokens(trainer.args)
    parts["trainer"] = _trainer(trainer, description)
    parts["callbacks"] = _callbacks(trainer.callback_handler.callbacks, description)
    parts["model"] = _model(trainer.model, description)
    parts["accelerator"] = accelerator_settings(trainer.accelerator)
    if trainer.processing_class is not None:
        parts["processing_class"] = description.of(trainer.processing_class, "processing_class")
    if trainer._prepared is not None:
        parts["train_dataset"] = _dataset(trainer._prepared, description)
    if evaluation_trains(trainer.args):
        parts["eval_dataset"] = _rows_digest(trainer.eval_dataset, description)
    return json.loads(json.dumps(parts)), description.unstable


def recorded_parts(record: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that the record of a stage or checkpoint tells of; before they were recorded, precision was."""
    if isinstance(record.get("parts"), dict):
        return record["parts"]
    known = record.get("circumstances", {}).get("mixed_precision")
    return {} if known is None else {"accelerator": {"mixed_precision": known}}


def differing_parts(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """
    The parts that differ, by name, as (recorded, present). What only one of the two knows of is not compared: an
    earlier version did not record it, or a tokenizer was not given. Nor is code that another Python compiled.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for name in sorted(recorded.keys() & present.keys()):
        then, now = recorded[name], present[name]
        if name == "accelerator" and isinstance(then, dict):
            then, now = ({n: side[n] for n in then.keys() & now.keys()} for side in (then, now))
        _compare(name, then, now, found)
    return found


def lacking(recorded: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """The parts that a record does not know of, or whose code another Python compiled."""
    found = {name for name in present if name not in recorded and name != "processing_class"}
    return sorted(found | {name for name in recorded.keys() & present.keys() if _is_of_another_python(recorded[name])})


def shown_parts(differing: Mapping[str, tuple[Any, Any]]) -> str:
    """Parts that differ, as a message names them."""
    return ", ".join(_shown(name, then, now) for name, (then, now) in differing.items())


def _shown(name: str, then: Any, now: Any) -> str:
    if any(_is_digest(value) for value in (then, now)):
        return f"another `{name}`"
    then, now = _name_of(then), _name_of(now)
    return f"another `{name}`" if then == now or _UNKNOWN in (then, now) else f"{name}={now} (was {then})"


def _name_of(description: Any) -> str:
    if isinstance(description, list):
        return ", ".join(map(_name_of, description)) or "none"
    if not isinstance(description, dict):
        return str(description)
    for part in ("name", "class", "function", "backend"):
        if part in description:
            return _name_of(description[part])
    return _UNKNOWN


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and re.fullmatch(r"(\S+:)?[0-9a-f]{32}", value) is not None


def _is_of_another_python(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_is_of_another_python(part) for part in value.values())
    if isinstance(value, list):
        return any(map(_is_of_another_python, value))
    return isinstance(value, str) and _is_digest(value) and ":" in value and not value.startswith(f"{_COMPILER}:")


def _compare(name: str, then: Any, now: Any, found: dict[str, tuple[Any, Any]]) -> None:
    if then == now:
        return
    if isinstance(then, dict) and isinstance(now, dict) and _name_of(then) == _name_of(now):
        for part in sorted(then.keys() | now.keys()):
            inside = name if part in _UNNAMED else f"{name}.{part}"
            _compare(inside, then.get(part), now.get(part), found)
    elif isinstance(then, dict) or not (_is_of_another_python(then) or _is_of_another_python(now)):
        found.setdefault(name, (then, now))


def accelerator_settings(accelerator: Any) -> dict[str, Any]:
    """What an accelerator says of how it trains, whether arguments, a config file or the environment told it."""
    dynamo, state = accelerator.state.dynamo_plugin, accelerator.gradient_state
    feeding = accelerator.dataloader_config
    return {
        "mixed_precision": accelerator.mixed_precision,
        "dynamo": {name: str(value) for name, value in dynamo.to_dict().items()} if compiles(accelerator) else None,
        "split_batches": feeding.split_batches,
        "dispatch_batches": feeding.dispatch_batches,
        "even_batches": feeding.even_batches,
        "use_seedable_sampler": feeding.use_seedable_sampler,
        "gradient_accumulation": dict(state.plugin_kwargs),
        "step_scheduler_with_optimizer": accelerator.step_scheduler_with_optimizer,
        "autocast": str(accelerator.autocast_handler) if accelerator.autocast_handler is not None else None,
    }


def compiles(accelerator: Any) -> bool:
    """Whether an accelerator compiles the models that it prepares."""
    return accelerator.state.dynamo_plugin.backend.value != "NO"


# Parts of a trainer


def _optimizer(given: tuple[type, Mapping[str, Any]] | None, description: "_Description") -> Any:
    if given is None:
        return None
    kind, arguments = given
    return {
        "class": description.of(kind, "optimizer_cls_and_kwargs"),
        "attributes": description.named(arguments, "optimizer_cls_and_kwargs"),
    }


def _special_tokens(args: Any) -> dict[str, Any]:
    """The tokens that arguments name. As these describe themselves, all that is called a token is masked."""
    names = [field.name for field in dataclasses.fields(args) if field.name.endswith("_token")]
    return {name: getattr(args, name) for name in names if not name.startswith(("hub", "push_to_hub"))}


def _trainer(trainer: "S3TTrainerMixin", description: "_Description") -> dict[str, Any]:
    """The class that is a library's, what the user's classes put in the place of its methods, and what they keep."""
    aside = _ASIDE if evaluation_trains(trainer.args) else _ASIDE | _OF_EVALUATION
    own = [kind for kind in type(trainer).__mro__ if not _is_of_library(kind)]
    base = next(kind for kind in type(trainer).__mro__ if _is_of_library(kind) and kind.__name__ != "S3TTrainerMixin")
    methods: dict[str, Any] = {}
    for name, value in vars(trainer).items():
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)) and hasattr(base, name):
            methods[name] = description.of(value, f"trainer.{name}")
    for kind in own:
        for name, value in _members(kind).items():
            if name not in aside and name not in methods:
                methods[name] = description.member(value, f"trainer.{name}")
    library = [kind for kind in type(trainer).__mro__ if _is_of_library(kind)]
    settings = _settings_of(own) & (_read_in_steps(own, aside) | _set_in(library).keys())
    kept = {name: vars(trainer)[name] for name in settings if _is_setting(vars(trainer).get(name))}
    return {
        "class": _qualified(base),
        "methods": methods,
        "attributes": description.named(kept, "trainer"),
    }


def _settings_of(kinds: Sequence[type]) -> set[str]:
    """Names of attributes that the constructors of classes set, and that nothing else in them sets."""
    return {attribute for attribute, methods in _set_in(kinds).items() if methods == {"__init__"}}


def _set_in(kinds: Iterable[type]) -> dict[str, set[str]]:
    """Names of attributes that classes set, with those of the functions in which they do."""
    set_by: dict[str, set[str]] = {}
    for function in (function for kind in kinds for function in _functions_in(kind)):
        for step in (step for code in _codes(function.__code__) for step in dis.get_instructions(code)):
            if step.opname == "STORE_ATTR":
                set_by.setdefault(step.argval, set()).add(function.__name__)
    return set_by


def _read_in_steps(kinds: Iterable[type], aside: set[str]) -> set[str]:
    """Names in what the user's classes do in a step, as against a time of start that only their logs show."""
    members = [value for kind in kinds for name, value in vars(kind).items() if name not in aside]
    waiting, seen, found = [*map(_function_of, members)], set(), set()
    while waiting:
        part = waiting.pop()
        if isinstance(part, property):
            waiting += [part.fget, part.fset]
        elif isinstance(part, type) and part not in seen:
            seen.add(part)
            waiting += _functions_in(part)
        elif isinstance(part, types.FunctionType) and inspect.unwrap(part) not in seen:
            part = inspect.unwrap(part)
            seen.add(part)
            names = _names_in(part.__code__)
            # Such as those that `getattr` is given.
            found |= {
                *names,
                *(const for code in _codes(part.__code__) for const in code.co_consts if isinstance(const, str)),
            }
            waiting += [value for value in map(part.__globals__.get, names) if _is_of_user(value)]
    return found


def _is_setting(value: Any) -> bool:
    """Whether an attribute is one that a loss goes by, and not what a run gathers."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(one, (bool, int, float, str)) for one in value)
    kinds = (bool, int, float, str, torch.Tensor, np.ndarray, nn.Module, types.FunctionType, functools.partial, Enum)
    return isinstance(value, kinds)


def _callbacks(callbacks: Iterable[TrainerCallback], description: "_Description") -> list[Any]:
    """Callbacks that decide when a stage ends, and those of the user's that reach what is trained."""
    found = []
    for callback in callbacks:
        kinds = [kind for kind in type(callback).__mro__ if not _is_of_library(kind)]
        if isinstance(callback, EarlyStoppingCallback) or any(_reaches_training(kind) for kind in kinds):
            exported = callback.state()["args"] if isinstance(callback, ExportableState) else {}
            arguments = {**_numbers_given(callback, kinds), **exported}
            found.append(
                {
                    "class": description.of(type(callback), "callbacks"),
                    "attributes": description.named(arguments, "callbacks"),
                }
            )
    return sorted(found, key=json.dumps)


def _numbers_given(callback: TrainerCallback, kinds: Sequence[type]) -> dict[str, Any]:
    """The numbers that a callback of the user's was made with and keeps under their names, as it does not count in."""
    given = {name for kind in kinds if "__init__" in vars(kind) for name in inspect.signature(kind).parameters}
    kept = {name: vars(callback).get(name) for name in given & _settings_of(kinds)}
    return {name: value for name, value in kept.items() if isinstance(value, (bool, int, float))}


def _reaches_training(kind: type) -> bool:
    """Whether a callback takes what steps, ends a stage, or writes to what the model holds."""
    codes = [code for function in _functions_in(kind) for code in _codes(function.__code__)]
    names = {name for code in codes for name in (*code.co_names, *code.co_varnames)}
    names.update(const for code in codes for const in code.co_consts if isinstance(const, str))
    writes = any(name in _WRITING or (name.endswith("_") and not name.startswith("_")) for name in names)
    return "on_pre_optimizer_step" in vars(kind) or not _STEPPING.isdisjoint(names) or ("model" in names and writes)


def _model(model: nn.Module, description: "_Description") -> dict[str, Any]:
    loss = getattr(model, "_loss_function", None)
    return {
        "class": description.of(type(model), "model"),
        "loss_function": None if loss is None else description.of(loss, "model.loss_function"),
        "loss_type": getattr(model, "loss_type", None),
    }


def _dataset(dataset: Any, description: "_Description") -> dict[str, Any]:
    """How rows are shown. What they hold is compared by itself."""
    if not isinstance(dataset, datasets.Dataset):
        return {"class": description.of(type(dataset), "train_dataset")}
    is_custom = dataset.format["type"] == "custom"
    shown = dataset.format["format_kwargs"].get("transform") if is_custom else None
    return {"transform": description.of(shown, "train_dataset.transform")}


def _rows_digest(dataset: Any, description: "_Description") -> Any:
    if isinstance(dataset, dict):
        return {name: _rows_digest(one, description) for name, one in dataset.items()}
    if dataset is None:
        return None
    rows = stored_rows(dataset) if isinstance(dataset, datasets.Dataset) else shown_rows(dataset)
    try:
        return description.digest([hashlib.sha256(encode(row)).digest() for row in rows])
    except ExampleIdError:
        # Of what has no bytes of its own.
        return _qualified(type(dataset))


# Descriptions


class _Description:
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
            return f"{_qualified(type(value))}.{value.name}"
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
            return f"{_qualified(type(value))} again"
        if id(value) in self._shared or isinstance(value, _OPAQUE):
            return _qualified(type(value))
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
        if isinstance(value, _GENERATORS):
            self.unstable.append(f"`{name}`, a {type(value).__name__}")
            return _qualified(type(value))
        if isinstance(value, _PROCESSORS):
            return self._processor(value, name)
        if isinstance(value, re.Pattern):
            return self.digest([value.pattern, value.flags])
        if isinstance(value, (*_CONTAINERS, Mapping, set, frozenset)):
            return self._container(value, name)
        if isinstance(value, nn.Module):
            return self._module(value, name)
        if hasattr(value, "__name__") and not hasattr(value, "__dict__"):
            # Written in another language.
            return _qualified(value)
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
            own = {n: v for n, v in vars(value).items() if not n.startswith("_") and isinstance(v, _CONSTANTS)}
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
        # Not the whole, whose truncation and padding are those of its last call.
        ways = ("model", "normalizer", "pre_tokenizer", "post_processor")
        states = [getattr(backend, way).__getstate__() if getattr(backend, way) is not None else None for way in ways]
        return {**about, "vocabulary": self.digest(states)}

    def _class(self, kind: type, name: str) -> Any:
        return _qualified(kind) if all(map(_is_of_library, kind.__mro__)) else self._code(kind, name)

    def _function(self, function: types.FunctionType, name: str) -> Any:
        if _is_of_library(function):
            return _qualified(function)
        kind = _unstable_kind(function)
        if kind is not None:
            self.unstable.append(f"`{name}`, the {kind} {_qualified(function)}")
            return _qualified(function)
        return self._code(function, name)

    def member(self, value: Any, name: str) -> Any:
        """What a class holds under a name; see `_members`."""
        if isinstance(value, property):
            return [self.of(part, name) for part in (value.fget, value.fset)]
        return self.of(_function_of(value), name)

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
            functions = [inspect.unwrap(part)] if isinstance(part, types.FunctionType) else list(_functions_in(part))
            found[part] = [part.__qualname__, self._own(part, name)]
            for function in functions:
                named = {n: function.__globals__.get(n) for n in _names_in(function.__code__)}
                waiting += [value for value in named.values() if _is_of_user(value)]
                constants |= {n: v for n, v in named.items() if _is_constant(n, v)}
            if isinstance(part, type):
                waiting += [base for base in part.__mro__ if _is_of_user(base)]
        content = json.dumps(sorted(found.values(), key=json.dumps))
        about = {"name": root.__qualname__, "code": f"{_COMPILER}:{self.digest(content)}"}
        return {**about, "attributes": self.named(constants, name)} if constants else about

    def _own(self, part: types.FunctionType | type, name: str) -> Any:
        """What a function or class says itself."""
        if isinstance(part, type):
            bases = [_qualified(base) for base in part.__bases__ if _is_of_library(base)]
            return [bases, {n: self._own_member(value, name) for n, value in sorted(_members(part).items())}]
        if _free(part) and part is not inspect.unwrap(part):
            part = inspect.unwrap(part)
        elif _free(part):
            self.unstable.append(f"`{name}`, which goes by the closure {_qualified(part)}")
        defaults = [[n, self.of(value, name)] for n, value in _defaults_of(part).items()]
        return [self.digest(_plain_code(part.__code__)), defaults]

    def _own_member(self, value: Any, name: str) -> Any:
        if isinstance(value, property):
            return [self._own_member(part, name) for part in (value.fget, value.fset)]
        value = _function_of(value)
        if isinstance(value, types.FunctionType):
            return _qualified(value) if _is_of_library(value) else self._own(value, name)
        return self.member(value, name)


def _is_constant(name: str, value: Any) -> bool:
    return name.isupper() and value is not None and isinstance(value, _CONSTANTS)


def _unstable_kind(function: types.FunctionType) -> str | None:
    """What makes a function one that cannot be told from another of its name."""
    if function.__name__ == "<lambda>":
        return "lambda"
    # What a decorator puts around a function is told by what is inside.
    return "closure" if _free(inspect.unwrap(function)) else None


def _free(function: types.FunctionType) -> set[str]:
    """Names by which a function goes that are neither its own nor its module's; `super()` needs one."""
    return set(function.__code__.co_freevars) - {"__class__"}


def _defaults_of(function: types.FunctionType) -> dict[str, Any]:
    positional = {str(number): value for number, value in enumerate(function.__defaults__ or ())}
    return {**positional, **dict(sorted((function.__kwdefaults__ or {}).items()))}


def _members(kind: type) -> dict[str, Any]:
    """Code and constants that a class holds by name. What else it holds can change: it is state."""
    kept = (*_CONSTANTS, Enum, types.FunctionType, type, property)
    return {
        name: value
        for name, value in vars(kind).items()
        if name not in _OF_CLASSES
        and isinstance(_function_of(value), kept)
        and not _is_generated(kind, value)
        and not _is_inherited(kind, name, value)
    }


def _functions_in(kind: type) -> Iterator[types.FunctionType]:
    for name, value in vars(kind).items():
        if _is_inherited(kind, name, value):
            continue
        parts = (value.fget, value.fset) if isinstance(value, property) else (_function_of(value),)
        yield from (inspect.unwrap(part) for part in parts if isinstance(part, types.FunctionType))


def _weights_digest(module: nn.Module) -> str:
    tensors = {name: tensor for name, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}
    return tensors_digest({name: tensor for name, tensor in tensors.items() if not tensor.is_meta})


def _is_of_user(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, type)) and not _is_of_library(value)


def _is_of_library(part: Any) -> bool:
    """Whether code is of an installed library, this one or Python: its version says which it is."""
    module = getattr(part, "__module__", None) or "builtins"
    top = module.split(".")[0]
    if top == "__main__":
        return False
    if top in sys.stdlib_module_names or top == __name__.split(".")[0]:
        return True
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and any(os.path.realpath(file).startswith(path + os.sep) for path in _installed())


@functools.cache
def _installed() -> tuple[str, ...]:
    """Where libraries are installed."""
    paths = {path for path in sys.path if os.path.basename(path) in ("site-packages", "dist-packages")}
    return tuple({os.path.realpath(path) for path in paths}.union(_HERE))


def _qualified(part: Any) -> str:
    """Module and name. What a script defines lies under the script's name, also where the script is imported."""
    module = getattr(part, "__module__", None) or ""
    if module == "__main__":
        main = sys.modules["__main__"]
        spec, file = getattr(main, "__spec__", None), getattr(main, "__file__", None)
        module = spec.name if spec is not None else os.path.splitext(os.path.basename(file))[0] if file else module
    name = getattr(part, "__qualname__", None) or getattr(part, "__name__", None) or type(part).__qualname__
    return f"{module}.{name}" if module else name


def _function_of(value: Any) -> Any:
    """The function inside of what a class holds."""
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.func if isinstance(value, functools.cached_property) else value


def _is_generated(kind: type, value: Any) -> bool:
    """Whether `dataclass` wrote a method, from fields that are there to see."""
    code = getattr(_function_of(value), "__code__", None)
    is_one = code is not None and code.co_filename == "<string>" and code.co_name.startswith("__")
    return dataclasses.is_dataclass(kind) and (is_one or (code is not None and "__create_fn__" in code.co_qualname))


def _is_inherited(kind: type, name: str, value: Any) -> bool:
    """Whether a class holds what a base of it does: the first optimizer of a class puts its `step`, wrapped, there."""
    base = next((vars(one)[name] for one in kind.__mro__[1:] if name in vars(one)), None)
    return isinstance(value, types.FunctionType) and callable(base) and inspect.unwrap(value) is inspect.unwrap(base)


def _slots(value: Any) -> Iterator[tuple[str, Any]]:
    for kind in type(value).__mro__:
        names = vars(kind).get("__slots__", ())
        for name in [names] if isinstance(names, str) else names:
            if not name.startswith("__") and hasattr(value, name):
                yield name, getattr(value, name)


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    """A code object and those inside of it."""
    yield code
    for const in code.co_consts:
        if isinstance(const, types.CodeType):
            yield from _codes(const)


def _names_in(code: types.CodeType) -> list[str]:
    return sorted({name for one in _codes(code) for name in one.co_names})


def _plain_code(code: types.CodeType) -> list[Any]:
    """What code does, without where it stands and what it says of itself."""
    consts = list(code.co_consts)
    has_doc = bool(code.co_flags & 0x4000000) if sys.version_info >= (3, 13) else not code.co_name.startswith("<")
    if has_doc and consts and isinstance(consts[0], str):
        consts[0] = None
    counts = [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags]
    names = [list(part) for part in (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)]
    return [code.co_code, code.co_exceptiontable, counts, names, [_plain_const(const) for const in consts]]


def _plain_const(const: Any) -> Any:
    if isinstance(const, types.CodeType):
        return _plain_code(const)
    if isinstance(const, tuple):
        return ["tuple", *map(_plain_const, const)]
    if isinstance(const, frozenset):
        # In the order of their hashes, which are others in every process.
        return ["frozenset", *sorted(map(repr, const))]
    return repr(const) if isinstance(const, (complex, types.EllipsisType)) else const
