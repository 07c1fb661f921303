"""Streams of requests: the simulator against one that is slow and plainly right, and METHOD's numbers."""

import itertools
import random
from dataclasses import replace

import pytest

from hf_s3t import S3TConfig
from hf_s3t.analysis.frontiers import frontier, full_points, less_work, policies_of, s3t_points, sisa_points
from hf_s3t.analysis.growing import Growing
from hf_s3t.analysis.streams import Policy, families_under, full_retraining, sisa
from hf_s3t.errors import ConfigError
from hf_s3t.plan import Plan, StageKey
from hf_s3t.plan.growth import Growth
from hf_s3t.sequences import select_sequences
from hf_s3t.sequences.families import stage_work, stages_of


CHAIN = ((0,), (0, 1), (0, 1, 2), (0, 1, 2, 3))
PUBLISHED = stages_of(select_sequences(4, 4))


def requests(number, num_shards, num_slices, prior=None, seed=0):
    """The requests of a stream: each draws its shard, and then its slice."""
    rng = random.Random(seed)
    prior = prior or [1 / num_slices] * num_slices
    for _ in range(number):
        shard = int(rng.random() * num_shards)
        draw = rng.random() * sum(prior)
        yield shard, next(s for s in range(num_slices) if draw < sum(prior[: s + 1]) or s == num_slices - 1)


def slowly(config, policy, number, seed=0):
    """Depths after each request, the work and the number of stages, by keys of stages, the plan and its growth."""
    plan = Plan.from_config(config)
    growth = Growth(plan, config)
    m, size = config.num_shards, config.num_slices
    valid = set(plan.stages())
    depths, work, stages = [], 0.0, 0

    def depth_of(shard):
        return max((key.depth for key in valid if key.shard == shard), default=0)

    def grow(key):
        nonlocal work, stages
        assert key.parent is None or key.parent in valid
        valid.add(key)
        work += stage_work(key.depth, size, config.replay) / m
        stages += 1

    for place, hit in enumerate(requests(number, m, size, config.deletion_prior, seed), start=1):
        valid -= {key for key in valid if key.saw({hit})}
        low = [shard for shard in range(m) if depth_of(shard) < policy.trigger]
        if place % policy.every or not low or (policy.together and len(low) < m):
            low = []
        for shard in low:
            while depth_of(shard) < policy.target:
                own = [step.key for step in growth.missing(valid) if step.key.shard == shard]
                if not own:
                    break
                grow(own[0])
        left = len(plan.stages()) if policy.extra is None else policy.extra
        while left and (of_low := [step.key for step in growth.missing(valid) if step.key.shard in low]):
            grow(of_low[0])
            left -= 1
        depths.append([depth_of(shard) for shard in range(m)])
    return depths, work, stages


POLICIES = [
    Policy.never(),
    Policy.all_at_once(3),
    Policy.all_at_once(3, every=4),
    Policy.stages(3, 1),
    Policy.stages(3, 2, every=2),
    Policy.to_depth(2, 3),
    Policy.to_depth(3, 3),
    Policy.when_dead(3),
    Policy.when_exhausted(3),
    Policy(2, 2, 1),
]
SYSTEMS = [
    dict(num_shards=2),
    dict(num_shards=2, replay=0.25, deletion_prior=[0.6, 0.3, 0.1]),
    dict(num_shards=1, work_budget=2.6, deletion_prior=[0.2, 0.3, 0.5], score_horizon=5),
    dict(num_shards=2, budget=2),
    dict(num_shards=2, budget=1),
    dict(num_shards=2, budget=3, keep_idle=True),
]


