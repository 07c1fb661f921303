"""How much of a shard is left after some deletion requests hit it (Lemma 2): the exact values and the paper's."""

import math

import numpy as np

from ..config import require_int
from ..errors import ConfigError
from ..sequences import check_sequences


# 2 ** 20 states take a few megabytes and milliseconds; every slice more doubles both.
_MOST_BITS = 20


def retention(sequences: list[tuple[int, ...]], hits: int, at_least: int) -> float:
    """
    Probability that some sequence of a shard keeps a number of slices after requests that hit the shard.

    Exact for the given sequences, by a sum over the sets of slices that can be hit. The paper's Lemma 2 treats
    sequences as independent of each other though the same requests hit all of them; see [`retention_paper`].

    Args:
        sequences (`list[tuple[int, ...]]`):
            The sequences of the shard.
        hits (`int`):
            Number of requests `r`, each hitting any slice of the shard with equal probability.
        at_least (`int`):
            Number of slices `k` that a sequence must keep: none of its first `k` slices was hit.

    Returns:
        `float`: The probability.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the sequences are no permutations of the same slices, a number is out of
            range, or there are more than 20 slices and more than 20 different sets of first `at_least` slices.

    Example:

    ```python
    >>> from hf_s3t.analysis import retention
    >>> from hf_s3t.sequences import select_sequences

    >>> round(retention(select_sequences(8, 8), hits=4, at_least=3), 4)
    0.707
    ```
    """
    sequences = check_sequences(sequences)
    num_slices = len(sequences[0])
    _check_numbers(num_slices, hits, at_least)
    kept = {frozenset(sequence[:at_least]) for sequence in sequences}
    if num_slices <= _MOST_BITS:
        return _over_hit_sets(kept, num_slices, hits)
    if len(kept) <= _MOST_BITS:
        return _over_sets_of_prefixes(sorted(map(sorted, kept)), num_slices, hits)
    raise ConfigError(
        f"Got {num_slices} slices and {len(kept)} different sets of first {at_least} slices; exact retention needs "
        f"at most {_MOST_BITS} of either. Give fewer sequences, or sample the hits."
    )


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


def _check_numbers(num_slices, hits, at_least):
    require_int("hits", hits, 0)
    require_int("at_least", at_least, 0)
    if at_least > num_slices:
        raise ConfigError(f"at_least={at_least}, expected at most the {num_slices} slices that a sequence has.")


def _distinct_hits(num_slices, hits) -> list[float]:
    """The probabilities that exactly 0, 1, ..., `num_slices` different slices are hit."""
    weights = np.zeros(num_slices + 1)
    weights[0] = 1.0
    old = np.arange(num_slices + 1) / num_slices
    for _ in range(hits):
        weights = weights * old + np.concatenate(([0.0], (weights * (1 - old))[:-1]))
    return weights.tolist()


def _over_hit_sets(kept, num_slices, hits) -> float:
    """Sum over all sets of hit slices, as bit masks: a prefix is kept if the set lies within its complement."""
    everything = (1 << num_slices) - 1
    survived = np.zeros(1 << num_slices, dtype=bool)
    survived[[everything ^ sum(1 << s for s in prefix) for prefix in kept]] = True
    sizes = np.zeros(1 << num_slices, dtype=np.int8)
    for bit in range(num_slices):
        without, with_ = survived.reshape(-1, 2, 1 << bit).swapaxes(0, 1)
        without |= with_
        sizes.reshape(-1, 2, 1 << bit)[:, 1] += 1
    # All sets of one size are equally likely to be the one that is hit.
    surviving = np.bincount(sizes[survived], minlength=num_slices + 1).tolist()
    return math.fsum(
        weight * count / math.comb(num_slices, size)
        for size, (weight, count) in enumerate(zip(_distinct_hits(num_slices, hits), surviving))
    )


def _over_sets_of_prefixes(kept, num_slices, hits) -> float:
    """Inclusion and exclusion over the prefixes: some of them are all kept if every request misses their union."""
    missed = np.zeros(1 << len(kept))
    for s in range(num_slices):
        missed[sum(1 << i for i, prefix in enumerate(kept) if s not in prefix)] += 1
    signs = np.full(1 << len(kept), -1.0)
    for bit in range(len(kept)):
        without, with_ = missed.reshape(-1, 2, 1 << bit).swapaxes(0, 1)
        # From "outside exactly these prefixes" to "outside at least these".
        without += with_
        signs.reshape(-1, 2, 1 << bit)[:, 1] *= -1
    terms = signs * (missed / num_slices) ** hits
    return min(1.0, max(0.0, math.fsum(terms[1:])))
