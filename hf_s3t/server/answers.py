"""From the rows of a request to its response: collected or streamed, given up in time, and known until handed out."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from .batching import Batcher, Item
from .problems import Problem


class GivenPart(Protocol):
    """What batches give of a row: parts of a text, say."""

    @property
    def is_last(self) -> bool:
        """Whether the row has no more."""
        ...


Given = TypeVar("Given", bound=GivenPart)
# Whatever proxies a stream is not to hold its events back.
OF_STREAMS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
# Seconds for a last word to a client that does not read.
_LAST_WORD = 1.0


class Answer(Generic[Given]):
    """
    What a request gets, while its rows run in other threads.

    Args:
        timeout (`float`): Seconds from now until it is given up.
    """

    def __init__(self, timeout: float):
        self.since = time.monotonic()
        self._deadline, self._timeout = self.since + timeout, timeout
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[tuple[int, Given | Problem]] = asyncio.Queue()
        self.items: list[Item] = []
        # Its last byte was handed to the network, or will never be.
        self.is_handed_out = asyncio.Event()
        # Why no more of it is handed out, also of what is computed already.
        self.is_cut = asyncio.Event()
        self._cut: Problem | None = None
        # How many tokens its prompt has, and all its choices; known when it is complete.
        self.tokens: tuple[int, int] | None = None

    def put_for(self, index: int) -> Callable[[Given | Problem], None]:
        """What the row of a number gives its parts to, from any thread."""

        def put(given: Given | Problem) -> None:
            # Where the loop is closed nobody waits.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._events.put_nowait, (index, given))

        return put

    async def next(self) -> tuple[int, Given]:
        """
        The next part, and the number of its row.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: If a row has none; 504 if it took too long.
        """
        try:
            async with asyncio.timeout_at(self._loop.time() + self._deadline - time.monotonic()):
                index, given = await self._events.get()
        except TimeoutError:
            raise self._late() from None
        if self._cut is not None:
            raise self._cut
        if isinstance(given, Problem):
            raise given
        return index, given

    async def parts(self) -> AsyncIterator[tuple[int, Given]]:
        """
        All parts as they come, each with the number of its row.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: As [`Answer.next`].
        """
        left = len(self.items)
        while left:
            index, given = await self.next()
            left -= given.is_last
            yield index, given

    async def all(self) -> list[Given]:
        """
        The last part of each row, in their order: of rows that are not streamed the only one.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: As [`Answer.next`].
        """
        last = {index: given async for index, given in self.parts()}
        return [last[index] for index in range(len(self.items))]

    @property
    def seconds(self) -> float:
        """How long ago it was asked for."""
        return time.monotonic() - self.since

    def oldest_mark(self) -> int | None:
        """What was known of deletions when the oldest of its batches began; `None` if none has."""
        return min((item.mark for item in self.items if item.mark is not None), default=None)

    def is_older(self, mark: int) -> bool:
        """Whether one of its batches began when fewer deletions were known than now, by their mark."""
        oldest = self.oldest_mark()
        return oldest is not None and oldest < mark

    def close(self) -> None:
        """End what still runs for it."""
        for item in self.items:
            item.is_cancelled = True
        self.is_handed_out.set()

    def cut(self) -> None:
        """Have it end now, with an error: nothing more of it is handed out."""
        self._give_up(Problem(503, "An erasure did not wait for this answer.", "stopped_by_erasure"))

    async def end_of_patience(self) -> None:
        """Return when it was cut, or when its time is over, a moment after [`Answer.next`] says so."""
        try:
            async with asyncio.timeout_at(self._loop.time() + self._deadline - time.monotonic() + _LAST_WORD):
                await self.is_cut.wait()
        except TimeoutError:
            self._give_up(self._late())

    @property
    def why_cut(self) -> Problem:
        """What is told of it where no more of it is handed out."""
        return self._cut or self._late()

    def _late(self) -> Problem:
        message = f"The answer took longer than {self._timeout:g} seconds. Ask for less, or later."
        return Problem(504, message, "timeout")

    def _give_up(self, why: Problem) -> None:
        self._cut = why
        self.is_cut.set()
        for item in self.items:
            item.is_cancelled = True


class Answers:
    """
    The answers that are not handed out yet.

    An erasure is acknowledged when no call computes with what it removed, and what such calls had computed has left
    the server: see [`Answers.settled`].

    Args:
        mark (callable): What is known of deletions now: a number that each raises.
        timeout (`float`): Seconds that an answer may take.
    """

    def __init__(self, mark: Callable[[], int], timeout: float):
        self._mark, self._timeout = mark, timeout
        self._open: set[Answer[Any]] = set()

    def __len__(self) -> int:
        return len(self._open)

    def open(self) -> Answer[Any]:
        """A new one, of the running event loop."""
        answer: Answer[Any] = Answer(self._timeout)
        self._open.add(answer)
        return answer

    def close(self, answer: Answer[Any]) -> None:
        """It is handed out, or nobody waits for it any more."""
        answer.close()
        self._open.discard(answer)

    async def settled(self, timeout: float, cuts: bool = True) -> int:
        """
        Wait until each answer is handed out of which a part was computed before the last deletion.

        Call it in the event loop of the app, when `model.unlearn` has returned and before that is acknowledged.

        Args:
            timeout (`float`): Seconds to wait at most.
            cuts (`bool`, defaults to `True`): Whether they end with an error then.

        Returns:
            `int`: How many were not handed out by then.
        """
        now = self._mark()
        old = [answer for answer in self._open if answer.is_older(now)]
        if not old:
            return 0
        waits = [asyncio.ensure_future(answer.is_handed_out.wait()) for answer in old]
        await asyncio.wait(waits, timeout=timeout)
        # What was stopped may have begun again meanwhile, on what is left.
        late = {
            answer: wait
            for answer, wait in zip(old, waits, strict=True)
            if answer.is_older(now) and not answer.is_handed_out.is_set()
        }
        for answer in late if cuts else ():
            answer.cut()
        if late and cuts:
            # Until whoever sent them has stopped: a client that reads on gets nothing of what was computed for it.
            await asyncio.wait(late.values())
        for wait in waits:
            wait.cancel()
        return len(late)


class AnswerResponse(Response):
    """
    A response that is made while it is sent, and given up when its client goes.

    Args:
        answers ([`Answers`]): Those of the service.
        answer ([`Answer`]): This one.
        collected (callable): Gives the body, of an answer that is not streamed.
        streamed (async iterator of `dict`, *optional*): Its events, of one that is.
    """

    def __init__(
        self,
        answers: Answers,
        answer: Answer[Any],
        collected: Callable[[], Awaitable[dict[str, Any]]] | None = None,
        streamed: AsyncIterator[dict[str, Any]] | None = None,
    ):
        super().__init__()
        self._answers, self._answer, self._collected, self._streamed = answers, answer, collected, streamed
        self._has_begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any response."""
        work = asyncio.ensure_future(self._respond(scope, receive, self._noting(send)))
        gone = asyncio.ensure_future(_disconnected(receive))
        cut = asyncio.ensure_future(self._answer.end_of_patience())
        try:
            await asyncio.wait({work, gone, cut}, return_when=asyncio.FIRST_COMPLETED)
            is_cut = cut.done() and not gone.done()
            if is_cut:
                # Also where it waits for a client that does not read.
                work.cancel()
        finally:
            for task in (work, gone, cut):
                task.cancel()
            await asyncio.gather(work, gone, cut, return_exceptions=True)
            self._answers.close(self._answer)
            if self._answer.tokens is not None:
                scope["hf_s3t.tokens"] = self._answer.tokens
        if not work.cancelled():
            work.result()
        elif is_cut:
            await self._end(scope, send)

    def _noting(self, send: Send) -> Send:
        async def note_and_send(message: Message) -> None:
            self._has_begun = True
            await send(message)

        return note_and_send

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._collected is not None:
            await JSONResponse(await self._collected())(scope, receive, send)
        elif self._streamed is not None:
            await _send_events(self._streamed, scope, send)

    async def _end(self, scope: Scope, send: Send) -> None:
        """Say why there is no more."""
        problem = self._answer.why_cut
        if not self._has_begun:
            raise problem
        scope["hf_s3t.ended_with"] = problem.status
        if self._streamed is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LAST_WORD):
                    await _send_last(_event(problem.body), send)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue


