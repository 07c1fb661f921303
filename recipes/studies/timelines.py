"""
How long deleting takes in the long run: streams of requests over measured times of deleting and of training again.

Requests hit the slices of all shards independently and uniformly, as in the paper's deletion rate.
"""

from collections.abc import Collection, Sequence

import numpy as np

from hf_s3t.checks import require_choice, require_int
from hf_s3t.errors import ConfigError


# When a system is trained again: as in the paper when no shard is left, or every shard as soon as it is dead.
RETRAIN = ("exhausted", "dead_shard")


def time_of_lives(
    first_slices: Sequence[Collection[int]],
    num_slices: int,
    shard_seconds: Sequence[float],
    *,
    requests: int,
    delete_seconds: float = 0.0,
    retrain: str = "exhausted",
    runs: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """
    Time spent on deletion requests by a system that is trained again only when nothing is left.

    Args:
        first_slices (sequence of collections of `int`):
            For every shard the first slices of its sequences; SISA has one.
        num_slices (`int`):
            Number of slices `L` per shard.
        shard_seconds (sequence of `float`):
            For every shard, how long training it from scratch takes.
        requests (`int`):
            Number of requests.
        delete_seconds (`float`, defaults to 0):
            How long a deletion takes by itself.
        retrain (`str`, defaults to `"exhausted"`):
            `"exhausted"` trains all shards again when the last one is dead, as the paper does; `"dead_shard"` trains
            every shard again as soon as it is dead.
        runs (`int`, defaults to 200):
            Number of streams.
        seed (`int`, defaults to 0):
            Seed of the streams.

    Returns:
        `numpy.ndarray`: Shape `(runs, requests + 1)`, the seconds spent after so many requests.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range.

    Example:

    ```python
    >>> from studies.timelines import time_of_lives

    >>> # One shard of one slice dies with every request.
    >>> time_of_lives([{0}], 1, [2.0], requests=3, runs=1, delete_seconds=0.5).tolist()
    [[0.0, 2.5, 5.0, 7.5]]
    ```
    """
    _check(num_slices, requests, runs)
    require_choice("retrain", retrain, RETRAIN)
    m = len(first_slices)
    if m < 1 or len(shard_seconds) != m:
        raise ConfigError(
            f"`first_slices` is of {m} shards and `shard_seconds` of {len(shard_seconds)}. Give one of each per shard."
        )
    fresh = np.zeros((m, num_slices), dtype=bool)
    for shard, slices in enumerate(first_slices):
        if not slices or not all(0 <= s < num_slices for s in slices):
            raise ConfigError(
                f"The first slices of shard {shard} are {sorted(slices)}, expected some of 0 to {num_slices - 1}."
            )
        fresh[shard, list(slices)] = True
    rng = np.random.default_rng(seed)
    every = np.arange(runs)
    alive = np.repeat(fresh[None], runs, axis=0)
    costs = np.asarray(shard_seconds, dtype=float)
    spent = np.zeros((runs, requests + 1))
    for number in range(requests):
        shards, slices = rng.integers(m, size=runs), rng.integers(num_slices, size=runs)
        alive[every, shards, slices] = False
        spent[:, number + 1] = spent[:, number] + delete_seconds
        if retrain == "exhausted":
            dead = ~alive.any(axis=(1, 2))
            alive[dead] = fresh
            spent[dead, number + 1] += costs.sum()
        else:
            dead = ~alive[every, shards].any(axis=1)
            alive[every[dead], shards[dead]] = fresh[shards[dead]]
            spent[dead, number + 1] += costs[shards[dead]]
    return spent


def time_of_rolling_back(
    unit_seconds: Sequence[Sequence[float]],
    *,
    requests: int,
    delete_seconds: float = 0.0,
    runs: int = 200,
    seed: int = 0,
) -> np.ndarray:
    """
    Time spent on deletion requests by SISA proper: every request rolls its shard back and trains it again from there.

    Args:
        unit_seconds (sequence of sequences of `float`):
            For every shard, how long the training of each slice takes, in their order. One slice a shard is full
            retraining of the shard.
        requests (`int`):
            Number of requests.
        delete_seconds (`float`, defaults to 0):
            How long a deletion takes by itself.
        runs (`int`, defaults to 200):
            Number of streams.
        seed (`int`, defaults to 0):
            Seed of the streams.

    Returns:
        `numpy.ndarray`: Shape `(runs, requests + 1)`, the seconds spent after so many requests.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range.

    Example:

    ```python
    >>> from studies.timelines import time_of_rolling_back

    >>> # Full retraining: all that was trained is trained again.
    >>> time_of_rolling_back([[3.0]], requests=2, runs=1).tolist()
    [[0.0, 3.0, 6.0]]
    ```
    """
    if not unit_seconds or len({len(units) for units in unit_seconds}) != 1 or not unit_seconds[0]:
        raise ConfigError(
            f"`unit_seconds` has {[len(units) for units in unit_seconds]} entries per shard. Give every shard the "
            "same number, one per slice."
        )
    m, num_slices = len(unit_seconds), len(unit_seconds[0])
    _check(num_slices, requests, runs)
    # What is trained after a request for slice s: s and all after it.
    again = np.cumsum(np.asarray(unit_seconds, dtype=float)[:, ::-1], axis=1)[:, ::-1]
    rng = np.random.default_rng(seed)
    drawn = again[rng.integers(m, size=(runs, requests)), rng.integers(num_slices, size=(runs, requests))]
    spent = np.zeros((runs, requests + 1))
    spent[:, 1:] = np.cumsum(drawn + delete_seconds, axis=1)
    return spent


def _check(num_slices: int, requests: int, runs: int) -> None:
    require_int("num_slices", num_slices, 1)
    require_int("requests", requests, 1)
    require_int("runs", runs, 1)
