"""A deletion as any process applies it to a folder: all or nothing, seen beforehand, and the same as a model's."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import folders
from support.folders import (
    NAMES,
    NUMBERS,
    USERS,
    add_checkpoint,
    apply,
    delete_and_die,
    files_of,
    grow,
    new_system,
    preview,
    stages_on_disk,
)

from hf_s3t.errors import ConfigError, ExampleIdError, FolderError, UnknownExampleError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.folder.table_file import write_table
from hf_s3t.operations.written_ids import groups_from_texts, ids_from_texts
from hf_s3t.plan import StageKey
from hf_s3t.records.examples import ExampleTable


pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A system with every stage, not to be changed."""
    path = tmp_path_factory.mktemp("grown") / "system"
    grow(new_system(path))
    return path


@pytest.fixture
def system(grown, tmp_path):
    return SystemFolder(shutil.copytree(grown, tmp_path / "system"))


def names_on_disk(path) -> list:
    return pq.read_table(Path(path) / "examples.parquet").column("id").to_pylist()


def of_slice(folder, shard, slice_):
    return folder.table.members(shard, slice_)


# Seen beforehand


@settings(max_examples=25)
@given(ids=st.lists(st.sampled_from(NUMBERS), max_size=4), groups=st.lists(st.sampled_from(folders.USERS), max_size=2))
def test_a_preview_says_what_the_deletion_then_does(grown, tmp_path_factory, ids, groups):
    folder = SystemFolder(shutil.copytree(grown, tmp_path_factory.mktemp("copy") / "system"))
    seen = preview(folder, ids, groups)
    report = apply(folder, ids, groups)
    assert (seen.requested, len(seen.present), seen.already_deleted) == (
        report.requested,
        report.deleted,
        report.already_deleted,
    )
    assert set(seen.stages_removed) == set(report.stages_removed)
    assert (seen.depths_before, seen.depths_after) == (report.depths_before, report.depths_after)
    assert seen.would_exhaust == report.is_exhausted
    now = preview(SystemFolder(folder.path), [], [])
    assert now.depths_before == report.depths_after
    assert now.deletions_left_before == seen.deletions_left_after <= seen.deletions_left_before


def test_a_preview_changes_nothing(system):
    before = files_of(system.path)
    seen = preview(system, [3], ["user-4"])
    assert seen.present == (3, 8, 9) and seen.stages_removed
    assert files_of(system.path) == before
    assert len(system.table) == len(NUMBERS)


def test_a_preview_knows_of_exhaustion(system):
    seen = preview(system, NUMBERS)
    assert seen.would_exhaust and seen.depths_after == [0, 0] and seen.deletions_left_after == 0
    assert seen.depths_before == [3, 3] and seen.deletions_left_before > 0


def test_a_preview_counts_no_stage_that_an_earlier_deletion_condemned(system):
    (first,) = of_slice(system, 0, 0)[:1]
    delete_and_die(system, [first])
    assert preview(system, of_slice(system, 0, 0)).stages_removed == ()


def test_a_preview_and_a_deletion_know_what_another_process_deleted_since_the_folder_was_read(system):
    first, second = of_slice(system, 0, 0)[:1], of_slice(system, 0, 1)[:1]
    gone = set(apply(SystemFolder(system.path), first).stages_removed)
    seen = preview(system, [*first, *second])
    assert (seen.present, seen.already_deleted) == (tuple(second), 1) and not gone & set(seen.stages_removed)
    late = SystemFolder(system.path)
    apply(SystemFolder(system.path), second)
    report = apply(late, second)
    assert (report.deleted, report.already_deleted, report.stages_removed) == (0, 1, ())
    assert SystemFolder(system.path).ledger.num_deletions == 2


# What it does


def test_a_deletion_leaves_nothing_that_saw_the_example(system):
    touched = of_slice(system, 0, 1)[0]
    unfinished = StageKey(0, (1, 2, 0))
    system.remove_stages([unfinished])
    stale = add_checkpoint(system, unfinished)
    report = apply(system, [touched])
    assert (report.requested, report.deleted, report.already_deleted) == (1, 1, 0)
    assert report.depths_before == [3, 3] and report.depths_after == [2, 3] and not report.is_exhausted
    assert report.lock_seconds == 0 and report.seconds > 0
    left = stages_on_disk(system.path)
    assert left == {str(key) for key in system.plan.stages() if key != unfinished and not key.saw({(0, 1)})}
    assert not left & set(report.stages_removed)
    assert touched not in names_on_disk(system.path)
    assert not stale.exists()
    (entry,) = system.ledger.entries
    assert entry.ids == (system.key.of_id(touched),) and set(entry.removed) == set(report.stages_removed)
    assert set(entry.left) == left and entry.versions["torch"]


