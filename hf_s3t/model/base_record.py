"""What a system records of its base: where it came from, and all that decides what it computes."""

import json
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from .base_precision import HALVES, computed_dtypes, dtypes_held, first_dtype, main_dtype, other_dtypes
from .base_tensors import digests_of_base
from .checkpoint import parts_of
from .quantisation import settings_as_dict


# Settings that say nothing of what a base computes: where it came from, how it was loaded, what is decided per call.
_NOT_THE_FUNCTION = {
    "_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "quantization_config",
    "use_cache", "architectures", "attn_implementation", "_attn_implementation", "return_dict", "output_hidden_states",
    "output_attentions", "experts_implementation",
}  # fmt: skip
# What a base computes its attention and its experts with, each of its parts its own way: bits depend on it.
IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


def describe_base(model: PreTrainedModel, layers_path: str, head: Sequence[str]) -> dict[str, Any]:
    """
    What a system records of its base: where it came from, its class, precision, quantisation and digests.

    Args:
        model ([`~transformers.PreTrainedModel`]): The bare base model.
        layers_path (`str`): Name of the list of transformer layers.
        head (sequence of `str`): Modules left out, since every stage has its own copy.
    """
    config = model.config
    quantization = getattr(config, "quantization_config", None)
    dtype = first_dtype(model)
    return {
        "id": getattr(config, "_name_or_path", "") or None,
        "revision": getattr(config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "module": type(model).__module__,
        "dtype": dtype,
        "main_dtype": main_dtype(model),
        "other_dtypes": other_dtypes(model),
        "computed_dtypes": computed_dtypes(model),
        **{name: implementation(config, name) for name in IMPLEMENTATIONS},
        "quantization": settings_as_dict(quantization),
        "digest": digests_of_base(model, layers_path, head, sorted({dtype, *dtypes_held(model), *HALVES})),
        "num_labels": getattr(config, "num_labels", None) if head else None,
    }


def config_of(model: PreTrainedModel) -> dict[str, Any]:
    """The settings of a base that decide what it computes, as JSON types: its config, less where it came from."""
    settings: dict[str, Any] = json.loads(json.dumps(deciding_settings(model.config.to_dict()), default=str))
    return settings


def deciding_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a config's settings and those of its parts the ones that decide what a model computes."""
    kept = {name: value for name, value in settings.items() if name not in _NOT_THE_FUNCTION}
    return {name: deciding_settings(value) if is_config(value) else value for name, value in kept.items()}


def is_config(value: Any) -> bool:
    """Whether a setting is the config of a part, as JSON types."""
    return isinstance(value, dict) and "model_type" in value


def implementation(config: PreTrainedConfig, name: str) -> Any:
    """By what a model computes its attention or its experts: a name, or where its parts differ, one for each."""
    own = getattr(config, f"_{name}", None)
    parts = {part: implementation(its, name) for part, its in parts_of(config).items()}
    # A part that is not in use has none.
    return own if all(its in (own, None) for its in parts.values()) else {"": own, **parts}


def generation_of(model: PreTrainedModel) -> dict[str, Any]:
    """What a system records of how its base generates: where a text ends, and what its user has set."""
    settings = getattr(model, "generation_config", None)
    return {} if settings is None else {"generation": json.loads(settings.to_json_string(use_diff=True))}
