"""A system's folder: whole or refused, its deletions never forgotten, nothing of a deleted example left in it."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.numpy
from support.folders import apply, delete_and_die, forge, forge_stage, preview, request_later
from support.insides import routing_of, wait_for_cleaner

import hf_s3t.folder.files as files
import hf_s3t.folder.system as storage
from hf_s3t import S3TConfig
from hf_s3t.errors import ConfigError, FolderError, FormatVersionError, KeyMissingError
from hf_s3t.folder import known_stages, ledger_file
from hf_s3t.folder.layout import KEY_FILE, STAGE_FILE
from hf_s3t.folder.opening import open_folder
from hf_s3t.folder.secret import KEY_VARIABLE, draw_key, read_key, write_key
from hf_s3t.folder.system import SystemFolder
from hf_s3t.folder.table_file import read_table, write_table
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.pending import apply_pending
from hf_s3t.plan import StageKey
from hf_s3t.plan.partition import assign
from hf_s3t.records.digests import KeptNames
from hf_s3t.records.examples import Example, ExampleTable


ROOT_FILES = {"s3t_config.json", "examples.parquet", "ledger.jsonl", "ledger.head", "ledger.key", "stages"}
STAGE_FILES = {"adapter_config.json", "adapter_model.safetensors", "stage.json"}
IDS = [f"someone-{name}@example.org" for name in "abcdefghijklmnopqrstuvwx"]
CONFIG = S3TConfig(num_shards=2, num_slices=3, id_column="id", keep_idle=True, seed=1)


# Systems without tensors: what training would write is a file that depends on what it would depend on.


def rows_of(ids, key, config=CONFIG, groups=None):
    places = assign(ids, num_shards=config.num_shards, num_slices=config.num_slices, seed=config.seed, groups=groups)
    groups = groups or [None] * len(ids)
    return {i: Example(*place, key.of_content({"id": i}), group) for i, place, group in zip(ids, places, groups)}


def new_system(path, ids=IDS, config=CONFIG, groups=None) -> SystemFolder:
    path.mkdir(parents=True, exist_ok=True)
    key = draw_key(path)
    write_key(path, key)
    record = {"s3t_config": config.to_dict(), "base_model": {"id": "base"}}
    shape = {"num_shards": config.num_shards, "num_slices": config.num_slices, "seed": config.seed}
    table = ExampleTable.of(rows_of(ids, key, config, groups), **shape, names=KeptNames(key, config.keep_ids))
    return SystemFolder.create(path, record, table, key)


def record_of(folder: SystemFolder, key: StageKey, **metrics):
    below = folder.stage_record(key.parent)["files"]["adapter_model.safetensors"] if key.parent else None
    return {"slices": folder.slice_digests(key), "below": below, "metrics": metrics}


def fill_with(record, key: StageKey):
    def fill(path: Path):
        seen = json.dumps([str(key), record["slices"], record["below"]]).encode()
        tensor = np.frombuffer(hashlib.sha256(seen).digest(), dtype=np.uint8)
        safetensors.numpy.save_file({"lora": tensor}, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))

    return fill


def grow(folder: SystemFolder, limit=None) -> None:
    for key in folder.plan.missing(folder.valid_stages, folder.table.empty)[:limit]:
        record = record_of(folder, key)
        assert folder.write_stage(key, record, fill_with(record, key))


def forget(folder: SystemFolder, ids) -> list[StageKey]:
    """What `S3TModel.unlearn` does to the folder, in its order."""
    removed = folder.plan.removed_by(folder.table.places(ids), folder.stages)
    with folder.lock():
        folder.record_deletion(ids, removed, {})
        folder.remove_stages(removed)
        folder.remove_stale_checkpoints()
    folder.compact()
    return removed


def files_of(path) -> dict[str, bytes]:
    """Every file below a folder but the lock, which says nothing."""
    path = Path(path)
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def stages_on_disk(path) -> set[str]:
    return {f"{folder.parent.name}/{folder.name}" for folder in Path(path).glob("stages/shard-*/*")}


def read_everything(path) -> None:
    folder = SystemFolder(path)
    for key in folder.stages:
        folder.adapter_path(key)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A grown system, not to be changed."""
    path = tmp_path_factory.mktemp("grown") / "system"
    grow(new_system(path))
    return path


@pytest.fixture(scope="module")
def after_deletions(tmp_path_factory):
    """A system with two deletions behind it, grown again after the first; not to be changed."""
    path = tmp_path_factory.mktemp("after") / "system"
    folder = new_system(path)
    grow(folder)
    forget(folder, IDS[:2])
    grow(folder)
    forget(folder, IDS[2:3])
    assert folder.valid_stages and folder.plan.missing(folder.valid_stages)
    return path


@pytest.fixture
def system(grown, tmp_path):
    return Path(shutil.copytree(grown, tmp_path / "system"))


@pytest.fixture
def deleted_system(after_deletions, tmp_path):
    return Path(shutil.copytree(after_deletions, tmp_path / "system"))


# Made and opened again


@pytest.mark.parametrize(
    "ids",
    [
        list(range(12)),
        [n - 5 for n in range(11)] + [2**62],
        [f"id {n}" for n in range(12)],
        ["", " ", "1", "01", "a\nb", 'quote"', "back\\slash", "\u00e4", "\U0001f600", "\x00", "None", "nan"],
    ],
    ids=["numbers", "negative and large numbers", "texts", "odd texts"],
)
@pytest.mark.parametrize("groups", [None, list(range(12)), [f"group {n}" for n in range(12)]], ids=repr)
def test_a_system_opened_again_is_what_was_written(tmp_path, ids, groups):
    made = new_system(tmp_path / "system", ids, groups=groups)
    opened = SystemFolder(tmp_path / "system")
    assert opened.table.rows == made.table.rows == rows_of(ids, made.key, groups=groups)
    assert all(type(i) is type(ids[0]) for i in opened.table.rows)
    assert opened.config == CONFIG and opened.plan == made.plan and opened.ledger.lines == ()
    assert opened.record["base_model"] == {"id": "base"} and opened.record["format_version"] == 2
    for shard in range(2):
        for slice_ in range(3):
            assert opened.table.slice_digest(shard, slice_) == made.table.slice_digest(shard, slice_)
            assert opened.table.members(shard, slice_) == made.table.members(shard, slice_)


def test_grown_stages_are_there_and_valid_when_the_system_is_opened_again(grown):
    folder = SystemFolder(grown)
    assert folder.valid_stages == set(folder.plan.stages()) == set(folder.stages)
    for key in folder.stages:
        assert folder.adapter_path(key) == grown / key.path
        assert folder.stage_record(key)["stage"] == str(key)


def test_opening_a_whole_system_writes_nothing(grown, after_deletions):
    for path in (grown, after_deletions):
        before = {file: os.stat(file).st_mtime_ns for file in path.rglob("*")}
        read_everything(path)
        assert {file: os.stat(file).st_mtime_ns for file in path.rglob("*")} == before


def test_a_table_with_no_row_left_can_be_opened(tmp_path):
    folder = new_system(tmp_path / "system")
    grow(folder)
    forget(folder, IDS)
    again = SystemFolder(folder.path)
    assert len(again.table) == 0 and again.stages == [] and again.plan.stages(again.table.empty) == []
    assert all(again.is_deleted(i) for i in IDS)


def test_nothing_lies_at_the_root_but_what_the_design_lists(after_deletions, grown):
    for path in (grown, after_deletions):
        assert set(os.listdir(path)) == ROOT_FILES
        for folder in path.glob("stages/shard-*/*"):
            assert set(os.listdir(folder)) == STAGE_FILES


def test_a_system_that_was_not_made_to_the_end_is_none_and_can_be_made_again(tmp_path, monkeypatch):
    for number in range(100):
        path = tmp_path / str(number)
        with monkeypatch.context() as patch:
            crash = Crash(patch, number)
            with contextlib.suppress(Died):
                new_system(path)
        if not crash.happened:
            break
        # The config comes last: whatever comes after its renaming is only syncing.
        if not SystemFolder.exists(path):
            new_system(path)
        assert SystemFolder(path).table.rows == rows_of(IDS, read_key(path))
    assert not crash.happened and number > 5


