"""What lets a served model forget: a change of routing, and removing what saw the examples, now or together later."""

import contextlib
import functools
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime

from transformers.utils import logging

from ..config import require_choice
from ..errors import ConfigError, S3TError
from ..folder.system import SystemFolder
from ..operations.deletion import record_request
from ..operations.pending import PendingReceipt, PendingRequests, request_later
from ..plan.stages import StageKey
from ..records.report import UnlearningReport
from ..records.request import DeletionRequest
from .calls import Calls, Routing
from .retrying import Retrying
from .stack import StageStack


logger = logging.get_logger(__name__)

# Seconds: how long running calls are waited for, how long a call waits before it looks at the ledger again, how long
# `unlearn` has to return before the id table is written, within which two changes of a folder may bear one time, and
# how often stages are looked at whatever their folders' times say.
_PATIENCE = 60.0
_A_MOMENT = 0.005
_HEAD_START = 0.002
_GRAIN = 2.0
_IN_ANY_CASE = 60.0
_WHILE_TRAINING = 1.0
# How often stages that another process removes meanwhile are tried to be loaded.
_ATTEMPTS = 10


class Unlearning:
    """
    The part of [`~hf_s3t.S3TModel`] that keeps what serves in step with the folder, and forgets.

    Args:
        stack ([`~hf_s3t.model.stack.StageStack`]): The adapters in memory.
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The folder that is served and written to.
        preload (`str`): `"best"` or `"all"`; see [`~hf_s3t.S3TModel`].
    """

    def _begin_serving(self, stack: StageStack, folder: SystemFolder, preload: str) -> None:
        self.stack = stack
        self.folder = folder
        self.preload = preload
        self._calls = Calls(Routing(()))
        # What serves goes by so many lines of the ledger, and by the stages that were there then: others than this
        # model read the folder too, and write to it.
        self._followed: tuple[int, tuple] | None = None
        self._look_again = 0.0
        self._not_taken_up: str | None = None
        self._deletion_lock = threading.RLock()
        compact = functools.partial(_compact, folder)
        apply_due = functools.partial(_apply_due, weakref.ref(self))
        self._cleaner = Retrying(compact, "The table of examples still holds deleted rows")
        self._due = Retrying(apply_due, "Deletion requests are due and could not be applied")
        self.refresh()
        # Before there are calls, also where no stage serves yet: what is attached later must replace no module.
        stack.wrap()
        self._apply_in_time()

    @contextlib.contextmanager
    def _call(self) -> Iterator[Routing]:
        """A call: it works on what the folder says when it begins, from start to end, with the base to itself."""
        with self.stack.call(), self._calls.call(self._follow) as routing:
            yield routing

    def _catch_up(self) -> None:
        """Follow the folder, unless inside of a call, or while a deletion is under way: neither is waited for."""
        if not self._calls.is_inside and self._is_behind() and self._deletion_lock.acquire(blocking=False):
            try:
                self._follow()
            finally:
                self._deletion_lock.release()

    def _follow(self) -> None:
        """Before a call: do what the folder says since another process wrote to it, deletions and new stages."""
        while self._is_behind():
            # Whoever holds this lock is reading the folder, or writing to it: soon there is no news any more.
            if self._deletion_lock.acquire(timeout=_A_MOMENT):
                try:
                    if not self._is_behind():
                        continue
                    if self.stack.in_training is not None:
                        self._switch_off()
                    elif self._knows_all_deletions():
                        self._take_up_stages()
                    else:
                        self.refresh()
                finally:
                    self._deletion_lock.release()

    def _take_up_stages(self) -> None:
        """Serve what was grown. What of it is damaged is no reason to fail a call that can be answered without."""
        state = self._state()
        try:
            problems = self.folder.look_at_stages()
            self.folder.prepare()
            self._serve()
        except OSError as error:
            if self._routing.route is None:
                raise
            problems = [error]
            self._has_followed(state)
        said = " ".join(map(str, problems))
        if said and said != self._not_taken_up:
            logger.warning(f"Stages of {self.folder.path} are not taken up: {said}")
        self._not_taken_up = said or None

    def _switch_off(self) -> None:
        """Follow the ledger while a stage trains on the same base: condemned stages stop answering, none is loaded."""
        folder = self.folder
        folder.refresh_ledger()
        followed = self._state()
        here = self._routing.stages & folder.valid_stages
        held = frozenset(key for key in here if self.stack.holds(key, folder.adapter_digest(key)))
        self._calls.switch(self._routing_of(held))
        self._has_followed(followed)

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
        return self.folder.has_news() or self._followed != self._state() or time.monotonic() >= self._look_again

    def _knows_all_deletions(self) -> bool:
        known = self._followed is not None and self._followed[0] == len(self.folder.ledger.lines)
        return known and not self.folder.has_news()

    def _state(self) -> tuple[int, tuple]:
        """What is known of the folder, before stages are looked at: what comes meanwhile is news again."""
        return len(self.folder.ledger.lines), self.folder.stages_stamp()

    def _has_followed(self, state: tuple[int, tuple]) -> None:
        self._followed = state
        # A change that came right after may bear the same time as the one that was seen.
        newest = max((stamp.time for stamp in state[1] if stamp is not None), default=0)
        is_recent = abs(time.time_ns() - newest) < _GRAIN * 1e9
        self._look_again = time.monotonic() + (_GRAIN if is_recent else _IN_ANY_CASE)

    def refresh(self) -> None:
        """
        Follow what is in the folder now: deletions by other processes, stages a trainer added.

        Calls notice what other processes deleted or grew by themselves when they begin; this is for not waiting for
        one, and for what only the Hub knows. Calls under way on a stage that has gone are waited for, as in
        [`~S3TModel.unlearn`].

        Raises:
            [`~hf_s3t.errors.S3TError`]: If called while a stage trains, or from inside a running call of this model.
        """
        self._calls.refuse_inside("refresh")
        with self._deletion_lock:
            self._refuse_while_training()
            self._wait_for_cleaner()
            self._take_in()

    def _take_in(self) -> None:
        """Read what is in the folder, and serve it."""
        for attempt in range(_ATTEMPTS):
            seen = self.folder.stages_stamp()
            self.folder.refresh()
            self.folder.prepare()
            try:
                self._serve()
                break
            except OSError:
                # What another process removes or replaces while it is loaded here.
                is_news = self.folder.has_news() or self.folder.stages_stamp() != seen
                if not is_news or attempt == _ATTEMPTS - 1:
                    raise
        self._not_taken_up = None

    def _refuse_while_training(self) -> None:
        if self.stack.in_training is not None:
            raise S3TError(
                f"The stage {self.stack.in_training} is in training on this model's base. Call this after `train()`, "
                "or on a model that another process loaded from the folder."
            )

    def _serve(self, on_running: str = "wait", timeout: float = _PATIENCE) -> float:
        """Load what shall be in memory, switch to it, and drop the rest; returns how long the lock was held."""
        folder, stack, calls = self.folder, self.stack, self._calls
        # In this order: what comes in between is followed before the next call.
        followed = self._state()
        valid = folder.valid_stages
        present = frozenset(key for key in valid if stack.holds(key, folder.adapter_digest(key)))
        routing = self._routing_of(valid)
        # What is in memory and may stay answers first: loading what is not may fail, and a removed stage must not
        # answer then. Where nothing was removed, the stacks that serve go on until the new ones are there.
        first = routing if routing.stages <= present else self._routing_of(present)
        gone = frozenset(stack.loaded) - present
        wanted = set(valid) if self.preload == "all" else routing.stages
        new = sorted(wanted - present, key=lambda key: (key.shard, key.depth, key.prefix))
        # A system of which a stack is left is not exhausted while that is loaded: calls wait for it.
        is_awaited = first.route is None and routing.route is not None
        lock_seconds = 0.0
        try:
            with calls.awaited() if is_awaited else contextlib.nullcontext():
                if not self._routing.stages <= present:
                    lock_seconds = calls.switch(first)
                # What serves from here on is valid; new calls need not wait for what follows. Where nothing serves
                # they do, and if it fails the next one tries it again.
                self._followed = None
                if not is_awaited:
                    self._has_followed(followed)
                # Of two stages under one name only one can be in memory.
                self._let_go(gone.intersection(new), on_running, timeout)
                # All files are read, and so checked, before any is attached.
                stack.load_all([(key, folder.read_adapter(key), folder.adapter_digest(key)) for key in new])
                lock_seconds = max(lock_seconds, calls.switch(routing))
                self._has_followed(followed)
        finally:
            self._let_go(gone.difference(new), on_running, timeout)
        spare = frozenset(stack.loaded) - wanted
        # These may answer: calls that use them run to their end, and if that takes long they are dropped another time.
        if calls.wait_for(spare, timeout):
            stack.drop(spare)
        return lock_seconds

    def _let_go(self, gone: frozenset[StageKey], on_running: str, timeout: float) -> None:
        """Drop stages that must answer no more, when no call computes with them."""
        if on_running == "cancel" or not self._calls.wait_for(gone, timeout):
            self._calls.stop(gone)
        self.stack.drop(gone)

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

    def apply_pending(self, *, on_running: str = "wait", timeout: float = _PATIENCE) -> UnlearningReport:
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

    def _wait_for_cleaner(self) -> None:
        """The id table is written without the deleted rows a moment after `unlearn` returned."""
        self._cleaner.wait()

    @property
    def _failures(self) -> list[str]:
        """One sentence for each thing that could not be done yet, and is tried again."""
        problems = (self._cleaner.problem, self._due.problem, self._not_taken_up)
        return [problem for problem in problems if problem is not None]


def _compact(folder: SystemFolder) -> None:
    # Else this thread would hold the interpreter, and the folder's lock, before `unlearn` could return.
    time.sleep(_HEAD_START)
    folder.compact()
    folder.prepare()


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


def _require_seconds(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ConfigError(f"`{name}` must be a number of seconds, got {value!r}.")
