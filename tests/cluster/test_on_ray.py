"""Stages that are trained on a real cluster of Ray, on this machine: to the bit those of one process."""

import os
import signal
import sys
import threading
import time
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from support.folders import forge_stage
from support.on_ray import ROWS, System, adapters_of
from support.receipts import OTHER_KEY, public, signer
from support.tiny import lm_rows

from hf_s3t.cluster import train_on_ray, verify_on_ray
from hf_s3t.cluster.ray_cluster import joined
from hf_s3t.errors import ExampleIdError
from hf_s3t.folder.audits_file import read_audits
from hf_s3t.folder.files import file_digest
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.signing.keys import SIGNING_VARIABLE, use_signer


pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread", "shared_key", "cluster"),
    pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: pip install hf_s3t[ray]"),
]


@pytest.fixture(scope="module")
def cluster(shared_key):
    """One cluster for all tests of this file; what workers import is found where this process finds it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([*sys.path, os.environ.get("PYTHONPATH", "")]))
        with joined(None, 2, {"CPU": 1.0}) as ray:
            yield ray


@pytest.fixture(scope="module")
def alone(tmp_path_factory, one_thread, shared_key):
    """What one process trains."""
    return trained_alone(tmp_path_factory.mktemp("alone") / "system")


def trained_alone(path, **changes):
    System(path, **changes)().train()
    return adapters_of(path)


def change_a_bit(path, key):
    """Have a stage on which none stands hold another tensor than training gave it, with digests that match."""
    file = path / key.path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    forge_stage(
        path, str(key), files={one: file_digest(file.parent / one) for one in (file.name, "adapter_config.json")}
    )
    return name


def is_whole(path, alone):
    """That all stages are there, bit for bit those of one process, and nothing else."""
    assert adapters_of(path) == alone
    folder = SystemFolder(path)
    assert folder.valid_stages == set(folder.plan.stages())
    assert inspect(path).problems == () and not list(path.glob(".tmp-*"))


@pytest.mark.parametrize("shared", [None, False], ids=["one folder", "no folder"])
def test_two_workers_train_each_stage_once_and_to_the_bit_as_one_process(tmp_path, alone, shared):
    path = tmp_path / "system"
    found = train_on_ray(System(path), num_workers=2, shared_folder=shared).metrics
    is_whole(path, alone)
    assert found["stages_trained"] == len(alone) and found["stages_left"] == 0 and found["deaths"] == 0


@pytest.mark.long
def test_four_workers_train_the_same(tmp_path, alone):
    path = tmp_path / "system"
    found = train_on_ray(System(path), num_workers=4, resources_per_worker={"CPU": 0.5}).metrics
    is_whole(path, alone)
    assert found["stages_trained"] == len(alone)


def test_rows_that_come_meanwhile_without_a_shared_folder_are_told_of_and_nothing_is_lost(tmp_path):
    path, notes, balanced = tmp_path / "system", tmp_path / "notes", {"partition": "balanced"}
    notes.mkdir()
    more = [{**row, "id": f"later-{number}"} for number, row in enumerate(lm_rows(4, seed=5))]

    def add():
        while not list(path.glob("stages/shard-*/[0-9]*")):
            time.sleep(0.01)
        System(path, **balanced)().add_examples(Dataset.from_list(more), into="slices")

    adding = threading.Thread(target=add)
    adding.start()
    with pytest.raises(ExampleIdError, match=r"4 examples came to .* Have `make_trainer` give the whole dataset"):
        train_on_ray(System(path, notes, seconds=0.1, **balanced), num_workers=2, shared_folder=False)
    adding.join()
    folder = SystemFolder(path)
    there, behind = folder.valid_stages, folder.missing_stages()
    assert there and behind and inspect(path).problems == ()
    whole = {"rows": [*ROWS, *more], **balanced}
    assert train_on_ray(System(path, **whole), num_workers=2, shared_folder=False).metrics["stages_left"] == 0
    assert System(path, **whole)().verify([behind[0]]).ok


def test_one_worker_goes_on_where_a_process_stopped_in_bfloat16(tmp_path):
    changes = {"dtype": torch.bfloat16}
    alone = trained_alone(tmp_path / "alone", **changes)
    path = tmp_path / "system"
    System(path, **changes)().train(max_stages=3)
    found = train_on_ray(System(path, **changes), num_workers=1, same_kind=True).metrics
    is_whole(path, alone)
    assert found["stages_trained"] == len(alone) - 3


@pytest.mark.parametrize("shared", [None, False], ids=["one folder", "no folder"])
def test_a_killed_worker_costs_its_stage_alone(tmp_path, alone, shared):
    path, notes = tmp_path / "system", tmp_path / "notes"
    notes.mkdir()
    killer = threading.Thread(target=kill_the_first_that_trains, args=(notes,))
    killer.start()
    found = train_on_ray(System(path, notes, seconds=0.2), num_workers=2, shared_folder=shared).metrics
    killer.join()
    is_whole(path, alone)
    assert found["deaths"] == 1 and found["stages_trained"] == len(alone)


def kill_the_first_that_trains(notes):
    while not (found := sorted(notes.iterdir())):
        time.sleep(0.01)
    os.kill(int(found[0].name.partition("-")[2]), signal.SIGKILL)


@pytest.mark.parametrize("shared", [None, False], ids=["one folder", "no folder"])
def test_what_is_deleted_meanwhile_is_in_no_stage(tmp_path, shared):
    path, notes = tmp_path / "system", tmp_path / "notes"
    notes.mkdir()
    deleted = ROWS[0]["id"]

    def delete():
        while not list(path.glob("stages/shard-*/[0-9]*")):
            time.sleep(0.01)
        System(path)().s3t_model.unlearn([deleted])

    deleting = threading.Thread(target=delete)
    deleting.start()
    train_on_ray(System(path, notes, seconds=0.1), num_workers=2, shared_folder=shared)
    deleting.join()
    without = trained_alone(tmp_path / "without", rows=ROWS[1:])
    is_whole(path, without)
    assert SystemFolder(path).is_deleted(deleted)


def test_an_audit_over_workers_finds_every_stage_the_same_and_one_that_is_not(tmp_path, alone):
    path = tmp_path / "system"
    System(path)().train()
    report = verify_on_ray(System(path), num_workers=2)
    assert report.ok and len(report.stages) == len(alone) and report.trained_here == ()
    assert not read_audits(path), "nobody here has a key"
    # Without a folder: what differs there is what the driver sent.
    last = max(SystemFolder(path).valid_stages, key=lambda key: (key.depth, key))
    changed = change_a_bit(path, last)
    report = verify_on_ray(System(path), [last], num_workers=1, shared_folder=False)
    assert report.mismatches == {str(last): [changed]}


def test_an_audit_over_workers_is_recorded_once_by_the_driver(tmp_path):
    """Also where the workers, which see the folder, have a key; with the adapters that these compared with."""
    path = tmp_path / "system"
    System(path)().train()
    use_signer(signer())
    try:
        keys = {"env_vars": {SIGNING_VARIABLE: OTHER_KEY}}
        report = verify_on_ray(System(path), num_workers=2, runtime_env=keys)
    finally:
        use_signer(None)
    (kept,) = read_audits(path)
    folder = SystemFolder(path)
    assert kept.key.keyid == public().keyid and kept.statement.fresh and not kept.statement.differing
    assert kept.statement.stages == report.adapters
    assert report.adapters == {str(key): folder.adapter_digest(key) for key in folder.plan.stages()}
    assert not inspect(path).problems
