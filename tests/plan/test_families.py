"""Families of stages: what idle stages are, the lattice, and the best family for some work."""

import functools
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_s3t.errors import ConfigError
from hf_s3t.sequences.families import (
    best_family,
    depths_of_hit_sets,
    expected_depth,
    family_of,
    lattice,
    stage_work,
    stages_of,
    work_of,
)
from hf_s3t.sequences.rules import select_sequences
from hf_s3t.sequences.worth import Outlook


PRIOR = [0.4, 0.3, 0.2, 0.1]
RULES = ("cyclic", "cyclic-paper", "bms", "conditional", "random", "sorted-cyclic", "optimal")


def prior_of(size: int) -> list[float]:
    """A prior in which no two slices are alike."""
    return [2 * (i + 1) / (size * (size + 1)) for i in range(size)]


def served(stages, hits) -> int:
    """The slow, obviously right way: the deepest stage none of whose slices was hit."""
    return max((len(stage) for stage in stages if not set(stage) & set(hits)), default=0)


def hit_sets(size: int):
    return [hits for count in range(size + 1) for hits in itertools.combinations(range(size), count)]


def mean_depths(stages, size: int) -> list[float]:
    """The mean depth after 0, 1, 2, ... distinct hits; the last, after which nothing is left, not among them."""
    return [
        float(np.mean([served(stages, hits) for hits in itertools.combinations(range(size), count)]))
        for count in range(size)
    ]


def published(size: int):
    return stages_of(select_sequences(size, size))


# What the page "beyond the paper" says

TABLE = [
    ("as published", 4, published(4), 16, 8.75, [4, 3, 1.67, 1]),
    ("without idle stages", 4, family_of(published(4)), 13, 5.75, [4, 3, 1.67, 1]),
    ("all sequences", 4, stages_of(itertools.permutations(range(4))), 64, 44.88, [4, 3, 2, 1]),
    ("lattice", 4, lattice(4), 15, 6.50, [4, 3, 2, 1]),
    ("all sequences", 3, stages_of(itertools.permutations(range(3))), 15, 10.00, [3, 2, 1]),
    ("lattice", 3, lattice(3), 7, 3.33, [3, 2, 1]),
    ("all sequences", 5, stages_of(itertools.permutations(range(5))), 325, 241.4, [5, 4, 3, 2, 1]),
    ("lattice", 5, lattice(5), 31, 12.80, [5, 4, 3, 2, 1]),
    ("as published", 6, published(6), 36, 18.08, [6, 5, 3.2, 2.2, 1.4, 1]),
    ("without idle stages", 6, family_of(published(6)), 31, 13.08, [6, 5, 3.2, 2.2, 1.4, 1]),
    ("lattice", 6, lattice(6), 63, 25.33, [6, 5, 4, 3, 2, 1]),
    ("as published", 8, published(8), 64, 30.75, [8, 7, 4.71, 3.43, 2.54, 1.86, 1.29, 1]),
    ("without idle stages", 8, family_of(published(8)), 57, 23.75, [8, 7, 4.71, 3.43, 2.54, 1.86, 1.29, 1]),
    ("lattice", 8, lattice(8), 255, 100.0, [8, 7, 6, 5, 4, 3, 2, 1]),
]


@pytest.mark.parametrize(
    ("size", "stages", "count", "work", "depths"),
    [row[1:] for row in TABLE],
    ids=[f"{row[0]}-{row[1]}" for row in TABLE],
)
def test_stages_work_and_depth_are_those_of_the_table(size, stages, count, work, depths):
    assert len(stages) == count
    assert work_of(stages, size) == pytest.approx(work, abs=0.051 if work > 200 else 0.0051)
    assert mean_depths(stages, size) == pytest.approx(depths, abs=0.0051)


@pytest.mark.parametrize(("replay", "chain"), [(1.0, 2.19), (0.5, 1.50), (0.25, 1.16), (0.0, 0.81)])
def test_a_chain_costs_less_with_less_replay(replay, chain):
    assert work_of(stages_of([(0, 1, 2, 3)]), 4, replay) == pytest.approx(chain, abs=0.0051)


# Idle stages


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("size", [2, 3, 4, 5, 6])
def test_without_idle_stages_every_pattern_of_hits_is_served_as_deep(rule, size):
    most = size if rule in ("bms", "sorted-cyclic") else min(math.factorial(size), size + 3)
    for budget in {1, 2, size, most} - {b for b in (1, 2) if b > most}:
        stages = stages_of(select_sequences(size, budget, rule, prior_of(size), 5))
        family = family_of(stages)
        assert {frozenset(stage) for stage in family} == {frozenset(stage) for stage in stages}
        assert all(served(family, hits) == served(stages, hits) for hits in hit_sets(size))


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_the_lattice_serves_what_all_sequences_serve(size):
    every = stages_of(itertools.permutations(range(size)))
    assert all(served(lattice(size), hits) == served(every, hits) == size - len(hits) for hits in hit_sets(size))


def is_family(stages) -> bool:
    """Parents come before their children, and no set comes twice."""
    before = {()}
    for stage in stages:
        if stage[:-1] not in before:
            return False
        before.add(stage)
    return len({frozenset(stage) for stage in stages}) == len(stages)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_family_is_a_tree_of_parents_with_each_set_once(data):
    size = data.draw(st.integers(2, 5))
    permutations = st.permutations(range(size)).flatmap(lambda p: st.integers(1, size).map(lambda n: tuple(p[:n])))
    sequences = data.draw(st.lists(permutations, min_size=1, max_size=6))
    family = family_of(sequences)
    assert is_family(family)
    assert all(served(family, hits) == served(stages_of(sequences), hits) for hits in hit_sets(size))
    assert is_family(Outlook(size).order(family)) and set(Outlook(size).order(family)) == set(family)


