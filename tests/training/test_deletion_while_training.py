"""Deletions by other processes that arrive while a trainer is at work: no stage they touch stays, finished or not."""

import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from support.folders import apply, forge_stage, take_claims_away
from support.insides import routing_of, stack_of
from support.launched import launched
from support.tiny import lm_rows, make_trainer, plant_stages, s3t_config, tiny_llama, training_arguments
from transformers import TrainerCallback

from hf_s3t import S3TTrainer, launch
from hf_s3t.errors import ExhaustedError, FolderError, S3TError
from hf_s3t.folder.files import file_digest
from hf_s3t.folder.layout import ADAPTER_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect


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
    return make_trainer(path, tiny_llama(3), rows=rows, config=s3t_config(num_slices=3, budget=2), **more)


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
    plant_stages(trainer)
    model = trainer.s3t_model
    model.refresh()
    key = trainer.folder.plan.stages()[0]
    before = model.stack.loaded
    assert key in before
    by_another_folder(path, victim_in(trainer.folder, key))
    model(input_ids=torch.tensor([ROWS[0]["input_ids"]]))
    assert key not in model.stack.loaded and not any(key in stage.lineage for stage in model.stack.loaded)


class AskedFromAThread(TrainerCallback):
    """At every step: which stages answer a call that another thread begins."""

    def __init__(self, model, at_first):
        self.model, self.at_first = model, at_first
        self.answered_by = []

    def on_step_end(self, args, state, control, **kwargs):
        """Do what comes first, then call."""
        if not self.answered_by:
            self.at_first()
        with ThreadPoolExecutor(1) as threads:
            threads.submit(self.call).result()

    def call(self):
        """Note who answers."""
        try:
            self.model(input_ids=torch.tensor([ROWS[0]["input_ids"]]))
            stages = routing_of(self.model).stages
            # One that was grown again since is another, under the same name.
            self.answered_by.append({(str(key), self.model.folder.adapter_digest(key)) for key in stages})
        except ExhaustedError:
            self.answered_by.append(set())


def test_a_model_that_serves_while_stages_train_follows_a_deletion(tmp_path):
    path = tmp_path / "system"
    rows = lm_rows(32)
    trainer = make_trainer(path, tiny_llama(3), rows=rows, config=s3t_config(num_shards=2, partition="balanced"))
    plant_stages(trainer)
    model, folder = trainer.s3t_model, trainer.folder
    model.refresh()
    # Shard 0 is grown again; an example of shard 1 goes meanwhile.
    model.unlearn(folder.table.members(0, 0)[:1])
    victim = folder.table.members(1, 0)[0]
    asked = AskedFromAThread(model, lambda: by_another_folder(path, victim))
    saw_it = {(str(key), folder.adapter_digest(key)) for key in folder.stages if key.shard == 1 and 0 in key.prefix}
    trainer.add_callback(asked)
    trainer.train()
    assert saw_it and len(asked.answered_by) > 6 and not any(saw_it & answered for answered in asked.answered_by)
    # What goes on to answer is what was not hit; all of it is back when training is done.
    assert all(any(stage.startswith("shard-0") for stage, _ in answered) for answered in asked.answered_by)
    assert model.status()["depths"] == [2, 2]


class AtTheFirstStep(TrainerCallback):
    """Does something once, in the first step that is taken."""

    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, **kwargs):
        """Do it, and keep what comes of it."""
        if self.do is not None:
            do, self.do = self.do, None
            self.outcome = do()


def served_and_hit(path, callback_of):
    """A system whose model serves, and of whose second shard another process deletes an example before training."""
    trainer = make_trainer(
        path, tiny_llama(3), rows=lm_rows(32), config=s3t_config(num_shards=2, partition="balanced")
    )
    plant_stages(trainer)
    model, folder = trainer.s3t_model, trainer.folder
    model.refresh()
    callback = AtTheFirstStep(callback_of(trainer))
    trainer.add_callback(callback)
    victim = folder.table.members(1, 0)[0]
    hit = {key for key in folder.plan.stages() if key.shard == 1 and 0 in key.prefix}
    assert hit & set(model.stack.loaded)
    return trainer, callback, victim, hit


def test_what_another_process_trained_meanwhile_is_not_trained_again(tmp_path):
    config = s3t_config(budget=1, partition="balanced")
    trainer, other = (make_trainer(tmp_path, tiny_llama(3), rows=ROWS, config=config) for _ in range(2))

    def overtake():
        take_claims_away(tmp_path)
        return other.train().metrics["stages_trained"]

    overtaken = AtTheFirstStep(overtake)
    trainer.add_callback(overtaken)
    assert trainer.train().metrics["stages_trained"] == 0 and overtaken.outcome == 2
    assert trainer.folder.valid_stages == set(trainer.folder.plan.stages())


