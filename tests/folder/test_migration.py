"""Folders of format 1, as its last code wrote them, open for ever; the first write migrates one, in one step."""

import errno
import json
import multiprocessing
import os
import re
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.crashes import Faults, Recording, crashes, plant
from support.folders import apply, files_of, forge, gate_of, grow, new_system, stages_on_disk
from support.format_1 import FOLDERS, VERDICTS, WRITTEN, base, copy_of, format_of, load, verdict
from support.tiny import lm_rows, lora, make_trainer, s3t_config, training_arguments
from transformers import AutoModelForSequenceClassification, TrainerCallback
from typer.testing import CliRunner

from hf_s3t import S3TConfig
from hf_s3t.baselines.prototypes import ProtoSISAModel
from hf_s3t.cli.app import app
from hf_s3t.errors import ContentChangedError, FolderError
from hf_s3t.folder.identity import identity_of
from hf_s3t.folder.layout import CHECKPOINTS, CONFIG_FILE, PROTOTYPES_FILE, TABLE_FILE, TEMPORARY
from hf_s3t.folder.opening import ReadOnlyFolder
from hf_s3t.folder.system import SystemFolder
from hf_s3t.folder.table_file import write_table
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.pending import apply_pending
from hf_s3t.plan import Plan, StageKey
from hf_s3t.records.buffers import hexadecimal
from hf_s3t.records.digests import PUBLIC_SECRET
from hf_s3t.records.examples import ExampleTable
from hf_s3t.training.rows import StageRows, TrainingRows


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")


@pytest.fixture(params=FOLDERS)
def name(request):
    return request.param


@pytest.fixture
def path(name, tmp_path):
    """A copy of a folder of format 1."""
    return copy_of(name, tmp_path)


def stages(keys) -> list[str]:
    return sorted(map(str, keys))


def sees_no_search(monkeypatch) -> None:
    def searched(*args, **kwargs):
        raise AssertionError("a plan was searched that is written down")

    monkeypatch.setattr("hf_s3t.plan.stages.select_sequences", searched)


# Opening


def test_what_was_said_of_it_is_said_still_and_looking_changes_nothing(path, name):
    before = files_of(path)
    assert verdict(path) == VERDICTS[name]
    assert files_of(path) == before


def test_opened_to_write_it_keeps_what_was_valid_and_loses_what_was_condemned(path, name):
    folder = SystemFolder(path)
    assert stages(folder.valid_stages) == VERDICTS[name]["valid"]
    assert stages_on_disk(path) == set(VERDICTS[name]["stages"]).difference(VERDICTS[name]["condemned"])
    assert inspect(path).problems == ()
    # A removal that waited was finished, and the table is without what was deleted: that was the first write.
    is_behind = any("examples.parquet" in problem for problem in VERDICTS[name]["problems"])
    assert format_of(path) == (2 if is_behind else 1)


def test_where_nothing_may_be_written_it_is_served_as_it_is(path, name):
    before = files_of(path)
    with Faults(0, errno.EROFS).running():
        assert stages(SystemFolder(path).valid_stages) == VERDICTS[name]["valid"]
    assert files_of(path) == before


# The first write


def deleted_elsewhere(tmp_path) -> SystemFolder:
    """Another copy of `digests`, in which something was deleted."""
    other = SystemFolder(copy_of("digests", tmp_path / "elsewhere"))
    apply(other, [min(other.table.rows)])
    return other


WRITES = {
    "deletion": lambda folder, tmp_path: apply(folder, [next(iter(folder.table.rows))]),
    "stage": lambda folder, tmp_path: grow(folder, limit=1),
    "table": lambda folder, tmp_path: folder.compact(),
    "merge": lambda folder, tmp_path: folder.merge_ledger(deleted_elsewhere(tmp_path).ledger),
    "export": lambda folder, tmp_path: folder.record_export(min(folder.valid_stages), {}),
    "copy": lambda folder, tmp_path: folder.copy_to(tmp_path / "copy"),
}


