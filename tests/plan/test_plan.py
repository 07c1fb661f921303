"""The plan against a naive model: which stages exist, which go, which are grown again, and which stacks serve."""

import itertools
import json
import math
import random
from dataclasses import replace

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hf_s3t import S3TConfig
from hf_s3t.errors import FolderError
from hf_s3t.plan import Plan, StageKey, relative_cost, stage_seed
from hf_s3t.records.digests import DigestKey, KeptNames
from hf_s3t.records.examples import Example, ExampleTable


KEY = DigestKey(b"k" * 32)


MANY = settings(max_examples=150)


# The naive model: lists of tuples, read straight from METHOD section 1.


def naive_stages(sequences, empty=()):
    """Every (shard, prefix) once, in the order in which training one sequence after the other meets them."""
    found = []
    for shard, of_shard in enumerate(sequences):
        for sequence in of_shard:
            for depth in range(1, len(sequence) + 1):
                if (shard, sequence[depth - 1]) in empty:
                    break
                if (shard, sequence[:depth]) not in found:
                    found.append((shard, sequence[:depth]))
    return found


def naive_depth(shard, sequence, valid):
    depth = 0
    while depth < len(sequence) and (shard, sequence[: depth + 1]) in valid:
        depth += 1
    return depth


def naive_longest(sequences, valid):
    """Per shard the longest valid prefix, the first in order among equals."""
    served = []
    for shard, of_shard in enumerate(sequences):
        best = ()
        for sequence in of_shard:
            depth = naive_depth(shard, sequence, valid)
            if depth > len(best):
                best = sequence[:depth]
        served.append([(shard, best)] if best else [])
    return served


def naive_reachable(shard, of_shard, valid):
    """(number of the sequence, prefix) of every valid prefix of a shard."""
    return [
        (number, sequence[:depth])
        for number, sequence in enumerate(of_shard)
        for depth in range(1, naive_depth(shard, sequence, valid) + 1)
    ]


def plain(keys):
    return [(key.shard, key.prefix) for key in keys]


def keys_of(pairs):
    return [StageKey(shard, prefix) for shard, prefix in pairs]


# Systems of up to three shards and five slices, and subsets of their stages and slices. A few drawn integers make a
# case: drawing every permutation by itself would cost fifty times as much.


PERMUTATIONS = {slices: list(itertools.permutations(range(slices))) for slices in range(1, 6)}


@st.composite
def systems(draw):
    num_shards, num_slices, seed = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(0, 2**32)))
    generator = random.Random(seed)
    budget = generator.randint(1, min(6, math.factorial(num_slices)))
    return tuple(tuple(generator.sample(PERMUTATIONS[num_slices], budget)) for _ in range(num_shards))


def places_of(sequences):
    return [(shard, slice_) for shard, of_shard in enumerate(sequences) for slice_ in sorted(of_shard[0])]


def subset_of(items, bits):
    return {item for position, item in enumerate(items) if bits >> position & 1}


bits = st.integers(0, 2**64 - 1)
few_bits = st.tuples(bits, bits).map(lambda pair: pair[0] & pair[1])


@st.composite
def systems_with_places(draw):
    sequences = draw(systems())
    return sequences, frozenset(subset_of(places_of(sequences), draw(few_bits)))


@st.composite
def systems_with_valid_stages(draw):
    """Any subset of the stages: parents may be missing, as after someone removed a folder."""
    sequences = draw(systems())
    most = draw(bits) | draw(bits) | draw(bits) | draw(bits) << 64
    return sequences, frozenset(subset_of(naive_stages(sequences), most))


# Which stages exist


@MANY
@given(systems())
def test_the_stages_are_all_prefixes_of_all_sequences_shared_ones_once(sequences):
    assert plain(Plan(sequences).stages()) == naive_stages(sequences)


@MANY
@given(systems_with_places())
def test_every_stage_comes_after_the_stage_it_stands_on(case):
    sequences, empty = case
    stages = Plan(sequences).stages(empty)
    for position, key in enumerate(stages):
        assert key.parent is None or key.parent in stages[:position]


@MANY
@given(systems_with_places())
def test_a_sequence_ends_before_a_slice_that_deletions_emptied(case):
    sequences, empty = case
    plan = Plan(sequences)
    assert plain(plan.stages(empty)) == naive_stages(sequences, empty)
    assert not any(key.saw(empty) for key in plan.stages(empty))


