"""`keep_ids="digest"`: a folder that names nobody, and everything that works with ids all the same."""

import json
import os

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support.folders import files_of, preview
from support.tiny import lm_rows, make_trainer, plant_stages, s3t_config, tiny_llama

from hf_s3t import S3TModel
from hf_s3t.cli.app import app
from hf_s3t.errors import ConfigError, ContentChangedError, ExampleIdError, UnknownExampleError
from hf_s3t.folder.layout import KEY_FILE
from hf_s3t.folder.secret import KEY_VARIABLE, load_key
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.pending import PendingRequests
from hf_s3t.operations.receipts import Receipts
from hf_s3t.operations.written_ids import groups_from_texts, ids_from_texts


pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = {"num_shards": 2, "num_slices": 2, "group_column": "person", "partition": "balanced"}


def people_rows(ids=None):
    """Twelve rows of six people whose ids are their addresses."""
    rows = lm_rows(12)
    ids = ids or [f"someone{n}@example.org" for n in range(12)]
    return [{**row, "id": ids[n], "person": f"Person Nr {n // 2}"} for n, row in enumerate(rows)]


def system(path, rows=None, keep_ids="digest", **changes):
    config = s3t_config(**{**SETTINGS, **changes}, keep_ids=keep_ids)
    return make_trainer(path, rows=rows or people_rows(), config=config)


@pytest.fixture
def planted(tmp_path):
    trainer = system(tmp_path / "system")
    plant_stages(trainer)
    return trainer


def everything_in(path) -> bytes:
    """All files, the table both as it lies on the disk and unpacked."""
    table = pq.read_table(path / "examples.parquet")
    return b"".join(data for data in files_of(path).values() if data) + repr(table.to_pydict()).encode()


def test_no_file_of_the_folder_holds_an_id_or_a_group(planted):
    victim = people_rows()[0]["id"]
    planted.s3t_model.unlearn([victim])
    planted.s3t_model.unlearn_later(groups=["Person Nr 3"])
    planted.s3t_model.check()
    held = everything_in(planted.folder.path)
    assert not any(row["id"].encode() in held or row["person"].encode() in held for row in people_rows())
    # In a folder that keeps them they stand, so this test could see them.
    plain = everything_in(system(planted.folder.path.parent / "plain", keep_ids="plain").folder.path)
    assert all(row["id"].encode() in plain and row["person"].encode() in plain for row in people_rows())


@pytest.mark.parametrize("partition", ["hashed", "balanced"])
def test_what_is_trained_does_not_depend_on_it(partition, tmp_path, monkeypatch):
    # Hashed places and the order inside a slice depend on no secret, and each system has its own. Balanced ones do.
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    if partition == "balanced":
        monkeypatch.setenv(KEY_VARIABLE, "of both systems of this test")
    trained = [system(tmp_path / how, keep_ids=how, partition=partition, seed=1) for how in ("plain", "digest")]
    for trainer in trained:
        trainer.train()
    plain, digest = (trainer.folder for trainer in trained)
    assert (plain.key.check == digest.key.check) == (partition == "balanced") and len(plain.stages) == 8
    for key in plain.stages:
        ours, theirs = (load_file(f.path / key.path / "adapter_model.safetensors") for f in (plain, digest))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours), key


def test_ids_and_groups_are_given_as_they_are(planted, tmp_path, monkeypatch):
    rows, model = people_rows(), planted.s3t_model
    monkeypatch.setenv(KEY_VARIABLE, os.environ.get(KEY_VARIABLE) or (tmp_path / "system" / KEY_FILE).read_text())
    plain = system(tmp_path / "plain", keep_ids="plain").folder.table.rows
    assert model.locate([rows[4]["id"]]) == {rows[4]["id"]: (plain[rows[4]["id"]].shard, plain[rows[4]["id"]].slice)}
    report = model.unlearn([rows[0]["id"]])
    assert (report.deleted, report.already_deleted) == (1, 0)
    assert model.unlearn([rows[0]["id"]]).already_deleted == 1
    assert model.unlearn(groups=[rows[4]["person"]]).deleted == 2
    assert model.unlearn(groups=[rows[4]["person"]]).deleted == 0
    with pytest.raises(UnknownExampleError, match=r"Unknown ids: 'stranger'\. Name examples by the ids"):
        model.unlearn(["stranger"])
    with pytest.raises(UnknownExampleError, match="Unknown groups: 'nobody'"):
        model.unlearn(groups=["nobody"])
    with pytest.raises(UnknownExampleError, match="deleted, and in no slice any more"):
        model.locate([rows[0]["id"]])
    assert model.check() == []


