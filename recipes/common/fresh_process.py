"""Runs a part of a recipe in a process that has trained nothing: an audit there repeats no state of this one."""

import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any


# By these a launcher tells a process which of several it is; the new one is by itself.
_LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def in_new_process(function: Callable, *arguments: Any) -> Any:
    """
    What a function returns in a new process.

    Args:
        function (`Callable`): A function of a module.
        arguments: What it is called with, pickled.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=_alone) as pool:
        return pool.submit(function, *arguments).result()


def _alone() -> None:
    for name in _LAUNCHED:
        os.environ.pop(name, None)
