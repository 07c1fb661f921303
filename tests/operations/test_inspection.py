"""A look at a folder: it finds every damage, says what to do, never changes anything and never falls over."""

import contextlib
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file
from support.folders import (
    NAMES,
    add_checkpoint,
    apply,
    delete_and_die,
    files_of,
    forge,
    forge_stage,
    grow,
    new_system,
    stages_on_disk,
)
from support.tables import rewrite_table

from hf_s3t import S3TConfig
from hf_s3t.errors import FolderError, S3TError
from hf_s3t.folder.foreign import printable
from hf_s3t.folder.opening import open_folder
from hf_s3t.folder.status import system_status
from hf_s3t.folder.system import SystemFolder
from hf_s3t.folder.table_file import write_table
from hf_s3t.operations.findings import Inspection
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.pending import PendingRequests
from hf_s3t.plan import StageKey
from hf_s3t.records.examples import Example, ExampleTable


pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(scope="module")
def after_deletion(tmp_path_factory):
    """A system grown again after a deletion, with a second behind it; not to be changed."""
    path = tmp_path_factory.mktemp("inspected") / "system"
    folder = grow(new_system(path, NAMES))
    apply(folder, NAMES[:1])
    grow(folder)
    apply(folder, NAMES[3:4])
    return path


@pytest.fixture
def system(after_deletion, tmp_path):
    return Path(shutil.copytree(after_deletion, tmp_path / "system"))


@pytest.fixture
def untouched(tmp_path):
    """A system that nothing was ever deleted from."""
    return grow(new_system(tmp_path / "untouched", NAMES)).path


def stage_of(system) -> Path:
    """The folder of a stage that is there."""
    return system / "stages" / sorted(stages_on_disk(system))[-1]


def problem_of(path) -> str:
    """The one problem that a folder has."""
    before = files_of(path)
    found = inspect(path)
    assert files_of(path) == before
    assert len(found.problems) == 1, found.problems
    return found.problems[0]


# A folder without problems


def test_an_intact_folder_has_no_problems(system, untouched, tmp_path):
    for path in (system, untouched, new_system(tmp_path / "new").path):
        found = inspect(path)
        assert (found.problems, found.notes, found.to_remove, found.checkpoints) == ((), (), (), ())


def test_a_system_as_training_and_serving_leave_it_has_no_problems(tmp_path):
    from support.tiny import make_trainer, training_arguments

    args = training_arguments(tmp_path / "system", save_strategy="epoch")
    trainer = make_trainer(tmp_path / "system", args=args)
    trainer.train()
    assert inspect(tmp_path / "system") == Inspection((), (), (), ())
    trainer.s3t_model.unlearn(trainer.folder.table.members(0, 1)[:1])
    trainer.train()
    assert inspect(tmp_path / "system") == Inspection((), (), (), ())


def test_what_belongs_beside_a_system_is_no_problem(system):
    for name in ("README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", ".gitattributes"):
        (system / name).write_text("{}")
    folder = SystemFolder(system)
    key = folder.plan.missing(folder.valid_stages)[0]
    checkpoint = add_checkpoint(folder, key)
    found = inspect(system)
    assert found.problems == () and found.checkpoints == (checkpoint,)


def test_logs_and_histories_are_noted(system):
    (system / "runs").mkdir()
    (system / ".git").mkdir()
    (system / "events.out.tfevents.1").touch()
    found = inspect(system)
    assert found.problems == ()
    assert [note for note in found.notes if "hf-s3t purge" in note] == list(found.notes) and len(found.notes) == 3


def test_requests_that_wait_are_noted(system):
    folder = SystemFolder(system)
    requests = PendingRequests(folder)
    requests.add(NAMES[5:7], [], max_delay=None)
    assert inspect(system).notes == (f"{system}/pending.jsonl: 2 examples wait to be deleted.",)
    requests.add(NAMES[7:8], [], max_delay=60)
    found = inspect(system)
    assert "3 examples wait to be deleted by the first load of the model after 20" in found.notes[0]
    assert found.problems == ()
    (system / "pending.jsonl").write_text("{}\n")
    assert "pending.jsonl line 1 cannot be read" in problem_of(system)


