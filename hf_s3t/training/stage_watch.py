"""What is noted of a stage while it trains: its optimizer, what is not finite, what it draws, what it leaves."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.utils import logging

from ..errors import IsolationError
from ..model.module_state import BUFFERS, Look, shown
from ..model.randomness import RandomStates
from ..model.stateless import changed_for_good
from ..model.targets import refuse_failing_adapter
from ..plan.stages import StageKey
from ..records.validity import saw_what_is_in
from .divergence import FiniteWatch, refuse_diverged
from .fresh_parts import FreshParts
from .live_model import LiveModel
from .optimizers import StageOptimizer


logger = logging.get_logger(__name__)


class StageWatch(LiveModel):
    """The part of a trainer that watches the steps of the stage in training."""

    # The copies that the stage in training has.
    _fresh_parts: FreshParts

    def _begin_without_stage(self) -> None:
        self._stage = None
        self._stage_output_dir: Path | None = None
        # The model as Trainer has set it up for training, which it is once.
        self._set_up_model: Look | None = None

    def _begin_watch(self, key: StageKey, output_dir: Path | None, origin: dict[str, Any]) -> None:
        self._stage, self._stage_output_dir, self._stage_origin = key, output_dir, origin
        self._batches_are_random = self.args.dataloader_num_workers > 0
        # The model after the first step of the stage, when it has made for itself what it makes.
        self._settled_model: Look | None = None
        self._finite = FiniteWatch()
        # By name of the input: operations per number in it.
        self._operations: dict[str, int] = {}
        self._stage_optimizer: StageOptimizer | None = None

    # Hooks of `Trainer`

    def training_step(self, model: torch.nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in `Trainer`; the first of a stage shows what the model is set up to, and what it makes for itself."""
        is_first = self._settled_model is None
        if is_first:
            self._know_optimizer()
            self._set_up_model = Look(self.model)
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except Exception as error:
            if is_first:
                refuse_failing_adapter(error, self.model)
            raise
        if is_first:
            self._settled_model = Look(self.model)
        # Trainer's own logs leave out what is not finite (`logging_nan_inf_filter`).
        self._finite.note(loss, self.state.global_step + 1)
        return loss

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """As in `Trainer`, which goes through all modules for it: for a stage once, and not in every step."""
        counted = super().floating_point_ops
        name = getattr(self.model, "main_input_name", "input_ids")
        numbers = inputs[name].numel() if name in inputs else 0
        if self._stage is None or not numbers or getattr(counted, "__func__", None) is not Trainer.floating_point_ops:
            return counted(inputs)
        if name not in self._operations:
            self._operations[name] = counted(inputs) // numbers
        return self._operations[name] * numbers

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`, which has prepared the optimizer by then and makes no other for the stage."""
        if self._stage is not None:
            self._know_optimizer()
        return super().create_scheduler(*args, **kwargs)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As in `Trainer`; notes whether making batches draws random numbers, which a resume would not repeat."""
        # An epoch's first batch always draws: the data loader seeds its workers with it.
        begun = epoch_iterator is getattr(self, "_epoch_iterator", None)
        self._epoch_iterator = epoch_iterator
        before = RandomStates()
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_are_random |= begun and RandomStates() != before
        return batches

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm)
        self._finite.note(norm, self.state.global_step + 1)
        return norm

    # What they have shown

    def _know_optimizer(self) -> StageOptimizer:
        """The optimizer of the stage in training, as `Trainer` has set it up."""
        if self._stage_optimizer is None:
            self._stage_optimizer = StageOptimizer(self.optimizer, self.model, self._shared)
        return self._stage_optimizer

    def _is_condemned(self) -> bool:
        """
        Whether the stage in training saw what was deleted since: its checkpoints were removed, also one that was being
        written, and it will be discarded.
        """
        self.folder.refresh_ledger()
        return not saw_what_is_in(self._stage_origin, self.folder.slice_digests_ever(self._stage_in_training))

    def _has_moved(self) -> bool:
        """Whether what a resume would begin anew is not as the stage began: collator, data, loss, the model itself."""
        if self._fresh_parts.have_moved():
            return True
        return self._settled_model is not None and Look(self.model).differs(self._settled_model)

    def _refuse_diverged(self) -> None:
        """Go no further with a stage that is NaN: it would only cost time, and never be anything else."""
        key = self._stage_in_training
        refuse_diverged(key, self._stack.tensors(key), self._finite, self.state.global_step)

    def _say_what_was_not_finite(self, key: StageKey) -> None:
        """A loss that was NaN, and left the weights alone: nothing is wrong with the stage, but with a batch."""
        first = self._finite.first_step
        if first is not None:
            logger.warning(
                f"{key} is finite, though a loss or its gradient was not, first in step {first}: that batch taught "
                "nothing. Look through the examples for values that are not finite and rows without a label that "
                "counts."
            )

    def _refuse_changed_model(self, key: StageKey) -> None:
        """A stage that left something in the modules of the base is not written: the next one would read it."""
        if self._set_up_model is None or self._settled_model is None:
            return
        now = Look(self.model)
        left = {**now.changed(self._settled_model), **changed_for_good(self.model, self._set_up_model, now)}
        # Buffers are compared by themselves.
        left = {name: marks for name, marks in left.items() if not name.endswith(BUFFERS)}
        if left:
            raise IsolationError(
                f"Training {key} changed {shown(left)} of the base model, on which all stages stand: the next stage "
                "would depend on what this one saw. Use a model whose forward pass leaves nothing behind, and change "
                "no setting of it in a callback."
            )
