"""Tables of docs/beyond_the_paper.md, in Markdown, from the JSON beside the figures in docs/figures/."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


# Of the qualities that SISA reaches so many are shown.
_SHOWN = 6


def exact_values(data: Mapping[str, Any]) -> str:
    """What plans of a shard cost, and how deep they serve."""
    lines = [
        "| L | plan | stages | work | mean depth after 0, 1, 2, … distinct hits | expected depth over L requests |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["table"]:
        depths = ", ".join(f"{depth:.2f}".rstrip("0").rstrip(".") for depth in row["depths"])
        shown = [row["num_slices"], row["plan"], row["stages"], f"{row['work']:.2f}", depths]
        lines.append(f"| {' | '.join(map(str, shown))} | {row['expected_depth']:.2f} |")
    return "\n".join(lines)


_CALLED = {"digits": "digits", "trec": "TREC", "sst2": "SST-2"}


def published_ways(data: Mapping[str, Any]) -> str:
    """Full retraining, and what the paper does."""
    tasks = data["tasks"]
    names = [_CALLED.get(task["task"], task["task"]) for task in tasks]
    heads = " | ".join(f"{name}: work | depth | accuracy (%)" for name in names)
    lines = [f"| as published | {heads} |", "|---" * (1 + 3 * len(tasks)) + "|"]
    for place, name in enumerate(_WAYS):
        cells = [
            f"{point['work']:.0f} | {point['mean_depth']:.2f} | {100 * point['quality']:.1f}"
            for point in (task["points"]["published"][place] for task in tasks)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


_WAYS = (
    "full retraining, m = 1",
    "full retraining of the shard that was hit",
    *(
        f"{method}: {policy}"
        for method in ("SISA", "S3T, B = L")
        for policy in ("all anew when exhausted", "a shard anew when it is dead", "all at once")
    ),
)


def work_for_quality(data: Mapping[str, Any]) -> str:
    """What SISA and S3T need for the same mean quality."""
    lines = [
        "| task | mean accuracy (%) that SISA reaches | its work | how | S3T's work | how | less work |",
        "|---|---|---|---|---|---|---|",
    ]
    for task in data["tasks"]:
        name = _CALLED.get(task["task"], task["task"])
        for row in _spread(_while_all_serve(task)):
            theirs, ours = row["sisa"], row["s3t"]
            shown = [name, f"{100 * theirs['quality']:.2f}", f"{theirs['work']:.1f}", _how(theirs)]
            if ours is None:
                shown += ["not reached", "", ""]
            else:
                shown += [f"{ours['work']:.1f}", _how(ours), f"{row['less']:.2f}x"]
            lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _while_all_serve(task: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points of SISA's frontier at which a shard serves one slice or more, in the mean."""
    return [row for row in task["points"]["goal"] if row["sisa"]["mean_depth"] >= 1]


def _spread(rows: Sequence[Any]) -> list[Any]:
    """Some of many, the first and the last among them."""
    if len(rows) <= _SHOWN:
        return list(rows)
    places = sorted({round(number * (len(rows) - 1) / (_SHOWN - 1)) for number in range(_SHOWN)})
    return [rows[place] for place in places]


def _how(point: Mapping[str, Any]) -> str:
    plan = "" if point["method"] == "sisa" else f"{point['plan']}, "
    return f"{plan}replay {point['replay']:g}, {point['policy']}"


def equal_depth(data: Mapping[str, Any]) -> str:
    """What it costs to keep all shards at a depth."""
    lines = [
        "| every shard at depth | replay | SISA | S3T, one chain | less than SISA | S3T, lattice |",
        "|---|---|---|---|---|---|",
    ]
    for row in data["at_equal_depth"]:
        works = f"{row['sisa']:.1f} | {row['chain']:.1f} | {row['sisa'] / row['chain']:.2f}x | {row['lattice']:.1f}"
        lines.append(f"| {row['depth']} | {row['replay']:g} | {works} |")
    return "\n".join(lines)


def factors(data: Mapping[str, Any]) -> str:
    """What the paper's factors would be."""
    lines = ["| task | the paper's factor | is work of | S3T then | SISA then |", "|---|---|---|---|---|"]
    for task in data["tasks"]:
        for row in task["points"]["factors"]:
            then = [
                "nothing"
                if row[method] is None
                else f"{100 * row[method]['quality']:.2f}% at mean depth {row[method]['mean_depth']:.2f}"
                for method in ("s3t", "sisa")
            ]
            claim = f"{row['factor']:g}x less than {row['than']} | {row['work']:.1f}"
            lines.append(f"| {_CALLED.get(task['task'], task['task'])} | {claim} | {' | '.join(then)} |")
    return "\n".join(lines)


def answered(data: Mapping[str, Any]) -> str:
    """A stream that was really answered, beside the simulation of the same requests."""
    lines = [
        "| really trained | stages | work, simulated | mean depth, simulated | mean accuracy (%), simulated | "
        "work by steps |",
        "|---|---|---|---|---|---|",
    ]
    for system in data["systems"]:
        said = system["simulated"]
        lines.append(
            f"| {system['title']} | {system['stages_trained']} | {system['work']:.2f}, {said['work']:.2f} | "
            f"{system['mean_depth']:.2f}, {said['mean_depth']:.2f} | {100 * system['mean_quality']:.2f}, "
            f"{100 * said['mean_quality']:.2f} | {system['work_in_steps']:.2f} |"
        )
    return "\n".join(lines)


# Figure, and what makes a table of its data.
TABLES: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("families", exact_values),
    ("frontier", equal_depth),
    ("frontier", published_ways),
    ("frontier", work_for_quality),
    ("frontier", factors),
    ("frontier-trained", answered),
)
