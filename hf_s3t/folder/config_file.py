"""`s3t_config.json`, whose presence makes a folder a system: its formats, and what of it others may have."""

import os
import re
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from ..config import S3TConfig
from ..errors import FolderError, FormatVersionError
from ..plan.stages import Plan
from .files import digested_json, read_checked_json, write_checked_json
from .identity import identity_of
from .layout import CONFIG_FILE, LEDGER_FILE, STAGES


FORMAT_VERSION = 2
_VERSIONS = (1, 2)


def read_record(file: Path) -> dict[str, Any]:
    """
    What `s3t_config.json` says of a system, the format's version checked.

    Of format 1 it is what a migration makes of it, but for `format_version`, `plan` and what is in `earlier_slices`.

    Args:
        file (`Path`): The file, of a folder or of the snapshot of a repository.

    Raises:
        [`~hf_s3t.errors.FormatVersionError`]: If another version of hf_s3t wrote it.
        [`~hf_s3t.errors.FolderError`]: If the file is missing or altered.
    """
    record = read_checked_json(file)
    version = record.get("format_version")
    if isinstance(version, bool) or version not in _VERSIONS:
        raise FormatVersionError(
            f"{file} has format version {version!r}; this hf_s3t reads versions 1 and {FORMAT_VERSION}. "
            "Install the version of hf_s3t that wrote it."
        )
    if version == 1:
        return {**record, "system_id": identity_of(record), "row_digests": 1, "earlier_slices": {}}
    _check_fields(file, record)
    return record


def _check_fields(file: Path, record: Mapping[str, Any]) -> None:
    identity, rows = record.get("system_id"), record.get("row_digests")
    earlier = record.get("earlier_slices", {})
    is_read = {
        "system_id": isinstance(identity, str) and re.fullmatch("[0-9a-f]{32}", identity),
        "row_digests": not isinstance(rows, bool) and rows in (1, 2),
        "earlier_slices": isinstance(earlier, dict) and all(isinstance(digest, str) for digest in earlier.values()),
    }
    wrong = [name for name, fits in is_read.items() if not fits]
    if wrong:
        raise FolderError(f"{file} says of {' and '.join(wrong)} what no config says. Restore it from a backup.")


def plan_of(file: Path, record: Mapping[str, Any], config: S3TConfig) -> Plan:
    """
    The plan of a system: the one that is written down, or, of format 1, the one that its settings ask for.

    Args:
        file (`Path`): The file.
        record (mapping): What it says.
        config ([`~hf_s3t.S3TConfig`]): The settings in it.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the plan that is written down is none of these settings.
    """
    if record["format_version"] == 1:
        return Plan.as_asked_for(config)
    try:
        return Plan.from_record(record.get("plan"), config)
    except FolderError as error:
        raise FolderError(f"{file}: {error} Restore it from a backup.") from None


def write_record(file: Path, record: Mapping[str, Any]) -> None:
    """Write `s3t_config.json` in the newest format, in which the record is."""
    write_checked_json(file, in_newest_format(record))


def in_newest_format(record: Mapping[str, Any]) -> dict[str, Any]:
    """What `s3t_config.json` says, with the version of the format in its first place."""
    return {"format_version": FORMAT_VERSION, **{name: v for name, v in record.items() if name != "format_version"}}


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


def config_for_others(record: Mapping[str, Any]) -> bytes:
    """`s3t_config.json` as others may have it: of a base that is a folder of this machine, only the name."""
    base = record["base_model"]
    if base.get("id") is not None and base_id_of(record) is None:
        name = PureWindowsPath(base["id"]).name
        record = {**record, "base_model": {**base, "id": None, "folder": name}}
    return digested_json(in_newest_format(record))
