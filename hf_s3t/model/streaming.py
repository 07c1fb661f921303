"""Whoever reads from a streamer gets an end, however the call that feeds it ends."""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from transformers import GenerationMixin


def streamer_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The streamer among the arguments of `generate`."""
    if not args:
        return kwargs.get("streamer")
    generate = inspect.signature(GenerationMixin.generate)
    try:
        return generate.bind_partial(None, *args, **kwargs).arguments.get("streamer")
    except TypeError:
        # `generate` itself will say what is wrong with them.
        return kwargs.get("streamer")


@contextlib.contextmanager
def ending(streamer: Any) -> Iterator[Callable[[], None]]:
    """
    End the stream if what runs inside raises: `generate` ends it only where it comes to its own end.

    Words that were held back until they are whole are not handed out any more: after a deletion stopped the call, they
    would be of a stage that is gone.

    Args:
        streamer (*optional*): What was given to `generate`.

    Yields:
        What to call when `generate` has returned: it has ended the stream by itself, and whoever uses the streamer
        again must not find another end in it.
    """
    has_ended = False

    def has_ended_itself() -> None:
        nonlocal has_ended
        has_ended = True

    try:
        yield has_ended_itself
    except BaseException:
        if streamer is not None and not has_ended:
            _end(streamer)
        raise


def _end(streamer: Any) -> None:
    """End a stream without what it holds back; the error of the call is what is raised, not one of the streamer."""
    if hasattr(streamer, "token_cache"):
        streamer.token_cache, streamer.print_len = [], 0
    with contextlib.suppress(Exception):
        streamer.end()
