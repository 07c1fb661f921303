"""What shares of replay are worth: tables of docs/beyond_the_paper.md in Markdown, and the data of their picture."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean, stdev
from typing import Any

from studies.measured import paired_difference
from studies.runs import REPLAY_TASKS, SEEDS, SHARES, ReplayTask

from hf_s3t.sequences.families import lattice, stage_work, work_of


# A share does as well as all rows if what it loses is at most this: of an accuracy half a point, of a loss half a
# percent.
TOLERANCE = 0.005
_CALLED = {"0": "0", "0.25": "0.25", "0.5": "0.5", "1": "1, as published", "equal": "1, a first stage's steps"}


def by_depth(content: Mapping[str, Any]) -> list[float]:
    """A run's first metric at every depth."""
    (found,) = content["metrics"].values()
    return [next(iter(found[depth].values())) for depth in sorted(found, key=int)]


def work_by_depth(num_slices: int, share: str) -> list[float]:
    """Work of one sequence up to every depth, in full fine-tunings of its shard."""
    return list(accumulate(stage_work(depth, num_slices, _replay(share)) for depth in range(1, num_slices + 1)))


def _replay(share: str) -> float:
    """The share that costs as much: as many steps as a first stage are what it costs to take no earlier rows."""
    return 0.0 if share == "equal" else float(share)


