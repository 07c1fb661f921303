"""
Families of stages: what a shard trains, as sets of slices.

How deep a shard serves depends on the sets of slices that its stages saw, not on their orders. So it needs no two
stages of one set: a *family* has a first prefix for each of its sets, and every set has a parent in it, itself less
one slice. Between one chain and the *lattice* of all sets lie families for any amount of work.
"""

import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np

from ..config import (
    FAMILY_MOST_SLICES,
    LATTICE_MOST_SLICES,
    OPTIMAL_MOST_SLICES,
    check_prior,
    require_horizon,
    require_int,
)
from ..errors import ConfigError
from .optimal import hit_set_weights, mean_depth_weights
from .rules import select_sequences


# Work is counted in whole numbers of such parts, so that no order of adding matters; and a budget that is the sum of
# the same floats in another order pays for it still.
_PARTS = 2**40
_SLACK = 2**11


def stage_work(depth: int, num_slices: int, replay: float = 1.0) -> float:
    """
    What training one stage costs, in full LoRA fine-tunings of the same shard for as many epochs.

    A step goes forward through all layers and backward through the trained group and those above it; an epoch sees the
    new slice and a share of the earlier ones.

    Args:
        depth (`int`): Depth of the stage.
        num_slices (`int`): Number of slices `L` of the shard.
        replay (`float`, defaults to 1.0): Share of the earlier slices' rows that an epoch sees.

    Example:

    ```python
    >>> from hf_s3t.sequences.families import stage_work

    >>> [stage_work(depth, 2) for depth in (1, 2)]
    [0.375, 1.0]
    ```
    """
    return (1 + replay * (depth - 1)) / num_slices * (num_slices + depth) / (2 * num_slices)


def work_of(prefixes: Iterable[Sequence[int]], num_slices: int, replay: float = 1.0) -> float:
    """
    What training some stages costs, in full LoRA fine-tunings of the same shard for as many epochs.

    Args:
        prefixes (`list[tuple[int, ...]]`): The stages.
        num_slices (`int`): Number of slices `L` of the shard.
        replay (`float`, defaults to 1.0): Share of the earlier slices' rows that an epoch sees.

    Example:

    ```python
    >>> from hf_s3t.sequences.families import lattice, work_of

    >>> work_of(lattice(4), 4)
    6.5
    ```
    """
    return math.fsum(stage_work(len(prefix), num_slices, replay) for prefix in prefixes)


