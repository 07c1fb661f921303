"""Repositories of format 1, as its last code pushed one, are served for ever; a push migrates one in one commit."""

import hashlib

import pytest
import torch
from support.folders import apply, forge, grow
from support.format_1 import WRITTEN, base, copy_of, format_of
from support.format_1 import load as load_folder
from support.hub_systems import files_on, logits_of, plant, send

from hf_s3t import S3TModel
from hf_s3t.errors import HubError, KeyMissingError, MergeNeededError
from hf_s3t.folder.files import read_checked_json
from hf_s3t.folder.identity import identity_of
from hf_s3t.folder.layout import CONFIG_FILE
from hf_s3t.folder.ledger_file import read_ledger
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub.folder import HubFolder
from hf_s3t.hub.memory import state_folder
from hf_s3t.operations.inspection import inspect


pytestmark = [
    pytest.mark.usefixtures("one_thread", "shared_key"),
    pytest.mark.filterwarnings("ignore:The base model is a folder of this machine"),
]

# Of the repository, deletions that `trained` does not know.
UNKNOWN_TO_FOLDER = 3


@pytest.fixture
def published(repo):
    """The repository, as it was pushed."""
    repo.api.create_repo(repo.repo_id)
    repo.api.upload_folder(repo_id=repo.repo_id, folder_path=WRITTEN / "repository")
    assert format_on(repo) == 1
    return repo


def format_on(repo) -> int:
    return read_checked_json(repo.download(CONFIG_FILE, repo.newest_commit()))["format_version"]


def load(repo, **more) -> S3TModel:
    return S3TModel.from_pretrained(repo.repo_id, base_model=base(), **more)


def pulled(repo, path) -> SystemFolder:
    """The system as somebody else pulls it, to train on."""
    HubFolder(repo.repo_id).copy_to(path)
    assert format_of(path) == 2 and inspect(path).problems == ()
    return SystemFolder(path)


def commits_of(repo) -> int:
    return len(repo.api.list_repo_commits(repo.repo_id))


# Served as it is


def test_it_is_served_without_the_secret_as_it_was(published, tmp_path, monkeypatch):
    files, expected = files_on(published), logits_of(load_folder(copy_of("repository", tmp_path)))
    monkeypatch.delenv("HF_S3T_KEY")
    model = load(published)
    assert len(model.folder.valid_stages) == 4 and model.check() == []
    assert torch.equal(logits_of(model), expected) and files_on(published) == files
    # Its table can be asked for sizes too.
    assert model.folder.table.size(0, 0) and len(model.folder.valid_stages) == 4
    with pytest.raises(KeyMissingError):
        model.unlearn(groups=["person-3"])


def test_it_forgets_and_pulls(published, tmp_path):
    model = load(published)
    report = model.unlearn(groups=["person-3"])
    assert report.stages_removed and format_on(published) == 1
    folder = pulled(published, tmp_path / "pulled")
    assert folder.valid_stages == model.folder.valid_stages == load(published).folder.valid_stages
    assert torch.equal(logits_of(load_folder(folder.path)), logits_of(model))
    grow(folder)
    assert SystemFolder(folder.path).valid_stages == set(folder.plan.stages())


def test_what_this_machine_remembers_of_it_by_earlier_code_stays_in_force(published, tmp_path):
    """By that the folder was named after the check of the secret."""
    deleted = SystemFolder(copy_of("repository", tmp_path))
    apply(deleted, groups=["person-3"])
    check = read_checked_json(WRITTEN / "repository" / CONFIG_FILE)["key_check"]
    remembered = state_folder(published.repo_id) / hashlib.sha256(check.encode()).hexdigest()[:16]
    (remembered / "stages").mkdir(parents=True)
    (remembered / "ledger.jsonl").write_bytes(deleted.ledger.text.encode())
    assert HubFolder(published.repo_id).valid_stages == deleted.valid_stages
    # Also when the repository is of the new format by then.
    send(SystemFolder(copy_of("repository", tmp_path / "other")), published, merge=True)
    assert format_on(published) == 2
    assert HubFolder(published.repo_id).valid_stages == deleted.valid_stages
    assert HubFolder(published.repo_id).path == remembered


# A push migrates it


def test_a_push_replaces_it_in_one_commit_and_history_is_erased(published, tmp_path):
    folder, before = SystemFolder(copy_of("repository", tmp_path)), commits_of(published)
    assert not folder.is_migrated
    report = send(folder, published)
    # Nothing was written into the folder; and of the stages there, none is uploaded again.
    assert format_of(folder.path) == 1 and format_on(published) == 2 and commits_of(published) == before + 1
    assert {CONFIG_FILE, "stages/index.json"} <= set(report.added) and not report.deleted
    assert not any("shard-" in file for file in report.added)
    assert send(folder, published).added == ()
    assert pulled(published, tmp_path / "pulled").valid_stages == folder.valid_stages
    model = load_folder(folder.path)
    model.unlearn(groups=["person-3"])
    erased = model.push_to_hub(published.repo_id, erase_history=True)
    assert erased.blobs and commits_of(published) == 1
    assert pulled(published, tmp_path / "later").valid_stages == folder.valid_stages & model.folder.valid_stages


