"""What lets a served model forget: a change of routing, and removing what saw the examples, now or together later."""

import functools
import time
import weakref
from collections.abc import Sequence
from datetime import UTC, datetime

from ..config import require_choice
from ..errors import ConfigError
from ..folder.system import SystemFolder
from ..operations.deletion import record_request
from ..operations.pending import PendingReceipt, PendingRequests, request_later
from ..records.report import UnlearningReport
from ..records.request import DeletionRequest
from .following import PATIENCE, Following
from .retrying import Retrying
from .stack import StageStack


# Seconds until requests that are due are looked at again while a stage trains.
_WHILE_TRAINING = 1.0


class Unlearning(Following):
    """The part of [`~hf_s3t.S3TModel`] that forgets examples."""

    def _begin_serving(self, stack: StageStack, folder: SystemFolder, preload: str) -> None:
        apply_due = functools.partial(_apply_due, weakref.ref(self))
        self._due = Retrying(apply_due, "Deletion requests are due and could not be applied")
        super()._begin_serving(stack, folder, preload)
        self._apply_in_time()

    def unlearn(
        self,
        ids: Sequence[int | str] | None = None,
        *,
        groups: Sequence[int | str] | None = None,
        missing: str = "error",
        include_duplicates: bool = False,
        on_running: str = "wait",
        timeout: float = PATIENCE,
    ) -> UnlearningReport:
        """
        Forget examples: switch off, and remove, every stage that saw one (Algorithm 4). No training, no restart.

        When it has returned, no call on this model returns a value computed with a stage that saw one of the ids; the
        tensors are out of memory and the stage folders out of the system's folder. The deletion is in the ledger, and
        synced, before anything else changes: whatever dies afterwards, the next load finishes the removal.

        Other threads may call the model meanwhile. New calls work on what is left at once. Calls that are running on a
        stage that goes are waited for, or stopped with [`~hf_s3t.errors.CallStoppedError`]; the tensors are freed, and
        this returns, when none of them computes any more.

        All ids are checked first; a refused call changes nothing. Ids that were deleted before are no error.

        Args:
            ids (sequence of `int` or `str`, *optional*): Ids of the examples.
            groups (sequence of `int` or `str`, *optional*): Groups whose examples are all meant.
            missing (`str`, defaults to `"error"`): `"ignore"` passes over ids this system never saw.
            include_duplicates (`bool`, defaults to `False`):
                Delete the examples too whose content equals that of one of these. Otherwise the report names them. Of
                ids that were deleted before the content is not known any more.
            on_running (`str`, defaults to `"wait"`):
                `"wait"` lets running calls on the old stacks end, `"cancel"` stops them.
            timeout (`float`, defaults to 60): Seconds to wait at most for running calls; then they are stopped.

        Returns:
            [`~hf_s3t.records.report.UnlearningReport`]: What went, and what is left.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
            [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
            [`~hf_s3t.errors.S3TError`]: If called while a stage trains on this model's base, or from inside a running
                call of this model.
        """
        require_choice("on_running", on_running, ("wait", "cancel"))
        _require_seconds("timeout", timeout)
        self._calls.refuse_inside("unlearn")
        request = DeletionRequest(ids, groups, missing, include_duplicates)
        started = time.perf_counter()
        with self._deletion_lock:
            self._refuse_while_training()
            self._wait_for_cleaner()
            with self.folder.lock():
                return self._unlearn(request, on_running, timeout, started)

    def _unlearn(self, request: DeletionRequest, on_running: str, timeout: float, started: float) -> UnlearningReport:
        folder = self.folder
        folder.refresh_ledger()
        folder.refresh_stages()
        before = self._routing.depths
        deletion = record_request(folder, request)
        lock_seconds = self._serve(on_running, timeout)
        folder.remove_stages(deletion.condemned)
        folder.remove_stale_checkpoints()
        # This removal is no news, and the folder's lock keeps others from making any.
        self._has_followed(self._state())
        # Also what an earlier call could not write for want of room.
        if folder.is_table_behind:
            self._cleaner.start()
        return deletion.report(before, self._routing.depths, time.perf_counter() - started, lock_seconds)

    def unlearn_later(
        self,
        ids: Sequence[int | str] | None = None,
        *,
        groups: Sequence[int | str] | None = None,
        missing: str = "error",
        max_delay: float | None = None,
    ) -> PendingReceipt:
        """
        Record a deletion request durably, to be applied together with others.

        Deletions in bulk cost fewer changes of stacks, and the moments at which depth is lost tell less about single
        requests. Until [`~S3TModel.apply_pending`] has returned, the examples still take part in what the model
        answers: the promise of [`~S3TModel.unlearn`] counts from then.

        Args:
            ids (sequence of `int` or `str`, *optional*): Ids of the examples.
            groups (sequence of `int` or `str`, *optional*): Groups whose examples are all meant.
            missing (`str`, defaults to `"error"`): `"ignore"` passes over ids this system never saw.
            max_delay (`float`, *optional*):
                Seconds after which the request is applied by itself, with all others that wait: by this process while
                it runs, else by the next one that loads the folder.

        Returns:
            [`~hf_s3t.operations.pending.PendingReceipt`]: What was recorded.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
            [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
        """
        self._calls.refuse_inside("unlearn_later")
        if max_delay is not None:
            _require_seconds("max_delay", max_delay)
        request = DeletionRequest(ids, groups, missing)
        with self._deletion_lock:
            self._wait_for_cleaner()
            receipt = request_later(self.folder, request, max_delay)
            self._apply_in_time()
        return receipt

    def apply_pending(self, *, on_running: str = "wait", timeout: float = PATIENCE) -> UnlearningReport:
        """
        Delete what [`~S3TModel.unlearn_later`] recorded, in one go.

        Args:
            on_running (`str`, defaults to `"wait"`): As in [`~S3TModel.unlearn`].
            timeout (`float`, defaults to 60): As in [`~S3TModel.unlearn`].

        Returns:
            [`~hf_s3t.records.report.UnlearningReport`]: As of `unlearn`; `deleted` is 0 if nothing was waiting.
        """
        self._calls.refuse_inside("apply_pending")
        with self._deletion_lock:
            self._refuse_while_training()
            self._wait_for_cleaner()
            with self.folder.lock():
                self.folder.refresh_ledger()
                pending = PendingRequests(self.folder)
                ids, groups = pending.ids(), pending.groups()
                report = self.unlearn(ids, groups=groups, missing="ignore", on_running=on_running, timeout=timeout)
                # In the ledger now; a crash before this line finds them there, and nothing to delete.
                pending.clear()
        return report

    def _apply_in_time(self) -> None:
        """Have the requests that wait applied when the most urgent one is due."""
        due = PendingRequests(self.folder).apply_by()
        if due is None:
            self._due.cancel()
        else:
            self._due.start_in((due - datetime.now(UTC)).total_seconds())

    @property
    def _failures(self) -> list[str]:
        """One sentence for each thing that could not be done yet, and is tried again."""
        problems = (self._cleaner.problem, self._due.problem, self._not_taken_up)
        return [problem for problem in problems if problem is not None]


def _apply_due(model: "weakref.ref[Unlearning]") -> None:
    """Apply what waits, unless the model is gone; another process will then when it loads the folder."""
    alive = model()
    if alive is None:
        return
    if alive.stack.in_training is None:
        alive.apply_pending()
    else:
        # A stage in training is waited for in silence.
        alive._due.start_in(_WHILE_TRAINING)


def _require_seconds(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ConfigError(f"`{name}` must be a number of seconds, got {value!r}.")
