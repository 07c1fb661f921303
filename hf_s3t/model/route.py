"""Which adapters the rows of a batch go through: decided per call."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from ..errors import CallStoppedError, NotServedError
from ..plan.stages import StageKey
from .scope import Scope


# Up to so many rows, counted with their positions, blocks are multiplied together: padded to one size they are few
# calls, and no more than so many times the work. Beyond, a block is a product of its own.
_FEW = 1024
_MUCH_PADDING = 4


class Padding(NamedTuple):
    """
    Blocks of unequal size as blocks of equal size, one for each member of the whole route.

    Args:
        taken (`torch.Tensor` of shape `(members * longest,)`): Which row to put there; any where a block is shorter.
        places (`torch.Tensor` of shape `(rows,)`): Where each row has been put.
    """

    taken: torch.Tensor
    places: torch.Tensor


# Positional and named arguments of a call of a module.
_Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Route:
    """
    Which adapters the rows of a batch go through: the batch holds one block of rows per ensemble member.

    Args:
        members (`tuple[StageKey, ...]`): The last stage of each member's stack; without any, the base is by itself.
        stopped (`threading.Event`): Set by a deletion to stop the calls that go this way.
        sizes (`tuple[int, ...]`, *optional*): How many rows each member's block has; equally many if not given.
        whole ([`Route`], *optional*): The route of which these are some of the members.

    Example:

    ```python
    >>> import torch
    >>> from hf_s3t.model.route import Route
    >>> from hf_s3t.plan import StageKey

    >>> route = Route((StageKey(0, (0,)), StageKey(1, (0,))), sizes=(1, 2))
    >>> [len(block) for block in route.blocks(torch.zeros(6, 4))]  # three rows of two positions
    [2, 4]
    ```
    """

    members: tuple[StageKey, ...]
    stopped: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)
    sizes: tuple[int, ...] | None = None
    whole: "Route | None" = field(default=None, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.members)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # A copied cache was made with the same stacks, and they are compared by identity.
        return self

    @cached_property
    def num_rows(self) -> int:
        """By what the rows of a batch can be divided: how many there are, or how many blocks of equal size."""
        return len(self.members) if self.sizes is None else sum(self.sizes)

    def blocks(self, rows: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """
        The block of each member.

        Args:
            rows (`torch.Tensor` of shape `(rows, ...)` or `(rows * positions, ...)`): What a module is given.
        """
        if self.sizes is None:
            return rows.chunk(len(self.members))
        return torch.split(rows, self._lengths(len(rows)))

    def _lengths(self, total: int) -> list[int]:
        lengths = self._lengths_by_total.get(total)
        if lengths is None:
            lengths = [size * (total // self.num_rows) for size in self.sizes or ()]
            self._lengths_by_total[total] = lengths
        return lengths

    @cached_property
    def _lengths_by_total(self) -> dict[int, list[int]]:
        # Every layer of every token asks.
        return {}

    def padding(self, total: int, device: torch.device) -> Padding | None:
        """
        How the blocks can be multiplied together; `None` where that is not worth it.

        Args:
            total (`int`): How many rows a module is given, or rows and positions.
            device (`torch.device`): Where they are.
        """
        if self.whole is None or total > _FEW:
            return None
        kind = total, device
        if kind not in self._paddings:
            self._paddings[kind] = self._padding(total, device, self.whole)
        return self._paddings[kind]

    def _padding(self, total: int, device: torch.device, whole: "Route") -> Padding | None:
        lengths = self._lengths(total)
        longest = max(lengths)
        if len(whole) * longest > _MUCH_PADDING * total:
            return None
        begins = [whole.members.index(tip) * longest for tip in self.members]
        places = torch.cat([torch.arange(at, at + n) for at, n in zip(begins, lengths, strict=True)])
        taken = torch.zeros(len(whole) * longest, dtype=torch.long).scatter_(0, places, torch.arange(total))
        return Padding(taken.to(device), places.to(device))

    @cached_property
    def _paddings(self) -> dict[tuple[int, torch.device], Padding | None]:
        return {}

    @cached_property
    def is_stopped(self) -> Callable[[], bool]:
        """Says whether `refuse_stopped` would raise: what layers ask, before they call that."""
        return self.stopped.is_set

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

    @cached_property
    def is_stopped(self) -> Callable[[], bool]:
        """As ever."""
        return lambda: True

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
ROUTE = Scope("hf_s3t_route")

# While set, the length of what each adapted module and head is given is noted here, call by call.
LENGTHS = Scope("hf_s3t_lengths")


@contextlib.contextmanager
def routed(route: Route | None) -> Iterator[None]:
    """Inside, calls of the base in this thread go through the route; `None` for the base as it is."""
    with ROUTE.holding(route):
        yield


@contextlib.contextmanager
def noting_lengths() -> Iterator[list[int]]:
    """Inside, calls of the base in this thread note the length of what each adapted module and head is given."""
    lengths: list[int] = []
    with LENGTHS.holding(lengths):
        yield lengths


def length_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Length of the first tensor that a module is given: how many rows it has, where rows come first."""
    return next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


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
    if ROUTE.get() is not None:
        return None
    args = tuple(a.detach() if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args)
    kwargs = {k: v.detach() if isinstance(v, torch.Tensor) and v.requires_grad else v for k, v in kwargs.items()}
    return args, kwargs
