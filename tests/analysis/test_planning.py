"""What is recommended before training: costs, storage and times as METHOD counts them, and the choice among them."""

import json
import math

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from hf_s3t.analysis import deletion_rate, expected_depth
from hf_s3t.analysis.backbone import Backbone
from hf_s3t.analysis.plan_figure import figure_of_plan
from hf_s3t.analysis.planning import MOST_EPOCHS, Workload, recommend, sequence_cost, storage, survival
from hf_s3t.errors import ConfigError
from hf_s3t.plan import LEAST_STEPS, Plan
from hf_s3t.sequences import select_sequences


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


class TestCost:
    @pytest.mark.parametrize("size, cost", [(4, 2.2), (6, 3.0), (7, 3.4)])
    def test_of_method_section_3(self, size, cost):
        # Layers that the slices divide, so that the last stage trains them all.
        assert round(sequence_cost(size, 4, 4 * size), 1) == cost

    def test_of_a_whole_plan_counts_shared_stages_once(self):
        found = recommend(WORKLOAD, LAYERS, goal_months=1e9, max_shards=3).options[-1]
        sequences = tuple(select_sequences(found.num_slices, found.budget))
        layers = found.layers_per_slice
        expected = sum(
            key.depth / found.num_slices * (24 + key.depth * layers) / 48 for key in Plan((sequences,)).stages()
        )
        assert found.cost_ratio * WORKLOAD.epochs == pytest.approx(found.epochs * expected)
        assert found.training_hours == pytest.approx(2.0 * found.epochs * expected)
        assert found.num_stages == len(Plan((sequences,) * found.num_shards).stages())


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
    @pytest.mark.parametrize("goal", [1, 6, 12])
    def test_is_the_cheapest_that_lasts(self, goal, until):
        found = recommend(WORKLOAD, LAYERS, goal_months=goal, until=until)
        best = found.chosen
        assert found.meets_goal and best.months(until) >= goal and best in found.options
        # Every budget of every shape, tried one by one.
        for m in range(1, 6):
            for size in range(2, 13):
                for budget in range(1, size + 1):
                    months = deletion_rate(m, size, budget, until=until) / 4
                    cost = 3 * 2.0 * budget * sequence_cost(size, 24 // size, 24)
                    if cost < best.training_hours * (1 - 1e-9):
                        assert months < goal * 1.01

    def test_times_are_exact_and_each_example_is_deleted_once(self):
        best = recommend(WORKLOAD, LAYERS, goal_months=3).chosen
        arguments = (best.num_shards, best.num_slices, best.budget)
        first = deletion_rate(*arguments, num_examples=50_000, until="first_shard")
        assert best.deletions_until_first_dead_shard == first and best.months_until_first_dead_shard == first / 4
        assert best.deletions_until_exhausted == deletion_rate(*arguments, num_examples=50_000)
        assert best.targeted_deletions_until_first_dead_shard == best.budget
        assert best.targeted_deletions_until_exhausted == best.num_shards * best.budget

    def test_first_stages_get_their_steps(self):
        few = Workload(num_examples=600, deletions_per_month=2, hours_per_epoch=0.1)
        found = recommend(few, LAYERS, goal_months=6)
        assert found.chosen.epochs > few.epochs
        assert any("fewer than about 50 steps does not converge" in note for note in found.notes)
        for option in found.options:
            shortest = few.num_examples // (option.num_shards * option.num_slices)
            assert option.steps_of_first_stage == option.epochs * math.ceil(shortest / 8) >= LEAST_STEPS
            assert few.epochs <= option.epochs <= MOST_EPOCHS
            assert option.epochs == few.epochs or (option.epochs - 1) * math.ceil(shortest / 8) < LEAST_STEPS

    def test_longer_life_costs_more(self):
        options = recommend(WORKLOAD, LAYERS).options
        hours = [option.training_hours for option in options]
        assert hours == sorted(hours) and len(options) > 4

    def test_no_option_has_one_layer_a_slice_where_there_is_a_choice(self):
        assert all(option.layers_per_slice >= 2 for option in recommend(WORKLOAD, Backbone(6)).options)
        assert recommend(WORKLOAD, Backbone(1), goal_months=0.1).chosen.num_slices == 1

    def test_out_of_reach(self):
        found = recommend(WORKLOAD, LAYERS, goal_months=10_000)
        assert not found.meets_goal
        assert any("expected to last 10000 months" in note for note in found.notes)
        # Nothing lasts any longer.
        longest = found.chosen.months("first_shard")
        assert recommend(WORKLOAD, LAYERS, goal_months=longest).meets_goal
        assert not recommend(WORKLOAD, LAYERS, goal_months=1.001 * longest).meets_goal

    def test_hours_are_a_limit(self):
        free = recommend(WORKLOAD, LAYERS)
        found = recommend(WORKLOAD, LAYERS, max_hours=free.chosen.training_hours / 2)
        assert not found.meets_goal
        assert all(option.training_hours <= free.chosen.training_hours / 2 for option in found.options)
        with pytest.raises(ConfigError, match="the cheapest system takes"):
            recommend(WORKLOAD, LAYERS, max_hours=0.01)

    def test_too_few_examples(self):
        with pytest.raises(ConfigError, match="30 steps in 30 epochs, expected at least 50"):
            recommend(Workload(10, 1.0, 1.0), LAYERS)

    def test_is_plain_data(self):
        from dataclasses import asdict

        assert json.loads(json.dumps(asdict(recommend(WORKLOAD, LAYERS))))["chosen"]["sequence_selection"] == "cyclic"

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
        "change", [dict(goal_months=-1), dict(until="noon"), dict(max_shards=0), dict(max_hours=0)]
    )
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
            (Workload(52_000, deletions_per_month=4, hours_per_epoch=3.0), {"max_hours": 12.4}),
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
    def test_is_the_mean_over_poisson_hits(self):
        best = recommend(WORKLOAD, Backbone(8), goal_months=2).chosen
        sequences = select_sequences(best.num_slices, best.budget)
        mean = 3.0
        alive, depth = survival(best, np.array([0.0, mean * best.num_shards]))
        assert (alive[0], depth[0]) == (1.0, 1.0)
        # At random times, the number of requests that hit one shard is Poisson.
        chance = [math.exp(-mean) * mean**k / math.factorial(k) for k in range(40)]
        expected = sum(p * expected_depth(sequences, k) for k, p in enumerate(chance)) / best.num_slices
        assert depth[1] == pytest.approx(expected, rel=1e-9)

    def test_half_depth_is_where_half_of_the_slices_serve(self):
        best = recommend(WORKLOAD, LAYERS).chosen
        _, depth = survival(best, np.array([best.months_until_half_depth * 4]))
        assert depth[0] == pytest.approx(0.5, abs=1e-6)
