"""How much sooner more workers are done with the first training: bounded by work and by the longest chain."""

import pytest

from hf_s3t.analysis.backbone import Backbone
from hf_s3t.analysis.planning import Workload, recommend
from hf_s3t.analysis.speedup import hours_by, speedups
from hf_s3t.errors import ConfigError
from hf_s3t.plan import StageKey


@pytest.fixture(scope="module")
def option():
    return recommend(Workload(52_000, 4.0, 3.0), Backbone(32, None)).chosen


def test_a_stage_waits_for_its_parent_and_for_a_worker():
    chain = [StageKey(0, (0,)), StageKey(0, (0, 1)), StageKey(0, (0, 1, 2))]
    beside = [StageKey(1, (0,)), StageKey(2, (0,))]
    hours = dict(zip([*chain, *beside], [1.0, 2.0, 4.0, 3.0, 3.0]))
    assert hours_by([*chain, *beside], hours, 1) == 13
    # The second worker trains what stands beside the chain.
    assert hours_by([*chain, *beside], hours, 2) == 7
    assert hours_by([*chain, *beside], hours, 99) == 7


def test_one_worker_takes_the_planned_hours_and_no_number_beats_the_longest_chain(option):
    found = speedups(option, 32, [1, 2, 4, 8, 512])
    assert found[0].hours == pytest.approx(option.training_hours) and found[0].busy == pytest.approx(1.0)
    hours = [one.hours for one in found]
    assert hours == sorted(hours, reverse=True)
    for one in found:
        assert one.speedup <= min(one.workers, option.num_stages) + 1e-9
        assert one.busy == pytest.approx(one.speedup / one.workers)
        # Whoever waits does so for a chain: Graham's bound.
        assert one.hours <= option.training_hours / one.workers + hours[-1] + 1e-9


@pytest.mark.parametrize("workers", [[], [0], [2, 2], [1.5]])
def test_numbers_that_are_none_are_refused(option, workers):
    with pytest.raises(ConfigError, match="workers"):
        speedups(option, 32, workers)
