"""The driver, without Ray: which stage goes to whom, what a death costs, and how busy many workers are kept."""

import heapq
import itertools
import random
import time
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

import pytest

from hf_s3t import S3TConfig
from hf_s3t.cluster.driving import MOST_ATTEMPTS, Driver, Outcome
from hf_s3t.errors import ClusterError, DivergedError, FolderError
from hf_s3t.plan import Growth, Plan, StageKey
from hf_s3t.plan.schedule import Schedule


def key(*prefix, shard=0):
    return StageKey(shard, prefix)


class Desk:
    """A system in memory: its plan, what is there, and what deletions took."""

    def __init__(self, config):
        self.plan_of_system = Plan.from_config(config)
        self.growth = Growth(self.plan_of_system, config)
        self.there = set()
        self.begun = []
        self.deleted = []

    def delete(self, *hits):
        """What is deleted goes, and what stands on it; the driver hears of it when it asks."""
        self.deleted.append(hits)
        self.there -= set(self.plan_of_system.removed_by(hits, self.there))

    def has_news(self):
        news, self.deleted = self.deleted, []
        return bool(news)

    def plan(self, under_way):
        # What is trained was begun before a deletion, so that it counts for nothing, or after.
        good = {one for one in under_way if one not in self.condemned}
        return Schedule([step.key for step in self.growth.steps(self.there | good)], self.there, good)

    condemned = frozenset()

    def begin(self, stage):
        assert stage.parent is None or stage.parent in self.there, "a stage is begun when its parent is there"
        self.begun.append(stage)

    def accept(self, outcome):
        if outcome.key in self.condemned:
            self.condemned = self.condemned - {outcome.key}
            return False
        self.there.add(outcome.key)
        return True

    def show(self, under_way):
        pass


class Pool:
    """Workers in simulated time: each stage takes as long as `seconds` says, unless its worker dies in it."""

    def __init__(self, slots, seconds=lambda stage: 1.0, fate=lambda stage: {}):
        self.slots, self.seconds, self.fate = slots, seconds, fate
        self.now = self.busy = 0.0
        self.running = []
        self.told = 0
        self.at = {}
        self.numbers = itertools.count(1)

    @property
    def free(self):
        return self.slots - len(self.running)

    def start(self, stage):
        took = self.seconds(stage)
        self.busy += took
        worker = f"Worker {next(self.numbers)}"
        heapq.heappush(self.running, (self.now + took, stage, worker))
        return worker

    def outcomes(self):
        self.now, stage, worker = heapq.heappop(self.running)
        if stage in self.at:
            self.at.pop(stage)()
        return [Outcome(stage, worker, **(self.fate(stage) or {"result": {}}))]

    def tell(self):
        self.told += 1


def config(shards=1, slices=3, **changes):
    return S3TConfig(num_shards=shards, num_slices=slices, **changes)


def test_the_worthiest_stage_whose_parent_is_there_goes_first():
    schedule = Schedule([key(0), key(0, 1), key(1), key(1, 0)], [])
    assert [schedule.take(), schedule.take(), schedule.take()] == [key(0), key(1), None]
    schedule.has_arrived(key(0))
    assert [schedule.take(), schedule.take()] == [key(0, 1), None]
    schedule.give_back(key(1))
    assert schedule.take() == key(1)


def test_what_was_not_taken_cannot_be_given_back_and_what_is_trained_is_not_handed_out():
    schedule = Schedule([key(0, 1), key(1)], [], taken=[key(0)])
    schedule.give_back(key(1))
    assert [schedule.take(), schedule.take()] == [key(1), None]
    schedule.give_back(key(0))
    assert [schedule.take(), schedule.take()] == [key(0), None]


def test_what_is_there_is_not_handed_out_and_is_stood_on():
    schedule = Schedule([key(0, 1)], [key(0)])
    assert [schedule.take(), schedule.take()] == [key(0, 1), None]


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_every_stage_of_a_plan_is_trained_once_whatever_the_number_of_workers(slots):
    desk = Desk(config(shards=2))
    tally = Driver(desk, Pool(slots)).run()
    assert sorted(tally.trained) == sorted(desk.plan_of_system.stages())
    assert len(desk.begun) == len(set(desk.begun)) and tally.deaths == 0


def test_one_worker_trains_in_the_order_of_worth():
    desk = Desk(config(shards=2))
    steps = [step.key for step in desk.growth.steps(())]
    assert Driver(desk, Pool(1)).run().trained == steps


def test_a_worker_that_dies_costs_its_stage_and_nothing_else():
    desk, deaths = Desk(config()), [key(0)]
    pool = Pool(2, fate=lambda stage: {"died": "killed."} if stage in deaths and not deaths.remove(stage) else {})
    tally = Driver(desk, pool).run()
    assert sorted(tally.trained) == sorted(desk.plan_of_system.stages())
    assert tally.deaths == 1 and desk.begun.count(key(0)) == 2


def test_a_stage_that_kills_every_worker_ends_the_run_by_its_name_and_what_others_trained_stays():
    desk = Desk(config(shards=2))
    pool = Pool(2, fate=lambda stage: {"died": "out of memory."} if stage == key(0) else {})
    with pytest.raises(ClusterError, match=r"shard-0/0 was handed out 3 times .*out of memory.*resources_per_worker"):
        Driver(desk, pool).run()
    assert desk.begun.count(key(0)) == MOST_ATTEMPTS and desk.there


