"""
How many deletion requests a system outlives (Lemma 1), exactly and by simulation.

A shard dies when the first slice of each of its sequences was hit. Requests come one at a time; letting them come at
the times of a Poisson process of rate 1 makes the slices independent of each other and changes no expected number.
"""

import math

import numpy as np

from ..config import check_prior, require_choice, require_int
from ..errors import ConfigError
from ..sequences import check_sequences


UNTIL = ("exhausted", "first_shard")

# Runs of a simulation that are held in memory at once.
_BLOCK = 2000


def deletion_rate(
    num_shards: int,
    num_slices: int,
    budget: int,
    *,
    prior=None,
    sequences=None,
    until: str = "exhausted",
) -> float:
    """
    Expected number of deletion requests until the system, or its first shard, must be trained again (Lemma 1).

    Exact for any prior. For the uniform one it is `m * L * H(m * min(B, L))` with the harmonic number `H`; `budget=1`
    is SISA.

    Args:
        num_shards (`int`):
            Number of shards `m`.
        num_slices (`int`):
            Number of slices `L` per shard.
        budget (`int`):
            Number of sequences `B` per shard.
        prior (`list[float]` or `list[list[float]]`, *optional*):
            Probability of each slice of a shard to be hit by a request to that shard, one list for all shards or one
            per shard; uniform if not given. Requests spread evenly over the shards.
        sequences (`list[tuple[int, ...]]` or one such list per shard, *optional*):
            The sequences trained. Not given, they are taken to start with as many different slices as they can; with
            a prior and fewer sequences than slices it matters which, and they must be given.
        until (`str`, defaults to `"exhausted"`):
            `"exhausted"` counts until every shard is dead, as the paper does, `"first_shard"` until the first one is.

    Returns:
        `float`: The expected number of requests; infinite if no possible request ends it.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range or `sequences` is missing.

    Example:

    ```python
    >>> from hf_s3t.analysis import deletion_rate

    >>> round(deletion_rate(5, 6, 6), 2)
    119.85
    >>> round(deletion_rate(5, 6, 6, until="first_shard"), 2)
    38.53
    ```
    """
    first = _first_slices(num_shards, num_slices, budget, prior, sequences)
    return expected_deletions_left(first, num_shards, num_slices, prior=prior, until=until)


def expected_deletions_left(
    first_slices_alive: list[set[int]],
    num_shards: int,
    num_slices: int,
    *,
    prior=None,
    until: str = "exhausted",
) -> float:
    """
    Expected number of further deletion requests that a system in use outlives.

    Args:
        first_slices_alive (`list[set[int]]`):
            For every shard, the first slices of its sequences whose first stage still exists; an empty set is a dead
            shard.
        num_shards (`int`):
            Number of shards `m`.
        num_slices (`int`):
            Number of slices `L` per shard.
        prior (`list[float]` or `list[list[float]]`, *optional*):
            As in [`deletion_rate`].
        until (`str`, defaults to `"exhausted"`):
            `"exhausted"` counts until every shard is dead, `"first_shard"` until any is.

    Returns:
        `float`: The expected number of requests, the deciding one included, requests to dead slices and shards too;
        0.0 if it has happened already, infinite if no possible request ends it.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range.

    Example:

    ```python
    >>> from hf_s3t.analysis import expected_deletions_left

    >>> expected_deletions_left([{0, 2}, {1}], num_shards=2, num_slices=4)
    14.666666666666666
    >>> expected_deletions_left([{0, 2}, set()], num_shards=2, num_slices=4, until="first_shard")
    0.0
    ```
    """
    require_int("num_shards", num_shards, 1)
    require_int("num_slices", num_slices, 1)
    require_choice("until", until, UNTIL)
    rates = _rates(_checked_sets(first_slices_alive, num_shards, num_slices), num_shards, num_slices, prior)
    if until == "exhausted":
        # The system is one shard that dies with the last slice of all.
        rates = [np.concatenate(rates)]
    if any(len(shard) == 0 for shard in rates):
        return 0.0
    mortal = [shard for shard in rates if shard.min() > 0]
    if not mortal:
        return math.inf
    if len(mortal) == 1 and np.ptp(mortal[0]) == 0:
        harmonic = math.fsum(1 / k for k in range(1, len(mortal[0]) + 1))
        return float(harmonic / mortal[0][0])
    return _mean_time_to_first_death(mortal)


