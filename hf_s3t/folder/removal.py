"""Removing so that a crash brings nothing back, and what interrupted writes and removals left behind."""

import os
import shutil
import uuid
from collections.abc import Iterable
from pathlib import Path

from .files import remove, sync
from .layout import GONE, LEFTOVERS


def discard(folders: Iterable[Path]) -> None:
    """Remove folders; each goes by one rename first, so that none is seen, or comes back, with files missing."""
    renamed = []
    for folder in folders:
        if folder.exists():
            renamed.append(folder.with_name(f"{GONE}{folder.name}-{uuid.uuid4().hex[:8]}"))
            os.rename(folder, renamed[-1])
    # A crash must not give a folder its name back that has lost files.
    for parent in sorted({gone.parent for gone in renamed}):
        sync(parent)
    for gone in renamed:
        shutil.rmtree(gone)


def leftovers(path: Path) -> list[Path]:
    """What writes and removals that were interrupted left in a system's folder."""
    return [found for pattern in LEFTOVERS for found in path.glob(pattern)]


def remove_leftovers(path: Path) -> None:
    """Remove what writes and removals that were interrupted left; the folder's lock must be held."""
    found = leftovers(path)
    for parent in sorted({leftover.parent for leftover in found} - {path}):
        sync(parent)
    for leftover in found:
        remove(leftover)
