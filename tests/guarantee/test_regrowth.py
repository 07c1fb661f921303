"""
What a plan by sets grows after deletions, in whatever order and however often it is interrupted, is to the bit what a
system grows that never had the rows (E3): equal prefixes, equal stages.
"""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.bitwise_scenarios import Crash
from support.folders import apply
from support.insides import wait_for_cleaner
from support.launched import launched
from support.tiny import batch_of, lm_rows, make_trainer, s3t_config, tiny_llama, training_arguments

from hf_s3t import S3TModel
from hf_s3t.folder.system import SystemFolder
from hf_s3t.launch import start_cpu_processes
from hf_s3t.model.tensor_files import differing_tensors
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("one_thread")

SLICES = 3
FORGET = "forget"
ROWS = lm_rows(24, seed=1)
# One stage for each set of slices; the best of them for less work; one list of sequences that end early.
PLANS = {
    "lattice": {"sequence_selection": "lattice"},
    "work budget": {"work_budget": 2.5},
    "short prefixes": {"sequence_selection": [[0, 1, 2], [1, 2], [2, 0]]},
}


def published(prefixes):
    """The settings of a system of just these prefixes, each grown as it is listed."""
    return s3t_config(num_slices=SLICES, sequence_selection=prefixes, keep_idle=True)


def trainer_of(
    path: Path, plan="lattice", rows=ROWS, precision: str = "fp32", saving: bool = False, config=None, **more
):
    """A trainer whose stages take two steps and more, with dropout; with `saving` each step leaves a checkpoint."""
    args = training_arguments(
        path,
        num_train_epochs=2,
        per_device_train_batch_size=8,
        lr_scheduler_type="linear",
        bf16=precision == "bf16",
        **(dict(save_strategy="steps", save_steps=1) if saving else {}),
    )
    if config is None:
        config = s3t_config(num_slices=SLICES, keep_idle=None, **PLANS[plan])
    return make_trainer(path, tiny_llama(SLICES, attention_dropout=0.1), rows, args=args, config=config, **more)


def stages_of(path: Path) -> dict[StageKey, dict[str, torch.Tensor]]:
    """The tensors of every valid stage of a folder."""
    valid = sorted(SystemFolder(path).valid_stages)
    return {key: load_file(path / key.path / "adapter_model.safetensors") for key in valid}


def assert_same(one: dict, other: dict) -> None:
    """Stage by stage, for equal prefixes."""
    assert one.keys() == other.keys()
    assert not {str(key): found for key in one if (found := differing_tensors(one[key], other[key]))}


def assert_as_from_scratch(path: Path, oracle: Path, rows, **how) -> None:
    """Every stage of a system is that of one whose plan has just these prefixes, and which never had other rows."""
    found = stages_of(path)
    listed = [list(key.prefix) for key in found]
    trainer_of(oracle, rows=rows, config=published(listed), **how).train()
    assert_same(found, stages_of(oracle))


def rows_in(trainer, *slices: int, count: int = 1) -> list[str]:
    """Ids of rows of slices of the first shard."""
    return [i for slice_ in slices for i in trainer.folder.table.members(0, slice_)[:count]]


def without(ids) -> list[dict]:
    return [row for row in ROWS if row["id"] not in ids]


@pytest.mark.parametrize(
    ("plan", "precision"),
    [
        ("lattice", "bf16"),
        ("work budget", "fp32"),
        ("short prefixes", "fp32"),
        pytest.param("lattice", "fp32", marks=pytest.mark.slow),
        pytest.param("work budget", "bf16", marks=pytest.mark.slow),
        pytest.param("short prefixes", "bf16", marks=pytest.mark.slow),
    ],
)
def test_what_is_regrown_is_what_a_system_grows_that_never_had_the_rows(plan, precision, tmp_path):
    trainer = trainer_of(tmp_path / "saw", plan, precision=precision)
    trainer.train()
    planned = {*trainer.folder.plan.stages()}
    assert trainer.folder.valid_stages == planned
    gone = rows_in(trainer, 0)
    trainer.s3t_model.unlearn(gone)
    wait_for_cleaner(trainer.s3t_model)
    trainer.train()
    assert not trainer.folder.missing_stages()
    saw = stages_of(tmp_path / "saw")
    # The chain to full depth began with the slice that was hit; it is grown on what was not.
    assert {*saw} != planned and {key.slices for key in saw} == {key.slices for key in planned}
    never = trainer_of(tmp_path / "never", plan, without(gone), precision=precision)
    never.train()
    of_never = stages_of(tmp_path / "never")
    both = saw.keys() & of_never.keys()
    assert both and both != saw.keys()
    assert_same({key: saw[key] for key in both}, {key: of_never[key] for key in both})
    assert_as_from_scratch(tmp_path / "saw", tmp_path / "oracle", without(gone), precision=precision)


def test_training_stage_by_stage_is_training_at_once(tmp_path):
    trainer_of(tmp_path / "once").train()
    by_one = trainer_of(tmp_path / "by one")
    for number in range(1, 8):
        done = by_one.train(max_stages=1).metrics
        assert (done["stages_trained"], done["stages_left"]) == (1, 7 - number)
    assert_same(stages_of(tmp_path / "once"), stages_of(tmp_path / "by one"))
    # And in trainers of their own, of which one dies in mid-stage and one as a stage begins.
    for crash in (None, "in a stage", "between stages", None):
        callbacks = [Crash(crash)] if crash is not None else None
        trainer = trainer_of(tmp_path / "anew", saving=True, callbacks=callbacks)
        with pytest.raises(KeyboardInterrupt) if crash is not None else contextlib.nullcontext():
            trainer.train(max_stages=2)
    assert len(stages_of(tmp_path / "anew")) == 6
    trainer_of(tmp_path / "anew", saving=True).train()
    assert_same(stages_of(tmp_path / "once"), stages_of(tmp_path / "anew"))


