"""
What to choose before anything is trained: from the data, the requests to expect and the model to shards, slices,
stages, replay and epochs, and how far to grow again after each request; with work, life and expected depth.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..checks import require_choice, require_int, require_share
from ..errors import ConfigError, counted
from ..plan.stages import LEAST_STEPS, Plan
from ..sequences.rules import select_sequences
from .backbone import TARGETS, Backbone
from .options import (
    MOST_EPOCHS,
    Kept,
    Option,
    Shape,
    Workload,
    depths_of,
    published,
    replay_for,
    require_positive,
    shapes,
    stage_cost,
    storage_of,
    survival,
)
from .purposes import PURPOSES, UNSAID
from .rates import UNTIL
from .streams import Policy


__all__ = [
    "MOST_EPOCHS",
    "TARGETS",
    "Backbone",
    "Option",
    "Recommendation",
    "Workload",
    "recommend",
    "replay_for",
    "sequence_cost",
    "storage",
    "survival",
]

# Of the options, those are shown that serve at least so much of their slices more than the next cheaper one.
_WORTH_SHOWING = 0.04
# Streams of requests of each option: to compare all of them, and to say what is expected of those that are shown.
_COARSE, _FINE = 1, 12
_POINTS_IN_TIME = 12


@dataclass(frozen=True)
class Recommendation:
    """
    The option to take, and others.

    Args:
        chosen ([`Option`]): The recommended one.
        options (`tuple[Option, ...]`):
            The cheapest ways to serve deeper and deeper, cheapest first; those that last as long, if there are any.
        meets_goal (`bool`): Whether the chosen one lasts and serves as was asked.
        goal_months (`float`): How long it was asked to.
        goal_depth (`float`): Which share of its slices was to serve, in the mean over that time.
        until (`str`): What ends it: `"first_shard"` or `"exhausted"`.
        months (`tuple[float, ...]`): When depths are given of.
        published_depths (`tuple[float, ...]`):
            Expected depth then, in slices, of the published plan for the same shards and slices: as many sequences as
            slices, all rows in every epoch, nothing grown again.
        published_hours (`float`): Hours to train that.
        learns (`str`, *optional*): What it is to learn: `"facts"`, `"skills"` or `"both"`.
        gate (mapping): The settings of `S3TConfig` by which members are weighed, for what it is to learn.
        answered_by (`str`): Who answers, in words.
        notes (`tuple[str, ...]`): Sentences on what decided.
    """

    chosen: Option
    options: tuple[Option, ...]
    meets_goal: bool
    goal_months: float
    goal_depth: float
    until: str
    months: tuple[float, ...]
    published_depths: tuple[float, ...]
    published_hours: float
    learns: str | None
    gate: Mapping[str, Any]
    answered_by: str
    notes: tuple[str, ...]

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `S3TConfig`."""
        return {**self.chosen.settings, **self.gate}


class _Way(NamedTuple):
    """A shape and how it is kept up."""

    shape: Shape
    policy: Policy
    kept: Kept

    @property
    def hours(self) -> float:
        return self.shape.hours + self.kept.hours

    @property
    def share(self) -> float:
        return self.kept.mean_depth / self.shape.num_slices

    @property
    def order(self) -> tuple[float, int, int, float]:
        return round(self.hours, 9), self.shape.num_shards, self.shape.num_slices, -self.share