def test_a_stage_that_is_discarded_and_has_nothing_left_to_be_grown_on_is_out_of_memory(tmp_path):
    rows = [{**row, "shard": 0, "slice": int(number == 0)} for number, row in enumerate(ROWS)]
    columns = {"partition": "column", "shard_column": "shard", "slice_column": "slice"}
    config = s3t_config(sequence_selection=[[0, 1]], **columns)
    forget = DeleteDuring(2, lambda: by_another_folder(tmp_path, ROWS[0]["id"]))
    trainer = make_trainer(tmp_path, tiny_llama(3), rows=rows, config=config, callbacks=[forget])
    trainer.train()
    first, second = trainer.folder.plan.stages()
    assert trainer.folder.stages == [first] and second not in stack_of(trainer)
    assert not [name for name, _ in trainer.model.named_parameters() if second.adapter_name in name.split(".")]


def test_what_was_deleted_before_is_out_of_memory_while_the_first_stage_trains(tmp_path):
    trainer, seen, victim, hit = served_and_hit(
        tmp_path, lambda trainer: lambda: (stack_of(trainer).in_training, stack_of(trainer).loaded)
    )
    by_another_folder(tmp_path, victim)
    trainer.train()
    stage, loaded = seen.outcome
    assert hit & set(loaded) <= {stage} and any(key.shard == 0 for key in loaded)


def test_a_call_on_what_goes_has_computed_before_it_is_dropped(tmp_path, monkeypatch):
    begun, go_on, computed = (threading.Event() for _ in range(3))
    trainer, _, victim, hit = served_and_hit(tmp_path, lambda trainer: None)
    model, drop, had_computed = trainer.s3t_model, stack_of(trainer).drop, []

    def wait_inside(*args):
        if threading.current_thread() is not threading.main_thread():
            begun.set()
            assert go_on.wait(20)

    def note_the_end(*args):
        if threading.current_thread() is not threading.main_thread():
            computed.set()

    def noted_drop(stages):
        stages = frozenset(stages)
        if hit & stages:
            had_computed.append(computed.is_set())
        drop(stages)

    model.get_input_embeddings().register_forward_pre_hook(wait_inside)
    model.base_model.model.register_forward_hook(note_the_end)
    monkeypatch.setattr(stack_of(trainer), "drop", noted_drop)
    with ThreadPoolExecutor(1) as threads:
        running = threads.submit(lambda: model(input_ids=torch.tensor([ROWS[0]["input_ids"]])))
        assert begun.wait(20)
        by_another_folder(tmp_path, victim)
        threading.Timer(0.5, go_on.set).start()
        trainer.train()
        running.result()
    assert had_computed and all(had_computed)


@pytest.mark.parametrize("work", ["train", "verify"])
def test_a_live_model_attaches_nothing_to_a_base_that_is_a_stages(work, tmp_path):
    def refresh_beside(trainer):
        def do():
            with ThreadPoolExecutor(1) as threads:
                return threads.submit(trainer.s3t_model.refresh).exception()

        return do

    trainer, refused, victim, _ = served_and_hit(tmp_path, refresh_beside)
    if work == "train":
        by_another_folder(tmp_path, victim)
        trainer.train()
    else:
        trainer.verify(["shard-0/0"])
    assert isinstance(refused.outcome, S3TError) and "in training" in str(refused.outcome)


class DeletesWhileSaving(S3TTrainer):
    """Another process deletes an example between two files of a checkpoint."""

    victim = None

    def _save_optimizer_and_scheduler(self, output_dir):
        if self.victim is not None and self._stage.depth == 2:
            victim, self.victim = self.victim, None
            by_another_folder(self.folder.path, victim)
            # What was left of the checkpoint that is being written.
            self.left = Path(output_dir).exists()
        super()._save_optimizer_and_scheduler(output_dir)


@pytest.mark.parametrize("hit", [True, False], ids=["of the stage", "of another slice"])
def test_a_deletion_while_a_checkpoint_is_written(hit, tmp_path):
    path = tmp_path / "system"
    config = s3t_config(num_slices=3, budget=1, partition="balanced")
    args = training_arguments(path, save_strategy="steps", save_steps=1)
    trainer = make_trainer(path, tiny_llama(3), rows=lm_rows(18), cls=DeletesWhileSaving, config=config, args=args)
    stage = next(key for key in trainer.folder.plan.stages() if key.depth == 2)
    (other,) = set(range(3)) - set(stage.prefix)
    trainer.victim = victim = trainer.folder.table.members(0, stage.prefix[-1] if hit else other)[0]
    trainer.train()
    assert trainer.left is not hit
    folder = SystemFolder(path)
    assert folder.is_deleted(victim) and inspect(path).problems == () and not (path / "checkpoints").exists()
    without = tmp_path / "without"
    rows = [row for row in lm_rows(18) if row["id"] != victim]
    # Places as in the system: a row less would move others.
    places = {row["id"]: folder.table.rows[row["id"]] for row in rows}
    rows = [{**row, "shard": 0, "slice": places[row["id"]].slice} for row in rows]
    columns = s3t_config(num_slices=3, budget=1, partition="column", shard_column="shard", slice_column="slice")
    oracle = make_trainer(without, tiny_llama(3), rows=rows, config=columns)
    oracle.train()
    for key in folder.plan.stages():
        ours, theirs = (load_file(f / key.path / "adapter_model.safetensors") for f in (path, without))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs), key


