"""Scores of a task: which metrics fit it, what they find, and what is kept of a model's answers."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from common.tasks import METRICS

from hf_s3t.errors import ConfigError
from hf_s3t.metrics import load as load_metric


def check_metrics(task: Any) -> None:
    """
    Refuse a metric that cannot score the task.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With those that can.
    """
    labels = task.class_names
    kinds = {"numbers"} if labels is None else {"classes", "two classes"} if len(labels) == 2 else {"classes"}
    if task.has_questions:
        # The metric over questions bears the name of its task.
        kinds = {METRICS[task.name]} | kinds
    fitting = [name for name, kind in METRICS.items() if kind in kinds]
    for name in task.metrics:
        if name not in METRICS:
            raise ConfigError(f"`--metrics {name}` is unknown. Choose of {', '.join(fitting)}.")
        if name not in fitting:
            what = "numbers" if labels is None else f"{len(labels)} classes"
            raise ConfigError(
                f"`--metrics {name}` scores {METRICS[name]}, and {task.name} has {what}. Choose of "
                f"{', '.join(fitting)}."
            )


def answers(scores: np.ndarray, task: Any, metric: str) -> np.ndarray:
    """What a model's scores say to a metric: numbers, classes, or, to `copa`, how well a choice fits."""
    if isinstance(scores, tuple):
        scores = scores[0]
    if task.class_names is None:
        return scores.reshape(len(scores))
    if metric == "copa":
        return scores[:, 1] - scores[:, 0]
    return scores.argmax(axis=-1)


def score(scores: np.ndarray, references: Sequence, questions: Sequence | None, task: Any) -> dict[str, float]:
    """The metrics of a task."""
    found = {}
    for name in task.metrics:
        given = answers(scores, task, name)
        more = {"questions": [str(question) for question in questions]} if "questions" in METRICS[name] else {}
        module = name
        if name == "macro_f1":
            module, more = "f1", {"average": "macro", "num_classes": len(task.class_names)}
        values = load_metric(module).compute(predictions=given.tolist(), references=list(references), **more)
        # COPA's accuracy is over questions; where the accuracy over rows is asked for too, each has its own name.
        own_name = name == "copa" and "accuracy" in task.metrics
        found.update({name if key == "f1" or own_name else key: float(value) for key, value in values.items()})
    return {name: round(value, 6) for name, value in found.items()}


def shown_predictions(scores: np.ndarray, task: Any) -> list:
    """What is kept of a model's answers: the class of each row, its number, or how well a choice fits."""
    given = answers(scores, task, "copa" if "copa" in task.metrics else task.metrics[0])
    return given.tolist() if given.dtype.kind == "i" else [round(value, 6) for value in given.tolist()]
