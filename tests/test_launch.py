"""`accelerate launch --num_processes N --cpu` trains with N processes, with and without the launcher's help."""

import os
import subprocess
import sys

import pytest

from hf_s3t import launch


SCRIPT = """
import os
from hf_s3t.launch import start_cpu_processes
start_cpu_processes()
from transformers import TrainingArguments
args = TrainingArguments(output_dir="unused")
# One write per line: the processes share the stream.
os.write(1, f"rank {args.process_index} of {args.world_size}\\n".encode())
"""


def launched(tmp_path, *options: str) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_machines", "1"),
        *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "29611", *options, str(script)),
    ]
    unwanted = {*launch._RANKS, "MASTER_PORT", "MASTER_ADDR"}
    environment = {name: value for name, value in os.environ.items() if name not in unwanted}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))


def test_two_processes_are_two_processes(tmp_path):
    assert launched(tmp_path, "--num_processes", "2") == ["rank 0 of 2", "rank 1 of 2"]


def test_one_process_stays_one_process(tmp_path):
    assert launched(tmp_path, "--num_processes", "1") == ["rank 0 of 1"]


@pytest.mark.parametrize("variable", launch._RANKS)
def test_a_process_that_belongs_to_a_group_is_left_alone(monkeypatch, variable):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv(variable, "0")
    assert launch.asked_for() == 1
