"""`stage.json`, the record of a stage: the form in which it is written, and its place."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import FolderError
from ..plan.stages import StageKey
from .layout import ADAPTER_CONFIG_FILE, ADAPTER_FILE, STAGE_FILE


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