def test_examples_of_equal_content_are_named_or_deleted_too(tmp_path):
    folder = new_system(tmp_path / "system", groups=None, config=folders.S3TConfig(num_slices=3, seed=1))
    row = folder.table.rows[3]
    rows = {**folder.table.rows, 7: dataclasses.replace(folder.table.rows[7], digest=row.digest)}
    write_table(folder.path / "examples.parquet", ExampleTable.of(rows, 1, 3, 1, folder.names), folder.ledger)
    folder = grow(SystemFolder(folder.path))
    assert preview(folder, [3]).duplicates == (7,)
    seen = preview(folder, [3], include_duplicates=True)
    assert set(seen.present) == {3, 7} and seen.duplicates == ()
    kept = apply(SystemFolder(shutil.copytree(folder.path, tmp_path / "copy")), [3])
    assert (kept.deleted, kept.duplicates) == (1, (7,))
    both = apply(folder, [3], include_duplicates=True)
    assert (both.deleted, both.duplicates) == (2, ())
    assert set(both.stages_removed) == set(seen.stages_removed)


def test_a_group_whose_last_example_went_by_id_is_known_as_deleted(system):
    one, other = NUMBERS[0], NUMBERS[1]
    apply(system, [one])
    apply(system, [other])
    again = apply(system, groups=[USERS[0]])
    assert (again.deleted, again.requested) == (0, 0)


def test_a_group_is_deleted_as_one(system):
    report = apply(system, groups=["user-2"])
    assert report.deleted == 2 and system.ledger.entries[0].groups == (system.key.of_group("user-2"),)
    again = apply(system, groups=["user-2"])
    assert (again.requested, again.deleted, again.stages_removed) == (0, 0, ())
    assert again.deleted_groups == preview(system, groups=["user-2"]).deleted_groups == ("user-2",)
    assert system.ledger.line_of_group(system.key.of_group("user-2")) == 1
    assert system.ledger.line_of_group(system.key.of_group("user-3")) is None


def test_ids_deleted_before_are_no_error_and_make_no_line(system):
    apply(system, [3])
    before = files_of(system.path)
    report = apply(system, [3])
    assert (report.requested, report.deleted, report.already_deleted) == (1, 0, 1)
    assert files_of(system.path) == before


def test_deleting_everything_exhausts(system):
    report = apply(system, NUMBERS)
    assert report.is_exhausted and report.depths_after == [0, 0]
    assert stages_on_disk(system.path) == set() and names_on_disk(system.path) == []
    assert apply(SystemFolder(system.path), [3]).already_deleted == 1


def test_unknown_ids_can_be_passed_over(system):
    seen = preview(system, [3, 99, 98], ["nobody"], missing="ignore")
    report = apply(system, [3, 99, 98], ["nobody"], missing="ignore")
    assert (report.requested, report.deleted) == (1, 1)
    assert (report.unknown, report.unknown_groups) == (seen.unknown, seen.unknown_groups) == (2, 1)


def test_stages_that_a_trainer_added_meanwhile_go_too(grown, tmp_path):
    path = tmp_path / "system"
    mine = new_system(path)
    grow(SystemFolder(path))
    assert not mine.stages
    report = apply(mine, [3])
    assert report.stages_removed and stages_on_disk(path) == {str(key) for key in SystemFolder(path).valid_stages}


def test_deletions_by_another_process_meanwhile_are_known(system):
    other = SystemFolder(system.path)
    apply(other, [3, 4])
    report = apply(system, [3, 5])
    assert (report.deleted, report.already_deleted) == (1, 1)
    assert system.ledger.num_deletions == 2


# Refused, interrupted


@pytest.mark.parametrize("damage", [Path.unlink, lambda file: file.write_bytes(b'{"sta')])
def test_a_damaged_record_of_a_stage_says_how_deletions_go_on(system, damage):
    key = StageKey(0, (0, 1))
    damage(system.path / key.path / "stage.json")
    with pytest.raises(
        FolderError, match=r"Restore it, or remove its folder and call `train\(\)` to grow it again\.$"
    ):
        apply(system, [3])
    shutil.rmtree(system.path / key.path)
    assert apply(system, [3]).deleted == 1


@pytest.mark.parametrize("act", [preview, apply])
@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (dict(ids=[3, 99]), UnknownExampleError, "Unknown ids: 99"),
        (dict(ids=[3], groups=["nobody"]), UnknownExampleError, "Unknown groups: 'nobody'"),
        (dict(ids=["3"]), UnknownExampleError, "Unknown ids: '3'"),
        (dict(ids="3"), ExampleIdError, "must be a list"),
        (dict(ids=[True]), ExampleIdError, "integers or strings"),
        (dict(), ConfigError, "neither `ids` nor `groups`"),
        (dict(ids=[3], missing="skip"), ConfigError, "`missing` must be one of error, ignore"),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value),
)
def test_a_refused_request_changes_nothing(system, act, request_, error, message):
    before = files_of(system.path)
    with pytest.raises(error, match=message):
        act(system, **request_)
    assert files_of(system.path) == before


