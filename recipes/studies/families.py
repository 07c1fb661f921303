"""Families of stages beside sequences: what depth an amount of training buys, and exact values of a few plans."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_s3t.sequences.families import (
    best_family,
    depths_of_hit_sets,
    expected_depth,
    family_of,
    lattice,
    stages_of,
    work_of,
)
from hf_s3t.sequences.rules import select_sequences


_RULES = ("cyclic", "bms", "optimal")
# Slices that requests hit very unequally, with which rules that take a prior are compared.
_SKEWED = {
    4: (0.5, 0.1, 0.3, 0.1),
    6: (0.3, 0.05, 0.35, 0.1, 0.15, 0.05),
    8: (0.12, 0.02, 0.35, 0.05, 0.2, 0.03, 0.15, 0.08),
}
# Families are searched for so many amounts of work, from one chain to the lattice.
_AMOUNTS = 12
# What the table shows: slices -> budgets of the published rotations.
_TABLE = {3: (3,), 4: (4,), 5: (5,), 6: (6,), 8: (4, 8)}
# All L! sequences are listed up to here.
_MOST_SEQUENCES = 5


def families() -> dict[str, Any]:
    """Expected depth against work, for sequences by every rule, families, the lattice; and a table of exact values."""
    return {
        "panels": [
            _panel(size, name, prior)
            for name in ("uniform", "skewed")
            for size, skewed in _SKEWED.items()
            for prior in [(1 / size,) * size if name == "uniform" else skewed]
        ],
        "table": [row for size, budgets in _TABLE.items() for row in _rows(size, budgets)],
    }


def _panel(size: int, name: str, prior: Sequence[float]) -> dict[str, Any]:
    """One number of slices under one prior; depths are means over as many requests as there are slices."""

    def point(stages: Sequence[tuple[int, ...]]) -> dict[str, float]:
        return {"work": work_of(stages, size), "depth": expected_depth(stages, size, prior, horizon=size)}

    rules = {}
    for rule in _RULES:
        found = [select_sequences(size, budget, rule, list(prior), size) for budget in range(1, size + 1)]
        rules[rule] = {
            "published": [point(stages_of(sequences)) for sequences in found],
            "without_idle": [point(family_of(sequences)) for sequences in found],
        }
    chain, whole = work_of(stages_of([range(size)]), size), work_of(lattice(size), size)
    amounts = np.geomspace(chain, whole, _AMOUNTS).tolist()
    # The ends are exact, whatever their logarithms were rounded to.
    amounts[0], amounts[-1] = chain, whole
    return {
        "num_slices": size,
        "name": name,
        "prior": list(prior),
        "horizon": size,
        "rules": rules,
        "families": [point(best_family(size, work, prior, horizon=size)) for work in amounts],
        "lattice": point(lattice(size)),
    }


# The table


def _rows(size: int, budgets: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for budget in budgets:
        sequences = select_sequences(size, budget)
        rows += [
            _row(f"cyclic, B = {budget}, as published", stages_of(sequences), size),
            _row(f"cyclic, B = {budget}, without idle stages", family_of(sequences), size),
        ]
        rows.append(_row("the best family for that work", best_family(size, rows[-2]["work"], horizon=size), size))
    if size <= _MOST_SEQUENCES:
        every = stages_of(select_sequences(size, math.factorial(size)))
        rows.append(_row(f"all {math.factorial(size)} sequences, prefixes shared", every, size))
    return [*rows, _row("lattice", lattice(size), size)]


def _row(plan: str, stages: Sequence[tuple[int, ...]], size: int) -> dict[str, Any]:
    return {
        "num_slices": size,
        "plan": plan,
        "stages": len(stages),
        "work": work_of(stages, size),
        "depths": _depths_by_hits(stages, size),
        "expected_depth": expected_depth(stages, size, horizon=size),
    }


def _depths_by_hits(stages: Sequence[tuple[int, ...]], size: int) -> list[float]:
    """The mean depth over all sets of 0, 1, 2, ... slices that may be hit; once all are hit nothing serves."""
    depths = depths_of_hit_sets(stages, size)
    counts = np.array([state.bit_count() for state in range(1 << size)])
    return [float(depths[counts == hits].mean()) for hits in range(size)]