@MANY
@given(systems())
def test_a_plan_contains_its_stages_and_no_others(sequences):
    plan = Plan(sequences)
    stages = set(naive_stages(sequences))
    every_key = {
        (shard, prefix)
        for shard in range(len(sequences) + 1)
        for depth in range(1, 4)
        for prefix in itertools.permutations(range(5), depth)
    }
    assert {(shard, prefix) for shard, prefix in every_key | stages if StageKey(shard, prefix) in plan} == stages


@MANY
@given(systems())
def test_a_plan_that_is_written_down_is_read_as_it_was(sequences):
    plan = Plan(sequences)
    written = json.loads(json.dumps(plan.to_record()))
    config = S3TConfig(num_shards=len(sequences), num_slices=len(sequences[0][0]), keep_idle=True)
    assert Plan.from_record(written, config) == plan
    assert [[tuple(stage["prefix"]) for stage in shard] for shard in written] == [
        [key.prefix for key in plan.stages() if key.shard == number] for number in range(plan.num_shards)
    ]


def test_a_plan_of_other_shards_or_slices_is_refused_in_a_sentence():
    config = S3TConfig(num_shards=2, num_slices=3, budget=2)
    plan = Plan.from_config(config)
    assert Plan.from_record(plan.to_record(), config) == plan
    with pytest.raises(FolderError, match="is of 2 shards, expected one of 3 shards and 3 slices"):
        Plan.from_record(plan.to_record(), replace(config, num_shards=3))
    with pytest.raises(FolderError, match="for shard 0 is no tree of stages, expected one of 2 shards and 2 slices"):
        Plan.from_record(plan.to_record(), replace(config, num_slices=2))
    first = plan.to_record()[0]
    for damaged in (
        first[1:],
        [*first, first[0]],
        [{**first[0], "slices": [1]}, *first[1:]],
        [{"slices": [True], "prefix": [True]}],
        [{"slices": [0]}],
        [{"slices": [0, 0], "prefix": [0, 0]}],
        [None],
        None,
        [],
    ):
        with pytest.raises(FolderError, match="no tree of stages"):
            Plan.from_record([damaged, damaged], config)


def test_a_written_plan_names_sets_of_slices_and_the_first_of_their_orders():
    (shard,) = Plan.from_config(S3TConfig(num_slices=2, keep_idle=True)).to_record()
    assert shard == [
        {"slices": [0], "prefix": [0]},
        {"slices": [0, 1], "prefix": [0, 1]},
        {"slices": [1], "prefix": [1]},
        {"slices": [0, 1], "prefix": [1, 0]},
    ]


def test_all_24_sequences_of_four_slices_share_64_stages():
    assert len(Plan((tuple(itertools.permutations(range(4))),)).stages()) == 64


# Which go, and which are grown again


@MANY
@given(systems_with_places())
def test_a_deletion_removes_the_stages_at_and_after_the_hit_slice_in_every_sequence_of_its_shard(case):
    sequences, hits = case
    plan = Plan(sequences)
    expected = set()
    for shard, of_shard in enumerate(sequences):
        for sequence in of_shard:
            positions = [position for position, slice_ in enumerate(sequence) if (shard, slice_) in hits]
            if positions:
                expected |= {(shard, sequence[:depth]) for depth in range(min(positions) + 1, len(sequence) + 1)}
    removed = plan.removed_by(hits, plan.stages())
    assert set(plain(removed)) == expected
    assert len(removed) == len(expected)


@MANY
@given(systems_with_places())
def test_what_a_deletion_leaves_is_closed_under_parents(case):
    sequences, hits = case
    plan = Plan(sequences)
    left = set(plan.stages()) - set(plan.removed_by(hits, plan.stages()))
    assert all(key.parent is None or key.parent in left for key in left)


@MANY
@given(systems_with_valid_stages(), st.data())
def test_missing_stages_are_the_planned_ones_without_a_valid_copy_in_training_order(case, data):
    sequences, valid = case
    empty = subset_of(places_of(sequences), data.draw(few_bits))
    missing = Plan(sequences).missing(set(keys_of(valid)), empty)
    assert plain(missing) == [stage for stage in naive_stages(sequences, empty) if stage not in valid]


