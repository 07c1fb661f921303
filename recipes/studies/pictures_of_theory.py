"""The pictures, by matplotlib, of what `theory.py` computed."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from hf_s3t.analysis.pictures import (
    FIRST,
    MORE,
    OURS,
    PAPER,
    SISA,
    finish,
    new_figure,
    plain_numbers,
    shared_legend,
)


_METHODS = {
    "random": ("random", "#999999"),
    "cyclic-paper": ("cyclic, published", "#E69F00"),
    "cyclic": ("cyclic, spaced", "#0072B2"),
    "sorted-cyclic": ("sorted cyclic", "#56B4E9"),
    "bms": ("BMS", "#CC79A7"),
    "conditional": ("conditional (BMS up to B = L)", "#D55E00"),
    "optimal": ("optimal", "#009E73"),
}
_REQUESTS = "deletion requests"


def _against_budget_alone(data):
    figure, (axes,) = new_figure(1, (7.5, 5.6))
    points = data["points"]
    _rates_panel(axes, points, "budget")
    axes.set(
        title="Figure 6, right: m = 5, L = 64. The paper: steady growth, slower with larger B",
        xlabel="budget B (sequences per shard)",
    )
    finish(axes, legends=False)
    shared_legend(figure, [axes], 2)
    return figure


def _three_ways(data):
    figure, panels = new_figure(3, (15, 5.4))
    gains = data["paper_gains"]
    settings = (
        ("against_budget", "budget", "budget B (sequences per shard)", "m = 5, L = 32"),
        ("against_shards", "num_shards", "number of shards m", "L = 32, B = 32"),
        ("against_slices", "num_slices", "number of slices L", "m = 5, B = L"),
    )
    for axes, (key, variable, label, title) in zip(panels, settings):
        points = data[key]
        _rates_panel(axes, points, variable)
        x = [p[variable] for p in points]
        if key == "against_budget":
            # A point: the paper gives the gain at B = 8.
            sisa = points[0]["sisa"]
            axes.plot(8, gains[key] * sisa, "X", color=PAPER, markersize=9, label="the paper: 1.6 × SISA at B = 8")
        else:
            claimed = [gains[key] * p["sisa"] for p in points]
            axes.plot(x, claimed, ":", color=PAPER, label="the paper: up to 2.3 × (m) and 3 × SISA (L)")
        axes.set(title=f"Figure 7: {title}", xlabel=label)
    finish(*panels, legends=False)
    shared_legend(figure, panels, 4)
    return figure


def _rates_panel(axes, points, variable):
    x = [p[variable] for p in points]
    axes.plot(x, [p["theory"] for p in points], color=OURS, label="S3T exhausted, exact (= Lemma 1)")
    drawn = [p for p in points if "simulated" in p]
    axes.errorbar(
        [p[variable] for p in drawn],
        [p["simulated"] for p in drawn],
        yerr=[2 * p["error"] for p in drawn],
        fmt="o",
        color=OURS,
        markersize=4,
        capsize=2,
        label="S3T exhausted, simulated (± 2 standard errors)",
    )
    axes.plot(x, [p["sisa"] for p in points], "--", color=SISA, label="SISA exhausted, exact")
    axes.plot(x, [p["first_shard"] for p in points], color=FIRST, label="S3T, first dead shard, exact")
    axes.plot(x, [p["sisa_first_shard"] for p in points], "--", color=MORE[1], label="SISA, first dead shard, exact")
    axes.set(ylabel=f"{_REQUESTS} until then", ylim=(0, None))


def _diversity(data):
    figure, (distance, edit, scores) = new_figure(3, (15, 4.6))
    size = data["num_slices"]
    budgets = np.arange(2, len(data["cyclic"]) + 1)
    distance.plot(budgets, data["cyclic"][1:], color=OURS, label="cyclic, spaced")
    distance.plot(budgets, data["random_mean"][1:], color=SISA, label="random, mean of 20 sets")
    distance.fill_between(budgets, data["random_low"][1:], data["random_high"][1:], color=SISA, alpha=0.2, linewidth=0)
    distance.axhline(data["all_permutations"], color=PAPER, linestyle=":", label="all 120 permutations")
    distance.set(
        title="Figure 8, left: cyclic sequences differ more",
        xlabel="budget B (sequences)",
        ylabel="mean edit distance (positions)",
        ylim=(None, size + 0.1),
    )
    rows = data["priors"]
    x = np.arange(1, len(rows) + 1)
    edit.bar(x - 0.2, [r["bms_edit_distance"] for r in rows], 0.4, color=OURS, label="BMS")
    edit.bar(x + 0.2, [r["random_edit_distance"] for r in rows], 0.4, color=SISA, label="random, mean of 20 sets")
    edit.axhline(size, color=PAPER, linestyle=":", label=f"the paper: BMS = L = {size}")
    edit.set(
        title=f"Figure 8, right: B = L = {size}",
        xlabel="prior (10 draws of a Dirichlet distribution)",
        ylabel="mean edit distance (positions)",
        xticks=x,
        ylim=(0, size * 1.35),
    )
    for shift, (horizon, color) in zip((-0.18, 0.18), (("10", OURS), ("100", MORE[0]))):
        found = [r["scores"][horizon] for r in rows]
        scores.scatter(
            np.repeat(x + shift, len(found[0]["random_sets"])),
            np.concatenate([np.array(f["random_sets"]) / f["random"] for f in found]),
            s=8,
            color=MORE[3],
            alpha=0.4,
            label="single random sets" if horizon == "10" else None,
        )
        ratios = [f["bms"] / f["random"] for f in found]
        scores.plot(x + shift, ratios, "D", color=color, markersize=5, label=f"BMS, t = {horizon}")
    scores.axhline(1, color=PAPER, linestyle=":", label="mean of random sets; the paper: BMS above it")
    scores.set(
        title="Figure 8, right: score after t requests",
        xlabel="prior (10 draws of a Dirichlet distribution)",
        ylabel="mean score, as a multiple of random's",
        xticks=x,
    )
    finish(distance, edit, scores)
    return figure


def _under_a_prior(data):
    figure, (scores, rates, first) = new_figure(3, (15, 5.0))
    rows = data["scores"]
    x = [r["sorted-cyclic"] for r in rows]
    scores.plot(x, [r["bms"] for r in rows], "o", color=OURS, label="10 priors")
    ends = (0, 1.05 * max(max(x), max(r["bms"] for r in rows)))
    scores.plot(ends, ends, ":", color=PAPER, label="equal; the paper: BMS not below")
    scores.set(
        title=f"Figure 15: scores, B = L = {data['num_slices']}, t = {data['horizon']}",
        xlabel="mean score of sorted cyclic (slices)",
        ylabel="mean score of BMS (slices)",
    )
    budgets = [r["budget"] for r in data["rates"]]
    styles = {"cyclic": "-", "sorted-cyclic": "-", "bms": "--", "optimal": ":"}
    for axes, ending, title in ((rates, "", "exhausted"), (first, "_first_shard", "first dead shard")):
        for method, style in styles.items():
            label, color = _METHODS[method]
            values = [r[method + ending] for r in data["rates"]]
            axes.plot(budgets, values, style, color=color, linewidth=2.2, label=f"{label}, exact")
        axes.set(
            title=f"Skewed prior, m = {data['num_shards']}, L = {data['num_slices']}: {title}",
            xlabel="budget B (sequences per shard)",
            ylabel=f"{_REQUESTS} until then",
            ylim=(0, None),
            xticks=budgets,
        )
    rates.errorbar(
        budgets,
        [r["bms_simulated"] for r in data["rates"]],
        yerr=[2 * r["bms_error"] for r in data["rates"]],
        fmt="o",
        color=_METHODS["bms"][1],
        markersize=4,
        capsize=2,
        label="BMS, simulated (± 2 standard errors)",
    )
    rates.set_ylim(0, 720)
    finish(scores)
    finish(rates, first, legends=False)
    shared_legend(figure, (rates, first), 5)
    return figure


def _table_3(data):
    figure, (rates, size) = new_figure(2, (11, 4.6))
    rows = data["rows"]
    budgets = [r["budget"] for r in rows]
    rates.plot(budgets, [r["exact_rate"] for r in rows], color=OURS, label="exhausted, exact")
    rates.errorbar(
        budgets,
        [r["simulated_rate"] for r in rows],
        yerr=[2 * r["simulated_error"] for r in rows],
        fmt="o",
        color=OURS,
        markersize=4,
        capsize=2,
        label="exhausted, 5,000 lifetimes (± 2 standard errors)",
    )
    rates.plot(budgets, [r["paper_rate"] for r in rows], "X", color=PAPER, markersize=9, label="the paper, simulated")
    rates.plot(budgets, [r["first_shard"] for r in rows], color=FIRST, label="first dead shard, exact")
    rates.set(
        title="Table 3: deletion rate, m = 5, L = 6",
        xlabel="budget B (sequences per shard)",
        ylabel=f"{_REQUESTS} until then",
        ylim=(0, 150),
        xticks=budgets,
    )
    x = np.array(budgets)
    size.plot(x, [r["paper_gigabytes"] for r in rows], "X", color=PAPER, markersize=9, label="the paper")
    whole = [r["whole_adapters_gigabytes"] for r in rows]
    size.plot(x, whole, color=SISA, label="by formula: L whole adapters a sequence")
    size.plot(x, [r["stack_gigabytes"] for r in rows], color=OURS, label="by formula: a stack, with its six heads")
    size.set(
        title="Table 3: storage, ViT-large, r = 16, 200 classes",
        xlabel="budget B (sequences per shard)",
        ylabel="adapters and heads (GB)",
        ylim=(0, None),
        xticks=budgets,
    )
    finish(rates, size)
    return figure


def _selection_rules(data):
    figure, panels = new_figure(4, (12, 9), columns=2)
    size, budget = data["num_slices"], data["budget"]
    for axes, name in zip(panels[:2], ("uniform", "skewed")):
        for method, curve in data[name]["methods"].items():
            label, color = _METHODS[method]
            style = "--" if method in ("conditional", "sorted-cyclic") else "-"
            axes.plot(curve["depths"], style, color=color, linewidth=1.8, label=label)
        axes.set(
            title=f"{name.capitalize()} prior, L = {size}, B = {budget}",
            xlabel="requests that hit the shard",
            ylabel="expected depth that serves (slices)",
            xlim=(0, 20),
            ylim=(0, size),
            xticks=range(0, 21, 4),
        )
    for axes, key, number in ((panels[2], "methods", budget), (panels[3], "methods_beyond", data["budget_beyond"])):
        methods = list(data["uniform"][key])
        places = np.arange(len(methods))
        for shift, (name, color) in zip((-0.2, 0.2), (("uniform", OURS), ("skewed", SISA))):
            depths = {method: found["mean_depth_over_100"] for method, found in data[name][key].items()}
            shares = [100 * depths[method] / depths["optimal"] for method in methods]
            bars = axes.barh(places + shift, shares, 0.38, color=color, label=f"{name} prior")
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
        axes.set(
            title=f"Mean depth over the first {data['horizon']} requests, B = {number}",
            xlabel="share of the optimal set's (%)",
            yticks=places,
            yticklabels=[_METHODS[method][0].split(" (")[0] for method in methods],
            xlim=(0, 118),
        )
        axes.invert_yaxis()
    finish(*panels[:2])
    finish(*panels[2:], legends=False)
    shared_legend(figure, panels[2:], 2)
    return figure


def _gains_of_optimal(data):
    figure, (uniform, priors) = new_figure(2, (12.5, 4.8))
    rows = data["rows"]
    names = [f"{row['num_slices']}, {row['budget']}" for row in rows]
    gains = [100 * (row["uniform"] - 1) for row in rows]
    bars = uniform.bar(range(len(rows)), gains, 0.6, color=OURS)
    uniform.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    uniform.set(
        title="Uniform prior: optimal over spaced cyclic",
        xlabel="slices L, budget B (sequences)",
        ylabel=f"gain in mean depth over {data['horizon']} requests (%)",
        xticks=range(len(rows)),
        xticklabels=names,
    )
    uniform.set_axisbelow(True)
    drawn = [row for row in rows if "bms" in row]
    x = np.arange(len(drawn))
    methods = ("bms", "sorted-cyclic", "cyclic")
    for shift, method in zip((-0.2, 0, 0.2), methods, strict=True):
        label, color = _METHODS[method]
        values = np.array([row[method] for row in drawn])
        priors.plot(x + shift, values.mean(axis=1), "D", color=color, markersize=6, label=f"over {label}, mean")
        priors.plot(np.repeat(x + shift, values.shape[1]), values.ravel(), ".", color=color, alpha=0.45, markersize=5)
    priors.set(
        title="Ten priors, draws of a Dirichlet distribution",
        xlabel="slices L, budget B (sequences)",
        ylabel="mean depth of the optimal set, as a multiple",
        xticks=x,
        xticklabels=names[: len(drawn)],
        yscale="log",
    )
    plain_numbers(priors.yaxis)
    finish(uniform, legends=False)
    finish(priors)
    return figure


def _retention(data):
    figure, (axes,) = new_figure(1, (7.5, 4.8))
    x = data["hits"]
    axes.plot(x, data["paper"], ":", color=PAPER, linewidth=2, label="the paper's Lemma 2")
    axes.plot(x, data["random_exact"], color=SISA, label="random sequences, exact")
    axes.plot(x, data["random_simulated"], "o", color=SISA, markersize=4, label="random sequences, simulated")
    axes.plot(x, data["cyclic"], color=OURS, label="cyclic, exact")
    axes.plot(x, data["optimal"], color=FIRST, label="optimal, exact")
    axes.plot(x, data["sisa"], "--", color=MORE[3], label="SISA, exact (= Lemma 2)")
    axes.set(
        title=f"Retention: L = {data['num_slices']}, B = {data['budget']}",
        xlabel="requests that hit the shard",
        ylabel=f"probability that {data['at_least']} slices or more still serve",
        ylim=(0, 1.02),
    )
    finish(axes)
    return figure


def _without_replacement(data):
    figure, (axes,) = new_figure(1, (7.5, 4.8))
    rows = data["rows"]
    curve = data["curve"]
    x = [c["num_examples"] for c in curve]
    axes.plot(x, [c["exhausted"] for c in curve], color=OURS, label="exhausted, exact")
    axes.errorbar(
        [r["num_examples"] for r in rows],
        [r["simulated"] for r in rows],
        yerr=[2 * r["error"] for r in rows],
        fmt="o",
        color=OURS,
        markersize=4,
        capsize=2,
        label="exhausted, simulated (± 2 standard errors)",
    )
    axes.axhline(data["with_replacement"], color=PAPER, linestyle=":", label="exhausted, with replacement (Lemma 1)")
    axes.plot(x, [c["first_shard"] for c in curve], color=FIRST, label="first dead shard, exact")
    axes.set(
        title=f"Each example deleted once: m = {data['num_shards']}, L = {data['num_slices']}, B = {data['budget']}",
        xlabel=f"examples of the system (over {data['num_shards'] * data['num_slices']} slices)",
        ylabel=f"{_REQUESTS} until then",
        xscale="log",
        ylim=(0, None),
    )
    finish(axes)
    return figure


# Name of the figure -> what draws its data.
DRAWERS: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "figure-6-right": _against_budget_alone,
    "figure-7": _three_ways,
    "figure-8": _diversity,
    "figure-15": _under_a_prior,
    "table-3": _table_3,
    "selection-rules": _selection_rules,
    "optimal-gains": _gains_of_optimal,
    "retention": _retention,
    "without-replacement": _without_replacement,
}
