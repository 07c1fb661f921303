"""Ways to set up a system and to keep it up, with what each costs, how deep it serves and how long it lasts."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..checks import require_int
from ..errors import ConfigError, counted
from ..plan.stages import LEAST_STEPS
from ..sequences.families import best_family, depths_of_hit_sets, lattice, stages_of, work_of
from ..sequences.rules import select_sequences
from .backbone import Backbone
from .growing import Growing
from .rates import deletion_rate
from .streams import Policy, Stream, streams_of


__all__ = ["MOST_EPOCHS", "Option", "Shape", "Workload", "replay_for", "shapes", "survival"]

# A stage that reads its slice more often does not converge better, in our experience.
MOST_EPOCHS = 30
_MOST_SLICES = 8
_MOST_SLICES_OF_LATTICE = 6
# Work budgets to look at, as multiples of what one chain costs: fewer where the search for a family takes longer, and
# where it takes longer than a plan should, sequences in their place.
_BUDGETS = {2: (1.5,), 3: (1.5, 2.0), 4: (1.6, 2.0, 2.5), 5: (1.5, 2.5), 6: (1.5,)}
_SEQUENCES = (2, 4)
_SHARDS_ONE_BY_ONE = 8
# From how many rows a slice on which share of replay ended within half a point of all rows, where it was measured.
_REPLAYS = ((600, 0.25), (200, 0.5))
# Requests that are simulated one by one; what comes after is as in the second half of them.
_SIMULATED = 300
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
            require_positive(name, getattr(self, name))


@dataclass(frozen=True)
class Option:
    """
    One way to set up a system and to keep it up, and what to expect of it.

    Depths are in slices, the mean over shards; "goal" is the number of months that was asked for.

    Args:
        num_shards (`int`): Number of shards `m`.
        num_slices (`int`): Number of slices `L` per shard.
        layers_per_slice (`int`): Layers that each stage adapts.
        sequence_selection (`str` or `None`): `"lattice"`, where that is what each shard trains.
        work_budget (`float` or `None`): Else what its family may cost, as `S3TConfig` counts it.
        budget (`int` or `None`): Else the number of sequences `B` per shard.
        replay (`float`): Share of the earlier slices' rows in an epoch.
        replay_reason (`str`): Why so much, in words.
        epochs (`int`): Epochs of every stage.
        steps_of_first_stage (`int`): Optimizer steps of the shortest stage.
        num_stages (`int`): Stages to train.
        work (`float`): What they cost, in ordinary fine-tunings of as many epochs, with the layers of the model.
        training_hours (`float`): Hours to train all of them.
        cost_ratio (`float`): The same as a multiple of ordinary fine-tuning with the workload's epochs.
        storage_bytes (`int` or `None`): Size of all adapters and heads in single precision.
        policy ([`~hf_s3t.analysis.streams.Policy`]): How far to grow again after each request.
        after_each_request (`str`): The same in words.
        stages_per_request (`float`): Stages that are grown again for a request, in the mean.
        hours_per_request (`float`): Hours that they take.
        hours_per_month (`float`): The same for the requests of a month.
        total_hours (`float`): The first training, and all that is grown again until the goal.
        mean_depth (`float`): Depth that serves, in the mean over the time until the goal.
        months_between_dead_shards (`float`):
            Months from one request to the next that leaves a shard with nothing to serve until it is grown again, as
            simulated; without an end if there was none.
        months_between_exhaustions (`float`): The same of requests that leave all shards so.
        depths (`tuple[float, ...]`): Expected depth at the months of the recommendation.
        depths_without (`tuple[float, ...]`): The same if nothing is grown again.
        deletions_until_first_dead_shard (`float`):
            Expected number of requests until a shard is dead, if nothing is grown again.
        deletions_until_exhausted (`float`): The same until every shard is.
        months_until_first_dead_shard (`float`): The first of these, in months.
        months_until_exhausted (`float`): The second.
        months_until_half_depth (`float`):
            Months until half of the slices serve, in expectation over the shards, if nothing is grown again.
        targeted_deletions_until_first_dead_shard (`int`):
            Requests that suffice if they are chosen by somebody who knows the slices.
        targeted_deletions_until_exhausted (`int`): The same until every shard is dead.
    """

    num_shards: int
    num_slices: int
    layers_per_slice: int
    sequence_selection: str | None
    work_budget: float | None
    budget: int | None
    replay: float
    replay_reason: str
    epochs: int
    steps_of_first_stage: int
    num_stages: int
    work: float
    training_hours: float
    cost_ratio: float
    storage_bytes: int | None
    policy: Policy
    after_each_request: str
    stages_per_request: float
    hours_per_request: float
    hours_per_month: float
    total_hours: float
    mean_depth: float
    months_between_dead_shards: float
    months_between_exhaustions: float
    depths: tuple[float, ...]
    depths_without: tuple[float, ...]
    deletions_until_first_dead_shard: float
    deletions_until_exhausted: float
    months_until_first_dead_shard: float
    months_until_exhausted: float
    months_until_half_depth: float
    targeted_deletions_until_first_dead_shard: int
    targeted_deletions_until_exhausted: int

    @property
    def family(self) -> tuple[tuple[int, ...], ...]:
        """The stages of a shard."""
        kind = self.sequence_selection or self.work_budget or self.budget or self.num_slices
        return _family(self.num_slices, kind, self.replay)

    @property
    def plan(self) -> str:
        """What each shard trains, as settings of `S3TConfig`."""
        if self.sequence_selection is not None:
            return self.sequence_selection
        return f"budget={self.budget}" if self.work_budget is None else f"work_budget={self.work_budget:g}"

    @property
    def settings(self) -> dict[str, Any]:
        """The settings of `S3TConfig`."""
        names = ("num_shards", "num_slices", "sequence_selection", "work_budget", "budget", "replay")
        given = {name: getattr(self, name) for name in names}
        return {name: value for name, value in given.items() if value is not None}

    def months(self, until: str) -> float:
        """The expected time until the end that counts, if nothing is grown again."""
        return self.months_until_exhausted if until == "exhausted" else self.months_until_first_dead_shard


# What a shard trains: the lattice by name, a work budget as a float, a number of sequences.
_Kind = str | float | int


class Kept(NamedTuple):
    """
    What a way to keep a system up comes to until the goal.

    Args:
        hours (`float`): Hours of what is grown again.
        stages (`float`): Number of stages.
        mean_depth (`float`): Depth that serves, in slices.
        months_between_dead_shards (`float`): Months until a request leaves a shard with nothing to serve.
        months_between_exhaustions (`float`): The same of the last shard.
    """

    hours: float
    stages: float
    mean_depth: float
    months_between_dead_shards: float
    months_between_exhaustions: float

    def months(self, until: str) -> float:
        """The expected time until the end that counts."""
        return self.months_between_exhaustions if until == "exhausted" else self.months_between_dead_shards


@dataclass(frozen=True)
class Shape:
    """A way to set up a system, before its life is computed. Fields as of [`Option`]."""

    num_shards: int
    num_slices: int
    layers_per_slice: int
    kind: _Kind
    replay: float
    replay_reason: str
    epochs: int
    steps: int
    works: tuple[float, ...]
    workload: Workload

    @property
    def family(self) -> tuple[tuple[int, ...], ...]:
        """The stages of a shard."""
        return _family(self.num_slices, self.kind, self.replay)

    @property
    def work(self) -> float:
        """What training them costs, in ordinary fine-tunings of as many epochs."""
        return sum(self.works[len(prefix) - 1] for prefix in self.family)

    @property
    def hours(self) -> float:
        """Hours to train it."""
        return self.work * self._hours_of_one

    @property
    def _hours_of_one(self) -> float:
        """Hours of one ordinary fine-tuning of as many epochs."""
        return self.workload.hours_per_epoch * self.epochs

    @property
    def first_slices(self) -> int:
        """Number of slices with which a stack of a shard begins."""
        return sum(len(prefix) == 1 for prefix in self.family)

    def months(self, until: str) -> float:
        """Expected time until the end that counts, if nothing is grown again."""
        return self.deletions(until) / self.workload.deletions_per_month

    def deletions(self, until: str) -> float:
        """The expected number of requests until then."""
        return _life(self.num_shards, self.num_slices, self.first_slices, self.workload.num_examples, until)

    def policies(self) -> list[Policy]:
        """Ways to keep it up: nothing, some stages after each request, as many as some depth takes."""
        size = self.num_slices
        depths = sorted({math.ceil(size / 2), math.ceil(3 * size / 4), size - 1, size} - {0})
        found = [Policy.never(), *(Policy.stages(size, stages) for stages in (1, 2, 3))]
        return found + [Policy.to_depth(depth, depth) for depth in depths]

    def kept(self, policy: Policy, months: float, runs: int) -> Kept:
        """What a policy comes to in so many months."""
        requests = months * self.workload.deletions_per_month
        if policy.trigger == 0:
            times = np.linspace(0, requests, 200)
            depth = _left(self.family, self.num_slices, times / self.num_shards)[1]
            mean = float(np.trapezoid(depth, times) / requests)
            return Kept(0.0, 0.0, mean * self.num_slices, self.months("first_shard"), self.months("exhausted"))
        found = self._stream(policy, requests, runs)
        monthly = self.workload.deletions_per_month
        return Kept(
            hours=_in_all(found.work_after, requests) * self._hours_of_one,
            stages=found.stages * requests / found.requests,
            mean_depth=_mean(found.depth_after, requests),
            months_between_dead_shards=found.requests / found.deaths / monthly if found.deaths else math.inf,
            months_between_exhaustions=found.requests / found.exhaustions / monthly if found.exhaustions else math.inf,
        )

    def depths(self, policy: Policy, months: Sequence[float], runs: int) -> tuple[float, ...]:
        """Expected depth after each number of months."""
        requests = np.array(months) * self.workload.deletions_per_month
        if policy.trigger == 0:
            return tuple(
                (_left(self.family, self.num_slices, requests / self.num_shards)[1] * self.num_slices).tolist()
            )
        known = self._stream(policy, float(requests[-1]), runs).depth_after
        found = np.interp(requests, np.arange(len(known)), known)
        return tuple(np.where(requests < len(known), found, np.mean(known[len(known) // 2 :])).tolist())

    def _stream(self, policy: Policy, requests: float, runs: int) -> Stream:
        simulated = min(math.ceil(requests), _SIMULATED)
        runs = max(1, runs * _SIMULATED // simulated)
        return _stream(self.num_slices, self.kind, self.replay, self.works, policy, self.num_shards, simulated, runs)

    def option(self, policy: Policy, months: Sequence[float], backbone: Backbone, runs: int) -> Option:
        """All that there is to say of it, kept up by a policy until the last of these months."""
        m, size, load = self.num_shards, self.num_slices, self.workload
        kept = self.kept(policy, months[-1], runs)
        requests = months[-1] * load.deletions_per_month
        first, exhausted = self.deletions("first_shard"), self.deletions("exhausted")
        num_stages = m * len(self.family)
        return Option(
            num_shards=m,
            num_slices=size,
            layers_per_slice=self.layers_per_slice,
            sequence_selection=self.kind if isinstance(self.kind, str) else None,
            work_budget=self.kind if isinstance(self.kind, float) else None,
            budget=self.kind if isinstance(self.kind, int) else None,
            replay=self.replay,
            replay_reason=self.replay_reason,
            epochs=self.epochs,
            steps_of_first_stage=self.steps,
            num_stages=num_stages,
            work=self.work,
            training_hours=self.hours,
            cost_ratio=self.hours / (load.hours_per_epoch * load.epochs),
            storage_bytes=storage_of(num_stages, self.layers_per_slice, backbone),
            policy=policy,
            after_each_request=_in_words(policy, size),
            stages_per_request=kept.stages / requests,
            hours_per_request=kept.hours / requests,
            hours_per_month=kept.hours / months[-1],
            total_hours=self.hours + kept.hours,
            mean_depth=kept.mean_depth,
            months_between_dead_shards=kept.months_between_dead_shards,
            months_between_exhaustions=kept.months_between_exhaustions,
            depths=self.depths(policy, months, runs),
            depths_without=self.depths(Policy.never(), months, runs),
            deletions_until_first_dead_shard=first,
            deletions_until_exhausted=exhausted,
            months_until_first_dead_shard=first / load.deletions_per_month,
            months_until_exhausted=exhausted / load.deletions_per_month,
            months_until_half_depth=m * _hits_until_half_depth(self.family, size) / load.deletions_per_month,
            targeted_deletions_until_first_dead_shard=self.first_slices,
            targeted_deletions_until_exhausted=m * self.first_slices,
        )


def shapes(workload: Workload, backbone: Backbone, max_shards: int, replay: float | None = None) -> list[Shape]:
    """
    The ways to set up a system that have enough steps for each stage.

    Args:
        workload ([`Workload`]): Data and requests.
        backbone ([`~hf_s3t.analysis.backbone.Backbone`]): The model.
        max_shards (`int`): Number of shards at most.
        replay (`float`, *optional*):
            Share of the earlier slices' rows in an epoch; if not given, [`replay_for`] the rows of a slice.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there are too few examples for any.
    """
    layers = backbone.num_layers
    # One layer a slice works badly; a model of fewer than four layers leaves no choice.
    most = min(_MOST_SLICES, layers // 2 if layers >= 4 else layers)
    sizes = range(min(2, most), most + 1)
    found = []
    for m in _numbers_of_shards(max_shards):
        for size in sizes:
            rows = workload.num_examples // (m * size)
            epochs, steps = _epochs(workload, rows)
            if steps < LEAST_STEPS:
                continue
            per_slice = layers // size
            share, reason = (replay_for(rows), _reason_of_replay(rows)) if replay is None else (replay, "as given")
            works = tuple(stage_cost(depth, size, per_slice, layers, share) for depth in range(1, size + 1))
            for kind in _kinds(size, share):
                found.append(Shape(m, size, per_slice, kind, share, reason, epochs, steps, works, workload))
    if not found:
        size = sizes[0]
        _, steps = _epochs(workload, workload.num_examples // size)
        raise ConfigError(
            f"num_examples={workload.num_examples} with batch_size={workload.batch_size}: even one shard of {size} "
            f"slices gives its first stage {counted(steps, 'step')} in "
            f"{counted(max(MOST_EPOCHS, workload.epochs), 'epoch')}, expected at least {LEAST_STEPS}, below which a "
            "stage does not converge. Lower the batch size, or train one adapter and train it again for each deletion."
        )
    return found


def replay_for(rows_per_slice: int) -> float:
    """
    The share of replay for slices of a size: the smallest that ended within half a point of all rows, where measured.

    Args:
        rows_per_slice (`int`):
            Training examples in a slice.

    Returns:
        `float`: Share of the earlier slices' rows in an epoch of a stage.

    Example:

    ```python
    >>> from hf_s3t.analysis.options import replay_for

    >>> [replay_for(rows) for rows in (600, 599, 200, 199)]
    [0.25, 0.5, 0.5, 1.0]
    ```
    """
    return next((share for rows, share in _REPLAYS if rows_per_slice >= rows), 1.0)


def survival(option: Option, deletions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    What is left of a system while requests come in, if nothing is grown again.

    Args:
        option ([`Option`]):
            The system.
        deletions (`np.ndarray`):
            Numbers of requests, each hitting any slice with equal probability.

    Returns:
        `tuple[np.ndarray, np.ndarray]`: The expected share of shards alive, and the expected depth of a shard (0 for a
        dead one) as a share of its slices.
    """
    return _left(option.family, option.num_slices, np.asarray(deletions, dtype=float) / option.num_shards)


