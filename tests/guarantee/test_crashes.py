"""Whatever dies, and whenever: a deletion that was acknowledged is in force, and nothing else is lost or left (E4)."""

import errno
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from support.crashes import Crash, Disk, Faults, Recording, crashes, plant, tree_of
from support.folders import (
    NAMES,
    add,
    add_checkpoint,
    apply,
    delete_and_die,
    gate_of,
    gate_says,
    gate_that_never_had,
    grow,
    new_system,
    own_surroundings,
    request_later,
    stages_on_disk,
    stored_gate,
)
from support.insides import routing_of, wait_for_cleaner
from support.receipts import OUR_KEY, public

from hf_s3t import S3TConfig
from hf_s3t.errors import FolderError
from hf_s3t.folder.erasure_requests_file import ErasureBook
from hf_s3t.folder.layout import (
    ADAPTER_FILE,
    ADDITION_FILE,
    ERASURES_FILE,
    GATE_FILE,
    LEDGER_FILE,
    PENDING_FILE,
    SIGNATURES_FILE,
    TABLE_FILE,
)
from hf_s3t.folder.opening import ReadOnlyFolder
from hf_s3t.folder.signatures_file import Signatures
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.erasures import record_erasure, state_of
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.pending import PendingRequests, apply_pending
from hf_s3t.plan import StageKey
from hf_s3t.records.request import DeletionRequest
from hf_s3t.signing.keys import SIGNING_VARIABLE
from hf_s3t.signing.verification import verify


