"""Claims: who has a stage in hand, what ends that, and that no clock of another machine is believed."""

import json
import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest
from support.crashes import Faults, Recording, crashes, plant, tree_of
from support.folders import add, apply, grow, new_system
from support.folders import plant as plant_stage

from hf_s3t import S3TConfig
from hf_s3t.errors import FolderError
from hf_s3t.folder.claims import LEASE, ClaimLostError, Claims, ClaimWatch
from hf_s3t.folder.processes import is_gone, this_process
from hf_s3t.folder.shared_growth import SharedGrowth, end_dead_claims
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.purge import purge, take_inventory
from hf_s3t.plan import Growth, Plan, StageKey


pytestmark = pytest.mark.usefixtures("surroundings")

FIRST, SECOND = StageKey(0, (0,)), StageKey(0, (0, 1))
SETS = S3TConfig(num_shards=2, num_slices=3, group_column="user", seed=1)


def take(folder, key=FIRST, lease=LEASE, **work):
    with folder.lock():
        return folder.claims.take(key, {"slices": folder.slice_digests(key), **work}, lease)


def of_another_machine(claim, **changes):
    """Have a claim be one of a process of which nothing can be asked."""
    head, _, beat = claim.path.read_bytes().partition(b"\n")
    said = {**json.loads(head), "machine": "another", **changes}
    claim.path.write_bytes(json.dumps(said).encode() + b"\n" + beat)


class Clock:
    now = 50.0

    def __call__(self):
        return self.now


# Taking


def test_a_stage_has_one_claim_and_is_free_when_that_has_ended(tmp_path):
    folder, other = new_system(tmp_path), SystemFolder(tmp_path)
    claim = take(folder)
    assert claim.is_held() and other.claims.keys() == [FIRST]
    assert take(other) is None and take(folder) is None
    elsewhere = take(other, StageKey(1, (0,)))
    assert elsewhere is not None and other.claims.keys() == [FIRST, StageKey(1, (0,))]
    claim.end()
    assert not claim.is_held() and claim.is_lost and take(other).token != claim.token


def test_in_a_plan_by_sets_a_set_is_claimed_in_whatever_order(tmp_path):
    published, by_sets = new_system(tmp_path / "published"), new_system(tmp_path / "sets", config=SETS)
    for folder, is_free in ((published, True), (by_sets, False)):
        assert take(folder, StageKey(0, (0, 1)))
        assert (take(folder, StageKey(0, (1, 0))) is not None) is is_free


def test_a_claim_says_who_has_it_and_how_it_works(tmp_path):
    folder = new_system(tmp_path)
    take(folder, recipe={"learning_rate": 1.0})
    (claim,) = folder.claims.look()
    assert claim.said["recipe"] == {"learning_rate": 1.0} and claim.said["slices"] == folder.slice_digests(FIRST)
    assert claim.holder == f"process {os.getpid()} on {this_process()['host']}" and claim.lease == LEASE


def test_only_the_thread_that_works_under_a_claim_would_wait_for_itself(tmp_path):
    folder = new_system(tmp_path)
    with take(folder).beating():
        assert folder.claims.look()[0].is_of_this_thread
    take(folder)
    assert not folder.claims.look()[0].is_of_this_thread


def test_two_claims_of_one_stage_show_that_the_lock_keeps_nobody_out(tmp_path):
    folder = new_system(tmp_path)
    claim = take(folder)
    # What another machine writes that does not see the lock.
    claim.path.with_name(f"{claim.path.name[:-16]}{'0' * 16}").write_bytes(claim.path.read_bytes())
    with pytest.raises(FolderError, match=r"shard-0/0 is claimed twice in .*without `nolock`.*Nothing was written"):
        claim.is_held()


# Ending