def published(option: Option) -> tuple[tuple[int, ...], ...]:
    """The stages of the published plan for the same slices: as many sequences as slices."""
    return _family(option.num_slices, option.num_slices, 1.0)


def depths_of(family: tuple[tuple[int, ...], ...], option: Option, deletions: Sequence[float]) -> tuple[float, ...]:
    """The expected depth, in slices, that a family in the shards of an option serves, if nothing is grown again."""
    hits = np.asarray(deletions, dtype=float) / option.num_shards
    return tuple((_left(family, option.num_slices, hits)[1] * option.num_slices).tolist())


def stage_cost(depth: int, num_slices: int, layers_per_slice: int, num_layers: int, replay: float = 1.0) -> float:
    """What an epoch of a stage costs, as a share of one of ordinary training of the shard, by a model's layers."""
    forward, backward = num_layers, depth * layers_per_slice
    return (1 + replay * (depth - 1)) / num_slices * (forward + backward) / (2 * num_layers)


def storage_of(num_stages: int, layers_per_slice: int, backbone: Backbone) -> int | None:
    """Bytes of the adapters and heads of some stages in single precision."""
    if backbone.adapter_weights_per_layer is None:
        return None
    per_stage = layers_per_slice * backbone.adapter_weights_per_layer + backbone.head_weights
    return num_stages * per_stage * _BYTES_PER_WEIGHT


