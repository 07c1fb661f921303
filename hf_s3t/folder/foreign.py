"""What a folder that comes from anywhere may hold instead of files: links, pipes, names that are no text."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from ..errors import FolderError, S3TError
from .layout import PARTS, TEMPORARY


def is_foreign(entry: Path) -> bool:
    """Whether something is there that is neither a file nor a folder."""
    try:
        mode = os.lstat(entry).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return False
    return not (stat.S_ISREG(mode) or stat.S_ISDIR(mode))


def foreign_problem(entry: Path) -> str:
    """What is wrong with a link, a pipe or a device in a system's folder."""
    if entry.is_symlink():
        return (
            f"{entry} is a symbolic link: reading or removing through it would reach beyond the folder. Put what it "
            "leads to in its place, or remove it."
        )
    return f"{entry} is neither a file nor a folder: reading it may never end. Remove it."


@contextlib.contextmanager
def forgeries_told(what: str | os.PathLike[str], advice: str) -> Iterator[None]:
    """
    Say that values of a wrong type come from no version of hf_s3t: who edits a file can make its digest match.

    Args:
        what (`str` or `os.PathLike`): What holds the values.
        advice (`str`): What to do.
    """
    try:
        yield
    except S3TError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        raise FolderError(
            f"{what} holds values that no version of hf_s3t writes ({type(error).__name__}: {error}). {advice}"
        ) from error


def refuse_foreign_parts(path: str | os.PathLike[str]) -> None:
    """
    Raise [`~hf_s3t.errors.FolderError`] if a part of a system is a symbolic link, which may lead out of its folder, or
    a pipe or device, which reading may never come back from.

    Args:
        path (`str` or `os.PathLike`): The folder of the system; it may be a link itself.
    """
    entry = next(foreign_parts(Path(path)), None)
    if entry is not None:
        raise FolderError(foreign_problem(entry))


def foreign_parts(path: Path) -> Iterator[Path]:
    """What is neither a file nor a folder among the parts of a system: what is written to, removed, or read."""
    roots = [path / name for name in PARTS]
    roots += [entry for entry in entries(path) if entry.name.startswith(TEMPORARY)]
    for root in roots:
        if is_foreign(root):
            yield root
        else:
            yield from _foreign_below(root)


def _foreign_below(folder: Path) -> Iterator[Path]:
    """What is neither a file nor a folder below a folder. Thousands of files are looked at, by what lists them."""
    waiting = [os.fspath(folder)]
    while waiting:
        try:
            with os.scandir(waiting.pop()) as listed:
                found = sorted(listed, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            continue
        for entry in found:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
            elif not entry.is_file(follow_symlinks=False) and is_foreign(Path(entry.path)):
                yield Path(entry.path)


def printable(text: str) -> str:
    """
    A text on one line, as it can be printed: names in a foreign folder may hold line breaks or commands to terminals.

    Args:
        text (`str`): The text.

    Returns:
        `str`: The text, unprintable characters escaped.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def entries(folder: Path) -> list[Path]:
    """What lies in a folder, none where there is no folder."""
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
