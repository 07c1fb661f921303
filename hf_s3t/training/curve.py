"""One curve of steps over all stages: what logs say of them, and what `state` tells after training."""

import contextlib
from collections.abc import Iterator
from typing import Any

from ..plan.stages import StageKey
from ..records.validity import saw_what_is_in
from .tracking import PlanHandler, last_step, tags
from .trainer_mixin import TrainerMixin


class TrainingCurve(TrainerMixin):
    """The part of a trainer that counts steps from stage to stage and keeps what was logged in each."""

    callback_handler: PlanHandler

    def _begin_curve(self) -> None:
        # Where the stage in training begins, where the last one that was trained to its end has its end, and how far a
        # stage came.
        self._first_step = self._last_step = self._reached = 0
        self._is_logging = False
        # Per stage what it was made from, and its entries of `log_history`.
        self._logs_of_stages: dict[StageKey, tuple[dict[str, Any], list[dict[str, Any]]]] = {}

    def _begin_stage_on_curve(self) -> None:
        # What was trained by others, or before, is on the curve already.
        self._first_step = max(self._last_step, last_step(self.folder.stage_records))

    def _keep_logs(self, key: StageKey, origin: dict[str, Any]) -> None:
        self._logs_of_stages.pop(key, None)
        self._logs_of_stages[key] = (origin, self.state.log_history)
        self._reached = self._first_step + self.state.global_step

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        As in `Trainer`. Inside a stage logs carry `shard`, `sequence` (its number in the plan) and `depth`, entries of
        `log_history` also `stage`, its address. Steps, as `on_log` finds them in `state`, go on from stage to stage.
        """
        if self._stage is None:
            super().log(logs, start_time)
            return
        state, steps, number = self.state, self.state.global_step, len(self.state.log_history)
        # Not twice where a callback of `on_log` logs.
        state.global_step += 0 if self._is_logging else self._first_step
        outer, self._is_logging = self._is_logging, True
        try:
            told = {**logs, **tags(self._stage, self.folder.plan)}
            super().log(told, start_time)
            # What the class adds to the numbers of an evaluation comes back with them, and may choose.
            logs |= {name: value for name, value in told.items() if name.startswith("eval_")}
        finally:
            state.global_step, self._is_logging = steps, outer
        # `Trainer` declares numbers alone.
        state.log_history[number]["stage"] = str(self._stage)  # type: ignore[assignment]

    @contextlib.contextmanager
    def _unheard(self) -> Iterator[None]:
        """What is trained for an audit is no part of the plan: no tracker hears of it, and no state tells of it."""
        state, logs, steps = self.state, self._logs_of_stages, self._first_step
        self._logs_of_stages, self._first_step = {}, 0
        try:
            with self.callback_handler.silenced():
                yield
        finally:
            self.state, self._logs_of_stages, self._first_step = state, logs, steps

    def _sum_up_state(self) -> None:
        """Have `state` tell of all stages that were trained, but not of what was deleted since (E5)."""
        if self._logs_of_stages:
            self.state.log_history = [
                entry
                for key, (origin, entries) in self._logs_of_stages.items()
                if saw_what_is_in(origin, self.folder.slice_digests_ever(key))
                for entry in entries
            ]
            self.state.global_step = self.state.max_steps = self._reached