def test_what_a_stage_raises_is_raised_when_the_stages_under_way_have_come_to_their_end():
    desk = Desk(config(shards=2))
    pool = Pool(
        2,
        seconds=lambda stage: 1.0 + stage.shard,
        fate=lambda stage: {"error": DivergedError("NaN")} if stage.shard == 0 else {},
    )
    with pytest.raises(DivergedError, match="NaN"):
        Driver(desk, pool).run()
    assert [stage.shard for stage in desk.there] == [1] and not pool.running


def test_a_stage_that_a_deletion_takes_while_it_trains_is_discarded_and_grown_anew():
    desk, pool = Desk(config()), Pool(1)
    first = next(desk.growth.steps(())).key

    def delete():
        desk.condemned = frozenset({first})
        desk.delete((0, first.prefix[0]))

    pool.at[first] = delete
    tally = Driver(desk, pool).run()
    assert tally.discarded == 1 and pool.told == 1
    assert sorted(desk.there) == sorted(desk.plan_of_system.stages())


def test_a_stage_that_is_condemned_while_it_trains_is_begun_anew_by_another_before_the_first_one_ends():
    desk, pool = Desk(config(slices=1, shards=2)), Pool(2, seconds=lambda stage: 10.0 if stage.shard == 0 else 1.0)
    condemned, ended = key(0), []

    def delete():
        desk.condemned = frozenset({condemned})
        desk.delete((0, 0))

    accept = desk.accept
    desk.accept = lambda outcome: ended.append(outcome.worker) or accept(outcome)
    pool.at[key(0, shard=1)] = delete
    tally = Driver(desk, pool).run()
    assert desk.begun.count(condemned) == 2 and tally.discarded == 1 and condemned in desk.there
    assert ended == ["Worker 2", "Worker 1", "Worker 3"]


def test_a_parent_that_goes_as_its_child_is_handed_out_is_trained_again():
    class Forgetful(Pool):
        is_gone = False

        def start(self, stage):
            if stage.parent is not None and not self.is_gone:
                self.is_gone = True
                desk.there.discard(stage.parent)
                raise FolderError(f"{stage.parent} is missing.")
            return super().start(stage)

    desk = Desk(config(budget=3, keep_idle=True))
    tally = Driver(desk, Forgetful(2)).run()
    assert sorted(desk.there) == sorted(desk.plan_of_system.stages())
    assert len(tally.trained) == len(desk.there) + 1


def test_a_stage_that_is_discarded_again_and_again_though_nothing_is_deleted_ends_the_run():
    desk = Desk(config())
    pool = Pool(1)
    desk.accept = lambda outcome: False
    with pytest.raises(ClusterError, match=r"never came back: .*nothing was deleted"):
        Driver(desk, pool).run()


def critical_path(stages, seconds):
    return max(sum(map(seconds, stage.lineage)) for stage in stages)


@pytest.mark.slow
def test_1280_stages_keep_64_workers_busy_but_for_the_longest_chain():
    # Eight sequences of eight slices in each of 20 shards, in simulated time.
    desk = Desk(config(shards=20, slices=8, budget=8, keep_idle=True))
    stages = desk.plan_of_system.stages()
    assert len(stages) == 1280
    durations = random.Random(0)
    lengths = {stage: durations.uniform(0.5, 1.5) * stage.depth for stage in stages}
    pool = Pool(64, lengths.__getitem__)
    Driver(desk, pool).run()
    assert desk.there == set(stages)
    apart = pool.now - critical_path(stages, lengths.__getitem__)
    assert pool.busy >= 0.9 * 64 * apart


class Sleepers:
    """64 threads that sleep: the driver's own work counts, as it does in a cluster."""

    def __init__(self, slots, seconds):
        self.slots, self.seconds = slots, seconds
        self.threads, self.running = ThreadPoolExecutor(slots), {}
        self.numbers = itertools.count(1)

    @property
    def free(self):
        return self.slots - len(self.running)

    def start(self, stage):
        worker = f"Worker {next(self.numbers)}"
        self.running[self.threads.submit(time.sleep, self.seconds)] = stage, worker
        return worker

    def outcomes(self):
        done, _ = wait(self.running, return_when=FIRST_COMPLETED)
        return [Outcome(*self.running.pop(one), result={}) for one in done]

    def tell(self):
        pass


@pytest.mark.slow
def test_the_drivers_own_work_leaves_64_workers_that_sleep_50_ms_busy_nine_tenths_of_the_time():
    desk = Desk(config(shards=20, slices=8, budget=8, keep_idle=True))
    stages = desk.plan_of_system.stages()
    schedule = desk.plan(())
    desk.plan = lambda under_way: schedule  # what is planned once, before the clock runs
    pool = Sleepers(64, 0.05)
    started = time.perf_counter()
    Driver(desk, pool).run()
    took = time.perf_counter() - started
    assert len(desk.there) == len(stages)
    assert 0.05 * len(stages) >= 0.9 * 64 * (took - critical_path(stages, lambda stage: 0.05))