def test_a_ledger_that_lost_lines_is_refused(system):
    apply(system, [3])
    (system.path / "ledger.jsonl").write_text("")
    with pytest.raises(FolderError, match="lacks lines"):
        apply(system, [4])


@pytest.mark.parametrize("step", ["remove_stages", "remove_stale_checkpoints", "compact"])
def test_the_next_load_finishes_a_deletion_that_died(system, monkeypatch, step):
    class Death(Exception):
        pass

    whole = getattr(SystemFolder, step)

    def die(self, *args):
        if self.ledger.num_deletions:
            raise Death
        return whole(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(SystemFolder, step, die)
        with pytest.raises(Death):
            apply(system, [3])
    after = SystemFolder(system.path)
    assert 3 not in names_on_disk(system.path)
    assert stages_on_disk(system.path) == {str(key) for key in after.valid_stages}


def test_a_deletion_is_the_same_as_that_of_a_model(tmp_path):
    import torch
    from support.tiny import batch_of, lm_rows, make_trainer, plant_stages, tiny_llama

    from hf_s3t import S3TModel

    trainer = make_trainer(tmp_path / "by-model")
    plant_stages(trainer)
    shutil.copytree(tmp_path / "by-model", tmp_path / "by-folder")
    ids = trainer.folder.table.members(0, 1)[:2]
    model = S3TModel.from_pretrained(tmp_path / "by-model", base_model=tiny_llama())
    serving = S3TModel.from_pretrained(tmp_path / "by-folder", base_model=tiny_llama())
    expected = model.unlearn(ids)
    model.save_pretrained(tmp_path / "by-model")  # waits for the table
    report = apply(SystemFolder(tmp_path / "by-folder"), ids)
    for name in ("requested", "deleted", "already_deleted", "stages_removed", "depths_before", "depths_after"):
        assert getattr(report, name) == getattr(expected, name), name
    assert stages_on_disk(tmp_path / "by-folder") == stages_on_disk(tmp_path / "by-model")
    assert names_on_disk(tmp_path / "by-folder") == names_on_disk(tmp_path / "by-model")
    lines = [SystemFolder(tmp_path / name).ledger.entries[0] for name in ("by-folder", "by-model")]
    # A model that serves the folder follows before its next answer.
    batch = batch_of(lm_rows(2))
    assert torch.equal(serving(**batch).logits, model(**batch).logits)
    assert serving.status()["depths"] == report.depths_after
    assert lines[0].ids == lines[1].ids and lines[0].removed == lines[1].removed and lines[0].left == lines[1].left


# Ids as texts


def test_texts_become_ids_of_the_type_the_system_has(system, tmp_path):
    assert ids_from_texts(system, ["3", " 11 ", "-5", "99"]) == [3, 11, -5, 99]
    assert groups_from_texts(system, ["user-1", "7"]) == ["user-1", "7"]
    named = new_system(tmp_path / "named", NAMES, groups=[number // 2 for number in range(12)])
    assert ids_from_texts(named, ["3", " 11 ", ""]) == ["3", " 11 ", ""]
    assert groups_from_texts(named, ["4"]) == [4]


@pytest.mark.parametrize("text", ["x", "", "3.0", "03", "+3", "1e3", "٣", "3 4", "0x1", "-0", "1" * 30, "1_000"])
def test_a_text_that_is_no_number_is_refused_where_ids_are_numbers(system, text):
    with pytest.raises(ExampleIdError, match="integers such as"):
        ids_from_texts(system, [text])


def test_groups_are_refused_where_there_are_none(tmp_path):
    folder = new_system(tmp_path / "system", config=folders.S3TConfig(num_slices=2, seed=1), groups=None)
    with pytest.raises(ExampleIdError, match="without a `group_column`"):
        groups_from_texts(folder, ["user-1"])
    assert groups_from_texts(folder, []) == []


@pytest.mark.parametrize("ids", [NUMBERS, [str(number) for number in NUMBERS]], ids=["numbers", "texts"])
def test_of_a_system_that_lost_everything_the_ledger_knows_the_type(tmp_path, ids):
    folder = new_system(tmp_path / "system", ids)
    apply(folder, ids)
    folder = SystemFolder(folder.path)
    assert ids_from_texts(folder, ["3", "never"]) == [ids[3], "never"]


def test_nothing_is_imported_under_the_lock_and_pandas_nowhere(tmp_path):
    new_system(tmp_path / "system")
    code = f"""
import contextlib, sys
from hf_s3t.cli.app import app
from hf_s3t.folder import system

@contextlib.contextmanager
def lock(self, lock=system.SystemFolder.lock):
    with lock(self):
        before = set(sys.modules)
        yield
        assert set(sys.modules) == before, sorted(set(sys.modules) - before)

system.SystemFolder.lock = lock
app(["unlearn", {str(tmp_path / "system")!r}, "3"], standalone_mode=False)
assert not {{"pandas", "torch", "datasets"}}.intersection(sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stderr == ""
    assert 3 not in SystemFolder(tmp_path / "system").table.rows
