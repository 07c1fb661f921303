"""
The benchmarks' metrics as `evaluate` modules, over scikit-learn and scipy: they need no network.

`evaluate.load(str(hf_s3t.metrics.path("f1")))` loads one as a metric from the Hub is loaded; [`load`] does without the
copy of the script and the cache folder that `evaluate.load` makes.

- `accuracy`: the share of rows whose class is right.
- `f1`: of class 1 where there are two classes, or the mean over all classes.
- `matthews_correlation`: of predicted and true classes.
- `pearson`: the correlation of predicted and true numbers.
- `spearman`: the same of their ranks.
- `copa`: the share of questions whose right choice got the highest score.
- `multirc`: F1 over all answers, and the share of questions with every answer judged right.
"""

import importlib
import tempfile
from pathlib import Path

import evaluate

from ..checks import require_choice


__all__ = ["METRICS", "load", "path"]

METRICS = ("accuracy", "copa", "f1", "matthews_correlation", "multirc", "pearson", "spearman")


def path(name: str) -> Path:
    """
    The folder of a metric, for `evaluate.load`.

    Args:
        name (`str`): One of `METRICS`.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is no such metric.
    """
    require_choice("metric", name, METRICS)
    return Path(__file__).resolve().parent / name


def load(name: str) -> evaluate.Metric:
    """
    A metric, ready to `compute`: offline, in memory, without a file written.

    Args:
        name (`str`): One of `METRICS`.

    Returns:
        `evaluate.Metric`: As `evaluate.load` returns it.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is no such metric.

    Example:

    ```python
    >>> from hf_s3t.metrics import load

    >>> load("accuracy").compute(predictions=[0, 1, 1], references=[0, 1, 0])
    {'accuracy': 0.6666666666666666}
    ```
    """
    module = importlib.import_module(f"{__name__}.{path(name).name}.{name}")
    (metric,) = (
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, evaluate.Metric) and value is not evaluate.Metric
    )
    # The base class makes its cache folder on construction; in memory nothing is ever put there.
    with tempfile.TemporaryDirectory(prefix="hf-s3t-metric-") as nowhere:
        return metric(keep_in_memory=True, cache_dir=nowhere)
