"""Frontiers: the most quality over a stream of requests that each method has for its work, over its policies."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..errors import ConfigError
from ..sequences.families import stage_work
from .growing import Growing
from .streams import Policy, Stream, full_retraining, sisa, streams_of


# After so many requests at a time, for those who need not answer at once.
_GATHERED = (1, 2, 5, 10, 20, 50)
# For each replay, by depth from 0; or what says it of a stream, where shards of several depths answer together.
_ByDepth = Sequence[float] | Callable[[Stream], float]
_QUALITY = Mapping[float, _ByDepth]


@dataclass(frozen=True)
class Point:
    """
    A way to serve a stream of requests.

    Args:
        method (`str`): Of which method.
        plan (`str`): What is trained.
        replay (`float`): Share of the earlier slices' rows in an epoch.
        policy ([`Policy`] or `None`): How far it is grown again; `None` for full retraining.
        work (`float`): Work over the stream, in full fine-tunings of all data, without the first training.
        first_work (`float`): Work of the first training.
        mean_depth (`float`): Mean depth over the stream and the shards.
        quality (`float`): Mean quality over the stream and the shards.
    """

    method: str
    plan: str
    replay: float
    policy: Policy | None
    work: float
    first_work: float
    mean_depth: float
    quality: float


def policies_of(num_slices: int) -> list[Policy]:
    """
    The policies that shards of so many slices may follow, from all at once to nothing until the last one is dead.

    Example:

    ```python
    >>> from hf_s3t.analysis.frontiers import policies_of

    >>> len(policies_of(4))
    106
    ```
    """
    size = num_slices
    found = [Policy.when_exhausted(size), Policy.when_dead(size)]
    for every in _GATHERED:
        found.append(Policy.all_at_once(size, every))
        found += [Policy.to_depth(low, high, every) for high in range(1, size + 1) for low in range(1, high + 1)]
        found += [Policy.stages(size, stages, every) for stages in range(1, size + 2)]
    # Beyond what serves now, for later requests.
    found += [Policy(low, size, extra) for low in range(1, size + 1) for extra in (1, 2)]
    return list(dict.fromkeys(found))


def s3t_points(
    plans: Mapping[str, Sequence[tuple[int, ...]]],
    num_slices: int,
    quality: _QUALITY,
    *,
    policies: Sequence[Policy] | None = None,
    by_sets: bool = True,
    method: str = "s3t",
    num_shards: int = 1,
    horizon: int = 100,
    prior: Sequence[float] | None = None,
    **streams: Any,
) -> list[Point]:
    """
    What S3T can do, by plan, replay and policy.

    Args:
        plans (mapping from `str` to prefixes):
            By name, the stages of a shard; published ones in the order in which they are planned.
        num_slices (`int`):
            Number of slices `L` of each shard.
        quality (mapping from `float` to sequences of `float` or callables):
            For each replay to consider, the quality at depths 0 to `num_slices`, as measured with it; or what says
            the mean quality over a [`~hf_s3t.analysis.streams.Stream`].
        policies (sequence of [`Policy`], *optional*):
            What is done after requests; all of [`policies_of`] if not given.
        by_sets (`bool`, defaults to `True`):
            Whether a stage counts by its set; not in plans as published.
        method (`str`, defaults to `"s3t"`):
            The name of it.
        num_shards (`int`, defaults to 1):
            Number of shards `m`.
        horizon (`int`, defaults to 100):
            Number of requests by which stages are weighed.
        prior (sequence of `float`, *optional*):
            Probability of each slice of a shard; uniform if not given.
        streams:
            `requests`, `runs` and `seed` of [`~hf_s3t.analysis.streams.stream`].

    Example:

    ```python
    >>> from hf_s3t.analysis.frontiers import frontier, s3t_points
    >>> from hf_s3t.sequences.families import lattice

    >>> by_depth = [0.5, 0.8, 0.9]
    >>> [round(p.quality, 2) for p in frontier(s3t_points({"lattice": lattice(2)}, 2, {1.0: by_depth}))][-1]
    0.9
    ```
    """
    found = []
    for replay, by_depth in quality.items():
        _check(by_depth, num_slices)
        works = [stage_work(depth, num_slices, replay) for depth in range(1, num_slices + 1)]
        for name, family in plans.items():
            growing = Growing(family, num_slices, by_sets=by_sets, prior=prior, horizon=horizon, replay=replay)
            for policy in policies_of(num_slices) if policies is None else policies:
                result = streams_of(growing, works, policy, num_shards=num_shards, prior=prior, **streams)
                found.append(_point(method, name, replay, policy, result, by_depth))
    return found


def sisa_points(
    num_slices: int,
    quality: _QUALITY,
    *,
    policies: Sequence[Policy] | None = None,
    method: str = "sisa",
    **streams: Any,
) -> list[Point]:
    """
    What SISA can do with all that helps it: replay, training again later or less far, other orders of slices.

    Args:
        num_slices (`int`): Number of slices `L` of each shard.
        quality (mapping from `float` to sequences of `float` or callables): As for [`s3t_points`].
        policies (sequence of [`Policy`], *optional*): As for [`s3t_points`].
        method (`str`, defaults to `"sisa"`): The name of it.
        streams: `num_shards`, `reorders`, `prior`, `requests`, `runs`, `seed` of [`~hf_s3t.analysis.streams.sisa`].

    Example:

    ```python
    >>> from hf_s3t.analysis.frontiers import frontier, sisa_points

    >>> [round(point.quality, 2) for point in frontier(sisa_points(2, {1.0: [0.5, 0.8, 0.9]}))][-1]
    0.9
    ```
    """
    found = []
    for replay, by_depth in quality.items():
        _check(by_depth, num_slices)
        for policy in policies_of(num_slices) if policies is None else policies:
            result = sisa(num_slices, policy, replay=replay, **streams)
            found.append(_point(method, "chain", replay, policy, result, by_depth))
    return found


def full_points(quality: float, *, requests: int = 1000, every: Sequence[int] = _GATHERED) -> list[Point]:
    """Full retraining after each request, or after so many. Its quality is always the same."""
    results = [full_retraining(requests=requests, every=gathered) for gathered in every]
    return [_point("full", "everything", 1.0, None, result, [quality] * 2) for result in results]


def frontier(points: Iterable[Point]) -> list[Point]:
    """
    Of some points those that none beats, by growing work: no other has the quality for less work.

    Example:

    ```python
    >>> from hf_s3t.analysis.frontiers import frontier, full_points

    >>> [point.work for point in frontier(full_points(0.9, requests=100, every=[1, 10]))]
    [10.0]
    ```
    """
    kept: list[Point] = []
    for point in sorted(points, key=lambda point: (point.work, -point.quality)):
        if not kept or point.quality > kept[-1].quality:
            kept.append(point)
    return kept


def less_work(ours: Iterable[Point], theirs: Iterable[Point]) -> list[tuple[Point, Point | None]]:
    """
    For each point of another method's frontier, the cheapest of ours that serves at least its quality.

    Args:
        ours (iterable of [`Point`]): What is compared.
        theirs (iterable of [`Point`]): With what.

    Returns:
        `list[tuple[Point, Point | None]]`: Theirs and ours, by growing quality; `None` where ours serves nothing as
        good.

    Example:

    ```python
    >>> from hf_s3t.analysis.frontiers import full_points, less_work

    >>> ((theirs, ours),) = less_work(full_points(0.9, every=[10]), full_points(0.8, every=[1]))
    >>> theirs.work / ours.work
    10.0
    ```
    """
    own = frontier(ours)
    return [(point, next((one for one in own if one.quality >= point.quality), None)) for point in frontier(theirs)]


def _point(method: str, plan: str, replay: float, policy: Policy | None, result: Stream, by_depth: _ByDepth) -> Point:
    quality = by_depth(result) if callable(by_depth) else result.mean_quality(by_depth)
    return Point(method, plan, replay, policy, result.work, result.first_work, result.mean_depth, quality)


def _check(by_depth: _ByDepth, num_slices: int) -> None:
    if not callable(by_depth) and len(by_depth) != num_slices + 1:
        raise ConfigError(
            f"The quality is given for {len(by_depth)} depths, expected num_slices + 1 = {num_slices + 1}: from 0, "
            "where nothing serves, to all slices."
        )
