"""`hf-s3t serve` as a process: it says where it listens, answers, and ends when what runs has ended."""

import os
import signal
import subprocess
import sys

import httpx2
import pytest
from support.served import tiny_system


def started(path, *options, **environment):
    command = [sys.executable, "-m", "hf_s3t", "serve", str(path), "--base_model", str(path / "base"), *options]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


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
@pytest.mark.parametrize("options", [("--host", "0.0.0.0"), ("--keys", "nowhere"), ("--on-running", "kill")])
def test_what_it_cannot_do_it_says_in_one_line(tmp_path, options):
    (tmp_path / "base").mkdir()
    with started(tmp_path, *options) as process:
        said = process.stderr.read()
        assert process.wait(60) == 1 and said.count("\n") == 1 and said.startswith("Error: ")
