"""The pictures of systems that examples are deleted from: what deleting costs in quality, and in time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from studies.measured import quality_at

from hf_s3t.analysis.pictures import FIRST, MORE, OURS, PAPER, SISA, finish, new_figure, plain_numbers, shared_legend


SHADES = ("#9ECAE1", "#56B4E9", "#0072B2", "#08306B", "#CC79A7", "#E69F00")


def shades(count: int) -> Sequence[Any]:
    """As many colours, of which neighbours are told apart."""
    if count <= len(SHADES):
        return SHADES[:count]
    from matplotlib import colormaps

    return [colormaps["viridis"](place) for place in np.linspace(0, 0.95, count)]


def _named(name: str) -> str:
    if name.startswith("s3t-"):
        return f"S3T, B = {name.removeprefix('s3t-')}"
    return {"sisa": "SISA", "protosisa": "ProtoSISA", "full": "full retraining"}[name]


def _retrained(points: Sequence[Mapping[str, Any]]) -> str:
    """What the points of full retraining are."""
    if len(points) < 2:
        return "full training"
    return f"full retraining every {points[1]['request'] - points[0]['request']} requests of the first order"


def _quality(data):
    figure, (axes, near) = new_figure(2, (12.5, 5.2))
    x = np.arange(data["requests"] + 1)
    dead = data["quality_of_guessing"]
    budgets = [name for name in data["systems"] if name.startswith("s3t-")]
    colors = {**dict(zip(budgets, shades(len(budgets)), strict=True)), "sisa": SISA, "protosisa": MORE[1]}
    best = max(point["quality"] for point in data["full"])
    for panel in (axes, near):
        for name, runs in data["systems"].items():
            curves = 100 * np.array([quality_at(run, x, dead) for run in runs])
            # The largest budget lies on the one before it for long stretches.
            style = "--" if len(budgets) > 1 and name == budgets[-1] else "-"
            width = 3.5 if len(budgets) > 1 and name == budgets[-2] else 1.8
            panel.plot(x, curves.mean(axis=0), style, color=colors[name], linewidth=width, label=_named(name))
        panel.plot(
            [point["request"] for point in data["full"]],
            [100 * point["quality"] for point in data["full"]],
            "s--",
            color=FIRST,
            markersize=4,
            label=f"{_retrained(data['full'])} (m = 1)",
        )
        panel.set(xlabel="deletion requests", ylabel=f"{data['metric']} (%)", xlim=(0, data["requests"]))
    axes.axvline(data["paper_sisa_dies"], color=PAPER, linestyle=":", label="the paper: SISA dies near 40")
    axes.axhline(100 * dead, color=MORE[3], linestyle=":", linewidth=1, label="guessing: nothing answers")
    for name, expected in data["expected_exhausted"].items():
        if expected <= data["requests"]:
            axes.plot(expected, 100 * dead, "v", color=colors[name], markersize=8, clip_on=False, zorder=5)
    axes.plot([], [], "v", color=MORE[3], label="exhausted, exact expectation")
    axes.set(
        title=f"Figure 6, left: m = {data['num_shards']}, L = {data['num_slices']}, mean of "
        f"{len(next(iter(data['systems'].values())))} orders of requests",
        ylim=(0, 102),
    )
    near.set(title="The same, near the top", ylim=(100 * best - 16, 100 * best + 3))
    finish(axes, near, legends=False)
    shared_legend(figure, (axes, near), 4)
    return figure


def _weights(data):
    figure, (by_weight, by_requests) = new_figure(2, (12.5, 4.8))
    x = np.array(data["weights"])
    values = 100 * np.array([[point["quality"] for point in order] for order in data["orders"]]).mean(axis=0)
    left = np.array([[point["shards_left"] for point in order] for order in data["orders"]]).mean(axis=0)
    for color, count, shards, row in zip(shades(len(left)), data["after"], left, values, strict=True):
        label = f"after {count} requests: {shards:.1f} of {data['num_shards']} shards left"
        by_weight.plot(x, row, "o-", color=color, markersize=4, label=label)
    by_weight.set(
        title=f"Figure 15, right: ProtoSISA, m = {data['num_shards']}, L = {data['num_slices']}, "
        f"mean of {len(data['orders'])} orders",
        xlabel="weight of the prototypes (0: SISA alone, 1: prototypes alone)",
        ylabel=f"{data['metric']} (%)",
    )
    places = np.linspace(0, len(x) - 1, min(5, len(x))).round().astype(int)
    for color, place in zip(shades(len(places)), places, strict=True):
        label = f"weight {x[place]:g}"
        by_requests.plot(data["after"], values[:, place], "o-", color=color, markersize=4, label=label)
    by_requests.set(
        title="The same, against deletions",
        xlabel="deletion requests",
        ylabel=f"{data['metric']} (%)",
    )
    finish(by_weight, by_requests)
    return figure


def _lifetimes(data):
    figure, (over, totals) = new_figure(2, (13, 5.4))
    budgets = [name for name in data["training_seconds"] if name.startswith("s3t-")]
    _draw_times(over, data, budgets)
    _draw_totals(totals, data, budgets)
    finish(over, totals)
    totals.legend(fontsize=8, loc="lower right")
    return figure


def _draw_times(over, data, budgets):
    x = data["requests"]
    shown = {
        "full": (FIRST, "-", "full retraining at every request"),
        "sisa-rolled-back": (SISA, "--", "SISA, retrained from its checkpoint at every request"),
        "sisa-exhausted": (SISA, "-", "SISA, retrained when exhausted"),
        **{
            f"{name}-exhausted": (color, "-", f"{_named(name)}, retrained when exhausted")
            for name, color in zip(budgets, shades(len(budgets)), strict=True)
        },
    }
    saturated = f"s3t-{data['num_slices']}"
    if saturated in budgets:
        label = f"{_named(saturated)}, its sequences trained in parallel"
        shown[f"{saturated}-side-by-side-exhausted"] = (SHADES[2], ":", label)
    for name, (color, style, label) in shown.items():
        over.plot(x[1:], data["curves"][name][1:], style, color=color, linewidth=1.8, label=label)
    sisa, full = (data["totals"][name]["mean"] for name in ("sisa-exhausted", "full"))
    over.plot(
        x[-1],
        sisa / data["paper_less_than_sisa"],
        "X",
        color=PAPER,
        markersize=9,
        clip_on=False,
        zorder=5,
        label=f"the paper: {data['paper_less_than_sisa']:g}x less than SISA",
    )
    over.plot(
        x[-1],
        full / data["paper_less_than_full"],
        "P",
        color=PAPER,
        markersize=9,
        clip_on=False,
        zorder=5,
        label=f"the paper: {data['paper_less_than_full']:g}x less than full retraining",
    )
    over.set(
        title=f"Figure 9: m = {data['num_shards']}, L = {data['num_slices']}, mean of 500 streams",
        xlabel="deletion requests",
        ylabel="time spent until then (seconds, log scale)",
        yscale="log",
    )
    plain_numbers(over.yaxis)


def _draw_totals(totals, data, budgets):
    full = data["totals"]["full"]["mean"]
    names = [
        ("full", "full, every request"),
        ("sisa-rolled-back", "SISA, every request"),
        ("sisa-exhausted", "SISA"),
        *((f"{name}-exhausted", _named(name)) for name in budgets),
        *((f"{name}-side-by-side-exhausted", f"{_named(name)}, in parallel") for name in budgets[1:]),
    ]
    places = np.arange(len(names))
    for shift, ending, color, label in (
        (-0.2, "exhausted", OURS, "trained again when exhausted"),
        (0.2, "dead_shard", FIRST, "a shard trained again when it is dead"),
    ):
        values = [data["totals"].get(name.replace("exhausted", ending), {}).get("mean") for name, _ in names]
        if ending == "dead_shard":
            values = [value if "exhausted" in name else None for value, (name, _) in zip(values, names)]
        kept = [(place, value) for place, value in zip(places, values) if value is not None]
        bars = totals.barh([p + shift for p, _ in kept], [v for _, v in kept], 0.38, color=color, label=label)
        gains = [f"{full / v:.1f}x less" if v < full else "" for _, v in kept]
        totals.bar_label(bars, labels=gains, fontsize=7.5, padding=2)
    totals.set(
        title=f"After {data['requests'][-1]:,} requests; against full retraining",
        xlabel="time spent (seconds, log scale)",
        yticks=places,
        yticklabels=[label for _, label in names],
        xscale="log",
        xlim=(None, 4 * full),
    )
    totals.invert_yaxis()
    totals.set_axisbelow(True)
    plain_numbers(totals.xaxis)


# Name of the figure -> what draws its data.
DRAWERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "figure-6-left": _quality,
    "figure-15-weights": _weights,
    "figure-9": _lifetimes,
}
