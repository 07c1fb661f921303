"""The trainer class that the mixin is put over: what it takes, what it makes of a base, and what it keeps."""

import contextlib
import copy
import inspect
import re
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn
from transformers import Trainer, TrainingArguments

from ..errors import ConfigError
from .bytecode import attributes_set_in
from .library_code import is_of_library
from .trainer_mixin import TrainerMixin


# What every trainer is asked for, under these names.
_ASKED_FOR = ("model", "args", "train_dataset")
# What trainers take and is looked at by itself. What a class takes besides decides its stages too.
_KNOWN = {
    *_ASKED_FOR, "data_collator", "eval_dataset", "processing_class", "model_init", "compute_loss_func",
    "compute_metrics", "callbacks", "optimizers", "optimizer_cls_and_kwargs", "preprocess_logits_for_metrics",
    "quantization_config", "peft_config", "formatting_func", "ref_model", "s3t_config",
}  # fmt: skip
# What a class counts and gathers for its curves: it goes on from stage to stage, and no step reads it.
_FOR_CURVES = re.compile("metrics|logs|tokens|time")
_VARIABLE = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def host_of(kind: type) -> type[Trainer]:
    """
    The trainer class that a class puts S3T over.

    Args:
        kind (`type`): A class that has the mixin and a trainer class among its bases, in this order.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is none, or it comes first, or takes what no trainer takes.
    """
    hosts = [one for one in kind.__mro__ if issubclass(one, Trainer) and not issubclass(one, TrainerMixin)]
    mixins = [one for one in kind.__mro__ if issubclass(one, TrainerMixin) and not issubclass(one, Trainer)]
    host = hosts[0] if hosts else None
    if host is None or kind.__mro__.index(host) < kind.__mro__.index(mixins[0]):
        is_mixin = kind.__name__ == "S3TTrainerMixin"
        bases = "" if is_mixin else f"({', '.join(base.__name__ for base in kind.__bases__)})"
        raise ConfigError(
            f"{kind.__name__}{bases} trains no system: expected S3TTrainerMixin before a trainer class. Write `class "
            f"{'MyTrainer' if is_mixin else kind.__name__}(S3TTrainerMixin, "
            f"{'SomeTrainer' if host is None else host.__name__})`."
        )
    lacking = [name for name in _ASKED_FOR if name not in signature_over(host).parameters]
    if lacking:
        raise ConfigError(
            f"{host.__name__} takes no `{'`, `'.join(lacking)}`, expected `model`, `args` and `train_dataset` as "
            "`Trainer` takes them. Have its `__init__` take them by these names, and pass on the rest."
        )
    return host


def signature_over(host: type[Trainer]) -> inspect.Signature:
    """What a trainer class takes, in its order, and `peft_config` and `s3t_config`."""
    found: dict[str, inspect.Parameter] = {}
    more: list[inspect.Parameter] = []
    is_by_name = False
    for kind in host.__mro__:
        if "__init__" not in vars(kind):
            continue
        taken = [*inspect.signature(vars(kind)["__init__"]).parameters.values()][1:]
        for parameter in taken:
            is_late = parameter.default is parameter.empty and any(p.default is not p.empty for p in found.values())
            if parameter.kind not in _VARIABLE:
                late = parameter.replace(kind=parameter.KEYWORD_ONLY) if is_late or is_by_name else parameter
                found.setdefault(parameter.name, late)
        # What a class passes on is what the next one takes.
        if kind is host:
            more = [parameter for parameter in taken if parameter.kind is parameter.VAR_KEYWORD]
        if not any(parameter.kind in _VARIABLE for parameter in taken):
            break
        # Without `*args` it passes on by name what it does not take itself.
        is_by_name |= not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in taken)
    for name in ("peft_config", "s3t_config"):
        found.setdefault(name, inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None))
    return inspect.Signature(sorted([*found.values(), *more], key=lambda parameter: parameter.kind))


