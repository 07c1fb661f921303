"""
What to choose before anything is trained: from the data, the requests to expect and the model to shards, slices,
sequences and epochs, with what they cost and how long they last.
"""

import functools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import brentq

from ..config import require_choice, require_int
from ..errors import ConfigError
from ..plan.stages import LEAST_STEPS, Plan
from ..sequences.rules import select_sequences
from .backbone import TARGETS, Backbone
from .rates import UNTIL, deletion_rate
from .retention import depths_of_hit_sets


__all__ = [
    "MOST_EPOCHS",
    "TARGETS",
    "Backbone",
    "Option",
    "Recommendation",
    "Workload",
    "recommend",
    "sequence_cost",
    "storage",
    "survival",
]

# A stage that reads its slice more often does not converge better, in our experience.
MOST_EPOCHS = 30
_MOST_SLICES = 12
# Of the options, those are shown that last at least so much longer than the next cheaper one.
_WORTH_SHOWING = 1.5
_BYTES_PER_WEIGHT = 4


@dataclass(frozen=True)
class Workload:
    """
    What a system is planned for.

    Args:
        num_examples (`int`):
            Number of training examples.
        deletions_per_month (`float`):
            Deletion requests a month; each names one example, or one group.
        hours_per_epoch (`float`):
            Hours that one epoch of ordinary LoRA fine-tuning on all the data takes.
        epochs (`int`, defaults to 3):
            Epochs that ordinary fine-tuning would have; at least so many every stage gets.
        batch_size (`int`, defaults to 8):
            Examples per optimizer step.
    """

    num_examples: int
    deletions_per_month: float
    hours_per_epoch: float
    epochs: int = 3
    batch_size: int = 8

    def __post_init__(self) -> None:
        for name in ("num_examples", "epochs", "batch_size"):
            require_int(name, getattr(self, name), 1)
        for name in ("deletions_per_month", "hours_per_epoch"):
            _require_positive(name, getattr(self, name))


@dataclass(frozen=True)
class Option:
    """
    One way to set up a system, and what to expect of it.

    Args:
        num_shards (`int`): Number of shards `m`.
        num_slices (`int`): Number of slices `L` per shard.
        layers_per_slice (`int`): Layers that each stage adapts.
        budget (`int`): Number of sequences `B` per shard.
        sequence_selection (`str`): The rule that selects them.
        epochs (`int`): Epochs of every stage.
        steps_of_first_stage (`int`): Optimizer steps of the shortest stage.
        num_stages (`int`): Stages to train, those that sequences share counted once.
        training_hours (`float`): Hours to train all of them.
        cost_ratio (`float`): The same as a multiple of ordinary fine-tuning with the workload's epochs.
        storage_bytes (`int` or `None`): Size of all adapters and heads in single precision.
        deletions_until_first_dead_shard (`float`): Expected number of requests until a shard must be trained again.
        deletions_until_exhausted (`float`): The same until every shard must.
        months_until_first_dead_shard (`float`): The first of these, in months.
        months_until_exhausted (`float`): The second.
        months_until_half_depth (`float`): Months until half of the slices serve, in expectation over the shards.
        targeted_deletions_until_first_dead_shard (`int`):
            Requests that suffice if they are chosen by somebody who knows the slices.
        targeted_deletions_until_exhausted (`int`): The same until every shard is dead.
    """

    num_shards: int
    num_slices: int
    layers_per_slice: int
    budget: int
    sequence_selection: str
    epochs: int
    steps_of_first_stage: int
    num_stages: int
    training_hours: float
    cost_ratio: float
    storage_bytes: int | None
    deletions_until_first_dead_shard: float
    deletions_until_exhausted: float
    months_until_first_dead_shard: float
    months_until_exhausted: float
    months_until_half_depth: float
    targeted_deletions_until_first_dead_shard: int
    targeted_deletions_until_exhausted: int

    def months(self, until: str) -> float:
        """The expected time until the end that counts."""
        return self.months_until_exhausted if until == "exhausted" else self.months_until_first_dead_shard


@dataclass(frozen=True)
class Recommendation:
    """
    The option to take, and others.

    Args:
        chosen ([`Option`]): The recommended one.
        options (`tuple[Option, ...]`): The cheapest ways to last longer and longer, cheapest first.
        meets_goal (`bool`): Whether the chosen one lasts as long as was asked.
        goal_months (`float`): What was asked.
        until (`str`): What ends it: `"first_shard"` or `"exhausted"`.
        notes (`tuple[str, ...]`): Sentences on what decided.
    """

    chosen: Option
    options: tuple[Option, ...]
    meets_goal: bool
    goal_months: float
    until: str
    notes: tuple[str, ...]


