"""The runs behind the docs' numbers: commands that the recipes accept, and tables that follow from results."""

import json
from statistics import fmean

import pytest
import reproduce
from studies import runs
from studies.tables_of_replay import by_depth, replay_data, work_by_depth
from studies.tables_of_runs import comparison_table, tables

from hf_s3t.errors import ConfigError


RUNS = runs.runs()


def test_every_run_has_a_name_of_its_own():
    assert len({run.name for run in RUNS}) == len(RUNS)


@pytest.mark.parametrize("run", [run for run in RUNS if "seed2" not in run.name and "seed3" not in run.name], ids=str)
def test_every_run_is_a_command_of_its_recipe(run, tmp_path):
    arguments = run.arguments("base", tmp_path, tmp_path)
    options = runs.RECIPES[run.recipe].read(arguments)
    assert options.script.method == run.options["method"]
    assert options.script.results_file == str(run.results)
    if run.recipe == "llama_alpaca":
        return
    assert options.s3t.num_shards == run.options.get("num_shards", 1)
    # Settings are chosen on rows that training could have had, never on a test set; the digits bring their own.
    chooses = "select-" in run.name
    assert bool(options.script.validation_share) == chooses
    assert (options.script.eval_file is None) == (chooses or run.config == "digits")


def test_runs_that_are_compared_differ_in_method_and_rate_only():
    by_name = {run.name: run for run in RUNS}
    ours, theirs = by_name["trec-s3t-m5-seed2"].options, by_name["trec-full-m5-seed2"].options
    assert {name for name in ours if ours[name] != theirs[name]} == {"method", "learning_rate"}


@pytest.mark.parametrize("task", runs.REPLAY_TASKS, ids=lambda task: task.name)
def test_shares_of_replay_differ_in_nothing_else(task):
    by_name = {run.name: run.options for run in RUNS}
    how = {"stage_data", "replay", "max_steps", "learning_rate"}
    others = [
        {name: value for name, value in by_name[task.named(share, 2)].items() if name not in how}
        for share in runs.SHARES
    ]
    assert all(one == others[0] for one in others)
    # The rate of every share was chosen among the same.
    assert not task.tried or {*task.rates.values()} <= {*task.tried}


def test_the_rows_that_choose_for_a_language_model_are_not_those_that_compare(tmp_path):
    (task,) = (task for task in runs.REPLAY_TASKS if task.recipe == "llama_alpaca")
    (run,) = (run for run in RUNS if run.name == task.named("1", 1))
    compared = runs.RECIPES[task.recipe].read(run.arguments("base", tmp_path, tmp_path)).script.eval_size
    assert task.options["max_train_samples"] + compared <= task.choice["max_train_samples"]


def result(right: str, seconds: float = 10.0) -> dict:
    accuracy = right.count("1") / len(right)
    return {
        "metrics": {"test": {"1": {"accuracy": 0.5}, "2": {"accuracy": accuracy}}},
        "right": {"1": "10" * (len(right) // 2), "2": right},
        "cost": {"seconds": seconds},
    }


def test_a_table_pairs_the_rows_of_equal_seeds():
    found = {
        "trec-s3t-m1-seed1": result("1111110000"),
        "trec-full-m1-seed1": result("1111100000"),
        "trec-s3t-m1-seed2": result("1111111000"),
        # Without its partner this one says nothing about a difference.
        "trec-full-m1-seed3": result("0000000000"),
    }
    table = comparison_table("trec", found)
    (ours,) = (line for line in table.splitlines() if "S3T, m = 1" in line)
    assert "0.500 ± 0.000, 0.650 ± 0.071 | 2 | +10.0 (" in ours
    assert "five" not in table


def test_of_predictions_it_is_kept_which_were_right(tmp_path):
    path = tmp_path / "run.json"
    predictions = {"test": {"ids": [3, 4, 5], "references": [0, 1, 1], "by_depth": {"1": [0, 0, 1], "2": [0, 1, 1]}}}
    path.write_text(json.dumps({"predictions": predictions, "cost": {"seconds": 1.0, "units": [1, 2]}}))
    path.with_suffix(".md").write_text("card")
    runs.shorten(path)
    assert json.loads(path.read_text()) == {"cost": {"seconds": 1.0}, "right": {"1": "101", "2": "111"}}
    assert not path.with_suffix(".md").exists()


def test_a_pattern_that_names_no_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'trec-s4t' names no run"):
        reproduce.main(["run", "--minilm", "m", "--data", str(tmp_path), "trec-s3t-m1-seed1", "trec-s4t"])


def test_a_run_that_was_interrupted_is_not_done(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "RESULTS", tmp_path)
    (run,) = (run for run in RUNS if run.name == "tofu-s3t-seed42")

    def is_done(**content) -> bool:
        run.results.write_text(json.dumps(content))
        return run.is_done

    assert not run.is_done and not is_done(losses={}) and not is_done(finished="now")
    assert not is_done(finished="now", unlearned={}, predictions={}) and is_done(finished="now", unlearned={})


@pytest.mark.slow
def test_the_docs_show_the_tables_of_the_results_that_are_kept():
    page = "".join((runs.DOCS / f"{name}.md").read_text() for name in ("reproduction", "beyond_the_paper", "gates"))
    assert any(run.results.is_file() for run in RUNS)
    for table in tables():
        assert table in page


@pytest.mark.parametrize("name", ["figure-5", "replay"])
def test_a_figure_is_that_of_the_results(name, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed: the extra `figures`")
    reproduce.main(["figure", "--output", str(tmp_path)])
    assert (tmp_path / f"{name}.json").read_text() == (runs.FIGURES / f"{name}.json").read_text()
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_work_is_that_of_the_method():
    # One sequence of four slices, in full fine-tunings of its shard.
    assert [round(work_by_depth(4, share)[-1], 2) for share in runs.SHARES] == [0.81, 1.16, 1.5, 2.19, 0.81]


def test_the_smallest_share_that_keeps_up_is_found():
    def run(*accuracies: float) -> dict:
        return {
            "metrics": {"test": {str(depth): {"accuracy": value} for depth, value in enumerate(accuracies, 1)}},
            "settings": {"training": {"learning_rate": 1e-3}},
            "cost": {"steps": 9},
            "data": {"train_rows": 90, "evaluation_rows": {"test": 30}},
        }

    # Half a point below with all slices learnt is enough, if it is so on average too.
    by_share = {"0": (0.9, 0.9, 0.904), "0.25": (0.8, 0.9, 0.92), "0.5": (0.9, 0.9, 0.905), "1": (0.9, 0.9, 0.91)}
    task = runs.REPLAY_TASKS[0]
    data = replay_data({task.named(share, 1): run(*values) for share, values in by_share.items()})
    assert [one["smallest_share"] for one in data["tasks"]] == ["0.5"]


@pytest.mark.parametrize("task", runs.REPLAY_TASKS, ids=lambda task: task.name)
def test_the_rate_of_a_share_is_the_best_on_what_was_held_out(task):
    sign = -1 if task.metric == "loss" else 1
    for share, rate in task.rates.items():
        paths = {tried: runs.RESULTS / f"{task.chooses(share, tried)}.json" for tried in task.tried}
        means = {
            tried: sign * fmean(by_depth(json.loads(path.read_text())))
            for tried, path in paths.items()
            if path.is_file()
        }
        assert not means or rate == max(means, key=means.get)
