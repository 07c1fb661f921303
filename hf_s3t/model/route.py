"""Which adapters the rows of a batch go through: decided per call, by hooks on the modules that PEFT adapted."""

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Self

import torch
from peft.utils import ModulesToSaveWrapper
from torch import nn

from ..errors import CallStoppedError, NotServedError, S3TError
from ..plan.stages import StageKey
from .peft_layers import AdaptedLayer
from .scope import Scope


# Positional and named arguments of a call of a module.
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Route:
    """
    Which adapters the rows of a batch go through: the batch holds one block of rows per ensemble member.

    Args:
        members (`tuple[StageKey, ...]`): The last stage of each member's stack; without any, the base is by itself.
        stopped (`threading.Event`): Set by a deletion to stop the calls that go this way.
    """

    members: tuple[StageKey, ...]
    stopped: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.members)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A copied cache was made with the same stacks, and they are compared by identity.
        return self

    def refuse_stopped(self) -> None:
        """
        Raise if a deletion stopped the calls that go this way.

        Raises:
            [`~hf_s3t.errors.CallStoppedError`]: With what to do.
        """
        if self.stopped.is_set():
            raise CallStoppedError(
                "A deletion removed a stage that this call was using, and stopped it. Call again, from the full "
                "prompt: the stacks that are left answer."
            )

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Per member the adapter whose head answers: the last surviving stage's."""
        return tuple(key.adapter_name for key in self.members)

    @cached_property
    def by_group(self) -> dict[int, tuple[str | None, ...]]:
        """Per layer group and member the adapter to apply; `None` below the member's stack."""
        depth = max((key.depth for key in self.members), default=0)
        return {
            group: tuple(key.lineage[group].adapter_name if group < key.depth else None for key in self.members)
            for group in range(depth)
        }


class NoWay(Route):
    """Refuses: what computes with an adapted module here is not the model that serves."""

    def refuse_stopped(self) -> None:
        """
        Raise.

        Raises:
            [`~hf_s3t.errors.NotServedError`]: Always.
        """
        raise NotServedError(
            "The base model's own way to generate computes with the base alone, past the stages that serve. Export a "
            "shard with `export_adapter` and use plain PEFT, or call the model for its logits."
        )


# The base by itself answers. Caches are stamped with it where no shard is left.
BASE_ALONE = Route(())

# The route of the call under way; unset, the base behaves as PEFT's active adapters say (which is how stages train).
_ROUTE = Scope("hf_s3t_route")

# While set, the length of what each adapted module and head is given is noted here, call by call.
_LENGTHS = Scope("hf_s3t_lengths")


def hook(module: nn.Module, group: int) -> None:
    """
    Have an adapted module, or the wrapper of a head, go by the route of the call under way.

    Args:
        module (`nn.Module`): PEFT's layer or wrapper.
        group (`int`): The layer group of an adapted module.
    """
    module.register_forward_pre_hook(_note_length, with_kwargs=True)
    if isinstance(module, ModulesToSaveWrapper):
        module.register_forward_hook(_answer_with_heads, with_kwargs=True)
    else:
        module.register_forward_pre_hook(_compute_base_only, with_kwargs=True)
        module.register_forward_hook(_member_adder(group))


@contextlib.contextmanager
def routed(route: Route | None) -> Iterator[None]:
    """Inside, calls of the base in this thread go through the route; `None` for the base as it is."""
    with _ROUTE.holding(route):
        yield


@contextlib.contextmanager
def noting_lengths() -> Iterator[list[int]]:
    """Inside, calls of the base in this thread note the length of what each adapted module and head is given."""
    lengths: list[int] = []
    with _LENGTHS.holding(lengths):
        yield lengths


