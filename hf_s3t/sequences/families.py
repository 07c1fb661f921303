"""
Families of stages: what a shard trains, as sets of slices.

How deep a shard serves depends on the sets of slices that its stages saw, not on their orders. So it needs no two
stages of one set: a *family* has a first prefix for each of its sets, and every set has a parent in it, itself less
one slice. Between one chain and the *lattice* of all sets lie families for any amount of work.
"""

import functools
import itertools
import math
import random
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from ..checks import check_prior, require_chain, require_horizon, require_int
from ..config import FAMILY_MOST_SLICES, LATTICE_MOST_SLICES, OPTIMAL_MOST_SLICES
from ..errors import ConfigError
from .optimal import hit_set_weights, mean_depth_weights
from .rules import select_sequences


# Work is counted in whole numbers of such parts, so that no order of adding matters; and a budget that is the sum of
# the same floats in another order pays for it still.
_PARTS = 2**40
_SLACK = 2**11
# Of so few slices all families are looked at.
_LISTED_SLICES = 4
# So many of the families that are found first are made better, each until so many changes in a row were none, by this
# seed.
_EXCHANGED = 3
_ROUNDS = 60
_SEED = 20261129


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


def depths_of_hit_sets(prefixes: Iterable[Sequence[int]], num_slices: int | None = None) -> np.ndarray:
    """
    The depth that a shard serves for every set of hit slices.

    Args:
        prefixes (`list[tuple[int, ...]]`): The stages. Those below them count as there, named or not.
        num_slices (`int`, *optional*): Number of slices `L` of the shard; the length of the longest if not given.

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
    prefixes = list(prefixes)
    num_slices = max(map(len, prefixes)) if num_slices is None else num_slices
    depths = np.zeros(1 << num_slices, dtype=np.int8)
    for prefix in prefixes:
        missed = len(depths) - 1
        for depth, s in enumerate(prefix, start=1):
            missed ^= 1 << s
            depths[missed] = depth
    for bit in range(num_slices):
        # What misses a set of hits misses all that is within it.
        without, with_ = depths.reshape(-1, 2, 1 << bit).swapaxes(0, 1)
        np.maximum(without, with_, out=without)
    return depths


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
    require_chain("work_budget", work_budget, num_slices, replay)
    # As many full trainings as there are sets pay for all of them.
    affordable = round(min(work_budget, 2.0**num_slices) * _PARTS) + _SLACK
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
    search = _Search(prior, horizon, replay, affordable)
    if size <= _LISTED_SLICES:
        return _prefixes(size, search.best_of_all())
    starts = [family for family in _starts(prior, horizon) if search.work(family) <= affordable]
    # What is filled from nothing begins with one chain to full depth, the one that serves most.
    found = sorted((search.filled(family) for family in [search.chain(), *starts]), key=search.rank, reverse=True)
    best = max((search.exchanged(family) for family in found[:_EXCHANGED]), key=search.rank)
    return _prefixes(size, best)


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
    return list(dict.fromkeys([*families, frozenset(range(1, 1 << size))]))


class _Search:
    """
    Families of sets, as bit masks, for one prior, horizon, replay and amount of work.

    A chain of sets, each with one slice more, gains for every one of them the weight of the states that have it and
    are served less than its size. So what a chain gains and costs are sums along it, and the chain that gains most for
    its work is found by dynamic programming over sets: the one that gains most beyond so much for each unit of work,
    and again with what it gains itself, until that is no more (Dinkelbach's method).
    """

    def __init__(self, prior: tuple[float, ...], horizon: int, replay: float, affordable: int):
        self.size, self.affordable = len(prior), affordable
        self.states = np.arange(1 << self.size)
        self.everything = len(self.states) - 1
        # By the slices that are left, not by those that are hit.
        self.weights = hit_set_weights(prior, horizon)[::-1]
        self.sizes = np.bitwise_count(self.states).astype(np.int64)
        self.levels = [self.states[self.sizes == size] for size in range(1, self.size + 1)]
        self.below = [self._below(level) for level in self.levels]
        work = [0] + [round(stage_work(depth, self.size, replay) * _PARTS) for depth in range(1, self.size + 1)]
        self.costs = np.array(work, dtype=np.int64)[self.sizes]

    def work(self, family: Iterable[int]) -> int:
        return int(self.costs[list(family)].sum())

    def served(self, family: Iterable[int]) -> np.ndarray:
        """The depth that is served, for every set of slices that are left."""
        deepest = np.zeros(len(self.states), dtype=np.int64)
        members = np.fromiter(family, dtype=np.int64)
        deepest[members] = self.sizes[members]
        for bit in range(self.size):
            without, with_ = self._halves(deepest, bit)
            np.maximum(with_, without, out=with_)
        return deepest

    def value(self, family: Iterable[int]) -> float:
        return float(self.weights @ self.served(family))

    def rank(self, family: frozenset[int]) -> tuple[float, int, list[int]]:
        """Of equally deep families the one that costs least is best, then that of the lowest sets."""
        return self.value(family), -self.work(family), sorted((-s for s in family), reverse=True)

    def best_of_all(self) -> frozenset[int]:
        """The best of all families, of few slices."""
        inner = self.states[1:-1]
        chosen = (np.arange(1 << len(inner))[:, None] >> np.arange(len(inner)) & 1).astype(bool)
        chosen = np.hstack([chosen, np.ones((len(chosen), 1), dtype=bool)])
        is_tree = np.ones(len(chosen), dtype=bool)
        for place, state in enumerate(map(int, self.states[1:])):
            below = [state - (1 << s) - 1 for s in range(self.size) if state >> s & 1 and state != 1 << s]
            if below:
                is_tree &= ~chosen[:, place] | chosen[:, below].any(axis=1)
        chosen = chosen[is_tree & (chosen @ self.costs[1:] <= self.affordable)]
        served = np.zeros((len(chosen), len(self.states)), dtype=np.int64)
        for place, state in enumerate(map(int, self.states[1:])):
            depth = np.where(self.states & state == state, self.sizes[state], 0)
            np.maximum(served, chosen[:, place : place + 1] * depth, out=served)
        values = served @ self.weights
        families = [frozenset((np.flatnonzero(row) + 1).tolist()) for row in chosen[values == values.max()]]
        return max(families, key=self.rank)

    def chain(self) -> frozenset[int]:
        """The chain to full depth that serves most."""
        gains = self._gains(np.zeros(len(self.states), dtype=np.int64))
        *_, before = self._along(gains, 0.0, self.states > 0)
        return frozenset(self._back(self.everything, before, frozenset()))

    def filled(self, family: frozenset[int]) -> frozenset[int]:
        """Add the chain that gains most for its work, and again, as long as something is gained."""
        sets = set(family)
        while (chain := self._best_chain(sets)) is not None:
            sets.update(chain)
        return frozenset(sets)

    def exchanged(self, family: frozenset[int]) -> frozenset[int]:
        """Take some sets out on which nothing stands, and fill up again, as long as something becomes better."""
        best, reached, rng, failed = family, self.rank(family), random.Random(_SEED), 0
        while failed < _ROUNDS:
            sets = set(best)
            # Python promises the stream of `random()` alone.
            for _ in range(1 + int(rng.random() * 4)):
                free = sorted(self._removable(sets))
                if free:
                    sets.remove(free[int(rng.random() * len(free))])
            other = self.filled(frozenset(sets))
            failed += 1
            if (rank := self.rank(other)) > reached:
                best, reached, failed = other, rank, 0
        return best

    def _removable(self, sets: set[int]) -> list[int]:
        return [state for state in sets if state != self.everything and self._bears_nothing(state, sets)]

    def _bears_nothing(self, state: int, sets: set[int]) -> bool:
        for child in (state | 1 << s for s in range(self.size) if not state >> s & 1):
            if child in sets and not any(
                child ^ 1 << s in sets for s in range(self.size) if child >> s & 1 and child ^ 1 << s != state
            ):
                return False
        return True

    def _best_chain(self, sets: set[int]) -> list[int] | None:
        """The missing sets of the chain that gains most for its work, among those that are paid for."""
        left, is_missing = self.affordable - self.work(sets), np.ones(len(self.states), dtype=bool)
        is_missing[[0, *sets]] = False
        gains = self._gains(self.served(sets)) * is_missing
        rate, best = 0.0, None
        while True:
            # The end of the best chain is where the sum along it is greatest; of ends too dear, none.
            gained, cost, before = self._along(gains, rate, is_missing)
            can = (gained > 0) & (cost <= left)
            rates = np.divide(gained, cost, out=np.zeros(len(gained)), where=can)
            end = int(rates.argmax())
            if rates[end] <= rate:
                return best
            rate, best = float(rates[end]), self._back(end, before, sets)

    def _along(
        self, gains: np.ndarray, rate: float, is_missing: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """
        For each missing set the chain to it, from one that is there, that gains most beyond so much for each unit of
        work: what it gains, what it costs, and the set before the last.
        """
        gained, beyond = np.zeros(len(self.states)), np.zeros(len(self.states))
        cost, before = np.zeros(len(self.states), dtype=np.int64), np.zeros(len(self.states), dtype=np.int64)
        for level, below in zip(self.levels, self.below, strict=True):
            best = below[beyond[below].argmax(axis=0), np.arange(len(level))]
            before[level] = best
            gained[level] = own = (gained[best] + gains[level]) * is_missing[level]
            cost[level] = work = (cost[best] + self.costs[level]) * is_missing[level]
            beyond[level] = own - rate * work
        return gained, cost, before

    def _back(self, end: int, before: np.ndarray, sets: Collection[int]) -> list[int]:
        chain = []
        while end and end not in sets:
            chain.append(end)
            end = int(before[end])
        return chain

    def _gains(self, served: np.ndarray) -> np.ndarray:
        """For every set, the weight of the states that have it and are served less than its size."""
        missed: np.ndarray = self.weights * (served < np.arange(self.size + 1)[:, None])
        for bit in range(self.size):
            without, with_ = self._halves(missed, bit)
            without += with_
        gains: np.ndarray = missed[self.sizes, self.states]
        return gains

    def _below(self, level: np.ndarray) -> np.ndarray:
        """For each of some sets of one size, those with one slice less."""
        slices = np.arange(self.size)
        has = (level[:, None] >> slices & 1).astype(bool)
        without = level[:, None] ^ (1 << slices)
        by_set: np.ndarray = without[has].reshape(len(level), -1)
        return by_set.T

    @staticmethod
    def _halves(values: np.ndarray, bit: int) -> tuple[np.ndarray, np.ndarray]:
        """Views of what belongs to the states without a slice, and with it."""
        halves = values.reshape(*values.shape[:-1], -1, 2, 1 << bit)
        return halves[..., 0, :], halves[..., 1, :]
