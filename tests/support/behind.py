"""Servers with an engine behind them, for tests: a tiny system, what passes requests on, and a client."""

import contextlib
import json
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx2
from fastapi import FastAPI

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.folder.system import SystemFolder
from hf_s3t.server.engine.model import EngineModel, load_behind_engine
from hf_s3t.server.engine.passing_on import Engine
from hf_s3t.server.measuring import NoMetrics
from hf_s3t.server.problems import install
from hf_s3t.server.settings import ServerSettings
from support.fake_vllm import FakeVllm, adapter_digest
from support.served import listening, served_trainer
from support.tiny import ids_of, plant_stages


@dataclass
class Behind:
    """A system, the engine behind it, and the URL where requests are taken."""

    path: Path
    fake: FakeVllm
    model: EngineModel
    engine: Engine
    url: str

    @property
    def exports(self) -> list[str]:
        """The exports that lie on the disk."""
        return self.model.switch.exports.names()

    def ask(self, words: int = 1, prompt: str = "w7", **fields) -> httpx2.Response:
        """A completion."""
        body = {"model": "system", "prompt": prompt, "max_tokens": words, **fields}
        return httpx2.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def answer(self, words: int = 1, **fields) -> str:
        """The text of a completion."""
        response = self.ask(words, **fields)
        response.raise_for_status()
        return response.json()["choices"][0]["text"]

    @property
    def expected(self) -> str:
        """What answers by what the folder says: exported from a copy by a model that has the base in memory."""
        with tempfile.TemporaryDirectory() as scratch, self._alone():
            copy, export = Path(scratch, "system"), Path(scratch, "export")
            shutil.copytree(self.path, copy)
            S3TModel.from_pretrained(copy, base_model=str(self.path / "base")).export_adapter(0, export)
            return adapter_digest(export)

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """While nothing is exported: PEFT makes modules without values for all threads of a process at once."""
        with self.model._deletion_lock:
            yield

    def grow(self, config: S3TConfig) -> None:
        """Grow what is missing, as another process would."""
        with self._alone():
            plant_stages(served_trainer(self.path, config=config), seed=len(self.fake.history))

    @contextlib.contextmanager
    def stream(self, words: int = 2, prompt: str = "slow") -> Iterator[Iterator[dict | str]]:
        """The events of a completion, one at a time."""
        body = {"model": "system", "prompt": prompt, "max_tokens": words, "stream": True}
        with httpx2.stream("POST", f"{self.url}/v1/completions", json=body, timeout=60) as response:
            yield (_event(line) for line in response.iter_lines() if line)


def _event(line: str) -> dict | str:
    said = line.removeprefix("data: ")
    return said if said == "[DONE]" else json.loads(said)


def app_of(engine: Engine) -> FastAPI:
    """What passes completions on, and nothing else."""
    app = FastAPI()
    install(app)

    @app.post("/v1/completions")
    async def complete(body: dict):
        return engine.complete("/completions", body, body.get("stream", False))

    return app


@contextlib.contextmanager
def behind(path: Path, fake: FakeVllm, key: str | None = None, exports=None, **settings) -> Iterator[Behind]:
    """A system whose answers the engine computes; its exports lie beside it."""
    model = load_behind_engine(path, fake.url, engine_key=key, exports=exports)
    engine = Engine(model, "system", ServerSettings(**settings), NoMetrics(), key)
    try:
        with listening(app_of(engine)) as url:
            yield Behind(path, fake, model, engine, url)
    finally:
        fake.go()
        model.end()


def of_last_slice(path: Path) -> str:
    """The id of an example by whose deletion the stack that serves is cut, and not lost."""
    folder = SystemFolder(path)
    (tips,) = folder.served()
    return next(i for i in ids_of(24) if folder.table.places_of([i]) == [(0, tips[0].prefix[-1])])


def wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    """Until something that happens beside has happened."""
    ticker = threading.Event()
    for _ in range(int(seconds / 0.05)):
        if condition():
            return
        ticker.wait(0.05)
    raise AssertionError("It did not happen.")
