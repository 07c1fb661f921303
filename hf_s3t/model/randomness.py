"""The random states of this process: read, put back, and kept away from what must not draw from them."""

import contextlib
import os
import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


class RandomStates:
    """
    The states of all generators that code draws from without naming one: Python's, NumPy's, torch's on the CPU and on
    the accelerators of this process.

    They are read when this is made.
    """

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state()
        self._torch = torch.get_rng_state()
        self._accelerator = _accelerator_states()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RandomStates):
            return NotImplemented
        return self._key() == other._key()

    # Two of the same states are equal, and states change: nothing to look one up by.
    __hash__ = None  # type: ignore[assignment]

    def _key(self) -> tuple[Any, ...]:
        states = self._accelerator if isinstance(self._accelerator, (list, tuple)) else [self._accelerator]
        numbers = [None if state is None else state.cpu().numpy().tobytes() for state in (self._torch, *states)]
        kind, words, *others = self._numpy
        return self._python, kind, words.tobytes(), others, numbers

    def restore(self) -> None:
        """Make them what they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._accelerator is not None:
            module = _accelerator()
            if hasattr(module, "set_rng_state_all"):
                module.set_rng_state_all(self._accelerator)
            else:
                module.set_rng_state(self._accelerator)


def _accelerator() -> Any:
    """PyTorch's module of the accelerator, if there is one and this process has used it: nothing has drawn else."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    module = torch.get_device_module(kind) if kind is not None else None
    return module if getattr(module, "is_initialized", lambda: True)() else None


def _accelerator_states() -> Any:
    module = _accelerator()
    if module is None:
        return None
    return module.get_rng_state_all() if hasattr(module, "get_rng_state_all") else module.get_rng_state()


@contextlib.contextmanager
def preserved_randomness() -> Iterator[None]:
    """Leave every random state as it was: evaluation and audits must not change what training draws next."""
    before = RandomStates()
    try:
        yield
    finally:
        before.restore()


class _Holder:
    """The thread of this process that has its random states, and how often it asked for them."""

    def __init__(self) -> None:
        self.begin_anew()

    def begin_anew(self) -> None:
        """Be held by no thread."""
        self.lock = threading.RLock()
        self.depth = 0


_HOLDER = _Holder()
# In a process that is forked meanwhile, nobody is left who would let go of them.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_HOLDER.begin_anew)


@contextlib.contextmanager
def own_randomness() -> Iterator[None]:
    """
    Have the random states of this process: what a stage draws follows from its seed only if no other thread draws,
    seeds or puts back meanwhile. One that asks for them waits. To the thread that has them already, as in a callback
    of a stage in training, they are left as they were.
    """
    with _HOLDER.lock:
        _HOLDER.depth += 1
        try:
            with preserved_randomness() if _HOLDER.depth > 1 else contextlib.nullcontext():
                yield
        finally:
            _HOLDER.depth -= 1


def seed_all(seed: int) -> None:
    """Begin anew with every generator."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
