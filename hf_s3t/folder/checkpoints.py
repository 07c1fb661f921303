"""Checkpoints of stages in training: where they lie, what they hold, and which of them a deletion condemned."""

import contextlib
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import BaseFileLock

from ..config import S3TConfig
from ..errors import FolderError
from ..plan.stages import StageKey, is_stage_of
from ..records.ledger import Ledger
from ..records.validity import saw_what_is_in
from .earlier_slices import EarlierSlices
from .files import (
    check_digest,
    file_digest,
    make_folders,
    read_checked,
    read_checked_json,
    sync,
    write_checked_json,
)
from .foreign import is_foreign
from .layout import ADAPTER_FILE, CHECKPOINT_PREFIX, CHECKPOINTS, STAGE_FILE, STAGES
from .scratch import folders_below, folders_of, hold, names_in, stage_of, unused


# What one holds


def write_checkpoint_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Mark a checkpoint, synced, with the slices it saw and its files' digests; without, it is not resumed."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file() and file.name != STAGE_FILE]
    for file in files:
        sync(file)
    digests = {file.relative_to(folder).as_posix(): file_digest(file) for file in files}
    write_checked_json(folder / STAGE_FILE, {**record, "files": digests})


def read_checkpoint_record(folder: Path, earlier: EarlierSlices) -> dict[str, Any]:
    """
    What `write_checkpoint_record` was given.

    Args:
        folder (`Path`): The checkpoint.
        earlier ([`~hf_s3t.folder.earlier_slices.EarlierSlices`]): By which a record of format 1 is understood.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the record or a file of the checkpoint is missing or altered.
    """
    record, files = _record_and_files(folder)
    for name, digest in files.items():
        check_digest(folder / name, digest)
    return earlier.translated(record)


def read_checkpoint_adapter(folder: Path) -> bytes:
    """
    The bytes of the adapter file of a checkpoint, as `write_checkpoint_record` found it, read once.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the record or the file is missing or altered.
    """
    return read_checkpoint_file(folder, ADAPTER_FILE)


def read_checkpoint_file(folder: Path, name: str) -> bytes:
    """
    The bytes of a file of a checkpoint, as `write_checkpoint_record` found it, read once.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the record or the file is missing or altered.
    """
    _, files = _record_and_files(folder)
    return read_checked(folder / name, files.get(name, ""))


