"""MultiRC: F1 over all answers, and the share of questions with every answer judged right."""

from collections import defaultdict

import datasets
import evaluate
from sklearn.metrics import f1_score


_INPUTS = """
Args:
    predictions (list of `int`): 1 for an answer held to be true, one row an answer.
    references (list of `int`): 1 for an answer that is true.
    questions (list of `str`): The question that each row belongs to.

Returns:
    f1_a (`float`): F1 of the true answers, over the answers of all questions.
    exact_match (`float`): Share of questions with every answer judged right.
"""


class Multirc(evaluate.Metric):
    """F1a and exact match (SuperGLUE: MultiRC)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 over all answers, and the share of questions with every answer judged right.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("int64"),
                    "references": datasets.Value("int64"),
                    "questions": datasets.Value("string"),
                }
            ),
        )

    def _compute(self, predictions: list[int], references: list[int], questions: list[str]) -> dict[str, float]:
        right: defaultdict[str, bool] = defaultdict(lambda: True)
        for question, predicted, true in zip(questions, predictions, references, strict=True):
            right[question] &= predicted == true
        return {
            "f1_a": float(f1_score(references, predictions, zero_division=0)),
            "exact_match": sum(right.values()) / len(right),
        }
