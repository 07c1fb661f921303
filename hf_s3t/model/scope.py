"""Context variables whose values end with the block that set them."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any


class _Block:
    """A block that is entered, with the value that holds in it, inside of the one around it."""

    __slots__ = ("is_open", "outer", "value")

    def __init__(self, value: Any, outer: "_Block | None"):
        self.value = value
        self.outer = outer
        self.is_open = True


class Scope:
    """
    A context variable for what is said of a block of code.

    A task, or a thread that is given a copy of the context (`asyncio.create_task`, `asyncio.to_thread`,
    `run_coroutine_threadsafe`), keeps the values that were set where it was started for as long as it lives. What has
    ended must not count there as what it is inside of: a value counts while its block runs, and no longer.

    Args:
        name (`str`): Name of the variable.

    Example:

    ```python
    >>> from contextvars import copy_context
    >>> from hf_s3t.model.scope import Scope

    >>> scope = Scope("example")
    >>> with scope.holding(1):
    ...     started_inside = copy_context()
    >>> scope.get(), started_inside.run(scope.get)
    (None, None)
    ```
    """

    def __init__(self, name: str):
        self._innermost: ContextVar[_Block | None] = ContextVar(name, default=None)
        # The innermost block, maybe one that has ended; `None` where there never was one. Layers ask before all that
        # they compute, where a call of Python would be felt.
        self.peek: Callable[[], _Block | None] = self._innermost.get

    def get(self) -> Any:
        """The value of the innermost block that still runs; `None` outside of all."""
        block = self._innermost.get()
        # Asked for by every layer of every token: most often there is none, or the innermost is it.
        if block is not None and not block.is_open:
            block = _first_open(block)
        return None if block is None else block.value

    @contextlib.contextmanager
    def holding(self, value: Any) -> Iterator[None]:
        """Inside, `get` gives the value, here and in what is started here."""
        outer = _first_open(self._innermost.get())
        if outer is not None:
            # Where each task is started by the one before, blocks that have ended must not pile up behind this one.
            outer.outer = _first_open(outer.outer)
        block = _Block(value, outer)
        token = self._innermost.set(block)
        try:
            yield
        finally:
            block.is_open, block.value = False, None
            # A generator may be ended in another context than it was begun in; there is nothing to put back there.
            with contextlib.suppress(ValueError):
                self._innermost.reset(token)


def _first_open(block: _Block | None) -> _Block | None:
    while block is not None and not block.is_open:
        block = block.outer
    return block
