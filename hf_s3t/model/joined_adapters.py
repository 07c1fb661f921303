"""Adapters of several members in one piece of memory, so that one product of matrices does for all of them."""

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .peft_layers import AdaptedLayer
from .route import Route


# Where each adapter of several begins, in bytes: as memory of torch's own does, since products of an adapter by itself
# may be summed in another order elsewhere.
_ALIGNED = {"cpu": 64, "other": 512}
# Held while parameters are put elsewhere. It is not the layer's, which may be copied.
_MOVING = threading.Lock()
# The layer's attribute.
_JOINED = "_s3t_joined"


@dataclass(frozen=True, slots=True)
class Joined:
    """
    The weights of several adapters of a layer, of one shape, one after the other.

    Args:
        names (`tuple[str, ...]`): The adapters.
        down (`torch.Tensor` of shape `(adapters, rank, features_in)`): Their first weights.
        up (`torch.Tensor` of shape `(adapters, features_out, rank)`): Their second weights.
        scaling (`float`): What PEFT multiplies the product with.
        down_transposed (`torch.Tensor` of shape `(adapters, features_in, rank)`): The first, as they are multiplied.
        up_transposed (`torch.Tensor` of shape `(adapters, rank, features_out)`): The second.
        route (`weakref.ref`): The route they were joined for. While it is there, calls may go by it.
    """

    names: tuple[str, ...]
    down: torch.Tensor
    up: torch.Tensor
    scaling: float
    down_transposed: torch.Tensor
    up_transposed: torch.Tensor
    route: weakref.ref[Route]

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        # The parameters of a copied layer have memory of their own.
        return None

    def add_to(self, output: torch.Tensor, x: torch.Tensor) -> None:
        """
        Add each adapter to its block of rows.

        Args:
            output (`torch.Tensor` of shape `(adapters, rows, features_out)`): What the base layer made of the rows.
            x (`torch.Tensor` of shape `(adapters, rows, features_in)`): The rows.
        """
        output.baddbmm_(torch.bmm(x, self.down_transposed), self.up_transposed, alpha=self.scaling)

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """
        What each adapter makes of its block of rows, before it is scaled.

        Args:
            x (`torch.Tensor` of shape `(adapters, rows, features_in)`): The rows.
        """
        return torch.bmm(torch.bmm(x, self.down_transposed), self.up_transposed)

    def is_for(self, names: Sequence[str | None], output: torch.Tensor) -> bool:
        """Whether these are the adapters to add to an output, and can be."""
        return self.names == names and self.down.dtype == output.dtype and self.down.device == output.device


def joined(layer: AdaptedLayer, route: Route, names: tuple[str | None, ...], output: torch.Tensor) -> Joined | None:
    """
    The adapters of all members, if one product can do for them: one for each, all plain and of the same shape.

    There is no second copy. The weights are put into the memory that is returned here, and stay there until one of
    the adapters is removed; see `take_apart`. Where a layer's are joined for other members already, on another route
    that is still there (calls on an earlier routing are under way, say), they are joined for the time of this product.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): An adapted layer.
        route ([`~hf_s3t.model.route.Route`]): That of the call.
        names (`tuple` of `str`): Per member the adapter, `None` below its stack.
        output (`torch.Tensor` of shape `(members * rows, ..., features_out)`): What the base layer made of the rows.
    """
    held: Joined | None = layer.__dict__.get(_JOINED)
    if held is not None and held.is_for(names, output):
        return held
    # A compiled graph must not keep the memory.
    if torch.compiler.is_compiling():
        return None
    together = _join(layer, route, names, output.dtype)
    if together is None or _is_in_use(held):
        return together
    with _MOVING:
        held = layer.__dict__.get(_JOINED)
        if not _is_in_use(held):
            if held is not None:
                _separate(layer, held, None)
            together = _join(layer, route, names, output.dtype)
            if together is not None:
                # First of all: from here on, whatever happens, it is known who shares memory.
                layer.__dict__[_JOINED] = together
                for place, name in enumerate(together.names):
                    _put(layer.lora_A[name], together.down[place])
                    _put(layer.lora_B[name], together.up[place])
    return together