def recommend(
    workload: Workload,
    backbone: Backbone,
    *,
    goal_months: float = 12.0,
    until: str = "first_shard",
    max_hours: float | None = None,
    max_shards: int = 5,
) -> Recommendation:
    """
    The cheapest way to set up a system that is expected to last.

    Considered are up to `max_shards` shards, 2 to 12 slices of at least two layers (one layer a slice works badly,
    Figure 13), every budget up to the number of slices, and as many epochs as the first stage needs for 50 steps, 30
    at most. Among those that last as long as asked the cheapest to train is recommended, with fewer shards among
    equals; if none does, the one that lasts longest.

    Args:
        workload ([`Workload`]):
            Data and requests.
        backbone ([`Backbone`]):
            The model.
        goal_months (`float`, defaults to 12.0):
            Months that the system should be expected to last.
        until (`str`, defaults to `"first_shard"`):
            What ends it: the first dead shard, or `"exhausted"`, when all are.
        max_hours (`float`, *optional*):
            Hours that training may take.
        max_shards (`int`, defaults to 5):
            Number of shards at most; each learns from its own part of the data alone.

    Returns:
        [`Recommendation`]: The option, its alternatives and what decided.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an argument is out of range, there are too few examples for any option, or
            none of them can be trained in `max_hours`.

    Example:

    ```python
    >>> from hf_s3t.analysis.planning import Backbone, Workload, recommend

    >>> plan = recommend(Workload(50_000, deletions_per_month=2, hours_per_epoch=1.0), Backbone(num_layers=24))
    >>> plan.chosen.num_shards, plan.chosen.num_slices, plan.chosen.budget, plan.meets_goal
    (5, 10, 2, True)
    ```
    """
    _require_positive("goal_months", goal_months)
    require_choice("until", until, UNTIL)
    require_int("max_shards", max_shards, 1)
    shapes = _shapes(workload, backbone, max_shards)
    if max_hours is not None:
        _require_positive("max_hours", max_hours)
        cheapest = min(shape.hours for shape in shapes)
        shapes = [shape for shape in shapes if shape.hours <= max_hours]
        if not shapes:
            raise ConfigError(
                f"max_hours={max_hours:g}, but the cheapest system takes {cheapest:.3g} hours to train. Allow more "
                "hours, or lower the epochs."
            )
    front = _front(shapes, workload, backbone, until)
    # Requests without replacement end a system sooner than the bound says by which options were sorted.
    wanted = goal_months * workload.deletions_per_month
    promising = sorted((shape for shape in shapes if shape.bound(until) >= wanted), key=_Shape.order)
    lasting = (shape.option(workload, backbone) for shape in promising)
    chosen = next((option for option in lasting if option.months(until) >= goal_months), None)
    meets_goal = chosen is not None
    if chosen is None:
        chosen = _longest(shapes, workload, backbone, until)
    return Recommendation(
        chosen=chosen,
        options=tuple(sorted({chosen, *front}, key=lambda option: (option.training_hours, option.months(until)))),
        meets_goal=meets_goal,
        goal_months=float(goal_months),
        until=until,
        notes=tuple(_notes(chosen, meets_goal, workload, goal_months, until)),
    )


def sequence_cost(num_slices: int, layers_per_slice: int, num_layers: int) -> float:
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

    Returns:
        `float`: The multiple.

    Example:

    ```python
    >>> from hf_s3t.analysis.planning import sequence_cost

    >>> [round(sequence_cost(size, 28 // size, 28), 1) for size in (4, 7)]
    [2.2, 3.4]
    ```
    """
    return sum(_stage_cost(depth, num_slices, layers_per_slice, num_layers) for depth in range(1, num_slices + 1))


def storage(num_shards: int, num_slices: int, budget: int, layers_per_slice: int, backbone: Backbone) -> int | None:
    """
    Bytes of all adapters and heads of a system in single precision; stages that sequences share lie there once.

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
    if backbone.adapter_weights_per_layer is None:
        return None
    per_stage = layers_per_slice * backbone.adapter_weights_per_layer + backbone.head_weights
    return num_shards * sum(_stages_by_depth(num_slices, budget)) * per_stage * _BYTES_PER_WEIGHT


