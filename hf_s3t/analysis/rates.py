"""
How many deletion requests a system outlives (Lemma 1), exactly and by simulation.

A shard dies when the first slice of each of its sequences was hit. Requests come one at a time; letting them come at
the times of a Poisson process of rate 1 makes the slices independent of each other and changes no expected number.
Where each example can be deleted only once, giving every example an exponential time of its own does the same.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

import numpy as np

from ..checks import check_prior, require_choice, require_int
from ..errors import ConfigError, counted
from ..sequences.rules import check_prefixes


# One list for all shards, or one per shard.
Prior = Sequence[float] | Sequence[Sequence[float]]
Sequences = Sequence[Sequence[int]] | Sequence[Sequence[Sequence[int]]]

UNTIL = ("exhausted", "first_shard")

# Runs of a simulation that are held in memory at once.
_BLOCK = 2000


def deletion_rate(
    num_shards: int,
    num_slices: int,
    budget: int | None = None,
    *,
    prior: Prior | None = None,
    sequences: Sequences | None = None,
    num_examples: int | list[list[int]] | None = None,
    until: str = "exhausted",
) -> float:
    """
    Expected number of deletion requests until the system, or its first shard, must be trained again (Lemma 1).

    Exact for any prior. For the uniform one it is `m * L * H(m * min(B, L))` with the harmonic number `H`, see
    [`deletion_rate_paper`]; `budget=1` is SISA.

    Args:
        num_shards (`int`):
            Number of shards `m`.
        num_slices (`int`):
            Number of slices `L` per shard.
        budget (`int`, *optional*):
            Number of sequences `B` per shard; if not given, that of `sequences`, or `num_slices`: one for each slice
            to start with, as the lattice has them.
        prior (`list[float]` or `list[list[float]]`, *optional*):
            Probability of each slice of a shard to be hit by a request to that shard, one list for all shards or one
            per shard; uniform if not given. Requests spread evenly over the shards.
        sequences (`list[tuple[int, ...]]` or one such list per shard, *optional*):
            The sequences trained, or the stages of a family: of distinct slices, not necessarily of all. What counts
            is what they start with. Not given, they are taken to start with as many different slices as they can; with
            a prior and fewer sequences than slices it matters which, and they must be given.
        num_examples (`int` or `list[list[int]]`, *optional*):
            Requests are taken to hit slices independently of each other, as the paper has it; where slices hold few
            examples, that overstates the rate, because nobody's data is deleted twice. With the number of examples
            of the system (dealt out evenly, as `partition="balanced"` does), or with the number in every slice of
            every shard, each example is deleted at most once, in random order; a prior gives its share to the
            examples of a slice evenly.
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
    >>> round(deletion_rate(5, 6, 6, num_examples=300), 2)
    97.58
    ```
    """
    first = _first_slices(num_shards, num_slices, budget, prior, sequences)
    if num_examples is None:
        return expected_deletions_left(first, num_shards, num_slices, prior=prior, until=until)
    require_choice("until", until, UNTIL)
    examples = _Examples(num_shards, num_slices, num_examples, prior)
    shards = _mortal(examples.members(first), examples.rates, until)
    return math.inf if shards is None else _mean_count_at_first_death(shards, examples)


def deletion_rate_paper(num_shards: int, num_slices: int, budget: int) -> float:
    """
    The closed form of Lemma 1, `m * L * H(m * B')` with `B' = min(B, L)`: uniform prior, until all shards are dead.

    Args:
        num_shards (`int`):
            Number of shards `m`.
        num_slices (`int`):
            Number of slices `L` per shard.
        budget (`int`):
            Number of sequences `B` per shard; 1 is SISA.

    Returns:
        `float`: The expected number of requests.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range.

    Example:

    ```python
    >>> from hf_s3t.analysis import deletion_rate_paper

    >>> round(deletion_rate_paper(5, 32, 8), 1), round(deletion_rate_paper(5, 32, 1), 1)
    (684.6, 365.3)
    ```
    """
    require_int("num_shards", num_shards, 1)
    require_int("num_slices", num_slices, 1)
    require_int("budget", budget, 1)
    return num_shards * num_slices * _harmonic(num_shards * min(budget, num_slices))


def expected_deletions_left(
    first_slices_alive: list[set[int]],
    num_shards: int,
    num_slices: int,
    *,
    prior: Prior | None = None,
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
        return float(_harmonic(len(mortal[0])) / mortal[0][0])
    return _mean_time_to_first_death(mortal)


def simulate_deletions(
    num_shards: int,
    num_slices: int,
    budget: int | None = None,
    *,
    prior: Prior | None = None,
    sequences: Sequences | None = None,
    num_examples: int | list[list[int]] | None = None,
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
        budget (`int`, *optional*):
            Number of sequences `B` per shard; if not given, that of `sequences`, or `num_slices`: one for each slice
            to start with, as the lattice has them.
        prior (`list[float]` or `list[list[float]]`, *optional*):
            As in [`deletion_rate`].
        sequences (`list[tuple[int, ...]]` or one such list per shard, *optional*):
            As in [`deletion_rate`].
        num_examples (`int` or `list[list[int]]`, *optional*):
            As in [`deletion_rate`]: each example is deleted at most once.
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
    first = _first_slices(num_shards, num_slices, budget, prior, sequences)
    if num_examples is None:
        examples, rates = None, np.array(_priors(prior, num_shards, num_slices)).ravel() / num_shards
    else:
        examples = _Examples(num_shards, num_slices, num_examples, prior)
        rates = examples.rates
    mortal = _mortal(_members(first, num_slices), rates, until)
    if mortal is None:
        return np.full(runs, math.inf)
    rng = np.random.default_rng(seed)
    blocks = [min(_BLOCK, runs - done) for done in range(0, runs, _BLOCK)]
    if examples is None:
        shards = [rates[members] for members in mortal]
        return np.concatenate([_lifetimes(shards, block, rng) for block in blocks])
    return np.concatenate([_lifetimes_of_examples(mortal, examples, block, rng) for block in blocks])


def _lifetimes(shards: Sequence[np.ndarray], runs: int, rng: np.random.Generator) -> np.ndarray:
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
    lifetimes: np.ndarray = np.min([part.max(axis=1) for part in np.split(hit_at, ends, axis=1)], axis=0)
    return lifetimes


def _lifetimes_of_examples(
    shards: Sequence[np.ndarray], examples: "_Examples", runs: int, rng: np.random.Generator
) -> np.ndarray:
    """
    The same where each example is deleted once, each shard being the numbers of the slices that must be hit.

    The first deletion in a slice comes at an exponential time, and its other examples have exponential times after
    that: how many of them come before the end is binomial.
    """
    with np.errstate(divide="ignore"):
        hit_at = rng.exponential(size=(runs, len(examples.rates))) / examples.rates
    end = np.min([hit_at[:, members].max(axis=1) for members in shards], axis=0)[:, None]
    since = np.where(hit_at <= end, end - hit_at, 0.0)
    others = rng.binomial(examples.sizes - 1, -np.expm1(-examples.weights * since))
    deleted: np.ndarray = ((hit_at <= end) * (1.0 + others)).sum(axis=1)
    return deleted


def _mean_count_at_first_death(shards: Sequence[np.ndarray], examples: "_Examples") -> float:
    """
    Expected number of examples deleted when the first of the shards dies, each being the slices that must be hit.

    An example counts if at its own time the system still was alive: the integral, over that time, of its density times
    the probability of life given that this one is not deleted yet. Examples of a slice have the same.
    """
    step = 1 / 16
    rates, sizes, weights = examples.rates, examples.sizes, examples.weights
    mortal = np.concatenate(shards)
    start, end = math.log(1e-18 / rates.sum()), math.log((45 + math.log(len(mortal))) / rates[mortal].min())
    t = np.exp(np.arange(start, end + step, step))
    log_hit = [_log_hit(np.outer(t, rates[members])) for members in shards]
    dead = np.array([part.sum(axis=1) for part in log_hit])
    alive = -np.expm1(dead)
    density = t[:, None] * weights * np.exp(-np.outer(t, weights))
    counted = sizes * density * alive.prod(axis=0)[:, None]
    for shard, members in enumerate(shards):
        others = np.delete(alive, shard, axis=0).prod(axis=0)
        # One example of the slice is not deleted yet; where it is the only one, the slice is not hit.
        with np.errstate(divide="ignore"):
            without = _log_hit(np.outer(t, weights[members] * (sizes[members] - 1)))
        given = -np.expm1(dead[shard][:, None] - log_hit[shard] + without)
        counted[:, members] = (sizes * density)[:, members] * given * others[:, None]
    return step * math.fsum(counted.sum(axis=1).tolist())


def _mean_time_to_first_death(shards: Sequence[np.ndarray]) -> float:
    """
    The integral over t of the probability that every shard is alive, 1 - product over its slices of 1 - exp(-rate t).

    With t = exp(y) the steps at the time scales of very different rates are equally wide and the integrand is smooth
    and falls off on both sides, where the trapezoidal rule converges exponentially: this step width is good to the
    last digits. Adaptive quadrature over t misses the short scales.
    """
    step = 1 / 16
    rates = np.concatenate(shards)
    # Shards are often alike.
    kinds = Counter(tuple(sorted(shard.tolist())) for shard in shards)
    start, end = math.log(1e-18 / rates.sum()), math.log((45 + math.log(len(rates))) / rates.min())
    total: list[float] = []
    for y in np.array_split(np.arange(start, end + step, step), 16):
        t = np.exp(y)
        alive = np.ones_like(t)
        for shard, number in kinds.items():
            distinct, counts = np.unique(shard, return_counts=True)
            alive *= (-np.expm1((counts * _log_hit(np.outer(t, distinct))).sum(axis=1))) ** number
        total.extend(alive * t)
    return step * math.fsum(total)


def _log_hit(x: np.ndarray) -> np.ndarray:
    """The logarithm of 1 - exp(-x), precise for small and for large x."""
    small = np.log(-np.expm1(-np.minimum(x, 1.0)))
    logarithm: np.ndarray = np.where(x < 1.0, small, np.log1p(-np.exp(-np.maximum(x, 1.0))))
    return logarithm


def _first_slices(
    num_shards: int, num_slices: int, budget: int | None, prior: Prior | None, sequences: Sequences | None
) -> list[set[int]]:
    require_int("num_shards", num_shards, 1)
    require_int("num_slices", num_slices, 1)
    if budget is not None:
        require_int("budget", budget, 1)
    if sequences is not None:
        return [{s[0] for s in shard} for shard in _checked_sequences(sequences, num_shards, num_slices, budget)]
    budget = num_slices if budget is None else budget
    if prior is not None and budget < num_slices:
        raise ConfigError(
            f"budget={budget} with a prior over num_slices={num_slices} slices: the rate depends on the slices that "
            "the sequences start with. Give `sequences`, from `select_sequences` for example."
        )
    starts = min(budget, num_slices)
    # Evenly spaced, as the default selection has it: without replacement it matters a little which slices are larger.
    return [{k * num_slices // starts for k in range(starts)}] * num_shards


def _checked_sequences(
    sequences: Sequences, num_shards: int, num_slices: int, budget: int | None
) -> list[list[tuple[int, ...]]]:
    per_shard = _is_list(sequences) and _is_list(sequences[0]) and _is_list(sequences[0][0])
    given: list[Any] = list(sequences) if per_shard else [sequences] * num_shards
    if len(given) != num_shards:
        raise ConfigError(
            f"`sequences` lists sequences for {counted(len(given), 'shard')}, but num_shards={num_shards}. Give one "
            "list for all shards or one per shard."
        )
    lists = [check_prefixes(shard, num_slices) for shard in given]
    wrong = sorted({len(shard) for shard in lists} - {budget})
    if wrong and budget is not None:
        raise ConfigError(
            f"`sequences` gives a shard {counted(wrong[0], 'sequence')}, but budget={budget}. Make them agree."
        )
    return lists


def _checked_sets(first_slices_alive: Iterable[Iterable[int]], num_shards: int, num_slices: int) -> list[set[int]]:
    try:
        sets = [set(alive) for alive in first_slices_alive]
    except TypeError as error:
        raise ConfigError(
            f"`first_slices_alive` must be a list of sets of slices, one per shard, got {first_slices_alive!r}."
        ) from error
    if len(sets) != num_shards:
        raise ConfigError(
            f"`first_slices_alive` has {counted(len(sets), 'value')}, but num_shards={num_shards}. Give a set for "
            "every shard, an empty one where it is dead."
        )
    wrong = sorted(set().union(*sets) - set(range(num_slices)), key=repr)
    if wrong:
        raise ConfigError(
            f"`first_slices_alive` holds {wrong[0]!r}, expected slices from 0 to {num_slices - 1} "
            f"(num_slices={num_slices})."
        )
    return sets


class _Examples:
    """
    How many examples each slice has, and how likely each is to be the next one deleted, over all slices of all shards.

    `rates` are those of slices, `weights` those of each of their examples.
    """

    def __init__(self, num_shards: int, num_slices: int, num_examples: int | list[list[int]], prior: Prior | None):
        self.num_slices = num_slices
        self.sizes = np.array(_slice_sizes(num_shards, num_slices, num_examples)).ravel()
        self.rates = np.array(_priors(prior, num_shards, num_slices)).ravel() / num_shards
        if prior is None:
            # Every example is as likely as any other, so larger slices are hit more often.
            self.rates = self.sizes / self.sizes.sum()
        self.weights = self.rates / self.sizes

    def members(self, first_slices: Iterable[Iterable[int]]) -> list[np.ndarray]:
        return _members(first_slices, self.num_slices)


def _members(first_slices: Iterable[Iterable[int]], num_slices: int) -> list[np.ndarray]:
    """Per shard, the numbers of its first slices among all slices of the system."""
    return [np.array([shard * num_slices + s for s in sorted(alive)]) for shard, alive in enumerate(first_slices)]


def _mortal(members: list[np.ndarray], rates: np.ndarray, until: str) -> list[np.ndarray] | None:
    """The groups of slices of which the first to be hit altogether ends it; `None` if nothing does."""
    if until == "exhausted":
        members = [np.concatenate(members)]
    return [group for group in members if rates[group].min() > 0] or None


def _slice_sizes(num_shards: int, num_slices: int, num_examples: int | list[list[int]]) -> list[list[int]]:
    cells = num_shards * num_slices
    if isinstance(num_examples, int) and not isinstance(num_examples, bool):
        if num_examples < cells:
            raise ConfigError(
                f"num_examples={num_examples}, but num_shards={num_shards} and num_slices={num_slices} make {cells} "
                "slices. Every slice needs an example: have fewer slices."
            )
        share, extra = divmod(num_examples, cells)
        return [[share + (s * num_shards + k < extra) for s in range(num_slices)] for k in range(num_shards)]
    rows = [list(row) if _is_list(row) else row for row in num_examples] if _is_list(num_examples) else []
    good = (
        len(rows) == num_shards
        and all(isinstance(row, list) and len(row) == num_slices for row in rows)
        and all(isinstance(n, (int, np.integer)) and not isinstance(n, bool) and n >= 1 for row in rows for n in row)
    )
    if not good:
        raise ConfigError(
            f"`num_examples` must be a whole number, or {num_shards} lists (num_shards) of {num_slices} whole numbers "
            f"from 1 (num_slices), got {num_examples!r}."
        )
    return rows


def _priors(prior: Prior | None, num_shards: int, num_slices: int) -> list[Sequence[float]]:
    """The prior of every shard."""
    if prior is None:
        return [[1 / num_slices] * num_slices] * num_shards
    if not _is_list(prior):
        raise ConfigError(f"`prior` must be a list of probabilities or one such list per shard, got {prior!r}.")
    priors: list[Sequence[float]] = list(prior) if _is_list(prior[0]) else [prior] * num_shards
    if len(priors) != num_shards:
        raise ConfigError(
            f"`prior` has {counted(len(priors), 'list')}, but num_shards={num_shards}. Give one list for all shards "
            "or one per shard."
        )
    for values in priors:
        check_prior(values, num_slices)
    return priors


def _rates(
    first_slices: Iterable[Iterable[int]], num_shards: int, num_slices: int, prior: Prior | None
) -> list[np.ndarray]:
    """For every shard, the probability that a request hits each of its first slices."""
    return [
        np.array([values[s] / num_shards for s in sorted(alive)], dtype=float)
        for values, alive in zip(_priors(prior, num_shards, num_slices), first_slices)
    ]


def _harmonic(n: int) -> float:
    return math.fsum(1 / k for k in range(1, n + 1))


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, (list, tuple, np.ndarray)) and len(value) > 0