def simulate_deletions(
    num_shards: int,
    num_slices: int,
    budget: int,
    *,
    prior=None,
    sequences=None,
    until: str = "exhausted",
    runs: int = 1000,
    seed: int = 0,
) -> np.ndarray:
    """
    Draw lifetimes, in deletion requests, of which [`deletion_rate`] is the mean.

    Args:
        num_shards (`int`):
            Number of shards `m`.
        num_slices (`int`):
            Number of slices `L` per shard.
        budget (`int`):
            Number of sequences `B` per shard.
        prior (`list[float]` or `list[list[float]]`, *optional*):
            As in [`deletion_rate`].
        sequences (`list[tuple[int, ...]]` or one such list per shard, *optional*):
            As in [`deletion_rate`].
        until (`str`, defaults to `"exhausted"`):
            `"exhausted"` or `"first_shard"`.
        runs (`int`, defaults to 1000):
            Number of lifetimes.
        seed (`int`, defaults to 0):
            Seed of the draws.

    Returns:
        `np.ndarray`: `runs` whole numbers as floats; infinite if no possible request ends a lifetime.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range or `sequences` is missing.

    Example:

    ```python
    >>> from hf_s3t.analysis import simulate_deletions

    >>> simulate_deletions(1, 1, 1, runs=3)
    array([1., 1., 1.])
    ```
    """
    require_choice("until", until, UNTIL)
    require_int("runs", runs, 1)
    require_int("seed", seed, 0)
    rates = _rates(_first_slices(num_shards, num_slices, budget, prior, sequences), num_shards, num_slices, prior)
    if until == "exhausted":
        rates = [np.concatenate(rates)]
    mortal = [shard for shard in rates if shard.min() > 0]
    if not mortal:
        return np.full(runs, math.inf)
    rng = np.random.default_rng(seed)
    blocks = [min(_BLOCK, runs - done) for done in range(0, runs, _BLOCK)]
    return np.concatenate([_lifetimes(mortal, block, rng) for block in blocks])


def _lifetimes(shards, runs, rng) -> np.ndarray:
    """
    Lifetimes of a system that ends with its first shard, each shard being the rates of the slices that must be hit.

    Only requests that hit one of these slices for the first time matter. Their order is that of independent
    exponential times; the number of requests from one to the next is geometric.
    """
    rates = np.concatenate(shards)
    order = np.argsort(rng.exponential(size=(runs, len(rates))) / rates, axis=1)
    unhit = np.cumsum(rates[order][:, ::-1], axis=1)[:, ::-1]
    requests = np.cumsum(rng.geometric(np.minimum(unhit, 1.0)).astype(float), axis=1)
    hit_at = np.empty_like(requests)
    np.put_along_axis(hit_at, order, requests, axis=1)
    ends = np.cumsum([len(shard) for shard in shards])[:-1]
    return np.min([part.max(axis=1) for part in np.split(hit_at, ends, axis=1)], axis=0)


def _mean_time_to_first_death(shards) -> float:
    """
    The integral over t of the probability that every shard is alive, 1 - product over its slices of 1 - exp(-rate t).

    With t = exp(y) the steps at the time scales of very different rates are equally wide and the integrand is smooth
    and falls off on both sides, where the trapezoidal rule converges exponentially: this step width is good to the
    last digits. Adaptive quadrature over t misses the short scales.
    """
    step = 1 / 16
    rates = np.concatenate(shards)
    start, end = math.log(1e-18 / rates.sum()), math.log((45 + math.log(len(rates))) / rates.min())
    total = []
    for y in np.array_split(np.arange(start, end + step, step), 16):
        t = np.exp(y)
        alive = np.ones_like(t)
        for shard in shards:
            distinct, counts = np.unique(shard, return_counts=True)
            alive *= -np.expm1((counts * _log_hit(np.outer(t, distinct))).sum(axis=1))
        total.extend(alive * t)
    return step * math.fsum(total)