async def _send_events(events: AsyncIterator[dict[str, Any]], scope: Scope, send: Send) -> None:
    """Send a stream of server-sent events; what goes wrong before the first one is a response of its own."""
    first = await anext(events)
    encoded = [(name.encode(), value.encode()) for name, value in OF_STREAMS.items()]
    await send({"type": "http.response.start", "status": 200, "headers": encoded})
    await _send_event(first, send)
    try:
        async for event in events:
            await _send_event(event, send)
        last = b"data: [DONE]\n\n"
    except Problem as problem:
        # As clients of OpenAI's API tell an error within a stream.
        last = _event(problem.body)
        scope["hf_s3t.ended_with"] = problem.status
    await _send_last(last, send)


async def _send_last(last: bytes, send: Send) -> None:
    await send({"type": "http.response.body", "body": last, "more_body": False})


async def _send_event(event: dict[str, Any], send: Send) -> None:
    await send({"type": "http.response.body", "body": _event(event), "more_body": True})


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


def submit(
    batcher: Batcher[Any], answers: Answers, answer: Answer[Any], items: Sequence[Item], is_alone: bool = False
) -> None:
    """
    Have the rows of an answer run.

    Raises:
        [`~hf_s3t.server.problems.Problem`]: If they are refused; the answer is closed then.
    """
    answer.items = list(items)
    try:
        batcher.submit(items, is_alone)
    except Problem:
        answers.close(answer)
        raise
