"""The file of the ledger, and the pins by which other files remember its last line."""

import os
from pathlib import Path

from ..errors import FolderError
from ..records.ledger import Ledger, line_hash
from .files import Stamp, unreadable, write_atomically
from .layout import HEAD_FILE, LEDGER_FILE


_BACKUP = "Restore it from a backup"


def read_ledger(file: Path, known: Ledger | None = None, advice: str = _BACKUP) -> Ledger:
    """
    The ledger in a file, its chain checked.

    Args:
        file (`Path`): The file.
        known ([`~hf_s3t.records.ledger.Ledger`], *optional*): What was read of it before, and is not read again.
        advice (`str`, *optional*): What to do where it is missing or damaged, without a full stop.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it is missing, no text, or no unbroken chain of lines.
    """
    return parse_ledger(file, read_ledger_text(file, advice), known, advice)


def read_on(file: Path, known: Ledger, before: Stamp | None) -> Ledger | None:
    """
    A ledger that was read from a file before, with what was appended to the file since; only that is read.

    Args:
        file (`Path`): The file.
        known ([`~hf_s3t.records.ledger.Ledger`]): What was read of it before.
        before (`Stamp`, *optional*): The stamp of the file at that time.

    Returns:
        [`~hf_s3t.records.ledger.Ledger`] or `None`: `None` where the file must be read as a whole, because it is
            another one, did not grow, or does not go on from these lines.
    """
    if before is None or not known.lines:
        return None
    try:
        with open(file, "rb") as opened:
            status = os.fstat(opened.fileno())
            if status.st_ino != before.number or status.st_size <= known.size():
                return None
            # The last line again: what was written over is seldom cut at the same place and ends in the same line.
            opened.seek(known.size(len(known.lines) - 1))
            last, _, more = opened.read().decode().partition("\n")
        return known.read_on(more) if line_hash(last) == known.hashes[-1] else None
    except (OSError, UnicodeDecodeError, FolderError):
        # Read as a whole, it is told what is wrong.
        return None


def read_ledger_text(file: Path, advice: str = _BACKUP) -> str:
    """The text of a ledger, whatever it says."""
    try:
        return file.read_bytes().decode()
    except FileNotFoundError:
        raise FolderError(f"{file} is missing: without it deletions could be forgotten. {advice}.") from None
    except OSError as error:
        raise unreadable(file, error) from error
    except UnicodeDecodeError as error:
        raise FolderError(f"{file} is not text: {error}. {advice}.") from error


def parse_ledger(file: Path, text: str, known: Ledger | None = None, advice: str = _BACKUP) -> Ledger:
    """The ledger of a text, in whose errors the file is named from which it was read."""
    try:
        return Ledger.parse(text, known)
    except FolderError as error:
        remedy = "" if str(error).endswith(".") else f". {advice}; do not serve this system."
        raise type(error)(f"{file}: {error}{remedy}") from error


def append_line(path: Path, ledger: Ledger) -> None:
    """
    Put the last line of a ledger into the file of a system that holds the lines before it, synced.

    A torn last line was never acknowledged; the new line takes its place.
    """
    with open(path / LEDGER_FILE, "r+b") as file:
        file.truncate(ledger.size(len(ledger.lines) - 1))
        file.seek(0, os.SEEK_END)
        file.write((ledger.lines[-1] + "\n").encode())
        file.flush()
        os.fsync(file.fileno())


def write_head(path: Path, ledger: Ledger) -> None:
    """
    Write down, beside a ledger, which line is its last.

    The chain cannot show that its last lines were cut off, and the table does only once it was written without the
    deleted rows. A line is synced before; this need not be: a part, as a crash of the machine leaves, does not count.
    """
    write_atomically(path / HEAD_FILE, f"{pin_of(ledger)}\n".encode(), synced=False)


def read_head(path: Path) -> str | None:
    """The pin of the last line, as `write_head` wrote it; `None` where it wrote none, or a crash left a part of it."""
    try:
        head = (path / HEAD_FILE).read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise unreadable(path / HEAD_FILE, error) from error
    return head.removesuffix("\n") if head.endswith("\n") else None


def pin_of(ledger: Ledger, count: int | None = None) -> str:
    """The lines whose deletions a table is written without: how many, and the hash of the last."""
    lines = len(ledger.hashes) if count is None else min(count, len(ledger.hashes))
    return f"{lines} {ledger.hashes[lines - 1]}" if lines else "0 "


def holds(ledger: Ledger, pin: str) -> bool:
    """Whether a ledger still has the lines of a pin, whatever came after them."""
    count = pin.partition(" ")[0]
    return count.isascii() and count.isdigit() and len(count) < 19 and pin == pin_of(ledger, int(count))


def pin_problem(ledger: Ledger, pin: str, by: str, file: str | Path = LEDGER_FILE) -> str | None:
    """
    What is wrong between a ledger and the lines that another file was written with.

    The chain alone cannot show that its last lines were cut off; the table and the head remember how many there were.

    Args:
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The ledger.
        pin (`str`): What was recorded: the number of lines and the hash of the last.
        by (`str`): The name of the file that recorded it.
        file (`str` or `Path`, *optional*): How the ledger's file is named.

    Returns:
        `str` or `None`: One sentence and the remedy.
    """
    if holds(ledger, pin):
        return None
    expected = pin.partition(" ")[0][:19]
    return (
        f"{file} does not hold the {expected} lines with which {by} was written (expected {expected}, found "
        f"{len(ledger.lines)}): lines were cut off or edited, and deletions would be forgotten. {_BACKUP}."
    )


def require_pinned(file: Path, ledger: Ledger, pin: str, by: str) -> None:
    """
    Check that a ledger still has the lines that another file was written with.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it lost some.
    """
    problem = pin_problem(ledger, pin, by, file)
    if problem is not None:
        raise FolderError(problem)