def _log_hit(x) -> np.ndarray:
    """The logarithm of 1 - exp(-x), precise for small and for large x."""
    small = np.log(-np.expm1(-np.minimum(x, 1.0)))
    return np.where(x < 1.0, small, np.log1p(-np.exp(-np.maximum(x, 1.0))))


def _first_slices(num_shards, num_slices, budget, prior, sequences) -> list[set[int]]:
    require_int("num_shards", num_shards, 1)
    require_int("num_slices", num_slices, 1)
    require_int("budget", budget, 1)
    if sequences is not None:
        return [{s[0] for s in shard} for shard in _checked_sequences(sequences, num_shards, num_slices, budget)]
    if prior is not None and budget < num_slices:
        raise ConfigError(
            f"budget={budget} with a prior over num_slices={num_slices} slices: the rate depends on the slices that "
            "the sequences start with. Give `sequences`, from `select_sequences` for example."
        )
    return [set(range(min(budget, num_slices)))] * num_shards


def _checked_sequences(sequences, num_shards, num_slices, budget) -> list[list[tuple[int, ...]]]:
    per_shard = _is_list(sequences) and _is_list(sequences[0]) and _is_list(sequences[0][0])
    lists = list(sequences) if per_shard else [sequences] * num_shards
    if len(lists) != num_shards:
        raise ConfigError(
            f"`sequences` lists sequences for {len(lists)} shards, but num_shards={num_shards}. Give one list for all "
            "shards or one per shard."
        )
    lists = [check_sequences(shard, num_slices) for shard in lists]
    wrong = sorted({len(shard) for shard in lists} - {budget})
    if wrong:
        raise ConfigError(f"`sequences` gives a shard {wrong[0]} sequences, but budget={budget}. Make them agree.")
    return lists


def _checked_sets(first_slices_alive, num_shards, num_slices) -> list[set[int]]:
    try:
        sets = [set(alive) for alive in first_slices_alive]
    except TypeError as error:
        raise ConfigError(
            f"`first_slices_alive` must be a list of sets of slices, one per shard, got {first_slices_alive!r}."
        ) from error
    if len(sets) != num_shards:
        raise ConfigError(
            f"`first_slices_alive` has {len(sets)} entries, but num_shards={num_shards}. Give a set for every shard, "
            "an empty one where it is dead."
        )
    wrong = sorted(set().union(*sets) - set(range(num_slices)), key=repr)
    if wrong:
        raise ConfigError(
            f"`first_slices_alive` holds {wrong[0]!r}, expected slices from 0 to {num_slices - 1} "
            f"(num_slices={num_slices})."
        )
    return sets


def _rates(first_slices, num_shards, num_slices, prior) -> list[np.ndarray]:
    """For every shard, the probability that a request hits each of its first slices."""
    if prior is None:
        priors = [[1 / num_slices] * num_slices] * num_shards
    else:
        if not _is_list(prior):
            raise ConfigError(f"`prior` must be a list of probabilities or one such list per shard, got {prior!r}.")
        per_shard = _is_list(prior[0])
        priors = prior if per_shard else [prior] * num_shards
        if len(priors) != num_shards:
            raise ConfigError(
                f"`prior` has {len(priors)} lists, but num_shards={num_shards}. Give one list for all shards or one "
                "per shard."
            )
        for values in priors:
            check_prior(values, num_slices)
    return [
        np.array([values[s] / num_shards for s in sorted(alive)], dtype=float)
        for values, alive in zip(priors, first_slices)
    ]


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0
