"""The lock of a system's folder, under which deletions are recorded and stages renamed into place."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from ..errors import FolderError
from .files import explained, make_folders
from .layout import LOCK_FILE, STAGES


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """
    Hold the lock of a system's folder.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the folder cannot be written to, or is not there any more.
    """
    if not path.is_dir():
        # The lock would make the folder anew, without the system.
        raise FolderError(f"{path} is not there any more. Restore it, then call again.")
    lock = FileLock(path / STAGES / LOCK_FILE, is_singleton=True)
    with explained(f"{path} cannot be changed", "Nothing was. Make it writable, then call again."):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def making(path: str | os.PathLike[str]) -> Iterator[None]:
    """
    The lock under which a folder becomes a system: of two trainers that begin at once, one makes it.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the folder cannot be written to.
    """
    make_folders(Path(path) / STAGES)
    with locked(Path(path)):
        yield
