"""One progress bar for the whole plan, with the time left; inside a stage the usual one."""

from typing import Any

from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerControl, TrainerState, TrainingArguments


class PlanProgress(ProgressCallback):
    """
    Trainer's progress bar for each stage, below one bar over all stages whose estimate of the time left weighs every
    stage by what it computes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plan_bar: tqdm | None = None
        self._cost = 0.0

    def begin(self, total_cost: float, enabled: bool) -> None:
        """Open the bar of a plan that will cost this much."""
        if enabled:
            self.plan_bar = tqdm(
                total=total_cost,
                desc="S3T",
                dynamic_ncols=True,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            )

    def begin_stage(self, label: str, number: int, count: int, cost: float) -> None:
        """Name the stage that starts now."""
        self._cost = cost
        if self.plan_bar is not None:
            self.plan_bar.set_postfix_str(f"stage {number}/{count}: {label}")

    def pass_by(self, cost: float) -> None:
        """Move the plan's bar by what other trainers have done."""
        if self.plan_bar is not None:
            self.plan_bar.update(min(cost, self.plan_bar.total - self.plan_bar.n))

    def end(self) -> None:
        """Close the bar."""
        if self.plan_bar is not None:
            self.plan_bar.close()
            self.plan_bar = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar of a stage, which does not stay."""
        super().on_train_begin(args, state, control, **kwargs)
        self.current_step = state.global_step
        if self.training_bar is not None:
            self.training_bar.leave = False
        if state.max_steps:
            self._advance(state.global_step / state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move both bars."""
        steps = state.global_step - self.current_step
        super().on_step_end(args, state, control, **kwargs)
        self._advance(steps / state.max_steps)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print what is logged, but not each stage's summary where the user asked for no logs."""
        if args.logging_strategy != "no":
            super().on_log(args, state, control, logs=logs, **kwargs)

    def _advance(self, share: float) -> None:
        """Move the plan's bar by a share of the stage's cost, never past its end by a rounding error."""
        if self.plan_bar is not None:
            self.plan_bar.update(min(self._cost * share, self.plan_bar.total - self.plan_bar.n))