def require_positive(name: str, value: Any) -> None:
    """Raise [`~hf_s3t.errors.ConfigError`] if a value is no number above zero."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigError(f"`{name}` must be a number above 0, got {value!r}.")


# -- what can be trained ----------------------------------------------------------------------------------------------


def _numbers_of_shards(most: int) -> list[int]:
    """All that are few, and of more those half as many again each time."""
    found = list(range(1, min(most, _SHARDS_ONE_BY_ONE) + 1))
    while found[-1] < most:
        found.append(min(most, found[-1] * 3 // 2))
    return found


def _epochs(workload: Workload, slice_examples: int) -> tuple[int, int]:
    """Epochs of each stage, and the steps they give the first one."""
    per_epoch = math.ceil(slice_examples / workload.batch_size)
    if per_epoch == 0:
        return workload.epochs, 0
    epochs = min(max(workload.epochs, math.ceil(LEAST_STEPS / per_epoch)), max(MOST_EPOCHS, workload.epochs))
    return epochs, epochs * per_epoch


def _reason_of_replay(rows_per_slice: int) -> str:
    least = next((rows for rows, _ in _REPLAYS if rows_per_slice >= rows), None)
    bound = f"fewer than {_REPLAYS[-1][0]}" if least is None else f"{least} or more"
    return f"by {counted(rows_per_slice, 'row')} a slice ({bound})"


def _kinds(num_slices: int, replay: float) -> Iterator[_Kind]:
    yield 1
    whole = math.inf
    if num_slices <= _MOST_SLICES_OF_LATTICE:
        yield "lattice"
        whole = work_of(lattice(num_slices), num_slices, replay)
    chain = work_of(stages_of([range(num_slices)]), num_slices, replay)
    budgets = (round(chain * times, 1) for times in _BUDGETS.get(num_slices, ()))
    yield from (budget for budget in budgets if chain < budget < whole)
    if num_slices > max(_BUDGETS):
        yield from _SEQUENCES


@functools.lru_cache(maxsize=None, typed=True)  # a budget of 4.0 is not 4 sequences
def _family(num_slices: int, kind: _Kind, replay: float) -> tuple[tuple[int, ...], ...]:
    """The stages of a shard."""
    if isinstance(kind, str):
        return lattice(num_slices)
    if isinstance(kind, float):
        return best_family(num_slices, kind, replay=replay)
    return stages_of(select_sequences(num_slices, kind))


@functools.lru_cache(maxsize=None, typed=True)
def _growing(num_slices: int, kind: _Kind, replay: float) -> Growing:
    return Growing(_family(num_slices, kind, replay), num_slices, replay=replay)


@functools.lru_cache(maxsize=4096, typed=True)
def _stream(
    num_slices: int,
    kind: _Kind,
    replay: float,
    works: tuple[float, ...],
    policy: Policy,
    num_shards: int,
    requests: int,
    runs: int,
) -> Stream:
    growing = _growing(num_slices, kind, replay)
    return streams_of(growing, works, policy, num_shards=num_shards, requests=requests, runs=runs)


# -- how deep, how long -----------------------------------------------------------------------------------------------


@functools.cache
def _life(num_shards: int, num_slices: int, first_slices: int, num_examples: int, until: str) -> float:
    return deletion_rate(num_shards, num_slices, first_slices, num_examples=num_examples, until=until)


def _left(family: tuple[tuple[int, ...], ...], num_slices: int, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The chance that a shard is alive after these numbers of requests hit it, and its expected share of depth."""
    hit = -np.expm1(-hits / num_slices)
    alive, depth = np.zeros_like(hit), np.zeros_like(hit)
    for count, (living, depths) in enumerate(_left_by_hit_slices(family, num_slices)):
        # With requests at random times, slices are hit independently of each other: their number weighs a set.
        weight = hit**count * (1 - hit) ** (num_slices - count)
        alive += weight * living
        depth += weight * depths / num_slices
    return alive, depth