def test_a_process_of_this_machine_that_is_gone_is_known_at_once(tmp_path):
    folder = new_system(tmp_path)
    process = multiprocessing.get_context("fork").Process(target=_claim_and_die, args=(tmp_path,))
    process.start()
    deadline = time.monotonic() + 60
    while not folder.claims.keys() and time.monotonic() < deadline:
        time.sleep(0.01)
    # A zombie: nobody has waited for it yet.
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    (dead,) = ClaimWatch(folder.claims).dead()
    process.join()
    assert ClaimWatch(folder.claims).dead() == [dead] and is_gone(dead.said)


def _claim_and_die(path):
    take(SystemFolder(path))
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_number_that_another_process_has_by_now_is_not_that_process():
    mine = this_process()
    assert not is_gone(mine)
    assert is_gone({**mine, "started": mine["started"] - 100})
    # Nothing is known of processes elsewhere, nor of what somebody made up.
    assert not is_gone({**mine, "started": 0, "machine": "another"})
    assert not any(is_gone({**mine, "process": wrong}) for wrong in (None, True, "7"))
    assert is_gone({**mine, "process": 10**30})


@pytest.mark.parametrize("clock", [1.0, 1e9, -1e9], ids=["equal", "ahead", "behind"])
def test_a_claim_of_another_machine_lasts_as_long_as_it_changes_whatever_time_it_tells(clock, tmp_path):
    folder, now = new_system(tmp_path), Clock()
    claim = take(folder, lease=30.0)
    of_another_machine(claim, since=clock, started=clock)
    os.utime(claim.path, (abs(clock), abs(clock)))
    watch = ClaimWatch(folder.claims, now)
    for _ in range(5):
        now.now += 20
        claim.beat()
        assert watch.dead() == []
    # Its clock may go on, or stand: it is silent.
    now.now += 29
    os.utime(claim.path, (abs(clock) + 99, abs(clock) + 99))
    assert watch.dead() == [] and watch.look()[0][1] == 29
    now.now += 1
    assert [dead.key for dead in watch.dead()] == [FIRST]


def test_one_who_looks_for_the_first_time_waits_for_a_whole_lease(tmp_path):
    folder, now = new_system(tmp_path), Clock()
    of_another_machine(take(folder, lease=30.0))
    now.now += 1e6
    watch = ClaimWatch(folder.claims, now)
    assert watch.dead() == []
    now.now += 30
    assert watch.dead() != []


@pytest.mark.parametrize("data", [b"", b"\0" * 40, b"[1]\n", b'{"lease": 1e300}\n', b'{"lease": true, "host": []}\n'])
def test_a_claim_that_says_nothing_is_judged_by_its_silence(data, tmp_path):
    folder, now = new_system(tmp_path), Clock()
    take(folder).path.write_bytes(data)
    watch = ClaimWatch(folder.claims, now)
    assert watch.dead() == [] and take(folder) is None
    now.now += LEASE
    (dead,) = watch.dead()
    assert dead.holder and folder.claims.end(dead) and take(folder) is not None


def test_one_that_lives_after_all_keeps_its_claim(tmp_path):
    folder, now = new_system(tmp_path), Clock()
    claim = take(folder)
    watch = ClaimWatch(folder.claims, now)
    watch.look()
    now.now += LEASE
    (dead,) = watch.dead()
    claim.beat()
    assert not folder.claims.end(dead) and claim.is_held()


def test_signs_of_life_come_by_themselves_and_never_bring_a_claim_back(tmp_path):
    folder = new_system(tmp_path)
    with take(folder, lease=0.12).beating():
        before = folder.claims.look()[0].data
        deadline = time.monotonic() + 30
        while folder.claims.look()[0].data == before and time.monotonic() < deadline:
            time.sleep(0.005)
        assert folder.claims.look()[0].data != before
    assert folder.claims.keys() == []
    claim = take(folder)
    claim.path.unlink()
    claim.beat()
    assert claim.is_lost and folder.claims.keys() == []


def test_a_full_disk_loses_no_claim(tmp_path):
    folder = new_system(tmp_path)
    claim = take(folder)
    with Faults(0).running():
        claim.beat()
    assert not claim.is_lost and claim.is_held()


# What a claim that was lost keeps from happening


def fill(path):
    raise AssertionError("it was asked for a file")


