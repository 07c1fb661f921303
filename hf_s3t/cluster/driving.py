"""The driver: hands stages out as their parents arrive, keeps every worker busy, and goes on where workers die."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers.utils import logging

from ..errors import ClusterError, FolderError, counted
from ..plan.schedule import Schedule
from ..plan.stages import StageKey


logger = logging.get_logger(__name__)

# So often a stage is handed out whose workers die, or which does not come out though nothing was deleted.
MOST_ATTEMPTS = 3


@dataclass(frozen=True)
class Outcome:
    """
    How the work on a stage ended.

    Args:
        key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
        worker (`str`): Who had it.
        died (`str`, *optional*): How the worker died, if it did.
        error (`Exception`, *optional*): What training raised.
        result (`dict`, *optional*): What the worker returned.
    """

    key: StageKey
    worker: str
    died: str | None = None
    error: Exception | None = None
    result: Mapping[str, Any] | None = None


class Pool(Protocol):
    """Workers that train stages."""

    @property
    def free(self) -> int:
        """How many workers wait for a stage."""

    def start(self, key: StageKey) -> str:
        """
        Have a worker that waits train a stage; tells which.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If what it stands on is not there any more.
        """

    def outcomes(self) -> Sequence[Outcome]:
        """
        What ended since; waits a moment for it. Dead workers are replaced meanwhile.

        Raises:
            [`~hf_s3t.errors.ClusterError`]: If there are no workers any more, and there will be none.
        """

    def tell(self) -> None:
        """Have every worker know what was deleted."""


class Desk(Protocol):
    """What the driver knows of the system, and the one place where its folder is written to."""

    def has_news(self) -> bool:
        """Whether something was deleted since, or stages came that others trained."""

    def plan(self, under_way: Collection[StageKey]) -> Schedule:
        """What is to be made beside the stages that are trained now."""

    def begin(self, key: StageKey) -> None:
        """Note that a stage is handed out."""

    def accept(self, outcome: Outcome) -> bool:
        """Have a stage that was trained be in the folder; whether it is, and valid."""

    def show(self, under_way: Iterable[StageKey]) -> None:
        """Show how far the work is."""


@dataclass
class Tally:
    """
    What a run did.

    Args:
        trained (`list[StageKey]`): The stages that were trained and are in the folder, in the order they came.
        results (`list`): What their workers returned.
        discarded (`int`): Stages that were trained and that a deletion took.
        deaths (`int`): Workers that died in a stage.
    """

    trained: list[StageKey] = field(default_factory=list)
    results: list[Mapping[str, Any]] = field(default_factory=list)
    discarded: int = 0
    deaths: int = 0


class Driver:
    """
    Has workers make what is missing.

    A stage that raises ends the run, as it ends `train()`: nothing more is handed out, what is under way is let come
    to its end, and what was raised is raised.

    Args:
        desk ([`Desk`]): The system.
        pool ([`Pool`]): The workers.
    """

    def __init__(self, desk: Desk, pool: Pool):
        self._desk = desk
        self._pool = pool
        # Who trains what, and how often there had been news when it was begun. A stage that a deletion condemned may
        # be trained by one still, and by another on what is left.
        self._under_way: dict[str, tuple[StageKey, int]] = {}
        self._news = 0
        self._attempts: Counter[StageKey] = Counter()
        self._failed: Exception | None = None
        self.tally = Tally()

    def run(self) -> Tally:
        """
        Make what is missing.

        Raises:
            [`~hf_s3t.errors.ClusterError`]: If a stage costs one worker after the other, or workers are lost for good.
            [`~hf_s3t.errors.S3TError`]: What a stage raised.
        """
        schedule = self._desk.plan(())
        while True:
            if self._look_for_news() or not self._hand_out(schedule):
                schedule = self._desk.plan(self._stages)
                continue
            if not self._under_way:
                break
            outcomes = self._pool.outcomes()
            # Every one has to be taken in.
            if True in [self._take_in(outcome, schedule) for outcome in outcomes]:
                schedule = self._desk.plan(self._stages)
            self._desk.show(self._stages)
        if self._failed is not None:
            raise self._failed
        return self.tally

    def _hand_out(self, schedule: Schedule) -> bool:
        """Give every worker that waits a stage; whether all stages are still there that these stand on."""
        while self._failed is None and self._pool.free and (key := schedule.take()) is not None:
            self._desk.begin(key)
            try:
                worker = self._pool.start(key)
            except FolderError as error:
                self._again(key, f"what it stands on is not there ({error})")
                return False
            self._under_way[worker] = key, self._news
        return True

    @property
    def _stages(self) -> set[StageKey]:
        return {key for key, _ in self._under_way.values()}

    def _look_for_news(self) -> bool:
        if not self._desk.has_news():
            return False
        self._news += 1
        self._pool.tell()
        return True

    def _take_in(self, outcome: Outcome, schedule: Schedule) -> bool:
        """Take in how a stage ended; whether it has to be planned anew what is missing."""
        key, news = self._under_way.pop(outcome.worker)
        if outcome.error is not None:
            self._fail(outcome.error)
            return False
        if outcome.died is not None:
            self.tally.deaths += 1
            self._again(key, f"{outcome.worker} died in it: {outcome.died}")
            # By the plan that holds: what is missing may stand on other stages than on this one in another.
            if key not in self._stages:
                schedule.give_back(key)
            return False
        if not self._desk.accept(outcome):
            self.tally.discarded += 1
            self._look_for_news()
            if news == self._news:
                self._again(
                    key,
                    f"{outcome.worker} came back without it, and nothing was deleted: another trainer may have it",
                )
            return True
        self.tally.trained.append(key)
        self.tally.results.append(outcome.result or {})
        schedule.has_arrived(key)
        return False

    def _again(self, key: StageKey, why: str) -> None:
        self._attempts[key] += 1
        why = why.rstrip(".")
        if self._attempts[key] < MOST_ATTEMPTS:
            logger.warning(f"{key} is handed out again: {why}.")
            return
        self._fail(
            ClusterError(
                f"{key} was handed out {counted(self._attempts[key], 'time')} and never came back: the last time, "
                f"{why}. What was trained is in the folder. See what ends its workers (memory, a time limit), "
                "give each more by `resources_per_worker`, and call again."
            )
        )

    def _fail(self, error: Exception) -> None:
        if self._failed is None:
            self._failed = error
            if self._under_way:
                left = counted(len(self._under_way), "stage")
                logger.warning(f"{error} No stage is begun any more; what is under way ({left}) comes to its end.")