class StepsAndCheckpoints(TrainerCallback):
    """The stages that took a step, one an element, and the checkpoints on disk after each."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.stages, self.checkpoints = [], []

    def on_step_end(self, args, state, control, **kwargs):
        """Before the checkpoint of this step, if there is one."""
        self.stages.append(stack_of(self.trainer).in_training)
        self.checkpoints.append(len(list(self.trainer.folder.path.glob("checkpoints/*/*/checkpoint-*"))))


@pytest.mark.parametrize("load_best", [False, True], ids=["last", "best"])
def test_a_stage_whose_data_is_deleted_stops_at_its_next_checkpoint_and_writes_none(load_best, tmp_path):
    path = tmp_path / "system"
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True} if load_best else {}
    args = training_arguments(path, save_strategy="steps", save_steps=1, num_train_epochs=8, **best)
    eval_dataset = Dataset.from_list(lm_rows(6, seed=5)) if load_best else None
    trainer = make_trainer(
        path, tiny_llama(3), rows=ROWS, config=s3t_config(num_slices=3, budget=1), args=args, eval_dataset=eval_dataset
    )
    first = trainer.folder.plan.stages()[0]
    victim = victim_in(trainer.folder, first)
    seen = StepsAndCheckpoints(trainer)

    class AtTheThirdStep(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if len(seen.stages) == 3:
                by_another_folder(path, victim)

    trainer.add_callback(seen)
    trainer.add_callback(AtTheThirdStep())
    trainer.train()
    # Three steps of eight; then the stage begins anew, on what is left, without a checkpoint of the first time.
    assert seen.stages[:4] == [first] * 4 and seen.checkpoints[:4] == [0, 1, 2, 0]
    assert seen.stages.count(first) == 3 + 8
    folder = SystemFolder(path)
    assert folder.is_deleted(victim) and folder.valid_stages == set(folder.plan.stages())
    assert inspect(path).problems == ()


class LosesItsParent(S3TTrainer):
    """What a stage stands on goes between its being chosen and its being brought in."""

    victim = None

    def _next_stage(self):
        key = super()._next_stage()
        if self.victim is not None and key.depth == 2:
            self._stack.drop(self._stack.loaded)
            by_another_folder(self.folder.path, self.victim)
            self.victim = None
        return key


def test_a_deletion_of_what_the_next_stage_stands_on(tmp_path):
    path = tmp_path / "system"
    trainer = system(path, cls=LosesItsParent)
    trainer.victim = victim = victim_in(trainer.folder, trainer.folder.plan.stages()[0])
    trainer.train()
    same_bits_as_without(path, victim, tmp_path / "without")


class ForgetsBeforeAStage(S3TTrainer):
    """The trainer's own live model forgets between two stages, when the second of them is chosen."""

    chosen, victims = None, ()

    def _next_stage(self):
        key = super()._next_stage()
        if self.victims and key == self.chosen:
            victims, self.victims = self.victims, ()
            self.s3t_model.unlearn(victims)
        return key


@pytest.mark.parametrize("hit", [0, -1], ids=["what the next stage stands on", "the next stage"])
def test_a_live_model_that_forgets_between_two_stages_does_not_end_training(hit, tmp_path):
    path = tmp_path / "system"
    trainer = system(path, cls=ForgetsBeforeAStage)
    trainer.s3t_model.refresh()
    trainer.chosen = next(key for key in trainer.folder.plan.stages() if key.depth == 2)
    victim = trainer.folder.table.members(0, trainer.chosen.prefix[hit])[0]
    trainer.victims = [victim]
    trainer.train()
    same_bits_as_without(path, victim, tmp_path / "without")


def test_a_slice_that_a_live_model_empties_between_two_stages_is_trained_on_no_more(tmp_path):
    rows = [{**row, "shard": 0, "slice": int(number == 0)} for number, row in enumerate(ROWS)]
    columns = {"partition": "column", "shard_column": "shard", "slice_column": "slice"}
    config = s3t_config(sequence_selection=[[0, 1]], **columns)
    trainer = make_trainer(tmp_path, tiny_llama(3), rows=rows, config=config, cls=ForgetsBeforeAStage)
    trainer.s3t_model.refresh()
    trainer.chosen, trainer.victims = trainer.folder.plan.stages()[1], [ROWS[0]["id"]]
    assert trainer.train().metrics["stages_trained"] == 1
    assert trainer.folder.stages == trainer.folder.plan.stages()[:1] and not trainer.folder.missing_stages()


