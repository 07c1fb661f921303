"""What the benchmarks share: results are kept as they come, and the processor's time is all that was worked."""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import harness
import pytest
from harness import Report, Task, Timing, clock, cpu_time


BENCHMARKS = Path(harness.__file__).parent


@pytest.fixture
def report(tmp_path):
    return Report("tried", Namespace(output=str(tmp_path / "new"), quick=True), {"layers": 2})


def kept(report) -> dict:
    return json.loads(report.path.read_text())


def test_a_result_is_in_the_file_before_the_next_is_measured(report):
    report.add("one", 3.0, "s", at_most=4)
    found = kept(report)
    assert [row["name"] for row in found["rows"]] == ["one"] and found["rows"][0]["met"]
    assert found["finished"] is None and found["settings"] == {"layers": 2}
    report.add_ratio("two", Timing([1.0, 4.0, 3.0], [2.0, 2.0, 2.0]), at_most=1)
    assert [(row["name"], row["met"]) for row in kept(report)["rows"]] == [("one", True), ("two", False)]
    report.finish()
    assert kept(report)["finished"] and len(kept(report)["rows"]) == 2
    assert [path.name for path in report.path.parent.iterdir()] == ["tried.json"]


def test_of_a_benchmark_that_fails_what_it_had_measured_stays(report):
    def measure():
        report.add("one", 3.0, "s")
        raise RuntimeError("no memory")

    with pytest.raises(RuntimeError):
        measure()
    assert [row["value"] for row in kept(report)["rows"]] == [3.0]


def test_cpu_time_counts_work_and_no_waiting(monkeypatch, report):
    monkeypatch.setattr(sys, "argv", ["bench", "--cpu-time"])
    monkeypatch.setattr(clock, "kind", "wall")
    assert harness.options("a benchmark").cpu_time and clock.kind == "cpu"
    monkeypatch.setattr(time, "process_time", lambda: 5.0)
    assert Task(lambda: time.sleep(0.01)).seconds() == 0
    report.add("one", 3.0, "s")
    assert kept(report)["clock"] == "cpu"


def test_cpu_time_counts_the_processes_that_were_waited_for():
    before, own = cpu_time(), time.process_time()
    subprocess.run([sys.executable, "-S", "-c", "sum(range(10**6))"], check=True)
    assert cpu_time() - before > time.process_time() - own


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("memory", []),
        pytest.param("stage", [], marks=pytest.mark.long),
        ("ledger", ["--cpu-time"]),
        ("gates", ["--cpu-time"]),
        pytest.param("training", [], marks=pytest.mark.long),
        pytest.param("workers", [], marks=pytest.mark.long),
        *(
            pytest.param(name, ["--cpu-time"], marks=pytest.mark.long)
            for name in ("unlearn", "folder", "loading", "scale", "gated_tokens")
        ),
    ],
)
def test_a_benchmark_runs_to_its_end(name, more, tmp_path):
    command = [sys.executable, str(BENCHMARKS / f"bench_{name}.py"), "--quick", "--output", str(tmp_path), *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["finished"] and found["rows"] and not [row for row in found["rows"] if row["met"] is False]
    assert found["clock"] == ("cpu" if more else "wall")
