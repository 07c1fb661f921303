"""Evaluation: with the ensemble that serves, or with the stack so far while a stage trains."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.trainer_utils import PredictionOutput

from ..model.randomness import own_randomness, preserved_randomness
from .fed_rows import FedRows
from .live_model import LiveModel
from .prepared_base import unprepared


class Evaluation(LiveModel):
    """The part of a trainer that evaluates and predicts."""

    # By which evaluation rows are compared with those of training.
    _fed_rows: FedRows
    # The evaluation set in which no training example was found, if nothing is left to compare.
    _compared_with: Any

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """
        As `Trainer.evaluate`: with the ensemble, or while a stage trains with the stack so far. It draws from no
        random state that training uses.
        """
        with self._evaluating():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As `Trainer.predict`, with the ensemble."""
        with self._evaluating():
            return super().predict(*args, **kwargs)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """As in `Trainer`, with the ensemble unless a stage is training."""
        model = model if self._stage is not None else self._ensemble
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    @property
    def _ensemble(self) -> Any:
        """What evaluations ask while no stage trains."""
        return self.s3t_model

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        turns, given = self._stack.turns, self.compute_metrics
        turns.refuse_beside("evaluate")
        if given is not None:
            # It may ask the live model from another thread, and wait for the answer.
            self.compute_metrics = turns.callbacks("compute_metrics")(given)
        try:
            with (
                own_randomness(),
                preserved_randomness(),
                unprepared(self.model, self.accelerator) if self._stage is None else contextlib.nullcontext(),
            ):
                yield
        finally:
            self.compute_metrics = given

    def _stage_metrics(self) -> dict[str, float]:
        """The stage's own evaluation, if there is a set to evaluate on and someone asks for the numbers."""
        if self.eval_dataset is None or (self.s3t_config.select != "metric" and self.args.eval_strategy == "no"):
            return {}
        return self.evaluate()

    def _compare_evaluation_set(self) -> None:
        """Refuse an evaluation set with training examples in it: it may have been prepared, or given, since."""
        if self.eval_dataset is not self._compared_with:
            self._fed_rows.refuse_shared(self.train_dataset, self._evaluation_rows())
            self._compared_with = self.eval_dataset

    def _evaluation_rows(self) -> Any:
        """The evaluation sets, row by row as those of training."""
        return self.eval_dataset
