"""Requests passed on to an engine, under the name that its adapter has there, and its answers passed back."""

import asyncio
import contextlib
import json
import time
from collections.abc import Mapping
from typing import Any

import anyio
import httpx2
from anyio import to_thread
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send
from transformers.utils import logging

from ...errors import CallStoppedError, ExhaustedError
from ..answers import OF_STREAMS
from ..measuring import Metrics
from ..problems import Problem, problem_of
from ..settings import ServerSettings
from .model import EngineModel
from .vllm import CONNECT_TIMEOUT, EngineError, authorization


logger = logging.get_logger(__name__)

# What a client may say of itself, and an engine need not know.
_KEPT_HERE = ("user", "metadata", "store")
# Seconds after which a client may ask again: while the engine is loading, and when it cannot be reached.
_RETRY_LOADING, _RETRY_DOWN = 1, 5
# How often a stack is loaded anew for one request, because the engine lacks it.
_RELOADS = 2
_LOOK_AGAIN = 1.0


class Engine:
    """
    What answers in a model's place.

    Args:
        model ([`~hf_s3t.server.engine.model.EngineModel`]): The system.
        name (`str`): What clients call it.
        settings ([`~hf_s3t.server.settings.ServerSettings`]): The limits of this server.
        metrics ([`~hf_s3t.server.measuring.Metrics`]): What is told of answers.
        key (`str`, *optional*): The key that the engine was started with.
    """

    def __init__(
        self, model: EngineModel, name: str, settings: ServerSettings, metrics: Metrics, key: str | None = None
    ):
        self.model, self.settings, self.metrics = model, settings, metrics
        # As it stands inside of a JSON text.
        self.public_name = json.dumps(name)[1:-1].encode()
        self.url = model.switch.vllm.address.url
        self._key = key
        self._client: httpx2.AsyncClient | None = None
        self._following: asyncio.Task[None] | None = None
        self._under_way = 0

    def complete(self, path: str, body: Mapping[str, Any], is_stream: bool) -> "PassedOn":
        """
        The engine's answer to a request.

        Args:
            path (`str`): `"/completions"` or `"/chat/completions"`.
            body (mapping): The request, checked. Its `model` is replaced.
            is_stream (`bool`): Whether it is answered by server-sent events.

        Returns:
            [`PassedOn`]: The response, which asks the engine when it is sent.
        """
        return PassedOn(self, path, {k: v for k, v in body.items() if k not in _KEPT_HERE}, is_stream)

    def switch(self, on_running: str = "wait", timeout: float = 60.0) -> dict[str, Any]:
        """
        Do at the engine what a deletion asks for and is not done yet, and say what of it is confirmed. It waits:
        call it in a thread.

        Args:
            on_running (`str`, defaults to `"wait"`): As in [`~hf_s3t.S3TModel.unlearn`].
            timeout (`float`, defaults to 60): The same.

        Returns:
            `dict`: See [`~hf_s3t.server.engine.switching.Switch.receipt`].
        """
        if self.model.switch.has_work:
            self.model.try_again(on_running, timeout)
        return self.model.switch.receipt()

    def receipt(self) -> dict[str, Any]:
        """What is confirmed of what was taken back; see [`~hf_s3t.server.engine.switching.Switch.receipt`]."""
        return self.model.switch.receipt()

    def status(self) -> dict[str, Any]:
        """Where the engine stands; see [`~hf_s3t.server.engine.switching.Switch.status`]."""
        return self.model.switch.status()

    def end(self) -> None:
        """Leave nothing at the engine, and no export."""
        self.model.end()

    # What a response asks for

    @property
    def room(self) -> int | None:
        """How many tokens the engine takes, prompt and answer together; `None` if it did not say."""
        return self.model.switch.vllm.room

    @property
    def client(self) -> httpx2.AsyncClient:
        """Through which requests are passed on, of the event loop that asks first."""
        if self._client is None:
            # How long an answer may take is this server's to say; no proxy of the environment reads it.
            timeout = httpx2.Timeout(None, connect=CONNECT_TIMEOUT)
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=self.settings.max_queue)
            headers = {"Accept-Encoding": "identity", **authorization(self._key)}
            self._client = httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits, trust_env=False)
        return self._client

    @contextlib.contextmanager
    def place(self) -> Any:
        """One of the places for requests under way; refused with 429 when all are taken."""
        if self._under_way >= self.settings.max_queue:
            raise Problem(
                429,
                f"{self._under_way} requests are under way, and no more are taken. Ask again later.",
                "queue_full",
                headers={"Retry-After": str(_RETRY_LOADING)},
            )
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1

    async def lease(self, scope: anyio.CancelScope) -> Any:
        """
        A lease on what serves by what the folder says now.

        Args:
            scope (`anyio.CancelScope`): What is cancelled when a deletion wants the request to end.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: If nothing is passed on.
        """
        loop, names = asyncio.get_running_loop(), self.model.switch.names

        def stop() -> None:
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(scope.cancel)

        while True:
            version = names.version
            if self.model.is_behind():
                self._follow()
            else:
                lease = names.take(stop)
                if lease is not None:
                    return lease
                if names.why is not None:
                    raise _unavailable(names.why)
            await names.wait_for_change(version, _LOOK_AGAIN)

    def _follow(self) -> None:
        """Have one thread follow the folder, for all requests that wait for that."""
        if self._following is not None and self._following.done():
            error, self._following = self._following.exception(), None
            if error is not None:
                raise problem_of(error)
        if self._following is None:
            self._following = asyncio.create_task(to_thread.run_sync(self.model.follow))
            self._following.add_done_callback(lambda task: self.model.switch.names.tell())


