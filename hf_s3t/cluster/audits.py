"""An audit over workers: each first stage, with what stands on it, is one worker's to train again."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from ..plan.schedule import Schedule
from ..plan.stages import StageKey
from ..training.audit import VerificationReport
from .driving import Outcome
from .ray_pool import Hired, RayPool


class AuditDesk:
    """
    What is to be audited, and what was found.

    Args:
        stages (iterable of [`~hf_s3t.plan.stages.StageKey`]): The stages to train again.
    """

    def __init__(self, stages: Iterable[StageKey]):
        self.chains: dict[StageKey, list[StageKey]] = defaultdict(list)
        for key in stages:
            self.chains[key.lineage[0]].append(key)
        self._found: list[Mapping[str, Any]] = []
        self._done: set[StageKey] = set()

    def has_news(self) -> bool:
        """Never: a deletion that takes what is compared ends an audit."""
        return False

    def plan(self, under_way: Collection[StageKey]) -> Schedule:
        """The first stages whose turn has not come, those with the most to train first."""
        left = self.chains.keys() - self._done - set(under_way)
        return Schedule(sorted(left, key=lambda root: (-self._size(root), root)), ())

    def _size(self, root: StageKey) -> int:
        return len({stage for key in self.chains[root] for stage in key.lineage})

    def begin(self, key: StageKey) -> None:
        """Nothing is noted."""

    def accept(self, outcome: Outcome) -> bool:
        """Keep what a worker found."""
        self._found.append(outcome.result or {})
        self._done.add(outcome.key)
        return True

    def show(self, under_way: Iterable[StageKey]) -> None:
        """Nothing: the report comes at the end."""

    def report(self, seconds: float) -> VerificationReport:
        """What was found, of all workers."""
        return VerificationReport(
            tuple(map(str, sorted(StageKey.from_path(f"stages/{s}") for told in self._found for s in told["stages"]))),
            {stage: names for told in self._found for stage, names in sorted(told["mismatches"].items())},
            {name: tuple(pair) for told in self._found for name, pair in told["circumstances"].items()},
            seconds,
            tuple(sorted(stage for told in self._found for stage in told["trained_here"])),
            {stage: digest for told in self._found for stage, digest in told["adapters"].items()},
        )


class AuditPool(RayPool):
    """Workers that audit: a first stage stands for all that is to be trained again upon it."""

    chains: Mapping[StageKey, Sequence[StageKey]] = {}

    def _begin(self, hired: Hired, key: StageKey) -> Any:
        names, parcels = self._lacking(hired, self.chains[key], whole=True)
        return hired.actor.verify.remote([stage.path for stage in self.chains[key]], names, *parcels)
