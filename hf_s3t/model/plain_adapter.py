"""What plain PEFT makes of the files of an adapter, compared with what is in memory."""

import copy
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .peft_layers import PEFT_PREFIX, AdaptedLayer, unwrapped
from .randomness import preserved_randomness
from .routed_layers import peft_class
from .tensor_files import differing_tensors


# The settings that decide, besides its tensors, what PEFT computes with a LoRA layer.
_SETTINGS = ("r", "lora_alpha", "scaling", "use_rslora", "use_dora", "lora_bias", "lora_variant")


def differences(
    base: nn.Module,
    folder: str | os.PathLike[str],
    layers: Mapping[str, tuple[AdaptedLayer, str]],
    heads: Mapping[str, Any],
) -> list[str]:
    """
    How the adapter in a folder, loaded by PEFT onto the bare base, differs from what is in memory.

    PEFT does load it, onto a copy of the base's modules that shares the base's tensors; neither they nor any random
    state are touched.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model, adapted or not.
        folder (`str` or `os.PathLike`): The adapter's folder.
        layers (mapping from `str` to `tuple[AdaptedLayer, str]`):
            By their names, the adapted modules, each with the name of the adapter that acts in it.
        heads (mapping from `str` to `nn.Module`): By their names, the modules that are trained in full.

    Returns:
        `list[str]`: One sentence for each module that differs.
    """
    # Some initialisers draw random numbers for tensors without values too.
    with preserved_randomness(), warnings.catch_warnings():
        # What PEFT has to say of missing keys shows in the comparison.
        warnings.simplefilter("ignore")
        plain = PeftModel.from_pretrained(
            bare_copy(base), folder, low_cpu_mem_usage=True, autocast_adapter_dtype=False, torch_device="cpu"
        )
    found = {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in plain.named_modules()
        if isinstance(module, (AdaptedLayer, ModulesToSaveWrapper))
    }
    expected = {**layers, **heads}
    problems = [f"PEFT would not adapt {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"PEFT would adapt {name} as well" for name in sorted(found.keys() - expected.keys())]
    for name in sorted(expected.keys() & found.keys()):
        theirs, ours = found[name], expected[name]
        if isinstance(theirs, AdaptedLayer) and isinstance(ours, tuple):
            unequal = _differing_settings(theirs, *ours) + _differing(_tensors(theirs, "default"), _tensors(*ours))
        elif isinstance(theirs, ModulesToSaveWrapper) and not isinstance(ours, tuple):
            unequal = _differing(theirs.modules_to_save["default"].state_dict(), ours.state_dict())
        else:
            unequal = ["its kind"]
        if unequal:
            problems.append(f"PEFT would give {name} another {', '.join(unequal)}")
    return problems


def bare_copy(model: nn.Module) -> nn.Module:
    """A copy of a model's modules without adapters and hooks, sharing every tensor."""
    return _bare(model, {})


def _bare(module: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    module = unwrapped(module)
    if module not in made:
        # Not by `copy`: parametrised modules refuse it, and it would copy tensors.
        twin = made[module] = module.__new__(type(module))
        twin.__dict__.update({name: copy.copy(v) if isinstance(v, dict) else v for name, v in vars(module).items()})
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            twin.__dict__[hooks].clear()
        for name in ("peft_config", "hf_device_map", "_hf_peft_config_loaded"):
            twin.__dict__.pop(name, None)
        if "config" in vars(module):
            # PEFT sets a field of it.
            twin.__dict__["config"] = copy.copy(module.config)
        twin._modules = {name: child if child is None else _bare(child, made) for name, child in twin._modules.items()}
    return made[module]


def _differing_settings(theirs: AdaptedLayer, ours: AdaptedLayer, adapter: str) -> list[str]:
    unequal = [name for name in _SETTINGS if _plain(theirs, name, "default") != _plain(ours, name, adapter)]
    if type(theirs) is not peft_class(ours) or getattr(theirs, "fan_in_fan_out", None) != getattr(
        ours, "fan_in_fan_out", None
    ):
        unequal.append("kind of layer")
    return unequal


def _plain(layer: AdaptedLayer, setting: str, adapter: str) -> Any:
    value = getattr(layer, setting).get(adapter)
    return type(value) if setting == "lora_variant" else value


def _tensors(layer: AdaptedLayer, adapter: str) -> dict[str, torch.Tensor]:
    return {
        f"{part}.{name}": tensor
        for part in layer.adapter_layer_names
        if adapter in getattr(layer, part)
        for name, tensor in getattr(layer, part)[adapter].state_dict().items()
    }


def _differing(theirs: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor]) -> list[str]:
    # Loaded like this, they are rounded to the base's precision; what counts is that every tensor comes to its place.
    rounded = {name: t.to(theirs[name].dtype) if name in theirs else t for name, t in ours.items()}
    return differing_tensors(theirs, rounded)
