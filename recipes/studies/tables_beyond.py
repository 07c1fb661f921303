"""Tables of docs/beyond_the_paper.md, in Markdown, from the JSON beside the figures in docs/figures/."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any


# Of the qualities that SISA reaches so many are shown.
_SHOWN = 9


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


def published_ways(data: Mapping[str, Any]) -> str:
    """Full retraining, and what the paper does."""
    lines = ["| as published | work | mean depth | mean accuracy (%) |", "|---|---|---|---|"]
    for point, name in zip(data["published"], _names(data), strict=True):
        lines.append(f"| {name} | {point['work']:.0f} | {point['mean_depth']:.2f} | {100 * point['quality']:.1f} |")
    return "\n".join(lines)


def _names(data: Mapping[str, Any]) -> Sequence[str]:
    called = {"sisa": "SISA", "s3t": f"S3T, B = {data['num_slices']}"}
    others = [f"{called[p['method']]}: {p['policy']}" for p in data["published"][2:]]
    return ["full retraining (m = 1)", "full retraining of the shard that was hit", *others]


def work_for_quality(data: Mapping[str, Any]) -> str:
    """What SISA and S3T need for the same mean quality."""
    lines = [
        "| mean accuracy (%) that SISA reaches | its work | how | S3T's work | how | less work |",
        "|---|---|---|---|---|---|",
    ]
    for row in _spread(_while_all_serve(data)):
        theirs, ours = row["sisa"], row["s3t"]
        shown = [f"{100 * theirs['quality']:.2f}", f"{theirs['work']:.1f}", _how(theirs)]
        shown += (
            ["not reached", "", ""] if ours is None else [f"{ours['work']:.1f}", _how(ours), f"{row['less']:.2f}x"]
        )
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def _while_all_serve(data: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The qualities above that of shards which all serve with one slice."""
    least = min(
        system["quality"]["-".join(["1"] * data["num_shards"])]
        for name, system in data["systems"].items()
        if not name.startswith("full")
    )
    return [row for row in data["goal"] if row["sisa"]["quality"] >= least]


def _spread(rows: Sequence[Any]) -> list[Any]:
    """Some of many, the first and the last among them."""
    if len(rows) <= _SHOWN:
        return list(rows)
    places = sorted({round(number * (len(rows) - 1) / (_SHOWN - 1)) for number in range(_SHOWN)})
    return [rows[place] for place in places]


def _how(point: Mapping[str, Any]) -> str:
    plan = "" if point["method"] == "sisa" else f"{point['plan']}, "
    return f"{plan}replay {point['replay']:g}, {point['policy']}"


def factors(data: Mapping[str, Any]) -> str:
    """What the paper's factors would be."""
    lines = ["| the paper's factor | is work of | S3T then | SISA then |", "|---|---|---|---|"]
    for row in data["factors"]:
        then = [
            "nothing"
            if row[method] is None
            else f"{100 * row[method]['quality']:.2f}% at mean depth {row[method]['mean_depth']:.2f}"
            for method in ("s3t", "sisa")
        ]
        lines.append(f"| {row['factor']:g}x less than {row['than']} | {row['work']:.1f} | {' | '.join(then)} |")
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
    ("frontier", published_ways),
    ("frontier", work_for_quality),
    ("frontier", factors),
    ("frontier-trained", answered),
)
