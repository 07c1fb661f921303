"""What lies below every stage of a route: computed once, and cached once, not once for each member."""

import contextlib
import enum
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedModel

from ..errors import CallStoppedError
from .aggregation import logit_fields
from .batches import NOT_ROWS, first_rows, repeat_rows
from .caches import CACHES, cache_of, caches_in, forget_rows, has_cache, holds_one_block, is_plain_cache, repeat_block
from .layers import LayerGroups, outer_lists
from .route import ROUTE, Route, routed
from .scope import Scope
from .uncompiled import uncompiled


# The pass under way whose members share a trunk, if one does.
_TRUNK = Scope("hf_s3t_trunk")
# What says the same for every row, whatever it is.
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, enum.Enum)
# How near two sums of the same products come in a precision, as a share of the largest.
_NEAR = {torch.float64: 1e-8, torch.float32: 1e-4}
_NEAR_IN_HALF = 5e-2


class Trunk:
    """
    One pass of the base for several members, in which layers that no stage adapts compute for one of them.

    The batch holds one block of rows per member, and until the first stage acts all blocks are the same. A layer that
    is given the same for every member answers the same for every one: so it is given the first block, and its answer
    is repeated. Around it nothing sees a difference, but caches: what such a layer keeps there is one block of rows.

    Where a layer is not seen to be given the same for all, it and all after it compute as ever, and the cache is
    repeated for them.

    Args:
        route ([`~hf_s3t.model.route.Route`]): The members.
        rows (`int`): Number of examples, of which each member has a block.
        cache ([`~transformers.Cache`], *optional*): What holds one block of rows from an earlier pass.
    """

    def __init__(self, route: Route, rows: int, cache: Cache | None = None):
        self.route = route
        self.adapted = frozenset(route.by_group)
        self._members = len(route)
        self._rows = rows
        # Whether all blocks are the same by now, as far as is known.
        self._is_whole = True
        self._inside: nn.Module | None = None
        # How often that layer was called again inside of itself: by a hook of the user's that calls the base, say.
        self._again = 0
        # What layers were given and answered last that is known to have the same block for each member: those blocks'
        # tensors, and the first block of those that the layer under way was given.
        self._repeated: dict[int, torch.Tensor] = {}
        self._given: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._caches = [] if cache is None else [cache]

    # Where torch compiles, tensors cannot be compared.
    @uncompiled
    def enter(self, layer: nn.Module, is_adapted: bool, arguments: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """What a layer shall be given in place of its arguments, a tuple and a dict; `None` for these."""
        if self._inside is not None:
            # What a layer that computes for one calls is given what that gives it.
            self._again += self._inside is layer
            return None
        if not self._is_whole:
            return None
        if is_adapted:
            self._is_whole = False
            return None
        args, kwargs = arguments
        self._given = {}
        try:
            first = self._first_of(args), {name: self._first_of(value, name) for name, value in kwargs.items()}
        except _NotTheSameError:
            first = None
        if first is None or not self._given:
            self._give_up()
            return None
        self._repeated = {id(whole): whole for whole, _ in self._given.values()}
        self._inside = layer
        return first

    @uncompiled
    def leave(self, layer: nn.Module, output: Any) -> Any:
        """What a layer's answer is taken for, with a block of rows for every member."""
        if self._inside is not layer:
            return None
        if self._again:
            self._again -= 1
            return None
        self._inside = None
        return self._repeat(output)

    def _first_of(self, value: Any, name: str = "") -> Any:
        if isinstance(value, torch.Tensor):
            return value if name in NOT_ROWS else self._first_block(value)
        if isinstance(value, Cache):
            self._note(value)
            return value
        if type(value) is tuple:
            return tuple(self._first_of(part) for part in value)
        if isinstance(value, _PLAIN):
            return value
        # A layer may write to others, or they say something of the rows that is not seen here.
        raise _NotTheSameError

    def _first_block(self, tensor: torch.Tensor) -> torch.Tensor:
        dimension = self._dimension_of_rows(tensor)
        if dimension is None:
            return tensor
        if self._repeated.get(id(tensor)) is not tensor:
            blocks = tensor.unflatten(dimension, (self._members, self._rows))
            others = blocks.narrow(dimension, 1, self._members - 1)
            if not torch.equal(blocks.narrow(dimension, 0, 1).expand_as(others), others):
                raise _NotTheSameError
        first = tensor.narrow(dimension, 0, self._rows)
        self._given[id(first)] = tensor, first
        return first

    def _dimension_of_rows(self, tensor: torch.Tensor) -> int | None:
        """The first, or the second behind those of positions in time, height and width; `None` if one is for all."""
        sizes, total = tensor.shape, self._members * self._rows
        if sizes[:1] == (total,):
            return 0
        return 1 if tensor.dim() > 2 and sizes[0] > 1 and sizes[1] == total else None

    def _note(self, cache: Cache) -> None:
        if any(cache is known for known in self._caches):
            return
        if not is_plain_cache(cache) or (has_cache({CACHES[0]: cache}) and not holds_one_block(cache, self._rows)):
            raise _NotTheSameError
        self._caches.append(cache)

    def _repeat(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            whole, first = self._given.get(id(value), (None, None))
            if first is value:
                # Handed on as it was.
                return whole
            if value.shape[:1] != (self._rows,):
                return value
            repeated = value.repeat(self._members, *[1] * (value.dim() - 1))
            self._repeated[id(repeated)] = repeated
            return repeated
        return tuple(map(self._repeat, value)) if type(value) is tuple else value

    def _give_up(self) -> None:
        self._is_whole = False
        for cache in self._caches:
            repeat_block(cache, self._rows, self._members)


class _NotTheSameError(Exception):
    """What a layer is given is not seen to be the same for every member."""


def hook_layers(base: PreTrainedModel, layers: LayerGroups) -> None:
    """
    Have the layers of a base go by the trunk of the pass under way, if there is one.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model.
        layers ([`~hf_s3t.model.layers.LayerGroups`]): Which of its layers each stage adapts.
    """
    groups = {name: group for group in range(len(layers.groups)) for name in layers.module_names(group)}
    for path, held in outer_lists(base).items():
        for name, layer in held.named_children():
            enter, leave = _hooks(groups.get(f"{path}.{name}"))
            layer.register_forward_pre_hook(enter, with_kwargs=True)
            layer.register_forward_hook(leave)


def _hooks(group: int | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """What runs before a layer of a group, and after it."""

    def enter(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trunk = _trunk_of_pass()
        return None if trunk is None else trunk.enter(layer, group in trunk.adapted, (args, kwargs))

    def leave(layer: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        trunk = _trunk_of_pass()
        return None if trunk is None else trunk.leave(layer, output)

    return enter, leave


def _trunk_of_pass() -> Trunk | None:
    trunk: Trunk | None = _TRUNK.get()
    # A hook of the user's may call the model inside of a pass: for that the trunk around it is none.
    return trunk if trunk is not None and trunk.route is ROUTE.get() else None


class Trunks:
    """
    Whether the members of a route can share what lies below their stages.

    Whatever reads what a layer left elsewhere than in its answer (keys and values of a lower layer, say) may find one
    block of rows where it needs one per member. So for each choice of inputs, and number of stages, the base is run
    once in either way, over two rows, and the answers are compared.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model.
    """

    def __init__(self, base: PreTrainedModel):
        self._base = base
        self._found: dict[tuple[frozenset[str], bool, frozenset[int]], bool] = {}

    @contextlib.contextmanager
    def shared(self, route: Route, inputs: dict[str, Any], rows: int) -> Iterator[None]:
        """
        Inside, a pass of the base computes once what it does before the stages of a route, where that is possible.

        Args:
            route ([`~hf_s3t.model.route.Route`]): Several members.
            inputs (`dict`): The inputs by name, tensors of shape `(rows, ...)`.
            rows (`int`): Number of examples.
        """
        cache = cache_of(inputs)
        if cache is not None and has_cache(inputs):
            is_shared = is_plain_cache(cache) and holds_one_block(cache, rows)
            trunk = Trunk(route, rows, cache) if is_shared else None
        else:
            # Cropped to nothing, it has the numbers of rows still that other stages had.
            forget_rows(cache)
            trunk = Trunk(route, rows) if self._is_possible(route, inputs, rows) else None
        with _TRUNK.holding(trunk):
            yield

    def _is_possible(self, route: Route, inputs: dict[str, Any], rows: int) -> bool:
        given = frozenset(name for name, value in inputs.items() if value is not None)
        kind = given, self._keeps_cache(inputs), frozenset(route.by_group)
        if kind not in self._found:
            self._found[kind] = self._answers_the_same(route, inputs, rows)
        return self._found[kind]

    def _keeps_cache(self, inputs: dict[str, Any]) -> bool:
        """Whether a pass makes a cache, through which a layer may read what another one left."""
        asked = inputs.get("use_cache")
        return bool(getattr(self._base.config.get_text_config(), "use_cache", False) if asked is None else asked)

    @torch.no_grad()
    def _answers_the_same(self, route: Route, inputs: dict[str, Any], rows: int) -> bool:
        given = {name: value for name, value in inputs.items() if name not in CACHES}
        given |= {"use_cache": True} if caches_in(inputs) else {}
        given, rows = (repeat_rows(given, 1, 2), 2) if rows == 1 else (first_rows(given, rows, 2), 2)
        try:
            as_ever = self._pass(route, given, rows, None)
            shared = self._pass(route, given, rows, Trunk(route, rows))
        except CallStoppedError:
            # Which says nothing of the base.
            raise
        except Exception:
            # Whatever it is: it is found where a base can be run as ever, and nowhere else.
            return False
        return all(_is_near(shared[name], as_ever[name]) for name in logit_fields(as_ever.keys()))

    def _pass(self, route: Route, inputs: dict[str, Any], rows: int, trunk: Trunk | None) -> Any:
        with routed(route), _TRUNK.holding(trunk):
            return self._base(**repeat_rows(inputs, rows, len(route)), return_dict=True)


def _is_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.shape != other.shape:
        return False
    near = _NEAR.get(other.dtype, _NEAR_IN_HALF)
    found = other[other.isfinite()]
    scale = max(1e-6, found.abs().max().item()) if found.numel() else 1.0
    return torch.allclose(one, other, rtol=0, atol=near * scale, equal_nan=True)
