"""The class of a served model, made per class of base: Transformers sees what it is, nothing passes by the routing."""

import enum
import functools
import inspect
import threading
import weakref
from collections.abc import Callable
from types import FunctionType, new_class
from typing import Any, SupportsIndex

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from ..errors import ConfigError, NotServedError


# What of the base's class runs on the served model itself. Decoding computes by calling it: the ensemble answers.
DECODING = frozenset({
    "_assisted_decoding", "_beam_search", "_beam_search_has_unfinished_sequences", "_check_early_stop_heuristic",
    "_expand_inputs_for_generation", "_expand_multimodal_outputs", "_extract_generation_mode_kwargs",
    "_flatten_beam_dim", "_gather_beams", "_get_candidate_generator", "_get_deprecated_gen_repo",
    "_get_logits_processor", "_get_running_beams_for_next_iteration", "_get_static_cache_init_shape",
    "_get_stopping_criteria", "_get_top_k_continuations", "_has_unfinished_sequences",
    "_maybe_initialize_input_ids_for_generation", "_maybe_prepare_encoder_kwargs_for_generation",
    "_merge_criteria_processor_list", "_prefill", "_prepare_attention_mask_for_generation",
    "_prepare_cache_for_generation", "_prepare_generated_length", "_prepare_generation_config",
    "_prepare_model_inputs", "_prepare_special_tokens", "_sample", "_supports_default_dynamic_cache",
    "_supports_logits_to_keep", "_supports_mm_encoder_outputs", "_unflatten_beam_dim", "_update_finished_beams",
    "_valid_auto_compile_criteria", "_validate_generated_length", "_validate_generation_mode",
    "_validate_model_kwargs", "compute_transition_scores", "heal_tokens", "load_custom_generate",
})  # fmt: skip
# Moving and counting all there is, and what kind of class it is.
OF_THE_MODULE = frozenset({
    "add_model_tags", "cuda", "float", "get_memory_footprint", "half", "is_backend_compatible", "is_custom_code",
    "is_remote_code", "num_parameters", "to",
})  # fmt: skip
INHERITED = DECODING | OF_THE_MODULE

# What is asked of the base. Preparing inputs reads its settings and at most its embeddings: no adapter acts in these.
PREPARING = frozenset({
    "_prepare_position_ids_for_generation", "create_masks_for_generate", "dummy_inputs", "get_input_embeddings",
    "get_output_embeddings", "prepare_inputs_for_generation",
})  # fmt: skip
SETTINGS = frozenset({
    "config_class", "ep_plan", "fsdp_plan", "fsdp_size", "generation_config_class", "get_experts_implementation",
    "hf_quantizer", "is_activation_checkpointing", "is_distributed_loading_by_transformers",
    "is_gradient_checkpointing", "loss_function", "pp_plan", "supports_context_parallel", "supports_pp_plan",
    "supports_tp_plan", "tp_plan", "tp_size", "use_kernels",
})  # fmt: skip
FROM_THE_BASE = PREPARING | SETTINGS
# Steps of generation that the served model has as methods of its own, which call the base's.
_CALLED_ON_THE_BASE = frozenset(
    {"_prepare_multimodal_encoder_kwargs_for_generation", "_update_model_kwargs_for_generation"}
)

_PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, enum.Enum,
    PreTrainedConfig, GenerationConfig,
)  # fmt: skip

# Keyed by the served model's class and the base's. A made class lives as long as a model of it, and keeps the
# base's alive.
_made: "weakref.WeakValueDictionary[tuple[type, type], type[nn.Module]]" = weakref.WeakValueDictionary()
_making = threading.Lock()


def model_class(served: type[nn.Module], base: type[PreTrainedModel]) -> type[nn.Module]:
    """
    The class of a served model on bases of some class: of the base's name, and a subclass of both.

    Transformers then finds the base's own steps of generation, which it looks up by class. What the base's class
    brings is inherited or read from the base if it is listed above, or is plain data; anything else is refused.

    Args:
        served (`type`): [`~hf_s3t.S3TModel`], a subclass, or a class made of one.
        base (`type`): The class of the base model.

    Returns:
        `type`: The same one while any model of it lives.
    """
    served = getattr(served, "_served_as", served)
    with _making:
        made = _made.get((served, base))
        if made is None:
            made = _made[served, base] = _make(served, base)
    return made


