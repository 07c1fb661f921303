"""A server that dies at any step of a switch: what the next one finds, and what it makes of it."""

import contextlib
import multiprocessing
import os
import threading
from collections.abc import Iterator

import httpx2
import pytest
from support.behind import of_last_slice, wait_for
from support.fake_vllm import FakeVllm, adapter_digest
from support.served import NO_KEYS, tiny_system
from support.tiny import s3t_config

from hf_s3t import S3TModel
from hf_s3t.folder.system import SystemFolder
from hf_s3t.server.running import serve
from hf_s3t.server.settings import ServerSettings


pytestmark = pytest.mark.slow


# Its processes are forks of one that has everything imported.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["hf_s3t.server.running"])


class Served:
    """A server in a process of its own."""

    def __init__(self, process: multiprocessing.process.BaseProcess, url: str):
        self.process, self.url = process, url

    def erase(self, example: str) -> httpx2.Response:
        headers = {"Idempotency-Key": "the-same"}
        return httpx2.post(f"{self.url}/v1/erasures", json={"ids": [example]}, headers=headers, timeout=60)

    def answer(self) -> str:
        response = httpx2.post(f"{self.url}/v1/completions", json={"prompt": "w7", "max_tokens": 1}, timeout=60)
        response.raise_for_status()
        return response.json()["choices"][0]["text"]

    def die(self) -> None:
        """At once, as from lack of memory."""
        self.process.kill()
        self.process.join()


def run_server(path: str, engine: str, told) -> None:
    """What the process does: `hf-s3t serve` on a free port, which it tells."""
    serve(path, ServerSettings(port=0), NO_KEYS, engine=engine, say=told.send)


@contextlib.contextmanager
def served(path, fake: FakeVllm) -> Iterator[Served]:
    told, tells = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=run_server, args=(str(path), fake.url, tells))
    process.start()
    try:
        assert told.poll(120), "The server did not start."
        yield Served(process, told.recv().split(" is at ")[1].split(",")[0])
    finally:
        process.terminate()
        process.join(60)


def expected_digest(path, scratch) -> str:
    """What answers by what the folder says."""
    S3TModel.from_pretrained(path, base_model=str(path / "base")).export_adapter(0, scratch)
    return adapter_digest(scratch)


@pytest.mark.parametrize(
    "step", ["before load", "after load", "before unload", "after unload", "while one is waited for"]
)
def test_an_erasure_survives_the_death_of_the_server(step, tmp_path):
    system = tiny_system(tmp_path / "system", config=s3t_config(num_slices=3))
    example = of_last_slice(system)
    with FakeVllm().running() as fake:
        with served(system, fake) as server:
            (before,) = fake.loaded
            if step == "while one is waited for":
                body = {"prompt": "w7 slow", "max_tokens": 3, "stream": True}
                with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as response:
                    # Kept: when it goes, so does the connection.
                    lines = response.iter_lines()
                    next(lines)
                    asking = threading.Thread(target=lambda: _suppressed(server.erase, example))
                    asking.start()
                    wait_for(lambda: len(fake.loaded) == 2)
                    server.die()
                    asking.join()
            else:
                fake.watch = lambda now: server.die() if now == step else None
                with pytest.raises(httpx2.TransportError):
                    server.erase(example)
            fake.watch = lambda now: None
        # In the ledger before anything was asked of the engine.
        assert SystemFolder(system).is_deleted(example)
        asked = len(fake.requests)
        with served(system, fake) as server:
            told = server.erase(example)
            assert (told.status_code, told.json()["status"]) == (200, "done")
            assert "lists their names no more" in str(told.json()["engine"]["confirmed"])
            assert list(fake.loaded) != [before] and len(fake.loaded) == 1
            assert before not in os.listdir(system.with_name("system.engine"))
            assert server.answer() == expected_digest(system, tmp_path / "export")
        assert before not in {name for name, _ in fake.requests[asked:]}
        assert SystemFolder(system).ledger.num_deletions == 1
        assert len(set(fake.history)) == len(fake.history)
        # A server that is told to stop leaves nothing.
        assert not fake.loaded
        assert not [name for name in os.listdir(system.with_name("system.engine")) if name.startswith("s3t-")]


def _suppressed(erase, example: str) -> None:
    with contextlib.suppress(httpx2.TransportError):
        erase(example)
