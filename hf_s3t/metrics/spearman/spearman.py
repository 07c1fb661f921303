"""Spearman correlation of predicted and true numbers."""

import datasets
import evaluate
from scipy.stats import spearmanr


_INPUTS = """
Args:
    predictions (list of `float`): The predicted numbers.
    references (list of `float`): The true numbers.

Returns:
    spearman (`float`): Between -1 and 1; 0 where either side is constant, as nothing is then told apart.
"""


class Spearman(evaluate.Metric):
    """Spearman correlation (GLUE: STS-B)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Spearman correlation of predicted and true numbers.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("float64")}
            ),
        )

    def _compute(self, predictions: list[float], references: list[float]) -> dict[str, float]:
        if len(set(predictions)) < 2 or len(set(references)) < 2:
            return {"spearman": 0.0}
        return {"spearman": float(spearmanr(predictions, references).statistic)}
