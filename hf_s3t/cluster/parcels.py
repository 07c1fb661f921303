"""
What goes between machines that share no folder: bytes of files, of a system and of its stages.

The driver alone writes to the system's folder; a worker works on a folder of its own, which is made of these.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ClusterError, FolderError
from ..folder.files import make_folders, write_atomically
from ..folder.layout import (
    ADAPTER_CONFIG_FILE,
    ADAPTER_FILE,
    CONFIG_FILE,
    GATE_FILE,
    HEAD_FILE,
    KEY_FILE,
    LEDGER_FILE,
    STAGE_FILE,
    STAGE_FILES,
    TABLE_FILE,
)
from ..folder.secret import write_key
from ..folder.stage_record import checked_stage
from ..folder.system import SystemFolder
from ..folder.table_file import read_table, table_bytes
from ..plan.stages import StageKey
from ..records.digests import DigestKey
from ..records.ledger import Ledger


# The bytes of files by their names.
Parcel = Mapping[str, bytes]
# In the order in which they are written: the config, which makes a folder a system, comes last.
_OF_A_SYSTEM = (TABLE_FILE, GATE_FILE, LEDGER_FILE, HEAD_FILE, CONFIG_FILE)


def pack_system(folder: SystemFolder) -> Parcel:
    """
    The files that make a folder this system, and its secret, but no stages.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
    """
    # What a deletion has left to do is done first: rows that are gone leave the table.
    folder.refresh()
    with folder.lock():
        companions = folder.companions()
        paths = {name: folder.path / name for name in _OF_A_SYSTEM} | companions
        files = {name: path.read_bytes() for name, path in paths.items() if path.is_file()}
    return {**files, KEY_FILE: folder.key.secret}


def pack_rows(folder: SystemFolder) -> bytes | None:
    """
    The table, for workers without it, where rows came that their ledgers are about to tell of.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system, as its ledger was read last.
    """
    return bytes(table_bytes(folder.table, folder.ledger)) if folder.ledger.additions else None


def take_in(folder: SystemFolder, ledger: str, rows: bytes | None) -> None:
    """
    Have a worker's own folder know what was deleted and what came.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The worker's folder.
        ledger (`str`): What the driver's ledger says.
        rows (`bytes`, *optional*): The driver's table, from [`pack_rows`].
    """
    if rows is None:
        folder.merge_ledger(Ledger.parse(ledger))
        return
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, TABLE_FILE)
        file.write_bytes(rows)
        folder.merge_ledger(Ledger.parse(ledger), read_table(file).examples(folder.config, folder.names))


def unpack_system(parcel: Parcel, path: Path) -> None:
    """
    Make a folder a system, the config last.

    Args:
        parcel (`Parcel`): From [`pack_system`].
        path (`Path`): The folder.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If there is a system by now.
    """
    with SystemFolder.making(path):
        if SystemFolder.exists(path):
            raise FolderError(
                f"{path} holds a system by now, which another process made. Call again to go on with it."
            )
        write_key(path, DigestKey(parcel[KEY_FILE]))
        last = [name for name in _OF_A_SYSTEM if name in parcel]
        for name in (*(name for name in parcel if name not in (*last, KEY_FILE)), *last):
            # A name comes from another machine.
            if Path(name).name != name:
                raise FolderError(f"{name!r} is no name of a file of a system. Use the same hf_s3t on every machine.")
            write_atomically(path / name, parcel[name])


def pack_stage(folder: SystemFolder, key: StageKey) -> Parcel:
    """
    The files of a valid stage, as they were written.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        key ([`~hf_s3t.plan.stages.StageKey`]): The stage.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If a file is missing or altered.
    """
    record = folder.stage_record(key)
    return {**folder.read_other_files(key, record), ADAPTER_FILE: folder.read_adapter(key)}


def unpack_stages(parcels: Mapping[StageKey, Parcel], folder: SystemFolder) -> None:
    """
    Put stages into a worker's own folder, parents first.

    Args:
        parcels (mapping): By their keys.
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The worker's folder.
    """
    with folder.lock():
        for key, parcel in parcels.items():
            target = folder.path / key.path
            make_folders(target)
            for name in STAGE_FILES:
                write_atomically(target / name, parcel[name], synced=False)
    folder.refresh_stages()


def accept_stage(folder: SystemFolder, key: StageKey, parcel: Parcel) -> bool:
    """
    Write a stage that a worker sent, if it is still what the folder lacks.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
        parcel (`Parcel`): Its files.

    Returns:
        `bool`: False if a deletion that came meanwhile touches it, or what it stands on.

    Raises:
        [`~hf_s3t.errors.ClusterError`]: If it did not come whole.
    """
    record = _record_in(parcel, key)

    def fill(path: Path) -> None:
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            (path / name).write_bytes(parcel[name])

    said = {name: value for name, value in record.items() if name not in ("stage", "files")}
    return folder.write_stage(key, said, fill)


def _record_in(parcel: Parcel, key: StageKey) -> dict[str, Any]:
    """The record of a stage in its parcel, whose files are those that it names."""
    try:
        if set(parcel) != set(STAGE_FILES):
            raise FolderError(f"it has the files {', '.join(sorted(parcel))}.")
        record: dict[str, Any] = json.loads(parcel[STAGE_FILE])
        record.pop("digest", None)
        record = checked_stage(Path(key.path), key, record)
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            if hashlib.sha256(parcel[name]).hexdigest() != record["files"][name]:
                raise FolderError(f"its {name} is not what its record names.")
    except (FolderError, ValueError, AttributeError, TypeError) as error:
        raise ClusterError(
            f"{key} did not come back whole: {error} Nothing of it was written. Call again to have it trained anew."
        ) from error
    return record
