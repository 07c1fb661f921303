"""What trackers see of a plan: one run, whose steps go on from stage to stage, and none of what an audit trains."""

import contextlib
import copy
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.trainer_callback import CallbackHandler

from ..model.randomness import preserved_randomness
from ..model.turns import Turns, TurnTakingHandler
from ..plan.stages import Plan, StageKey


class PlanHandler(TurnTakingHandler):
    """
    The handler of callbacks that tells trackers, those of `report_to`, of one run over all stages.

    They hear of its beginning with the first stage, and of its end after the last. What they draw, such as the name of
    a run, is not missing from the random numbers of a stage.
    """

    def __init__(self, given: CallbackHandler, turns: Turns) -> None:
        super().__init__(given, turns)
        # Trackers that were told that the run began, and not yet that it ended.
        self._in_run: list[TrainerCallback] = []
        self._is_silent = False

    def begin_run(self) -> None:
        """A run begins with the next stage."""
        self._in_run = []

    def end_run(self, args: TrainingArguments, state: TrainerState, control: TrainerControl) -> None:
        """Tell the trackers that the run has come to its end."""
        in_run, self._in_run = [callback for callback in self._in_run if callback in self.callbacks], []
        self._tell(in_run, "on_train_end", args, state, control)

    @contextlib.contextmanager
    def silenced(self) -> Iterator[None]:
        """Trackers hear of nothing."""
        self._is_silent = True
        try:
            yield
        finally:
            self._is_silent = False

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """As in Transformers; the trackers come first."""
        trackers: list[TrainerCallback] = [callback for callback in self.callbacks if isinstance(callback, _kinds())]
        if not trackers:
            heard: TrainerControl = super().call_event(event, args, state, control, **kwargs)
            return heard
        with self.turns.callbacks(event):
            control = self._tell(self._due(trackers, event), event, args, state, control, **kwargs)
            others = [callback for callback in self.callbacks if callback not in trackers]
            return self._call(others, event, args, state, control, **kwargs)

    def _due(self, trackers: list[TrainerCallback], event: str) -> list[TrainerCallback]:
        if self._is_silent or event == "on_train_end":
            return []
        if event == "on_train_begin":
            trackers = [callback for callback in trackers if callback not in self._in_run]
            self._in_run += trackers
        return trackers

    def _tell(
        self,
        trackers: list[TrainerCallback],
        event: str,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        trackers = [t for t in trackers if getattr(type(t), event) is not getattr(TrainerCallback, event)]
        if not trackers:
            return control
        with preserved_randomness():
            return self._call(trackers, event, args, state, control, **kwargs)

    def _call(
        self,
        callbacks: list[TrainerCallback],
        event: str,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> TrainerControl:
        some = copy.copy(self)
        some.callbacks = callbacks
        heard: TrainerControl = CallbackHandler.call_event(some, event, args, state, control, **kwargs)
        return heard


def _kinds() -> tuple[type[TrainerCallback], ...]:
    """The trackers that `report_to` knows by now: others may have been entered there."""
    return tuple(INTEGRATION_TO_CALLBACK.values())


def tags(key: StageKey, plan: Plan) -> dict[str, int]:
    """Where in the plan a stage is, in numbers, which every tracker takes: several of them drop texts."""
    return {"shard": key.shard, "sequence": plan.sequence_of(key), "depth": key.depth}


def last_step(records: Mapping[Any, Mapping[str, Any]]) -> int:
    """The last step of the plan's curve that the records of stages tell of; those of earlier versions tell of none."""
    ends = [record["steps"][1] for record in records.values() if _has_steps(record)]
    return max(ends, default=0)


def _has_steps(record: Mapping[str, Any]) -> bool:
    steps = record.get("steps")
    return isinstance(steps, list) and len(steps) == 2 and all(isinstance(step, int) for step in steps)
