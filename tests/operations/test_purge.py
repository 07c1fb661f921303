"""A purge: it finds every place that may hold deleted data or weights, and removes only what it may."""

import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import constants as hub_constants
from support.folders import (
    NAMES,
    add_checkpoint,
    delete_and_die,
    files_of,
    grow,
    new_system,
)

from hf_s3t.errors import FolderError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.purge import purge, take_inventory
from hf_s3t.plan import StageKey


pytestmark = pytest.mark.usefixtures("surroundings")


@pytest.fixture(autouse=True)
def empty_caches():
    yield
    for cache in (os.environ["HF_DATASETS_CACHE"], hub_constants.HF_HUB_CACHE, hub_constants.HF_XET_CACHE):
        shutil.rmtree(cache, ignore_errors=True)


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A system in whose training stages are missing; not to be changed."""
    path = tmp_path_factory.mktemp("purged") / "system"
    grow(new_system(path, NAMES), limit=16)
    return path


@pytest.fixture
def system(unfinished, tmp_path):
    return Path(shutil.copytree(unfinished, tmp_path / "work" / "system"))


def write(path, data=b"rows") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def saved_dataset(path) -> Path:
    for name in ("state.json", "dataset_info.json", "data-00000-of-00001.arrow"):
        write(path / name)
    return path


def found_in(system, **where) -> dict[Path, tuple[str, str]]:
    """Kind and action by path."""
    return {remnant.path: (remnant.kind, remnant.action) for remnant in take_inventory(system, **where).remnants}


def missing_of(system) -> StageKey:
    folder = SystemFolder(system)
    return folder.plan.missing(folder.valid_stages)[0]


# What is found


def test_a_system_by_itself_leaves_nothing(system):
    inventory = take_inventory(system)
    assert inventory.remnants == () == inventory.problems
    assert purge(system).remnants == ()


def test_what_a_deletion_condemned_is_found(system):
    key = missing_of(system)
    stale = add_checkpoint(SystemFolder(system), key)
    leftovers = write(system / ".tmp-x-1"), write(system / "stages/shard-0/.gone-0-1/stage.json").parent
    folder = SystemFolder(system / "nothing") if (system / "nothing").exists() else SystemFolder(system)
    for leftover in leftovers:
        assert not leftover.exists()  # opening a folder removes them
    leftovers = write(system / ".tmp-x-1"), write(system / "stages/shard-0/.gone-0-1/stage.json").parent
    delete_and_die(folder, folder.table.members(key.shard, key.prefix[0])[:1])
    found = found_in(system)
    assert found[stale] == ("checkpoint", "remove")
    assert found[system / "examples.parquet"] == ("rows", "rewrite")
    assert [found[leftover] for leftover in leftovers] == [("leftover", "remove")] * 2
    assert {action for kind, action in found.values() if kind == "stage"} == {"remove"}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("runs", "tracker logs"),
        ("wandb", "tracker logs"),
        ("mlruns", "tracker logs"),
        (".git", "git history"),
        ("checkpoint-500", "foreign checkpoint"),
    ],
)
def test_folders_that_other_libraries_leave_in_the_output_folder_are_found(system, name, kind):
    write(system / name / "deep" / "file", b"12345")
    inventory = take_inventory(system)
    (remnant,) = inventory.remnants
    assert (remnant.path, remnant.kind, remnant.bytes, remnant.action) == (system / name, kind, 5, "keep")
    assert remnant.advice


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("events.out.tfevents.17.host", "tracker logs"),
        ("optimizer.pt", "optimizer state"),
        ("scheduler.pt", "optimizer state"),
        ("rng_state.pth", "optimizer state"),
        ("cache-0a1b.arrow", "dataset cache"),
    ],
)
def test_files_that_other_libraries_leave_in_the_output_folder_are_found(system, name, kind):
    write(system / name)
    assert found_in(system) == {system / name: (kind, "keep")}


def test_a_checkpoint_that_can_be_resumed_is_kept(system):
    checkpoint = add_checkpoint(SystemFolder(system), missing_of(system))
    log = write(checkpoint.parent / "runs" / "events.out.tfevents.1").parent
    assert found_in(system) == {checkpoint: ("resumable checkpoint", "keep"), log: ("tracker logs", "keep")}
    assert purge(system).size("removed") == 0 and checkpoint.exists()


def test_a_checkpoint_of_a_finished_stage_goes(system):
    folder = SystemFolder(system)
    checkpoint = add_checkpoint(folder, sorted(folder.valid_stages)[0])
    assert found_in(system) == {checkpoint: ("checkpoint", "remove")}
    done = purge(system)
    assert [remnant.action for remnant in done.remnants] == ["removed"]
    assert not (system / "checkpoints").exists()


def test_the_baseline_beside_the_system_is_found(system):
    baseline = write(system.with_name("system-full-lora") / "adapter_model.safetensors").parent
    assert found_in(system) == {baseline: ("baseline", "keep")}


def test_caches_of_datasets_are_found_in_named_folders_the_default_and_beside(system, tmp_path):
    default = write(Path(os.environ["HF_DATASETS_CACHE"]) / "json" / "0.0.0" / "cache-1.arrow")
    beside = write(system.parent / "cache-2.arrow")
    in_data = write(system.parent / "data" / "cache-3.arrow")
    named = write(tmp_path / "elsewhere" / "a" / "b" / "cache-4.arrow")
    saved = saved_dataset(tmp_path / "elsewhere" / "tokenised")
    write(system.parent / "data" / "deeper" / "cache-5.arrow")  # too far away to be ours by the look of it
    write(tmp_path / "elsewhere" / "notes.txt")
    rows = ("dataset cache", "keep")
    assert found_in(system) == {default: rows, beside: rows, in_data: rows}
    assert found_in(system, dataset_caches=[tmp_path / "elsewhere"]) == {
        named: rows,
        saved: ("saved dataset", "keep"),
        beside: rows,
        in_data: rows,
    }


def test_saved_datasets_in_and_beside_the_output_folder_are_found(system):
    inside, beside = saved_dataset(system / "tokenised"), saved_dataset(system.parent / "tokenised")
    write(system.parent / "both" / "dataset_dict.json")
    assert found_in(system) == dict.fromkeys((inside, beside, system.parent / "both"), ("saved dataset", "keep"))


def test_a_place_is_listed_once(system):
    cache = write(system.parent / "data" / "cache-1.arrow")
    found = take_inventory(system, dataset_caches=[system.parent, system.parent / "data", cache.parent / ".."])
    assert [remnant.path for remnant in found.remnants] == [cache]


def test_the_hub_cache_of_this_system_is_listed_by_its_secret_or_its_name(system):
    cache = Path(hub_constants.HF_HUB_CACHE)
    (cache / "models--me--copy/snapshots/abc").mkdir(parents=True)
    shutil.copy(system / "s3t_config.json", cache / "models--me--copy/snapshots/abc")
    write(cache / "models--me--other/blobs/1")
    write(cache / "models--me--broken/snapshots/abc/s3t_config.json", b"{")
    write(Path(hub_constants.HF_XET_CACHE) / "chunk")
    found = found_in(system)
    assert found == {
        cache / "models--me--copy": ("Hub cache", "keep"),
        Path(hub_constants.HF_XET_CACHE): ("Xet cache", "keep"),
    }
    assert cache / "models--me--other" in found_in(system, repo_id="me/other")
    assert found_in(system, repo_id="../..") == found


def test_paths_are_shown_as_the_system_s_was_given(system, monkeypatch):
    monkeypatch.chdir(system.parent)
    write(Path("cache-1.arrow"))
    write(Path("system-full-lora/x"))
    write(Path("system/runs/x"))
    assert set(map(str, found_in("system"))) == {"cache-1.arrow", "system-full-lora", "system/runs"}


# What is done


def everything(system) -> Path:
    """A place of every kind, and a deletion whose process died."""
    folder = SystemFolder(system)
    add_checkpoint(folder, missing_of(system))
    for name in ("runs/x", "checkpoint-1/optimizer.pt", "cache-1.arrow", "../cache-2.arrow", "../system-full-lora/x"):
        write(system / name)
    saved_dataset(system / "tokenised")
    delete_and_die(folder, NAMES[:1])
    write(system / ".tmp-x")
    return system


def test_a_dry_run_changes_nothing_and_says_what_a_purge_does(system):
    everything(system)
    before = files_of(system.parent)
    planned = take_inventory(system)
    assert files_of(system.parent) == before
    done = purge(system)
    becomes = {"remove": "removed", "rewrite": "rewritten", "keep": "keep"}
    assert [(r.path, r.kind, becomes[r.action]) for r in planned.remnants] == [
        (r.path, r.kind, r.action) for r in done.remnants
    ]
    assert done.problems == () and done.size("removed") == planned.size("remove") > 0


def test_a_purge_removes_the_condemned_and_keeps_the_rest(system):
    everything(system)
    done = purge(system)
    for remnant in done.remnants:
        assert remnant.path.exists() == (remnant.action in ("keep", "rewritten")), remnant
    assert not [problem for problem in inspect(system).problems if "next load" in problem]
    kept = {remnant.kind for remnant in done.remnants if remnant.action == "keep"}
    assert {"tracker logs", "foreign checkpoint", "dataset cache", "saved dataset", "baseline"} <= kept


def test_with_consent_other_places_go_and_only_those(system):
    everything(system)
    baseline, cache = system.with_name("system-full-lora"), system.parent / "cache-2.arrow"
    done = purge(system, consent=[baseline, system / "runs", system.parent / "data" / ".." / "cache-2.arrow"])
    removed = {remnant.path for remnant in done.remnants if remnant.action == "removed"}
    assert {baseline, system / "runs", cache} <= removed
    assert not baseline.exists() and not (system / "runs").exists() and not cache.exists()
    assert (system / "cache-1.arrow").exists() and (system / "tokenised").exists()


def test_the_folder_of_a_dataset_stands_for_its_cache_files_alone(system, tmp_path):
    folder = tmp_path / "data"
    for name in ("cache-1.arrow", "cache-2.arrow", "json-train.arrow", "deeper/cache-3.arrow"):
        write(folder / name)
    purge(system, dataset_caches=[folder], consent=[folder])
    assert {p.name for p in folder.rglob("*") if p.is_file()} == {"json-train.arrow", "cache-3.arrow"}


@pytest.mark.parametrize("place", [".", "..", "stages", "s3t_config.json", "nowhere", "/", "data", "stages/shard-0/0"])
def test_consent_to_what_was_not_found_is_refused_and_nothing_goes(system, place):
    everything(system)
    write(system / "data" / "file")
    before = files_of(system.parent)
    with pytest.raises(FolderError, match="none of the places found"):
        purge(system, consent=[system / "runs", system / place])
    assert files_of(system.parent) == before


def test_the_hub_cache_is_only_listed(system):
    blob = write(Path(hub_constants.HF_HUB_CACHE) / "models--me--s3t" / "blobs" / "1")
    with pytest.raises(FolderError, match=r"only lists.*hf cache rm"):
        purge(system, repo_id="me/s3t", consent=[blob.parent.parent])
    assert blob.exists()


def test_what_cannot_be_removed_is_told_and_the_rest_still_goes(system, monkeypatch):
    everything(system)

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("hf_s3t.operations.purge._remove", refuse)
    done = purge(system, consent=[system / "runs"])
    (problem,) = done.problems
    assert "runs could not be removed (Permission denied). Remove it by hand." in problem
    assert not (system / ".tmp-x").exists()


# Links and foreign folders


@pytest.mark.parametrize("part", ["checkpoints", "stages", "examples.parquet", "stages/shard-0/0-1-2", ".tmp-x"])
@pytest.mark.parametrize("act", [take_inventory, purge])
def test_a_system_that_leads_elsewhere_is_refused_and_nothing_goes(system, tmp_path, act, part):
    victim = Path(shutil.copytree(system, tmp_path / "victim"))
    add_checkpoint(SystemFolder(victim), missing_of(victim), recorded=False)
    delete_and_die(SystemFolder(system), NAMES[:1])
    if (system / part).is_dir():
        shutil.rmtree(system / part)
    (system / part).unlink(missing_ok=True)
    (system / part).symlink_to(victim / part)
    before = files_of(victim), files_of(system)
    with pytest.raises(FolderError, match="symbolic link"):
        act(system)
    assert (files_of(victim), files_of(system)) == before


def test_links_beside_a_system_s_parts_are_told_and_not_followed(system, tmp_path):
    elsewhere = write(tmp_path / "elsewhere" / "cache-1.arrow").parent
    (system / "runs").symlink_to(elsewhere)
    (system / "data").mkdir()
    (system / "data" / "more").symlink_to(elsewhere)
    (system.parent / "system-full-lora").symlink_to(elsewhere)
    done = purge(system)
    assert done.remnants == () and (elsewhere / "cache-1.arrow").exists()
    assert len(done.problems) == 1 and "runs is a symbolic link" in done.problems[0]
    with pytest.raises(FolderError, match="none of the places"):
        purge(system, consent=[system / "runs"])


def test_a_place_that_became_a_link_after_it_was_listed_is_not_followed(system, tmp_path, monkeypatch):
    elsewhere = write(tmp_path / "elsewhere" / "x").parent
    write(system / "runs" / "x")
    whole = take_inventory

    def then_swapped(*args):
        inventory = whole(*args)
        shutil.rmtree(system / "runs")
        (system / "runs").symlink_to(elsewhere)
        return inventory

    monkeypatch.setattr("hf_s3t.operations.purge.take_inventory", then_swapped)
    done = purge(system, consent=[system / "runs"])
    assert "became a symbolic link" in done.problems[0] and (elsewhere / "x").exists()


def test_a_damaged_system_is_refused_and_nothing_goes(system):
    everything(system)
    (system / "ledger.jsonl").write_text("{}\n")
    before = files_of(system.parent)
    for act in (take_inventory, purge):
        with pytest.raises(FolderError, match=r"ledger\.jsonl"):
            act(system)
    assert files_of(system.parent) == before


def test_what_is_no_system_is_refused(tmp_path):
    with pytest.raises(FolderError, match="holds no S3T system"):
        purge(tmp_path)