@MANY
@given(systems(), st.data())
def test_deletions_regrowth_and_further_deletions_follow_the_naive_model(sequences, data):
    plan = Plan(sequences)
    valid, expected, empty = set(), set(), set()
    for _ in range(data.draw(st.integers(1, 4))):
        regrown = plan.missing(valid, empty)
        assert plain(regrown) == [s for s in naive_stages(sequences, empty) if s not in expected]
        valid |= set(regrown)
        expected |= set(naive_stages(sequences, empty))

        hits = subset_of(places_of(sequences), data.draw(few_bits))
        empty |= subset_of(sorted(hits), data.draw(bits))
        valid -= set(plan.removed_by(hits, valid))
        expected = {(shard, prefix) for shard, prefix in expected if not hits & {(shard, s) for s in prefix}}
        assert set(plain(valid)) == expected


def every_system_of_one_shard(num_slices):
    permutations = PERMUTATIONS[num_slices]
    for budget in range(1, len(permutations) + 1):
        choose = itertools.permutations if budget <= 4 else itertools.combinations
        for of_shard in choose(permutations, budget):
            yield (of_shard,)


@pytest.mark.parametrize("num_slices", [1, 2, 3])
def test_every_deletion_in_every_small_system_does_what_the_naive_model_does(num_slices):
    every_hit = [
        {(0, slice_) for slice_ in hit}
        for count in range(num_slices + 1)
        for hit in itertools.combinations(range(num_slices), count)
    ]
    for sequences in every_system_of_one_shard(num_slices):
        plan, stages = Plan(sequences), naive_stages(sequences)
        assert plain(plan.stages()) == stages
        for hits in every_hit:
            left = [stage for stage in stages if not hits & {(0, slice_) for slice_ in stage[1]}]
            valid = set(plan.stages()) - set(plan.removed_by(hits, plan.stages()))
            assert set(plain(valid)) == set(left)
            assert [plain(tips) for tips in plan.served(valid)] == naive_longest(sequences, set(left))
            assert plain(plan.missing(valid)) == [stage for stage in stages if stage not in left]
            assert plan.missing(valid, empty=hits) == []


# Which stacks serve


@MANY
@given(systems_with_valid_stages())
def test_the_longest_valid_prefix_serves_ties_go_to_the_lowest_sequence_number(case):
    sequences, valid = case
    served = Plan(sequences).served(set(keys_of(valid)))
    assert [plain(tips) for tips in served] == naive_longest(sequences, valid)


def test_a_tie_goes_to_the_lowest_sequence_number():
    plan = Plan((((0, 1), (1, 0)),))
    assert plan.served(plan.stages()) == ((StageKey(0, (0, 1)),),)
    assert plan.served({StageKey(0, (0,)), StageKey(0, (1,))}) == ((StageKey(0, (0,)),),)


@MANY
@given(systems_with_valid_stages())
def test_all_serves_the_longest_valid_prefix_of_every_sequence_each_once(case):
    sequences, valid = case
    for shard, tips in enumerate(Plan(sequences).served(set(keys_of(valid)), select="all")):
        expected = []
        for sequence in sequences[shard]:
            prefix = sequence[: naive_depth(shard, sequence, valid)]
            if prefix and (shard, prefix) not in expected:
                expected.append((shard, prefix))
        assert plain(tips) == expected


@MANY
@given(systems_with_valid_stages(), st.data())
def test_metric_serves_the_valid_prefix_with_the_lowest_loss_then_the_deepest_then_the_first(case, data):
    sequences, valid = case
    generator = random.Random(data.draw(bits))
    losses = {
        stage: generator.choice([0.0, 0.5, 1.0, math.inf]) for stage in sorted(valid) if generator.random() < 0.8
    }
    served = Plan(sequences).served(
        set(keys_of(valid)), select="metric", losses={StageKey(*stage): loss for stage, loss in losses.items()}
    )
    for shard, tips in enumerate(served):
        reachable = naive_reachable(shard, sequences[shard], valid)
        ranked = sorted(reachable, key=lambda item: (losses.get((shard, item[1]), math.inf), -len(item[1]), item[0]))
        assert plain(tips) == [(shard, ranked[0][1])] if ranked else tips == ()


