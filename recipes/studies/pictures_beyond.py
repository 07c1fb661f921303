"""The pictures of what goes beyond the paper: depth against work, and the quality that a long stream leaves."""

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from hf_s3t.analysis.pictures import FIRST, MORE, OURS, PAPER, SISA, finish, new_figure, plain_numbers, shared_legend


_RULES = {"cyclic": ("cyclic", MORE[2]), "bms": ("BMS", MORE[1]), "optimal": ("optimal", MORE[0])}


def _families(data):
    figure, panels = new_figure(len(data["panels"]), (14, 8.4), columns=3)
    for axes, panel in zip(panels, data["panels"], strict=True):
        for rule, (label, color) in _RULES.items():
            for key, style, marker, ending in (
                ("published", "-", "o", "as published"),
                ("without_idle", ":", ".", "without idle stages"),
            ):
                points = panel["rules"][rule][key]
                # What is optimal is often cyclic: one lies on the other.
                width = 3.5 if rule == "cyclic" else 1.5
                look = {"marker": marker, "markersize": 2.2 * width**0.5 + 2, "linewidth": width, "color": color}
                axes.plot(*_curve(points), style, **look, label=f"{label}, {ending}")
        axes.plot(*_curve(panel["families"]), "s-", color=OURS, markersize=4, label="the best family found")
        lattice = panel["lattice"]
        axes.plot(
            lattice["work"], lattice["depth"], "*", color=FIRST, markersize=14, label="lattice = all L! sequences"
        )
        size = panel["num_slices"]
        axes.set(
            title=f"L = {size}, {panel['name']} prior; B = 1 to {size}",
            xlabel="work of a shard (full fine-tunings, log scale)",
            ylabel=f"expected depth (mean over {panel['horizon']} requests)",
            xscale="log",
            ylim=(0, None),
        )
        plain_numbers(axes.xaxis)
    finish(*panels, legends=False)
    shared_legend(figure, panels, 4)
    return figure


def _curve(points, measure="depth"):
    """Work, and what is gained for it: a quality in percent."""
    scale = 100 if measure == "quality" else 1
    return [point["work"] for point in points], [scale * point[measure] for point in points]


_TASKS = {"digits": "digits", "trec": "TREC", "sst2": "SST-2"}


def _frontier(data):
    figure, panels = new_figure(len(data["tasks"]), (15, 5.6))
    for axes, task in zip(panels, data["tasks"], strict=True):
        points = task["points"]
        best = points["frontiers"]
        for kind, color, label in (
            ("sisa", SISA, "SISA, with replay where measured, lazy retraining, reordered slices"),
            ("s3t", OURS, "S3T: families, replay where measured, regrowth by worth"),
        ):
            axes.plot(*_curve(best[kind], "quality"), "o-", color=color, markersize=3.5, label=label)
        for kind, color, marker, label in (
            ("sisa", SISA, "s", "SISA as published: all when exhausted, a dead shard, at once"),
            ("s3t", OURS, "s", "S3T as published, B = L: the same"),
            ("full", FIRST, "D", "full retraining: of all, of the shard that was hit"),
        ):
            published = [point for point in points["published"] if point["method"] == kind]
            look = {"color": color, "markerfacecolor": "none", "markersize": 7}
            axes.plot(*_curve(published, "quality"), marker, **look, label=label)
        for claim, style in zip(points["factors"], (":", "--", "-."), strict=True):
            label = f"the paper: {claim['factor']:g}x less than {claim['than']}"
            axes.axvline(claim["work"], color=PAPER, linestyle=style, linewidth=1, label=label)
        top = max(100 * point["quality"] for point in [*best["s3t"], *best["sisa"], *points["published"]])
        name = _TASKS.get(task["task"], task["task"])
        axes.set(
            title=f"Figure 9 as work and quality: {name}, m = {task['num_shards']}, L = {task['num_slices']}",
            xlabel=f"work over {data['requests']:,} requests (full fine-tunings, log scale)",
            ylabel=f"mean {data['metric']} over the stream (%)",
            xscale="log",
            xlim=(5, None),
            ylim=(top - 8, top + 0.8),
        )
        plain_numbers(axes.xaxis)
    finish(*panels, legends=False)
    shared_legend(figure, panels, 3)
    return figure


