"""Where rows go that come after the first partition: into new shards, or into slices that are grown again."""

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np

from ..errors import EmptySliceError, counted
from .partition import Name, in_turns, shards_and_slices
from .stages import StageKey


# The number of a shard and of a slice in it.
Place = tuple[int, int]


def num_new_shards(num_rows: int, shard_sizes: Sequence[int]) -> int:
    """
    How many shards of about the present size rows make.

    Args:
        num_rows (`int`): How many rows come.
        shard_sizes (sequence of `int`): How many rows each shard has now.

    Example:

    ```python
    >>> from hf_s3t.plan.later_rows import num_new_shards

    >>> [num_new_shards(rows, [100, 98]) for rows in (20, 140, 160)]
    [1, 1, 2]
    ```
    """
    present = [size for size in shard_sizes if size]
    mean = sum(present) / len(present) if present else num_rows
    return max(1, round(num_rows / mean))


def into_new_shards(
    ids: Sequence[Name],
    units: Sequence[Name] | None,
    shard_sizes: Sequence[int],
    num_slices: int,
    seed: int,
    key: bytes | None,
) -> list[Place]:
    """
    The place of each row where whole shards are made of them, which come after those that there are.

    Args:
        ids (sequence): The id of each row.
        units (sequence, *optional*): Per row the name of what must lie in one slice.
        shard_sizes (sequence of `int`): How many rows each shard has now.
        num_slices (`int`): Number of slices per shard.
        seed (`int`): The system's seed.
        key (`bytes`, *optional*): As of [`~hf_s3t.plan.partition.assign`].

    Raises:
        [`~hf_s3t.errors.EmptySliceError`]: If they cannot fill one shard.
    """
    distinct = len(ids if units is None else set(units))
    if distinct < num_slices:
        raise EmptySliceError(
            f"{counted(distinct, 'example' if units is None else 'group')} cannot fill the {num_slices} slices of a "
            f'new shard, expected at least {num_slices}. Add them with into="slices".'
        )
    shards = min(num_new_shards(len(ids), shard_sizes), distinct // num_slices)
    found, slices = shards_and_slices(ids, num_shards=shards, num_slices=num_slices, seed=seed, groups=units, key=key)
    first = len(shard_sizes)
    return [(first + shard, slice_) for shard, slice_ in zip(found.tolist(), slices.tolist(), strict=True)]


def cheapest_slices(
    count: int,
    places: Sequence[Place],
    stages: Collection[StageKey],
    work: Callable[[Collection[StageKey]], float],
    chosen: Collection[Place] = (),
) -> list[Place]:
    """
    The slices that cost least to grow again together: one after the other that which adds least work to those chosen.

    Args:
        count (`int`): How many.
        places (sequence of `(shard, slice)`): Those there are; among equals the first is chosen.
        stages (collection of [`~hf_s3t.plan.stages.StageKey`]): The stages that are there: those of a slice go.
        work (callable): What growing stages again costs.
        chosen (collection of `(shard, slice)`): What is grown again in any case.

    Example:

    ```python
    >>> from hf_s3t.plan import StageKey
    >>> from hf_s3t.plan.later_rows import cheapest_slices

    >>> stages = [StageKey(0, (0,)), StageKey(0, (0, 1))]
    >>> cheapest_slices(1, [(0, 0), (0, 1)], stages, work=len)
    [(0, 1)]
    ```
    """
    left = {place: [key for key in stages if key.saw({place})] for place in places}
    gone = {key for key in stages if key.saw(set(chosen))}
    found: list[Place] = []
    for _ in range(min(count, len(left))):
        cost = {place: work([key for key in own if key not in gone]) for place, own in left.items()}
        best = min(left, key=cost.__getitem__)
        found.append(best)
        gone.update(left.pop(best))
    return found


def dealt_into(
    ids: Sequence[Name],
    units: Sequence[Name],
    places: Sequence[Place],
    sizes: Mapping[Place, int],
    seed: int,
    key: bytes | None,
) -> list[Place]:
    """
    The place of each row where they are dealt into some slices, the emptiest first, in the order of a hash.

    Args:
        ids (sequence): The id of each row.
        units (sequence): Per row the name of what must lie in one slice.
        places (sequence of `(shard, slice)`): The slices.
        sizes (mapping): How many rows each of them has.
        seed (`int`): The system's seed.
        key (`bytes`, *optional*): As of [`~hf_s3t.plan.partition.assign`].
    """
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    unit_of = np.fromiter(map(numbers.__getitem__, units), np.int64, len(units))
    rows = np.bincount(unit_of)
    emptiest = [(sizes[place], number) for number, place in enumerate(places)]
    heapq.heapify(emptiest)
    dealt: dict[int, Place] = {}
    for unit in in_turns(ids, list(numbers), unit_of, seed, key).tolist():
        load, number = emptiest[0]
        dealt[unit] = places[number]
        heapq.heapreplace(emptiest, (load + int(rows[unit]), number))
    return [dealt[unit] for unit in unit_of.tolist()]