def recommend(
    workload: Workload,
    backbone: Backbone,
    *,
    goal_months: float = 12.0,
    goal_depth: float = 0.75,
    until: str = "first_shard",
    replay: float | None = None,
    max_hours: float | None = None,
    max_hours_per_month: float | None = None,
    max_shards: int | None = None,
    learns: str | None = None,
) -> Recommendation:
    """
    The cheapest way to set up a system and to keep it up that is expected to last, and to serve as deep as asked.

    Considered are up to `max_shards` shards, 2 to 8 slices of at least two layers (one layer a slice works badly,
    Figure 13), one chain of stages, families for some amounts of work, and up to 6 slices the lattice; as many epochs
    as the first stage needs for 50 steps, 30 at most; and after each request nothing, some stages in the order of
    their worth, or as many as bring every shard back to some depth. Work is that of the first training and of all that
    is grown again in the months asked for. Of what is as cheap, fewer shards.

    Args:
        workload ([`Workload`]):
            Data and requests.
        backbone ([`Backbone`]):
            The model.
        goal_months (`float`, defaults to 12.0):
            Months that the system should be expected to last; what is grown again is summed over them.
        goal_depth (`float`, defaults to 0.75):
            Share of its slices that should serve, in the mean over these months and the shards.
        until (`str`, defaults to `"first_shard"`):
            What must not be expected within these months: that a request leaves a shard with nothing to serve until
            it is grown again, or `"exhausted"`, that one leaves all of them so.
        replay (`float`, *optional*):
            Share of the earlier slices' rows in an epoch of a stage. If not given, what kept up with all rows in
            slices of as many rows where that was measured: 0.25 from 600 on, 0.5 from 200 on, 1.0 below.
        max_hours (`float`, *optional*):
            Hours that the first training may take.
        max_hours_per_month (`float`, *optional*):
            Hours that may be spent in a month on growing again.
        max_shards (`int`, *optional*):
            Number of shards at most; each learns from its own part of the data alone. If not given, 20 for facts,
            else 5.
        learns (`str`, *optional*):
            What the system is to learn: `"facts"`, which belong to somebody whose rows lie in one shard
            (`group_column`): a gate asks the shard that was taught them, so that there may be many; `"skills"`, which
            all rows teach: few shards and their mean, as if it is not given; `"both"`: a gate, and few shards.

    Returns:
        [`Recommendation`]: The option, its alternatives and what decided.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range, there are too few examples for any option, or
            none of them can be trained in `max_hours`.

    Example:

    ```python
    >>> from hf_s3t.analysis.planning import Backbone, Workload, recommend

    >>> plan = recommend(Workload(50_000, deletions_per_month=2, hours_per_epoch=1.0), Backbone(num_layers=24))
    >>> plan.chosen.settings
    {'num_shards': 5, 'num_slices': 4, 'work_budget': 1.9, 'replay': 0.25}
    >>> plan.chosen.after_each_request
    'stages until every shard serves 3 of 4 slices'
    ```
    """
    if learns is not None:
        require_choice("learns", learns, tuple(PURPOSES))
    purpose = UNSAID if learns is None else PURPOSES[learns]
    max_shards = purpose.max_shards if max_shards is None else max_shards
    _check_goals(goal_months, goal_depth, until, replay, max_hours, max_hours_per_month, max_shards)
    found = shapes(workload, backbone, max_shards, None if replay is None else float(replay))
    if max_hours is not None:
        cheapest = min(shape.hours for shape in found)
        found = [shape for shape in found if shape.hours <= max_hours]
        if not found:
            raise ConfigError(
                f"max_hours={max_hours:g}, but the cheapest system takes {cheapest:.3g} hours to train. Allow more "
                "hours, or lower the epochs."
            )
    months = tuple(goal_months * point / _POINTS_IN_TIME for point in range(_POINTS_IN_TIME + 1))
    most = math.inf if max_hours_per_month is None else max_hours_per_month
    ways = [way for way in _ways(found, goal_months) if way.kept.hours <= most * goal_months]

    def closer(way: _Way) -> _Way:
        return way._replace(kept=way.shape.kept(way.policy, goal_months, _FINE))

    def is_deep(way: _Way, but: float = 0.0) -> bool:
        return way.share >= goal_depth - but and way.kept.hours <= most * goal_months

    # What is drawn more often is seen closer; so it is asked again of what comes first.
    deep = [way for way in ways if is_deep(way, _WORTH_SHOWING)]
    lasting = (closer(way) for way in deep if way.kept.months(until) >= goal_months / 2)
    chosen = next((way for way in lasting if is_deep(way) and way.kept.months(until) >= goal_months), None)
    meets_goal = chosen is not None
    if chosen is None:
        chosen = next(filter(is_deep, map(closer, deep)), None) or closer(max(ways, key=lambda way: way.share))
    others = [way for way in ways if way.kept.months(until) >= goal_months] if meets_goal else ways
    shown = {(way.shape, way.policy): way for way in [chosen, *_front(others)]}.values()
    options = [way.shape.option(way.policy, months, backbone, _FINE) for way in shown]
    best = options[0]
    gate = dict(purpose.gate) if best.num_shards > 1 else {}
    return Recommendation(
        chosen=best,
        options=tuple(sorted(options, key=lambda option: (option.total_hours, option.mean_depth))),
        meets_goal=meets_goal,
        goal_months=float(goal_months),
        goal_depth=float(goal_depth),
        until=until,
        months=months,
        published_depths=depths_of(published(best), best, [month * workload.deletions_per_month for month in months]),
        published_hours=_published_hours(best, workload, backbone),
        learns=learns,
        gate=gate,
        answered_by=purpose.answered_by if best.num_shards > 1 else "its one shard",
        notes=(*_notes(best, meets_goal, workload, goal_months, goal_depth, until), *_note_of_gate(gate)),
    )


