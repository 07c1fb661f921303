"""
The parts of a recipe besides arguments: what was given to a trainer and decides a stage, described so that another
process can tell one from another.
"""

import dataclasses
import functools
import hashlib
import inspect
import json
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from typing import Any

import datasets
import numpy as np
import torch
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import ExampleIdError
from ..records.digests import DigestKey, encode
from .accelerator import accelerator_settings
from .bytecode import COMPILER, attributes_set_in, codes_in, functions_in, members_of, names_read_in_steps, settings_of
from .circumstances import evaluation_trains
from .dataset_rows import shown_rows, stored_rows
from .descriptions import Description
from .library_code import is_of_library, qualified
from .trainer_mixin import TrainerMixin


_UNKNOWN = "something"
# Parts of a description that a message does not name.
_UNNAMED = ("attributes", "class", "code", "content", "methods")
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


def parts_of(trainer: TrainerMixin, key: DigestKey) -> tuple[dict[str, Any], list[str]]:
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
    description = Description(key, (trainer, trainer.model, trainer.args, trainer._stack))
    given = {name: getattr(trainer, name, None) for name in ("compute_loss_func", "data_collator", "label_smoother")}
    if evaluation_trains(trainer.args):
        given |= {name: getattr(trainer, name) for name in ("compute_metrics", "preprocess_logits_for_metrics")}
    parts = {name: description.of(part, name) for name, part in given.items()}
    parts["optimizer_cls_and_kwargs"] = _optimizer(trainer.optimizer_cls_and_kwargs, description)
    parts["arguments"] = _special_tokens(trainer.args)
    parts["trainer"] = _trainer(trainer, description)
    parts |= {name: description.of(part, name) for name, part in trainer._besides.items()}
    parts["callbacks"] = _callbacks(trainer.callback_handler.callbacks, description)
    parts["model"] = _model(trainer.model, description)
    parts["accelerator"] = accelerator_settings(trainer.accelerator)
    if trainer.processing_class is not None:
        parts["processing_class"] = description.of(trainer.processing_class, "processing_class")
    if trainer._prepared is not None:
        parts["train_dataset"] = _dataset(trainer._prepared, description)
    if evaluation_trains(trainer.args):
        parts["eval_dataset"] = _rows_digest(trainer.eval_dataset, description)
    plain: dict[str, Any] = json.loads(json.dumps(parts))
    return plain, description.unstable


