"""Loads the base model of a system as it was at training."""

import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig
from transformers.utils import logging

from ..errors import BaseModelMismatchError
from .base_precision import held_differently, hold_as_recorded, warn_of_other_rounding
from .base_recognition import other_sizes, which_base
from .base_record import IMPLEMENTATIONS, deciding_settings, implementation
from .checkpoint import left_at_random, quietly, some_of
from .quantisation import rowwise


logger = logging.get_logger(__name__)


def load_base(
    record: dict[str, Any],
    *,
    name: str | os.PathLike[str] | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    head: Sequence[str] = (),
    token: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> PreTrainedModel:
    """
    Load the base of a system, by default as it was at training.

    Args:
        record (`dict`): What `describe_base` said.
        name (`str`, *optional*): Id or path to use instead of the recorded one.
        dtype (`str` or `torch.dtype`, *optional*): Precision; the recorded one if not given.
        device_map (*optional*): As in Transformers.
        quantization_config (*optional*): `None` for the recorded quantisation, `False` for none.
        head (sequence of `str`): Modules that must not be quantised.
        token (`str`, *optional*): Token for the Hub; the one of `hf auth login` if not given.
        cache_dir (`str` or `os.PathLike`, *optional*): The Hub's cache; the usual one if not given.

    Raises:
        [`~hf_s3t.errors.BaseModelMismatchError`]: If no id or path of the base is known, or none is found by it.
    """
    name = name or _recorded_name(record)
    as_recorded = dtype is None and quantization_config is None
    architecture = class_of(record)
    if quantization_config is None and record["quantization"]:
        quantization_config = AutoQuantizationConfig.from_dict(dict(record["quantization"]))
    kwargs: dict[str, Any] = {}
    if name == record["id"] and record["revision"]:
        kwargs["revision"] = record["revision"]
    kwargs.update(token=token, cache_dir=cache_dir)
    config = _from_checkpoint(name, (architecture.config_class or PreTrainedConfig).from_pretrained, **kwargs)
    _restore(config, record.get("config", {}))
    # Not all have a main one on record.
    kwargs.update(config=config, dtype=dtype or record.get("main_dtype", record["dtype"]))
    if device_map is not None:
        kwargs["device_map"] = device_map
    if quantization_config:
        kwargs["quantization_config"] = rowwise(quantization_config, head)
    implementations = {n: record[n] for n in IMPLEMENTATIONS if record.get(n)}
    try:
        model, report = _load(architecture, name, **kwargs, **implementations)
    except (ImportError, ValueError) as error:
        model, report = _load_by_other_means(architecture, name, implementations, error, **kwargs)
    _refuse_unfilled(left_at_random(model, report, head), name, record)
    if record.get("generation") and getattr(model, "generation_config", None) is not None:
        model.generation_config = GenerationConfig.from_dict(record["generation"])
    if as_recorded:
        hold_as_recorded(model, record)
        if held_differently(model, record):
            warn_of_other_rounding(record)
    return model


def _recorded_name(record: dict[str, Any]) -> str:
    """The id or path by which a base is found, where one is on record."""
    if record["id"]:
        return str(record["id"])
    if record.get("folder"):
        raise BaseModelMismatchError(
            f"This system stands on a base model that was the folder {record['folder']!r} of another machine, so it "
            "cannot be found by name. Give it as `base_model`: the module, its folder here, or its id on the Hub."
        )
    raise BaseModelMismatchError(
        "This system was trained on a model made in memory, so its base cannot be found by name. Give it as "
        "`base_model`: the module, or the folder it was saved to."
    )


def _refuse_unfilled(missing: Sequence[str], name: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Refuse a model of which a checkpoint left parameters at random: the name is that of another base."""
    if missing:
        raise BaseModelMismatchError(
            f"The base model is not the one these stages were trained on: {name!r} has no parameters for "
            f"{some_of(missing)}, or has them in another size"
            f"{other_sizes(name, record)}. {which_base(str(name), record)}"
        )


def class_of(record: dict[str, Any]) -> type[PreTrainedModel]:
    """The class of Transformers that a base was of, which decides what is read of its checkpoint."""
    # Code of one's own, or that came with a checkpoint, often calls its classes as Transformers does.
    origin, name = record.get("module", "transformers"), record["architecture"]
    architecture = getattr(transformers, name, None) if origin.partition(".")[0] == "transformers" else None
    if isinstance(architecture, type) and issubclass(architecture, PreTrainedModel):
        return architecture
    if origin.partition(".")[0] == "transformers_modules":
        raise BaseModelMismatchError(
            f"The base was a {name} of the code that came with its checkpoint, which is not run unasked. Load it with "
            "`trust_remote_code=True`, as at training, and give the module as `base_model`."
        )
    raise BaseModelMismatchError(
        f"The base was a {origin}.{name}, which is no class of transformers {transformers.__version__}. Load it with "
        "that class, and give the module as `base_model`."
    )


def _restore(config: PreTrainedConfig, recorded: dict[str, Any]) -> None:
    """Make a config, and those of a composite model's parts, say what was recorded."""
    # Compared as JSON, as it was recorded; there the keys of a mapping of labels are no numbers.
    present = json.loads(json.dumps(config.to_dict(), default=str))
    for setting, value in deciding_settings(recorded).items():
        part = getattr(config, setting, None)
        if isinstance(part, PreTrainedConfig) and isinstance(value, dict):
            _restore(part, value)
        elif setting != "model_type" and present.get(setting) != value:
            setattr(config, setting, {int(k): v for k, v in value.items()} if setting == "id2label" else value)


def _load(
    architecture: type[PreTrainedModel], name: str | os.PathLike[str], **kwargs: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model, and the report of loading it."""
    # The checkpoint's head may be missing, or for other classes: ours replaces it, and the report would mislead.
    with quietly(bars=False):
        model, report = _from_checkpoint(
            name, architecture.from_pretrained, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
        return model, report


def _load_by_other_means(
    architecture: type[PreTrainedModel],
    name: str | os.PathLike[str],
    implementations: dict[str, Any],
    reason: Exception,
    **kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model that computes by what there is on this machine, where what it was trained with may be missing."""
    try:
        model, report = _load(architecture, name, **kwargs)
    except (ImportError, ValueError) as error:
        raise BaseModelMismatchError(
            f"The base model cannot be loaded from {name!r} as it was at training: {error} Mend that, or load it "
            "yourself and give the module as `base_model`."
        ) from error
    for kind, then in implementations.items():
        now = implementation(model.config, kind)
        if now != then:
            logger.warning_once(
                f"The base was trained on with {kind}={then!r}, which cannot be had here ({reason}), and is loaded "
                f"with {now!r}: answers are rounded otherwise. Install what is missing, or give the module as "
                "`base_model`."
            )
    return model, report


def _from_checkpoint(name: str | os.PathLike[str], load: Callable[..., Any], **kwargs: Any) -> Any:
    try:
        return load(name, **kwargs)
    # Also where a file ends too early, or is none of its kind.
    except (OSError, EOFError, SafetensorError) as error:
        raise BaseModelMismatchError(
            f"The base model cannot be loaded from {name!r}: {error} Give `token` if it is private, or `base_model`: "
            "the module, its folder here, or another id."
        ) from error


def name_padding(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """
    Have a base that names no token for padding go by the one at training.

    Decoders that classify look at the last token before the padding: without its name they would look at the padding.
    """
    recorded = record.get("config", {}).get("pad_token_id")
    if recorded is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = recorded
