"""
How much of a shard is left after some deletion requests hit it (Lemma 2): exact, simulated, and as in the paper.

A shard serves the longest prefix of any of its sequences that holds no slice that was hit. With `H` the set of slices
hit, this depth is a function of `H`, and there are only `2 ** L` of them. Sequences need not have all slices: the
stages of a family of sets are such sequences, too.
"""

import math
from collections.abc import Sequence

import numpy as np

from ..checks import check_prior, require_int
from ..errors import ConfigError
from ..sequences.families import depths_of_hit_sets as depths_of_hit_sets
from ..sequences.rules import check_prefixes


# 2 ** 20 states take a few megabytes and milliseconds; every slice more doubles both.
_MOST_BITS = 20


# Simulated requests that are held in memory at once.
_BLOCK = 1 << 20


def retention(
    sequences: list[tuple[int, ...]],
    hits: int,
    at_least: int,
    *,
    prior: list[float] | None = None,
    num_slices: int | None = None,
) -> float:
    """
    Probability that some sequence of a shard keeps a number of slices after requests that hit the shard.

    Exact for the given sequences, by a sum over the sets of slices that can be hit. The paper's Lemma 2 treats
    sequences as independent of each other though the same requests hit all of them; see [`retention_paper`].

    Args:
        sequences (`list[tuple[int, ...]]`):
            The sequences of the shard, or its stages: of distinct slices, not necessarily of all.
        hits (`int`):
            Number of requests `r` that hit the shard, independently of each other.
        at_least (`int`):
            Number of slices `k` that a sequence must keep: none of its first `k` slices was hit.
        prior (`list[float]`, *optional*):
            Probability that such a request hits each slice; uniform if not given.
        num_slices (`int`, *optional*):
            Number of slices `L` of the shard; the length of the longest sequence if not given.

    Returns:
        `float`: The probability.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the sequences are not of distinct slices, a number is out of range, or
            there are more than 20 slices and more than 20 different sets of first `at_least` slices.

    Example:

    ```python
    >>> from hf_s3t.analysis import retention
    >>> from hf_s3t.sequences import select_sequences

    >>> round(retention(select_sequences(8, 8), hits=4, at_least=3), 4)
    0.707
    ```
    """
    sequences, num_slices = _checked(sequences, num_slices)
    _check_numbers(num_slices, hits, at_least)
    likelihoods = _checked_prior(prior, num_slices)
    if num_slices <= _MOST_BITS:
        return _mean_over_hit_sets(
            depths_of_hit_sets(sequences, num_slices) >= at_least, num_slices, hits, likelihoods
        )
    kept = {frozenset(sequence[:at_least]) for sequence in sequences if len(sequence) >= at_least}
    if len(kept) <= _MOST_BITS:
        return _over_sets_of_prefixes(sorted(map(sorted, kept)), num_slices, hits, likelihoods)
    raise ConfigError(
        f"Got {num_slices} slices and {len(kept)} different sets of first {at_least} slices; exact retention needs "
        f"at most {_MOST_BITS} of either. Give fewer sequences, or sample the hits."
    )


def expected_depth(
    sequences: list[tuple[int, ...]],
    hits: int,
    *,
    prior: list[float] | None = None,
    num_slices: int | None = None,
) -> float:
    """
    Expected depth that a shard serves after requests that hit it, exactly: `sum over k = 1..L` of the [`retention`].

    Args:
        sequences (`list[tuple[int, ...]]`):
            The sequences of the shard, or its stages, over at most 20 slices: of distinct ones, not necessarily all.
        hits (`int`):
            Number of requests `r` that hit the shard, independently of each other.
        prior (`list[float]`, *optional*):
            Probability that such a request hits each slice; uniform if not given.
        num_slices (`int`, *optional*):
            Number of slices `L` of the shard; the length of the longest sequence if not given.

    Returns:
        `float`: The expected number of slices of the longest surviving prefix, 0 for a dead shard.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range, or there are more than 20 slices.

    Example:

    ```python
    >>> from hf_s3t.analysis import expected_depth
    >>> from hf_s3t.sequences import select_sequences

    >>> expected_depth(select_sequences(4, 4), hits=1)
    3.0
    >>> round(expected_depth(select_sequences(4, 4), hits=4), 3)
    1.156
    ```
    """
    sequences, num_slices = _checked(sequences, num_slices)
    _check_numbers(num_slices, hits, 0)
    likelihoods = _checked_prior(prior, num_slices)
    if num_slices > _MOST_BITS:
        raise ConfigError(
            f"Got {num_slices} slices; the exact depth is a sum over their subsets, for at most {_MOST_BITS} of them. "
            "Take the mean of `simulate_depths`."
        )
    return _mean_over_hit_sets(depths_of_hit_sets(sequences, num_slices), num_slices, hits, likelihoods)


