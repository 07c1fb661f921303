"""Where the tensors of an adapter lie in a base that PEFT adapted."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from peft.functional import get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .peft_layers import PEFT_PREFIX, AdaptedLayer, AdapterHolder, unwrapped


@dataclass(frozen=True)
class Slot:
    """
    Where a tensor of an adapter lies: at a path from an adapted module, or the wrapper of a head, that leads through
    the adapter's name.
    """

    module: nn.Module
    before: str
    after: str

    def tensor(self, adapter: str) -> torch.Tensor:
        """The tensor of an adapter, as it lies there."""
        owner, name = self._place(adapter)
        tensor: torch.Tensor = getattr(owner, name)
        return tensor

    def set(self, adapter: str, tensor: torch.Tensor) -> None:
        """Put a copy there as it is, on the device of the module; PEFT would round it to the base's precision."""
        owner, name = self._place(adapter)
        # Memory of torch's own, aligned as what is trained: products may be summed in another order elsewhere.
        own = tensor.to(_device_of(self.module), copy=True)
        is_parameter = isinstance(getattr(owner, name), nn.Parameter)
        setattr(owner, name, nn.Parameter(own, requires_grad=False) if is_parameter else own)

    def _place(self, adapter: str) -> tuple[nn.Module, str]:
        path, _, name = f"{self.before}{adapter}{self.after}".rpartition(".")
        return self.module.get_submodule(path), name


@dataclass(frozen=True)
class AdapterPlaces:
    """
    What PEFT makes of the config of a group: where its stages lie.

    Args:
        layers (mapping from `str` to `AdaptedLayer`): By their names, the adapted modules.
        heads (mapping from `str` to `ModulesToSaveWrapper`): By their names, the wrappers of heads.
        blanks (mapping from `str` to mapping): By the names of adapted modules, what an adapter without tensors is.
        slots (mapping from `str` to `Slot`): By the names that they have in a file, the tensors.
    """

    layers: Mapping[str, AdaptedLayer]
    heads: Mapping[str, ModulesToSaveWrapper]
    blanks: Mapping[str, Mapping[str, Any]]
    slots: Mapping[str, Slot]

    @property
    def modules(self) -> list[AdapterHolder]:
        """All modules that hold a stage: adapted ones and wrappers of heads."""
        return [*self.layers.values(), *self.heads.values()]


def holds_adapter(module: nn.Module, adapter: str) -> TypeGuard[AdapterHolder]:
    """Whether a module is an adapted one, or the wrapper of a head, that holds an adapter."""
    if isinstance(module, ModulesToSaveWrapper):
        return adapter in module.modules_to_save
    return isinstance(module, AdaptedLayer) and adapter in module.lora_A


def _without_tensors(layer: AdaptedLayer, adapter: str) -> dict[str, Any]:
    """What an adapter is in a layer besides its tensors, which are on the meta device."""
    found = {}
    for part in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
        if adapter in getattr(layer, part):
            blank = copy.deepcopy(getattr(layer, part)[adapter])
            found[part] = blank.to("meta") if isinstance(blank, nn.Module) else blank
    return found


def _device_of(module: nn.Module) -> torch.device:
    """Where an adapted module, or the wrapper of a head, computes."""
    return next(unwrapped(module).parameters()).device


def find_places(base: nn.Module, adapter: str, modules: Mapping[str, AdapterHolder]) -> AdapterPlaces:
    """
    Where the tensors of an injected adapter lie, by the names that PEFT gives them in files.

    Args:
        base (`nn.Module`): The base model.
        adapter (`str`): Name of the adapter.
        modules (mapping from `str` to `AdapterHolder`): By their names, the modules of the base that hold it.
    """
    # The tensors themselves, by which they are found again.
    state = get_peft_model_state_dict(
        base, base.state_dict(keep_vars=True), adapter_name=adapter, save_embedding_layers=False
    )
    paths = {
        id(tensor): Slot(module, *path.split(adapter, 1))
        for module in modules.values()
        for path, tensor in (*module.named_parameters(), *module.named_buffers())
        if adapter in path.split(".")
    }
    slots = {PEFT_PREFIX + name: paths[id(tensor)] for name, tensor in sorted(state.items())}
    layers = {name: module for name, module in modules.items() if isinstance(module, AdaptedLayer)}
    heads = {name: module for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    return AdapterPlaces(
        layers, heads, {name: _without_tensors(layer, adapter) for name, layer in layers.items()}, slots
    )
