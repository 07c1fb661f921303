"""Trackers see one run over the whole plan, and nothing that they do changes a stage."""

import random
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from support.folders import apply
from support.tiny import lm_rows, lora, make_trainer, s3t_config, tiny_llama, training_arguments
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.integrations import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from trl import SFTConfig

from hf_s3t import S3TSFTTrainer
from hf_s3t.folder.system import SystemFolder
from hf_s3t.plan import StageKey
from hf_s3t.training.tracking import last_step


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")

ROWS = lm_rows(16)


class Tracker(TrainerCallback):
    """Notes what it is told, and draws random numbers as some do for the name of a run."""

    def __init__(self):
        self.runs, self.points, self.trained = [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        """A run."""
        self.runs.append("begun")
        self._draw()

    def on_log(self, args, state, control, logs=None, **kwargs):
        """A point of its curves."""
        self.points.append((state.global_step, dict(logs)))
        self._draw()

    def on_train_end(self, args, state, control, **kwargs):
        """The end of a run."""
        self.runs.append(f"ended at {state.global_step}")

    def _draw(self):
        random.random(), np.random.random(), torch.rand(3)


class Stopped(Exception):
    """What ends a trainer inside a stage."""


class StopsAt(TrainerCallback):
    """Ends the trainer in its n-th stage, at a step."""

    def __init__(self, stage, step):
        self.stage, self.step, self.begun = stage, step, 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Count stages."""
        self.begun += 1

    def on_step_end(self, args, state, control, **kwargs):
        """End."""
        if (self.begun, state.global_step) == (self.stage, self.step):
            raise Stopped


@pytest.fixture(scope="module")
def report_to():
    """The name of a tracker that `report_to` knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(INTEGRATION_TO_CALLBACK, "recorder", Tracker)
        yield "recorder"


def system(path, report_to="none", changes=(), budget=2, **more):
    model = tiny_llama()
    args = training_arguments(
        path, **{"logging_strategy": "steps", "logging_steps": 1, "report_to": report_to, **dict(changes)}
    )
    dropout = lora(model, lora_dropout=0.3)
    return make_trainer(path, model, ROWS, args=args, peft_config=dropout, config=s3t_config(budget=budget), **more)


def tracker_of(trainer):
    return next(callback for callback in trainer.callback_handler.callbacks if isinstance(callback, Tracker))


def losses(points):
    return [(step, logs["shard"], logs["sequence"], logs["depth"]) for step, logs in points if "loss" in logs]


def curve(folder):
    """Where losses must be: stages in the order of the plan, step by step."""
    expected = []
    for key in folder.plan.stages():
        number = next(n for n, seq in enumerate(folder.plan.sequences[key.shard]) if seq[: key.depth] == key.prefix)
        first, last = folder.stage_record(key)["steps"]
        expected += [(step, key.shard, number, key.depth) for step in range(first + 1, last + 1)]
    return expected


def tensors_of(path):
    return {file.parent.name: file.read_bytes() for file in Path(path).glob("stages/*/*/adapter_model.safetensors")}


class Own(TrainerCallback):
    """A callback that is no tracker, and notes how it is called."""

    def __init__(self):
        self.runs, self.points, self.steps = [], [], []

    def on_train_begin(self, args, state, control, **kwargs):
        """Of a stage."""
        self.runs.append("begun")

    def on_step_end(self, args, state, control, **kwargs):
        """Of a stage."""
        self.steps.append((state.global_step, state.max_steps))

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Of the plan."""
        self.points.append((state.global_step, dict(logs)))

    def on_train_end(self, args, state, control, **kwargs):
        """Of a stage."""
        self.runs.append("ended")


@pytest.fixture(scope="module")
def tracked(report_to, tmp_path_factory):
    """A trainer with a tracker and a callback of its own, after training."""
    trainer = system(tmp_path_factory.mktemp("tracked") / "system", report_to, callbacks=[Own()])
    trainer.output = trainer.train()
    return trainer


def test_a_plan_is_one_run_whose_steps_go_on(tracked):
    tracker, steps = tracker_of(tracked), tracked.output.global_step
    assert tracker.runs == ["begun", f"ended at {steps}"]
    found = losses(tracker.points)
    assert found == curve(tracked.folder) and [step for step, *_ in found] == list(range(1, steps + 1))
    assert {(sequence, depth) for _, _, sequence, depth in found} == {(0, 1), (0, 2), (1, 1), (1, 2)}
    # Every tracker takes numbers; of texts several say at each that they drop them.
    assert all(isinstance(value, (int, float)) for _, logs in tracker.points for value in logs.values())


def test_the_state_tells_of_all_stages(tracked):
    history, stages, steps = tracked.state.log_history, tracked.folder.plan.stages(), tracked.output.global_step
    assert list(dict.fromkeys(entry["stage"] for entry in history)) == list(map(str, stages))
    for entry in history:
        key = StageKey.from_path(f"stages/{entry['stage']}")
        assert (entry["shard"], entry["depth"]) == (key.shard, key.depth)
        assert tracked.folder.plan.sequences[key.shard][entry["sequence"]][: key.depth] == key.prefix
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(1, steps + 1))
    assert sum("train_loss" in entry for entry in history) == 4 and tracked.state.global_step == steps


def test_other_callbacks_find_a_training_in_every_stage(tracked):
    own = next(callback for callback in tracked.callback_handler.callbacks if isinstance(callback, Own))
    assert own.runs == ["begun", "ended"] * 4
    assert sum(step == total for step, total in own.steps) == 4 and own.steps[0][0] == 1
    assert own.points == tracker_of(tracked).points


def test_a_tracker_changes_no_stage(tracked, tmp_path):
    system(tmp_path).train()
    assert tensors_of(tmp_path) == tensors_of(tracked.folder.path)


def test_neither_an_audit_nor_what_comes_later_is_a_part_of_the_run(tracked):
    tracker = tracker_of(tracked)
    points, runs, history = list(tracker.points), list(tracker.runs), list(tracked.state.log_history)
    assert tracked.verify(["shard-0/0"]).ok
    assert (tracker.points, tracker.runs, tracked.state.log_history) == (points, runs, history)
    tracked.evaluate(tracked.train_dataset)
    ((step, logs),) = tracker.points[len(points) :]
    assert step == tracked.output.global_step and "shard" not in logs


@pytest.mark.parametrize("saving", [True, False], ids=["with checkpoints", "without"])
def test_a_run_that_was_stopped_goes_on_with_the_curve(saving, report_to, tmp_path):
    changes = {"num_train_epochs": 2, **({"save_strategy": "steps", "save_steps": 1} if saving else {})}
    stopped = system(tmp_path, report_to, changes, budget=1, callbacks=[StopsAt(2, 2)])
    with pytest.raises(Stopped):
        stopped.train()
    before = losses(tracker_of(stopped).points)
    assert tracker_of(stopped).runs == ["begun"] and len(stopped.state.log_history) > len(before)
    again = system(tmp_path, report_to, changes, budget=1)
    again.train()
    after, folder = losses(tracker_of(again).points), again.folder
    second = folder.plan.stages()[1]
    first, _ = folder.stage_record(second)["steps"]
    # What was finished is not written over; the stage that was stopped goes on at its checkpoint, or begins again.
    assert before == curve(folder)[: first + 1]
    assert after == [point for point in curve(folder) if point[0] > first + saving]
    if saving:
        # What it logged before it was stopped is in its history.
        assert again.state.log_history[0]["step"] == first + 1
    assert again.state.log_history[0]["stage"] == str(second)


def test_what_is_grown_again_is_further_on_and_what_was_deleted_is_told_no_more(report_to, tmp_path):
    trainer = system(tmp_path, report_to, budget=1)
    done = trainer.train().global_step
    folder, tracker = trainer.folder, tracker_of(trainer)
    before = len(tracker.points)
    trainer.s3t_model.unlearn(folder.table.members(0, 0)[:1])
    grown = trainer.train().global_step
    assert [step for step, *_ in losses(tracker.points[before:])] == list(range(done + 1, done + grown + 1))
    assert tracker.runs == ["begun", f"ended at {done}", "begun", f"ended at {done + grown}"]
    # Another process goes on from there too.
    assert max(SystemFolder(tmp_path).stage_record(key)["steps"][1] for key in folder.stages) == done + grown


def test_the_state_does_not_tell_of_a_stage_that_saw_what_was_deleted_meanwhile(tmp_path):
    class Deletes(StopsAt):
        def on_step_end(self, args, state, control, **kwargs):
            if self.begun == self.stage:
                self.stage = None
                apply(SystemFolder(tmp_path), [victim])

    trainer = system(tmp_path, budget=1, callbacks=[Deletes(2, 1)])
    victim = trainer.folder.table.members(0, 1)[0]
    trainer.train()
    told = [entry["stage"] for entry in trainer.state.log_history if "train_loss" in entry]
    # Each once, in the order in which what is there was trained.
    assert sorted(told) == sorted(map(str, trainer.folder.plan.stages())) and told[0] == "shard-0/0"
    steps = [entry["step"] for entry in trainer.state.log_history]
    assert steps == sorted(steps)


def test_a_log_from_inside_of_a_log_is_at_the_same_step(tmp_path):
    class LogsMore(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                trainer.log({"more": 1.0})

    trainer = system(tmp_path, budget=1, callbacks=[LogsMore()])
    trainer.train()
    steps = {name: [e["step"] for e in trainer.state.log_history if name in e] for name in ("loss", "more")}
    assert steps["more"] == steps["loss"] != []
    assert {e["stage"] for e in trainer.state.log_history} == set(map(str, trainer.folder.plan.stages()))


def test_records_of_earlier_versions_tell_of_no_steps():
    assert last_step({}) == last_step({1: {}, 2: {"steps": "all"}, 3: {"steps": [1]}}) == 0
    assert last_step({1: {"steps": [0, 4]}, 2: {"steps": [4, 9]}, 3: {}}) == 9


def test_tensorboard_has_one_writer_whose_steps_go_on(tmp_path, monkeypatch):
    writers = []

    class SummaryWriter:
        def __init__(self, log_dir=None):
            self.scalars, self.texts, self.is_closed = [], [], False
            writers.append(self)

        def add_scalar(self, name, value, step):
            self.scalars.append((name, step, value))

        def add_text(self, name, text, step=None):
            self.texts.append(name)

        def flush(self):
            pass

        def close(self):
            self.is_closed = True

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr("transformers.integrations.integration_utils.is_tensorboard_available", lambda: True)
    trainer = system(tmp_path, "tensorboard", budget=1)
    assert any(isinstance(callback, TensorBoardCallback) for callback in trainer.callback_handler.callbacks)
    output = trainer.train()
    (writer,) = writers
    assert writer.is_closed and set(writer.texts) == {"args", "model_config"}
    for name in ("train/loss", "train/shard", "train/sequence", "train/depth"):
        steps = [step for found, step, _ in writer.scalars if found == name]
        assert set(steps) == set(range(1, output.global_step + 1)) and steps == sorted(steps), name


def test_trls_trainer_is_tracked_alike(report_to, tmp_path):
    words = WordLevel(
        {"[PAD]": 0, "[UNK]": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 60)}}, "[UNK]"
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), pad_token="[PAD]", eos_token="</s>")
    logging = {"logging_strategy": "steps", "logging_steps": 1, "report_to": report_to}
    args = training_arguments(tmp_path, SFTConfig, bf16=False, max_length=8, **logging)
    rows = [{"id": f"row-{number}", "text": f"w{number + 3} w5 w6"} for number in range(16)]
    trainer = make_trainer(
        tmp_path, tiny_llama(2), rows, cls=S3TSFTTrainer, args=args, config=s3t_config(), processing_class=tokenizer
    )
    output = trainer.train()
    tracker = tracker_of(trainer)
    assert losses(tracker.points) == curve(trainer.folder) and len(tracker.runs) == 2
    assert trainer.state.global_step == output.global_step
