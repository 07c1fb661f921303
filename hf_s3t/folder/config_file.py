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
# Of a system to which rows were added: who does not know of additions must not open it. All others stay what they are.
GROWN_VERSION = 3
_VERSIONS = (1, FORMAT_VERSION, GROWN_VERSION)
# How members weigh after shards were added: all alike, or each by the examples of its shard that are in.
WEIGHTS = ("equal", "size")


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
            f"{file} has format version {version!r}; this hf_s3t reads versions 1 to {GROWN_VERSION}. "
            "Install the version of hf_s3t that wrote it."
        )
    if version == 1:
        return {**record, "system_id": identity_of(record), "row_digests": 1, "earlier_slices": {}}
    _check_fields(file, record)
    return record


def _check_fields(file: Path, record: Mapping[str, Any]) -> None:
    identity, rows = record.get("system_id"), record.get("row_digests")
    earlier = record.get("earlier_slices", {})
    added = record.get("added", {"shards": 0, "weights": "equal"})
    is_read = {
        "added": ("added" in record) == (record["format_version"] == GROWN_VERSION) and is_said_of_additions(added),
        "system_id": isinstance(identity, str) and re.fullmatch("[0-9a-f]{32}", identity),
        "row_digests": not isinstance(rows, bool) and rows in (1, 2),
        "earlier_slices": isinstance(earlier, dict) and all(isinstance(digest, str) for digest in earlier.values()),
    }
    wrong = [name for name, fits in is_read.items() if not fits]
    if wrong:
        raise FolderError(f"{file} says of {' and '.join(wrong)} what no config says. Restore it from a backup.")


def is_said_of_additions(added: Any) -> bool:
    """Whether something is what is said of a system to which rows were added."""
    return (
        isinstance(added, dict)
        and type(added.get("shards")) is int
        and added["shards"] >= 0
        and added.get("weights") in WEIGHTS
    )


def settings_of(record: Mapping[str, Any]) -> S3TConfig:
    """
    The settings of a system, with the shards that were added to those that `num_shards` says.

    Args:
        record (mapping): What `s3t_config.json` says.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it says no settings.
    """
    return S3TConfig.from_dict(record["s3t_config"]).with_added_shards(record.get("added", {}).get("shards", 0))


def with_additions(record: Mapping[str, Any], added: Mapping[str, Any]) -> dict[str, Any]:
    """
    What `s3t_config.json` says after rows were added; shards that came are planned as the first ones are.

    Args:
        record (mapping): What it said before, in format 2 or 3.
        added (mapping): How many `shards` were added in all, and by which `weights` members answer.
    """
    plan, first = list(record["plan"]), record["s3t_config"]["num_shards"]
    plan += [plan[shard % first] for shard in range(len(plan), first + added["shards"])]
    return in_newest_format({**record, "plan": plan, "added": dict(added)})


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
    version = GROWN_VERSION if "added" in record else FORMAT_VERSION
    return {"format_version": version, **{name: v for name, v in record.items() if name != "format_version"}}


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
