"""Where checkpoints of stages in training lie: one folder per claim, held by a lock that ends with its process."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from ..plan.stages import StageKey
from .layout import CHECKPOINT_PREFIX, LOCK_FILE


# The folder of a stage; behind its name the token of the claim under which it is trained. Who has no claim, or an
# earlier release, has none, or a number where another one came to the same stage meanwhile.
_NAME = re.compile(r"(?P<stage>[^.]+)(?:\.(?P<token>[0-9a-f]{16}|[1-9][0-9]{0,8}))?")
_STEP = re.compile(rf"{CHECKPOINT_PREFIX}([0-9]+)")


def stage_of(folder: Path) -> StageKey:
    """
    The stage whose checkpoints a folder is for.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it is for none.
    """
    match = _NAME.fullmatch(folder.name)
    return StageKey.from_path(f"stages/{folder.parent.name}/{match['stage'] if match else folder.name}")


def folders_below(checkpoints: Path) -> Iterator[Path]:
    """The folders of all stages, whatever comes or goes meanwhile; what is no folder of a stage is among them."""
    for shard in names_in(checkpoints):
        if shard.startswith("shard-"):
            for name in names_in(checkpoints / shard):
                yield checkpoints / shard / name


def folders_of(first: Path) -> list[Path]:
    """The folders of one stage that are there, those with the newest checkpoint first: it has the least left to do."""
    found = []
    for name in names_in(first.parent):
        folder, match = first.with_name(name), _NAME.fullmatch(name)
        if match and match["stage"] == first.name and folder.is_dir() and not folder.is_symlink():
            found.append(folder)
    return sorted(found, key=lambda folder: (-_newest_step(folder), folder.name))


def unused(first: Path) -> Iterator[Path]:
    """Folders of a stage that are not there yet."""
    numbers = range(len(names_in(first.parent)) + 1)
    names = (first.name if number == 0 else f"{first.name}.{number}" for number in numbers)
    return (first.with_name(name) for name in names if not os.path.lexists(first.with_name(name)))


def names_in(folder: Path) -> list[str]:
    """What lies in a folder, which another process may have removed a moment ago."""
    with contextlib.suppress(OSError):
        return sorted(os.listdir(folder))
    return []


def hold(folder: Path) -> BaseFileLock | None:
    """Hold a folder until the lock is released or this process ends; `None` if a trainer that lives holds it."""
    # Released by whoever ends the stage. A process that is forked does not hold it.
    lock = FileLock(folder / LOCK_FILE, thread_local=False)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        return None
    return lock


def _newest_step(folder: Path) -> int:
    return max((int(match[1]) for name in names_in(folder) if (match := _STEP.fullmatch(name))), default=-1)
