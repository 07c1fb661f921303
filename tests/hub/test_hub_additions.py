"""A system that grew, on the Hub: what serves there lacks rows that came, until stages that saw them are pushed."""

import pytest
import torch
from support.folders import add, apply, grow
from support.hub_systems import load, logits_of, member, plant, send

from hf_s3t.errors import FolderError, MergeNeededError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub.folder import HubFolder
from hf_s3t.operations.inspection import inspect


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")

NEW = {"new-a": (0, 0), "new-b": (0, 1)}
SHARD = {f"new-{number}": (2, number % 2) for number in range(4)}


@pytest.fixture
def system(tmp_path):
    return SystemFolder(plant(tmp_path / "system", num_shards=2, num_slices=2))


def test_what_serves_goes_on_serving_from_the_hub_after_rows_came(system, repo):
    send(system, repo)
    served = load(repo)
    before, seen = logits_of(served), member(system, 0, 0)
    add(system, NEW)
    send(system, repo)
    hub = HubFolder(repo.repo_id)
    assert hub.valid_stages == system.valid_stages and hub.current_stages == system.current_stages < hub.valid_stages
    served.refresh()
    assert torch.equal(logits_of(served), before) and torch.equal(logits_of(load(repo)), before)
    apply(system, [seen])
    send(system, repo)
    served.refresh()
    assert served.folder.valid_stages == system.valid_stages < hub.valid_stages


def test_new_shards_come_to_the_hub_and_to_who_loaded_it_before(system, repo, tmp_path):
    send(system, repo)
    follower = HubFolder(repo.repo_id)
    add(system, SHARD)
    send(system, repo)
    follower.refresh()
    assert follower.config.num_shards == follower.plan.num_shards == 3
    assert len(follower.served()) == 3 and follower.valid_stages == system.valid_stages
    follower.copy_to(tmp_path / "pulled")
    pulled = SystemFolder(tmp_path / "pulled")
    assert set(pulled.table.rows) == set(system.table.rows) and pulled.config == system.config
    assert not inspect(tmp_path / "pulled").problems


def test_a_pulled_system_knows_which_stages_lack_rows(system, repo, tmp_path):
    add(system, NEW)
    send(system, repo)
    HubFolder(repo.repo_id).copy_to(tmp_path / "pulled")
    pulled = SystemFolder(tmp_path / "pulled")
    assert pulled.valid_stages == system.valid_stages and pulled.current_stages == system.current_stages


def test_a_copy_that_lacks_rows_does_not_take_them_from_the_hub(system, repo, tmp_path):
    system.copy_to(tmp_path / "copy")
    add(system, NEW)
    send(system, repo)
    commit = repo.state().commit
    copy = SystemFolder(tmp_path / "copy")
    with pytest.raises(MergeNeededError, match=r"knows of 1 addition of rows that .*copy lacks.*merge=True"):
        send(copy, repo)
    with pytest.raises(FolderError, match=r"tells of 1 addition of rows that .*copy lacks"):
        copy.merge_ledger(system.ledger)
    assert repo.state().commit == commit and not copy.ledger.additions
    send(copy, repo, merge=True)
    assert set(copy.table.rows) == set(system.table.rows) and copy.valid_stages == system.valid_stages
    assert not inspect(copy.path).problems


def test_where_two_copies_grew_both_have_all_rows_and_deletion_wins(system, repo, tmp_path):
    """What either has grown with its own rows serves on, for all its rows are in."""
    victim = member(system, 1, 0)
    HERE, THERE = {"here-a": (0, 0), "here-b": (2, 0), "here-c": (2, 1)}, {"there-a": (0, 0), "there-b": (0, 1)}
    system.copy_to(tmp_path / "copy")
    copy = grow(add(SystemFolder(tmp_path / "copy"), THERE))
    apply(copy, ["there-b"])
    apply(copy, [victim])
    apply(system, [victim])
    add(grow(add(system, HERE)), {victim: (1, 0)}, again=[victim])
    grown_there = {key: copy.adapter_digest(key) for key in copy.valid_stages}
    grown_here = system.current_stages
    send(copy, repo)
    send(system, repo, merge=True)
    assert {*HERE, "there-a"} < set(system.table.rows)
    assert "there-b" not in system.table.rows
    assert victim not in system.table.rows and system.is_deleted(victim), (
        "the copy deleted it, and did not bring it back"
    )
    assert grown_here - {key for key in grown_here if key.shard == 1} <= system.valid_stages
    assert not inspect(system.path).problems
    assert SystemFolder(system.path).valid_stages == system.valid_stages
    # Where only the copy has a stage, it comes to the Hub, and is valid there.
    hub = HubFolder(repo.repo_id)
    assert hub.valid_stages >= system.valid_stages and grown_there
    send(copy, repo, merge=True)
    assert set(copy.table.rows) == set(system.table.rows) and copy.config == system.config
    grow(copy)
    assert copy.current_stages and not copy.missing_stages()


def test_a_deletion_elsewhere_and_an_addition_here_are_both_in_force_after_a_merge(system, repo, tmp_path):
    send(system, repo)
    HubFolder(repo.repo_id).copy_to(tmp_path / "copy")
    copy = SystemFolder(tmp_path / "copy")
    victim = member(copy, 0, 0)
    apply(copy, [victim])
    send(copy, repo)
    add(system, NEW)
    send(system, repo, merge=True)
    assert victim not in system.table.rows and set(NEW) < set(system.table.rows)
    assert HubFolder(repo.repo_id).valid_stages == system.valid_stages
