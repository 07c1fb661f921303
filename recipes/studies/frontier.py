"""Figure 9 as a frontier: the mean quality over a long stream of deletions, against the work of keeping it up."""

import argparse
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from studies.answers import Benches, Trained, chosen_rate, named, quality_together
from studies.runs import RESULTS, SEEDS
from studies.workbench import about

from hf_s3t.analysis.frontiers import Point, frontier, less_work, s3t_points, sisa_points
from hf_s3t.analysis.streams import Policy, Stream, families_under, sisa
from hf_s3t.sequences.families import best_family, lattice, stages_of, work_of
from hf_s3t.sequences.rules import select_sequences


SHARES = (0.0, 0.25, 1.0)
# Families of S3T are searched for so many amounts of work between one chain and the lattice.
_AMOUNTS = 4
# What the paper claims of Figure 9.
LESS_THAN_SISA, LESS_THAN_FULL = 2.8, 25

Rates = Mapping[str, Sequence[float]]
Table = Mapping[str, float]


def trained_systems() -> list[Trained]:
    """What is trained to measure quality: every method at every share of replay, and full fine-tuning."""
    systems = [Trained(method, replay) for method in ("s3t", "sisa") for replay in SHARES]
    return [*systems, Trained("full"), Trained("full", num_shards=1)]


def measured(benches: Benches, rates: Rates, seeds: Sequence[int]) -> dict[str, dict[str, Any]]:
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
        quality = found[trained.name]["quality"]
        whole = quality[max(quality, key=lambda depths: sum(map(int, depths.split("-"))))]
        print(f"{trained.name}: rate {choice['rate']:g}, quality {whole:.3f}", flush=True)
    return found


