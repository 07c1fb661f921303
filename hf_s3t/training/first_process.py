"""What the first of several data-parallel processes does for all of them."""

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from ..errors import S3TError


T = TypeVar("T")


def in_first_process(act: Callable[[], T]) -> T:
    """
    Have the first process do something that it alone does, such as writing; the others wait for it.

    Args:
        act (callable): Does it. What it returns is sent to the others.

    Returns:
        What the first process got, in every process.

    Raises:
        Exception: What was raised there, in every process: whoever waited for what does not come would wait for ever.
            The others get what is no [`~hf_s3t.errors.S3TError`] as one.
    """
    state = PartialState()
    if state.num_processes == 1:
        return act()
    told: list[Any] = [None, None]
    failed: Exception | None = None
    if state.is_main_process:
        try:
            told[0] = act()
        except Exception as error:
            failed = error
            told[1] = error if isinstance(error, S3TError) else S3TError(f"{type(error).__name__}: {error}")
    found, refusal = broadcast_object_list(told)
    if failed is not None:
        raise failed
    if refusal is not None:
        raise refusal
    done: T = found
    return done
