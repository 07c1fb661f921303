"""What a served model keeps in step with its folder: the stages in memory, and which of them answer."""

import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from transformers.utils import logging

from ..errors import S3TError
from ..folder.files import Stamp, stamp
from ..folder.layout import GATE_FILE
from ..folder.system import SystemFolder
from ..plan.stages import StageKey
from .calls import Calls, Routing
from .gates import (
    RECORDED,
    ChosenGate,
    Gate,
    GateSettings,
    GivenWeights,
    TermsGate,
    UnreadableGate,
    UsersGate,
    tokenizer_of_gate,
)
from .retrying import Retrying
from .stack import StageStack


logger = logging.get_logger(__name__)

# Seconds that running calls are waited for.
PATIENCE = 60.0
# Seconds before a call looks at the ledger again.
_BETWEEN_LOOKS = 0.005
# Seconds that `unlearn` has to return before the id table is written.
_HEAD_START = 0.002
# Seconds within which two changes of a folder may bear one time.
_GRAIN = 2.0
# Seconds after which stages are looked at whatever their folders' times say.
_IN_ANY_CASE = 60.0
# How often stages that another process removes meanwhile are tried to be loaded.
_ATTEMPTS = 10


# How many lines the ledger has, what is seen of the stages' folders, and of the gate.
_State = tuple[int, tuple[Any, ...], Stamp | None]


