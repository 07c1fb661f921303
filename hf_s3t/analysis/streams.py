"""
Streams of deletion requests: what a system serves meanwhile, and what keeping it up costs.

Work is counted on one machine, in multiples of one full LoRA fine-tuning of all the data. Requests hit the slices of
all shards independently, uniformly or by a prior; the same seed gives every method the same requests.
"""

import random
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple, Protocol

from ..checks import check_prior, require_int
from ..errors import ConfigError
from ..sequences.families import stage_work
from .growing import Growing


__all__ = ["Policy", "Stream", "System", "drawn_requests", "families_under", "full_retraining", "sisa", "stream"]


@dataclass(frozen=True)
class Policy:
    """
    How far a system is grown again after requests.

    Args:
        trigger (`int`):
            Nothing is done for a shard that serves at least this depth. With one more than there are slices, all
            shards are looked at; with 0, none ever is.
        target (`int`, defaults to 0):
            The others are grown, the worthiest stage first, until they serve this depth.
        extra (`int` or `None`, defaults to 0):
            And after that so many stages more, the worthiest of all these shards; `None` for all that are missing.
        every (`int`, defaults to 1):
            Requests that are gathered before any of this is done.
        together (`bool`, defaults to `False`):
            Whether it is done for all shards at once, when each of them serves less than `trigger`.

    Example:

    ```python
    >>> from hf_s3t.analysis.streams import Policy

    >>> Policy.all_at_once(4)
    Policy(trigger=5, target=4, extra=None, every=1, together=False)
    >>> Policy.to_depth(3, 4)
    Policy(trigger=3, target=4, extra=0, every=1, together=False)
    ```
    """

    trigger: int
    target: int = 0
    extra: int | None = 0
    every: int = 1
    together: bool = False

    @classmethod
    def never(cls) -> "Policy":
        """What is gone stays away."""
        return cls(0)

    @classmethod
    def all_at_once(cls, num_slices: int, every: int = 1) -> "Policy":
        """All that is missing, after each request or after so many."""
        return cls(num_slices + 1, num_slices, None, every)

    @classmethod
    def stages(cls, num_slices: int, stages: int, every: int = 1) -> "Policy":
        """So many stages after each request or after so many, the worthiest of all shards: `train(max_stages=...)`."""
        return cls(num_slices + 1, 0, stages, every)

    @classmethod
    def to_depth(cls, trigger: int, target: int, every: int = 1) -> "Policy":
        """Where a shard serves less than `trigger`, until it serves `target`."""
        return cls(trigger, target, 0, every)

    @classmethod
    def when_dead(cls, num_slices: int) -> "Policy":
        """A shard anew as soon as it is dead."""
        return cls(1, num_slices, None)

    @classmethod
    def when_exhausted(cls, num_slices: int) -> "Policy":
        """All shards anew when the last one is dead, as published."""
        return cls(1, num_slices, None, together=True)

    def check(self, num_slices: int) -> None:
        """Refuse, by a [`~hf_s3t.errors.ConfigError`], a policy that shards of so many slices cannot follow."""
        require_int("trigger", self.trigger, 0)
        require_int("target", self.target, 0)
        require_int("every", self.every, 1)
        if self.extra is not None:
            require_int("extra", self.extra, 0)
        if self.target > num_slices:
            raise ConfigError(
                f"A policy with target={self.target}, but a shard of num_slices={num_slices} serves no deeper than "
                "that. Lower the target."
            )


class Grown(NamedTuple):
    """Work in full fine-tunings of a shard, and the number of stages."""

    work: float
    stages: int


class System(Protocol):
    """A system during a stream."""

    depths: list[int]

    def hit(self, shard: int, slice_: int) -> None:
        """Forget an example of a slice."""

    def grow(self, shards: Collection[int], target: int, extra: int | None) -> Grown:
        """Grow shards until each of them serves a depth, and then so many stages more among them."""


@dataclass(frozen=True)
class Stream:
    """
    What streams of requests were to a system, in the mean over them.

    Args:
        first_work (`float`): Work of the first training, in full fine-tunings of all data.
        work (`float`): Work of everything that was grown again.
        depths (`tuple[float, ...]`): Share of the time, over requests and shards, at which each depth from 0 served.
        requests (`int`): Number of requests.
        stages (`float`): Number of stages that were grown again.
        deaths (`float`): Number of requests that left their shard with nothing to serve, until it was grown again.
        exhaustions (`float`): Number of those that left the last shard so.
        depth_after (`tuple[float, ...]`): Mean depth over shards before any request, and after each of them.
        work_after (`tuple[float, ...]`): Work of what was grown again until then.
        together (`dict[tuple[int, ...], float]`): Share of the time at which the shards served these depths together,
            lowest first.
    """

    first_work: float
    work: float
    depths: tuple[float, ...]
    requests: int
    stages: float
    deaths: float
    exhaustions: float
    depth_after: tuple[float, ...]
    work_after: tuple[float, ...]
    together: Mapping[tuple[int, ...], float] = field(default_factory=dict, repr=False)

    @property
    def mean_depth(self) -> float:
        """The mean depth that served."""
        return sum(depth * share for depth, share in enumerate(self.depths))

    def mean_quality(self, by_depth: Mapping[int, float] | Sequence[float]) -> float:
        """The mean of a quality over the stream, which is given for each depth from 0."""
        return sum(by_depth[depth] * share for depth, share in enumerate(self.depths) if share)


