"""Where the secret of a system's digests is kept: in the environment, or in a file of the folder."""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FolderError, KeyMissingError
from ..records.digests import DigestKey
from .files import read_checked_json, temporary_beside
from .layout import CONFIG_FILE, KEY_FILE


KEY_VARIABLE = "HF_S3T_KEY"


def load_key(path: str | os.PathLike[str], record: Mapping[str, Any] | None = None) -> DigestKey:
    """
    The secret of a system's digests, checked to be the right one: with another, no deletion would be found.

    Args:
        path (`str` or `os.PathLike`): The folder of the system.
        record (mapping, *optional*): What the system's `s3t_config.json` says; read from the folder if not given.

    Returns:
        [`~hf_s3t.records.digests.DigestKey`]: The secret.

    Raises:
        [`~hf_s3t.errors.KeyMissingError`]: If there is none, or it is another system's.
    """
    if record is None:
        record = read_checked_json(Path(path) / CONFIG_FILE)
    key = read_key(path)
    if key.check != record.get("key_check"):
        raise KeyMissingError(
            f"The secret in {KEY_VARIABLE} or {Path(path) / KEY_FILE} is not the one that this system's digests were "
            "made with: its deletions cannot be recognised. Restore the file, or set the variable to what it was at "
            "training."
        )
    return key


def read_key(path: str | os.PathLike[str], is_new: bool = False) -> DigestKey:
    """
    The secret from the environment variable `HF_S3T_KEY`, else from `ledger.key` in the folder, whosever it is.

    Args:
        path (`str` or `os.PathLike`): The folder.
        is_new (`bool`, defaults to `False`): Whether there may be no system yet that was made with it.

    Raises:
        [`~hf_s3t.errors.KeyMissingError`]: If there is none, or it is too short or cannot be read.
    """
    secret = os.environ.get(KEY_VARIABLE, "").encode() or _read_secret(Path(path) / KEY_FILE)
    try:
        return DigestKey(secret)
    except KeyMissingError as error:
        # A new secret would match no deletion of a system that is there.
        advice = "Make one with `openssl rand -hex 32`." if is_new else "Restore it as it was at training."
        raise KeyMissingError(
            f"The secret in {KEY_VARIABLE} or {KEY_FILE} has {len(secret)} bytes, expected at least 16. {advice}"
        ) from error


def draw_key(path: str | os.PathLike[str]) -> DigestKey:
    """
    The secret of a system that is to be made in the folder: the one that is there for it already, else a new one, in
    memory until [`write_key`].

    Args:
        path (`str` or `os.PathLike`): The folder, which may be missing.

    Raises:
        [`~hf_s3t.errors.KeyMissingError`]: If the one that is there is too short or cannot be read.
    """
    if os.environ.get(KEY_VARIABLE) or (Path(path) / KEY_FILE).exists():
        return read_key(path, is_new=True)
    return DigestKey(secrets.token_hex(32).encode())


def write_key(path: str | os.PathLike[str], key: DigestKey) -> None:
    """
    Put the secret into the folder of a system that is made with it, unless the environment holds it.

    Args:
        path (`str` or `os.PathLike`): The folder.
        key ([`~hf_s3t.records.digests.DigestKey`]): The secret.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If another secret came there meanwhile.
    """
    if os.environ.get(KEY_VARIABLE):
        return
    file = Path(path) / KEY_FILE
    if not file.exists():
        _write_secret(file, key.secret.decode())
    if read_key(path).check != key.check:
        raise FolderError(
            f"{file} holds another secret than a moment ago: another process makes a system there. Choose another "
            "`output_dir`, or call again to go on with that one."
        )


def _read_secret(file: Path) -> bytes:
    try:
        return file.read_text().strip().encode()
    except FileNotFoundError:
        raise KeyMissingError(
            f"Neither {KEY_VARIABLE} nor {file} holds the secret of this system's digests. Restore the file, or set "
            "the variable to what it was at training."
        ) from None
    except UnicodeDecodeError as error:
        raise KeyMissingError(f"{file} is not text: {error}. Restore the file as it was at training.") from error
    except OSError as error:
        raise KeyMissingError(f"{file} cannot be read: {error.strerror}. Check its permissions.") from error


def _write_secret(file: Path, secret: str) -> None:
    """Make a file with a secret, whole or not at all, and never in the place of another."""
    temporary = temporary_beside(file)
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as new:
            new.write(secret)
            new.flush()
            os.fsync(new.fileno())
        try:
            os.link(temporary, file)
        except FileExistsError:
            # Another process was first: its secret is the one.
            return
        except OSError:
            # No hard links here.
            os.rename(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
