"""
The figures of the paper that need trained systems: quality, time and storage while examples are really deleted.

    python recipes/deletion_study.py quality --config recipes/configs/digits.yaml     # a stand-in, see there
    python recipes/deletion_study.py quality --config recipes/configs/cifar10.yaml --num_shards 5 --num_slices 4
    python recipes/deletion_study.py storage
    python recipes/deletion_study.py theory

What a study does not take is an option of `image_classification.py`, or with `--recipe text` of
`text_classification.py`. Systems and measurements stay in `--work_dir`: a study that was interrupted goes on where it
stopped, and what was measured under the same settings is not measured again. Numbers go to `--output` as JSON, beside
the picture that is drawn of them.
"""

import argparse
import copy
import json
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import command_line
from common.options import known_options
from common.results import hardware
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from studies import theory_command
from studies.figures import draw
from studies.stored import stored_data, write_data
from studies.theory import TABLE_3_GIGABYTES_PER_BUDGET, TABLE_3_RATES, VIT_LARGE
from studies.timelines import time_of_lives, time_of_rolling_back
from studies.workbench import RECIPES, Workbench, check_budgets, delete_one_by_one, request_order
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from hf_s3t import S3TConfig
from hf_s3t.analysis import deletion_rate
from hf_s3t.analysis.pictures import check_picture
from hf_s3t.baselines import METHODS, Method
from hf_s3t.errors import ConfigError
from hf_s3t.folder.layout import ADAPTER_FILE
from hf_s3t.folder.versions import library_versions
from hf_s3t.plan import Plan, StageKey