def test_who_lost_its_claim_writes_no_stage_and_gets_no_folder_for_checkpoints(tmp_path):
    folder = new_system(tmp_path)
    claim = take(folder)
    claim.path.unlink()
    before = tree_of(tmp_path)
    assert not folder.write_stage(FIRST, {"slices": folder.slice_digests(FIRST), "below": None}, fill, claim)
    with pytest.raises(ClaimLostError, match="taken over"), folder.scratch(FIRST, [], claim):
        pass
    assert tree_of(tmp_path) == before


def test_a_claim_ends_when_its_stage_is_there(tmp_path):
    folder = new_system(tmp_path)
    claim = take(folder)
    write, given = folder.write_stage, {}
    folder.write_stage = lambda *args: given.update(kept=write(*args, claim))
    plant_stage(folder, FIRST)
    assert given["kept"] and folder.is_valid(FIRST) and folder.claims.keys() == []


def test_a_claim_that_is_lost_while_its_stage_is_being_written_writes_nothing(tmp_path):
    """As where the server of a file system took a machine for dead, and gave its lock to another."""
    folder = new_system(tmp_path)
    claim, write = take(folder), folder.write_stage

    def written(key, record, fill):
        def fill_slowly(path):
            fill(path)
            claim.path.unlink()

        kept.append(write(key, record, fill_slowly, claim))

    kept, folder.write_stage = [], written
    plant_stage(folder, FIRST)
    assert kept == [False] and not folder.is_valid(FIRST) and not (tmp_path / FIRST.path).exists()


def test_checkpoints_lie_under_the_name_of_the_claim_and_go_over_to_the_next(tmp_path):
    folder, other = new_system(tmp_path), SystemFolder(tmp_path)
    slices = folder.slice_digests(FIRST)
    one = take(folder)
    with folder.scratch(FIRST, slices, one) as ours:
        (ours / "checkpoint-3").mkdir()
        assert ours.name == f"0.{one.token}"
        one.end()
        # The first one lives, whatever became of its claim: two who live share no folder.
        two = take(other)
        with other.scratch(FIRST, slices, two) as theirs:
            assert theirs.name == f"0.{two.token}" and not (theirs / "checkpoint-3").exists()
        two.end()
    three = take(other)
    with other.scratch(FIRST, slices, three) as again:
        assert again.name == f"0.{three.token}" and (again / "checkpoint-3").exists() and not ours.exists()
        assert inspect(tmp_path).problems == ()


# Sharing


def share(folder, **how):
    """A trainer's share, as `train()` has it: what is taken, and what was compared."""
    growth, compared = SharedGrowth(folder, **how), []
    choose = lambda there, behind: growth.first(there, folder.table.empty, behind)  # noqa: E731
    work = lambda key: {"slices": folder.slice_digests(key)}  # noqa: E731
    return SimpleNamespace(
        take=lambda: growth.take(choose, work, compared.append), growth=growth, compared=compared, folder=folder
    )


def finish(one, claim):
    plant_stage(one.folder, claim.key)
    claim.end()