def stages_of(sequences: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """
    Every prefix of some sequences once, in the order of first use: the stages that are published.

    Example:

    ```python
    >>> from hf_s3t.sequences.families import stages_of

    >>> stages_of([(0, 1), (1, 0)])
    ((0,), (0, 1), (1,), (1, 0))
    ```
    """
    return tuple(dict.fromkeys(tuple(q[:depth]) for q in sequences for depth in range(1, len(q) + 1)))


def family_of(sequences: Iterable[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """
    The stages of some sequences without idle ones: for each set of slices the first prefix.

    A later set stands on the first prefix of its parent's set. Whatever is hit, these stages serve as deep as all.

    Example:

    ```python
    >>> from hf_s3t.sequences.families import family_of

    >>> family_of([(0, 1, 2), (1, 0, 2), (2, 0, 1)])
    ((0,), (0, 1), (0, 1, 2), (1,), (2,), (2, 0))
    ```
    """
    first: dict[frozenset[int], tuple[int, ...]] = {frozenset(): ()}
    for prefix in stages_of(sequences):
        first.setdefault(frozenset(prefix), (*first[frozenset(prefix[:-1])], prefix[-1]))
    return tuple(first.values())[1:]


def lattice(num_slices: int) -> tuple[tuple[int, ...], ...]:
    """
    One stage for each set of slices, which serve as deep as all `L!` sequences; the slices of each in ascending order.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there are too many slices.

    Example:

    ```python
    >>> from hf_s3t.sequences.families import lattice

    >>> lattice(2)
    ((0,), (1,), (0, 1))
    ```
    """
    require_int("num_slices", num_slices, 1)
    if num_slices > LATTICE_MOST_SLICES:
        raise ConfigError(
            f"num_slices={num_slices}, but a lattice has one stage for each set of at most {LATTICE_MOST_SLICES} "
            f"slices. Lower `num_slices`, or use `best_family` up to {FAMILY_MOST_SLICES}."
        )
    return _prefixes(num_slices, range(1, 1 << num_slices))


def depths_of_hit_sets(prefixes: Iterable[Sequence[int]], num_slices: int) -> np.ndarray:
    """
    The depth that a shard serves for every set of hit slices.

    Args:
        prefixes (`list[tuple[int, ...]]`): The stages. Those below them count as there, named or not.
        num_slices (`int`): Number of slices `L` of the shard.

    Returns:
        `np.ndarray`: One whole number per set of slices, given as a bit mask: the size of the largest set that avoids
        it, 0 where none does.

    Example:

    ```python
    >>> from hf_s3t.sequences.families import depths_of_hit_sets

    >>> depths_of_hit_sets([(0,), (0, 1), (1,)], 2).tolist()
    [2, 1, 1, 0]
    ```
    """
    states = np.arange(1 << num_slices)
    deepest = np.zeros(len(states), dtype=np.int8)
    for state in {_mask(prefix) for prefix in stages_of(prefixes)}:
        np.maximum(deepest, np.where(states & state, 0, state.bit_count()), out=deepest, casting="unsafe")
    return deepest


def expected_depth(
    prefixes: Iterable[Sequence[int]],
    num_slices: int,
    prior: Sequence[float] | None = None,
    horizon: int = 100,
) -> float:
    """
    The depth that a shard serves on average over the first requests that hit it, nothing being trained again.

    Args:
        prefixes (`list[tuple[int, ...]]`): The stages.
        num_slices (`int`): Number of slices `L` of the shard, at most 10.
        prior (`list[float]`, *optional*): Probability of each slice to be hit by a request; uniform if not given.
        horizon (`int`, defaults to 100): Number of requests; with 0, the depth before any.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the number of slices, the prior or the horizon is invalid.

    Example:

    ```python
    >>> from hf_s3t.sequences.families import expected_depth

    >>> expected_depth([(0,), (0, 1), (1,)], 2, horizon=1)
    1.0
    ```
    """
    likelihoods = _likelihoods(num_slices, prior, horizon)
    depths = depths_of_hit_sets(prefixes, num_slices)
    if horizon == 0:
        return float(depths[0])
    weights = mean_depth_weights(list(likelihoods), horizon)
    return math.fsum(weights * depths) / horizon


def best_family(
    num_slices: int,
    work_budget: float,
    prior: Sequence[float] | None = None,
    horizon: int = 100,
    replay: float = 1.0,
) -> tuple[tuple[int, ...], ...]:
    """
    Search the family with the greatest [`expected_depth`] for at most some work, one chain to full depth in it.

    Args:
        num_slices (`int`):
            Number of slices `L` of the shard, at most 10.
        work_budget (`float`):
            The most that all stages may cost, as [`work_of`] counts it.
        prior (`list[float]`, *optional*):
            Probability of each slice to be hit by a request; uniform if not given.
        horizon (`int`, defaults to 100):
            Number of requests that hit the shard over which the depth is averaged.
        replay (`float`, defaults to 1.0):
            Share of the earlier slices' rows that an epoch sees: what deep stages cost beside others.

    Returns:
        `tuple[tuple[int, ...], ...]`: The first prefix of each set, parents before children.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range, or the work does not pay for one chain.

    Example:

    ```python
    >>> from hf_s3t.sequences.families import best_family

    >>> best_family(3, 2.5)
    ((0,), (1,), (2,), (0, 1), (0, 1, 2))
    ```
    """
    likelihoods = _likelihoods(num_slices, prior, horizon)
    for name, value, most in ("work_budget", work_budget, math.inf), ("replay", replay, 1):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
            bounds = "from 0 to 1" if most == 1 else "of at least 0"
            raise ConfigError(f"`{name}` must be a number {bounds}, got {value!r}.")
    chain = work_of(stages_of([range(num_slices)]), num_slices, replay)
    # As many full trainings as there are sets pay for all of them.
    affordable = round(min(work_budget, 2.0**num_slices) * _PARTS) + _SLACK
    if round(chain * _PARTS) > affordable:
        raise ConfigError(
            f"work_budget={work_budget:g}, but one chain of num_slices={num_slices} stages costs "
            f"{math.ceil(chain * 1e4) / 1e4:g} at replay={replay:g}. Give at least so much, or lower `replay`."
        )
    return _best_family(likelihoods, affordable, horizon, float(replay))


def _likelihoods(num_slices: int, prior: Sequence[float] | None, horizon: int) -> tuple[float, ...]:
    """The prior, checked."""
    require_int("num_slices", num_slices, 1)
    if num_slices > FAMILY_MOST_SLICES:
        raise ConfigError(
            f"num_slices={num_slices}, but families are weighed over the sets of at most {FAMILY_MOST_SLICES} slices. "
            "Lower `num_slices`, or plan sequences by `budget`."
        )
    require_horizon("horizon", horizon)
    if prior is None:
        return (1 / num_slices,) * num_slices
    check_prior(prior, num_slices)
    return tuple(map(float, prior))


def _mask(prefix: Iterable[int]) -> int:
    return sum(1 << s for s in prefix)


def _prefixes(num_slices: int, sets: Iterable[int]) -> tuple[tuple[int, ...], ...]:
    """The first prefix of each set, small sets first: a set stands on that without its highest slice, if it can."""
    prefixes: dict[int, tuple[int, ...]] = {0: ()}
    for state in sorted(sets, key=lambda state: (state.bit_count(), [s for s in range(num_slices) if state >> s & 1])):
        last = max(s for s in range(num_slices) if state >> s & 1 and state ^ 1 << s in prefixes)
        prefixes[state] = (*prefixes[state ^ 1 << last], last)
    return tuple(prefixes.values())[1:]


# -- search -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=64)  # the shards of a system ask the same question
def _best_family(
    prior: tuple[float, ...], affordable: int, horizon: int, replay: float
) -> tuple[tuple[int, ...], ...]:
    size = len(prior)
    search = _Search(prior, horizon, replay)
    starts = [family for family in _starts(prior, horizon) if search.work(family) <= affordable]
    found = [search.filled(start, affordable) for start in starts]
    return _prefixes(size, max(found, key=search.rank))


def _starts(prior: tuple[float, ...], horizon: int) -> list[frozenset[int]]:
    """The sets of what every rule plans, and of all there are."""
    size = len(prior)
    methods = ["cyclic", "cyclic-paper", "bms", "sorted-cyclic"]
    if size <= OPTIMAL_MOST_SLICES:
        methods.append("optimal")
    planned = [
        select_sequences(size, budget, method, list(prior), horizon)
        for method, budget in itertools.product(methods, range(1, size + 1))
    ]
    families = [frozenset(map(_mask, stages_of(sequences))) for sequences in planned]
    return [*families, frozenset(range(1, 1 << size))]


class _Search:
    """Exact gains of sets, for one prior, horizon and replay."""

    def __init__(self, prior: tuple[float, ...], horizon: int, replay: float):
        self.size = len(prior)
        self.states = np.arange(1 << self.size)
        # By the slices that are left, not by those that are hit.
        self.weights = hit_set_weights(prior, horizon)[::-1]
        self.sizes = np.bitwise_count(self.states).astype(np.int64)
        self.costs = [0] + [round(stage_work(depth, self.size, replay) * _PARTS) for depth in range(1, self.size + 1)]

    def work(self, family: Iterable[int]) -> int:
        return sum(self.costs[state.bit_count()] for state in family)

    def served(self, family: Iterable[int]) -> np.ndarray:
        """The depth that is served, for every set of slices that are left."""
        deepest = np.zeros(len(self.states), dtype=np.int64)
        for state in family:
            np.maximum(deepest, np.where(state & ~self.states, 0, state.bit_count()), out=deepest)
        return deepest

    def rank(self, family: frozenset[int]) -> tuple[float, int, list[int]]:
        """Of equally deep families the one that costs least is best, then that of the lowest sets."""
        return (
            float(self.weights @ self.served(family)),
            -self.work(family),
            sorted((-s for s in family), reverse=True),
        )

    def filled(self, family: frozenset[int], affordable: int) -> frozenset[int]:
        """Add the set that gains most for its work, and again, as long as something is gained."""
        sets, left = set(family), affordable - self.work(family)
        while True:
            served = self.served(sets)
            best = (0.0, 0)
            for state in map(int, self.states[1:]):
                below = any(state ^ 1 << s in sets or state == 1 << s for s in range(self.size) if state >> s & 1)
                cost = self.costs[state.bit_count()]
                if state not in sets and below and cost <= left:
                    above = self.states & state == state
                    gain = float(self.weights[above] @ np.maximum(state.bit_count() - served[above], 0))
                    best = max(best, (gain / cost, -state))
            if best[0] == 0:
                return frozenset(sets)
            sets.add(-best[1])
            left -= self.costs[(-best[1]).bit_count()]