# Options of studies of which none, or fewer, would leave nothing to do.
_COUNTS = (
    "budgets", "orders", "requests", "retrain_every", "stream", "max_depth", "layers", "slices", "members",
    "timing_image_size", "timing_batch_size",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    """A subcommand per study, each with its options; others are the recipe's."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="study", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--output", type=Path, default=Path("docs/figures"), help="folder for data and pictures")
    shared.add_argument("--format", choices=("png", "svg"), default="png", help="of the picture (default: png)")
    shared.add_argument("--redraw", action="store_true", help="draw from the JSON that is there, compute nothing")
    kept = argparse.ArgumentParser(add_help=False, parents=[shared])
    kept.add_argument(
        "--work_dir", type=Path, default=Path("runs/deletion-study"), help="where systems and measurements are kept"
    )
    trained = argparse.ArgumentParser(add_help=False, parents=[kept])
    trained.add_argument("--recipe", choices=sorted(RECIPES), default="image", help="whose options the others are")
    several = argparse.ArgumentParser(add_help=False)
    several.add_argument("--seeds", type=int, nargs="+", default=[42], help="seeds of the systems (default: 42)")
    deep = argparse.ArgumentParser(add_help=False)
    deep.add_argument(
        "--max_depth",
        type=int,
        default=6,
        help="slices of the one shard, which share the layers out (default: 6)",
    )

    def add(name: str, help_text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help_text, parents=parents, allow_abbrev=False)

    quality = add("quality", "Figure 6, left: quality against deletions", trained)
    lives = add("time", "Figure 9: time of many deletions", trained)
    for command in (quality, lives):
        command.add_argument("--budgets", type=int, nargs="+", default=[1, 2, 4, 24], help="of S3T")
        command.add_argument("--orders", type=int, default=3, help="orders of requests to delete in (default: 3)")
        command.add_argument("--requests", type=int, default=100, help="requests of each order (default: 100)")
        command.add_argument("--retrain_every", type=int, default=20, help="requests between full retrainings")
    lives.add_argument("--stream", type=int, default=1000, help="requests of a simulated stream (default: 1000)")
    weights = add("weights", "Figure 15, right: weights of ProtoSISA's prototypes", trained)
    weights.add_argument("--orders", type=int, default=3, help="orders of requests to delete in (default: 3)")
    weights.add_argument("--after", type=int, nargs="+", default=[0, 10, 20, 30, 40], help="requests to measure after")
    weights.add_argument("--weights", type=float, nargs="+", default=[i / 10 for i in range(11)], help="from 0 to 1")
    drop = add("drop", "Figure 12: relative drop against deleted slices", trained, several, deep)
    drop.add_argument(
        "--results",
        type=Path,
        nargs="+",
        default=[],
        help="results files of recipes, drawn too; with --redraw in place of those that were drawn before",
    )
    slices = add("slices", "Figure 13: layers per slice, number of slices", trained, several)
    slices.add_argument("--layers", type=int, nargs="+", default=[1, 2, 3], help="layers per slice")
    slices.add_argument("--slices", type=int, nargs="+", default=[1, 2, 3, 6], help="numbers of slices")
    sequential = add("sequential", "Figure 14: sequential training; time against layers", trained, several, deep)
    sequential.add_argument("--timing_image_size", type=int, default=112, help="images of ViT-base in the timing")
    sequential.add_argument("--timing_batch_size", type=int, default=2, help="batch of ViT-base in the timing")
    together = add("together", "Figure 16: one shard's sequences served together", trained)
    together.add_argument("--members", type=int, nargs="+", default=[1, 2, 3, 4, 8, 12, 24], help="of one shard")
    add("ablations", "Section C.2: bottom-up, and one slice per layer group", trained, several, deep)
    add("storage", "Table 3: storage of ViT-large, on files", kept)
    add("theory", "the figures that need no trained system, by theory_figures.py", shared)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run a study, or draw it again."""
    options, others = make_parser().parse_known_args(argv)
    if options.study == "theory":
        theory(options, others)
        return
    figure, study = STUDIES[options.study]
    data_file, picture = (options.output / f"{figure}.{suffix}" for suffix in ("json", options.format))
    if options.redraw:
        data = stored_data(data_file)
        check_picture(picture)
        if getattr(options, "results", []):
            data["runs"] = [run for run in data["runs"] if "results" not in run] + _earlier(options)
            write_data(data_file, data)
    else:
        check_picture(picture, make_folder=True)
        check_values(options)
        started = time.perf_counter()
        data = study(options, others)
        data["hardware"], data["versions"] = hardware(), library_versions()
        write_data(data_file, data)
        print(f"{data_file}: {time.perf_counter() - started:.0f} s")
    draw(figure, stored_data(data_file), picture)
    print(picture)


def theory(options: argparse.Namespace, others: Sequence[str]) -> None:
    """The figures that need no trained system."""
    redraw = ["--redraw"] if options.redraw else []
    given = ["--output", str(options.output), "--format", options.format, *redraw, *others]
    theory_command.make_figures(theory_command.make_parser().parse_args(given))


def check_values(options: argparse.Namespace) -> None:
    """
    Refuse values that a study would fail at when all is trained.

    Args:
        options (`Namespace`): The study's own options.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a count is below 1, or a weight is none of a mean.
    """
    for name in _COUNTS:
        value = getattr(options, name, 1)
        least = min(value) if isinstance(value, list) else value
        if least < 1:
            raise ConfigError(f"`--{name}` is {least}, expected 1 or more. Leave it out for the default.")
    for request in getattr(options, "after", ()):
        if request < 0:
            raise ConfigError(f"`--after` is {request}, expected numbers of requests: 0 or more.")
    for weight in getattr(options, "weights", ()):
        if not 0 <= weight <= 1:
            raise ConfigError(f"`--weights` is {weight:g}, expected weights of a mean: from 0 to 1.")


def _bench(options: argparse.Namespace, others: Sequence[str]) -> Workbench:
    # One of the study's own options may have been meant.
    known_options(RECIPES[options.recipe].make_parser(), others, vars(options))
    return Workbench(options.recipe, others, options.work_dir)


def _about(bench: Workbench, systems: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """What every study of trained systems says of what it was made with: those of `systems`, as a bench takes them."""
    return {
        "settings": bench.settings_of_study(systems),
        "metric": bench.metric,
        "train_rows": len(bench.loaded.train),
        "evaluation_rows": len(bench.loaded.evaluation.ids),
        "quality_of_guessing": bench.quality_of_guessing,
        "num_layers": bench.loaded.model.config.num_hidden_layers,
    }


# Figure 6, left


def quality(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality against the number of deletions, by deleting one example after the other from copies of systems."""
    bench = _bench(options, others)
    check_budgets(bench.options.s3t, options.budgets)
    systems = {
        name: [_deleted_from(bench, options, name, order) for order in range(options.orders)]
        for name in _system_names(options)
    }
    retrained = bench.kept(
        f"full-retrained-every-{options.retrain_every}-of-{options.requests}", lambda: _retrained(bench, options)
    )
    config = bench.loaded.config
    return {
        **_about(bench, _several_shards(options)),
        "num_shards": config.num_shards,
        "num_slices": config.num_slices,
        "requests": options.requests,
        "systems": systems,
        "full": retrained,
        "expected_exhausted": {
            name: deletion_rate(
                config.num_shards,
                config.num_slices,
                _budget_of(name),
                num_examples=len(bench.loaded.train) if config.partition == "balanced" else None,
            )
            for name in systems
            if name != "protosisa"
        },
        "paper": "CIFAR-10 and CIFAR-100: B = 4 is close to B = 24; SISA dies near 40 requests.",
        "paper_sisa_dies": 40,
    }


def _system_names(options: argparse.Namespace) -> list[str]:
    return [*(f"s3t-{budget}" for budget in sorted(set(options.budgets))), "sisa", "protosisa"]


def _several_shards(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """What is trained to delete from, and what it is compared with: S3T's budgets share the stages of the largest."""
    return [("s3t", {"budget": max(options.budgets)}), ("sisa", {}), ("protosisa", {}), ("full", {"num_shards": 1})]


def _budget_of(name: str) -> int:
    return int(name.removeprefix("s3t-")) if name.startswith("s3t-") else 1


def _trained_of(bench: Workbench, options: argparse.Namespace, name: str) -> tuple[str, Method, dict[str, Any]]:
    """The method of a system, what is trained for it, and what its copies change: S3T's budgets share stages."""
    if name.startswith("s3t-"):
        return "s3t", bench.trained("s3t", budget=max(options.budgets)), {"budget": _budget_of(name)}
    return name, bench.trained(name), {}


def _deleted_from(bench: Workbench, options: argparse.Namespace, name: str, order: int) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        method_name, source, changes = _trained_of(bench, options, name)
        method = bench.copy_of(method_name, source, f"{name}-order-{order}", **changes)
        # Every deletion changes the prototypes, which go on answering when no stack is left.
        every = 10 if name == "protosisa" else None
        found = delete_one_by_one(bench, method, request_order(bench.ids, order)[: options.requests], every)
        print(f"{name}, order {order}: {found['requests']} requests, exhausted after {found['exhausted_after']}")
        return found

    return bench.kept(f"{name}-order-{order}", measure, requests=options.requests, largest=max(options.budgets))


def _retrained(bench: Workbench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One model on all data, trained anew without the examples deleted so far; the requests of the first order."""
    order = request_order(bench.ids, 0)
    method = bench.copy_of("full", bench.trained("full", num_shards=1), "full-retrained")
    points = [{"request": 0, "quality": bench.quality(method), "seconds": method.cost.seconds}]
    for request in range(options.retrain_every, options.requests + 1, options.retrain_every):
        method.unlearn(order[points[-1]["request"] : request])
        cost = method.retrain()
        points.append({"request": request, "quality": bench.quality(method), "seconds": cost.seconds})
    return points


# Figure 15, ProtoSISA's weights


def weights(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality of ProtoSISA against the weight of its prototypes, after several numbers of deletions."""
    bench = _bench(options, others)
    after, values = sorted({0, *options.after}), sorted(set(options.weights))
    settings = {"after": after, "weights": values}
    return {
        **_about(bench, [("protosisa", {})]),
        "num_shards": bench.loaded.config.num_shards,
        "num_slices": bench.loaded.config.num_slices,
        "after": after,
        "weights": values,
        "orders": [
            bench.kept(
                f"weights-order-{order}", lambda order=order: _by_weight(bench, order, after, values), **settings
            )
            for order in range(options.orders)
        ],
        "paper": "Figure 15 shows several weights of ProtoSISA.",
    }


def _by_weight(bench: Workbench, order: int, after: Sequence[int], values: Sequence[float]) -> list[dict[str, Any]]:
    """Per number of requests the shards that are left, and the quality at every weight."""
    method = bench.copy_of("protosisa", bench.trained("protosisa"), f"weights-order-{order}")
    requests = request_order(bench.ids, order)
    found, done = [], 0
    for count in after:
        if count > done:
            method.unlearn(requests[done:count])
        done = count
        qualities = [_weighted(bench, method, weight) for weight in values]
        found.append({"shards_left": sum(depth > 0 for depth in method.depths), "quality": qualities})
    return found


def _weighted(bench: Workbench, method: Method, weight: float) -> float:
    method.model.prototype_weight = weight
    return bench.quality(method)


# Figure 9


def lifetimes(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Time of a long stream of deletions: simulated requests over what trainings and deletions really took."""
    bench = _bench(options, others)
    check_budgets(bench.options.s3t, options.budgets)
    config = bench.loaded.config
    m, size = config.num_shards, config.num_slices
    largest = max(options.budgets)
    methods = {
        "s3t": bench.trained("s3t", budget=largest),
        "sisa": bench.trained("sisa"),
        "full": bench.trained("full", num_shards=1),
    }
    s3t, sisa, whole = (_seconds_by_depth(bench, method) for method in methods.values())
    full = whole[1]
    delete = {
        name: statistics.median(_deleted_from(bench, options, name, 0)["seconds"]) for name in _system_names(options)
    }
    # Whatever the budget, and for SISA too, a deletion switches stages off. These were timed at different times on a
    # machine that may be shared: one number for all of them keeps that out of the comparison.
    seconds = statistics.median(value for name, value in delete.items() if name != "protosisa")
    stream = {"requests": options.stream, "runs": 500, "delete_seconds": seconds}
    curves: dict[str, np.ndarray] = {
        "full": np.full((1, options.stream + 1), full).cumsum(axis=1) - full,
        "sisa-rolled-back": time_of_rolling_back([_units(sisa, size)] * m, **stream),
    }
    training = {"full": full, "sisa": m * sum(_units(sisa, size))}
    for retrain in ("exhausted", "dead_shard"):
        lives = {**stream, "retrain": retrain}
        curves[f"sisa-{retrain}"] = time_of_lives([{0}] * m, size, [sum(_units(sisa, size))] * m, **lives)
        for budget in sorted(set(options.budgets)):
            plan = Plan.from_config(replace(config, budget=budget))
            first = [{sequence[0] for sequence in sequences} for sequences in plan.sequences]
            work = [sum(s3t[key.depth] for key in plan.stages() if key.shard == shard) for shard in range(m)]
            alone = [sum(_units(s3t, size))] * m
            training[f"s3t-{budget}"] = sum(work)
            for ending, training_of_each in (("", work), ("-side-by-side", alone)):
                curves[f"s3t-{budget}{ending}-{retrain}"] = time_of_lives(first, size, training_of_each, **lives)
    shown = np.unique(np.linspace(0, options.stream, 51).astype(int))
    return {
        **_about(bench, _several_shards(options)),
        "num_shards": m,
        "num_slices": size,
        "requests": shown.tolist(),
        "curves": {name: _rounded(curve.mean(axis=0)[shown]) for name, curve in curves.items()},
        "totals": {
            name: {"mean": round(float(c[:, -1].mean()), 3), "standard_deviation": round(float(c[:, -1].std()), 3)}
            for name, c in curves.items()
        },
        "training_seconds": training,
        "delete_seconds": delete,
        "seconds_of_a_deletion": seconds,
        "seconds_by_depth": {"s3t": s3t, "sisa": sisa, "full": full},
        "wall_seconds_of_training": {name: round(method.cost.seconds, 1) for name, method in methods.items()},
        "paper": "2.8x less than SISA, 25x less than full retraining.",
        "paper_less_than_sisa": 2.8,
        "paper_less_than_full": 25,
    }


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
        found.append(_median_step(base.train(), batch, rounds))
    return found


def _units(by_depth: dict[int, float], size: int) -> list[float]:
    return [by_depth[depth] for depth in range(1, size + 1)]


# Figure 12


# Recipe -> what the paper calls its tasks; those of language models are the others.
_KINDS = {"image": "vision", "text": "text"}


def drop(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Relative drop in quality against deleted slices: one example of the last slice, of the one before, and so on."""
    earlier = _earlier(options)
    bench = _bench(options, others)
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
        **_about(bench, [system for name in ("s3t", "sisa") for system in _of_seeds(options, name)]),
        "runs": runs,
        "paper": "Below 5% on vision, small on instruction tuning, larger on some text tasks.",
        "paper_vision": 0.05,
    }


def _task_name(bench: Workbench) -> str:
    return bench.loaded.task.name


def _one_shard(seed: int, **changes: Any) -> dict[str, Any]:
    """The fields of `S3TConfig` of a system with one shard and one sequence."""
    return {"num_shards": 1, "layers_per_slice": None, "budget": 1, "seed": seed, **changes}


def _dropped(bench: Workbench, name: str, seed: int, depth: int) -> list[float]:
    source = bench.trained(name, **_one_shard(seed, num_slices=depth))
    method = bench.copy_of(name, source, f"drop-{name}-{seed}")
    table = method.trainer.folder.table
    found = [bench.quality(method)]
    for last in reversed(range(1, method.max_depth)):
        # The one sequence takes the slices in their order.
        method.unlearn(table.members(0, last)[:1])
        found.append(bench.quality(method))
    return found


def _earlier(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The runs of the results files that are to be drawn too."""
    return [_from_results(path) for path in options.results]


def _from_results(path: Path) -> dict[str, Any]:
    """The run of a results file of a recipe, of a language model its loss."""
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
    bench = _bench(options, others)
    num_layers = bench.loaded.model.config.num_hidden_layers
    cells, systems = [], []
    for layers in sorted(set(options.layers)):
        for size in sorted(set(options.slices)):
            if layers * size <= num_layers:
                changes = [_one_shard(seed, num_slices=size, layers_per_slice=layers) for seed in options.seeds]
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
        **_about(bench, systems),
        "seeds": options.seeds,
        "cells": cells,
        "paper": "RTE: one layer a slice works badly, a sweet spot exists.",
    }


# Figure 14


def sequential(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality of S3T, sequential training and SISA by slices learnt; seconds per step against trained layers."""
    bench = _bench(options, others)
    timing = {"image_size": options.timing_image_size, "batch_size": options.timing_batch_size}
    methods = ("s3t", "sequential", "sisa")
    return {
        **_about(bench, [system for name in methods for system in _of_seeds(options, name)]),
        "learning_rate": bench.options.training.learning_rate,
        "seeds": options.seeds,
        "quality": {name: _by_depth(bench, options, name) for name in methods},
        "timing": {**timing, "rows": bench.kept("step-seconds", lambda: step_seconds(**timing), **timing)},
        "paper": "Comparable quality; time per step linear in the trained layers.",
    }


def _of_seeds(options: argparse.Namespace, name: str, **changes: Any) -> list[tuple[str, dict[str, Any]]]:
    """A method's systems of one shard, one per seed."""
    return [(name, _one_shard(seed, num_slices=options.max_depth, **changes)) for seed in options.seeds]


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


def step_seconds(image_size: int, batch_size: int, rounds: int = 3) -> list[dict[str, Any]]:
    """
    Seconds of a training step of ViT-base against the layers with adapters, counted from the top.

    Once with all of them trained, as when a whole adapter is limited to the top layers, and once with the lowest one
    trained and those above it active and frozen, as a stage of S3T with one layer a slice.

    Args:
        image_size (`int`): Height and width of the images.
        batch_size (`int`): Images in a batch.
        rounds (`int`): How often each step is timed; the median counts.
    """
    config = ViTConfig(image_size=image_size, num_labels=10)
    base = ViTForImageClassification(config)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    batch = {
        "pixel_values": torch.randn(batch_size, 3, image_size, image_size),
        "labels": torch.zeros(batch_size, dtype=torch.long),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    rows = []
    for count in range(1, config.num_hidden_layers + 1):
        lowest = config.num_hidden_layers - count
        own = copy.deepcopy(lora)
        own.layers_to_transform = list(range(lowest, config.num_hidden_layers))
        own.layers_pattern = "layers"
        model = get_peft_model(base, own).to(device).train()
        row = {"layers": count}
        for name in ("all", "lowest"):
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(
                    "lora_" in parameter_name and (name == "all" or f".{lowest}." in parameter_name)
                )
            row[name] = _median_step(model, batch, rounds)
        base = model.unload()
        rows.append(row)
    return rows


def _median_step(model: torch.nn.Module, batch: dict[str, torch.Tensor], rounds: int) -> float:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    on_gpu = next(iter(batch.values())).is_cuda
    # Time of the processor, where it does the work: others may share the machine.
    clock = time.perf_counter if on_gpu else time.process_time
    found = []
    for _ in range(rounds + 1):
        started = clock()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        found.append(clock() - started)
    # The first step allocates.
    return statistics.median(found[1:])


# Figure 16


def together(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality of one shard against the number of its sequences that answer together, for every shard by itself."""
    bench = _bench(options, others)
    check_budgets(bench.options.s3t, options.members)
    largest = max(options.members)
    num_shards = bench.loaded.config.num_shards

    def measure(count: int, shard: int) -> float:
        source = bench.trained("s3t", budget=largest)
        label = f"together-{count}-{shard}"
        return bench.quality(bench.copy_of("s3t", source, label, shards=[shard], budget=count, select="all"))

    return {
        **_about(bench, [("s3t", {"budget": largest})]),
        "num_shards": num_shards,
        "num_slices": bench.loaded.config.num_slices,
        "points": [
            {
                "members": count,
                "quality": [
                    bench.kept(
                        f"together-{count}-{shard}", lambda n=count, shard=shard: measure(n, shard), largest=largest
                    )
                    for shard in range(num_shards)
                ],
            }
            for count in sorted(set(options.members))
        ],
        "paper": "A small gain, then flat.",
    }


# Section C.2


def ablations(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality at every depth: the method, from the bottom up, and with one slice per layer group."""
    bench = _bench(options, others)
    variants = {
        "top-down, cumulative": {},
        "bottom-up, cumulative": {"growth": "bottom-up"},
        "top-down, one slice per group": {"stage_data": "slice"},
        "bottom-up, one slice per group": {"growth": "bottom-up", "stage_data": "slice"},
    }
    return {
        **_about(bench, [system for changes in variants.values() for system in _of_seeds(options, "s3t", **changes)]),
        "seeds": options.seeds,
        "quality": {name: _by_depth(bench, options, "s3t", **changes) for name, changes in variants.items()},
        "paper": "Bottom-up did not converge; cumulative is better than one slice per group.",
    }


# Table 3


def storage(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Bytes of the stage folders of ViT-large, m = 5, L = 6, for every budget: files as training writes them."""
    if others:
        raise ConfigError(f"`storage` does not know {' '.join(others)}. It takes --work_dir, --output and --format.")
    path = options.work_dir / "measurements" / "storage.json"
    if not path.is_file():
        rows = measured_storage(options.work_dir / "storage", num_shards=5, num_slices=6, layers_per_slice=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        row["paper_gigabytes"] = row["budget"] * TABLE_3_GIGABYTES_PER_BUDGET
        row["paper_rate"] = TABLE_3_RATES[row["budget"] - 1]
        row["exact_rate"] = deletion_rate(5, 6, row["budget"])
    return {
        "model": "ViT-large, LoRA of rank 16 on query and value, 200 classes",
        "num_shards": 5,
        "num_slices": 6,
        "rows": rows,
        "paper": "0.21 GB per unit of B.",
    }


def measured_storage(
    folder: Path,
    *,
    num_shards: int,
    num_slices: int,
    layers_per_slice: int,
    model_settings: dict[str, Any] = VIT_LARGE,
) -> list[dict[str, Any]]:
    """
    Write the stages of the largest budget up to `num_slices`, untrained, and measure those of every budget.

    A stage's file is as large whatever it has learnt, so nothing is trained, and the base's weights are left as the
    memory they happen to be.

    Args:
        folder (`Path`): Where to write; removed afterwards.
        num_shards (`int`): Number of shards.
        num_slices (`int`): Number of slices of a shard, and the largest budget.
        layers_per_slice (`int`): Layers that a stage adapts.
        model_settings (`dict`): Fields of `ViTConfig`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**model_settings, num_labels=200))
    model.to_empty(device="cpu")
    config = S3TConfig(num_shards=num_shards, num_slices=num_slices, layers_per_slice=layers_per_slice, id_column="id")
    count = num_shards * num_slices
    method = METHODS["s3t"](
        model,
        TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, max_steps=100),
        train_dataset=Dataset.from_dict(
            {"id": list(range(count)), "pixel_values": [[float(i)] for i in range(count)], "labels": [0] * count}
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
        s3t_config=config,
    )
    system, stack = method.trainer.folder, method.model.stack
    for key in system.plan.stages():
        # Its head starts as the one of the stage before it, which is still there: the plan goes along the sequences.
        stack.drop([other for other in stack.loaded if other not in key.lineage])
        for stage in key.lineage[:-1]:
            if stage not in stack:
                stack.load(stage, system.read_adapter(stage), system.adapter_digest(stage))
        stack.add(key)
        below = system.adapter_digest(key.parent) if key.parent else None
        record = {"slices": system.slice_digests(key), "below": below, "metrics": {}}
        system.write_stage(key, record, lambda path, key=key: stack.save(key, path, None))
    rows = []
    for budget in range(1, num_slices + 1):
        stages = Plan.from_config(replace(config, budget=budget)).stages()
        folders = [system.path / key.path for key in stages]
        rows.append(
            {
                "budget": budget,
                "stages": len(stages),
                "adapter_gigabytes": sum((path / ADAPTER_FILE).stat().st_size for path in folders) / 1e9,
                "folder_gigabytes": sum(f.stat().st_size for path in folders for f in path.iterdir()) / 1e9,
            }
        )
    shutil.rmtree(folder)
    return rows


# Study -> name of its figure, what computes it.
STUDIES: dict[str, tuple[str, Callable[[argparse.Namespace, Sequence[str]], dict[str, Any]]]] = {
    "quality": ("figure-6-left", quality),
    "weights": ("figure-15-weights", weights),
    "time": ("figure-9", lifetimes),
    "drop": ("figure-12", drop),
    "slices": ("figure-13", layers_and_slices),
    "sequential": ("figure-14", sequential),
    "together": ("figure-16", together),
    "ablations": ("ablations", ablations),
    "storage": ("table-3-files", storage),
}


if __name__ == "__main__":
    command_line.run(main)