@functools.cache
def _left_by_hit_slices(family: tuple[tuple[int, ...], ...], num_slices: int) -> tuple[tuple[int, int], ...]:
    """For each number of hit slices, how many sets of so many leave the shard alive, and the sum of their depths."""
    depths = depths_of_hit_sets(family, num_slices)
    sizes = np.bitwise_count(np.arange(1 << num_slices))
    groups = [depths[sizes == count] for count in range(num_slices + 1)]
    return tuple((int(np.count_nonzero(group)), int(group.sum(dtype=int))) for group in groups)


@functools.cache
def _hits_until_half_depth(family: tuple[tuple[int, ...], ...], num_slices: int) -> float:
    # It brings an optimizer, which is slow to import.
    from scipy.optimize import brentq

    def above_half(hits: float) -> float:
        return float(_left(family, num_slices, np.array([hits]))[1][0]) - 0.5

    most = 1.0
    while above_half(most) > 0:
        most *= 2
    half: float = brentq(above_half, 0.0, most)
    return half


def _mean(after: Sequence[float], requests: float) -> float:
    """The mean of what is there before and after requests, over so many of them."""
    if requests < len(after):
        return float(np.mean(after[: max(1, round(requests))]))
    known = len(after) - 1
    later = float(np.mean(after[known // 2 :]))
    return (float(np.mean(after[:known])) * known + later * (requests - known)) / requests


def _in_all(after: Sequence[float], requests: float) -> float:
    """What is spent on so many requests."""
    known = len(after) - 1
    if requests <= known:
        return after[-1] * requests / known
    half = known // 2
    return after[-1] + (after[-1] - after[half]) / (known - half) * (requests - known)


def _in_words(policy: Policy, num_slices: int) -> str:
    if policy.trigger == 0:
        return "no stage"
    if policy.extra:
        return counted(policy.extra, "stage")
    deep = f"all {num_slices} slices" if policy.target == num_slices else f"{policy.target} of {num_slices} slices"
    return f"stages until every shard serves {deep}"
