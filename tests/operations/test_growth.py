"""
What grows with the number of stages: of every operation the calls, of Python's functions and of those in C, which are
the same in every run as no stopwatch is. Twice as many stages ask for twice as much, and for no more.
"""

import shutil
import sys

import pytest
from support.folders import apply, delete_and_die, grow, new_system, preview

from hf_s3t import S3TConfig
from hf_s3t.folder.opening import open_folder
from hf_s3t.folder.status import system_status
from hf_s3t.hub.diagram import render_diagram
from hf_s3t.hub.git_attributes import state_of
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.purge import take_inventory
from hf_s3t.operations.receipts import Receipts


pytestmark = pytest.mark.usefixtures("surroundings")

# Each twice the one before; a shard has eight stages.
SHARDS = (2, 4, 8)


def calls_of(run, *arguments) -> int:
    """How many functions are called by the way."""
    count = 0

    def note(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        run(*arguments)
    finally:
        sys.setprofile(before)
    return count


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """Systems of two, four and eight shards; not to be changed."""
    made = []
    for shards in SHARDS:
        config = S3TConfig(num_shards=shards, num_slices=4, budget=2, seed=1)
        path = tmp_path_factory.mktemp("systems") / f"{shards}" / "system"
        made.append(grow(new_system(path, list(range(8 * shards)), config, groups=None)).path)
    return made


def of_every_shard(folder, slice_=1):
    return [folder.table.members(shard, slice_)[0] for shard in range(folder.config.num_shards)]


def interrupted(folder):
    delete_and_die(folder, of_every_shard(folder))
    return folder.path


def deleted_elsewhere(folder):
    other = open_folder(folder.path)
    apply(other, of_every_shard(other))
    return folder


OPERATIONS = {
    "open to look": (lambda folder: folder.path, lambda path: open_folder(path, read_only=True)),
    "open to write": (lambda folder: folder.path, open_folder),
    "finish a removal": (interrupted, open_folder),
    "follow": (deleted_elsewhere, lambda folder: folder.refresh()),
    "look for news": (lambda folder: folder, lambda folder: folder.refresh_stages()),
    "status": (lambda folder: folder, system_status),
    "preview": (lambda folder: folder, lambda folder: preview(folder, of_every_shard(folder))),
    "unlearn one": (lambda folder: folder, lambda folder: apply(folder, of_every_shard(folder)[:1])),
    "unlearn in every shard": (lambda folder: folder, lambda folder: apply(folder, of_every_shard(folder))),
    "check": (lambda folder: folder.path, inspect),
    "purge": (interrupted, lambda path: take_inventory(path, dataset_caches=[])),
    "receipts": (lambda folder: deleted_elsewhere(folder).path, Receipts.read),
    "copy": (lambda folder: folder, lambda folder: folder.copy_to(folder.path.parent / "copy")),
    "diagram": (lambda folder: folder, lambda folder: render_diagram(folder.plan, folder.valid_stages)),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_twice_as_many_stages_ask_for_no_more_than_twice_as_much(systems, operation, tmp_path):
    prepare, run = OPERATIONS[operation]

    def calls_on(system, name):
        copy = tmp_path / name / "system"
        shutil.copytree(system, copy)
        return calls_of(run, prepare(open_folder(copy)))

    # What is imported or compiled at the first call is no matter of size.
    calls_on(systems[0], "first")
    few, more, many = (calls_on(system, f"{shards}") for shards, system in zip(SHARDS, systems))
    assert few < more < many
    # Whatever it takes where there is nothing, falls out of the differences.
    assert many - more <= 2.05 * (more - few), (few, more, many)


def test_rules_for_large_files_are_read_once_however_many_files_are_asked_for():
    rules = {".gitattributes": "".join(f"*.kind-{number} -filter\n" for number in range(20)) + "*.bin filter=lfs"}

    def ask(number):
        for file in range(number):
            assert state_of("filter", f"stages/shard-0/{file}/adapter.bin", rules) == "lfs"

    ask(1)
    few, more, many = (calls_of(ask, number) for number in (1, 2, 50))
    # Nothing but a match for each rule and file: to compile one pattern takes a hundred calls.
    assert many - few == 49 * (more - few) and more - few < 30 * len(rules[".gitattributes"].splitlines())
