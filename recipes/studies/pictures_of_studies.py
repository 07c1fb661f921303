"""The pictures of the studies of trained systems, which `recipes/deletion_study.py` measures."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from hf_s3t.analysis.pictures import FIRST, MORE, OURS, PAPER, SISA, finish, new_figure, plain_numbers, shared_legend


_PLUS_MINUS = " (± a standard error of the rows)"
_SHADES = ("#9ECAE1", "#56B4E9", "#0072B2", "#08306B", "#CC79A7", "#E69F00")


def quality_at(run: Mapping[str, Any], requests: Sequence[int], when_dead: float) -> np.ndarray:
    """
    Quality of one run of deletions after each of some numbers of requests.

    Args:
        run (mapping):
            `points` with `request` and `quality`, measured whenever something changed; no quality where nothing
            answers.
        requests (sequence of `int`):
            The numbers of requests.
        when_dead (`float`):
            The quality where nothing answers.

    Returns:
        `numpy.ndarray`: One quality per number.

    Example:

    ```python
    >>> from studies.pictures_of_studies import quality_at

    >>> run = {"points": [{"request": 0, "quality": 0.9}, {"request": 2, "quality": None}]}
    >>> quality_at(run, [0, 1, 2, 3], 0.1).tolist()
    [0.9, 0.9, 0.1, 0.1]
    ```
    """
    times = [point["request"] for point in run["points"]]
    values = [when_dead if point["quality"] is None else point["quality"] for point in run["points"]]
    places = np.searchsorted(times, requests, side="right") - 1
    return np.asarray(values, dtype=float)[places]


def standard_error(quality: np.ndarray, data: Mapping[str, Any]) -> np.ndarray | None:
    """
    Standard error of qualities that come from a sample of rows, where they are shares of these rows.

    Args:
        quality (`numpy.ndarray`):
            The qualities.
        data (mapping):
            `metric`, and `evaluation_rows`: how many rows they were measured on, if that is known.

    Returns:
        `numpy.ndarray`, *optional*: One error per quality; none for other metrics, whose error these numbers do not
        tell.
    """
    if data["metric"] != "accuracy" or data["evaluation_rows"] is None:
        return None
    return np.sqrt(quality * (1 - quality) / data["evaluation_rows"])


def _shades(count: int) -> Sequence[Any]:
    """As many colours, of which neighbours are told apart."""
    if count <= len(_SHADES):
        return _SHADES[:count]
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
    colors = {**dict(zip(budgets, _shades(len(budgets)), strict=True)), "sisa": SISA, "protosisa": MORE[1]}
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
    for color, count, shards, row in zip(_shades(len(left)), data["after"], left, values, strict=True):
        label = f"after {count} requests: {shards:.1f} of {data['num_shards']} shards left"
        by_weight.plot(x, row, "o-", color=color, markersize=4, label=label)
    by_weight.set(
        title=f"Figure 15, right: ProtoSISA, m = {data['num_shards']}, L = {data['num_slices']}, "
        f"mean of {len(data['orders'])} orders",
        xlabel="weight of the prototypes (0: SISA alone, 1: prototypes alone)",
        ylabel=f"{data['metric']} (%)",
    )
    places = np.linspace(0, len(x) - 1, min(5, len(x))).round().astype(int)
    for color, place in zip(_shades(len(places)), places, strict=True):
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
    x = data["requests"]
    budgets = [name for name in data["training_seconds"] if name.startswith("s3t-")]
    shown = {
        "full": (FIRST, "-", "full retraining at every request"),
        "sisa-rolled-back": (SISA, "--", "SISA, retrained from its checkpoint at every request"),
        "sisa-exhausted": (SISA, "-", "SISA, retrained when exhausted"),
        **{
            f"{name}-exhausted": (color, "-", f"{_named(name)}, retrained when exhausted")
            for name, color in zip(budgets, _shades(len(budgets)), strict=True)
        },
    }
    saturated = f"s3t-{data['num_slices']}"
    if saturated in budgets:
        label = f"{_named(saturated)}, its sequences trained in parallel"
        shown[f"{saturated}-side-by-side-exhausted"] = (_SHADES[2], ":", label)
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
        title=f"After {x[-1]:,} requests; against full retraining",
        xlabel="time spent (seconds, log scale)",
        yticks=places,
        yticklabels=[label for _, label in names],
        xscale="log",
        xlim=(None, 4 * full),
    )
    totals.invert_yaxis()
    totals.set_axisbelow(True)
    plain_numbers(totals.xaxis)
    finish(over, totals)
    totals.legend(fontsize=8, loc="lower right")
    return figure


# Kind of a task -> what the paper says of its drop.
_DROP_CLAIMS = {
    "vision": "below 5%",
    "text": "larger on some tasks",
    "instruction tuning": "small",
}


def _drop(data):
    kinds = [kind for kind in _DROP_CLAIMS if any(run["kind"] == kind for run in data["runs"])]
    figure, panels = new_figure(len(kinds), (4.6 * len(kinds) if len(kinds) > 1 else 8, 5.2))
    colors = itertools.cycle((OURS, SISA, FIRST, *MORE, *_SHADES))
    for axes, kind in zip(panels, kinds, strict=True):
        by_name: dict[tuple, list] = {}
        for run in data["runs"]:
            if run["kind"] == kind:
                by_name.setdefault((run["name"], len(run["drop"])), []).append(run)
        for (name, depths), runs in by_name.items():
            first = runs[0]
            quality = np.array(first["quality"])
            error = standard_error(quality, first)
            if error is not None:
                # Of the quality, in the unit of the drop; nothing has dropped before the first deletion.
                error = np.where(np.arange(depths) > 0, error / quality[0], 0)
            unit = {"accuracy": "", "loss": " (rise of the loss)"}.get(first["metric"], f" ({first['metric']})")
            drops = [run["drop"] for run in runs]
            _with_range(axes, np.arange(depths), drops, error, f"{name}, L = {depths}{unit}", next(colors))
        axes.axhline(0, color=MORE[3], linewidth=0.8)
        if kind == "vision":
            axes.axhline(100 * data["paper_vision"], color=PAPER, linestyle=":", label="the paper: below 5%")
        axes.set(
            title=f"{kind.capitalize()}. The paper: {_DROP_CLAIMS[kind]}",
            xlabel="deleted slices, last ones first",
            xticks=range(max(depths for _, depths in by_name)),
        )
    panels[0].set_ylabel("drop in quality (% of the quality before)")
    # One scale, so that the panels can be compared, with room for the legends.
    limits = [limit for axes in panels for limit in axes.get_ylim()]
    for axes in panels:
        axes.set_ylim(min(limits), max(limits) + 0.25 * (max(limits) - min(limits)))
    finish(*panels, legends=False)
    for axes in panels:
        axes.legend(fontsize=8, loc="upper left")
    figure.suptitle("Figure 12: what deleted slices cost", fontsize=11)
    return figure


def _layers_and_slices(data):
    figure, (grid, lines) = new_figure(2, (12, 4.8))
    layers = sorted({cell["layers_per_slice"] for cell in data["cells"]})
    sizes = sorted({cell["num_slices"] for cell in data["cells"]})
    values = np.full((len(layers), len(sizes)), np.nan)
    for cell in data["cells"]:
        place = layers.index(cell["layers_per_slice"]), sizes.index(cell["num_slices"])
        values[place] = 100 * np.mean(cell["quality"])
    image = grid.imshow(values, cmap="Blues", origin="lower", aspect="auto")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2
    for row, column in np.ndindex(values.shape):
        value = values[row, column]
        text = "more than\nall layers" if np.isnan(value) else f"{value:.1f}"
        color = "white" if value > middle else "black"
        grid.text(column, row, text, ha="center", va="center", fontsize=8 if np.isnan(value) else 11, color=color)
    figure.colorbar(image, ax=grid, label=f"{data['metric']} (%)")
    grid.set(
        title=f"Figure 13: {data['num_layers']} layers, one shard, one sequence",
        xlabel="number of slices L",
        ylabel="layers per slice",
        xticks=range(len(sizes)),
        xticklabels=sizes,
        yticks=range(len(layers)),
        yticklabels=layers,
    )
    for count, color in zip(layers, (OURS, SISA, FIRST, *MORE)):
        own = [cell for cell in data["cells"] if cell["layers_per_slice"] == count]
        means = np.array([np.mean(cell["quality"]) for cell in own])
        errors = standard_error(means, data)
        note = _PLUS_MINUS if count == layers[0] and errors is not None else ""
        lines.errorbar(
            # Beside each other, where they have the same number of slices.
            np.array([cell["num_slices"] for cell in own]) + 0.05 * (layers.index(count) - 1),
            100 * means,
            yerr=None if errors is None else 100 * errors,
            fmt="o-",
            color=color,
            capsize=2,
            label=f"{count} layer{'s' if count > 1 else ''} a slice{note}",
        )
    lines.set(
        title="The paper, RTE: one layer a slice is bad, a sweet spot exists",
        xlabel="number of slices L",
        ylabel=f"{data['metric']} (%)",
        xticks=sizes,
    )
    finish(grid, lines, legends=False)
    grid.grid(False)
    lines.margins(y=0.2)
    lines.legend(fontsize=8, loc="lower right")
    return figure


def _sequential(data):
    figure, (quality, seconds) = new_figure(2, (12, 4.8))
    names = {"s3t": ("S3T", OURS), "sequential": ("sequential training", FIRST), "sisa": ("SISA", SISA)}
    for name, (label, color) in names.items():
        _with_range(quality, *_by_depth(data["quality"][name], data), label, color)
    quality.set(
        title=f"Figure 14, learning rate {data['learning_rate']:g} (the paper claims comparable quality)",
        xlabel="slices learnt",
        ylabel=f"{data['metric']} (%)",
    )
    rows = data["timing"]["rows"]
    x = np.array([row["layers"] for row in rows])
    for name, label, color in (
        ("all", "all of them trained", SISA),
        ("lowest", "the lowest trained, the others frozen (a stage of S3T)", OURS),
    ):
        y = np.array([row[name] for row in rows])
        seconds.plot(x, y, "o", color=color, markersize=5, label=label)
        slope, start = np.polyfit(x, y, 1)
        fit = 1 - np.sum((y - slope * x - start) ** 2) / np.sum((y - y.mean()) ** 2)
        seconds.plot(x, slope * x + start, ":", color=color, label=f"linear, as in the paper: R² = {fit:.3f}")
    seconds.set(
        title=f"ViT-base, batch of {data['timing']['batch_size']}, {data['timing']['image_size']} pixels",
        xlabel="layers with adapters, from the top",
        ylabel="processor time per step (seconds)",
        ylim=(0, None),
        xticks=x,
    )
    finish(quality, seconds)
    return figure


def _by_depth(runs, data) -> tuple:
    """The depths, the qualities of all seeds at each, and the standard error of their mean, where it is known."""
    return np.arange(1, len(runs[0]) + 1), runs, standard_error(np.mean(runs, axis=0), data)


def _with_range(axes, x, runs, error, label, color, style="o-") -> None:
    """The mean over seeds; around it their range, or of one seed a standard error, where it is known."""
    values = np.array(runs)
    mean = values.mean(axis=0)
    if len(values) > 1:
        low, high = values.min(axis=0), values.max(axis=0)
        note = f" (mean and range of {len(values)} seeds)"
    else:
        spread = 0 if error is None else error
        low, high, note = mean - spread, mean + spread, "" if error is None else _PLUS_MINUS
    # Said once, in the first line of the legend that has it.
    label += "" if any(note in line.get_label() for line in axes.lines) else note
    axes.plot(x, 100 * mean, style, color=color, markersize=4, label=label)
    axes.fill_between(x, 100 * low, 100 * high, color=color, alpha=0.12, linewidth=0)
    axes.set_xticks(x)


def _together(data):
    figure, (axes,) = new_figure(1, (8, 4.8))
    x = [point["members"] for point in data["points"]]
    values = 100 * np.array([point["quality"] for point in data["points"]])
    for shard in range(values.shape[1]):
        axes.plot(x, values[:, shard], "o-", color=MORE[2], linewidth=0.9, markersize=3, alpha=0.7,
                  label=None if shard else "each shard by itself")  # fmt: skip
    axes.plot(x, values.mean(axis=1), "o-", color=OURS, linewidth=2.2, label="mean of the shards")
    axes.axhline(values.mean(axis=1)[0], color=PAPER, linestyle=":", label="one sequence, as served by default")
    axes.set(
        title=f"Figure 16: one shard's sequences together, L = {data['num_slices']}. The paper: small gain, then flat",
        xlabel="sequences of the shard that answer together",
        ylabel=f"{data['metric']} (%)",
        xscale="log",
        xticks=x,
    )
    plain_numbers(axes.xaxis)
    axes.set_xticks(x)
    finish(axes)
    return figure


def _ablations(data):
    figure, (axes,) = new_figure(1, (8, 5))
    styles = ((OURS, "o-"), (SISA, "o-"), (FIRST, "s--"), (MORE[1], "s--"))
    for (name, runs), (color, style) in zip(data["quality"].items(), styles):
        _with_range(axes, *_by_depth(runs, data), name, color, style)
    axes.set(
        title="Section C.2. The paper: bottom-up did not converge, cumulative is better",
        xlabel="depth (slices learnt)",
        ylabel=f"{data['metric']} (%)",
    )
    finish(axes)
    return figure


def _table_3_files(data):
    figure, (axes,) = new_figure(1, (8, 4.8))
    rows = data["rows"]
    x = np.array([row["budget"] for row in rows])
    axes.plot(x, [row["paper_gigabytes"] for row in rows], "X:", color=PAPER, markersize=8, label="the paper")
    bars = axes.bar(x, [row["folder_gigabytes"] for row in rows], 0.6, color=OURS, label="measured: stage folders")
    axes.bar_label(bars, fmt="%.3f", fontsize=8, padding=2)
    axes.set_axisbelow(True)
    axes.set(
        title=f"Table 3: m = {data['num_shards']}, L = {data['num_slices']}, ViT-large, r = 16, 200 classes",
        xlabel="budget B (sequences per shard)",
        ylabel="files (GB)",
        xticks=x,
    )
    finish(axes)
    return figure


def _fine_tuned(data):
    figure, panels = new_figure(len(data["tasks"]) + 1, (13.5, 4.8))
    *compared, single = panels
    colors = {"S3T, m = 1": OURS, "S3T, m = 5": MORE[2], "SISA, m = 1": SISA, "SISA, m = 5": MORE[1]}
    for axes, task in zip(compared, data["tasks"], strict=True):
        for curve in task["curves"]:
            mean, error = 100 * np.array(curve["mean"]), 100 * np.array(curve["standard_deviation"])
            if len(mean) == 1:
                color, style = (PAPER, ":") if curve["num_shards"] == 1 else (MORE[0], "--")
                axes.axhline(mean[0], color=color, linestyle=style, label=curve["name"])
                if curve["num_shards"] == 1:
                    axes.axhspan(
                        mean[0] - 1, mean[0] + 1, color=FIRST, alpha=0.15, label="full LoRA ± 1 point, the aim"
                    )
                continue
            color = colors[curve["name"]]
            depths = np.arange(1, len(mean) + 1) + (0.03 if curve["num_shards"] > 1 else -0.03)
            axes.errorbar(depths, mean, error, fmt="o-", color=color, markersize=4, capsize=3, label=curve["name"])
        axes.set(
            title=f"{task['title']}, mean and standard deviation of {task['seeds']} seeds",
            xlabel="depth (slices learnt)",
            ylabel=f"{task['metric']} (%)",
            xticks=range(1, task["num_slices"] + 1),
        )
    for run, color in zip(data["single"], _shades(len(data["single"])), strict=True):
        share = np.arange(1, len(run["s3t"]) + 1) / len(run["s3t"])
        points = 100 * (np.array(run["s3t"]) - run["full"])
        single.plot(100 * share, points, "o-", color=color, markersize=4, label=f"{run['title']}, {run['metric']}")
    single.axhline(0, color=PAPER, linestyle=":", label="the paper: as full")
    single.set(
        title="One configuration and one seed each",
        xlabel="slices learnt, of all (%)",
        ylabel="S3T minus full LoRA (points)",
    )
    # Below the lines there is room for the legend.
    low, high = single.get_ylim()
    single.set_ylim(low - 0.45 * (high - low), high)
    finish(*panels)
    return figure


# Name of the figure -> what draws its data.
DRAWERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "figure-5": _fine_tuned,
    "figure-6-left": _quality,
    "figure-15-weights": _weights,
    "figure-9": _lifetimes,
    "figure-12": _drop,
    "figure-13": _layers_and_slices,
    "figure-14": _sequential,
    "figure-16": _together,
    "ablations": _ablations,
    "table-3-files": _table_3_files,
}
