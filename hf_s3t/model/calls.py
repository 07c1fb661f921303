"""The calls under way on a model: each works on one routing; a deletion waits for those on the old, or stops them."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from ..errors import S3TError
from ..plan.stages import StageKey
from .route import Route
from .scope import Scope


class Routing:
    """
    A snapshot of which stacks answer. Never changed: a deletion puts another in its place.

    Args:
        served (sequence of sequences of [`~hf_s3t.plan.stages.StageKey`]):
            Per shard the tips of the stacks that answer.
        digests (sequence of `str`): The digests of the files of those stages.
    """

    route_type = Route

    def __init__(self, served: Sequence[Sequence[StageKey]], digests: Sequence[str] = ()):
        self.served = tuple(tuple(tips) for tips in served)
        self.identity = (self.served, tuple(digests))
        members = tuple(tip for tips in self.served for tip in tips)
        self.route = self.route_type(members) if members else None
        alive = sum(1 for tips in self.served if tips)
        self.weights = torch.tensor([1 / (alive * len(tips)) for tips in self.served for _ in tips])
        self.stages = frozenset(key for tip in members for key in tip.lineage)
        self._cuts: dict[int, Routing] = {}

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
        return self._cuts[depth]

    @property
    def num_blocks(self) -> int:
        """How many blocks of rows a pass has: one per member, or the one of the base alone."""
        return max(1, len(self.route or ()))

    @property
    def depths(self) -> list[int]:
        """Per shard the depth of the deepest stack that answers; 0 where the shard is dead."""
        return [max((tip.depth for tip in tips), default=0) for tips in self.served]


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
        # The call whose steps are taken here, and the thread that takes them.
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
        with self._stepping.holding((threading.get_ident(), routing)):
            yield

    @property
    def of_step(self) -> Routing | None:
        """The routing of a call that is a step, if one begins here: that around it is counted, and has its turn."""
        thread, routing = self._stepping.get() or (None, None)
        return routing if thread == threading.get_ident() else None

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