@pytest.mark.parametrize("write", WRITES)
def test_the_first_write_migrates_it_for_good(tmp_path, write, monkeypatch):
    path = copy_of("digests", tmp_path)
    folder, old = SystemFolder(path), json.loads((path / CONFIG_FILE).read_bytes())
    assert not folder.is_migrated and format_of(path) == 1
    valid = folder.valid_stages
    WRITES[write](folder, tmp_path)
    new = json.loads((path / CONFIG_FILE).read_bytes())
    assert new["format_version"] == 2 and folder.is_migrated
    # What it said is said still, besides what is new.
    added = {"system_id", "plan", "row_digests", "earlier_slices"}
    assert {n: v for n, v in new.items() if n not in added | {"format_version", "digest"}} == {
        n: v for n, v in old.items() if n not in ("format_version", "digest")
    }
    assert new["row_digests"] == 1 and new["plan"] == Plan.as_asked_for(folder.config).to_record()
    # Nobody searches the plan again, and what was valid is, unless what it saw was deleted.
    sees_no_search(monkeypatch)
    again = ReadOnlyFolder(path)
    assert again.plan == folder.plan and again.valid_stages == folder.valid_stages
    touched = {key for key in valid if key not in again.valid_stages}
    assert bool(touched) == (write in ("deletion", "merge"))
    written = (path / CONFIG_FILE).read_bytes()
    apply(again, [next(iter(again.table.rows))])
    assert (path / CONFIG_FILE).read_bytes() == written
    assert inspect(path).problems == ()


def test_a_scratch_folder_migrates_it_and_its_checkpoints_stay(tmp_path):
    path = copy_of("trained", tmp_path)
    folder = SystemFolder(path)
    key = StageKey(0, (1, 0))
    slices = folder.slice_digests(key)
    with folder.scratch(key, slices) as scratch:
        assert folder.is_migrated and folder.read_checkpoint_record(scratch / "checkpoint-1")["slices"] == slices
    assert inspect(path).checkpoints == (scratch / "checkpoint-1",) and inspect(path).problems == ()


def test_old_and_new_records_stand_side_by_side(path, name):
    folder = SystemFolder(path)
    before = folder.valid_stages
    apply(folder, [min(folder.table.rows)])
    kept = folder.valid_stages
    grow(folder)
    for again in (folder, SystemFolder(path), ReadOnlyFolder(path)):
        assert again.missing_stages() == [] and {*kept} <= again.valid_stages
    assert kept < before and inspect(path).problems == ()
    # What was grown again says what slices are now, and what stayed says it as it always did.
    records = {key: (path / key.path / "stage.json").read_bytes() for key in kept}
    assert records == {key: (WRITTEN / name / key.path / "stage.json").read_bytes() for key in kept if key in before}


def test_what_waits_is_applied(tmp_path):
    path = copy_of("digests", tmp_path)
    folder = SystemFolder(path)
    report = apply_pending(folder)
    assert report.deleted == VERDICTS["digests"]["pending"] and format_of(path) == 2
    assert verdict(path)["pending"] == 0 and inspect(path).problems == ()


def test_one_that_another_process_migrated_meanwhile_is_taken_over(tmp_path):
    path = copy_of("regrown", tmp_path)
    shutil.copytree(path, tmp_path / "before")
    # One that does not finish what was begun, as where nothing may be written.
    follower = ReadOnlyFolder(path)
    writer = SystemFolder(path)
    first, second = sorted(writer.table.rows)[:2]
    apply(writer, [first])
    grow(writer)
    written = (path / CONFIG_FILE).read_bytes()
    follower.refresh_ledger()
    follower.refresh_stages()
    assert follower.valid_stages == writer.valid_stages and follower.is_migrated
    apply(follower, [second])
    assert (path / CONFIG_FILE).read_bytes() == written
    writer.refresh()
    assert follower.valid_stages == writer.valid_stages == SystemFolder(path).valid_stages
    assert inspect(path).problems == ()


def test_what_slices_were_in_format_1_is_not_computed_where_another_process_migrated_it(tmp_path, monkeypatch):
    """That reads every row of a slice, at each deletion that is followed."""
    path = copy_of("digests", tmp_path)
    follower, writer = ReadOnlyFolder(path), SystemFolder(path)
    computed = []
    monkeypatch.setattr("hf_s3t.folder.earlier_slices.earlier_slice_digest", lambda *slice_: computed.append(slice_))
    for example_id in sorted(writer.table.rows)[:2]:
        apply(writer, [example_id])
        follower.refresh_ledger()
        follower.refresh_stages()
        assert follower.valid_stages == writer.valid_stages
    assert computed == []


def _forget(path, example_id, barrier):
    folder = SystemFolder(path)
    barrier.wait()
    apply(folder, [example_id])
    os._exit(0)


def test_two_processes_that_migrate_it_at_once_both_delete(tmp_path):
    path = copy_of("digests", tmp_path)
    forking = multiprocessing.get_context("fork")
    barrier, ids = forking.Barrier(2), sorted(SystemFolder(path).table.rows)[:2]
    processes = [forking.Process(target=_forget, args=(path, i, barrier)) for i in ids]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    folder = SystemFolder(path)
    assert folder.is_migrated and folder.ledger.num_deletions == 3 and not set(ids) & set(folder.table.rows)
    assert inspect(path).problems == ()