@pytest.mark.parametrize("order", [((0, 1), (1, 0)), ((1, 0), (0, 1))])
def test_metric_takes_a_loss_that_is_not_a_number_for_the_worst(order):
    plan = Plan((order,))
    losses = {StageKey(0, (0,)): math.nan, StageKey(0, (0, 1)): math.nan, StageKey(0, (1,)): 0.7}
    assert plan.served(plan.stages(), select="metric", losses=losses) == ((StageKey(0, (1,)),),)


@MANY
@given(systems_with_valid_stages())
def test_nothing_serves_whose_stack_has_a_gap(case):
    sequences, valid = case
    plan = Plan(sequences)
    keys = set(keys_of(valid))
    for select in ("longest", "metric", "all"):
        for tips in plan.served(keys, select):
            assert all(stage in keys for tip in tips for stage in tip.lineage)


@MANY
@given(systems_with_valid_stages())
def test_depths_are_those_of_the_valid_prefixes(case):
    sequences, valid = case
    assert Plan(sequences).depths(set(keys_of(valid))) == [
        [naive_depth(shard, sequence, valid) for sequence in of_shard] for shard, of_shard in enumerate(sequences)
    ]


@MANY
@given(systems_with_valid_stages())
def test_the_first_slices_alive_are_those_of_sequences_that_still_have_a_first_stage(case):
    sequences, valid = case
    alive = Plan(sequences).first_slices_alive(set(keys_of(valid)))
    assert alive == [
        {sequence[0] for sequence in of_shard if (shard, (sequence[0],)) in valid}
        for shard, of_shard in enumerate(sequences)
    ]


@given(systems_with_valid_stages())
def test_a_shard_serves_if_and_only_if_a_first_slice_is_alive(case):
    sequences, valid = case
    plan = Plan(sequences)
    alive = plan.first_slices_alive(set(keys_of(valid)))
    assert [bool(tips) for tips in plan.served(set(keys_of(valid)))] == [bool(slices) for slices in alive]


@given(systems())
def test_with_every_stage_valid_the_first_sequence_of_every_shard_serves_in_full(sequences):
    plan = Plan(sequences)
    assert [plain(tips) for tips in plan.served(plan.stages())] == [
        [(shard, of_shard[0])] for shard, of_shard in enumerate(sequences)
    ]


# From the settings


@given(systems())
def test_explicit_sequences_are_the_plan(sequences):
    config = S3TConfig(
        num_shards=len(sequences),
        num_slices=len(sequences[0][0]),
        sequence_selection=[[list(sequence) for sequence in of_shard] for of_shard in sequences],
        keep_idle=True,
    )
    assert Plan.from_config(config).sequences == sequences


def test_one_list_of_sequences_holds_for_every_shard():
    listed = [[2, 0, 1], [0, 1, 2]]
    plan = Plan.from_config(S3TConfig(num_shards=2, num_slices=3, sequence_selection=listed, keep_idle=True))
    assert plan.sequences == (((2, 0, 1), (0, 1, 2)),) * 2


def test_a_prior_per_shard_gives_every_shard_its_own_sequences():
    priors = [[0.9, 0.05, 0.05], [0.05, 0.05, 0.9]]
    config = S3TConfig(num_shards=2, num_slices=3, budget=1, sequence_selection="bms", deletion_prior=priors)
    (first,), (second,) = Plan.from_config(config).sequences
    assert first[-1] == 0 and second[-1] == 2  # the slice that is hit most often comes last


@pytest.mark.parametrize("selection", ["cyclic", "cyclic-paper", "random"])
@pytest.mark.parametrize(("num_slices", "budget"), [(1, 1), (3, 2), (4, 4), (4, 9)])
def test_a_plan_has_budget_distinct_permutations_per_shard(selection, num_slices, budget):
    config = S3TConfig(
        num_shards=2, num_slices=num_slices, budget=budget, sequence_selection=selection, keep_idle=True
    )
    plan = Plan.from_config(config)
    assert plan.num_shards == 2
    for of_shard in plan.sequences:
        assert len(set(of_shard)) == len(of_shard) == budget
        assert all(sorted(sequence) == list(range(num_slices)) for sequence in of_shard)
    assert Plan.from_config(S3TConfig.from_json(config.to_json())) == plan


