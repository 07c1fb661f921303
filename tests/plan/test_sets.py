"""Plans by sets of slices: what is missing, serves and is idle, after any history of deletions and growth."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.folders import apply, grow, new_system

from hf_s3t import S3TConfig
from hf_s3t.config import LATTICE, SEQUENCE_SELECTIONS
from hf_s3t.folder.system import SystemFolder
from hf_s3t.plan import Growth, Plan, StageKey
from hf_s3t.plan.stages import is_stage_of
from hf_s3t.sequences.families import expected_depth, lattice, stage_work, stages_of
from hf_s3t.sequences.rules import select_sequences
from hf_s3t.sequences.worth import Outlook


MANY = settings(max_examples=100, deadline=None)
seeds = st.integers(0, 2**32)


class History:
    """
    A system of up to three shards and five slices, and what lies in its folder after deletions and growth.

    Requests may empty slices; missing stages are grown in any order; and stages of other plans are there, as in the
    folder of an older release.
    """

    def __init__(self, seed: int, events: int = 6):
        self.random = random.Random(seed)
        self.num_shards, self.num_slices = self.random.randint(1, 3), self.random.randint(1, 5)
        priors = [[self.random.random() for _ in range(self.num_slices)] for _ in range(self.num_shards)]
        self.config = S3TConfig(
            num_shards=self.num_shards,
            num_slices=self.num_slices,
            sequence_selection=[self._sequences() for _ in range(self.num_shards)],
            deletion_prior=[[p / sum(prior) for p in prior] for prior in priors],
            score_horizon=self.random.choice([0, 1, 3, 12]),
            replay=self.random.choice([0.0, 0.25, 1.0]),
        )
        self.plan = Plan.from_config(self.config)
        self.valid: set[StageKey] = set()
        self.empty: set[tuple[int, int]] = set()
        for _ in range(self.random.randint(0, events)):
            self.random.choice([self.grow, self.delete, self.find_older])()

    def _sequences(self):
        """Sequences of any length, in some number of orders."""
        orders = [
            self.random.sample(range(self.num_slices), self.num_slices) for _ in range(self.random.randint(1, 5))
        ]
        cut = {tuple(order[: self.random.randint(1, self.num_slices)]) for order in orders}
        return [list(sequence) for sequence in sorted(cut, key=lambda _: self.random.random())]

    @property
    def places(self):
        return [(shard, s) for shard in range(self.num_shards) for s in range(self.num_slices)]

    def grow(self, at_most=None):
        """Some of what is missing, each on what is there, in any order."""
        for _ in range(self.random.randint(1, 12) if at_most is None else at_most):
            missing = self.plan.missing(self.valid, self.empty)
            ready = [key for key in missing if key.parent is None or key.parent in self.valid]
            if not ready:
                return
            self.valid.add(self.random.choice(ready))

    def delete(self):
        hits = {place for place in self.places if self.random.random() < 0.3}
        self.valid -= set(self.plan.removed_by(hits, self.valid))
        self.empty |= {place for place in hits if self.random.random() < 0.3}

    def find_older(self):
        """A stack that no plan of today asks for."""
        shard = self.random.randrange(self.num_shards)
        order = self.random.sample(range(self.num_slices), self.random.randint(1, self.num_slices))
        self.valid |= {key for key in StageKey(shard, tuple(order)).lineage if not key.saw(self.empty)}


histories = seeds.map(History)


def sets_of(keys):
    return {key.slices for key in keys}


# What is missing


@MANY
@given(histories)
def test_what_is_missing_is_each_planned_set_without_a_valid_stage_once_on_what_is_valid_or_listed_before(history):
    plan, valid, empty = history.plan, history.valid, history.empty
    missing = plan.missing(valid, empty)
    expected = {key.slices for key in plan.stages() if not key.saw(empty)} - sets_of(valid)
    assert len(missing) == len(expected) and sets_of(missing) == expected
    for place, key in enumerate(missing):
        assert len(set(key.prefix)) == key.depth
        assert key.depth == 1 or key.parent in valid or key.parent in missing[:place]


@MANY
@given(histories)
def test_growing_everything_gives_every_planned_set_that_avoids_what_is_empty_and_nothing_else(history):
    before = set(history.valid)
    history.grow(at_most=1000)
    planned = {key.slices for key in history.plan.stages() if not key.saw(history.empty)}
    assert history.plan.missing(history.valid, history.empty) == []
    assert sets_of(history.valid) == planned | sets_of(before)
    assert len(history.valid - before) == len(planned - sets_of(before))


@MANY
@given(histories)
def test_what_is_missing_depends_on_nothing_but_what_is_there(history):
    shuffled = sorted(history.valid, key=lambda _: history.random.random())
    assert history.plan.missing(shuffled, history.empty) == history.plan.missing(history.valid, history.empty)
    again = Plan.from_record(history.plan.to_record(), history.config)
    assert again == history.plan
    assert again.missing(history.valid, history.empty) == history.plan.missing(history.valid, history.empty)


def test_a_set_is_grown_on_the_first_by_rank_of_the_valid_stages_that_saw_the_rest_of_it():
    plan = Plan((((2,), (2, 1), (0,), (0, 2), (0, 1), (0, 1, 2)),), by_sets=True)
    # Of one set in two orders the planned one; of two sets the one that is planned first.
    valid = [StageKey(0, prefix) for prefix in [(0,), (0, 2), (1,), (1, 2), (2,), (2, 1)]]
    assert plan.missing(valid)[-1] == StageKey(0, (2, 1, 0))
    assert plan.missing([key for key in valid if key.prefix != (2, 1)])[-1] == StageKey(0, (1, 2, 0))
    assert plan.missing([key for key in valid if len(key.prefix) == 1 or key.prefix[0] == 0])[-1].prefix == (0, 2, 1)
    # Its own first order comes before any other.
    assert plan.missing([*valid, StageKey(0, (0, 1))]) == [StageKey(0, (0, 1, 2))]


def test_a_set_belongs_to_the_sequence_that_has_its_stage_or_else_the_set_and_counts_by_its_size():
    plan = Plan((((0, 1), (2, 1, 0)),), by_sets=True)
    numbers = {(0, 1): 0, (1, 0): 0, (2,): 1, (1, 2): 1, (0, 2, 1): 1, (0, 2): 0}
    assert {prefix: plan.sequence_of(StageKey(0, prefix)) for prefix in numbers} == numbers
    published = Plan((((0, 1), (1, 0)),))
    assert [published.sequence_of(StageKey(0, prefix)) for prefix in [(0, 1), (1, 0), (1,)]] == [0, 1, 1]
    valid = [StageKey(0, prefix) for prefix in [(1,), (1, 0), (0, 1), (1, 2)]]
    assert plan.sets(valid) == [[(0, 2), (2, 2), (0, 1)]]
    assert plan.sets(valid, {(0, 0)}) == [[(0, 1), (1, 1), (0, 0)]]
    assert plan.depths([StageKey(0, prefix) for prefix in [(0,), (1,), (1, 0), (2,)]]) == [[2, 1]]


def test_a_system_can_have_stages_of_its_shards_on_its_slices_each_once():
    config = S3TConfig(num_shards=2, num_slices=3)
    assert all(is_stage_of(StageKey(shard, (2, 0)), config) for shard in range(2))
    for shard, prefix in [(2, (0,)), (0, (3,)), (0, (0, 3)), (1, (1, 1)), (1, (0, 2, 0))]:
        assert not is_stage_of(StageKey(shard, prefix), config)


@pytest.mark.parametrize("num_slices", [2, 3, 4, 5, 6])
def test_after_a_deletion_one_stage_brings_a_lattice_back_to_full_depth(num_slices):
    config = S3TConfig(num_slices=num_slices, sequence_selection=LATTICE)
    plan = Plan.from_config(config)
    assert len(plan.stages()) == 2**num_slices - 1
    for hit in range(num_slices):
        valid = [key for key in plan.stages() if not key.saw({(0, hit)})]
        ((tip,),) = plan.served(valid)
        assert tip.depth == num_slices - 1
        step = Growth(plan, config).next(valid)
        assert step.key.depth == num_slices and step.key.prefix[-1] == hit and step.key.parent in valid
        assert plan.served([*valid, step.key]) == ((step.key,),)


# Which stages serve, and in which order


@MANY
@given(histories)
def test_the_deepest_valid_stage_serves_planned_or_not_and_ties_are_settled_by_rank(history):
    plan = history.plan
    expected = []
    for shard in range(history.num_shards):
        of_shard = [key for key in history.valid if key.shard == shard]
        expected.append(tuple(sorted(of_shard, key=lambda key: (-key.depth, plan.rank(key)))[:1]))
    assert plan.served(history.valid) == tuple(expected)
    shuffled = sorted(history.valid, key=lambda _: history.random.random())
    assert plan.served(shuffled) == tuple(expected)


@MANY
@given(seeds)
def test_of_a_plan_with_idle_stages_that_was_made_earlier_the_same_stages_serve_and_it_is_written_as_it_was(seed):
    order = random.Random(seed)
    permutations = list(itertools.permutations(range(order.randint(1, 4))))
    sequences = tuple(order.sample(permutations, order.randint(1, min(8, len(permutations)))))
    published, by_sets = Plan((sequences,)), Plan((sequences,), by_sets=True)
    assert by_sets.to_record() == published.to_record()
    # Whatever was deleted or is damaged.
    valid = [key for key in published.stages() if order.random() < 0.8]
    assert by_sets.served(valid) == published.served(valid)
    config = S3TConfig(num_slices=len(sequences[0]), budget=1)
    assert Plan.from_record(by_sets.to_record(), config) == by_sets


@given(seeds.map(lambda seed: History(seed, events=0)))
@settings(max_examples=30, deadline=None)
def test_rank_orders_all_stages_that_a_system_can_have_planned_ones_as_they_are_planned(history):
    plan, slices = history.plan, range(history.num_slices)
    every = [
        StageKey(shard, prefix)
        for shard in range(history.num_shards)
        for depth in range(1, history.num_slices + 1)
        for prefix in itertools.permutations(slices, depth)
    ]
    history.random.shuffle(every)
    ranked = sorted(every, key=plan.rank)
    assert len({plan.rank(key) for key in every}) == len(every)
    assert [key for key in ranked if key in plan] == plan.stages()
    # The other orders of a planned set come right behind the planned one, sets that are not planned after all.
    planned, places = sets_of(plan.stages()), {key: place for place, key in enumerate(ranked)}
    first = {key.slices: places[key] for key in plan.stages()}
    last = max(places[key] for key in every if key.slices in planned)
    for key in every:
        if key.slices in planned:
            between = ranked[first[key.slices] : places[key] + 1]
            assert {other.slices for other in between} == {key.slices}
        else:
            assert places[key] > last


@pytest.mark.parametrize("seed", range(4))
def test_a_reloaded_folder_serves_what_the_live_one_serves_in_whatever_order_its_stages_were_written(
    tmp_path, monkeypatch, seed
):
    config = S3TConfig(num_shards=2, num_slices=3, group_column="user", seed=1)
    folder, order = new_system(tmp_path / "system", config=config), random.Random(seed)
    for _ in range(3):
        while missing := folder.missing_stages():
            ready = [key for key in missing if key.parent is None or key.parent in folder.valid_stages]
            chosen = [order.choice(ready)]
            monkeypatch.setattr(Plan, "missing", lambda *_, chosen=chosen: chosen)
            grow(folder)
            monkeypatch.undo()
            again = SystemFolder(folder.path)
            assert again.valid_stages == folder.valid_stages
            assert again.plan.served(again.valid_stages) == folder.plan.served(folder.valid_stages)
        # Each user has two rows; once both are gone their slice may be empty.
        apply(folder, ids=[order.choice(sorted(folder.table.rows))])


# Idle stages


def served_depth(plan, hits):
    left = [key for key in plan.stages() if not key.saw(hits)]
    ((*tips,),) = plan.served(left)
    return max((tip.depth for tip in tips), default=0)


@pytest.mark.parametrize("rule", SEQUENCE_SELECTIONS)
@pytest.mark.parametrize("num_slices", [1, 2, 3, 4, 5])
def test_idle_stages_left_out_never_change_the_depth_that_serves_by_any_rule_for_any_hits(rule, num_slices):
    prior = [2.0**-s for s in range(num_slices)]
    prior = [p / sum(prior) for p in prior]
    for budget in range(1, min(num_slices, math.factorial(num_slices)) + 1):
        sequences = select_sequences(num_slices, budget, rule, prior, 10, seed=3)
        published, family = Plan((tuple(sequences),)), Plan((tuple(sequences),), by_sets=True)
        assert len(sets_of(family.stages())) == len(family.stages()) <= len(published.stages())
        for count in range(num_slices + 1):
            for hit in itertools.combinations(range(num_slices), count):
                hits = {(0, s) for s in hit}
                assert served_depth(family, hits) == served_depth(published, hits)


@pytest.mark.parametrize("num_slices", [1, 2, 3, 4])
def test_the_lattice_serves_every_hit_set_as_deep_as_all_sequences(num_slices):
    everything = Plan((tuple(itertools.permutations(range(num_slices))),))
    every_set = Plan((lattice(num_slices),), by_sets=True)
    for count in range(num_slices + 1):
        for hit in itertools.combinations(range(num_slices), count):
            hits = {(0, s) for s in hit}
            assert served_depth(every_set, hits) == served_depth(everything, hits) == num_slices - count


# The order of growth


def likelihoods(prior, horizon):
    """How likely each set of hit slices is after a request drawn at random out of the first so many."""
    now, mean = {frozenset(): 1.0}, {}
    if horizon == 0:
        return now
    for _ in range(horizon):
        after = {}
        for hit, p in now.items():
            for s, q in enumerate(prior):
                after[hit | {s}] = after.get(hit | {s}, 0.0) + p * q
        now = after
        for hit, p in now.items():
            mean[hit] = mean.get(hit, 0.0) + p / horizon
    return mean


def naive_depth(prefixes, hit=frozenset()):
    return max((len(prefix) for prefix in prefixes if not hit & set(prefix)), default=0)


class Greedy:
    """The order of growth as its docstring has it, looked at stage by stage and hit set by hit set."""

    def __init__(self, history):
        self.config, self.plan = history.config, history.plan
        horizon = history.config.score_horizon
        self.hits = [likelihoods(history.config.prior_of(shard), horizon) for shard in range(history.num_shards)]

    def expected(self, shard, prefixes):
        return sum(p * naive_depth(prefixes, hit) for hit, p in self.hits[shard].items())

    def worth(self, key, missing, valid):
        """(depth now, expected depth), per work, of a stage with the missing ones below it; and the first of these."""
        chain = [stage for stage in key.lineage if stage in missing]
        there = [stage.prefix for stage in valid if stage.shard == key.shard]
        grown = [*there, *(stage.prefix for stage in chain)]
        work = sum(stage_work(stage.depth, self.config.num_slices, self.config.replay) for stage in chain)
        now = naive_depth(grown) - naive_depth(there)
        later = self.expected(key.shard, grown) - self.expected(key.shard, there)
        return (now / work, later / work), chain[0]

    def firsts(self, valid, empty):
        """The stages that may be grown first: more than one only where floats cannot tell their worths apart."""
        missing = self.plan.missing(valid, empty)
        worths = [self.worth(key, set(missing), valid) for key in missing]
        best = max((worth for worth, _ in worths), default=None)
        return {first for worth, first in worths if worth == pytest.approx(best, rel=1e-7, abs=1e-9)}


@settings(max_examples=60, deadline=None)
@given(histories)
def test_stages_are_grown_in_the_order_that_a_slow_greedy_search_finds(history):
    greedy, valid = Greedy(history), set(history.valid)
    for step in Growth(history.plan, history.config).steps(history.valid, history.empty):
        assert step.key in greedy.firsts(valid, history.empty)
        own = stage_work(step.key.depth, history.num_slices, history.config.replay)
        assert step.work == pytest.approx(own / history.num_shards)
        valid.add(step.key)
    assert history.plan.missing(valid, history.empty) == []


@MANY
@given(histories)
def test_the_expected_depth_is_the_mean_over_shards_and_as_many_requests_as_there_are_slices(history):
    config = history.config
    prefixes = [[key.prefix for key in history.valid if key.shard == shard] for shard in range(history.num_shards)]
    hits = [likelihoods(config.prior_of(shard), config.num_slices) for shard in range(history.num_shards)]
    expected = [
        sum(p * naive_depth(of_shard, hit) for hit, p in of_hits.items())
        for of_shard, of_hits in zip(prefixes, hits, strict=True)
    ]
    growth = Growth(history.plan, config)
    assert growth.expected_depth(history.valid) == pytest.approx(sum(expected) / len(expected), abs=1e-9)
    by_families = [
        expected_depth(of_shard, config.num_slices, config.prior_of(shard), config.num_slices)
        for shard, of_shard in enumerate(prefixes)
    ]
    assert by_families == pytest.approx(expected, abs=1e-9)


@MANY
@given(histories, st.booleans())
def test_a_step_says_what_its_stage_brings_by_itself(history, by_sets):
    plan = history.plan if by_sets else Plan(history.plan.families)
    growth, valid = Growth(plan, history.config), set(history.valid)

    def serves_now():
        of_shards = [[key.prefix for key in valid if key.shard == shard] for shard in range(history.num_shards)]
        return sum(map(naive_depth, of_shards)) / history.num_shards

    for step in growth.steps(history.valid, history.empty):
        before = serves_now(), growth.expected_depth(valid)
        valid.add(step.key)
        assert step.depth == pytest.approx(serves_now() - before[0])
        assert step.expected_depth == pytest.approx(growth.expected_depth(valid) - before[1], abs=1e-9)


def test_of_equals_the_first_of_the_plan_is_grown_first():
    config = S3TConfig(num_shards=2, num_slices=3)
    plan = Plan.from_config(config)
    grown = [step.key for step in Growth(plan, config).missing(())]
    # With a uniform prior all stages of one depth are equal.
    assert [key for key in grown if key.shard == 0] == [key for key in plan.stages() if key.shard == 0]
    assert [key._replace(shard=0) for key in grown if key.shard == 1] == [key for key in grown if key.shard == 0]


@MANY
@given(histories)
def test_next_is_the_first_of_what_is_missing_and_growing_it_again_and_again_is_all_of_it(history):
    growth, valid = Growth(history.plan, history.config), set(history.valid)
    all_at_once = growth.missing(history.valid, history.empty)
    one_by_one = []
    while (step := growth.next(valid, history.empty)) is not None:
        one_by_one.append(step)
        assert step.key.parent is None or step.key.parent in valid
        valid.add(step.key)
    assert one_by_one == all_at_once
    assert sets_of(step.key for step in one_by_one) == sets_of(history.plan.missing(history.valid, history.empty))


@settings(max_examples=60, deadline=None)
@given(seeds)
def test_what_is_remembered_is_never_an_old_answer(seed):
    history = History(seed, events=2)
    growth = Growth(history.plan, history.config)
    for _ in range(6):
        history.random.choice([history.grow, history.delete, history.find_older])()
        fresh = Growth(history.plan, history.config)
        assert growth.next(history.valid, history.empty) == fresh.next(history.valid, history.empty)
        assert growth.missing(history.valid, history.empty) == fresh.missing(history.valid, history.empty)


@MANY
@given(histories)
def test_a_published_plan_is_grown_as_it_is_planned(history):
    plan = Plan(history.plan.families)
    steps = Growth(plan, history.config).missing(history.valid, history.empty)
    assert [step.key for step in steps] == plan.missing(history.valid, history.empty)


@pytest.mark.parametrize("place", [0, 5, 10])
def test_where_sets_are_too_many_the_drawn_requests_hit_what_the_prior_says(place):
    one = [float(s == place) for s in range(11)]
    # One request hits one slice, and so do many of the same; many of all slices leave none.
    assert Outlook(11, horizon=1).expected_depth([(place,)]) < 1 == Outlook(11, horizon=1).expected_depth([(0,), (1,)])
    for horizon in (1, 1000):
        only = Outlook(11, one, horizon)
        assert [only.expected_depth([(s,)]) for s in range(11)] == [float(s != place) for s in range(11)]
    assert Outlook(11, horizon=10**6).expected_depth([(s,) for s in range(11)]) < 0.01


# What a config asks for


@pytest.mark.parametrize(("num_slices", "stages"), [(2, 3), (3, 7), (4, 15), (5, 31)])
def test_a_new_system_of_up_to_five_slices_has_one_stage_for_each_set(num_slices, stages):
    default = Plan.from_config(S3TConfig(num_slices=num_slices))
    assert default == Plan.from_config(S3TConfig(num_slices=num_slices, sequence_selection=LATTICE))
    assert default.by_sets and len(default.stages()) == stages


@pytest.mark.parametrize("select", ["all", "metric"])
def test_where_shallower_stages_serve_too_the_published_plan_is_the_default(select):
    config = S3TConfig(num_slices=4, select=select)
    rotations = tuple(stages_of(select_sequences(4, 4)))
    assert config.keeps_idle and Plan.from_config(config) == Plan((rotations,))
    assert Plan.from_config(S3TConfig(num_slices=4, keep_idle=True)) == Plan((rotations,))


def test_sequences_may_be_shorter_than_the_slices_and_differ_in_number_between_shards():
    config = S3TConfig(num_shards=2, num_slices=3, sequence_selection=[[[0, 1], [2]], [[1, 2, 0]]])
    plan = Plan.from_config(config)
    assert sets_of(plan.stages()) == sets_of(StageKey(0, p) for p in [(0,), (0, 1), (2,)]) | sets_of(
        StageKey(1, (1, 2, 0)).lineage
    )


CONFIGS = [
    S3TConfig(),
    S3TConfig(num_slices=4, budget=2),
    S3TConfig(num_slices=4, sequence_selection=LATTICE),
    S3TConfig(num_slices=4, work_budget=5.0),
    S3TConfig(num_slices=3, keep_idle=True, select="longest"),
    S3TConfig(num_shards=2, num_slices=3, sequence_selection=[[[0, 1], [2]], [[1, 2, 0]]]),
    S3TConfig(replay=0.25),
    S3TConfig(stage_data="slice"),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_a_config_is_read_as_it_was_written_and_asks_for_the_same_plan(config):
    again = S3TConfig.from_json(config.to_json())
    assert again == config and again.to_json() == config.to_json()
    assert Plan.from_config(again) == Plan.from_config(config)


def test_a_config_of_an_earlier_release_is_read_as_it_was():
    values = {"format_version": 1, "num_shards": 2, "num_slices": 4, "budget": 4, "sequence_selection": "cyclic"}
    config = S3TConfig.from_dict(values)
    assert (config.budget, config.sequence_selection) == (4, "cyclic")
    assert (config.work_budget, config.keep_idle, config.replay) == (None, None, 1.0)
    assert Plan.as_asked_for(config).sequences == Plan((tuple(select_sequences(4, 4)),) * 2, by_sets=True).sequences