def test_another_system_in_its_place_is_not_written_to(tmp_path):
    path = copy_of("digests", tmp_path)
    folder = SystemFolder(path)
    forge(path / CONFIG_FILE, head=["score"])
    with pytest.raises(FolderError, match="holds another system now"):
        apply(folder, [min(folder.table.rows)])
    assert folder.ledger == SystemFolder(path).ledger


def test_a_backup_of_it_with_the_newest_ledger_finishes_every_deletion(tmp_path):
    path, backup = copy_of("digests", tmp_path), copy_of("digests", tmp_path / "backup")
    folder = SystemFolder(path)
    apply(folder, [min(folder.table.rows)])
    shutil.copy2(path / "ledger.jsonl", backup / "ledger.jsonl")
    restored = SystemFolder(backup)
    assert restored.valid_stages == folder.valid_stages and restored.ledger == folder.ledger
    assert restored.is_migrated and inspect(backup).problems == ()


def test_the_command_line_looks_at_it_and_forgets(tmp_path):
    path, before = copy_of("trained", tmp_path), files_of(WRITTEN / "trained")
    looks = ["status", path], ["check", path], ["locate", path, "--group", "person-3"], ["receipt", path]
    for command in (*looks, ["unlearn", path, "--group", "person-3", "--dry-run"], ["purge", path, "--dry-run"]):
        assert run(*command).exit_code == 0 and files_of(path) == before, command
    assert run("unlearn", path, "--group", "person-3").exit_code == 0 and format_of(path) == 2
    assert run("apply-pending", path).exit_code == 0
    for command in (*looks[:2], looks[3]):
        assert run(*command).exit_code == 0, command


def run(*command):
    return CliRunner().invoke(app, list(map(str, command)))


# Crashes


@pytest.fixture
def memory(tmp_path):
    """A place for hundreds of folders, in memory where there is room in it."""
    room = Path("/dev/shm")
    if not os.access(room, os.W_OK) or shutil.disk_usage(room).free < 2**30:
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir=room) as folder:
            yield Path(folder)


@pytest.mark.parametrize("write", ["deletion", "stage", "table"])
@pytest.mark.parametrize("name", ["digests"])
def test_a_crash_leaves_it_as_it_was_or_migrated(memory, name, write):
    path = copy_of(name, memory)
    folder = SystemFolder(path)
    valid, slices = folder.valid_stages, folder.table
    recording = Recording(path)
    with recording.running():
        WRITES[write](folder, memory)
        recording.mark("told")
    lost = valid - folder.valid_stages
    seen = set()
    for number, crash in enumerate(crashes(recording)):
        found = plant(crash.tree, memory / f"crash-{number}")
        seen.add(format_of(found))
        if format_of(found) == 1:
            # Nothing of the new format is in it: only leftovers, that their names tell.
            named = {n for n in crash.tree if "/.tmp-" not in f"/{n}"}
            assert {n: crash.tree[n] for n in named} == recording.start, crash
        opened = SystemFolder(found)
        assert valid - lost <= opened.valid_stages and not (crash.told and lost & opened.valid_stages), crash
        assert not crash.told or (opened.is_migrated and len(opened.table) == len(folder.table)), crash
        assert len(opened.table) in (len(slices), len(folder.table)) and inspect(found).problems == (), crash
        shutil.rmtree(found)
    assert seen == {1, 2}


@pytest.mark.parametrize("name", ["behind", "regrown"])
def test_a_crash_while_it_is_opened_leaves_what_is_valid(memory, name):
    """Of these the opening finishes a removal, and migrates them before it writes the table."""
    path = copy_of(name, memory)
    recording = Recording(path)
    with recording.running():
        SystemFolder(path)
    seen = set()
    for number, crash in enumerate(crashes(recording)):
        found = plant(crash.tree, memory / f"crash-{number}")
        seen.add(format_of(found))
        if format_of(found) == 1:
            untouched = ("examples.parquet", "ledger.jsonl", CONFIG_FILE)
            assert all(crash.tree[file] == recording.start[file] for file in untouched), crash
        folder = SystemFolder(found)
        assert stages(folder.valid_stages) == VERDICTS[name]["valid"] and folder.is_migrated, crash
        assert not folder.condemned_stages() and inspect(found).problems == (), crash
        shutil.rmtree(found)
    assert seen == {1, 2}


