"""Trainers on one folder: they share its work, and what one is taken for dead in is harmless."""

import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.folders import add_checkpoint, apply, new_system, take_claims_away
from support.tiny import lm_rows, lora, make_trainer, s3t_config, tiny_llama, training_arguments
from transformers import TrainerCallback

from hf_s3t import S3TTrainer
from hf_s3t.errors import ConfigError
from hf_s3t.folder.scratch import hold
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.purge import purge
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = lm_rows(16)
# What comes and goes among checkpoints: one a step, of which one or two stay, and the best one is loaded at the end.
SAVING = dict(save_strategy="steps", save_steps=1, save_total_limit=1, eval_strategy="steps", eval_steps=1)
BEST = dict(**SAVING, load_best_model_at_end=True, max_steps=3)


def arguments(path, **changes):
    return training_arguments(path, **{**BEST, "logging_strategy": "no", **changes})


def system(path, args=None, changes=(), **more):
    """A trainer whose stages draw random numbers at every step, and choose the best of their checkpoints."""
    model = tiny_llama(2)
    return make_trainer(
        path,
        model,
        ROWS,
        args=args or arguments(path, **dict(changes)),
        eval_dataset=Dataset.from_list(lm_rows(4, seed=9)),
        peft_config=lora(model, lora_dropout=0.3),
        config=s3t_config(budget=more.pop("budget", 1)),
        **more,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The adapter files that one trainer writes where it is the only one."""
    trainer = system(tmp_path_factory.mktemp("alone") / "system", budget=2)
    trainer.train()
    return adapters_of(trainer.folder.path)


def adapters_of(path):
    files = Path(path).glob("stages/*/*/adapter_model.safetensors")
    return {f"{file.parent.parent.name}/{file.parent.name}": file.read_bytes() for file in files}


def same_as(alone, path):
    """That the stages are bit for bit those of one trainer, and that nothing else is left."""
    found = adapters_of(path)
    assert found and all(alone[key] == data for key, data in found.items())
    folder = SystemFolder(path)
    assert folder.valid_stages == set(folder.plan.stages())
    assert inspect(path).problems == () and not (Path(path) / "checkpoints").exists()


class AtStep(TrainerCallback):
    """Does something once, at a step of a stage, the first or another, before its checkpoint is written."""

    def __init__(self, step, do, stage=1):
        self.step, self.do, self.stage = step, do, stage

    def on_train_begin(self, args, state, control, **kwargs):
        """Count stages down."""
        self.stage -= 1

    def on_step_end(self, args, state, control, **kwargs):
        """Do it when the step comes."""
        if self.do is not None and not self.stage and state.global_step == self.step:
            do, self.do = self.do, None
            do()


# Whose checkpoints are whose


def test_trainers_at_one_stage_have_a_folder_each(surroundings, tmp_path):
    first, second = new_system(tmp_path), SystemFolder(tmp_path)
    key = StageKey(0, (0,))
    slices = first.slice_digests(key)
    with first.scratch(key, slices) as ours:
        with second.scratch(key, slices) as theirs:
            assert ours != theirs and inspect(tmp_path).problems == ()
            (theirs / "checkpoint-3").mkdir()
            # What one has no use for any more, the other may.
            first.remove_checkpoints(key)
            assert not ours.exists() and theirs.exists()
    # Of what two trainers left, the next one gets what has less left to do.
    with first.scratch(key, slices) as again, second.scratch(key, slices) as other:
        assert again == theirs and other == ours
    first.remove_checkpoints(key)
    assert not (tmp_path / "checkpoints").exists()


def test_a_stage_that_is_written_leaves_what_another_trainer_at_work_has(surroundings, tmp_path):
    folder = new_system(tmp_path)
    key = StageKey(0, (0,))
    held = add_checkpoint(folder, key)
    left = folder.checkpoints(key).with_name("0.1")
    left.mkdir()
    lock = hold(held.parent)
    folder.remove_checkpoints(key)
    assert held.exists() and not left.exists()
    lock.release()
    folder.remove_checkpoints(key)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize("recorded", [True, False], ids=["written", "being written"])
def test_a_deletion_takes_every_trainers_checkpoints(recorded, surroundings, tmp_path):
    folder, other = new_system(tmp_path), SystemFolder(tmp_path)
    key, elsewhere = StageKey(0, (0,)), StageKey(1, (0,))
    found = []
    with folder.scratch(key, folder.slice_digests(key)) as a, other.scratch(key, folder.slice_digests(key)) as b:
        with other.scratch(elsewhere, folder.slice_digests(elsewhere)) as c:
            for scratch, stage in ((a, key), (b, key), (c, elsewhere)):
                found.append(scratch / "checkpoint-1")
                found[-1].mkdir()
                if recorded:
                    folder.write_checkpoint_record(found[-1], {"slices": folder.slice_digests(stage)})
            apply(SystemFolder(tmp_path), [folder.table.members(0, 0)[0]])
            assert [checkpoint.exists() for checkpoint in found] == [False, False, True]
            assert inspect(tmp_path).problems == ()


def test_what_a_dead_trainer_left_of_a_finished_stage_goes_with_the_next_training(tmp_path):
    trainer = system(tmp_path)
    trainer.train()
    key = trainer.folder.plan.stages()[0]
    left, held = (add_checkpoint(trainer.folder, key, step) for step in (1, 2))
    beside = held.parent.with_name(f"{held.parent.name}.1")
    beside.mkdir()
    held = held.rename(beside / held.name)
    lock = hold(beside)
    trainer.train()
    # Somebody is still at it.
    assert not left.exists() and held.exists() and purge(tmp_path).problems
    lock.release()
    assert purge(tmp_path).problems == () and not (tmp_path / "checkpoints").exists()


# At work, where one is taken for dead that is not


def overtake(path, other):
    """What another trainer does inside a stage of one that it takes for dead."""

    def do():
        take_claims_away(path)
        other.train()

    return do


def test_a_trainer_that_is_overtaken_inside_a_stage_goes_on(alone, tmp_path):
    other = system(tmp_path)
    trainer = system(tmp_path, callbacks=[AtStep(3, overtake(tmp_path, other))])
    assert trainer.train().metrics["stages_trained"] == 0
    same_as(alone, tmp_path)


class Stopped(Exception):
    """What ends a trainer inside a stage."""


def stop():
    raise Stopped


class WhereItBegins(TrainerCallback):
    """The steps at which stages began."""

    def __init__(self):
        self.steps = []

    def on_train_begin(self, args, state, control, **kwargs):
        """Note one."""
        self.steps.append(state.global_step)


def test_a_deletion_reaches_the_stages_of_both(tmp_path):
    other = system(tmp_path)

    def overtaken():
        overtake(tmp_path, other)()
        victims.append(other.folder.table.members(0, other.folder.plan.stages()[0].prefix[0])[0])
        apply(SystemFolder(tmp_path), victims)
        left.extend(tmp_path.glob("checkpoints/*/*/checkpoint-*"))

    victims, left = [], []
    trainer = system(tmp_path, callbacks=[AtStep(2, overtaken)])
    trainer.train()
    assert left == [] and trainer.folder.is_deleted(victims[0]) and inspect(tmp_path).problems == ()
    assert trainer.folder.valid_stages == set(trainer.folder.plan.stages())
    assert trainer.verify(["shard-0/0"]).ok and not (tmp_path / "checkpoints").exists()


def test_one_that_was_stopped_goes_on_where_it_was_beside_another(alone, tmp_path):
    with pytest.raises(Stopped):
        system(tmp_path, callbacks=[AtStep(3, stop)]).train()
    begun = WhereItBegins()
    # The one that takes over what was left is overtaken in its turn.
    other = system(tmp_path)
    again = system(tmp_path, callbacks=[begun, AtStep(3, overtake(tmp_path, other))])
    again.train()
    assert begun.steps[0] == 2
    same_as(alone, tmp_path)


class AsksForCheckpoints(TrainerCallback):
    """As some do whatever `save_strategy` says."""

    def on_step_end(self, args, state, control, **kwargs):
        """At every step."""
        control.should_save = True


def test_checkpoints_that_only_a_callback_asks_for_are_a_trainers_own(tmp_path):
    unplanned = {"save_strategy": "no", "load_best_model_at_end": False, "eval_strategy": "no", "save_total_limit": 2}
    trainer, other = (system(tmp_path, changes=unplanned, callbacks=[AsksForCheckpoints()]) for _ in range(2))
    found = []

    def overtaken():
        ours = sorted(tmp_path.glob("checkpoints/*/*/checkpoint-*"))
        overtake(tmp_path, other)()
        found.append(ours == sorted(tmp_path.glob("checkpoints/*/*/checkpoint-*")) and len(ours))

    trainer.add_callback(AtStep(3, overtaken))
    trainer.train()
    assert found == [2] and not (tmp_path / "checkpoints").exists()


def test_trainers_in_two_threads_draw_their_own_random_numbers(alone, tmp_path):
    trainers = [system(tmp_path, budget=2) for _ in range(2)]
    errors = []

    def run(trainer):
        try:
            trainer.train()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(trainer,)) for trainer in trainers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    same_as(alone, tmp_path)


def test_a_trainer_that_is_made_in_another_thread_changes_no_stage(alone, tmp_path):
    args, outcomes = arguments(tmp_path / "other"), []
    thread = threading.Thread(target=lambda: outcomes.append(system(tmp_path / "other", args).train()))

    def begin():
        thread.start()
        # It waits for the stage, which does not wait for it.
        thread.join(0.2)

    trainer = system(tmp_path / "system", callbacks=[AtStep(2, begin)])
    trainer.train()
    thread.join()
    assert len(outcomes) == 1
    for name in ("system", "other"):
        same_as(alone, tmp_path / name)


def test_what_another_left_of_a_stage_that_was_there_by_then_goes_at_the_end(tmp_path):
    trainer = system(tmp_path)
    first = trainer.folder.plan.stages()[0]

    def die():
        found.append(add_checkpoint(SystemFolder(tmp_path), first))

    found = []
    trainer.add_callback(AtStep(1, die, stage=2))
    trainer.train()
    assert found[0] and not (tmp_path / "checkpoints").exists()


def test_a_trainer_with_another_recipe_that_is_overtaken_says_so(tmp_path):
    other = system(tmp_path)
    trainer = system(tmp_path, changes={"learning_rate": 3e-2}, callbacks=[AtStep(1, overtake(tmp_path, other))])
    with pytest.raises(ConfigError, match=r"another recipe: learning_rate=0.03 \(was 0.01\)"):
        trainer.train()


def test_a_system_that_another_trainer_made_meanwhile_is_joined_if_it_is_the_same(tmp_path):
    class Late(S3TTrainer):
        seed = 3

        def _set_up(self, blueprint):
            make_trainer(self.args.output_dir, tiny_llama(2), rows=ROWS, config=s3t_config(seed=self.seed))
            super()._set_up(blueprint)

    trainer = make_trainer(tmp_path / "same", tiny_llama(2), rows=ROWS, cls=Late)
    trainer.train()
    assert inspect(trainer.folder.path).problems == () and trainer.folder.valid_stages
    Late.seed = 4
    with pytest.raises(ConfigError, match=r"seed=3 \(was 4\)"):
        make_trainer(tmp_path / "other", tiny_llama(2), rows=ROWS, cls=Late)


# In processes of their own


class Meeting(AtStep):
    """Waits, inside of the first stage, until so many trainers are inside of theirs; then does something at a step."""

    def __init__(self, folder, count, step, do):
        super().__init__(step, do)
        self.folder, self.count = Path(folder), count

    def on_step_end(self, args, state, control, **kwargs):
        """Say that one is here, and wait for the others."""
        (self.folder / str(os.getpid())).touch()
        until = time.monotonic() + 120
        while len(list(self.folder.iterdir())) < self.count and time.monotonic() < until:
            time.sleep(0.01)
        super().on_step_end(args, state, control, **kwargs)


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def interrupted():
    signal.raise_signal(signal.SIGINT)


def _work(path, meeting, count, end):
    """A trainer's whole process."""
    torch.set_num_threads(1)
    system(path, budget=2, callbacks=[Meeting(meeting, count, 3, end)]).train()


@pytest.mark.slow
@pytest.mark.parametrize(
    "ends", [(None, None), (killed, None), pytest.param((interrupted, killed), marks=pytest.mark.long)]
)
def test_processes_that_train_one_folder(ends, alone, tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_two_trainers"])
    path, meeting = tmp_path / "system", tmp_path / "meeting"
    meeting.mkdir()
    processes = [context.Process(target=_work, args=(path, meeting, len(ends), end)) for end in ends]
    for process in processes:
        process.start()
    for process in processes:
        process.join(240)
    codes = {None: 0, killed: -signal.SIGKILL, interrupted: 1}
    assert [process.exitcode for process in processes] == [codes[end] for end in ends]
    if None not in ends:
        # What both left is there to be resumed from: one goes on, and the rest goes.
        left = {checkpoint.parent for checkpoint in path.glob("checkpoints/*/*/checkpoint-*")}
        assert len(left) == 2 and inspect(path).problems == ()
        begun = WhereItBegins()
        system(path, budget=2, callbacks=[begun]).train()
        assert begun.steps[0] == 2
    same_as(alone, path)
