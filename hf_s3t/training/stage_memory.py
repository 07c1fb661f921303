"""Stages between memory and the folder: those below come in, the one that was trained goes out."""

from collections.abc import Sequence
from typing import Any

from transformers.utils import logging

from ..errors import DivergedError
from ..folder.finite import NOT_FINITE
from ..model.stack import combined_digest
from ..model.tensor_files import differing_tensors, read_tensors, tensors_digest
from ..plan.stages import StageKey
from .divergence import is_finite
from .first_process import in_first_process
from .live_model import LiveModel


logger = logging.get_logger(__name__)

# The digests of the adapter files of stages that this process trained.
TRAINED_HERE: set[str] = set()
# By the digest of an adapter file, that of the tensors in it; and the files in which all numbers are finite.
_CONTENTS: dict[str, str] = {}
_FINITE: set[str] = set()


def was_trained_here(digest: str) -> bool:
    """Whether this process trained the stage whose adapter file has a digest."""
    return digest in TRAINED_HERE


class StageMemory(LiveModel):
    """The part of a trainer that has in memory what a stage stands on, and writes the stage."""

    def _bring_in(self, key: StageKey) -> str:
        """
        Have the stages below in memory, as their files have them, and of the others only those that serve.

        Returns:
            `str`: The digest of the stages below.
        """
        below = key.lineage[:-1]
        # DDP has all processes take the first one's tensors, one by one: they must have come in one order, and what
        # served in the first has come in another.
        self._make_room(below if self.accelerator.num_processes == 1 else ())
        return combined_digest({stage: self._as_written(stage) for stage in below})

    def _as_written(self, stage: StageKey) -> str:
        """Have a stage in memory as its file has it, and tell the digest of its tensors."""
        digest = self.folder.adapter_digest(stage)
        if self._stack.holds(stage, digest):
            # Whoever loads the stage that is to stand on it has its file alone.
            self.folder.adapter_path(stage)
            found = tensors_digest(self._stack.tensors(stage))
            if digest not in _CONTENTS:
                _CONTENTS[digest] = tensors_digest(read_tensors(self.folder.read_adapter(stage), str(stage)))
            if found == _CONTENTS[digest]:
                return found
            logger.warning(
                f"{stage} was written to in memory since it was trained or loaded, and answered by that. It is loaded "
                "again from its file. Parameters of stages are for reading: look for what wrote to them."
            )
        self._stack.load(stage, self.folder.read_adapter(stage), digest)
        _CONTENTS[digest] = tensors_digest(self._stack.tensors(stage))
        return _CONTENTS[digest]

    def _refuse_upon_diverged(self, key: StageKey) -> None:
        """A stage that stands on NaN, as earlier versions wrote, would be nothing else."""
        for stage in key.lineage[:-1]:
            digest = self.folder.adapter_digest(stage)
            if digest not in _FINITE and not is_finite(self._stack.tensors(stage)):
                raise DivergedError(f"{stage}, on which {key} stands, is NaN or infinite. {NOT_FINITE}")
            _FINITE.add(digest)

    def _make_room(self, below: Sequence[StageKey]) -> None:
        """Drop stages that neither serve nor are stood on; with several processes all must hold the same tensors."""
        alone = self.accelerator.num_processes == 1
        serving = self._live._routing.stages if self._live is not None and alone else frozenset()
        idle = frozenset(self._stack.loaded).difference(below, serving)
        if self._live is not None:
            self._live.free(idle)
        self._stack.drop(idle)

    def _write(self, key: StageKey, record: dict[str, Any]) -> bool:
        """Write a stage; whether it is kept, the same in every process."""
        base = self.folder.base_id, self.folder.base_revision
        is_kept = in_first_process(
            lambda: self.folder.write_stage(key, record, lambda path: self._stack.save(key, path, *base), self._claim)
        )
        if not self.is_world_process_zero():
            self.folder.refresh()
        if is_kept and self.folder.is_valid(key):
            self._take_as_written(key)
        else:
            self._stack.drop([key])
        if self._claim is not None and self._claim.is_lost:
            logger.warning(
                f"{key} is discarded: for longer than its lease this process gave no sign of life, or examples of its "
                "slices went or came, and another trainer was free to take it over."
            )
        elif not is_kept and self.is_world_process_zero():
            logger.warning(
                f"{key} is discarded: while it was trained, a deletion took examples that it saw, or what it stands "
                "on was removed or grown anew."
            )
        return is_kept

    def _take_as_written(self, key: StageKey) -> None:
        """Know a stage in memory by its file. Where another trainer wrote it first, that one takes its place."""
        data, digest = self.folder.read_adapter(key), self.folder.adapter_digest(key)
        if differing_tensors(read_tensors(data, str(key)), self._stack.tensors(key)):
            self._stack.load(key, data, digest)
        else:
            self._stack.mark(key, digest)
            _CONTENTS[digest] = tensors_digest(self._stack.tensors(key))
            TRAINED_HERE.add(digest)
