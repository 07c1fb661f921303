"""
Streams of deletion requests: what a system serves meanwhile, and what keeping it up costs.

Work is counted on one machine, in multiples of one full LoRA fine-tuning of all the data. Requests hit the slices of
all shards independently, uniformly or by a prior; the same seed gives every method the same requests.
"""

import random
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Protocol

from ..config import S3TConfig, require_int
from ..errors import ConfigError
from ..plan.growth import Growth
from ..plan.stages import Plan, StageKey
from ..sequences.families import stage_work


__all__ = [
    "Policy", "Shard", "Stream", "drawn_requests", "families_under", "frontier", "full_retraining", "sisa", "stream",
]  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """
    How far a shard is grown again after a request has hit it.

    Args:
        trigger (`int`): Nothing is done while the shard serves at least this depth.
        target (`int`): Else stages are grown, the worthiest first, until it serves this depth.
        extra (`int`, defaults to 0): And after that so many stages more, for later requests.
        until_exhausted (`bool`, defaults to `False`): As the paper does: nothing is grown before no shard of the
            system serves any more; then all of them are trained anew.

    With `trigger=1` a shard is trained again when it is dead, with `trigger` and `target` at the number of slices it
    always serves at full depth.
    """

    trigger: int
    target: int
    extra: int = 0
    until_exhausted: bool = False

    def check(self, num_slices: int) -> None:
        """Refuse, by a [`~hf_s3t.errors.ConfigError`], a policy that shards of so many slices cannot follow."""
        require_int("trigger", self.trigger, 0)
        require_int("target", self.target, 0)
        require_int("extra", self.extra, 0)
        if not self.trigger <= self.target <= num_slices:
            raise ConfigError(
                f"A policy with trigger={self.trigger} and target={self.target}, expected the trigger to be no more "
                f"than the target, and that no more than num_slices={num_slices}."
            )
        if self.until_exhausted and (self.trigger or self.target or self.extra):
            raise ConfigError(
                f"A policy with until_exhausted=True and trigger={self.trigger}, target={self.target}, extra="
                f"{self.extra}: expected 0 of each, as nothing is grown before."
            )


class Shard(Protocol):
    """One shard during a stream. Depths and work are its own: a full fine-tuning of the shard is 1."""

    depth: int

    def hit(self, slice_: int) -> list[int]:
        """Forget an example of a slice, grow again what shall be, and say of what depths that was."""

    def renew(self) -> list[int]:
        """Train all of it anew, and say of what depths that was."""


@dataclass(frozen=True)
class Stream:
    """
    What a stream of requests was to a system.

    Args:
        first_work (`float`): Work of the first training, in full fine-tunings of all data.
        work (`float`): Work of everything that was grown again.
        depths (`tuple[float, ...]`): Share of the time, over requests and shards, at which each depth from 0 served.
        requests (`int`): Number of requests.
        grown (`tuple[int, ...]`): How many stages of each depth from 0 were grown again.
        together (`dict[tuple[int, ...], float]`): Share of the time at which the shards served these depths together,
            deepest first.
    """

    first_work: float
    work: float
    depths: tuple[float, ...]
    requests: int
    grown: tuple[int, ...] = ()
    together: dict[tuple[int, ...], float] = field(default_factory=dict, repr=False)

    @property
    def mean_depth(self) -> float:
        """The mean depth that served."""
        return sum(depth * share for depth, share in enumerate(self.depths))

    def mean_quality(self, by_depth: Mapping[int, float] | Sequence[float]) -> float:
        """The mean of a quality over the stream, which is given for each depth from 0."""
        return sum(by_depth[depth] * share for depth, share in enumerate(self.depths) if share)


def stream(
    shards: Sequence[Shard],
    first_work: float,
    works: Sequence[float],
    *,
    requests: int = 1000,
    prior: Sequence[float] | None = None,
    until_exhausted: bool = False,
    seed: int = 0,
) -> Stream:
    """
    Send requests to the shards of a system.

    Args:
        shards (sequence of [`Shard`]): Fresh ones, all alike.
        first_work (`float`): Work of a shard's first training, in full fine-tunings of the shard.
        works (sequence of `float`): Work of a stage of each depth from 0 to the number of slices, likewise.
        requests (`int`, defaults to 1000): Number of requests.
        prior (sequence of `float`, *optional*): Probability of each slice of a shard; uniform if not given.
        until_exhausted (`bool`, defaults to `False`): Train all shards anew when none serves any more.
        seed (`int`, defaults to 0): Seed of the requests.

    Example:

    ```python
    >>> from hf_s3t.analysis.streams import sisa

    >>> at_once = sisa(4, num_shards=5, requests=1000)
    >>> at_once.mean_depth, round(at_once.work)
    (4.0, 367)
    ```
    """
    require_int("requests", requests, 1)
    num_slices = len(works) - 1
    grown, served = Counter[int](), Counter[tuple[int, ...]]()
    for shard, slice_ in drawn_requests(len(shards), num_slices, requests, prior, seed):
        grown.update(shards[shard].hit(slice_))
        if until_exhausted and not any(member.depth for member in shards):
            for member in shards:
                grown.update(member.renew())
        served[tuple(sorted((member.depth for member in shards), reverse=True))] += 1
    time_at = Counter[int]()
    for depths, time in served.items():
        time_at.update({depth: time * depths.count(depth) for depth in set(depths)})
    counts = tuple(grown[depth] for depth in range(num_slices + 1))
    return Stream(
        first_work,
        sum(count * work for count, work in zip(counts, works, strict=True)) / len(shards),
        tuple(time_at[depth] / requests / len(shards) for depth in range(num_slices + 1)),
        requests,
        counts,
        {depths: time / requests for depths, time in served.items()},
    )


