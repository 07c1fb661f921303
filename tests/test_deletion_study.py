"""Studies of trained systems: the arithmetic of streams, smaller budgets from larger ones, a study end to end."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny import batch_of, classification_rows, lora, s3t_config, tiny_bert, tiny_vit, training_arguments
from transformers import ViTImageProcessorPil

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.analysis import deletion_rate_paper
from hf_s3t.analysis.figures import draw
from hf_s3t.analysis.study_figures import DRAWERS, quality_at
from hf_s3t.analysis.timelines import time_of_lives, time_of_rolling_back
from hf_s3t.errors import ConfigError
from hf_s3t.storage import ADAPTER_FILE


sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "recipes"))

import deletion_study
from trained_systems import check_budgets, delete_one_by_one, request_order, served_subset


FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"


class TestStreams:
    @pytest.mark.parametrize("budget", [1, 3])
    def test_a_system_is_trained_as_often_as_lemma_1_says(self, budget):
        """In a long stream one training comes with every deletion rate."""
        first = [set(range(budget))] * 2
        spent = time_of_lives(first, 3, [1.0, 2.0], requests=3000, runs=40, delete_seconds=0.5)
        trainings = (spent[:, -1] - 3000 * 0.5) / 3.0
        assert np.allclose(trainings, trainings.round())
        assert trainings.mean() == pytest.approx(3000 / deletion_rate_paper(2, 3, budget), rel=0.03)
        assert (np.diff(spent, axis=1) >= 0.5).all()

    def test_a_dead_shard_is_trained_by_itself(self):
        """Half of the requests hit a shard, and every third of those its one first slice."""
        spent = time_of_lives([{0}, {1}], 3, [6.0, 6.0], requests=3000, runs=40, retrain="dead_shard")
        assert spent[:, -1].mean() == pytest.approx(3000 / 3 * 6.0, rel=0.03)
        steps = np.unique(np.diff(spent, axis=1))
        assert steps.tolist() == [0.0, 6.0]

    def test_rolling_back_trains_from_the_hit_slice_on(self):
        spent = time_of_rolling_back([[1.0, 2.0, 4.0]], requests=2000, runs=40, delete_seconds=0.25)
        assert set(np.unique(np.diff(spent, axis=1)).tolist()) == {4.25, 6.25, 7.25}
        assert spent[:, -1].mean() == pytest.approx(2000 * (17 / 3 + 0.25), rel=0.01)

    def test_the_same_seed_gives_the_same_stream(self):
        arguments = dict(requests=50, runs=3, delete_seconds=0.1)
        one, two = (time_of_lives([{0}], 2, [1.0], seed=seed, **arguments) for seed in (1, 1))
        assert np.array_equal(one, two)
        assert not np.array_equal(one, time_of_lives([{0}], 2, [1.0], seed=2, **arguments))

    def test_refusals(self):
        with pytest.raises(ConfigError, match="of 1 shards and `shard_seconds` of 2"):
            time_of_lives([{0}], 2, [1.0, 2.0], requests=3)
        with pytest.raises(ConfigError, match=re.escape("shard 0 are [2], expected some of 0 to 1")):
            time_of_lives([{2}], 2, [1.0], requests=3)
        with pytest.raises(ConfigError, match="must be one of exhausted, dead_shard"):
            time_of_lives([{0}], 2, [1.0], requests=3, retrain="never")
        with pytest.raises(ConfigError, match="same number, one per slice"):
            time_of_rolling_back([[1.0], [1.0, 2.0]], requests=3)


def test_request_orders_are_permutations_that_differ():
    orders = [request_order(list("abcdefgh"), number) for number in (0, 1)]
    assert all(sorted(order) == list("abcdefgh") for order in orders)
    assert orders[0] != orders[1] and orders[0] == request_order(list("abcdefgh"), 0)


# Smaller budgets


ROWS = classification_rows(18)
NEW = classification_rows(5, seed=9)


def trainer_of(folder, **changes):
    from datasets import Dataset

    from hf_s3t import S3TTrainer

    model = tiny_bert(3)
    return S3TTrainer(
        model=model,
        args=training_arguments(folder),
        train_dataset=Dataset.from_list(ROWS),
        peft_config=lora(model),
        s3t_config=s3t_config(num_slices=3, **changes),
    )


@pytest.fixture(scope="module")
def largest(tmp_path_factory, one_thread):
    folder = tmp_path_factory.mktemp("largest") / "system"
    trainer_of(folder, budget=3).train()
    return folder


def answers(folder) -> torch.Tensor:
    model = S3TModel.from_pretrained(folder, base_model=tiny_bert(3))
    with torch.no_grad():
        return model(**batch_of(NEW)).logits


def tensors_of(folder) -> dict:
    found = sorted(folder.glob(f"stages/shard-*/*/{ADAPTER_FILE}"))
    return {path.parent.name: load_file(path) for path in found}


@pytest.mark.usefixtures("one_thread")
class TestSubsets:
    def test_it_is_what_training_with_the_smaller_budget_makes(self, largest, tmp_path):
        """Every stage, and what it serves, before and after a deletion, bit for bit."""
        trainer_of(tmp_path / "trained", budget=2).train()
        served_subset(largest, tmp_path / "subset", budget=2)
        for _ in range(2):
            expected, found = (tensors_of(tmp_path / name) for name in ("trained", "subset"))
            assert expected.keys() == found.keys() and expected
            for stage, tensors in expected.items():
                assert all(torch.equal(tensor, found[stage][name]) for name, tensor in tensors.items()), stage
            assert torch.equal(answers(tmp_path / "trained"), answers(tmp_path / "subset"))
            for name in ("trained", "subset"):
                model = S3TModel.from_pretrained(tmp_path / name, base_model=tiny_bert(3))
                gone = model.folder.table.members(0, 2)[0]
                assert model.unlearn([gone]).depths_after == [2]
                assert not model.check()

    def test_a_deletion_leaves_the_source_as_it_was(self, largest, tmp_path):
        before = {path: path.read_bytes() for path in largest.rglob("*") if path.is_file()}
        target = served_subset(largest, tmp_path / "subset", budget=1)
        model = S3TModel.from_pretrained(target, base_model=tiny_bert(3))
        model.unlearn([ROWS[0]["id"]])
        model.check()
        assert {path: path.read_bytes() for path in largest.rglob("*") if path.is_file()} == before

    def test_sequences_and_selection(self, largest, tmp_path):
        every = served_subset(largest, tmp_path / "all", select="all", sequence_selection=[[1, 2, 0]], budget=None)
        assert sorted(tensors_of(every)) == ["1", "1-2", "1-2-0"]
        assert sorted(tensors_of(served_subset(largest, tmp_path / "none", shards=[]))) == []

    def test_refusals(self, largest, tmp_path):
        with pytest.raises(ConfigError, match="lacks 4 of the 13 stages that are asked for, such as shard-0"):
            served_subset(largest, tmp_path / "more", budget=5)
        with pytest.raises(ConfigError, match="num_slices cannot be changed after training"):
            served_subset(largest, tmp_path / "other", num_slices=2)
        with pytest.raises(ConfigError, match="is there already"):
            served_subset(largest, tmp_path, budget=1)
        assert not (tmp_path / "more").exists()


class _Counted:
    """Stands in for a workbench: quality is the number of slices that serve."""

    def __init__(self):
        self.measured = 0

    def quality(self, method):
        self.measured += 1
        return float(sum(method.depths))


@pytest.mark.usefixtures("one_thread")
def test_deleting_one_by_one_measures_what_changes(largest, tmp_path):
    from datasets import Dataset

    from hf_s3t.baselines import METHODS

    served_subset(largest, tmp_path / "copy", budget=2)
    method = METHODS["s3t"](tiny_bert(3), training_arguments(tmp_path / "copy"), train_dataset=Dataset.from_list(ROWS))
    bench, ids = _Counted(), request_order([row["id"] for row in ROWS], 0)
    run = delete_one_by_one(bench, method, ids)
    assert run["points"][0] == {"request": 0, "depths": [3], "quality": 3.0}
    assert run["points"][-1] == {"request": run["exhausted_after"], "depths": [0], "quality": None}
    assert run["requests"] == run["exhausted_after"] == len(run["seconds"])
    assert bench.measured <= len(run["points"]) - 1
    at = quality_at(run, range(run["requests"] + 1), 0.1)
    assert at[0] == 3.0 and at[-1] == 0.1 and len(at) == run["requests"] + 1


# Files


def test_storage_grows_with_the_budget_as_its_stages_do(tmp_path):
    settings = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=8)
    rows = deletion_study.measured_storage(
        tmp_path / "files", num_shards=2, num_slices=2, layers_per_slice=2, model_settings=settings
    )
    assert [(row["budget"], row["stages"]) for row in rows] == [(1, 4), (2, 8)]
    # Two layers of rank 16 on query and value, and a head of 200 classes: the rest of a file is its header.
    numbers = 2 * 2 * 16 * (16 + 16) + 200 * (16 + 1)
    for row in rows:
        per_stage = row["adapter_gigabytes"] * 1e9 / row["stages"]
        assert 4 * numbers < per_stage < 4 * numbers + 4000
        assert row["folder_gigabytes"] > row["adapter_gigabytes"]
    assert rows[1]["adapter_gigabytes"] == pytest.approx(2 * rows[0]["adapter_gigabytes"], rel=0.01)
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize("name", sorted(DRAWERS))
def test_every_figure_is_drawn_with_named_axes(name, tmp_path):
    data = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    assert data["paper"] and data["hardware"]["cpu"]
    assert not re.search(r'"/[a-z]+/', json.dumps(data)), "a path of a machine"
    draw(name, data, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    labels = re.findall("<!-- (.*(?:request|seconds|slices|budget|layers|sequences|depth|%|GB).*) -->", text)
    assert len(labels) >= 2
    picture = (FIGURES / f"{name}.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) < 100_000


# End to end


def save_tiny_vit(folder):
    tiny_vit(2, labels=10).save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_studies_end_to_end(tmp_path, capsys):
    model = save_tiny_vit(tmp_path / "base")
    common = [
        *("--task_name", "digits", "--model_name_or_path", str(model), "--augmentation", "none"),
        *("--max_train_samples", "48", "--max_eval_samples", "20", "--num_shards", "2", "--num_slices", "2"),
        *("--num_train_epochs", "1", "--per_device_train_batch_size", "4", "--disable_tqdm", "true"),
        *("--lora_r", "2", "--target_modules", "[q_proj, v_proj]"),
        *("--work_dir", str(tmp_path / "work"), "--output", str(tmp_path / "figures")),
    ]
    deletions = ["--budgets", "1", "2", "--orders", "1", "--requests", "12", "--retrain_every", "6"]
    deletion_study.main(["quality", *common, *deletions])
    data = json.loads((tmp_path / "figures" / "figure-6-left.json").read_text())
    assert set(data["systems"]) == {"s3t-1", "s3t-2", "sisa", "protosisa"}
    assert [point["request"] for point in data["full"]] == [0, 6, 12]
    for (run,) in data["systems"].values():
        assert run["points"][0]["depths"] == [2, 2] and 0 <= run["points"][0]["quality"] <= 1
    # What is there is neither trained nor measured again.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "systems").rglob(ADAPTER_FILE)}
    deletion_study.main(["time", *common, *deletions, "--stream", "50"])
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "systems").rglob(ADAPTER_FILE)}
    assert times == again and len(times) == 8 + 4 + 4 + 1
    lives = json.loads((tmp_path / "figures" / "figure-9.json").read_text())
    assert lives["totals"]["full"]["mean"] == pytest.approx(50 * lives["training_seconds"]["full"], rel=1e-4)
    (tmp_path / "figures" / "figure-9.png").unlink()
    deletion_study.main(["time", "--redraw", "--output", str(tmp_path / "figures")])
    assert (tmp_path / "figures" / "figure-9.png").exists()
    with pytest.raises(ConfigError, match="measured under other settings"):
        deletion_study.main(["quality", *common, *deletions, "--requests", "13"])
    deletion_study.main(["weights", *common, "--orders", "1", "--after", "3", "--weights", "0", "0.5", "1"])
    by_weight = json.loads((tmp_path / "figures" / "figure-15-weights.json").read_text())
    assert by_weight["after"] == [0, 3]
    # Nothing deleted: half the weight is what ProtoSISA has by default, and what Figure 6 starts with.
    ((before, after),) = by_weight["orders"]
    assert before["quality"][1] == data["systems"]["protosisa"][0]["points"][0]["quality"]
    assert before["shards_left"] == 2 and len(after["quality"]) == 3


def test_budgets_that_the_largest_does_not_contain_are_refused_beforehand():
    config = S3TConfig(num_shards=1, num_slices=6)
    check_budgets(config, [1, 3, 6])
    with pytest.raises(ConfigError, match=r"Budget 2 has sequences that 3, .* Choose among 1, 3, or another rule"):
        check_budgets(config, [2, 3])


def test_the_drop_of_results_is_how_much_worse_they_get(tmp_path):
    def drop(metric, *by_depth) -> list[float]:
        metrics = {"test": {str(depth): {metric: value} for depth, value in enumerate(by_depth, 1)}}
        settings = {"script": {}, "s3t": {"num_shards": 1}}
        content = {"metrics": metrics, "settings": settings, "method": "s3t", "seed": 1, "recipe": "llama_alpaca"}
        (tmp_path / "r.json").write_text(json.dumps(content))
        found = deletion_study._from_results(tmp_path / "r.json")
        assert found["name"] == "llama_alpaca: S3T, m = 1"
        return found["drop"]

    assert drop("accuracy", 0.6, 0.8) == pytest.approx([0, 0.25]) and drop("loss", 2.5, 2.0) == pytest.approx(
        [0, 0.25]
    )
    with pytest.raises(ConfigError, match=r"is 0 \(matthews_correlation\)"):
        drop("matthews_correlation", 0.1, 0.0)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no results of a recipe"):
        deletion_study.main(["drop", "--results", str(tmp_path / "other.json"), "--output", str(tmp_path)])


@pytest.mark.parametrize("count", [3, 9])
def test_every_budget_has_a_line_of_its_own(count, tmp_path):
    data = json.loads((FIGURES / "figure-6-left.json").read_text(encoding="utf-8"))
    runs = data["systems"]["s3t-1"]
    data["expected_exhausted"] = {}
    data["systems"] = {**{f"s3t-{budget}": runs for budget in range(1, count + 1)}, "sisa": runs, "protosisa": runs}
    draw("figure-6-left", data, tmp_path / "figure.svg")
    assert f"<!-- S3T, B = {count} -->" in (tmp_path / "figure.svg").read_text(encoding="utf-8")


def test_what_cannot_be_drawn_is_said_before_anything_is_trained(tmp_path):
    with pytest.raises(ConfigError, match="Run the study without --redraw"):
        deletion_study.main(["drop", "--redraw", "--output", str(tmp_path)])
    with pytest.raises(ConfigError, match="`--model_name_or_path` is missing"):
        deletion_study.main(["quality", "--task_name", "digits", "--output", str(tmp_path)])
    with pytest.raises(ConfigError, match="does not know --seeds"):
        deletion_study.main(["storage", "--seeds", "1", "--output", str(tmp_path)])
