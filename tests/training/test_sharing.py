"""Any number of trainers share what a folder lacks: each stage is trained once, and is the same whoever trained it."""

import json
import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.folders import apply, take_claims_away
from support.launched import launched
from support.tiny import lm_rows, lora, make_trainer, s3t_config, tiny_llama, training_arguments
from transformers import TrainerCallback

from hf_s3t.errors import ConfigError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = lm_rows(16)
PUBLISHED = dict(num_slices=4)
SETS = dict(num_slices=3, keep_idle=None, sequence_selection="lattice")
BEST = dict(
    save_strategy="steps", save_steps=1, save_total_limit=1, eval_strategy="steps", eval_steps=1,
    load_best_model_at_end=True, max_steps=3,
)  # fmt: skip
LAST = dict(save_strategy="steps", save_steps=1, max_steps=3)


def system(path, plan, saving=LAST, callbacks=None, precision=torch.float32, **changes):
    """A trainer whose stages draw random numbers at every step."""
    model = tiny_llama(4).to(precision)
    return make_trainer(
        path,
        model,
        ROWS,
        args=training_arguments(path, **{**saving, **changes}),
        eval_dataset=Dataset.from_list(lm_rows(4, seed=9)) if "load_best_model_at_end" in saving else None,
        peft_config=lora(model, lora_dropout=0.3),
        config=s3t_config(**plan),
        callbacks=callbacks,
    )


def adapters_of(path):
    files = Path(path).glob("stages/*/*/adapter_model.safetensors")
    return {f"{file.parent.parent.name}/{file.parent.name}": file.read_bytes() for file in files}


def assert_same_system(path, alone):
    """That a folder is whole, bit for bit that of one trainer, and nothing else is left in it."""
    found = adapters_of(path)
    assert found.keys() == alone.keys() and [name for name in alone if found[name] != alone[name]] == []
    assert inspect(path).problems == ()
    assert not any((Path(path) / name).exists() for name in ("claims", "checkpoints"))


class AtStep(TrainerCallback):
    """Does something at a step of the first stage, once."""

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step_end(self, args, state, control, **kwargs):
        """Do it when the step comes."""
        if self.do is not None and state.global_step == self.step:
            do, self.do = self.do, None
            do()


