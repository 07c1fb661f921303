"""
The small Hub of the tests in a process of its own, so that its work is not counted.

To be imported before anything of Hugging Face, which reads once where its Hub is and where its caches are: both are
ours then, and gone at the end.
"""

import atexit
import os
import subprocess
import sys
import tempfile
from pathlib import Path


_TESTS = Path(__file__).resolve().parent.parent / "tests"
_SERVER = """
import sys
from support.local_hub import FakeHub
with FakeHub(sys.argv[1], users={"hf_bench": ("bench", "write", {"bench"})}) as hub:
    print(hub.url, flush=True)
    sys.stdin.read()
"""
# Who owns repositories there.
OWNER = "bench"


def _start() -> None:
    home = tempfile.TemporaryDirectory(prefix="hf_s3t_bench_hub_")
    server = subprocess.Popen(
        [sys.executable, "-c", _SERVER, f"{home.name}/server"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(_TESTS)},
    )

    def end() -> None:
        # It ends with its input, also where this process is killed.
        server.communicate()
        home.cleanup()

    atexit.register(end)
    os.environ.update(
        HF_ENDPOINT=server.stdout.readline().strip(),
        HF_HOME=f"{home.name}/home",
        HF_TOKEN="hf_bench",
        HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_TELEMETRY="1",
        HF_DATASETS_OFFLINE="1",
        HF_S3T_HOME=f"{home.name}/s3t",
    )
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_XET_CACHE", "HF_S3T_KEY"):
        os.environ.pop(name, None)


_start()
