"""Pearson correlation of predicted and true numbers."""

import datasets
import evaluate
from scipy.stats import pearsonr


_INPUTS = """
Args:
    predictions (list of `float`): The predicted numbers.
    references (list of `float`): The true numbers.

Returns:
    pearson (`float`): Between -1 and 1; 0 where either side is constant, as nothing is then told apart.
"""


class Pearson(evaluate.Metric):
    """Pearson correlation (GLUE: STS-B)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Pearson correlation of predicted and true numbers.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        if len(set(predictions)) < 2 or len(set(references)) < 2:
            return {"pearson": 0.0}
        return {"pearson": float(pearsonr(predictions, references).statistic)}
