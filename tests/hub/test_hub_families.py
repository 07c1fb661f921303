"""Plans of sets on the Hub: a set may be grown in two orders by two machines, and an older folder has idle stages."""

import json
import re
import shutil

import pytest
import torch
from huggingface_hub import ModelCard
from support.folders import apply, forge
from support.hub_systems import ROWS, files_on, load, logits_of, member, on_disk, plant, send
from support.insides import routing_of
from support.tiny import make_trainer, plant_stages, s3t_config, tiny_llama, training_arguments

from hf_s3t import S3TModel
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub.erasure import erase
from hf_s3t.hub.folder import HubFolder
from hf_s3t.hub.repository import HubRepo
from hf_s3t.operations.inspection import inspect
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")

LATTICE = {"num_shards": 1, "num_slices": 3, "keep_idle": None, "partition": "balanced"}
FULL = StageKey(0, (0, 1, 2))
OTHERWISE = StageKey(0, (1, 2, 0))


def regrown(path, steps: int) -> SystemFolder:
    """What a machine makes of a folder: so many missing stages, one after the other, or with 0 all at once."""
    trainer = make_trainer(path, rows=ROWS, config=s3t_config(**LATTICE))
    for _ in range(steps):
        plant_stages(trainer, limit=1)
    if not steps:
        plant_stages(trainer)
    return SystemFolder(path)


@pytest.fixture
def two_machines(repo, tmp_path):
    """Copies of one folder that both regrew the full set after a deletion in slice 0, on different parents."""
    first = SystemFolder(plant(tmp_path / "first", **LATTICE))
    send(first, repo)
    apply(first, [member(first, 0, 0)])
    send(first, repo)
    HubFolder(repo.repo_id).copy_to(tmp_path / "second")
    # At once {0, 1, 2} stands on the one pair that is there; step by step on the pair that is regrown before it.
    one, other = regrown(tmp_path / "first", 0), regrown(tmp_path / "second", 3)
    assert OTHERWISE in one.valid_stages and FULL not in one.valid_stages
    assert FULL in other.valid_stages and OTHERWISE not in other.valid_stages
    return one, other


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_one_set_that_two_machines_grew_in_two_orders_is_kept_twice(two_machines, repo, order, tmp_path):
    for number in order:
        send(two_machines[number], repo)
    assert {FULL, OTHERWISE} <= set(repo.state().stages) and ModelCard.load(repo.repo_id)
    pulled = HubFolder(repo.repo_id)
    pulled.copy_to(tmp_path / "pulled")
    folder = SystemFolder(tmp_path / "pulled")
    assert inspect(folder.path).problems == () and folder.missing_stages() == []
    assert folder.valid_stages == pulled.valid_stages >= {FULL, OTHERWISE}
    # Of two as deep the planned order answers, on the Hub and everywhere else.
    served = S3TModel.from_pretrained(folder.path, base_model=tiny_llama())
    for model in (load(repo), served):
        assert routing_of(model).served == ((FULL,),)
        assert torch.equal(logits_of(model), logits_of(served))


def test_a_deletion_takes_both_orders_and_both_are_erased(two_machines, repo, hub):
    for folder in two_machines:
        send(folder, repo)
    paths = [f"{key.path}/adapter_model.safetensors" for key in (FULL, OTHERWISE)]
    erased = [repo.download(path).read_bytes() for path in paths]
    assert erased[0] != erased[1]
    model = load(repo)
    model.unlearn([member(two_machines[0], 0, 1)])
    assert model.status()["depths"] == [2]
    model.push_to_hub(repo.repo_id)
    assert not set(paths) & files_on(repo)
    assert erase(repo).blobs
    (stored,) = [stored for (_, name), stored in hub.repos.items() if name == repo.repo_id]
    stored.gc()
    assert not any(data in on_disk(stored.dir) for data in erased)


