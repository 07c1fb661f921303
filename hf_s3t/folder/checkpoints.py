"""Checkpoints of stages in training: whether they saw only what their slices hold now."""

import contextlib
from pathlib import Path

from ..errors import FolderError
from ..records.ledger import Ledger
from .files import read_checked_json
from .foreign import is_foreign
from .layout import STAGE_FILE


def is_checkpoint_current(path: Path, slices: list[str], ledger: Ledger) -> bool:
    """
    Whether an unfinished checkpoint, or the note of what its stage is trained on, saw what its slices hold now.

    A checkpoint without a record of its own is being written, or its writer died: it saw what its stage does. Where
    nothing says what that was, any deletion condemns it.

    Args:
        path (`Path`): The checkpoint's folder, or the note beside the checkpoints.
        slices (`list[str]`): The digests of the stage's slices as they are now.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): What was deleted.
    """
    for record in (path / STAGE_FILE, path.with_name(STAGE_FILE)):
        with contextlib.suppress(FolderError):
            if not is_foreign(record):
                return read_checked_json(record).get("slices") == slices
    return not ledger.num_deletions
