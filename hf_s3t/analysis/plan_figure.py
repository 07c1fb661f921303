"""The picture, by matplotlib, of what `hf-s3t plan` recommends."""

from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from .pictures import FIRST, OURS, PAPER, SISA, check_picture, finish, new_figure, plain_numbers, save
from .planning import Option, Recommendation, Workload, survival


def draw_plan(found: Recommendation, workload: Workload, path: str | Path) -> None:
    """
    Draw what to expect of a recommended system, and what others cost.

    Args:
        found ([`~hf_s3t.analysis.planning.Recommendation`]):
            The recommendation.
        workload ([`~hf_s3t.analysis.planning.Workload`]):
            What it was made for.
        path (`str` or `Path`):
            The picture to write, a `.png` or `.svg` file.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If no picture can be drawn there.
    """
    check_picture(path)
    save(figure_of_plan(found, workload), path)


def figure_of_plan(found: Recommendation, workload: Workload) -> Any:
    """
    The figure that [`draw_plan`] writes.

    Args:
        found ([`~hf_s3t.analysis.planning.Recommendation`]):
            The recommendation.
        workload ([`~hf_s3t.analysis.planning.Workload`]):
            What it was made for.

    Returns:
        A figure of matplotlib with two panels: what is left over time, and what a longer life costs.
    """
    figure, (life, cost) = new_figure(2, (11, 4.4))
    _draw_life(life, found.chosen, workload)
    _draw_costs(cost, found)
    finish(life, cost)
    return figure


def _draw_life(axes: Any, best: Option, workload: Workload) -> None:
    months = np.linspace(0, 1.3 * best.months_until_exhausted, 300)
    alive, depth = survival(best, months * workload.deletions_per_month)
    axes.plot(months, 100 * alive, color=OURS, label="shards alive")
    axes.plot(months, 100 * depth, color=FIRST, label="slices that serve, of all")
    axes.axvline(best.months_until_first_dead_shard, color=SISA, linestyle="--", label="first dead shard, expected")
    axes.axvline(best.months_until_exhausted, color=PAPER, linestyle=":", label="exhausted, expected")
    axes.set(
        title=f"m = {best.num_shards}, L = {best.num_slices}, B = {best.budget}: what is left",
        xlabel=f"months, at {workload.deletions_per_month:g} requests each",
        ylabel="expected share (%)",
        ylim=(0, 102),
        xlim=(0, None),
    )


def _draw_costs(axes: Any, found: Recommendation) -> None:
    best = found.chosen
    for number, (label, color, months_of) in enumerate(
        (
            ("until the first dead shard", SISA, attrgetter("months_until_first_dead_shard")),
            ("until exhausted", OURS, attrgetter("months_until_exhausted")),
        )
    ):
        hours = [option.training_hours for option in found.options]
        axes.plot(hours, list(map(months_of, found.options)), "o-", color=color, label=label, markersize=4)
        axes.plot(
            best.training_hours, months_of(best), "*", color=color, markersize=15, label=None if number else "chosen"
        )
    for option in found.options:
        axes.annotate(
            f"{option.num_shards}·{option.num_slices}·{option.budget}",
            (option.training_hours, option.months_until_first_dead_shard),
            xytext=(4, -11),
            textcoords="offset points",
            fontsize=7,
        )
    axes.axhline(found.goal_months, color=PAPER, linestyle=":", label="goal")
    axes.set(
        title="Longer life costs more training (m·L·B)",
        xlabel="training (hours)",
        ylabel="expected months",
        xscale="log",
        yscale="log",
    )
    # Room for the labels: of the last point beside it, of the first one below it.
    axes.margins(x=0.15, y=0.1)
    plain_numbers(axes.xaxis, axes.yaxis)
