"""A system that grew, on the Hub: what serves there lacks rows that came, until stages that saw them are pushed."""

import pytest
import torch
from support.folders import add, apply, grow
from support.hub_systems import load, logits_of, member, plant, send

from hf_s3t.errors import FolderError, HubError, MergeNeededError
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


@pytest.mark.parametrize("how", ["replaced", "deleted and brought back"])
def test_of_a_row_that_both_copies_replaced_both_have_the_one_of_the_hub(system, repo, tmp_path, how):
    send(system, repo)
    system.copy_to(tmp_path / "copy")
    copy, edited = SystemFolder(tmp_path / "copy"), member(system, 0, 0)
    here, there = (system.key.of_content({"edited by": who}) for who in ("here", "there"))
    add(system, {edited: (0, 0)}, replaced=[edited], contents={edited: here})
    if how == "replaced":
        add(copy, {edited: (0, 0)}, replaced=[edited], contents={edited: there})
    else:
        apply(copy, [edited])
        add(copy, {edited: (0, 0)}, contents={edited: there}, again=[edited])
    for folder in (system, copy, system, copy):
        send(folder, repo, merge=True)
    for folder in (system, copy):
        for found in (folder, SystemFolder(folder.path)):
            assert found.table.rows[edited].digest == here and not found.is_deleted(edited)
        assert not inspect(folder.path).problems
    assert set(system.table.rows) == set(copy.table.rows)


@pytest.mark.parametrize("then", ["replaced", "deleted"])
def test_what_was_replaced_or_deleted_since_does_not_come_back_from_a_copy_that_has_not_heard_of_it(
    system, repo, tmp_path, then
):
    send(system, repo)
    system.copy_to(tmp_path / "copy")
    copy, edited = SystemFolder(tmp_path / "copy"), member(system, 0, 0)
    contents = {who: system.key.of_content({"edited by": who}) for who in ("here", "there", "here again")}
    add(system, {edited: (0, 0)}, replaced=[edited], contents={edited: contents["here"]})
    add(copy, {edited: (0, 0)}, replaced=[edited], contents={edited: contents["there"]})
    send(system, repo)
    # It takes the row of the Hub, behind a line that replaced the one before.
    send(copy, repo, merge=True)
    if then == "deleted":
        apply(system, [edited])
    else:
        add(system, {edited: (0, 0)}, replaced=[edited], contents={edited: contents["here again"]})
    for folder in (system, copy, system):
        send(folder, repo, merge=True)
    for folder in (system, copy, SystemFolder(system.path), SystemFolder(copy.path)):
        found = {name: row.digest for name, row in folder.table.rows.items() if name == edited}
        assert found == ({} if then == "deleted" else {edited: contents["here again"]})
        assert folder.is_deleted(edited) == (then == "deleted") and not inspect(folder.path).problems


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


# How members weigh


def weights_of(folder):
    return folder.record["added"]["weights"]


def test_a_copy_that_never_grew_takes_over_how_members_weigh(system, repo, tmp_path):
    victim = member(system, 0, 0)
    system.copy_to(tmp_path / "copy")
    copy = SystemFolder(tmp_path / "copy")
    apply(copy, [victim])
    add(system, SHARD, weights="size")
    send(system, repo)
    send(copy, repo, merge=True)
    assert weights_of(copy) == weights_of(SystemFolder(copy.path)) == weights_of(HubFolder(repo.repo_id)) == "size"
    assert victim not in copy.table.rows and set(SHARD) < set(copy.table.rows)
    assert not inspect(copy.path).problems


@pytest.mark.parametrize("here, there, after", [("equal", "size", "size"), ("size", "equal", "size"), ("equal",) * 3])
def test_where_two_copies_grew_members_weigh_by_size_if_either_says_so(system, repo, tmp_path, here, there, after):
    system.copy_to(tmp_path / "copy")
    copy = add(SystemFolder(tmp_path / "copy"), {"there": (0, 0)}, weights=there)
    add(system, SHARD, weights=here)
    send(copy, repo)
    send(system, repo, merge=True)
    send(copy, repo, merge=True)
    assert {weights_of(folder) for folder in (system, copy, HubFolder(repo.repo_id))} == {after}
    assert set(copy.table.rows) == set(system.table.rows) > {"there", *SHARD}


def test_who_knows_all_additions_says_how_members_weigh(system, repo, tmp_path):
    """Also where that was changed back: the other copy knew of nothing that this one did not."""
    add(system, SHARD, weights="size")
    system.copy_to(tmp_path / "copy")
    copy = add(SystemFolder(tmp_path / "copy"), {}, weights="equal")
    send(system, repo)
    send(copy, repo)
    assert weights_of(HubFolder(repo.repo_id)) == "equal"
    send(system, repo, merge=True)
    assert weights_of(system) == "equal" and weights_of(HubFolder(repo.repo_id)) == "equal"


# Pushes of what is served from the Hub


def rows_on(repo):
    return set(HubFolder(repo.repo_id).table.rows)


def test_a_push_of_what_was_served_before_rows_came_does_not_take_them(system, repo):
    send(system, repo)
    served, victim = HubFolder(repo.repo_id), member(system, 0, 0)
    apply(served, [victim])
    add(system, SHARD, weights="size")
    send(system, repo)
    send(served, repo, merge=True)
    assert rows_on(repo) == set(system.table.rows) - {victim}
    assert weights_of(HubFolder(repo.repo_id)) == "size" and HubFolder(repo.repo_id).config.num_shards == 3


def test_a_push_of_a_revision_before_rows_came_is_refused(system, repo):
    commit = send(system, repo).commit
    served, victim = HubFolder(repo.repo_id, revision=commit), member(system, 0, 0)
    add(system, NEW)
    send(system, repo)
    apply(served, [victim])
    before = repo.state().commit
    with pytest.raises(HubError, match=r"before 1 addition of rows that the main branch has.*without `revision`"):
        send(served, repo, merge=True)
    assert repo.state().commit == before
    send(HubFolder(repo.repo_id), repo, merge=True)
    assert rows_on(repo) == set(system.table.rows) - {victim} > NEW.keys()
