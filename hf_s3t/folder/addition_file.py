"""The file that rows come in: synced before the ledger tells of them, and gone when the table has them."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import S3TConfig
from ..errors import FolderError
from ..records.digests import KeptNames
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from .config_file import is_said_of_additions
from .files import write_atomically
from .layout import ADDITION_FILE
from .table_file import read_table, table_bytes


_ADDED = b"hf_s3t.added"
_MERGED = b"hf_s3t.merged"


@dataclass(frozen=True)
class StoredAddition:
    """
    Rows that come to a system.

    Args:
        rows ([`~hf_s3t.records.examples.ExampleTable`]): The rows, in their places.
        added (mapping): What `s3t_config.json` says of additions with them; see
            [`~hf_s3t.folder.config_file.with_additions`].
        merged (`str`, *optional*): Where they come from another copy, by several lines perhaps, the hash of the last
            line of both ledgers together. They have the numbers of their additions then.
    """

    rows: ExampleTable
    added: Mapping[str, Any]
    merged: str | None = None


def write_addition(path: Path, addition: StoredAddition, ledger: Ledger) -> str:
    """
    Write down rows that are about to come, synced.

    Args:
        path (`Path`): The folder of the system.
        addition ([`StoredAddition`]): The rows.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The lines before the one that will tell of them.

    Returns:
        `str`: SHA-256 of the file, by which that line names it.
    """
    said = {_ADDED: json.dumps(dict(addition.added), sort_keys=True)}
    if addition.merged is not None:
        said[_MERGED] = addition.merged
    data = table_bytes(addition.rows, ledger, said)
    write_atomically(path / ADDITION_FILE, data)
    return hashlib.sha256(data).hexdigest()


def read_addition(path: Path, ledger: Ledger, line: int, config: S3TConfig, names: KeptNames) -> StoredAddition | None:
    """
    The rows that a line of the ledger names; `None` if they are not there any more, because the table has them.

    Args:
        path (`Path`): The folder of the system.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The ledger.
        line (`int`): Number of the line, counted from 1.
        config ([`~hf_s3t.S3TConfig`]): The settings of the system.
        names ([`~hf_s3t.records.digests.KeptNames`]): How ids and groups stand in the table.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If other rows are there.
    """
    file = path / ADDITION_FILE
    if not os.path.lexists(file):
        return None
    try:
        stored = read_table(file)
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        added, merged = json.loads(stored.said[_ADDED]), stored.said.get(_MERGED, b"").decode() or None
    except FileNotFoundError:
        return None
    except (KeyError, ValueError, RecursionError) as error:
        raise FolderError(f"{file} holds no rows that were to come: {error!r}. Restore it from a backup.") from error
    except FolderError:
        if not os.path.lexists(file):
            return None
        raise
    sha256 = ledger.entries[line - 1].rows_sha256
    is_named = found == sha256 if merged is None else merged in ledger.hashes[line - 1 :]
    if not is_named or not is_said_of_additions(added):
        raise FolderError(
            f"{file} holds other rows than the ledger tells of (SHA-256 {found[:12]}, expected {sha256[:12]}). "
            "Restore it from a backup."
        )
    return StoredAddition(stored.examples(config, names), added, merged)
