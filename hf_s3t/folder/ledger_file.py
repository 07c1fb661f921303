"""The file of the ledger, and the pins by which other files remember its last line."""

from pathlib import Path

from ..errors import FolderError
from ..records.ledger import Ledger, line_hash
from .files import unreadable, write_atomically
from .layout import HEAD_FILE, LEDGER_FILE, TABLE_FILE


# What is read may come from anywhere


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


def lines_lost(ledger: Path, by: str, pin: str) -> FolderError:
    """The error of a ledger without the lines that another file was written with."""
    return FolderError(
        f"{ledger} does not hold the {pin.partition(' ')[0][:19]} lines with which {by} was written: lines were cut "
        "off or edited, and deletions would be forgotten. Restore it from a backup."
    )


def pin_of(ledger: Ledger, count: int | None = None) -> str:
    """The lines whose deletions a table is written without: how many, and the hash of the last."""
    lines = ledger.lines[:count]
    return f"{len(lines)} {line_hash(lines[-1])}" if lines else "0 "


def holds(ledger: Ledger, pin: str) -> bool:
    """Whether a ledger still has the lines of a pin, whatever came after them."""
    count = pin.partition(" ")[0]
    return count.isascii() and count.isdigit() and len(count) < 19 and pin == pin_of(ledger, int(count))


def read_ledger_text(path: Path) -> str:
    """The text of a ledger, whatever it says."""
    try:
        return path.read_bytes().decode()
    except FileNotFoundError:
        raise FolderError(f"{path} is missing. Give the folder of a system, or restore it from a backup.") from None
    except OSError as error:
        raise unreadable(path, error) from error
    except UnicodeDecodeError as error:
        raise FolderError(f"{path} is not text: {error}. Restore it from a backup.") from error


def pin_problem(ledger: Ledger, pin: str, file: str = TABLE_FILE) -> str | None:
    """
    What is wrong between a ledger and the lines that another file was written with.

    The chain alone cannot show that its last lines were cut off; the table and the head remember how many there were.

    Args:
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The ledger.
        pin (`str`): What was recorded: the number of lines and the hash of the last.
        file (`str`, *optional*): Where.

    Returns:
        `str` or `None`: One sentence and the remedy.
    """
    if holds(ledger, pin):
        return None
    return (
        f"{LEDGER_FILE} does not hold the lines with which {file} was written (expected "
        f"{pin.partition(' ')[0][:19]}, found {len(ledger.lines)}): lines were cut off or edited, and deletions would "
        "be forgotten. Restore it from a backup."
    )
