"""Rows that come to a folder: what serves goes on serving, and nothing that was deleted comes back by itself."""

import json
import shutil

import pytest
from support.crashes import tree_of
from support.folders import NAMES, add, apply, grow, new_system, plant

from hf_s3t import S3TConfig
from hf_s3t.errors import ExampleIdError, FolderError, FormatVersionError
from hf_s3t.folder.layout import ADDITION_FILE, CONFIG_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.plan import StageKey
from hf_s3t.records.ledger import Ledger


CONFIG = S3TConfig(num_shards=2, num_slices=2, seed=1)
NEW = {"new-a": (0, 0), "new-b": (0, 0)}
SHARD = {f"new-{number}": (2, number % 2) for number in range(4)}


@pytest.fixture
def system(tmp_path):
    return grow(new_system(tmp_path / "system", NAMES, CONFIG, None)).path


def names(stages) -> list[str]:
    return sorted(map(str, stages))


def test_what_serves_goes_on_serving_when_rows_come_to_its_slices(system):
    folder = SystemFolder(system)
    valid, served = folder.valid_stages, folder.served()
    add(folder, NEW)
    assert folder.valid_stages == valid and folder.served() == served
    assert names(valid - folder.current_stages) == ["shard-0/0", "shard-0/0-1"]
    assert SystemFolder(system).valid_stages == valid and set(NEW) < set(SystemFolder(system).table.rows)
    inspection = inspect(system)
    assert not inspection.problems and "2 stages serve without examples that came" in inspection.notes[0]


def test_rows_that_the_table_cannot_take_are_refused_before_anything_is_written(system):
    folder, before = SystemFolder(system), tree_of(system)
    with pytest.raises(ExampleIdError, match="texts, those of the rows that came integers"):
        add(folder, {17: (0, 0)})
    assert tree_of(system) == before and not SystemFolder(system).ledger.lines


def test_a_deletion_of_what_a_stage_saw_ends_it_and_one_of_what_it_never_saw_does_not(system):
    folder = add(SystemFolder(system), NEW)
    valid = folder.valid_stages
    assert apply(folder, list(NEW)).stages_removed == ()
    assert folder.current_stages == folder.valid_stages == valid, "as if they had never come"
    add(folder, {"new-c": (0, 0)})
    report = apply(folder, folder.table.ids_in(0, 0)[:1])
    assert report.stages_removed == ("shard-0/0", "shard-0/0-1")
    assert SystemFolder(system).valid_stages == folder.valid_stages


def test_what_was_grown_again_saw_what_came_and_ends_with_it(system):
    folder = grow(add(SystemFolder(system), NEW))
    assert folder.current_stages == folder.valid_stages
    report = apply(folder, ["new-a"])
    assert len(report.stages_removed) == 2 and "shard-0/0" in report.stages_removed


def test_digests_after_a_row_came_and_went_are_as_if_it_had_never_come(system, tmp_path):
    folder = SystemFolder(system)
    places = list(folder.table.sizes_of_slices)
    before = [folder.table.slice_digest(*place) for place in places]
    apply(add(folder, NEW), list(NEW))
    assert [SystemFolder(system).table.slice_digest(*place) for place in places] == before
    assert b"new-a" not in (system / "examples.parquet").read_bytes()


def test_new_shards_change_nothing_that_is_there_and_are_planned_as_the_first(system):
    folder = SystemFolder(system)
    files = {path: path.read_bytes() for path in system.glob("stages/*/*/*")}
    identity, valid = folder.record["system_id"], folder.valid_stages
    add(folder, SHARD)
    assert folder.config.num_shards == folder.plan.num_shards == 3 and folder.record["system_id"] == identity
    assert folder.record["s3t_config"]["num_shards"] == 2, "what the user asked for stays"
    assert folder.plan.families[2] == folder.plan.families[0]
    assert folder.current_stages == valid and {path: path.read_bytes() for path in files} == files
    assert names(folder.missing_stages()) == ["shard-2/0", "shard-2/0-1", "shard-2/1"]
    assert [len(tips) for tips in grow(folder).served()] == [1, 1, 1]


def test_an_object_that_is_open_follows_what_another_process_adds(system):
    waiting, other = SystemFolder(system), SystemFolder(system)
    valid = waiting.valid_stages
    add(other, NEW)
    add(other, SHARD)
    waiting.refresh_ledger()
    assert {*NEW, *SHARD} < set(waiting.table.rows) and waiting.plan.num_shards == 3
    assert waiting.valid_stages == valid
    grow(waiting)
    other.refresh_stages()
    assert (
        other.current_stages
        == waiting.current_stages
        == set(waiting.stages) - (waiting.valid_stages - waiting.current_stages)
    )


