"""A stream of deletions that is really answered by training, beside what the simulation says of the same requests."""

import argparse
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from studies.answers import Benches, Trained, chosen_rate, named, quality_together
from studies.workbench import Workbench, about

from hf_s3t import S3TConfig
from hf_s3t.analysis.streams import Policy, Stream, drawn_requests, families_under, sisa
from hf_s3t.baselines import Method
from hf_s3t.baselines.cost import UnitCost
from hf_s3t.plan.stages import StageKey, relative_cost
from hf_s3t.sequences.families import lattice, stages_of
from hf_s3t.sequences.rules import select_sequences


@dataclass(frozen=True)
class Answered:
    """
    A way to answer requests.

    Args:
        title (`str`): What figures call it.
        trained (`Trained`): The method.
        stages (`int`, *optional*): Stages that are trained after each request; everything that is missing if not
            given.
        until_exhausted (`bool`): Whether nothing is trained before no shard is left.
    """

    title: str
    trained: Trained
    stages: int | None = None
    until_exhausted: bool = False

    def changes(self, num_slices: int) -> dict[str, Any]:
        """The fields of `S3TConfig` that differ."""
        if self.trained.method == "s3t" and self.until_exhausted:
            return {"replay": self.trained.replay, "budget": num_slices, "keep_idle": True}
        return self.trained.changes()

    def policy(self, num_slices: int) -> Policy:
        """The same, for the simulation."""
        if self.until_exhausted:
            return Policy.when_exhausted(num_slices)
        return Policy.all_at_once(num_slices) if self.stages is None else Policy.stages(num_slices, self.stages)

    def answer(self, method: Method) -> None:
        """Train what is trained after a request."""
        if not self.until_exhausted or method.is_exhausted:
            method.trainer.train(max_stages=self.stages)


def ways(replay: float, stages: Sequence[int]) -> list[Answered]:
    """S3T with a lattice, replay and some stages a request, SISA that retrains at once, and the published plan."""
    ours = [
        Answered(f"S3T, lattice, replay {replay:g}, {n} {'stage' if n == 1 else 'stages'} a request", of, n)
        for of in [Trained("s3t", replay)]
        for n in stages
    ]
    theirs = [
        Answered(f"SISA, retrained at once, replay {share:g}", Trained("sisa", share))
        for share in sorted({replay, 1.0})
    ]
    published = Answered("S3T as published, retrained when exhausted", Trained("s3t"), until_exhausted=True)
    return [*ours, *theirs, published]


