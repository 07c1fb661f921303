"""Train on everything and unlearn, or train without: every surviving stage is the same to the bit (E3)."""

import itertools
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from support.bitwise_scenarios import (
    FACTORS,
    Scenario,
    covering_scenarios,
    differences,
    pairs_of,
    train_side,
    truncated_logits,
)

from hf_s3t.model.tensor_files import differing_tensors


pytestmark = pytest.mark.usefixtures("one_thread")


COVERING = covering_scenarios(seed=1)
# One system each of a language model, a text and an image classifier, in seconds.
QUICK = [
    Scenario(num_shards=2, crash="in a stage", rows="shuffled", order="other", accumulation=2),
    Scenario(architecture="roberta", num_slices=3, afterwards="regrowth and another deletion", deletion="one slice"),
    Scenario(
        architecture="vit", precision="bf16", crash="between stages", deletion="scattered", num_slices=3, replay=0.5
    ),
]
# The first of two processes has what serves in memory, in another order than the second what it trains on.
FOUND = [Scenario(architecture="bert", num_slices=4, processes=2, afterwards="regrowth and another deletion")]


def with_long_ones_marked(scenarios) -> list:
    """All but the first two that take two processes, and half a minute each, are more of the same."""
    in_two = [scenario for scenario in scenarios if scenario.processes > 1]
    return [pytest.param(s, marks=pytest.mark.long) if s in in_two[2:] else s for s in scenarios]


def in_processes(scenario: Scenario, folder: Path, side: str) -> None:
    """Train a side in fresh processes, as many as the scenario says."""
    scenarios = Path(__file__).parents[1] / "support" / "bitwise_scenarios.py"
    script = [str(scenarios), side, str(folder), json.dumps(asdict(scenario))]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(scenario.processes)]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    command = [sys.executable, *(launcher if scenario.processes > 1 else []), *script]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.fail(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def check(scenario: Scenario, folder: Path) -> None:
    """Both sides, then every surviving tensor and the logits of every truncated stack."""
    for side in ("saw", "never"):
        fresh = scenario.processes > 1 or (side == "never" and scenario.oracle == "fresh process")
        (in_processes if fresh else train_side)(scenario, folder, side)
    survivors, differing = differences(folder / "saw", folder / "never")
    assert not differing
    assert survivors
    for forgot, never in truncated_logits(scenario, folder):
        assert torch.equal(forgot, never)


def test_every_pair_of_settings_meets_in_some_scenario():
    met = set().union(*map(pairs_of, COVERING))
    for one, other in itertools.combinations(FACTORS, 2):
        for x, y in itertools.product(FACTORS[one], FACTORS[other]):
            assert ((one, x), (other, y)) in met
    assert len(COVERING) <= 24


@pytest.mark.parametrize("scenario", QUICK, ids=str)
def test_unlearning_equals_never_having_trained_on_the_examples(scenario, tmp_path):
    check(scenario, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [*FOUND, *with_long_ones_marked(COVERING)], ids=str)
def test_unlearning_equals_never_having_trained_on_the_examples_whatever_the_settings(scenario, tmp_path):
    check(scenario, tmp_path)


def test_a_difference_names_every_tensor_that_differs():
    one = {name: torch.arange(4.0).view(2, 2) for name in ("a", "b", "c", "d")}
    other = {name: tensor.clone() for name, tensor in one.items()}
    other["b"][1, 1] += 1e-6
    other["c"] = other["c"].to(torch.bfloat16)
    del other["d"]
    assert differing_tensors(one, other) == ["b", "c", "d"]
    assert differing_tensors(one, one) == []


def test_zero_and_minus_zero_differ():
    assert differing_tensors({"a": torch.tensor([0.0])}, {"a": torch.tensor([-0.0])}) == ["a"]
