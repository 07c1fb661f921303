"""The sequences that a shard trains: every rule of METHOD section 2, and what is promised of each."""

import itertools
import json
import math
import random
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_s3t.config import SEQUENCE_SELECTIONS, S3TConfig
from hf_s3t.errors import ConfigError
from hf_s3t.plan import Plan
from hf_s3t.sequences.optimal import mean_depth_weights
from hf_s3t.sequences.rules import check_sequences, mean_edit_distance, score, select_sequences


CYCLIC = ("cyclic", "cyclic-paper")
UP_TO_L = ("bms", "sorted-cyclic")
FIGURE_4 = [0.4, 0.3, 0.2, 0.1]


def priors(size: int):
    """Priors with ties, zeros and certainties among them."""
    counts = st.lists(st.integers(0, 12), min_size=size, max_size=size).filter(any)
    return counts.map(lambda c: [n / sum(c) for n in c])


@st.composite
def requests(draw, methods=SEQUENCE_SELECTIONS, most_slices=5):
    method = draw(st.sampled_from(methods))
    size = draw(st.integers(1, most_slices))
    budget = draw(st.integers(1, size if method in UP_TO_L else math.factorial(size)))
    return dict(num_slices=size, budget=budget, method=method, prior=draw(priors(size)), seed=draw(st.integers(0, 99)))


def sizes_under_siblings(sequences):
    """For every prefix of some sequence: how many sequences go on with each of the slices that could follow."""
    size = len(sequences[0])
    for depth in range(size):
        counts = Counter(sequence[: depth + 1] for sequence in sequences)
        for prefix in {sequence[:depth] for sequence in sequences}:
            yield [counts[(*prefix, s)] for s in range(size) if s not in prefix]


