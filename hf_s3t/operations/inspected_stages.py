"""Looks at the stages of a folder, and at the checkpoints of those in training."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FolderError, counted
from ..folder.checkpoints import is_checkpoint_in
from ..folder.claims import claimed_by
from ..folder.files import REGROW, check_digest, read_checked
from ..folder.finite import NOT_FINITE, named, non_finite_tensors
from ..folder.foreign import entries
from ..folder.layout import (
    ADAPTER_FILE,
    CHECKPOINT_PREFIX,
    CHECKPOINTS,
    CLAIMS,
    ERASURES_LOCK_FILE,
    LEFTOVER_PREFIXES,
    LOCK_FILE,
    ORDER_FILE,
    STAGE_FILE,
    STAGE_FILES,
    STAGES,
    TEMPORARY,
    TRACKER_LOGS,
)
from ..folder.scratch import stage_of
from ..folder.stage_record import adapter_of, read_stage
from ..plan.stages import StageKey, is_stage_of
from ..records.validity import fits, is_current, saw_what_is_in
from .findings import Findings, require_file
from .inspected_records import Records


# Stages


def inspect_stages(path: Path, records: Records, adapters: bool, findings: Findings) -> None:
    """
    Read the stages, and say which are damaged, are not valid, or are none.

    Args:
        path (`Path`): The folder of the system.
        records ([`~hf_s3t.operations.inspected_records.Records`]): What is known of the system.
        adapters (`bool`): Read the adapters too.
        findings ([`~hf_s3t.operations.findings.Findings`]): Gets what is wrong.
    """
    root = path / STAGES
    if root.is_symlink():
        return
    if not root.is_dir():
        raise FolderError(f"{root} is missing. Restore it, or make an empty folder and call `train()`.")
    stages: dict[StageKey, dict[str, Any]] = {}
    for shard in entries(root):
        if shard.name in (LOCK_FILE, ERASURES_LOCK_FILE) and shard.is_file():
            continue
        if not shard.name.startswith("shard-") or shard.is_symlink() or not shard.is_dir():
            findings.unknown(shard)
            continue
        for folder in entries(shard):
            with findings.reading(folder):
                key = _stage_at(folder, records, findings)
                if key is not None:
                    stages[key] = _read_record(path, key, records)
                    _check_files(folder, stages[key]["files"], adapters, findings)
    _check_validity(path, stages, records, findings)


def _stage_at(folder: Path, records: Records, findings: Findings) -> StageKey | None:
    """The stage that a folder holds; `None` if it is a link, a leftover, or no stage of the system."""
    if folder.is_symlink():
        return None
    if folder.name.startswith(LEFTOVER_PREFIXES):
        findings.condemned(folder, "leftover")
        return None
    key = _key_of(folder)
    if key is None or not folder.is_dir() or not _is_of_system(key, records):
        findings.unknown(folder)
        return None
    for entry in entries(folder):
        if entry.name not in STAGE_FILES:
            findings.unknown(entry)
    return key


def _read_record(path: Path, key: StageKey, records: Records) -> dict[str, Any]:
    require_file(path / key.path / STAGE_FILE, REGROW)
    return read_stage(path, key, records.earlier)


def _check_files(folder: Path, files: Mapping[str, str], adapters: bool, findings: Findings) -> None:
    for name, digest in files.items():
        with findings.reading(folder / name):
            require_file(folder / name, REGROW)
            if adapters and name == ADAPTER_FILE:
                found = non_finite_tensors(read_checked(folder / name, digest))
                if found:
                    findings.problems.append(f"{folder} is NaN or infinite, in {named(found)}. {NOT_FINITE}")
            elif adapters:
                check_digest(folder / name, digest)


def _check_validity(
    path: Path, stages: Mapping[StageKey, dict[str, Any]], records: Records, findings: Findings
) -> None:
    table, ledger = records.table, records.ledger
    if table is None or ledger is None:
        return
    behind = 0
    for key, record in sorted(stages.items()):
        folder = path / key.path
        slices = [table.slice_digests_of(key.shard, slice_, ledger.generations) for slice_ in key.prefix]
        is_orphan = key.parent is not None and key.parent not in stages
        is_behind = not is_current(record, table.slice_digests(key.shard, key.prefix))
        if not saw_what_is_in(record, slices) and ledger.num_deletions:
            findings.condemned(folder, "stage")
        elif not saw_what_is_in(record, slices):
            findings.problems.append(
                f"{folder} was trained on other examples than those of its slices. Remove its folder and call "
                "`train()` to grow it again."
            )
        elif is_orphan:
            findings.problems.append(
                f"{folder} stands on {key.parent}, which is missing. Restore it, or call `train()` to grow it again."
            )
        elif fits(record, slices, None if key.parent is None else adapter_of(stages[key.parent])):
            behind += is_behind
        elif ledger.additions:
            # Its parent was grown again with rows that came, by a process that died before it removed this one.
            findings.condemned(folder, "stage")
        else:
            findings.problems.append(
                f"{folder} was trained on another stage {key.parent} than the one that is there. Remove its folder "
                "and call `train()` to grow it again."
            )
    if behind:
        findings.notes.append(
            f"{path / STAGES}: {counted(behind, 'stage')} serve without examples that came to their slices since. "
            "`train()` grows them again."
        )


# Checkpoints


def inspect_checkpoints(path: Path, records: Records, findings: Findings) -> None:
    """
    Look at the checkpoints of stages in training, and say which saw what was deleted.

    Args:
        path (`Path`): The folder of the system.
        records ([`~hf_s3t.operations.inspected_records.Records`]): What is known of the system.
        findings ([`~hf_s3t.operations.findings.Findings`]): Gets what is wrong, and what can be resumed.
    """
    root = path / CHECKPOINTS
    if root.is_symlink() or not os.path.lexists(root):
        return
    for shard in entries(root):
        if shard.is_symlink() or not shard.is_dir():
            findings.unknown(shard)
            continue
        for folder in entries(shard):
            with findings.reading(folder):
                _check_checkpoints_of_stage(folder, records, findings)


def _check_checkpoints_of_stage(folder: Path, records: Records, findings: Findings) -> None:
    if folder.is_symlink():
        return
    key = _trained_in(folder)
    if key is None or not folder.is_dir() or not _is_of_system(key, records):
        findings.unknown(folder)
        return
    for entry in entries(folder):
        if entry.is_symlink():
            continue
        is_checkpoint = entry.name.startswith(CHECKPOINT_PREFIX)
        if not is_checkpoint and entry.name != STAGE_FILE:
            if entry.name not in TRACKER_LOGS and entry.name != LOCK_FILE:
                findings.unknown(entry)
        elif not _is_current(entry, key, records):
            findings.condemned(entry, "checkpoint")
        elif is_checkpoint:
            findings.checkpoints.append(entry)


def _is_current(checkpoint: Path, key: StageKey, records: Records) -> bool:
    table, ledger = records.table, records.ledger
    if table is None or ledger is None:
        # Whether it is cannot be told; what is wrong with the table is said already.
        return True
    slices = [table.slice_digests_of(key.shard, slice_, ledger.generations) for slice_ in key.prefix]
    return is_checkpoint_in(checkpoint, slices, ledger, records.earlier)


# Claims


def inspect_claims(path: Path, records: Records, findings: Findings) -> None:
    """
    Look for what does not belong among the claims of trainers at work. They themselves are as they may be: whether one
    of them is over is for those to judge who wait for it.

    Args:
        path (`Path`): The folder of the system.
        records ([`~hf_s3t.operations.inspected_records.Records`]): What is known of the system.
        findings ([`~hf_s3t.operations.findings.Findings`]): Gets what is wrong.
    """
    root = path / CLAIMS
    if root.is_symlink():
        return
    for entry in entries(root):
        key = claimed_by(entry.name)
        is_claim = (key is not None and _is_of_system(key, records)) or entry.name == ORDER_FILE
        if entry.name.startswith(TEMPORARY):
            findings.condemned(entry, "leftover")
        elif not is_claim or entry.is_dir():
            findings.unknown(entry)


# Names of folders


def _is_of_system(key: StageKey, records: Records) -> bool:
    """Whether a stage can be one of the system's, as far as its settings could be read."""
    return records.config is None or is_stage_of(key, records.config)


def _key_of(folder: Path) -> StageKey | None:
    """The stage that a folder is the address of."""
    try:
        return StageKey.from_path(f"{STAGES}/{folder.parent.name}/{folder.name}")
    except FolderError:
        return None


def _trained_in(folder: Path) -> StageKey | None:
    """The stage whose checkpoints a folder is for."""
    try:
        return stage_of(folder)
    except FolderError:
        return None