def test_a_folder_without_a_system_is_refused(tmp_path):
    with pytest.raises(FolderError, match=r"holds no S3T system: there is no s3t_config.json. Give the `output_dir`"):
        SystemFolder(tmp_path)
    assert not SystemFolder.exists(tmp_path) and not list(tmp_path.iterdir())


# Damage


DAMAGED = [
    "s3t_config.json",
    "examples.parquet",
    "ledger.jsonl",
    "stages/shard-0/STAGE/stage.json",
    "stages/shard-0/STAGE/adapter_config.json",
    "stages/shard-0/STAGE/adapter_model.safetensors",
]


def file_in(path: Path, name: str) -> Path:
    first = sorted(folder.name for folder in path.glob("stages/shard-0/*"))[0]
    return path / name.replace("STAGE", first)


def assert_refused(path: Path, file: Path) -> None:
    before = files_of(path)
    with pytest.raises(FolderError) as caught:
        read_everything(path)
    assert file.name in str(caught.value)
    assert isinstance(caught.value, OSError)
    assert files_of(path) == before, "a refused folder was changed"


@pytest.mark.parametrize("name", DAMAGED)
def test_a_missing_file_is_refused_by_name(deleted_system, name):
    file = file_in(deleted_system, name)
    file.unlink()
    assert_refused(deleted_system, file)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_truncated_file_is_refused_by_name(deleted_system, name):
    file = file_in(deleted_system, name)
    data = file.read_bytes()
    for kept in {0, 1, len(data) // 3, len(data) // 2, len(data) - 10, len(data) - 1}:
        file.write_bytes(data[:kept])
        assert_refused(deleted_system, file)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_altered_in_one_byte_is_refused_by_name(deleted_system, name):
    file = file_in(deleted_system, name)
    data = file.read_bytes()
    ends = {0, 1, len(data) - 1, len(data) - 2}
    for position in ends | set(range(0, len(data), max(1, len(data) // 40))):
        altered = bytearray(data)
        altered[position] ^= 1
        file.write_bytes(altered)
        assert_refused(deleted_system, file)


def test_the_table_cannot_be_altered_unseen_not_even_where_no_value_stands(tmp_path):
    file = tmp_path / "examples.parquet"
    folder = new_system(tmp_path / "system", IDS[:6], groups=["ann", "bob", "cat", "dan", "eve", "fay"])
    data = (folder.path / "examples.parquet").read_bytes()
    file.write_bytes(data)
    assert read_table(file).examples(CONFIG, folder.names).rows == folder.table.rows
    for position in range(0, len(data), 3):
        altered = bytearray(data)
        altered[position] ^= 0x80
        file.write_bytes(altered)
        with pytest.raises(FolderError):
            read_table(file)


@pytest.mark.parametrize("name", DAMAGED)
def test_a_file_with_something_added_is_refused_by_name(deleted_system, name):
    file = file_in(deleted_system, name)
    file.write_bytes(file.read_bytes() + b"more\n")
    assert_refused(deleted_system, file)


@pytest.mark.parametrize("content", [b"[]", b"7", b'"text"', b"null", b"[" * 100_000, b"\xff\xfe", b"{}"])
@pytest.mark.parametrize("name", ["s3t_config.json", "ledger.jsonl", "stages/shard-0/STAGE/stage.json"])
def test_other_json_in_place_of_a_file_is_refused_by_name(deleted_system, name, content):
    file = file_in(deleted_system, name)
    file.write_bytes(content + b"\n")
    assert_refused(deleted_system, file)


def sign(record) -> str:
    """The text of a JSON file with the digest that the folder's format gives it."""
    record = {name: value for name, value in record.items() if name != "digest"}
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps({**record, "digest": digest})


@pytest.mark.parametrize("version", [0, 4, "1", None])
def test_a_config_of_an_unknown_format_version_is_refused_by_its_version(deleted_system, version):
    file = deleted_system / "s3t_config.json"
    file.write_text(sign({**json.loads(file.read_text()), "format_version": version}))
    with pytest.raises(
        FormatVersionError, match=r"s3t_config.json has format version .*reads versions 1 to 3. Install"
    ):
        SystemFolder(deleted_system)
    assert_refused(deleted_system, file)


def test_a_ledger_of_an_unknown_format_version_is_refused_by_its_version(deleted_system):
    file = deleted_system / "ledger.jsonl"
    file.write_text(file.read_text().replace('"version":2', '"version":3'))
    with pytest.raises(FormatVersionError, match=r"ledger.jsonl: .*version 3; this hf_s3t reads versions 1 and 2"):
        SystemFolder(deleted_system)
    assert_refused(deleted_system, file)


@pytest.mark.parametrize("lines", [0, 1])
def test_a_ledger_that_lost_its_last_lines_is_refused(deleted_system, lines):
    file = deleted_system / "ledger.jsonl"
    kept = file.read_text().splitlines(keepends=True)[:lines]
    file.write_text("".join(kept))
    with pytest.raises(FolderError, match=r"does not hold the 2 lines with which ledger.head was written"):
        SystemFolder(deleted_system)
    assert_refused(deleted_system, file)
    # A folder that was written before there was a head shows it by its table.
    (deleted_system / "ledger.head").unlink()
    with pytest.raises(FolderError, match=r"does not hold the 2 lines with which examples.parquet was written"):
        SystemFolder(deleted_system)
    assert_refused(deleted_system, file)


def test_a_ledger_whose_last_line_was_edited_is_refused(deleted_system):
    file = deleted_system / "ledger.jsonl"
    first, last = file.read_text().splitlines()
    values = json.loads(last)
    values["ids"] = ["00" * 32]
    file.write_text(f"{first}\n{json.dumps(values, sort_keys=True, separators=(',', ':'))}\n")
    assert_refused(deleted_system, file)


def test_a_ledger_that_loses_lines_while_the_folder_is_open_is_refused(deleted_system):
    folder = SystemFolder(deleted_system)
    file = deleted_system / "ledger.jsonl"
    file.write_text(file.read_text().splitlines(keepends=True)[0])
    with pytest.raises(FolderError, match=r"ledger.jsonl lacks lines that it had"):
        folder.refresh_ledger()
    assert all(folder.is_deleted(i) for i in IDS[:3])


def test_a_missing_config_does_not_make_room_for_a_new_system_that_would_forget_the_deletions(deleted_system):
    (deleted_system / "s3t_config.json").unlink()
    with pytest.raises(FolderError, match=r"s3t_config.json is missing, but the folder holds stages or deletions"):
        SystemFolder.exists(deleted_system)
    shutil.rmtree(deleted_system / "stages")
    with pytest.raises(FolderError, match=r"s3t_config.json is missing"):
        SystemFolder.exists(deleted_system)


def test_swapped_stage_folders_are_refused(system):
    one, other = system / "stages/shard-0/0", system / "stages/shard-0/1"
    aside = system / "aside"
    one.rename(aside)
    other.rename(one)
    aside.rename(other)
    with pytest.raises(FolderError, match=r"shard-0/0 holds the stage 'shard-0/1': folders were swapped or renamed"):
        SystemFolder(system)


def test_a_stage_of_another_shard_is_refused(system):
    shutil.rmtree(system / "stages/shard-1/0")
    shutil.copytree(system / "stages/shard-0/0", system / "stages/shard-1/0")
    with pytest.raises(FolderError, match=r"shard-1/0 holds the stage 'shard-0/0'"):
        SystemFolder(system)


@pytest.mark.parametrize("name", ["00", "0-", "notes", "0 copy"])
def test_a_folder_that_is_no_stage_among_the_stages_is_refused_by_name(system, name):
    (system / "stages/shard-0" / name).mkdir()
    with pytest.raises(FolderError, match=f"shard-0/{name}' is not the path of a stage"):
        SystemFolder(system)


@pytest.mark.parametrize("name", ["shard-7/0", "shard-0/9", "shard-0/0-0", "shard-0/0-1-2-0"])
def test_what_has_the_name_of_a_stage_that_the_system_cannot_have_is_none_and_stops_no_deletion(system, name):
    shutil.copytree(system / "stages/shard-0/0", system / "stages" / name)
    forge(system / "stages" / name / STAGE_FILE, stage=name)
    (system / "checkpoints" / name / "checkpoint-1").mkdir(parents=True)
    folder = SystemFolder(system)
    assert set(folder.stages) == folder.valid_stages == set(folder.plan.stages()) and not folder.missing_stages()
    removed = apply(folder, IDS[:1]).stages_removed
    again = SystemFolder(system)
    assert name not in removed and again.is_deleted(IDS[0]) and again.missing_stages()
    # It is for whoever put it there to look at.
    assert any(f"stages/{name} is no part of a system" in problem for problem in inspect(system).problems)


def test_adapters_swapped_between_stages_are_refused(system):
    one, other = (system / f"stages/shard-0/{n}/adapter_model.safetensors" for n in (0, 1))
    first = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(first)
    folder = SystemFolder(system)
    with pytest.raises(FolderError, match=r"adapter_model.safetensors was altered or cut short: its digest is"):
        folder.adapter_path(StageKey(0, (0,)))


def test_examples_outside_the_systems_shards_and_slices_are_refused(system):
    folder = SystemFolder(system)
    rows = {**folder.table.rows, IDS[0]: Example(0, 7, "00" * 32)}
    write_table(system / "examples.parquet", ExampleTable.of(rows, 2, 8, 1, folder.names), folder.ledger)
    with pytest.raises(FolderError, match=r"examples.parquet holds rows that are no examples of this system's shards"):
        SystemFolder(system)


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("s3t_config.json", {"s3t_config": 7}),
        ("s3t_config.json", {"s3t_config": {"num_shards": [2]}}),
        ("s3t_config.json", {"s3t_config": {"num_slices": {}, "deletion_prior": 3}}),
        ("stages/shard-0/0/stage.json", {"slices": 7}),
        ("stages/shard-0/0/stage.json", {"files": None}),
        ("stages/shard-0/0/stage.json", {"files": {"adapter_model.safetensors": "0"}}),
        ("stages/shard-0/0/stage.json", {"metrics": [1]}),
        ("stages/shard-0/0/stage.json", {"metrics": {"eval_loss": "low"}}),
    ],
)
def test_values_that_no_version_writes_are_refused_by_whatever_opens_the_folder(file, changes, system):
    forge(system / file, **changes)
    for opened in (SystemFolder, open_folder):
        with pytest.raises((FolderError, ConfigError)) as told:
            opened(system)
        assert str(told.value)


# The key


def test_the_key_is_for_its_owner_alone(grown):
    assert stat.S_IMODE((grown / KEY_FILE).stat().st_mode) == 0o600


def test_a_system_without_its_key_is_refused(system):
    (system / KEY_FILE).unlink()
    with pytest.raises(KeyMissingError, match=f"Neither {KEY_VARIABLE} nor .*{KEY_FILE} holds the secret"):
        SystemFolder(system)
    assert not (system / KEY_FILE).exists()


@pytest.mark.parametrize("content", [b"\xff" * 32, bytes(range(256))], ids=["one byte", "every byte"])
def test_a_key_that_is_no_text_is_refused_by_name(system, content):
    (system / KEY_FILE).write_bytes(content)
    with pytest.raises(KeyMissingError, match=f"{re.escape(str(system / KEY_FILE))} is not text: .*Restore the file"):
        SystemFolder(system)
    assert (system / KEY_FILE).read_bytes() == content


def test_a_system_with_another_key_is_refused_for_it_could_not_tell_what_was_deleted(deleted_system, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "another secret of enough bytes")
    with pytest.raises(KeyMissingError, match=r"is not the one that this system's digests were made with.*Restore"):
        SystemFolder(deleted_system)
    monkeypatch.setenv(KEY_VARIABLE, (deleted_system / KEY_FILE).read_text())
    (deleted_system / KEY_FILE).unlink()
    assert SystemFolder(deleted_system).is_deleted(IDS[0])


# Deletions


def test_a_deletion_removes_the_stages_that_saw_it_and_leaves_every_byte_of_the_others(system):
    folder = SystemFolder(system)
    place = (folder.table.rows[IDS[0]].shard, folder.table.rows[IDS[0]].slice)
    before = files_of(system / "stages")
    removed = forget(folder, [IDS[0]])
    assert {str(key) for key in removed} == {
        str(key) for key in folder.plan.stages() if key.shard == place[0] and place[1] in key.prefix
    }
    gone = tuple(f"{key}/" for key in removed)
    assert files_of(system / "stages") == {n: d for n, d in before.items() if not n.startswith(gone)}
    again = SystemFolder(system)
    assert again.valid_stages == set(again.plan.stages()) - set(removed) == set(again.stages)


def test_the_ledger_says_what_went_and_what_stays_with_digests_and_without_names(system):
    folder = SystemFolder(system)
    digests = {str(key): folder.stage_record(key)["files"]["adapter_model.safetensors"] for key in folder.stages}
    removed = {str(key) for key in forget(folder, IDS[:2])}
    (entry,) = SystemFolder(system).ledger.entries
    assert entry.removed == {name: digests[name] for name in removed}
    assert entry.left == {name: digests[name] for name in set(digests) - removed}
    assert set(entry.ids) == {folder.key.of_id(i) for i in IDS[:2]}


def test_the_table_has_no_row_of_a_deleted_example(deleted_system):
    table = pq.read_table(deleted_system / "examples.parquet")
    assert sorted(table["id"].to_pylist()) == IDS[3:]
    assert set(table.column_names) == {"id", "id_digest", "shard", "slice", "digest"}
    digests = {read_key(deleted_system).of_content({"id": i}) for i in IDS[:3]}
    assert not digests & set(table["digest"].to_pylist())


def test_no_byte_of_the_folder_names_a_deleted_example(deleted_system):
    for name, data in files_of(deleted_system).items():
        for deleted in IDS[:3]:
            assert deleted.encode() not in data, name
            assert deleted.encode().hex().encode() not in data, name


def test_the_last_example_of_a_group_takes_the_groups_name_with_it(tmp_path):
    groups = [f"person-{n // 3}" for n in range(24)]
    folder = new_system(tmp_path / "system", groups=groups)
    forget(folder, IDS[:3])
    assert "person-0" not in SystemFolder(folder.path).table.groups
    assert not [name for name, data in files_of(folder.path).items() if b"person-0" in data]
    assert pq.read_table(folder.path / "examples.parquet")["group"].to_pylist() == groups[3:]


def test_regrown_stages_under_old_names_are_valid_and_an_old_copy_of_them_is_not(system):
    folder = SystemFolder(system)
    old = shutil.copytree(system / "stages", system.parent / "old")
    removed = forget(folder, [IDS[0]])
    grow(folder)
    assert folder.valid_stages == set(folder.plan.stages())
    victim = removed[0]
    regrown = files_of(system / victim.path)
    assert regrown != files_of(old / str(victim))
    shutil.rmtree(system / victim.path)
    shutil.copytree(old / str(victim), system / victim.path)

    again = SystemFolder(system)
    assert victim not in again.valid_stages and not (system / victim.path).exists()
    grow(again)
    assert files_of(system / victim.path)["adapter_model.safetensors"] == regrown["adapter_model.safetensors"]


def test_old_copies_put_back_after_a_deletion_are_removed_at_load(system):
    folder = SystemFolder(system)
    old = shutil.copytree(system / "stages", system.parent / "old")
    removed = forget(folder, IDS[:2])
    for key in removed:
        shutil.copytree(old / str(key), system / key.path)
    folder.refresh()
    again = SystemFolder(system)
    for opened in (folder, again):
        assert not set(opened.stages) & set(removed) and not opened.valid_stages & set(removed)
    assert stages_on_disk(system) == {str(key) for key in again.valid_stages}


def test_an_old_table_put_back_is_masked_and_written_again(system):
    old = (system / "examples.parquet").read_bytes()
    forget(SystemFolder(system), IDS[:2])
    (system / "examples.parquet").write_bytes(old)
    assert not set(IDS[:2]) & set(SystemFolder(system).table.rows)
    assert pq.read_table(system / "examples.parquet").num_rows == len(IDS) - 2


def test_a_stage_is_not_valid_without_the_stages_it_stands_on(system):
    shutil.rmtree(system / "stages/shard-0/0")
    folder = SystemFolder(system)
    family = {key for key in folder.plan.stages() if key.shard == 0 and key.prefix[0] == 0}
    assert set(folder.plan.stages()) - folder.valid_stages == family


def test_a_stage_of_other_examples_is_left_to_be_looked_at_where_nothing_was_deleted(system):
    stage = StageKey(0, (0,))
    forge_stage(system, str(stage), slices=["0" * 64])
    folder = SystemFolder(system)
    assert stage in folder.stages and not {stage, StageKey(0, (0, 1))} & folder.valid_stages
    assert (system / stage.path).exists()


def test_a_stage_is_not_valid_on_another_parent_than_it_was_trained_on(system):
    folder = SystemFolder(system)
    key = next(key for key in folder.plan.stages() if key.depth == 2)
    record = record_of(folder, key.parent)
    other = {**record, "below": "another"}
    # A valid stage is not written over.
    shutil.rmtree(system / key.parent.path)
    folder.write_stage(key.parent, record, fill_with(other, key.parent))
    assert key.parent in folder.valid_stages and key not in folder.valid_stages


# A crash at any moment


class Died(BaseException):
    """The process ends here."""


class Crash:
    """Lets a number of operations on the disk happen, and none after them."""

    OPERATIONS = ("fsync", "rename", "replace", "truncate")

    def __init__(self, patch, after: int):
        self.left = after
        self.happened = False
        for name in self.OPERATIONS:
            patch.setattr(storage.os, name, self._counted(getattr(os, name)))
        patch.setattr(storage.shutil, "rmtree", self._counted(shutil.rmtree))
        for module in (ledger_file, files):
            patch.setattr(module, "open", self._counted(open), raising=False)
        # A dead process tidies nothing up.
        patch.setattr(Path, "unlink", self._silent(Path.unlink))

    def _counted(self, operation):
        def operate(*args, **kwargs):
            if self.happened:
                if kwargs.get("ignore_errors"):
                    return None
                raise Died
            self.left -= 1
            if self.left < 0:
                self.happened = True
                if kwargs.get("ignore_errors"):
                    return None
                raise Died
            return operation(*args, **kwargs)

        return operate

    def _silent(self, operation):
        return lambda *args, **kwargs: None if self.happened else operation(*args, **kwargs)


def crash_everywhere(grown, tmp_path, monkeypatch, act):
    """Run `act` on copies of a system that die after 0, 1, 2 … operations; the last one of them lives."""
    for after in range(200):
        path = Path(shutil.copytree(grown, tmp_path / f"dies after {after}"))
        folder = SystemFolder(path)
        with monkeypatch.context() as patch:
            crash = Crash(patch, after)
            with contextlib.suppress(Died):
                act(folder)
        yield path, crash.happened
        if not crash.happened:
            return
    raise AssertionError("`act` never came to its end")


def test_an_unlearning_that_dies_at_any_moment_is_finished_by_the_next_load_or_never_began(
    grown, tmp_path, monkeypatch
):
    victims = IDS[3:5]
    whole = Path(shutil.copytree(grown, tmp_path / "whole"))
    removed = forget(SystemFolder(whole), victims)
    expected = files_of(whole / "stages")
    began, never = 0, 0
    for path, _ in crash_everywhere(grown, tmp_path, monkeypatch, lambda folder: forget(folder, victims)):
        in_force = bool((path / "ledger.jsonl").read_bytes())
        folder = SystemFolder(path)
        assert set(os.listdir(path)) == ROOT_FILES
        assert stages_on_disk(path) == {str(key) for key in folder.valid_stages}
        if in_force:
            began += 1
            assert files_of(path / "stages") == expected
            assert all(folder.is_deleted(i) for i in victims) and not set(victims) & set(folder.table.rows)
            assert set(pq.read_table(path / "examples.parquet")["id"].to_pylist()) == set(IDS) - set(victims)
            for data in files_of(path).values():
                assert not any(victim.encode() in data for victim in victims)
        else:
            never += 1
            assert files_of(path) == files_of(grown)
        grow(folder)
        assert folder.valid_stages == set(folder.plan.stages())
    assert began > 2 * len(removed) and never == 1


def test_a_stage_write_that_dies_at_any_moment_leaves_the_stage_complete_or_absent(tmp_path, monkeypatch):
    start = tmp_path / "start"
    grow(new_system(start), limit=2)
    key = SystemFolder(start).plan.missing(SystemFolder(start).valid_stages)[0]
    absent, complete = 0, 0
    for path, _ in crash_everywhere(start, tmp_path, monkeypatch, lambda folder: grow(folder, limit=1)):
        folder = SystemFolder(path)
        if (path / key.path).exists():
            complete += 1
            assert set(os.listdir(path / key.path)) == STAGE_FILES and key in folder.valid_stages
            assert folder.adapter_path(key) == path / key.path
        else:
            absent += 1
            assert key not in folder.stages
        assert stages_on_disk(path) == {str(stage) for stage in folder.stages}, "leftovers"
        grow(folder)
        assert folder.valid_stages == set(folder.plan.stages())
    assert absent > 3 and complete


def test_an_interrupted_unlearning_of_which_only_the_ledger_was_written_is_finished_by_the_next_load(system):
    folder = SystemFolder(system)
    removed = folder.plan.removed_by(folder.table.places([IDS[0]]), folder.stages)
    folder.record_deletion([IDS[0]], removed, {})
    assert len(stages_on_disk(system)) == len(folder.plan.stages())
    again = SystemFolder(system)
    assert stages_on_disk(system) == {str(key) for key in again.plan.stages() if key not in removed}
    assert pq.read_table(system / "examples.parquet").num_rows == len(IDS) - 1
    assert IDS[0].encode() not in b"".join(files_of(system).values())


def at_the_lock(monkeypatch, act) -> None:
    """Have another process do something just before a folder's lock is taken for the next time."""
    lock = SystemFolder.lock

    def late(self):
        monkeypatch.setattr(SystemFolder, "lock", lock)
        act()
        return lock(self)

    monkeypatch.setattr(SystemFolder, "lock", late)


@pytest.mark.parametrize("more", [0, 1], ids=["as it was", "after another deletion"])
def test_a_removal_that_waited_for_the_lock_spares_what_was_grown_anew_meanwhile(more, system, monkeypatch):
    victim, *others = SystemFolder(system).table.members(0, 0)[: 1 + more]
    delete_and_die(SystemFolder(system), [victim])

    def meanwhile():
        folder = SystemFolder(system)
        if others:
            forget(folder, others)
        grow(folder)

    at_the_lock(monkeypatch, meanwhile)
    folder = SystemFolder(system)
    assert all(map(folder.is_deleted, [victim, *others])) and folder.valid_stages == set(folder.plan.stages())
    assert stages_on_disk(system) == {str(key) for key in folder.plan.stages()}
    assert SystemFolder(system).valid_stages == folder.valid_stages


def test_a_torn_ledger_line_is_no_deletion_and_the_next_one_takes_its_place(system):
    ledger = system / "ledger.jsonl"
    forget(SystemFolder(system), [IDS[0]])
    whole = ledger.read_bytes()
    ledger.write_bytes(whole + b'{"ids":["to')
    folder = SystemFolder(system)
    assert len(folder.ledger.lines) == 1
    forget(folder, [IDS[1]])
    again = SystemFolder(system)
    assert len(again.ledger.lines) == 2 and ledger.read_bytes().startswith(whole)
    assert again.is_deleted(IDS[0]) and again.is_deleted(IDS[1]) and b'"to' not in ledger.read_bytes()


def operations(monkeypatch, act) -> list[tuple[str, str]]:
    """What `act` syncs, renames, replaces and removes, in its order, by the names of files and folders."""
    seen = []

    def recorded(name, operation):
        def operate(target, *args, **kwargs):
            path = os.readlink(f"/proc/self/fd/{target}") if isinstance(target, int) else str(target)
            seen.append((name, path))
            return operation(target, *args, **kwargs)

        return operate

    with monkeypatch.context() as patch:
        for module, name in ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree")):
            patch.setattr(module, name, recorded(name, getattr(module, name)))
        act()
    return seen


def test_a_deletion_is_synced_to_the_ledger_before_anything_else_changes(system, monkeypatch):
    folder = SystemFolder(system)
    first, *others = operations(monkeypatch, lambda: forget(folder, IDS[:2]))
    assert first == ("fsync", str(system / "ledger.jsonl"))
    assert {name for name, _ in others} >= {"rename", "replace"}


def test_a_stage_is_synced_file_by_file_before_it_is_renamed_into_place(tmp_path, monkeypatch):
    folder = new_system(tmp_path / "system")
    done = operations(monkeypatch, lambda: grow(folder, limit=1))
    renamed = done.index(next(step for step in done if step[0] == "rename"))
    temporary = done[renamed][1]
    synced = {path for name, path in done[:renamed] if name == "fsync"}
    assert synced >= {temporary, *(f"{temporary}/{name}" for name in STAGE_FILES)}
    assert ("fsync", str(Path(temporary).parent)) in done[renamed:]


def done_without_the_lock(monkeypatch, system, act) -> tuple[int, list[str]]:
    """How many steps `act` takes on the disk, and those that it takes while anybody might have the system's lock."""
    number, unlocked = 0, []

    def watched(name, operation):
        def operate(target, *args, **kwargs):
            nonlocal number
            number += 1
            if f"{system}/checkpoints/" in str(target):
                # A trainer's own, as long as its stage is unfinished.
                return operation(target, *args, **kwargs)
            with open(system / "stages/.lock", "a") as lock, contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                unlocked.append(f"{name} {target}")
            return operation(target, *args, **kwargs)

        return operate

    with monkeypatch.context() as patch:
        steps = ((os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"), (Path, "unlink"))
        for owner, name in steps:
            patch.setattr(owner, name, watched(name, getattr(owner, name)))
        act()
    return number, unlocked


def apply_what_waits(system):
    request_later(SystemFolder(system), IDS[:1])
    return lambda: apply_pending(SystemFolder(system))


def compact(system):
    folder = SystemFolder(system)
    folder.record_deletion(IDS[:1], [], {})
    return folder.compact


def merge(system):
    forget(SystemFolder(shutil.copytree(system, system.parent / "other")), IDS[:1])
    other = SystemFolder(system.parent / "other")
    return lambda: SystemFolder(system).merge_ledger(other.ledger)


def finish_what_another_began(system):
    delete_and_die(SystemFolder(system), IDS[:1])
    return lambda: SystemFolder(system)


def grow_anew(system):
    forget(SystemFolder(system), IDS[:1])
    return lambda: grow(SystemFolder(system))


CHANGES = {
    "a deletion": lambda system: lambda: apply(SystemFolder(system), IDS[:1]),
    "a request": lambda system: lambda: request_later(SystemFolder(system), IDS[:1], max_delay=60),
    "what waits": apply_what_waits,
    "compaction": compact,
    "another ledger": merge,
    "the end of a removal": finish_what_another_began,
    "growth": grow_anew,
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_changes_a_system_holds_its_lock(change, system, monkeypatch):
    number, unlocked = done_without_the_lock(monkeypatch, system, CHANGES[change](system))
    assert number and not unlocked


def test_a_folder_named_by_a_relative_path_stays_that_folder_wherever_the_process_goes(system, tmp_path, monkeypatch):
    monkeypatch.chdir(system.parent)
    folder = SystemFolder(system.name)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    apply(folder, [next(iter(folder.table.rows))])
    folder.compact()
    assert not list(elsewhere.iterdir())
    assert SystemFolder(system).ledger.num_deletions == 1


def test_a_folder_that_was_taken_away_is_not_made_anew_by_what_was_still_to_do(system):
    folder = SystemFolder(system)
    shutil.rmtree(system)
    with pytest.raises(FolderError, match="is not there any more"):
        folder.compact()
    assert not system.exists()


@pytest.mark.parametrize(
    "leftover",
    [
        "stages/shard-0/.tmp-0-1-abcd1234/adapter_model.safetensors",
        "stages/shard-1/.gone-2-abcd1234/adapter_model.safetensors",
        ".tmp-examples.parquet-abcd1234",
        ".tmp-s3t_config.json-abcd1234",
    ],
)
def test_what_an_interrupted_write_left_behind_is_cleaned_away_at_load(system, leftover):
    before = files_of(system)
    (system / leftover).parent.mkdir(exist_ok=True)
    (system / leftover).write_bytes(IDS[0].encode())
    SystemFolder(system)
    assert files_of(system) == before
    assert not [path for path in system.rglob("*") if path.name.startswith((".tmp-", ".gone-"))]


# Writing stages


def test_a_deletion_that_came_while_a_stage_trained_discards_it(tmp_path):
    folder = new_system(tmp_path / "system")
    key = folder.plan.stages()[0]
    victim = folder.table.members(key.shard, key.prefix[0])[0]
    record = record_of(folder, key)  # what training began with
    other_process = SystemFolder(folder.path)
    other_process.record_deletion([victim], [], {})
    assert folder.write_stage(key, record, fill_with(record, key)) is False
    assert not stages_on_disk(folder.path) and key not in folder.stages
    assert folder.is_deleted(victim) and victim not in folder.table.rows
    record = record_of(folder, key)
    assert folder.write_stage(key, record, fill_with(record, key)) is True
    assert key in SystemFolder(folder.path).valid_stages


def test_a_stage_is_not_written_where_another_one_lies_further_below_than_it_was_trained_on(system):
    folder = SystemFolder(system)
    key = next(key for key in folder.plan.stages() if key.depth == 3)
    record = record_of(folder, key)
    first, *_ = key.lineage
    shutil.rmtree(system / key.path)
    shutil.rmtree(system / first.path)
    # Grown again by another process, and not bit for bit the same. The stage between the two stands on nothing now.
    other = SystemFolder(system)
    assert other.write_stage(first, record_of(other, first), fill_with({**record, "below": "another"}, first))
    assert folder.write_stage(key, record, fill_with(record, key)) is False
    assert not (system / key.path).exists()


def test_a_deletion_elsewhere_does_not_disturb_a_stage_in_training(tmp_path):
    folder = new_system(tmp_path / "system")
    key = folder.plan.stages()[0]
    victim = folder.table.members(1 - key.shard, 0)[0]
    record = record_of(folder, key)
    SystemFolder(folder.path).record_deletion([victim], [], {})
    assert folder.write_stage(key, record, fill_with(record, key)) is True
    assert key in folder.valid_stages and folder.is_deleted(victim)


def test_stage_folders_are_never_touched_again(system):
    def stamps():
        return {
            str(file.relative_to(system)): (file.stat().st_ino, file.stat().st_mtime_ns, file.read_bytes())
            for file in system.glob("stages/shard-*/*/*")
        }

    folder = SystemFolder(system)
    written = stamps()
    removed = tuple(f"{key.path}/" for key in forget(folder, IDS[:2]))
    survivors = {name: stamp for name, stamp in written.items() if not name.startswith(removed)}
    assert stamps() == survivors and survivors
    grow(folder)
    folder.refresh()
    SystemFolder(system)
    assert {name: stamp for name, stamp in stamps().items() if name in survivors} == survivors
    assert len(stamps()) == len(written)


def test_a_stage_whose_writing_fails_leaves_nothing(tmp_path):
    folder = new_system(tmp_path / "system")
    key = folder.plan.stages()[0]

    def fail(path):
        (path / "adapter_model.safetensors").write_bytes(b"half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full"):
        folder.write_stage(key, record_of(folder, key), fail)
    with pytest.raises(FileNotFoundError):
        folder.write_stage(key, record_of(folder, key), lambda path: None)
    assert not stages_on_disk(folder.path) and not folder.stages
    grow(folder, limit=1)  # and the folder is not left locked
    assert folder.valid_stages == {key}


def test_recorded_losses_are_those_of_the_stages_that_have_one(tmp_path):
    folder = new_system(tmp_path / "system")
    one, other = folder.plan.stages()[:2]
    record = record_of(folder, one, eval_loss=0.25, train_loss=1.0)
    folder.write_stage(one, record, fill_with(record, one))
    record = record_of(folder, other, train_loss=1.0)
    folder.write_stage(other, record, fill_with(record, other))
    assert SystemFolder(folder.path).losses() == {one: 0.25}


# Checkpoints


def checkpoint(folder: SystemFolder, key: StageKey, step: int, slices=None) -> Path:
    path = folder.checkpoints(key) / f"checkpoint-{step}"
    path.mkdir(parents=True)
    (path / "optimizer.pt").write_bytes(b"state")
    if slices is not None:
        folder.write_checkpoint_record(path, {"slices": slices})
    return path


def test_checkpoints_go_with_the_slices_they_saw_and_others_stay(tmp_path):
    folder = new_system(tmp_path / "system")
    hit, other = folder.plan.stages()[0], StageKey(1, (0,))
    stale = checkpoint(folder, hit, 5, folder.slice_digests(hit))
    kept = checkpoint(folder, other, 5, folder.slice_digests(other))
    unmarked = checkpoint(folder, other, 9)
    victim = folder.table.members(hit.shard, hit.prefix[0])[0]
    forget(folder, [victim])
    assert not stale.exists() and kept.exists() and not unmarked.exists()
    assert SystemFolder(folder.path).read_checkpoint_record(kept) == {"slices": folder.slice_digests(other)}
    assert kept.exists()


def test_a_checkpoint_that_was_put_back_after_its_example_was_deleted_is_removed_by_the_next_load(tmp_path):
    folder = new_system(tmp_path / "system")
    hit, other = StageKey(0, (0,)), StageKey(0, (1,))
    stale, current = (checkpoint(folder, key, 1, folder.slice_digests(key)) for key in (hit, other))
    shutil.copytree(stale, tmp_path / "aside")
    forget(folder, folder.table.members(0, 0)[:1])
    shutil.copytree(tmp_path / "aside", stale)
    SystemFolder(folder.path)
    assert not stale.exists() and current.exists()


def test_checkpoints_of_a_deletion_that_died_are_removed_by_the_next_load(tmp_path):
    folder = new_system(tmp_path / "system")
    key = folder.plan.stages()[0]
    stale = checkpoint(folder, key, 5, folder.slice_digests(key))
    folder.record_deletion([folder.table.members(key.shard, key.prefix[0])[0]], [], {})
    SystemFolder(folder.path)
    assert not stale.exists()


@pytest.mark.parametrize("damage", [lambda file: file.unlink(), lambda file: file.write_bytes(b"torn")])
def test_a_checkpoint_whose_files_are_not_what_was_written_is_not_resumed(damage, tmp_path):
    folder = new_system(tmp_path / "system")
    path = checkpoint(folder, folder.plan.stages()[0], 5, folder.slice_digests(folder.plan.stages()[0]))
    (path / "rng").mkdir()
    (path / "rng" / "state.pth").write_bytes(b"states")
    folder.write_checkpoint_record(path, {"slices": []})
    assert folder.read_checkpoint_record(path) == {"slices": []}
    damage(path / "rng" / "state.pth")
    with pytest.raises(FolderError, match=r"state\.pth"):
        folder.read_checkpoint_record(path)


def test_a_checkpoint_with_an_altered_record_is_not_resumed_and_goes_with_the_next_deletion(tmp_path):
    folder = new_system(tmp_path / "system")
    key, elsewhere = folder.plan.stages()[0], StageKey(1, (0,))
    path = checkpoint(folder, key, 5, folder.slice_digests(key))
    (path / "stage.json").write_text('{"slices": []}')
    with pytest.raises(FolderError, match=r"stage.json was altered"):
        folder.read_checkpoint_record(path)
    forget(folder, folder.table.members(elsewhere.shard, 0)[:1])
    assert not path.exists()


def test_a_checkpoint_that_is_being_written_is_judged_by_what_its_stage_is_trained_on(tmp_path):
    folder = new_system(tmp_path / "system")
    hit, other = folder.plan.stages()[0], StageKey(1, (0,))
    paths = []
    for key in (hit, other):
        with folder.scratch(key, folder.slice_digests(key)):
            paths.append(checkpoint(folder, key, 5))
    forget(folder, folder.table.members(hit.shard, hit.prefix[0])[:1])
    assert [path.exists() for path in paths] == [False, True]
    # The note goes with what it stood for.
    assert [(path.parent / "stage.json").exists() for path in paths] == [False, True]
    assert inspect(folder.path).problems == ()


@pytest.mark.parametrize("name", [".DS_Store", "notes.txt", "not-a-stage/checkpoint-1"])
def test_what_others_put_beside_checkpoints_keeps_no_deletion_from_its_end(name, tmp_path):
    folder = new_system(tmp_path / "system")
    path = folder.checkpoints(StageKey(0, (0,))).parent / name
    path.parent.mkdir(parents=True)
    path.write_text("mine")
    victim = folder.table.members(0, 0)[0]
    forget(folder, [victim])
    assert SystemFolder(folder.path).is_deleted(victim) and path.read_text() == "mine"


def test_a_written_stage_needs_no_checkpoint_any_more(tmp_path):
    folder = new_system(tmp_path / "system")
    key = folder.plan.stages()[0]
    path = checkpoint(folder, key, 5, folder.slice_digests(key))
    grow(folder, limit=1)
    assert not path.exists()


# Two readers of one folder


def test_a_deletion_by_one_process_is_seen_by_another(system):
    one, other = SystemFolder(system), SystemFolder(system)
    removed = forget(one, IDS[:2])
    other.refresh_ledger()
    assert all(other.is_deleted(i) for i in IDS[:2]) and not set(IDS[:2]) & set(other.table.rows)
    assert not other.valid_stages & set(removed)
    other.refresh()
    assert set(other.stages) == one.valid_stages == other.valid_stages


def removed_when_it_is_named(monkeypatch, remove) -> None:
    """Have something removed between the look at the folders of stages and at what is in them."""
    named = known_stages.stages_in

    def name_then_remove(path, problems):
        for key in list(named(path, problems)):
            remove(path / key.path)
            yield key

    monkeypatch.setattr(known_stages, "stages_in", name_then_remove)


@pytest.mark.parametrize("look", [SystemFolder.refresh, SystemFolder.refresh_stages])
def test_a_stage_that_another_process_removes_while_the_stages_are_read_is_passed_over(system, monkeypatch, look):
    folder, gone = SystemFolder(system), StageKey(0, (0,))
    folder._stages.take_over({})  # as if it came when this one was open
    removed_when_it_is_named(monkeypatch, lambda path: path == system / gone.path and shutil.rmtree(path))
    look(folder)
    assert set(folder.stages) == set(folder.plan.stages()) - {gone}


@pytest.mark.parametrize("look", [SystemFolder.refresh, SystemFolder.refresh_stages])
def test_a_stage_that_is_there_without_its_record_is_refused_however_it_came_about(system, monkeypatch, look):
    folder, damaged = SystemFolder(system), system / StageKey(0, (0,)).path
    folder._stages.take_over({})
    removed_when_it_is_named(monkeypatch, lambda path: path == damaged and (path / STAGE_FILE).unlink())
    with pytest.raises(FolderError, match=f"{damaged / STAGE_FILE} is missing"):
        look(folder)


@pytest.mark.parametrize("look", [SystemFolder.refresh, SystemFolder.refresh_stages])
def test_a_stage_that_is_grown_again_while_its_record_is_read_is_the_one_that_is_there_then(system, monkeypatch, look):
    folder, key = SystemFolder(system), StageKey(0, (0,))
    folder._stages.take_over({})
    read, away = known_stages.read_stage, system / "stages/shard-0/.gone-0"

    def read_while_another_process_regrows(path, stage, earlier):
        if stage == key and not away.exists():
            (system / key.path).rename(away)
            try:
                return read(path, stage, earlier)
            finally:
                shutil.copytree(away, system / key.path)
                forge_stage(system, str(key), metrics={"grown": 2})
        return read(path, stage, earlier)

    monkeypatch.setattr(known_stages, "read_stage", read_while_another_process_regrows)
    look(folder)
    assert folder.stage_record(key)["metrics"] == {"grown": 2}


def test_which_stages_are_valid_is_of_one_time_whatever_another_thread_takes_in_meanwhile(system, monkeypatch):
    folder = SystemFolder(system)
    before, digests = folder.valid_stages, SystemFolder.slice_digests_ever

    def digests_while_others_go(self, key):
        folder._stages.forget(before)
        return digests(self, key)

    monkeypatch.setattr(SystemFolder, "slice_digests_ever", digests_while_others_go)
    assert folder.valid_stages == before and not folder.valid_stages
    with pytest.raises(FolderError, match="shard-0/0 is not there: it was never trained, or removed since"):
        folder.adapter_digest(StageKey(0, (0,)))


def test_no_line_of_another_process_is_lost(system):
    one, other = SystemFolder(system), SystemFolder(system)
    forget(one, IDS[:2])
    tip = next(key for key in one.plan.stages() if key in one.valid_stages)
    other.record_export(tip, {})
    again = SystemFolder(system)
    assert [entry.kind for entry in again.ledger.entries] == ["deletion", "export"]
    assert all(again.is_deleted(i) for i in IDS[:2])


def test_a_merge_takes_along_what_another_process_recorded_since_the_folder_was_read(system, tmp_path):
    elsewhere = SystemFolder(shutil.copytree(system, tmp_path / "elsewhere"))
    forget(elsewhere, IDS[:1])
    folder = SystemFolder(system)
    here = forget(SystemFolder(system), IDS[1:2])
    folder.merge_ledger(elsewhere.ledger)
    assert all(map(folder.is_deleted, IDS[:2])) and folder.ledger.num_deletions == 2
    again = SystemFolder(system)
    assert all(map(again.is_deleted, IDS[:2])) and not set(here) & set(again.stages)


def test_a_merge_is_in_the_ledger_before_a_stage_goes_because_of_it(system, tmp_path, monkeypatch):
    elsewhere = SystemFolder(shutil.copytree(system, tmp_path / "elsewhere"))
    removed = forget(elsewhere, IDS[:1])
    folder = SystemFolder(system)
    done = operations(monkeypatch, lambda: folder.merge_ledger(elsewhere.ledger))
    names = [(name, Path(path).name) for name, path in done]
    replaced = next(n for n, (name, file) in enumerate(names) if name == "replace" and "ledger.jsonl" in file)
    renamed = [n for n, (name, file) in enumerate(names) if name == "rename"]
    assert len(renamed) == len(removed) and replaced < min(renamed)
    assert any(name == "fsync" and "ledger.jsonl" in file for name, file in names[:replaced])


def test_a_merge_removes_what_was_left_unfinished_by_a_stage_that_saw_the_example(tmp_path):
    folder = new_system(tmp_path / "system")
    elsewhere = SystemFolder(shutil.copytree(folder.path, tmp_path / "elsewhere"))
    hit, other = StageKey(0, (0,)), StageKey(0, (1,))
    forget(elsewhere, elsewhere.table.members(0, 0)[:1])
    stale, current = (checkpoint(folder, key, 1, folder.slice_digests(key)) for key in (hit, other))
    folder.merge_ledger(elsewhere.ledger)
    assert not stale.exists() and current.exists()


def test_compaction_does_not_bring_back_rows_that_another_process_took_out(system):
    folder = SystemFolder(system)
    forget(SystemFolder(system), IDS[:1])
    folder.compact()
    assert IDS[0] not in pq.read_table(system / "examples.parquet")["id"].to_pylist()


def test_a_line_that_comes_while_the_ledger_is_read_is_news_again(system, monkeypatch):
    folder, read = SystemFolder(system), Path.read_bytes
    forget(SystemFolder(system), IDS[:1])

    def overtaken(self):
        content = read(self)
        if self.name == "ledger.jsonl":
            monkeypatch.setattr(Path, "read_bytes", read)
            forget(SystemFolder(system), IDS[1:2])
        return content

    monkeypatch.setattr(Path, "read_bytes", overtaken)
    folder.refresh_ledger()
    assert [folder.is_deleted(i) for i in IDS[:2]] == [True, False] and folder.has_news()
    folder.refresh_ledger()
    assert folder.is_deleted(IDS[1]) and not folder.has_news()


def test_an_export_is_noted_and_deletes_nothing(system):
    folder = SystemFolder(system)
    before = files_of(system / "stages")
    tip = max(folder.plan.stages(), key=lambda key: key.depth)
    folder.record_export(tip, {"torch": "2"})
    again = SystemFolder(system)
    (entry,) = again.ledger.entries
    assert entry.kind == "export" and set(entry.removed) == {str(key) for key in tip.lineage} and entry.ids == ()
    assert again.ledger.num_deletions == 0 and len(again.table) == len(IDS) and files_of(system / "stages") == before


# Copies


def test_a_copy_is_the_same_system_without_what_is_unfinished(deleted_system, tmp_path):
    folder = SystemFolder(deleted_system)
    checkpoint(folder, StageKey(1, (0,)), 3, folder.slice_digests(StageKey(1, (0,))))
    (deleted_system / "stages/shard-0/.tmp-0-dead").mkdir()
    folder.copy_to(tmp_path / "copy")
    copy = SystemFolder(tmp_path / "copy")
    assert set(os.listdir(copy.path)) == ROOT_FILES
    assert copy.valid_stages == folder.valid_stages and copy.ledger == folder.ledger
    assert files_of(copy.path / "stages") == files_of(deleted_system / "stages")
    assert stat.S_IMODE((copy.path / KEY_FILE).stat().st_mode) == 0o600


def test_a_copy_during_which_a_deletion_comes_is_one_of_what_is_left(system, tmp_path, monkeypatch):
    folder, other = SystemFolder(system), SystemFolder(system)
    victim = folder.table.members(0, 0)[0]
    copytree, begun = shutil.copytree, []

    def interrupted(*args, **kwargs):
        if args[1] != tmp_path / "copy":
            return copytree(*args, **kwargs)  # of a folder inside
        begun.append(args)
        if len(begun) == 1:
            apply(other, [victim])
        copied = copytree(*args, **kwargs)
        if len(begun) == 2:
            raise shutil.Error([("a stage", "its copy", "went meanwhile")])
        return copied

    monkeypatch.setattr(shutil, "copytree", interrupted)
    folder.copy_to(tmp_path / "copy")
    copy = SystemFolder(tmp_path / "copy")
    assert len(begun) == 3 and copy.is_deleted(victim)
    assert files_of(copy.path / "stages") == files_of(system / "stages")


def test_a_copy_that_fails_leaves_nothing_behind(system, tmp_path, monkeypatch):
    def full(source, target, **kwargs):
        (Path(target) / "half").write_text("of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(FolderError, match=r"could not be copied to .*No space left on device.* Nothing is left there"):
        SystemFolder(system).copy_to(tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_a_copy_does_not_go_into_the_system_itself(system):
    before = files_of(system)
    with pytest.raises(FolderError, match=r"inside the system's folder, where only its own files belong"):
        SystemFolder(system).copy_to(system / "copy")
    assert files_of(system) == before


def test_a_copy_goes_into_an_empty_folder_only(system, tmp_path):
    target = tmp_path / "taken"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(FolderError, match=r"is no empty folder. Give a new one"):
        SystemFolder(system).copy_to(target)
    assert files_of(target) == {"thesis.txt": b"mine"}


# With a model on it


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The folder of a model with every stage, not to be changed."""
    from support.tiny import lm_rows, make_trainer, plant_stages, s3t_config, tiny_llama

    path = tmp_path_factory.mktemp("planted") / "system"
    rows = [{**row, "id": f"someone-{n:02d}@example.org"} for n, row in enumerate(lm_rows(24))]
    plant_stages(make_trainer(path, tiny_llama(layers=2), rows, config=s3t_config(num_shards=2, num_slices=2)))
    return path


@pytest.fixture
def served(planted, tmp_path):
    from support.tiny import tiny_llama

    from hf_s3t import S3TModel

    shutil.copytree(planted, tmp_path / "served")
    return S3TModel.from_pretrained(tmp_path / "served", base_model=tiny_llama(layers=2))


def test_after_unlearn_no_deleted_id_stands_in_any_byte_of_any_file(served):
    victims = list(served.folder.table.rows)[:3]
    served.unlearn(victims)
    wait_for_cleaner(served)
    for name, data in files_of(served.folder.path).items():
        assert not [victim for victim in victims if victim.encode() in data], name
    table = pq.read_table(served.folder.path / "examples.parquet")
    assert sorted(table["id"].to_pylist()) == sorted(served.folder.table.rows)
    assert not set(victims) & set(served.folder.table.rows)
    assert set(os.listdir(served.folder.path)) == ROOT_FILES


def test_after_unlearn_the_stages_are_out_of_the_folder_and_out_of_memory(served):
    victim = next(iter(served.folder.table.rows))
    report = served.unlearn([victim])
    gone = {StageKey.from_path(f"stages/{name}") for name in report.stages_removed}
    assert gone and not gone & set(served.stack.loaded)
    assert not [name for name, _ in served.named_parameters() for key in gone if f".{key.adapter_name}." in name]
    assert stages_on_disk(served.folder.path) == {str(key) for key in served.folder.valid_stages}
    assert not stages_on_disk(served.folder.path) & set(report.stages_removed)


def test_unlearn_removes_what_another_process_grew_on_the_example_since_the_model_was_loaded(served):
    path, stages = served.folder.path, served.folder.path / "stages"
    aside = Path(shutil.copytree(stages, path.parent / "aside"))
    late = StageKey(0, (0, 1))
    shutil.rmtree(path / late.path)
    served.refresh()
    assert late not in served.folder.stages
    shutil.copytree(aside / str(late), path / late.path)
    report = served.unlearn(served.folder.table.members(0, 1)[:1])
    assert str(late) in report.stages_removed and not (path / late.path).exists()
    entry = SystemFolder(path).ledger.entries[-1]
    assert str(late) in entry.removed, "the ledger says what went"
    assert stages_on_disk(path) == {"shard-0/0", *(str(key) for key in served.folder.plan.stages() if key.shard == 1)}


def saw(folder: SystemFolder, shard: int, slice_: int) -> set[str]:
    """The planned stages that are trained on a slice."""
    return {str(key) for key in folder.plan.stages() if key.shard == shard and slice_ in key.prefix}


def removed_by_line(path) -> list[set[str]]:
    return [set(entry.removed) for entry in SystemFolder(path).ledger.entries]


def test_unlearn_also_removes_what_a_deletion_condemned_whose_process_died(served):
    path, first, second = served.folder.path, *(served.folder.table.members(0, s)[:1] for s in (0, 1))
    delete_and_die(SystemFolder(path), first)
    condemned, touched = saw(served.folder, 0, 0), saw(served.folder, 0, 1) - saw(served.folder, 0, 0)
    assert set(preview(served.folder, second).stages_removed) == touched, "what goes in the name of this deletion"
    report = served.unlearn(second)
    assert set(report.stages_removed) == condemned | touched and report.depths_after == [0, 2]
    assert not stages_on_disk(path) & (condemned | touched)
    assert removed_by_line(path) == [condemned, touched], "the ledger says which deletion took what"


def test_unlearning_again_removes_what_the_process_that_unlearned_did_not_live_to_remove(served):
    path, victim = served.folder.path, served.folder.table.members(0, 0)[:1]
    delete_and_die(SystemFolder(path), victim)
    report = served.unlearn(victim)
    assert (report.deleted, report.already_deleted) == (0, 1)
    assert set(report.stages_removed) == saw(served.folder, 0, 0) and report.depths_after == [1, 2]
    assert not stages_on_disk(path) & saw(served.folder, 0, 0)
    assert removed_by_line(path) == [saw(served.folder, 0, 0)]


def test_a_model_goes_on_without_what_was_deleted_although_the_folders_cannot_be_removed(served, monkeypatch):
    import torch

    def refuse(source, target):
        raise PermissionError(errno.EACCES, "not yours", str(source))

    victim, gone = served.folder.table.members(0, 0)[:1], saw(served.folder, 0, 0)
    monkeypatch.setattr(storage.os, "rename", refuse)
    with pytest.raises(FolderError, match=r"could not be removed.*The deletions in the ledger are in force"):
        served.unlearn(victim)
    assert served(torch.tensor([[5, 6, 7]])).logits is not None
    assert not gone & {str(key) for key in (*served.stack.loaded, *routing_of(served).stages)}
    assert all(map(served.folder.is_deleted, victim)) and served.status()["depths"] == [1, 2]
    monkeypatch.undo()
    assert not gone & stages_on_disk(SystemFolder(served.folder.path).path)


def test_a_model_that_changes_its_system_holds_the_lock(served, monkeypatch):
    one, other, last = (served.folder.table.members(shard, s)[:1] for shard, s in ((0, 0), (0, 1), (1, 0)))

    def act():
        served.unlearn(one)
        served.unlearn_later(other, max_delay=600)
        served.apply_pending()
        served.unlearn(last)
        wait_for_cleaner(served)

    number, unlocked = done_without_the_lock(monkeypatch, served.folder.path, act)
    assert number and not unlocked


@pytest.mark.parametrize("what", ["ledger.jsonl", ""], ids=["the ledger", "the folder"])
def test_a_live_model_refuses_what_was_put_back_from_before_a_deletion(served, what):
    import torch

    path = served.folder.path
    aside = Path(shutil.copytree(path, path.parent / "aside"))
    victims = served.folder.table.members(0, 0)[:1]
    removed = set(served.unlearn(victims).stages_removed)
    wait_for_cleaner(served)
    if what:
        shutil.copy(aside / what, path / what)
    else:
        shutil.copytree(aside, path, dirs_exist_ok=True)
    ids = torch.tensor([[5, 6, 7]])
    calls = (lambda: served(ids), lambda: served.generate(ids, max_new_tokens=1), served.refresh,
             lambda: served.unlearn(served.folder.table.members(1, 0)[:1]), lambda: served(ids))  # fmt: skip
    for call in calls:
        with pytest.raises(FolderError, match=r"ledger.jsonl lacks lines that it had.*Restore it from a backup"):
            call()
    assert not removed & {str(key) for key in (*served.stack.loaded, *routing_of(served).stages)}
    assert all(map(served.folder.is_deleted, victims))


def test_an_unlearn_that_dies_after_the_ledger_is_finished_by_the_next_load(served, monkeypatch):
    from support.tiny import tiny_llama

    from hf_s3t import S3TModel

    def die(*args, **kwargs):
        raise Died

    victim = next(iter(served.folder.table.rows))
    monkeypatch.setattr(served, "_serve", die)
    with pytest.raises(Died):
        served.unlearn([victim])
    path = served.folder.path
    assert victim.encode() in b"".join(files_of(path).values())
    again = S3TModel.from_pretrained(path, base_model=tiny_llama(layers=2))
    assert again.folder.is_deleted(victim) and not again.check()
    assert stages_on_disk(path) == {str(key) for key in again.folder.valid_stages}
    assert victim.encode() not in b"".join(files_of(path).values())


def test_check_names_what_is_wrong_with_a_folder(served):
    assert served.check() == []
    file = file_in(served.folder.path, "stages/shard-0/STAGE/adapter_config.json")
    file.write_bytes(file.read_bytes() + b" ")
    (problem,) = served.check()
    assert str(file) in problem and "was altered or cut short" in problem
    (served.folder.path / "examples.parquet").unlink()
    assert any("examples.parquet is missing" in problem for problem in served.check())