@pytest.mark.parametrize("config", [SETS, None], ids=["sets", "published"])
def test_what_several_take_is_what_one_alone_would_train(config, tmp_path):
    folder = new_system(tmp_path, **({} if config is None else {"config": config}))
    growth, alone = Growth(folder.plan, folder.config), set()
    while (step := growth.next(alone)) is not None:
        alone.add(step.key)
    workers = [share(SystemFolder(tmp_path)) for _ in range(5)]
    held, taken = [], []
    for turn in range(1000):
        worker = workers[turn % 5]
        claim = worker.take().claim
        if claim is not None:
            assert claim.key.parent is None or claim.key.parent in worker.folder.valid_stages
            taken.append(claim.key)
            held.append((worker, claim))
        elif not held:
            break
        else:
            # The last one that began ends first, as a rule.
            finish(*held.pop(-1 if turn % 3 else 0))
    assert len(taken) == len(alone) and set(taken) == alone
    for worker in workers:
        worker.growth.tidy()
    assert not (tmp_path / "claims").exists() and inspect(tmp_path).problems == ()


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("config", [SETS, None], ids=["sets", "published"])
def test_what_several_take_when_rows_came_is_what_one_alone_would_train_anew(config, number, tmp_path):
    folder = grow(new_system(tmp_path, **({} if config is None else {"config": config})))
    add(folder, {101: (0, 0), 102: (1, 1)})
    current, valid = folder.current_stages, folder.valid_stages
    steps = folder.growth.steps(current, folder.table.empty, valid - current)
    expected = [step.key for step in steps]
    assert expected and current < valid
    workers = [share(SystemFolder(tmp_path)) for _ in range(number)]
    held, taken = [], []
    for turn in range(1000):
        claim = None if len(held) == number else (worker := workers[turn % number]).take().claim
        if claim is not None:
            # What a stage is to stand on saw what came, too.
            assert claim.key.parent is None or claim.key.parent in worker.folder.current_stages
            taken.append(claim.key)
            held.append((worker, claim))
        elif not held:
            break
        else:
            finish(*held.pop())
    # What lowers no depth comes first.
    assert taken == expected if number == 1 else sorted(taken) == sorted(expected)
    folder.refresh()
    assert folder.current_stages == folder.valid_stages and inspect(tmp_path).problems == ()


def test_a_shard_that_comes_while_others_have_all_else_in_hand_is_begun_by_who_waits(tmp_path):
    folder = grow(new_system(tmp_path))
    add(folder, {101: (0, 0)})
    one, other = share(SystemFolder(tmp_path)), share(SystemFolder(tmp_path))
    held = [one.take().claim]
    while (claim := other.take().claim) is not None:
        held.append(claim)
    added = folder.config.num_shards
    add(SystemFolder(tmp_path), {200 + slice_: (added, slice_) for slice_ in range(folder.config.num_slices)})
    # As a trainer does before each turn.
    other.folder.refresh_ledger()
    assert other.take().claim.key.shard == added and all(claim.is_held() for claim in held)


def test_rows_that_come_end_the_claims_of_the_stages_of_their_slices_and_no_other(tmp_path):
    folder = new_system(tmp_path)
    hit, other = take(folder, StageKey(1, (0,))), take(folder, StageKey(1, (1,)))
    one = share(SystemFolder(tmp_path))
    add(SystemFolder(tmp_path), {101: (1, 0)})
    one.take()
    assert not hit.is_held() and other.is_held()


def test_the_stage_of_one_that_died_is_taken_again_and_told_of(tmp_path):
    folder = new_system(tmp_path)
    one, other = share(SystemFolder(tmp_path)), share(folder)
    claim = one.take().claim
    head, _, beat = claim.path.read_bytes().partition(b"\n")
    claim.path.write_bytes(json.dumps({**json.loads(head), "started": 0}).encode() + b"\n" + beat)
    taken = other.take()
    assert taken.claim.key == claim.key and [over.token for over in taken.over] == [claim.token]
    assert not claim.is_held()


def test_who_finds_nothing_is_told_who_has_it_and_wakes_when_that_changes(tmp_path):
    folder = new_system(tmp_path, config=S3TConfig(num_slices=1, seed=1), groups=None)
    one, other = share(SystemFolder(tmp_path)), share(folder)
    claim = one.take().claim
    taken = other.take()
    assert taken.claim is None and [claim.key for claim in taken.others] == [FIRST]
    begun = time.monotonic()
    other.growth.wait(0.2)
    assert time.monotonic() - begun >= 0.2
    other.take()
    # Also where that is so before it waits.
    claim.end()
    other.growth.wait(60)
    assert other.take().claim.key == FIRST and time.monotonic() - begun < 50


def test_a_deletion_ends_the_claims_of_stages_that_saw_it_and_no_other(tmp_path):
    folder = new_system(tmp_path)
    one = share(SystemFolder(tmp_path))
    hit, other = take(folder, StageKey(1, (0,))), take(folder, StageKey(1, (1,)))
    apply(folder, folder.table.members(1, 0)[:1])
    one.take()
    assert not hit.is_held() and other.is_held()


