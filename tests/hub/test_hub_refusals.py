"""What is refused on the way to the Hub and from there, and in which words."""

import shutil
import warnings
from pathlib import Path

import hf_xet
import pytest
import torch
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelInfo, constants, hf_hub_download
from support.folders import apply
from support.hub_systems import ROWS, files_on, load, logits_of, member, on_disk, plant, send
from support.tiny import make_trainer, plant_stages, s3t_config, tiny_llama
from transformers import AutoModelForCausalLM

from hf_s3t import S3TModel
from hf_s3t.errors import BaseModelMismatchError, ConfigError, FolderError, HubError, S3TError, TransferError
from hf_s3t.folder.files import digested_json, read_checked_json
from hf_s3t.folder.secret import KEY_VARIABLE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub import repository
from hf_s3t.hub.erasure import erase
from hf_s3t.hub.memory import state_folder
from hf_s3t.hub.repository import HubRepo
from hf_s3t.records.digests import PUBLIC_SECRET, DigestKey


pytestmark = pytest.mark.usefixtures("one_thread")

# What the Hub refuses


@pytest.mark.parametrize(
    ("token", "role", "message"),
    [("hf_wrong", None, "does not accept the token|may not see it"), ("hf_read", "read", "may not write")],
    ids=["wrong", "read-only"],
)
def test_a_token_that_may_not_is_told_so(token, role, message, pushed, hub, repo):
    if role:
        hub.users[token] = (hub.user, role, {hub.user})
    apply(pushed, [member(pushed)])
    with pytest.raises(HubError, match=message):
        send(pushed, HubRepo(repo.repo_id, token=token))


def test_what_is_not_there_is_told_by_name(pushed, repo, hub, tmp_path):
    with pytest.raises(HubError, match="is not on the Hub, or your token may not see it"):
        S3TModel.from_pretrained(f"{hub.user}/nothing")
    with pytest.raises(HubError, match="has no such revision"):
        load(repo, revision="no-such-branch")
    HfApi().create_repo(f"{hub.user}/empty")
    with pytest.raises(FolderError, match="holds no S3T system"):
        S3TModel.from_pretrained(f"{hub.user}/empty")
    with pytest.raises(FolderError, match="is not a folder"):
        S3TModel.from_pretrained(str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match="is a folder"):
        S3TModel.from_pretrained(pushed.path, revision="main")
    with pytest.raises(ConfigError, match="pull it to a folder first"):
        load(repo).push_to_hub(f"{hub.user}/elsewhere")


def test_a_damaged_download_is_refused(pushed, repo):
    load(repo)
    key = next(iter(pushed.plan.stages()))
    file = hf_hub_download(repo.repo_id, f"{key.path}/adapter_model.safetensors")
    data = bytearray(Path(file).read_bytes())
    data[-1] ^= 1
    Path(file).resolve().write_bytes(data)
    with pytest.raises(FolderError, match="digest"):
        load(repo)


def replace_on_hub(repo, path, content):
    repo.api.create_commit(repo.repo_id, [CommitOperationAdd(path, content)], commit_message="by hand")


def commit_by_git(hub, repo, path, content):
    """Past the checks of client and server."""
    (stored,) = [stored for (_, name), stored in hub.repos.items() if name == repo.repo_id]
    head = stored.refs["refs/heads/main"]
    tree = {**stored.commits[head].tree, path: stored.put_blob(content)}
    stored.refs["refs/heads/main"] = stored.add_commit(tree, [head], "by git", "", "somebody")


def forged_index(repo, change) -> bytes:
    index = read_checked_json(repo.download("stages/index.json"))
    change(index)
    return digested_json(index)


def first_stage(index):
    return next(iter(index["stages"].values()))


