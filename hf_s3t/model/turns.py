"""Who has the base: a stage in training, or calls. They take turns, and neither leaves a trace in the other."""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import CallbackHandler

from ..errors import S3TError
from .randomness import RandomStates


# Per `Turns` the turn of the call that this code is inside of. Tasks and threads that a call starts may inherit it.
_INSIDE: ContextVar[dict[int, object] | None] = ContextVar("hf_s3t_turns", default=None)

# What `Accelerator.prepare` leaves on a model: mixed precision wraps the forward.
PREPARED = ("forward", "_original_forward")
# Before each of these the training thread stands between two steps.
_BETWEEN_STEPS = ("on_step_begin", "on_substep_end", "on_prediction_step")
# Seconds: how soon a waiting call looks whether training waits for it, how seldom at last, and how long calls that
# were let in may take until others, for which they may wait, are let in too. A thread that does not wait for a lock
# stands still only if it does for long: it may be out of luck with the processor.
_A_MOMENT = 0.01
_SELDOM = 0.2
_PATIENCE = 1.0
_LONG = 0.25


class Turns:
    """
    Lets calls of a model and the training of stages share one base.

    While a stage trains, a call waits until the training thread stands between two steps. Then all calls that wait run
    to their end, next to each other, on the base in eval mode and with random states of their own; training goes on
    with its modes and its random states as they were. A call from the training thread itself (a callback's) waits for
    nothing. While no stage trains, calls are noted, and nothing else.

    Args:
        base (`nn.Module`): The base model.
    """

    def __init__(self, base: nn.Module):
        self._base = base
        self._changed = threading.Condition()
        # The thread that trains, if one does, and whether the base is its own: not while it waits for calls to end.
        self._trainer: int | None = None
        self._is_held = False
        self._under_way: set[object] = set()
        self._waiting: set[object] = set()
        # What of training is put aside while calls run, and since when they do.
        self._aside: _Aside | None = None
        self._since = 0.0
        self._patience = _PATIENCE
        self._of_calls: RandomStates | None = None
        self._bare: dict[str, Any] = {}
        # How deep the training thread is inside of callbacks, and how many events there were.
        self._in_callbacks = 0
        self._events = 0

    # For calls

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Inside, the base is in the hands of calls; a call that a running one makes is part of it."""
        inside, turn = _INSIDE.get() or {}, object()
        self._under_way.add(turn)
        # In this order: who takes the base says so first, and then looks who is under way.
        if self._trainer is not None:
            self._wait_for_turn(turn, inside.get(id(self)))
        token = _INSIDE.set({**inside, id(self): turn})
        try:
            yield
        finally:
            _INSIDE.reset(token)
            self._under_way.discard(turn)
            if self._trainer is not None:
                self._leave(turn)

    def _wait_for_turn(self, turn: object, outer: object | None) -> None:
        with self._changed:
            self._under_way.discard(turn)
            if self._trainer in (None, threading.get_ident()) or outer in self._under_way:
                self._let_in({turn})
                return
            self._waiting.add(turn)
            self._changed.notify_all()
            try:
                self._wait(turn)
            except BaseException:
                self._leave(turn)
                raise

    def _wait(self, turn: object) -> None:
        """Until this turn is let in; it lets itself in where training, or a call that runs, may wait for it."""
        moment, place, since = _A_MOMENT, None, 0.0
        while not self._changed.wait_for(lambda: turn not in self._waiting, moment):
            moment, now = min(2 * moment, _SELDOM), time.monotonic()
            if self._aside is not None or not self._is_held:
                stuck = now - self._since > self._patience
                # More patient the next time: calls must not take turns with each other while training waits.
                self._patience *= 2 if stuck else 1
            else:
                before, place = place, self._place()
                since = since if place == before else now
                stuck = place is not None and now - since > (0 if place.waits else _LONG)
            if stuck:
                self._let_in({turn})

    def _place(self) -> "_Place | None":
        """Where in a callback the training thread is; where it stays the same, training comes to no next step."""
        trainer = self._trainer
        if trainer is None or not self._in_callbacks:
            return None
        frame = sys._current_frames()[trainer]
        # In milliseconds: a thread that computes uses more of them between two looks.
        used = round(1000 * _cpu_seconds(trainer))
        return _Place(self._events, id(frame), frame.f_lasti, used, frame.f_globals is vars(threading))

    def _let_in(self, turns: set[object]) -> None:
        # The random states of calls are read as soon as a stage has the base.
        if self._is_held and self._aside is None and self._of_calls is not None:
            self._aside = _Aside(self._base, self._bare)
            self._of_calls.restore()
            self._since, self._patience = time.monotonic(), _PATIENCE
        self._waiting -= turns
        self._under_way |= turns
        self._changed.notify_all()

    def _leave(self, turn: object) -> None:
        with self._changed:
            self._waiting.discard(turn)
            self._under_way.discard(turn)
            if not self._under_way and self._aside is not None:
                self._of_calls = RandomStates()
                self._aside.bring_back()
                self._aside = None
            self._changed.notify_all()

    @property
    def is_inside(self) -> bool:
        """Whether this code is inside of a call."""
        return (_INSIDE.get() or {}).get(id(self)) in self._under_way

    @property
    def is_alone(self) -> bool:
        """Whether one call is under way at most, and no stage trains."""
        return self._trainer is None and len(self._under_way) < 2

    # For training

    def refuse_inside(self, what: str) -> None:
        """
        Refuse what would wait for the very call it was called from.

        Raises:
            [`~hf_s3t.errors.S3TError`]: With the way out.
        """
        if self.is_inside:
            raise S3TError(
                f"`{what}` was called from inside a running call of the model, which it would wait for. Call it when "
                "that call has returned."
            )

    def refuse_beside(self, what: str) -> None:
        """
        Refuse what cannot be done by one thread while another trains.

        Raises:
            [`~hf_s3t.errors.S3TError`]: With the way out.
        """
        if self._trainer not in (None, threading.get_ident()):
            raise S3TError(
                f"`{what}` was called while another thread trains a stage on the same base. Call `trainer.s3t_model`, "
                "which waits between steps, or do this after `train()` or in another process."
            )

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, the base is a stage's, in this thread; begins when the calls under way have ended."""
        with self._changed:
            if self._trainer is not None:
                raise S3TError("A stage trains on this base already. Let its `train()` come to its end first.")
            self._bare = {name: vars(self._base).get(name) for name in PREPARED}
            self._of_calls = self._of_calls or RandomStates()
            self._since, self._patience = time.monotonic(), _PATIENCE
            self._trainer = threading.get_ident()
        try:
            with self._changed:
                self._changed.wait_for(lambda: not self._under_way)
                self._is_held = True
            yield
        finally:
            with self._changed:
                self._wait_for_calls()
                self._is_held, self._trainer = False, None
                self._let_in(set(self._waiting))

    def _give_way(self) -> None:
        """Let the calls run that wait by now, and wait for them."""
        with self._changed:
            if self._waiting and not self.is_inside:
                self._let_in(set(self._waiting))
                self._wait_for_calls()

    def _wait_for_calls(self) -> None:
        try:
            self._changed.wait_for(lambda: self._aside is None)
        except BaseException:
            # What interrupts training does not end calls, and they have the base.
            self._changed.wait_for(lambda: self._aside is None)
            raise

    @contextlib.contextmanager
    def callbacks(self, event: str) -> Iterator[None]:
        """Around the callbacks of an event of training: calls may run before it, and while one waits for them."""
        if self._trainer != threading.get_ident():
            yield
            return
        if event in _BETWEEN_STEPS and not self._in_callbacks:
            self._give_way()
        self._in_callbacks += 1
        self._events += 1
        try:
            yield
        finally:
            with self._changed:
                self._in_callbacks -= 1
                if not self.is_inside:
                    self._wait_for_calls()


