"""Tables of the docs, in Markdown, from the JSON beside the figures in docs/figures/."""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from studies import tables_beyond, tables_of_gates
from studies.measured import quality_at, standard_error


AFTER = (0, 10, 20, 30, 35, 40)
NAMES = {"sisa": "SISA, without retraining", "protosisa": "ProtoSISA"}


def study_tables(folder: Path) -> list[str]:
    """The tables of the studies whose data is in a folder."""
    made = [*TABLES.items(), *tables_beyond.TABLES, *tables_of_gates.TABLES]
    there = [(folder / f"{name}.json", make) for name, make in made]
    made_of = [make(json.loads(file.read_text())) for file, make in there if file.is_file()]
    # A part of a study that was not run has no table.
    return [table for table in made_of if table]


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines).replace("| --- ", "|---").replace("---| ", "---|")


def quality_against_deletions(data: Mapping[str, Any]) -> str:
    """Figure 6, left."""
    dead = data["quality_of_guessing"]
    rows = []
    for name, runs in data["systems"].items():
        means = 100 * np.mean([quality_at(run, AFTER, dead) for run in runs], axis=0)
        shown = [f"{mean:.1f}" if mean > 100 * dead + 0.05 else "dead" for mean in means]
        exhausted = ", ".join(str(run["exhausted_after"]) for run in runs)
        expected = data["expected_exhausted"].get(name)
        if name == "protosisa":
            exhausted = "its shards as SISA's"
        title = NAMES.get(name, f"S3T, B = {name.removeprefix('s3t-')}")
        rows.append([title, *shown, exhausted, "" if expected is None else f"{expected:.1f}"])
    retrained = {point["request"]: f"{100 * point['quality']:.1f}" for point in data["full"]}
    rows.append(["full retraining, m = 1", *(retrained.get(request, "") for request in AFTER), "never", ""])
    heads = [f"accuracy (%), mean of {len(runs)} orders, after", *map(str, AFTER[:-1]), f"{AFTER[-1]} requests"]
    return _table([*heads, "exhausted after", "expected, exact"], rows)


def time_of_deletions(data: Mapping[str, Any]) -> str:
    """Figure 9."""
    totals = {name: total["mean"] for name, total in data["totals"].items()}
    full, sisa = totals["full"], totals["sisa-exhausted"]
    titles = {
        "full": "full retraining (m = 1) at every request",
        "sisa-rolled-back": "SISA proper, from its checkpoint at every request",
        "sisa-exhausted": "SISA, trained again when exhausted",
    }
    for name in totals:
        if alone := re.fullmatch(r"s3t-(\d+)-exhausted", name):
            titles[name] = f"S3T, B = {alone[1]}, trained again when exhausted"
    parallel = f"s3t-{data['num_slices']}-side-by-side-exhausted"
    titles[parallel] = f"S3T, B = {data['num_slices']}, the sequences of a shard in parallel"
    rows = [
        [
            title,
            f"{totals[name]:,.0f}",
            f"{full / totals[name]:.1f}x less" if name != "full" else "1x",
            _to(totals[name], sisa),
        ]
        for name, title in titles.items()
    ]
    return _table([f"seconds after {data['requests'][-1]:,} requests", "time", "against full", "against SISA"], rows)


def _to(value: float, other: float) -> str:
    if value == other:
        return "1x"
    return f"{other / value:.3g}x less" if value < other else f"{value / other:.3g}x more"


def by_depth(data: Mapping[str, Any]) -> str:
    """Section C.2."""
    depths = range(1, len(next(iter(data["quality"].values()))[0]) + 1)
    rows = [
        [name, *(f"{100 * value:.1f}" for value in np.mean(runs, axis=0))] for name, runs in data["quality"].items()
    ]
    return _table(["accuracy (%) at depth", *map(str, depths)], rows)


def by_deleted_slices(data: Mapping[str, Any]) -> str:
    """Figure 12; one line per run, whatever its seed."""
    most = max(len(run["drop"]) for run in data["runs"])
    rows = []
    for run in data["runs"]:
        # No drop shows as 0.0, never as -0.0.
        shown = [f"{round(100 * drop, 1) + 0.0:.1f}" for drop in run["drop"][1:]]
        error = standard_error(np.array(run["quality"]), run)
        rows.append(
            [
                f"{run['name']}, L = {len(run['drop'])}",
                *shown,
                *[""] * (most - len(run["drop"])),
                "not known" if error is None else f"{100 * max(error[1:]) / run['quality'][0]:.1f}",
            ]
        )
    return _table(["drop (%) after deleted slices", *map(str, range(1, most)), "standard error, at most"], rows)


def by_weight(data: Mapping[str, Any]) -> str:
    """Figure 15, right."""
    shown = [place for place, weight in enumerate(data["weights"]) if round(10 * weight) % 2 == 0 or weight == 0.5]
    values = 100 * np.mean([[point["quality"] for point in order] for order in data["orders"]], axis=0)
    left = np.mean([[point["shards_left"] for point in order] for order in data["orders"]], axis=0)
    rows = [
        [f"{after} requests, {shards:.1f} shards left", *(f"{row[place]:.1f}" for place in shown)]
        for after, shards, row in zip(data["after"], left, values, strict=True)
    ]
    return _table(["accuracy (%), weight", *(f"{data['weights'][place]:g}" for place in shown)], rows)


def gains_of_optimal(data: Mapping[str, Any]) -> str:
    """What `sequence_selection="optimal"` gains."""

    def gain(ratio: float) -> str:
        return f"{ratio:.1f}x" if ratio >= 1.5 else f"{100 * (ratio - 1):.1f}%"

    rows = [
        [
            f"{row['num_slices']}, {row['budget']}",
            gain(row["uniform"]),
            *(
                f"{gain(float(np.mean(row[method])))}, up to {gain(max(row[method]))}" if method in row else ""
                for method in ("bms", "sorted-cyclic", "cyclic")
            ),
        ]
        for row in data["rows"]
    ]
    heads = ["L, B", "over spaced cyclic, uniform"]
    return _table([*heads, *(f"over {rule}, priors" for rule in ("BMS", "sorted cyclic", "spaced cyclic"))], rows)


def deletion_rates_and_storage(data: Mapping[str, Any]) -> str:
    """Table 3."""
    heads = [
        "B", "the paper", "exact", "5,000 lifetimes", "first dead shard", "GB, the paper", "GB, six whole adapters",
        "GB, a stack",
    ]  # fmt: skip
    rows = [
        [
            str(row["budget"]),
            f"{row['paper_rate']:.1f}",
            f"{row['exact_rate']:.1f}",
            f"{row['simulated_rate']:.1f} ± {row['simulated_error']:.1f}",
            f"{row['first_shard']:.1f}",
            f"{row['paper_gigabytes']:.2f}",
            f"{row['whole_adapters_gigabytes']:.3f}",
            f"{row['stack_gigabytes']:.3f}",
        ]
        for row in data["rows"]
    ]
    return _table(heads, rows)


# Figure -> what makes the table of its data.
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "figure-6-left": quality_against_deletions,
    "figure-9": time_of_deletions,
    "figure-12": by_deleted_slices,
    "ablations": by_depth,
    "figure-15-weights": by_weight,
    "optimal-gains": gains_of_optimal,
    "table-3": deletion_rates_and_storage,
}
