"""Accuracy: the share of rows whose class is right."""

import datasets
import evaluate
from sklearn.metrics import accuracy_score


_INPUTS = """
Args:
    predictions (list of `int`): The predicted classes.
    references (list of `int`): The true classes.

Returns:
    accuracy (`float`): Between 0 and 1.
"""


class Accuracy(evaluate.Metric):
    """Share of rows whose class is right (GLUE, SuperGLUE)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Share of rows whose class is right.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"accuracy": float(accuracy_score(references, predictions))}