def given_to(host: type[Trainer], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """
    The arguments of a call by their names, those that have a default and were left out among them.

    Raises:
        `TypeError`: If the class, with the mixin over it, takes no such arguments.
    """
    signature = signature_over(host)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{host.__name__} with S3TTrainerMixin: {error}") from None
    bound.apply_defaults()
    given = {**dict.fromkeys(_ASKED_FOR), **bound.arguments}
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name)
    return given


def passed_on(host: type[Trainer], given: Mapping[str, Any]) -> dict[str, Any]:
    """What of the arguments goes on to the trainer class: adapters and system are none of its business."""
    aside = {"peft_config", "s3t_config", "model_init", "optimizers"}
    return {name: value for name, value in given.items() if name not in aside}


def given_besides(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a class was given that no other trainer takes: functions of rewards, say."""
    return {name: value for name, value in given.items() if name not in _KNOWN and value is not None}


def arguments_type(host: type[Trainer]) -> type[TrainingArguments]:
    """The class of training arguments that a trainer class takes, as its `__init__` says."""
    said = signature_over(host).parameters["args"].annotation
    if isinstance(said, str):
        around = vars(sys.modules[host.__module__])
        kinds = [around.get(name) for name in re.findall(r"\w+", said)]
    else:
        kinds = [*typing.get_args(said)] or [said]
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, TrainingArguments)), TrainingArguments)


class HostedBase:
    """
    What a trainer class makes of a base as it is set up, another forward or no dropout: in place while a stage trains,
    and at no other time.

    Args:
        model (`nn.Module`): The base, before the class is set up.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._outside = self._settings()
        self._inside: dict[tuple[nn.Module, str], Any] = {}

    def _settings(self) -> dict[tuple[nn.Module, str], Any]:
        dropouts = [module for module in self._model.modules() if isinstance(module, nn.Dropout)]
        found: dict[tuple[nn.Module, str], Any] = {(module, "p"): module.p for module in dropouts}
        return {**found, (self._model, "forward"): vars(self._model).get("forward")}

    @property
    def has_another_forward(self) -> bool:
        """Whether the class computes by a forward of its own."""
        return (self._model, "forward") in self._inside

    def put_aside(self) -> None:
        """Take what the class has made by now off the base."""
        now = self._settings()
        self._inside = {place: value for place, value in now.items() if value is not self._outside.get(place, value)}
        self._set(self._outside)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the base is as the class has made it."""
        self._set(self._inside)
        try:
            yield
        finally:
            self._set(self._outside)

    def _set(self, values: Mapping[tuple[nn.Module, str], Any]) -> None:
        for module, name in self._inside:
            value = values[module, name]
            if value is None:
                vars(module).pop(name, None)
            else:
                setattr(module, name, value)


class KeptByHost:
    """
    What the methods of a library's trainer class keep from step to step: numbers of steps, rows to come. Every stage
    begins with it as it is before the first, and leaves nothing of it to the next.

    What is gathered for curves goes on. Of a class of the user's own nothing is set back: it may be there to be read.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, before any stage.
        host (`type`): The class.
    """

    def __init__(self, trainer: Trainer, host: type[Trainer]):
        self._trainer = trainer
        own = [kind for kind in host.__mro__ if issubclass(kind, Trainer) and kind is not Trainer]
        set_by = attributes_set_in(kind for kind in own if is_of_library(kind))
        changing = {name for name, methods in set_by.items() if methods - {"__init__"}}
        changing -= attributes_set_in(Trainer.__mro__).keys()
        self._begun = {
            name: value
            for name, value in vars(trainer).items()
            if name in changing and _is_plain(value) and not _FOR_CURVES.search(name)
        }

    def begin_anew(self) -> None:
        """Set it back."""
        vars(self._trainer).update(copy.deepcopy(self._begun))

    def has_moved(self) -> bool:
        """Whether a stage that is resumed would find another state than the one it was in."""
        now = {name: vars(self._trainer).get(name) for name in self._begun}
        return any(not _is_plain(now[name]) or now[name] != value for name, value in self._begun.items())


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return value is None or isinstance(value, (bool, int, float, str))
