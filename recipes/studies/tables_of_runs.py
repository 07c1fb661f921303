"""The tables of the docs that follow from the results of runs, in Markdown, and the data of their figures."""

import json
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

from studies.measured import paired_difference
from studies.runs import FIGURES, SEEDS, runs
from studies.tables import study_tables
from studies.tables_of_replay import by_depth, replay_data, replay_tables


# Tasks of Figure 5 and what they are called: with three seeds, and with one.
_COMPARED = {"trec": "MiniLM on TREC", "sst2": "MiniLM on SST-2"}
_SINGLE = {"trec-L6": "TREC, L = 6", "cola": "CoLA", "cb": "CB", "rte": "RTE", "cifar10": "CIFAR-10"}
# What the tables call a run of a method with m shards.
_NAMES = {
    "full-m1": "full LoRA",
    "full-m5": "five full LoRA, each on its shard",
    "full-m5-rate0.001": "the same at 1e-3",
    "s3t-m1": "S3T, m = 1",
    "s3t-m5": "S3T, m = 5",
    "sisa-m1": "SISA, m = 1",
    "sisa-m5": "SISA, m = 5",
}


def tables() -> list[str]:
    """The tables of docs/reproduction.md, then those of docs/beyond_the_paper.md, in Markdown."""
    found = _results()
    made = [
        *(_selection_table(task, found) for task in ("trec", "sst2")),
        *(comparison_table(task, found) for task in ("trec", "sst2")),
        _single_table(found),
        _language_table(found),
        *study_tables(FIGURES),
        *replay_tables(found),
    ]
    # Of what was not run there are no rows below the line that heads them.
    return [table for table in made if table.count("\n") > 1]


def _results() -> dict[str, dict]:
    """Name of a run that is done -> its results."""
    return {run.name: json.loads(run.results.read_text()) for run in runs() if run.is_done}


def _language_table(found: dict[str, dict]) -> str:
    lines = [
        "| held-out loss | base | full LoRA | by depth | after unlearning | what was forgotten |",
        "|---|---|---|---|---|---|",
    ]
    for name in ("alpaca-s3t-seed42", "alpaca-8bit-s3t-seed42", "alpaca-sisa-seed42", "tofu-s3t-seed42"):
        if name not in found:
            continue
        losses, forgotten = found[name]["losses"], found[name].get("forgotten")
        cells = [f"{losses[key]:.3f}" if key in losses else "" for key in ("base", "full LoRA")]
        # A deletion voids what was measured before it, at every depth; what came after is a column of its own.
        was_deleted = "unlearned" in found[name]
        depths = "" if was_deleted else ", ".join(f"{value:.3f}" for value in by_depth(found[name]))
        after = next((f"{loss:.3f}" for key, loss in losses.items() if "after" in key), "")
        shown = f"{forgotten['before']:.3f} before, {forgotten['after']:.3f} after" if forgotten else ""
        lines.append(f"| {name.rpartition('-')[0]} | {' | '.join([*cells, depths, after, shown])} |")
    return "\n".join(lines)


def _single_table(found: dict[str, dict]) -> str:
    lines = ["| one seed | metric | full LoRA | S3T by depth | SISA by depth |", "|---|---|---|---|---|"]
    for task in _SINGLE:
        contents = {method: found.get(f"{task}-{method}-m1-seed1") for method in ("full", "s3t", "sisa")}
        there = next((content for content in contents.values() if content), None)
        if there is None:
            continue
        (measured,) = there["metrics"].values()
        cells = [", ".join(f"{value:.3f}" for value in by_depth(c)) if c else "" for c in contents.values()]
        lines.append(f"| {task} | {next(iter(measured['1']))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _selection_table(task: str, found: dict[str, dict]) -> str:
    lines = [f"| held out from training: {task} | accuracy by depth |", "|---|---|"]
    for name, content in found.items():
        if name.startswith(f"select-{task}-"):
            shown = name.removeprefix(f"select-{task}-")
            lines.append(f"| {shown} | {', '.join(f'{a:.3f}' for a in by_depth(content))} |")
    return "\n".join(lines)


def comparison_table(task: str, found: dict[str, dict]) -> str:
    """The runs of a task with three seeds, by method and number of shards."""
    lines = [
        f"| {task} | accuracy by depth: mean ± standard deviation | seeds | minus full (95% interval) | seconds |",
        "|---|---|---|---|---|",
    ]
    for kind, title in _NAMES.items():
        method, _, shards = kind.partition("-")
        contents = {s: found[n] for s in SEEDS if (n := f"{task}-{kind}-seed{s}") in found}
        if not contents:
            continue
        columns = zip(*map(by_depth, contents.values()), strict=True)
        fulls = {s: found[n] for s in contents if (n := f"{task}-full-{shards}-seed{s}") in found}
        gap = "" if method == "full" or not fulls else paired_difference(contents, fulls)
        seconds = fmean(content["cost"]["seconds"] for content in contents.values())
        numbers = ", ".join(_mean(values) for values in columns)
        lines.append(f"| {title} | {numbers} | {len(contents)} | {gap} | {seconds:.0f} |")
    return "\n".join(lines)


# Figures


def replay() -> dict[str, Any]:
    """The data of the picture of replay."""
    found = _results()
    # Those made for it: what was there before has its own machine.
    made = [content for name, content in found.items() if "replay-" in name]
    return {
        **replay_data(found),
        "paper": "A stage trains on every row of its slices in each epoch; its ablation on the last slice alone.",
        **{name: _shared([content[name] for content in made]) for name in ("hardware", "versions")},
    }


def figure_5() -> dict[str, Any]:
    """The data of Figure 5: quality at every depth, against full fine-tuning."""
    found = {name: content for name, content in _results().items() if "replay-" not in name}
    return {
        "tasks": [_compared(task, title, found) for task, title in _COMPARED.items()],
        "single": [
            {
                "title": title,
                "metric": next(iter(next(iter(full["metrics"].values()))["1"])),
                "full": by_depth(full)[-1],
                "s3t": by_depth(ours),
            }
            for task, title in _SINGLE.items()
            if (full := found.get(f"{task}-full-m1-seed1")) and (ours := found.get(f"{task}-s3t-m1-seed1"))
        ],
        "paper": "Slice-wise training is about as good as full fine-tuning on each task.",
        **{name: _shared([content[name] for content in found.values()]) for name in ("hardware", "versions")},
    }


def _shared(settings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is the same in all of them."""
    return {name: value for name, value in settings[0].items() if all(one.get(name) == value for one in settings)}


def _compared(task: str, title: str, found: dict[str, dict]) -> dict[str, Any]:
    curves = []
    for kind, name in _NAMES.items():
        contents = [found[n] for s in SEEDS if (n := f"{task}-{kind}-seed{s}") in found]
        columns = list(zip(*map(by_depth, contents), strict=True))
        # The aim is measured at the rate that was chosen.
        if contents and "rate" not in kind:
            curves.append(
                {
                    "name": name,
                    "num_shards": int(kind[-1]),
                    "mean": [round(fmean(values), 6) for values in columns],
                    "standard_deviation": [round(stdev(values), 6) if len(values) > 1 else 0 for values in columns],
                }
            )
    depths = max(len(curve["mean"]) for curve in curves)
    return {"title": title, "metric": "accuracy", "num_slices": depths, "seeds": len(SEEDS), "curves": curves}


def _mean(values: Sequence[float]) -> str:
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
