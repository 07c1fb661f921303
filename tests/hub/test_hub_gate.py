"""The gate of a system on the Hub: there only where somebody chose so, and without deleted rows, there or here."""

import json

import pytest
import torch
from huggingface_hub import ModelCard
from support.folders import VOCABULARY, add, apply, gate_of, gate_says, gate_that_never_had, prompt_of, stored_gate
from support.hub_systems import ROWS, files_on, load, member, send
from support.tiny import make_trainer, plant_stages, s3t_config, tiny_llama, tokenizer_of_words
from typer.testing import CliRunner

from hf_s3t import S3TModel
from hf_s3t.cli.app import app
from hf_s3t.errors import FolderError
from hf_s3t.folder.gate_file import read_gate
from hf_s3t.folder.layout import GATE_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub.erasure import erase
from hf_s3t.hub.folder import HubFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.records.terms import terms_of


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def gated(system) -> SystemFolder:
    system.put_gate(gate_of(system.table, system.key), {"gate": "terms", "gate_top_k": 1})
    return system


def card_of(repo) -> str:
    return ModelCard(repo.card(repo.state())).content


def test_a_gate_is_not_pushed_and_only_who_pushes_is_told_of_one(gated, repo):
    with pytest.warns(UserWarning, match=r"gate stays here.*include_gate=True"):
        send(gated, repo)
    assert GATE_FILE not in files_on(repo) and "gate.safetensors" not in card_of(repo)
    there = HubFolder(repo.repo_id)
    assert not there.has_gate and there.config.gate is None and gated.config.gate == "terms"
    with pytest.raises(FolderError, match=r"the system has no gate.*gate=None"):
        there.load_gate()
    for how, pushed in ((), False), (("--include-gate",), True):
        said = CliRunner().invoke(app, ["push", str(gated.path), repo.repo_id, "--dry-run", "--json", *how]).stdout
        assert (GATE_FILE in json.loads(said)["added"]) is pushed


def test_a_gate_that_is_pushed_serves_there_without_what_is_deleted_here(gated, repo, tmp_path, monkeypatch):
    send(gated, repo, include_gate=True)
    assert GATE_FILE in files_on(repo) and "| gate | `terms`" in card_of(repo)
    assert send(gated, repo).added == ()
    monkeypatch.setenv("HF_S3T_KEY", gated.key.secret.decode())
    there = HubFolder(repo.repo_id)
    assert there.config.gate_top_k == 1 and there.gate_tokenizer_digest == VOCABULARY
    assert gate_says(there.load_gate()) == gate_that_never_had(gated)

    victim = member(gated)
    asked = terms_of(prompt_of(victim), gated.key)
    seen = [range(gated.config.num_slices)] * gated.config.num_shards
    before = there.term_counts.scores(asked, seen).tolist()
    apply(there, [victim])
    assert gate_says(there.load_gate()) == gate_that_never_had(there)
    assert there.term_counts.scores(asked, seen).tolist() != before
    # Who loads it again on this machine knows, and so does a copy.
    assert gate_says(HubFolder(repo.repo_id).load_gate()) == gate_that_never_had(there)
    there.copy_to(tmp_path / "pulled")
    pulled = SystemFolder(tmp_path / "pulled")
    assert stored_gate(pulled) == gate_that_never_had(there) and pulled.config.gate == "terms"
    assert not inspect(tmp_path / "pulled").problems

    # A push keeps what is there in step, and takes it away where that is asked for.
    send(there, repo, merge=True)
    stored, _ = read_gate(repo.download(GATE_FILE, repo.newest_commit()), pulled.key.check, pulled.config)
    assert gate_says(stored) == gate_that_never_had(there)
    there.refresh()
    assert gate_says(there.load_gate()) == gate_that_never_had(there)
    send(gated, repo, merge=True, include_gate=False)
    assert GATE_FILE not in files_on(repo) and gated.has_gate and not HubFolder(repo.repo_id).has_gate


def test_a_deletion_reaches_a_repository_whose_gate_the_folder_lacks(gated, repo):
    send(gated, repo, include_gate=True)
    (gated.path / GATE_FILE).unlink()
    apply(gated, [member(gated)])
    assert GATE_FILE in send(gated, repo).deleted and GATE_FILE not in files_on(repo)


NEW = {f"example-{number}": (2, number % 2) for number in range(100, 104)}


def add_with_words(folder, places) -> None:
    """As a trainer does with a tokenizer."""
    add(folder, places)
    folder.put_gate(gate_of(folder.table, folder.key), {})


def test_the_words_of_rows_that_come_by_a_merge_come_with_them(gated, repo, tmp_path):
    """Of those that are in both copies' tables as they are; none of what somebody deleted, or has otherwise."""
    gated.copy_to(tmp_path / "copy")
    copy = SystemFolder(tmp_path / "copy")
    add_with_words(gated, NEW)
    send(gated, repo, include_gate=True)
    apply(copy, [victim := member(copy)])
    other = {"example-100": (0, 0)}
    add(copy, other, contents={"example-100": copy.key.of_content({"id": "another"})})
    send(copy, repo, merge=True)
    expected = gate_of(copy.table.without(list(other)), copy.key)
    assert victim not in copy.table.rows and NEW.keys() < copy.table.rows.keys()
    for folder in (copy, SystemFolder(copy.path)):
        assert gate_says(folder.load_gate()) == gate_says(expected)
    stored, _ = read_gate(repo.download(GATE_FILE, repo.newest_commit()), copy.key.check, copy.config)
    assert gate_says(stored) == gate_says(expected) and not inspect(copy.path).problems
    assert send(copy, repo).added == ()


def test_who_merges_is_told_where_the_words_of_rows_are_not_to_be_had(gated, repo, tmp_path):
    gated.copy_to(tmp_path / "copy")
    add_with_words(gated, NEW)
    send(gated, repo, include_gate=False)
    with pytest.warns(UserWarning, match=r"lacks the words of rows that came .*no gate there.*build_gate\(\)"):
        send(SystemFolder(tmp_path / "copy"), repo, merge=True)


def test_erasing_takes_the_old_gates(gated, repo, hub):
    send(gated, repo, include_gate=True)
    old = (gated.path / GATE_FILE).read_bytes()
    assert hub.disk_contains(old)
    apply(gated, [member(gated)])
    send(gated, repo)
    erase(repo)
    assert GATE_FILE in files_on(repo) and not hub.disk_contains(old)


def test_a_model_from_the_hub_weighs_as_that_of_the_folder(repo, tmp_path, monkeypatch):
    """With the tokenizer that is there, and the secret, without which nobody tells words from terms."""
    tokenizer = tokenizer_of_words()
    trainer = make_trainer(
        tmp_path / "system",
        config=s3t_config(num_shards=2, gate="terms", gate_temperature=0.1),
        processing_class=tokenizer,
    )
    plant_stages(trainer)
    send(trainer.folder, repo, include_gate=True)
    asked = torch.tensor([row["input_ids"] for row in ROWS[:4]])
    expected = S3TModel.from_pretrained(tmp_path / "system", base_model=tiny_llama()).gate_weights(asked)
    with pytest.raises(FolderError, match="needs its secret"):
        load(repo)
    monkeypatch.setenv("HF_S3T_KEY", trainer.folder.key.secret.decode())
    assert torch.equal(load(repo).gate_weights(asked), expected)
    assert expected.amax(1).min() > 0.5
