"""What the numbers that a study measured say: quality after so many requests, and how sure it is."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


_BOOTSTRAP_SAMPLES = 10_000


def quality_at(run: Mapping[str, Any], requests: Sequence[int], when_dead: float) -> np.ndarray:
    """
    Quality of one run of deletions after each of some numbers of requests.

    Args:
        run (mapping):
            `points` with `request` and `quality`, measured whenever something changed; no quality where nothing
            answers.
        requests (sequence of `int`):
            The numbers of requests.
        when_dead (`float`):
            The quality where nothing answers.

    Returns:
        `numpy.ndarray`: One quality per number.

    Example:

    ```python
    >>> from studies.measured import quality_at

    >>> run = {"points": [{"request": 0, "quality": 0.9}, {"request": 2, "quality": None}]}
    >>> quality_at(run, [0, 1, 2, 3], 0.1).tolist()
    [0.9, 0.9, 0.1, 0.1]
    ```
    """
    times = [point["request"] for point in run["points"]]
    values = [when_dead if point["quality"] is None else point["quality"] for point in run["points"]]
    places = np.searchsorted(times, requests, side="right") - 1
    return np.asarray(values, dtype=float)[places]


def standard_error(quality: np.ndarray, data: Mapping[str, Any]) -> np.ndarray | None:
    """
    Standard error of qualities that come from a sample of rows, where they are shares of these rows.

    Args:
        quality (`numpy.ndarray`):
            The qualities.
        data (mapping):
            `metric`, and `evaluation_rows`: how many rows they were measured on, if that is known.

    Returns:
        `numpy.ndarray`, *optional*: One error per quality; none for other metrics, whose error these numbers do not
        tell.
    """
    if data["metric"] != "accuracy" or data["evaluation_rows"] is None:
        return None
    return np.sqrt(quality * (1 - quality) / data["evaluation_rows"])


def paired_difference(ours: Mapping[int, Mapping[str, Any]], theirs: Mapping[int, Mapping[str, Any]]) -> str:
    """
    Mean difference in points, on the same rows and seeds, and where it lies with 95%: a bootstrap over both.

    Another test set would have other rows, and another training another seed; an interval over rows alone would hold
    for these very trainings.

    Args:
        ours (mapping): Seed -> the results of a run; of every seed of `theirs`.
        theirs (mapping): The runs that they are compared with.
    """
    points = np.array([_right(ours[seed]) - _right(theirs[seed]) for seed in theirs]) * 100
    if np.ptp(points) == 0:
        return f"{points.mean():+.1f}"
    draw = np.random.default_rng(0).integers
    seeds, rows = points.shape
    means = [
        points[draw(seeds, size=seeds)].mean(axis=0)[draw(rows, size=rows)].mean() for _ in range(_BOOTSTRAP_SAMPLES)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return f"{points.mean():+.1f} ({low:+.1f} to {high:+.1f})"


def _right(content: Mapping[str, Any]) -> np.ndarray:
    """Per evaluation row whether the deepest stacks were right."""
    digits = content["right"][max(content["right"], key=int)]
    return np.array([int(digit) for digit in digits])
