"""Systems on the Hub: pushed, served from there, forgotten there, and what happens when two are at it."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants, hf_hub_download, snapshot_download
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.folders import apply, files_of, forge_stage
from support.hub_systems import ROWS, SETTINGS, files_on, load, logits_of, member, send
from support.insides import routing_of
from support.tiny import lm_rows, make_trainer, plant_stages, s3t_config, tiny_llama, training_arguments
from typer.testing import CliRunner

from hf_s3t import S3TModel
from hf_s3t.cli.app import app
from hf_s3t.errors import ConfigError, FolderError, HubError, KeyMissingError, MergeNeededError
from hf_s3t.folder.files import file_digest
from hf_s3t.folder.secret import KEY_VARIABLE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub.card import description
from hf_s3t.hub.folder import HubFolder
from hf_s3t.hub.memory import state_folder
from hf_s3t.hub.pushing import push
from hf_s3t.hub.repository import HubRepo
from hf_s3t.model.route import Route, routed
from hf_s3t.model.tensor_files import differing_tensors
from hf_s3t.operations.inspection import inspect
from hf_s3t.records.ledger import LedgerEntry


pytestmark = pytest.mark.usefixtures("one_thread")

# Pushing


def test_a_push_is_one_commit_of_the_system_without_its_secret(system, repo, hub):
    report = send(system, repo, commit_message="first")
    assert len(hub.calls("POST", "/commit/")) == 1
    on_hub = files_on(repo)
    assert {"s3t_config.json", "ledger.jsonl", "examples.parquet", "stages/index.json", "README.md"} <= on_hub
    assert {f"{key.path}/adapter_model.safetensors" for key in system.stages} <= on_hub
    assert "ledger.key" not in on_hub and not hub.disk_contains((system.path / "ledger.key").read_bytes())
    assert report.commit == repo.state().commit and set(report.added) == on_hub - {".gitattributes"}
    assert repo.api.list_repo_commits(repo.repo_id)[0].title == "first"


def send_while(folder, repo, do):
    """Push, and have another process do something once, when the files have been looked at and nothing is sent."""
    todo = [do]

    def describe(*args):
        if todo:
            todo.pop()()
        return description(*args, repo_id=repo.repo_id)

    return push(folder, repo, describe)


def grown_otherwise(path, key):
    """Another process grew a stage again, with other sums."""
    stage = path / key.path
    tensors = {name: tensor + 1 for name, tensor in load_file(stage / "adapter_model.safetensors").items()}
    files = {**SystemFolder(path).stage_record(key)["files"]}
    shutil.copytree(stage, stage.with_name(".tmp-other"))
    shutil.rmtree(stage)
    stage.with_name(".tmp-other").rename(stage)
    save_file(tensors, stage / "adapter_model.safetensors", {"format": "pt"})
    files["adapter_model.safetensors"] = file_digest(stage / "adapter_model.safetensors")
    forge_stage(path, str(key), files=files)


def test_a_stage_that_is_grown_anew_while_it_is_pushed_comes_with_its_own_record(system, repo):
    key = next(key for key in system.stages if key.depth == 2)
    send_while(system, repo, lambda: grown_otherwise(system.path, key))
    there = SystemFolder(system.path)
    assert repo.state().stages[key]["files"] == there.stage_record(key)["files"]
    pulled = HubFolder(repo.repo_id)
    assert pulled.valid_stages == there.valid_stages
    for stage in sorted(pulled.valid_stages):
        assert pulled.read_adapter(stage) == there.read_adapter(stage)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "stage.json"])
def test_a_stage_that_is_damaged_is_named_and_not_pushed(system, repo, name):
    file = system.path / max(system.stages).path / name
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(FolderError, match=rf"{file} .* remove its folder and call `train\(\)`"):
        send(system, repo)
    assert repo.state().record is None


@pytest.mark.parametrize("moment", ["before", "meanwhile"])
def test_no_push_brings_what_another_process_deleted_by_then(system, repo, moment):
    # Of a slice that no stage saw: no file goes that would be missed.
    for stage in system.stages:
        if stage.saw({(1, 1)}):
            shutil.rmtree(system.path / stage.path)
    system.refresh()
    if moment == "meanwhile":
        send(system, repo)
    victim, other = member(system, 1, 1), SystemFolder(system.path)
    if moment == "before":
        apply(other, [victim])
        send(system, repo)
    else:
        send_while(system, repo, lambda: apply(other, [victim]))
    assert other.names.id_digest(victim) in repo.state().ledger.deleted
    assert len(HubFolder(repo.repo_id).table) == len(other.table)


def test_pushing_again_uploads_nothing(system, repo, hub):
    first = send(system, repo)
    hub.requests.clear()
    again = send(system, repo)
    assert (again.commit, again.added, again.deleted) == (first.commit, (), ())
    assert not hub.calls("POST", "/commit/") and not hub.calls("PUT") and not hub.calls("POST", "objects/batch")


def test_a_push_that_merges_says_what_the_folder_forgot(pushed, repo, tmp_path):
    other = SystemFolder(shutil.copytree(pushed.path, tmp_path / "other"))
    report = apply(other, [member(other), member(other, 1, 1)])
    send(other, repo)
    done = send(pushed, repo, merge=True)
    assert (done.forgotten, done.stages_removed) == (2, report.stages_removed)
    again = send(pushed, repo, merge=True)
    assert (again.forgotten, again.stages_removed) == (0, ())


def test_a_push_after_a_deletion_removes_what_went_and_uploads_no_weights(pushed, repo, hub):
    report = apply(pushed, [member(pushed)])
    hub.requests.clear()
    done = send(pushed, repo)
    assert {f"stages/{stage}/adapter_model.safetensors" for stage in report.stages_removed} <= set(done.deleted)
    assert not any(path.endswith(".safetensors") for path in done.added)
    assert not any(f"stages/{stage}/" in path for stage in report.stages_removed for path in files_on(repo))
    assert repo.state().ledger.deleted == pushed.ledger.deleted


def test_a_dry_run_says_what_would_go_and_does_nothing(system, repo, hub):
    would = send(system, repo, dry_run=True)
    assert "s3t_config.json" in would.added and not repo.api.repo_exists(repo.repo_id)
    send(system, repo)
    apply(system, [member(system)])
    before = repo.state().commit
    would = send(system, repo, dry_run=True)
    assert would.deleted and repo.state().commit == before
    assert set(send(system, repo).deleted) == set(would.deleted)


def test_another_system_in_the_repository_is_not_overwritten(pushed, repo, tmp_path, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE)
    trainer = make_trainer(tmp_path / "other", rows=ROWS, config=s3t_config(**SETTINGS))
    plant_stages(trainer)
    before = repo.state().commit
    with pytest.raises(HubError, match="holds another system"):
        send(trainer.folder, repo)
    assert repo.state().commit == before


# Two who delete


def test_a_push_that_would_bring_examples_back_is_refused_and_can_merge(pushed, repo, tmp_path):
    other = SystemFolder(shutil.copytree(pushed.path, tmp_path / "other"))
    apply(other, [member(other, 0, 0)])
    send(other, repo)
    apply(pushed, [member(pushed, 1, 1)])
    before, ours = repo.state(), pushed.ledger
    with pytest.raises(MergeNeededError, match=r"1 deleted examples .* merge=True"):
        send(pushed, repo)
    assert repo.state().commit == before.commit and SystemFolder(pushed.path).ledger == ours
    send(pushed, repo, merge=True)
    state = repo.state()
    assert state.ledger.deleted == ours.deleted | before.ledger.deleted
    assert inspect(pushed.path).problems == ()
    assert set(state.stages) == set(SystemFolder(pushed.path).valid_stages)
    # The other machine catches up by the same way.
    send(other, repo, merge=True)
    assert other.ledger.deleted == state.ledger.deleted and inspect(other.path).problems == ()


def test_two_pushes_at_once_end_with_both_deletions(pushed, repo, tmp_path, monkeypatch):
    other = SystemFolder(shutil.copytree(pushed.path, tmp_path / "other"))
    apply(pushed, [member(pushed, 0, 0)])
    apply(other, [member(other, 1, 1)])
    create, raced = HfApi.create_commit, []

    def race(self, *args, **kwargs):
        if not raced:
            raced.append(True)
            send(other, HubRepo(repo.repo_id))
        return create(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", race)
    send(pushed, repo)
    state = repo.state()
    assert state.ledger.deleted == pushed.ledger.deleted > other.ledger.deleted
    assert set(state.stages) == set(pushed.valid_stages)


# Serving from the Hub


def test_only_what_serves_is_downloaded(pushed, repo, hub):
    model = load(repo)
    snapshot = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")
    fetched = {str(file.relative_to(root)) for root in snapshot for file in root.rglob("*") if file.is_file()}
    served = {tip for tips in routing_of(model).served for tip in tips}
    adapters = {f"{key.path}/adapter_model.safetensors" for tip in served for key in tip.lineage}
    assert {path for path in fetched if path.endswith(".safetensors")} == adapters
    assert "examples.parquet" not in fetched
    assert torch.equal(logits_of(model), logits_of(S3TModel.from_pretrained(pushed.path, base_model=tiny_llama())))
    model.locate([ROWS[0]["id"]])
    assert any(Path(constants.HF_HUB_CACHE).rglob("examples.parquet"))


def test_a_deletion_on_a_model_from_the_hub_is_in_force_everywhere_on_this_machine(pushed, repo, hub, monkeypatch):
    model = load(repo)
    commit = model.folder.commit
    victim = member(pushed)
    report = model.unlearn([victim])
    apply(pushed, [victim])
    expected = logits_of(S3TModel.from_pretrained(pushed.path, base_model=tiny_llama()))
    assert report.stages_removed and torch.equal(logits_of(model), expected)
    assert not list(state_folder(repo.repo_id).rglob("*.safetensors"))
    for how in ({}, {"revision": commit}, {"revision": "main", "cache_dir": Path(constants.HF_HOME) / "second"}):
        assert torch.equal(logits_of(load(repo, **how)), expected), how
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for how in ({}, {"revision": commit}):
        assert torch.equal(logits_of(load(repo, **how)), expected), how


def test_a_model_from_the_hub_brings_its_deletion_there(pushed, repo):
    model = load(repo)
    report = model.unlearn([member(pushed)])
    model.push_to_hub(repo.repo_id)
    assert model.check() == []
    assert not any(f"stages/{stage}/" in path for stage in report.stages_removed for path in files_on(repo))
    assert repo.state().ledger.deleted == model.folder.ledger.deleted
    # Whoever has neither state nor secret gets the same.
    shutil.rmtree(state_folder(repo.repo_id))
    assert torch.equal(logits_of(load(repo)), logits_of(model))


def test_an_old_revision_does_not_bring_a_deleted_example_back(pushed, repo):
    old = load(repo).folder.commit
    apply(pushed, [member(pushed)])
    send(pushed, repo)
    shutil.rmtree(state_folder(repo.repo_id))
    expected = logits_of(S3TModel.from_pretrained(pushed.path, base_model=tiny_llama()))
    assert torch.equal(logits_of(load(repo, revision=old)), expected)


def test_lines_of_the_ledger_that_were_read_from_the_hub_or_here_are_not_read_again(pushed, repo, monkeypatch):
    for victim in member(pushed), member(pushed, 1):
        apply(pushed, [victim])
        send(pushed, repo)
    lines_read, read = [], LedgerEntry.from_line
    monkeypatch.setattr(LedgerEntry, "from_line", lambda line: lines_read.append(line) or read(line))
    folder = HubFolder(repo.repo_id)
    assert folder.ledger == pushed.ledger and sorted(lines_read) == sorted(folder.ledger.lines)
    lines_read.clear()
    folder.refresh()
    assert not lines_read
    monkeypatch.setattr(LedgerEntry, "from_line", read)
    apply(pushed, [pushed.table.members(1, 0)[0]])
    send(pushed, repo)
    monkeypatch.setattr(LedgerEntry, "from_line", lambda line: lines_read.append(line) or read(line))
    folder.refresh()
    assert folder.ledger == pushed.ledger and lines_read == [pushed.ledger.lines[2]]


def test_without_the_secret_a_model_serves_and_asks_for_it_when_it_is_needed(pushed, repo, monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE)
    model = load(repo)
    before = logits_of(model)
    with pytest.raises(KeyMissingError, match=KEY_VARIABLE):
        model.unlearn([ROWS[0]["id"]])
    assert torch.equal(logits_of(model), before) and not model.folder.ledger.lines
    with pytest.raises(KeyMissingError):
        model.save_pretrained(state_folder("x/y") / "pulled")


def test_a_pulled_system_is_the_system(pushed, repo, tmp_path, monkeypatch):
    model = load(repo)
    model.unlearn([member(pushed)])
    model.save_pretrained(tmp_path / "pulled")
    apply(pushed, [member(pushed)])
    assert inspect(tmp_path / "pulled").problems == ()
    pulled = SystemFolder(tmp_path / "pulled")
    assert pulled.valid_stages == pushed.valid_stages and pulled.table.rows == pushed.table.rows
    # It can be pushed from, and trained on.
    assert send(pulled, repo).deleted
    assert make_trainer(pulled.path, rows=ROWS, config=s3t_config(**SETTINGS)).folder.table.rows == pushed.table.rows


@pytest.mark.slow
def test_a_quarter_of_the_adapters_of_a_larger_system_is_downloaded_to_serve_it(tmp_path, repo, hub):
    config = s3t_config(num_shards=5, num_slices=4, budget=4, partition="balanced")
    trainer = make_trainer(tmp_path / "large", tiny_llama(4), lm_rows(40), config=config)
    plant_stages(trainer)
    send(trainer.folder, repo)
    every = sum(
        (trainer.folder.path / k.path / "adapter_model.safetensors").stat().st_size for k in trainer.folder.stages
    )
    load(repo)
    cached = {p.resolve() for p in Path(constants.HF_HUB_CACHE).rglob("*.safetensors")}
    assert sum(path.stat().st_size for path in cached) == every / 4


def test_live_models_follow_what_others_pushed(pushed, repo):
    model = load(repo)
    apply(pushed, [member(pushed)])
    send(pushed, repo)
    model.refresh()
    assert torch.equal(logits_of(model), logits_of(S3TModel.from_pretrained(pushed.path, base_model=tiny_llama())))


def test_a_push_that_fails_after_merging_leaves_no_stage_serving_that_went(pushed, repo, hub, tmp_path):
    other = SystemFolder(shutil.copytree(pushed.path, tmp_path / "other"))
    apply(other, [member(other, 0, 0)])
    send(other, repo)
    model = S3TModel.from_pretrained(pushed.path, base_model=tiny_llama())
    model.unlearn([member(pushed, 1, 1)])
    hub.fail("POST", "/commit/", status=403, times=100)
    with pytest.raises(HubError, match="may not write"):
        model.push_to_hub(repo.repo_id, merge=True)
    expected = logits_of(S3TModel.from_pretrained(pushed.path, base_model=tiny_llama()))
    assert torch.equal(logits_of(model), expected)


def test_a_dry_run_with_merging_changes_nothing_here(pushed, repo, tmp_path):
    other = SystemFolder(shutil.copytree(pushed.path, tmp_path / "other"))
    apply(other, [member(other, 0, 0)])
    send(other, repo)
    before = files_of(pushed.path)
    send(pushed, repo, merge=True, dry_run=True)
    run("push", pushed.path, repo.repo_id, "--merge", "--dry-run")
    assert files_of(pushed.path) == before


def test_a_model_from_an_older_commit_does_not_put_its_stages_into_the_index(pushed, repo):
    old = load(repo).folder.commit
    # Somebody grew a stage anew, to other bits.
    key = pushed.plan.stages()[0]
    record = json.loads((pushed.path / key.path / "stage.json").read_text())
    file = pushed.path / key.path / "adapter_model.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    forge_stage(pushed.path, str(key), files={**record["files"], file.name: file_digest(file)})
    regrown = SystemFolder(pushed.path)
    send(regrown, repo)
    model = load(repo, revision=old)
    model.unlearn([member(pushed, 1, 1)])
    model.push_to_hub(repo.repo_id)
    assert repo.state().stages[key]["files"][file.name] == file_digest(file)
    assert load(repo, cache_dir=Path(constants.HF_HOME) / "fresh").check() == []


# From a trainer, and from the command line


def hub_trainer(path, hub, **more):
    args = training_arguments(path, hub_model_id=f"{hub.user}/trained", push_to_hub=True, **more)
    return make_trainer(path, rows=ROWS[:12], args=args, config=s3t_config(budget=2))


def test_a_trainer_pushes_every_sequence_as_it_completes(hub, tmp_path):
    trainer = hub_trainer(tmp_path / "system", hub)
    trainer.train()
    titles = [commit.title for commit in HfApi().list_repo_commits(trainer.hub_model_id)]
    assert titles == ["Sequence shard-0/1-0", "Sequence shard-0/0-1", "initial commit"]
    assert set(HubRepo(trainer.hub_model_id).state().stages) == set(trainer.folder.stages)
    assert not any("checkpoint" in path or "training_args" in path for path in files_on(HubRepo(trainer.hub_model_id)))
    assert not trainer.push_to_hub().added


def test_with_the_strategy_end_there_is_one_push(hub, tmp_path):
    trainer = hub_trainer(tmp_path / "system", hub, hub_strategy="end")
    trainer.train()
    titles = [commit.title for commit in HfApi().list_repo_commits(trainer.hub_model_id)]
    assert titles == ["End of training", "initial commit"]


def test_training_goes_on_where_the_hub_fails_meanwhile(hub, tmp_path, caplog):
    trainer = hub_trainer(tmp_path / "system", hub)
    hub.fail("POST", "/commit/", status=403, times=1)
    trainer.train()
    assert set(HubRepo(trainer.hub_model_id).state().stages) == set(trainer.folder.plan.stages())


@pytest.mark.parametrize("wrong", [{"blocking": False}, {"revision": "side"}])
def test_a_trainer_pushes_at_once_and_to_the_main_branch(wrong, hub, tmp_path):
    trainer = hub_trainer(tmp_path / "system", hub)
    with pytest.raises(ConfigError, match="Leave both out"):
        trainer.push_to_hub(**wrong)


def run(*args, code=0):
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(app, [str(arg) for arg in args])
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_line_pushes_pulls_and_erases(pushed, repo, tmp_path):
    system = pushed.path
    assert "is up to date" in run("push", system, repo.repo_id)
    run("unlearn", system, member(pushed))
    assert "would change" in run("push", system, repo.repo_id, "--dry-run")
    assert "stays in older commits until `hf-s3t erase`" in run("push", system, repo.repo_id)
    assert "would erase" in run("erase", repo.repo_id, "--dry-run")
    said = run("erase", repo.repo_id)
    assert "confirmed: " in said and "not confirmable from here: " in said and "  next: " in said
    assert json.loads(run("erase", repo.repo_id, "--json"))["blobs"] == 0
    target = tmp_path / "pulled"
    assert "would pull" in run("pull", repo.repo_id, target, "--dry-run") and not target.exists()
    run("pull", repo.repo_id, target)
    assert inspect(target).problems == ()
    other = SystemFolder(shutil.copytree(target, tmp_path / "other"))
    removed = apply(other, [member(other, 1, 1)]).stages_removed
    send(other, repo)
    assert "--merge" in run("push", target, repo.repo_id, code=1)
    before = files_of(target)
    said = run("push", target, repo.repo_id, "--merge", "--dry-run")
    assert f"would forget here what {repo.repo_id} knows as deleted: 1 example\n" in said
    assert f"stages that would go here: {', '.join(removed)}\n" in said and files_of(target) == before
    said = run("push", target, repo.repo_id, "--merge")
    assert f"forgot here what {repo.repo_id} knows as deleted: 1 example\n" in said
    assert f"stages removed here: {', '.join(removed)}\n" in said and "is up to date" in said
    assert not set(removed) & {str(key) for key in SystemFolder(target).stages}
    assert "forgot" not in run("push", target, repo.repo_id, "--merge")
    assert inspect(target).problems == ()
    assert "is not on the Hub" in run("erase", "nobody/nothing", code=1)
    assert "is not empty" in run("pull", repo.repo_id, target, code=1)


# The whole loop


def test_train_push_load_elsewhere_unlearn_push_with_erasure_load_again(hub, tmp_path, monkeypatch):
    rows, config = lm_rows(16), s3t_config(num_slices=3, budget=2)
    trainer = make_trainer(tmp_path / "system", rows=rows, config=config)
    trainer.train()
    repo_id = f"{hub.user}/loop"
    trainer.s3t_model.push_to_hub(repo_id, private=True)
    monkeypatch.setenv(KEY_VARIABLE, (tmp_path / "system" / "ledger.key").read_text())

    elsewhere = S3TModel.from_pretrained(repo_id, base_model=tiny_llama())
    victim = member(trainer.folder, 0, 2)
    report = elsewhere.unlearn([victim])
    erasure = elsewhere.push_to_hub(repo_id, erase_history=True)
    assert report.stages_removed and erasure.blobs == len(report.stages_removed) + 1

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "third machine"))
    again = S3TModel.from_pretrained(repo_id, base_model=tiny_llama(), cache_dir=tmp_path / "third cache")
    # E3: what is left is, bit for bit, what training without the example gives.
    never = make_trainer(tmp_path / "never", rows=[row for row in rows if row["id"] != victim], config=config)
    never.train()
    assert routing_of(again).stages
    for key in again.folder.valid_stages:
        ours = load_file(again.folder.adapter_path(key) / "adapter_model.safetensors")
        theirs = load_file(never.folder.path / key.path / "adapter_model.safetensors")
        assert not differing_tensors(ours, theirs), key


@pytest.mark.parametrize("shard", [0, 1])
def test_an_exported_shard_is_one_plain_adapter_with_the_same_logits(shard, pushed, repo, tmp_path):
    model = load(repo)
    model.export_adapter(shard, tmp_path / "plain")
    plain = PeftModel.from_pretrained(tiny_llama(), tmp_path / "plain").eval()
    inputs = {"input_ids": torch.tensor([ROWS[0]["input_ids"]])}
    with torch.no_grad(), routed(Route((routing_of(model).served[shard][0],))):
        ours = model.base_model(**inputs).logits
    with torch.no_grad():
        theirs = plain(**inputs).logits
    assert torch.allclose(ours, theirs, atol=1e-6)
    assert [entry.kind for entry in model.folder.ledger.entries] == ["export"]


def test_a_stage_of_depth_one_loads_with_plain_peft_from_the_hub(pushed, repo):
    key = next(key for key in pushed.plan.stages() if key.depth == 1)
    model = PeftModel.from_pretrained(tiny_llama(), repo.repo_id, subfolder=key.path)
    loaded = {n.replace(".default", ""): p for n, p in model.named_parameters() if "lora" in n}
    ours = load_file(pushed.path / key.path / "adapter_model.safetensors")
    assert set(ours) == set(loaded) and all(torch.equal(ours[n], loaded[n]) for n in ours)


# Cards


def test_the_card_says_what_it_is_and_how_to_use_it(pushed, repo, hub):
    S3TModel.from_pretrained(pushed.path, base_model=tiny_llama()).push_to_hub(
        repo.repo_id, datasets=["tatsu-lab/alpaca"], license="apache-2.0", evaluation={"Accuracy": 0.91}
    )
    card = ModelCard.load(repo.repo_id)
    assert {"s3t", "machine-unlearning", "peft", "lora"} <= set(card.data.tags)
    assert (card.data.library_name, card.data.license) == ("hf_s3t", "apache-2.0")
    assert card.data.datasets == ["tatsu-lab/alpaca"] and card.data.pipeline_tag == "text-generation"
    assert [(r.metric_name, r.metric_value) for r in card.data.eval_results] == [("Accuracy", 0.91)]
    assert f'S3TModel.from_pretrained("{repo.repo_id}", base_model=base)' in card.text
    assert "| Accuracy | 0.91 |" in card.text
    assert "whole of a stack only at depth 1" in card.text and "{{" not in card.text and "{%" not in card.text
    assert str(pushed.path) not in card.content
    assert hub.calls("POST", "validate-yaml")
    # It stays as it is where nothing changed, and its numbers go with the next deletion.
    assert not send(pushed, repo).added
    apply(pushed, [member(pushed)])
    send(pushed, repo)
    card = ModelCard.load(repo.download("README.md"))
    assert card.data.eval_results is None and "Accuracy" not in card.content
    assert card.data.datasets == ["tatsu-lab/alpaca"] and "| requests so far | 1 |" in card.text


def test_the_picture_shows_every_stage_live_or_gone(pushed, repo):
    apply(pushed, [member(pushed)])
    send(pushed, repo)
    picture = ElementTree.fromstring(Path(hf_hub_download(repo.repo_id, "stacks.svg")).read_bytes())
    boxes = [group.get("class") for group in picture.iter("{http://www.w3.org/2000/svg}g")]
    depths = [depth for shard in pushed.plan.depths(pushed.valid_stages) for depth in shard]
    assert boxes.count("live") == sum(depths) and len(boxes) == 2 * 2 * 2


@pytest.mark.slow
def test_it_all_works_with_the_xet_store_too(tmp_path):
    program = [sys.executable, "-m", "support.hub_with_xet", tmp_path]
    done = subprocess.run(program, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip().endswith("done"), done.stdout + done.stderr


def test_a_pull_holds_nothing_that_another_process_of_this_machine_deleted_meanwhile(pushed, repo, tmp_path):
    live, other = HubFolder(repo.repo_id), HubFolder(repo.repo_id)
    victim = live.table.members(0, 0)[0]
    condemned = apply(other, [victim]).stages_removed
    live.copy_to(tmp_path / "pulled")
    pulled = SystemFolder(tmp_path / "pulled")
    assert pulled.is_deleted(victim) and victim not in pulled.table.rows
    assert condemned and not [stage for stage in condemned if (pulled.path / "stages" / stage).exists()]


def test_a_server_whose_home_is_read_only_serves_by_what_it_reads(pushed, repo, monkeypatch):
    first = HubFolder(repo.repo_id)
    victims = [first.table.members(0, 0)[0], first.table.members(1, 0)[0]]
    apply(first, victims[:1])
    monkeypatch.setattr("hf_s3t.hub.memory.may_remember", lambda state: False)
    monkeypatch.setattr("hf_s3t.hub.folder.may_remember", lambda state: False)
    before = (first.path / "ledger.jsonl").read_bytes()
    reader = HubFolder(repo.repo_id)
    assert reader.is_deleted(victims[0]) and reader.valid_stages == first.valid_stages
    # It follows what a process that may write records, and never forgets what it knew.
    apply(first, victims[1:])
    assert reader.has_news()
    reader.refresh_ledger()
    assert reader.is_deleted(victims[1]) and reader.valid_stages == first.valid_stages
    (first.path / "ledger.jsonl").write_bytes(before)
    with pytest.raises(FolderError, match="lacks deletions that it had"):
        reader.refresh()
    # One that was never here is served as it was pushed.
    shutil.rmtree(first.path)
    assert HubFolder(repo.repo_id).ledger.num_deletions == 0 and not first.path.exists()


def test_a_pull_holds_nothing_that_was_deleted_while_it_downloaded(pushed, repo, tmp_path, monkeypatch):
    live, victim = HubFolder(repo.repo_id), member(pushed)
    condemned = []

    def interrupted(*args, **named):
        condemned.extend(apply(HubFolder(repo.repo_id), [victim]).stages_removed)
        return snapshot_download(*args, **named)

    monkeypatch.setattr("hf_s3t.hub.folder.snapshot_download", interrupted)
    live.copy_to(tmp_path / "pulled")
    assert condemned and not [stage for stage in condemned if (tmp_path / "pulled" / "stages" / stage).exists()]
    pulled = SystemFolder(tmp_path / "pulled")
    assert pulled.is_deleted(victim) and victim not in pulled.table.rows
    assert pulled.valid_stages == live.valid_stages and inspect(pulled.path).problems == ()


def test_a_pull_fetches_the_valid_stages_by_a_few_patterns_and_nothing_of_others(
    pushed, repo, hub, tmp_path, monkeypatch
):
    system, asked, looked_up = HubFolder(repo.repo_id), [], []
    condemned = apply(system, [system.table.members(0, 0)[0]]).stages_removed
    download = HubRepo.download

    def fetched(*args, **named):
        asked.append(named)
        return snapshot_download(*args, **named)

    monkeypatch.setattr("hf_s3t.hub.folder.snapshot_download", fetched)
    monkeypatch.setattr(HubRepo, "download", lambda *args: looked_up.append(args[1]) or download(*args))
    hub.requests.clear()
    system.copy_to(tmp_path / "pulled")
    paths = [call["path"] for call in hub.calls("GET", "/resolve/.*/stages/shard-")]
    stages = {re.search(r"/(shard-\d+/[\d-]+)/", path)[1] for path in paths}
    assert stages == set(map(str, system.valid_stages)) and len(set(paths)) == len(paths)
    assert condemned and not stages.intersection(condemned)
    # A pattern is matched with every file: not one for each stage, but for each sequence that ends early.
    (patterns,) = asked
    assert [pattern for pattern in patterns["allow_patterns"] if "/" in pattern] == ["stages/shard-*/*"]
    assert patterns["ignore_patterns"] == ["stages/shard-0/0[-/]*", "stages/shard-0/1-0[-/]*"]
    # What lies in one folder by then is not looked up file by file.
    assert not [name for name in looked_up if name.startswith("stages/shard-")]
