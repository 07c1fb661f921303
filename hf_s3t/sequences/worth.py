"""What stages of a shard are worth: the depth that they add, now and after the requests to expect, per work."""

import functools
import random
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from ..config import FAMILY_MOST_SLICES, S3TConfig
from .families import stage_work
from .optimal import hit_set_weights, mean_depth_weights


# Where sets of slices are too many, so many patterns of hits are drawn in their place, by this seed.
_DRAWN = 256
_SEED = 20261129
# No pattern changes any more, in all likelihood, after so many requests for each slice.
_MOST_DRAWN = 20


class Worth(NamedTuple):
    """
    What is gained by the stages up to one that is missing, from those on which they can stand.

    Args:
        now (`float`): Depth that they add to what serves now.
        later (`float`): Depth that they add in expectation, over the requests to come.
        work (`float`): What training them costs, in full fine-tunings of the shard.
    """

    now: float
    later: float
    work: float

    @property
    def order(self) -> tuple[float, float]:
        """What is worthier compares greater: what serves now first, per work; then what serves later, per work."""
        return self.now / self.work, self.later / self.work


class Outlook:
    """
    The requests that one shard has to expect.

    Args:
        num_slices (`int`): Number of slices `L`.
        prior (sequence of `float`, *optional*): Probability of each slice to be hit by a request; else uniform.
        horizon (`int`, defaults to 100): Number of requests over which the depth is averaged.
        replay (`float`, defaults to 1.0): Share of the earlier slices' rows in an epoch; it decides the work.

    Up to 10 slices all sets of hit slices are weighed exactly; beyond, a fixed sample of them.

    Example:

    ```python
    >>> from hf_s3t.sequences.worth import Outlook

    >>> Outlook(2).order([(0,), (1,), (0, 1)])
    ((0,), (0, 1), (1,))
    ```
    """

    def __init__(self, num_slices: int, prior: Sequence[float] | None = None, horizon: int = 100, replay: float = 1.0):
        uniform = (1 / num_slices,) * num_slices
        # Of whole numbers sums are exact, so what ties by symmetry ties here.
        self._hits, self._weights, self._total = patterns(uniform if prior is None else tuple(prior), horizon)
        self._known: dict[tuple[int, ...], np.ndarray] = {}
        self._work = [stage_work(depth, num_slices, replay) for depth in range(1, num_slices + 1)]

    def work(self, depth: int) -> float:
        """What training a stage of a depth costs, in full fine-tunings of the shard."""
        return self._work[depth - 1]

    def expected_depth(self, stages: Collection[tuple[int, ...]]) -> float:
        """The mean depth that stages serve over the requests to come, if none is grown again."""
        return float(self._served(stages) @ self._weights) / self._total

    def worths(self, missing: Sequence[tuple[int, ...]], there: Collection[tuple[int, ...]]) -> list[Worth]:
        """
        What each missing stage is worth, with the missing ones on which it stands.

        Args:
            missing (sequence of prefixes): What can be grown, parents before children.
            there (collection of prefixes): The valid stages.

        Returns:
            `list[Worth]`: One for each of `missing`.
        """
        if not missing:
            return []
        served, serves_now = self._served(there), max(map(len, there), default=0)
        rows = {prefix: row for row, prefix in enumerate(missing)}
        # The last row is what is there already: on it stands what stands on no missing stage.
        below = np.array([rows.get(prefix[:-1], -1) for prefix in missing])
        sizes = np.array([len(prefix) for prefix in missing])
        after = np.empty((len(missing) + 1, len(served)), dtype=np.int8)
        after[-1], work = served, np.zeros(len(missing) + 1)
        for depth in np.unique(sizes):
            level = np.flatnonzero(sizes == depth)
            depths = [self._depths(missing[row]) for row in level.tolist()]
            after[level] = np.maximum(after[below[level]], depths)
            work[level] = work[below[level]] + self.work(int(depth))
        later = (after[:-1] - served) @ self._weights / self._total
        now = np.maximum(sizes - serves_now, 0)
        return [Worth(*values) for values in zip(now.tolist(), later.tolist(), work.tolist(), strict=False)]

    def first(
        self, missing: Sequence[tuple[int, ...]], there: Collection[tuple[int, ...]]
    ) -> tuple[tuple[int, ...], Worth] | None:
        """
        The missing stage to grow first, and what it is worth with those above it for which it is grown.

        Args:
            missing (sequence of prefixes): What can be grown, parents before children; the first of equals is taken.
            there (collection of prefixes): The valid stages.
        """
        if not missing:
            return None
        worths = self.worths(missing, there)
        # The first of equals.
        best = max(range(len(missing)), key=lambda i: worths[i].order)
        known = set(missing)
        lineage = (missing[best][:depth] for depth in range(1, len(missing[best]) + 1))
        return next(prefix for prefix in lineage if prefix in known), worths[best]

    def order(self, family: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
        """
        The stages of a family, parents before children, in the order in which they are worth growing.

        Of equals the smallest set comes first, and of those the one of the lowest slices: a family has this one order,
        in whatever other it is given.
        """
        left, grown = sorted(family, key=lambda prefix: (len(prefix), sorted(prefix))), list[tuple[int, ...]]()
        while (step := self.first(left, grown)) is not None:
            grown.append(step[0])
            left.remove(step[0])
        return tuple(grown)

    def _served(self, stages: Collection[tuple[int, ...]]) -> np.ndarray:
        served = np.zeros(len(self._hits), dtype=np.int8)
        for prefix in stages:
            np.maximum(served, self._depths(prefix), out=served)
        return served

    def _depths(self, prefix: tuple[int, ...]) -> np.ndarray:
        """The depth of a stage for each pattern of hits: all of it, or nothing."""
        if prefix not in self._known:
            is_hit = self._hits[:, prefix].any(axis=1)
            self._known[prefix] = np.where(is_hit, 0, len(prefix)).astype(np.int8)
        return self._known[prefix]


@functools.lru_cache(maxsize=64)  # shards that expect the same share what is known of stages
def _outlook(num_slices: int, prior: tuple[float, ...] | None, horizon: int, replay: float) -> Outlook:
    return Outlook(num_slices, prior, horizon, replay)


def outlook_of(config: S3TConfig, shard: int, horizon: int | None = None) -> Outlook:
    """The requests that a shard has to expect by a config, or so many; shards that expect the same share one."""
    prior = config.prior_of(shard)
    horizon = config.score_horizon if horizon is None else horizon
    return _outlook(config.num_slices, None if prior is None else tuple(prior), horizon, config.replay)


@functools.lru_cache(maxsize=64)  # the shards of a system ask the same question
def patterns(prior: tuple[float, ...], horizon: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Which slices are hit, how much each such pattern counts in whole numbers, and how much all of them do."""
    size = len(prior)
    if size <= FAMILY_MOST_SLICES:
        states = np.arange(1 << size)
        hits = (states[:, None] >> np.arange(size) & 1).astype(bool)
        weights = hit_set_weights(prior, horizon)
        # Requests after which all is hit count as well: of two shards the one that they leave more to is worth more.
        left = float(mean_depth_weights(list(prior), horizon)[:-1].sum())
        if left == 0:
            # Nothing is ever left, or, without requests, everything.
            return hits, (states == 0).astype(float) if horizon == 0 else weights, 1.0
        return hits, weights, float(weights.sum()) * horizon / left
    rng = random.Random(_SEED)
    hits = np.zeros((_DRAWN, size), dtype=bool)
    for pattern in hits:
        # Python promises the stream of `random()` alone.
        requests = 1 + int(rng.random() * max(horizon, 1))
        bounds = np.cumsum(prior)
        draws = [rng.random() * bounds[-1] for _ in range(min(requests, _MOST_DRAWN * size))]
        pattern[np.minimum(np.searchsorted(bounds, draws, side="right"), size - 1)] = True
    return hits, np.ones(_DRAWN), float(_DRAWN)