CONFIG = S3TConfig(num_shards=2, num_slices=2, keep_idle=True, seed=1)
GATED = replace(CONFIG, gate="terms")
EARLIER = NAMES[:1]


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    with own_surroundings(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture
def tmp_path(tmp_path):
    """In memory, where there is room in it: hundreds of folders are written and removed for what a crash may leave."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK) or shutil.disk_usage(memory).free < 2**30:
        yield tmp_path
    else:
        with tempfile.TemporaryDirectory(dir=memory) as folder:
            yield Path(folder)


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A system with every stage and an empty ledger, not to be changed."""
    path = tmp_path_factory.mktemp("first") / "system"
    grow(new_system(path, NAMES, CONFIG, None))
    return path


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A system with every stage, an empty ledger and a gate; not to be changed."""
    path = tmp_path_factory.mktemp("gated") / "system"
    grow(new_system(path, NAMES, GATED, None))
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
        if folder.has_gate:
            assert stored_gate(folder) == gate_that_never_had(folder) == gate_says(folder.load_gate()), why
        if in_force:
            assert not [n for n, data in found.items() if any(v.encode() in (data or b"") for v in self.victims)], why
        assert folder.valid_stages == set(folder.stages), why
        for key in folder.stages:
            folder.adapter_path(key)
        return in_force


class Signed(Outcome):
    """The same where lines are signed: what is whole signs a line that is there, and nothing else is left."""

    def __init__(self, start, victims, whole):
        super().__init__(start, victims, whole)
        del self.after[SIGNATURES_FILE]

    def check(self, path, acknowledged: bool, why="") -> bool:
        found, hashes = Signatures.read(path), SystemFolder(path).ledger.hashes
        assert not found.damaged and set(found.of_line) <= set(hashes), why
        for envelope, statement in (one for signed in found.of_line.values() for one in signed):
            assert verify(envelope.to_json(), public()) == statement, why
        assert found.of_line or not acknowledged, f"what was acknowledged is not signed {why}"
        (path / SIGNATURES_FILE).unlink(missing_ok=True)
        return super().check(path, acknowledged, why)


def names_in(path) -> list[str]:
    return sorted(pq.read_table(Path(path) / TABLE_FILE).column("id").to_pylist())


def parts(tree, name) -> dict:
    return {n: data for n, data in tree.items() if n.split("/")[0] == name and (data is not None or n.count("/") > 1)}


def left_by(crashed, folder, step=1) -> Iterator[tuple[Crash, Path]]:
    """The crashes, or every third, say; each with a folder as it left it, which is gone when the next one comes."""
    for number, crash in enumerate(islice(crashed, None, None, step)):
        path = plant(crash.tree, folder / "crashed" / str(number))
        yield crash, path
        shutil.rmtree(path)


def sweep(recording, outcome, tmp_path, disk=None, step=1) -> set[bool]:
    found = set()
    for crash, path in left_by(crashes(recording, disk), tmp_path, step):
        found.add(outcome.check(path, "acknowledged" in crash.told, str(crash)))
    return found


# Deleting


def delete(path, mark, victims) -> None:
    apply(SystemFolder(path), victims)
    mark("acknowledged")


# Every crash, or a part of them that takes less time.
EVERY = pytest.mark.parametrize("step", [3, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])


@pytest.mark.parametrize("start", ["first", "gated", pytest.param("later", marks=pytest.mark.slow)])
def test_after_a_crash_at_any_moment_of_a_deletion_it_is_in_force_or_never_was(start, request, tmp_path):
    start = request.getfixturevalue(start)
    victims = victims_of(start)
    recording = record(start, tmp_path / "recorded", partial(delete, victims=victims))
    synced = [step.name for step in recording.steps if step.kind == "sync"]
    assert synced[0] == LEDGER_FILE and len(synced) <= 4 + 2 * (start / GATE_FILE).exists(), "unlearning is to be fast"
    assert sweep(recording, Outcome(start, victims, tmp_path / "whole"), tmp_path) == {False, True}


@EVERY
def test_with_a_key_a_crash_leaves_a_signature_or_none(first, tmp_path, monkeypatch, step):
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    victims = victims_of(first)
    recording = record(first, tmp_path / "recorded", partial(delete, victims=victims))
    synced = [step.name for step in recording.steps if step.kind == "sync"]
    assert synced[0] == LEDGER_FILE and SIGNATURES_FILE in synced
    assert sweep(recording, Signed(first, victims, tmp_path / "whole"), tmp_path, step=step) == {False, True}


def die_and_try_again(start, tmp_path, kinds, step, limit=100) -> None:
    """A process dies with nothing lost but what it had not done; the next one deletes the same; the machine dies."""
    victims = victims_of(start)
    outcome = Outcome(start, victims, tmp_path / "whole")
    recording = record(start, tmp_path / "recorded", partial(delete, victims=victims))
    disk = Disk(recording.start)
    for moment, done in enumerate(recording.steps):
        if done.kind in kinds:
            (_, tree), *_ = disk.crashes(random.Random(0), 0)
            again = plant(tree, tmp_path / "again" / str(moment))
            second = record(again, tmp_path / "second" / str(moment), partial(delete, victims=victims))
            sweep(second, outcome, tmp_path, disk, step)
            limit -= 1
            if not limit:
                return
        disk.do(done)


@EVERY
def test_what_a_dead_process_left_unsynced_is_synced_before_it_is_built_upon(first, tmp_path, step):
    # First the line in the ledger, then that stages were renamed, which the next process removes.
    die_and_try_again(first, tmp_path, ("sync",), step, limit=2)


@pytest.mark.slow
def test_any_moment_at_which_a_process_dies_may_be_followed_by_any_at_which_the_machine_does(later, tmp_path):
    die_and_try_again(later, tmp_path, ("sync", "move"), 2)


def test_an_object_that_is_open_syncs_what_it_reads_before_it_says_that_an_id_is_gone(first, tmp_path):
    """The line of a process that died before syncing it is found by one that had loaded the folder before."""
    victims = victims_of(first)
    shutil.copytree(first, tmp_path / "system")
    waiting = SystemFolder(tmp_path / "system")
    recording = Recording(tmp_path / "system")
    with recording.running():
        delete_and_die(SystemFolder(tmp_path / "system"), victims)
        # As if that one had died a moment earlier.
        recording.steps = [step for step in recording.steps if step.kind != "sync"]
        waiting.refresh_ledger()
        assert all(map(waiting.is_deleted, victims))
        recording.mark("acknowledged")
    sweep(recording, Outcome(first, victims, tmp_path / "whole"), tmp_path)


# Stages, tables, systems


def write_one(path, mark) -> None:
    grow(SystemFolder(path), limit=1)
    mark("acknowledged")


@pytest.mark.parametrize("grown", [0, 3])
def test_after_a_crash_at_any_moment_of_its_writing_a_stage_is_complete_or_absent(tmp_path, grown):
    """The first stage of a shard makes the shard's folder."""
    start = tmp_path / "start"
    grow(new_system(start, NAMES, CONFIG, None), limit=grown)
    key = SystemFolder(start).plan.missing(SystemFolder(start).valid_stages)[0]
    recording, found = record(start, tmp_path / "recorded", write_one), set()
    for crash, path in left_by(crashes(recording), tmp_path):
        folder = SystemFolder(path)
        found.add(key in folder.valid_stages)
        assert key in folder.valid_stages or "acknowledged" not in crash.told, crash
        expected = tree_of(recording.root if key in folder.valid_stages else start)
        assert files(tree_of(path)) == files(expected), crash
        assert grow(folder).valid_stages == set(folder.plan.stages())
    assert found == {False, True}


def files(tree) -> dict:
    return {name: data for name, data in tree.items() if data is not None}


def test_a_stage_in_the_place_of_one_that_is_not_valid_is_written_whole_or_not_at_all(tmp_path, first):
    """Grown on another parent than the one it stands on now."""
    start = shutil.copytree(first, tmp_path / "start")
    folder = SystemFolder(start)
    key = next(key for key in folder.stages if key.depth == 2)
    others = {n: d for n, d in tree_of(start).items() if not f"{n}/".startswith(f"{key.path}/")}
    record_of = {**folder.stage_record(key), "below": "another"}
    folder.write_stage(key, record_of, lambda path: shutil.copytree(start / key.path, path, dirs_exist_ok=True))
    for crash, path in left_by(crashes(record(start, tmp_path / "recorded", write_one)), tmp_path):
        folder = SystemFolder(path)
        assert key in folder.valid_stages or "acknowledged" not in crash.told, crash
        assert {n: d for n, d in tree_of(path).items() if not f"{n}/".startswith(f"{key.path}/")} == others, crash
        assert grow(folder).valid_stages == set(folder.plan.stages())


def test_table_and_gate_are_old_or_new_ones_and_masked_in_any_case(gated, tmp_path):
    """A load that finishes what a deletion left undone, rows included."""
    victims = victims_of(gated)
    start = Path(shutil.copytree(gated, tmp_path / "start"))
    delete_and_die(SystemFolder(start), victims)
    recording = record(start, tmp_path / "recorded", lambda path, mark: SystemFolder(path))
    assert {TABLE_FILE, GATE_FILE} <= {step.target for step in recording.steps}
    assert sweep(recording, Outcome(gated, victims, tmp_path / "whole"), tmp_path) == {True}


def test_a_system_is_there_when_its_making_was_acknowledged_and_can_be_made_again_otherwise(tmp_path):
    root = tmp_path / "recorded"
    root.mkdir()
    recording, found = Recording(root), set()
    with recording.running():
        made = new_system(root / "system", NAMES, GATED, None)
        recording.mark("acknowledged")
    for crash, root in left_by(crashes(recording), tmp_path):
        path = root / "system"
        exists = SystemFolder.exists(path)
        found.add(exists)
        assert exists or "acknowledged" not in crash.told, crash
        folder = SystemFolder(path) if exists else new_system(path, NAMES, GATED, None)
        assert gate_says(folder.load_gate()) == gate_says(gate_of(made.table, folder.key)), crash
        assert set(folder.table.rows) == set(made.table.rows) and grow(folder).valid_stages, crash
    assert found == {False, True}


def test_a_copy_has_every_deletion_or_is_no_system(gated, tmp_path):
    victims = victims_of(gated)
    start = Path(shutil.copytree(gated, tmp_path / "start"))
    folder = SystemFolder(start)
    # The table still has the rows: only the ledger tells that they are deleted.
    delete_and_die(folder, victims)
    (tmp_path / "copies").mkdir()
    recording = Recording(tmp_path / "copies")
    with recording.running():
        folder.copy_to(tmp_path / "copies" / "copy")
        recording.mark("acknowledged")
    outcome = Outcome(gated, victims, tmp_path / "whole")
    found = list(crashes(recording))
    systems = [crash for crash in found if "copy/s3t_config.json" in crash.tree]
    assert systems and all(crash in systems or "acknowledged" not in crash.told for crash in found)
    for crash, root in left_by(systems, tmp_path):
        assert outcome.check(root / "copy", True, str(crash))


def put(path, mark, made) -> None:
    SystemFolder(path).put_gate(made, {"gate": "terms"})
    mark("acknowledged")


def test_a_gate_that_is_made_later_is_there_and_used_or_not_used_yet(first, tmp_path):
    folder = SystemFolder(first)
    made = gate_of(folder.table, folder.key)
    recording, found = record(first, tmp_path / "recorded", partial(put, made=made)), set()
    for crash, path in left_by(crashes(recording), tmp_path):
        folder = SystemFolder(path)
        found.add(folder.config.gate)
        assert folder.config.gate or "acknowledged" not in crash.told, crash
        # Its settings are recorded last.
        if folder.config.gate or folder.has_gate:
            assert gate_says(folder.load_gate()) == gate_says(made), crash
        assert not inspect(path).problems, crash
    assert found == {None, "terms"}


# Rows that come


NEWCOMERS = {"new-1@example.org": (0, 0), "new-2@example.org": (0, 1), "new-3@example.org": (0, 1)}
NEW_SHARD = {f"shard-{number}@example.org": (2, number % 2) for number in range(4)}


def bring(path, mark, places, replaced=()) -> None:
    add(SystemFolder(path), places, replaced)
    mark("acknowledged")


def says(path) -> tuple:
    """All that a folder says that is opened to write."""
    folder = SystemFolder(path)
    rows = {one: folder.table.rows[one] for one in folder.table.rows}
    digests = [folder.table.slice_digest(*place) for place in folder.table.sizes_of_slices]
    return rows, digests, folder.config, folder.valid_stages, folder.current_stages, len(folder.ledger.lines)


@EVERY
@pytest.mark.parametrize("places", [NEWCOMERS, NEW_SHARD], ids=["slices", "new shard"])
@pytest.mark.parametrize("start", ["first", "gated", pytest.param("later", marks=pytest.mark.slow)])
def test_after_a_crash_at_any_moment_of_an_addition_the_rows_are_in_or_never_came(
    start, request, tmp_path, places, step
):
    start = request.getfixturevalue(start)
    recording = record(start, tmp_path / "recorded", partial(bring, places=places))
    synced = [step.name for step in recording.steps if step.kind == "sync" and step.name]
    assert synced.index(LEDGER_FILE) <= 2, "the rows are synced, then the line, before anything else changes"
    before, after = says(shutil.copytree(start, tmp_path / "before")), says(recording.root)
    assert len(after[0]) == len(before[0]) + len(places) and after[3] >= before[3]
    found = set()
    for crash, path in left_by(crashes(recording), tmp_path, step):
        reader = ReadOnlyFolder(path)
        seen, stages = set(reader.table.rows), reader.valid_stages
        said = says(path)
        assert said in (before, after), crash
        assert said == after or "acknowledged" not in crash.told, crash
        # Who only looks sees the same.
        assert seen == set(said[0]) and stages == said[3], crash
        assert not (path / ADDITION_FILE).exists() and not inspect(path).problems, crash
        found.add(said == after)
    assert found == {False, True}


@EVERY
def test_after_a_crash_at_any_moment_a_replaced_row_is_the_old_or_the_new_one(first, tmp_path, step):
    victims = victims_of(first)
    places = dict.fromkeys(victims, (0, 1))
    recording = record(first, tmp_path / "recorded", partial(bring, places=places, replaced=victims))
    before, after = says(shutil.copytree(first, tmp_path / "before")), says(recording.root)
    assert before[0].keys() == after[0].keys() and before[0] != after[0] and after[3] < before[3]
    found = set()
    for crash, path in left_by(crashes(recording), tmp_path, step):
        said = says(path)
        assert not any(map(SystemFolder(path).is_deleted, victims)), crash
        assert said in (before, after) and (said == after or "acknowledged" not in crash.told), crash
        assert not inspect(path).problems, crash
        found.add(said == after)
    assert found == {False, True}


def test_a_deletion_after_an_addition_that_died_unfinished_has_both_in_force(first, tmp_path):
    victims = victims_of(first)
    recording = record(first, tmp_path / "recorded", partial(bring, places=NEWCOMERS))
    disk, found = Disk(recording.start), set()
    for moment, step in enumerate(recording.steps):
        (_, tree), *_ = disk.crashes(random.Random(0), 0)
        path = plant(tree, tmp_path / "again" / str(moment))
        apply(SystemFolder(path), victims)
        folder = SystemFolder(path)
        assert not set(victims) & set(folder.table.rows)
        found.add(NEWCOMERS.keys() <= set(folder.table.rows))
        assert grow(folder).current_stages == set(folder.plan.stages()) and not inspect(path).problems
        disk.do(step)
    assert found == {False, True}


def take_in(path, mark, ledger, rows) -> None:
    SystemFolder(path).merge_ledger(ledger, rows)
    mark("acknowledged")


@EVERY
def test_after_a_crash_at_any_moment_of_a_merge_the_rows_of_another_copy_are_in_or_never_came(first, tmp_path, step):
    """Both copies grew; the other deleted one of its rows, and one that both have."""
    start = shutil.copytree(first, tmp_path / "start")
    other = SystemFolder(shutil.copytree(start, tmp_path / "other"))
    add(add(other, NEWCOMERS), NEW_SHARD | {"newer@example.org": (1, 0)})
    gone = [*victims_of(start)[:1], "new-1@example.org"]
    apply(other, gone)
    add(SystemFolder(start), {"own@example.org": (1, 1)})
    recording = record(start, tmp_path / "recorded", partial(take_in, ledger=other.ledger, rows=other.table))
    before, after = says(shutil.copytree(start, tmp_path / "before")), says(recording.root)
    assert after[0].keys() == {*other.table.rows, "own@example.org"}
    found = set()
    for crash, path in left_by(crashes(recording), tmp_path, step):
        said = says(path)
        assert said in (before, after) and (said == after or "acknowledged" not in crash.told), crash
        assert not inspect(path).problems, crash
        found.add(said == after)
    assert found == {False, True}


# Requests that wait


def ask(path, mark, victims) -> None:
    for number, victim in enumerate(victims):
        folder = SystemFolder(path)
        with folder.lock():
            PendingRequests(folder).add([victim], [], None)
        mark(f"asked {number}")


def assert_requests_known(path, victims, crash) -> None:
    folder = SystemFolder(path)
    waiting = PendingRequests(folder).ids()
    for number, victim in enumerate(victims):
        if f"asked {number}" in crash.told:
            assert victim in waiting or folder.is_deleted(victim), f"a request is lost {crash}"
    if "applied" in crash.told:
        assert all(map(folder.is_deleted, victims)), crash
    assert set(waiting) <= set(victims), crash


def test_no_request_is_lost_whose_recording_was_acknowledged(first, tmp_path):
    victims = victims_of(first)
    recording = record(first, tmp_path / "recorded", partial(ask, victims=victims))
    for crash, path in left_by(crashes(recording, count=10), tmp_path):
        assert_requests_known(path, victims, crash)


def test_no_request_is_lost_before_or_after_what_waits_was_applied_without_a_model(first, tmp_path):
    victims = victims_of(first)

    def act(path, mark):
        ask(path, mark, victims)
        apply_pending(SystemFolder(path))
        mark("applied")

    recording = record(first, tmp_path / "recorded", act)
    for crash, path in left_by(crashes(recording, count=3), tmp_path):
        assert_requests_known(path, victims, crash)


def test_a_request_beside_one_of_a_process_that_died_unsynced_is_not_lost_with_it(first, tmp_path):
    one, other = victims_of(first)
    begun = record(first, tmp_path / "begun", partial(ask, victims=[one]))
    disk = Disk(begun.start)
    for moment, step in enumerate(begun.steps):
        (_, tree), *_ = disk.crashes(random.Random(0), 0)
        again = plant(tree, tmp_path / "again" / str(moment))
        recording = record(again, tmp_path / "second" / str(moment), partial(ask, victims=[other]))
        for crash, path in left_by(crashes(recording, disk), tmp_path):
            assert other in PendingRequests(SystemFolder(path)).ids() or "asked 0" not in crash.told, crash
        disk.do(step)


# Requests to erase, as a server takes them


def erase(path, mark, victims) -> None:
    """Take a request, as a server does: if it is one that was taken before, go on with it."""
    folder = SystemFolder(path)
    book = ErasureBook(folder)
    with book.taking():
        erasure = book.of_key("7f3") or record_erasure(book, DeletionRequest(victims), "b0d7", "7f3")
        mark("recorded")
        if erasure.report is None:
            report = apply(folder, victims)
            erasure = book.note_done(erasure.id, {"deleted": report.deleted + report.already_deleted})
    mark("acknowledged")


class ErasureOutcome(Outcome):
    """The same of a request to erase, which stands in a book too."""

    def check(self, path, acknowledged: bool, why="") -> bool:
        tree = tree_of(path)
        in_force = super().check(path, acknowledged, why)
        assert tree_of(path).get(ERASURES_FILE) == tree.get(ERASURES_FILE), f"a load changed the book {why}"
        known = ErasureBook(SystemFolder(path)).latest()
        assert len(known) <= 1 and (known or not in_force), f"deleted, and the request is not known {why}"
        states = [state_of(SystemFolder(path), one) for one in known]
        assert states == ["done" if in_force else "interrupted"] * len(known), why
        assert not inspect(path).problems, why
        # Whoever asked asks again: it is the same request, and it is in force.
        again = []
        erase(path, again.append, self.victims)
        book = ErasureBook(SystemFolder(path))
        assert [one.id for one in book.latest()] == [one.id for one in known] or not known, why
        assert book.latest()[0].report == {"deleted": len(self.victims)} and again[-1] == "acknowledged", why
        assert tree_of(path)[LEDGER_FILE].count(b"\n") == 1, f"a repeated request deleted again {why}"
        return in_force


@EVERY
def test_a_request_to_erase_that_was_acknowledged_is_in_force_and_a_repeated_one_goes_on(first, tmp_path, step):
    victims = victims_of(first)
    outcome = ErasureOutcome(first, victims, tmp_path / "whole")
    outcome.before, outcome.after = ({**tree, ERASURES_FILE: b""} for tree in (outcome.before, outcome.after))
    recording, found = record(first, tmp_path / "recorded", partial(erase, victims=victims)), set()
    for crash, path in left_by(crashes(recording), tmp_path, step):
        if "recorded" not in crash.told and ERASURES_FILE not in crash.tree:
            (path / ERASURES_FILE).touch(0o600)
        found.add(outcome.check(path, "acknowledged" in crash.told, str(crash)))
        if "recorded" in crash.told:
            assert ErasureBook(SystemFolder(path)).of_key("7f3") is not None, crash
    assert found == {False, True}


def wait_to_be_erased(path, mark, victims) -> None:
    folder = SystemFolder(path)
    book = ErasureBook(folder)
    with book.taking():
        erasure = book.of_key("7f3") or record_erasure(book, DeletionRequest(victims), "b0d7", "7f3", 600.0)
        if not erasure.waits:
            request_later(folder, victims, max_delay=600.0)
            book.note_waiting(erasure.id)
    mark("acknowledged")


def test_a_request_to_erase_that_waits_by_its_answer_waits(first, tmp_path):
    victims = victims_of(first)
    recording, found = record(first, tmp_path / "recorded", partial(wait_to_be_erased, victims=victims)), set()
    for crash, path in left_by(crashes(recording), tmp_path):
        folder = SystemFolder(path)
        states = [state_of(folder, one) for one in ErasureBook(folder).latest()]
        assert states == ["waiting"] or "acknowledged" not in crash.told, crash
        found.update(states or ["nothing"])
        wait_to_be_erased(path, lambda _: None, victims)
        (erasure,) = ErasureBook(folder).latest()
        assert state_of(folder, erasure) == "waiting" and set(PendingRequests(folder).ids()) == set(victims), crash
        apply_pending(folder)
        assert state_of(folder, erasure) == "done" and not inspect(path).problems, crash
    assert found == {"nothing", "interrupted", "waiting"}


# With a model


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a model with every stage, not to be changed."""
    from support.tiny import lm_rows, make_trainer, plant_stages, s3t_config, tiny_llama

    path = tmp_path_factory.mktemp("trained") / "system"
    config = s3t_config(num_shards=2, num_slices=2)
    rows = [{**row, "id": f"someone-{n:02d}@example.org"} for n, row in enumerate(lm_rows(16))]
    trainer = make_trainer(path, tiny_llama(layers=2), rows, config=config)
    plant_stages(trainer)
    return path


def load(path):
    from support.tiny import tiny_llama

    from hf_s3t import S3TModel

    return S3TModel.from_pretrained(path, base_model=tiny_llama(layers=2))


def recorded_on_model(start, path, act) -> Recording:
    model = load(shutil.copytree(start, path))
    recording = Recording(path)
    with recording.running():
        act(model, recording.mark)
        wait_for_cleaner(model)
    return recording


@EVERY
def test_after_a_crash_at_any_moment_of_unlearn_it_is_in_force_or_never_was(trained, tmp_path, step):
    victims = victims_of(trained)

    def act(model, mark):
        model.unlearn(victims)
        mark("acknowledged")

    recording = recorded_on_model(trained, tmp_path / "recorded", act)
    told = [step.name if step.kind == "mark" else step.kind for step in recording.steps]
    # The table is written by a thread that `unlearn` has started.
    assert told[: told.index("acknowledged")].count("sync") <= 4, "unlearning is to be fast"
    outcome = Outcome(trained, victims, tmp_path / "whole")
    assert sweep(recording, outcome, tmp_path, step=step) == {False, True}
    for crash, path in left_by(crashes(recording, count=0), tmp_path, 15):
        model = load(path)
        assert model.check() == []
        in_force = outcome.check(model.folder.path, "acknowledged" in crash.told, str(crash))
        assert set(model.stack.loaded) <= set(map(StageKey.from_path, stage_paths(outcome, in_force)))


def stage_paths(outcome, in_force) -> list[str]:
    tree = outcome.after if in_force else outcome.before
    return [name for name in tree if name.startswith("stages/") and name.count("/") == 2]


@EVERY
def test_a_request_that_waits_is_not_lost_before_or_after_it_was_applied(trained, tmp_path, step):
    victims = victims_of(trained)

    def act(model, mark):
        for number, victim in enumerate(victims):
            model.unlearn_later([victim])
            mark(f"asked {number}")
        model.apply_pending()
        mark("applied")

    recording = recorded_on_model(trained, tmp_path / "recorded", act)
    for crash, path in left_by(crashes(recording), tmp_path, step):
        assert_requests_known(path, victims, crash)


# A disk that is full or may not be written


def apply_despite(faults, folder, victims) -> Exception | None:
    try:
        with faults.running():
            apply(folder, victims)
    except FolderError as error:
        return error
    return None


@pytest.mark.parametrize("once", [True, False], ids=["for a moment", "for long"])
def test_a_full_disk_at_any_moment_of_a_deletion_leaves_it_undone_or_in_force(gated, tmp_path, once):
    victims = victims_of(gated)
    outcome = Outcome(gated, victims, tmp_path / "whole")
    found = set()
    for after in range(200):
        path = Path(shutil.copytree(gated, tmp_path / str(after)))
        folder = SystemFolder(path)
        rows, stages = set(folder.table.rows), set(folder.stages)
        error = apply_despite(faults := Faults(after, once=once), folder, victims)
        if not faults.happened:
            break
        assert error is None or "No space left on device" in str(error), after
        recorded = (path / LEDGER_FILE).read_bytes().endswith(b"\n")
        found.add(recorded)
        assert recorded or error is not None
        if not recorded:
            assert (set(folder.table.rows), set(folder.stages)) == (rows, stages)
            assert parts(tree_of(path), "stages") == parts(outcome.before, "stages")
        assert outcome.check(Path(shutil.copytree(path, tmp_path / "loaded" / str(after))), recorded) == recorded
        # The same object, once there is room.
        assert apply(folder, victims).deleted == (0 if folder.ledger.num_deletions == 1 and recorded else len(victims))
        assert outcome.check(path, True)
    assert found == {False, True} and not faults.happened and after > 10


def test_a_full_disk_at_any_moment_of_unlearn_leaves_a_model_that_finishes_it_when_called_again(trained, tmp_path):
    victims = victims_of(trained)
    outcome = Outcome(trained, victims, tmp_path / "whole")
    for after in (0, 1, 2, 3, 4, 5, 7, 10, 14, 18):
        model = load(shutil.copytree(trained, tmp_path / str(after)))
        routing = routing_of(model)
        path = model.folder.path
        try:
            with Faults(after).running():
                model.unlearn(victims)
                wait_for_cleaner(model)
        except FolderError as error:
            assert "No space left on device" in str(error)
        if not (path / LEDGER_FILE).read_bytes().endswith(b"\n"):
            assert routing_of(model) is routing and outcome.before == tree_of(path) | torn(path)
        model.unlearn(victims)
        wait_for_cleaner(model)
        gone = set(stage_paths(outcome, False)) - set(stage_paths(outcome, True))
        assert gone and not gone & {key.path for key in model.stack.loaded}
        assert names_in(path) == outcome.rows[True], after
        assert outcome.check(path, True, after)


def torn(path) -> dict:
    """A line that was not written to its end stands for none."""
    assert not (path / LEDGER_FILE).read_bytes().count(b"\n")
    return {LEDGER_FILE: b""}


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES], ids=["read-only", "permission denied"])
def test_a_folder_that_cannot_be_written_is_served_and_refuses_to_forget(later, tmp_path, number):
    path = Path(shutil.copytree(later, tmp_path / "system"))
    victims = victims_of(path)
    before = tree_of(path)
    with Faults(0, number).running() as faults:
        folder = SystemFolder(path)
        assert folder.valid_stages == set(folder.plan.stages()) and faults.happened == 0
        with pytest.raises(FolderError, match=rf"cannot be changed .*{os.strerror(number)}.* Nothing was. Make it"):
            apply(folder, victims)
        with pytest.raises(FolderError, match=r"cannot be changed"), folder.lock():
            PendingRequests(folder).add(victims, [], None)
    assert tree_of(path) == before and not any(map(folder.is_deleted, victims))
    assert set(victims) <= set(folder.table.rows)
    # Who died after the line left the removal to whoever may write; until then what is valid is served.
    delete_and_die(SystemFolder(path), victims)
    died = tree_of(path)
    with Faults(0, number).running():
        reader = SystemFolder(path)
        assert set(reader.table.rows).isdisjoint(victims) and reader.condemned_stages()
        assert reader.valid_stages.isdisjoint(reader.condemned_stages()) and reader.valid_stages
        reader.refresh()
    assert tree_of(path) == died
    assert set(SystemFolder(path).table.rows).isdisjoint(victims)
    assert not {str(key) for key in reader.condemned_stages()} & stages_on_disk(path)


def test_a_request_that_found_no_room_was_not_recorded_and_can_be_made_again(first, tmp_path):
    victims = victims_of(first)
    for after in range(2, 20):
        folder = SystemFolder(shutil.copytree(first, tmp_path / str(after)))
        try:
            with Faults(after).running() as faults, folder.lock():
                PendingRequests(folder).add(victims[:1], [], None)
        except FolderError as error:
            assert "No space left on device" in str(error)
        with folder.lock():
            PendingRequests(folder).add(victims[1:], [], None)
        waiting = PendingRequests(SystemFolder(folder.path)).ids()
        assert set(victims[1:]) <= set(waiting) <= set(victims)
        assert faults.happened or len(waiting) == len(victims)
        if not faults.happened:
            break
    assert not faults.happened


# Damage that a model is loaded on


def cut_short(path, one, other):
    data = (path / one / ADAPTER_FILE).read_bytes()
    (path / one / ADAPTER_FILE).write_bytes(data[: len(data) // 2])


def swapped_files(path, one, other):
    first, second = (path / stage / ADAPTER_FILE for stage in (one, other))
    data = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(data)


def altered_by_a_byte(path, one, other):
    data = bytearray((path / one / ADAPTER_FILE).read_bytes())
    data[-5] ^= 1
    (path / one / ADAPTER_FILE).write_bytes(data)


def swapped_folders(path, one, other):
    (path / one).rename(path / "aside")
    (path / other).rename(path / one)
    (path / "aside").rename(path / other)


@pytest.mark.parametrize("damage", [cut_short, swapped_files, altered_by_a_byte, swapped_folders])
def test_a_model_is_not_loaded_on_a_damaged_stage(trained, tmp_path, damage):
    path = Path(shutil.copytree(trained, tmp_path / "system"))
    folder = SystemFolder(path)
    one, other = [key.path for key in folder.stages if key.depth == 1][:2]
    damage(path, one, other)
    with pytest.raises(FolderError, match=r"was altered or cut short|were swapped or renamed"):
        load(path)


def test_an_old_stage_file_put_into_a_stage_that_was_grown_again_is_refused(later, first, tmp_path):
    """And a whole old folder is removed: `test_old_copies_put_back_after_a_deletion_are_removed_at_load`."""
    path = Path(shutil.copytree(later, tmp_path / "system"))
    folder = SystemFolder(path)
    key = next(k for k in folder.stages if (first / k.path / ADAPTER_FILE).read_bytes() != adapter(path, k))
    shutil.copy(first / key.path / ADAPTER_FILE, path / key.path / ADAPTER_FILE)
    with pytest.raises(FolderError, match="was altered or cut short"):
        SystemFolder(path).adapter_path(key)


def adapter(path, key) -> bytes:
    return (path / key.path / ADAPTER_FILE).read_bytes()


def test_a_corrupt_line_in_the_middle_of_a_ledger_is_refused_and_nothing_is_changed(later, tmp_path):
    path = Path(shutil.copytree(later, tmp_path / "system"))
    for victim in NAMES[1:3]:
        apply(SystemFolder(path), [victim])
    lines = (path / LEDGER_FILE).read_bytes().splitlines(keepends=True)
    for middle in (b"\n", b"\0" * (len(lines[1]) - 1) + b"\n", lines[1][: len(lines[1]) // 2] + b"\n", lines[0], b""):
        (path / LEDGER_FILE).write_bytes(b"".join([lines[0], middle, *lines[2:]]))
        before = tree_of(path)
        with pytest.raises(FolderError, match=LEDGER_FILE):
            SystemFolder(path)
        assert tree_of(path) == before


# Processes that are killed


CHILD = """
import random, sys
from support.folders import apply, grow
from hf_s3t.folder.system import SystemFolder

folder = grow(SystemFolder(sys.argv[1]))
print("ready", flush=True)
while len(folder.table):
    for victim in random.sample(sorted(folder.table.rows), 3):
        print("begins", victim, flush=True)
        apply(folder, [victim])
        print("done", victim, flush=True)
    grow(folder)
"""


@pytest.mark.slow
def test_no_acknowledged_deletion_is_lost_by_a_process_that_is_killed(tmp_path):
    names = [f"someone-{number:03d}@example.org" for number in range(600)]
    path = tmp_path / "system"
    new_system(path, names, CONFIG, None)
    begun, done, chance = set(), set(), random.Random(0)
    for number in range(10):
        output = tmp_path / f"output {number}"
        with open(output, "w") as file:
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD, str(path)], stdout=file, env={**os.environ, "PYTHONPATH": PATHS}
            )
        try:
            wanted = chance.randrange(4)
            while "ready" not in output.read_text() or output.read_text().count("done") < wanted:
                assert child.poll() is None, "the child failed"
                time.sleep(0.01)
            time.sleep(chance.random() * 0.1)
        finally:
            child.kill()
            child.wait()
        for line in output.read_text().splitlines(keepends=True):
            what, _, name = line.partition(" ")
            if name.endswith("\n"):
                (done if what == "done" else begun).add(name.strip())
        folder = SystemFolder(path)
        gone = {name for name in names if folder.is_deleted(name)}
        assert done <= gone <= begun | done and len(gone - done) <= number + 1
        assert set(folder.table.rows) == set(names) - gone == set(names_in(path))
        assert folder.valid_stages == set(folder.stages)
        for key in folder.stages:
            folder.adapter_path(key)
        found = tree_of(path)
        assert not [n for n in found if ".tmp-" in n or ".gone-" in n]
        assert not [n for n, data in found.items() if any(name.encode() in (data or b"") for name in gone)]
    assert done, "none was killed while it deleted"


PATHS = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
