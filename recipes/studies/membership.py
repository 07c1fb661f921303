"""Whether it can be told who was deleted: by a score of their rows, and by where questions about them go."""

from collections.abc import Iterable, Sequence, Sized
from statistics import fmean
from typing import Any

import numpy as np
from scipy.stats import rankdata


_PERMUTATIONS = 500


def membership(members: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> dict[str, float]:
    """
    AUC of telling members from others by a score of their rows.

    Args:
        members (sequence of `np.ndarray`): Per subject the scores of its rows.
        others (sequence of `np.ndarray`): The same of subjects that were never in.

    Returns:
        `dict[str, float]`: `auc`, and its standard `error` if there were nothing to tell: rows of one subject are
        alike, so whole subjects change sides.
    """
    rng, subjects = np.random.default_rng(0), [*members, *others]
    sizes = np.array([len(scores) for scores in subjects])
    ranks = by_subject(rankdata(np.concatenate(subjects)), subjects)
    sums = np.array([found.sum() for found in ranks])

    def auc(order: np.ndarray) -> float:
        """Mann and Whitney's statistic, if the first of the order were the members."""
        inside = order[: len(members)]
        count = sizes[inside].sum()
        return float((sums[inside].sum() - count * (count + 1) / 2) / (count * (sizes.sum() - count)))

    by_chance = [auc(rng.permutation(len(subjects))) for _ in range(_PERMUTATIONS)]
    return {"auc": round(auc(np.arange(len(subjects))), 4), "error": round(float(np.std(by_chance)), 4)}


def orphans(deleted: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> dict[str, Any]:
    """
    Where the questions of deleted subjects go, against those of strangers.

    Args:
        deleted (sequence of `np.ndarray`): Per subject the weights of its rows, `(rows, num_shards)`.
        others (sequence of `np.ndarray`): The same of strangers.

    Returns:
        `dict`: `deleted` and `strangers`, mean weights by shard; their total variation `distance`, and `chance`, how
        often as much lies between as many subjects drawn from both.
    """
    rng = np.random.default_rng(0)
    means = np.array([weights.mean(0) for weights in (*deleted, *others)])

    def distance(order: Sequence[int]) -> float:
        one, other = (means[part].mean(0) for part in np.split(order, [len(deleted)]))
        return float(np.abs(one - other).sum() / 2)

    found = distance(np.arange(len(means)))
    by_chance = [distance(rng.permutation(len(means))) for _ in range(_PERMUTATIONS)]
    return {
        "deleted": means[: len(deleted)].mean(0).round(4).tolist(),
        "strangers": means[len(deleted) :].mean(0).round(4).tolist(),
        "distance": round(found, 4),
        "chance": round(fmean(value >= found for value in by_chance), 4),
    }


def by_subject(values: np.ndarray, subjects: Iterable[Sized]) -> list[np.ndarray]:
    """What is said of rows, one subject after the other, by subject."""
    return np.split(values, np.cumsum([len(one) for one in subjects])[:-1])