def test_depths_by_bit_masks_are_those_of_the_slow_way():
    family = family_of([(0, 1, 2, 3), (2, 1), (3, 1, 0)])
    by_mask = {sum(1 << s for s in hits): served(family, hits) for hits in hit_sets(4)}
    assert depths_of_hit_sets(family, 4).tolist() == [by_mask[mask] for mask in range(16)]


def test_the_expected_depth_is_the_mean_over_all_streams_of_requests():
    family, horizon = family_of([(0, 1, 2), (2, 1)]), 3
    prior = [0.5, 0.3, 0.2]
    streams = itertools.product(range(3), repeat=horizon)
    by_hand = sum(
        math.prod(prior[s] for s in stream) * sum(served(family, stream[:t]) for t in range(1, horizon + 1)) / horizon
        for stream in streams
    )
    assert expected_depth(family, 3, prior, horizon) == pytest.approx(by_hand, rel=1e-12)


# The best family for some work


@functools.cache
def all_families(size: int):
    """Every family with one chain to full depth: its sets, and the depth that it serves for every pattern of hits."""
    sets = [frozenset(c) for n in range(1, size + 1) for c in itertools.combinations(range(size), n)]
    found = []
    for chosen in itertools.product((False, True), repeat=len(sets) - 1):
        family = {frozenset()} | {s for s, is_in in zip(sets, (*chosen, True), strict=True) if is_in}
        if all(not s or any(s - {x} in family for x in s) for s in family):
            family.remove(frozenset())
            found.append((family, [served(family, hits) for hits in hit_sets(size)]))
    return found


def value_of(depths, prior, horizon) -> float:
    """The mean depth over the first requests, from how likely each pattern of hits is after each of them."""
    chance, total = {frozenset(): 1.0}, 0.0
    by_hits = {frozenset(hits): depth for hits, depth in zip(hit_sets(len(prior)), depths, strict=True)}
    for _ in range(horizon):
        after: dict[frozenset, float] = {}
        for hits, probability in chance.items():
            for s, p in enumerate(prior):
                after[hits | {s}] = after.get(hits | {s}, 0.0) + probability * p
        chance = after
        total += sum(probability * by_hits[hits] for hits, probability in chance.items())
    return total / horizon


@pytest.mark.parametrize("replay", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    ("prior", "horizon"),
    [([0.5, 0.5], 2), ([0.9, 0.1], 4), ([1 / 3] * 3, 3), ([0.6, 0.4, 0.0], 5), (PRIOR, 4), ([0.25] * 4, 8)],
    ids=str,
)
def test_it_is_the_best_of_all_of_up_to_four_slices(prior, horizon, replay):
    size = len(prior)
    weights = np.array([value_of(np.eye(2**size)[i], prior, horizon) for i in range(2**size)])
    families = all_families(size)
    values = np.array([depths for _, depths in families]) @ weights
    works = np.array([work_of(map(tuple, family), size, replay) for family, _ in families])
    for budget in np.linspace(works.min(), works.max() + 0.1, 7):
        found = best_family(size, float(budget), prior, horizon, replay)
        assert is_family(found) and work_of(found, size, replay) <= budget + 1e-9
        assert expected_depth(found, size, prior, horizon) == pytest.approx(
            values[works <= budget + 1e-9].max(), rel=1e-9
        )


@pytest.mark.parametrize("size", [5, pytest.param(6, marks=pytest.mark.slow), pytest.param(8, marks=pytest.mark.slow)])
def test_it_is_never_worse_than_what_a_rule_plans_for_no_more(size):
    prior = prior_of(size)
    for budget in (2, size):
        for rule in ("cyclic", "bms", "optimal"):
            family = family_of(select_sequences(size, budget, rule, prior, size))
            work = work_of(family, size)
            found = best_family(size, work, prior, size)
            assert is_family(found) and work_of(found, size) <= work + 1e-9
            assert max(map(len, found)) == size
            assert expected_depth(found, size, prior, size) >= expected_depth(family, size, prior, size) - 1e-12


@pytest.mark.parametrize(("size", "budget", "least"), [(6, 6, 3.09), pytest.param(8, 4, 3.54, marks=pytest.mark.slow)])
def test_for_the_work_of_the_published_plan_it_serves_deeper(size, budget, least):
    sequences = select_sequences(size, budget)
    work = work_of(stages_of(sequences), size)
    found = expected_depth(best_family(size, work, None, size), size, None, size)
    assert found > least > expected_depth(sequences, size, None, size) + 0.3


def test_all_sets_are_taken_where_they_are_paid_for():
    assert set(best_family(4, 6.5)) == set(best_family(4, 1e9)) and len(best_family(4, 1e9)) == 15
    assert {frozenset(stage) for stage in best_family(4, 6.5)} == {frozenset(stage) for stage in lattice(4)}
    assert len(best_family(4, 2.5)) < 15


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (4, 2.0),
            "work_budget=2, but one chain of stages with num_slices=4 costs 2.1875 at replay=1.*Give at least so",
        ),
        ((11, 9.0), "num_slices=11.*at most 10 slices"),
        ((4, 9.0, None, 100, 1.5), "`replay` must be a number from 0 to 1, got 1.5"),
        ((4, float("nan")), "`work_budget` must be a number"),
        ((4, 9.0, [0.5, 0.5]), "has 2 values, expected num_slices=4"),
    ],
)
def test_what_cannot_be_searched_is_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        best_family(*arguments)


def test_the_least_that_works_works():
    least = work_of(stages_of([range(4)]), 4)
    assert len(best_family(4, least)) == 4 and least == sum(stage_work(depth, 4) for depth in range(1, 5))
