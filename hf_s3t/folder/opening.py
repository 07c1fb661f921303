"""Opens a folder that may come from anywhere, to write or to be looked at only."""

import os
from collections.abc import Collection, Mapping
from typing import Any

from ..errors import ConfigError, FolderError
from ..plan.stages import StageKey
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from .foreign import refuse_foreign_parts
from .system import SystemFolder


class ReadOnlyFolder(SystemFolder):
    """
    A system's folder that is only looked at: opening it leaves an interrupted removal to whoever opens it to write.

    What a deletion condemned does not count as valid and deleted rows are masked, so it says the same as a folder
    after the removal. It can be read where nothing may be written.
    """

    def _finish_removal(self) -> None:
        """Nothing: finishing writes."""

    def merge_ledger(
        self, other: Ledger, rows: ExampleTable | None = None, weights: str | None = None
    ) -> list[StageKey]:
        """Refused: merging writes."""
        raise FolderError(f"{self.path} was opened to be looked at. Open it to write, to merge a ledger into it.")


def open_folder(path: str | os.PathLike[str], read_only: bool = False) -> SystemFolder:
    """
    Open a folder that may come from anywhere, after a look at whether it would lead writes elsewhere.

    Args:
        path (`str` or `os.PathLike`): The folder of the system.
        read_only (`bool`, defaults to `False`): Leave a removal that was interrupted as it is.

    Returns:
        [`~hf_s3t.folder.system.SystemFolder`]: The folder.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it holds symbolic links, or no intact system.
    """
    refuse_foreign_parts(path)
    return ReadOnlyFolder(path) if read_only else SystemFolder(path)


def check_method(record: Mapping[str, Any], methods: Collection[str], path: str | os.PathLike[str]) -> None:
    """
    Refuse a folder that another method made, whose adapters mean something else.

    Args:
        record (mapping): What `s3t_config.json` says.
        methods (collection of `str`): The methods that fit.
        path (`str` or `os.PathLike`): The folder.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it was made by none of them.
    """
    baseline = record.get("baseline", {"method": "s3t"})
    found = baseline.get("method") if isinstance(baseline, dict) else None
    if found not in methods:
        raise ConfigError(
            f"{path} holds a system of the method {found!r}, expected {' or '.join(methods)}. Use the class of that "
            "method (`hf_s3t.baselines.METHODS`), or choose another folder."
        )
