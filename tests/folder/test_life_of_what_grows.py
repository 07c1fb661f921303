"""Rows come, go and come again, in any order and by any process: what serves has seen nothing that is not in."""

import itertools
import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from support.folders import NUMBERS, add, apply, grow, new_system, stages_on_disk

from hf_s3t import S3TConfig
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect


pytestmark = pytest.mark.usefixtures("surroundings")

CONFIG = S3TConfig(num_shards=2, num_slices=2, budget=2, keep_idle=True, seed=1)
# Ids that may come.
LATER = list(range(100, 108))
NUMBER = itertools.count()


class Life(RuleBasedStateMachine):
    """
    A folder beside a plain model of it: the ids that are in, where they lie, and what each stage has seen of them.

    Args:
        start: A system with every stage, which is copied.
        place: Where the copies go.
    """

    def __init__(self, start: Path, place: Path):
        super().__init__()
        self.path = Path(shutil.copytree(start, place / f"{next(NUMBER)}" / "system"))

    @initialize()
    def begin(self):
        self.folder = SystemFolder(self.path)
        self.in_ = dict(zip(NUMBERS, self.folder.table.places_of(NUMBERS), strict=True))
        self.gone = set()
        self.saw = {key: self.members(key) for key in self.folder.plan.stages()}

    def teardown(self):
        shutil.rmtree(self.path.parent)

    def members(self, key):
        places = {(key.shard, slice_) for slice_ in key.prefix}
        return {i for i, place in self.in_.items() if place in places}

    def keep(self, stays):
        """A stage goes with what it stands on."""
        lost = {key for key in self.saw if not stays(key)}
        self.saw = {key: seen for key, seen in self.saw.items() if not lost & set(key.lineage)}

    def shape(self):
        return self.folder.config.num_shards, self.folder.config.num_slices

    @rule(ids=st.sets(st.sampled_from(LATER), min_size=1, max_size=2), data=st.data())
    def rows_come(self, ids, data):
        ids = sorted(ids - self.in_.keys())
        if not ids:
            return
        shards, slices = self.shape()
        places = {i: (data.draw(st.integers(0, shards - 1)), data.draw(st.integers(0, slices - 1))) for i in ids}
        add(self.folder, places, again=[i for i in ids if i in self.gone])
        self.in_ |= places
        self.gone -= places.keys()

    @precondition(lambda self: self.folder.config.num_shards == 2)
    @rule()
    def a_shard_comes(self):
        ids = [i for i in LATER if i not in self.in_ and i not in self.gone][:2]
        if len(ids) == 2:
            places = dict(zip(ids, [(2, 0), (2, 1)], strict=True))
            add(SystemFolder(self.path), places)
            self.folder.refresh()
            self.in_ |= places

    @precondition(lambda self: self.in_)
    @rule(data=st.data())
    def rows_go(self, data):
        ids = data.draw(st.sets(st.sampled_from(sorted(self.in_)), min_size=1, max_size=2))
        apply(SystemFolder(self.path), ids)
        self.folder.refresh()
        for i in ids:
            del self.in_[i]
        self.gone |= ids
        self.keep(lambda key: not self.saw[key] & ids)

    @precondition(lambda self: self.in_)
    @rule(data=st.data())
    def a_row_is_replaced(self, data):
        one = data.draw(st.sampled_from(sorted(self.in_)))
        add(self.folder, {one: self.in_[one]}, replaced=[one])
        self.keep(lambda key: one not in self.saw[key])

    @rule(limit=st.integers(1, 6))
    def train(self, limit):
        for key in self.folder.missing_stages()[:limit]:
            # What stood on the old one ends with it.
            self.keep(lambda other, key=key: other != key)
            grow(self.folder, 1)
            self.saw[key] = self.members(key)

    @rule()
    def everyone_starts_again(self):
        self.folder = SystemFolder(self.path)

    @invariant()
    def what_serves_saw_nothing_that_is_not_in(self):
        if not hasattr(self, "saw"):
            return
        folder = self.folder
        assert folder.valid_stages == self.saw.keys() == set(SystemFolder(self.path).valid_stages)
        assert stages_on_disk(self.path) == set(map(str, self.saw))
        assert all(seen <= self.in_.keys() for seen in self.saw.values())
        current = {key for key, seen in self.saw.items() if seen == self.members(key)}
        assert folder.current_stages == current
        empty = {(s, p) for s in range(self.shape()[0]) for p in range(self.shape()[1])} - set(self.in_.values())
        wanted = {key for key in folder.plan.stages() if not key.saw(empty)}
        assert set(folder.missing_stages()) == wanted - current
        assert set(folder.table.rows) == self.in_.keys()
        assert inspect(self.path).problems == ()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    path = tmp_path_factory.mktemp("first") / "system"
    grow(new_system(path, config=CONFIG, groups=None))
    return path


@pytest.mark.parametrize(
    ("examples", "steps"), [(6, 10), pytest.param(100, 25, marks=[pytest.mark.slow, pytest.mark.long])]
)
def test_a_folder_that_grows_is_at_any_time_what_its_history_makes_it(start, tmp_path, examples, steps):
    few = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(lambda: Life(start, tmp_path), settings=few)
