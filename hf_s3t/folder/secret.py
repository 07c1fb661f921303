"""Reads the secret of a system's digests."""

import os
from pathlib import Path

from ..errors import KeyMissingError
from ..records.digests import KEY_FILE, KEY_VARIABLE, DigestKey
from .files import read_checked_json
from .layout import CONFIG_FILE


def load_key(path: str | os.PathLike) -> DigestKey:
    """
    The secret of a folder's digests, checked to be the right one: with another, no deletion would be found.

    Args:
        path (`str` or `os.PathLike`): The folder of the system.

    Returns:
        [`~hf_s3t.records.digests.DigestKey`]: The secret.

    Raises:
        [`~hf_s3t.errors.KeyMissingError`]: If there is none, or it is another system's.
    """
    record = read_checked_json(Path(path) / CONFIG_FILE)
    try:
        key = DigestKey.load(path)
    except UnicodeDecodeError as error:
        raise KeyMissingError(f"{Path(path) / KEY_FILE} is not text: {error}. Restore it from a backup.") from error
    if key.check != record.get("key_check"):
        raise KeyMissingError(
            f"The secret in {KEY_VARIABLE} or {Path(path) / KEY_FILE} is not the one that this system's digests were "
            "made with: its deletions cannot be recognised. Restore the file, or set the variable to what it was at "
            "training."
        )
    return key
