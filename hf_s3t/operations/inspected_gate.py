"""Looks at the gate of a folder: whether it is one, of the rows that are in, and nobody else's to read."""

import os
from pathlib import Path

import numpy as np

from ..errors import counted
from ..folder.gate_file import StoredGate, read_gate
from ..folder.layout import GATE_FILE, LEDGER_FILE
from ..folder.ledger_file import pin_of, require_pinned
from ..records.examples import ExampleTable
from .findings import Findings, require_file, require_private
from .inspected_records import Records


_ANEW = "Remove it, and make it anew by `trainer.build_gate()`."


def inspect_gate(path: Path, records: Records, findings: Findings) -> None:
    """
    Read the gate of a system, if it has one.

    Args:
        path (`Path`): The folder of the system.
        records ([`~hf_s3t.operations.inspected_records.Records`]): What could be read of the system as a whole.
        findings ([`~hf_s3t.operations.findings.Findings`]): Gets what is wrong.
    """
    file, config = path / GATE_FILE, records.config
    if config is None:
        return
    if not os.path.lexists(file):
        if config.gate is not None:
            findings.problems.append(
                f"{file} is missing, and the settings say gate={config.gate!r}. Restore it from a backup, or make it "
                'by `trainer.build_gate()` with the dataset: gate="terms" needs it.'
            )
        return
    require_file(file)
    require_private(file, findings, "others could test what its rows say")
    gate, pin = read_gate(file, records.key_check, config)
    if records.ledger is None:
        return
    require_pinned(path / LEDGER_FILE, records.ledger, pin, GATE_FILE)
    if not gate.is_counted:
        findings.problems.append(f"{file} has counts that are not those of its rows. {_ANEW}")
    left = gate.without(records.ledger.deleted)
    if pin != pin_of(records.ledger):
        findings.condemned(file, "rows")
    elif left is not gate:
        findings.problems.append(
            f"{file} still holds {counted(len(gate.rows) - len(left.rows), 'deleted example')}, though it says that "
            f"it was written without. {_ANEW}"
        )
    if records.table is not None and not _is_of(left, records.table):
        findings.problems.append(f"{file} holds rows that {path} does not have, or has elsewhere. {_ANEW}")


def _is_of(gate: StoredGate, table: ExampleTable) -> bool:
    """Whether each row of a gate is one of a table, in its place."""
    rows = gate.rows.settled()
    numbers = table.columns.rows_of_digests(rows.digests)
    are_in = np.isin(numbers, table.row_numbers)
    columns = table.columns
    same = (columns.shards[numbers] == rows.shards) & (columns.slices[numbers] == rows.slices)
    return bool((are_in & same).all())
