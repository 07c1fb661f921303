"""`stage.json`, the record of a stage: the form in which it is written, its place, and the files it speaks of."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import FolderError
from ..plan.stages import StageKey
from .earlier_slices import EarlierSlices
from .files import (
    REGROW,
    check_digest,
    file_digest,
    read_checked,
    read_checked_json,
    sync,
    unreadable,
    write_checked_json,
)
from .layout import ADAPTER_CONFIG_FILE, ADAPTER_FILE, STAGE_FILE, STAGES


def read_stage(path: Path, key: StageKey, earlier: EarlierSlices) -> dict[str, Any]:
    """
    What `stage.json` says of a stage in a system's folder.

    Args:
        path (`Path`): The folder of the system.
        key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
        earlier ([`~hf_s3t.folder.earlier_slices.EarlierSlices`]): By which a record of format 1 is understood.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it is missing, damaged, or says what no record of this stage says.
    """
    folder = path / key.path
    return earlier.translated(checked_stage(folder, key, read_checked_json(folder / STAGE_FILE, REGROW)))


def read_intact_stage(path: Path, key: StageKey, earlier: EarlierSlices) -> dict[str, Any] | None:
    """What `stage.json` says of a stage whose files are those that it names; `None` if there is no such stage."""
    try:
        record = read_stage(path, key, earlier)
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            check_digest(path / key.path / name, record["files"][name])
    except FolderError:
        return None
    return record


def read_files(path: Path, key: StageKey, record: Mapping[str, Any], earlier: EarlierSlices) -> dict[str, bytes]:
    """
    The files of a stage besides its adapter, whose record was read before.

    Args:
        path (`Path`): The folder of the system.
        key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
        record (mapping): What its `stage.json` said.
        earlier ([`~hf_s3t.folder.earlier_slices.EarlierSlices`]): By which a record of format 1 is understood.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If a file is missing or altered, or another stage is there now.
    """
    folder = path / key.path
    config = read_checked(folder / ADAPTER_CONFIG_FILE, record["files"][ADAPTER_CONFIG_FILE])
    try:
        written = (folder / STAGE_FILE).read_bytes()
    except OSError as error:
        raise unreadable(folder / STAGE_FILE, error) from error
    # What is there is never changed, but another stage may have taken its place before, or may after.
    if read_stage(path, key, earlier) != record or written != (folder / STAGE_FILE).read_bytes():
        raise FolderError(f"{folder} holds another stage than a moment ago. Call again.")
    return {ADAPTER_CONFIG_FILE: config, STAGE_FILE: written}


def adapter_of(record: Mapping[str, Any]) -> str:
    """The digest of the adapter file that the record of a stage names."""
    digest: str = record["files"][ADAPTER_FILE]
    return digest


def fill_stage(folder: Path, key: StageKey, record: Mapping[str, Any], fill: Callable[[Path], None]) -> dict[str, Any]:
    """
    Write the files of a stage into a new folder, synced.

    Args:
        folder (`Path`): Where they go, before it gets the stage's name.
        key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
        record (mapping): What `stage.json` shall say besides the stage's name and the digests of its files.
        fill (callable): Called with the folder to write the adapter into.

    Returns:
        `dict`: What `stage.json` says.
    """
    fill(folder)
    files = {name: file_digest(folder / name) for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE)}
    written = {**record, "stage": str(key), "files": files}
    write_checked_json(folder / STAGE_FILE, written)
    for file in folder.iterdir():
        sync(file)
    sync(folder)
    return written


def stages_in(path: Path, problems: list[FolderError]) -> Iterator[StageKey]:
    """
    The stages that have a folder.

    Args:
        path (`Path`): The folder of the system.
        problems (`list[FolderError]`): Gets an error for each thing that is none.
    """
    # Not by glob, which looks at every file's type: a deletion waits for this.
    root = f"{path / STAGES}"
    for shard in sorted(name for name in _names_in(root) if name.startswith("shard-")):
        try:
            for name in sorted(_names_in(f"{root}/{shard}")):
                if not name.startswith("."):
                    try:
                        yield StageKey.from_path(f"{STAGES}/{shard}/{name}")
                    except FolderError as error:
                        problems.append(FolderError(f"{error} Move it out of {path}."))
        except FolderError as error:
            problems.append(error)


def _names_in(folder: str) -> list[str]:
    try:
        return os.listdir(folder)
    except NotADirectoryError:
        raise FolderError(f"{folder} is a file, expected a folder of stages. Remove it.") from None
    except FileNotFoundError:
        raise FolderError(
            f"{folder} is missing. Restore it, or make an empty folder and call `train()` to grow its stages again."
        ) from None
    except OSError as error:
        raise unreadable(Path(folder), error) from error


def checked_stage(folder: Path, key: StageKey, record: Mapping[str, Any]) -> dict[str, Any]:
    """
    What `stage.json` says.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it lies elsewhere than it says, or has not the form it was written in.
    """
    if record.get("stage") != str(key):
        raise FolderError(
            f"{folder} holds the stage {record.get('stage')!r}: folders were swapped or renamed. Move "
            "it back, or remove it and call `train()` to grow it again."
        )
    if not is_stage_record(record):
        raise FolderError(
            f"{folder / STAGE_FILE} does not say what the record of a stage says, or names other files than "
            f"{ADAPTER_FILE} and {ADAPTER_CONFIG_FILE}. Remove the folder and call `train()` to grow it again."
        )
    return dict(record)


def is_stage_record(record: Mapping[str, Any]) -> bool:
    """Whether what is said of a stage has the form in which it is written."""
    files, slices, metrics = record.get("files"), record.get("slices"), record.get("metrics")
    return (
        isinstance(files, dict)
        and set(files) == {ADAPTER_FILE, ADAPTER_CONFIG_FILE}
        and _are_texts(files.values())
        and isinstance(slices, list)
        and _are_texts(slices)
        and "below" in record
        and isinstance(metrics, dict)
        and isinstance(metrics.get("eval_loss", 0.0), (int, float))
    )


def _are_texts(values: Iterable[Any]) -> bool:
    return all(isinstance(value, str) for value in values)
