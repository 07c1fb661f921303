"""What shares of replay are worth: tables of docs/beyond_the_paper.md in Markdown, and the data of their picture."""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from statistics import fmean, stdev
from typing import Any

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
    """The tasks of which the share of all and another one were measured."""
    return [
        task
        for task in REPLAY_TASKS
        if _seeds(task, "1", found) and any(_seeds(task, share, found) for share in SHARES if share != "1")
    ]


def _seeds(task: ReplayTask, share: str, found: Mapping[str, Any]) -> list[int]:
    return [seed for seed in SEEDS if task.named(share, seed) in found]


def _compared(task: ReplayTask, found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    curves = []
    for share in SHARES:
        contents = [found[task.named(share, seed)] for seed in _seeds(task, share, found)]
        if not contents:
            continue
        values = list(zip(*map(by_depth, contents), strict=True))
        curves.append(
            {
                "share": share,
                "name": _CALLED[share],
                "metric": task.metric,
                "learning_rate": contents[0]["settings"]["training"]["learning_rate"],
                "seeds": _seeds(task, share, found),
                "work": [round(work, 6) for work in work_by_depth(task.num_slices, share)],
                "steps": contents[0]["cost"]["steps"],
                "mean": [round(fmean(one), 6) for one in values],
                "standard_deviation": [round(stdev(one), 6) if len(one) > 1 else 0 for one in values],
            }
        )
    data = found[task.named("1", _seeds(task, "1", found)[0])]["data"]
    return {
        "name": task.name,
        "title": task.title,
        "metric": task.metric,
        "num_slices": task.num_slices,
        "train_rows": data["train_rows"],
        "evaluation_rows": next(iter(data["evaluation_rows"].values())),
        "curves": curves,
        "smallest_share": _smallest(curves),
    }


def _smallest(curves: Sequence[Mapping[str, Any]]) -> str:
    """The smallest share that is within the tolerance of all rows, with all slices learnt and on average."""
    (everything,) = (curve for curve in curves if curve["share"] == "1")
    return next(curve["share"] for curve in curves if _keeps_up(curve, everything))


def _keeps_up(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    pairs = ((curve["mean"][-1], fmean(curve["mean"])) for curve in (ours, theirs))
    return all(loss_of(ours["metric"], one, other) <= TOLERANCE for one, other in zip(*pairs, strict=True))


def loss_of(metric: str, ours: float, theirs: float) -> float:
    """By how much `ours` is worse: the difference of two accuracies, and of two losses its share of `theirs`."""
    return round(ours / theirs - 1 if metric == "loss" else theirs - ours, 9)


# Tables


def replay_tables(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tables of docs/beyond_the_paper.md, in Markdown: what chose the rates, and what was compared at them."""
    tasks = replay_data(found)["tasks"]
    return [
        _work_table(),
        *map(_comparison_table, tasks),
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


def _comparison_table(task: Mapping[str, Any]) -> str:
    of = "loss" if task["metric"] == "loss" else "accuracy"
    lines = [
        f"| {task['title']}: share of the earlier rows | work | steps | {of} by depth: mean ± standard deviation | "
        "all depths, against 1 | seeds |",
        "|---|---|---|---|---|---|",
    ]
    whole = next(fmean(curve["mean"]) for curve in task["curves"] if curve["share"] == "1")
    for curve in task["curves"]:
        points = [f"{mean:.3f}{_spread(curve, d)}" for d, mean in enumerate(curve["mean"])]
        mean = fmean(curve["mean"])
        gap = f"{100 * (mean / whole - 1):+.1f}%" if of == "loss" else f"{100 * (mean - whole):+.1f}"
        shown = "" if curve["share"] == "1" else gap
        lines.append(
            f"| {curve['name']} | {curve['work'][-1]:.2f} | {curve['steps']} | {', '.join(points)} | {shown} | "
            f"{len(curve['seeds'])} |"
        )
    return "\n".join(lines)


def _spread(curve: Mapping[str, Any], place: int) -> str:
    return f" ± {curve['standard_deviation'][place]:.3f}" if len(curve["seeds"]) > 1 else ""


def _overview(tasks: Sequence[Mapping[str, Any]]) -> str:
    lines = [
        "| task | rows a slice | steps of a first stage | smallest share that keeps up | its work, of that of 1 |",
        "|---|---|---|---|---|",
    ]
    for task in tasks:
        of = next(one for one in REPLAY_TASKS if one.name == task["name"])
        works = {curve["share"]: curve["work"][-1] for curve in task["curves"]}
        share = task["smallest_share"]
        rows = task["train_rows"] / of.num_shards / of.num_slices
        lines.append(f"| {task['title']} | {rows:.0f} | {of.steps[1]} | {share} | {works[share] / works['1']:.2f} |")
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