def stream(
    fresh: Callable[[], System],
    num_slices: int,
    policy: Policy,
    *,
    first_work: float,
    requests: int = 1000,
    runs: int = 1,
    prior: Sequence[float] | None = None,
    seed: int = 0,
) -> Stream:
    """
    Send streams of requests to a system that follows a policy.

    Args:
        fresh (callable): Makes the system, freshly trained.
        num_slices (`int`): Number of slices `L` of each of its shards.
        policy ([`Policy`]): How far it is grown again.
        first_work (`float`): Work of a shard's first training, in full fine-tunings of the shard.
        requests (`int`, defaults to 1000): Number of requests.
        runs (`int`, defaults to 1): Number of streams.
        prior (sequence of `float`, *optional*): Probability of each slice of a shard; uniform if not given.
        seed (`int`, defaults to 0): Seed of the requests, which are the same for every system of as many shards.
    """
    require_int("requests", requests, 1)
    require_int("runs", runs, 1)
    policy.check(num_slices)
    if prior is not None:
        check_prior(prior, num_slices)
    rng = random.Random(seed)
    served = Counter[tuple[int, ...]]()
    depth_after, work_after = [0] * (requests + 1), [0.0] * (requests + 1)
    stages = shards = deaths = exhaustions = 0
    for _ in range(runs):
        system, spent = fresh(), 0.0
        shards = len(system.depths)
        # What is known of the depths as they were: most requests change none.
        before: list[int] = []
        total, sorted_depths = 0, tuple[int, ...]()
        depth_after[0] += sum(system.depths)
        for number, (shard, slice_) in enumerate(drawn_requests(rng, shards, num_slices, requests, prior), start=1):
            if system.depths[shard]:
                system.hit(shard, slice_)
                if not system.depths[shard]:
                    deaths += 1
                    exhaustions += not any(system.depths)
            if number % policy.every == 0:
                grown = _follow(policy, system)
                spent += grown.work
                stages += grown.stages
            if system.depths != before:
                before = list(system.depths)
                sorted_depths, total = tuple(sorted(before)), sum(before)
            served[sorted_depths] += 1
            depth_after[number] += total
            work_after[number] += spent
    time_at = Counter[int]()
    for depths, time in served.items():
        time_at.update({depth: time * depths.count(depth) for depth in set(depths)})
    whole = runs * shards
    return Stream(
        first_work=first_work,
        work=work_after[-1] / whole,
        depths=tuple(time_at[depth] / (whole * requests) for depth in range(num_slices + 1)),
        requests=requests,
        stages=stages / runs,
        deaths=deaths / runs,
        exhaustions=exhaustions / runs,
        depth_after=tuple(depth / whole for depth in depth_after),
        work_after=tuple(work / whole for work in work_after),
        together={depths: time / (runs * requests) for depths, time in served.items()},
    )


def families_under(
    family: Sequence[tuple[int, ...]],
    num_slices: int,
    policy: Policy,
    *,
    num_shards: int = 1,
    by_sets: bool = True,
    replay: float = 1.0,
    works: Sequence[float] | None = None,
    requests: int = 1000,
    runs: int = 1,
    prior: Sequence[float] | None = None,
    horizon: int = 100,
    seed: int = 0,
) -> Stream:
    """
    Streams to S3T with a family of stages in each shard, which is grown again in the order of its worth.

    Args:
        family (sequence of prefixes):
            The stages of each shard; published ones in the order in which they are planned, parents before children.
        num_slices (`int`): Number of slices `L` of each shard.
        policy ([`Policy`]): How far it is grown again.
        num_shards (`int`, defaults to 1): Number of shards `m`.
        by_sets (`bool`, defaults to `True`): Whether a stage counts by its set, as in plans without idle stages.
        replay (`float`, defaults to 1.0): Share of the earlier slices' rows in an epoch.
        works (sequence of `float`, *optional*):
            What a stage of each depth costs, in full fine-tunings of its shard; else as `stage_work` counts it.
        requests (`int`, defaults to 1000): Number of requests.
        runs (`int`, defaults to 1): Number of streams.
        prior (sequence of `float`, *optional*): Probability of each slice of a shard; uniform if not given.
        horizon (`int`, defaults to 100): Number of requests by which stages are weighed.
        seed (`int`, defaults to 0): Seed of the requests.

    Example:

    ```python
    >>> from hf_s3t.analysis.streams import Policy, families_under
    >>> from hf_s3t.sequences.families import lattice

    >>> found = families_under(lattice(4), 4, Policy.to_depth(3, 3), requests=1000)
    >>> round(found.mean_depth, 1), found.work < 1000
    (3.0, True)
    ```
    """
    require_int("num_shards", num_shards, 1)
    growing = Growing(family, num_slices, by_sets=by_sets, prior=prior, horizon=horizon, replay=replay)
    if works is None:
        works = [stage_work(depth, num_slices, replay) for depth in range(1, num_slices + 1)]
    return streams_of(
        growing, works, policy, num_shards=num_shards, requests=requests, runs=runs, prior=prior, seed=seed
    )


