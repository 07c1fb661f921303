"""An engine for tests: it keeps adapters as vLLM does, and answers with what it was given to load."""

import asyncio
import contextlib
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, StreamingResponse


def adapter_digest(folder: str | Path) -> str:
    """By which the answers of an adapter are told from those of others: of its tensors' file."""
    return hashlib.sha256((Path(folder) / "adapter_model.safetensors").read_bytes()).hexdigest()


class FakeVllm:
    """
    A server with the routes of vLLM that are used. A completion's text is the digest of the adapter's file as it was
    when it was loaded, once for each token that was asked for.

    A request whose prompt has the word `slow` gets its first word, and the others when `go` is called.
    """

    def __init__(self) -> None:
        self.url = ""
        self.loaded: dict[str, str] = {}
        self.digests: dict[str, str] = {}
        # All names that were ever loaded, in order, and every request with the name that it was for.
        self.history: list[str] = []
        self.requests: list[tuple[str, dict]] = []
        self.headers: list[dict] = []
        self.broken_off: list[str] = []
        self.under_way: Counter[str] = Counter()
        # By route, what is answered in place of doing it: a status and a body.
        self.refusals: dict[str, tuple[int, dict]] = {}
        # Called before and after each thing that is done, with its name.
        self.watch: Callable[[str], None] = lambda step: None
        self.started = 1.0
        self.begun = threading.Event()
        self.ended = threading.Event()
        self._go: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None
        self._port = 0

    # Its life

    @contextlib.contextmanager
    def running(self) -> Iterator["FakeVllm"]:
        """It listens on 127.0.0.1."""
        self.start()
        try:
            yield self
        finally:
            self.stop()

    def start(self) -> None:
        """Start listening, on the same port as before."""
        ready = threading.Event()
        fake = self

        class Server(uvicorn.Server):
            async def startup(self, sockets=None):
                fake._loop, fake._go = asyncio.get_running_loop(), asyncio.Event()
                await super().startup(sockets)
                ready.set()

        config = uvicorn.Config(
            self._app(), host="127.0.0.1", port=self._port, log_level="error", timeout_graceful_shutdown=1
        )
        self._server = Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        if not ready.wait(30) or not self._server.started:
            raise RuntimeError("The engine did not start.")
        self._port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self._port}/v1"

    def stop(self) -> None:
        """Stop listening, and forget everything that was loaded."""
        self.go()
        self._server.should_exit = True
        self._thread.join(30)
        self.loaded.clear()
        self.digests.clear()
        self.started += 1

    def restart(self) -> None:
        """Stop and start."""
        self.stop()
        self.start()

    def go(self) -> None:
        """Let slow requests go on."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._go.set)

    # What it answers

    def _app(self) -> FastAPI:
        app = FastAPI()

        @app.post("/v1/load_lora_adapter")
        async def load(request: Request):
            body = await request.json()
            return await self._done("load", lambda: self._load(body["lora_name"], body["lora_path"]))

        @app.post("/v1/unload_lora_adapter")
        async def unload(request: Request):
            body = await request.json()
            return await self._done("unload", lambda: self._unload(body["lora_name"]))

        @app.get("/v1/models")
        async def models():
            if "models" in self.refusals:
                return self._refusal("models")
            cards = [{"id": "base", "root": "/base"}, *({"id": n, "root": p} for n, p in self.loaded.items())]
            return {"object": "list", "data": cards}

        @app.get("/metrics")
        async def metrics():
            return PlainTextResponse(f"# TYPE x gauge\nprocess_start_time_seconds {self.started:.1f}\n")

        @app.post("/v1/completions")
        @app.post("/v1/chat/completions")
        async def complete(request: Request):
            body = await request.json()
            self.requests.append((body["model"], body))
            self.headers.append(dict(request.headers))
            if "complete" in self.refusals:
                return self._refusal("complete")
            if body["model"] not in self.loaded:
                return _error(404, f"The model `{body['model']}` does not exist.")
            if body.get("stream"):
                return StreamingResponse(self._stream(body), media_type="text/event-stream")
            return await self._whole(request, body)

        return app

    def _refusal(self, step: str) -> JSONResponse:
        status, body = self.refusals[step]
        return JSONResponse(body, status)

    async def _done(self, step: str, do: Callable[[], JSONResponse | PlainTextResponse]):
        await asyncio.to_thread(self.watch, f"before {step}")
        answer = self._refusal(step) if step in self.refusals else do()
        await asyncio.to_thread(self.watch, f"after {step}")
        return answer

    def _load(self, name: str, path: str):
        if name in self.loaded:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        try:
            self.digests[name] = adapter_digest(path)
        except OSError:
            return _error(404, f"No adapter found for {path}")
        self.loaded[name] = path
        self.history.append(name)
        return PlainTextResponse(f"Success: LoRA adapter '{name}' added successfully.")

    def _unload(self, name: str):
        if name not in self.loaded:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        del self.loaded[name]
        return PlainTextResponse(f"Success: LoRA adapter '{name}' removed successfully.")

    async def _words(self, body: dict):
        """The words of an answer, one at a time; who leaves early is noted."""
        name = body["model"]
        self.under_way[name] += 1
        try:
            for number in range(body.get("max_tokens", 1)):
                if number and "slow" in body.get("prompt", ""):
                    self.begun.set()
                    await self._go.wait()
                yield self.digests[name]
        except (asyncio.CancelledError, GeneratorExit):
            self.broken_off.append(name)
            raise
        finally:
            self.under_way[name] -= 1
            self.ended.set()

    async def _stream(self, body: dict):
        made = 0
        async for word in self._words(body):
            made += 1
            choice = {"index": 0, "text": f"{word} ", "finish_reason": None}
            yield f"data: {json.dumps({'model': body['model'], 'choices': [choice]})}\n\n"
        if (body.get("stream_options") or {}).get("include_usage"):
            usage = {"prompt_tokens": 1, "completion_tokens": made, "total_tokens": 1 + made}
            last = {"model": body["model"], "choices": [], "usage": usage}
            yield f"data: {json.dumps(last, separators=(',', ':'))}\n\n"
        yield "data: [DONE]\n\n"

    async def _whole(self, request: Request, body: dict) -> JSONResponse:
        words: list[str] = []

        async def collect() -> None:
            async for word in self._words(body):
                words.append(word)

        work = asyncio.create_task(collect())
        gone = asyncio.create_task(request.receive())
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await work
        usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
        choice = {"index": 0, "text": " ".join(words), "finish_reason": "length"}
        return JSONResponse({"id": "cmpl-1", "model": body["model"], "choices": [choice], "usage": usage})


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": "NotFoundError", "code": status}}, status)