def test_a_line_that_was_never_finished_is_noted(system):
    with open(system / "ledger.jsonl", "a") as file:
        file.write('{"kind": "dele')
    found = inspect(system)
    assert found.problems == () and "never acknowledged" in found.notes[0]


# What is wrong is said


def _drop(name):
    return lambda system: (system / name).unlink()


def _write(name, data=b"other"):
    def damage(system):
        (system / name).parent.mkdir(parents=True, exist_ok=True)
        (system / name).write_bytes(data)

    return damage


def _in_stage(act):
    return lambda system: act(stage_of(system))


def _swap_adapters(system):
    first, second = (system / "stages" / stage for stage in sorted(stages_on_disk(system))[:2])
    one, two = first / "adapter_model.safetensors", second / "adapter_model.safetensors"
    data = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(data)


def _cut_last_ledger_line(system):
    lines = (system / "ledger.jsonl").read_text().splitlines(keepends=True)
    (system / "ledger.jsonl").write_text("".join(lines[:-1]))


DAMAGES = {
    "no config": (_drop("s3t_config.json"), "holds no S3T system"),
    "config cut": (_write("s3t_config.json", b'{"format_'), "s3t_config.json is not the JSON"),
    "config of another version": (lambda s: forge(s / "s3t_config.json", format_version=9), "format version 9"),
    "config with an unknown key": (
        lambda s: forge(s / "s3t_config.json", s3t_config={"cats": 1}),
        "Unknown S3TConfig keys: cats",
    ),
    "config of another type": (lambda s: forge(s / "s3t_config.json", s3t_config=7), "got int"),
    "no key": (_drop("ledger.key"), "Neither HF_S3T_KEY nor"),
    "another key": (lambda s: (s / "ledger.key").write_text("1" * 64), "is not the one"),
    "key for all to read": (lambda s: (s / "ledger.key").chmod(0o644), "mode 644, expected 600.*chmod 600"),
    "no ledger": (_drop("ledger.jsonl"), "ledger.jsonl is missing"),
    "ledger emptied": (_write("ledger.jsonl", b""), "expected 2, found 0.*cut off"),
    "ledger one line short": (_cut_last_ledger_line, "expected 2, found 1"),
    "ledger no text": (_write("ledger.jsonl", b"\xff\n"), "ledger.jsonl is not text"),
    "ledger no JSON": (_write("ledger.jsonl", b"{}\n"), "ledger line cannot be read"),
    "no table": (_drop("examples.parquet"), "examples.parquet is missing"),
    "table cut": (_write("examples.parquet", b"PAR1"), "is not the table"),
    "adapter cut": (
        _in_stage(lambda s: os.truncate(s / "adapter_model.safetensors", 9)),
        "was altered or cut short",
    ),
    "adapter's config edited": (_in_stage(_write("adapter_config.json", b"{}")), "was altered or cut short"),
    "adapter missing": (_in_stage(_drop("adapter_model.safetensors")), "adapter_model.safetensors is missing"),
    "no stage record": (_in_stage(_drop("stage.json")), "stage.json is missing.*remove its folder and call `train"),
    "stage record cut": (
        _in_stage(lambda s: os.truncate(s / "stage.json", 9)),
        "stage.json is not the JSON.*remove its folder and call `train",
    ),
    "stage record edited": (
        _in_stage(lambda s: (s / "stage.json").write_text((s / "stage.json").read_text().replace("0", "1"))),
        "stage.json was altered.*remove its folder and call `train",
    ),
    "file beside an adapter": (_in_stage(_write("model.bin")), "model.bin is no part of a system"),
    "weights at the root": (_write("model.safetensors"), "model.safetensors is no part of a system"),
    "stage of no shard": (_write("stages/shard-9/0/stage.json"), "shard-9/0 is no part of a system"),
    "stage of no name": (_write("stages/shard-0/01/stage.json"), "shard-0/01 is no part of a system"),
    "stage of a huge name": (_write(f"stages/shard-0/{'1' * 250}/stage.json"), "is no part of a system"),
    "file among shards": (_write("stages/notes.txt"), "notes.txt is no part of a system"),
    "file among stages": (_write("stages/shard-0/7"), "shard-0/7 is no part of a system"),
    "checkpoint of no stage": (_write("checkpoints/shard-9/0/x"), "shard-9/0 is no part of a system"),
    "file among checkpoints": (_write("checkpoints/notes.txt"), "notes.txt is no part of a system"),
    "file where stages were": (
        lambda s: (shutil.rmtree(s / "stages"), (s / "stages").touch()),
        "stages is missing",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damage_is_one_sentence_with_its_remedy(system, name):
    damage, message = DAMAGES[name]
    damage(system)
    problem = problem_of(system)
    assert re.search(message, problem), problem
    assert problem.rstrip().endswith((".", "it."))
    assert problem.count(". ") + problem.count(": ") >= 1, problem


def test_swapped_adapters_are_both_named(system):
    _swap_adapters(system)
    assert sum("was altered" in problem for problem in inspect(system).problems) == 2


def test_swapped_stage_folders_are_both_named(system):
    first, second = (system / "stages" / stage for stage in sorted(stages_on_disk(system))[:2])
    first.rename(system / "aside")
    second.rename(first)
    (system / "aside").rename(second)
    found = inspect(system).problems
    assert sum("swapped or renamed" in problem for problem in found) == 2


def test_a_stage_without_the_one_it_stands_on_is_named(system):
    tip = max(SystemFolder(system).valid_stages, key=lambda key: (key.depth, key))
    shutil.rmtree(system / tip.parent.path)
    assert f"stands on {tip.parent}, which is missing" in " ".join(inspect(system).problems)


def test_a_stage_on_another_one_is_named(untouched):
    folder = SystemFolder(untouched)
    parent = StageKey(0, (0,))
    record = {"slices": folder.slice_digests(parent), "below": None, "metrics": {}}

    def fill(path):
        save_file({"trained": np.array([2.0])}, path / "adapter_model.safetensors")
        (path / "adapter_config.json").write_text("{}")

    # A valid stage is not written over.
    shutil.rmtree(untouched / parent.path)
    folder.write_stage(parent, record, fill)
    assert "was trained on another stage shard-0/0 than the one that is there" in problem_of(untouched)


def test_where_nothing_was_deleted_a_stage_of_other_examples_is_named(untouched):
    forge_stage(untouched, "shard-0/0-1-2", slices=["aa", "bb", "cc"])
    found = inspect(untouched)
    assert "was trained on other examples" in problem_of(untouched) and found.to_remove == ()


def test_an_old_copy_of_a_stage_is_condemned(tmp_path):
    folder = grow(new_system(tmp_path / "system", NAMES))
    key = next(key for key in folder.plan.stages() if key.saw(folder.table.places(NAMES[:1])) and key.depth == 1)
    shutil.copytree(folder.path / key.path, tmp_path / "backup")
    apply(folder, NAMES[:1])
    shutil.copytree(tmp_path / "backup", folder.path / key.path)
    assert "saw an example that was deleted" in problem_of(folder.path)


def test_deleted_rows_in_a_table_that_denies_them_are_told(system):
    before = SystemFolder(system)
    table, ledger = before.table, before.ledger
    rows = {NAMES[0]: Example(0, 0, "aa" * 32), **table.rows}
    write_table(system / "examples.parquet", ExampleTable.of(rows, 2, 3, 1, before.names), ledger)
    assert "still holds 1 deleted example" in problem_of(system)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("shard", pa.array([9, 0, 0])),
        ("shard", pa.array([0, -1, 0])),
        ("slice", pa.array([0, 0, 3])),
        ("shard", pa.array([0, None, 0])),
        ("slice", pa.array(["0", "0", "0"])),
        ("slice", pa.array([0.0, 0.0, 0.0])),
        ("digest", pa.array([bytes(32), None, bytes(32)], pa.binary(32))),
        ("digest", pa.array([b"", b"", b""])),
        ("digest", pa.array([bytes(31)] * 3, pa.binary(31))),
        ("id_digest", pa.array([bytes(32)] * 3, pa.binary(32))),
        ("id", pa.array(["a", None, "c"])),
        ("id", pa.array([1.5, 2.5, 3.5])),
        ("group", pa.array([1.5, None, 2.5])),
    ],
)
def test_rows_that_are_no_examples_are_told(untouched, column, values):
    rewrite_table(untouched / "examples.parquet", lambda columns: {**columns, column: values}, rows=3)
    assert "rows that are no examples" in problem_of(untouched)


