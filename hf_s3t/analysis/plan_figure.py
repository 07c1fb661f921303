"""The picture, by matplotlib, of what `hf-s3t plan` recommends."""

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import counted
from .pictures import FIRST, OURS, PAPER, SISA, check_picture, finish, new_figure, plain_numbers, save
from .planning import Option, Recommendation, Workload


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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


def figure_of_plan(found: Recommendation, workload: Workload) -> "Figure":
    """
    The figure that [`draw_plan`] writes.

    Args:
        found ([`~hf_s3t.analysis.planning.Recommendation`]):
            The recommendation.
        workload ([`~hf_s3t.analysis.planning.Workload`]):
            What it was made for.

    Returns:
        A figure of matplotlib with two panels: the depth that serves over time, and what more of it costs.
    """
    figure, (depth, cost) = new_figure(2, (11, 4.4))
    _draw_depth(depth, found, workload)
    _draw_costs(cost, found)
    finish(depth, cost)
    return figure


def _draw_depth(axes: "Axes", found: Recommendation, workload: Workload) -> None:
    best = found.chosen
    again = f"after each request: {best.after_each_request}"
    axes.plot(found.months, best.depths, color=OURS, label=again)
    axes.plot(found.months, best.depths_without, color=FIRST, label="never grown again")
    axes.plot(
        found.months,
        found.published_depths,
        color=PAPER,
        linestyle="--",
        label=f"published plan (B = {best.num_slices}; {found.published_hours:.3g} hours), never grown again",
    )
    if best.months_until_first_dead_shard <= found.months[-1]:
        axes.axvline(
            best.months_until_first_dead_shard, color=SISA, linestyle=":", label="first dead shard, never grown again"
        )
    axes.set(
        title=f"m = {best.num_shards}, L = {best.num_slices}, {best.plan}: expected depth",
        xlabel=f"months, at {counted(workload.deletions_per_month, 'request')} each",
        ylabel="slices that serve",
        ylim=(0, 1.35 * best.num_slices),
        xlim=(0, None),
    )
    axes.set_yticks(range(best.num_slices + 1))


def _draw_costs(axes: "Axes", found: Recommendation) -> None:
    best = found.chosen
    hours = [option.total_hours for option in found.options]
    axes.plot(hours, list(map(_share, found.options)), "o-", color=OURS, label="cheapest for its depth", markersize=4)
    axes.plot(best.total_hours, _share(best), "*", color=OURS, markersize=15, label="chosen")
    first = [option.training_hours for option in found.options]
    axes.plot(first, list(map(_share, found.options)), ".", color=FIRST, label="of that, the first training")
    for option in found.options:
        axes.annotate(
            f"{option.num_shards}·{option.num_slices}·{len(option.family)}",
            (option.total_hours, _share(option)),
            xytext=(5, -11),
            textcoords="offset points",
            fontsize=7,
        )
    axes.axhline(100 * found.goal_depth, color=PAPER, linestyle=":", label="goal")
    axes.set(
        title="More depth costs more training (m·L·stages of a shard)",
        xlabel=f"training (hours in {counted(found.goal_months, 'month')})",
        ylabel="slices that serve, in the mean (%)",
        xscale="log",
    )
    # Room for the labels: of the last point beside it, of the first one below it.
    axes.margins(x=0.2, y=0.12)
    plain_numbers(axes.xaxis)


def _share(option: Option) -> float:
    return 100 * option.mean_depth / option.num_slices
