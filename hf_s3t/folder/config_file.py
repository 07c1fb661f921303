"""`s3t_config.json`, whose presence makes a folder a system: reading it, and what of it others may have."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from ..config import FORMAT_VERSION
from ..errors import FolderError, FormatVersionError
from .files import digested_json, read_checked_json, write_checked_json
from .layout import CONFIG_FILE, LEDGER_FILE, STAGES


def read_record(file: Path) -> dict[str, Any]:
    """
    What `s3t_config.json` says of a system, the format's version checked.

    Args:
        file (`Path`): The file, of a folder or of the snapshot of a repository.

    Raises:
        [`~hf_s3t.errors.FormatVersionError`]: If another version of hf_s3t wrote it.
        [`~hf_s3t.errors.FolderError`]: If the file is missing or altered.
    """
    record = read_checked_json(file)
    version = record.get("format_version")
    if version != FORMAT_VERSION:
        raise FormatVersionError(
            f"{file} has format version {version!r}; this hf_s3t reads version {FORMAT_VERSION}. Install the version "
            "of hf_s3t that wrote it."
        )
    return record


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write `s3t_config.json` in the format that `read_record` reads."""
    write_checked_json(file, {"format_version": FORMAT_VERSION, **record})


def holds_system(path: Path) -> bool:
    """
    Whether a folder holds a system.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it holds stages or deletions of a system whose config is missing.
    """
    if (path / CONFIG_FILE).is_file():
        return True
    ledger = path / LEDGER_FILE
    if any(path.glob(f"{STAGES}/shard-*/*")) or (ledger.is_file() and ledger.stat().st_size):
        raise FolderError(
            f"{path / CONFIG_FILE} is missing, but the folder holds stages or deletions of a system. Restore it "
            "from a backup, or choose another folder."
        )
    return False


def base_id_of(record: Mapping[str, Any]) -> str | None:
    """The id that others can load the base by; `None` if it is a folder of this machine, or was made in memory."""
    base = record["base_model"]
    base_id: str | None = base.get("id")
    # What came from the Hub came in a revision of it.
    if not base_id or base.get("revision"):
        return base_id
    is_path = re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", base_id) is None
    return None if is_path or os.path.isdir(base_id) else base_id


def config_for_others(path: Path, record: Mapping[str, Any]) -> bytes:
    """`s3t_config.json` as others may have it: of a base that is a folder of this machine, only the name."""
    base = record["base_model"]
    if base.get("id") is None or base_id_of(record) is not None:
        return (path / CONFIG_FILE).read_bytes()
    name = PureWindowsPath(base["id"]).name
    return digested_json({**record, "base_model": {**base, "id": None, "folder": name}})