def test_a_table_of_a_newer_version_is_refused_by_it(untouched):
    rewrite_table(untouched / "examples.parquet", lambda columns: columns, table="3")
    assert "has the version 3 of a table; this hf_s3t reads versions 1 and 2. Install" in problem_of(untouched)


# Interrupted removals


def test_an_interrupted_removal_is_told_and_left_to_the_next_load(tmp_path):
    folder = grow(new_system(tmp_path / "system", NAMES), limit=16)
    (missing,) = folder.plan.missing(folder.valid_stages)[:1]
    checkpoint = add_checkpoint(folder, missing)
    (folder.path / ".tmp-ledger-1").write_bytes(b"half")
    (folder.path / "stages/shard-0/.gone-0-1").mkdir()
    delete_and_die(folder, folder.table.members(missing.shard, missing.prefix[0])[:1])
    before = files_of(folder.path)
    found = inspect(folder.path)
    assert files_of(folder.path) == before
    kinds = {item.kind for item in found.to_remove}
    assert kinds == {"stage", "checkpoint", "leftover", "rows"} and len(found.to_remove) == len(found.problems)
    assert all("next load" in problem for problem in found.problems)
    assert checkpoint in [item.path for item in found.to_remove]
    SystemFolder(folder.path)
    assert inspect(folder.path).problems == ()
    assert not [item.path for item in found.to_remove if item.kind != "rows" and item.path.exists()]


