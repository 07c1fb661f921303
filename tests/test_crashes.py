"""Whatever dies, and whenever: a deletion that was acknowledged is in force, and nothing else is lost or left."""

import copy
import errno
import os
import random
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import folders
import pyarrow.parquet as pq
import pytest
from crashes import Disk, Faults, Recording, crashes, plant, tree_of
from folders import NAMES, add_checkpoint, grow, new_system, own_surroundings

from hf_s3t import S3TConfig
from hf_s3t.deletion import apply
from hf_s3t.errors import FolderError, S3TError
from hf_s3t.pending import PENDING_FILE, PendingRequests
from hf_s3t.plan import StageKey
from hf_s3t.storage import LEDGER_FILE, TABLE_FILE, SystemFolder


CONFIG = S3TConfig(num_shards=2, num_slices=2, seed=1)
EARLIER = NAMES[:1]


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    with own_surroundings(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A system with every stage and an empty ledger, not to be changed."""
    path = tmp_path_factory.mktemp("first") / "system"
    grow(new_system(path, NAMES, CONFIG, None))
    return path


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """A system with a deletion behind it, grown again, with a checkpoint in it; not to be changed."""
    path = tmp_path_factory.mktemp("later") / "system"
    folder = grow(new_system(path, NAMES, CONFIG, None))
    apply(folder, EARLIER)
    grow(folder)
    for shard in range(CONFIG.num_shards):
        add_checkpoint(folder, StageKey(shard, (0,)))
    return path


def victims_of(path) -> list[str]:
    """Two examples of one slice."""
    return SystemFolder(path).table.members(0, 1)[:2]


def record(start, path, act) -> Recording:
    """What `act` does to a copy of a system; it gets the path and what marks that a call returned."""
    shutil.copytree(start, path)
    recording = Recording(path)
    with recording.running():
        act(path, recording.mark)
    return recording


class Outcome:
    """What a load may find after a crash while some examples were deleted."""

    def __init__(self, start, victims, whole):
        apply(SystemFolder(shutil.copytree(start, whole)), victims)
        self.victims = victims
        self.before, self.after = tree_of(start), tree_of(whole)
        self.rows = {False: names_in(start), True: names_in(whole)}

    def check(self, path, acknowledged: bool, why="") -> bool:
        """Load a folder after a crash; returns whether the deletion is in force."""
        folder = SystemFolder(path)
        known = {folder.is_deleted(victim) for victim in self.victims}
        assert len(known) == 1, why
        in_force = known.pop()
        assert in_force or not acknowledged, f"an acknowledged deletion is forgotten {why}"
        found, expected = tree_of(path), self.after if in_force else self.before
        assert parts(found, "stages") == parts(expected, "stages"), why
        assert parts(found, "checkpoints") == parts(expected, "checkpoints"), why
        assert set(found) - {PENDING_FILE} == set(expected), f"something is left {why}"
        assert names_in(path) == sorted(folder.table.rows) == self.rows[in_force], why
        if in_force:
            assert not [n for n, data in found.items() if any(v.encode() in (data or b"") for v in self.victims)], why
        assert folder.valid_stages == set(folder.stages), why
        for key in folder.stages:
            folder.adapter_path(key)
        return in_force


def names_in(path) -> list[str]:
    return sorted(pq.read_table(Path(path) / TABLE_FILE).column("id").to_pylist())


def parts(tree, name) -> dict:
    return {n: data for n, data in tree.items() if n.split("/")[0] == name and (data is not None or n.count("/") > 1)}


def sweep(recording, outcome, tmp_path, marks=("acknowledged",), disk=None) -> set[bool]:
    found = set()
    for number, crash in enumerate(crashes(recording, disk)):
        path = plant(crash.tree, tmp_path / "crashed" / str(number))
        found.add(outcome.check(path, bool(crash.told.intersection(marks)), str(crash)))
        shutil.rmtree(path)
    return found


# Deleting


def delete(path, mark, victims) -> None:
    apply(SystemFolder(path), victims)
    mark("acknowledged")


@pytest.mark.parametrize("start", ["first", "later"])
def test_after_a_crash_at_any_moment_of_a_deletion_it_is_in_force_or_never_was(start, request, tmp_path):
    start = request.getfixturevalue(start)
    victims = victims_of(start)
    recording = record(start, tmp_path / "recorded", partial(delete, victims=victims))
    synced = [step.name for step in recording.steps if step.kind == "sync"]
    assert synced[0] == LEDGER_FILE and len(synced) <= 4, "unlearning is to be fast"
    assert sweep(recording, Outcome(start, victims, tmp_path / "whole"), tmp_path) == {False, True}


def test_a_process_that_died_unsynced_is_followed_by_a_crash_of_the_machine(later, tmp_path):
    """What the next process finds may not last yet. What it does and says because of it must."""
    victims = victims_of(later)
    outcome = Outcome(later, victims, tmp_path / "whole")
    first = record(later, tmp_path / "recorded", partial(delete, victims=victims))
    disk = Disk(first.start)
    moments = [n for n, step in enumerate(first.steps) if step.kind in ("sync", "move")]
    for moment, step in enumerate(first.steps):
        if moment in moments:
            (_, tree), *_ = disk.crashes(random.Random(0), 0)
            again = plant(tree, tmp_path / "again" / str(moment))
            second = record(again, tmp_path / "second" / str(moment), partial(delete, victims=victims))
            sweep(second, outcome, tmp_path, disk=disk)
        disk.do(step)
