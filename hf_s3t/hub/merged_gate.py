"""The gate of a folder that rows came to from a repository: their words come from the gate there."""

import warnings
from collections.abc import Callable, Container

import numpy as np

from ..folder.config_file import settings_of
from ..folder.gate_file import StoredGate, read_gate
from ..folder.layout import GATE_FILE
from ..folder.system import SystemFolder
from ..records.examples import ExampleTable
from ..records.terms import TermRows
from .repository import HubRepo, HubState


# Of a row its place and its content.
_Row = tuple[int, int, bytes]


def take_in_words(
    folder: SystemFolder, repo: HubRepo, state: HubState, table_there: Callable[[], ExampleTable], came: bool
) -> None:
    """
    Have a folder's gate know the rows that came from a repository, as the gate there does.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system, which has the rows.
        repo ([`HubRepo`]): The repository.
        state ([`HubState`]): What is there.
        table_there (callable): Reads the rows there.
        came (`bool`): Whether rows came just now: where their words cannot be had, that is told.
    """
    # What a system on the Hub serves has no gate of its own here.
    if not (folder.path / GATE_FILE).is_file() or folder.gate_head().rows >= len(folder.table):
        return
    gate = folder.load_gate()
    config, found = settings_of(state.record or folder.record), None
    if GATE_FILE in state.tree:
        found, _ = read_gate(repo.download(GATE_FILE, state.commit), folder.key.check, config)
    if found is None or found.tokenizer_digest != gate.tokenizer_digest:
        if came:
            why = "there is no gate there" if found is None else "the gate there reads them by another tokenizer"
            warnings.warn(
                f"The gate lacks the words of rows that came from {repo.repo_id}: {why}. Call `trainer.build_gate()` "
                "with all rows, then push again.",
                stacklevel=2,
            )
        return
    unknown = _unknown(gate, folder.table)
    # Of an id that both added, each may have a row of its own.
    same = _rows(table_there(), unknown)
    words = found.rows.only([digest.hex() for digest, row in unknown.items() if same.get(digest) == row])
    if len(words):
        shape = folder.config.num_shards, folder.config.num_slices
        folder.put_gate(StoredGate.of(_joined(gate.rows.settled(), words), *shape, gate.tokenizer_digest), {})


def _unknown(gate: StoredGate, table: ExampleTable) -> dict[bytes, _Row]:
    """The rows of a table whose words a gate lacks, by the digests of their ids."""
    ids = table.columns.taken(table.row_numbers).id_digests
    known = {digest.tobytes() for digest in gate.rows.only(ids).digests}
    return _rows(table, {digest.tobytes() for digest in ids} - known)


def _rows(table: ExampleTable, wanted: Container[bytes]) -> dict[bytes, _Row]:
    columns = table.columns.taken(table.row_numbers)
    names = [digest.tobytes() for digest in columns.id_digests]
    return {
        name: (int(columns.shards[row]), int(columns.slices[row]), columns.digests[row].tobytes())
        for row, name in enumerate(names)
        if name in wanted
    }


def _joined(ours: TermRows, theirs: TermRows) -> TermRows:
    def both(name: str) -> np.ndarray:
        return np.concatenate([getattr(ours, name), getattr(theirs, name)])

    terms = [one for rows in (ours, theirs) for one in np.split(rows.terms, rows.ends[:-1]) if len(rows)]
    return TermRows.of(both("digests"), both("shards"), both("slices"), terms)
