"""The part of a folder in which stages train: their checkpoints, which no other trainer touches."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..plan.stages import StageKey
from .checkpoints import write_checkpoint_record
from .claims import ClaimLostError, HeldClaim
from .files import remove
from .view import FolderView


class CheckpointingFolder(FolderView):
    """The part of [`~hf_s3t.folder.system.SystemFolder`] that keeps checkpoints of stages in training."""

    if TYPE_CHECKING:

        def lock(self) -> contextlib.AbstractContextManager[None]:
            """The folder's lock."""

        def _migrate(self) -> None:
            """Have the folder be of the newest format."""

    @contextlib.contextmanager
    def scratch(self, key: StageKey, slices: list[str], claim: HeldClaim | None = None) -> Iterator[Path]:
        """
        A folder for the checkpoints of a stage in training that no other trainer touches.

        What a trainer that ended left there can be resumed from. The folder stays until the stage is written.

        Args:
            key ([`StageKey`]): The stage.
            slices (`list[str]`): The digests of what it is trained on.
            claim ([`~hf_s3t.folder.claims.HeldClaim`], *optional*): The claim under which it is trained, whose name
                the folder gets: one whose holder lost it knows the folder no more.

        Raises:
            [`~hf_s3t.folder.claims.ClaimLostError`]: If the claim was lost.
        """
        # Under the lock, as every removal of such a folder.
        with self.lock():
            if claim is not None and not claim.is_held():
                raise ClaimLostError(f"{key} was taken over by another trainer. Go on with another stage.")
            self._migrate()
            folder, held = self._checkpoints.take(key, slices, None if claim is None else claim.token)
        try:
            yield folder
        finally:
            self._checkpoints.let_go(folder, held)

    write_checkpoint_record = staticmethod(write_checkpoint_record)

    def remove_checkpoints(self, key: StageKey) -> None:
        """
        Remove the unfinished checkpoints of a stage but those of another trainer at work, and the folders this leaves
        empty. The folder's lock must be held.
        """
        self._checkpoints.remove(key)

    def remove_stale_checkpoints(self) -> None:
        """
        Remove unfinished checkpoints of stages whose slices are no longer what they saw. The folder's lock must be
        held, and what the folder says be as it is on the disk.
        """
        for checkpoint in self._stale_checkpoints():
            remove(checkpoint)

    def remove_finished_checkpoints(self) -> None:
        """Remove checkpoints of valid stages, but those of trainers at work."""
        if self.finished_checkpoints():
            with self.lock():
                # A stage that was there may be in training again.
                self.refresh()
                for key in set(self.finished_checkpoints().values()):
                    self.remove_checkpoints(key)
