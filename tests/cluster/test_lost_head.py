"""The head of a cluster is lost while stages train: an error that says what to do, and the next call goes on."""

import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from support.launched import free_port
from support.on_ray import System, adapters_of

from hf_s3t.cluster import train_on_ray
from hf_s3t.errors import ClusterError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect


pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.usefixtures("one_thread", "shared_key"),
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install hf_s3t[ray]"),
]


def head_at(port, place):
    """The command that is the head of a cluster on this machine, until it ends."""
    return [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--port", str(port)),
        *("--node-ip-address", "127.0.0.1", "--num-cpus", "1", "--include-dashboard", "false"),
        *("--object-store-memory", str(128 * 2**20), "--temp-dir", str(place), "--disable-usage-stats"),
    ]


def until(found, seconds=120):
    """What is found, when it is there."""
    end = time.monotonic() + seconds
    while not (what := found()):
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.05)
    return what


def test_a_run_ends_with_what_to_do_and_the_next_call_trains_what_is_missing(tmp_path):
    path, notes = tmp_path / "system", tmp_path / "notes"
    notes.mkdir()
    # What sockets lie in has a short name.
    place = Path("/tmp", f"hf-s3t-{os.getpid()}")
    port = free_port()
    kept = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    head = subprocess.Popen(head_at(port, place), env=kept, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        until(lambda: [one for one in psutil.Process(head.pid).children() if "gcs_server" in one.name()])
        time.sleep(3)
        command = [sys.executable, __file__, str(path), str(notes), f"127.0.0.1:{port}"]
        driver = subprocess.Popen(command, env=kept, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        until(lambda: len(adapters_of(path)) >= 2)
        started = psutil.Process(head.pid).children(recursive=True)
        for process in started:
            if "gcs_server" in process.name():
                process.kill()
        said, _ = driver.communicate(timeout=120)
    finally:
        for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
            process.kill()
        head.wait()
    assert driver.returncode == 3, said[-4000:]
    assert f"The head of the Ray cluster at 127.0.0.1:{port} does not answer any more. The stages that were" in said
    there = adapters_of(path)
    System(tmp_path / "alone")().train()
    alone = adapters_of(tmp_path / "alone")
    assert 2 <= len(there) < len(alone) and there.items() <= alone.items()
    trainer = System(path)()
    assert trainer.train().metrics["stages_trained"] == len(alone) - len(there)
    assert adapters_of(path) == alone and inspect(path).problems == ()
    assert SystemFolder(path).claims.keys() == []


if __name__ == "__main__":
    try:
        train_on_ray(System(Path(sys.argv[1]), Path(sys.argv[2]), seconds=1.0), address=sys.argv[3])
    except ClusterError as error:
        print(error, flush=True)
        sys.exit(3)