def take_apart(layer: AdaptedLayer, going: str | None = None) -> None:
    """
    Give every adapter memory of its own, if they are joined.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): An adapted layer.
        going (`str`, *optional*):
            An adapter that is being removed, with which nothing computes: nothing is done if it is not among those
            that are joined. It gets no memory of its own, and what was its part of the memory, to which a product of
            others that is under way may hold on a moment longer, is cleared.
    """
    with _MOVING:
        held: Joined | None = layer.__dict__.get(_JOINED)
        if held is None or (going is not None and going not in held.names):
            return
        _separate(layer, held, going)


def plain_pairs(
    layer: AdaptedLayer, names: Sequence[str | None], dtype: torch.dtype
) -> list[tuple[torch.Tensor, torch.Tensor] | None] | None:
    """
    Per member the weights of its adapter, if it has one here; `None` if any adapter is something else than two.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): An adapted layer.
        names (sequence of `str`): Per member the adapter, `None` below its stack.
        dtype (`torch.dtype`): The precision in which they are to be.
    """
    held: Any = layer._modules
    # Not by their names as attributes: each is a call of Python, for each member of each layer of each token.
    lora_A, lora_B = held["lora_A"]._modules, held["lora_B"]._modules
    pairs: list[tuple[torch.Tensor, torch.Tensor] | None] = []
    for name in names:
        if name is None:
            pairs.append(None)
            continue
        first, second = lora_A[name], lora_B[name]
        if name in layer.lora_variant or type(first) is not nn.Linear or type(second) is not nn.Linear:
            return None
        weights: Any = second._parameters
        if weights["bias"] is not None or weights["weight"].dtype != dtype:
            return None
        pairs.append((first.weight, weights["weight"]))
    return pairs


def _is_in_use(held: Joined | None) -> bool:
    return held is not None and held.route() is not None


def _separate(layer: AdaptedLayer, held: Joined, going: str | None) -> None:
    # A call within `torch.inference_mode` may be what removes one, and the others be trained upon later.
    with torch.inference_mode(False), torch.no_grad():
        for place, name in enumerate(held.names):
            for linear, weight in ((layer.lora_A[name], held.down[place]), (layer.lora_B[name], held.up[place])):
                if name != going:
                    _put(linear, weight.clone())
                    continue
                weight.zero_()
                # The parameter too, which lies there: gradients that somebody has still to compute with it are an
                # error then, and not those of zeros.
                linear.get_parameter("weight").zero_()
    del layer.__dict__[_JOINED]


def _join(layer: AdaptedLayer, route: Route, names: tuple[str | None, ...], dtype: torch.dtype) -> Joined | None:
    """Copies of the weights of all members in one piece of memory each; `None` if one product cannot do for them."""
    adapters = tuple(name for name in names if name is not None)
    if len(adapters) < len(names) or len(set(adapters)) < len(adapters):
        return None
    pairs = plain_pairs(layer, adapters, dtype)
    weights = [pair for pair in pairs or () if pair is not None]
    if not weights or len({layer.scaling[name] for name in adapters}) > 1:
        return None
    downs, ups = [pair[0] for pair in weights], [pair[1] for pair in weights]
    if not (_fit(downs, dtype) and _fit(ups, dtype)):
        return None
    # One may be joined within `torch.inference_mode`, and stages be trained above it later.
    with torch.inference_mode(False), torch.no_grad():
        down, up = torch.stack(downs), torch.stack(ups)
        transposed = down.transpose(1, 2), up.transpose(1, 2)
        return Joined(adapters, down, up, layer.scaling[adapters[0]], *transposed, weakref.ref(route))


def _fit(weights: list[torch.Tensor], dtype: torch.dtype) -> bool:
    """Whether weights can lie one after the other. What is being trained stays where its optimizer knows it."""
    first = weights[0]
    aligned = _ALIGNED["cpu" if first.device.type == "cpu" else "other"]
    return all(
        weight.dtype == dtype
        and weight.shape == first.shape
        and weight.device == first.device
        and weight.is_contiguous()
        and weight.nbytes % aligned == 0
        and not weight.requires_grad
        for weight in weights
    )


def _put(linear: nn.Module, weight: torch.Tensor) -> None:
    # Another parameter: a product under way in another thread holds on to the one that was there, and its memory.
    with torch.inference_mode(False):
        # By `data`: each counts by itself what is written to it, which gradients depend on.
        linear._parameters["weight"] = nn.Parameter(weight.data, requires_grad=False)