class PassedOn(Response):
    """
    A response that is asked of the engine while it is sent.

    A client that goes away, and a deletion, close the connection to the engine, which then computes no more. What a
    deletion stopped is asked again of what is left, if nothing was sent of it yet.

    Args:
        engine ([`Engine`]): The engine.
        path (`str`): The path below the engine's `/v1`.
        fields (mapping): The request.
        is_stream (`bool`): Whether it is answered by server-sent events.
    """

    def __init__(self, engine: Engine, path: str, fields: Mapping[str, Any], is_stream: bool):
        super().__init__()
        self._engine, self._path, self._fields, self._is_stream = engine, path, fields, is_stream
        # The engine says what a stream took only if it is asked to, and it is counted here for each.
        self._tells_usage = "stream_options" in fields
        if is_stream:
            self._fields = {**fields, "stream_options": {"include_usage": True}}
        self._has_begun = self._was_cut = False
        self._began = time.perf_counter()
        self._scope: Scope = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As any ASGI app."""
        error: Exception | None = None
        self._scope = scope
        async with anyio.create_task_group() as group:

            async def end_when_gone() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                group.cancel_scope.cancel()

            group.start_soon(end_when_gone)
            try:
                await self._answer(send)
            except Exception as problem:
                error = problem
            group.cancel_scope.cancel()
        if error is not None and not self._has_begun:
            raise error
        if error is not None:
            # The status was sent: the stream says it, and ends without its last word.
            told = problem_of(error)
            scope["hf_s3t.ended_with"] = told.status
            await self._send_event(send, told)

    async def _answer(self, send: Send) -> None:
        reloads = 0
        try:
            with self._engine.place():
                async with asyncio.timeout(self._engine.settings.request_timeout):
                    while (lacking := await self._attempt(send)) is not None:
                        reloads += bool(lacking)
                        if reloads > _RELOADS:
                            raise _unavailable(None)
                        if lacking:
                            await to_thread.run_sync(self._engine.model.reload, lacking)
        except EngineError as error:
            logger.error(f"What serves could not be loaded anew: {error}")
            raise _unavailable(None) from error
        except TimeoutError:
            raise Problem(504, "The answer took too long and was given up. Ask for fewer tokens.", "timeout") from None

    async def _attempt(self, send: Send) -> str | None:
        """Ask once: `None` when the answer is sent, a name that the engine lacks, `""` if a deletion stopped it."""
        names = self._engine.model.switch.names
        with anyio.CancelScope() as scope:
            lease = await self._engine.lease(scope)
            try:
                if await self._exchange(lease.loaded.name, send):
                    return None
                return str(lease.loaded.name)
            except httpx2.TransportError as error:
                if not self._may_ask_again(error):
                    raise _down(error) from error
            finally:
                names.release(lease)
        if self._has_begun:
            raise CallStoppedError("A deletion removed a stage that was answering, and stopped the answer. Ask again.")
        return ""

    def _may_ask_again(self, error: httpx2.TransportError) -> bool:
        """Whether a connection may only have been too old: one that was kept since the engine was restarted, say."""
        is_first, self._was_cut = not self._was_cut, True
        return is_first and not self._has_begun and not isinstance(error, httpx2.ConnectError)

    async def _exchange(self, name: str, send: Send) -> bool:
        """Ask the engine, and send its answer; `False` if it lacks the name."""
        engine, body = self._engine, {**self._fields, "model": name}
        async with engine.client.stream("POST", f"{engine.url}{self._path}", json=body) as answer:
            if answer.status_code != 200:
                content = await answer.aread()
                if answer.status_code == 404 and name.encode() in content:
                    return False
                self._refuse_of_engine(answer.status_code, content)
                await self._send_whole(send, answer, content, name)
            elif self._is_stream:
                await self._send_lines(send, answer, name)
            else:
                await self._send_whole(send, answer, await answer.aread(), name)
        return True

    def _refuse_of_engine(self, status: int, content: bytes) -> None:
        """Raise where what an engine says is not about the request."""
        if status in (401, 403):
            logger.error(f"The engine at {self._engine.url} refuses this server's key (HF_S3T_ENGINE_KEY).")
            raise _unavailable(None)
        if status >= 500:
            logger.error(f"The engine at {self._engine.url} failed at a request with status {status}.")
            raise Problem(502, "The engine behind this server failed at this request.", "engine_failed")

    async def _send_whole(self, send: Send, answer: httpx2.Response, content: bytes, name: str) -> None:
        content = content.replace(name.encode(), self._engine.public_name)
        kind = answer.headers.get("content-type", "application/json")
        headers = {"content-type": kind, "content-length": str(len(content))}
        if "retry-after" in answer.headers:
            headers["retry-after"] = answer.headers["retry-after"]
        self._count(content)
        await self._begin(send, answer.status_code, headers)
        await send({"type": "http.response.body", "body": content})

    async def _send_lines(self, send: Send, answer: httpx2.Response, name: str) -> None:
        """Each line as it comes: a name may lie on both sides of where the engine's bytes were cut."""
        held, secret = b"", name.encode()
        async for chunk in answer.aiter_raw():
            whole, newline, held = (held + chunk).rpartition(b"\n")
            if newline:
                await self._send_some(send, (whole + newline).replace(secret, self._engine.public_name))
        await self._send_some(send, held.replace(secret, self._engine.public_name))
        await send({"type": "http.response.body", "body": b""})

    async def _send_some(self, send: Send, lines: bytes) -> None:
        if not self._has_begun:
            self._engine.metrics.first_token(time.perf_counter() - self._began)
            await self._begin(send, 200, OF_STREAMS)
        kept: list[bytes] = []
        for line in lines.split(b"\n"):
            is_of_usage = b'"usage":{' in line
            if is_of_usage:
                self._count(line.removeprefix(b"data: "))
            if self._tells_usage or not (is_of_usage and b'"choices":[]' in line):
                kept.append(line)
        await send({"type": "http.response.body", "body": b"\n".join(kept), "more_body": True})

    async def _begin(self, send: Send, status: int, headers: Mapping[str, str]) -> None:
        self._has_begun = True
        encoded = [(k.encode(), v.encode()) for k, v in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": encoded})

    async def _send_event(self, send: Send, problem: Problem) -> None:
        if self._is_stream:
            body = f"data: {json.dumps(problem.body)}\n\n".encode()
            await send({"type": "http.response.body", "body": body})

    def _count(self, content: bytes) -> None:
        """Tell of the tokens that an answer says it took."""
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
            usage = json.loads(content)["usage"]
            tokens = int(usage["prompt_tokens"]), int(usage.get("completion_tokens") or 0)
            self._engine.metrics.tokens(*tokens)
            self._scope["hf_s3t.tokens"] = tokens


def _down(error: Exception) -> Problem:
    message = "The engine behind this server cannot be reached, or broke off. Ask again later."
    logger.error(f"A request could not be passed on to the engine ({type(error).__name__}).")
    return Problem(503, message, "engine_down", headers={"Retry-After": str(_RETRY_DOWN)})


def _unavailable(why: Exception | None) -> Problem:
    """What a client is told while nothing is passed on. Sentences of the engine or the disk are for the log."""
    if isinstance(why, ExhaustedError):
        return problem_of(why)
    message = "The engine behind this server has not loaded what serves. Ask again later."
    return Problem(503, message, "engine_not_ready", headers={"Retry-After": str(_RETRY_DOWN)})
