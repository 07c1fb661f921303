"""Servers for tests: a tiny system on a port of this machine, and clients that ask it."""

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from hf_s3t import S3TModel
from hf_s3t.folder.secret import KEY_VARIABLE
from hf_s3t.model.gates import RECORDED
from hf_s3t.server.app import create_app
from hf_s3t.server.keys import Keys
from hf_s3t.server.service import Service
from hf_s3t.server.settings import ServerSettings
from support.tiny import lora, make_trainer, plant_stages, tiny_llama, tokenizer_of_words


NO_KEYS = Keys({})
# Systems that were made, by the secret and the settings they were made with.
_HOME = tempfile.TemporaryDirectory(prefix="hf-s3t-served-")
_MADE: dict[tuple[str | None, str], Path] = {}


def tiny_system(path: Path, model: Any = None, *, tokenizer: Any = None, **changes) -> Path:
    """
    The folder of a system whose stages hold random numbers, its base in `base` and its tokenizer beside them. One of a
    Llama is made once: who asks for the same again has a copy, secret and all.
    """
    if model is not None or tokenizer is not None:
        return _make(path, model or tiny_llama(), tokenizer, **changes)
    asked = os.environ.get(KEY_VARIABLE), repr(sorted(changes.items()))
    if asked not in _MADE:
        _MADE[asked] = _make(Path(_HOME.name) / str(len(_MADE)), tiny_llama(), **changes)
    return shutil.copytree(_MADE[asked], path, dirs_exist_ok=True)


def served_trainer(path: Path, rows: Any = None, *, model: Any = None, **changes) -> Any:
    """A trainer of the system that [`tiny_system`] made, or is to make."""
    model = model or tiny_llama()
    # All of a layer: what a stage more or less changes is to be seen in what is generated.
    return make_trainer(path, model, rows, **{"peft_config": lora(model, target_modules="all-linear"), **changes})


def _make(path: Path, model: Any, tokenizer: Any = None, **changes) -> Path:
    model.save_pretrained(path / "base")
    plant_stages(served_trainer(path, model=model, **changes))
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


class HeldTokenizer:
    """
    A tokenizer at which batches can be held: who reads tokens waits, from some point on, until it is let go.

    Args:
        tokenizer: The tokenizer.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._changed = threading.Condition()
        self._left: int | None = None
        self._num_held = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def decode(self, *args: Any, **kwargs: Any) -> str:
        """As the tokenizer's, when it is let."""
        with self._changed:
            if self._left is not None:
                self._left -= 1
                if self._left < 0:
                    self._num_held += 1
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: self._left is None or self._left >= 0, 60)
                    self._num_held -= 1
        return self._tokenizer.decode(*args, **kwargs)

    def hold(self, after: int = 0) -> None:
        """Hold who decodes from now on, but for some times."""
        with self._changed:
            self._left = after

    def let_go(self) -> None:
        """Hold nobody any more."""
        with self._changed:
            self._left = None
            self._changed.notify_all()

    def is_holding(self, batches: int = 1) -> None:
        """Wait until so many batches are held."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._num_held >= batches, 60):
                raise RuntimeError(f"{self._num_held} batches are held, and not {batches}.")