def test_a_folder_opened_to_read_says_the_same_as_after_the_removal(tmp_path):
    folder = grow(new_system(tmp_path / "system", NAMES))
    delete_and_die(folder, NAMES[:1])
    before = files_of(folder.path)
    status = system_status(open_folder(folder.path, read_only=True))
    assert files_of(folder.path) == before
    assert status == system_status(SystemFolder(folder.path))
    assert files_of(folder.path) != before


# Whatever is in the folder


@pytest.fixture(scope="module")
def scratch(after_deletion, tmp_path_factory):
    """A copy for many changes, each of which is taken back."""
    return Path(shutil.copytree(after_deletion, tmp_path_factory.mktemp("scratch") / "system"))


@contextlib.contextmanager
def put_back(path):
    whole = path.read_bytes()
    try:
        yield
    finally:
        path.write_bytes(whole)


FILES = [
    "s3t_config.json",
    "examples.parquet",
    "ledger.jsonl",
    "ledger.key",
    "stage.json",
    "adapter_config.json",
    "adapter_model.safetensors",
]


@settings(max_examples=100)
@given(data=st.data(), name=st.sampled_from(FILES), cut=st.booleans())
def test_every_changed_byte_and_every_cut_is_a_problem(scratch, data, name, cut):
    path = scratch / name if (scratch / name).exists() else stage_of(scratch) / name
    whole = path.read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    other = b"" if cut else bytes([data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[position]))])
    with put_back(path):
        path.write_bytes(whole[:position] + other + (b"" if cut else whole[position + 1 :]))
        found = inspect(scratch)
    assert found.problems
    assert all(problem.isprintable() for problem in found.problems)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["", "../..", "shard-0/0", "aa"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["slices", "a"]), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=80)
