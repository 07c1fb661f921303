"""
The numbers behind the paper's figures that need no trained model: what its formulas say, what is exact, what is drawn.

Every function returns plain JSON types; `pictures_of_theory.py` draws them.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from studies.families import families

from hf_s3t.analysis.backbone import Backbone
from hf_s3t.analysis.planning import sequence_cost, storage
from hf_s3t.analysis.rates import deletion_rate, deletion_rate_paper, simulate_deletions
from hf_s3t.analysis.retention import (
    depths_of_hit_sets,
    expected_depth,
    retention,
    retention_paper,
    retention_random,
    simulate_depths,
)
from hf_s3t.sequences.optimal import mean_depth_weights
from hf_s3t.sequences.rules import mean_edit_distance, score, select_sequences


# What the paper prints, in Table 3: ViT-large, m = 5, L = 6, B = 1..6, the deletion rates simulated.
TABLE_3_RATES = (66.4, 86.9, 100.8, 107.8, 110.1, 124.1)
TABLE_3_GIGABYTES_PER_BUDGET = 0.21
# ViT-large with LoRA of rank 16 on query and value, and Tiny ImageNet's 200 classes.
VIT_LARGE = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}

# Slices hit very unequally: the prior under which rules of selection are compared, beside the uniform one.
SKEWED = (0.12, 0.02, 0.35, 0.05, 0.2, 0.03, 0.15, 0.08)
_SELECTED_BUDGET = 4
_PRIORS = 10


def deletion_rate_against_budget() -> dict[str, Any]:
    """Figure 6, right: the deletion rate of 5 shards of 64 slices against the budget."""
    simulated = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64)
    return {
        "num_shards": 5,
        "num_slices": 64,
        "sisa": deletion_rate_paper(5, 64, 1),
        "points": [_rates(5, 64, budget, budget in simulated) for budget in range(1, 65)],
        "paper": "The rate grows steadily with the budget, and slower the larger it is.",
    }


def deletion_rate_three_ways() -> dict[str, Any]:
    """Figure 7: the deletion rate against the budget, the number of shards and the number of slices."""
    return {
        "against_budget": [_rates(5, 32, b, b in (1, 2) or b % 4 == 0) for b in range(1, 33)],
        "against_shards": [_rates(m, 32, 32) for m in range(1, 11)],
        "against_slices": [_rates(5, size, size, size in (1, 2, 4) or size % 8 == 0) for size in range(1, 65)],
        "paper": "Up to 1.6x over SISA at B = 8, 2.3x over the numbers of shards, 3x over the numbers of slices.",
        "paper_gains": {"against_budget": 1.6, "against_shards": 2.3, "against_slices": 3.0},
    }


def diversity_of_sequences() -> dict[str, Any]:
    """Figure 8: how much sequences differ, cyclic against random; edit distance and score of BMS against random."""
    size = 5
    cyclic = [mean_edit_distance(select_sequences(size, budget)) for budget in range(1, 121)]
    seeds = range(20)
    drawn = np.array(
        [[mean_edit_distance(select_sequences(size, b, "random", seed=seed)) for b in range(1, 121)] for seed in seeds]
    )
    # Two permutations differ in 5 * (1 - 1/5) positions on average, and distinct ones a little more.
    by_chance = size * (1 - 1 / size) * math.factorial(size) / (math.factorial(size) - 1)
    rows = []
    for number, prior in enumerate(_dirichlet_priors(size)):
        matched = select_sequences(size, size, "bms", prior)
        random_sets = [select_sequences(size, size, "random", seed=100 * number + seed) for seed in seeds]
        rows.append(
            {
                "number": number,
                "prior": prior,
                "bms_edit_distance": mean_edit_distance(matched),
                "random_edit_distance": float(np.mean([mean_edit_distance(s) for s in random_sets])),
                "scores": {str(horizon): _scores(random_sets, prior, horizon) for horizon in (10, 100)},
            }
        )
    return {
        "num_slices": size,
        "cyclic": cyclic,
        "random_mean": drawn.mean(axis=0).tolist(),
        "random_low": drawn.min(axis=0).tolist(),
        "random_high": drawn.max(axis=0).tolist(),
        "all_permutations": by_chance,
        "priors": rows,
        "paper": "Cyclic sequences differ more than random ones; BMS differs in all L positions and scores higher.",
    }


def selection_under_a_prior() -> dict[str, Any]:
    """Figure 15: the score of BMS against sorted cyclic, and the deletion rate under a prior."""
    size, m = 8, 5
    rows = []
    for number, prior in enumerate(_dirichlet_priors(size)):
        by_method = {
            method: _mean_score(select_sequences(size, size, method, prior), prior)
            for method in ("bms", "sorted-cyclic")
        }
        rows.append({"number": number, "prior": prior, **by_method})
    rates = []
    prior = list(SKEWED)
    for budget in range(1, size + 1):
        row = {"budget": budget}
        for method in ("bms", "sorted-cyclic", "optimal", "cyclic"):
            sequences = select_sequences(size, budget, method, prior)
            arguments = dict(prior=prior, sequences=sequences)
            row[method] = deletion_rate(m, size, budget, **arguments)
            row[f"{method}_first_shard"] = deletion_rate(m, size, budget, until="first_shard", **arguments)
        matched = select_sequences(size, budget, "bms", prior)
        drawn = simulate_deletions(m, size, budget, prior=prior, sequences=matched, runs=2000, seed=budget)
        row["bms_simulated"], row["bms_error"] = _mean_and_error(drawn)
        rates.append(row)
    return {
        "num_shards": m,
        "num_slices": size,
        "horizon": 100,
        "scores": rows,
        "prior": prior,
        "rates": rates,
        "paper": "BMS scores at least as high as sorted cyclic; the deletion rate under a prior.",
    }


def storage_and_deletion_rate() -> dict[str, Any]:
    """Table 3: storage and deletion rate of ViT-large, 5 shards of 6 slices, budgets 1 to 6."""
    m, size = 5, 6
    backbone = Backbone.from_config(VIT_LARGE, rank=16, target_modules="query-value", num_labels=200)
    whole_adapters = size * (backbone.num_layers * backbone.adapter_weights_per_layer + backbone.head_weights)
    rows = []
    for budget in range(1, size + 1):
        drawn = simulate_deletions(m, size, budget, runs=5000, seed=budget)
        mean, error = _mean_and_error(drawn)
        rows.append(
            {
                "budget": budget,
                "paper_rate": TABLE_3_RATES[budget - 1],
                "exact_rate": deletion_rate(m, size, budget),
                "simulated_rate": mean,
                "simulated_error": error,
                "standard_deviation": float(np.std(drawn)),
                "first_shard": deletion_rate(m, size, budget, until="first_shard"),
                "paper_gigabytes": budget * TABLE_3_GIGABYTES_PER_BUDGET,
                "whole_adapters_gigabytes": budget * m * whole_adapters * 4 / 1e9,
                "stack_gigabytes": storage(m, size, budget, 4, backbone) / 1e9,
                "cost": budget * sequence_cost(size, 4, 24),
            }
        )
    return {"num_shards": m, "num_slices": size, "rows": rows, "paper": "Table 3, deletion rates simulated there."}


def selection_rules_compared() -> dict[str, Any]:
    """What every rule of selection keeps of a shard while requests hit it, under the uniform and a skewed prior."""
    size, few, many = len(SKEWED), _SELECTED_BUDGET, 2 * len(SKEWED)
    all_methods = ("random", "cyclic-paper", "cyclic", "sorted-cyclic", "bms", "conditional", "optimal")
    beyond = ("random", "cyclic-paper", "cyclic", "conditional", "optimal")
    found = {}
    for name, prior in (("uniform", [1 / size] * size), ("skewed", list(SKEWED))):
        found[name] = {
            "prior": prior,
            "methods": {method: _kept(method, few, prior) for method in all_methods},
            "methods_beyond": {method: _kept(method, many, prior) for method in beyond},
        }
    return {
        "num_slices": size,
        "budget": few,
        "budget_beyond": many,
        "num_shards_of_rate": 5,
        "horizon": 100,
        **found,
    }


def _kept(method, budget, prior) -> dict[str, Any]:
    size = len(prior)
    # A random set is one of many: the mean over some.
    seeds = range(20) if method == "random" else (42,)
    sets = [select_sequences(size, budget, method, prior, seed=seed) for seed in seeds]
    depths = np.mean([[expected_depth(s, hits, prior=prior) for hits in range(101)] for s in sets], axis=0)
    rates = [deletion_rate(5, size, budget, prior=prior, sequences=s) for s in sets]
    return {
        "depths": depths[:31].tolist(),
        "mean_depth_over_100": float(depths[1:].mean()),
        "deletion_rate": float(np.mean(rates)),
        "edit_distance": float(np.mean([mean_edit_distance(s) for s in sets])),
        "sequences": [list(q) for q in sets[0]] if len(sets) == 1 else None,
    }


def gains_of_optimal() -> dict[str, Any]:
    """How much deeper the optimal set stays than those of other rules, over the first requests that hit a shard."""
    horizon = 100

    def depth(size, budget, method, prior) -> float:
        sequences = select_sequences(size, budget, method, prior, horizon)
        return float(mean_depth_weights(prior, horizon) @ depths_of_hit_sets(sequences))

    rows = []
    for size, budget in ((4, 2), (4, 4), (6, 3), (6, 6), (8, 4), (8, 8), (8, 16), (8, 24)):
        uniform = [1 / size] * size
        row = {
            "num_slices": size,
            "budget": budget,
            "uniform": depth(size, budget, "optimal", uniform) / depth(size, budget, "cyclic", uniform),
        }
        if budget <= size:
            # The other rules that take a prior have no more sequences than slices.
            for method in ("bms", "sorted-cyclic", "cyclic"):
                row[method] = [
                    depth(size, budget, "optimal", prior) / depth(size, budget, method, prior)
                    for prior in _dirichlet_priors(size)
                ]
        rows.append(row)
    return {"horizon": horizon, "rows": rows}


def retention_three_ways() -> dict[str, Any]:
    """Lemma 2: the chance that a shard keeps k slices after r requests, as in the paper, exact, and drawn."""
    size, at_least, budget = 8, 3, 8
    hits = list(range(13))
    sets = [select_sequences(size, budget, "random", seed=seed) for seed in range(200)]
    drawn = [
        [simulate_depths(s, r, runs=100, seed=1000 * r + seed) >= at_least for seed, s in enumerate(sets)]
        for r in hits
    ]
    return {
        "num_slices": size,
        "at_least": at_least,
        "budget": budget,
        "hits": hits,
        "sisa": [retention_paper(size, 1, r, at_least) for r in hits],
        "paper": [retention_paper(size, budget, r, at_least) for r in hits],
        "random_exact": [retention_random(size, budget, r, at_least) for r in hits],
        "random_simulated": [float(np.mean(row)) for row in drawn],
        "cyclic": [retention(select_sequences(size, budget), r, at_least) for r in hits],
        "optimal": [retention(select_sequences(size, budget, "optimal"), r, at_least) for r in hits],
    }


def deletion_rate_against_examples() -> dict[str, Any]:
    """How few examples per slice bring the deletion rate down: 5 shards of 32 slices, budget 8."""
    m, size, budget = 5, 32, 8
    rows = []
    for examples in (160, 320, 640, 1000, 2000, 4000, 8000, 16000, 64000):
        drawn = simulate_deletions(m, size, budget, num_examples=examples, runs=2000, seed=examples)
        mean, error = _mean_and_error(drawn)
        rows.append(
            {
                "num_examples": examples,
                "exact": deletion_rate(m, size, budget, num_examples=examples),
                "simulated": mean,
                "error": error,
            }
        )
    return {
        "num_shards": m,
        "num_slices": size,
        "budget": budget,
        "with_replacement": deletion_rate(m, size, budget),
        "first_shard_with_replacement": deletion_rate(m, size, budget, until="first_shard"),
        "rows": rows,
        "curve": [
            {
                "num_examples": examples,
                **{
                    until: deletion_rate(m, size, budget, num_examples=examples, until=until)
                    for until in ("exhausted", "first_shard")
                },
            }
            for examples in np.geomspace(m * size, 64000, 40).astype(int).tolist()
        ],
    }


# Name of the figure -> what computes its numbers.
STUDIES: dict[str, Callable[[], dict[str, Any]]] = {
    "figure-6-right": deletion_rate_against_budget,
    "figure-7": deletion_rate_three_ways,
    "figure-8": diversity_of_sequences,
    "figure-15": selection_under_a_prior,
    "table-3": storage_and_deletion_rate,
    "selection-rules": selection_rules_compared,
    "optimal-gains": gains_of_optimal,
    "retention": retention_three_ways,
    "without-replacement": deletion_rate_against_examples,
    "families": families,
}


def _rates(num_shards, num_slices, budget, is_simulated=True) -> dict[str, Any]:
    row = {"num_shards": num_shards, "num_slices": num_slices, "budget": budget}
    row["theory"] = deletion_rate_paper(num_shards, num_slices, budget)
    row["sisa"] = deletion_rate_paper(num_shards, num_slices, 1)
    row["gain"] = row["theory"] / row["sisa"]
    for name, sequences in (("first_shard", budget), ("sisa_first_shard", 1)):
        row[name] = deletion_rate(num_shards, num_slices, sequences, until="first_shard")
    if is_simulated:
        seed = num_shards * num_slices + budget
        drawn = simulate_deletions(num_shards, num_slices, budget, runs=2000, seed=seed)
        row["simulated"], row["error"] = _mean_and_error(drawn)
    return row


def _mean_and_error(drawn) -> tuple[float, float]:
    """The mean, and its standard error."""
    return float(np.mean(drawn)), float(np.std(drawn) / math.sqrt(len(drawn)))


def _dirichlet_priors(size) -> list[list[float]]:
    rng = np.random.default_rng(8)
    return [rng.dirichlet(np.ones(size)).tolist() for _ in range(_PRIORS)]


def _scores(random_sets, prior, horizon) -> dict[str, Any]:
    every = list(itertools.permutations(range(len(prior))))
    return {
        "bms": _mean_score(select_sequences(len(prior), len(prior), "bms", prior, horizon), prior, horizon),
        # What random sequences score on average, exactly: the mean over all permutations.
        "random": _mean_score(every, prior, horizon),
        "random_sets": [_mean_score(sequences, prior, horizon) for sequences in random_sets],
    }


def _mean_score(sequences, prior, horizon=100) -> float:
    return float(np.mean([score(sequence, prior, horizon) for sequence in sequences]))
