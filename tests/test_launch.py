"""`accelerate launch --num_processes N --cpu` trains with N processes, with and without the launcher's help."""

import pytest
from launched import launched

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


def ranks(tmp_path, processes: int) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    printed = launched(script, processes=processes, port=29611)
    return sorted(line for line in printed.splitlines() if line.startswith("rank"))


def test_two_processes_are_two_processes(tmp_path):
    assert ranks(tmp_path, 2) == ["rank 0 of 2", "rank 1 of 2"]


def test_one_process_stays_one_process(tmp_path):
    assert ranks(tmp_path, 1) == ["rank 0 of 1"]


@pytest.mark.parametrize("variable", launch._RANKS)
def test_a_process_that_belongs_to_a_group_is_left_alone(monkeypatch, variable):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv(variable, "0")
    assert launch.asked_for() == 1
