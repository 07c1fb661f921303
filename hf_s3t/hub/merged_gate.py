"""The gate of a folder that rows came to from a repository: their words come from the gate there."""

import warnings
from collections.abc import Callable, Container

from ..folder.config_file import settings_of
from ..folder.gate_file import StoredGate, read_gate
from ..folder.layout import GATE_FILE
from ..folder.system import SystemFolder
from ..records.examples import ExampleTable
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
    config, found = settings_of(state.record or folder.record), None
    if GATE_FILE in state.tree:
        found, _ = read_gate(repo.download(GATE_FILE, state.commit), folder.key.check, config)
    if found is None or found.tokenizer_digest != folder.gate_tokenizer_digest:
        if came:
            why = "there is no gate there" if found is None else "the gate there reads them by another tokenizer"
            warnings.warn(
                f"The gate lacks the words of rows that came from {repo.repo_id}: {why}. Call `trainer.build_gate()` "
                "with all rows, then push again.",
                stacklevel=2,
            )
        return
    there = table_there()
    with folder.lock():
        # While this read, another may have written a gate, or rows may have come or gone.
        folder.refresh()
        gate = folder.load_gate()
        unknown = _unknown(gate, folder.table)
        # Of an id that both added, each may have a row of its own.
        same = _rows(there, unknown)
        words = [digest.hex() for digest, row in unknown.items() if same.get(digest) == row]
        joined = gate.keeping(found, words)
        if joined is not gate:
            folder.put_gate(joined, {})


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