def test_the_cost_of_a_stage_counts_all_layers_forward_and_those_from_its_group_up_backward():
    assert relative_cost(StageKey(0, (2,)), num_examples=10, num_layers=8, layers_below=6) == 10 * (8 + 2)
    assert relative_cost(StageKey(0, (2, 1)), num_examples=20, num_layers=8, layers_below=4) == 20 * (8 + 4)


# Addresses


numbers = st.integers(0, 10**6)
stage_keys = st.builds(StageKey, numbers, st.lists(numbers, min_size=1, max_size=6).map(tuple))


@MANY
@given(stage_keys)
def test_a_key_is_found_again_from_its_path(key):
    assert StageKey.from_path(key.path) == key
    assert key.path == f"stages/{key}"


@MANY
@given(stage_keys, stage_keys)
def test_distinct_keys_have_distinct_paths_and_adapter_names(one, other):
    assume(one != other)
    assert one.path != other.path
    assert one.adapter_name != other.adapter_name


@given(stage_keys)
def test_adapter_names_hold_no_dots_which_module_names_cannot_hold(key):
    assert "." not in key.adapter_name


WRONG_PATHS = [
    "", "stages", "stages/", "stages/shard-0", "stages/shard-0/", "shard-0/1", "/stages/shard-0/1",
    "stages/shard-0/1/", "stages/shard-0/1-", "stages/shard-0/-1", "stages/shard-0/1--2",
    "stages/shard-00/1", "stages/shard-01/1",
    "stages/shard-0/01", "stages/shard-0/1-02", "stages/shard--1/0", "stages/shard-a/0", "stages/shard-0/a",
    "stages/shard-0/1 ", " stages/shard-0/1", "stages/shard-0/1\n", "stages\\shard-0\\1", "stages/shard-0/1-2/3",
    "stages/shard-0/../1", "stages/shard-/0", "stages/Shard-0/1", "stages/shard-0/+1", "stages/shard-0/1.0",
    "stages/shard-0/\u0661", "stages/shard-\u0661/0",
]  # fmt: skip


@pytest.mark.parametrize("path", WRONG_PATHS)
def test_anything_else_is_no_path_of_a_stage(path):
    with pytest.raises(FolderError, match="is not the path of a stage, which looks like stages/shard-0/2-0-1"):
        StageKey.from_path(path)


@MANY
@given(st.text("stages/hrd-0123 \n.", max_size=24))
@example("stages/shard-0/2-0-1")
def test_whatever_is_read_as_a_path_is_written_the_same(path):
    try:
        key = StageKey.from_path(path)
    except FolderError:
        return
    assert key.path == path


@given(stage_keys)
def test_the_lineage_is_the_stack_from_the_first_stage_to_this_one(key):
    lineage = key.lineage
    assert [stage.depth for stage in lineage] == list(range(1, key.depth + 1))
    assert lineage[-1] == key and lineage[0].parent is None
    assert [stage.parent for stage in lineage[1:]] == list(lineage[:-1])
    assert [stage.group for stage in lineage] == list(range(key.depth))


# Seeds


def all_keys(num_shards, num_slices):
    return [
        StageKey(shard, prefix)
        for shard in range(num_shards)
        for depth in range(1, num_slices + 1)
        for prefix in itertools.permutations(range(num_slices), depth)
    ]


def test_distinct_stages_have_distinct_seeds():
    keys = all_keys(3, 5)
    assert len({stage_seed(42, key) for key in keys}) == len(keys)


@MANY
@given(stage_keys, st.integers(), st.integers())
def test_another_system_seed_gives_a_stage_another_seed(key, one, other):
    assume(one != other)
    assert stage_seed(one, key) != stage_seed(other, key)


@given(stage_keys, st.integers())
def test_a_stage_seed_is_good_for_every_generator(key, seed):
    assert 0 <= stage_seed(seed, key) < 2**31


@given(systems(), st.integers(0, 3))
def test_a_stage_seed_depends_on_seed_shard_and_prefix_and_not_on_the_plan_around_it(sequences, seed):
    seeds = {(key.shard, key.prefix): stage_seed(seed, key) for key in Plan(sequences).stages()}
    alone = {
        (shard, sequence[:depth]): stage_seed(seed, StageKey(shard, sequence[:depth]))
        for shard, of_shard in reversed(list(enumerate(sequences)))
        for sequence in of_shard
        for depth in range(len(sequence), 0, -1)
    }
    assert seeds == alone