def sequence_cost(num_slices: int, layers_per_slice: int, num_layers: int, replay: float = 1.0) -> float:
    """
    What training one sequence costs, as a multiple of ordinary LoRA fine-tuning of the same data and epochs.

    Counted is what is computed: forward through all layers, and backward through those from the trained group up. As
    the base is frozen, a layer costs as much backward as forward.

    Args:
        num_slices (`int`):
            Number of slices `L`.
        layers_per_slice (`int`):
            Layers that each stage adapts.
        num_layers (`int`):
            Layers of the model `N`.
        replay (`float`, defaults to 1.0):
            Share of the earlier slices' rows in an epoch.

    Returns:
        `float`: The multiple.

    Example:

    ```python
    >>> from hf_s3t.analysis.planning import sequence_cost

    >>> [round(sequence_cost(size, 28 // size, 28), 1) for size in (4, 7)]
    [2.2, 3.4]
    ```
    """
    depths = range(1, num_slices + 1)
    return sum(stage_cost(depth, num_slices, layers_per_slice, num_layers, replay) for depth in depths)


def storage(num_shards: int, num_slices: int, budget: int, layers_per_slice: int, backbone: Backbone) -> int | None:
    """
    Bytes of all adapters and heads of a published plan in single precision; stages that sequences share count once.

    Args:
        num_shards (`int`): Number of shards `m`.
        num_slices (`int`): Number of slices `L` per shard.
        budget (`int`): Number of sequences `B` per shard.
        layers_per_slice (`int`): Layers that each stage adapts.
        backbone ([`Backbone`]): The model.

    Returns:
        `int` or `None`: The number of bytes; `None` if the size of an adapter is not known.

    Example:

    ```python
    >>> from hf_s3t.analysis.planning import Backbone, storage

    >>> vit_large = Backbone(num_layers=24, adapter_weights_per_layer=65536, head_weights=205000)
    >>> storage(5, 6, 1, 4, vit_large) / 1e9  # Table 3 has 0.21 GB, six whole adapters per sequence
    0.05605728
    ```
    """
    num_stages = num_shards * len(Plan((tuple(select_sequences(num_slices, budget)),)).stages())
    return storage_of(num_stages, layers_per_slice, backbone)


# -- the choice -------------------------------------------------------------------------------------------------------


def _check_goals(
    goal_months: float,
    goal_depth: float,
    until: str,
    replay: float | None,
    max_hours: float | None,
    max_hours_per_month: float | None,
    max_shards: int,
) -> None:
    require_positive("goal_months", goal_months)
    for name, value in (("max_hours", max_hours), ("max_hours_per_month", max_hours_per_month)):
        if value is not None:
            require_positive(name, value)
    require_share("goal_depth", goal_depth)
    if replay is not None:
        require_share("replay", replay)
    require_choice("until", until, UNTIL)
    require_int("max_shards", max_shards, 1)


def _ways(found: Sequence[Shape], months: float) -> list[_Way]:
    """The shapes and the ways to keep them up, cheapest first."""
    ways = [_Way(shape, policy, shape.kept(policy, months, _COARSE)) for shape in found for policy in shape.policies()]
    return sorted(ways, key=lambda way: way.order)


def _front(ways: Sequence[_Way]) -> Iterator[_Way]:
    """The cheapest ways to serve deeper and deeper."""
    deepest = 0.0
    for way in ways:
        if way.share >= deepest + _WORTH_SHOWING:
            deepest = way.share
            yield way


def _published_hours(option: Option, workload: Workload, backbone: Backbone) -> float:
    size, layers = option.num_slices, option.layers_per_slice
    works = [stage_cost(len(prefix), size, layers, backbone.num_layers) for prefix in published(option)]
    return sum(works) * workload.hours_per_epoch * option.epochs


def _notes(
    chosen: Option, meets_goal: bool, workload: Workload, goal_months: float, goal_depth: float, until: str
) -> Iterator[str]:
    if not meets_goal:
        end = "a shard is dead" if until == "first_shard" else "all shards are dead"
        yield (
            f"Nothing considered is expected to last {counted(goal_months, 'month')} until {end} and to serve "
            f"{100 * goal_depth:g}% of its slices in the mean: this comes closest. More may be had for more hours "
            "(--max-hours, --max-hours-per-month) or more shards (--max-shards)."
        )
    if chosen.epochs > workload.epochs:
        yield (
            f"{counted(chosen.epochs, 'epoch')} instead of {workload.epochs}: the first stage of a sequence sees one "
            f"slice only, and a stage of fewer than about {LEAST_STEPS} steps does not converge."
        )
    if chosen.num_shards * chosen.num_slices * LEAST_STEPS * workload.batch_size > workload.num_examples * 10:
        yield "There are few examples per slice: compare the quality with that of ordinary fine-tuning first."


def _note_of_gate(gate: Mapping[str, Any]) -> Iterator[str]:
    if gate:
        yield "A gate asks the shard that was taught a subject: set group_column, by which its rows lie together."