class TestEveryMethod:
    @given(requests())
    def test_gives_distinct_permutations(self, request_):
        sequences = select_sequences(**request_)
        assert len(sequences) == len(set(sequences)) == request_["budget"]
        assert all(sorted(sequence) == list(range(request_["num_slices"])) for sequence in sequences)
        assert all(type(s) is int for sequence in sequences for s in sequence)

    @given(requests(most_slices=4))
    @settings(max_examples=40)
    def test_depends_on_its_arguments_alone(self, request_):
        state, legacy_state = random.getstate(), np.random.get_state()[1].tolist()
        first = select_sequences(**request_)
        assert select_sequences(**request_) == first
        assert (random.getstate(), np.random.get_state()[1].tolist()) == (state, legacy_state)

    def test_is_the_same_in_another_process(self):
        code = (
            "import json; from hf_s3t.sequences.rules import select_sequences as s; p = [0.1, 0.2, 0.3, 0.15, 0.25];"
            f"print(json.dumps([s(5, 5, m, p) for m in {SEQUENCE_SELECTIONS!r}]))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        here = [select_sequences(5, 5, method, [0.1, 0.2, 0.3, 0.15, 0.25]) for method in SEQUENCE_SELECTIONS]
        assert [[tuple(q) for q in sequences] for sequences in json.loads(done.stdout)] == here

    def test_is_the_same_in_every_version(self):
        # The sequences name the folders of trained stages: a change here would orphan them.
        assert select_sequences(4, 3, "random", seed=1) == [(0, 3, 2, 1), (1, 0, 2, 3), (1, 0, 3, 2)]
        drawn = select_sequences(4, 7, "conditional", FIGURE_4, seed=1)[4:]
        assert drawn == [(1, 2, 3, 0), (3, 2, 0, 1), (2, 3, 1, 0)]

    @pytest.mark.parametrize("method", [m for m in SEQUENCE_SELECTIONS if m not in UP_TO_L])
    def test_can_give_all_permutations(self, method):
        prior = [0.5, 0.3, 0.2, 0.0, 0.0]
        assert set(select_sequences(5, 120, method, prior)) == set(itertools.permutations(range(5)))

    @pytest.mark.parametrize(
        "method, size, budget",
        [
            ("cyclic", 64, 5000),
            ("cyclic-paper", 20, 5000),
            ("random", 64, 5000),
            ("random", 7, 5040),
            ("random", 7, 5039),
            ("conditional", 7, 5039),
            ("conditional", 30, 60),
            ("bms", 32, 32),
        ],
    )
    def test_never_lists_all_permutations_to_find_some(self, method, size, budget):
        prior = np.random.default_rng(0).dirichlet(np.ones(size))
        start = time.perf_counter()
        assert len(set(select_sequences(size, budget, method, prior))) == budget
        assert time.perf_counter() - start < 10


class TestCyclic:
    @given(st.integers(1, 40).flatmap(lambda size: st.tuples(st.just(size), st.integers(1, size))))
    def test_first_slices_are_spaced_evenly(self, case):
        size, budget = case
        sequences = select_sequences(size, budget)
        assert [sequence[0] for sequence in sequences] == [k * size // budget for k in range(budget)]
        assert all((b - a) % size == 1 % size for q in sequences for a, b in itertools.pairwise(q))

    def test_the_papers_are_the_first_right_rotations(self):
        rotations = [(0, 1, 2, 3), (3, 0, 1, 2), (2, 3, 0, 1), (1, 2, 3, 0)]
        for budget in range(1, 5):
            assert select_sequences(4, budget, "cyclic-paper") == rotations[:budget]

    @given(requests(CYCLIC, most_slices=6))
    @settings(max_examples=60)
    def test_numbers_under_sibling_prefixes_differ_by_at_most_one(self, request_):
        for counts in sizes_under_siblings(select_sequences(**request_)):
            assert max(counts) - min(counts) <= 1

    @pytest.mark.parametrize("method", CYCLIC)
    @pytest.mark.parametrize("budget", range(1, 25))
    def test_numbers_under_sibling_prefixes_differ_by_at_most_one_at_four_slices(self, method, budget):
        for counts in sizes_under_siblings(select_sequences(4, budget, method)):
            assert max(counts) - min(counts) <= 1

    @pytest.mark.parametrize("method", CYCLIC)
    @pytest.mark.parametrize("budget", [6, 7, 24, 100, 720])
    def test_larger_budgets_begin_with_the_rotations(self, method, budget):
        assert select_sequences(6, budget, method)[:6] == select_sequences(6, 6, method)

    @given(st.integers(2, 12), st.sampled_from(CYCLIC))
    def test_up_to_l_sequences_differ_everywhere(self, size, method):
        assert mean_edit_distance(select_sequences(size, size, method)) == size


class TestMatching:
    def test_the_papers_figure_4(self):
        papers = {(0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0)}
        assert set(select_sequences(4, 4, "bms", FIGURE_4)) == papers

    @given(st.integers(1, 7).flatmap(priors), st.integers(0, 100_000))
    @settings(max_examples=50)
    def test_no_slice_twice_at_one_position(self, prior, horizon):  # Lemma 3
        sequences = select_sequences(len(prior), len(prior), "bms", prior, horizon)
        assert all(len(set(column)) == len(prior) for column in zip(*sequences))

    @given(priors(4), st.sampled_from([1, 2, 10, 100]))
    def test_every_position_is_a_matching_of_greatest_total_score(self, prior, horizon):
        sequences = sorted(select_sequences(4, 4, "bms", prior, horizon))
        for depth in range(1, 4):
            prefixes = [sequence[:depth] for sequence in sequences]
            extensions = [
                [(*q, s) for q, s in zip(prefixes, slices)]
                for slices in itertools.permutations(range(4))
                if all(s not in q for q, s in zip(prefixes, slices))
            ]
            best = max(sum(score(q, prior, horizon) for q in extension) for extension in extensions)
            chosen = sum(score(sequence[: depth + 1], prior, horizon) for sequence in sequences)
            assert chosen == pytest.approx(best, rel=1e-9)

    def test_ties_go_to_the_lowest_slices(self):
        expected = [(0, 1, 2, 3, 4), (1, 0, 3, 4, 2), (2, 3, 4, 1, 0), (3, 4, 0, 2, 1), (4, 2, 1, 0, 3)]
        assert select_sequences(5, 5, "bms", [0.2] * 5) == expected

    def test_rounding_does_not_break_ties(self):
        # The same prior up to the last bits, as another platform or a sum in another order would give it.
        base = [0.1, 0.1, 0.2, 0.2, 0.2, 0.2]
        shaken = [p * (1 + (-1) ** i * 4e-16) for i, p in enumerate(base)]
        assert select_sequences(6, 6, "bms", shaken) == select_sequences(6, 6, "bms", base)

    @given(priors(5), st.integers(1, 5))
    @settings(max_examples=30)
    def test_a_smaller_budget_keeps_the_highest_scores(self, prior, budget):
        every = select_sequences(5, 5, "bms", prior)
        chosen = select_sequences(5, budget, "bms", prior)
        assert chosen == every[:budget]
        scores = [score(sequence, prior, 100) for sequence in every]
        assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(scores))

    def test_scores_too_small_for_a_float_are_decided_by_shorter_horizons(self):
        assert score((0, 1, 2, 3), FIGURE_4, 10**6) == 0.0
        assert select_sequences(4, 4, "bms", FIGURE_4, 10**6) == select_sequences(4, 4, "bms", FIGURE_4)

    @given(st.integers(2, 6).flatmap(priors))
    @settings(max_examples=30)
    def test_scores_no_worse_than_sorted_cyclic_after_the_first_pair(self, prior):  # Figure 15, two positions
        def total(method):
            return sum(score(q[:2], prior, 100) for q in select_sequences(len(prior), len(prior), method, prior))

        assert total("bms") >= total("sorted-cyclic") * (1 - 1e-9)

    def test_sequences_differ_everywhere_and_score_above_random(self):  # Figure 8, right
        rng = np.random.default_rng(0)
        for _ in range(10):
            prior = rng.dirichlet(np.ones(5)).tolist()
            matched = select_sequences(5, 5, "bms", prior)
            assert mean_edit_distance(matched) == 5
            # What random sequences score on average: the mean over all permutations.
            by_chance = np.mean([score(q, prior, 100) for q in itertools.permutations(range(5))])
            assert np.mean([score(q, prior, 100) for q in matched]) > by_chance


def depth_after_hits(sequences, hit) -> int:
    """What the shard serves: the longest prefix of any sequence without a hit slice."""
    return max(next((i for i, s in enumerate(q) if s in hit), len(q)) for q in sequences)


def mean_depth(sequences, prior, horizon) -> float:
    """The mean depth over the first requests, one request at a time over the sets of slices hit so far."""
    chance, total = {frozenset(): 1.0}, 0.0
    for _ in range(horizon):
        after = Counter()
        for hit, weight in chance.items():
            for s, p in enumerate(prior):
                after[hit | {s}] += weight * p
        chance = after
        total += sum(weight * depth_after_hits(sequences, hit) for hit, weight in chance.items())
    return total / horizon


class TestOptimal:
    @pytest.mark.parametrize("size, budget", [(3, 2), (4, 1), (4, 2), (4, 3)])
    @pytest.mark.parametrize("horizon", [2, 12])
    def test_no_set_of_sequences_is_deeper(self, size, budget, horizon):
        for prior in ([1 / size] * size, np.random.default_rng(size).dirichlet(np.ones(size)).tolist()):
            weights = mean_depth_weights(prior, horizon)
            masks = [{s for s in range(size) if mask >> s & 1} for mask in range(1 << size)]
            table = {
                q: np.array([depth_after_hits([q], hit) for hit in masks]) for q in itertools.permutations(range(size))
            }

            def value(sequences, weights=weights, table=table):
                return weights @ np.max([table[q] for q in sequences], axis=0) / horizon

            best = max(map(value, itertools.combinations(table, budget)))
            found = select_sequences(size, budget, "optimal", prior, horizon)
            assert value(found) == pytest.approx(best, rel=1e-9)
            assert value(found) == pytest.approx(mean_depth(found, prior, horizon), rel=1e-12)

    @given(st.integers(2, 6).flatmap(priors), st.integers(1, 20))
    @settings(max_examples=15)
    def test_is_as_deep_as_every_other_rule(self, prior, horizon):
        size = len(prior)
        budget = max(1, size - 1)
        found = mean_depth(select_sequences(size, budget, "optimal", prior, horizon), prior, horizon)
        for method in ("cyclic", "bms", "sorted-cyclic"):
            others = select_sequences(size, budget, method, prior, horizon)
            assert found >= mean_depth(others, prior, horizon) * (1 - 1e-9)

    def test_one_sequence_takes_the_safest_slices_first(self):
        assert select_sequences(4, 1, "optimal", FIGURE_4) == [(3, 2, 1, 0)]

    def test_gains_over_the_other_rules(self):
        prior = [0.02, 0.03, 0.05, 0.1, 0.2, 0.6]
        deep = {m: mean_depth(select_sequences(6, 4, m, prior), prior, 20) for m in ("cyclic", "bms", "optimal")}
        assert deep["optimal"] > 1.02 * max(deep["cyclic"], deep["bms"])

    def test_without_a_prior_it_is_uniform(self):
        assert select_sequences(5, 4, "optimal") == select_sequences(5, 4, "optimal", [0.2] * 5)

    def test_beyond_what_helps_it_makes_up_the_number(self):
        found = select_sequences(4, 20, "optimal")
        # Symmetric chains cover all sets of slices by 6 sequences: with more, nothing can be deeper.
        assert mean_depth(found, [0.25] * 4, 5) == pytest.approx(
            mean_depth(list(itertools.permutations(range(4))), [0.25] * 4, 5)
        )

    @pytest.mark.parametrize("horizon", [0, 1, 10**9])
    def test_takes_any_horizon(self, horizon):
        prior = [0.5, 0.3, 0.2, 0.0, 0.0]
        assert len(set(select_sequences(5, 3, "optimal", prior, horizon))) == 3

    @pytest.mark.parametrize("horizon", [0, 1, 2, 7, 30])
    def test_its_weights_are_those_of_one_request_at_a_time(self, horizon):
        chance, expected = np.eye(16)[0], np.zeros(16)
        for _ in range(horizon):
            after = np.zeros(16)
            for state, s in itertools.product(range(16), range(4)):
                after[state | 1 << s] += chance[state] * FIGURE_4[s]
            chance = after
            expected += chance
        assert mean_depth_weights(FIGURE_4, horizon) == pytest.approx(expected, rel=1e-12)

    def test_a_config_takes_it_and_refuses_too_many_slices(self):
        plan = Plan.from_config(S3TConfig(num_slices=4, sequence_selection="optimal", keep_idle=True))
        assert plan.sequences == (tuple(select_sequences(4, 4, "optimal")),)
        with pytest.raises(ConfigError, match="at most 8 slices, got num_slices=9"):
            S3TConfig(num_slices=9, sequence_selection="optimal")


class TestSortedCyclic:
    def test_rotates_the_slices_sorted_by_probability(self):
        assert select_sequences(4, 4, "sorted-cyclic", FIGURE_4) == [
            (3, 2, 1, 0),
            (2, 1, 0, 3),
            (1, 0, 3, 2),
            (0, 3, 2, 1),
        ]


class TestConditional:
    @given(requests(("conditional",)))
    @settings(max_examples=30)
    def test_begins_with_the_matched_sequences(self, request_):
        size, budget = request_["num_slices"], min(request_["num_slices"], request_["budget"])
        matched = select_sequences(size, budget, "bms", request_["prior"])
        assert select_sequences(**request_)[:budget] == matched

    def test_likely_slices_come_late(self):
        prior = [0.05, 0.1, 0.15, 0.2, 0.2, 0.3]
        drawn = select_sequences(6, 106, "conditional", prior)[6:]
        places = [np.mean([sequence.index(s) for sequence in drawn]) for s in range(6)]
        assert places[0] < places[1] < places[2] < min(places[3:5])
        assert max(places[3:5]) < places[5]

    def test_draws_are_those_of_dropping_repeats(self):
        # The chance of a permutation is that of drawing its slices from last to first with the prior's weights;
        # given that it is none of the matched three, its share among the others.
        prior = [0.6, 0.3, 0.1]
        matched = set(select_sequences(3, 3, "bms", prior))
        chance = {q: prior[q[2]] * prior[q[1]] / (1 - prior[q[2]]) for q in itertools.permutations(range(3))}
        assert math.fsum(chance.values()) == pytest.approx(1)
        others = {q: p for q, p in chance.items() if q not in matched}
        runs = 800
        seen = Counter(select_sequences(3, 4, "conditional", prior, seed=seed)[3] for seed in range(runs))
        for sequence, weight in others.items():
            share = weight / sum(others.values())
            assert abs(seen[sequence] / runs - share) < 4 * math.sqrt(share / runs) + 1e-9

    def test_seeds_differ(self):
        assert len({tuple(select_sequences(6, 20, "conditional", [1 / 6] * 6, seed=s)) for s in range(5)}) == 5


class TestRandom:
    @pytest.mark.parametrize("budget", [2, 5])  # by rejection, and by shuffling all of them
    def test_permutations_are_equally_likely(self, budget):
        runs = 1200
        seen = Counter(q for seed in range(runs) for q in select_sequences(3, budget, "random", seed=seed))
        expected = runs * budget / 6
        assert len(seen) == 6
        assert all(abs(count - expected) < 4.5 * math.sqrt(expected) for count in seen.values())

    def test_seeds_differ(self):
        assert len({tuple(select_sequences(6, 6, "random", seed=s)) for s in range(5)}) == 5


class TestScore:
    def test_is_the_sum_of_the_paper(self):
        expected = 1 * 0.8**3 + 2 * 0.5**3 + 3 * 0.0**3
        assert score((2, 1, 0), [0.5, 0.3, 0.2], 3) == pytest.approx(expected)

    @given(st.permutations(range(5)), priors(5), st.integers(1, 50))
    def test_agrees_with_its_definition(self, sequence, prior, horizon):
        unhit = 1 - np.cumsum([prior[s] for s in sequence])
        expected = sum(i * max(0.0, left) ** horizon for i, left in enumerate(unhit, start=1))
        assert score(sequence, prior, horizon) == pytest.approx(expected, rel=1e-6, abs=1e-12)

    def test_safe_slices_first_scores_highest(self):
        best = max(itertools.permutations(range(4)), key=lambda q: score(q, FIGURE_4, 20))
        assert best == (3, 2, 1, 0)

    @pytest.mark.parametrize(
        "sequence, prior, horizon",
        [((0, 0), [0.5, 0.5], 1), ((0, 2), [0.5, 0.5], 1), ((0, 1), [0.5, 0.6], 1), ((0, 1), [0.5, 0.5], -1)],
    )
    def test_refuses_wrong_input(self, sequence, prior, horizon):
        with pytest.raises(ConfigError):
            score(sequence, prior, horizon)


class TestEditDistance:
    @given(st.lists(st.permutations(range(4)).map(tuple), min_size=2, max_size=12, unique=True))
    def test_is_the_mean_over_pairs(self, sequences):
        pairs = [sum(a != b for a, b in zip(p, q)) for p, q in itertools.combinations(sequences, 2)]
        assert mean_edit_distance(sequences) == pytest.approx(np.mean(pairs))

    def test_repeats_count_once(self):
        assert mean_edit_distance([(0, 1), (0, 1), (1, 0)]) == 2.0

    def test_one_sequence_has_no_pair(self):
        assert mean_edit_distance([(0, 1)]) == 0.0


class TestWrongInput:
    @pytest.mark.parametrize(
        "arguments, says",
        [
            (dict(num_slices=0, budget=1), "`num_slices` must be an integer of at least 1, got 0"),
            (dict(num_slices=4, budget=0), "`budget` must be"),
            (dict(num_slices=4.0, budget=1), "`num_slices` must be"),
            (dict(num_slices=4, budget=True), "`budget` must be"),
            (dict(num_slices=4, budget=1, method="spiral"), "`method` must be one of cyclic"),
            (dict(num_slices=4, budget=1, seed=None), "`seed` must be"),
            (dict(num_slices=4, budget=1, horizon=-1), "`horizon` must be"),
            (dict(num_slices=4, budget=25), "only 24 permutations.*Lower the budget"),
            (dict(num_slices=3, budget=7, method="conditional", prior=[0.2, 0.3, 0.5]), "only 6 permutations"),
            (dict(num_slices=4, budget=5, method="bms", prior=FIGURE_4), "at most num_slices=4"),
            (dict(num_slices=4, budget=5, method="sorted-cyclic", prior=FIGURE_4), "at most num_slices=4"),
            (dict(num_slices=9, budget=4, method="optimal"), "num_slices=9.*at most 8 slices. Use"),
            (dict(num_slices=4, budget=4, method="bms"), "needs the probability of each slice"),
            (dict(num_slices=3, budget=3, method="bms", prior=FIGURE_4), "has 4 values"),
            (dict(num_slices=2, budget=2, method="bms", prior=[0.5, 0.6]), "sums to 1.1"),
        ],
    )
    def test_selection_says_what_is_wrong(self, arguments, says):
        with pytest.raises(ConfigError, match=says):
            select_sequences(**arguments)

    @pytest.mark.parametrize(
        "sequences", [[], [()], 3, [0, 1], [(0, 0)], [(0, 1), (0, 1, 2)], [(0, 2)], [(1, 2)], [(0.0, 1.0)], ["01"]]
    )
    def test_sequences_must_be_permutations_of_the_same_slices(self, sequences):
        with pytest.raises(ConfigError):
            check_sequences(sequences)

    def test_arrays_become_plain_tuples(self):
        checked = check_sequences(np.array([[1, 0], [0, 1]]), num_slices=2)
        assert checked == [(1, 0), (0, 1)]
        assert type(checked[0][0]) is int
