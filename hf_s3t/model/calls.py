"""The calls under way on a model: each works on one routing; a deletion waits for those on the old, or stops them."""

import contextlib
import copy
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from ..errors import S3TError
from ..plan.stages import StageKey
from .gates import Gate, chosen
from .gating import Gating
from .route import Route
from .scope import Scope


class Routing:
    """
    A snapshot of which stacks answer. Never changed: a deletion puts another in its place.

    Args:
        served (sequence of sequences of [`~hf_s3t.plan.stages.StageKey`]):
            Per shard the tips of the stacks that answer.
        digests (sequence of `str`): The digests of the files of those stages.
        gate ([`~hf_s3t.model.gates.Gate`], *optional*): What weighs the members for each row; equally if not given.
        gate_top_k (`int`, *optional*): See [`~hf_s3t.model.gates.chosen`].
    """

    route_type = Route

    def __init__(
        self,
        served: Sequence[Sequence[StageKey]],
        digests: Sequence[str] = (),
        gate: Gate | None = None,
        gate_top_k: int | None = None,
    ):
        self.served = tuple(tuple(tips) for tips in served)
        self.identity = (self.served, tuple(digests))
        members = tuple(tip for tips in self.served for tip in tips)
        self.route = self.route_type(members) if members else None
        alive = sum(1 for tips in self.served if tips)
        self.weights = torch.tensor([1 / (alive * len(tips)) for tips in self.served for _ in tips])
        self.stages = frozenset(key for tip in members for key in tip.lineage)
        # Per shard the slices that its stacks have seen.
        self.seen = tuple(frozenset(number for tip in tips for number in tip.prefix) for tips in self.served)
        self.gate, self.gate_top_k = gate, gate_top_k
        # Without the gate, of which there may be another for the same stacks.
        self._cuts: dict[int, Routing] = {}

    def with_gate(self, gate: Gate | None, top_k: int | None) -> "Routing":
        """The same stacks, weighed by another gate: the route is the same, so that caches stay good."""
        if gate is self.gate and top_k == self.gate_top_k:
            return self
        other = copy.copy(self)
        other.gate, other.gate_top_k = gate, top_k
        return other

    def gating(self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, rows: int) -> Gating | None:
        """
        Who answers which rows; `None` without a gate, and where there are not several members to choose from.

        Args:
            input_ids (`torch.Tensor` of shape `(rows, positions)`, *optional*): The prompts.
            attention_mask (`torch.Tensor` of shape `(rows, positions)`, *optional*): What of them counts.
            rows (`int`): How many rows the call has.

        Raises:
            [`~hf_s3t.errors.S3TError`]: If the gate cannot tell, or speaks of other rows.
        """
        if self.gate is None or self.route is None or len(self.route) == 1:
            return None
        weights = self.gate.weights(input_ids, attention_mask, self.seen)
        if len(weights) not in (1, rows):
            raise S3TError(
                f"Weights were given for {len(weights)} rows, and the call has {rows}. Give `weighted_by` one row of "
                "weights for each prompt, or one for all."
            )
        weights = weights.expand(rows, -1)
        shards = torch.tensor([shard for shard, tips in enumerate(self.served) for _ in tips])
        # The stacks of one shard share what it has.
        shares = torch.tensor([1 / len(tips) for tips in self.served for _ in tips], dtype=weights.dtype)
        of_members = chosen(weights, self.seen, self.gate_top_k)[:, shards] * shares
        # In the precision that equal weights have.
        of_members = of_members.t().to(self.weights.dtype)
        return Gating(self.route, of_members if input_ids is None else of_members.to(input_ids.device))

    def cut(self, depth: int | None) -> "Routing":
        """
        The same stacks, none of them deeper than some number of stages.

        All its stages are among this one's, so that it needs nothing loaded, and a deletion that this one has to wait
        for, or stops, is one for it too. It is made once: caches of keys and values stay good between calls.
        """
        if depth is None or depth >= max(self.depths, default=0):
            return self
        if depth not in self._cuts:
            tips = [
                list(dict.fromkeys(tip.lineage[min(depth, tip.depth) - 1] for tip in tips)) for tips in self.served
            ]
            self._cuts[depth] = type(self)(tips, (*self.identity[1], str(depth)))
        return self._cuts[depth].with_gate(self.gate, self.gate_top_k)

    @property
    def num_blocks(self) -> int:
        """How many blocks of rows a pass has: one per member, or the one of the base alone."""
        return max(1, len(self.route or ()))

    @property
    def depths(self) -> list[int]:
        """Per shard the depth of the deepest stack that answers; 0 where the shard is dead."""
        return [max((tip.depth for tip in tips), default=0) for tips in self.served]


