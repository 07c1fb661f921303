"""`accelerate launch` of a script on this machine's processor, as from a shell."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_s3t import launch


def free_port() -> int:
    """A port of this machine that nothing listens at."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def launched(script: Path, *arguments: str, processes: int, environment: dict[str, str] | None = None) -> str:
    """What the script prints in so many processes."""
    command: Sequence[str] = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(free_port())),
        *("--num_processes", str(processes), str(script), *arguments),
    ]
    unwanted = {*launch._RANKS, "MASTER_PORT", "MASTER_ADDR"}
    kept = {name: value for name, value in os.environ.items() if name not in unwanted}
    kept |= {"PYTHONPATH": os.pathsep.join(sys.path), **(environment or {})}
    done = subprocess.run(command, env=kept, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-12000:]
    return done.stdout