def test_stage_seeds_are_the_same_in_every_process_and_version():
    assert [stage_seed(42, StageKey(0, (0,))), stage_seed(42, StageKey(1, (2, 0)))] == [1712106442, 761364934]


# Training, deleting and growing again, any number of times


class Life(RuleBasedStateMachine):
    """
    A system whose stages are records of slice digests, beside a naive model in which a stage is the set of ids it saw.

    The validity rule is applied to the records, as storage does: a stage is valid if what it recorded of each slice of
    its prefix equals that slice's digest now, and all it stands on is valid.
    """

    @initialize(sequences=systems(), per_slice=st.integers(1, 3))
    def start(self, sequences, per_slice):
        self.sequences = sequences
        self.plan = Plan(sequences)
        places = places_of(sequences) * per_slice
        rows = {f"e{n}": Example(*place, digest=KEY.of_content({"n": n})) for n, place in enumerate(places)}
        names = KeptNames(KEY, "plain")
        self.table = ExampleTable.of(rows, len(sequences), len(sequences[0][0]), seed=0, names=names)
        self.place_of = {i: (row.shard, row.slice) for i, row in rows.items()}
        self.records = {}
        self.old_copies = []
        self.alive = set(rows)
        self.saw = {}

    def members(self, place):
        return {i for i in self.alive if self.place_of[i] == place}

    def valid(self):
        found = set()
        for key in self.plan.stages():
            digests = [self.table.slice_digest(key.shard, s) for s in key.prefix]
            if self.records.get(key) == digests and (key.parent is None or key.parent in found):
                found.add(key)
        return found

    @rule(limit=st.integers(0, 30))
    def train(self, limit):
        """Stages are made in order; a crash may leave the rest for later."""
        for key in self.plan.missing(self.valid(), self.table.empty)[:limit]:
            assert key.parent is None or key.parent in self.valid()
            self.records[key] = [self.table.slice_digest(key.shard, s) for s in key.prefix]
            self.saw[key.shard, key.prefix] = set().union(*(self.members((key.shard, s)) for s in key.prefix))

    @precondition(lambda self: self.alive)
    @rule(data=st.data())
    def delete(self, data):
        ids = data.draw(st.sets(st.sampled_from(sorted(self.alive)), min_size=1, max_size=3))
        removed = self.plan.removed_by(self.table.places(ids), self.records)
        self.old_copies += [(key, self.records.pop(key)) for key in removed]
        self.table = self.table.without(ids)

        self.alive -= ids
        gone = {stage for stage, seen in self.saw.items() if seen & ids}
        assert set(plain(removed)) == gone
        self.saw = {stage: seen for stage, seen in self.saw.items() if stage not in gone}

    @precondition(lambda self: self.old_copies)
    @rule(data=st.data())
    def put_an_old_copy_back(self, data):
        key, record = data.draw(st.sampled_from(self.old_copies))
        if key not in self.records:
            self.records[key] = record
            assert key not in self.valid()
            del self.records[key]

    @invariant()
    def valid_stages_are_those_that_saw_exactly_what_is_left(self):
        valid = self.valid()
        assert set(plain(valid)) == set(self.saw)
        for (shard, prefix), seen in self.saw.items():
            assert seen == set().union(*(self.members((shard, s)) for s in prefix))

    @invariant()
    def missing_stages_are_what_training_would_add(self):
        empty = {place for place in places_of(self.sequences) if not self.members(place)}
        assert set(self.table.empty) == empty
        missing = plain(self.plan.missing(self.valid(), self.table.empty))
        assert missing == [stage for stage in naive_stages(self.sequences, empty) if stage not in self.saw]

    @invariant()
    def the_longest_stack_without_a_deleted_example_serves(self):
        served = self.plan.served(self.valid())
        assert [plain(tips) for tips in served] == naive_longest(self.sequences, set(self.saw))
        for tips in served:
            for shard, prefix in plain(tips):
                assert self.saw[shard, prefix] <= self.alive


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=50, stateful_step_count=20)
