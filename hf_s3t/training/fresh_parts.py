"""Copies of what was given to a trainer and may keep state, so that each stage finds it as it was given."""

import contextlib
import functools
import types
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..errors import IsolationError
from ..model.fresh_copies import fresh_copy, fresh_dataset
from ..model.marks import Mark, difference, mark
from ..model.tokenizer_settings import TokenizerSettings
from ..plan.stages import StageKey
from .live_model import LiveModel


# What a closure or a bound object holds and cannot be copied, copies of these share: so they are compared.
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


class FreshParts:
    """
    What may keep state (callbacks such as early stopping, a loss) is a copy of what was given while a stage trains.
    What was given stays as it is, or the stage is none.

    Args:
        trainer ([`LiveModel`]): The trainer, whose `train_dataset` is the stage's already.
        stage ([`~hf_s3t.plan.stages.StageKey`]): The stage.
        parts (mapping from `str`): What was given, by the trainer's attribute that it is.
    """

    def __init__(self, trainer: LiveModel, stage: StageKey, parts: Mapping[str, Any]):
        self._trainer, self._stage, self._given = trainer, stage, parts
        self._callbacks: list[TrainerCallback] = list(trainer.callback_handler.callbacks)
        self._before = {name: mark(part, trainer._shared) for name, part in parts.items()}
        # Copies, and in which state each began the stage.
        self._copies: list[tuple[Any, Mark]] = []
        # Tokenizers are large and shared by all copies, so their settings are put back instead.
        self._tokenizers = TokenizerSettings([trainer.processing_class, *parts.values()])
        self.note(trainer.train_dataset)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """
        Inside, the trainer has copies.

        Raises:
            [`~hf_s3t.errors.IsolationError`]: If the stage changed what was given, around its copies.
        """
        # The dataset is the stage's own, and every loader gets a copy of the collator.
        names = self._given.keys() - {"train_dataset", "data_collator"}
        callbacks = self._trainer.callback_handler.callbacks
        try:
            for name in names:
                copied = self._copied(name)
                setattr(self._trainer, name, copied)
                self.note(copied)
            for position, callback in enumerate(self._callbacks):
                if isinstance(callback, ExportableState):
                    callbacks[position] = fresh_copy(callback, self._trainer._shared)
            yield
            self._refuse_changed()
        finally:
            self._tokenizers.put_back()
            for name in names:
                setattr(self._trainer, name, self._given[name])
            self._put_callbacks_back()

    def note(self, copied: Any) -> None:
        """Remember in which state a copy begins the stage."""
        self._copies.append((copied, mark(copied, self._trainer._shared)))

    def have_moved(self) -> bool:
        """Whether what a resume would begin anew is not as the stage began."""
        if self._tokenizers.have_changed():
            return True
        return any(mark(copied, self._trainer._shared) != begun for copied, begun in self._copies)

    def _copied(self, name: str) -> Any:
        copy_of = fresh_dataset if "dataset" in name else fresh_copy
        return copy_of(self._given[name], self._trainer._shared)

    def _refuse_changed(self) -> None:
        for name, part in self._given.items():
            # A collator that is an object is copied for every loader, or was refused.
            if name == "data_collator" and not isinstance(part, _FUNCTIONS):
                continue
            where = difference(self._before[name], mark(part, self._trainer._shared))
            if where is not None:
                raise IsolationError(
                    f"{self._stage} changed `{name}`{f' in `{where}`' if where else ''}, which all stages share: the "
                    "next one would depend on what this one saw. Each stage gets a copy where `copy.deepcopy` makes "
                    "one; this is reached around it, by a callback or a global name, or cannot be copied. Let it keep "
                    "no state."
                )

    def _put_callbacks_back(self) -> None:
        # What the stage added or removed stays so. Those that keep state are the given ones again: a resume replaces
        # them.
        present = self._trainer.callback_handler.callbacks
        kinds = {type(callback) for callback in self._callbacks if isinstance(callback, ExportableState)}
        now = [callback for callback in present if type(callback) not in kinds]
        kept = [callback for callback in self._callbacks if type(callback) in kinds or callback in now]
        self._trainer._have_callbacks(kept + [callback for callback in now if callback not in kept])
