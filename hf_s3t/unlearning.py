"""What lets a served model forget: a change of routing, and removing what saw the examples, now or together later."""

import contextlib
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from transformers.utils import logging

from .calls import Calls, Routing
from .config import require_choice
from .deletion import record
from .errors import ConfigError, S3TError
from .ledger import UnlearningReport
from .pending import PendingReceipt, PendingRequests, request_later
from .plan import StageKey
from .stack import StageStack
from .storage import SystemFolder


logger = logging.get_logger(__name__)

# Seconds: how long running calls are waited for, how long a call waits before it looks at the ledger again, how long
# `unlearn` has to return before the id table is written, and until requests that could not be applied are tried again.
_PATIENCE = 60.0
_A_MOMENT = 0.005
_HEAD_START = 0.002
_RETRY = 60.0


class Unlearning:
    """
    The part of [`~hf_s3t.S3TModel`] that keeps what serves in step with the folder, and forgets.

    Args:
        stack ([`~hf_s3t.stack.StageStack`]): The adapters in memory.
        folder ([`~hf_s3t.storage.SystemFolder`]): The folder that is served and written to.
        preload (`str`): `"best"` or `"all"`; see [`~hf_s3t.S3TModel`].
    """

    def _begin_serving(self, stack: StageStack, folder: SystemFolder, preload: str) -> None:
        self.stack = stack
        self.folder = folder
        self.preload = preload
        self._calls = Calls(Routing(()))
        # How many lines of the ledger what serves goes by: others than this model read them too.
        self._followed = 0
        self._deletion_lock = threading.RLock()
        self._cleaner: threading.Thread | None = None
        self._timer: threading.Timer | None = None
        self.refresh()
        # Before there are calls, also where no stage serves yet: what is attached later must replace no module.
        stack.wrap()
        self._apply_in_time()

    def _follow(self) -> None:
        """Before a call: do what the ledger says since another process wrote to it."""
        if self._calls.is_inside:
            return
        while self._is_behind():
            # Whoever holds this lock is reading the ledger, or writing to it: soon there is no news any more.
            if self._deletion_lock.acquire(timeout=_A_MOMENT):
                try:
                    if self._is_behind() and self.stack.in_training is None:
                        self.refresh()
                    elif self._is_behind():
                        self._switch_off()
                finally:
                    self._deletion_lock.release()

    def _switch_off(self) -> None:
        """Follow the ledger while a stage trains on the same base: condemned stages stop answering, none is loaded."""
        folder = self.folder
        folder.refresh_ledger()
        followed = len(folder.ledger.lines)
        here = self._routing.stages & folder.valid_stages
        held = frozenset(key for key in here if self.stack.holds(key, folder.adapter_digest(key)))
        self._calls.switch(self._routing_of(held))
        self._followed = followed

    @contextlib.contextmanager
    def at_rest(self) -> Iterator[None]:
        """Inside, no other thread attaches or drops stages; what is deleted by now answers no more."""
        with self._deletion_lock:
            self._wait_for_cleaner()
            self._switch_off()
            yield

    def free(self, stages: frozenset[StageKey]) -> None:
        """Wait until no call uses any of the stages, and stop the calls that take too long."""
        if not self._calls.wait_for(stages, _PATIENCE):
            self._calls.stop(stages)

    def _is_behind(self) -> bool:
        return self.folder.has_news() or len(self.folder.ledger.lines) != self._followed

    def refresh(self) -> None:
        """
        Follow what is in the folder now: deletions by other processes, stages a trainer added.

        Calls notice deletions by other processes by themselves when they begin; this is for not waiting for one. Calls
        under way on a stage that has gone are waited for, as in [`~S3TModel.unlearn`].

        Raises:
            [`~hf_s3t.errors.S3TError`]: If called while a stage trains, or from inside a running call of this model.
        """
        self._calls.refuse_inside("refresh")
        with self._deletion_lock:
            self._refuse_while_training()
            self._wait_for_cleaner()
            while True:
                self.folder.refresh()
                self.folder.prepare()
                try:
                    self._serve()
                    return
                except OSError:
                    # What another process removes while it is loaded here: a line in the ledger says so before.
                    if not self.folder.has_news():
                        raise

    def _refuse_while_training(self) -> None:
        if self.stack.in_training is not None:
            raise S3TError(
                f"The stage {self.stack.in_training} is in training on this model's base. Call this after `train()`, "
                "or on a model that another process loaded from the folder."
            )

    def _serve(self, on_running: str = "wait", timeout: float = _PATIENCE) -> float:
        """Load what shall be in memory, switch to it, and drop the rest; returns how long the lock was held."""
        folder, stack, calls = self.folder, self.stack, self._calls
        # In this order: a line that comes in between is followed before the next call.
        followed = len(folder.ledger.lines)
        valid = folder.valid_stages
        present = frozenset(key for key in valid if stack.holds(key, folder.adapter_digest(key)))
        routing = self._routing_of(valid)
        # What is in memory and may stay answers first: loading what is not may fail, and a removed stage must not
        # answer then. Where nothing was removed, the stacks that serve go on until the new ones are there.
        lock_seconds = 0.0
        if not self._routing.stages <= present:
            lock_seconds = calls.switch(routing if routing.stages <= present else self._routing_of(present))
        # What serves from here on is valid; new calls need not wait for what follows.
        self._followed = followed
        gone = frozenset(stack.loaded) - present
        if on_running == "cancel" or not calls.wait_for(gone, timeout):
            calls.stop(gone)
        stack.drop(gone)
        wanted = set(valid) if self.preload == "all" else routing.stages
        new = sorted(wanted - present, key=lambda key: (key.shard, key.depth, key.prefix))
        # All files are read, and so checked, before any is attached.
        stack.load_all([(key, folder.read_adapter(key), folder.adapter_digest(key)) for key in new])
        lock_seconds = max(lock_seconds, calls.switch(routing))
        spare = frozenset(stack.loaded) - wanted
        # These may answer: calls that use them run to their end, and if that takes long they are dropped another time.
        if calls.wait_for(spare, timeout):
            stack.drop(spare)
        return lock_seconds

    def _routing_of(self, valid: frozenset[StageKey]) -> "Routing":
        folder = self.folder
        served = folder.plan.served(valid, folder.config.select, folder.losses())
        return Routing(served, [folder.adapter_digest(tip) for tips in served for tip in tips])

    @property
    def _routing(self) -> Routing:
        return self._calls.routing

    def unlearn(
        self,
        ids: Sequence[int | str] | None = None,
        *,
        groups: Sequence[int | str] | None = None,
        missing: str = "error",
        include_duplicates: bool = False,
        on_running: str = "wait",
        timeout: float = _PATIENCE,
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
            [`~hf_s3t.ledger.UnlearningReport`]: What went, and what is left.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
            [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
            [`~hf_s3t.errors.S3TError`]: If called while a stage trains on this model's base, or from inside a running
                call of this model.
        """
        require_choice("on_running", on_running, ("wait", "cancel"))
        _require_seconds("timeout", timeout)
        self._calls.refuse_inside("unlearn")
        started = time.perf_counter()
        with self._deletion_lock:
            self._refuse_while_training()
            self._wait_for_cleaner()
            with self.folder.lock():
                return self._unlearn(ids, groups, missing, include_duplicates, on_running, timeout, started)

    def _unlearn(self, ids, groups, missing, include_duplicates, on_running, timeout, started) -> UnlearningReport:
        folder = self.folder
        folder.refresh_ledger()
        folder.refresh_stages()
        before = self._routing.depths
        deletion = record(folder, ids, groups, missing, include_duplicates)
        lock_seconds = self._serve(on_running, timeout)
        folder.remove_stages(deletion.condemned)
        folder.remove_stale_checkpoints()
        # Also what an earlier call could not write for want of room.
        if folder.is_table_behind:
            self._cleaner = threading.Thread(target=_compact, args=[folder], name="hf_s3t-compact")
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
            [`~hf_s3t.pending.PendingReceipt`]: What was recorded.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
            [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
        """
        self._calls.refuse_inside("unlearn_later")
        if max_delay is not None:
            _require_seconds("max_delay", max_delay)
        with self._deletion_lock:
            self._wait_for_cleaner()
            receipt = request_later(self.folder, ids, groups, missing, max_delay)
            self._apply_in_time()
        return receipt

    def apply_pending(self, *, on_running: str = "wait", timeout: float = _PATIENCE) -> UnlearningReport:
        """
        Delete what [`~S3TModel.unlearn_later`] recorded, in one go.

        Args:
            on_running (`str`, defaults to `"wait"`): As in [`~S3TModel.unlearn`].
            timeout (`float`, defaults to 60): As in [`~S3TModel.unlearn`].

        Returns:
            [`~hf_s3t.ledger.UnlearningReport`]: As of `unlearn`; `deleted` is 0 if nothing was waiting.
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
        if self._timer is not None:
            self._timer.cancel()
        due = PendingRequests(self.folder).apply_by()
        if due is not None:
            self._apply_in((due - datetime.now(UTC)).total_seconds())

    def _apply_in(self, seconds: float) -> None:
        seconds = min(max(0.0, seconds), threading.TIMEOUT_MAX)
        self._timer = threading.Timer(seconds, _apply_due, [weakref.ref(self)])
        self._timer.daemon = True
        self._timer.start()

    def _wait_for_cleaner(self) -> None:
        """The id table is written without the deleted rows a moment after `unlearn` returned."""
        if self._cleaner is not None:
            self._cleaner.join()
            self._cleaner = None


def _compact(folder: SystemFolder) -> None:
    # Else this thread would hold the interpreter, and the folder's lock, before `unlearn` could return.
    time.sleep(_HEAD_START)
    try:
        folder.compact()
        folder.prepare()
    except OSError as error:
        logger.error(str(error))


def _require_seconds(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ConfigError(f"`{name}` must be a number of seconds, got {value!r}.")


def _apply_due(model: "weakref.ref[Unlearning]") -> None:
    """Apply what waits, unless the model is gone; another process will then when it loads the folder."""
    alive = model()
    if alive is None:
        return
    try:
        alive.apply_pending()
    except S3TError as error:
        logger.error(f"Deletion requests are due and could not be applied: {error} It is tried again every minute.")
        alive._apply_in(_RETRY)