def trained_stream(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality and work of a stream whose requests are answered by training, and by simulation."""
    benches = Benches(options, others)
    bench = benches.given()
    config = bench.loaded.config
    size, seed = config.num_slices, options.seeds[0]
    rates = {"s3t": options.rates, "sisa": options.baseline_rates}
    systems = []
    for way in ways(options.replay, options.stages):
        rate = chosen_rate(benches, way.trained, rates[way.trained.method], seed)["rate"]
        here = benches.at(rate, seed)
        requests = list(drawn_requests(random.Random(options.order), config.num_shards, size, options.requests))
        settings = {"order": options.order, "requests": options.requests, "stages": way.stages}
        label = f"stream-{way.trained.name}-{way.stages or ('exhausted' if way.until_exhausted else 'all')}"
        found = here.kept(label, lambda b=here, w=way, n=label, r=requests: _answered(b, w, n, r), **settings)
        simulated = simulated_stream(config, way, found["works"], options.requests, options.order)
        table = quality_together(benches, way.trained, rate, options.seeds)
        expected = sum(table[named(depths)] * share for depths, share in simulated.together.items())
        systems.append(
            {
                "title": way.title,
                "method": way.trained.method,
                "replay": way.trained.replay,
                "learning_rate": rate,
                **found,
                "simulated": {
                    "work": round(simulated.work, 4),
                    "stages": simulated.stages,
                    "mean_depth": round(simulated.mean_depth, 4),
                    "mean_quality": round(expected, 6),
                    "depths": [round(depth, 4) for depth in simulated.depth_after],
                },
            }
        )
        print(f"{way.title}: {found['mean_quality']:.4f} for {found['work']:.2f}", flush=True)
    made = [(way.trained.method, way.changes(size)) for way in ways(options.replay, options.stages)]
    return {
        **about(bench, made),
        "num_shards": config.num_shards,
        "num_slices": size,
        "requests": options.requests,
        "order": options.order,
        "seed": seed,
        "systems": systems,
        "paper": "Figure 9 is simulated over measured times.",
    }


# Really


def _answered(bench: Workbench, way: Answered, label: str, requests: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """Delete one example with each request, train what shall be, and measure. Work is without the first training."""
    method_name = way.trained.method
    source = bench.trained(method_name, **way.changes(bench.loaded.config.num_slices))
    method = bench.copy_of(method_name, source, label)
    before, first, works = method.cost, _work(bench, method, method.cost.units), _works(bench, method)
    qualities, depths = [bench.quality(method)], [fmean(method.depths)]
    for shard, slice_ in requests:
        method.unlearn([_example(method, shard, slice_)])
        way.answer(method)
        qualities.append(bench.quality_of_guessing if method.is_exhausted else bench.quality(method))
        depths.append(fmean(method.depths))
    units = method.cost.since(before).units
    return {
        "first_work": round(first, 4),
        "work": round(_work(bench, method, units), 4),
        "work_in_steps": round(_work_in_steps(bench, method, units), 4),
        "stages_trained": len(units),
        "steps": sum(unit.steps for unit in units),
        "works": works,
        "qualities": qualities,
        "depths": [round(depth, 4) for depth in depths],
        "mean_quality": round(fmean(qualities[1:]), 6),
        "mean_depth": round(fmean(depths[1:]), 4),
    }


def _example(method: Method, shard: int, slice_: int) -> Any:
    """The first example of a slice that is in; of an empty one, of whichever slice of the shard has one."""
    table, size = method.trainer.folder.table, method.trainer.folder.config.num_slices
    slices = [slice_, *(s for s in range(size) if s != slice_)]
    return next(example for s in slices for example in table.members(shard, s))


def _layers(method: Method, key: StageKey, rows: float) -> float:
    """Forward and backward passes of one layer for one row, in training so many rows of a stage."""
    layers = method.model.stack.layers
    return relative_cost(key, 1, layers.num_layers, layers.layers_below(key.group)) * rows


def _full(bench: Workbench, method: Method) -> float:
    """The same of one full fine-tuning: all rows, forward and backward through all layers, as many epochs."""
    layers = method.model.stack.layers.num_layers
    return 2 * layers * len(bench.loaded.train) * bench.options.training.num_train_epochs


def _work(bench: Workbench, method: Method, units: Sequence[UnitCost]) -> float:
    """In full fine-tunings, by the rows that were seen and the layers that they went through."""
    passes = sum(_layers(method, _key(unit), unit.examples) for unit in units)
    return passes / _full(bench, method)


def _work_in_steps(bench: Workbench, method: Method, units: Sequence[UnitCost]) -> float:
    """The same where a step costs as much whatever its number of rows: small slices leave batches half empty."""
    size = bench.options.training.per_device_train_batch_size
    passes = sum(_layers(method, _key(unit), unit.steps * size) for unit in units)
    whole = -(-len(bench.loaded.train) // size) * size / len(bench.loaded.train)
    return passes / (_full(bench, method) * whole)


def _key(unit: UnitCost) -> StageKey:
    return StageKey.from_path(f"stages/{unit.unit}")


def _works(bench: Workbench, method: Method) -> list[float]:
    """What a stage of each depth costs by its rows and layers, in full fine-tunings of its shard, nothing deleted."""
    folder = method.trainer.folder
    config, shards = folder.config, folder.config.num_shards
    found = []
    for depth in range(1, config.num_slices + 1):
        keys = [StageKey(shard, tuple(range(depth))) for shard in range(shards)]
        rows = [config.examples_per_epoch([folder.table.size(k.shard, s) for s in k.prefix]) for k in keys]
        epochs = bench.options.training.num_train_epochs
        passes = [_layers(method, key, epochs * count) for key, count in zip(keys, rows, strict=True)]
        found.append(round(sum(passes) / _full(bench, method), 6))
    return found


# Simulated


def simulated_stream(config: S3TConfig, way: Answered, works: Sequence[float], requests: int, order: int) -> Stream:
    """
    The same requests, simulated.

    Args:
        config (`S3TConfig`): Shards, slices, and the horizon by which stages are weighed.
        way ([`Answered`]): What is trained after each request.
        works (sequence of `float`): What a stage of each depth costs, with the model's layers and rows.
        requests (`int`): Number of requests.
        order (`int`): Seed of the requests.
    """
    size = config.num_slices
    drawn: Mapping[str, Any] = {
        "num_shards": config.num_shards,
        "replay": way.trained.replay,
        "works": works,
        "requests": requests,
        "seed": order,
    }
    if way.trained.method == "sisa":
        return sisa(size, way.policy(size), reorders=False, **drawn)
    if way.until_exhausted:
        rotations = stages_of(select_sequences(size, size))
        return families_under(rotations, size, way.policy(size), by_sets=False, **drawn)
    return families_under(lattice(size), size, way.policy(size), horizon=config.score_horizon, **drawn)
