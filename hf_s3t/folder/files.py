"""Files that last through a crash and show when they were altered: writes synced and atomic, reads checked."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FolderError
from .layout import TEMPORARY


class Stamp(NamedTuple):
    """What changes when a file, or what lies in a folder, does."""

    number: int
    size: int
    time: int


def stamp(path: str | os.PathLike[str]) -> Stamp | None:
    """The stamp of a file or folder, at one look; `None` if it cannot be seen."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# What to do about a damaged file of a stage, which is no more than what training made of the data.
REGROW = "Restore it, or remove its folder and call `train()` to grow it again."


def check_digest(path: Path, expected: str) -> None:
    """Raise [`~hf_s3t.errors.FolderError`] if a file is missing or not what it was when it was written."""
    _require_file(path)
    _require_digest(path, file_digest(path), expected)


def read_checked(path: Path, expected: str) -> bytes:
    """
    The bytes of a file, read once: they are those that were written, whatever becomes of the file meanwhile or later.

    Args:
        path (`Path`): The file.
        expected (`str`): Its digest.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the file is missing, or its bytes are not what was written.
    """
    _require_file(path)
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise FolderError(f"{path} is missing. {REGROW}") from None
    except OSError as error:
        raise unreadable(path, error) from error
    _require_digest(path, hashlib.sha256(data).hexdigest(), expected)
    return data


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise FolderError(f"{path} is missing. {REGROW}")


def _require_digest(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise FolderError(
            f"{path} was altered or cut short: its digest is {found[:12]}…, expected {expected[:12]}…. {REGROW}"
        )


def unreadable(path: Path, error: OSError) -> FolderError:
    """The error to raise for a file that the operating system does not let be read."""
    return FolderError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.")


@contextlib.contextmanager
def explained(what: str, advice: str) -> Iterator[None]:
    """Say what an error of the operating system means; those that say so are left as they are."""
    try:
        yield
    except FolderError:
        raise
    except OSError as error:
        raise FolderError(f"{what} ({error}). {advice}") from error


def is_read_only(error: Exception) -> bool:
    """Whether an error that was `explained` says that one may read there and not write."""
    return getattr(error.__cause__, "errno", None) in (errno.EROFS, errno.EACCES, errno.EPERM)


def sync(path: Path) -> None:
    """Make the content of a file, or what was created, renamed or removed in a folder, last through a crash."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folders(path: Path) -> None:
    """Make a folder and those above it that are missing, so that they last through a crash."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync_above(folder)


def sync_above(folder: Path) -> None:
    """Make a new folder's name last through a crash."""
    # One may be allowed to make folders in a folder and not to read it; syncing needs the latter.
    with contextlib.suppress(PermissionError):
        sync(folder.absolute().parent)


def remove(path: Path) -> None:
    """Remove a file or a folder, whatever is left of it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def temporary_beside(path: Path) -> Path:
    """Where something is written before it gets its name; what a crash leaves there is known by its own."""
    return path.with_name(f"{TEMPORARY}{path.name}-{uuid.uuid4().hex[:8]}")


def write_atomically(path: Path, data: bytes | memoryview, synced: bool = True, private: bool = False) -> None:
    """
    Write a file that is there whole or not at all, whenever this process dies. Its permissions stay what they were.

    Args:
        path (`Path`): The file.
        data (`bytes` or `memoryview`): What it shall hold.
        synced (`bool`, defaults to `True`):
            Make it last through a crash of the machine when this returns; otherwise it may be empty after one.
        private (`bool`, defaults to `False`): Only its owner may read it, from the first byte on.
    """
    temporary = temporary_beside(path)
    try:
        with open(temporary, "wb", opener=_open_private if private else None) as file:
            file.write(data)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        if not private:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(path, temporary)
        os.replace(temporary, path)
        if synced:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _digest_of(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def write_checked_json(path: Path, record: Mapping[str, Any]) -> None:
    """Write a JSON object with its own digest in it."""
    write_atomically(path, digested_json(record))


def digested_json(record: Mapping[str, Any]) -> bytes:
    """A JSON object with its own digest in it."""
    record = json.loads(json.dumps(record))
    return json.dumps({**record, "digest": _digest_of(record)}, indent=2).encode()


def read_checked_json(path: Path, advice: str = "Restore it from a backup.") -> dict[str, Any]:
    """
    The JSON object of a file that carries its own digest.

    Args:
        path (`Path`): The file.
        advice (`str`): What to do where it is missing or damaged.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the file is missing or altered.
    """
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
        intact = record.pop("digest", None) == _digest_of(record)
    except FileNotFoundError:
        raise FolderError(f"{path} is missing. {advice}") from None
    except OSError as error:
        raise unreadable(path, error) from error
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path} is not the JSON it was written as: {error}. {advice}") from error
    if not intact:
        raise FolderError(f"{path} was altered: its contents do not match the digest it carries. {advice}")
    return record
