"""
The search behind `sequence_selection="optimal"`: sequences by the depth that the shard really serves.

The scores of the paper look at one sequence at a time, but the same requests hit all of them, and the shard serves
whichever is longest. What counts is the set: with `H` the slices hit so far, the shard serves the longest prefix of
any sequence that avoids `H`. There are only `2 ** L` sets `H`, so the expected depth is a finite sum.
"""

import random
from collections.abc import Sequence

import numpy as np


# Sets of slices are weighted by whole numbers that add up to this: sums of them are exact in floats, so that what ties
# by symmetry ties in the computer, in whatever order a platform adds.
_TOTAL = 2.0**40
# Rounds of taking some sequences out and others in: so many, and so many divided by the budget; and their seed.
_ROUNDS = (10, 300)
_SEED = 20250424


def best_sequences(
    prior: list[float], budget: int, horizon: int, starts: list[list[tuple[int, ...]]]
) -> list[tuple[int, ...]]:
    """
    Search the sequences of one shard with the greatest mean depth over the first requests that hit the shard.

    Every step is exact: the best sequence to add to given others is found by dynamic programming over the sets of
    slices, without listing permutations. The set as a whole is found by adding greedily, exchanging one sequence at a
    time until no exchange helps, and replacing several at a time.

    Args:
        prior (`list[float]`):
            Probability of each of the `L` slices to be hit by a request. Work and memory grow as `4 ** L`.
        budget (`int`):
            Number of sequences `B`.
        horizon (`int`):
            Number of requests `t` over which the depth is averaged.
        starts (`list[list[tuple[int, ...]]]`):
            Sets of sequences the search begins with, beside the greedy one; the answer is at least as good as each.

    Returns:
        `list[tuple[int, ...]]`: Distinct permutations in ascending order; fewer than `budget` if more of them would
        add nothing, because every set of hit slices leaves the depth of its complement already.
    """
    search = _Search(prior, horizon)
    best = search.refill([], budget)
    if len(best) < budget:
        return sorted(best)
    candidates = [search.exchange(start) for start in [best, *starts]]
    best = max(candidates, key=search.value)
    rng = random.Random(_SEED)
    for number in range(_ROUNDS[0] + _ROUNDS[1] // budget):
        # Python promises the stream of `random()` alone.
        kept = sorted(range(budget), key=lambda _: rng.random())[min(budget, 1 + number % 4) :]
        other = [best[i] for i in sorted(kept)]
        if number % 3:
            # The best additions lead back to where they came from; random ones lead elsewhere.
            other.append(tuple(sorted(range(len(prior)), key=lambda _: rng.random())))
        other = search.exchange(search.refill(other, budget))
        if search.value(other) > search.value(best):
            best = other
    return sorted(best)


def mean_depth_weights(prior: list[float], horizon: int) -> np.ndarray:
    """
    Expected number of requests, out of the first `horizon`, after which exactly these slices have been hit.

    Args:
        prior (`list[float]`):
            Probability of each slice to be hit by a request.
        horizon (`int`):
            Number of requests `t`.

    Returns:
        `np.ndarray`: One number per set of slices, given as a bit mask; they sum to `horizon`.
    """
    states = np.arange(1 << len(prior))
    step = np.zeros((len(states), len(states)))
    for s, probability in enumerate(prior):
        step[states, states | 1 << s] += probability
    # Doubling, so that no horizon is too long: the power and the sum of the powers before it. Only non-negative
    # numbers are added, so small weights keep their digits.
    now = np.zeros(len(states))
    now[0] = 1.0
    weights = np.zeros(len(states))
    powers, sums = step, np.eye(len(states))
    while True:
        if horizon & 1:
            # The states after each of the next requests, the first of which is one step away.
            weights += now @ sums @ step
            now = now @ powers
        horizon >>= 1
        if horizon == 0:
            return weights
        sums = sums + powers @ sums
        powers = powers @ powers


def hit_set_weights(prior: Sequence[float], horizon: int) -> np.ndarray:
    """
    How much each set of hit slices counts in the mean depth, in whole numbers: sums of them are exact in floats.

    Args:
        prior (sequence of `float`):
            Probability of each slice to be hit by a request.
        horizon (`int`):
            Number of requests `t`.

    Returns:
        `np.ndarray`: One whole number per set of slices, given as a bit mask; none for the set of all of them.
    """
    weights = mean_depth_weights(list(prior), horizon)
    # Once all is hit nothing serves; the weight of that state must not crowd out the others.
    weights[-1] = 0.0
    total = weights.sum()
    scaled: np.ndarray = np.rint(weights / total * _TOTAL) if total > 0 else weights
    return scaled


def depths(sequence: tuple[int, ...]) -> np.ndarray:
    """
    The depth of a sequence for every set of hit slices.

    Args:
        sequence (`tuple[int, ...]`):
            A permutation of the slices.

    Returns:
        `np.ndarray`: One whole number per set of slices, given as a bit mask: the slices before the first hit one.
    """
    states = np.arange(1 << len(sequence))
    unhit = np.ones(len(states), dtype=bool)
    depth = np.zeros(len(states), dtype=np.int8)
    for s in sequence:
        unhit &= (states >> s) & 1 == 0
        depth += unhit
    return depth


class _Search:
    """Exact gains of sequences, for one prior and horizon."""

    def __init__(self, prior: list[float], horizon: int):
        self.size = len(prior)
        self.states = np.arange(1 << self.size)
        self.weights = hit_set_weights(prior, horizon)
        self.sizes = np.array([int(state).bit_count() for state in self.states])
        self.levels = [self.states[self.sizes == size] for size in range(self.size + 1)]
        # Per size, of each set of it, the sets with one slice more; the number of sets where that slice is in already.
        self.steps = [
            np.array([np.where(level >> s & 1, len(self.states), level | 1 << s) for s in range(self.size)])
            for level in self.levels
        ]
        self.known: dict[tuple[int, ...], np.ndarray] = {}

    def depths(self, sequence: tuple[int, ...]) -> np.ndarray:
        if sequence not in self.known:
            self.known[sequence] = depths(sequence)
        return self.known[sequence]

    def served(self, sequences: Sequence[tuple[int, ...]]) -> np.ndarray:
        """The depth that the shard serves, for every set of hit slices."""
        if not sequences:
            return np.zeros(len(self.states), dtype=np.int8)
        deepest: np.ndarray = np.max([self.depths(sequence) for sequence in sequences], axis=0)
        return deepest

    def value(self, sequences: Sequence[tuple[int, ...]]) -> float:
        return float(self.weights @ self.served(sequences))

    def best_addition(self, served: np.ndarray) -> tuple[float, tuple[int, ...]]:
        """
        The sequence that adds most to what is served, the lowest of those that tie, and how much it adds.

        Depth `d` over `c` gains `d - c`: one for every `k` with `c < k <= d`. So a sequence gains, for each of its
        prefixes, the weight of the states that miss the prefix and are served less than its length: a sum along a
        path from the empty set of slices to the full one, whose maximum is found from its end.
        """
        missed = self.weights * (served < np.arange(1, self.size + 1)[:, None])
        for bit in range(self.size):
            without, with_ = missed.reshape(self.size, -1, 2, 1 << bit).swapaxes(0, 2).swapaxes(1, 2)
            with_ += without
        everything = len(self.states) - 1
        # One more, of what no sequence comes to: a slice that is in already.
        best = np.zeros(len(self.states) + 1)
        best[-1] = -1.0
        for size in range(self.size, 0, -1):
            level = self.levels[size]
            if size < self.size:
                best[level] = best[self.steps[size]].max(axis=0)
            best[level] += missed[size - 1, everything ^ level]
        sequence: list[int] = []
        state = 0
        while len(sequence) < self.size:
            free = [s for s in range(self.size) if not state >> s & 1]
            sequence.append(max(free, key=lambda s: (best[state | 1 << s], -s)))
            state |= 1 << sequence[-1]
        return float(best[1 << sequence[0]]), tuple(sequence)

    def refill(self, sequences: Sequence[tuple[int, ...]], budget: int) -> list[tuple[int, ...]]:
        """Add the best sequence, and again, up to the budget or until nothing is gained."""
        sequences = list(sequences)
        served = self.served(sequences)
        while len(sequences) < budget:
            gain, sequence = self.best_addition(served)
            if gain == 0:
                break
            sequences.append(sequence)
            served = np.maximum(served, self.depths(sequence))
        return sequences

    def exchange(self, sequences: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
        """Put a better sequence in the place of one, until there is none."""
        sequences = list(sequences)
        unchanged = at = 0
        while unchanged < len(sequences):
            others = self.served(sequences[:at] + sequences[at + 1 :])
            now = float(self.weights @ np.maximum(others, self.depths(sequences[at])))
            gain, sequence = self.best_addition(others)
            unchanged += 1
            if float(self.weights @ others) + gain > now:
                sequences[at] = sequence
                unchanged = 1
            at = (at + 1) % len(sequences)
        return sequences