def test_a_stage_that_is_grown_again_takes_what_stood_on_the_old_one_with_it(tmp_path):
    config = S3TConfig(num_slices=2, budget=1, keep_idle=True, seed=1)
    folder = grow(new_system(tmp_path / "system", NAMES, config, None))
    add(folder, {"new": (0, folder.plan.sequences[0][0][0])})
    assert len(folder.valid_stages) == 2 and not folder.current_stages
    grow(folder, limit=1)
    assert (
        names(folder.valid_stages) == names(folder.stages) == names(folder.current_stages) and len(folder.stages) == 1
    )
    assert not inspect(folder.path).problems
    assert len(grow(folder).current_stages) == 2


def test_growth_begins_with_what_lowers_no_depth(tmp_path):
    for config in (S3TConfig(num_slices=3, seed=1), S3TConfig(num_slices=3, keep_idle=True, seed=1)):
        folder = grow(new_system(tmp_path / str(config.keep_idle), NAMES, config, None))
        add(folder, {"new": (0, 0)})
        while folder.missing_stages():
            current = folder.current_stages
            step = folder.growth.next(current, folder.table.empty, folder.valid_stages - current)
            plant(folder, step.key)
            assert max(key.depth for key in folder.valid_stages) == 3, step.key
        assert {key.slices for key in folder.current_stages} == {key.slices for key in folder.plan.stages()}


def test_an_outdated_stage_does_not_take_the_place_of_one_that_saw_more(system):
    """Two trainers: one chose its stage before rows came, the other after."""
    slow, fast = SystemFolder(system), SystemFolder(system)
    key = StageKey(0, (0,))
    old = dict(slow.stage_record(key))
    files = {path.name: path.read_bytes() for path in (system / key.path).iterdir()}
    grow(add(fast, NEW))
    now = fast.adapter_digest(key)

    def fill(path):
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (path / name).write_bytes(files[name])

    assert slow.write_stage(key, {"slices": old["slices"], "below": None, "metrics": {}}, fill)
    assert slow.adapter_digest(key) == now and SystemFolder(system).current_stages == fast.current_stages


def test_who_does_not_know_of_additions_cannot_open_what_grew(system):
    before = json.loads((system / CONFIG_FILE).read_text())
    assert before["format_version"] == 2 and "added" not in before
    add(SystemFolder(system), NEW)
    assert json.loads((system / CONFIG_FILE).read_text())["format_version"] == 3
    line = json.loads(SystemFolder(system).ledger.lines[-1])
    assert line["kind"] == "addition" and "optional" not in line
    with pytest.raises(FormatVersionError, match="does not know"):
        Ledger.parse(SystemFolder(system).ledger.text.replace('"addition"', '"something newer"'))


def test_a_table_that_is_older_than_the_rows_that_came_is_refused_and_told_of(system, tmp_path):
    old = (system / "examples.parquet").read_bytes()
    add(SystemFolder(system), NEW)
    (system / "examples.parquet").write_bytes(old)
    with pytest.raises(
        FolderError, match=r"lacks rows that the ledger tells of.*older than the ledger. Restore the newest"
    ):
        SystemFolder(system)
    assert any("lacks rows that line 1 of the ledger tells of" in problem for problem in inspect(system).problems)


def test_rows_that_were_never_told_of_are_removed_by_the_next_load(system):
    (system / ADDITION_FILE).write_bytes(b"of who died before")
    assert [(found.path.name, found.kind) for found in inspect(system).to_remove] == [(ADDITION_FILE, "leftover")]
    SystemFolder(system)
    assert not (system / ADDITION_FILE).exists()


def test_what_comes_back_by_an_explicit_word_is_in_and_can_be_deleted_again(system):
    folder = SystemFolder(system)
    one = folder.table.ids_in(0, 0)[0]
    apply(folder, [one])
    add(folder, {one: (0, 0)}, again=[one])
    for opened in (folder, SystemFolder(system)):
        assert not opened.is_deleted(one) and one in opened.table.rows
        assert opened.ledger.deleted_since(0) == [opened.names.id_digest(one)]
    apply(folder, [one])
    for opened in (folder, SystemFolder(system)):
        assert opened.is_deleted(one) and one not in opened.table.rows
    assert not inspect(system).problems


def test_where_two_histories_meet_deletion_wins(system, tmp_path):
    one = SystemFolder(system).table.ids_in(0, 0)[0]
    here, there = SystemFolder(system), SystemFolder(shutil.copytree(system, tmp_path / "there"))
    apply(here, [one])
    add(here, {one: (0, 0)}, again=[one])
    apply(there, [one])
    # Here it came back after the deletion here; of the one there nobody knew.
    here.merge_ledger(there.ledger)
    assert here.is_deleted(one) and one not in here.table.rows
    assert SystemFolder(system).is_deleted(one) and one not in SystemFolder(system).table.rows


def test_a_copy_is_of_one_time_and_grew_as_the_system_did(system, tmp_path):
    folder = add(add(SystemFolder(system), NEW), SHARD)
    folder.copy_to(tmp_path / "copy")
    copy = SystemFolder(tmp_path / "copy")
    assert set(copy.table.rows) == set(folder.table.rows) and copy.valid_stages == folder.valid_stages
    assert copy.current_stages == folder.current_stages and copy.config == folder.config
    assert not inspect(tmp_path / "copy").problems
