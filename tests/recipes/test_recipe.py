"""The recipe from start to end: the demo on a base made here, and real text on a real small Llama."""

import json
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import llama_alpaca as recipe
import pytest
from common import instruction_tuning
from common.chats import chat_template
from demo import people_demo
from transformers import AutoTokenizer

from hf_s3t import S3TModel
from hf_s3t.errors import ConfigError, UnknownExampleError
from hf_s3t.plan import StageKey


# What a deletion hits follows from the secret: none of these systems is to be exhausted.
pytestmark = pytest.mark.usefixtures("shared_key")


@pytest.mark.slow
def test_the_demo_trains_forgets_a_person_and_proves_it(tmp_path, monkeypatch, capsys):
    # A base that knows less, and fewer epochs: the steps are the demo's, what it learns is for `make demo` to show.
    monkeypatch.setattr(people_demo, "BaseSettings", partial(people_demo.BaseSettings, steps=20, batch_size=16))
    options = [
        "--output_dir",
        str(tmp_path / "system"),
        "--cache_dir",
        str(tmp_path / "cache"),
        "--disable_tqdm",
        "True",
    ]
    results = recipe.main([*options, "--num_people", "4", "--num_general", "16", "--num_train_epochs", "2"])
    systems = {"base", "full LoRA", "S3T", "S3T after unlearning"}
    assert systems == set(results["losses"]) and systems - {"full LoRA"} < set(results["known"])
    assert results["losses"]["S3T"] < results["losses"]["base"]
    assert results["known"]["base"] <= 0.2
    report = results["report"]
    assert report.deleted == 10 and report.depths_before == [4, 4] and sorted(report.depths_after) < [4, 4]
    assert results["verified"] and results["within_error"]
    printed = " ".join(capsys.readouterr().out.split())  # the console breaks lines
    assert "bit for bit the same" in printed and "1 deletion in force, 0 problems" in printed
    assert S3TModel.from_pretrained(tmp_path / "system").status()["deletions"] == 1
    # The base is made once.
    assert "from the cache" not in printed
    assert people_demo.base_model(people_demo.BaseSettings(), str(tmp_path / "cache"))[1] == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("cut", "printed"),
    [
        pytest.param(
            (5, 2),
            r"audit without .+ \(of shard \d: shard \d has no stage left\): 2 stages",
            marks=pytest.mark.long,
            id="another shard is left",
        ),
        pytest.param((1, 1), "no stage is left to audit", id="nothing is left"),
    ],
)
def test_the_demo_ends_where_the_shard_that_was_hit_has_no_stage_left(cut, printed, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(people_demo, "BaseSettings", partial(people_demo.BaseSettings, steps=1, batch_size=4))
    # Else the secret is the demo's own, under which everybody has his place.
    monkeypatch.delenv("HF_S3T_KEY")
    folders = ["--output_dir", str(tmp_path / "system"), "--cache_dir", str(tmp_path / "cache")]
    shape = ["--num_shards", str(cut[0]), "--num_slices", str(cut[1]), "--budget", "1", "--num_train_epochs", "1"]
    small = ["--num_people", "4", "--num_general", "8", "--skip_full_lora", "True", "--disable_tqdm", "True"]
    results = recipe.main([*folders, *shape, *small, "--seed", "1"])
    assert 0 in results["report"].depths_after and re.search(printed, " ".join(capsys.readouterr().out.split()))
    assert results["verified"] is (True if cut[0] > 1 else None)
    assert json.loads((tmp_path / "system-results.json").read_text()).get("verified") is results["verified"]


@pytest.mark.parametrize(
    ("left", "audited"),
    [
        (["0/1", "0/1-0", "1/0", "1/0-1"], "0/1-0"),
        (["0/1", "1/0", "1/0-1"], "0/1"),
        (["1/0", "1/0-1", "2/1"], "1/0-1"),
        ([], None),
    ],
)
def test_of_the_shard_that_was_hit_the_deepest_stage_is_audited_and_else_of_another(left, audited):
    valid = frozenset(StageKey.from_path(f"stages/shard-{name}") for name in left)
    trainer = SimpleNamespace(folder=SimpleNamespace(valid_stages=valid))
    found = people_demo.surviving_stage(trainer, 0)
    assert (found and str(found)) == (audited and f"shard-{audited}")


@pytest.fixture
def stories(shared_data, tmp_path):
    """Options for the real small Llama on a few real instructions."""
    config = Path(recipe.__file__).parent / "configs" / "stories260k.yaml"
    return [
        *("--config", str(config)),
        *("--model_name_or_path", str(shared_data("stories260K"))),
        *("--dataset_name", str(shared_data("alpaca/alpaca_union.jsonl"))),
        *("--output_dir", str(tmp_path / "system"), "--disable_tqdm", "True"),
        *(
            "--max_train_samples",
            "24",
            "--eval_size",
            "8",
            "--max_length",
            "192",
            "--num_shards",
            "2",
            "--budget",
            "1",
        ),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("precision", [[], ["--load_in_8bit", "True"]], ids=["fp32", "8 bit"])
def test_the_recipe_runs_on_another_model_and_dataset(stories, precision, tmp_path):
    results = recipe.main([*stories, *precision, "--unlearn", "3", "--verify", "sample"])
    # Served, it answers questions in a chat by the prompt it was trained on.
    assert AutoTokenizer.from_pretrained(tmp_path / "system").chat_template == chat_template("alpaca-short")
    assert set(results["losses"]) == {"base", "full LoRA", "S3T", "S3T after unlearning"}
    assert results["unlearned"].deleted == 1 and results["verified"]


def test_ids_that_the_dataset_does_not_have_are_refused_before_anything_is_trained(stories):
    with pytest.raises(UnknownExampleError, match=r"`--unlearn 100000`: .* Nothing was trained"):
        recipe.main([*stories, "--unlearn", "3", "100000"])


def no_training(*args, **kwargs):
    raise AssertionError("trained")


def test_what_the_system_cannot_be_trained_with_is_said_before_the_baseline_is_trained(stories, monkeypatch):
    monkeypatch.setattr(instruction_tuning.SFTTrainer, "train", no_training)
    with pytest.raises(ConfigError, match="layers"):
        recipe.main([*stories, "--num_slices", "3", "--layers_per_slice", "4"])


@pytest.mark.slow
def test_the_comparison_is_made_once_and_never_with_rows_that_were_deleted(stories, monkeypatch, tmp_path):
    """An interrupted run goes on with what it has; after a deletion no full LoRA is trained any more."""
    train, results = instruction_tuning.METHODS["s3t"].train, tmp_path / "system-results.json"
    monkeypatch.setattr(instruction_tuning.METHODS["s3t"], "train", no_training)
    with pytest.raises(AssertionError, match="trained"):
        recipe.main(stories)
    kept = json.loads(results.read_text())
    assert set(kept["losses"]) == {"base", "full LoRA"} and "finished" not in kept
    monkeypatch.setattr(instruction_tuning.METHODS["s3t"], "train", train)
    monkeypatch.setattr(instruction_tuning, "baseline_losses", no_training)
    found = recipe.main(stories)["losses"]
    assert {name: found[name] for name in kept["losses"]} == kept["losses"]
    recipe.main([*stories, "--unlearn", "3"])
    again = recipe.main([*stories, "--unlearn", "4"])["losses"]
    assert set(again) == {"base", "S3T", "S3T after unlearning"} and again["base"] == found["base"]


def test_more_rows_held_out_than_there_are_is_refused(stories):
    with pytest.raises(ConfigError, match="leaves none to train on"):
        recipe.main([*stories, "--eval_size", "10000000"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["s3t", "full", "sisa", "sequential"])
def test_every_method_takes_the_same_command_and_writes_its_results(stories, method, tmp_path):
    options = [*stories, "--skip_full_lora", "True", "--method", method]
    name = instruction_tuning.NAMES[method]
    assert set(recipe.main(options)["losses"]) == {"base", name}
    path = tmp_path / "system-results.json"
    found = json.loads(path.read_text())
    depths = {str(depth) for depth in range(1, 2 if method == "full" else 5)}
    assert found["method"] == method and set(found["metrics"]["held_out"]) == depths
    assert found["cost"]["steps"] > 0 and found["storage_bytes"] > 0 and path.with_suffix(".md").exists()
    assert recipe.main(options) == found
    after = recipe.main([*options, "--unlearn", "3"])
    assert after["unlearned"].deleted == 1
    assert set(json.loads(path.read_text())["losses"]) == {"base", f"{name} after unlearning"}


@pytest.mark.slow
def test_a_group_is_forgotten_as_a_whole_and_what_was_forgotten_is_measured_if_asked_for(stories, shared_data):
    questions = ["--dataset_name", str(shared_data("tofu/full.jsonl")), "--columns", "question", "answer"]
    small = ["--max_train_samples", "80", "--num_shards", "1", "--skip_full_lora", "True"]
    options = [*stories, *questions, *small, "--group_column", "author"]
    results = recipe.main([*options, "--unlearn_groups", "2", "--measure_forgetting", "True"])
    assert results["unlearned"].deleted == 20
    assert set(results["forgotten"]) == {"before", "after"}


def test_columns_that_the_dataset_does_not_have_are_refused(stories):
    with pytest.raises(ConfigError, match=r"must name the columns of instruction and output; .* has instruction"):
        recipe.main([*stories, "--columns", "question", "answer"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--eval_size", "0"], "`--eval_size 0` would leave none"),
        (["--eval_size", "-3"], "`--eval_size -3` would leave none"),
        (["--max_train_samples", "0"], "`--max_train_samples 0` would leave none"),
        (["--num_people", "0"], "`--num_people 0` would leave none"),
        (["--num_general", "-1"], "`--num_general -1` is less than none. Give 0 or more"),
        (["--base_steps", "0"], "`--base_steps 0` would leave none"),
        (["--verify", "smaple"], "`--verify smaple` is unknown"),
        (["--prompt_template", "vicuna"], "`--prompt_template vicuna` is unknown. Choose one of alpaca, alpaca-short"),
        (["--dataset_name", "none.json"], "There is no file or folder none.json"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(argv, message, tmp_path):
    model = ["--model_name_or_path", "a/model/that/is/nowhere", "--output_dir", str(tmp_path / "system")]
    with pytest.raises(ConfigError, match=message):
        recipe.main([*model, "--dataset_name", "some/data", *argv])


@pytest.mark.parametrize(
    ("row", "argv", "message"),
    [
        ({"instruction": "a"}, [], "has the columns instruction, id. Expected instruction and output"),
        ({"title": "a"}, [], "has the columns title, id. Expected .* by `--columns`"),
        ({"instruction": "a", "output": None}, [], "4 of 4 rows of .* have no output"),
        ({"text": "a"}, ["--id_column", "number"], "`--id_column number` is no column of .*, which has text"),
        ({"text": "a"}, ["--group_column", "who"], "`--group_column who` is no column"),
        ({"text": "a"}, [], "`--model_name_or_path .*nowhere` cannot be read: .* Give the folder of a model"),
    ],
)
def test_rows_that_cannot_be_trained_on_and_models_that_are_not_there_are_refused(row, argv, message, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps(row) + "\n") * 4)
    model = ["--model_name_or_path", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "system")]
    with pytest.raises(ConfigError, match=message):
        recipe.main([*model, "--dataset_name", str(path), "--eval_size", "1", *argv])


def test_a_method_that_does_not_fit_is_refused(stories):
    with pytest.raises(ConfigError, match="`--method protosisa` is for classification"):
        recipe.main([*stories, "--method", "protosisa"])
    with pytest.raises(ConfigError, match="The demo shows S3T"):
        recipe.main(["--method", "sisa"])


def test_a_base_that_cannot_be_made_is_refused():
    with pytest.raises(ConfigError, match=r"`--base_hidden_size 7` cannot be .* expected a multiple of 8"):
        people_demo.demo_base(SimpleNamespace(base_hidden_size=7, base_vocab_size=None, base_steps=None))