@given(
    target=st.sampled_from(["s3t_config.json", "stage.json"]),
    name=st.sampled_from(
        ["s3t_config", "key_check", "format_version", "stage", "files", "slices", "below", "metrics"]
    ),
    value=JSON,
)
def test_forged_values_with_matching_digests_are_sentences_or_harmless(scratch, target, name, value):
    path = scratch / target if (scratch / target).exists() else stage_of(scratch) / target
    with put_back(path):
        forge(path, **{name: value})
        found = inspect(scratch)
        assert all(problem.isprintable() for problem in found.problems)
        try:
            system_status(open_folder(scratch, read_only=True))
        except S3TError:
            assert found.problems


def test_a_record_that_names_files_elsewhere_is_refused_and_they_are_not_read(system):
    stage = stage_of(system)
    forge(stage / "stage.json", files={"../../../../../etc/hostname": "aa"})
    assert "does not say what the record of a stage says" in " ".join(inspect(system).problems)


@pytest.mark.parametrize(
    "part", ["s3t_config.json", "examples.parquet", "ledger.jsonl", "ledger.key", "stages", "stages/shard-0"]
)
def test_a_link_in_the_place_of_a_part_is_refused(system, tmp_path, part):
    (system / part).rename(tmp_path / "elsewhere")
    (system / part).symlink_to(tmp_path / "elsewhere")
    assert f"{part} is a symbolic link" in " ".join(inspect(system).problems)
    for read_only in (True, False):
        with pytest.raises(FolderError, match="symbolic link"):
            open_folder(system, read_only=read_only)


def test_opening_a_folder_removes_nothing_through_a_link(tmp_path):
    victim = grow(new_system(tmp_path / "victim", NAMES), limit=1)
    kept = add_checkpoint(victim, StageKey(1, (0,)), recorded=False)
    folder = grow(new_system(tmp_path / "system", NAMES))
    apply(folder, NAMES[:1])
    (folder.path / "checkpoints").symlink_to(victim.path / "checkpoints")
    with pytest.raises(FolderError, match="checkpoints is a symbolic link"):
        open_folder(folder.path)
    assert kept.exists() and "checkpoints is a symbolic link" in problem_of(folder.path)


def test_links_that_lead_in_circles_or_nowhere_are_told(system):
    (system / "loop").symlink_to(system)
    (system / "stages/shard-0/0-1-2").parent.mkdir(exist_ok=True)
    (stage_of(system) / "more").symlink_to("/nowhere")
    assert sum("symbolic link" in problem for problem in inspect(system).problems) == 2


def test_a_pipe_in_the_place_of_a_file_is_not_read(system):
    (system / "ledger.jsonl").unlink()
    os.mkfifo(system / "ledger.jsonl")
    assert "neither a file nor a folder" in " ".join(inspect(system).problems)
    with pytest.raises(FolderError, match="neither a file nor a folder"):
        open_folder(system)


def test_names_that_would_command_a_terminal_are_escaped(system):
    (system / "evil\x1b[2J\nname").write_text("")
    problem = problem_of(system)
    assert "evil\\x1b[2J\\nname" in problem
    assert printable("d\udcffé…") == "d\\udcffé…"


def test_an_unreadable_file_is_a_sentence(system, monkeypatch):
    # Permissions do not bind every user that tests run as.
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("hf_s3t.operations.inspected_records.read_table", refuse)
    assert "examples.parquet cannot be read: Permission denied" in problem_of(system)


@pytest.mark.parametrize("path", ["nowhere", "file"])
def test_what_is_no_system_is_said_to_be_none(tmp_path, path):
    (tmp_path / "file").write_text("")
    assert "holds no S3T system" in inspect(tmp_path / path).problems[0]


def test_a_deletion_meanwhile_makes_it_look_again(system, monkeypatch):
    stamps = iter([1, 2, 2, 2])
    monkeypatch.setattr("hf_s3t.operations.inspection.stamp", lambda path: next(stamps))
    assert inspect(system).problems == ()
    assert not list(stamps)


def test_configs_are_those_of_other_systems_too(tmp_path):
    # Without groups, with one shard, with explicit sequences.
    config = S3TConfig(num_slices=2, sequence_selection=[[1, 0]], seed=3)
    assert inspect(grow(new_system(tmp_path / "system", config=config, groups=None)).path).problems == ()