def _record_and_files(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    record = read_checked_json(folder / STAGE_FILE)
    files = record.pop("files", None)
    if not isinstance(files, dict):
        raise FolderError(f"{folder / STAGE_FILE} names no files. Remove the checkpoint.")
    return record, files


def _held(folder: Path, token: str | None) -> tuple[Path, BaseFileLock | None]:
    """Hold a folder under the name of a claim: whoever had it is gone, and if it is not, it writes there no more."""
    lock = hold(folder)
    named = folder if token is None else folder.with_name(f"{folder.name.partition('.')[0]}.{token}")
    if lock is None or named == folder:
        return folder, lock
    # The system's lock is held: nobody comes in between.
    lock.release()
    os.rename(folder, named)
    sync(folder.parent)
    return named, hold(named)


def is_checkpoint_in(path: Path, slices: Sequence[Collection[str]], ledger: Ledger, earlier: EarlierSlices) -> bool:
    """
    Whether all that an unfinished checkpoint, or the note of what its stage is trained on, saw is in.

    Whether it is resumed is another question: rows may have come since.

    A checkpoint without a record of its own is being written, or its writer died: it saw what its stage does. Where
    nothing says what that was, any deletion condemns it.

    Args:
        path (`Path`): The checkpoint's folder, or the note beside the checkpoints.
        slices (sequence of collections of `str`): Of each of the stage's slices the digests that its remaining rows
            ever had.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): What was deleted.
        earlier ([`~hf_s3t.folder.earlier_slices.EarlierSlices`]): By which a record of format 1 is understood.
    """
    for record in (path / STAGE_FILE, path.with_name(STAGE_FILE)):
        with contextlib.suppress(FolderError):
            if not is_foreign(record):
                return saw_what_is_in(earlier.translated(read_checked_json(record)), slices)
    return not ledger.num_deletions


# Where they lie


class Checkpoints:
    """
    The folders for checkpoints in a system's folder, and those among them that are held through this object.

    Args:
        path (`Path`): The folder of the system.
        config ([`~hf_s3t.S3TConfig`]): Its settings: checkpoints of stages that it cannot have are passed over.
        earlier ([`~hf_s3t.folder.earlier_slices.EarlierSlices`]): By which records of format 1 are understood.
    """

    def __init__(self, path: Path, config: S3TConfig, earlier: EarlierSlices):
        self.path = path
        self.config = config
        self._earlier = earlier
        self._held: set[Path] = set()

    def of(self, key: StageKey) -> Path:
        """Where the checkpoints of a stage in training lie; beside it those of a second trainer, see `take`."""
        return self.path / CHECKPOINTS / key.path.removeprefix(f"{STAGES}/")

    def are_there(self, key: StageKey) -> bool:
        """Whether there is a folder for checkpoints of a stage, or was a moment ago."""
        return bool(folders_of(self.of(key)))

    def take(self, key: StageKey, slices: list[str], token: str | None = None) -> tuple[Path, BaseFileLock]:
        """
        Hold a folder that no other trainer touches; the system's lock must be held, as for every removal of one.

        Args:
            key ([`~hf_s3t.plan.stages.StageKey`]): The stage that is trained.
            slices (`list[str]`): The digests of what it is trained on.
            token (`str`, *optional*): The token of the claim under which it is trained, which the folder is named by.

        Returns:
            The folder, one with checkpoints to resume from before an empty one, and its lock for `let_go`.
        """
        first = self.of(key)
        fresh = unused(first) if token is None else [first.with_name(f"{first.name}.{token}")]
        for folder in (*folders_of(first), *fresh):
            make_folders(folder)
            folder, lock = _held(folder, token)
            if lock is not None:
                # By this a checkpoint without a record of its own is judged.
                write_checked_json(folder / STAGE_FILE, {"slices": slices})
                self._held.add(folder)
                return folder, lock
        raise FolderError(f"Other trainers hold every folder for checkpoints beside {first}. Call again.")

    def let_go(self, folder: Path, lock: BaseFileLock) -> None:
        """Hold a folder no more; it stays until the stage is written."""
        self._held.discard(folder)
        lock.release()

    def remove(self, key: StageKey) -> None:
        """
        Remove the checkpoints of a stage but those of another trainer at work, and the folders this leaves empty. The
        system's lock must be held.
        """
        first = self.of(key)
        for folder in folders_of(first):
            if folder in self._held:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            with contextlib.suppress(OSError):
                lock = hold(folder)
                if lock is not None:
                    shutil.rmtree(folder, ignore_errors=True)
                    lock.release()
        with contextlib.suppress(OSError):
            first.parent.rmdir()
            first.parent.parent.rmdir()

    def stale(self, slices_of: Callable[[StageKey], Sequence[Collection[str]]], ledger: Ledger) -> list[Path]:
        """
        Checkpoints of stages that saw what was deleted since.

        Args:
            slices_of (callable): From a stage to the digests that the remaining rows of its slices ever had.
            ledger ([`~hf_s3t.records.ledger.Ledger`]): What was deleted.
        """
        stale = []
        for folder, key in self._stages():
            slices = slices_of(key)
            names = (name for name in names_in(folder) if name.startswith(CHECKPOINT_PREFIX) or name == STAGE_FILE)
            found = [folder / name for name in names]
            stale += [c for c in found if not is_checkpoint_in(c, slices, ledger, self._earlier)]
        return stale

    def finished(self, is_there: Callable[[StageKey], bool]) -> dict[Path, StageKey]:
        """Folders for checkpoints of stages that need no training, because they or others in their place are there."""
        return {folder: key for folder, key in self._stages() if is_there(key)}

    def _stages(self) -> Iterator[tuple[Path, StageKey]]:
        """The folders of stages. What others put there is not ours to judge, nor a reason to stop a removal."""
        for folder in folders_below(self.path / CHECKPOINTS):
            with contextlib.suppress(FolderError):
                key = stage_of(folder)
                if is_stage_of(key, self.config):
                    yield folder, key
