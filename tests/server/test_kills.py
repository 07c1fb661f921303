"""A server that is killed at any moment of an erasure: what it acknowledged is in force, asking again does no harm."""

import multiprocessing
import os
import random
import signal
import threading
from pathlib import Path

import httpx2
import pytest
from support.served import served_trainer, tiny_system
from support.tiny import ids_of, lm_rows, plant_stages, s3t_config

from hf_s3t.folder.layout import LEDGER_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect


IDS = ids_of(120)
CONFIG = s3t_config(num_shards=2, num_slices=3, partition="balanced")


def serve_here(path: str, connection) -> None:
    """What a server's process runs; tells its port."""
    from hf_s3t.server.keys import Keys
    from hf_s3t.server.running import serve
    from hf_s3t.server.settings import ServerSettings

    settings = ServerSettings(port=0)
    serve(path, settings, Keys({}), base_model=f"{path}/../base", say=lambda text: connection.send(text))


class Server:
    """A server in a process of its own."""

    def __init__(self, path: Path):
        # Forked from a process that has imported everything, it is there in a second.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["hf_s3t.server.running", "torch", "peft"])
        ours, theirs = context.Pipe()
        self.process = context.Process(target=serve_here, args=(str(path), theirs), daemon=True)
        self.process.start()
        theirs.close()
        if not ours.poll(120):
            raise RuntimeError("The server did not start.")
        self.url = next(word for word in ours.recv().replace(",", " ").split() if word.startswith("http"))

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.join()


def grow(path: Path, seed: int) -> None:
    plant_stages(served_trainer(path, lm_rows(len(IDS)), config=CONFIG), seed=seed)


def ask(url: str, one: str, key: str, told: list, max_delay: float | None) -> None:
    """Have one example erased, and note what was answered."""
    wanted = {"ids": [one]} if max_delay is None else {"ids": [one], "max_delay": max_delay}
    try:
        told.append(httpx2.post(f"{url}/v1/erasures", json=wanted, headers={"Idempotency-Key": key}, timeout=60))
    except httpx2.HTTPError:
        return


def assert_in_force(client: httpx2.Client, path: Path, one: str, answer) -> None:
    """What was acknowledged, after a restart."""
    told = answer.json()
    found = client.get(f"/v1/erasures/{told['id']}").json()
    if told["status"] == "done":
        assert client.get("/v1/examples", params={"id": one}).json()["data"][0]["deleted"] is True
        assert found["status"] == "done" and found["receipts"] == told["receipts"]
    else:
        assert found["status"] in ("waiting", "done")
    folder = SystemFolder(path)
    there = {folder.adapter_digest(key) for key in folder.stages}
    gone = {stage["adapter_sha256"] for receipt in told["receipts"] for stage in receipt["stages_removed"]}
    assert not there & gone, "a stage that went came back"


@pytest.mark.slow
@pytest.mark.parametrize("kills", [5, pytest.param(50, marks=pytest.mark.long)])
def test_what_a_killed_server_acknowledged_is_in_force_and_a_repeated_request_changes_nothing(tmp_path, kills):
    path = tiny_system(tmp_path / "system", rows=lm_rows(len(IDS)), config=CONFIG)
    (path / "base").rename(tmp_path / "base")
    random_ = random.Random(0)
    left, acknowledged, typical = iter(IDS), [], 0.1
    was_acknowledged = []
    for number in range(kills):
        if number % 6 == 5:
            grow(path, seed=number)
        server, told = Server(path), []
        client = httpx2.Client(base_url=server.url, timeout=60)
        for one, answer in acknowledged[-3:]:
            assert_in_force(client, path, one, answer)
        one, key, delay = next(left), f"key-{number}", (None, None, 3600.0)[number % 3]
        asking = threading.Thread(target=ask, args=(server.url, one, key, told, delay))
        asking.start()
        asking.join(random_.uniform(0, 2 * typical))
        server.kill()
        asking.join()
        was_acknowledged.append(bool(told))
        lines = (path / LEDGER_FILE).read_text().count("\n")

        again = Server(path)
        client = httpx2.Client(base_url=again.url, timeout=60)
        if told:
            assert told[0].status_code == (200 if delay is None else 202)
            assert_in_force(client, path, one, told[0])
        repeated: list = []
        ask(again.url, one, key, repeated, delay)
        assert repeated[0].status_code == (200 if delay is None else 202)
        if told:
            assert repeated[0].json() == {**told[0].json(), "duplicates": None}
            assert (path / LEDGER_FILE).read_text().count("\n") == lines
            typical = 0.7 * typical + 0.3 * told[0].elapsed.total_seconds()
        listed = [one["id"] for one in client.get("/v1/erasures", params={"limit": 1000}).json()["data"]]
        assert len(listed) == len(set(listed)) == number + 1
        acknowledged.append((one, repeated[0]))
        again.kill()
    # A load finishes what the last one left.
    SystemFolder(path)
    assert inspect(path).problems == ()
    server = Server(path)
    client = httpx2.Client(base_url=server.url, timeout=60)
    for one, answer in acknowledged:
        assert_in_force(client, path, one, answer)
    server.kill()
    if kills >= 50:
        assert len(set(was_acknowledged)) == 2, "all of them were killed before, or after, they had answered"
