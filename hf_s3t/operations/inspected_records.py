"""Looks at what a folder says of its system as a whole: config, secret, ledger, and the table of examples."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import S3TConfig
from ..errors import ConfigError, FolderError, KeyMissingError, counted
from ..folder.addition_file import read_addition
from ..folder.config_file import plan_of, read_record, settings_of
from ..folder.earlier_slices import EarlierSlices
from ..folder.layout import CONFIG_FILE, HEAD_FILE, KEY_FILE, LEDGER_FILE, TABLE_FILE
from ..folder.ledger_file import parse_ledger, pin_of, read_head, read_ledger_text, require_pinned
from ..folder.secret import load_key
from ..folder.table_file import StoredTable, read_table
from ..records.digests import DigestKey, KeptNames
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from .findings import Findings, require_file, require_private


@dataclass
class Records:
    """
    What could be read; `None` is what could not, or what depends on it.

    Args:
        config ([`~hf_s3t.S3TConfig`], *optional*): The settings.
        key_check (`str`, defaults to `""`): What tells the secret from others.
        is_of_format_1 (`bool`, defaults to `False`): Whether nothing of a later format was written yet.
        key ([`~hf_s3t.records.digests.DigestKey`], *optional*): The secret.
        ledger ([`~hf_s3t.records.ledger.Ledger`], *optional*): The ledger, if it holds all lines that it had.
        table ([`~hf_s3t.records.examples.ExampleTable`], *optional*): The examples that are in.
        earlier ([`~hf_s3t.folder.earlier_slices.EarlierSlices`]): By which records of format 1 are understood.
    """

    config: S3TConfig | None = None
    key_check: str = ""
    is_of_format_1: bool = False
    key: DigestKey | None = None
    ledger: Ledger | None = None
    table: ExampleTable | None = None
    earlier: EarlierSlices = field(default_factory=lambda: EarlierSlices({}))


def inspect_records(path: Path, findings: Findings) -> Records:
    """
    Read config, secret, ledger and table of a system.

    Args:
        path (`Path`): The folder of the system.
        findings ([`~hf_s3t.operations.findings.Findings`]): Gets what is wrong with them.

    Returns:
        [`Records`]: What could be read.
    """
    records = Records()
    with findings.reading(path):
        record = _read_config(path)
        records.config, records.key_check = _settings_in(path, record), str(record.get("key_check", ""))
        # Read to see that it is one.
        plan_of(path / CONFIG_FILE, record, records.config)
        records.is_of_format_1 = record["format_version"] == 1
        records.earlier.take_in(record.get("earlier_slices", {}))
    with findings.reading(path):
        _check_key_file(path / KEY_FILE, findings)
        if records.config is not None:
            records.key = load_key(path)
    with findings.reading(path):
        _read_ledger_and_table(path, records, findings)
    return records


def _read_config(path: Path) -> dict[str, Any]:
    require_file(path / CONFIG_FILE)
    return read_record(path / CONFIG_FILE)


def _settings_in(path: Path, record: Mapping[str, Any]) -> S3TConfig:
    try:
        return settings_of(record)
    except ConfigError as error:
        raise FolderError(f"{path / CONFIG_FILE}: {error} Restore it from a backup.") from error


def _check_key_file(file: Path, findings: Findings) -> None:
    if not os.path.lexists(file):
        return
    require_file(file)
    require_private(file, findings, "others could test who was deleted")


def _read_ledger_and_table(path: Path, records: Records, findings: Findings) -> None:
    # In the order of SystemFolder: the ledger is never behind the table, nor behind its head.
    stored = pin = head = ledger = None
    with findings.reading(path / TABLE_FILE):
        require_file(path / TABLE_FILE)
        stored = read_table(path / TABLE_FILE)
        pin = stored.pin
    with findings.reading(path / HEAD_FILE):
        # Folders of earlier versions have none.
        if os.path.lexists(path / HEAD_FILE):
            require_file(path / HEAD_FILE)
            head = read_head(path)
    with findings.reading(path / LEDGER_FILE):
        ledger = _read_ledger(path / LEDGER_FILE, findings)
    for by, known in ((TABLE_FILE, pin), (HEAD_FILE, head)):
        if ledger is not None and known is not None:
            require_pinned(path / LEDGER_FILE, ledger, known, by)
    records.ledger = ledger
    if stored is not None:
        with findings.reading(path / TABLE_FILE):
            is_behind = ledger is not None and pin != pin_of(ledger)
            _check_table(stored, is_behind, records, findings)


def _read_ledger(file: Path, findings: Findings) -> Ledger:
    require_file(file)
    text = read_ledger_text(file)
    ledger = parse_ledger(file, text)
    if not text.endswith("\n") and text:
        findings.notes.append(
            f"{file} ends within a line. That deletion was never acknowledged; the next one takes its place."
        )
    return ledger


def _check_table(stored: StoredTable, is_behind: bool, records: Records, findings: Findings) -> None:
    config, key, ledger = records.config, records.key, records.ledger
    if config is None:
        return
    names = KeptNames(key or _no_key, config.keep_ids)
    table = stored.examples(config, names)
    # Where the secret is missing, what was deleted cannot be told, nor then what is valid.
    can_tell = ledger is not None and (not ledger.deleted or key is not None or config.keep_ids == "digest")
    if ledger is None or not can_tell:
        return
    if key is not None and not table.is_as_digested:
        findings.problems.append(
            f"{stored.file} carries digests that are not those of its rows: stages cannot be judged by it. Restore it "
            "from a backup."
        )
        return
    lines = 0 if stored.version == 1 else int(stored.pin.partition(" ")[0])
    # What came back after it was deleted is in.
    left = table.without_digests([*ledger.deleted, *ledger.deleted_since(lines)]) if ledger.deleted_since(0) else table
    deleted = len(table) - len(left)
    if is_behind:
        findings.condemned(stored.file, "rows")
    elif deleted:
        findings.problems.append(
            f"{stored.file} still holds {counted(deleted, 'deleted example')}, though it says that it was written "
            "without. Restore it from a backup."
        )
    records.table = _with_rows_that_come(stored.file.parent, left, ledger, lines, config, names)
    if records.is_of_format_1:
        records.earlier.learn(left)


def _with_rows_that_come(
    path: Path, table: ExampleTable, ledger: Ledger, lines: int, config: S3TConfig, names: KeptNames
) -> ExampleTable:
    """The rows that are in, with those that the ledger tells of and the table has not yet."""
    for number, line in enumerate(ledger.additions, start=1):
        if line > lines:
            addition = read_addition(path, ledger, line, config, names)
            if addition is None:
                raise FolderError(
                    f"{path / TABLE_FILE} lacks rows that line {line} of the ledger tells of, and they are not beside "
                    "it: it is older than the ledger. Restore the newest from a backup."
                )
            rows = addition.rows.without_digests(ledger.deleted_since(line)).settled().columns
            num_shards = max(table.num_shards, addition.rows.num_shards)
            if addition.merged is not None:
                merged = list(ledger.hashes).index(addition.merged) + 1
                rows = addition.rows.without_digests(ledger.deleted_since(merged)).settled().columns
                return table.with_more(rows, None, num_shards)
            table = table.with_more(rows, number, num_shards)
    return table


def _no_key() -> DigestKey:
    raise KeyMissingError("Digests cannot be compared without the secret. Restore it.")
