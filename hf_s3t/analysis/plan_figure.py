"""The picture, by matplotlib, of what `hf-s3t plan` recommends."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import counted
from .pictures import FIRST, OURS, PAPER, SISA, check_picture, finish, new_figure, plain_numbers, save
from .planning import Option, Recommendation, Workload
from .speedup import Speedup


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def draw_plan(found: Recommendation, workload: Workload, path: str | Path, speedups: Sequence[Speedup] = ()) -> None:
    """
    Draw what to expect of a recommended system, and what others cost.

    Args:
        found ([`~hf_s3t.analysis.planning.Recommendation`]):
            The recommendation.
        workload ([`~hf_s3t.analysis.planning.Workload`]):
            What it was made for.
        path (`str` or `Path`):
            The picture to write, a `.png` or `.svg` file.
        speedups (sequence of [`~hf_s3t.analysis.speedup.Speedup`], *optional*):
            How much sooner more workers are done, for a third panel.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If no picture can be drawn there.
    """
    check_picture(path)
    save(figure_of_plan(found, workload, speedups), path)


def figure_of_plan(found: Recommendation, workload: Workload, speedups: Sequence[Speedup] = ()) -> "Figure":
    """
    The figure that [`draw_plan`] writes.

    Args:
        found ([`~hf_s3t.analysis.planning.Recommendation`]):
            The recommendation.
        workload ([`~hf_s3t.analysis.planning.Workload`]):
            What it was made for.
        speedups (sequence of [`~hf_s3t.analysis.speedup.Speedup`], *optional*):
            How much sooner more workers are done, for a third panel.

    Returns:
        A figure of matplotlib with two panels: the depth that serves over time, and what more of it costs; with
        `speedups` a third one.
    """
    figure, panels = new_figure(3, (16, 4.4)) if speedups else new_figure(2, (11, 4.4))
    _draw_depth(panels[0], found, workload)
    _draw_costs(panels[1], found)
    if speedups:
        _draw_speedups(panels[2], found.chosen, speedups)
    finish(*panels)
    return figure


def _draw_speedups(axes: "Axes", best: Option, speedups: Sequence[Speedup]) -> None:
    workers = [one.workers for one in speedups]
    axes.plot(workers, [one.speedup for one in speedups], "o-", color=OURS, label="this plan", markersize=4)
    axes.plot(workers, workers, color=PAPER, linestyle="--", label="as many times sooner as workers")
    most = best.training_hours / min(one.hours for one in speedups)
    axes.axhline(most, color=SISA, linestyle=":", label=f"most of these: {most:.3g} times")
    for one in speedups:
        axes.annotate(
            f"{one.hours:.3g} h",
            (one.workers, one.speedup),
            xytext=(0, -12),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    axes.set(
        title=f"First training over workers ({counted(best.num_stages, 'stage')})",
        xlabel="workers, each with one stage at a time",
        ylabel="times sooner than one worker",
        xscale="log",
        yscale="log",
        ylim=(0.5, 4 * most),
    )
    plain_numbers(axes.xaxis, axes.yaxis)


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
