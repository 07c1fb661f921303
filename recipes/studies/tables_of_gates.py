"""The tables of docs/gates.md, in Markdown, from the JSON beside its figure in docs/figures/."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any


System = Mapping[str, Any]
_ASKED_BY = {"mean": "mean of all shards", "terms": "terms", "oracle": "right shard known", "strangers": "strangers"}


def knowledge(data: Mapping[str, Any]) -> str:
    """What is known by each gate, by kind of question."""
    found = [*_by_shards(data, "people"), *_by_shards(data, "authors")]
    kinds = list(found[0][1][0]["known"]["mean"])
    lines = [f"| of | m | weighed by | {' | '.join(kinds)} |", "|---" * (3 + len(kinds)) + "|"]
    for shards, systems in found:
        for gate, called in _ASKED_BY.items():
            cells = [_percent([system["known"][gate][kind] for system in systems]) for kind in kinds]
            lines.append(f"| {systems[0]['title']} | {shards} | {called} | {' | '.join(cells)} |")
    for title in dict.fromkeys(system["title"] for system in data.get("whole", [])):
        whole = [system["known"]["full"] for system in data["whole"] if system["title"] == title]
        cells = [_percent([known[kind] for known in whole]) for kind in kinds]
        lines.append(f"| {title} | | one LoRA on everything | {' | '.join(cells)} |")
    return "\n".join(lines)


def of_the_oracle(data: Mapping[str, Any]) -> str:
    """The share that each gate keeps of what the right shard knows beyond what is guessed of strangers."""
    lines = ["| of | m | mean, as trained | mean, changed | terms, as trained | terms, changed |", "|---" * 6 + "|"]
    for shards, systems in [*_by_shards(data, "people"), *_by_shards(data, "authors")]:
        cells = [
            _percent([_kept(system["known"], gate, changed) for system in systems])
            for gate in ("mean", "terms")
            for changed in (False, True)
        ]
        lines.append(f"| {systems[0]['title']} | {shards} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _kept(known: Mapping[str, Mapping[str, float]], gate: str, changed: bool) -> float:
    kinds = [kind for kind in known[gate] if (kind != "as trained") == changed]
    gains = {who: fmean(known[who][kind] - known["strangers"][kind] for kind in kinds) for who in (gate, "oracle")}
    return gains[gate] / gains["oracle"] if gains["oracle"] else 1.0


def otherwise(data: Mapping[str, Any]) -> str:
    """General quality, what is left of who is forgotten, and where questions about them go."""
    lines = [
        "| of | m | held-out loss: mean, terms (error of the difference) | deleted: mean, terms (%) | "
        "strangers (%) | orphans' distance to strangers (by chance) |",
        "|---" * 6 + "|",
    ]
    for shards, systems in [*_by_shards(data, "people"), *_by_shards(data, "authors")]:
        for system in systems:
            loss, after = system["held_out"], system["after"]
            cells = [f"{loss['mean']:.3f}, {loss['terms']:.3f} ({loss['error']:.3f})"]
            if after is None:
                cells += ["no shard is left", "", ""]
            else:
                known, lost = after["known"], after["orphans"]
                cells += [
                    f"{100 * known['mean']['deleted']:.1f}, {100 * known['terms']['deleted']:.1f}",
                    f"{100 * known['terms']['strangers']:.1f}",
                    f"{lost['distance']:.3f} ({lost['chance']:.2f})",
                ]
            lines.append(f"| {system['title']} | {shards} | {' | '.join(cells)} |")
    return "\n".join(lines)


def told(data: Mapping[str, Any]) -> str:
    """AUC of telling subjects that are deleted, each by itself, from strangers, before and after."""
    ways = {"mean": "loss, mean of all shards", "terms": "loss, terms", "weight": "weight of its shard"}
    lines = [
        f"| of | m | {' | '.join(f'{called}: before, after (error)' for called in ways.values())} |",
        "|---" * (2 + len(ways)) + "|",
    ]
    for shards, systems in [*_by_shards(data, "people"), *_by_shards(data, "authors")]:
        for system in systems:
            before, after = system["membership"]["before"], system["membership"]["after"]
            cells = [f"{before[way]['auc']:.2f}, {after[way]['auc']:.2f} ({after[way]['error']:.2f})" for way in ways]
            lines.append(f"| {system['title']} | {shards} | {' | '.join(cells)} |")
    return "\n".join(lines)


def temperatures(data: Mapping[str, Any]) -> str:
    """What those who choose know by each temperature, and how far the loss on general rows is above the mean's."""
    found = [*_by_shards(data, "people"), *_by_shards(data, "authors")]
    # Where as many members answer as stand out, it is less a question of temperature.
    of_all = [
        [[one for one in system["chosen"]["tried"] if one["gate_top_k"] is None] for system in systems]
        for _, systems in found
    ]
    tried = [one["gate_temperature"] for one in of_all[0][0]]
    lines = [f"| of | m | {' | '.join(f'{one:g}' for one in tried)} |", "|---" * (2 + len(tried)) + "|"]
    for (shards, systems), settings in zip(found, of_all, strict=True):
        cells = [
            f"{100 * fmean(one['known'] for one in same):.1f}, {fmean(one['loss_above_mean'] for one in same):+.3f}"
            for same in zip(*settings, strict=True)
        ]
        lines.append(f"| {systems[0]['title']} | {shards} | {' | '.join(cells)} |")
    return "\n".join(lines)


