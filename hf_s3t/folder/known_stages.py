"""The records of a folder's stages as they were last read: what did not change since is not read again."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..config import S3TConfig
from ..errors import FolderError
from ..plan.stages import StageKey, is_stage_of
from .earlier_slices import EarlierSlices
from .files import Stamp, stamp
from .layout import STAGE_FILE
from .stage_record import adapter_of, read_stage, stages_in


# How often a record is read that another process replaces meanwhile.
_ATTEMPTS = 10


class KnownStages:
    """
    What is known of the stages in a folder. One thread at a time may change it.

    Args:
        path (`Path`): The folder of the system.
        config ([`~hf_s3t.S3TConfig`]): Its settings: folders of stages that it cannot have are passed over.
        earlier ([`~hf_s3t.folder.earlier_slices.EarlierSlices`]): By which records of format 1 are understood.
    """

    def __init__(self, path: Path, config: S3TConfig, earlier: EarlierSlices):
        self.path = path
        self.config = config
        self._earlier = earlier
        # Replaced, and never changed: other threads go through what was there when they began.
        self.records: dict[StageKey, dict[str, Any]] = {}
        # The digests of their adapters by their names: what a deletion's line is compared with, so always at hand.
        self.adapters: dict[str, str] = {}
        # Stages that a deletion condemned which was recorded through this object, and that are not removed yet.
        self.condemned: dict[StageKey, dict[str, Any]] = {}
        # By which the record of a stage that was read is told from one that was written since.
        self._stamps: dict[StageKey, Stamp | None] = {}

    def take_over(self, records: Mapping[StageKey, dict[str, Any]]) -> None:
        """Know these records, which were read elsewhere, and nothing else."""
        self.records = {key: record for key, record in records.items() if is_stage_of(key, self.config)}
        self.condemned, self._stamps = {}, {}
        self.adapters = _adapters_of(self.records)

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
            if not is_stage_of(key, self.config):
                continue
            try:
                found = self._look_at(key)
                if found is not None:
                    stamps[key], records[key] = found
            except FolderError as error:
                problems.append(error)
                # To be read again, whatever its stamp.
                if key in self.records:
                    records[key] = self.records[key]
        if records != self.records:
            self.adapters = _adapters_of(records)
        self.records, self._stamps, self.condemned = records, stamps, {}
        return problems

    def _look_at(self, key: StageKey) -> tuple[Stamp | None, dict[str, Any]] | None:
        """The record of a stage, and the stamp it has; `None` if another process has removed the stage meanwhile."""
        for attempt in range(_ATTEMPTS):
            # Before reading: a record that is replaced meanwhile is read again.
            seen = self._stamp_of(key)
            if seen is not None and seen == self._stamps.get(key) and key in self.records:
                return seen, self.records[key]
            try:
                return seen, read_stage(self.path, key, self._earlier)
            except FolderError:
                if not (self.path / key.path).exists():
                    return None
                # One that was removed, and grown again since, is another.
                if self._stamp_of(key) == seen or attempt == _ATTEMPTS - 1:
                    raise
        return None

    def translate(self) -> None:
        """Understand what was read before something was learnt of slices."""
        self.records = {key: self._earlier.translated(record) for key, record in self.records.items()}

    def note(self, key: StageKey, record: dict[str, Any]) -> None:
        """Know a stage that was written a moment ago."""
        self.records = {**self.records, key: record}
        self._stamps[key] = self._stamp_of(key)
        self.adapters[str(key)] = adapter_of(record)

    def condemn(self, keys: Iterable[StageKey]) -> None:
        """Have stages count as removed, until they are."""
        # That these no longer match their slices needs no computing.
        records = dict(self.records)
        for key in keys:
            self.condemned[key] = records.pop(key)
            del self.adapters[str(key)]
        self.records = records

    def forget(self, keys: Iterable[StageKey]) -> None:
        """Know stages no more."""
        records = dict(self.records)
        for key in keys:
            records.pop(key, None)
            self.adapters.pop(str(key), None)
            self.condemned.pop(key, None)
        self.records = records

    def _stamp_of(self, key: StageKey) -> Stamp | None:
        return stamp(f"{self.path}/{key.path}/{STAGE_FILE}")


def _adapters_of(records: Mapping[StageKey, Mapping[str, Any]]) -> dict[str, str]:
    return {str(key): adapter_of(record) for key, record in records.items()}
