"""Which rows go through the model together: those of equal settings, the oldest first, and none joins later."""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from ..errors import CallStoppedError
from .measuring import Metrics
from .problems import RETRY_SOON, Problem, problem_of
from .settings import ServerSettings


logger = logging.getLogger(__name__)

# How often a batch waits once more because another row came while it did.
_MOST_WAITS = 4


class Item:
    """
    A row of a batch, and what became of it.

    Args:
        key (hashable): Rows of equal keys may go through the model together.
        fail (callable): Told the problem, from any thread, where there is no answer.
    """

    def __init__(self, key: Hashable, fail: Callable[[Problem], None]):
        self.key, self._fail = key, fail
        # Whoever asked for it is gone.
        self.is_cancelled = False
        # Something of its answer was handed out, and all of it.
        self.has_sent = self.is_ended = False
        # What was known of deletions when its batch began; `None` while it waits.
        self.mark: int | None = None

    def fail(self, problem: Problem) -> None:
        """There will be no answer, or no more of it."""
        self.is_ended = True
        self._fail(problem)

    def begin_again(self) -> None:
        """Forget what was computed, of which nothing was handed out."""
        self.mark = None


SomeItem = TypeVar("SomeItem", bound=Item)


@dataclass
class _Request(Generic[SomeItem]):
    """What of a request waits."""

    items: list[SomeItem]
    is_alone: bool
    since: float = field(default_factory=time.monotonic)


