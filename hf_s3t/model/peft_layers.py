"""What PEFT puts around the modules of a base, as types, and by which names."""

from typing import TYPE_CHECKING

from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


# What `PeftModel` puts before a module's name, in the files of an adapter too.
PEFT_PREFIX = "base_model.model."

if TYPE_CHECKING:

    class AdaptedLayer(LoraLayer, nn.Module):
        """A layer of PEFT, which is a module too: its own types do not say so."""
else:
    AdaptedLayer = LoraLayer


# What holds adapters: a layer, or the wrapper of a head.
AdapterHolder = AdaptedLayer | ModulesToSaveWrapper


def unwrapped(module: nn.Module) -> nn.Module:
    """The base's own module, where PEFT has put a layer or a wrapper around it."""
    if isinstance(module, BaseTunerLayer):
        return module.get_base_layer()
    if isinstance(module, ModulesToSaveWrapper):
        original: nn.Module = module.original_module
        return original
    return module