def families_under(
    family: Sequence[tuple[int, ...]],
    num_slices: int,
    policy: Policy,
    *,
    num_shards: int = 1,
    replay: float = 1.0,
    requests: int = 1000,
    prior: Sequence[float] | None = None,
    horizon: int = 100,
    seed: int = 0,
) -> Stream:
    """
    A stream to S3T with a family of stages in each shard, which is grown again in the order of its worth.

    Args:
        family (sequence of prefixes): The stages of each shard, parents before children.
        num_slices (`int`): Number of slices `L` of each shard.
        policy ([`Policy`]): How far a shard is grown again.
        num_shards (`int`, defaults to 1): Number of shards `m`.
        replay (`float`, defaults to 1.0): Share of the earlier slices' rows in an epoch.
        requests (`int`, defaults to 1000): Number of requests.
        prior (sequence of `float`, *optional*): Probability of each slice of a shard; uniform if not given.
        horizon (`int`, defaults to 100): Number of requests by which stages are weighed.
        seed (`int`, defaults to 0): Seed of the requests.
    """
    policy.check(num_slices)
    growing = _Growing(family, num_slices, replay, prior, horizon)
    shards = [_OfFamily(growing, policy) for _ in range(num_shards)]
    anew = policy.until_exhausted
    works = growing.works
    return stream(shards, growing.first_work, works, requests=requests, prior=prior, until_exhausted=anew, seed=seed)


def sisa(
    num_slices: int,
    policy: Policy | None = None,
    *,
    num_shards: int = 1,
    replay: float = 1.0,
    requests: int = 1000,
    prior: Sequence[float] | None = None,
    reordered: bool = True,
    seed: int = 0,
) -> Stream:
    """
    A stream to SISA: one chain of checkpoints of the whole adapter in each shard, rolled back and trained again.

    It is given what helps it too: replay, training again only when a depth is lost that matters, and another order of
    slices each time: what was hit goes last, and of a prior the likeliest slices, which makes no difference without.

    Args:
        num_slices (`int`): Number of slices `L` of each shard.
        policy ([`Policy`], *optional*): How far a shard is grown again; at once and all of it if not given.
        num_shards (`int`, defaults to 1): Number of shards `m`.
        replay (`float`, defaults to 1.0): Share of the earlier slices' rows in an epoch.
        requests (`int`, defaults to 1000): Number of requests.
        prior (sequence of `float`, *optional*): Probability of each slice of a shard; uniform if not given.
        reordered (`bool`, defaults to `True`): Whether what is trained anew comes in another order.
        seed (`int`, defaults to 0): Seed of the requests.
    """
    policy = Policy(num_slices, num_slices) if policy is None else policy
    policy.check(num_slices)
    # Every unit trains the whole adapter, forward and backward through all layers.
    works = [0.0, *((1 + replay * (depth - 1)) / num_slices for depth in range(1, num_slices + 1))]
    shards = [_Chain(num_slices, policy, prior, reordered) for _ in range(num_shards)]
    anew = policy.until_exhausted
    return stream(shards, sum(works), works, requests=requests, prior=prior, until_exhausted=anew, seed=seed)