def test_a_disk_that_refuses_leaves_it_as_it_was(memory):
    path = copy_of("digests", memory)
    folder, before, said = SystemFolder(path), files_of(path), []
    while format_of(path) == 1:
        # Each time one operation more succeeds.
        with Faults(len(said)).running():
            try:
                apply(folder, [min(folder.table.rows)])
            except FolderError as error:
                said.append(str(error))
        if format_of(path) == 1:
            # Nor can what was half written be taken away from such a disk; its name tells what it is.
            left = {name: data for name, data in files_of(path).items() if not name.startswith(TEMPORARY)}
            assert left == before and not folder.is_migrated
            assert stages(folder.valid_stages) == VERDICTS["digests"]["valid"]
    assert any(re.search(rf"{CONFIG_FILE} could not be written .*Nothing was removed\. Make room", s) for s in said)
    apply(folder, [min(folder.table.rows)])
    assert folder.is_migrated and inspect(path).problems == ()


# Models


INPUTS = {"input_ids": torch.tensor([lm_rows(24)[0]["input_ids"]])}


def answer(model):
    with torch.no_grad():
        return model(**INPUTS).logits


def trainer_of(path, keep_idle=None, **more):
    rows = [{**row, "group": f"person-{number % 8}"} for number, row in enumerate(lm_rows(24))]
    saving = dict(save_strategy="steps", save_steps=1, save_total_limit=1, num_train_epochs=2)
    args = training_arguments(path, **saving)
    config = s3t_config(group_column="group", keep_idle=keep_idle)
    model = base()
    # As the folder was made.
    more = {"peft_config": lora(model, target_modules="all-linear"), **more}
    return make_trainer(path, model, Dataset.from_list(rows), args=args, config=config, **more)


def test_a_live_model_goes_on_while_another_process_migrates_its_folder(tmp_path):
    path = copy_of("trained", tmp_path)
    shutil.rmtree(path / "stages/shard-0/1")
    model = load(path)
    before = answer(model)
    assert format_of(path) == 1
    trainer_of(path).train()
    assert format_of(path) == 2
    assert torch.equal(answer(model), answer(load(path)))
    report = apply(SystemFolder(path), groups=["person-3"])
    assert report.stages_removed and torch.equal(answer(model), answer(load(path)))
    written = (path / CONFIG_FILE).read_bytes()
    model.unlearn(groups=["person-4"])
    model.apply_pending()
    assert (path / CONFIG_FILE).read_bytes() == written and not torch.equal(answer(model), before)
    assert model.check() == [] and torch.equal(answer(model), answer(load(path)))


class Steps(TrainerCallback):
    """The step in which each stage begins."""

    def __init__(self):
        self.first = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.first.append(state.global_step)


def test_a_stage_is_resumed_from_its_checkpoint(tmp_path):
    path, anew = copy_of("trained", tmp_path), copy_of("trained", tmp_path / "anew")
    for copy in (path, anew):
        # What was begun is idle: another stage saw its slices.
        forge(copy / CONFIG_FILE, s3t_config=s3t_config(group_column="group", keep_idle=True).to_dict())
    shutil.rmtree(anew / CHECKPOINTS)
    steps = Steps()
    trainer = trainer_of(path, keep_idle=True, callbacks=[steps])
    (key,) = trainer.folder.plan.missing(trainer.folder.valid_stages)
    begun = trainer.folder.read_checkpoint_record(trainer.folder.checkpoints(key) / "checkpoint-1")
    trainer.train()
    # Under other versions of the libraries than it was written with, or another processor, it is begun anew.
    is_same = begun["circumstances"] == trainer.folder.stage_record(key)["circumstances"]
    assert steps.first == [1 if is_same else 0] and trainer.s3t_model.check() == []
    trainer_of(anew, keep_idle=True).train()
    adapter = Path(key.path, "adapter_model.safetensors")
    assert (path / adapter).read_bytes() == (anew / adapter).read_bytes()


def test_rows_keep_the_digests_that_it_was_made_with(tmp_path):
    """Those of now count no field that Arrow gives a row because another has it; a system does not change its own."""
    rows = [{**row, "about": {"phone": 1} if number % 2 else {"mail": 2}} for number, row in enumerate(lm_rows(24))]
    path, dataset, config = tmp_path / "system", Dataset.from_list(rows), s3t_config(num_slices=2, budget=1)

    def trainer():
        return make_trainer(path, rows=dataset, config=config)

    folder, given = trainer().folder, TrainingRows(dataset, config)
    then = dict(zip(given.ids, hexadecimal(given.digests(folder.key, 1)), strict=True))
    assert then.keys() == folder.table.rows.keys()
    assert all(row.digest != then[i] for i, row in folder.table.rows.items())
    as_then = {i: replace(row, digest=then[i]) for i, row in folder.table.rows.items()}
    write_table(path / TABLE_FILE, ExampleTable.of(as_then, 1, 2, config.seed, folder.names), folder.ledger)
    with pytest.raises(ContentChangedError):
        trainer()
    forge(path / CONFIG_FILE, row_digests=1)
    trainer().train()
    went_on = trainer()
    went_on.train()
    (key, *_) = went_on.folder.plan.stages()
    fed = went_on.folder.stage_record(key)["circumstances"]["data_digest"]
    table, secret, names = went_on.folder.table, went_on.folder.key, went_on.folder.names
    digests = [StageRows(dataset, given, names, version).digest(key, table, secret) for version in (1, 2)]
    assert fed == digests[0] != digests[1]