# In one process


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The adapters of a small system that one trainer trained."""
    path = tmp_path_factory.mktemp("alone") / "system"
    system(path, {"budget": 2}).train()
    return adapters_of(path)


def test_two_threads_train_each_stage_once(two, tmp_path):
    trainers, done = [system(tmp_path, {"budget": 2}) for _ in range(2)], []
    threads = [threading.Thread(target=lambda t=t: done.append(t.train().metrics["stages_trained"])) for t in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(done) == len(two) == 4
    assert_same_system(tmp_path, two)


def test_one_inside_a_stage_of_another_does_the_rest_and_does_not_wait_for_it(two, tmp_path):
    inner = system(tmp_path, {"budget": 2})
    done = []
    outer = system(
        tmp_path,
        {"budget": 2},
        callbacks=[AtStep(1, lambda: done.append(inner.train().metrics["stages_trained"]))],
    )
    done.append(outer.train().metrics["stages_trained"])
    assert done == [2, 2]
    assert_same_system(tmp_path, two)


def test_who_waits_says_so_once_in_a_line_and_ends_at_its_limit(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_s3t.training.shared_work.logger.warning", said.append)
    trainer = system(tmp_path, {"num_slices": 2, "budget": 1})
    folder = SystemFolder(tmp_path)
    with folder.lock():
        claim = folder.claims.take(StageKey(0, (0,)), {"slices": folder.slice_digests(StageKey(0, (0,)))})
    begun = time.monotonic()
    metrics = trainer.train(max_seconds=0.5).metrics
    assert time.monotonic() - begun >= 0.5 and metrics["stages_trained"] == 0 and metrics["stages_left"] == 2
    (line,) = said
    assert line.startswith(f"All that can be trained now is in training: shard-0/0 (process {os.getpid()} on ")
    assert line.endswith("Waiting for that.")
    claim.end()
    assert trainer.train(max_stages=1).metrics["stages_trained"] == 1
    assert trainer.train(max_stages=1).metrics["stages_trained"] == 1


def test_a_worker_that_is_told_of_a_stage_that_is_there_waits_for_nobody_who_has_another(tmp_path):
    trainer = system(tmp_path, {"num_slices": 2, "budget": 1})
    first, second = trainer.folder.plan.stages()
    trainer._begin_assigned()
    assert trainer._train_assigned(first)["steps"] > 0 and trainer.folder.claims.keys() == []
    folder = SystemFolder(tmp_path)
    with folder.lock():
        claim = folder.claims.take(second, {"slices": folder.slice_digests(second)})
    pool = ThreadPoolExecutor(1)
    try:
        assert pool.submit(trainer._train_assigned, first).result(60) is None
        # Who has this one is waited for.
        waiting = pool.submit(trainer._train_assigned, second)
        with pytest.raises(TimeoutError):
            waiting.result(1)
    finally:
        claim.end()
        pool.shutdown()
    assert waiting.result(60)["steps"] > 0 and trainer.folder.valid_stages == {first, second}


@pytest.mark.parametrize("wrong", [0, -1, True, float("nan"), "60"])
def test_a_lease_that_is_none_is_refused_before_anything(wrong, tmp_path):
    trainer = system(tmp_path, {"budget": 1})
    with pytest.raises(ConfigError, match="`lease_seconds` must be a number above 0"):
        trainer.train(lease_seconds=wrong)
    assert not (tmp_path / "claims").exists()


def test_one_by_another_recipe_is_refused_before_it_trains_a_step(two, tmp_path):
    other = system(tmp_path, {"budget": 2}, learning_rate=3e-2)
    refused = []

    def join():
        with pytest.raises(ConfigError) as error:
            other.train()
        refused.append(str(error.value))

    system(tmp_path, {"budget": 2}, callbacks=[AtStep(1, join)]).train()
    assert "trains shard-0/0 of" in refused[0] and "here learning_rate=0.03 (was 0.01)" in refused[0]
    assert "Give all trainers of one folder the same arguments" in refused[0]
    assert_same_system(tmp_path, two)


def test_one_with_another_version_is_refused(two, tmp_path, monkeypatch):
    other = system(tmp_path, {"budget": 2})

    def join():
        with (
            monkeypatch.context() as patch,
            pytest.raises(ConfigError, match=r"with hf_s3t .*, this is 9\.9\.9"),
        ):
            patch.setattr("hf_s3t.training.shared_work.own_version", lambda: "9.9.9")
            other.train()

    system(tmp_path, {"budget": 2}, callbacks=[AtStep(1, join)]).train()
    assert_same_system(tmp_path, two)


def test_a_deletion_ends_the_claim_and_another_takes_the_stage_as_it_is_now(tmp_path):
    other, done = system(tmp_path, {"budget": 1}), []

    def overtaken():
        victim = other.folder.table.members(0, 0)[0]
        apply(SystemFolder(tmp_path), [victim])
        done.append(other.train().metrics["stages_trained"])

    trainer = system(tmp_path, {"budget": 1}, callbacks=[AtStep(2, overtaken)])
    done.append(trainer.train().metrics["stages_trained"])
    assert done == [2, 0] and inspect(tmp_path).problems == ()
    assert trainer.verify().ok


def test_one_that_lost_its_claim_takes_no_step_more_and_writes_nothing(two, tmp_path):
    steps, other = [], system(tmp_path, {"budget": 2})

    class Count(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    def overtaken():
        take_claims_away(tmp_path)
        other.train()
        trainer._claim.beat()

    trainer = system(tmp_path, {"budget": 2}, callbacks=[AtStep(1, overtaken), Count()], save_steps=500)
    assert trainer.train().metrics["stages_trained"] == 0 and steps == [1, 2]
    assert_same_system(tmp_path, two)


# In processes of their own


def _work(path, plan, saving, precision, report, at_step=None, lease=60.0):
    """A trainer's whole process, which writes what it trained."""
    torch.set_num_threads(1)
    trained = []

    class Count(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            trained.append(str(trainer._stage))

    callbacks = [Count(), *([] if at_step is None else [AtStep(2, at_step)])]
    trainer = system(path, plan, saving, callbacks, precision)
    done = trainer.train(lease_seconds=lease).metrics["stages_trained"]
    Path(report).write_text(json.dumps({"begun": trained, "trained": done}))


def stopped():
    os.kill(os.getpid(), signal.SIGSTOP)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def begin(path, plan, saving, precision, report, *more):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_sharing"])
    process = context.Process(target=_work, args=(path, plan, saving, precision, report, *more))
    process.start()
    return process


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


SCENARIOS = {
    "last": (PUBLISHED, LAST, torch.float32),
    "best": (PUBLISHED, BEST, torch.float32),
    "sets in bf16": (SETS, LAST, torch.bfloat16),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_train_sixteen_stages_for_sixteen(name, tmp_path):
    plan, saving, precision = SCENARIOS[name]
    system(tmp_path / "alone", plan, saving, precision=precision).train()
    alone = adapters_of(tmp_path / "alone")
    reports = [tmp_path / f"{number}.json" for number in range(2)]
    processes = [begin(tmp_path / "system", plan, saving, precision, report) for report in reports]
    for process in processes:
        process.join(400)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [json.loads(report.read_text()) for report in reports]
    assert len(alone) == (16 if plan is PUBLISHED else 7)
    begun = [stage for one in found for stage in one["begun"]]
    assert sorted(begun) == sorted(alone) and sum(one["trained"] for one in found) == len(alone)
    assert_same_system(tmp_path / "system", alone)


@pytest.mark.slow
@pytest.mark.parametrize("saving", [LAST, BEST], ids=["last", "best"])
def test_one_that_was_stopped_and_goes_on_writes_nothing_of_what_was_taken_over(saving, two, tmp_path):
    plan, path = {"budget": 2}, tmp_path / "system"
    system(tmp_path / "alone", plan, saving).train()
    reports = [tmp_path / f"{number}.json" for number in range(2)]
    first = begin(path, plan, saving, torch.float32, reports[0], stopped, 1.0)
    until(lambda: "T" in Path(f"/proc/{first.pid}/stat").read_text().rpartition(")")[2].split()[0])
    (claim,) = path.glob("claims/shard-*")
    second = begin(path, plan, saving, torch.float32, reports[1])
    second.join(400)
    assert second.exitcode == 0 and not claim.exists()
    there = {file: file.read_bytes() for file in path.rglob("stages/**/*") if file.is_file()}
    os.kill(first.pid, signal.SIGCONT)
    first.join(400)
    assert first.exitcode == 0
    assert {file: file.read_bytes() for file in path.rglob("stages/**/*") if file.is_file()} == there
    found = [json.loads(report.read_text()) for report in reports]
    assert found[0]["trained"] == 0 and found[1]["trained"] == 4
    assert_same_system(path, adapters_of(tmp_path / "alone"))


@pytest.mark.slow
def test_the_stage_of_one_that_was_killed_is_resumed_by_the_other(two, tmp_path):
    plan, path = {"budget": 2}, tmp_path / "system"
    reports = [tmp_path / f"{number}.json" for number in range(2)]
    first = begin(path, plan, LAST, torch.float32, reports[0], killed)
    first.join(400)
    assert first.exitcode == -signal.SIGKILL and len(list(path.glob("claims/shard-*"))) == 1
    second = begin(path, plan, LAST, torch.float32, reports[1])
    second.join(400)
    assert second.exitcode == 0 and json.loads(reports[1].read_text())["trained"] == 4
    assert_same_system(path, two)


GROUP = """
import sys

from test_sharing import PUBLISHED, LAST, system

trainer = system(sys.argv[1], {"budget": 2}, LAST)
done = trainer.train()
if trainer.is_world_process_zero():
    print("trained", int(done.metrics["stages_trained"]))
"""


@pytest.mark.slow
def test_groups_of_data_parallel_processes_share_too(tmp_path):
    script = tmp_path / "group.py"
    script.write_text(GROUP)
    told = []

    def run(path):
        told.append(launched(script, str(path), processes=2, environment={"OMP_NUM_THREADS": "1"}))

    run(tmp_path / "alone")
    groups = [threading.Thread(target=run, args=(tmp_path / "system",)) for _ in range(2)]
    for group in groups:
        group.start()
    for group in groups:
        group.join()
    alone, *shared = [int(text.split("trained ")[1].split()[0]) for text in told]
    assert alone == sum(shared) == 4
    assert_same_system(tmp_path / "system", adapters_of(tmp_path / "alone"))