@pytest.mark.parametrize(
    "change",
    [
        lambda index: first_stage(index).pop("files"),
        lambda index: first_stage(index)["files"].pop("adapter_config.json"),
        lambda index: first_stage(index).pop("slices"),
        lambda index: first_stage(index).pop("below"),
        lambda index: first_stage(index).update(slices=None),
        lambda index: first_stage(index).update(metrics=[]),
        lambda index: index["stages"].update({"shard-0/0": None}),
        lambda index: index["slices"].pop("shard-0/0"),
        lambda index: index.pop("slices"),
        lambda index: index.pop("ledger"),
    ],
)
def test_an_index_that_says_too_little_is_refused(change, pushed, repo):
    replace_on_hub(repo, "stages/index.json", forged_index(repo, change))
    with pytest.raises(FolderError, match=r"index.json.*[Pp]ush the system again"):
        load(repo)


def test_a_ledger_whose_lines_were_cut_off_on_the_hub_is_refused(pushed, repo):
    apply(pushed, [member(pushed)])
    send(pushed, repo)
    shutil.rmtree(state_folder(repo.repo_id))
    replace_on_hub(repo, "ledger.jsonl", b"")
    with pytest.raises(FolderError, match="lines were cut off or edited"):
        load(repo)


def test_a_ledger_that_is_no_text_is_told_with_a_remedy(pushed, repo):
    replace_on_hub(repo, "ledger.jsonl", b"\xff\xfe\n")
    for act in (lambda: load(repo), lambda: send(pushed, repo), lambda: erase(repo)):
        with pytest.raises(FolderError, match=r"ledger.jsonl is not text: .*push the system again"):
            act()


@pytest.mark.parametrize("card", [b"\xff\xfe", b"---\n[: : :\n---\n", b"---\njust words\n---\n"])
def test_a_deletion_does_not_wait_for_a_card_that_cannot_be_read(card, pushed, repo, hub):
    commit_by_git(hub, repo, "README.md", card)
    apply(pushed, [member(pushed)])
    with pytest.warns(UserWarning, match=r"cannot be read .*Give `datasets`, `license`"):
        send(pushed, repo)
    assert repo.state().ledger.deleted == pushed.ledger.deleted
    assert ModelCard.load(repo.repo_id).data.library_name == "hf_s3t"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("cas: 500"), ConnectionError("reset"), TimeoutError("late"), hf_xet.XetObjectNotFoundError("x")],
)
def test_a_transfer_that_fails_is_told_whatever_the_client_raises(error, pushed, repo, monkeypatch):
    apply(pushed, [member(pushed)])

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(HfApi, "create_commit", fail)
        with pytest.raises(HubError, match=r"[Cc]all again"):
            send(pushed, repo)
        patch.setattr(repository, "hf_hub_download", fail)
        with pytest.raises(HubError, match=r"could not be transferred .*call again"):
            load(repo)
    assert send(pushed, repo).deleted and load(repo)