def test_deletions_between_stages_that_are_regrown_one_by_one(tmp_path):
    trainer = trainer_of(tmp_path / "saw")
    gone: list[str] = []
    for slice_ in (0, 2, 1, 1):
        trainer.train(max_stages=4)
        gone += [rows_in(trainer, slice_)[0]]
        trainer.s3t_model.unlearn(gone[-1:])
        wait_for_cleaner(trainer.s3t_model)
    trainer.train()
    assert len(trainer.folder.valid_stages) == 7
    assert_as_from_scratch(tmp_path / "saw", tmp_path / "oracle", without(gone))


def test_a_regrown_stage_on_another_parent_is_audited_as_any_other(tmp_path):
    trainer = trainer_of(tmp_path / "saw")
    trainer.train()
    trainer.s3t_model.unlearn(gone := rows_in(trainer, 0))
    wait_for_cleaner(trainer.s3t_model)
    trainer.train(max_stages=1)
    (grown,) = trainer.folder.valid_stages - {*trainer.folder.plan.stages()}
    assert grown.depth == SLICES and grown.prefix[-1] == 0
    again = trainer_of(tmp_path / "saw", rows=without(gone))
    assert again.verify().ok and grown.path.removeprefix("stages/") in {str(key) for key in again.folder.valid_stages}


def test_a_live_model_beside_answers_as_a_reloaded_one_after_every_stage(tmp_path):
    """Also where the stage that serves is one of several as deep: one order settles it for both."""
    inputs = {name: tensor for name, tensor in batch_of(lm_rows(3, seed=5)).items() if name != "labels"}
    trainer = trainer_of(tmp_path / "saw")
    live = trainer.s3t_model
    trainer.train(max_stages=6)
    tied = 0
    for slice_ in (0, 1):
        live.unlearn(rows_in(trainer, slice_))
        wait_for_cleaner(live)
        while True:
            reloaded = S3TModel.from_pretrained(tmp_path / "saw", base_model=tiny_llama(SLICES, attention_dropout=0.1))
            valid = reloaded.folder.valid_stages
            deepest = max(key.depth for key in valid)
            tied += sum(key.depth == deepest for key in valid) > 1
            assert live.status()["depths"] == reloaded.status()["depths"] == [deepest]
            with torch.no_grad():
                assert torch.equal(live(**inputs).logits, reloaded(**inputs).logits)
            if not trainer.train(max_stages=1).metrics["stages_trained"]:
                break
    assert tied


# In processes of their own


@pytest.mark.slow
def test_fresh_processes_that_stop_early_train_what_one_trains(tmp_path):
    trainer_of(tmp_path / "once").train()
    for limits in ({"max_stages": 1}, {"max_stages": 2}, {"max_seconds": 1000.0}):
        command = [sys.executable, __file__, str(tmp_path / "by one"), json.dumps({"calls": [limits]})]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    assert_same(stages_of(tmp_path / "once"), stages_of(tmp_path / "by one"))


@pytest.mark.slow
def test_two_processes_regrow_in_one_order_and_stop_together(tmp_path):
    run = {"processes": 2, "environment": {"OMP_NUM_THREADS": "1"}}
    calls = json.dumps({"calls": [{}, FORGET, {"max_stages": 2}, {}]})
    launched(Path(__file__), str(tmp_path / "saw"), calls, **run)
    told = [json.loads((tmp_path / f"saw-{rank}.json").read_text()) for rank in range(2)]
    done = [[(each["stages_trained"], each["stages_left"]) for each in of_rank] for of_rank in told]
    assert done == [[(7, 0), (2, 2), (2, 0)]] * 2
    grown = stages_of(tmp_path / "saw")
    assert any(key not in SystemFolder(tmp_path / "saw").plan for key in grown)
    # From scratch, in two processes again.
    gone = [row["id"] for row in ROWS if SystemFolder(tmp_path / "saw").is_deleted(row["id"])]
    listed = json.dumps({"calls": [{}], "prefixes": [list(key.prefix) for key in grown], "without": gone})
    launched(Path(__file__), str(tmp_path / "oracle"), listed, **run)
    assert len(gone) == 1
    assert_same(grown, stages_of(tmp_path / "oracle"))


def forget_the_first(trainer) -> None:
    """Delete a row of the slice that the planned chain to full depth begins with."""
    if trainer.is_world_process_zero():
        apply(trainer.folder, rows_in(trainer, 0))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    start_cpu_processes()
    torch.set_num_threads(1)
    to, how = Path(sys.argv[1]), json.loads(sys.argv[2])
    config = published(how["prefixes"]) if "prefixes" in how else None
    trainer = trainer_of(to, rows=without(how.get("without", [])), config=config)
    reports = []
    for call in how["calls"]:
        if call == FORGET:
            forget_the_first(trainer)
        else:
            reports.append(trainer.train(**call).metrics)
    to.with_name(f"{to.name}-{trainer.args.process_index}.json").write_text(json.dumps(reports))