@dataclass
class Steps:
    """
    The steps of a call that generates, which one thread takes.

    Args:
        routing ([`Routing`]): What they all work on.
        thread (`int`): The thread.
        gating ([`~hf_s3t.model.gating.Gating`], *optional*): Who answers which row, since its prompt was read.
    """

    routing: Routing
    thread: int = field(default_factory=threading.get_ident)
    gating: Gating | None = None


class Calls:
    """
    The routing that new calls work on, and the calls under way.

    The one lock in here is the routing lock. It is held to count, or to change a pointer; never while anything waits,
    computes or reads a file.

    Args:
        routing ([`Routing`]): What the first calls work on.
    """

    def __init__(self, routing: Routing):
        self.routing = routing
        self._changed = threading.Condition(threading.Lock())
        self._calls: Counter[Routing] = Counter()
        self._passes: Counter[Routing] = Counter()
        self._is_awaited = False
        # The routing of the call that code is inside of, and the depth that stacks are cut to for calls that begin.
        self._inside = Scope("hf_s3t_inside")
        self._limit = Scope("hf_s3t_limit")
        # The gate that is asked in place of the routing's own by calls that begin.
        self._gate = Scope("hf_s3t_gate")
        # The steps that are taken here.
        self._stepping = Scope("hf_s3t_stepping")

    @property
    def is_inside(self) -> bool:
        """Whether this code is inside a call that runs: in a streamer's callback, say, or in a task that it made."""
        return self._inside.get() is not None

    @property
    def is_exhausted(self) -> bool:
        """Whether no stack answers, and none is being loaded."""
        with self._changed:
            return self.routing.route is None and not self._is_awaited

    def refuse_inside(self, what: str) -> None:
        """
        Refuse what would wait for the very call it was called from.

        Raises:
            [`~hf_s3t.errors.S3TError`]: With the way out.
        """
        if self.is_inside:
            raise S3TError(
                f"`{what}` was called from inside a running call of the same model, or from a task that was made "
                "there, and it would wait for that call. Call it when that call has returned, or from another thread."
            )

    @contextlib.contextmanager
    def call(self, follow: Callable[[], None] = lambda: None) -> Iterator[Routing]:
        """
        Inside, everything works on one routing, which is what is yielded; a call inside a call joins it.

        Each is counted by itself: one that joins may be a task that outlives the call it was made in.

        Args:
            follow (callable): Called before a call takes the routing of now: what brings that up to date.

        Raises:
            [`~hf_s3t.errors.CallStoppedError`]: If a deletion stopped the call, instead of letting it return.
        """
        routing = self._join(self._inside.get())
        while routing is None:
            follow()
            routing = self._begin()
        try:
            with self._inside.holding(routing):
                yield routing
            refuse_stopped(routing)
        finally:
            self._leave(self._calls, routing)

    @contextlib.contextmanager
    def stepping(self, routing: Routing) -> Iterator[None]:
        """Inside, calls that this thread makes are steps of the call around them: they end before it."""
        with self._stepping.holding(Steps(routing)):
            yield

    @property
    def steps(self) -> Steps | None:
        """Those that a call which begins here is one of: the call around them is counted, and has its turn."""
        steps: Steps | None = self._stepping.get()
        return steps if steps is not None and steps.thread == threading.get_ident() else None

    def _join(self, outer: Routing | None) -> Routing | None:
        """Count one more call on the routing of the call around it, unless that has ended meanwhile."""
        with self._changed:
            if outer is None or not self._calls[outer]:
                return None
            self._calls[outer] += 1
            return outer

    def _begin(self) -> Routing | None:
        """Count one more call on what answers now; `None` after a wait for it to be loaded, which may have failed."""
        with self._changed:
            if self._is_awaited:
                self._changed.wait_for(lambda: not self._is_awaited)
                return None
            routing = self.routing.cut(self._limit.get())
            gate = self._gate.get()
            if gate is not None:
                routing = routing.with_gate(gate, routing.gate_top_k)
            self._calls[routing] += 1
            return routing

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Around the loading of the only stacks that will answer: calls that begin meanwhile wait for them."""
        with self._changed:
            self._is_awaited = True
        try:
            yield
        finally:
            with self._changed:
                self._is_awaited = False
                self._changed.notify_all()

    @contextlib.contextmanager
    def limited_to(self, depth: int) -> Iterator[None]:
        """Inside, calls that begin here work on stacks of at most so many stages."""
        with self._limit.holding(depth):
            yield

    @contextlib.contextmanager
    def weighted_by(self, gate: Gate) -> Iterator[None]:
        """Inside, calls that begin here ask this gate."""
        with self._gate.holding(gate):
            yield

    @contextlib.contextmanager
    def computing(self, routing: Routing) -> Iterator[None]:
        """Around what touches adapters: a stopped call is waited for until it has left here."""
        with self._changed:
            refuse_stopped(routing)
            self._passes[routing] += 1
        try:
            yield
        finally:
            self._leave(self._passes, routing)

    def _leave(self, counter: Counter[Routing], routing: Routing) -> None:
        with self._changed:
            counter[routing] -= 1
            if not counter[routing]:
                del counter[routing]
                self._changed.notify_all()

    def switch(self, routing: Routing) -> float:
        """Let new calls work on another routing; returns for how many seconds that held them up."""
        started = time.perf_counter()
        with self._changed:
            # Caches are compared by route: the same stacks keep theirs, and with it caches stay good.
            if routing.identity != self.routing.identity:
                self.routing = routing
            else:
                self.routing = self.routing.with_gate(routing.gate, routing.gate_top_k)
        return time.perf_counter() - started

    def wait_for(self, stages: frozenset[StageKey], timeout: float) -> bool:
        """
        Wait until no call uses any of the stages, those aside that were stopped: they compute no more.

        Args:
            stages (`frozenset` of [`~hf_s3t.plan.stages.StageKey`]): What shall be free.
            timeout (`float`): Seconds to wait at most.

        Returns:
            `bool`: Whether none does.
        """
        return self._wait(lambda: all(map(_is_stopped, self._using(self._calls, stages))), timeout)

    def stop(self, stages: frozenset[StageKey]) -> None:
        """
        Stop the calls that use any of the stages, and wait until none computes with them.

        A stopped call raises [`~hf_s3t.errors.CallStoppedError`] at the next adapted module it comes to.
        """
        with self._changed:
            for routing in self._using(self._calls, stages):
                if routing.route is not None:
                    routing.route.stopped.set()
        self._wait(lambda: not self._using(self._passes, stages), None)

    def _wait(self, condition: Callable[[], bool], timeout: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(condition, timeout)

    def _using(self, counter: Counter[Routing], stages: frozenset[StageKey]) -> list[Routing]:
        return [routing for routing in counter if routing.stages & stages]


def _is_stopped(routing: Routing) -> bool:
    return routing.route is not None and routing.route.stopped.is_set()


def refuse_stopped(routing: Routing) -> None:
    """
    Raise if a deletion stopped the calls on a routing.

    Raises:
        [`~hf_s3t.errors.CallStoppedError`]: With what to do.
    """
    if routing.route is not None:
        routing.route.refuse_stopped()
