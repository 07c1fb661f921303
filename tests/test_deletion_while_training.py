"""Deletions by other processes that arrive while a trainer is at work: no stage they touch stays, finished or not."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tiny import lm_rows, make_trainer, s3t_config
from transformers import TrainerCallback

from hf_s3t.deletion import apply
from hf_s3t.inspection import inspect
from hf_s3t.storage import SystemFolder


pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = lm_rows(16)


class DeleteDuring(TrainerCallback):
    """Delete examples at the first step of the n-th stage that is trained."""

    def __init__(self, number, delete):
        self.number, self.delete = number, delete
        self.begun = 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Count the stages."""
        self.begun += 1

    def on_step_end(self, args, state, control, **kwargs):
        """Delete once."""
        if self.begun == self.number:
            self.number = None
            self.delete()


def system(path, rows=ROWS, **more):
    return make_trainer(path, rows=rows, config=s3t_config(num_slices=3, budget=2), **more)


def victim_in(folder, key):
    """An example of the slice that a stage is the first of its stack to see."""
    return folder.table.members(key.shard, key.prefix[-1])[0]


def by_another_process(path, victim):
    """What `hf-s3t unlearn` does, run as one."""
    subprocess.run(
        [sys.executable, "-m", "hf_s3t", "unlearn", str(path), victim],
        check=True,
        capture_output=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def by_another_folder(path, victim):
    apply(SystemFolder(path), [victim])


def same_bits_as_without(path, victim, oracle_path):
    """That every stage is what training gives on a dataset that never held the example."""
    folder = SystemFolder(path)
    oracle = system(oracle_path, [row for row in ROWS if row["id"] != victim])
    oracle.train()
    assert set(folder.valid_stages) == set(oracle.folder.valid_stages) == set(folder.plan.stages())
    for key in folder.stages:
        ours, theirs = (load_file(f.path / key.path / "adapter_model.safetensors") for f in (folder, oracle.folder))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), key


@pytest.mark.parametrize(
    ("in_training", "hit", "delete"),
    [(1, 0, by_another_folder), (3, 0, by_another_folder), (2, 4, by_another_folder), (3, 1, by_another_process)],
    ids=["the first stage at work", "a finished stage below", "a stage to come", "by the command line"],
)
def test_what_is_left_never_saw_the_example(in_training, hit, delete, tmp_path):
    path = tmp_path / "system"
    victims = []

    def forget():
        victims.append(victim_in(trainer.folder, trainer.folder.plan.stages()[hit]))
        delete(path, victims[0])

    trainer = system(path, callbacks=[DeleteDuring(in_training, forget)])
    trainer.train()
    (victim,) = victims
    assert inspect(path).problems == () and SystemFolder(path).is_deleted(victim)
    # What was discarded is grown again by the same call, on what is left.
    assert victim not in trainer.folder.table.rows
    same_bits_as_without(path, victim, tmp_path / "without")


def test_the_model_of_the_trainer_follows(tmp_path):
    path = tmp_path / "system"
    trainer = system(path)
    trainer.train()
    model = trainer.s3t_model
    key = trainer.folder.plan.stages()[0]
    before = model.stack.loaded
    assert key in before
    by_another_folder(path, victim_in(trainer.folder, key))
    model(input_ids=torch.tensor([ROWS[0]["input_ids"]]))
    assert key not in model.stack.loaded and not any(key in stage.lineage for stage in model.stack.loaded)