def frontiers(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Mean quality against work, for every method under every policy: simulated streams over measured qualities."""
    benches = Benches(options, others)
    bench = benches.given()
    config = bench.loaded.config
    rates = {"s3t": options.rates, "sisa": options.baseline_rates, "full": options.baseline_rates}
    systems = measured(benches, rates, options.seeds)
    tables = {name: system["quality"] for name, system in systems.items()}
    streams = {"requests": options.stream, "runs": options.streams}
    own = {
        "task": bench.loaded.task.name,
        "num_shards": config.num_shards,
        "num_slices": config.num_slices,
        "seeds": options.seeds,
        "systems": systems,
        "points": compared(simulated(config.num_shards, config.num_slices, tables, **streams)),
    }
    return {
        **about(bench, [(trained.method, trained.changes()) for trained in trained_systems()]),
        **streams,
        "tasks": [own, *(of_results(task, **streams) for task in ("trec", "sst2"))],
        "at_equal_depth": at_equal_depth(config.num_shards, config.num_slices, **streams),
        "paper": f"{LESS_THAN_SISA:g}x less than SISA, {LESS_THAN_FULL:g}x less than full retraining.",
    }


# The tasks of docs/reproduction.md


def of_results(task: str, *, requests: int, runs: int) -> dict[str, Any]:
    """
    The same of a task whose runs are kept in docs/results/: five shards of three slices, every row in every epoch.

    They were measured with all shards at one depth. Of several depths together the mean of those that serve is taken.

    Args:
        task (`str`): Begins the names of its runs.
        requests (`int`): Requests of a stream.
        runs (`int`): Number of streams.
    """
    shards, sources = 5, {"s3t-1": "s3t-m5", "sisa-1": "sisa-m5", "full": "full-m1", "full-per-shard": "full-m5"}
    by_depth = {name: _mean_by_depth(f"{task}-{kind}") for name, kind in sources.items()}
    size = len(by_depth["s3t-1"])
    tables = {name: _table_of(depths, 1 if name == "full" else shards) for name, depths in by_depth.items()}
    return {
        "task": task,
        "num_shards": shards,
        "num_slices": size,
        "seeds": list(SEEDS),
        "by_depth": {name: [round(value, 6) for value in depths] for name, depths in by_depth.items()},
        "points": compared(simulated(shards, size, tables, requests=requests, runs=runs)),
    }


def _mean_by_depth(runs: str) -> list[float]:
    """The first metric at every depth, in the mean over seeds."""
    found = []
    for seed in SEEDS:
        (depths,) = json.loads((RESULTS / f"{runs}-seed{seed}.json").read_text())["metrics"].values()
        found.append([next(iter(depths[depth].values())) for depth in sorted(depths, key=int)])
    return [fmean(values) for values in zip(*found, strict=True)]


def _table_of(by_depth: Sequence[float], shards: int) -> Table:
    combinations = itertools.combinations_with_replacement(range(len(by_depth) + 1), shards)
    # Where nothing serves no answer is right.
    return {
        named(depths): fmean([by_depth[depth - 1] for depth in depths if depth] or [0.0]) for depths in combinations
    }


# Streams


def simulated(
    num_shards: int, num_slices: int, tables: Mapping[str, Table], *, requests: int, runs: int, amounts: int = _AMOUNTS
) -> dict[str, list[Point]]:
    """
    What each method does with a stream, over its policies. Work counts the first training, too.

    Args:
        num_shards (`int`): Number of shards `m`.
        num_slices (`int`): Number of slices `L` of each.
        tables (mapping): Name of a system -> the quality of its shards by the depths that they serve together.
        requests (`int`): Requests of a stream.
        runs (`int`): Number of streams.
        amounts (`int`): Families of so many sizes between the chain and the lattice.

    Returns:
        `dict[str, list[Point]]`: `full`; `published-sisa` and `published-s3t`, whatever the paper does with them and
        training at once; `sisa`, with all that helps it, and `s3t`.
    """
    size, drawn = num_slices, {"num_shards": num_shards, "requests": requests, "runs": runs}
    published = {"policies": [Policy.when_exhausted(size), Policy.when_dead(size), Policy.all_at_once(size)]}
    rotations = {f"cyclic, B = {size}": stages_of(select_sequences(size, size))}
    shares = {share: f"{share:g}" for share in SHARES if f"s3t-{share:g}" in tables}
    at_once = [Policy.all_at_once(1)]
    # One model a shard, trained anew whenever its shard is hit: SISA of one slice.
    whole = {"policies": at_once, "method": "full", "requests": requests, "runs": runs}
    of_sisa = {share: _mean_by(tables[f"sisa-{name}"]) for share, name in shares.items()}
    found = {
        "full": [
            *sisa_points(1, {1.0: _mean_by(tables["full"])}, **whole),
            *sisa_points(1, {1.0: _mean_by(tables["full-per-shard"])}, num_shards=num_shards, **whole),
        ],
        "published-sisa": sisa_points(size, {1.0: _mean_by(tables["sisa-1"])}, reorders=False, **published, **drawn),
        "published-s3t": s3t_points(
            rotations, size, {1.0: _mean_by(tables["s3t-1"])}, by_sets=False, **published, **drawn
        ),
        "sisa": sisa_points(size, of_sisa, **drawn),
        "s3t": [
            point
            for share, name in shares.items()
            for point in s3t_points(
                _families(size, share, amounts), size, {share: _mean_by(tables[f"s3t-{name}"])}, **drawn
            )
        ],
    }
    return {method: [replace(p, work=p.first_work + p.work) for p in points] for method, points in found.items()}


def at_equal_depth(num_shards: int, num_slices: int, *, requests: int, runs: int) -> list[dict[str, Any]]:
    """What keeping every shard at a depth or deeper costs SISA, and S3T with one chain or all sets, per replay."""
    drawn = {"num_shards": num_shards, "requests": requests, "runs": runs}
    found = []
    for share, depth in itertools.product(SHARES, range(1, num_slices + 1)):
        policies = [Policy.to_depth(depth, depth)]
        works = [(1 + share * (place - 1)) / num_slices for place in range(1, num_slices + 1)]
        theirs = sisa(num_slices, policies[0], works=works, **drawn)
        ours = {
            name: families_under(family, num_slices, policies[0], replay=share, **drawn)
            for name, family in (("chain", stages_of([range(num_slices)])), ("lattice", lattice(num_slices)))
        }
        found.append(
            {
                "replay": share,
                "depth": depth,
                "sisa": round(theirs.first_work + theirs.work, 4),
                "sisa_mean_depth": round(theirs.mean_depth, 4),
                **{name: round(one.first_work + one.work, 4) for name, one in ours.items()},
                **{f"{name}_mean_depth": round(one.mean_depth, 4) for name, one in ours.items()},
            }
        )
    return found


def _mean_by(table: Table) -> Callable[[Stream], float]:
    return lambda stream: sum(table[named(depths)] * share for depths, share in stream.together.items())


def _families(num_slices: int, replay: float, amounts: int) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Families of several sizes; those that come out alike are one."""
    chain, whole = stages_of([range(num_slices)]), lattice(num_slices)
    least, most = (work_of(stages, num_slices, replay) for stages in (chain, whole))
    works = [least + (most - least) * number / (amounts + 1) for number in range(1, amounts + 1)]
    between = {f"family for {work:.2f}": best_family(num_slices, work, replay=replay) for work in works}
    by_stages = {family: name for name, family in {"lattice": whole, **between, "chain": chain}.items()}
    return {name: family for family, name in by_stages.items()}


# What is compared


def compared(points: Mapping[str, Sequence[Point]]) -> dict[str, Any]:
    """
    The frontiers of points, and what S3T needs for every quality that SISA reaches.

    Args:
        points (mapping): As of [`simulated`].

    Returns:
        `dict[str, Any]`: `published`, the points of full retraining and of the published ways; `frontiers`, per method
        those that none beats; `goal`, per point of SISA's the S3T point of least work for its quality (`None` where
        S3T does not reach it); `paper`, the amounts of work that its factors speak of, and what each method does then.
    """
    # SISA of one slice is a model for each shard, which is trained anew when it is hit.
    of_sisa = [*points["sisa"], *points["published-sisa"], *points["full"][1:]]
    best = {"sisa": frontier(of_sisa), "s3t": frontier(points["s3t"])}
    exhausted, _, at_once = points["published-sisa"]
    factors = {
        "SISA when exhausted": (LESS_THAN_SISA, exhausted.work),
        "SISA at once": (LESS_THAN_SISA, at_once.work),
        "full retraining": (LESS_THAN_FULL, points["full"][0].work),
    }
    return {
        "published": [_described(p) for kind in ("full", "published-sisa", "published-s3t") for p in points[kind]],
        "tried": {"sisa": len(of_sisa), "s3t": len(points["s3t"])},
        "frontiers": {method: [_described(point) for point in found] for method, found in best.items()},
        "goal": [
            {
                "sisa": _described(theirs),
                "s3t": None if ours is None else _described(ours),
                "less": None if ours is None else round(theirs.work / ours.work, 4),
            }
            for theirs, ours in less_work(points["s3t"], of_sisa)
        ],
        "factors": [
            {
                "than": than,
                "factor": factor,
                "work": round(work / factor, 4),
                **{method: _at_most(work / factor, found) for method, found in best.items()},
            }
            for than, (factor, work) in factors.items()
        ],
    }


def _at_most(work: float, found: Sequence[Point]) -> dict[str, Any] | None:
    """The best that a frontier does for so much work."""
    affordable = [point for point in found if point.work <= work]
    return _described(affordable[-1]) if affordable else None


def _described(point: Point) -> dict[str, Any]:
    policy = point.policy
    return {
        "method": point.method,
        "plan": point.plan,
        "replay": point.replay,
        "policy": None if policy is None else called(policy),
        "work": round(point.work, 4),
        "mean_depth": round(point.mean_depth, 4),
        "quality": round(point.quality, 6),
    }


def called(policy: Policy) -> str:
    """What figures and tables call a policy."""
    gathered = f", every {policy.every} requests" if policy.every > 1 else ""
    if policy.together:
        return f"all anew when exhausted{gathered}"
    if policy.trigger == 1 and policy.extra is None:
        return f"a shard anew when it is dead{gathered}"
    if policy.extra is None:
        return f"all at once{gathered}"
    if not policy.target:
        return f"{policy.extra} {'stage' if policy.extra == 1 else 'stages'} a time{gathered}"
    more = f", {policy.extra} more" if policy.extra else ""
    return f"below depth {policy.trigger} to {policy.target}{more}{gathered}"