def test_a_transfer_that_fails_once_is_made_again(pushed, repo, monkeypatch):
    apply(pushed, [member(pushed)])
    create, failed = HfApi.create_commit, []

    def fail_once(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise RuntimeError("the store did not answer")
        return create(*args, **kwargs)

    monkeypatch.setattr(HfApi, "create_commit", fail_once)
    assert send(pushed, repo).deleted and failed


def test_a_transfer_that_the_token_forbids_is_not_tried_again(pushed, repo, monkeypatch):
    apply(pushed, [member(pushed)])
    tried = []

    def refuse(*args, **kwargs):
        tried.append(True)
        raise hf_xet.XetAuthenticationError("no")

    monkeypatch.setattr(HfApi, "create_commit", refuse)
    with pytest.raises(TransferError, match="the token is valid"):
        send(pushed, repo)
    assert len(tried) == 1


def test_a_file_that_the_store_does_not_take_ends_the_push_in_a_sentence(system, repo, hub):
    hub.fail("PUT", "/upload/", status=403, times=1000)
    with pytest.raises(HubError, match="may not write"):
        send(system, repo)


def test_a_name_that_is_none_is_told(system):
    with pytest.raises(HubError, match="names no repository"):
        send(system, HubRepo("a/b/c"))


# What would lie in git, or show a path


LFS = "filter=lfs diff=lfs merge=lfs -text"


@pytest.mark.parametrize(
    ("rules", "kept"),
    [
        (f"*.safetensors {LFS}\n", "examples.parquet"),
        (f"*.safetensors {LFS}\n*.parquet {LFS}\nexamples.parquet -filter\n", "examples.parquet"),
        (f"*.parquet {LFS}\n# *.safetensors {LFS}\n", "adapter_model.safetensors"),
        (f"*.parquet {LFS}\n*.safetensors {LFS}\nstages/** !filter\n", "adapter_model.safetensors"),
        (f"*.parquet {LFS}\nstages/*.safetensors {LFS}\n", "adapter_model.safetensors"),
        (f"*.parquet {LFS}\n*.safetensors {LFS}\n**/1/* -filter\n", "adapter_model.safetensors"),
        (f"*.safetensors {LFS}\n*.parquet {LFS}\n[attr]small -filter\n/examples.parquet small\n", "examples.parquet"),
        (f"*.safetensors {LFS}\n*.parquet {LFS}\n[[:alpha:]]*.parquet -filter\n", "examples.parquet"),
    ],
    ids=[
        *("no rule", "taken back", "a comment", "for a folder", "from the top", "for any folder", "by a macro"),
        "of a form that may be read otherwise",
    ],
)
def test_ids_and_weights_are_not_pushed_where_git_would_keep_them(rules, kept, system, repo):
    repo.api.create_repo(repo.repo_id)
    replace_on_hub(repo, ".gitattributes", rules.encode())
    for dry_run in (True, False):
        with pytest.raises(HubError, match=rf"{kept}.* git itself.*Add to .gitattributes there: \*\.\w+ filter=lfs"):
            send(system, repo, dry_run=dry_run)
    assert files_on(repo) == {".gitattributes"}
    replace_on_hub(repo, ".gitattributes", f"*.parquet {LFS}\n*.safetensors {LFS}\n".encode())
    send(system, repo)
    state = repo.state()
    assert state.tree["examples.parquet"].lfs and all(
        state.tree[f"{key.path}/adapter_model.safetensors"].lfs for key in system.stages
    )


def test_a_rule_in_a_folder_counts_before_those_above(system, repo):
    repo.api.create_repo(repo.repo_id)
    replace_on_hub(repo, "stages/.gitattributes", b"*.safetensors -filter\n")
    with pytest.raises(
        HubError, match=r"adapter_model.safetensors.* git itself.*remove files of that name from the fold"
    ):
        send(system, repo)


@pytest.mark.parametrize(
    "rules",
    [
        f"[attr]large {LFS}\n*.parquet large\n/stages/** large\n",
        f'"examples.parquet" {LFS}\n**/adapter_model.safetensors {LFS}\n',
        f"*.parquet -filter\n*.parquet {LFS}\nstages/*/*/*.safetensors {LFS}\nstages -filter\nstages/ -filter\n",
    ],
    ids=["by a macro", "quoted", "a folder's own"],
)
def test_rules_that_git_reads_so_are_no_reason_to_refuse(rules, system, repo):
    repo.api.create_repo(repo.repo_id)
    replace_on_hub(repo, ".gitattributes", rules.encode())
    assert "examples.parquet" in send(system, repo, dry_run=True).added


# What would tell who was deleted


def telling(tmp_path, monkeypatch, ids, secret=None, **settings):
    """A system of which three are deleted."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    rows = [{**row, "id": i} for row, i in zip(ROWS, ids, strict=True)]
    if secret is not None:
        tmp_path.joinpath("telling").mkdir()
        tmp_path.joinpath("telling", "ledger.key").write_text(secret)
    folder = SystemFolder(plant(tmp_path / "telling", rows=rows, **settings))
    apply(folder, [ids[3], ids[8], ids[9]])
    return folder


NAMES = [f"{n * 7919 % 1000}@example.org" for n in range(24)]


@pytest.mark.parametrize(
    ("why", "settings"),
    [
        ('its ids are numbers in a row, .*`keep_ids="digest"`', {"ids": list(range(24))}),
        ('its ids are numbers in a row, .*`keep_ids="digest"`', {"ids": list(range(100, 124)), "partition": "hashed"}),
        ("its secret is the one for comparisons, .*a secret of its own", {"ids": NAMES, "secret": PUBLIC_SECRET}),
    ],
)
def test_what_tells_who_was_deleted_is_said_with_the_way_out(why, settings, tmp_path, monkeypatch, repo):
    folder = telling(tmp_path, monkeypatch, **settings)
    with pytest.warns(UserWarning, match=f"can tell who was deleted: {why}"):
        send(folder, repo, dry_run=True)


def test_a_table_that_was_dealt_without_the_secret_is_said_to_show_it(tmp_path, monkeypatch, repo):
    with monkeypatch.context() as patch:
        patch.setattr(DigestKey, "for_places", None)
        folder = telling(tmp_path, patch, NAMES)
    with pytest.warns(
        UserWarning, match="gaps show where deleted ids were.*train a new system in another `output_dir`"
    ):
        send(folder, repo, dry_run=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"ids": NAMES},
        {"ids": [n * n for n in range(24)]},
        {"ids": list(range(24)), "keep_ids": "digest"},
        {"ids": NAMES, "partition": "hashed", "num_slices": 2},
    ],
)
def test_a_push_that_tells_nobody_says_nothing(settings, tmp_path, monkeypatch, repo):
    folder = telling(tmp_path, monkeypatch, **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        send(folder, repo, dry_run=True)


def test_a_repository_without_rules_is_refused_too(system, repo):
    repo.api.create_repo(repo.repo_id)
    repo.api.delete_file(".gitattributes", repo.repo_id)
    with pytest.raises(HubError, match="git itself"):
        send(system, repo)


def test_ids_that_lie_in_git_already_are_moved_and_an_erasure_says_what_it_cannot_reach(pushed, repo):
    replace_on_hub(repo, ".gitattributes", f"*.safetensors {LFS}\n".encode())
    replace_on_hub(repo, "examples.parquet", (pushed.path / "examples.parquet").read_bytes())
    assert repo.state().tree["examples.parquet"].lfs is None
    with pytest.raises(HubError, match="git itself"):
        send(pushed, repo)
    replace_on_hub(repo, ".gitattributes", f"*.parquet {LFS}\n*.safetensors {LFS}\n".encode())
    assert "examples.parquet" in send(pushed, repo).added
    assert repo.state().tree["examples.parquet"].lfs
    ((question, step),) = [asked for asked in erase(repo).unconfirmed if "small files in git" in asked[0]]
    assert question.startswith("2 old commits") and "delete the repository" in step


def test_a_repository_without_a_system_keeps_its_history(repo):
    repo.api.create_repo(repo.repo_id)
    replace_on_hub(repo, "model.safetensors", b"somebody's")
    before = repo.api.list_repo_commits(repo.repo_id)
    with pytest.raises(HubError, match="holds no S3T system"):
        erase(repo)
    assert repo.api.list_repo_commits(repo.repo_id) == before


def test_where_the_base_lies_on_this_machine_is_pushed_nowhere(repo, hub, tmp_path, monkeypatch):
    base = tmp_path / "my-base"
    tiny_llama().save_pretrained(base)
    trainer = make_trainer(
        tmp_path / "system", AutoModelForCausalLM.from_pretrained(base), ROWS[:8], config=s3t_config()
    )
    plant_stages(trainer)
    with pytest.warns(UserWarning, match="is a folder of this machine"):
        send(trainer.folder, repo)
    (stored,) = [stored for (_, name), stored in hub.repos.items() if name == repo.repo_id]
    assert not any(str(tmp_path).encode() in data for data in on_disk(stored.dir))
    monkeypatch.setenv(KEY_VARIABLE, (tmp_path / "system" / "ledger.key").read_text())
    with pytest.raises(BaseModelMismatchError, match=r"'my-base' of another machine.*Give it as `base_model`"):
        S3TModel.from_pretrained(repo.repo_id)
    with pytest.raises(BaseModelMismatchError, match="Expected 'my-base'"):
        S3TModel.from_pretrained(repo.repo_id, base_model=tiny_llama(seed=1))
    model = S3TModel.from_pretrained(repo.repo_id, base_model=str(base))
    # Here the folder still says where its base is, and a push from a copy of the repository changes nothing.
    assert torch.equal(logits_of(model), logits_of(S3TModel.from_pretrained(tmp_path / "system")))
    model.save_pretrained(tmp_path / "pulled")
    assert not send(SystemFolder(tmp_path / "pulled"), repo).added


# Another system under the name


@pytest.fixture
def other(tmp_path, monkeypatch):
    """Another system, of another secret."""
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    return SystemFolder(plant(tmp_path / "other"))


def use_key_of(folder, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, (folder.path / "ledger.key").read_text())


def test_another_system_under_the_name_does_not_follow_the_deletions_of_the_one_before(
    system, other, repo, monkeypatch
):
    send(system, repo)
    old = repo.state().commit
    use_key_of(system, monkeypatch)
    model = load(repo)
    model.unlearn([member(system)])
    forgotten = logits_of(model)
    repo.api.delete_repo(repo.repo_id)
    use_key_of(other, monkeypatch)
    send(other, repo)
    with pytest.warns(UserWarning, match="held another system, of which this machine remembers deletions"):
        new = load(repo)
    assert new.folder.ledger.lines == () and new.check() == []
    new.unlearn([member(other, 1, 1)])
    new.push_to_hub(repo.repo_id)
    assert repo.state().ledger.num_deletions == 1
    # A live model of the former refuses to become the other one, and the former is forgotten nowhere.
    use_key_of(system, monkeypatch)
    with pytest.raises(FolderError, match="holds another system now"):
        model.refresh()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits_of(load(repo, revision=old)), forgotten)


def test_a_revision_of_the_former_system_is_loaded_beside_the_new_one(system, other, repo, monkeypatch):
    use_key_of(system, monkeypatch)
    send(system, repo)
    old = load(repo)
    victim = member(system)
    old.unlearn([victim])
    repo.api.delete_repo(repo.repo_id)
    use_key_of(other, monkeypatch)
    apply(other, [member(other, 1, 1)])
    send(other, repo)
    use_key_of(system, monkeypatch)
    # The main branch can be asked, and what it says of another system's deletions is not taken in.
    pinned = load(repo, revision=old.folder.commit)
    assert pinned.folder.ledger == old.folder.ledger and torch.equal(logits_of(pinned), logits_of(old))


def test_a_config_that_names_no_secret_is_refused(pushed, repo):
    record = read_checked_json(repo.download("s3t_config.json"))
    replace_on_hub(repo, "s3t_config.json", digested_json({**record, "key_check": ["../.."]}))
    with pytest.raises(FolderError, match="expected a digest"):
        load(repo)


@pytest.mark.parametrize(
    "change", [{"base_model": None}, {"s3t_config": 3}, {"layers": {}}, {"peft_config": []}, {"head": 4}]
)
def test_a_forged_config_on_the_hub_is_a_sentence(change, pushed, repo):
    record = read_checked_json(repo.download("s3t_config.json"))
    replace_on_hub(repo, "s3t_config.json", digested_json({**record, **change}))
    with pytest.raises(S3TError):
        load(repo)


def test_a_repository_without_a_commit_is_refused(monkeypatch):
    monkeypatch.setattr(HfApi, "repo_info", lambda *args: ModelInfo(id="me/system"))
    with pytest.raises(HubError, match=r"names no commit of me/system, expected .* Call again\."):
        HubRepo("me/system").state()