def cut_graph(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments | None:
    """
    Let no gradient-requiring tensor enter the lowest layer, so that layers below the trained group build no graph.

    Gradient checkpointing and k-bit preparation make embeddings require gradients; with non-reentrant checkpointing
    nothing needs that. An ensemble that serves may be differentiated by its inputs.

    Args:
        module (`nn.Module`): The lowest layer.
        args (`tuple`): What it is given, hidden states of shape `(rows, positions, features)` first.
        kwargs (`dict`): What it is given by name: masks, positions, caches.

    Returns:
        Both, without gradients; `None`, and nothing is changed, with a route.
    """
    if _ROUTE.get() is not None:
        return None
    args = tuple(a.detach() if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args)
    kwargs = {k: v.detach() if isinstance(v, torch.Tensor) and v.requires_grad else v for k, v in kwargs.items()}
    return args, kwargs


def _note_length(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    lengths = _LENGTHS.get()
    if lengths is not None:
        lengths.append(_length(args, kwargs))


def _compute_base_only(layer: AdaptedLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Arguments | None:
    """
    With a route, PEFT computes the base layer alone, whatever adapters are active.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): An adapted layer.
        args (`tuple`): What it is given: a tensor of shape `(members * rows, ..., features_in)`.
        kwargs (`dict`): What it is given by name.
    """
    if _ROUTE.get() is None or layer.disable_adapters:
        return None
    return args, {**kwargs, "adapter_names": ["__base__"] * len(args[0])}


def _member_adder(group: int) -> Callable[[AdaptedLayer, tuple[Any, ...], torch.Tensor], torch.Tensor | None]:
    def add_members(layer: AdaptedLayer, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor | None:
        """
        With a route, add each member's adapter to its block of rows.

        Args:
            layer ([`~peft.tuners.lora.LoraLayer`]): An adapted layer.
            args (`tuple`): What it was given: a tensor of shape `(members * rows, ..., features_in)`.
            output (`torch.Tensor` of shape `(members * rows, ..., features_out)`): What the base layer made of it.

        Returns:
            `torch.Tensor` of the output's shape; the output itself where no gradients are needed.
        """
        route = _ROUTE.get()
        if route is None:
            return None
        route.refuse_stopped()
        names = route.by_group.get(group)
        if names is None:
            return None
        if len(output) % len(names):
            raise S3TError(
                f"An adapted {type(layer).__name__} was given {len(output)} rows for {len(names)} ensemble members: "
                "it selects among them, so they cannot be told apart. Leave it out of `target_modules`."
            )
        in_place = not output.requires_grad and not torch.is_grad_enabled()
        if in_place and _add_products(layer, names, args[0], output):
            return output
        blocks = output.chunk(len(names))
        inputs = args[0].chunk(len(names))
        if in_place:
            for name, x, block in zip(names, inputs, blocks, strict=True):
                if name is not None:
                    _add_adapter(layer, name, x, block, in_place=True)
            return output
        return torch.cat(
            [
                block if name is None else _add_adapter(layer, name, x, block, in_place=False)
                for name, x, block in zip(names, inputs, blocks, strict=True)
            ]
        )

    return add_members


def _add_products(layer: AdaptedLayer, names: Sequence[str | None], x: torch.Tensor, output: torch.Tensor) -> bool:
    """
    Add each member's adapter to its block of rows by one product of matrices, writing nothing in between.

    Args:
        layer ([`~peft.tuners.lora.LoraLayer`]): An adapted layer.
        names (sequence of `str`): Per member the adapter, `None` below its stack.
        x (`torch.Tensor` of shape `(members * rows, ..., features_in)`): What the layer was given.
        output (`torch.Tensor` of shape `(members * rows, ..., features_out)`): What the base layer made of it.

    Returns:
        `bool`: False, and nothing is changed, if they are no plain LoRA of linear layers in the output's precision.
    """
    pairs = _plain_pairs(layer, names, output.dtype) if output.is_contiguous() else None
    if pairs is None:
        return False
    blocks = output.view(-1, output.shape[-1]).chunk(len(names))
    inputs = x.to(output.dtype).flatten(0, -2).chunk(len(names))
    for name, pair, rows, block in zip(names, pairs, inputs, blocks, strict=True):
        if pair is not None:
            low = nn.functional.linear(rows, pair[0].weight)
            block.addmm_(low, pair[1].weight.t(), alpha=layer.scaling[name])
    return True


def _plain_pairs(
    layer: AdaptedLayer, names: Sequence[str | None], dtype: torch.dtype
) -> list[tuple[nn.Linear, nn.Linear] | None] | None:
    """Per member the two linear layers of its adapter, if it has one here; `None` if any adapter is something else."""
    pairs: list[tuple[nn.Linear, nn.Linear] | None] = []
    for name in names:
        if name is None:
            pairs.append(None)
            continue
        lora_A, lora_B = layer.lora_A[name], layer.lora_B[name]
        if name in layer.lora_variant or type(lora_A) is not nn.Linear or type(lora_B) is not nn.Linear:
            return None
        if lora_B.bias is not None or lora_B.weight.dtype != dtype:
            return None
        pairs.append((lora_A, lora_B))
    return pairs


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
    route = _ROUTE.get()
    if not route:
        return None
    rows = _length(args, kwargs)

    def answer(member: int, head: nn.Module) -> torch.Tensor:
        dtype = next((p.dtype for p in head.parameters() if p.is_floating_point()), None)

        def block(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            if value.dim() > 0 and len(value) == rows:
                value = value.chunk(len(route))[member]
            # On a base of another precision than at training; as adapters, a head is what its file says.
            return value.to(dtype) if dtype is not None and value.is_floating_point() else value

        logits: torch.Tensor = head(*map(block, args), **{name: block(value) for name, value in kwargs.items()})
        return logits

    return torch.cat([answer(member, wrapper.modules_to_save[name]) for member, name in enumerate(route.heads)])


def _length(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Length of the first tensor that a module is given: how many rows it has, where rows come first."""
    return next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
