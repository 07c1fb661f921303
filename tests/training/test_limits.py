"""How far a call of `train` goes, and what it reports of what it did and left."""

from statistics import fmean

import pytest
from support.folders import apply
from support.tiny import lm_rows, make_trainer, s3t_config, tiny_llama
from transformers import TrainerCallback

from hf_s3t.errors import ConfigError
from hf_s3t.folder.status import system_status
from hf_s3t.training import plan_run


pytestmark = pytest.mark.usefixtures("one_thread")


def trainer_of(path, callbacks=None):
    """A system of fourteen stages, one for each set of slices of two shards."""
    config = s3t_config(num_slices=3, num_shards=2, keep_idle=None, sequence_selection="lattice")
    return make_trainer(path, tiny_llama(3), lm_rows(36), config=config, callbacks=callbacks)


class Clock(TrainerCallback):
    """A clock by which every stage takes ten seconds, and nothing else any time."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr(plan_run.time, "monotonic", lambda: self.now)

    def on_train_end(self, args, state, control, **kwargs):
        self.now += 10


@pytest.mark.parametrize("wrong", [-1, True, 1.5, "2"])
def test_a_number_of_stages_that_is_none_is_refused_before_anything(wrong, tmp_path):
    trainer = trainer_of(tmp_path / "system")
    with pytest.raises(ConfigError, match=r"`max_stages` must be an integer of at least 0, got .*Leave it out"):
        trainer.train(max_stages=wrong)
    assert not trainer.folder.valid_stages


@pytest.mark.parametrize("wrong", [0, -1.0, True, float("nan"), "2"])
def test_a_time_that_is_none_is_refused_before_anything(wrong, tmp_path):
    trainer = trainer_of(tmp_path / "system")
    with pytest.raises(ConfigError, match=r"`max_seconds` must be a number above 0, got .*Leave it out"):
        trainer.train(max_seconds=wrong)
    assert not trainer.folder.valid_stages


def test_the_report_says_what_was_done_and_what_is_left_as_status_does(tmp_path):
    trainer = trainer_of(tmp_path / "system")
    left = 14
    for wanted in (0, 1, 5, 99):
        done = trainer.train(max_stages=wanted).metrics
        left -= done["stages_trained"]
        assert done["stages_trained"] == min(wanted, left + done["stages_trained"]) and done["stages_left"] == left
        status = system_status(trainer.folder)
        assert {name: done[name] for name in ("stages_left", "work_left", "expected_depth")} == {
            name: status[name] for name in ("stages_left", "work_left", "expected_depth")
        }
        assert done["depth"] == fmean(status["depths"])
    assert (left, done["work_left"], done["depth"]) == (0, 0.0, 3.0)


def test_after_so_many_seconds_no_stage_is_begun_and_the_one_under_way_is_finished(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path / "system", [Clock(monkeypatch)])
    assert trainer.train(max_seconds=25.0).metrics["stages_trained"] == 3
    assert trainer.train(max_seconds=10).metrics["stages_trained"] == 1
    # Whichever comes first.
    assert trainer.train(max_seconds=1e9, max_stages=2).metrics["stages_trained"] == 2
    assert trainer.train(max_seconds=5, max_stages=2).metrics["stages_trained"] == 1
    assert len(trainer.folder.valid_stages) == 7


def test_one_stage_brings_full_depth_back_and_is_trained_first(tmp_path):
    trainer = trainer_of(tmp_path / "system")
    trainer.train()
    apply(trainer.folder, trainer.folder.table.members(0, 0)[:1])
    (before, after) = (trainer.train(max_stages=number).metrics for number in (0, 1))
    assert (before["depth"], before["stages_left"]) == (2.5, 4)
    assert (after["depth"], after["stages_left"]) == (3.0, 3)


class Deletes(TrainerCallback):
    """Another process that deletes while the first stage of a call is trained."""

    def __init__(self):
        self.folder, self.place = None, (1, 2)

    def on_train_begin(self, args, state, control, **kwargs):
        folder, self.folder = self.folder, None
        if folder is not None:
            apply(folder, folder.table.members(*self.place)[:1])


def test_a_deletion_meanwhile_counts_in_what_is_left(tmp_path):
    deletes = Deletes()
    trainer = trainer_of(tmp_path / "system", [deletes])
    trainer.train(max_stages=12)
    deletes.folder = type(trainer.folder)(trainer.folder.path)
    done = trainer.train(max_stages=1).metrics
    assert done["stages_trained"] == 1
    assert done["stages_left"] == len(trainer.folder.missing_stages()) == system_status(trainer.folder)["stages_left"]
    assert done["stages_left"] > 1


@pytest.mark.parametrize("limit", [{"max_stages": 1}, {"max_seconds": 15}], ids=["stages", "seconds"])
def test_a_stage_that_is_discarded_counts_as_none(limit, tmp_path, monkeypatch):
    deletes = Deletes()
    trainer = trainer_of(tmp_path / "system", [deletes, Clock(monkeypatch)])
    trainer.train(max_stages=4)
    before = trainer.folder.valid_stages
    key = trainer.folder.growth.next(before).key
    deletes.folder, deletes.place = type(trainer.folder)(trainer.folder.path), (key.shard, key.prefix[-1])
    done = trainer.train(**limit).metrics
    gone = {stage for stage in before if stage.shard == key.shard and key.prefix[-1] in stage.prefix}
    assert len(trainer.folder.valid_stages - (before - gone)) == done["stages_trained"] == 1
    assert done["stages_left"] == len(trainer.folder.missing_stages())


@pytest.mark.parametrize(("sequences", "where"), [([[0, 1], [1]], "slice 2 of shard 0"), ([[0, 2], [1, 0]], None)])
def test_examples_that_no_planned_sequence_names_are_told_of(sequences, where, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_s3t.training.trainer.logger.warning_once", said.append)
    config = s3t_config(num_slices=3, keep_idle=None, sequence_selection=sequences)
    table = make_trainer(tmp_path / "system", tiny_llama(3), lm_rows(36), config=config).folder.table
    (told,) = [sentence for sentence in said if "never trained on" in sentence] or [None]
    if where is None:
        assert told is None
    else:
        assert told.startswith(f"{table.size(0, 2)} of 36 examples are never trained on") and f"({where})" in told
        assert "name every slice in `sequence_selection`" in told
