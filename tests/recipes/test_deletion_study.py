"""Studies of trained systems: the arithmetic of streams, smaller budgets from larger ones, a study end to end."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import deletion_study
import numpy as np
import pretrain_vit
import pytest
import torch
from safetensors.torch import load_file
from studies import pictures_of_deletions, pictures_of_studies, workbench
from studies.deletions import delete_one_by_one, request_order
from studies.depth import run_of_results
from studies.figures import draw
from studies.measured import quality_at, standard_error
from studies.storage import measured_storage
from studies.subsets import check_budgets, served_subset
from studies.tables import by_deleted_slices
from studies.timelines import time_of_lives, time_of_rolling_back
from studies.workbench import Workbench
from support.tiny import batch_of, classification_rows, lora, s3t_config, tiny_bert, tiny_vit, training_arguments
from transformers import ViTImageProcessorPil

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.analysis import deletion_rate_paper
from hf_s3t.errors import ConfigError
from hf_s3t.folder.layout import ADAPTER_FILE
from hf_s3t.folder.system import SystemFolder


DOCS = Path(__file__).resolve().parents[2] / "docs"
FIGURES = DOCS / "figures"
# What `reproduce.py figure` draws is looked at where its tables are.
STORED = [
    *pictures_of_deletions.DRAWERS,
    *(name for name in pictures_of_studies.DRAWERS if name != "replay"),
    "lower-rate/figure-14",
]


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
        one, other = SystemFolder(tmp_path / "trained"), SystemFolder(tmp_path / "subset")
        assert one.plan == other.plan and not other.missing_stages()
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
        without_idle = SystemFolder(served_subset(largest, tmp_path / "fewer", budget=3, keep_idle=False))
        assert len(SystemFolder(largest).stages) == 9 and len(without_idle.stages) == 7
        assert not without_idle.missing_stages()
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


# What a study says that it trained


class _Bench:
    """Stands in for a workbench on the settings of digits.yaml: notes what is trained, and knows all answers."""

    settings_of_study = Workbench.settings_of_study
    metric, quality_of_guessing = "accuracy", 0.1

    def __init__(self, *_):
        self.asked = []
        config = S3TConfig(num_shards=5, num_slices=4, layers_per_slice=1)
        self.settings = {"script": {"method": "s3t"}, "s3t": config.to_dict(), "training": {"learning_rate": 0.01}}
        self.options = SimpleNamespace(s3t=config, training=SimpleNamespace(learning_rate=0.01))
        self.loaded = SimpleNamespace(
            config=config,
            task=SimpleNamespace(name="digits"),
            train=range(9),
            evaluation=SimpleNamespace(ids=range(4)),
            model=SimpleNamespace(config=SimpleNamespace(num_hidden_layers=6)),
        )

    def trained(self, name, **changes):
        self.asked.append({"method": name, **changes})
        table = SimpleNamespace(members=lambda *_: [0])
        folder = SimpleNamespace(folder=SimpleNamespace(table=table))
        return SimpleNamespace(max_depth=6, trainer=folder, unlearn=lambda ids: None)

    def copy_of(self, name, source, *_, **__):
        return source

    def quality(self, *_):
        return 0.9

    def kept(self, label, measure, **_):
        return [{"layers": n, "all": n, "lowest": n} for n in (1, 2)] if label == "step-seconds" else measure()


@pytest.mark.parametrize(
    ("study", "count", "also"),
    [
        (["drop", "--seeds", "1", "2"], 4, {"num_shards": 1, "num_slices": 6, "layers_per_slice": None}),
        (["slices"], 9, {"num_shards": 1, "budget": 1}),
        (["sequential"], 3, {"num_slices": 6, "layers_per_slice": None}),
        (["ablations"], 4, {"num_shards": 1, "budget": 1}),
        (["together"], 1, {"num_shards": 5, "num_slices": 4, "budget": 24, "layers_per_slice": 1}),
    ],
)
def test_a_study_records_the_systems_that_it_trained(study, count, also, tmp_path, monkeypatch):
    bench = _Bench()
    monkeypatch.setattr(workbench, "Workbench", lambda *_: bench)
    deletion_study.main([*study, "--output", str(tmp_path)])
    ((data_file),) = tmp_path.glob("*.json")
    settings = json.loads(data_file.read_text())["settings"]
    recorded = [{**settings["s3t"], **system} for system in settings["systems"]]
    asked = [own for n, own in enumerate(bench.asked) if own not in bench.asked[:n]]
    # The one sequence of a method other than S3T is listed: that is its budget.
    asked = [own if own["method"] == "s3t" else {k: v for k, v in own.items() if k != "budget"} for own in asked]
    assert len(recorded) == len(asked) == count
    assert all({**have, **own} == have for have, own in zip(recorded, asked, strict=True))
    assert settings["s3t"].items() >= also.items() and "method" not in settings["script"]
    assert all(system["stage_data"] == "slice" for system in recorded if system["method"] == "sequential")


@pytest.mark.parametrize(
    ("name", "count", "shared"),
    [
        ("figure-12", 2, {"num_shards": 1, "num_slices": 6, "budget": 1, "layers_per_slice": None}),
        ("figure-13", 9, {"num_shards": 1, "budget": 1}),
        ("figure-14", 3, {"num_shards": 1, "num_slices": 6, "budget": 1, "layers_per_slice": None}),
        ("lower-rate/figure-14", 3, {"num_shards": 1, "num_slices": 6, "budget": 1, "layers_per_slice": None}),
        ("ablations", 4, {"num_shards": 1, "num_slices": 6, "budget": 1, "layers_per_slice": None}),
        ("figure-15-weights", 1, {"num_shards": 5, "num_slices": 4, "budget": 1, "layers_per_slice": None}),
        ("figure-16", 1, {"num_shards": 5, "num_slices": 4, "budget": 24, "layers_per_slice": 1}),
        ("figure-6-left", 4, {}),
        ("figure-9", 4, {}),
    ],
)
def test_stored_figures_name_what_was_trained_for_them(name, count, shared):
    data = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    settings = data["settings"]
    assert len(settings["systems"]) == count and settings["s3t"].items() >= shared.items()
    for cell, system in zip(data.get("cells", []), settings["systems"]):
        assert system.items() >= {key: cell[key] for key in ("layers_per_slice", "num_slices")}.items()
    if name.endswith("figure-14"):
        assert data["learning_rate"] == settings["training"]["learning_rate"]


# Files


def test_storage_grows_with_the_budget_as_its_stages_do(tmp_path):
    settings = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=8)
    rows = measured_storage(
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


@pytest.mark.parametrize("name", sorted(STORED))
def test_every_figure_is_drawn_with_named_axes(name, tmp_path):
    data = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8"))
    assert data["paper"] and data["hardware"]["cpu"]
    assert not re.search(r'"/[a-z]+/', json.dumps(data)), "a path of a machine"
    draw(Path(name).name, data, tmp_path / "figure.svg")
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
    for system, folder in zip(
        data["settings"]["systems"], ("s3t-budget=2", "sisa", "protosisa", "full-num_shards=1"), strict=True
    ):
        record = json.loads((tmp_path / "work" / "systems" / folder / "s3t_config.json").read_text())
        assert {**data["settings"]["s3t"], **system} == {**record["s3t_config"], "method": folder.split("-")[0]}
    # What is there is neither trained nor measured again.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "systems").rglob(ADAPTER_FILE)}
    deletion_study.main(["time", *common, *deletions, "--stream", "50"])
    again = {path: path.stat().st_mtime_ns for path in (tmp_path / "work" / "systems").rglob(ADAPTER_FILE)}
    assert times == again and len(times) == 8 + 4 + 4 + 1
    lives = json.loads((tmp_path / "figures" / "figure-9.json").read_text())
    assert lives["totals"]["full"]["mean"] == pytest.approx(round(50 * lives["training_seconds"]["full"], 3), rel=1e-4)
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
        found = run_of_results(tmp_path / "r.json")
        assert found["name"] == "llama_alpaca: S3T, m = 1"
        return found["drop"]

    # No drop is a plain 0.
    assert str(drop("loss", 2.5, 2.0)[0]) == "0.0"
    assert drop("accuracy", 0.6, 0.8) == pytest.approx([0, 0.25]) and drop("loss", 2.5, 2.0) == pytest.approx(
        [0, 0.25]
    )
    with pytest.raises(ConfigError, match=r"is 0 \(matthews_correlation\)"):
        drop("matthews_correlation", 0.1, 0.0)
    (tmp_path / "other.json").write_text("[]")
    with pytest.raises(ConfigError, match="holds no results of a recipe"):
        deletion_study.main(["drop", "--results", str(tmp_path / "other.json"), "--output", str(tmp_path)])


def results_file(folder, name, by_depth, task="trec", metric="accuracy", recipe="text_classification"):
    content = {
        "metrics": {"evaluation": {str(depth): {metric: value} for depth, value in enumerate(by_depth, 1)}},
        "settings": {"script": {"task_name": task}, "s3t": {"num_shards": 1}},
        **{"method": "s3t", "seed": 1, "recipe": recipe, "data": {"evaluation_rows": {"evaluation": 500}}},
    }
    (folder / name).write_text(json.dumps(content))
    return str(folder / name)


def test_results_are_drawn_beside_a_study_without_its_systems(tmp_path):
    stored = json.loads((FIGURES / "figure-12.json").read_text(encoding="utf-8"))
    measured = [run for run in stored["runs"] if "results" not in run]
    (tmp_path / "figure-12.json").write_text(json.dumps({**stored, "runs": measured}))
    redraw = ["drop", "--redraw", "--format", "svg", "--output", str(tmp_path)]

    def drawn(*arguments):
        deletion_study.main([*redraw, *arguments])
        data = json.loads((tmp_path / "figure-12.json").read_text())
        assert data["runs"][: len(measured)] == measured and {**data, "runs": 0} == {**stored, "runs": 0}
        return data["runs"][len(measured) :], (tmp_path / "figure-12.svg").read_text(encoding="utf-8")

    three, six = results_file(tmp_path, "3.json", [0.7, 0.8, 0.9]), results_file(tmp_path, "6.json", [0.5] * 6)
    loss = results_file(tmp_path, "l.json", [3.0, 2.5], None, "loss", "llama_alpaca")
    runs, picture = drawn("--results", three, six, loss)
    assert [(run["kind"], run["results"]) for run in runs] == [
        ("text", "3.json"),
        ("text", "6.json"),
        ("instruction tuning", "l.json"),
    ]
    assert [(run["metric"], run["evaluation_rows"]) for run in runs] == [("accuracy", 500)] * 2 + [("loss", 500)]
    # Two systems of one task are no seeds of each other.
    for label in ("trec: S3T, m = 1, L = 3", "trec: S3T, m = 1, L = 6", "llama_alpaca: S3T, m = 1, L = 2", "digits"):
        assert f"<!-- {label}" in picture
    assert len(re.findall("<!-- .*The paper: .* -->", picture)) == 3 and "seeds" not in picture
    # Without the option they stay; with it they are the ones that are named.
    assert drawn()[0] == runs
    assert drawn("--results", six)[0] == runs[1:2]
    before = (tmp_path / "figure-12.json").read_bytes()
    with pytest.raises(ConfigError, match=r"is no file\. Give the results files of recipes"):
        deletion_study.main([*redraw, "--results", str(tmp_path / "none.json")])
    assert (tmp_path / "figure-12.json").read_bytes() == before


def test_the_stored_drops_are_those_of_the_results_and_of_the_docs():
    stored = json.loads((FIGURES / "figure-12.json").read_text(encoding="utf-8"))
    earlier = [run for run in stored["runs"] if "results" in run]
    assert {run["kind"] for run in stored["runs"]} == {"vision", "text", "instruction tuning"}
    for run in earlier:
        assert run_of_results(DOCS / "results" / run["results"]) == run
    assert by_deleted_slices(stored) in (DOCS / "reproduction.md").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("model", [[], ["--model_name_or_path", "./no-such-model"]])
@pytest.mark.parametrize("study", sorted(set(deletion_study.STUDIES) - {"storage", "gates"}))
def test_a_study_that_is_refused_leaves_no_folder(study, model, tmp_path):
    where = ["--work_dir", str(tmp_path / "work"), "--output", str(tmp_path / "docs" / "figures")]
    with pytest.raises(ConfigError, match="--model_name_or_path"):
        deletion_study.main([study, "--task_name", "digits", *model, *where])
    with pytest.raises(ConfigError, match=r"There is no .* to draw from"):
        deletion_study.main([study, "--redraw", *where])
    assert list(tmp_path.iterdir()) == []


def test_gates_without_its_numbers_is_refused_too(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no .*gates\.json to draw from"):
        deletion_study.main(["gates", "--redraw", "--data", str(tmp_path), "--output", str(tmp_path / "figures")])
    assert list(tmp_path.iterdir()) == []


def test_theory_without_its_numbers_is_refused_too(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no .*retention\.json to draw from"):
        deletion_study.main(["theory", "--redraw", "--only", "retention", "--output", str(tmp_path)])


@pytest.mark.parametrize("below", ["", "figures"])
def test_an_output_folder_that_cannot_be_made_is_said_before_anything_is_trained(below, tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, "Workbench", lambda *_: pytest.fail("the study began"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file.* is no folder"):
        deletion_study.main(["drop", "--output", str(tmp_path / "file" / below)])


@pytest.mark.parametrize("size", ["3", "16", "0", "-2"])
def test_a_patch_that_does_not_divide_the_image_is_refused(size, tmp_path):
    with pytest.raises(ConfigError, match=f"`--patch_size {size}` does not divide `--image_size 8`"):
        pretrain_vit.main(["--output_dir", str(tmp_path / "vit"), "--patch_size", size])
    assert not (tmp_path / "vit").exists()


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["quality", "--retrain_every", "0"], "`--retrain_every` is 0, expected 1 or more"),
        (["time", "--retrain_every", "-2"], "`--retrain_every` is -2, expected 1 or more"),
        (["quality", "--orders", "0"], "`--orders` is 0, expected 1 or more"),
        (["slices", "--layers", "1", "0"], "`--layers` is 0, expected 1 or more"),
        (["weights", "--weights", "0.5", "2"], "`--weights` is 2, expected weights of a mean: from 0 to 1"),
        (["weights", "--weights", "nan"], "`--weights` is nan, expected weights"),
        (["weights", "--after", "-1"], "`--after` is -1, expected numbers of requests"),
        (["quality", "--budgetz", "3"], r"`--budgetz` is no option. Did you mean `--budgets`\?"),
        (["drop", "--recipe", "text", "--metrik", "f1"], r"`--metrik` is no option. Did you mean `--metrics`\?"),
    ],
)
def test_what_a_study_cannot_end_with_is_refused_before_it_begins(argv, message, tmp_path, monkeypatch):
    monkeypatch.setattr(workbench, "Workbench", lambda *_: pytest.fail("the study began"))
    with pytest.raises(ConfigError, match=message):
        deletion_study.main([*argv, "--work_dir", str(tmp_path / "work"), "--output", str(tmp_path)])


# What pictures say


def test_a_standard_error_is_that_of_shares_of_rows_alone():
    quality = np.array([0.5, 0.9])
    assert standard_error(quality, {"metric": "accuracy", "evaluation_rows": 100}) == pytest.approx([0.05, 0.03])
    assert standard_error(quality, {"metric": "matthews_correlation", "evaluation_rows": 100}) is None
    assert standard_error(quality, {"metric": "accuracy", "evaluation_rows": None}) is None


@pytest.mark.parametrize("name", ["figure-12", "figure-13", "figure-14", "ablations"])
@pytest.mark.parametrize("metric", ["accuracy", "matthews_correlation"])
def test_an_error_that_is_not_known_is_neither_drawn_nor_said(name, metric, tmp_path):
    data = json.loads((FIGURES / f"{name}.json").read_text(encoding="utf-8")) | {"metric": metric}
    if name == "figure-12":
        data["runs"] = [run | {"metric": metric} for run in data["runs"][:1]]
    elif name != "figure-13":
        data["quality"] = {key: runs[:1] for key, runs in data["quality"].items()}
    draw(name, data, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert ("standard error" in text) == (metric == "accuracy")
    if name == "figure-13":
        # The first collection of lines is the colour bar's, the others are the errors.
        assert ("LineCollection_2" in text) == (metric == "accuracy")


@pytest.mark.parametrize(("count", "said"), [(6, "full retraining every 20 requests of the first order"), (1, "full")])
def test_the_retraining_that_is_drawn_is_the_one_that_was_made(count, said, tmp_path):
    data = json.loads((FIGURES / "figure-6-left.json").read_text(encoding="utf-8"))
    data["full"] = data["full"][:count]
    draw("figure-6-left", data, tmp_path / "figure.svg")
    text = (tmp_path / "figure.svg").read_text(encoding="utf-8")
    assert f"<!-- {said}" in text and "at every request" not in text


def test_the_drop_has_a_band_as_wide_as_the_error_of_the_quality():
    data = json.loads((FIGURES / "figure-12.json").read_text(encoding="utf-8"))
    run = data["runs"][0] | {"quality": [0.8, 0.5], "drop": [0.0, 0.375], "evaluation_rows": 100}
    figure = pictures_of_studies.DRAWERS["figure-12"](data | {"runs": [run]})
    (band,) = figure.axes[0].collections
    ends = band.get_paths()[0].vertices
    # An accuracy of a half on 100 rows: 5 points, which are 6.25% of 80%. What has not dropped has no error.
    assert {(x, round(y, 2)) for x, y in ends} >= {(0, 0), (1, 37.5 - 6.25), (1, 37.5 + 6.25)}
    assert ends[:, 1].max() == pytest.approx(43.75)


@pytest.mark.parametrize(("folder", "rate"), [("", "0.01"), ("lower-rate", "0.001")])
def test_figure_14_says_its_rate_and_whose_the_claim_is(folder, rate):
    data = json.loads((FIGURES / folder / "figure-14.json").read_text(encoding="utf-8"))
    title = pictures_of_studies.DRAWERS["figure-14"](data).axes[0].get_title()
    assert title == f"Figure 14, learning rate {rate} (the paper claims comparable quality)"
