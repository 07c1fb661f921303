"""lm-evaluation-harness on an ensemble: it hears what that answers; wrong tasks are refused before training."""

import sys
from pathlib import Path

import llama_alpaca
import pytest
import torch
from common import lm_evaluation
from common.lm_evaluation import TABLE_1, check_tasks, evaluate, known_tasks
from lm_eval_tasks import questions
from transformers import AutoTokenizer

from hf_s3t import S3TModel
from hf_s3t.errors import ConfigError


pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: the extra `lm_eval`")

TASKS = str(Path(lm_evaluation.__file__).parents[1] / "lm_eval_tasks")
FIXTURE = Path(__file__).resolve().parents[1] / "fixtures" / "people"


@pytest.fixture
def people(monkeypatch):
    """The demo's small system, with its tokenizer."""
    monkeypatch.setenv("HF_S3T_KEY", "invented people have no secrets")
    model = S3TModel.from_pretrained(FIXTURE / "system", base_model=str(FIXTURE / "base"))
    return model, AutoTokenizer.from_pretrained(FIXTURE / "base")


def test_the_harness_hears_what_the_ensemble_answers(people):
    model, tokenizer = people
    rows = questions.facts()["test"].select(range(6))
    found = evaluate(model, tokenizer, ["invented_facts"], task_folder=TASKS, batch_size=4, limit=6)
    right = [max(range(4), key=lambda c: _likelihood(model, tokenizer, r["prompt"], r["choices"][c])) for r in rows]
    assert found["invented_facts"]["acc"] == pytest.approx(
        sum(a == b for a, b in zip(right, rows["answer"], strict=True)) / 6
    )
    assert set(found) == {"invented_facts"}


def _likelihood(model, tokenizer, prompt, answer):
    """The logarithm of the probability that the ensemble goes on with the answer, one pass, no batch."""
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + answer)["input_ids"]
    with torch.no_grad():
        logs = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
    return sum(logs[i - 1, whole[i]].item() for i in range(len(before), len(whole)))


@pytest.mark.slow
def test_tasks_whose_questions_are_out_of_reach_are_refused_before_training():
    with pytest.raises(ConfigError, match=r"`--eval_tasks piqa`: its questions cannot be read: .*name other tasks"):
        check_tasks(["piqa"], None)


def test_every_question_has_four_choices_of_which_one_is_right():
    for made in (questions.facts(), questions.general()):
        rows = made["test"]
        assert len(rows) >= 48
        assert all(len(set(row["choices"])) == 4 and 0 <= row["answer"] < 4 for row in rows)
        # No place is right more often than chance makes likely.
        assert max(rows["answer"].count(place) for place in range(4)) < len(rows) / 2
    truth = {(row["prompt"], row["choices"][row["answer"]]) for row in questions.facts()["test"]}
    assert len(truth) == len(questions.facts()["test"])


@pytest.mark.slow
def test_table_1_is_known_to_the_harness():
    names, _ = known_tasks(None, None)
    assert names == list(TABLE_1) and len(TABLE_1) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval", "helm"], "`--eval helm` is unknown, expected `lm_eval`"),
        (["--eval", "lm_eval", "--eval_task_folder", "no/such"], "is no folder"),
        pytest.param(
            ["--eval", "lm_eval", "--eval_task_folder", TASKS, "--eval_tasks", "arithmatic"],
            "knows no such task",
            marks=pytest.mark.slow,  # the harness reads thousands of task files
        ),
    ],
)
def test_a_wrong_evaluation_is_refused_before_anything_is_made(options, message, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_alpaca, "run_demo", lambda options: pytest.fail("the demo began"))
    with pytest.raises(ConfigError, match=message):
        llama_alpaca.main([*options, "--output_dir", str(tmp_path / "system")])
    assert not (tmp_path / "system").exists()


def test_without_the_harness_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConfigError, match=r"pip install -e .\.\[lm_eval\]"):
        lm_evaluation.check_tasks(None, None)