def replay_data(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """
    Quality by depth beside work, for every share and task that was measured.

    Args:
        found (mapping): Name of a run -> its results.
    """
    return {"tolerance": TOLERANCE, "tasks": [_compared(task, found) for task in measured_tasks(found)]}


def measured_tasks(found: Mapping[str, Any]) -> list[ReplayTask]:
    """The tasks of which the share of all and another one were measured, with the same seed."""
    return [task for task in REPLAY_TASKS if any(_seeds(task, share, found) for share in SHARES if share != "1")]


def _seeds(task: ReplayTask, share: str, found: Mapping[str, Any]) -> list[int]:
    """The seeds that were run both so and with all rows."""
    return [seed for seed in SEEDS if task.named(share, seed) in found and task.named("1", seed) in found]


def _compared(task: ReplayTask, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    curves = [_curve(task, share, seeds, found) for share in SHARES if (seeds := _seeds(task, share, found))]
    data = found[task.named("1", _seeds(task, "1", found)[0])]["data"]
    return {
        "name": task.name,
        "title": task.title,
        "metric": task.metric,
        "num_slices": task.num_slices,
        "train_rows": data["train_rows"],
        "evaluation_rows": next(iter(data["evaluation_rows"].values())),
        "curves": curves,
        "smallest_share": next(curve["share"] for curve in curves if curve["keeps_up"]),
    }


def _curve(task: ReplayTask, share: str, seeds: list[int], found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    contents = [found[task.named(share, seed)] for seed in seeds]
    values = list(zip(*map(by_depth, contents), strict=True))
    # Of all rows, the same seeds: the others had other slices.
    shared = [by_depth(found[task.named("1", seed)]) for seed in seeds]
    mean, of_all = [fmean(one) for one in values], [fmean(one) for one in zip(*shared, strict=True)]
    on_average, with_all = lost(task.metric, fmean(mean), fmean(of_all)), lost(task.metric, mean[-1], of_all[-1])
    return {
        "share": share,
        "name": _CALLED[share],
        "learning_rate": contents[0]["settings"]["training"]["learning_rate"],
        "seeds": seeds,
        "work": [round(work, 6) for work in work_by_depth(task.num_slices, share)],
        "steps": contents[0]["cost"]["steps"],
        "mean": [round(one, 6) for one in mean],
        "standard_deviation": [round(stdev(one), 6) if len(one) > 1 else 0 for one in values],
        "lost_on_average": on_average,
        "lost_with_all_slices": with_all,
        "keeps_up": max(on_average, with_all) <= TOLERANCE,
    }


def lost(metric: str, ours: float, theirs: float) -> float:
    """By how much `ours` is worse: the difference of two accuracies, and of two losses its share of `theirs`."""
    return round(ours / theirs - 1 if metric == "loss" else theirs - ours, 6)


# Tables


def replay_tables(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tables of docs/beyond_the_paper.md, in Markdown: what chose the rates, and what was compared at them."""
    tasks = replay_data(found)["tasks"]
    return [
        _work_table(),
        *(_comparison_table(task, found) for task in tasks),
        *([_overview(tasks)] if tasks else []),
        _selection_table(found),
    ]


def _work_table() -> str:
    sizes = (3, 4, 5)
    heads = [f"{what}, L = {size}" for size in sizes for what in ("a sequence", "lattice")]
    lines = [f"| work, in full fine-tunings of a shard | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for share in SHARES:
        replay = _replay(share)
        works = [
            work_of(family, size, replay)
            for size in sizes
            for family in ([tuple(range(depth)) for depth in range(1, size + 1)], lattice(size))
        ]
        lines.append(f"| {_CALLED[share]} | {' | '.join(f'{work:.2f}' for work in works)} |")
    return "\n".join(lines)


def _comparison_table(task: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> str:
    interval = "" if task["metric"] == "loss" else " (95% interval)"
    lines = [
        f"| {task['title']}: share of the earlier rows | work | steps | {task['metric']} by depth: mean ± standard "
        f"deviation | seeds | on average, against 1 | with all slices{interval} |",
        "|---|---|---|---|---|---|---|",
    ]
    for curve in task["curves"]:
        shown = ", ".join(f"{mean:.3f}{_spread(curve, d)}" for d, mean in enumerate(curve["mean"]))
        gaps = ["", ""] if curve["share"] == "1" else _gaps(task, curve, found)
        work, seeds = f"{curve['work'][-1]:.2f}", str(len(curve["seeds"]))
        lines.append(f"| {' | '.join([curve['name'], work, str(curve['steps']), shown, seeds, *gaps])} |")
    return "\n".join(lines)


def _gaps(task: Mapping[str, Any], curve: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The mean over the depths, and the deepest stages, against all rows."""
    lost_by = [curve["lost_on_average"], curve["lost_with_all_slices"]]
    if task["metric"] == "loss":
        return [f"{100 * value:+.1f}%" for value in lost_by]
    (of,) = (one for one in REPLAY_TASKS if one.name == task["name"])
    runs = ({seed: found[of.named(share, seed)] for seed in curve["seeds"]} for share in (curve["share"], "1"))
    return [f"{-100 * lost_by[0] + 0:+.1f}", paired_difference(*runs)]


def _spread(curve: Mapping[str, Any], place: int) -> str:
    return f" ± {curve['standard_deviation'][place]:.3f}" if len(curve["seeds"]) > 1 else ""


def _overview(tasks: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| task | rows a slice | steps of a first stage | smallest share that keeps up | work, of that of 1 | "
        "all rows for a first stage's steps |",
        "|---|---|---|---|---|---|",
    ]
    for task in tasks:
        (of,) = (one for one in REPLAY_TASKS if one.name == task["name"])
        curves = {curve["share"]: curve for curve in task["curves"]}
        work = curves[task["smallest_share"]]["work"][-1] / curves["1"]["work"][-1]
        rows = task["train_rows"] / of.num_shards / of.num_slices
        equal = ("falls behind", "keeps up")[curves["equal"]["keeps_up"]] if "equal" in curves else ""
        lines.append(
            f"| {task['title']} | {rows:.0f} | {of.steps[1]} | {task['smallest_share']} | {work:.2f} | {equal} |"
        )
    return "\n".join(lines)


def _selection_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Per task and share the mean over the depths at every rate that was tried, the chosen one in bold."""
    lines = ["| held out from training | share | mean over the depths, by rate |", "|---|---|---|"]
    for task in REPLAY_TASKS:
        for share in SHARES:
            means = {
                rate: f"{fmean(by_depth(found[name])):.3f} at {rate:g}"
                for rate in task.tried
                if (name := task.chooses(share, rate)) in found
            }
            if means:
                chosen = task.rates[share]
                shown = ", ".join(f"**{mean}**" if rate == chosen else mean for rate, mean in means.items())
                lines.append(f"| {task.title} | {_CALLED[share]} | {shown} |")
    return "\n".join(lines)
