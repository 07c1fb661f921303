"""What of a base concerns the stages of one group of layers: PEFT looks through all that it is given."""

from typing import Any

from peft import LoraConfig
from peft.utils.constants import MIN_TARGET_MODULES_FOR_OPTIMIZATION
from torch import nn

from .layers import LayerGroups


class Sections:
    """
    A base without the layers of other groups: the same modules, by the same names and in the same order.

    PEFT decides by a module's name alone whether it adapts it, so in a section it makes, and draws, what it does in
    the whole, where a config names nothing outside of it. It goes through the modules of what it adapts a dozen times
    for every adapter, and those that it has wrapped are ten each.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model, bare.
        layers ([`~hf_s3t.model.layers.LayerGroups`]): Which layers each group has.
    """

    def __init__(self, base: nn.Module, layers: LayerGroups):
        self._base, self._layers = base, layers
        self._path = layers.path.split(".")
        self._is_known_once = self._have_one_name([base, *self._below(base)])

    def of(self, group: int, config: LoraConfig) -> nn.Module:
        """
        The section of a group, or the whole base where that is not the same to PEFT.

        Args:
            group (`int`): The group.
            config ([`~peft.LoraConfig`]): Its config, which matches no module outside its layers.
        """
        # Of many names PEFT keeps endings that match nothing else, and so looks at all there is.
        few = len(config.target_modules or ()) < MIN_TARGET_MODULES_FOR_OPTIMIZATION
        if config.layers_to_transform is None or isinstance(config.target_modules, str) or not few:
            return self._base
        if not self._is_known_once:
            return self._base
        section = owner = _twin(self._base)
        for name in self._path:
            owner._modules[name] = owner = _twin(_child(owner, name))
        kept = {str(index) for index in self._layers.groups[group]}
        owner._modules = {name: layer for name, layer in owner._modules.items() if name in kept}
        return section

    def put_back(self, section: nn.Module) -> None:
        """Have the base hold what PEFT has put into a section: what is inside of layers, the base holds already."""
        theirs, ours = [section, *self._below(section)], [self._base, *self._below(self._base)]
        for shown, owner in zip(theirs, ours, strict=True):
            for name, module in shown._modules.items():
                if module is not owner._modules[name] and module not in theirs:
                    setattr(owner, name, module)

    def _below(self, base: nn.Module) -> list[nn.Module]:
        """What leads from a base to its layers."""
        found = []
        for name in self._path:
            base = _child(base, name)
            found.append(base)
        return found

    def _have_one_name(self, owners: list[nn.Module]) -> bool:
        """Whether these are held by nothing but each other: by another name, all layers would still be there."""
        held = [child for module in self._base.modules() for child in module._modules.values() if child in owners]
        return len(held) == len(owners) - 1


def _child(module: nn.Module, name: str) -> nn.Module:
    child: nn.Module = getattr(module, name)
    return child


def _twin(module: nn.Module) -> nn.Module:
    """A module that holds what another holds, and may come to hold something else."""
    twin: nn.Module = module.__new__(type(module))
    own: dict[str, Any] = vars(module)
    twin.__dict__.update({name: value.copy() if isinstance(value, dict) else value for name, value in own.items()})
    return twin