def recorded_parts(record: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that the record of a stage or checkpoint tells of; before they were recorded, precision was."""
    parts = record.get("parts")
    if isinstance(parts, dict):
        return parts
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
    return ", ".join(_shown_difference(name, then, now) for name, (then, now) in differing.items())


def _shown_difference(name: str, then: Any, now: Any) -> str:
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
    return isinstance(value, str) and _is_digest(value) and ":" in value and not value.startswith(f"{COMPILER}:")


def _compare(name: str, then: Any, now: Any, found: dict[str, tuple[Any, Any]]) -> None:
    if then == now:
        return
    if isinstance(then, dict) and isinstance(now, dict) and _name_of(then) == _name_of(now):
        for part in sorted(then.keys() | now.keys()):
            inside = name if part in _UNNAMED else f"{name}.{part}"
            _compare(inside, then.get(part), now.get(part), found)
    elif isinstance(then, dict) or not (_is_of_another_python(then) or _is_of_another_python(now)):
        found.setdefault(name, (then, now))


def _optimizer(given: tuple[type, Mapping[str, Any]] | None, description: Description) -> Any:
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


def _trainer(trainer: TrainerMixin, description: Description) -> dict[str, Any]:
    """The class that is a library's, what the user's classes put in the place of its methods, and what they keep."""
    aside = _ASIDE if evaluation_trains(trainer.args) else _ASIDE | _OF_EVALUATION
    own = [kind for kind in type(trainer).__mro__ if not is_of_library(kind)]
    # Of this package's classes, mixins are no trainers by themselves.
    base = next(kind for kind in type(trainer).__mro__ if is_of_library(kind) and not _is_our_mixin(kind))
    methods: dict[str, Any] = {}
    for name, value in vars(trainer).items():
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)) and hasattr(base, name):
            methods[name] = description.of(value, f"trainer.{name}")
    for kind in own:
        for name, value in members_of(kind).items():
            if name not in aside and name not in methods:
                methods[name] = description.member(value, f"trainer.{name}")
    library = [kind for kind in type(trainer).__mro__ if is_of_library(kind)]
    settings = settings_of(own) & (names_read_in_steps(own, aside) | attributes_set_in(library).keys())
    kept = {name: vars(trainer)[name] for name in settings if _is_setting(vars(trainer).get(name))}
    return {
        "class": qualified(base),
        "methods": methods,
        "attributes": description.named(kept, "trainer"),
    }


def _is_our_mixin(kind: type) -> bool:
    return kind.__module__.split(".")[0] == __name__.split(".")[0] and not issubclass(kind, Trainer)


def _is_setting(value: Any) -> bool:
    """Whether an attribute is one that a loss goes by, and not what a run gathers."""
    if isinstance(value, (list, tuple)):
        return bool(value) and all(isinstance(one, (bool, int, float, str)) for one in value)
    kinds = (bool, int, float, str, torch.Tensor, np.ndarray, nn.Module, types.FunctionType, functools.partial, Enum)
    return isinstance(value, kinds)


def _callbacks(callbacks: Iterable[TrainerCallback], description: Description) -> list[Any]:
    """Callbacks that decide when a stage ends, and those of the user's that reach what is trained."""
    found = []
    for callback in callbacks:
        kinds = [kind for kind in type(callback).__mro__ if not is_of_library(kind)]
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
    kept = {name: vars(callback).get(name) for name in given & settings_of(kinds)}
    return {name: value for name, value in kept.items() if isinstance(value, (bool, int, float))}


def _reaches_training(kind: type) -> bool:
    """Whether a callback takes what steps, ends a stage, or writes to what the model holds."""
    codes = [code for function in functions_in(kind) for code in codes_in(function.__code__)]
    names = {name for code in codes for name in (*code.co_names, *code.co_varnames)}
    names.update(const for code in codes for const in code.co_consts if isinstance(const, str))
    writes = any(name in _WRITING or (name.endswith("_") and not name.startswith("_")) for name in names)
    return "on_pre_optimizer_step" in vars(kind) or not _STEPPING.isdisjoint(names) or ("model" in names and writes)


def _model(model: nn.Module, description: Description) -> dict[str, Any]:
    loss = getattr(model, "_loss_function", None)
    return {
        "class": description.of(type(model), "model"),
        "loss_function": None if loss is None else description.of(loss, "model.loss_function"),
        "loss_type": getattr(model, "loss_type", None),
    }


def _dataset(dataset: Any, description: Description) -> dict[str, Any]:
    """How rows are shown. What they hold is compared by itself."""
    if not isinstance(dataset, datasets.Dataset):
        return {"class": description.of(type(dataset), "train_dataset")}
    is_custom = dataset.format["type"] == "custom"
    shown = dataset.format["format_kwargs"].get("transform") if is_custom else None
    return {"transform": description.of(shown, "train_dataset.transform")}


def _rows_digest(dataset: Any, description: Description) -> Any:
    if isinstance(dataset, dict):
        return {name: _rows_digest(one, description) for name, one in dataset.items()}
    if dataset is None:
        return None
    rows = stored_rows(dataset) if isinstance(dataset, datasets.Dataset) else shown_rows(dataset)
    try:
        return description.digest([hashlib.sha256(encode(row)).digest() for row in rows])
    except ExampleIdError:
        # The rows hold values without stable bytes.
        return qualified(type(dataset))
