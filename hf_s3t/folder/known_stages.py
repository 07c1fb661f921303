"""The records of a folder's stages as they were last read: what did not change since is not read again."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import FolderError
from ..plan.stages import StageKey
from .earlier_slices import EarlierSlices
from .files import Stamp, stamp
from .layout import STAGE_FILE
from .stage_record import adapter_of, read_stage, stages_in


class KnownStages:
    """
    What is known of the stages in a folder. One thread at a time may change it.

    Args:
        path (`Path`): The folder of the system.
        earlier ([`~hf_s3t.folder.earlier_slices.EarlierSlices`]): By which records of format 1 are understood.
    """

    def __init__(self, path: Path, earlier: EarlierSlices):
        self.path = path
        self._earlier = earlier
        self.records: dict[StageKey, dict[str, Any]] = {}
        # The digests of their adapters by their names: what a deletion's line is compared with, so always at hand.
        self.adapters: dict[str, str] = {}
        # Stages that a deletion condemned which was recorded through this object, and that are not removed yet.
        self.condemned: dict[StageKey, dict[str, Any]] = {}
        # By which the record of a stage that was read is told from one that was written since.
        self._stamps: dict[StageKey, Stamp | None] = {}

    def take_over(self, records: Mapping[StageKey, dict[str, Any]]) -> None:
        """Know these records, which were read elsewhere, and nothing else."""
        self.records, self.condemned, self._stamps = dict(records), {}, {}
        self.adapters = _adapters_of(records)

    def look(self) -> list[FolderError]:
        """
        Take in stages that were added, removed or grown again, but for what is damaged: of that, what was known before
        stays known.

        Returns:
            `list[FolderError]`: What is wrong among the stages.
        """
        problems: list[FolderError] = []
        records: dict[StageKey, dict[str, Any]] = {}
        stamps: dict[StageKey, Stamp | None] = {}
        for key in stages_in(self.path, problems):
            # Before reading: a record that is replaced meanwhile is read again.
            stamps[key] = self._stamp_of(key)
            try:
                unchanged = stamps[key] is not None and stamps[key] == self._stamps.get(key)
                is_known = unchanged and key in self.records
                records[key] = self.records[key] if is_known else read_stage(self.path, key, self._earlier)
            except FolderError as error:
                # Between the look at the folder and at its file, another process may have removed the stage.
                if (self.path / key.path).exists():
                    problems.append(error)
                    # To be read again, whatever its stamp.
                    del stamps[key]
                    if key in self.records:
                        records[key] = self.records[key]
        if records != self.records:
            self.adapters = _adapters_of(records)
        self.records, self._stamps, self.condemned = records, stamps, {}
        return problems

    def translate(self) -> None:
        """Understand what was read before something was learnt of slices."""
        self.records = {key: self._earlier.translated(record) for key, record in self.records.items()}

    def note(self, key: StageKey, record: dict[str, Any]) -> None:
        """Know a stage that was written a moment ago."""
        self.records[key], self._stamps[key] = record, self._stamp_of(key)
        self.adapters[str(key)] = adapter_of(record)

    def condemn(self, keys: Iterable[StageKey]) -> None:
        """Have stages count as removed, until they are."""
        # That these no longer match their slices needs no computing.
        for key in keys:
            self.condemned[key] = self.records.pop(key)
            del self.adapters[str(key)]

    def forget(self, keys: Iterable[StageKey]) -> None:
        """Know stages no more."""
        for key in keys:
            self.records.pop(key, None)
            self.adapters.pop(str(key), None)
            self.condemned.pop(key, None)

    def _stamp_of(self, key: StageKey) -> Stamp | None:
        return stamp(f"{self.path}/{key.path}/{STAGE_FILE}")


def _adapters_of(records: Mapping[StageKey, Mapping[str, Any]]) -> dict[str, str]:
    return {str(key): adapter_of(record) for key, record in records.items()}