def streams_of(
    growing: Growing,
    works: Sequence[float],
    policy: Policy,
    *,
    num_shards: int = 1,
    requests: int = 1000,
    runs: int = 1,
    prior: Sequence[float] | None = None,
    seed: int = 0,
) -> Stream:
    """What [`families_under`] says of a family in which it is known already what is grown next. Arguments as there."""
    own = [works[len(prefix) - 1] for prefix in growing.stages]
    return stream(
        lambda: _Families(growing, own, num_shards),
        len(works),
        policy,
        first_work=sum(own),
        requests=requests,
        runs=runs,
        prior=prior,
        seed=seed,
    )


def sisa(
    num_slices: int,
    policy: Policy | None = None,
    *,
    num_shards: int = 1,
    replay: float = 1.0,
    works: Sequence[float] | None = None,
    reorders: bool = True,
    requests: int = 1000,
    runs: int = 1,
    prior: Sequence[float] | None = None,
    seed: int = 0,
) -> Stream:
    """
    Streams to SISA: one chain of checkpoints of the whole adapter in each shard, rolled back and trained again.

    It is given what helps it too: replay, training again only when a depth is lost that matters, and another order of
    slices each time: what was hit goes last, and of a prior the likeliest slices, which makes no difference without.

    Args:
        num_slices (`int`): Number of slices `L` of each shard.
        policy ([`Policy`], *optional*): How far it is grown again; at once and all of it if not given.
        num_shards (`int`, defaults to 1): Number of shards `m`.
        replay (`float`, defaults to 1.0): Share of the earlier slices' rows in an epoch.
        works (sequence of `float`, *optional*):
            What training each slice of a chain costs, in full fine-tunings of its shard; else forward and backward
            through all layers, on the rows that it sees.
        reorders (`bool`, defaults to `True`): Whether the order of slices is chosen anew.
        requests (`int`, defaults to 1000): Number of requests.
        runs (`int`, defaults to 1): Number of streams.
        prior (sequence of `float`, *optional*): Probability of each slice of a shard; uniform if not given.
        seed (`int`, defaults to 0): Seed of the requests.

    Example:

    ```python
    >>> from hf_s3t.analysis.streams import sisa

    >>> at_once = sisa(4, num_shards=5, requests=1000)
    >>> at_once.mean_depth, at_once.first_work
    (4.0, 2.5)
    ```
    """
    require_int("num_slices", num_slices, 1)
    require_int("num_shards", num_shards, 1)
    if works is None:
        works = [(1 + replay * (depth - 1)) / num_slices for depth in range(1, num_slices + 1)]
    return stream(
        lambda: _Chains(works, num_shards, prior, reorders),
        num_slices,
        Policy.all_at_once(num_slices) if policy is None else policy,
        first_work=sum(works),
        requests=requests,
        runs=runs,
        prior=prior,
        seed=seed,
    )


