"""A study of long streams of deletions: what they take when systems are trained again, Figure 9."""

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from studies.quality import deleted_from, several_shards, system_names
from studies.step_times import median_step
from studies.subsets import check_budgets
from studies.timelines import time_of_lives, time_of_rolling_back
from studies.workbench import Workbench, about, open_bench

from hf_s3t import S3TConfig
from hf_s3t.baselines import Method
from hf_s3t.plan import Plan, StageKey


def lifetimes(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Time of a long stream of deletions: simulated requests over what trainings and deletions really took."""
    bench = open_bench(options, others)
    check_budgets(bench.options.s3t, options.budgets)
    config = bench.loaded.config
    methods = {
        "s3t": bench.trained("s3t", budget=max(options.budgets)),
        "sisa": bench.trained("sisa"),
        "full": bench.trained("full", num_shards=1),
    }
    by_depth = {name: _seconds_by_depth(bench, method) for name, method in methods.items()}
    delete = {
        name: statistics.median(deleted_from(bench, options, name, 0)["seconds"]) for name in system_names(options)
    }
    # Whatever the budget, and for SISA too, a deletion switches stages off. These were timed at different times on a
    # machine that may be shared: one number for all of them keeps that out of the comparison.
    seconds = statistics.median(value for name, value in delete.items() if name != "protosisa")
    stream = {"requests": options.stream, "runs": 500, "delete_seconds": seconds}
    curves, training = _streams(config, sorted(set(options.budgets)), by_depth, stream)
    shown = np.unique(np.linspace(0, options.stream, 51).astype(int))
    return {
        **about(bench, several_shards(options)),
        "num_shards": config.num_shards,
        "num_slices": config.num_slices,
        "requests": shown.tolist(),
        "curves": {name: _rounded(curve.mean(axis=0)[shown]) for name, curve in curves.items()},
        "totals": {
            name: {"mean": round(float(c[:, -1].mean()), 3), "standard_deviation": round(float(c[:, -1].std()), 3)}
            for name, c in curves.items()
        },
        "training_seconds": training,
        "delete_seconds": delete,
        "seconds_of_a_deletion": seconds,
        "seconds_by_depth": by_depth,
        "wall_seconds_of_training": {name: round(method.cost.seconds, 1) for name, method in methods.items()},
        "paper": "2.8x less than SISA, 25x less than full retraining.",
        "paper_less_than_sisa": 2.8,
        "paper_less_than_full": 25,
    }


def _streams(
    config: S3TConfig, budgets: Sequence[int], by_depth: dict[str, dict[int, float]], stream: dict[str, Any]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Name of a way to delete -> the seconds spent, by stream and request; and what training its system takes."""
    m, size = config.num_shards, config.num_slices
    full, s3t, sisa = by_depth["full"][1], _units(by_depth["s3t"], size), _units(by_depth["sisa"], size)
    curves: dict[str, np.ndarray] = {
        "full": np.full((1, stream["requests"] + 1), full).cumsum(axis=1) - full,
        "sisa-rolled-back": time_of_rolling_back([sisa] * m, **stream),
    }
    training = {"full": full, "sisa": m * sum(sisa)}
    for retrain in ("exhausted", "dead_shard"):
        lives = {**stream, "retrain": retrain}
        curves[f"sisa-{retrain}"] = time_of_lives([{0}] * m, size, [sum(sisa)] * m, **lives)
        for budget in budgets:
            plan = Plan.from_config(replace(config, budget=budget))
            first = [{sequence[0] for sequence in sequences} for sequences in plan.sequences]
            work = [
                sum(by_depth["s3t"][key.depth] for key in plan.stages() if key.shard == shard) for shard in range(m)
            ]
            alone = [sum(s3t)] * m
            training[f"s3t-{budget}"] = sum(work)
            for ending, training_of_each in (("", work), ("-side-by-side", alone)):
                curves[f"s3t-{budget}{ending}-{retrain}"] = time_of_lives(first, size, training_of_each, **lives)
    return curves, training


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(float(value), 4) for value in values]


def _seconds_by_depth(bench: Workbench, method: Method) -> dict[int, float]:
    """
    What a unit of each depth takes: its steps when it was trained, at the seconds of a step measured in one sitting.

    The systems were trained at different times, on a machine that others may have used more or less.
    """
    steps = bench.kept(f"step-seconds-{method.name}", lambda: _step_seconds_of(bench, method))
    by_depth: dict[int, list[int]] = {}
    for unit in method.cost.units:
        by_depth.setdefault(unit.unit.count("-"), []).append(unit.steps)
    return {depth: statistics.fmean(found) * steps[depth - 1] for depth, found in sorted(by_depth.items())}


def _step_seconds_of(bench: Workbench, method: Method, rounds: int = 30) -> list[float]:
    """Seconds of a step at every depth, with the stages of the first shard: what is trained is thrown away."""
    folder, stack, base = method.trainer.folder, method.model.stack, method.model.base_model
    rows = bench.loaded.train.select(range(bench.options.training.per_device_train_batch_size))
    loader = method.trainer.get_test_dataloader(rows)
    # As many rows as in training, whatever a batch of the evaluation has.
    batch = loader.collate_fn([loader.dataset[place] for place in range(len(rows))])
    batch = {name: tensor.to(base.device) for name, tensor in batch.items()}
    found = []
    for key in StageKey(0, folder.plan.sequences[0][0]).lineage:
        for stage in key.lineage:
            if stage not in stack:
                stack.load(stage, folder.read_adapter(stage), folder.adapter_digest(stage))
        stack.train_only(key)
        found.append(median_step(base.train(), batch, rounds))
    return found


def _units(by_depth: dict[int, float], size: int) -> list[float]:
    return [by_depth[depth] for depth in range(1, size + 1)]