def test_what_it_knows_as_deleted_and_an_older_folder_does_not_is_merged(published, tmp_path):
    folder = SystemFolder(copy_of("trained", tmp_path))
    known = len(folder.ledger.deleted)
    with pytest.raises(MergeNeededError, match=f"knows of {UNKNOWN_TO_FOLDER} deleted examples"):
        send(folder, published)
    assert format_of(folder.path) == 1 and format_on(published) == 1
    report = send(folder, published, merge=True)
    assert report.forgotten == UNKNOWN_TO_FOLDER and format_of(folder.path) == format_on(published) == 2
    assert len(folder.ledger.deleted) == known + UNKNOWN_TO_FOLDER
    # Stages that were grown and pushed by earlier code after the last deletion stay, and are understood by who pulls.
    assert len(pulled(published, tmp_path / "pulled").valid_stages) == 4
    assert inspect(folder.path).problems == ()


def test_a_migrated_folder_and_it_keep_what_either_has(published, tmp_path):
    folder = SystemFolder(copy_of("trained", tmp_path))
    apply(folder, groups=["person-3"])
    assert folder.is_migrated
    send(folder, published, merge=True)
    there = pulled(published, tmp_path / "pulled")
    assert there.ledger.deleted == folder.ledger.deleted and there.valid_stages >= folder.valid_stages
    # What saw what either had deleted is in none of them; what did not, was kept.
    alone = SystemFolder(copy_of("repository", tmp_path / "alone"))
    apply(alone, groups=["person-3"])
    assert there.valid_stages == alone.valid_stages and there.valid_stages


def test_an_older_folder_meets_a_repository_that_was_migrated(published, tmp_path):
    send(SystemFolder(copy_of("repository", tmp_path)), published)
    folder = SystemFolder(copy_of("trained", tmp_path))
    assert format_of(folder.path) == 1 and format_on(published) == 2
    assert send(folder, published, merge=True).forgotten == UNKNOWN_TO_FOLDER
    there = pulled(published, tmp_path / "pulled")
    assert len(there.valid_stages) == 4 and there.ledger.deleted == folder.ledger.deleted


def test_who_serves_it_follows_when_it_is_migrated(published, tmp_path):
    model, pinned = load(published), load(published, revision=published.newest_commit())
    before = logits_of(model)
    folder = SystemFolder(copy_of("repository", tmp_path))
    apply(folder, groups=["person-3"])
    send(folder, published)
    for served in (model, pinned):
        served.refresh()
        assert served.folder.valid_stages == folder.valid_stages and served.check() == []
    assert torch.equal(logits_of(model), logits_of(load(published)))
    assert not torch.equal(logits_of(model), before) and torch.equal(logits_of(pinned), logits_of(model))
    report = model.unlearn(groups=["person-4"])
    assert report.deleted and model.push_to_hub(published.repo_id).added
    assert load(published).folder.valid_stages == model.folder.valid_stages


def test_a_model_that_was_loaded_from_it_migrates_it(published, tmp_path):
    model, before = load(published), commits_of(published)
    model.unlearn(groups=["person-3"])
    model.push_to_hub(published.repo_id)
    assert format_on(published) == 2 and commits_of(published) == before + 1
    assert pulled(published, tmp_path / "pulled").valid_stages == model.folder.valid_stages
    assert read_ledger(published.download("ledger.jsonl")).deleted == model.folder.ledger.deleted


# Whose it is


def test_copies_of_one_system_derive_one_identity(published, tmp_path):
    records = [read_checked_json(WRITTEN / name / CONFIG_FILE) for name in ("trained", "repository", "digests")]
    trained, repository, other = map(identity_of, records)
    assert trained == repository != other and len(trained) == 32
    assert HubFolder(published.repo_id).record["system_id"] == trained
    # What a later version adds to the settings changes nothing, once it is migrated.
    folder = SystemFolder(copy_of("trained", tmp_path))
    apply(folder, groups=["person-3"])
    forge(folder.path / CONFIG_FILE, new_field=1, key_check=folder.record["key_check"])
    assert SystemFolder(folder.path).record["system_id"] == trained


def test_systems_that_were_made_alike_are_two(repo, tmp_path):
    one, other = (SystemFolder(plant(tmp_path / name)) for name in ("one", "other"))
    send(one, repo)
    with pytest.raises(HubError, match=r"holds another system \(system_id differ\)"):
        send(other, repo)
    assert state_folder(repo.repo_id, one.record) != state_folder(repo.repo_id, other.record)


def test_what_no_copy_of_a_system_differs_in_is_damage(repo, tmp_path):
    folder = SystemFolder(plant(tmp_path / "system"))
    send(folder, repo)
    forge(folder.path / CONFIG_FILE, peft_config={**folder.record["peft_config"], "r": 7})
    with pytest.raises(HubError, match=r"copies of one system and differ .*\(peft_config\): one of them"):
        send(SystemFolder(folder.path), repo)