class TestFamilies:
    @pytest.mark.parametrize("policy", POLICIES, ids=str)
    @pytest.mark.parametrize("settings", SYSTEMS, ids=str)
    def test_as_slowly(self, settings, policy):
        config = S3TConfig(num_slices=3, **settings)
        depths, work, stages = slowly(config, policy, 25)
        found = families_under(
            Plan.from_config(config).families[0],
            3,
            policy,
            num_shards=config.num_shards,
            by_sets=not config.keeps_idle,
            replay=config.replay,
            prior=config.deletion_prior,
            horizon=config.score_horizon,
            requests=25,
        )
        assert found.depth_after == pytest.approx([3, *(sum(own) / config.num_shards for own in depths)])
        assert found.work == pytest.approx(work) and found.stages == stages
        flat = list(itertools.chain(*depths))
        assert found.depths == pytest.approx([flat.count(depth) / len(flat) for depth in range(4)])

    @pytest.mark.parametrize(
        "settings", [dict(), dict(work_budget=5.2, replay=0.5), dict(budget=4), dict(num_slices=12, budget=3)], ids=str
    )
    @pytest.mark.parametrize("prior", [None, [0.4, 0.3, 0.2, 0.1]])
    def test_what_is_grown_next_is_as_growth_has_it(self, settings, prior):
        config = S3TConfig(**{"num_slices": 4, **settings})
        size = config.num_slices
        if prior is not None:
            prior = [share * 4 / size for share in prior for _ in range(size // 4)]
            config = replace(config, deletion_prior=prior)
        plan = Plan.from_config(config)
        growth, rng = Growth(plan, config), random.Random(1)
        # In whatever order it is given, a family is grown in that of the plan.
        shuffled = rng.sample(plan.families[0], len(plan.families[0]))
        growing = Growing(shuffled, size, prior=prior, replay=config.replay)
        for given in (plan.families[0], Plan.as_asked_for(config).families[0]):
            assert Growing(given, size, prior=prior, replay=config.replay).stages == growing.stages
        for _ in range(40):
            # Deletions and stages that were grown since, in any order.
            state, valid = growing.all, set(plan.stages())
            for _ in range(rng.randrange(1, 6)):
                hit = rng.randrange(size)
                state = growing.without(state, hit)
                valid = {key for key in valid if not key.saw({(0, hit)})}
                for _ in range(rng.randrange(4)):
                    step, expected = growing.next(state), growth.next(valid)
                    assert (step is None) == (expected is None)
                    if step is not None:
                        assert set(growing.stages[step.place]) == set(expected.key.prefix)
                        state |= 1 << step.place
                        valid.add(expected.key)
            assert {frozenset(growing.stages[i]) for i in range(len(growing.stages)) if state >> i & 1} == {
                frozenset(key.prefix) for key in valid
            }
            assert growing.depth(state) == max((key.depth for key in valid), default=0)

    def test_runs_are_averaged(self):
        one = [families_under(CHAIN, 4, Policy.when_dead(4), requests=50, runs=1)]
        both = families_under(CHAIN, 4, Policy.when_dead(4), requests=50, runs=2)
        # The second stream goes on where the first one has drawn its requests.
        whole = list(requests(100, 1, 4))
        second = [0.0, 0]
        depth = 4
        for _, slice_ in whole[50:]:
            depth = min(depth, slice_)
            if depth == 0:
                second[0] += sum(stage_work(d, 4) for d in range(1, 5))
                second[1] += 1
                depth = 4
        assert both.work == pytest.approx((one[0].work + second[0]) / 2)
        assert both.deaths == (one[0].deaths + second[1]) / 2

    def test_deaths_are_of_shards_and_exhaustions_of_the_last_one(self):
        # Of one slice each, every request kills what it hits.
        found = families_under([(0,)], 1, Policy.when_exhausted(1), num_shards=2, requests=400)
        alive, deaths, exhaustions = {0, 1}, 0, 0
        for shard, _ in requests(400, 2, 1):
            deaths += shard in alive
            alive -= {shard}
            if not alive:
                exhaustions += 1
                alive = {0, 1}
        assert (found.deaths, found.exhaustions) == (deaths, exhaustions)

    @pytest.mark.parametrize(
        "change, says",
        [
            (dict(policy=Policy(5, 5)), "target=5, but a shard of num_slices=4 serves no deeper"),
            (dict(policy=Policy(4, 4, -1)), "`extra`"),
            (dict(policy=Policy(4, 4, every=0)), "`every`"),
            (dict(requests=0), "`requests`"),
            (dict(runs=0), "`runs`"),
            (dict(num_shards=0), "`num_shards`"),
            (dict(prior=[1.0]), "1 value|`deletion_prior`"),
        ],
    )
    def test_wrong_arguments(self, change, says):
        with pytest.raises(ConfigError, match=says):
            families_under(**{"family": CHAIN, "num_slices": 4, "policy": Policy.to_depth(4, 4), **change})


class TestMethod:
    """Numbers of METHOD sections 3 and 6, in full fine-tunings of the shard for each request that hits it."""

    MANY = 20_000

    def test_a_chain_that_holds_full_depth(self):
        # Each of the four slices is as likely the one from which on stages are gone: 1.7 whatever the order.
        exact = sum(depth * stage_work(depth, 4) for depth in range(1, 5)) / 4
        assert round(exact, 1) == 1.7
        for order in (range(4), reversed(range(4)), (2, 0, 3, 1)):
            family = stages_of([tuple(order)])
            found = families_under(family, 4, Policy.to_depth(4, 4), requests=self.MANY)
            assert found.mean_depth == 4 and found.work / self.MANY == pytest.approx(exact, rel=0.01)

    def test_sisa_at_once(self):
        # Whole adapters: 1.09 times as much, which METHOD's simulation of one chain had as 1.09 to 1.13.
        found = sisa(4, requests=self.MANY)
        assert found.work / self.MANY == pytest.approx(1.875, rel=0.01)
        assert 1.875 / 1.71875 == pytest.approx(1.09, abs=0.005)

    def test_the_published_plan_costs_more_than_sisa(self):
        # B = 4: 8.75 for every 25/3 requests that it outlives; SISA 2.5 for every 4: 1.68 times as much if shards are
        # trained anew when they are dead. (1.6, of Figure 9, is of measured seconds and whole systems.)
        dead = Policy.when_dead(4)
        ours = families_under(PUBLISHED, 4, dead, by_sets=False, requests=self.MANY)
        theirs = sisa(4, dead, requests=self.MANY)
        assert ours.first_work == 8.75 and theirs.first_work == 2.5
        assert ours.work / theirs.work == pytest.approx(8.75 / (25 / 3) / (2.5 / 4), rel=0.03)
        # All at once, every request costs each depth as often as it is deep.
        at_once = families_under(PUBLISHED, 4, Policy.all_at_once(4), by_sets=False, requests=1000)
        assert at_once.work / 1000 == pytest.approx(6.875) and at_once.mean_depth == 4

    def test_full_retraining(self):
        assert full_retraining(requests=1000).work == 1000 and full_retraining(requests=1000, every=7).work == 142


class TestSisa:
    def test_prior_puts_the_likeliest_last(self):
        prior = [0.7, 0.1, 0.1, 0.1]
        # Of what is hit, that and all after it is trained again.
        again = [2.5, 2.25, 1.75, 1.0]
        for reorders, order in ((False, prior), (True, prior[::-1])):
            found = sisa(4, prior=prior, reorders=reorders, requests=20_000)
            assert found.work / 20_000 == pytest.approx(
                sum(p * w for p, w in zip(order, again, strict=True)), rel=0.02
            )

    def test_order_makes_no_difference_without_one(self):
        works = [sisa(4, reorders=reorders, requests=20_000).work for reorders in (False, True)]
        assert works[0] == pytest.approx(works[1], rel=0.02)

    def test_replay_saves(self):
        # Depth by depth: a quarter, and of the earlier slices half.
        assert sisa(4, replay=0.5, requests=1).first_work == 0.25 * (1 + 1.5 + 2 + 2.5)

    def test_lazily(self):
        lazy = sisa(4, Policy.to_depth(2, 4), requests=2000)
        assert lazy.mean_depth < 4 and lazy.work < 0.9 * sisa(4, requests=2000).work

    def test_some_units_after_each_request(self):
        # Two units at a time, the most of them where the chain is shallow.
        found = sisa(2, Policy.stages(2, 1), num_shards=1, requests=3)
        depth, work = 2, 0.0
        order = [0, 1]
        for _, slice_ in requests(3, 1, 2):
            place = order.index(slice_)
            depth = min(depth, place)
            rest = [s for s in order[depth:] if s != slice_]
            order[depth:] = [*rest, slice_]
            if depth < 2:
                work += (depth + 1) / 2
                depth += 1
        assert found.work == work and found.stages == 3


class TestFrontiers:
    BY_DEPTH = (0.0, 0.25, 0.5, 0.75, 1.0)

    @pytest.fixture(scope="class")
    def points(self):
        plans = {"chain": CHAIN, "lattice": Plan.from_config(S3TConfig()).families[0]}
        quality = dict.fromkeys((1.0, 0.25), self.BY_DEPTH)
        return s3t_points(plans, 4, quality, requests=1000), sisa_points(4, quality, requests=1000)

    def test_less_work_than_sisa_at_every_quality(self, points):
        pairs = less_work(*points)
        assert pairs[-1][0].quality == 1.0
        assert all(ours is not None and ours.work < theirs.work for theirs, ours in pairs)

    def test_of_a_frontier_none_beats_another(self, points):
        for own in points:
            kept = frontier(own)
            assert [p.quality for p in kept] == sorted(p.quality for p in kept)
            assert not any(
                p.work < kept[i].work and p.quality >= kept[i].quality for p in own for i in range(len(kept))
            )

    def test_quality_is_of_the_depths_that_serve(self, points):
        for point in points[0][:50]:
            assert point.quality == pytest.approx(point.mean_depth / 4)

    def test_the_same_requests_for_all(self):
        alone = s3t_points({"chain": CHAIN}, 4, {1.0: self.BY_DEPTH}, policies=[Policy.when_dead(4)], requests=300)
        theirs = sisa_points(4, {1.0: self.BY_DEPTH}, policies=[Policy.when_dead(4)], reorders=False, requests=300)
        # Chains in one order die of the same requests.
        assert alone[0].work / alone[0].first_work == pytest.approx(theirs[0].work / theirs[0].first_work)

    def test_full_retraining_is_as_good_whenever(self):
        assert {point.quality for point in full_points(0.9)} == {0.9}

    def test_policies_are_distinct_and_fit(self):
        found = policies_of(3)
        assert len(set(found)) == len(found)
        for policy in found:
            policy.check(3)

    def test_quality_of_every_depth_is_asked_for(self):
        with pytest.raises(ConfigError, match="given for 4 depths, expected num_slices \\+ 1 = 5"):
            sisa_points(4, {1.0: self.BY_DEPTH[:-1]})


def test_stage_keys_are_of_no_use_to_the_simulator():
    """States are sets: however a stage came by its slices, what is grown next is the same."""
    config = S3TConfig(num_slices=3)
    growth = Growth(Plan.from_config(config), config)
    for order in itertools.permutations(range(3)):
        valid = {StageKey(0, order[:depth]) for depth in range(1, 4)}
        straight = {StageKey(0, tuple(sorted(key.prefix))) for key in valid}
        assert set(growth.next(valid).key.prefix) == set(growth.next(straight).key.prefix)
