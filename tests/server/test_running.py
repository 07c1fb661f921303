"""`hf-s3t serve` as a process: it says where it listens, answers, and ends when what runs has ended."""

import contextlib
import dataclasses
import inspect
import os
import signal
import socket
import subprocess
import sys

import httpx2
import pytest
from support.served import tiny_system
from typer.testing import CliRunner

from hf_s3t.cli.app import app
from hf_s3t.cli.serve import serve as command
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.pending import PendingRequests
from hf_s3t.server import running
from hf_s3t.server.settings import ServerSettings


def started(path, *options, **environment):
    command = [sys.executable, "-m", "hf_s3t", "serve", str(path), "--base_model", str(path / "base"), *options]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_every_option_reaches_what_it_is_about(tmp_path, monkeypatch):
    arrived = {}

    def serve(system, settings, keys, **others):
        arrived.update(dataclasses.asdict(settings), system=system, keys=keys, **others)

    monkeypatch.setattr(running, "serve", serve)
    own = {"system": "somewhere", "host": "127.0.0.9", "name": "other", "on_running": "cancel", "preload": "all"}
    own |= {"dtype": "bfloat16", "when_exhausted": "base", "gate": "terms", "revision": "v2", "base_model": "base"}
    own |= {"engine": "http://127.0.0.1:1/v1"}
    numbers = iter(range(101, 200))
    options = {
        name: own.get(name, next(numbers))
        for name in inspect.signature(command).parameters
        if name not in {"system", "keys", "cache_dir", "engine_exports", "signing_key"}
    }
    paths = {"cache_dir": tmp_path / "cache", "engine_exports": tmp_path / "exports"}
    given = [
        part for name, value in {**options, **paths}.items() for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    assert CliRunner().invoke(app, ["serve", "somewhere", *given], catch_exceptions=False).exit_code == 0
    assert {name: arrived.get(name) for name in [*options, *paths]} == {**options, **paths}
    assert {field.name for field in dataclasses.fields(ServerSettings)} <= options.keys()


@pytest.mark.slow
def test_it_says_where_it_listens_and_answers_until_it_is_told_to_stop(tmp_path):
    path = tiny_system(tmp_path / "system")
    with started(path, "--port", "0", HF_S3T_ANSWER_KEYS="answering-key") as process:
        try:
            line = process.stdout.readline()
            assert line.startswith("system is at http://127.0.0.1:") and "with a key" in line, process.stderr.read()
            url = line.split()[3].rstrip(",")
            body = {"model": "system", "prompt": "w7", "max_tokens": 2}
            headers = {"Authorization": "Bearer answering-key"}
            assert httpx2.post(f"{url}/v1/completions", json=body).status_code == 401
            assert httpx2.post(f"{url}/v1/completions", json=body, headers=headers).status_code == 200
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(60) in (0, -signal.SIGTERM)
        assert "Traceback" not in process.stderr.read()


@pytest.mark.slow
def test_told_to_stop_it_ends_the_answer_under_way_and_keeps_what_waits_to_be_erased(tmp_path):
    path = tiny_system(tmp_path / "system")
    name = SystemFolder(path).table.ids_in(0, 0)[0]
    with started(path, "--port", "0") as process:
        try:
            url = process.stdout.readline().split()[3].rstrip(",")
            waits = httpx2.post(f"{url}/v1/erasures", json={"ids": [name], "max_delay": 3600}, timeout=60)
            assert waits.status_code == 202
            body = {"prompt": "w7", "max_tokens": 120, "stream": True, "temperature": 0, "logit_bias": {"2": -100}}
            with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as answer:
                lines = answer.iter_lines()
                next(lines)
                process.send_signal(signal.SIGTERM)
                events = [line for line in lines if line]
            assert events[-1] == "data: [DONE]" and '"finish_reason":"length"' in events[-2]
            assert process.wait(60) in (0, -signal.SIGTERM)
            assert "Traceback" not in process.stderr.read()
        finally:
            process.kill()
    with pytest.raises(httpx2.ConnectError):
        httpx2.get(f"{url}/healthz")
    folder = SystemFolder(path)
    assert PendingRequests(folder).ids() == [name] and not folder.ledger.num_deletions


@pytest.mark.slow
def test_an_answer_that_does_not_end_does_not_keep_it_from_stopping(tmp_path):
    path = tiny_system(tmp_path / "system")
    with started(path, "--port", "0", "--shutdown-timeout", "1") as process, contextlib.ExitStack() as clients:
        try:
            url = process.stdout.readline().split()[3].rstrip(",")
            # It sends half of a request, and nothing more.
            client = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])))
            clients.callback(client.close)
            head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            client.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
            assert httpx2.get(f"{url}/healthz").status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) in (0, -signal.SIGTERM)
        finally:
            process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--host", "0.0.0.0"), ("--keys", "nowhere"), ("--on-running", "kill")])
def test_what_it_cannot_do_it_says_in_one_line(tmp_path, options):
    (tmp_path / "base").mkdir()
    with started(tmp_path, *options) as process:
        # Libraries may have said something before.
        *_, last = process.stderr.read().splitlines()
        assert process.wait(60) == 1 and last.startswith("Error: ")
