"""Studies of one shard: quality by the slices it has learnt, or lost, and by how its layers are shared out."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from studies.step_times import step_seconds
from studies.workbench import Workbench, about, open_bench

from hf_s3t.errors import ConfigError


# Figure 12


# Recipe -> what the paper calls its tasks; those of language models are the others.
_KINDS = {"image": "vision", "text": "text"}


def drop(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Relative drop in quality against deleted slices: one example of the last slice, of the one before, and so on."""
    earlier = [run_of_results(path) for path in options.results]
    bench = open_bench(options, others)
    runs = [
        {
            "name": f"{_task_name(bench)}: {label}",
            "kind": _KINDS[options.recipe],
            "method": name,
            "seed": seed,
            "metric": bench.metric,
            "evaluation_rows": len(bench.loaded.evaluation.ids),
            "quality": found,
        }
        for name, label in (("s3t", "S3T"), ("sisa", "SISA"))
        for seed in options.seeds
        for found in [
            bench.kept(
                f"drop-{name}-{seed}",
                lambda name=name, seed=seed: _dropped(bench, name, seed, options.max_depth),
                max_depth=options.max_depth,
            )
        ]
    ]
    for run in runs:
        run["drop"] = _relative_drop(run["quality"])
    runs += earlier
    return {
        **about(bench, [system for name in ("s3t", "sisa") for system in _of_seeds(options, name)]),
        "runs": runs,
        "paper": "Below 5% on vision, small on instruction tuning, larger on some text tasks.",
        "paper_vision": 0.05,
    }


def _task_name(bench: Workbench) -> str:
    return bench.loaded.task.name


def one_shard(seed: int, **changes: Any) -> dict[str, Any]:
    """The fields of `S3TConfig` of a system with one shard and one sequence."""
    return {"num_shards": 1, "layers_per_slice": None, "budget": 1, "seed": seed, **changes}


def _dropped(bench: Workbench, name: str, seed: int, depth: int) -> list[float]:
    source = bench.trained(name, **one_shard(seed, num_slices=depth))
    method = bench.copy_of(name, source, f"drop-{name}-{seed}")
    table = method.trainer.folder.table
    found = [bench.quality(method)]
    for last in reversed(range(1, method.max_depth)):
        # The one sequence takes the slices in their order.
        method.unlearn(table.members(0, last)[:1])
        found.append(bench.quality(method))
    return found


def run_of_results(path: Path) -> dict[str, Any]:
    """
    The run of a results file of a recipe, of a language model its loss.

    Args:
        path (`Path`): The file.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it holds no results, or none by depth.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is no file. Give the results files of recipes.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows, by_depth = next(iter(content["metrics"].items()), ("", {}))
        script, config = content["settings"]["script"], content["settings"]["s3t"]
        found = {
            "kind": _KINDS.get(content["recipe"].removesuffix("_classification"), "instruction tuning"),
            "method": content["method"],
            "seed": content["seed"],
            "evaluation_rows": content.get("data", {}).get("evaluation_rows", {}).get(rows),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} holds no results of a recipe ({error!r}). Give such a file.") from error
    if len(by_depth) < 2:
        raise ConfigError(f"{path} holds one depth at most. Give results of a system with slices.")
    metric = next(iter(by_depth["1"]))
    values = [by_depth[depth][metric] for depth in sorted(by_depth, key=int, reverse=True)]
    name = f"{script.get('task_name') or content['recipe']}: {found['method'].upper()}, m = {config['num_shards']}"
    return {
        "name": name,
        **found,
        "metric": metric,
        "results": path.name,
        "quality": values,
        "drop": _relative_drop(values, metric),
    }


def _relative_drop(values: Sequence[float], metric: str = "") -> list[float]:
    """How much worse each value is than the first one, as a share of that; of a loss the larger is the worse."""
    whole = values[0]
    if whole == 0:
        raise ConfigError(f"The quality before any deletion is 0 ({metric or 'the main metric'}): nothing can drop.")
    return [(value - whole if metric == "loss" else whole - value) / abs(whole) for value in values]


# Figure 13


def layers_and_slices(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality over layers per slice and number of slices, of one shard with one sequence."""
    bench = open_bench(options, others)
    num_layers = bench.loaded.model.config.num_hidden_layers
    cells, systems = [], []
    for layers in sorted(set(options.layers)):
        for size in sorted(set(options.slices)):
            if layers * size <= num_layers:
                changes = [one_shard(seed, num_slices=size, layers_per_slice=layers) for seed in options.seeds]
                values = [
                    bench.kept(
                        f"slices-{layers}-{size}-{own['seed']}",
                        lambda own=own: bench.quality(bench.trained("s3t", **own)),
                    )
                    for own in changes
                ]
                cells.append({"layers_per_slice": layers, "num_slices": size, "quality": values})
                systems += [("s3t", own) for own in changes]
    return {
        **about(bench, systems),
        "seeds": options.seeds,
        "cells": cells,
        "paper": "RTE: one layer a slice works badly, a sweet spot exists.",
    }


# Figure 14


def sequential(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality of S3T, sequential training and SISA by slices learnt; seconds per step against trained layers."""
    bench = open_bench(options, others)
    timing = {"image_size": options.timing_image_size, "batch_size": options.timing_batch_size}
    methods = ("s3t", "sequential", "sisa")
    return {
        **about(bench, [system for name in methods for system in _of_seeds(options, name)]),
        "learning_rate": bench.options.training.learning_rate,
        "seeds": options.seeds,
        "quality": {name: _by_depth(bench, options, name) for name in methods},
        "timing": {**timing, "rows": bench.kept("step-seconds", lambda: step_seconds(**timing), **timing)},
        "paper": "Comparable quality; time per step linear in the trained layers.",
    }


def _of_seeds(options: argparse.Namespace, name: str, **changes: Any) -> list[tuple[str, dict[str, Any]]]:
    """A method's systems of one shard, one per seed."""
    return [(name, one_shard(seed, num_slices=options.max_depth, **changes)) for seed in options.seeds]


def _by_depth(bench: Workbench, options: argparse.Namespace, name: str, **changes: Any) -> list[list[float]]:
    """For each seed the quality at every depth."""

    def measure(own: dict[str, Any]) -> list[float]:
        method = bench.trained(name, **own)
        return [bench.quality(method, depth) for depth in range(1, method.max_depth + 1)]

    label = "-".join([name, *map(str, changes.values())])
    return [
        bench.kept(f"by-depth-{label}-{own['seed']}", lambda own=own: measure(own), max_depth=options.max_depth)
        for _, own in _of_seeds(options, name, **changes)
    ]


# Section C.2


def ablations(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality at every depth: the method, from the bottom up, and with one slice per layer group."""
    bench = open_bench(options, others)
    variants = {
        "top-down, cumulative": {},
        "bottom-up, cumulative": {"growth": "bottom-up"},
        "top-down, one slice per group": {"stage_data": "slice"},
        "bottom-up, one slice per group": {"growth": "bottom-up", "stage_data": "slice"},
    }
    return {
        **about(bench, [system for changes in variants.values() for system in _of_seeds(options, "s3t", **changes)]),
        "seeds": options.seeds,
        "quality": {name: _by_depth(bench, options, "s3t", **changes) for name, changes in variants.items()},
        "paper": "Bottom-up did not converge; cumulative is better than one slice per group.",
    }
