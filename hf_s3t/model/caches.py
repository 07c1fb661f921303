"""Caches of keys and values: whose they are, and whether they still may be used."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import S3TError, StaleCacheError
from .gating import Gating
from .route import BASE_ALONE, Route


# The names under which models take and return a `Cache`.
CACHES = ("past_key_values", "cache_params")
# And under which some carry a state from call to call.
_STATES = (*CACHES, "mems", "state")
_WITH_A_CACHE = {"use_cache", "cache_position", "attention_mask", "position_ids", *CACHES}


def without_cache(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs without a cache and the masks and positions that may go with it."""
    return {name: value for name, value in inputs.items() if name not in _WITH_A_CACHE}


def caches_in(values: Mapping[str, Any]) -> dict[str, Cache]:
    """What of a call's inputs or outputs is a cache of keys and values, or of states, by name."""
    return {name: values[name] for name in CACHES if isinstance(values.get(name), Cache)}


def cache_of(values: Mapping[str, Any]) -> Cache | None:
    """The cache among a call's inputs or outputs."""
    for name in CACHES:
        value = values.get(name)
        if isinstance(value, Cache):
            return value
    return None


def has_cache(values: Mapping[str, Any]) -> bool:
    """Whether there is one with something in it."""
    cache = cache_of(values)
    return cache is not None and not _is_empty(cache)


def stamp_cache(cache: Cache | None, route: Route, gating: Gating | None = None) -> None:
    """Remember which stacks filled a cache, and with which rows if not all of them with all."""
    if cache is not None:
        vars(cache).update(_s3t_route=route, _s3t_gating=gating)


def gating_of_cache(cache: Cache | None) -> Gating | None:
    """Which members filled a cache with which rows; `None` where all did with all, or where it is empty."""
    gating: Gating | None = getattr(cache, "_s3t_gating", None)
    return gating if cache is None or gating is None or not _is_empty(cache) else None


def forget_rows(cache: Cache | None) -> None:
    """Let a cache that was cropped to nothing be filled with another number of rows than it had."""
    if cache is not None and is_plain_cache(cache) and _is_empty(cache):
        cache.reset()


def check_cache(cache: Cache | None, route: Route) -> None:
    """
    Refuse a filled cache that other stacks than the route's made.

    Raises:
        [`~hf_s3t.errors.StaleCacheError`]: With what to do.
    """
    if cache is None or getattr(cache, "_s3t_route", None) is route:
        return
    if not _is_empty(cache):
        raise StaleCacheError(
            "`past_key_values` was made before a deletion changed the stacks that answer, or by another model. Start "
            "again without it, from the full prompt."
        )


def _is_empty(cache: Cache) -> bool:
    # Some models add a store of their own, beside layers that stay empty.
    stores = [value for name, value in vars(cache).items() if name != "layers"]
    return not any(map(_is_filled, cache.layers)) and not any(map(_holds_tensors, stores))


def _is_filled(layer: Any) -> bool:
    states = getattr(layer, "has_previous_state", {})
    return any(states.values()) or (hasattr(layer, "get_seq_length") and bool(layer.get_seq_length() > 0))


def _holds_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensors, value))
    return isinstance(value, torch.Tensor) and value.numel() > 0


def refuse_other_state(inputs: dict[str, Any]) -> None:
    """
    Refuse what recurrent models carry from call to call: nobody could tell which stacks it was made with.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Naming it.
    """
    for name in _STATES:
        value = inputs.get(name)
        if value is not None and not (name in CACHES and isinstance(value, Cache)):
            raise S3TError(
                f"`{name}` holds state that an ensemble cannot tell fresh from stale. Call without it, with "
                "use_cache=False."
            )


# Kinds of layers that hold keys and values, one entry per row, and nothing else.
_PLAIN_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


def is_plain_cache(cache: Cache) -> bool:
    """Whether the layers of a cache may be of unlike many rows: each keeps what it is given, for itself."""
    made = cache.layer_class_to_replicate
    kinds = {*map(type, cache.layers), *([] if made is None else [made])}
    return type(cache) is DynamicCache and not cache.offloading and kinds <= set(_PLAIN_LAYERS)


def holds_one_block(cache: Cache, rows: int) -> bool:
    """
    Whether some layers of a cache that several members filled hold one block of rows for all of them.

    Args:
        cache ([`~transformers.Cache`]): The cache.
        rows (`int`): Number of rows of a block.
    """
    return any(_holds(layer, rows) for layer in getattr(cache, "layers", ()))


def repeat_block(cache: Cache, rows: int, members: int) -> None:
    """Give every member a block of its own in those layers of a cache that hold one for all of them."""
    layers: list[Any] = cache.layers
    for layer in layers:
        if _holds(layer, rows):
            layer.reorder_cache(torch.arange(rows).repeat(members))


def _holds(layer: Any, rows: int) -> bool:
    keys = getattr(layer, "keys", None)
    return isinstance(keys, torch.Tensor) and keys.dim() > 1 and len(keys) == rows


def reorder_cache(cache: Any, beam_idx: torch.Tensor) -> Any:
    """
    Reorder a cache for beam search: the same beams in the block of rows of every member that filled it.

    Args:
        cache ([`~transformers.Cache`]):
            The cache, of `members * rows` rows, or of each member's where a gate says who answers which; of `rows` in
            layers that no stage adapts.
        beam_idx (`torch.Tensor` of shape `(rows,)`): For each row the one that it goes on from.
    """
    gating = gating_of_cache(cache)
    if gating is not None and not gating.is_full:
        after, entries = gating.reordered(beam_idx)
        vars(cache)["_s3t_gating"] = after
        cache.reorder_cache(entries)
        return cache
    rows, members = len(beam_idx), max(1, len(getattr(cache, "_s3t_route", BASE_ALONE)))
    of_all = torch.cat([beam_idx + member * rows for member in range(members)])
    if members > 1 and holds_one_block(cache, rows):
        for layer in cache.layers:
            layer.reorder_cache(beam_idx if _holds(layer, rows) else of_all)
    else:
        cache.reorder_cache(of_all)
    return cache