def test_each_claim_is_compared_once_and_a_refusal_takes_nothing(tmp_path):
    folder = new_system(tmp_path)
    one, other = share(SystemFolder(tmp_path)), share(folder)
    first, second = one.take().claim, other.take().claim
    assert [claim.key for claim in other.compared] == [first.key]
    assert all(one.take().claim for _ in range(2))
    assert [claim.key for claim in one.compared] == [second.key]

    def refuse(claim):
        raise FolderError("another recipe")

    before = folder.claims.names()
    with pytest.raises(FolderError, match="another recipe"):
        SharedGrowth(folder).take(lambda there, behind: StageKey(1, (2,)), lambda key: {}, refuse)
    assert folder.claims.names() == before


# What else knows of claims


def test_claims_are_no_findings_nor_copied_and_purge_ends_those_of_dead_processes(tmp_path):
    folder = grow(new_system(tmp_path / "system", config=SETS), limit=2)
    alive = share(folder).take().claim
    dead = take(folder, StageKey(1, (2,)))
    head, _, beat = dead.path.read_bytes().partition(b"\n")
    dead.path.write_bytes(json.dumps({**json.loads(head), "started": 0}).encode() + b"\n" + beat)
    assert (tmp_path / "system" / "claims" / "order.json").exists()
    assert inspect(folder.path).problems == () == inspect(folder.path).notes
    assert not [one for one in take_inventory(folder.path).remnants if "claims" in str(one.path)]
    folder.copy_to(tmp_path / "copy")
    assert not (tmp_path / "copy" / "claims").exists()
    assert purge(folder.path).problems == () and alive.is_held() and not dead.is_held()


def test_what_is_no_claim_is_told(tmp_path):
    folder = new_system(tmp_path)
    claim = take(folder)
    for name in ("notes.txt", f"shard-9.0.{claim.token}", "shard-0.0.claim"):
        (claim.path.parent / name).touch()
    assert len(inspect(tmp_path).problems) == 3 and folder.claims.keys() == [FIRST]


def test_a_crash_at_any_moment_of_claiming_leaves_a_claim_that_ends_or_none(tmp_path):
    new_system(tmp_path / "system", config=SETS)
    root = tmp_path / "system"
    recording = Recording(root)
    with recording.running():
        one = share(SystemFolder(root))
        claim = one.take().claim
        recording.mark("taken")
        finish(one, claim)
        one.growth.tidy()
        recording.mark("finished")
    found = set()
    for number, crash in enumerate(crashes(recording)):
        path = plant(crash.tree, tmp_path / "crashed" / str(number))
        folder, clock = SystemFolder(path), Clock()
        assert "finished" not in crash.told or folder.valid_stages == {claim.key}, crash
        assert inspect(path).problems == (), crash
        watch = ClaimWatch(folder.claims, clock)
        watch.look()
        clock.now += LEASE
        found.add(len(folder.claims.keys()))
        again = share(folder)
        again.growth._watch = watch
        key = again.take().claim.key
        assert (key == claim.key) is (claim.key not in folder.valid_stages), crash
    assert found == {0, 1}


def test_claims_of_stages_that_are_there_end(tmp_path):
    folder = new_system(tmp_path)
    claim = take(folder)
    plant_stage(folder, FIRST)
    end_dead_claims(folder)
    assert not claim.is_held() and not (tmp_path / "claims").exists()


def test_claims_of_stages_that_a_system_cannot_have_are_none(tmp_path):
    config = S3TConfig(num_shards=1, num_slices=2)
    claims = Claims(tmp_path, config, Plan.from_config(config).by_sets)
    (tmp_path / "claims").mkdir()
    for name in ("shard-0.1-0", "shard-1.0", "shard-0.2", "shard-0.0-0"):
        (tmp_path / "claims" / f"{name}.{'a' * 16}").touch()
    assert claims.keys() == [StageKey(0, (1, 0))]
