"""What the modules of a model hold besides parameters: looked at, compared, put back."""

import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from .marks import UNSET, Mark, mark
from .peft_layers import unwrapped
from .turns import PREPARED
from .uncompiled import uncompiled


# Libraries of quantisation, which keep what they need beside the weights.
_QUANTIZERS = {"bitsandbytes", "hqq", "torchao", "optimum", "eetq"}
# Attributes of modules that say how they are run and wrapped, not what they compute.
_HOW_IT_IS_RUN = {
    *PREPARED, "training", "generation_config", "warnings_issued", "peft_config", "gradient_checkpointing",
    "_gradient_checkpointing_func", "neftune_noise_alpha", "_parameters", "_modules", "_buffers", "_hf_hook",
    "_old_forward", "_compiled_call_impl", "_is_accelerate_prepared", "_hf_peft_config_loaded",
}  # fmt: skip
# The name of a module's buffers among its attributes; they are looked at, and never put back.
BUFFERS = "buffers"


class Look:
    """
    What the modules of a model hold besides parameters, and its configs: seen when this is made.

    Args:
        model (`nn.Module`): The model; adapters on it are passed over.
    """

    # A compiled graph would look at what was there when it was made.
    @uncompiled
    def __init__(self, model: nn.Module):
        self._model = model
        self._tensors: dict[tuple[str, str], torch.Tensor] = {}
        self._plain: dict[tuple[str, str], bool | int | float | str] = {}
        derived = _DERIVED.get(model, ())
        self.marks: dict[tuple[str, str], Mark] = {}
        for name, attribute, _, value in _attributes(model):
            place = name, attribute
            if place in derived:
                continue
            if isinstance(value, torch.Tensor):
                self._tensors[place] = value
            elif isinstance(value, (bool, int, float, str)):
                self._plain[place] = value
            # Modules and configs that are held have attributes of their own here.
            self.marks[place] = mark(value, opaque=(nn.Module, PreTrainedConfig))

    def changed(self, since: "Look") -> dict[str, tuple[Mark, Mark]]:
        """
        What was set and is not the same any more: what it was and what it is.

        A tensor counts if it was written to, or is another one of the same shape with other fractions in it: what is
        computed with weights. Positions and the like are made by every pass for itself.
        """
        found = {}
        for place, before in since.marks.items():
            now = self.marks.get(place, UNSET)
            if before.is_unset or now == before:
                continue
            is_other = place in since._tensors and self._tensors.get(place) is not since._tensors[place]
            if not is_other or _holds_other_fractions(before, now):
                found[f"{place[0]}.{place[1]}" if place[0] else place[1]] = before, now
        return found

    def differs(self, other: "Look") -> bool:
        """Whether anything is not the same."""
        return self.marks != other.marks

    def put_back(self, settings: bool = False) -> None:
        """
        Take from the modules what was not set, and is now, and give them the tensors they had: what each pass makes
        for itself, as it needs it.

        Args:
            settings (`bool`, defaults to `False`): Give them what else was replaced, too.
        """
        for name, attribute, owner, value in list(_attributes(self._model)):
            place = name, attribute
            if attribute == BUFFERS or place in _DERIVED.get(self._model, ()):
                continue
            if place in self._tensors:
                vars(owner)[attribute] = self._tensors[place]
            elif settings and place in self._plain:
                vars(owner)[attribute] = self._plain[place]
            elif place not in self.marks:
                vars(owner).pop(attribute)
            elif self.marks[place].is_unset and value is not None:
                vars(owner)[attribute] = None


class Derived(frozenset[tuple[str, str]]):
    """The attributes, as owner and name, that a pass makes from the shape of its own input, whatever came before."""

    @classmethod
    def of(cls, first: Look, between: Look, again: Look) -> "Derived":
        """
        What changes with the shape of an input, and is the same again for the same input.

        Args:
            first ([`Look`]): After a pass over some input.
            between ([`Look`]): After a pass over an input of another shape.
            again ([`Look`]): After a pass over the first input again.
        """
        places = first.marks.keys() | between.marks.keys()
        changed = {place for place in places if first.marks.get(place) != between.marks.get(place)}
        return cls(place for place in changed if first.marks.get(place) == again.marks.get(place))

    def hold_for(self, model: nn.Module) -> None:
        """Have looks at a model pass over these."""
        _DERIVED[model] = self


# Per model what looks pass over.
_DERIVED: "weakref.WeakKeyDictionary[nn.Module, Derived]" = weakref.WeakKeyDictionary()


def shown(left: dict[str, tuple[Mark, Mark]]) -> str:
    """Attributes that changed, as a message names them."""
    name, (before, after) = next(iter(left.items()))
    plain = before.content is not None and after.content is not None and not isinstance(before.content, tuple)
    values = f" (from {before.content} to {after.content})" if plain else ""
    return f"`{name}`{values}" + (f" and {len(left) - 1} more" if len(left) > 1 else "")


def _holds_other_fractions(one: Mark, other: Mark) -> bool:
    if not (isinstance(one.content, tuple) and isinstance(other.content, tuple)):
        return False
    return one.content[:2] == other.content[:2] and any(kind in one.content[0] for kind in ("float", "complex"))


def _attributes(model: nn.Module) -> Iterator[tuple[str, str, Any, Any]]:
    """Attributes of the modules and configs of a model: name of the owner, name, owner and value."""
    for name, module in _bare_modules(model, ""):
        if type(module).__module__.split(".")[0] in _QUANTIZERS:
            continue
        for attribute, value in list(vars(module).items()):
            if attribute not in _HOW_IT_IS_RUN and "_hook" not in attribute and not attribute.startswith("_dynamo"):
                yield name, attribute, module, value
        yield name, BUFFERS, module, {n: b for n, b in module._buffers.items() if not n.endswith("inv_freq")}
    yield from _config_attributes(getattr(model, "config", None), "config")


def _bare_modules(module: nn.Module, name: str, seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """The modules of a model by their names, without those that PEFT put around or into them."""
    seen = seen if seen is not None else set()
    module = unwrapped(module)
    if module in seen:
        return
    seen.add(module)
    yield name, module
    for child, inner in module.named_children():
        yield from _bare_modules(inner, f"{name}.{child}" if name else child, seen)


def _config_attributes(config: Any, name: str) -> Iterator[tuple[str, str, Any, Any]]:
    if not isinstance(config, PreTrainedConfig):
        return
    for attribute, value in list(vars(config).items()):
        yield name, attribute, config, value
        yield from _config_attributes(value, f"{name}.{attribute}")
