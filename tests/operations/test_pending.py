"""Deletions recorded now and applied together later: durable, in force from when they are applied."""

import gc
import json
import shutil
import time

import pytest
from support.folders import apply
from support.insides import routing_of
from support.tiny import ids_of, lm_rows, make_trainer, plant_stages, s3t_config, tiny_llama
from transformers import TrainerCallback

from hf_s3t import S3TModel
from hf_s3t.errors import ConfigError, FolderError, S3TError, UnknownExampleError
from hf_s3t.folder.layout import PENDING_FILE
from hf_s3t.folder.system import SystemFolder


IDS = ids_of(12)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a system with every stage, not to be changed."""
    path = tmp_path_factory.mktemp("made") / "system"
    rows = [{**row, "person": f"p{n // 3}"} for n, row in enumerate(lm_rows(12))]
    plant_stages(make_trainer(path, tiny_llama(2), rows, config=s3t_config(num_slices=2, group_column="person")))
    return path


@pytest.fixture
def model(made, tmp_path):
    return load(shutil.copytree(made, tmp_path / "system"))


def load(folder) -> S3TModel:
    return S3TModel.from_pretrained(folder, base_model=tiny_llama(2))


def pending_file(model):
    return model.folder.path / PENDING_FILE


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.01)


def test_until_it_is_applied_a_request_changes_nothing_but_its_own_file(model):
    routing, stages = routing_of(model), model.folder.stages
    receipt = model.unlearn_later(IDS[:2])
    assert (receipt.requested, receipt.already_deleted, receipt.pending, receipt.apply_by) == (2, 0, 2, None)
    assert routing_of(model) is routing and model.folder.stages == stages
    assert model.folder.ledger.num_deletions == 0 and model.status()["pending"] == 2


def test_what_waits_is_applied_as_one_deletion(model):
    model.unlearn_later(IDS[:1])
    model.unlearn_later(IDS[:2])
    assert model.unlearn_later(groups=["p3"]).pending == 5
    report = model.apply_pending()
    assert report.deleted == 5 and model.folder.ledger.num_deletions == 1
    assert not pending_file(model).exists() and model.status()["pending"] == 0
    assert model.check() == []
    with pytest.raises(UnknownExampleError):
        model.locate(IDS[:1])
    # The group is known as deleted as one.
    assert model.unlearn(groups=["p3"]).deleted == 0


def test_applying_nothing_does_nothing(model):
    assert model.apply_pending().deleted == 0
    assert model.folder.ledger.num_deletions == 0


def test_requests_outlive_the_process(model):
    folder = model.folder.path
    model.unlearn_later(IDS[:2])
    del model
    gc.collect()
    assert load(folder).apply_pending().deleted == 2


def test_the_file_names_nobody(model):
    model.unlearn_later(IDS[:2], groups=["p3"])
    text = pending_file(model).read_text()
    assert not any(i in text for i in IDS) and "p3" not in text


def test_a_request_is_applied_by_itself_when_it_is_due(model):
    receipt = model.unlearn_later(IDS[:1], max_delay=0.05)
    assert receipt.apply_by is not None
    wait_for(lambda: model.folder.ledger.num_deletions == 1)
    wait_for(lambda: not pending_file(model).exists())


def test_a_request_that_fell_due_while_nothing_ran_is_applied_at_the_next_load(model):
    folder = model.folder.path
    model.unlearn_later(IDS[:1], max_delay=0)
    model._due.cancel()
    del model
    gc.collect()
    loaded = load(folder)
    wait_for(lambda: loaded.folder.ledger.num_deletions == 1)


def test_the_most_urgent_request_decides(model):
    late = model.unlearn_later(IDS[:1], max_delay=1000).apply_by
    soon = model.unlearn_later(IDS[1:2], max_delay=500).apply_by
    assert soon < late
    assert model.unlearn_later(IDS[2:3], max_delay=2000).apply_by == soon
    assert model.unlearn_later(IDS[3:4]).apply_by == soon
    model._due.cancel()


def test_unknown_ids_are_refused_and_nothing_is_recorded(model):
    with pytest.raises(UnknownExampleError, match="nobody"):
        model.unlearn_later([IDS[0], "nobody"])
    assert not pending_file(model).exists()
    assert model.unlearn_later([IDS[0], "nobody"], missing="ignore").requested == 1


@pytest.mark.parametrize(
    ("wrong", "says"),
    [({"ids": None}, "neither"), ({"ids": IDS[:1], "max_delay": -1}, "max_delay"), ({"ids": "x"}, "list of integers")],
    ids=["nothing named", "a negative delay", "no list"],
)
def test_wrong_requests_are_refused(model, wrong, says):
    with pytest.raises(S3TError, match=says):
        model.unlearn_later(**wrong)
    assert not pending_file(model).exists()


def test_deleted_before_is_no_error(model):
    model.unlearn(IDS[:1])
    receipt = model.unlearn_later(IDS[:2])
    assert (receipt.requested, receipt.already_deleted) == (1, 1)


def test_a_request_knows_what_another_process_deleted_since_the_model_was_loaded(model):
    apply(SystemFolder(model.folder.path), IDS[:1])
    receipt = model.unlearn_later(IDS[:2])
    assert (receipt.requested, receipt.already_deleted, receipt.pending) == (1, 1, 1)


def test_a_torn_last_line_was_never_acknowledged(model):
    model.unlearn_later(IDS[:1])
    whole = pending_file(model).read_bytes()
    pending_file(model).write_bytes(whole + whole[: len(whole) // 2])
    assert model.status()["pending"] == 1
    model.unlearn_later(IDS[1:2])
    assert model.apply_pending().deleted == 2


@pytest.mark.parametrize(
    "line", ["nonsense", "{}", "[]", json.dumps({"version": 9, "ids": [], "groups": [], "apply_by": None})]
)
def test_a_corrupt_line_is_an_error_that_names_it(model, line):
    model.unlearn_later(IDS[:1])
    pending_file(model).write_text(line + "\n" + pending_file(model).read_text())
    with pytest.raises(FolderError, match="line 1"):
        model.apply_pending()
    assert model.folder.ledger.num_deletions == 0


def test_a_crash_between_ledger_and_file_repeats_nothing(model):
    model.unlearn_later(IDS[:2])
    before = pending_file(model).read_bytes()
    model.apply_pending()
    pending_file(model).write_bytes(before)
    again = load(model.folder.path)
    assert again.status()["pending"] == 0
    assert again.apply_pending().deleted == 0 and again.folder.ledger.num_deletions == 1
    assert not pending_file(again).exists()


def test_how_long_is_checked(model):
    with pytest.raises(ConfigError, match="seconds"):
        model.apply_pending(timeout="soon")


class WaitsUntilDue(TrainerCallback):
    """Records a request in the first step of a training, and waits there until it is overdue."""

    def __init__(self, model, victim):
        self.model, self.victim = model, victim

    def on_step_end(self, args, state, control, **kwargs):
        """Once."""
        if self.victim is not None:
            self.model.unlearn_later([self.victim], max_delay=0.2)
            self.victim = None
            time.sleep(0.6)


def test_a_request_that_falls_due_while_stages_train_is_applied_when_they_are_done(tmp_path):
    trainer = make_trainer(tmp_path, rows=lm_rows(24), config=s3t_config(num_shards=2, partition="balanced"))
    plant_stages(trainer)
    model, folder = trainer.s3t_model, trainer.folder
    model.refresh()
    model.unlearn(folder.table.members(0, 0)[:1])
    victim = folder.table.members(1, 0)[0]
    trainer.add_callback(WaitsUntilDue(model, victim))
    trainer.train()
    wait_for(lambda: SystemFolder(tmp_path).is_deleted(victim))
    assert SystemFolder(tmp_path).ledger.num_deletions == 2
