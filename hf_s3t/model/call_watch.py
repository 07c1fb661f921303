"""Watches calls of a model for what they leave in its modules."""

import contextlib
from collections.abc import Iterator

from torch import nn

from ..errors import IsolationError
from .module_state import Look, shown
from .turns import Turns


# How often in a row something may seem to be left in a model that several threads call at once.
_DOUBTS = 3


class CallWatch:
    """
    Watches whether calls of a model leave something in its modules: at its second call, its fourth, its eighth and so
    on, since looking takes a while. The first call may make what all need.

    Args:
        model (`nn.Module`): The base model.
        turns ([`~hf_s3t.model.turns.Turns`]): Those of the base.
    """

    def __init__(self, model: nn.Module, turns: Turns):
        self._model, self._turns = model, turns
        self._refusal: str | None = None
        self.begin_anew()

    def begin_anew(self) -> None:
        """After something else than calls had the model."""
        self._calls, self._next, self._suspicions = 0, 2, 0

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """
        Around a call.

        Raises:
            [`~hf_s3t.errors.IsolationError`]: If this call left something behind, or an earlier one did.
        """
        if self._refusal is not None:
            raise IsolationError(self._refusal)
        self._calls += 1
        alone = self._turns.is_alone
        before = Look(self._model) if self._calls >= self._next else None
        yield
        if before is None:
            return
        self._next = 2 * self._calls
        after = Look(self._model)
        left = after.changed(before)
        # What another thread's call has in hand right now may only seem to be left behind.
        self._suspicions = self._suspicions + 1 if left else 0
        if left and ((alone and self._turns.is_alone) or self._suspicions > _DOUBTS):
            self._refusal = (
                f"A call left something in the modules of {type(self._model).__name__}, {shown(left)}: it would reach "
                "into later answers, also when the stages that computed it are deleted. Use a model whose forward "
                "pass leaves nothing behind."
            )
            raise IsolationError(self._refusal)