def full_retraining(*, requests: int = 1000, every: int = 1) -> Stream:
    """
    A stream to plain fine-tuning of all data, begun anew after every so many requests.

    Its depth is 1, and it never serves less: what is waiting to be forgotten serves on meanwhile, which no other
    method does.

    Args:
        requests (`int`, defaults to 1000): Number of requests.
        every (`int`, defaults to 1): Requests that are gathered.

    Example:

    ```python
    >>> from hf_s3t.analysis.streams import full_retraining

    >>> full_retraining(requests=1000, every=10).work
    100.0
    ```
    """
    require_int("requests", requests, 1)
    require_int("every", every, 1)
    works = tuple(float(number // every) for number in range(requests + 1))
    return Stream(1.0, works[-1], (0.0, 1.0), requests, works[-1], 0.0, 0.0, (1.0,) * (requests + 1), works)


# -- requests ---------------------------------------------------------------------------------------------------------


def drawn_requests(
    rng: random.Random, num_shards: int, num_slices: int, requests: int, prior: Sequence[float] | None = None
) -> Iterator[tuple[int, int]]:
    """
    The shard and the slice that each request of a stream hits.

    Args:
        rng (`random.Random`): Decides it: a fresh one of a seed gives the first stream of that seed.
        num_shards (`int`): Number of shards `m`.
        num_slices (`int`): Number of slices `L` of each.
        requests (`int`): Number of requests.
        prior (sequence of `float`, *optional*): Probability of each slice of a shard; uniform if not given.
    """
    bounds = list(accumulate([1 / num_slices] * num_slices if prior is None else prior))
    for _ in range(requests):
        # Python promises the stream of `random()` alone.
        shard = int(rng.random() * num_shards)
        yield shard, min(bisect(bounds, rng.random() * bounds[-1]), num_slices - 1)


def _follow(policy: Policy, system: System) -> Grown:
    low = [shard for shard, depth in enumerate(system.depths) if depth < policy.trigger]
    if not low or (policy.together and len(low) < len(system.depths)):
        return Grown(0.0, 0)
    return system.grow(low, policy.target, policy.extra)


# -- systems ----------------------------------------------------------------------------------------------------------


class _Families:
    """Shards of S3T, all of one family: which of its stages are there."""

    def __init__(self, growing: Growing, works: Sequence[float], num_shards: int):
        self._growing, self._works = growing, works
        self._states = [growing.all] * num_shards
        self.depths = [growing.depth(growing.all)] * num_shards

    def hit(self, shard: int, slice_: int) -> None:
        self._set(shard, self._growing.without(self._states[shard], slice_))

    def grow(self, shards: Collection[int], target: int, extra: int | None) -> Grown:
        work, stages = 0.0, 0
        if extra is None:
            for shard in shards:
                missing = self._growing.all & ~self._states[shard]
                work += sum(own for place, own in enumerate(self._works) if missing >> place & 1)
                stages += missing.bit_count()
                self._set(shard, self._growing.all)
            return Grown(work, stages)
        for shard in shards:
            if self.depths[shard] < target:
                places = self._growing.until(self._states[shard], target)
                work += sum(self._add(shard, place) for place in places)
                stages += len(places)
        for _ in range(extra):
            chosen, worthiest = 0, None
            for shard in shards:
                step = self._growing.next(self._states[shard])
                # The first of equals.
                if step is not None and (worthiest is None or step.order > worthiest.order):
                    chosen, worthiest = shard, step
            if worthiest is None:
                break
            work += self._add(chosen, worthiest.place)
            stages += 1
        return Grown(work, stages)

    def _add(self, shard: int, place: int) -> float:
        self._set(shard, self._states[shard] | 1 << place)
        return self._works[place]

    def _set(self, shard: int, state: int) -> None:
        self._states[shard], self.depths[shard] = state, self._growing.depth(state)


class _Chains:
    """Shards of SISA: one chain each, in an order that is chosen anew for what is trained anew."""

    def __init__(self, works: Sequence[float], num_shards: int, prior: Sequence[float] | None, reorders: bool):
        self._works, self._reorders = works, reorders
        self._likely = [1.0] * len(works) if prior is None else prior
        order = list(range(len(works)))
        if reorders:
            order.sort(key=lambda slice_: self._likely[slice_])
        self._orders = [list(order) for _ in range(num_shards)]
        self.depths = [len(works)] * num_shards

    def hit(self, shard: int, slice_: int) -> None:
        order = self._orders[shard]
        depth = self.depths[shard] = min(self.depths[shard], order.index(slice_))
        if self._reorders:
            # Of what is to be trained anew, the likeliest last, and of those as likely what was hit.
            rest = [s for s in order[depth:] if s != slice_]
            at = sum(self._likely[s] <= self._likely[slice_] for s in rest)
            order[depth:] = [*rest[:at], slice_, *rest[at:]]

    def grow(self, shards: Collection[int], target: int, extra: int | None) -> Grown:
        work, stages = 0.0, 0
        goals = [max(target, self.depths[shard]) if extra is not None else len(self._works) for shard in shards]
        for shard, goal in zip(shards, goals, strict=True):
            work += sum(self._works[self.depths[shard] : goal])
            stages += goal - self.depths[shard]
            self.depths[shard] = goal
        for _ in range(extra or 0):
            # As S3T has it: the most depth for the work.
            shard = min(shards, key=lambda shard: self.depths[shard])
            depth = self.depths[shard]
            if depth == len(self._works):
                break
            work += self._works[depth]
            stages += 1
            self.depths[shard] = depth + 1
        return Grown(work, stages)