def layouts(data: Mapping[str, Any]) -> str:
    """Shards by slices at equal work; empty where they were not measured."""
    if not data.get("layouts"):
        return ""
    lines = [
        "| m | L | epochs, rate | known: mean, terms (%) | held-out loss: mean, terms | requests until a shard is "
        "dead, all are | work of growing again after a request |",
        "|---" * 7 + "|",
    ]
    for shards, slices in dict.fromkeys((system["num_shards"], system["num_slices"]) for system in data["layouts"]):
        systems = [s for s in data["layouts"] if (s["num_shards"], s["num_slices"]) == (shards, slices)]
        known = [_percent([s["known"][gate]["as trained"] for s in systems]) for gate in ("mean", "terms")]
        loss = [f"{fmean(s['held_out'][gate] for s in systems):.3f}" for gate in ("mean", "terms")]
        one = systems[0]
        cells = [
            shards,
            slices,
            f"{one['epochs']}, {one['learning_rate']:g}",
            ", ".join(known),
            ", ".join(loss),
            f"{one['requests_until_a_shard_is_dead']:.1f}, {one['requests_until_all_are_dead']:.1f}",
            f"{one['work_of_a_request']:.3f}",
        ]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def classifiers(data: Mapping[str, Any]) -> str:
    """Accuracy where shards are random parts of one task; empty where it was not measured."""
    if not data.get("classifiers"):
        return ""
    ways = list(dict.fromkeys(way for system in data["classifiers"] for way in system["accuracy"]))
    lines = [f"| task | {' | '.join(ways)} | one LoRA on everything |", "|---" * (2 + len(ways)) + "|"]
    for task in dict.fromkeys(system["task"] for system in data["classifiers"]):
        systems = [system for system in data["classifiers"] if system["task"] == task]
        cells = [_percent([s["accuracy"][way] for s in systems if way in s["accuracy"]]) for way in ways]
        whole = _percent([s["full_lora"] for s in systems if s["full_lora"] is not None])
        lines.append(f"| {task} | {' | '.join(cells)} | {whole} |")
    return "\n".join(lines)


def _by_shards(data: Mapping[str, Any], part: str) -> Iterator[tuple[int, list[System]]]:
    """The systems of a part by their number of shards, one for each seed."""
    systems = data.get(part, [])
    for shards in sorted({system["num_shards"] for system in systems}):
        yield shards, [system for system in systems if system["num_shards"] == shards]


def _percent(shares: Sequence[float]) -> str:
    if not shares:
        return ""
    return f"{100 * fmean(shares):.1f}" + (f" ± {100 * stdev(shares):.1f}" if len(shares) > 1 else "")


# Figure, and what makes a table of its data.
TABLES: tuple[tuple[str, Callable[[Mapping[str, Any]], str]], ...] = (
    ("gates", knowledge),
    ("gates", of_the_oracle),
    ("gates", temperatures),
    ("gates", otherwise),
    ("gates", told),
    ("gates", layouts),
    ("gates", classifiers),
)
