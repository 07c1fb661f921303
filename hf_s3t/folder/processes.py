"""Which process of which machine something belongs to, and whether that one is gone; no clock is asked."""

import os
import platform
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import psutil


# Seconds by which two looks at the start of one process may differ.
_TOLERANCE = 0.5


def this_process() -> dict[str, Any]:
    """
    Who this process is: `host` and `process` for people, `machine` and `started` to tell it from all others.

    A process number counts within a machine since its last start, and within a container; it comes again when its
    process is gone, but not with the same start.
    """
    process = os.getpid()
    return {"host": platform.node(), "machine": _machine(), "process": process, "started": _started(process)}


def is_gone(who: Mapping[str, Any]) -> bool:
    """Whether a process has ended, as far as it can be told from here: of other machines' processes it cannot."""
    if who.get("machine") != _machine():
        return False
    number, started = who.get("process"), who.get("started")
    if type(number) is not int or not isinstance(started, (int, float)):
        return False
    now = _started(number)
    return now is None or abs(now - started) > _TOLERANCE


@cache
def _machine() -> str:
    """What tells a machine from others, also from one of the same name, and from itself before it was started anew."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{platform.node()} {uuid.getnode():012x}"


def _started(number: int) -> float | None:
    """How many seconds after its machine a process started, whatever clocks were set since; `None` if it ended."""
    try:
        process = psutil.Process(number)
        # One that nobody has waited for is only a number.
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return process.create_time() - psutil.boot_time()
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return None
    except psutil.AccessDenied:
        # It is there.
        return 0.0
