"""The pictures of what trained systems can do: by depth, by the number of slices and members, in files, fine-tuned."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from studies.measured import standard_error
from studies.pictures_of_deletions import SHADES, shades

from hf_s3t.analysis.pictures import FIRST, MORE, OURS, PAPER, SISA, finish, new_figure, plain_numbers, shared_legend


_PLUS_MINUS = " (± a standard error of the rows)"


# Kind of a task -> what the paper says of its drop.
_DROP_CLAIMS = {
    "vision": "below 5%",
    "text": "larger on some tasks",
    "instruction tuning": "small",
}


def _drop(data):
    kinds = [kind for kind in _DROP_CLAIMS if any(run["kind"] == kind for run in data["runs"])]
    figure, panels = new_figure(len(kinds), (4.6 * len(kinds) if len(kinds) > 1 else 8, 5.2))
    colors = itertools.cycle((OURS, SISA, FIRST, *MORE, *SHADES))
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
    for run, color in zip(data["single"], shades(len(data["single"])), strict=True):
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


def _replay(data):
    tasks = data["tasks"]
    columns = min(len(tasks), 3)
    rows = -(-len(tasks) // columns)
    figure, panels = new_figure(rows * columns, (4.6 * columns, 4.4 * rows), columns)
    for axes in panels[len(tasks) :]:
        axes.remove()
    panels = panels[: len(tasks)]
    styles = {"0": (MORE[2], "o-"), "0.25": (OURS, "s-"), "0.5": (FIRST, "^-"), "1": (PAPER, "D-")}
    for axes, task in zip(panels, tasks, strict=True):
        scale = 1 if task["metric"] == "loss" else 100
        for curve in task["curves"]:
            color, style = styles.get(curve["share"], (SISA, "v--"))
            mean, error = scale * np.array(curve["mean"]), scale * np.array(curve["standard_deviation"])
            axes.errorbar(
                curve["work"], mean, error, fmt=style, color=color, markersize=5, capsize=3, label=curve["name"]
            )
        axes.set(
            title=f"{task['title']}, L = {task['num_slices']}",
            xlabel="work of a sequence up to each depth (full fine-tunings)",
            ylabel="held-out loss" if task["metric"] == "loss" else f"{task['metric']} (%)",
        )
    finish(*panels, legends=False)
    shared_legend(figure, panels, len(styles) + 1)
    figure.suptitle(
        "Replay: quality at every depth against the work it took, by the share of the earlier rows "
        "(mean and standard deviation of seeds)"
    )
    return figure


# Name of the figure -> what draws its data.
DRAWERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "figure-5": _fine_tuned,
    "figure-12": _drop,
    "figure-13": _layers_and_slices,
    "figure-14": _sequential,
    "figure-16": _together,
    "ablations": _ablations,
    "replay": _replay,
    "table-3-files": _table_3_files,
}