def full_retraining(num_shards: int = 1, *, requests: int = 1000, every: int = 1) -> Stream:
    """
    A stream to plain fine-tuning, begun anew after every so many requests; what is waiting is not forgotten meanwhile.

    Args:
        num_shards (`int`, defaults to 1): Number of shards, of which only the one that was hit is trained again.
        requests (`int`, defaults to 1000): Number of requests.
        every (`int`, defaults to 1): Requests that are gathered.
    """
    require_int("every", every, 1)
    return Stream(1.0, requests // every / num_shards, (0.0, 1.0), requests)


def frontier(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """
    Of (work, quality), those that none beats: no other has at least the quality for less work, or more for no more.

    Example:

    ```python
    >>> from hf_s3t.analysis.streams import frontier

    >>> frontier([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9)])
    [(1.0, 0.5), (3.0, 0.9)]
    ```
    """
    kept: list[tuple[float, float]] = []
    for work, quality in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not kept or quality > kept[-1][1]:
            kept.append((work, quality))
    return kept


# Requests


def drawn_requests(
    num_shards: int, num_slices: int, requests: int, prior: Sequence[float] | None = None, seed: int = 0
) -> Iterator[tuple[int, int]]:
    """
    The requests of a stream: shard and slice of each.

    Args:
        num_shards (`int`): Number of shards `m`; each is hit as often.
        num_slices (`int`): Number of slices `L` of each.
        requests (`int`): Number of requests.
        prior (sequence of `float`, *optional*): Probability of each slice of a shard; uniform if not given.
        seed (`int`, defaults to 0): Seed of the requests.
    """
    rng = random.Random(seed)
    bounds = list(accumulate([1 / num_slices] * num_slices if prior is None else prior))
    for _ in range(requests):
        # Python promises the stream of `random()` alone.
        shard = int(rng.random() * num_shards)
        yield shard, min(bisect(bounds, rng.random() * bounds[-1]), num_slices - 1)


# Shards


class _Growing:
    """A family, and in which order it grows from each of its states: found once for each, as states come again."""

    def __init__(
        self,
        family: Sequence[tuple[int, ...]],
        num_slices: int,
        replay: float,
        prior: Sequence[float] | None,
        horizon: int,
    ):
        settings = S3TConfig(
            num_slices=num_slices,
            sequence_selection=[list(prefix) for prefix in family],
            deletion_prior=None if prior is None else list(prior),
            score_horizon=horizon,
            replay=replay,
        )
        self.plan = Plan.from_config(settings)
        self._growth = Growth(self.plan, settings)
        self.works = [0.0, *(stage_work(depth, num_slices, replay) for depth in range(1, num_slices + 1))]
        self.all = frozenset(frozenset(key.prefix) for key in self.plan.stages())
        self.first_work = sum(self.works[len(slices)] for slices in self.all)
        self._known: dict[frozenset[frozenset[int]], frozenset[int] | None] = {}

    def next(self, there: frozenset[frozenset[int]]) -> frozenset[int] | None:
        """The set that is grown next where these are there."""
        if there not in self._known:
            # On which stages it stands is all the same here: what they are worth depends on sets.
            step = self._growth.next([StageKey(0, tuple(sorted(slices))) for slices in there])
            self._known[there] = None if step is None else frozenset(step.key.prefix)
        return self._known[there]


class _OfFamily:
    """A shard of S3T: the sets of slices that its valid stages saw."""

    def __init__(self, growing: _Growing, policy: Policy):
        self._growing, self._policy = growing, policy
        self._there = growing.all
        self.depth = max(map(len, self._there))

    def hit(self, slice_: int) -> list[int]:
        there = frozenset(slices for slices in self._there if slice_ not in slices)
        depth, added, left = max(map(len, there), default=0), list[int](), self._policy.extra
        if depth < self._policy.trigger:
            while (grown := self._growing.next(there)) is not None:
                if depth >= self._policy.target:
                    if not left:
                        break
                    left -= 1
                there |= {grown}
                added.append(len(grown))
                depth = max(depth, len(grown))
        self._there, self.depth = there, depth
        return added

    def renew(self) -> list[int]:
        self._there = self._growing.all
        depths = list(map(len, self._there))
        self.depth = max(depths)
        return depths


class _Chain:
    """A shard of SISA: one chain, in an order that is chosen anew for what is trained anew."""

    def __init__(self, num_slices: int, policy: Policy, prior: Sequence[float] | None, reordered: bool):
        self._policy, self._reordered = policy, reordered
        likely = [1.0] * num_slices if prior is None else prior
        self._order = sorted(range(num_slices), key=lambda slice_: (likely[slice_] if reordered else 0, slice_))
        self._likely = likely
        self.depth = num_slices

    def hit(self, slice_: int) -> list[int]:
        place = self._order.index(slice_)
        if place < self.depth:
            self.depth = place
        if self._reordered:
            # Of what is to be trained anew, the likeliest last, and of those as likely what was hit.
            rest = [s for s in self._order[self.depth :] if s != slice_]
            at = sum(self._likely[s] <= self._likely[slice_] for s in rest)
            self._order[self.depth :] = [*rest[:at], slice_, *rest[at:]]
        if self.depth >= self._policy.trigger:
            return []
        added = range(self.depth + 1, self._policy.target + 1)
        self.depth = max(self.depth, self._policy.target)
        return list(added)

    def renew(self) -> list[int]:
        self.depth = len(self._order)
        return list(range(1, self.depth + 1))
