"""What keeps one client from taking what others need: how large a body is, and how long a request may take to come."""

import asyncio
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from .problems import Problem
from .settings import ServerSettings


class BodyLimits:
    """
    Reads the body of a request before its route does: refuses one that is too large or too slow.

    Nothing of a body that is refused is kept. One that comes in chunks without a length is counted as it comes.

    Args:
        app (ASGI app): What gets the whole body.
        settings ([`~hf_s3t.server.settings.ServerSettings`]): The limits.
    """

    def __init__(self, app: ASGIApp, settings: ServerSettings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any ASGI app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except Problem as problem:
            # What of the body is still to come is not read: the connection is of no more use.
            problem.headers["Connection"] = "close"
            await problem.response()(scope, receive, send)
            return
        if body is not None:
            await self._app(scope, _given_first(body, receive), send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        """The body; `None` if the client went away."""
        length = headers.get("content-length", "")
        if length.isdigit() and int(length) > self._settings.max_body_bytes:
            raise self._too_large()
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    chunks.append(message.get("body", b""))
                    size += len(chunks[-1])
                    if size > self._settings.max_body_bytes:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError:
            seconds = self._settings.body_timeout
            raise Problem(408, f"The body did not come within {seconds:g} seconds.", "body_timeout") from None

    def _too_large(self) -> Problem:
        most = self._settings.max_body_bytes
        return Problem(413, f"The body is larger than {most} bytes. Send less at once.", "body_too_large")


def impatient(seconds: float) -> type[H11Protocol]:
    """
    The protocol of a server that closes connections on which no request comes, or only slowly: each takes a file
    descriptor of the process, which opens the system's files too.

    Args:
        seconds (`float`): How long the head of a request may take, counted since the connection or the last answer.
    """

    class Impatient(H11Protocol):
        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            self.loop.call_later(seconds, self._look, None)

        def _look(self, before: object) -> None:
            """Close it if nothing is being answered, and nothing was at the last look or has been since."""
            if self.transport.is_closing():
                return
            is_answering = self.cycle is not None and not self.cycle.response_complete
            if self.cycle is before and not is_answering:
                self.transport.close()
            else:
                self.loop.call_later(seconds, self._look, self if is_answering else self.cycle)

    return Impatient


def _given_first(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive_again() -> Message:
        with suppress(IndexError):
            return waiting.pop()
        return await receive()

    return receive_again
