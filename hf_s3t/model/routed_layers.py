"""Adapted layers and heads that go by the route of the call under way."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from peft.tuners.lora import Linear
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..errors import S3TError
from .joined_adapters import joined, plain_pairs, take_apart
from .peft_layers import AdaptedLayer, AdapterHolder
from .route import LENGTHS, ROUTE, Route, length_of


# Whether torch runs hooks around every module there is.
_has_global_hooks: Callable[[], Any] = nn.modules.module._has_any_global_hook


def route_through(module: AdapterHolder, group: int) -> None:
    """
    Have an adapted layer, or the wrapper of a head, go by the route of the call under way.

    A layer becomes one of a subclass of its class: hooks would cost every call of it, of every token, more than all
    else that is done here.

    Args:
        module (`nn.Module`): PEFT's layer or wrapper.
        group (`int`): The layer group of an adapted layer.
    """
    if isinstance(module, ModulesToSaveWrapper):
        module.register_forward_pre_hook(_note_length, with_kwargs=True)
        module.register_forward_hook(_answer_with_heads, with_kwargs=True)
    else:
        module.__class__ = _routed(type(module))
        vars(module)["_s3t_group"] = group


def peft_class(layer: AdaptedLayer) -> type:
    """The class that PEFT made a layer of."""
    return next(cls for cls in type(layer).__mro__ if not issubclass(cls, RoutedLayer))


@functools.cache
def _routed(peft_class: type) -> type:
    return type(
        peft_class.__name__,
        (RoutedLayer, peft_class),
        {"__module__": peft_class.__module__, "_is_linear": peft_class is Linear},
    )


if TYPE_CHECKING:
    _Layer = AdaptedLayer
else:
    _Layer = object


class RoutedLayer(_Layer):
    """What a layer that PEFT adapted is first: with a route, it adds to what the base's layer answers by that."""

    _s3t_group: int
    _is_linear: bool

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """
        As PEFT's layer; with a route, each member's adapter is added to its block of rows.

        Args:
            *args: What the base's layer is given: a tensor of shape `(members * rows, ..., features_in)`.
            **kwargs: What it is given by name.

        Returns:
            `torch.Tensor` of shape `(members * rows, ..., features_out)`.
        """
        if LENGTHS.peek() is not None:
            _note_length(self, args, kwargs)
        block = ROUTE.peek()
        route: Route | None = block.value if block is not None and block.is_open else ROUTE.get()
        if route is None:
            return self._as_peft(args, kwargs)
        if not self._disable_adapters:
            # With these names PEFT computes the base's layer alone, whatever adapters are active.
            output = self._as_peft(args, {**kwargs, "adapter_names": ["__base__"] * len(args[0])})
        elif self._is_linear and not kwargs and not self.merged_adapters:
            output = _linear(self._modules["base_layer"], *args)
        else:
            output = self._as_peft(args, kwargs)
        if route.is_stopped():
            route.refuse_stopped()
        names = route.by_group.get(self._s3t_group)
        return output if names is None else _add_members(self, route, names, args[0], output)

    def delete_adapter(self, adapter_name: str) -> None:
        """
        As PEFT's; no other adapter keeps its memory.

        Args:
            adapter_name (`str`): The adapter.
        """
        take_apart(self, adapter_name)
        super().delete_adapter(adapter_name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        # What moves each parameter by itself, to another device say.
        take_apart(self)
        apply: Callable[..., Self] = super()._apply
        return apply(fn, recurse)

    def _as_peft(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        output: torch.Tensor = super().forward(*args, **kwargs)
        return output


def _linear(layer: Any, x: torch.Tensor, *more: Any) -> torch.Tensor:
    """
    All that PEFT does with disabled adapters, none of them merged, and a plain layer without hooks does when it is
    called, at once.
    """
    if type(layer) is nn.Linear and not (
        layer._forward_pre_hooks
        or layer._forward_hooks
        or layer._backward_hooks
        or layer._backward_pre_hooks
        or "forward" in layer.__dict__
        or more
        or _has_global_hooks()
    ):
        held: Any = layer._parameters
        return nn.functional.linear(x, held["weight"], held["bias"])
    output: torch.Tensor = layer(x, *more)
    return output


def _note_length(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    lengths = LENGTHS.get()
    if lengths is not None:
        lengths.append(length_of(args, kwargs))


def _add_members(
    layer: AdaptedLayer, route: Route, names: tuple[str | None, ...], x: torch.Tensor, output: torch.Tensor
) -> torch.Tensor:
    """
    Add each member's adapter to its block of rows.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): An adapted layer.
        route ([`~hf_s3t.model.route.Route`]): That of the call.
        names (`tuple` of `str`): Per member the adapter, `None` below its stack.
        x (`torch.Tensor` of shape `(members * rows, ..., features_in)`): What the layer was given.
        output (`torch.Tensor` of shape `(members * rows, ..., features_out)`): What the base layer made of it.

    Returns:
        `torch.Tensor` of the output's shape; the output itself where no gradients are needed.
    """
    if len(output) % route.num_rows:
        blocks_of = "" if route.sizes is None else f", of {', '.join(map(str, route.sizes))} rows each"
        raise S3TError(
            f"An adapted {type(layer).__name__} was given {len(output)} rows for {len(names)} ensemble members"
            f"{blocks_of}: it selects among them, so they cannot be told apart. Leave it out of `target_modules`."
        )
    in_place = not output.requires_grad and not torch.is_grad_enabled()
    if in_place and _add_products(layer, route, names, x, output):
        return output
    blocks, inputs = route.blocks(output), route.blocks(x)
    if in_place:
        for name, given, block in zip(names, inputs, blocks, strict=True):
            if name is not None:
                _add_adapter(layer, name, given, block, in_place=True)
        return output
    return torch.cat(
        [
            block if name is None else _add_adapter(layer, name, given, block, in_place=False)
            for name, given, block in zip(names, inputs, blocks, strict=True)
        ]
    )


def _add_products(
    layer: AdaptedLayer, route: Route, names: tuple[str | None, ...], x: torch.Tensor, output: torch.Tensor
) -> bool:
    """
    Add each member's adapter to its block of rows by products of matrices, writing nothing in between.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): An adapted layer.
        route ([`~hf_s3t.model.route.Route`]): That of the call.
        names (`tuple` of `str`): Per member the adapter, `None` below its stack.
        x (`torch.Tensor` of shape `(members * rows, ..., features_in)`): What the layer was given.
        output (`torch.Tensor` of shape `(members * rows, ..., features_out)`): What the base layer made of it.

    Returns:
        `bool`: False, and nothing is changed, if they are no plain LoRA of linear layers in the output's precision.
    """
    if not output.is_contiguous():
        return False
    # One member is multiplied as plain PEFT does, to the bit.
    together = joined(layer, route, names, output) if len(names) > 1 and route.sizes is None else None
    if together is not None:
        members = len(names)
        given = x.to(output.dtype).reshape(members, -1, x.shape[-1])
        together.add_to(output.view(members, -1, output.shape[-1]), given)
        return True
    if route.sizes is not None and _add_padded(layer, route, x, output):
        return True
    pairs = plain_pairs(layer, names, output.dtype)
    if pairs is None:
        return False
    whole, given = output.view(-1, output.shape[-1]), x.to(output.dtype).flatten(0, -2)
    blocks, inputs = ((whole,), (given,)) if len(names) == 1 else (route.blocks(whole), route.blocks(given))
    for name, pair, rows, block in zip(names, pairs, inputs, blocks, strict=True):
        if pair is not None:
            low = nn.functional.linear(rows, pair[0])
            block.addmm_(low, pair[1].t(), alpha=layer.scaling[name])
    return True


def _add_padded(layer: AdaptedLayer, route: Route, x: torch.Tensor, output: torch.Tensor) -> bool:
    """
    Add each member's adapter to its block of few rows, all blocks together.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): An adapted layer.
        route ([`~hf_s3t.model.route.Route`]): That of the call, of blocks of unequal size.
        x (`torch.Tensor` of shape `(rows, ..., features_in)`): What the layer was given.
        output (`torch.Tensor` of shape `(rows, ..., features_out)`): What the base layer made of it.

    Returns:
        `bool`: False, and nothing is changed, if there are too many rows, or no weights to multiply with at once.
    """
    padding = route.padding(x.numel() // x.shape[-1], x.device)
    if padding is None or route.whole is None:
        return False
    # The memory is that of the whole route: calls that ask other members do not move it.
    together = joined(layer, route.whole, route.whole.by_group[vars(layer)["_s3t_group"]], output)
    if together is None:
        return False
    given = x.to(output.dtype).flatten(0, -2).index_select(0, padding.taken)
    made = together.product(given.view(len(route.whole), -1, x.shape[-1])).flatten(0, 1)
    output.view(-1, output.shape[-1]).add_(made.index_select(0, padding.places), alpha=together.scaling)
    return True


def _add_adapter(
    layer: AdaptedLayer, name: str, x: torch.Tensor, result: torch.Tensor, in_place: bool
) -> torch.Tensor:
    """
    Add one adapter to the output of the base layer.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): An adapted layer.
        name (`str`): The adapter.
        x (`torch.Tensor` of shape `(rows, ..., features_in)`): The member's block of what the layer was given.
        result (`torch.Tensor` of shape `(rows, ..., features_out)`): Its block of what the base layer made of it.
        in_place (`bool`): Whether to write the sum there.

    Returns:
        `torch.Tensor` of the result's shape and precision.
    """
    lora_A: Any = layer.lora_A[name]
    x = x.to(lora_A.weight.dtype)
    if name in layer.lora_variant:
        combined: torch.Tensor = layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=result)
        combined = combined.to(result.dtype)
        return result.copy_(combined) if in_place else combined
    # As PEFT does: the sum in the adapter's precision, rounded once.
    combined = (result + layer.lora_B[name](lora_A(x)) * layer.scaling[name]).to(result.dtype)
    return result.copy_(combined) if in_place else combined


def _answer_with_heads(
    wrapper: ModulesToSaveWrapper, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> torch.Tensor | None:
    """
    With a route, each member's block of rows goes through that member's head.

    Args:
        wrapper ([`~peft.utils.ModulesToSaveWrapper`]): The wrapper of the heads.
        args (`tuple`): What it is given: features of shape `(members * rows, ..., features)`.
        kwargs (`dict`): What it is given by name.
        output: What the base's own head made of it, which is passed over.

    Returns:
        `torch.Tensor` of shape `(members * rows, ..., classes)`; `None`, and nothing is changed, without a route.
    """
    route = ROUTE.get()
    if not route:
        return None
    rows = length_of(args, kwargs)

    def answer(member: int, head: nn.Module) -> torch.Tensor:
        dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), None)

        def block(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if value.dim() > 0 and len(value) == rows:
                value = route.blocks(value)[member]
            # On a base of another precision than at training; as adapters, a head is what its file says.
            return value.to(dtype) if dtype is not None and value.is_floating_point() else value

        logits: torch.Tensor = head(*map(block, args), **{name: block(value) for name, value in kwargs.items()})
        return logits

    return torch.cat([answer(member, wrapper.modules_to_save[name]) for member, name in enumerate(route.heads)])