def test_a_pull_after_a_deletion_leaves_on_the_hub_what_that_condemned_in_either_order(
    two_machines, repo, hub, tmp_path
):
    """Also what is planned in another order, and what the copy that deleted knows no more."""
    for folder in two_machines:
        send(folder, repo)
    system = HubFolder(repo.repo_id)
    condemned = apply(system, [member(system, 0, 0)]).stages_removed
    assert {str(FULL), str(OTHERWISE)} <= set(condemned)
    hub.requests.clear()
    system.copy_to(tmp_path / "pulled")
    paths = [call["path"] for call in hub.calls("GET", "/resolve/.*/stages/shard-")]
    assert not {re.search(r"/(shard-\d+/[\d-]+)/", path)[1] for path in paths} & set(condemned)
    pulled = SystemFolder(tmp_path / "pulled")
    assert pulled.valid_stages == system.valid_stages and not {FULL, OTHERWISE} & set(pulled.stages)
    # The Hub has them until somebody pushes who knows.
    assert {FULL, OTHERWISE} <= set(repo.state().stages)
    assert {f"stages/{stage}/adapter_model.safetensors" for stage in condemned} <= set(send(pulled, repo).deleted)
    assert set(repo.state().stages) == system.valid_stages


@pytest.fixture
def older(tmp_path):
    """A folder that was made before idle stages were left out: nothing says so, and the published plan is recorded."""
    folder = SystemFolder(plant(tmp_path / "older", num_shards=1, num_slices=3, budget=3, keep_idle=True))
    settings = {**folder.record["s3t_config"], "sequence_selection": "cyclic"}
    for name in ("keep_idle", "work_budget", "replay"):
        del settings[name]
    forge(folder.path / "s3t_config.json", s3t_config=settings)
    again = SystemFolder(folder.path)
    assert len(again.valid_stages) == 9 and len(again.plan.stages()) == 7 and again.missing_stages() == []
    return again


def test_idle_stages_of_an_older_folder_are_pushed_pulled_and_erased(older, repo, hub, tmp_path):
    idle = sorted(older.valid_stages - set(older.plan.stages()))
    assert [key.prefix for key in idle] == [(1, 2, 0), (2, 0, 1)]
    send(older, repo)
    assert set(repo.state().stages) == older.valid_stages
    HubFolder(repo.repo_id).copy_to(tmp_path / "pulled")
    pulled = SystemFolder(tmp_path / "pulled")
    assert pulled.valid_stages == older.valid_stages and inspect(pulled.path).problems == ()
    apply(older, [member(older, 0, 0)])
    # A deletion takes them; what is left is planned, and a push takes them from the branch.
    report = send(older, repo)
    assert {f"{key.path}/adapter_model.safetensors" for key in idle} <= set(report.deleted)
    assert erase(repo).blobs > len(idle)
    assert load(repo).status()["depths"] == [2]


def test_an_older_folder_is_pushed_from_a_copy_that_lacks_its_idle_stages(older, repo, tmp_path):
    """Who has fewer stages takes none from the Hub that is valid."""
    send(older, repo)
    fewer = SystemFolder(shutil.copytree(older.path, tmp_path / "fewer"))
    for key in sorted(older.valid_stages - set(older.plan.stages())):
        shutil.rmtree(fewer.path / key.path)
    assert send(SystemFolder(fewer.path), repo).deleted == ()
    assert set(repo.state().stages) == older.valid_stages


def test_a_trainer_pushes_whenever_a_sequence_of_sets_is_whole(hub, tmp_path):
    """Also where its last set is regrown in another order than the planned one."""
    settings = s3t_config(num_slices=3, keep_idle=None, sequence_selection=[[0, 1, 2], [1, 2]])
    args = training_arguments(tmp_path / "system", hub_model_id=f"{hub.user}/trained", push_to_hub=True)
    trainer = make_trainer(tmp_path / "system", rows=ROWS[:12], args=args, config=settings)
    trainer.train()
    repo = HubRepo(trainer.hub_model_id)

    def pushes() -> list[str]:
        return [commit.title for commit in reversed(repo.api.list_repo_commits(repo.repo_id))]

    assert pushes() == ["initial commit", "Sequence shard-0/0-1-2", "Sequence shard-0/1-2"]
    trainer.s3t_model.unlearn(trainer.folder.table.members(0, 0)[:1])
    trainer.train()
    assert pushes()[3] == "Sequence shard-0/1-2-0"
    assert set(repo.state().stages) == SystemFolder(trainer.folder.path).valid_stages
    assert json.loads((trainer.folder.path / "s3t_config.json").read_text())["plan"] == trainer.folder.plan.to_record()
