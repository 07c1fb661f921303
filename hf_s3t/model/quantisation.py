"""Bases that are quantised: their settings, and what of their libraries would make an answer depend on others."""

import logging
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers.utils import logging as transformers_logging

from ..errors import IsolationError


logger = transformers_logging.get_logger(__name__)


def is_quantised(model: nn.Module) -> bool:
    """Whether a model was loaded quantised."""
    return getattr(model.config, "quantization_config", None) is not None


def quantization_method(model: nn.Module) -> str | None:
    """By what a model was quantised, if it was."""
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return getattr(method, "value", method)


def settings_as_dict(quantization: Any) -> Any:
    """The settings of a quantisation as JSON types; `None` of a model that is not quantised."""
    return quantization.to_dict() if hasattr(quantization, "to_dict") else quantization


def rowwise(quantization_config: Any, head: Sequence[str] = ()) -> Any:
    """
    An 8-bit config under which a row's answer does not depend on the other rows of its batch.

    With outlier columns on (the default threshold 6.0) it does: a threshold set on purpose is any other value.
    """
    if getattr(quantization_config, "load_in_8bit", False) and quantization_config.llm_int8_threshold == 6.0:
        quantization_config.llm_int8_threshold = 0.0
    if head and hasattr(quantization_config, "llm_int8_skip_modules"):
        skip = quantization_config.llm_int8_skip_modules or []
        quantization_config.llm_int8_skip_modules = sorted({*skip, *head})
    return quantization_config


class _EachMessageOnce(logging.Filter):
    """Lets every message through once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        first = message not in self.seen
        self.seen.add(message)
        return first


def log_casts_once(model: nn.Module) -> None:
    """
    Have bitsandbytes say once, not per layer and call, that it casts the inputs of an 8-bit base; and say once if the
    base answers a row depending on the other rows of its batch.
    """
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    threshold = getattr(settings, "llm_int8_threshold", 0) if getattr(settings, "load_in_8bit", False) else 0
    if threshold > 0:
        logger.warning_once(
            f"The base is in 8 bit with llm_int8_threshold={threshold}: a row's answer depends on "
            "the other rows of its batch, ensemble members included. Load it with llm_int8_threshold=0.0."
        )
    casts = logging.getLogger("bitsandbytes.autograd._functions")
    if getattr(model, "is_loaded_in_8bit", False) and not any(isinstance(f, _EachMessageOnce) for f in casts.filters):
        casts.addFilter(_EachMessageOnce())


def keep_4_bit_weights(model: nn.Module) -> None:
    """
    Have bitsandbytes leave the weights of a 4-bit base as they are.

    On CPUs that compute in bfloat16, it packs them when the model first answers: it rounds what they are scaled by,
    which it cannot undo, and passes no gradients through them. A stage trained then would stand on another base than
    one that is trained in a fresh process.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: If the model has answered before, and its weights are packed.
    """
    for name, module in model.named_modules():
        if hasattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu"):
            raise IsolationError(
                f"The 4-bit base has answered before, and bitsandbytes has rounded its weights for this CPU ({name} "
                "and others): it is not what its checkpoint says any more. Load it again, and give it before it is "
                "called."
            )
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
