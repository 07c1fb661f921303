"""What `Trainer` and Accelerate do to a base model for training, undone: the next stage and calls find it bare."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from accelerate import Accelerator
from torch import nn
from transformers.debug_utils import DebugUnderflowOverflow

from ..model.tensor_files import tensors_digest
from ..model.turns import PREPARED, set_attributes


@contextlib.contextmanager
def unprepared(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """
    A model that Accelerate has not seen, before and after.

    For mixed precision it wraps the forward of the model it prepares and marks the model, so that the next stage
    would train without; and a base that serves must not stay wrapped.

    Args:
        model (`nn.Module`): The base model.
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
    """
    before = {name: vars(model).get(name) for name in PREPARED}
    model.__dict__.pop("_is_accelerate_prepared", None)
    accelerator._models.clear()
    try:
        yield
    finally:
        accelerator._models.clear()
        set_attributes(model, before)
        model.__dict__.pop("_is_accelerate_prepared", None)


def remove_watchers(model: nn.Module) -> None:
    """Remove the hooks of `debug="underflow_overflow"`, which `Trainer` puts on every module in every training."""
    for module in model.modules():
        for number, hooked in list(module._forward_hooks.items()):
            if isinstance(getattr(hooked, "__self__", None), DebugUnderflowOverflow):
                del module._forward_hooks[number]


def buffers_digest(model: nn.Module) -> str:
    """
    Digest of what a base keeps besides parameters. Frequencies of positions are left out: they are computed anew in
    every pass (see `check_base`).
    """
    own = (".lora_", ".modules_to_save.")
    # Modules that PEFT wraps meanwhile may have buffers: they stay what they are under another name.
    buffers = {
        n.replace(".base_layer.", "."): b for n, b in model.named_buffers() if not any(part in n for part in own)
    }
    return tensors_digest({n: b for n, b in buffers.items() if not n.endswith("inv_freq")})


def paged_tensors() -> list[Any]:
    """What bitsandbytes keeps of every paged optimizer for as long as the process lives."""
    functional = sys.modules.get("bitsandbytes.functional")
    return functional.GlobalPageManager.get_instance().paged_tensors if functional is not None else []