def _make(served: type[nn.Module], base: type[PreTrainedModel]) -> type[nn.Module]:
    own = {name for one in served.__mro__ if one not in (nn.Module, object) for name in vars(one)}
    namespace: dict[str, Any] = {
        "__module__": base.__module__,
        "__qualname__": f"{served.__name__}[{base.__name__}]",
        "__doc__": served.__doc__,
        # A model of another base's class is made from this one.
        "_served_as": served,
        "forward": _with_signature(served, base),
    }
    for name in dir(base):
        there, usual = inspect.getattr_static(base, name), inspect.getattr_static(nn.Module, name, None)
        if name in own or name in INHERITED or there is usual:
            continue
        if callable(usual):
            # The base's own way to be a module is called on the base.
            namespace[name] = usual
        elif not _is_special(name) or isinstance(there, FunctionType):
            namespace[name] = _OfTheBase(base, name)
    return new_class(base.__name__, (served, base), exec_body=lambda body: body.update(namespace))


def _with_signature(served: type[nn.Module], base: type[PreTrainedModel]) -> Callable[..., Any]:
    """The served model's `forward`, which says that it takes what the base's takes."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return served.forward(self, *args, **kwargs)

    functools.update_wrapper(forward, base.forward)
    # Whoever unwraps it, as Accelerate does where it takes mixed precision away, shall not come to the base's.
    vars(forward)["__signature__"] = inspect.signature(base.forward)
    del vars(forward)["__wrapped__"]
    return forward


def brings_own_ways(base: type) -> bool:
    """Whether something else than Transformers says how a class of base generates."""
    ways = (
        inspect.getattr_static(base, name, None) for name in DECODING | PREPARING | _CALLED_ON_THE_BASE | {"generate"}
    )
    return any(getattr(way, "__module__", "transformers").split(".")[0] != "transformers" for way in ways)


def _is_special(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


class _OfTheBase:
    """Stands in a made class before what it would inherit: a model answers with its base's, or refuses."""

    def __init__(self, base: type, name: str):
        self.base = base
        self.name = name

    def __get__(self, model: nn.Module | None, owner: type) -> Any:
        if model is None:
            return getattr(self.base, self.name)
        served: Any = model
        return read_from_base(served.base_model, self.name)


def read_from_base(base: nn.Module, name: str) -> Any:
    """
    What a served model answers with its base's: what is listed above, and plain data.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model.
        name (`str`): Name of the attribute.

    Raises:
        [`~hf_s3t.errors.NotServedError`]: If the base has it and it may compute with the base, or change it.
        `AttributeError`: If the base has none of that name.
    """
    if name in FROM_THE_BASE:
        return getattr(base, name)
    value = inspect.getattr_static(base, name, _NOTHING)
    if value is _NOTHING and not hasattr(base, name):
        raise AttributeError(f"'{type(base).__name__}' object has no attribute '{name}'")
    if not _is_plain(value):
        raise NotServedError(
            f"A served model has no `{name}`: the base's may compute with the base alone, past the stages that serve, "
            "or change what they stand on. For answers call the model or its `generate`; for a part of one shard use "
            f"`export_adapter` and plain PEFT; where the bare base is meant, `model.base_model.{name}`."
        )
    return value


_NOTHING = object()


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return _is_plain(list(value)) and _is_plain(list(value.values()))
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    return isinstance(value, _PLAIN)


class AttachedConfigs(dict[str, Any]):
    """
    The configs of the adapters in memory by name. PEFT adds to them before it attaches an adapter of its own, which no
    route would go through: that is refused.
    """

    def __setitem__(self, name: str, config: Any) -> None:
        _refuse_adapters()

    def update(self, *args: Any, **kwargs: Any) -> None:
        """
        Refused.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: Always.
        """
        _refuse_adapters()

    def __reduce_ex__(self, protocol: SupportsIndex) -> tuple[Any, ...]:
        return dict, (dict(self),)


def _refuse_adapters() -> None:
    raise ConfigError(
        "A served model takes no adapter from outside: no call would go through it, and the base under all stages "
        "would be changed. Export a shard with `export_adapter` and load that with `PeftModel.from_pretrained` on a "
        "base of its own."
    )