def _trained(data):
    figure, (over, points) = new_figure(2, (13.5, 5.4))
    colors = _colors(data["systems"])
    for system, color in zip(data["systems"], colors, strict=True):
        over.plot([100 * q for q in system["qualities"]], color=color, linewidth=1.4, label=system["title"])
        points.plot(system["work"], 100 * system["mean_quality"], "o", color=color, markersize=8)
        simulated = system["simulated"]
        points.plot(
            simulated["work"], 100 * simulated["mean_quality"], "x", color=color, markersize=9, markeredgewidth=2
        )
    points.plot([], [], "o", color=PAPER, label="really trained")
    points.plot([], [], "x", color=PAPER, markeredgewidth=2, label="simulated, the same requests")
    over.set(
        title=f"{data['requests']} requests, really answered: m = {data['num_shards']}, L = {data['num_slices']}",
        xlabel="deletion requests",
        ylabel=f"{data['metric']} (%)",
    )
    points.set(
        title="What that cost, and what the simulation says",
        xlabel="work of training again (full fine-tunings)",
        ylabel=f"mean {data['metric']} over the stream (%)",
        xlim=(0, None),
    )
    finish(over, points, legends=False)
    shared_legend(figure, (over, points), 3)
    return figure


def _colors(systems):
    """Blue ones for S3T, red and orange ones for the baselines, black for what is published."""
    ours, theirs = iter((OURS, MORE[2], FIRST, MORE[0])), iter((SISA, MORE[1], MORE[3]))
    return [
        PAPER if "published" in s["title"] else next(ours) if s["method"] == "s3t" else next(theirs) for s in systems
    ]


_GATES = {"oracle": ("right shard known", FIRST), "terms": ("terms gate", OURS), "mean": ("mean of all shards", SISA)}


def _gates(data):
    parts = [(name, found) for name in ("people", "authors", "layouts") if (found := data.get(name))]
    figure, panels = new_figure(len(parts), (6.5 * len(parts), 5.2))
    for axes, (name, systems) in zip(panels, parts, strict=True):
        if name == "layouts":
            _draw_layouts(axes, systems)
        else:
            _draw_gates(axes, systems)
        axes.set(
            xlabel="number of shards",
            ylabel="answers right (%)" if systems[0]["measure"] == "right" else "tokens of answers right (%)",
            xticks=sorted({system["num_shards"] for system in systems}),
            ylim=(0, 103),
        )
    finish(*panels, legends=False)
    shared_legend(figure, panels, 2 * len(parts))
    return figure


def _draw_gates(axes, systems):
    """What is known by each gate, of questions as trained and of changed ones."""
    for gate, (label, color) in _GATES.items():
        # What the gate keeps of the right shard's knowledge is often all: one lies on the other.
        look = {"color": color, "linewidth": 5 if gate == "oracle" else 1.5}
        axes.plot(*_known(systems, gate, _as_trained), "o-", **look, label=f"{label}: questions as trained")
        axes.plot(*_known(systems, gate, _changed), "s--", **look, label=f"{label}: questions changed by rule")
    axes.plot(*_known(systems, "strangers", _as_trained), "x:", color=PAPER, label="subjects never seen")
    axes.set(title=f"Facts of {systems[0]['title']}")


def _draw_layouts(axes, systems):
    """What is known of questions as trained, by numbers of slices, at equal work."""
    slices = sorted({system["num_slices"] for system in systems})
    for size, color in zip(slices, MORE, strict=False):
        of_size = [system for system in systems if system["num_slices"] == size]
        axes.plot(*_known(of_size, "terms", _as_trained), "o-", color=color, label=f"terms gate, L = {size}")
        axes.plot(*_known(of_size, "mean", _as_trained), "s--", color=color, label=f"mean, L = {size}")
    axes.set(title=f"Layouts at equal work: facts of {systems[0]['title']}")


def _known(systems, gate, asked):
    """Numbers of shards, and in percent what is known with so many."""
    shards = sorted({system["num_shards"] for system in systems})
    by_shards = [[s for s in systems if s["num_shards"] == number] for number in shards]
    return shards, [100 * fmean(asked(s["known"][gate]) for s in those) for those in by_shards]


def _as_trained(by_kind):
    return by_kind["as trained"]


def _changed(by_kind):
    """The mean over the rules."""
    return fmean(share for kind, share in by_kind.items() if kind != "as trained")


# Name of the figure -> what draws its data.
DRAWERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "families": _families,
    "frontier": _frontier,
    "frontier-trained": _trained,
    "gates": _gates,
}
