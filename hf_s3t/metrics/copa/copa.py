"""COPA: the share of questions whose right choice got the highest score."""

from collections import defaultdict

import datasets
import evaluate
from sklearn.metrics import accuracy_score


_INPUTS = """
Args:
    predictions (list of `float`): How well each choice fits, one row a choice.
    references (list of `int`): 1 for the right choice of a question, 0 for the others.
    questions (list of `str`): The question that each row belongs to.

Returns:
    accuracy (`float`): Share of questions answered right. Of equal scores the first row counts.
"""


class Copa(evaluate.Metric):
    """Accuracy over questions, each with rows for its choices (SuperGLUE: COPA)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of questions whose right choice got the highest score.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("float64"),
                    "references": datasets.Value("int64"),
                    "questions": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions: list[int], references: list[int], questions: list[str]) -> dict[str, float]:
        rows = defaultdict(list)
        for position, question in enumerate(questions):
            rows[question].append(position)
        chosen = [max(range(len(own)), key=lambda i: predictions[own[i]]) for own in rows.values()]
        right = [max(range(len(own)), key=lambda i: references[own[i]]) for own in rows.values()]
        return {"accuracy": float(accuracy_score(right, chosen))}