def test_a_copy_of_it_is_migrated_and_serves_the_same(tmp_path):
    path = copy_of("trained", tmp_path)
    model = load(path)
    model.save_pretrained(tmp_path / "copy")
    assert format_of(path) == format_of(tmp_path / "copy") == 2
    copy = load(tmp_path / "copy")
    assert torch.equal(answer(copy), answer(model)) and copy.check() == []
    assert copy.folder.record["system_id"] == model.folder.record["system_id"]
    assert copy.folder.valid_stages == model.folder.valid_stages


def test_prototypes_of_a_baseline_stay(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_S3T_KEY", PUBLIC_SECRET)
    path = copy_of("protosisa", tmp_path)
    before = (path / PROTOTYPES_FILE).read_bytes()

    def opened():
        return ProtoSISAModel.from_pretrained(
            path, base_model=AutoModelForSequenceClassification.from_pretrained(WRITTEN / "base-of-classes")
        )

    model = opened()
    folder, kept = model.folder, answer(model)
    assert format_of(path) == 1 and not model.prototypes.missing(folder.table)
    assert (path / PROTOTYPES_FILE).read_bytes() == before
    gone = folder.table.members(0, 1)[0]
    model.unlearn([gone])
    assert format_of(path) == 2 and model.prototypes.missing(folder.table) == [(0, 1)]
    again = opened()
    assert again.prototypes.missing(again.folder.table) == [(0, 1)] and again.check() == []
    assert torch.equal(answer(again), answer(model)) and not torch.equal(kept, answer(model))


# What is new in it


def test_a_new_system_has_an_identity_of_its_own_and_its_plan_is_never_searched_again(tmp_path, monkeypatch):
    config = S3TConfig(num_shards=2, num_slices=3, seed=1, sequence_selection="optimal", budget=2)
    folder, other = (new_system(tmp_path / n, config=config, groups=None) for n in ("one", "two"))
    assert folder.record["system_id"] != other.record["system_id"] and folder.record["row_digests"] == 2
    assert "earlier_slices" not in folder.record
    sees_no_search(monkeypatch)
    grow(folder)
    again = SystemFolder(folder.path)
    assert again.plan == folder.plan and again.valid_stages == set(folder.plan.stages())
    assert inspect(folder.path).problems == ()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("system_id", None), ("system_id", 10**31), ("system_id", "../../etc"), ("row_digests", 3),
        ("row_digests", True), ("earlier_slices", ["a"]), ("earlier_slices", {"a": 1}), ("plan", None), ("plan", []),
        ("plan", [[{"slices": [0, 1], "prefix": [0, 1]}]] * 2),
    ],
)  # fmt: skip
def test_what_no_version_writes_is_refused_by_its_name(tmp_path, field, value):
    folder = new_system(tmp_path / "system")
    forge(folder.path / CONFIG_FILE, **{field: value})
    with pytest.raises(FolderError, match=rf"{CONFIG_FILE}.*{field}.*Restore it from a backup"):
        SystemFolder(folder.path)
    assert any(field in problem for problem in inspect(folder.path).problems)


@pytest.mark.parametrize("name", ["trained", "behind"], indirect=True)
def test_a_gate_is_given_to_a_folder_of_format_1_which_stays_the_system_that_it_was(path):
    folder = SystemFolder(path)
    identity, stages_before, left = identity_of(folder.record), folder.valid_stages, next(iter(folder.table.rows))
    folder.put_gate(gate_of(folder.table, folder.key), {"gate": "terms"})
    again = SystemFolder(path)
    assert format_of(path) == 2 and again.config.gate == "terms" and not inspect(path).problems
    assert identity_of(again.record) == identity and again.valid_stages == stages_before
    apply(again, [left])
    found, expected = SystemFolder(path).load_gate(), gate_of(again.table, again.key)
    assert found.rows.digests.tolist() == expected.rows.digests.tolist() and found.is_counted