class Following:
    """The part of [`~hf_s3t.S3TModel`] that keeps what serves in step with the folder."""

    # What is put together of the folder's stages; the baselines have others.
    routing_type: type[Routing] = Routing
    # Which gate weighs the members.
    _gate_settings = GateSettings()

    def _begin_serving(self, stack: StageStack, folder: SystemFolder, preload: str) -> None:
        """
        Serve what a folder says from here on.

        Args:
            stack ([`~hf_s3t.model.stack.StageStack`]): The adapters in memory.
            folder ([`~hf_s3t.folder.system.SystemFolder`]): The folder that is served and written to.
            preload (`str`): `"best"` or `"all"`; see [`~hf_s3t.S3TModel`].
        """
        self.stack = stack
        self.folder = folder
        self.preload = preload
        self._calls = Calls(Routing(()))
        # What serves goes by so many lines of the ledger, and by the stages that were there then: others than this
        # model read the folder too, and write to it.
        self._followed: _State | None = None
        self._gate_stamp = self._stamp_of_gate()
        self._look_again = 0.0
        self._not_taken_up: str | None = None
        # The gate that was made last, and the digest of its tokenizer.
        self._terms: tuple[str, TermsGate] | None = None
        self._deletion_lock = threading.RLock()
        compact = functools.partial(_compact, folder)
        self._cleaner = Retrying(compact, "The table of examples still holds deleted rows")
        self._letting_go = Retrying(folder.let_go_of_deleted_rows, "Deleted rows are still in memory")
        self.refresh()
        # Before there are calls, also where no stage serves yet: what is attached later must replace no module.
        stack.wrap()

    @contextlib.contextmanager
    def _call(self) -> Iterator[Routing]:
        """A call: it works on what the folder says when it begins, from start to end, with the base to itself."""
        with self.stack.call(), self._calls.call(self.follow) as routing:
            yield routing

    def catch_up(self) -> None:
        """Follow the folder, unless inside of a call, or while a deletion is under way: neither is waited for."""
        if not self._calls.is_inside and self.is_behind() and self._deletion_lock.acquire(blocking=False):
            try:
                self.follow()
            finally:
                self._deletion_lock.release()

    def follow(self) -> None:
        """
        Do what the folder says since another process wrote to it, deletions and new stages; calls begin with it.

        On return what was deleted before answers no more, and calls under way on it have ended.
        """
        while self.is_behind():
            # Whoever holds this lock is reading the folder, or writing to it: soon there is no news any more.
            if self._deletion_lock.acquire(timeout=_BETWEEN_LOOKS):
                try:
                    if not self.is_behind():
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
            problems: list[OSError] = [*self.folder.look_at_stages()]
            self.folder.prepare()
            self._serve()
        except OSError as error:
            if self._routing.route is None:
                raise
            problems = [error]
            self._has_followed(state)
        sentences = " ".join(map(str, problems))
        if sentences and sentences != self._not_taken_up:
            logger.warning(f"Stages of {self.folder.path} are not taken up: {sentences}")
        self._not_taken_up = sentences or None

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

    def give_up(self, stages: frozenset[StageKey]) -> None:
        """
        Have some stages answer no more, though they are valid: others of their names are about to be trained, and two
        of one name cannot be in memory at once. Only while this is at rest.
        """
        left = self._routing.stages - stages
        self._calls.switch(self._routing_of(frozenset(left)))
        self.free(stages)
        self.stack.drop(stages)

    def free(self, stages: frozenset[StageKey]) -> None:
        """Wait until no call uses any of the stages, and stop the calls that take too long."""
        if not self._calls.wait_for(stages, PATIENCE):
            self._calls.stop(stages)

    def is_behind(self) -> bool:
        """Whether the folder changed since it was followed: a glance, which waits for nothing."""
        return self.folder.has_news() or self._followed != self._state() or time.monotonic() >= self._look_again

    def serves_all(self) -> bool:
        """Whether what answers is what the folder says, as far as it was read, all of it loaded."""
        return self._routing.served == tuple(map(tuple, self.folder.served()))

    def _knows_all_deletions(self) -> bool:
        known = self._followed is not None and self._followed[0] == len(self.folder.ledger.lines)
        return known and not self.folder.has_news()

    def _state(self) -> "_State":
        """What is known of the folder, before stages are looked at: what comes meanwhile is news again."""
        return len(self.folder.ledger.lines), self.folder.stages_stamp(), self._stamp_of_gate()

    def _stamp_of_gate(self) -> Stamp | None:
        """By which a gate that was made since is told; `None` where none is asked for."""
        asks = self._gate_settings.gate in (RECORDED, "terms")
        return stamp(self.folder.path / GATE_FILE) if asks else None

    def _has_followed(self, state: "_State") -> None:
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
        if self.folder.holds_deleted_rows:
            # Whoever deleted them writes the table; the call that noticed it does not wait for what is in memory here.
            self._letting_go.start()

    def _refuse_while_training(self) -> None:
        if self.stack.in_training is not None:
            raise S3TError(
                f"The stage {self.stack.in_training} is in training on this model's base. Call this after `train()`, "
                "or on a model that another process loaded from the folder."
            )

    def _serve(self, on_running: str = "wait", timeout: float = PATIENCE) -> float:
        """Load what shall be in memory, switch to it, and drop the rest; returns how long the lock was held."""
        folder, stack, calls = self.folder, self.stack, self._calls
        # In this order: what comes in between is followed before the next call.
        followed = self._state()
        if followed[2] != self._gate_stamp:
            # With the gate its settings are recorded.
            folder.refresh_settings()
            self._gate_stamp = followed[2]
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
                # Two stages of one name cannot be in memory at once.
                self._let_go(gone.intersection(new), on_running, timeout)
                # All files are read, and so checked, before any is attached.
                stack.load_all([(key, folder.read_adapter(key), folder.adapter_digest(key)) for key in new])
                lock_seconds = max(lock_seconds, calls.switch(routing))
                self._has_followed(followed)
        finally:
            self._let_go(gone.difference(new), on_running, timeout)
        spare = frozenset(stack.loaded) - wanted
        # These may still answer: calls that use them run to their end; if that takes long, they are dropped later.
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
        served = folder.served(valid)
        digests = [folder.adapter_digest(tip) for tips in served for tip in tips]
        settings = self._gate_settings.resolved(folder.config)
        return self.routing_type(served, digests, self._gate(settings), settings.top_k)

    def _gate(self, settings: ChosenGate) -> Gate | None:
        """What weighs the members by what is in now. Stages are taken out of use also where it cannot be read."""
        if settings.gate != "terms":
            return self._by_size() if settings.gate is None else UsersGate(settings.gate)
        try:
            return self._terms_gate(float(settings.temperature))
        except (S3TError, OSError) as error:
            return UnreadableGate(error)

    def _by_size(self) -> Gate | None:
        """
        Weights by the rows of each shard that are in, where these were asked for when shards were added: a pure
        function of these rows.
        """
        folder = self.folder
        if folder.record.get("added", {}).get("weights") != "size":
            return None
        num_shards = folder.config.num_shards
        sizes = torch.zeros(num_shards, dtype=torch.float64)
        for (shard, _), size in folder.table.sizes_of_slices.items():
            sizes[shard] += size
        # Where no row is left there is nothing to weigh.
        return GivenWeights(sizes, num_shards) if sizes.any() else None

    def _terms_gate(self, temperature: float) -> TermsGate:
        folder = self.folder
        stored = folder.load_gate()
        counts, digest = stored.counts, stored.tokenizer_digest
        if self._terms is None or self._terms[0] != digest:
            tokenizer = tokenizer_of_gate(folder, digest)
        else:
            _, last = self._terms
            if last.counts is counts and last.temperature == temperature:
                return last
            tokenizer = last.tokenizer
        gate = TermsGate(tokenizer, folder.key, counts, temperature)
        self._terms = digest, gate
        return gate

    @property
    def _routing(self) -> Routing:
        return self._calls.routing

    def _wait_for_cleaner(self) -> None:
        """The id table is written without the deleted rows a moment after `unlearn` returned."""
        self._cleaner.wait()


def _compact(folder: SystemFolder) -> None:
    # Else this thread would hold the interpreter, and the folder's lock, before `unlearn` could return.
    time.sleep(_HEAD_START)
    folder.compact()
    folder.prepare()