class Batcher(Generic[SomeItem]):
    """
    Runs rows in batches, several at once, each in a thread of its own.

    A batch takes the oldest row that waits, and others of the same key up to `max_batch_size`. Nothing joins it once
    it has begun: what comes after a deletion never runs beside what began before. A batch that a deletion stopped is
    begun again with the rows of which nothing was handed out; the others fail.

    Args:
        run (callable): Runs the rows of one batch; returns when each has ended, or raises.
        mark (callable): What is known of deletions now: a number that each raises.
        settings ([`~hf_s3t.server.settings.ServerSettings`]): How large batches are, how many, and how much may wait.
        metrics ([`~hf_s3t.server.measuring.Metrics`]): Told of each batch.
    """

    def __init__(
        self,
        run: Callable[[Sequence[SomeItem]], None],
        mark: Callable[[], int],
        settings: ServerSettings,
        metrics: Metrics,
    ):
        self._run, self._mark, self._settings, self._metrics = run, mark, settings, metrics
        self._changed = threading.Condition()
        # Of two threads one collects rows; the other would take some of them away.
        self._collecting = threading.Lock()
        self._waiting: deque[_Request[SomeItem]] = deque()
        self._running: list[list[SomeItem]] = []
        self._is_alone = self._is_stopping = False
        self._threads: list[threading.Thread] = []

    @property
    def num_waiting(self) -> int:
        """How many requests wait, with some of their rows at least."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """How many batches are under way."""
        return len(self._running)

    def submit(self, items: Sequence[SomeItem], is_alone: bool = False) -> None:
        """
        Have the rows of a request run.

        Args:
            items (sequence of [`Item`]): The rows.
            is_alone (`bool`, defaults to `False`): Whether they run together, and nothing beside them.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: 429 if too many wait, 503 if the server is being stopped.
        """
        with self._changed:
            if self._is_stopping:
                raise Problem(503, "The server is being stopped.", "stopping", headers={"Retry-After": "5"})
            if len(self._waiting) >= self._settings.max_queue:
                message = f"{len(self._waiting)} requests wait already. Ask again in a moment."
                raise Problem(429, message, "queue_full", headers={"Retry-After": str(RETRY_SOON)})
            self._waiting.append(_Request(list(items), is_alone))
            self._changed.notify_all()

    def start(self) -> None:
        """Begin to run what comes."""
        for number in range(self._settings.max_concurrent_batches):
            thread = threading.Thread(target=self._work, name=f"hf-s3t-batches-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()

    def stop(self) -> None:
        """Refuse what comes, fail what waits, end what runs, and return when nothing does."""
        with self._changed:
            self._is_stopping = True
            left = [item for request in self._waiting for item in request.items]
            self._waiting.clear()
            for batch in self._running:
                for item in batch:
                    item.is_cancelled = True
            self._changed.notify_all()
        for item in left:
            item.fail(Problem(503, "The server was stopped.", "stopping"))
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while True:
            with self._collecting:
                batch = self._collect()
            if batch is None:
                return
            with self._under_way(batch):
                self._run_once(batch)

    def _collect(self) -> list[SomeItem] | None:
        """The next batch; `None` if there will be none."""
        with self._changed:
            while not self._is_stopping:
                self._forget_cancelled()
                first = self._waiting[0] if self._waiting else None
                if first is None or self._is_alone or (first.is_alone and self._running):
                    # Nothing overtakes a request that has to be alone.
                    self._changed.wait()
                elif first.is_alone:
                    self._waiting.popleft()
                    self._is_alone = True
                    return first.items
                elif self._running and (left := self._settings.overlap_wait - time.monotonic() + first.since) > 0:
                    self._changed.wait(left)
                elif self._is_worth_waiting(first):
                    self._wait_for_more(first)
                else:
                    return self._take(first.items[0].key)
        return None

    def _is_worth_waiting(self, first: "_Request[SomeItem]") -> bool:
        waited = time.monotonic() - first.since
        return waited < self._settings.batch_wait and self._count(first) < self._settings.max_batch_size

    def _wait_for_more(self, first: "_Request[SomeItem]") -> None:
        """Until nothing comes any more, or the batch is full: clients whose answers ended together ask together."""
        wait = self._settings.batch_wait
        last = first.since + _MOST_WAITS * wait
        while (until := min(self._waiting[-1].since + wait, last) - time.monotonic()) > 0:
            if self._count(first) >= self._settings.max_batch_size or self._is_stopping:
                break
            self._changed.wait(until)
            self._forget_cancelled()
            if not self._waiting or self._waiting[0] is not first:
                break

    def _count(self, first: "_Request[SomeItem]") -> int:
        key = first.items[0].key
        return sum(item.key == key for request in self._waiting if not request.is_alone for item in request.items)

    def _take(self, key: Hashable) -> list[SomeItem]:
        batch: list[SomeItem] = []
        for request in self._waiting:
            # What came after one that has to be alone waits for it too.
            if request.is_alone:
                break
            room = self._settings.max_batch_size - len(batch)
            batch += [item for item in request.items if item.key == key][:room]
        taken = set(map(id, batch))
        for request in self._waiting:
            request.items = [item for item in request.items if id(item) not in taken]
        self._waiting = deque(request for request in self._waiting if request.items)
        return batch

    def _forget_cancelled(self) -> None:
        for request in self._waiting:
            request.items = [item for item in request.items if not item.is_cancelled]
        self._waiting = deque(request for request in self._waiting if request.items)

    @contextlib.contextmanager
    def _under_way(self, batch: list[SomeItem]) -> Iterator[None]:
        with self._changed:
            self._running.append(batch)
            # Before it takes the stages that answer now.
            mark = self._mark()
            for item in batch:
                item.mark = mark
                item.is_cancelled |= self._is_stopping
        try:
            yield
        finally:
            with self._changed:
                self._running = [other for other in self._running if other is not batch]
                self._is_alone = False
                self._changed.notify_all()

    def _run_once(self, batch: list[SomeItem]) -> None:
        self._metrics.batch(len(batch))
        try:
            self._run(batch)
        except CallStoppedError as error:
            self._begin_again(batch, problem_of(error))
        except Exception as error:
            problem = problem_of(error)
            if problem.status == 500:
                logger.exception("A batch failed.")
            for item in batch:
                if not item.is_ended:
                    item.fail(problem)

    def _begin_again(self, batch: list[SomeItem], problem: Problem) -> None:
        left = [item for item in batch if not (item.is_ended or item.is_cancelled)]
        for item in left:
            if item.has_sent:
                item.fail(problem)
        again = [item for item in left if not item.has_sent]
        for item in again:
            item.begin_again()
        if again:
            with self._changed:
                # At the front: they have waited longest. A batch that was alone is so again.
                self._waiting.appendleft(_Request(again, self._is_alone, since=0.0))