def simulate_depths(
    sequences: list[tuple[int, ...]],
    hits: int,
    *,
    prior: list[float] | None = None,
    num_slices: int | None = None,
    runs: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """
    Draw depths that a shard serves after requests that hit it, for any number of slices.

    Their mean is [`expected_depth`], the share of those of at least `k` is [`retention`].

    Args:
        sequences (`list[tuple[int, ...]]`):
            The sequences of the shard, or its stages: of distinct slices, not necessarily of all.
        hits (`int`):
            Number of requests `r` that hit the shard, independently of each other.
        prior (`list[float]`, *optional*):
            Probability that such a request hits each slice; uniform if not given.
        num_slices (`int`, *optional*):
            Number of slices `L` of the shard; the length of the longest sequence if not given.
        runs (`int`, defaults to 1000):
            Number of depths.
        seed (`int`, defaults to 0):
            Seed of the draws.

    Returns:
        `np.ndarray`: `runs` whole numbers from 0 to the number of slices.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range.

    Example:

    ```python
    >>> from hf_s3t.analysis import simulate_depths

    >>> simulate_depths([(0, 1, 2)], hits=0, runs=4)
    array([3, 3, 3, 3])
    ```
    """
    sequences, num_slices = _checked(sequences, num_slices)
    _check_numbers(num_slices, hits, 0)
    require_int("runs", runs, 1)
    require_int("seed", seed, 0)
    likelihoods = _checked_prior(prior, num_slices)
    rng = np.random.default_rng(seed)
    # Behind the end of each sequence a slice that is hit in every run: what nothing was hit of ends there.
    ends = np.full((len(sequences), num_slices + 1), num_slices)
    for row, sequence in zip(ends, sequences):
        row[: len(sequence)] = sequence
    block = max(1, _BLOCK // max(1, hits, ends.size))
    depths = []
    for done in range(0, runs, block):
        count = min(block, runs - done)
        hit = np.zeros((count, num_slices + 1), dtype=bool)
        hit[:, -1] = True
        np.put_along_axis(hit, rng.choice(num_slices, size=(count, hits), p=likelihoods), True, axis=1)
        depths.append(hit[:, ends].argmax(axis=2).max(axis=1))
    return np.concatenate(depths)


def retention_random(num_slices: int, budget: int, hits: int, at_least: int) -> float:
    """
    The same probability for sequences that are drawn at random, exactly (Lemma 2, corrected).

    `E[1 - (1 - C(L - U, k) / C(L, k)) ** B]` over the number `U` of different slices that `r` requests hit.

    Args:
        num_slices (`int`):
            Number of slices `L` of the shard.
        budget (`int`):
            Number of sequences `B`, drawn independently.
        hits (`int`):
            Number of requests `r` that hit the shard.
        at_least (`int`):
            Number of slices `k` that a sequence must keep.

    Returns:
        `float`: The probability.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a number is out of range.

    Example:

    ```python
    >>> from hf_s3t.analysis import retention_random

    >>> round(retention_random(8, 8, hits=4, at_least=3), 3)
    0.668
    ```
    """
    require_int("num_slices", num_slices, 1)
    require_int("budget", budget, 1)
    _check_numbers(num_slices, hits, at_least)
    prefixes = math.comb(num_slices, at_least)
    return math.fsum(
        weight * (1 - (1 - math.comb(num_slices - distinct, at_least) / prefixes) ** budget)
        for distinct, weight in enumerate(_distinct_hits(num_slices, hits))
    )


def retention_paper(num_slices: int, budget: int, hits: int, at_least: int) -> float:
    """
    The value of the paper's Lemma 2, `1 - (1 - (1 - k / L) ** r) ** B'` with `B' = min(B, L! / (L - k)!)`.

    It takes the sequences as independent, which overstates; `budget=1` is SISA, and exact.

    Args:
        num_slices (`int`):
            Number of slices `L` of the shard.
        budget (`int`):
            Number of sequences `B`.
        hits (`int`):
            Number of requests `r` that hit the shard.
        at_least (`int`):
            Number of slices `k` that a sequence must keep.

    Returns:
        `float`: The paper's probability.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a number is out of range.

    Example:

    ```python
    >>> from hf_s3t.analysis import retention_paper

    >>> round(retention_paper(8, 8, hits=4, at_least=3), 3)
    0.734
    ```
    """
    require_int("num_slices", num_slices, 1)
    require_int("budget", budget, 1)
    _check_numbers(num_slices, hits, at_least)
    prefixes = min(budget, math.perm(num_slices, at_least))
    return 1 - (1 - (1 - at_least / num_slices) ** hits) ** prefixes


def _checked(sequences: Sequence[Sequence[int]], num_slices: int | None) -> tuple[list[tuple[int, ...]], int]:
    """The sequences, and of how many slices they are."""
    if num_slices is not None:
        require_int("num_slices", num_slices, 1)
    found = check_prefixes(sequences, num_slices)
    return found, max(map(len, found)) if num_slices is None else num_slices


def _check_numbers(num_slices: int, hits: int, at_least: int) -> None:
    require_int("hits", hits, 0)
    require_int("at_least", at_least, 0)
    if at_least > num_slices:
        raise ConfigError(f"at_least={at_least}, expected at most the {num_slices} slices that a sequence has.")


def _distinct_hits(num_slices: int, hits: int) -> list[float]:
    """The probabilities that exactly 0, 1, ..., `num_slices` different slices are hit."""
    weights = np.zeros(num_slices + 1)
    weights[0] = 1.0
    old = np.arange(num_slices + 1) / num_slices
    for _ in range(hits):
        weights = weights * old + np.concatenate(([0.0], (weights * (1 - old))[:-1]))
    chances: list[float] = weights.tolist()
    return chances


def _checked_prior(prior: Sequence[float] | None, num_slices: int) -> np.ndarray | None:
    if prior is None:
        return None
    check_prior(prior, num_slices)
    return np.array(prior, dtype=float) / math.fsum(prior)


def _mean_over_hit_sets(values: np.ndarray, num_slices: int, hits: int, prior: np.ndarray | None) -> float:
    """The mean of whole numbers that belong to the sets of hit slices, over the sets that `hits` requests make."""
    if prior is not None:
        return _mean_under_prior(values, hits, prior)
    sizes = np.zeros(1 << num_slices, dtype=np.int8)
    for bit in range(num_slices):
        sizes.reshape(-1, 2, 1 << bit)[:, 1] += 1
    # All sets of one size are equally likely to be the one that is hit.
    sums = np.bincount(sizes, weights=values, minlength=num_slices + 1).tolist()
    return math.fsum(
        weight * total / math.comb(num_slices, size)
        for size, (weight, total) in enumerate(zip(_distinct_hits(num_slices, hits), sums))
    )


def _mean_under_prior(values: np.ndarray, hits: int, prior: np.ndarray) -> float:
    """
    Inclusion and exclusion: the requests stay within a set `T` with probability `p(T) ** r`.

    The coefficient of each is a whole number, so nothing is lost before the one sum of all.
    """
    coefficients = values.astype(float)
    inside = np.zeros(1)
    for bit, probability in enumerate(prior):
        without, with_ = coefficients.reshape(-1, 2, 1 << bit).swapaxes(0, 1)
        without -= with_
        inside = np.concatenate((inside, inside + probability))
    inside[-1] = 1.0
    terms = coefficients * inside**hits
    return max(0.0, math.fsum(terms[terms != 0]))


def _over_sets_of_prefixes(
    kept: Sequence[Sequence[int]], num_slices: int, hits: int, prior: np.ndarray | None
) -> float:
    """Inclusion and exclusion over the prefixes: some of them are all kept if every request misses their union."""
    missed = np.zeros(1 << len(kept))
    for s in range(num_slices):
        missed[sum(1 << i for i, prefix in enumerate(kept) if s not in prefix)] += 1 if prior is None else prior[s]
    signs = np.full(1 << len(kept), -1.0)
    for bit in range(len(kept)):
        without, with_ = missed.reshape(-1, 2, 1 << bit).swapaxes(0, 1)
        # From "outside exactly these prefixes" to "outside at least these".
        without += with_
        signs.reshape(-1, 2, 1 << bit)[:, 1] *= -1
    terms = signs * (missed / (num_slices if prior is None else 1)) ** hits
    return min(1.0, max(0.0, math.fsum(terms[1:])))