def survival(option: Option, deletions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    What is left of a system while requests come in.

    Args:
        option ([`Option`]):
            The system.
        deletions (`np.ndarray`):
            Numbers of requests, each hitting any slice with equal probability.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The expected share of shards alive, and the expected depth of a shard (0 for a
        dead one) as a share of its slices.
    """
    return _left(option.num_slices, option.budget, np.asarray(deletions, dtype=float) / option.num_shards)


def _left(num_slices: int, budget: int, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chance that a shard is alive after these numbers of requests hit it, and its expected share of depth."""
    hit = -np.expm1(-hits / num_slices)
    alive, depth = np.zeros_like(hit), np.zeros_like(hit)
    for count, (living, depths) in enumerate(_left_by_hit_slices(num_slices, budget)):
        # With requests at random times, slices are hit independently of each other: their number weighs a set.
        weight = hit**count * (1 - hit) ** (num_slices - count)
        alive += weight * living
        depth += weight * depths / num_slices
    return alive, depth


@functools.cache
def _left_by_hit_slices(num_slices: int, budget: int) -> tuple[tuple[int, int], ...]:
    """For each number of hit slices, how many sets of so many leave the shard alive, and the sum of their depths."""
    depths = depths_of_hit_sets(select_sequences(num_slices, budget))
    sizes = np.array([state.bit_count() for state in range(1 << num_slices)])
    groups = [depths[sizes == count] for count in range(num_slices + 1)]
    return tuple((int(np.count_nonzero(group)), int(group.sum(dtype=int))) for group in groups)


@functools.cache
def _hits_until_half_depth(num_slices: int, budget: int) -> float:
    most = 1.0
    while _left(num_slices, budget, np.array([most]))[1][0] > 0.5:
        most *= 2
    half: float = brentq(lambda hits: float(_left(num_slices, budget, np.array([hits]))[1][0]) - 0.5, 0.0, most)
    return half


# -- the options ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shape:
    """An option before its exact life is computed."""

    num_shards: int
    num_slices: int
    budget: int
    layers_per_slice: int
    epochs: int
    steps: int
    hours: float
    num_stages: int

    def order(self) -> tuple[float, int, int, int]:
        return round(self.hours, 9), self.num_shards, self.num_slices, self.budget

    def bound(self, until: str) -> float:
        """The expected number of requests it lasts if they hit slices with replacement, which is longer."""
        scale = self.num_shards * self.num_slices
        return scale * _life_per_slice(self.num_shards, self.budget, until)

    def option(self, workload: Workload, backbone: Backbone) -> Option:
        m, size, budget = self.num_shards, self.num_slices, self.budget
        first, exhausted = (
            deletion_rate(m, size, budget, num_examples=workload.num_examples, until=until)
            for until in ("first_shard", "exhausted")
        )
        return Option(
            num_shards=m,
            num_slices=size,
            layers_per_slice=self.layers_per_slice,
            budget=budget,
            sequence_selection="cyclic",
            epochs=self.epochs,
            steps_of_first_stage=self.steps,
            num_stages=self.num_stages,
            training_hours=self.hours,
            cost_ratio=self.hours / (workload.hours_per_epoch * workload.epochs),
            storage_bytes=storage(m, size, budget, self.layers_per_slice, backbone),
            deletions_until_first_dead_shard=first,
            deletions_until_exhausted=exhausted,
            months_until_first_dead_shard=first / workload.deletions_per_month,
            months_until_exhausted=exhausted / workload.deletions_per_month,
            months_until_half_depth=m * _hits_until_half_depth(size, budget) / workload.deletions_per_month,
            targeted_deletions_until_first_dead_shard=budget,
            targeted_deletions_until_exhausted=m * budget,
        )


@functools.cache
def _life_per_slice(num_shards: int, budget: int, until: str) -> float:
    # A slice more makes every slice be hit the more seldom, and changes nothing else.
    return deletion_rate(num_shards, budget, budget, until=until) / (num_shards * budget)


def _shapes(workload: Workload, backbone: Backbone, max_shards: int) -> list[_Shape]:
    layers = backbone.num_layers
    # One layer a slice works badly; a model of fewer than four layers leaves no choice.
    most = min(_MOST_SLICES, layers // 2 if layers >= 4 else layers)
    sizes = range(min(2, most), most + 1)
    found = []
    for m in range(1, max_shards + 1):
        for size in sizes:
            epochs, steps = _epochs(workload, workload.num_examples // (m * size))
            if steps < LEAST_STEPS:
                continue
            per_slice = layers // size
            for budget in range(1, size + 1):
                by_depth = _stages_by_depth(size, budget)
                cost = sum(n * _stage_cost(d, size, per_slice, layers) for d, n in enumerate(by_depth, start=1))
                hours = workload.hours_per_epoch * epochs * cost
                found.append(_Shape(m, size, budget, per_slice, epochs, steps, hours, m * sum(by_depth)))
    if not found:
        size = sizes[0]
        _, steps = _epochs(workload, workload.num_examples // size)
        raise ConfigError(
            f"num_examples={workload.num_examples} with batch_size={workload.batch_size}: even one shard of {size} "
            f"slices gives its first stage {steps} steps in {max(MOST_EPOCHS, workload.epochs)} epochs, expected at "
            f"least {LEAST_STEPS}, below which a stage does not converge. Lower the batch size, or train one adapter "
            "and train it again for each deletion."
        )
    return found


def _epochs(workload: Workload, slice_examples: int) -> tuple[int, int]:
    """Epochs of each stage, and the steps they give the first one."""
    per_epoch = math.ceil(slice_examples / workload.batch_size)
    if per_epoch == 0:
        return workload.epochs, 0
    epochs = min(max(workload.epochs, math.ceil(LEAST_STEPS / per_epoch)), max(MOST_EPOCHS, workload.epochs))
    return epochs, epochs * per_epoch


@functools.cache
def _stages_by_depth(num_slices: int, budget: int) -> tuple[int, ...]:
    stages = Plan((tuple(select_sequences(num_slices, budget)),)).stages()
    return tuple(sum(key.depth == depth for key in stages) for depth in range(1, num_slices + 1))


def _stage_cost(depth: int, num_slices: int, layers_per_slice: int, num_layers: int) -> float:
    """What an epoch of a stage costs, as a share of an epoch of ordinary training of the shard."""
    forward, backward = num_layers, depth * layers_per_slice
    return depth / num_slices * (forward + backward) / (2 * num_layers)


def _front(shapes: Iterable[_Shape], workload: Workload, backbone: Backbone, until: str) -> list[Option]:
    """The cheapest ways to last longer and longer."""
    found: list[Option] = []
    longest = 0.0
    for shape in sorted(shapes, key=lambda shape: (shape.order()[0], -shape.bound(until), shape.num_shards)):
        if shape.bound(until) >= longest * _WORTH_SHOWING:
            longest = shape.bound(until)
            found.append(shape.option(workload, backbone))
    return found


def _longest(shapes: Iterable[_Shape], workload: Workload, backbone: Backbone, until: str) -> Option:
    """The option that is expected to last longest, and of those that last as long the cheapest."""
    first, *others = sorted(shapes, key=lambda shape: (-shape.bound(until), *shape.order()))
    best = first.option(workload, backbone)
    requests = best.months(until) * workload.deletions_per_month
    for shape in others:
        if shape.bound(until) <= requests:
            break
        option = shape.option(workload, backbone)
        if (found := option.months(until) * workload.deletions_per_month) > requests:
            best, requests = option, found
    return best


def _notes(chosen: Option, meets_goal: bool, workload: Workload, goal_months: float, until: str) -> Iterator[str]:
    end = "until the first shard is dead" if until == "first_shard" else "until all shards are dead"
    if not meets_goal:
        yield (
            f"Nothing considered is expected to last {goal_months:g} months {end}: this lasts longest. "
            "Plan to train deleted stages again: `train()` grows them on the remaining data. What it may cost can be "
            "limited by --max-hours."
        )
    if chosen.epochs > workload.epochs:
        yield (
            f"{chosen.epochs} epochs instead of {workload.epochs}: the first stage of a sequence sees one slice only, "
            f"and a stage of fewer than about {LEAST_STEPS} steps does not converge."
        )
    if chosen.num_shards * chosen.num_slices * LEAST_STEPS * workload.batch_size > workload.num_examples * 10:
        yield "There are few examples per slice: compare the quality with that of ordinary fine-tuning first."


def _require_positive(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"`{name}` must be a number above 0, got {value!r}.")
