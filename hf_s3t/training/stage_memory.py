"""Stages between memory and the folder: those below come in, the one that was trained goes out."""

from collections.abc import Sequence
from typing import Any

from ..model.tensor_files import differing_tensors, read_tensors
from ..plan.stages import StageKey
from .live_model import LiveModel


# The digests of the adapter files of stages that this process trained.
TRAINED_HERE: set[str] = set()


def was_trained_here(digest: str) -> bool:
    """Whether this process trained the stage whose adapter file has a digest."""
    return digest in TRAINED_HERE


class StageMemory(LiveModel):
    """The part of a trainer that has in memory what a stage stands on, and writes the stage."""

    def _bring_in(self, key: StageKey) -> None:
        """Have the stages below in memory, and of the others only those that serve."""
        below = key.lineage[:-1]
        self._make_room(below)
        for stage in below:
            digest = self.folder.adapter_digest(stage)
            if not self._stack.holds(stage, digest):
                self._stack.load(stage, self.folder.read_adapter(stage), digest)

    def _make_room(self, below: Sequence[StageKey]) -> None:
        """Drop stages that neither serve nor are stood on; with several processes all must hold the same tensors."""
        alone = self.accelerator.num_processes == 1
        serving = self._live._routing.stages if self._live is not None and alone else frozenset()
        idle = frozenset(self._stack.loaded).difference(below, serving)
        if self._live is not None:
            self._live.free(idle)
        self._stack.drop(idle)

    def _write(self, key: StageKey, record: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            base = self.folder.base_id, self.folder.base_revision
            self.folder.write_stage(key, record, lambda path: self._stack.save(key, path, *base))
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            self.folder.refresh()
        if self.folder.is_valid(key):
            self._take_as_written(key)
        else:
            self._stack.drop([key])

    def _take_as_written(self, key: StageKey) -> None:
        """Know a stage in memory by its file. Where another trainer wrote it first, that one takes its place."""
        data, digest = self.folder.read_adapter(key), self.folder.adapter_digest(key)
        if differing_tensors(read_tensors(data, str(key)), self._stack.tensors(key)):
            self._stack.load(key, data, digest)
        else:
            self._stack.mark(key, digest)
            TRAINED_HERE.add(digest)
