"""Streams of deletions: in which order the requests come, and what is left while they do."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from studies.workbench import Workbench

from hf_s3t.baselines import Method


def request_order(ids: Sequence, number: int) -> list:
    """The ids in the order in which one stream of requests deletes them."""
    return [ids[i] for i in np.random.default_rng(1000 + number).permutation(len(ids))]


def delete_one_by_one(bench: Workbench, method: Method, ids: Sequence, every: int | None = None) -> dict[str, Any]:
    """
    Delete examples, one request each, until nothing answers any more, and measure whenever another stack serves.

    Args:
        bench ([`Workbench`]): Where the method comes from.
        method (`Method`): A system that may be changed.
        ids (sequence): The requests.
        every (`int`, *optional*): Measure after every so many requests too: where deletions change more than stacks.

    Returns:
        `dict[str, Any]`: `points` (request, depths and quality when they changed; no quality where nothing answers),
        `seconds` of each deletion, and `exhausted_after`, the requests it outlived plus one.
    """
    points, seconds, known = [], [], {}
    serving = _serving(method)

    def measure(request: int) -> None:
        if serving not in known or every:
            known[serving] = None if method.is_exhausted else bench.quality(method)
        points.append({"request": request, "depths": method.depths, "quality": known[serving]})

    measure(0)
    exhausted_after = None
    for request, example in enumerate(ids, start=1):
        deletion = method.unlearn([example])
        seconds.append(deletion.seconds)
        now = _serving(method)
        if now != serving or (every and request % every == 0):
            serving = now
            measure(request)
        if exhausted_after is None and not any(method.depths):
            exhausted_after = request
            if method.is_exhausted:
                break
    return {
        "points": points,
        "seconds": seconds,
        "requests": len(seconds),
        "exhausted_after": exhausted_after,
    }


def _serving(method: Method) -> tuple:
    return method.trainer.folder.served()
