"""What is recommended before training: costs, storage and times as METHOD counts them, and the choice among them."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hf_s3t import S3TConfig
from hf_s3t.analysis import deletion_rate
from hf_s3t.analysis.backbone import Backbone
from hf_s3t.analysis.options import shapes
from hf_s3t.analysis.plan_figure import figure_of_plan
from hf_s3t.analysis.planning import MOST_EPOCHS, Workload, recommend, sequence_cost, storage, survival
from hf_s3t.analysis.streams import Policy, families_under
from hf_s3t.errors import ConfigError
from hf_s3t.plan import LEAST_STEPS, Plan
from hf_s3t.sequences import select_sequences
from hf_s3t.sequences.families import depths_of_hit_sets, lattice, stage_work, stages_of, work_of


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 32,
}
WORKLOAD = Workload(num_examples=50_000, deletions_per_month=4, hours_per_epoch=2.0)
LAYERS = Backbone(num_layers=24)


@pytest.fixture(scope="module")
def found():
    return recommend(WORKLOAD, LAYERS)


class TestCost:
    @pytest.mark.parametrize("size, cost", [(4, 2.2), (6, 3.0), (7, 3.4)])
    def test_of_method_section_3(self, size, cost):
        # Layers that the slices divide, so that the last stage trains them all.
        assert round(sequence_cost(size, 4, 4 * size), 1) == cost

    def test_replay_of_sequences(self):
        # METHOD section 6: one chain at L = 4.
        costs = [sequence_cost(4, 6, 24, replay) for replay in (1.0, 0.5, 0.25, 0.0)]
        assert [round(cost, 2) for cost in costs] == [2.19, 1.5, 1.16, 0.81]

    def test_of_a_whole_plan_is_by_the_layers_of_the_model(self, found):
        best = found.chosen
        layers, size = best.layers_per_slice, best.num_slices
        expected = sum(
            (1 + best.replay * (len(prefix) - 1)) / size * (24 + len(prefix) * layers) / 48 for prefix in best.family
        )
        assert best.work == pytest.approx(expected)
        assert best.cost_ratio * WORKLOAD.epochs == pytest.approx(best.epochs * expected)
        assert best.training_hours == pytest.approx(2.0 * best.epochs * expected)
        assert best.num_stages == best.num_shards * len(best.family)

    def test_layers_left_over_below_save_work(self):
        # Five slices of 24 layers have four each: the lowest four carry no adapter, and no backward pass.
        five = {shape.kind: shape for shape in shapes(WORKLOAD, LAYERS, 1, 1.0) if shape.num_slices == 5}
        assert five["lattice"].work < work_of(lattice(5), 5)
        four = {shape.kind: shape for shape in shapes(WORKLOAD, LAYERS, 1, 1.0) if shape.num_slices == 4}
        assert four["lattice"].work == pytest.approx(6.5)


class TestStorage:
    def test_table_3(self):
        large = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}
        vit = Backbone.from_config(large, rank=16, target_modules="query-value", num_labels=200)
        sizes = [storage(5, 6, budget, 4, vit) / 1e9 for budget in (1, 2, 6)]
        assert [round(size, 3) for size in sizes] == [0.056, 0.112, 0.336]

    def test_shared_stages_lie_there_once(self):
        # All 24 sequences of four slices: 64 stages, not 96 (METHOD section 3).
        one = Backbone(num_layers=4, adapter_weights_per_layer=1)
        assert storage(1, 4, 24, 1, one) == 4 * 64

    def test_is_not_known_without_sizes(self):
        assert storage(1, 4, 4, 1, Backbone(num_layers=4)) is None


class TestBackbone:
    def test_all_linear_of_a_causal_language_model(self):
        # q, o: 4096 -> 4096; k, v: 4096 -> 1024; gate, up: 4096 -> 11008; down: 11008 -> 4096.
        per_rank = 2 * 8192 + 2 * 5120 + 3 * 15104
        assert Backbone.from_config(LLAMA, rank=32) == Backbone(32, 32 * per_rank)

    def test_query_and_value_of_others(self):
        assert Backbone.from_config({**LLAMA, "architectures": ["LlamaModel"]}, rank=1) == Backbone(32, 8192 + 5120)

    @pytest.mark.parametrize(
        "config",
        [{"n_layer": 6, "n_embd": 8}, {"n_layers": 6, "dim": 8}, {"text_config": {"num_layers": 6, "d_model": 8}}],
    )
    def test_other_names(self, config):
        assert Backbone.from_config(config, rank=2) == Backbone(6, 2 * 32)

    def test_without_sizes(self):
        assert Backbone.from_config({"num_layers": 6, "hidden_size": None}) == Backbone(6)

    @pytest.mark.parametrize("config", [{}, [], {"num_hidden_layers": "6"}])
    def test_no_layers(self, config):
        with pytest.raises(ConfigError, match="Give --num-layers"):
            Backbone.from_config(config)


class TestRecommendation:
    @pytest.mark.parametrize("until", ["first_shard", "exhausted"])
    @pytest.mark.parametrize("goal", [6, pytest.param(1, marks=pytest.mark.slow)])
    def test_is_the_cheapest_that_lasts_and_serves(self, goal, until):
        found = recommend(WORKLOAD, LAYERS, goal_months=goal, goal_depth=0.6, until=until, max_shards=3)
        best = found.chosen
        assert found.meets_goal and best in found.options and best.mean_depth >= 0.6 * best.num_slices
        lasts = best.months_between_dead_shards if until == "first_shard" else best.months_between_exhaustions
        assert lasts >= goal
        # Every way to set one up and to keep it up, one by one; what is simulated is not to the digit.
        for shape in shapes(WORKLOAD, LAYERS, 3):
            for policy in shape.policies():
                kept = shape.kept(policy, goal, 5)
                if shape.hours + kept.hours < 0.9 * best.total_hours:
                    assert kept.mean_depth < 0.65 * shape.num_slices or kept.months(until) < 2 * goal

    def test_facts_may_lie_in_many_shards_of_which_one_is_asked(self):
        said, facts = (recommend(WORKLOAD, LAYERS, goal_months=3, learns=learns) for learns in (None, "facts"))
        assert facts.chosen.num_shards > 5 >= said.chosen.num_shards
        assert facts.chosen.total_hours < said.chosen.total_hours and facts.meets_goal
        config = S3TConfig(**facts.settings, group_column="person")
        assert (config.gate, config.gate_top_k, config.num_shards) == ("terms", 1, facts.chosen.num_shards)
        assert "the shard that was taught it" in facts.answered_by and "group_column" in facts.notes[-1]
        few = recommend(WORKLOAD, LAYERS, goal_months=3, learns="facts", max_shards=4)
        assert few.chosen.num_shards <= 4 and few.gate

    def test_skills_are_the_mean_of_few_shards_and_both_want_few_shards_and_a_gate(self):
        said, skills, both = (recommend(WORKLOAD, LAYERS, learns=learns) for learns in (None, "skills", "both"))
        assert skills == replace(said, learns="skills") and skills.settings == skills.chosen.settings
        assert both.options == said.options and both.settings == {**said.settings, "gate": "terms", "gate_top_k": 1}

    def test_one_shard_has_nobody_to_ask(self):
        alone = recommend(WORKLOAD, LAYERS, learns="facts", max_shards=1, goal_months=1)
        assert alone.gate == {} and alone.answered_by == "its one shard" and "group_column" not in str(alone.notes)

    def test_its_settings_give_its_stages(self, found):
        for option in found.options:
            plan = Plan.from_config(S3TConfig(**option.settings))
            assert len(plan.stages()) == option.num_stages
            assert {frozenset(prefix) for prefix in plan.families[0]} == {frozenset(p) for p in option.family}

    def test_life_is_exact_and_each_example_is_deleted_once(self, found):
        best = found.chosen
        first_slices = sum(len(prefix) == 1 for prefix in best.family)
        arguments = (best.num_shards, best.num_slices, first_slices)
        first = deletion_rate(*arguments, num_examples=50_000, until="first_shard")
        assert best.deletions_until_first_dead_shard == first and best.months_until_first_dead_shard == first / 4
        assert best.deletions_until_exhausted == deletion_rate(*arguments, num_examples=50_000)
        assert best.targeted_deletions_until_first_dead_shard == first_slices
        assert best.targeted_deletions_until_exhausted == best.num_shards * first_slices

    def test_what_is_grown_again_is_as_simulated(self, found):
        best = found.chosen
        works = [(1 + best.replay * (d - 1)) / best.num_slices * (24 + d * best.layers_per_slice) / 48
                 for d in range(1, best.num_slices + 1)]  # fmt: skip
        stream = families_under(
            best.family, best.num_slices, best.policy, num_shards=best.num_shards, replay=best.replay, works=works,
            requests=48, runs=200, seed=5,
        )  # fmt: skip
        hours = 2.0 * best.epochs * stream.work
        assert best.hours_per_month == pytest.approx(hours / 12, rel=0.1)
        assert best.total_hours == pytest.approx(best.training_hours + 12 * best.hours_per_month)
        assert best.hours_per_request == pytest.approx(best.hours_per_month / 4)
        assert best.stages_per_request == pytest.approx(stream.stages / 48, rel=0.1)
        assert best.mean_depth == pytest.approx(sum(stream.depth_after[:48]) / 48, rel=0.03)
        assert best.depths == pytest.approx(stream.depth_after[::4], abs=0.2)
        assert found.months == tuple(range(13))

    def test_what_is_never_grown_again_is_exact(self, found):
        best = found.chosen
        size = best.num_slices
        depths = depths_of_hit_sets(best.family, size)
        # At random times, the number of requests that hit one slice is Poisson.
        hit = 1 - math.exp(-4 * 6 / (best.num_shards * size))
        expected = sum(
            depth * hit ** state.bit_count() * (1 - hit) ** (size - state.bit_count())
            for state, depth in enumerate(depths.tolist())
        )
        assert best.depths_without[6] == pytest.approx(expected)
        assert best.depths[0] == best.depths_without[0] == found.published_depths[0] == size

    def test_the_published_plan_beside_it(self, found):
        best = found.chosen
        size = best.num_slices
        published = stages_of(select_sequences(size, size))
        depths = depths_of_hit_sets(published, size)
        hit = 1 - math.exp(-4 * 12 / (best.num_shards * size))
        expected = sum(
            depth * hit ** state.bit_count() * (1 - hit) ** (size - state.bit_count())
            for state, depth in enumerate(depths.tolist())
        )
        assert found.published_depths[-1] == pytest.approx(expected)
        if 24 % size == 0:
            assert found.published_hours == pytest.approx(2.0 * best.epochs * work_of(published, size))

    def test_replay_is_asked_for(self):
        whole, none = (recommend(WORKLOAD, LAYERS, goal_months=3, replay=replay, max_shards=2) for replay in (1, 0.0))
        assert whole.chosen.replay == 1 and none.chosen.replay == 0
        assert none.chosen.total_hours < whole.chosen.total_hours

    @pytest.mark.parametrize(("rows", "replay"), [(600, 0.25), (599, 0.5), (200, 0.5), (199, 1.0)])
    def test_replay_is_by_the_rows_of_a_slice(self, rows, replay):
        found = shapes(Workload(4 * rows, 1.0, 1.0, epochs=30), LAYERS, 1)
        of_four = [shape for shape in found if shape.num_slices == 4]
        assert of_four and {shape.replay for shape in of_four} == {replay}
        assert all(f"by {rows} rows a slice" in shape.replay_reason for shape in of_four)
        # Of the same data, smaller slices want more of the earlier rows.
        assert {shape.replay for shape in found if shape.num_slices == 2} == {0.25 if rows >= 300 else 0.5}
        assert {shape.replay_reason for shape in shapes(WORKLOAD, LAYERS, 1, 0.5)} == {"as given"}

    def test_many_requests_are_as_the_later_of_those_that_are_simulated(self):
        shape = next(one for one in shapes(WORKLOAD, LAYERS, 2, 1.0)[::-1] if one.num_slices == 4 and one.kind == 1)
        policy = Policy.to_depth(4, 4)
        one, ten = shape.kept(policy, 100, 4), shape.kept(policy, 1000, 4)
        assert ten.hours == pytest.approx(10 * one.hours, rel=0.05) and ten.mean_depth == one.mean_depth == 4
        # A request costs what METHOD says, of one of two shards.
        exact = sum(depth * stage_work(depth, 4) for depth in range(1, 5)) / 4 / 2 * 2.0 * shape.epochs
        assert one.hours == pytest.approx(400 * exact, rel=0.05)
        assert len(shape.depths(policy, (0, 500, 1000), 1)) == 3

    def test_first_stages_get_their_steps(self):
        few = Workload(num_examples=600, deletions_per_month=2, hours_per_epoch=0.1)
        found = recommend(few, LAYERS, goal_months=6, goal_depth=0.3)
        assert found.chosen.epochs > few.epochs
        assert any("fewer than about 50 steps does not converge" in note for note in found.notes)
        for option in found.options:
            shortest = few.num_examples // (option.num_shards * option.num_slices)
            assert option.steps_of_first_stage == option.epochs * math.ceil(shortest / 8) >= LEAST_STEPS
            assert few.epochs <= option.epochs <= MOST_EPOCHS
            assert option.epochs == few.epochs or (option.epochs - 1) * math.ceil(shortest / 8) < LEAST_STEPS

    def test_more_depth_costs_more(self, found):
        ordered = sorted(found.options, key=lambda option: option.total_hours)
        assert list(found.options) == ordered and len(ordered) > 3
        assert ordered[-1].mean_depth / ordered[-1].num_slices > ordered[0].mean_depth / ordered[0].num_slices

    def test_the_same_again(self, found):
        assert recommend(WORKLOAD, LAYERS) == found

    def test_no_option_has_one_layer_a_slice_where_there_is_a_choice(self):
        assert all(option.layers_per_slice >= 2 for option in recommend(WORKLOAD, Backbone(6)).options)
        assert recommend(WORKLOAD, Backbone(1), goal_months=0.1).chosen.num_slices == 1

    def test_out_of_reach(self):
        found = recommend(WORKLOAD, LAYERS, goal_depth=1, max_hours_per_month=0.1)
        assert not found.meets_goal
        assert any("100% of its slices in the mean: this comes closest" in note for note in found.notes)
        assert all(option.hours_per_month < 0.15 for option in found.options)

    def test_nothing_grown_again_must_last(self):
        found = recommend(WORKLOAD, LAYERS, goal_months=1, goal_depth=0, max_hours_per_month=1e-6)
        assert found.meets_goal and found.chosen.after_each_request == "no stage"
        assert found.chosen.months_until_first_dead_shard >= 1

    def test_hours_are_a_limit(self, found):
        most = 0.6 * found.chosen.training_hours
        cheaper = recommend(WORKLOAD, LAYERS, max_hours=most)
        assert all(option.training_hours <= most for option in cheaper.options)
        with pytest.raises(ConfigError, match="the cheapest system takes"):
            recommend(WORKLOAD, LAYERS, max_hours=0.01)

    def test_too_few_examples(self):
        with pytest.raises(ConfigError, match="30 steps in 30 epochs, expected at least 50"):
            recommend(Workload(10, 1.0, 1.0), LAYERS)

    def test_is_plain_data(self, found):
        from dataclasses import asdict

        assert json.loads(json.dumps(asdict(found)))["chosen"]["policy"]["trigger"] == found.chosen.policy.trigger

    @pytest.mark.parametrize(
        "change, says",
        [
            (dict(num_examples=0), "`num_examples` must be"),
            (dict(deletions_per_month=0), "`deletions_per_month` must be a number above 0, got 0"),
            (dict(hours_per_epoch=math.inf), "`hours_per_epoch` must be a number above 0"),
            (dict(epochs=0), "`epochs` must be"),
            (dict(batch_size=2.5), "`batch_size` must be"),
        ],
    )
    def test_wrong_workloads(self, change, says):
        with pytest.raises(ConfigError, match=says):
            Workload(**{"num_examples": 100, "deletions_per_month": 1.0, "hours_per_epoch": 1.0, **change})

    @pytest.mark.parametrize(
        "change",
        [
            dict(goal_months=-1), dict(until="noon"), dict(max_shards=0), dict(max_hours=0), dict(goal_depth=1.1),
            dict(replay=-0.1), dict(replay=True), dict(max_hours_per_month=0),
            dict(learns="names"), dict(max_shards=True),
        ],
    )  # fmt: skip
    def test_wrong_goals(self, change):
        with pytest.raises(ConfigError, match="must be"):
            recommend(WORKLOAD, LAYERS, **change)


class TestPicture:
    @pytest.mark.parametrize("until", ["first_shard", "exhausted"])
    @pytest.mark.parametrize(
        ("workload", "limits"),
        [
            (Workload(52_000, deletions_per_month=4, hours_per_epoch=3.0), {"max_hours": 60}),
            (Workload(52_000, deletions_per_month=4, hours_per_epoch=3.0), {}),
            (Workload(3000, deletions_per_month=2, hours_per_epoch=0.1), {}),
            (Workload(52_000, deletions_per_month=4, hours_per_epoch=3.0), {"max_hours": 12.4, "goal_depth": 0.4}),
        ],
    )
    def test_labels_are_within_the_axes(self, workload, limits, until):
        figure = figure_of_plan(recommend(workload, Backbone(num_layers=32), until=until, **limits), workload)
        FigureCanvasAgg(figure).draw()
        axes = figure.axes[1]
        frame, labels = axes.get_window_extent(), [label.get_window_extent() for label in axes.texts]
        assert labels
        for box in labels:
            assert frame.x0 < box.x0 and box.x1 < frame.x1 and frame.y0 < box.y0 and box.y1 < frame.y1


class TestSurvival:
    def test_starts_whole_and_halves_where_it_says(self, found):
        best = found.chosen
        alive, depth = survival(best, np.array([0.0, best.months_until_half_depth * 4]))
        assert (alive[0], depth[0]) == (1.0, 1.0)
        assert depth[1] == pytest.approx(0.5, abs=1e-6)

    def test_a_shard_is_alive_until_all_its_first_slices_are_hit(self, found):
        best = found.chosen
        first_slices = sum(len(prefix) == 1 for prefix in best.family)
        hit = 1 - math.exp(-10 / (best.num_shards * best.num_slices))
        assert survival(best, np.array([10.0]))[0][0] == pytest.approx(1 - hit**first_slices)
