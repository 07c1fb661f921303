"""Deletion rate and retention: the numbers of METHOD section 3, exact against simulated, and the special cases."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad

from hf_s3t.analysis import (
    deletion_rate,
    deletion_rate_paper,
    expected_deletions_left,
    expected_depth,
    retention,
    retention_paper,
    retention_random,
    simulate_deletions,
    simulate_depths,
)
from hf_s3t.errors import ConfigError
from hf_s3t.sequences import select_sequences
from hf_s3t.sequences.families import family_of, lattice


UNTIL = ("exhausted", "first_shard")
SKEWED = [0.4, 0.3, 0.2, 0.1]


def harmonic(n: int) -> float:
    return math.fsum(1 / k for k in range(1, n + 1))


def priors(size: int):
    counts = st.lists(st.integers(1, 30), min_size=size, max_size=size)
    return counts.map(lambda c: [n / sum(c) for n in c])


def request_by_request(first_slices, num_slices, until, rng) -> int:
    """One lifetime, played out as a system lives it."""
    alive = [set(slices) for slices in first_slices]
    ended = all if until == "exhausted" else any
    for request in itertools.count(1):
        alive[rng.integers(len(alive))].discard(int(rng.integers(num_slices)))
        if ended(not slices for slices in alive):
            return request


def assert_mean(sample, expected):
    assert abs(np.mean(sample) - expected) < 4.5 * np.std(sample) / math.sqrt(len(sample)) + 1e-9


class TestDeletionRate:
    @pytest.mark.parametrize(
        "budget, first_shard", [(1, 6.00), (2, 15.19), (3, 22.76), (4, 28.93), (5, 34.10), (6, 38.53)]
    )
    def test_first_dead_shard_of_method_section_3(self, budget, first_shard):
        assert round(deletion_rate(5, 6, budget, until="first_shard"), 2) == first_shard

    def test_exhaustion_of_method_section_3(self):
        rates = [deletion_rate(5, 6, budget) for budget in range(1, 7)]
        assert [round(rate, 1) for rate in rates] == [68.5, 87.9, 99.5, 107.9, 114.5, 119.8]
        assert round(deletion_rate(5, 32, 8)) == 685

    @given(st.integers(1, 8), st.integers(1, 12), st.integers(1, 20))
    def test_lemma_1(self, m, size, budget):
        assert deletion_rate(m, size, budget) == pytest.approx(m * size * harmonic(m * min(budget, size)), rel=1e-12)

    @given(st.integers(1, 5), st.integers(1, 8), st.sampled_from(UNTIL))
    @settings(max_examples=30)
    def test_saturates_at_one_sequence_per_slice(self, m, size, until):
        rates = [deletion_rate(m, size, budget, until=until) for budget in range(1, size + 3)]
        assert all(a < b for a, b in itertools.pairwise(rates[:size]))
        assert rates[size - 1] == rates[size] == rates[size + 1]

    @given(st.integers(1, 4), st.integers(1, 8), st.sampled_from(UNTIL))
    def test_a_uniform_prior_is_no_prior(self, m, size, until):
        uniform = deletion_rate(m, size, size, until=until)
        assert deletion_rate(m, size, size, prior=[1 / size] * size, until=until) == pytest.approx(uniform, rel=1e-12)

    def test_the_integral_meets_the_closed_form(self):
        # A prior that differs from the uniform one in the last digits goes through the integral.
        almost = [0.25 + 1e-12, 0.25 - 1e-12, 0.25, 0.25]
        assert deletion_rate(5, 4, 4, prior=almost) == pytest.approx(20 * harmonic(20), rel=1e-11)

    @given(priors(4), st.integers(1, 3), st.sampled_from(UNTIL))
    @settings(max_examples=30)
    def test_is_the_integral_of_method_section_3(self, prior, m, until):
        def alive(t):
            hit = np.prod([1 - math.exp(-p / m * t) for p in prior])
            return 1 - hit**m if until == "exhausted" else (1 - hit) ** m

        scale = m / min(prior)
        expected = scale * sum(quad(lambda x: alive(scale * x), a, a + 5, limit=200)[0] for a in range(0, 60, 5))
        assert deletion_rate(m, 4, 4, prior=prior, until=until) == pytest.approx(expected, rel=1e-6)

    @given(priors(5))
    def test_is_inclusion_and_exclusion_over_the_slices(self, prior):
        sets = (c for n in range(1, 6) for c in itertools.combinations(prior, n))
        expected = math.fsum((-1) ** (len(c) + 1) / sum(c) for c in sets)
        assert deletion_rate(1, 5, 5, prior=prior) == pytest.approx(expected, rel=1e-10)

    def test_very_different_probabilities_keep_their_digits(self):
        a, b = 1e-9, 0.3
        prior = [a, b, 1 - a - b]
        sequences = [(0, 1, 2), (1, 0, 2)]
        rate = deletion_rate(1, 3, 2, prior=prior, sequences=sequences)
        assert rate == pytest.approx(1 / a + 1 / b - 1 / (a + b), rel=1e-12)

    def test_only_the_first_slices_count(self):
        sequences = [(3, 2, 1, 0), (3, 0, 1, 2)]
        assert deletion_rate(1, 4, 2, sequences=sequences) == pytest.approx(4)
        assert deletion_rate(1, 4, 2, prior=SKEWED, sequences=sequences) == pytest.approx(10)

    def test_families_and_sequences_of_any_length_and_number_count_by_what_they_start_with(self):
        """One stage for each set of slices starts with all of them, as many rotations as slices do."""
        for until in ("exhausted", "first_shard"):
            rate = deletion_rate(3, 4, 4, prior=SKEWED, until=until)
            for sequences in (lattice(4), family_of(select_sequences(4, 4)), [(1,), (0, 2), (3, 2, 1), (2,)]):
                assert deletion_rate(3, 4, prior=SKEWED, sequences=sequences, until=until) == rate
            assert deletion_rate(3, 4, prior=SKEWED, until=until) == rate
        per_shard = [lattice(2), [(1, 0)]]
        assert deletion_rate(2, 2, sequences=per_shard) == pytest.approx(2 * 2 * harmonic(3))
        drawn = simulate_deletions(2, 2, sequences=per_shard, runs=8000)
        assert_mean(drawn, deletion_rate(2, 2, sequences=per_shard))

    def test_shards_can_have_their_own_prior_and_sequences(self):
        rate = deletion_rate(
            2,
            2,
            1,
            prior=[[0.25, 0.75], [0.5, 0.5]],
            sequences=[[(1, 0)], [(0, 1)]],
            until="first_shard",
        )
        assert rate == pytest.approx(1 / (0.75 / 2 + 0.5 / 2))

    def test_arrays_are_welcome(self):
        prior, sequences = np.array([SKEWED, SKEWED]), np.array([[0, 1, 2, 3]])
        assert deletion_rate(2, 4, 1, prior=prior, sequences=sequences) == pytest.approx(3 * 2 / 2 / 0.4)

    def test_safe_first_slices_live_longer(self):
        risky = deletion_rate(5, 4, 2, prior=SKEWED, sequences=[(0, 1, 2, 3), (1, 0, 2, 3)])
        safe = deletion_rate(5, 4, 2, prior=SKEWED, sequences=[(2, 0, 1, 3), (3, 0, 1, 2)])
        assert risky < safe

    def test_the_papers_form_by_name(self):
        assert deletion_rate_paper(5, 32, 8) == 160 * harmonic(40)
        assert deletion_rate_paper(5, 32, 1) == 160 * harmonic(5)  # SISA
        assert deletion_rate_paper(3, 4, 4) == deletion_rate_paper(3, 4, 400) == deletion_rate(3, 4, 400)

    def test_what_is_never_hit_never_dies(self):
        assert deletion_rate(2, 2, 2, prior=[1.0, 0.0]) == math.inf
        one_mortal = [[0.5, 0.5], [1.0, 0.0]]
        assert deletion_rate(2, 2, 2, prior=one_mortal) == math.inf
        assert deletion_rate(2, 2, 2, prior=one_mortal, until="first_shard") == pytest.approx(2 * 3)
        assert deletion_rate(2, 2, 2, prior=[1.0, 0.0], until="first_shard") == math.inf


class TestDeletionsLeft:
    def test_a_new_system_has_its_deletion_rate_left(self):
        for until in UNTIL:
            left = expected_deletions_left([range(3)] * 4, 4, 6, until=until)
            assert left == deletion_rate(4, 6, 3, until=until)

    def test_a_dead_shard_is_the_first(self):
        assert expected_deletions_left([{0}, set()], 2, 4, until="first_shard") == 0.0
        assert expected_deletions_left([{0}, set()], 2, 4) == pytest.approx(8)

    def test_an_exhausted_system_has_none_left(self):
        for until in UNTIL:
            assert expected_deletions_left([set(), set()], 2, 4, until=until) == 0.0

    @given(st.lists(st.sets(st.integers(0, 3)), min_size=3, max_size=3), st.sampled_from(UNTIL))
    @settings(max_examples=40)
    def test_obeys_the_recurrence_over_one_request(self, state, until):
        # left = 1 + mean of what is left after each of the 12 possible requests
        left = expected_deletions_left(state, 3, 4, until=until)
        if left == 0:
            return
        after = [
            expected_deletions_left([s - {hit} if k == shard else s for k, s in enumerate(state)], 3, 4, until=until)
            for shard in range(3)
            for hit in range(4)
        ]
        assert left == pytest.approx(1 + np.mean(after), rel=1e-10)

    @given(priors(3), st.lists(st.sets(st.integers(0, 2)), min_size=2, max_size=2), st.sampled_from(UNTIL))
    @settings(max_examples=30)
    def test_obeys_the_recurrence_with_a_prior(self, prior, state, until):
        def left(sets):
            return expected_deletions_left(sets, 2, 3, prior=prior, until=until)

        now = left(state)
        if now == 0:
            return
        after = math.fsum(
            prior[hit] / 2 * left([s - {hit} if k == shard else s for k, s in enumerate(state)])
            for shard in range(2)
            for hit in range(3)
        )
        assert now == pytest.approx(1 + after, rel=1e-10)


def requests_until(first, sizes, prior, until) -> float:
    """Mean number of deletions until the end, over all orders in which the examples can be deleted."""

    def ended(shards):
        return (all if until == "exhausted" else any)(not alive for alive in shards)

    def left(shards, sizes):
        if ended(shards):
            return 0.0
        weights = [w for shard, row in enumerate(sizes) for w in (n * prior[shard][s] for s, n in enumerate(row))]
        total, mean = math.fsum(weights), 1.0
        for cell, weight in enumerate(weights):
            shard, s = divmod(cell, len(sizes[0]))
            if weight:
                fewer = [[n - ((k, i) == (shard, s)) for i, n in enumerate(row)] for k, row in enumerate(sizes)]
                mean += weight / total * left([a - {s} if k == shard else a for k, a in enumerate(shards)], fewer)
        return mean

    return left([set(alive) for alive in first], sizes)


class TestWithoutReplacement:
    @pytest.mark.parametrize("until", UNTIL)
    @pytest.mark.parametrize("sizes", [[[1, 1], [1, 1]], [[2, 1], [1, 3]], [[1, 2, 2], [2, 1, 1]]])
    def test_is_the_mean_over_all_orders(self, sizes, until):
        size = len(sizes[0])
        ones = [[1.0] * size] * 2
        first = [set(range(size - 1))] * 2 if size > 2 else [{0, 1}] * 2
        sequences = [tuple((s + k) % size for k in range(size)) for s in sorted(first[0])]
        rate = deletion_rate(2, size, len(sequences), sequences=sequences, num_examples=sizes, until=until)
        assert rate == pytest.approx(requests_until(first, sizes, ones, until), rel=1e-10)

    @pytest.mark.parametrize("until", UNTIL)
    def test_is_the_mean_over_all_orders_under_a_prior(self, until):
        sizes, prior = [[2, 1], [1, 3]], [[0.7, 0.3], [0.2, 0.8]]
        share = [[p / n for p, n in zip(*rows)] for rows in zip(prior, sizes)]
        rate = deletion_rate(2, 2, 2, prior=prior, num_examples=sizes, until=until)
        assert rate == pytest.approx(requests_until([{0, 1}] * 2, sizes, share, until), rel=1e-10)

    def test_one_example_a_slice_leaves_no_second_hit(self):
        # Every order is equally likely, and every example must go.
        assert deletion_rate(1, 4, 4, num_examples=4) == pytest.approx(4)
        assert deletion_rate(1, 4, 1, num_examples=4) == pytest.approx(2.5)

    @pytest.mark.parametrize("until", UNTIL)
    def test_many_examples_are_as_good_as_replacement(self, until):
        without = deletion_rate(3, 4, 2, num_examples=12 * 10**7, until=until)
        assert without == pytest.approx(deletion_rate(3, 4, 2, until=until), rel=1e-6)

    def test_few_examples_per_slice_bring_the_rate_down(self):
        # METHOD section 3, simulated there: 484 instead of 685. It matters which slices are larger by one example.
        assert deletion_rate(5, 32, 8, num_examples=1000) == pytest.approx(489.509, abs=1e-3)
        assert deletion_rate(5, 32, 8) == pytest.approx(684.57, abs=5e-3)

    @pytest.mark.parametrize("until", UNTIL)
    @pytest.mark.parametrize("m, size, budget, examples", [(1, 4, 1, 9), (5, 6, 3, 100), (3, 8, 20, 1000)])
    def test_simulation_agrees(self, m, size, budget, examples, until):
        arguments = dict(num_examples=examples, until=until)
        lifetimes = simulate_deletions(m, size, budget, runs=4000, **arguments)
        assert (lifetimes <= examples).all() and (lifetimes == np.round(lifetimes)).all()
        assert_mean(lifetimes, deletion_rate(m, size, budget, **arguments))

    def test_simulation_agrees_under_a_prior(self):
        arguments = dict(num_examples=[[3, 5, 2, 8], [9, 1, 4, 4]], prior=[SKEWED, [0.0, 0.5, 0.25, 0.25]])
        sequences = [select_sequences(4, 2, "bms", SKEWED), [(1, 0, 2, 3), (2, 1, 0, 3)]]
        for until in UNTIL:
            lifetimes = simulate_deletions(2, 4, 2, sequences=sequences, until=until, runs=8000, **arguments)
            assert_mean(lifetimes, deletion_rate(2, 4, 2, sequences=sequences, until=until, **arguments))

    def test_what_is_never_asked_for_never_dies(self):
        assert deletion_rate(2, 2, 2, prior=[1.0, 0.0], num_examples=50) == math.inf
        assert np.isinf(simulate_deletions(2, 2, 2, prior=[1.0, 0.0], num_examples=50, runs=3)).all()


GRID = [(m, size, budget) for m in (1, 3) for size in (2, 5) for budget in (1, 2, size)]


class TestGrid:
    @pytest.mark.parametrize("m, size, budget", GRID)
    @pytest.mark.parametrize("examples", [None, 40])
    @pytest.mark.parametrize("skew", [False, True])
    def test_exact_and_simulated_agree(self, m, size, budget, examples, skew):
        arguments = dict(num_examples=examples)
        if skew:
            prior = [2.0**k / (2.0**size - 1) for k in range(size)]
            arguments.update(prior=prior, sequences=select_sequences(size, budget, "bms", prior))
        for until in UNTIL:
            lifetimes = simulate_deletions(m, size, budget, until=until, runs=3000, seed=7, **arguments)
            assert_mean(lifetimes, deletion_rate(m, size, budget, until=until, **arguments))


class TestSimulation:
    @pytest.mark.parametrize("until", UNTIL)
    @pytest.mark.parametrize("m, size, budget", [(1, 4, 1), (5, 6, 3), (3, 8, 20)])
    def test_agrees_with_the_exact_rate(self, m, size, budget, until):
        lifetimes = simulate_deletions(m, size, budget, until=until, runs=4000)
        assert_mean(lifetimes, deletion_rate(m, size, budget, until=until))

    @pytest.mark.parametrize("until", UNTIL)
    def test_agrees_under_a_prior(self, until):
        settings_ = dict(
            prior=[SKEWED, SKEWED[::-1]],
            sequences=[select_sequences(4, 2, "bms", p) for p in (SKEWED, SKEWED[::-1])],
            until=until,
        )
        assert_mean(simulate_deletions(2, 4, 2, runs=4000, **settings_), deletion_rate(2, 4, 2, **settings_))

    @pytest.mark.parametrize("until", UNTIL)
    def test_lifetimes_are_those_of_a_system_played_request_by_request(self, until):
        rng = np.random.default_rng(1)
        played = np.array([request_by_request([{0, 2}] * 3, 4, until, rng) for _ in range(2000)])
        drawn = simulate_deletions(3, 4, 2, until=until, runs=20_000, seed=1)
        assert_mean(played, deletion_rate(3, 4, 2, until=until))
        for quarter in (0.25, 0.5, 0.75):
            # The share of played lifetimes below a quantile of the drawn ones, which are whole numbers.
            at = np.quantile(drawn, quarter)
            assert abs(np.mean(played <= at) - np.mean(drawn <= at)) < 4.5 * math.sqrt(0.25 / 2000)

    def test_lifetimes_are_whole_numbers_and_reproducible(self):
        first = simulate_deletions(2, 3, 2, runs=50, seed=3)
        assert first.shape == (50,)
        assert (first == np.round(first)).all()
        assert (first >= 4).all()  # an attacker who knows the slices needs m * B' requests
        assert (simulate_deletions(2, 3, 2, runs=50, seed=3) == first).all()
        assert (simulate_deletions(2, 3, 2, runs=50, seed=4) != first).any()

    def test_what_is_never_hit_never_dies(self):
        assert np.isinf(simulate_deletions(1, 2, 2, prior=[1.0, 0.0], runs=3)).all()
        assert np.isfinite(simulate_deletions(2, 2, 2, prior=[[1, 0], [0.5, 0.5]], until="first_shard", runs=3)).all()

    def test_the_size_of_figure_6(self):
        lifetimes = simulate_deletions(5, 64, 64, runs=10_000)
        assert_mean(lifetimes, 320 * harmonic(320))


class TestRetention:
    @given(st.lists(st.permutations(range(4)), min_size=1, max_size=6), st.integers(0, 4), st.integers(0, 4))
    @settings(max_examples=60)
    def test_is_the_share_of_all_possible_hits(self, sequences, hits, at_least):
        kept = [
            any(not set(sequence[:at_least]) & set(hit) for sequence in sequences)
            for hit in itertools.product(range(4), repeat=hits)
        ]
        assert retention(sequences, hits, at_least) == pytest.approx(np.mean(kept), abs=1e-12)

    @pytest.mark.parametrize("size", [8, 32])
    def test_one_sequence_is_sisa(self, size):
        for hits, at_least in [(0, 3), (1, 1), (5, 4), (40, 2)]:
            exact = retention(select_sequences(size, 1), hits, at_least)
            assert exact == pytest.approx((1 - at_least / size) ** hits, rel=1e-12)
            assert exact == pytest.approx(retention_paper(size, 1, hits, at_least), rel=1e-12)
            assert exact == pytest.approx(retention_random(size, 1, hits, at_least), rel=1e-12)

    @pytest.mark.parametrize("method, depth, kept", [("cyclic", 29.5, 0.927), ("cyclic-paper", 21.625, 0.556)])
    def test_spaced_rotations_keep_more_than_the_papers(self, method, depth, kept):  # METHOD section 2
        sequences = select_sequences(32, 8, method)
        assert sum(retention(sequences, 1, k) for k in range(1, 33)) == pytest.approx(depth)
        assert retention(sequences, 5, 8) == pytest.approx(kept, abs=5e-4)

    def test_many_slices_agree_with_drawn_hits(self):
        sequences = select_sequences(24, 12, "random")
        hit = np.random.default_rng(0).integers(24, size=(20_000, 6))
        kept = np.array([[not set(s[:5]) & set(row) for s in sequences] for row in hit[:4000].tolist()]).any(axis=1)
        assert_mean(kept, retention(sequences, 6, 5))

    def test_both_ways_of_summing_agree(self):
        from hf_s3t.analysis.retention import _over_sets_of_prefixes

        sequences = select_sequences(10, 12, "random")
        prefixes = sorted(map(sorted, {frozenset(s[:4]) for s in sequences}))
        for prior in (None, np.arange(1, 11) / 55):
            by_hits = retention(sequences, 3, 4, prior=prior if prior is None else prior.tolist())
            assert by_hits == pytest.approx(_over_sets_of_prefixes(prefixes, 10, 3, prior), rel=1e-12)

    def test_twenty_slices_are_fine(self):
        assert 0 < retention(select_sequences(20, 40), hits=10, at_least=4) < 1

    @given(st.integers(1, 9), st.integers(1, 12), st.integers(0, 6))
    def test_falls_with_what_is_asked_and_with_hits(self, size, budget, hits):
        sequences = select_sequences(size, min(budget, math.factorial(size)))
        values = [retention(sequences, hits, k) for k in range(size + 1)]
        assert values[0] == pytest.approx(1)
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(values))
        assert all(retention(sequences, hits + 1, k) <= values[k] + 1e-12 for k in range(size + 1))


def mean_over_hits(sequences, hits, prior, value) -> float:
    """The mean of a value of the depth over all ways that requests can hit."""
    total = 0.0
    for hit in itertools.product(range(len(prior)), repeat=hits):
        depth = max(next((i for i, s in enumerate(q) if s in hit), len(q)) for q in sequences)
        total += math.prod(prior[s] for s in hit) * value(depth)
    return total


# Sequences need not name all slices.
PREFIXES = st.tuples(st.permutations(range(4)), st.integers(1, 4)).map(lambda drawn: tuple(drawn[0][: drawn[1]]))


class TestDepth:
    @given(st.lists(PREFIXES, min_size=1, max_size=6), st.integers(0, 4), priors(4))
    @settings(max_examples=40)
    def test_is_the_mean_over_all_possible_hits(self, sequences, hits, prior):
        uniform = mean_over_hits(sequences, hits, [0.25] * 4, float)
        assert expected_depth(sequences, hits, num_slices=4) == pytest.approx(uniform, rel=1e-12)
        skewed = mean_over_hits(sequences, hits, prior, float)
        assert expected_depth(sequences, hits, prior=prior, num_slices=4) == pytest.approx(skewed, rel=1e-9, abs=1e-12)
        kept = mean_over_hits(sequences, hits, prior, lambda depth: depth >= 2)
        assert retention(sequences, hits, 2, prior=prior, num_slices=4) == pytest.approx(kept, rel=1e-9, abs=1e-12)

    @pytest.mark.parametrize("hits", [0, 1, 3, 7])
    def test_the_lattice_serves_what_all_sequences_do_and_idle_stages_add_nothing(self, hits):
        everything = list(itertools.permutations(range(4)))
        assert expected_depth(lattice(4), hits) == expected_depth(everything, hits)
        rotations = select_sequences(6, 6)
        assert expected_depth(family_of(rotations), hits) == expected_depth(rotations, hits)

    def test_short_sequences_are_simulated_too(self):
        sequences = [(0, 1, 2, 3, 4), (3,), (2, 4), (4, 1, 0)]
        drawn = simulate_depths(sequences, 3, runs=20_000)
        assert_mean(drawn, expected_depth(sequences, 3))
        assert_mean(drawn >= 2, retention(sequences, 3, 2))
        assert (simulate_depths([(0, 1), (2,)], 0, num_slices=4, runs=5) == 2).all()

    def test_of_many_slices_retention_counts_the_sequences_that_are_long_enough(self):
        sequences = [tuple(range(24)), (5, 3), (7,)]
        assert retention(sequences, 4, 3) == pytest.approx((21 / 24) ** 4)
        assert retention([(5, 3), (7,)], 4, 3, num_slices=24) == 0

    def test_is_the_sum_of_retentions(self):
        sequences = select_sequences(9, 5, "random")
        for hits, prior in itertools.product((0, 1, 6), (None, [0.2] * 4 + [0.04] * 5)):
            total = sum(retention(sequences, hits, k, prior=prior) for k in range(1, 10))
            assert expected_depth(sequences, hits, prior=prior) == pytest.approx(total, rel=1e-10)

    def test_a_uniform_prior_is_no_prior_up_to_twenty_slices(self):
        sequences = select_sequences(20, 20)
        for hits in (1, 10, 60):
            flat = expected_depth(sequences, hits, prior=[0.05] * 20)
            assert flat == pytest.approx(expected_depth(sequences, hits), rel=1e-9, abs=1e-9)

    @pytest.mark.parametrize("prior", [None, [0.3, 0.1, 0.05, 0.25, 0.1, 0.2]])
    @pytest.mark.parametrize("budget, hits", [(1, 2), (6, 5), (30, 9)])
    def test_simulated_depths_agree(self, budget, hits, prior):
        sequences = select_sequences(6, budget)
        drawn = simulate_depths(sequences, hits, prior=prior, runs=20_000, seed=1)
        assert_mean(drawn, expected_depth(sequences, hits, prior=prior))
        for at_least in (1, 3):
            assert_mean(drawn >= at_least, retention(sequences, hits, at_least, prior=prior))

    def test_simulation_takes_any_number_of_slices(self):
        drawn = simulate_depths(select_sequences(64, 64), 3, runs=3000)
        # After three hits of 64 slices the longest gap of the circle serves: E of the largest of three spacings.
        assert_mean(drawn, np.mean([circle_gap(seed) for seed in range(5000)]))

    def test_simulation_is_reproducible_and_starts_whole(self):
        sequences = select_sequences(5, 3)
        assert (simulate_depths(sequences, 0, runs=10) == 5).all()
        assert (simulate_depths(sequences, 4, runs=50) == simulate_depths(sequences, 4, runs=50)).all()
        assert (simulate_depths(sequences, 4, runs=50) != simulate_depths(sequences, 4, runs=50, seed=1)).any()


def circle_gap(seed) -> int:
    """The longest run of slices between three hit ones, on a circle of 64."""
    hit = np.unique(np.random.default_rng(seed).integers(64, size=3))
    return int(np.diff(np.append(hit, hit[0] + 64)).max()) - 1


class TestRetentionOfRandomSequences:
    def test_method_section_3(self):
        assert round(retention_random(8, 8, hits=4, at_least=3), 3) == 0.668
        assert round(retention_paper(8, 8, hits=4, at_least=3), 3) == 0.734

    def test_is_the_mean_over_random_sets(self):
        # Two independent permutations of three slices: all 36 pairs.
        permutations = list(itertools.permutations(range(3)))
        for hits, at_least in itertools.product(range(4), range(4)):
            pairs = [retention([p, q], hits, at_least) for p in permutations for q in permutations]
            assert retention_random(3, 2, hits, at_least) == pytest.approx(np.mean(pairs), abs=1e-12)

    @given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 10), st.integers(0, 12))
    def test_the_paper_overstates(self, size, budget, hits, at_least):
        at_least = min(at_least, size)
        # Its cap B' on the number of sequences pulls the other way, so only below it.
        if budget <= math.perm(size, at_least):
            exact = retention_random(size, budget, hits, at_least)
            assert exact <= retention_paper(size, budget, hits, at_least) + 1e-12


class TestWrongInput:
    @pytest.mark.parametrize(
        "arguments, says",
        [
            (dict(num_shards=0), "`num_shards` must be"),
            (dict(num_slices=0), "`num_slices` must be"),
            (dict(budget=0), "`budget` must be"),
            (dict(until="tomorrow"), "`until` must be one of exhausted, first_shard"),
            (dict(prior=SKEWED, budget=2), "Give `sequences`"),
            (dict(prior=[0.5, 0.5]), "has 2 values"),
            (dict(prior=0.5), "`prior` must be a list"),
            (dict(prior=[SKEWED] * 3), "`prior` has 3 lists, but num_shards=2"),
            (dict(sequences=[(0, 1, 2, 3)]), "1 sequence, but budget=4"),
            (dict(sequences=[[(0, 1, 2, 3)]] * 3), "for 3 shards, but num_shards=2"),
            (dict(sequences=[(0, 1, 0)] * 4), "slices from 0 to 3, each once"),
            (dict(sequences=[(0, 4)] * 4), "slices from 0 to 3"),
            (dict(sequences=[(0,), (), (1,), (2,)]), r"holds \(\)"),
            (dict(sequences=[(0,), (1,)]), "2 sequences, but budget=4"),
            (dict(sequences=7), "must be a list of permutations"),
            (dict(sequences=[]), "is empty"),
            (dict(num_examples=7), "num_examples=7.*make 8 slices"),
            (dict(num_examples=9.5), "`num_examples` must be a whole number"),
            (dict(num_examples=[[1, 2, 3, 4]]), "or 2 lists"),
            (dict(num_examples=[[1, 2, 3, 0]] * 2), "whole numbers from 1"),
        ],
    )
    def test_rates_say_what_is_wrong(self, arguments, says):
        arguments = {"num_shards": 2, "num_slices": 4, "budget": 4, **arguments}
        for function in (deletion_rate, simulate_deletions):
            with pytest.raises(ConfigError, match=says):
                function(**arguments)

    @pytest.mark.parametrize("change", [{"runs": 0}, {"runs": 1.5}, {"seed": -1}])
    def test_simulation_settings(self, change):
        with pytest.raises(ConfigError, match="must be"):
            simulate_deletions(1, 2, 1, **change)

    @pytest.mark.parametrize("state", [[{0}], [{0}, {4}], [{0}, {-1}], [{0}, {"a"}], [0, 1], 3])
    def test_states(self, state):
        with pytest.raises(ConfigError, match="`first_slices_alive`"):
            expected_deletions_left(state, 2, 4)

    def test_retention(self):
        sequences = select_sequences(4, 4)
        for hits, at_least in [(-1, 1), (1, -1), (1, 5), (1.0, 1)]:
            with pytest.raises(ConfigError):
                retention(sequences, hits, at_least)
            with pytest.raises(ConfigError):
                retention_random(4, 4, hits, at_least)
            with pytest.raises(ConfigError):
                retention_paper(4, 4, hits, at_least)
        with pytest.raises(ConfigError, match="Take the mean of `simulate_depths`"):
            expected_depth(select_sequences(21, 2), 3)
        for wrong, num_slices in ([(0, 2)], None), ([(0, 0)], None), ([(1,), ()], 2), ([(3,)], 3), ([(0,)], 0):
            with pytest.raises(ConfigError):
                expected_depth(wrong, 1, num_slices=num_slices)
        for change in (dict(hits=-1), dict(runs=0), dict(seed=-1), dict(prior=[0.5, 0.5])):
            with pytest.raises(ConfigError):
                simulate_depths(sequences, **{"hits": 1, **change})
        with pytest.raises(ConfigError, match="at most 20 of either"):
            retention(select_sequences(30, 30), 1, 3)
