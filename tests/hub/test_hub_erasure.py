"""Erasing from the Hub, and what a push and an erasure do when the Hub fails at any of their requests."""

import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, _tree_cache, constants, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RevisionNotFoundError
from support.folders import apply
from support.hub_systems import ROWS, load, logits_of, member, on_disk, plant, send
from support.tiny import tiny_llama

from hf_s3t import S3TModel
from hf_s3t.errors import HubError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub import erasure
from hf_s3t.hub.erasure import erase
from hf_s3t.hub.memory import state_folder
from hf_s3t.hub.repository import HubRepo


pytestmark = pytest.mark.usefixtures("one_thread")

# Positions of injected failures: every one, and in the quick suite one of so many.
STRIDES = [pytest.param(11, id="some requests"), pytest.param(1, id="every request", marks=pytest.mark.slow)]
FAULTS = [
    pytest.param({"status": 503}, id="refused"),
    pytest.param({"drop": True}, id="dropped"),
    pytest.param({"status": 500, "after": True}, id="done, answer lost"),
]


# Erasing


def test_erased_files_cannot_be_had_by_any_name_the_hub_knows(pushed, repo, hub, tmp_path):
    api = repo.api
    old = repo.state()
    api.create_tag(repo.repo_id, tag="v1")
    api.create_branch(repo.repo_id, branch="side")
    api.create_branch(repo.repo_id, branch="notes", revision=api.list_repo_commits(repo.repo_id)[-1].commit_id)
    report = apply(pushed, [member(pushed)])
    gone = [f"stages/{stage}/adapter_model.safetensors" for stage in report.stages_removed]
    erased = [Path(hf_hub_download(repo.repo_id, path)).read_bytes() for path in gone]
    table = Path(hf_hub_download(repo.repo_id, "examples.parquet")).read_bytes()
    (stored,) = [stored for (_, name), stored in hub.repos.items() if name == repo.repo_id]
    assert all(data in on_disk(stored.dir) for data in erased)
    send(pushed, repo)
    done = erase(repo)
    assert set(done.refs_removed) == {"refs/tags/v1", "refs/heads/side"}
    assert done.blobs == len(gone) + 1 and len(done.confirmed) == 2
    for revision in (old.commit, "v1", "side", "main"):
        for path in (*gone, "examples.parquet"):
            if revision == "main" and path == "examples.parquet":
                continue
            with pytest.raises((EntryNotFoundError, RevisionNotFoundError, HfHubHTTPError)):
                hf_hub_download(
                    repo.repo_id, path, revision=revision, cache_dir=tmp_path / "empty", force_download=True
                )
    stored.gc()
    assert not any(data in on_disk(stored.dir) for data in [*erased, table])
    # What survives is whole.
    assert torch.equal(
        logits_of(load(repo)), logits_of(S3TModel.from_pretrained(pushed.path, base_model=tiny_llama()))
    )


def test_a_blob_that_a_surviving_stage_has_too_is_kept(pushed, repo):
    model = load(repo)
    key = next(iter(sorted(pushed.valid_stages)))
    twin = pushed.path / key.path / "adapter_model.safetensors"
    repo.api.create_commit(
        repo.repo_id, [CommitOperationAdd("stages/shard-0/9/adapter_model.safetensors", str(twin))], commit_message="x"
    )
    send(pushed, repo)
    assert erase(repo).blobs == 0
    assert model.check() == [] and load(repo, cache_dir=Path(constants.HF_HOME) / "fresh")


def test_what_cannot_be_confirmed_comes_with_the_next_step(pushed, repo, hub):
    repo.api.create_commit(repo.repo_id, [CommitOperationAdd("note.txt", b"x")], commit_message="x", create_pr=True)
    apply(pushed, [member(pushed)])
    send(pushed, repo)
    report = erase(repo)
    what = " / ".join(f"{problem}: {step}" for problem, step in report.unconfirmed)
    assert "refs/pr/1 may hold an old state" in what and "website" in what
    assert "until the Hub collects garbage" in what and "CDN" in what


def test_an_outage_is_no_word_that_a_file_is_gone(pushed, repo, hub, monkeypatch):
    apply(pushed, [member(pushed)])
    send(pushed, repo)
    look = erasure._look

    def during_an_outage(*args):
        hub.fail("*", "/resolve/", status=503, times=1000)
        return look(*args)

    monkeypatch.setattr(erasure, "_look", during_an_outage)
    with pytest.raises(HubError):
        erase(repo)
    assert list(state_folder(repo.repo_id).glob("*/erasure.json"))
    hub.faults.clear()
    monkeypatch.setattr(erasure, "_look", look)
    assert any("can be fetched" in line for line in erase(repo).confirmed)


def test_a_deletion_is_pushed_before_it_is_erased(pushed, repo):
    load(repo).unlearn([member(pushed)])
    before = repo.api.list_repo_commits(repo.repo_id)
    with pytest.raises(HubError, match="Push the deletion first"):
        erase(repo)
    assert repo.api.list_repo_commits(repo.repo_id) == before


