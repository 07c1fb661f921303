"""What a server writes down of its requests: JSON lines without prompts, answers, ids, keys or queries."""

import json
import logging
import sys
import time
import traceback
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, TextIO

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .measuring import Metrics


LOGGER = "hf_s3t.server"
# What a client gets that had gone before its answer: nothing; so it is written down.
GONE = 499
_WATCHING = ("/v1/status", "/metrics", "/healthz", "/readyz")
_OF_OTHERS = ("hf_s3t", "transformers", "uvicorn", "uvicorn.error")


class JsonLines(logging.Formatter):
    """
    Records as lines of JSON. Of an exception its type and where it was raised, not its words: they may be somebody's.

    Example:

    ```python
    >>> import logging

    >>> from hf_s3t.server.logs import JsonLines

    >>> record = logging.LogRecord("hf_s3t.server", logging.INFO, "", 0, "request", (), None)
    >>> record.fields = {"route": "/v1/completions", "status": 200}
    >>> JsonLines().format(record)[-62:]
    '"event": "request", "route": "/v1/completions", "status": 200}'
    ```
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        time_of = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": time_of, "level": record.levelname.lower(), "event": record.getMessage()}
        line.update(getattr(record, "fields", {}))
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__
            line["at"] = _places(record.exc_info[2])
        return json.dumps(line)


def _places(raised: TracebackType | None) -> list[str]:
    return [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(raised)[-8:]]


def start(level: str = "info", stream: TextIO | None = None) -> logging.Handler:
    """
    Have this process write its log as lines of JSON, that of its libraries too.

    Args:
        level (`str`, defaults to `"info"`): From which level on.
        stream (text file, *optional*): Where to; standard error if not given.

    Returns:
        `logging.Handler`: What writes, for `stop`.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    for name in _OF_OTHERS:
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        # What it loads, and from where, is told by nobody who serves.
        least = logging.WARNING if name == "transformers" else logging.NOTSET
        logger.setLevel(max(logging.getLevelNamesMapping()[level.upper()], least))
    # Whoever else logs through it would write the same twice.
    logging.getLogger("uvicorn.error").handlers = []
    logging.getLogger("uvicorn.error").propagate = True
    return handler


def note(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """
    Write a line.

    Args:
        event (`str`): What happened.
        level (`int`): How much it matters.
        fields: What belongs to it; nothing that names anybody.
    """
    logging.getLogger(LOGGER).log(level, event, extra={"fields": fields})


class Observed:
    """
    The outermost layer of an app: measures each request from its first byte to the last of its answer, and writes a
    line of it.

    Who answers puts `scope["hf_s3t.tokens"]`, a pair of numbers, of the prompt and of the answer; and of a stream that
    ended with an error `scope["hf_s3t.ended_with"]`, the status that it would have had.

    Args:
        app (ASGI app): What answers.
        metrics ([`~hf_s3t.server.measuring.Metrics`]): Is told of each request.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics):
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any ASGI app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen = _Seen()
        try:
            await self._app(scope, seen.receiving(receive), seen.sending(send))
        except BaseException:
            seen.status = seen.status or 500
            raise
        finally:
            self._note(scope, seen)

    def _note(self, scope: Scope, seen: "_Seen") -> None:
        seconds = time.perf_counter() - seen.started
        status = GONE if seen.has_gone or not seen.status else scope.get("hf_s3t.ended_with", seen.status)
        # Never the path itself: it may hold a name that somebody asked for.
        route = str(getattr(scope.get("route"), "path", ""))
        self._metrics.request_done(route, status, seconds)
        fields: dict[str, Any] = {"route": route, "method": scope["method"], "status": status}
        fields["ms"] = round(seconds * 1000, 1)
        tokens = scope.get("hf_s3t.tokens")
        if tokens is not None:
            fields["prompt_tokens"], fields["completion_tokens"] = tokens
        note("request", _level(route, status), **fields)


def _level(route: str, status: int) -> int:
    if status >= 500:
        return logging.WARNING
    # Whoever watches asks each second.
    return logging.DEBUG if route in _WATCHING and status < 400 else logging.INFO


class _Seen:
    """What was seen of one request."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.status, self.is_complete, self.has_gone = 0, False, False

    def receiving(self, receive: Receive) -> Receive:
        async def look_and_receive() -> Message:
            message = await receive()
            if message["type"] == "http.disconnect" and not self.is_complete:
                self.has_gone = True
            return message

        return look_and_receive

    def sending(self, send: Send) -> Send:
        async def look_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                self.is_complete = True
            await send(message)

        return look_and_send
