"""Matthews correlation of predicted and true classes."""

import datasets
import evaluate
from sklearn.metrics import matthews_corrcoef


_INPUTS = """
Args:
    predictions (list of `int`): The predicted classes.
    references (list of `int`): The true classes.

Returns:
    matthews_correlation (`float`): Between -1 and 1; 0 where either side has one class only.
"""


class MatthewsCorrelation(evaluate.Metric):
    """Matthews correlation (GLUE: CoLA)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Correlation of predicted and true classes.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        return {"matthews_correlation": float(matthews_corrcoef(references, predictions))}