def test_a_deletion_by_another_process_during_a_push_is_taken_along(pushed, repo, monkeypatch):
    HfApi().delete_repo(repo.repo_id)
    create, raced = HfApi.create_commit, []

    def race(self, *args, **kwargs):
        if not raced:
            raced.append(apply(SystemFolder(pushed.path), [member(pushed)]))
        return create(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", race)
    send(pushed, repo)
    send(SystemFolder(pushed.path), repo)
    state = repo.state()
    assert state.ledger.num_deletions == 1
    assert set(state.stages) == set(SystemFolder(pushed.path).valid_stages)


def test_what_is_pushed_during_an_erasure_stays(pushed, repo, hub, tmp_path, monkeypatch):
    stage = pushed.plan.stages()[-1]
    whole = SystemFolder(shutil.copytree(pushed.path, tmp_path / "whole"))
    shutil.rmtree(pushed.path / stage.path)
    send(SystemFolder(pushed.path), repo)
    HfApi().delete_repo(repo.repo_id)
    send(SystemFolder(pushed.path), repo)
    squash = HfApi.super_squash_history

    def push_first(self, *args, **kwargs):
        send(whole, HubRepo(repo.repo_id))
        return squash(self, *args, **kwargs)

    monkeypatch.setattr(HfApi, "super_squash_history", push_first)
    erase(repo)
    assert load(repo, preload="all", cache_dir=Path(constants.HF_HOME) / "fresh").check() == []


def test_a_tag_that_stands_on_an_old_state_goes_too(pushed, repo):
    apply(pushed, [member(pushed)])
    send(pushed, repo)
    repo.api.create_tag(repo.repo_id, tag="new")
    assert erase(repo).refs_removed == ("refs/tags/new",)


def test_a_dry_run_of_an_erasure_names_what_would_go(pushed, repo):
    repo.api.create_tag(repo.repo_id, tag="v1")
    apply(pushed, [member(pushed)])
    send(pushed, repo)
    before = repo.api.list_repo_commits(repo.repo_id)
    would = erase(repo, dry_run=True)
    assert would.is_dry_run and would.blobs and would.refs_removed == ("refs/tags/v1",)
    assert repo.api.list_repo_commits(repo.repo_id) == before
    assert erase(repo).blobs == would.blobs


# Failures at every request


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A system of four stages: the requests are of the same kinds, and there are fewer of each."""
    return plant(tmp_path_factory.mktemp("small") / "system", ROWS[:8], num_shards=1, num_slices=2)


def forget_downloads():
    """A commit with the id of one before would be asked for less: its files are in the cache."""
    shutil.rmtree(constants.HF_HUB_CACHE)
    _tree_cache._IN_MEMORY_TREE_CACHE.clear()


def requests_of(hub, act):
    hub.requests.clear()
    act()
    return len(hub.requests)


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_push_outlives_a_failure_at_every_request(fault, stride, small, repo, hub, tmp_path):
    count = requests_of(hub, lambda: send(SystemFolder(shutil.copytree(small, tmp_path / "count")), repo))
    assert count > 5
    for position in range(0, count, stride):
        repo.api.delete_repo(repo.repo_id)
        forget_downloads()
        hub.faults.clear()
        hub.fail("*", ".*", skip=position, **fault)
        (injected,) = hub.faults
        folder = SystemFolder(shutil.copytree(small, tmp_path / f"at-{position}"))
        try:
            send(folder, repo)
        except HubError:
            # Refused clearly; calling again finishes it.
            hub.faults.clear()
            send(folder, repo)
        assert injected.times == 0, f"request {position} was never made"
        hub.faults.clear()
        assert set(repo.state().stages) == set(folder.valid_stages), position
        assert not send(folder, repo).added


@pytest.mark.parametrize("stride", STRIDES)
@pytest.mark.parametrize("fault", FAULTS)
def test_an_erasure_outlives_a_failure_at_every_request(fault, stride, small, repo, hub, tmp_path, monkeypatch):
    def begun(position):
        folder = SystemFolder(shutil.copytree(small, tmp_path / f"at-{position}"))
        send(folder, repo)
        repo.api.create_tag(repo.repo_id, tag="v1")
        old = repo.state().commit
        report = apply(folder, [member(folder)])
        send(folder, repo)
        return old, [f"stages/{stage}/adapter_model.safetensors" for stage in report.stages_removed]

    begun("count")
    count = requests_of(hub, lambda: erase(repo))
    assert count > 10
    for position in range(0, count, stride):
        repo.api.delete_repo(repo.repo_id)
        forget_downloads()
        shutil.rmtree(state_folder(repo.repo_id))
        old, gone = begun(position)
        hub.fail("*", ".*", skip=position, **fault)
        (injected,) = hub.faults
        try:
            erase(repo)
        except HubError:
            hub.faults.clear()
            erase(repo)
        assert injected.times == 0, f"request {position} was never made"
        hub.faults.clear()
        assert not {f.filename for f in repo.api.list_lfs_files(repo.repo_id)} & set(gone), position
        assert not repo.api.list_repo_refs(repo.repo_id).tags
        for path in gone:
            with pytest.raises((EntryNotFoundError, RevisionNotFoundError, HfHubHTTPError)):
                hf_hub_download(repo.repo_id, path, revision=old, cache_dir=tmp_path / "empty", force_download=True)


def test_an_error_that_stays_is_told_and_calling_again_finishes(pushed, repo, hub):
    apply(pushed, [member(pushed)])
    hub.fail("POST", "/commit/", status=503, times=100)
    with pytest.raises(HubError, match="Call again"):
        send(pushed, repo)
    hub.faults.clear()
    assert send(pushed, repo).deleted


def test_a_commit_whose_answer_was_lost_is_not_made_twice(system, repo, hub):
    hub.fail("POST", "/commit/", status=500, after=True)
    send(system, repo)
    assert len(repo.api.list_repo_commits(repo.repo_id)) == 2
