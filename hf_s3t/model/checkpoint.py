"""What of a base model its checkpoint holds, by what Transformers reports when it loads it."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from logging import ERROR
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from ..errors import IsolationError
from .quantisation import is_quantised
from .randomness import preserved_randomness


logger = logging.get_logger(__name__)


def check_checkpoint(model: PreTrainedModel, head: Sequence[str]) -> None:
    """
    Refuse a base with parameters that its checkpoint lacks, besides the head: they are random, and nobody could load
    them again.

    Looks only at checkpoints on this machine, at names and sizes; a model made in memory has none.

    Args:
        model ([`~transformers.PreTrainedModel`]): The bare base model.
        head (sequence of `str`): Modules left out, since every stage has its own copy.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the parameters and the way out.
    """
    name = getattr(model.config, "_name_or_path", None)
    loaded = _load_names(model, name) if name else None
    if loaded is None:
        return
    again, report = loaded
    own = {n: p.shape for n, p in model.named_parameters(remove_duplicate=False)}
    # Where its settings were changed after it was loaded, that load was another.
    same = {n for n, p in again.named_parameters(remove_duplicate=False) if own.get(n) in (p.shape, None)}
    if is_quantised(model):
        same = set(own)
    missing = [parameter for parameter in left_at_random(model, report, head) if parameter in same]
    if missing:
        resized = all(parameter in _resized(report) for parameter in missing)
        raise IsolationError(
            f"The checkpoint {name!r} has no parameters for {some_of(missing)}"
            f"{' in that size' if resized else ''}: they were initialised at random when it was loaded as a "
            f"{type(model).__name__}, and a system loaded later would stand on others. {_remedy(model, missing)}"
        )


def left_at_random(model: nn.Module, report: Mapping[str, Any], head: Sequence[str] = ()) -> list[str]:
    """
    Names of the parameters that loading left as they were initialised.

    Parameters that are tied to others, or that the class does not expect in a checkpoint, are not among them.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        report (`Mapping`): What `from_pretrained(..., output_loading_info=True)` says of loading it.
        head (sequence of `str`): Modules left out.
    """
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    left_out = tuple(f"{name}." for name in head)
    # A quantised weight may lie in several tensors, of names below its own or beside it.
    below = report["unexpected_keys"] if is_quantised(model) else ()
    stored = {module for key in below for module in (_module_of(key), _module_of(_module_of(key)))}
    return sorted(
        key
        for key in {*report["missing_keys"], *_resized(report)}
        if key in parameters and not key.startswith(left_out) and _module_of(key) not in stored
    )


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first of several names, and how many there are."""
    return ", ".join(names[:most]) + (f" and others, {len(names)} in all" if len(names) > most else "")


def parts_of(config: PreTrainedConfig) -> dict[str, PreTrainedConfig]:
    """The configs of a composite model's parts, by their names."""
    parts = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    return {name: part for name, part in parts.items() if isinstance(part, PreTrainedConfig)}


def _module_of(key: str) -> str:
    return key.rpartition(".")[0]


def _resized(report: Mapping[str, Any]) -> set[str]:
    return {key for key, *_ in report["mismatched_keys"]}


def _remedy(model: nn.Module, missing: Sequence[str]) -> str:
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    if set(ignored) & set(missing):
        return (
            "The class leaves them out of what it saves (`_keys_to_ignore_on_save`): set that to None, save the model "
            "with `save_pretrained`, load it from that folder, and train on that."
        )
    remedy = (
        "Save the model once with `save_pretrained` to a new folder, load it from there, and train on that; nothing "
        "is missing then."
    )
    output = getattr(model, "get_output_embeddings", lambda: None)()
    is_output = any(model.get_submodule(_module_of(parameter)) is output for parameter in missing)
    if output is not None and is_output:
        return (
            f"Its words would be chosen at random, since stages do not train them: take the checkpoint of a "
            f"{type(model).__name__}. Where random ones are meant: {remedy[0].lower()}{remedy[1:]}"
        )
    return remedy


def _load_names(model: PreTrainedModel, name: str) -> tuple[nn.Module, dict[str, Any]] | None:
    """
    A base's checkpoint loaded once more without its values, and the report; `None` if it is not on this machine.

    Nothing but the library knows which key of a checkpoint becomes which parameter.
    """
    config = copy.deepcopy(model.config)
    for part in (config, *_all_parts(config)):
        # Names are those of the weights themselves.
        vars(part).pop("quantization_config", None)
    revision = getattr(config, "_commit_hash", None)
    try:
        with preserved_randomness(), quietly():
            loaded: Any = type(model).from_pretrained(
                name,
                config=config,
                **({"revision": revision} if revision else {}),
                local_files_only=True,
                device_map=torch.device("meta"),
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            again, report = loaded
            return again, report
    except Exception as error:
        # It is elsewhere, or was loaded in some way of its own.
        logger.debug(f"What the checkpoint {name!r} holds cannot be looked at: {error}")
        return None


def _all_parts(config: PreTrainedConfig) -> Iterable[PreTrainedConfig]:
    for part in parts_of(config).values():
        yield part
        yield from _all_parts(part)


class quietly:
    """Holds back Transformers' load report, and its bars."""

    def __init__(self, bars: bool = True):
        self.bars = bars

    def __enter__(self) -> None:
        self.verbosity = logging.get_verbosity()
        logging.set_verbosity(ERROR)
        if self.bars:
            self.hook = logging.set_tqdm_hook(lambda make, args, kwargs: make(*args, **{**kwargs, "disable": True}))

    def __exit__(self, *exc: object) -> None:
        logging.set_verbosity(self.verbosity)
        if self.bars:
            logging.set_tqdm_hook(self.hook)