def test_a_digest_that_the_system_told_names_its_example_too(tmp_path):
    rows = people_rows()
    rows[5] = {**rows[5], **{k: v for k, v in rows[0].items() if k not in ("id", "person")}}
    trainer = system(tmp_path, rows=rows)
    plant_stages(trainer)
    model = trainer.s3t_model
    (duplicate,) = model.unlearn([rows[0]["id"]]).duplicates
    assert duplicate == model.folder.key.of_id(rows[5]["id"])
    assert model.unlearn([duplicate]).deleted == 1
    assert model.unlearn([duplicate]).already_deleted == model.unlearn([rows[5]["id"]]).already_deleted == 1


def test_the_deletion_stays_in_force_on_a_new_load_and_in_training(tmp_path):
    rows = people_rows()
    trainer = system(tmp_path)
    trainer.train()
    trainer.s3t_model.unlearn([rows[0]["id"]])
    again = S3TModel.from_pretrained(tmp_path, base_model=tiny_llama())
    assert again.folder.is_deleted(rows[0]["id"]) and len(again.folder.table) == 11
    # The dataset still holds the row; the trainer passes over it.
    resumed = system(tmp_path, rows=rows)
    resumed.train()
    assert len(resumed.folder.table) == 11 and len(resumed.folder.valid_stages) == 8
    assert inspect(tmp_path).problems == ()


def test_a_dataset_that_does_not_fit_is_refused_by_its_own_ids(planted):
    rows = people_rows()
    with pytest.raises(UnknownExampleError, match="'stranger'"):
        system(planted.folder.path, rows=[*rows, {**rows[0], "id": "stranger"}])
    with pytest.raises(ContentChangedError, match=r"someone1@example\.org"):
        system(planted.folder.path, rows=[rows[0], {**rows[1], "input_ids": rows[2]["input_ids"]}, *rows[2:]])
    with pytest.raises(ContentChangedError, match=r"someone1@example\.org"):
        system(planted.folder.path, rows=[rows[0], {**rows[1], "person": "Another"}, *rows[2:]])
    with pytest.raises(ExampleIdError, match="lacks 1 example "):
        system(planted.folder.path, rows=rows[:-1])


def test_requests_that_wait_are_applied(planted):
    rows, model = people_rows(), planted.s3t_model
    model.unlearn_later([rows[0]["id"]], groups=[rows[4]["person"]])
    assert len(PendingRequests(SystemFolder(model.folder.path)).ids()) == 3
    assert model.apply_pending().deleted == 3
    assert all(model.folder.is_deleted(rows[n]["id"]) for n in (0, 4, 5))


def test_numbers_on_a_command_line_find_the_ids_they_are(tmp_path):
    trainer = system(tmp_path, rows=people_rows(ids=list(range(100, 112))))
    plant_stages(trainer)
    folder = trainer.folder
    assert ids_from_texts(folder, ["100", "x"]) == [100, "x"]
    assert groups_from_texts(folder, ["Person Nr 2", "7"]) == ["Person Nr 2", "7"]
    assert preview(folder, ids_from_texts(folder, ["100"])).requested == 1
    trainer.s3t_model.unlearn([100])
    assert ids_from_texts(SystemFolder(tmp_path), ["100"]) == [100]


def test_the_command_line_finds_places_and_receipts_by_the_id(planted):
    from typer.testing import CliRunner

    path, victim = str(planted.folder.path), people_rows()[0]["id"]
    planted.s3t_model.unlearn([victim])
    result = CliRunner().invoke(app, ["locate", path, victim, people_rows()[3]["id"], "--json"])
    found = json.loads(result.stdout)["examples"]
    assert [(e["id"], e["deleted"]) for e in found] == [(victim, True), (people_rows()[3]["id"], False)]
    group = people_rows()[4]["person"]
    planted.s3t_model.unlearn(groups=[group])
    for name in (group, planted.folder.key.of_group(group)):
        result = CliRunner().invoke(app, ["locate", path, "--group", name, "--json"])
        assert json.loads(result.stdout)["deleted_groups"] == [{"group": name, "line": 2}]
    (receipt,) = Receipts.read(path).of_id(victim, load_key(path))
    assert receipt.entry.ids == (planted.folder.key.of_id(victim),)


def test_another_secret_is_refused(planted, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "0" * 32)
    assert "secret" in inspect(planted.folder.path).problems[0]


def test_other_ways_to_keep_ids_are_refused():
    with pytest.raises(ConfigError, match="`keep_ids`"):
        s3t_config(keep_ids="hashed")
