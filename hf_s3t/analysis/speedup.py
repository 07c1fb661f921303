"""How much sooner the first training of a planned system is done by more workers: its tree of stages bounds it."""

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..checks import require_int
from ..errors import ConfigError
from ..plan.schedule import Schedule
from ..plan.stages import StageKey
from .growing import Growing
from .options import Option, stage_cost


@dataclass(frozen=True)
class Speedup:
    """
    The first training by some workers, each of which trains one stage at a time.

    Args:
        workers (`int`): How many.
        hours (`float`): Until the last stage is there.
        speedup (`float`): How many times sooner than by one worker.
        busy (`float`): Share of their time that they train, from 0 to 1.
    """

    workers: int
    hours: float
    speedup: float
    busy: float


def hours_by(stages: Sequence[StageKey], hours: Mapping[StageKey, float], workers: int) -> float:
    """
    Hours until the last of some stages is there, where each goes, as its parent has arrived, to a worker that waits.

    Args:
        stages (sequence of [`~hf_s3t.plan.stages.StageKey`]): In the order of their worth, parents before children.
        hours (mapping): What each takes.
        workers (`int`): How many there are.

    Example:

    ```python
    >>> from hf_s3t.analysis.speedup import hours_by
    >>> from hf_s3t.plan import StageKey

    >>> stages = [StageKey(0, (0,)), StageKey(0, (0, 1)), StageKey(1, (0,)), StageKey(1, (0, 1))]
    >>> [hours_by(stages, dict.fromkeys(stages, 1.0), workers) for workers in (1, 2, 4)]
    [4.0, 2.0, 2.0]
    ```
    """
    schedule = Schedule(stages, ())
    running: list[tuple[float, StageKey]] = []
    now = 0.0
    while True:
        while len(running) < workers and (key := schedule.take()) is not None:
            heapq.heappush(running, (now + hours[key], key))
        if not running:
            return now
        now, key = heapq.heappop(running)
        schedule.has_arrived(key)


def speedups(option: Option, num_layers: int, workers: Iterable[int]) -> tuple[Speedup, ...]:
    """
    The first training of a planned system by more and more workers.

    Nothing is counted but training: neither the start of workers nor what goes between them.

    Args:
        option ([`~hf_s3t.analysis.planning.Option`]): The planned system.
        num_layers (`int`): Layers of the model.
        workers (iterable of `int`): Numbers of workers.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a number is below 1, or comes twice.
    """
    numbers = list(workers)
    for number in numbers:
        require_int("workers", number, 1)
    if len(set(numbers)) < len(numbers) or not numbers:
        raise ConfigError(f"`workers` is {numbers}, expected different numbers of workers. Name each once.")
    family, costs = _in_order(option), {}
    for prefix in family:
        costs[prefix] = stage_cost(len(prefix), option.num_slices, option.layers_per_slice, num_layers, option.replay)
    # Shards are alike, and take turns.
    stages = [StageKey(shard, prefix) for prefix in family for shard in range(option.num_shards)]
    scale = option.training_hours / sum(costs[key.prefix] for key in stages)
    hours = {key: costs[key.prefix] * scale for key in stages}
    alone = sum(hours.values())
    found = [(number, hours_by(stages, hours, number)) for number in sorted(numbers)]
    return tuple(Speedup(number, took, alone / took, alone / (took * number)) for number, took in found)


def _in_order(option: Option) -> list[tuple[int, ...]]:
    """The stages of a shard in the order in which they are grown."""
    growing = Growing(option.family, option.num_slices, replay=option.replay)
    state, order = 0, list[tuple[int, ...]]()
    while (step := growing.next(state)) is not None:
        order.append(growing.stages[step.place])
        state |= 1 << step.place
    return order
