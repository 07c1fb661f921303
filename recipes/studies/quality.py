"""Studies of several shards: quality while examples are deleted, by prototypes' weight, by members that answer."""

import argparse
from collections.abc import Sequence
from typing import Any

from studies.deletions import delete_one_by_one, request_order
from studies.subsets import check_budgets
from studies.workbench import Workbench, about, open_bench

from hf_s3t.analysis import deletion_rate
from hf_s3t.baselines import Method


# Figure 6, left


def quality(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality against the number of deletions, by deleting one example after the other from copies of systems."""
    bench = open_bench(options, others)
    check_budgets(bench.options.s3t, options.budgets)
    systems = {
        name: [deleted_from(bench, options, name, order) for order in range(options.orders)]
        for name in system_names(options)
    }
    retrained = bench.kept(
        f"full-retrained-every-{options.retrain_every}-of-{options.requests}", lambda: _retrained(bench, options)
    )
    config = bench.loaded.config
    return {
        **about(bench, several_shards(options)),
        "num_shards": config.num_shards,
        "num_slices": config.num_slices,
        "requests": options.requests,
        "systems": systems,
        "full": retrained,
        "expected_exhausted": {
            name: deletion_rate(
                config.num_shards,
                config.num_slices,
                _budget_of(name),
                num_examples=len(bench.loaded.train) if config.partition == "balanced" else None,
            )
            for name in systems
            if name != "protosisa"
        },
        "paper": "CIFAR-10 and CIFAR-100: B = 4 is close to B = 24; SISA dies near 40 requests.",
        "paper_sisa_dies": 40,
    }


def system_names(options: argparse.Namespace) -> list[str]:
    return [*(f"s3t-{budget}" for budget in sorted(set(options.budgets))), "sisa", "protosisa"]


def several_shards(options: argparse.Namespace) -> list[tuple[str, dict[str, Any]]]:
    """What is trained to delete from, and what it is compared with: S3T's budgets share the stages of the largest."""
    return [("s3t", {"budget": max(options.budgets)}), ("sisa", {}), ("protosisa", {}), ("full", {"num_shards": 1})]


def _budget_of(name: str) -> int:
    return int(name.removeprefix("s3t-")) if name.startswith("s3t-") else 1


def _trained_of(bench: Workbench, options: argparse.Namespace, name: str) -> tuple[str, Method, dict[str, Any]]:
    """The method of a system, what is trained for it, and what its copies change: S3T's budgets share stages."""
    if name.startswith("s3t-"):
        return "s3t", bench.trained("s3t", budget=max(options.budgets)), {"budget": _budget_of(name)}
    return name, bench.trained(name), {}


def deleted_from(bench: Workbench, options: argparse.Namespace, name: str, order: int) -> dict[str, Any]:
    def measure() -> dict[str, Any]:
        method_name, source, changes = _trained_of(bench, options, name)
        method = bench.copy_of(method_name, source, f"{name}-order-{order}", **changes)
        # Every deletion changes the prototypes, which go on answering when no stack is left.
        every = 10 if name == "protosisa" else None
        found = delete_one_by_one(bench, method, request_order(bench.ids, order)[: options.requests], every)
        print(f"{name}, order {order}: {found['requests']} requests, exhausted after {found['exhausted_after']}")
        return found

    return bench.kept(f"{name}-order-{order}", measure, requests=options.requests, largest=max(options.budgets))


def _retrained(bench: Workbench, options: argparse.Namespace) -> list[dict[str, Any]]:
    """One model on all data, trained anew without the examples deleted so far; the requests of the first order."""
    order = request_order(bench.ids, 0)
    method = bench.copy_of("full", bench.trained("full", num_shards=1), "full-retrained")
    points = [{"request": 0, "quality": bench.quality(method), "seconds": method.cost.seconds}]
    for request in range(options.retrain_every, options.requests + 1, options.retrain_every):
        method.unlearn(order[points[-1]["request"] : request])
        cost = method.retrain()
        points.append({"request": request, "quality": bench.quality(method), "seconds": cost.seconds})
    return points


# Figure 15, ProtoSISA's weights


def weights(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality of ProtoSISA against the weight of its prototypes, after several numbers of deletions."""
    bench = open_bench(options, others)
    after, values = sorted({0, *options.after}), sorted(set(options.weights))
    settings = {"after": after, "weights": values}
    return {
        **about(bench, [("protosisa", {})]),
        "num_shards": bench.loaded.config.num_shards,
        "num_slices": bench.loaded.config.num_slices,
        "after": after,
        "weights": values,
        "orders": [
            bench.kept(
                f"weights-order-{order}", lambda order=order: _by_weight(bench, order, after, values), **settings
            )
            for order in range(options.orders)
        ],
        "paper": "Figure 15 shows several weights of ProtoSISA.",
    }


def _by_weight(bench: Workbench, order: int, after: Sequence[int], values: Sequence[float]) -> list[dict[str, Any]]:
    """Per number of requests the shards that are left, and the quality at every weight."""
    method = bench.copy_of("protosisa", bench.trained("protosisa"), f"weights-order-{order}")
    requests = request_order(bench.ids, order)
    found, done = [], 0
    for count in after:
        if count > done:
            method.unlearn(requests[done:count])
        done = count
        qualities = [_weighted(bench, method, weight) for weight in values]
        found.append({"shards_left": sum(depth > 0 for depth in method.depths), "quality": qualities})
    return found


def _weighted(bench: Workbench, method: Method, weight: float) -> float:
    method.model.prototype_weight = weight
    return bench.quality(method)


# Figure 16


def together(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Quality of one shard against the number of its sequences that answer together, for every shard by itself."""
    bench = open_bench(options, others)
    check_budgets(bench.options.s3t, options.members)
    largest = max(options.members)
    num_shards = bench.loaded.config.num_shards

    def measure(count: int, shard: int) -> float:
        source = bench.trained("s3t", budget=largest)
        label = f"together-{count}-{shard}"
        return bench.quality(bench.copy_of("s3t", source, label, shards=[shard], budget=count, select="all"))

    return {
        **about(bench, [("s3t", {"budget": largest})]),
        "num_shards": num_shards,
        "num_slices": bench.loaded.config.num_slices,
        "points": [
            {
                "members": count,
                "quality": [
                    bench.kept(
                        f"together-{count}-{shard}", lambda n=count, shard=shard: measure(n, shard), largest=largest
                    )
                    for shard in range(num_shards)
                ],
            }
            for count in sorted(set(options.members))
        ],
        "paper": "A small gain, then flat.",
    }
