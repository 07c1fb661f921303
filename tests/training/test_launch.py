"""`accelerate launch --num_processes N --cpu` trains with N processes, with and without the launcher's help."""

from collections import Counter

import pytest
from support.launched import launched

from hf_s3t import launch


SCRIPT = """
import os
from hf_s3t.launch import start_cpu_processes
start_cpu_processes()
# What arguments of a trainer ask.
from accelerate import PartialState
state = PartialState(cpu=True)
# One write per line: the processes share the stream.
os.write(1, f"rank {state.process_index} of {state.num_processes}\\n".encode())
"""


def ranks(tmp_path, processes: int) -> list[str]:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    printed = launched(script, processes=processes)
    return sorted(line for line in printed.splitlines() if line.startswith("rank"))


@pytest.mark.slow
def test_two_processes_are_two_processes(tmp_path):
    assert ranks(tmp_path, 2) == ["rank 0 of 2", "rank 1 of 2"]


@pytest.mark.slow
def test_one_process_stays_one_process(tmp_path):
    assert ranks(tmp_path, 1) == ["rank 0 of 1"]


def test_the_launcher_sets_no_port_for_one_process(monkeypatch):
    for variable in (*launch._RANKS, "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert launch.asked_for() == 1


@pytest.mark.parametrize("variable", launch._RANKS)
def test_a_process_that_belongs_to_a_group_is_left_alone(monkeypatch, variable):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv(variable, "0")
    assert launch.asked_for() == 1


TRAINERS = """
import os, sys
from hf_s3t.launch import start_cpu_processes
start_cpu_processes()
from hf_s3t import S3TTrainer
from support.tiny import make_trainer, s3t_config

show = lambda what, key, table: os.write(1, f"{what}: {key.check} {sorted(table.rows.items())}\\n".encode())

class Trainer(S3TTrainer):
    def _set_up(self, blueprint):
        # Before there is a folder, and after.
        if blueprint.new is not None:
            show(f"planned {self.args.process_index}", blueprint.new.key, blueprint.new.table)
        super()._set_up(blueprint)
        show(f"made {self.args.process_index}", self.folder.key, self.folder.table)

for _ in range(2):
    make_trainer(sys.argv[1], cls=Trainer, config=s3t_config(num_shards=2, partition="balanced"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("secret", [None, "of the environment, long enough"])
def test_all_processes_place_rows_under_one_new_secret(tmp_path, secret, monkeypatch):
    monkeypatch.delenv("HF_S3T_KEY", raising=False)
    script = tmp_path / "script.py"
    script.write_text(TRAINERS)
    environment = {} if secret is None else {"HF_S3T_KEY": secret}
    printed = launched(script, str(tmp_path / "system"), processes=2, environment=environment)
    lines = [line.partition(": ") for line in printed.splitlines() if line.startswith(("planned", "made"))]
    times = Counter(what for what, _, _ in lines)
    assert times == {"planned 0": 1, "planned 1": 1, "made 0": 2, "made 1": 2}
    assert len({said for _, _, said in lines}) == 1
    assert (tmp_path / "system" / "ledger.key").exists() == (secret is None)