def regrow_otherwise(path, key):
    """Put another stage under a name, as a process does that grows it again with other sums."""
    stage = path / key.path
    tensors = {name: tensor + 1 for name, tensor in load_file(stage / ADAPTER_FILE).items()}
    files = {**SystemFolder(path).stage_record(key)["files"]}
    shutil.copytree(stage, stage.with_name(".tmp-other"))
    shutil.rmtree(stage)
    stage.with_name(".tmp-other").rename(stage)
    save_file(tensors, stage / ADAPTER_FILE, {"format": "pt"})
    files[ADAPTER_FILE] = file_digest(stage / ADAPTER_FILE)
    forge_stage(path, str(key), files=files)


class ParentIsRegrown(S3TTrainer):
    """Another process grows the parent anew when it is in memory; another thread reads the folder then."""

    begun = ()

    def _bring_in(self, key):
        digest = super()._bring_in(key)
        if key.depth == 2 and key not in self.begun:
            regrow_otherwise(self.folder.path, key.parent)
            self.folder.refresh_stages()
        self.begun = (*self.begun, key)
        return digest


def test_a_stage_is_not_written_upon_another_parent_than_it_was_trained_on(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(3), rows=ROWS, config=s3t_config(budget=1), cls=ParentIsRegrown)
    report = trainer.train().metrics
    first, second = trainer.folder.plan.stages()
    # The one that was trained on what went is discarded, and does not count.
    assert trainer.begun == (first, second, second) and report["stages_trained"] == 2
    assert trainer.folder.valid_stages == {first, second}
    record, below = trainer.folder.stage_record(second), stack_of(trainer).digest([first])
    assert record["below"] == trainer.folder.adapter_digest(first) and record["frozen_before"] == below


def test_a_stage_that_is_damaged_while_another_is_trained_on_it_is_named_and_what_was_trained_stays(tmp_path):
    path = tmp_path / "system"
    first = system(tmp_path / "whole").folder.plan.stages()[0]
    file = path / first.path / ADAPTER_FILE
    whole = []

    def damage():
        whole.append(file.read_bytes())
        file.write_bytes(whole[0][:-1] + bytes([whole[0][-1] ^ 1]))

    trainer = system(path, callbacks=[callback := DeleteDuring(2, damage)])
    with pytest.raises(FolderError, match=rf"{first}/{ADAPTER_FILE} was altered .* remove its folder and call `train"):
        trainer.train()
    assert callback.begun == 2 and trainer.folder.stages == list(first.lineage) + trainer.folder.plan.stages()[1:2]
    shutil.rmtree(file.parent)
    trainer.train()
    assert file.read_bytes() == whole[0] and trainer.folder.valid_stages == set(trainer.folder.plan.stages())
    # What stands on it was not trained again.
    assert callback.begun == 1 + len(trainer.folder.plan.stages())


def late_deletion(path, moment):
    """A script of two processes: the first comes to `train` late, or an example is deleted before either does."""
    trainer = make_trainer(path, tiny_llama(3), rows=ROWS, config=s3t_config(budget=1, partition="balanced"))
    key = trainer.folder.plan.stages()[0]
    if trainer.args.process_index == 0:
        victim = trainer.folder.table.members(0, key.prefix[0])[1]
        if moment == "late":
            # The other process has read the folder meanwhile, and waits.
            time.sleep(3)
        apply(SystemFolder(path), [victim])
    if moment == "before":
        trainer.accelerator.wait_for_everyone()
    trainer.train()


@pytest.mark.slow
def test_all_processes_train_a_stage_on_the_same_examples(tmp_path, monkeypatch):
    # One secret for both folders, so that a seed places examples alike.
    monkeypatch.setenv("HF_S3T_KEY", "of both of these systems")
    digests = []
    for moment in ("before", "late"):
        path = tmp_path / moment
        run = {"processes": 2, "environment": {"OMP_NUM_THREADS": "1"}}
        launched(Path(__file__), str(path), moment, **run)
        folder = SystemFolder(path)
        assert folder.ledger.num_deletions == 1 and folder.valid_stages == set(folder.plan.stages())
        digests.append([folder.adapter_digest(key) for key in folder.plan.stages()])
    assert digests[0] == digests[1]


if __name__ == "__main__":
    launch.start_cpu_processes()
    late_deletion(Path(sys.argv[1]), sys.argv[2])
