"""F1: of class 1 where there are two classes, or the mean over all classes."""

import datasets
import evaluate
from sklearn.metrics import f1_score


_INPUTS = """
Args:
    predictions (list of `int`): The predicted classes.
    references (list of `int`): The true classes.
    average (`str`, defaults to `"binary"`): `"binary"` for the F1 of class 1, `"macro"` for the mean over classes.
    num_classes (`int`, *optional*): Number of classes, for `"macro"`: one that does not occur counts as 0. Without it
        the mean is over the classes that occur.

Returns:
    f1 (`float`): Between 0 and 1.
"""


class F1(evaluate.Metric):
    """F1 as GLUE (QQP, MRPC: of class 1) and SuperGLUE (CB: mean over classes) score it."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of class 1, or the mean of the classes' F1.",
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(
        self,
        predictions: list[int],
        references: list[int],
        average: str = "binary",
        num_classes: int | None = None,
    ) -> dict[str, float]:
        labels = None if num_classes is None else list(range(num_classes))
        return {"f1": float(f1_score(references, predictions, labels=labels, average=average, zero_division=0))}
