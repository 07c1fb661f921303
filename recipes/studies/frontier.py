"""Figure 9 as a frontier: the mean quality over a long stream of deletions, against the work of keeping it up."""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from studies.answers import Benches, Trained, chosen_rate, named, quality_together
from studies.workbench import about

from hf_s3t.analysis.streams import Policy, Stream, families_under, frontier, full_retraining, sisa
from hf_s3t.sequences.families import best_family, family_of, lattice, stages_of, work_of
from hf_s3t.sequences.rules import select_sequences


SHARES = (0.0, 0.25, 1.0)
# Families of S3T are searched for so many amounts of work between one chain and the lattice.
_AMOUNTS = 4
# What is told apart in the figure; `best` are the frontiers.
PUBLISHED_S3T, PUBLISHED_SISA, S3T, SISA, FULL = "s3t-published", "sisa-published", "s3t", "sisa", "full"


def trained_systems() -> list[Trained]:
    """What is trained to measure quality: every method at every share of replay, and full fine-tuning."""
    systems = [Trained(method, replay) for method in ("s3t", "sisa") for replay in SHARES]
    return [*systems, Trained("full"), Trained("full", num_shards=1)]


def measured(benches: Benches, rates: Mapping[str, Sequence[float]], seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
    """
    Name of a system -> its learning rate, what chose it, and the quality of its shards at all depths together.

    Args:
        benches ([`~studies.answers.Benches`]): Where systems are trained.
        rates (mapping): Method -> the rates to choose of.
        seeds (sequence of `int`): Of the systems that are measured; the first one chooses rates.
    """
    found = {}
    for trained in trained_systems():
        choice = chosen_rate(benches, trained, rates[trained.method], seeds[0])
        found[trained.name] = {**choice, "quality": quality_together(benches, trained, choice["rate"], seeds)}
        whole = max(found[trained.name]["quality"], key=lambda depths: sum(map(int, depths.split("-"))))
        print(f"{trained.name}: rate {choice['rate']:g}, quality {found[trained.name]['quality'][whole]:.3f}")
    return found


def frontiers(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Mean quality against work, for every method under every policy: simulated streams over measured qualities."""
    benches = Benches(options, others)
    bench = benches.given()
    config = bench.loaded.config
    rates = {"s3t": options.rates, "sisa": options.baseline_rates, "full": options.baseline_rates}
    systems = measured(benches, rates, options.seeds)
    points = list(
        simulated(config.num_shards, config.num_slices, systems, requests=options.stream, runs=options.streams)
    )
    return {
        **about(bench, [(trained.method, trained.changes()) for trained in trained_systems()]),
        "num_shards": config.num_shards,
        "num_slices": config.num_slices,
        "requests": options.stream,
        "streams": options.streams,
        "seeds": options.seeds,
        "systems": systems,
        **compared(points, options.stream),
        "paper": "Over 1,000 requests 2.8x less than SISA, 25x less than full retraining.",
        "paper_less_than_sisa": 2.8,
        "paper_less_than_full": 25,
    }


# Streams


def simulated(
    num_shards: int, num_slices: int, systems: Mapping[str, Mapping[str, Any]], *, requests: int, runs: int
) -> Iterable[dict[str, Any]]:
    """Every method under every policy: its work with the first training, and its mean quality, over some streams."""

    def streams(simulate: Any) -> list[Stream]:
        return [simulate(num_shards=num_shards, requests=requests, seed=seed) for seed in range(runs)]

    m, size = num_shards, num_slices
    retrained = full_retraining(requests=requests)
    for name, shards in (("full", 1), ("full-per-shard", m)):
        quality = systems[name]["quality"][named([1] * shards)]
        yield _point(FULL, f"{name}, at once", 1 + retrained.work / shards, quality, {"shards": shards})
    # As published: every row in every epoch, nothing in between; idle stages are trained too, and cost their part.
    published = stages_of(select_sequences(size, size))
    pruned = family_of(published)
    idle = work_of(published, size) / work_of(pruned, size)
    for policy_name, policy in _published_policies(size).items():
        found = streams(lambda **drawn: families_under(pruned, size, policy, **drawn))  # noqa: B023
        work = [idle * (one.first_work + one.work) for one in found]
        yield _mean(PUBLISHED_S3T, policy_name, work, found, systems["s3t-1"], {"replay": 1.0})
        found = streams(lambda **drawn: sisa(size, policy, reordered=False, **drawn))  # noqa: B023
        yield _mean(PUBLISHED_SISA, policy_name, _works(found), found, systems["sisa-1"], {"replay": 1.0})
    at_once = Policy(size, size)
    found = streams(lambda **drawn: sisa(size, at_once, reordered=False, **drawn))
    yield _mean(PUBLISHED_SISA, "at once", _works(found), found, systems["sisa-1"], {"replay": 1.0})
    for replay in SHARES:
        for policy in policies(size):
            how = {"replay": replay, "policy": _described(policy)}
            if not policy.extra:
                found = streams(lambda **drawn: sisa(size, policy, replay=replay, **drawn))  # noqa: B023
                yield _mean(SISA, "", _works(found), found, systems[f"sisa-{replay:g}"], how)
            for family_name, family in _families(size, replay).items():
                found = streams(lambda **drawn: families_under(family, size, policy, replay=replay, **drawn))  # noqa: B023
                yield _mean(S3T, family_name, _works(found), found, systems[f"s3t-{replay:g}"], how)


def policies(num_slices: int) -> list[Policy]:
    """How far a shard may be grown again: from any depth, to any, with some stages more; and the paper's way."""
    found = [
        Policy(trigger, target, extra)
        for trigger in range(1, num_slices + 1)
        for target in range(trigger, num_slices + 1)
        for extra in range(num_slices)
    ]
    return [*found, Policy(0, 0, until_exhausted=True)]


def _published_policies(num_slices: int) -> dict[str, Policy]:
    everything = 1 << num_slices
    return {
        "when exhausted": Policy(0, 0, until_exhausted=True),
        "when a shard is dead": Policy(1, num_slices, everything),
    }


def _families(num_slices: int, replay: float) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Families of several sizes; those that come out alike are one."""
    chain, whole = stages_of([range(num_slices)]), lattice(num_slices)
    least, most = (work_of(stages, num_slices, replay) for stages in (chain, whole))
    found = {"chain": chain}
    for number in range(1, _AMOUNTS + 1):
        work = least + (most - least) * number / (_AMOUNTS + 1)
        found[f"family for {work:.2f}"] = best_family(num_slices, work, replay=replay)
    found["lattice"] = whole
    return {name: family for name, family in found.items() if family not in [f for n, f in found.items() if n < name]}


def _works(found: Sequence[Stream]) -> list[float]:
    return [one.first_work + one.work for one in found]


def _described(policy: Policy) -> dict[str, Any]:
    if policy.until_exhausted:
        return {"until_exhausted": True}
    return {"trigger": policy.trigger, "target": policy.target, "extra": policy.extra}


def _mean(
    kind: str, name: str, works: Sequence[float], found: Sequence[Stream], system: Mapping[str, Any], how: dict[str, Any]
) -> dict[str, Any]:
    table = system["quality"]
    qualities = [sum(table[named(depths)] * share for depths, share in one.together.items()) for one in found]
    depth = fmean(one.mean_depth for one in found)
    errors = {
        "work_error": round(stdev(works) / len(works) ** 0.5, 3) if len(works) > 1 else 0.0,
        "quality_error": round(stdev(qualities) / len(works) ** 0.5, 6) if len(works) > 1 else 0.0,
    }
    return _point(kind, name, fmean(works), fmean(qualities), {**how, "mean_depth": round(depth, 4), **errors})


def _point(kind: str, name: str, work: float, quality: float, how: dict[str, Any]) -> dict[str, Any]:
    return {"kind": kind, "name": name, "work": round(work, 4), "quality": round(quality, 6), **how}


# What is compared


def compared(points: Sequence[Mapping[str, Any]], requests: int) -> dict[str, Any]:
    """
    The frontiers of points, and what S3T needs for every quality that a baseline reaches.

    Args:
        points (sequence of mappings): As of [`simulated`].
        requests (`int`): Requests of a stream.

    Returns:
        `dict[str, Any]`: `published`, the points of the published ways; `frontiers`, the others that none of their
        kind beats; and `goal`, per point of SISA's frontier the S3T point with at least its quality for the least work
        (`None` where S3T does not reach it).
    """
    kinds = {kind: [p for p in points if p["kind"] in kinds] for kind, kinds in _BEST.items()}
    best = {kind: _undominated(found) for kind, found in kinds.items()}
    return {
        "published": [p for p in points if p["kind"] in (PUBLISHED_S3T, PUBLISHED_SISA, FULL)],
        "frontiers": best,
        "tried": {kind: len(found) for kind, found in kinds.items()},
        "goal": [_against(point, best[S3T]) for point in best[SISA]],
        "paper_work": {
            "sisa": _named_work(points, PUBLISHED_SISA, "when exhausted"),
            "full": float(requests),
        },
    }


# A frontier's points may be published ones: SISA's may also be one model a shard, retrained whole.
_BEST = {S3T: (S3T,), SISA: (SISA, PUBLISHED_SISA)}


def _undominated(points: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    kept = frontier([(p["work"], p["quality"]) for p in points])
    return [next(p for p in points if (p["work"], p["quality"]) == pair) for pair in kept]


def _against(point: Mapping[str, Any], ours: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What S3T needs for the quality of a point of SISA's: its frontier ascends in work and quality."""
    there = next((p for p in ours if p["quality"] >= point["quality"]), None)
    return {
        "quality": point["quality"],
        "sisa": point["work"],
        "s3t": None if there is None else there["work"],
        "less": None if there is None else round(point["work"] / there["work"], 4),
    }


def _named_work(points: Sequence[Mapping[str, Any]], kind: str, name: str) -> float:
    return next(p["work"] for p in points if (p["kind"], p["name"]) == (kind, name))
