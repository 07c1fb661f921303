"""The benchmarks' metrics: their values by hand, offline, and without files in places nobody asked for."""

import evaluate
import pytest
from sklearn.metrics import matthews_corrcoef

from hf_s3t import metrics
from hf_s3t.errors import ConfigError


TRUE = [0, 1, 2, 1, 1, 0]
GIVEN = [0, 1, 1, 1, 0, 0]
# Question a: the second choice is right and scores highest; b: the second is right, the first scores highest.
QUESTIONS = ["a", "a", "b", "b"]


def test_accuracy():
    found = metrics.load("accuracy").compute(predictions=GIVEN, references=TRUE)
    assert found == {"accuracy": pytest.approx(4 / 6)}


def test_f1_of_two_classes_is_that_of_class_1():
    found = metrics.load("f1").compute(predictions=[1, 1, 0, 1], references=[1, 0, 1, 1])
    assert found == {"f1": pytest.approx(2 / 3)}


def test_macro_f1_counts_a_class_that_does_not_occur():
    def macro(count):
        return metrics.load("f1").compute(predictions=GIVEN, references=TRUE, average="macro", num_classes=count)["f1"]

    assert macro(None) == macro(3) == pytest.approx((0.8 + 2 / 3 + 0) / 3)
    assert macro(4) == pytest.approx((0.8 + 2 / 3 + 0) / 4)


def test_matthews_correlation():
    metric = metrics.load("matthews_correlation")
    true, given = [1, 1, 0, 0, 1], [1, 0, 0, 0, 1]
    # tp = 2, tn = 2, fp = 0, fn = 1
    assert metric.compute(predictions=given, references=true)["matthews_correlation"] == pytest.approx(4 / 6)
    assert matthews_corrcoef(true, given) == pytest.approx(4 / 6)
    # A model that always says the same tells nothing apart.
    assert metric.compute(predictions=[1] * 5, references=true)["matthews_correlation"] == 0


@pytest.mark.parametrize(("name", "value"), [("pearson", 0.9819805), ("spearman", 1.0)])
def test_correlations(name, value):
    metric = metrics.load(name)
    assert metric.compute(predictions=[1.0, 2.0, 4.0], references=[1.0, 2.0, 3.0])[name] == pytest.approx(value)
    assert metric.compute(predictions=[2.0, 2.0, 2.0], references=[1.0, 2.0, 3.0])[name] == 0


def test_copa_is_scored_by_question():
    metric = metrics.load("copa")
    rows = {"references": [0, 1, 0, 1], "questions": QUESTIONS}
    assert metric.compute(predictions=[-5.0, -4.0, 1.0, 0.5], **rows) == {"accuracy": 0.5}
    assert metric.compute(predictions=[-5.0, -4.0, 0.4, 0.5], **rows) == {"accuracy": 1.0}


def test_multirc_is_scored_by_answer_and_by_question():
    found = metrics.load("multirc").compute(predictions=[1, 0, 1, 1], references=[1, 0, 0, 1], questions=QUESTIONS)
    # Answers: tp = 2, fp = 1, fn = 0; question b has one wrong.
    assert found == {"f1_a": pytest.approx(0.8), "exact_match": 0.5}


def test_rows_of_a_question_need_not_lie_together():
    found = metrics.load("multirc").compute(
        predictions=[1, 1, 0, 1], references=[1, 0, 0, 1], questions=["a", "b", "a", "b"]
    )
    assert found["exact_match"] == 0.5


def test_every_metric_loads_by_its_path_as_one_from_the_hub_does(tmp_path, monkeypatch):
    # One folder for all: Python remembers where it found the package of copied scripts.
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    for name in metrics.METRICS:
        loaded = evaluate.load(str(metrics.path(name)), cache_dir=str(tmp_path / "cache"))
        rows = {"predictions": [0, 1, 1, 0], "references": [0, 1, 0, 1]}
        if "questions" in loaded.features:
            rows["questions"] = QUESTIONS
        assert loaded.compute(**rows) == metrics.load(name).compute(**rows)
        assert loaded.inputs_description


def test_loading_by_name_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    metrics.load("accuracy").compute(predictions=[1], references=[1])
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_metric_is_refused_with_those_there_are():
    with pytest.raises(ConfigError, match=r"must be one of accuracy, copa, .* got 'bleu'"):
        metrics.load("bleu")
