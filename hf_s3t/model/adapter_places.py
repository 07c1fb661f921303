"""Where the tensors of an adapter lie in a base that PEFT adapted."""

import copy
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from peft import LoraConfig
from peft.functional import get_peft_model_state_dict
from peft.tuners.lora.dora import DoraLinearLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from .peft_layers import PEFT_PREFIX, AdaptedLayer, AdapterHolder, unwrapped


# Modules of which nothing is their own but numbers and tensors.
_PLAIN = (nn.Linear, nn.Dropout, nn.Identity, DoraLinearLayer)


@dataclass(frozen=True)
class Slot:
    """
    Where a tensor of an adapter lies: at a path from an adapted module, or the wrapper of a head, that leads through
    the adapter's name.

    Args:
        module (`nn.Module`): PEFT's layer or wrapper.
        before (`tuple[str, ...]`): The path to what holds the adapters' parts by their names.
        after (`tuple[str, ...]`): The path on from there.
    """

    module: nn.Module
    before: tuple[str, ...]
    after: tuple[str, ...]

    def tensor(self, adapter: str) -> torch.Tensor:
        """The tensor of an adapter, as it lies there."""
        tensor: torch.Tensor = getattr(self._owner(adapter), self._name(adapter))
        return tensor

    def set(self, adapter: str, tensor: torch.Tensor) -> None:
        """Put a tensor there as it is; PEFT would round it to the base's precision."""
        owner, name = self._owner(adapter), self._name(adapter)
        is_parameter = isinstance(getattr(owner, name), nn.Parameter)
        setattr(owner, name, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)

    def _owner(self, adapter: str) -> nn.Module:
        owner: nn.Module = functools.reduce(getattr, (*self.before, adapter, *self.after)[:-1], self.module)
        return owner

    def _name(self, adapter: str) -> str:
        return self.after[-1] if self.after else adapter


class Blank:
    """
    A part of an adapter without its tensors, from which one is made for every stage.

    Args:
        part: What PEFT made: a module, a number, or anything else. It is left as it is.
    """

    def __init__(self, part: Any):
        self._is_plain = type(part) in _PLAIN and not any(
            value for name, value in vars(part).items() if isinstance(value, (dict, set)) and name != "_parameters"
        )
        if self._is_plain:
            # Not by `to`, which may exchange tensors in place: they are those of the stage that was attached.
            self._part = _shell(part)
            self._part._parameters.update({name: _without_values(p) for name, p in part._parameters.items()})
        else:
            self._part = copy.deepcopy(part)
            if isinstance(part, nn.Module):
                self._part.to("meta")

    def anew(self) -> Any:
        """Another one. Its tensors, in whose place others are put, have no values and may be shared."""
        # What `deepcopy` makes takes longer than everything else about attaching a stage.
        return _shell(self._part) if self._is_plain else copy.deepcopy(self._part)


def _without_values(parameter: nn.Parameter | None) -> nn.Parameter | None:
    return None if parameter is None else nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)


def _shell(module: nn.Module) -> nn.Module:
    """A module like a plain one, with the same tensors."""
    twin = module.__new__(type(module))
    own = vars(module).items()
    twin.__dict__.update({name: value.copy() if isinstance(value, (dict, set)) else value for name, value in own})
    return twin


@dataclass(frozen=True)
class AdapterPlaces:
    """
    What PEFT makes of the config of a group: where its stages lie.

    Args:
        config ([`~peft.LoraConfig`]): The config, as PEFT left it.
        layers (mapping from `str` to `AdaptedLayer`): By their names, the adapted modules.
        heads (mapping from `str` to `ModulesToSaveWrapper`): By their names, the wrappers of heads.
        blanks (mapping from `str` to mapping): By the names of adapted modules, what an adapter without tensors is.
        slots (mapping from `str` to `Slot`): By the names that they have in a file, the tensors.
        is_all (`bool`): Whether this is all that PEFT made there, as far as anybody can see.
    """

    config: LoraConfig
    layers: Mapping[str, AdaptedLayer]
    heads: Mapping[str, ModulesToSaveWrapper]
    blanks: Mapping[str, Mapping[str, Blank]]
    slots: Mapping[str, Slot]
    is_all: bool

    @property
    def modules(self) -> list[AdapterHolder]:
        """All modules that hold a stage: adapted ones and wrappers of heads."""
        return [*self.layers.values(), *self.heads.values()]

    def tensors(self, adapter: str) -> dict[str, torch.Tensor]:
        """The tensors of an adapter by the names that they have in a file, as they lie there."""
        return {name: slot.tensor(adapter) for name, slot in self.slots.items()}

    def add(self, adapter: str) -> None:
        """Make room for one more adapter, as PEFT does when it is told to adapt the same modules."""
        for name, layer in self.layers.items():
            for part, blank in self.blanks[name].items():
                getattr(layer, part)[adapter] = blank.anew()
        for wrapper in self.heads.values():
            wrapper.update(adapter)

    def fill(self, adapter: str, state: Mapping[str, torch.Tensor]) -> None:
        """Put copies of tensors where they belong, as they are, each on the device of its module."""
        devices: dict[nn.Module, torch.device] = {module: _device_of(module) for module in self.modules}
        for name, slot in self.slots.items():
            # Memory of torch's own, aligned as what is trained: products may be summed in another order elsewhere.
            slot.set(adapter, state[name].to(devices[slot.module], copy=True))


