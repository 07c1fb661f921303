"""Servers for tests: a tiny system on a port of this machine, and clients that ask it."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from hf_s3t import S3TModel
from hf_s3t.model.gates import RECORDED
from hf_s3t.server.app import create_app
from hf_s3t.server.keys import Keys
from hf_s3t.server.service import Service
from hf_s3t.server.settings import ServerSettings
from support.tiny import make_trainer, plant_stages, tiny_llama, tokenizer_of_words


NO_KEYS = Keys({})


def tiny_system(path: Path, model: Any = None, *, tokenizer: Any = None, **changes) -> Path:
    """The folder of a system whose stages hold random numbers, its base in `base` and its tokenizer beside them."""
    model = model if model is not None else tiny_llama()
    model.save_pretrained(path / "base")
    plant_stages(make_trainer(path, model, **changes))
    (tokenizer or tokenizer_of_words()).save_pretrained(path)
    return path


def service_of(
    path: Path, processor: Any = None, *, keys: Keys = NO_KEYS, gate: Any = RECORDED, **settings
) -> Service:
    """The service of a system that [`tiny_system`] made; `settings` are the server's."""
    model = S3TModel.from_pretrained(path, base_model=str(path / "base"), gate=gate)
    return Service(model, processor or tokenizer_of_words(), ServerSettings(**settings), keys)


@contextlib.contextmanager
def listening(app: Any, **config) -> Iterator[str]:
    """An app on a free port of 127.0.0.1, served by a thread: gives its URL, and ends it."""
    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets=None):
            await super().startup(sockets)
            ready.set()

    server = Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error", **config))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        if not ready.wait(30) or not server.started:
            raise RuntimeError("The server did not start.")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(30)


@contextlib.contextmanager
def serving(path: Path, processor: Any = None, **settings) -> Iterator[tuple[str, Service]]:
    """A system on a port: gives the URL and the service; see [`service_of`]."""
    service = service_of(path, processor, **settings)
    with listening(create_app(service)) as url:
        yield url, service