class _Place(NamedTuple):
    """Where a thread is: in which event, at which instruction, after how much work; whether it waits for a lock."""

    event: int
    frame: int
    instruction: int
    used: int
    waits: bool


class _Aside:
    """What of a stage in training is put aside while calls run: modes of modules, a prepared forward, randomness."""

    def __init__(self, base: nn.Module, bare: dict[str, Any]):
        self._base = base
        self._modes = {module: module.training for module in base.modules()}
        self._prepared = {name: vars(base).get(name) for name in PREPARED}
        self._random = RandomStates()
        base.eval()
        set_attributes(base, bare)

    def bring_back(self) -> None:
        set_attributes(self._base, self._prepared)
        for module, mode in self._modes.items():
            module.training = mode
        self._random.restore()


class TurnTakingHandler(CallbackHandler):
    """
    Transformers' handler of callbacks, at whose events calls get their turn.

    Args:
        given ([`~transformers.trainer_callback.CallbackHandler`]): The handler whose place this takes.
        turns ([`Turns`]): Those of the base in training.
    """

    def __init__(self, given: CallbackHandler, turns: Turns):
        # Not by adding its callbacks again, of which it would warn.
        vars(self).update(vars(given))
        self.turns = turns

    def call_event(
        self, event: str, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """As in Transformers."""
        with self.turns.callbacks(event):
            call_event: Callable[..., TrainerControl] = super().call_event
            return call_event(event, args, state, control, **kwargs)


def set_attributes(module: nn.Module, values: dict[str, Any]) -> None:
    """Give a module attributes of its own, or take them from it where the value is `None`."""
    for name, value in values.items():
        if value is None:
            vars(module).pop(name, None)
        else:
            vars(module)[name] = value


def _cpu_seconds(thread: int) -> float:
    """How long a thread has computed, where the platform tells."""
    if not hasattr(time, "pthread_getcpuclockid"):
        return 0.0
    return time.clock_gettime(time.pthread_getcpuclockid(thread))
