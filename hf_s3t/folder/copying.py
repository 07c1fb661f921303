"""Copies a system's folder while others may write to it: what is valid of it, as it was at one time."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError
from ..plan.stages import StageKey
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from .files import make_folders, stamp, sync, write_atomically
from .gate_file import StoredGate, write_gate
from .layout import (
    AUDITS_FILE,
    CACHE,
    COMPANIONS,
    CONFIG_FILE,
    COST_FILE,
    GATE_FILE,
    KEY_FILE,
    LEDGER_FILE,
    PENDING_FILE,
    PROTOTYPES_FILE,
    SIGNATURES_FILE,
    STAGES,
    TABLE_FILE,
)
from .ledger_file import write_head
from .table_file import write_table


# How often a copy is begun that a deletion, or the end of one, interrupts.
_ATTEMPTS = 5
# What is copied as it is, besides stages. Config, table, gate and ledger are written anew, from what was read.
_COPIED = COMPANIONS - {CACHE} | {KEY_FILE, PENDING_FILE, COST_FILE, PROTOTYPES_FILE, SIGNATURES_FILE, AUDITS_FILE}


@dataclass(frozen=True)
class Snapshot:
    """
    What a folder says at one time.

    Args:
        table ([`~hf_s3t.records.examples.ExampleTable`]): The examples that are in.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): What was deleted.
        stages (`frozenset[StageKey]`): The valid stages.
        lines_in_table (`int`): How many lines of the ledger the table on the disk goes by.
        gate ([`~hf_s3t.folder.gate_file.StoredGate`], *optional*): The gate of the examples that are in.
    """

    table: ExampleTable
    ledger: Ledger
    stages: frozenset[StageKey]
    lines_in_table: int
    gate: StoredGate | None = None


def check_target(target: Path, path: Path) -> None:
    """
    Refuse to write what is made from a system where something is, or into the system's own folder.

    Args:
        target (`Path`): Where it shall be written.
        path (`Path`): The folder of the system.

    Raises:
        [`~hf_s3t.errors.FolderError`]: Saying which.
    """
    is_free = target.is_dir() and not any(target.iterdir()) if target.exists() else True
    if target.is_symlink() or not is_free:
        raise FolderError(f"{target} is there and is no empty folder. Give a new one.")
    if target.resolve().is_relative_to(path.resolve()):
        raise FolderError(f"{target} is inside the system's folder, where only its own files belong. Give another.")


def copy_system(path: Path, target: Path, look: Callable[[], Snapshot]) -> None:
    """
    Copy a system into a folder that is empty or not there; the config goes last, when the rest is synced.

    No lock is held, for which deletions would have to wait: where one came meanwhile, it is copied again.

    Args:
        path (`Path`): The folder of the system.
        target (`Path`): Where the copy goes.
        look (callable): Reads what the folder says now.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it cannot be copied.
    """
    for attempt in range(_ATTEMPTS):
        seen = stamp(path / LEDGER_FILE)
        try:
            _copy_files(path, target, look())
        except OSError as error:
            shutil.rmtree(target, ignore_errors=True)
            if attempt == _ATTEMPTS - 1:
                raise FolderError(
                    f"{path} could not be copied to {target}: {error}. Nothing is left there. Make room, or wait "
                    "until nobody writes to the system, then call again."
                ) from error
            continue
        if stamp(path / LEDGER_FILE) == seen:
            break
        shutil.rmtree(target, ignore_errors=True)
    else:
        raise FolderError(
            f"{path} could not be copied: deletions came in all the time. Call again when there are fewer."
        )
    write_atomically(target / CONFIG_FILE, (path / CONFIG_FILE).read_bytes())


def _copy_files(path: Path, target: Path, snapshot: Snapshot) -> None:
    make_folders(target)
    shutil.copytree(path, target, dirs_exist_ok=True, ignore=_left_out(path, snapshot))
    # As they were read: a deletion that is under way may not have come to its files.
    write_table(target / TABLE_FILE, snapshot.table, snapshot.ledger)
    if snapshot.gate is not None:
        write_gate(target / GATE_FILE, snapshot.gate, snapshot.ledger, snapshot.table.names.key.check)
    write_atomically(target / LEDGER_FILE, snapshot.ledger.text.encode())
    write_head(target, snapshot.ledger)
    for name in (TABLE_FILE, LEDGER_FILE):
        shutil.copymode(path / name, target / name)
    # A system whose ledger a crash cut off would have forgotten deletions.
    for file in (*target.rglob("*"), target):
        sync(file)


def _left_out(path: Path, snapshot: Snapshot) -> Callable[[str, list[str]], set[str]]:
    """What `shutil.copytree` passes over."""
    valid = {Path(key.path) for key in snapshot.stages}
    kept = valid.union(*(stage.parents for stage in valid), map(Path, _COPIED), [Path(STAGES)])
    if snapshot.ledger.num_deletions_since(snapshot.lines_in_table):
        # They may have been made of what was deleted.
        kept.discard(Path(PROTOTYPES_FILE))

    def left_out(folder: str, names: list[str]) -> set[str]:
        here = Path(folder).relative_to(path)
        return {name for name in names if here / name not in kept and here not in valid}

    return left_out