def holds_adapter(module: nn.Module, adapter: str) -> TypeGuard[AdapterHolder]:
    """Whether a module is an adapted one, or the wrapper of a head, that holds an adapter."""
    if isinstance(module, ModulesToSaveWrapper):
        return adapter in module.modules_to_save
    return isinstance(module, AdaptedLayer) and adapter in module.lora_A


def _blanks(layer: AdaptedLayer, adapter: str) -> dict[str, Blank]:
    """What an adapter is in a layer besides its tensors, by the names of the parts."""
    found = {}
    for part in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
        if adapter in getattr(layer, part):
            found[part] = Blank(getattr(layer, part)[adapter])
    return found


def _is_all(layer: AdaptedLayer, adapter: str, parts: Mapping[str, Blank]) -> bool:
    """Whether an adapter in a layer is these parts, as far as anybody can see."""
    own = {**vars(layer), **dict(layer.named_children())}
    mentioned = {name for name, value in own.items() if hasattr(value, "keys") and adapter in value}
    return type(layer).__module__.startswith("peft.") and mentioned <= parts.keys()


def _tensors_of(module: nn.Module, adapter: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of an adapter in a module, by their paths from there."""
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        if adapter in path.split("."):
            yield path, tensor


def _device_of(module: nn.Module) -> torch.device:
    """Where an adapted module, or the wrapper of a head, computes."""
    return next(unwrapped(module).parameters()).device


def find_places(
    base: nn.Module, adapter: str, config: LoraConfig, modules: Mapping[str, AdapterHolder]
) -> AdapterPlaces:
    """
    Where the tensors of an injected adapter lie, by the names that PEFT gives them in files.

    Args:
        base (`nn.Module`): The base model.
        adapter (`str`): Name of the adapter.
        config ([`~peft.LoraConfig`]): Its config, as PEFT left it.
        modules (mapping from `str` to `AdapterHolder`): By their names, the modules of the base that hold it.
    """
    # The tensors themselves, by which they are found again, by every name that a module has.
    held = set(modules.values())
    own = {
        path: tensor
        for name, module in base.named_modules(remove_duplicate=False)
        if module in held
        for path, tensor in module.state_dict(prefix=f"{name}.", keep_vars=True).items()
    }
    state = get_peft_model_state_dict(base, own, adapter_name=adapter, save_embedding_layers=False)
    lie = {name: dict(_tensors_of(module, adapter)) for name, module in modules.items()}
    paths = {
        id(tensor): _slot(modules[name], path, adapter)
        for name, tensors in lie.items()
        for path, tensor in tensors.items()
    }
    slots = {PEFT_PREFIX + name: paths[id(tensor)] for name, tensor in sorted(state.items())}
    layers = {name: module for name, module in modules.items() if isinstance(module, AdaptedLayer)}
    heads = {name: module for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
    blanks = {name: _blanks(layer, adapter) for name, layer in layers.items()}
    tensors = {id(tensor) for tensor in state.values()}
    is_all = all(
        _is_all(layer, adapter, blanks[name]) and {id(tensor) for tensor in lie[name].values()} <= tensors
        for name, layer in layers.items()
    )
    return AdapterPlaces(copy.deepcopy(config), layers, heads, blanks, slots, is_all)


def _slot(module: nn.Module, path: str, adapter: str) -> Slot:
    names = path.split(".")
    at = names.index(adapter)
    return Slot(module, tuple(names[:at]), tuple(names[at + 1 :]))
