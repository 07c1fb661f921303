"""
What the benchmarks share: interleaved timing, targets, a table on the terminal and a JSON file of the results.

A result is in the file as soon as it is measured: what a benchmark that was interrupted has measured is not lost.

Two things are compared by running them in turn, round after round, in one process: what else the machine does hits
both. A round's times give one ratio; the result is the median of the ratios of all rounds.
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any


# The benchmarks compare computation, not the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from rich.console import Console
from rich.table import Table

from hf_s3t.folder.files import write_atomically
from hf_s3t.folder.versions import library_versions


# What is taken for the least that can be measured.
_LEAST = 1e-6
RESULTS = Path(__file__).resolve().parent / "results"


def cpu_time() -> float:
    """Seconds of processor time that this process has taken in all its threads, and processes that it waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


class Clock:
    """What the times are taken with: what passes, or with `--cpu-time` what the processor has worked."""

    kind = "wall"
    _KINDS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": cpu_time}

    def now(self) -> float:
        """Seconds since some time before."""
        return self._KINDS[self.kind]()


clock = Clock()


@dataclass(frozen=True)
class Task:
    """
    Something to be timed.

    Args:
        run (callable): What is timed; called with what `prepare` returned, if there is one.
        prepare (callable, *optional*): Called before every timed call, outside the time.
    """

    run: Callable
    prepare: Callable[[], Any] | None = None

    def seconds(self) -> float:
        """How long one call takes."""
        arguments = () if self.prepare is None else (self.prepare(),)
        started = clock.now()
        self.run(*arguments)
        return clock.now() - started


@dataclass(frozen=True)
class Timing:
    """The times of two tasks that ran in turn: per round, seconds per call."""

    ours: list[float]
    theirs: list[float]

    @property
    def ratios(self) -> list[float]:
        """Per round, our time as a share of theirs."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        """The median of the ratios."""
        return statistics.median(self.ratios)

    def numbers(self) -> dict[str, Any]:
        """Everything measured, for the JSON file."""
        return {
            "ours_seconds": statistics.median(self.ours),
            "theirs_seconds": statistics.median(self.theirs),
            "ratios": self.ratios,
            "ours_rounds": self.ours,
            "theirs_rounds": self.theirs,
        }


def interleave(ours: Task, theirs: Task, *, rounds: int = 5, calls: int = 1, warmup: int = 1) -> Timing:
    """
    Time two tasks in turn.

    Args:
        ours ([`Task`]): What is measured.
        theirs ([`Task`]): What it is compared with.
        rounds (`int`, defaults to 5): Number of ratios whose median is the result.
        calls (`int`, defaults to 1): Calls of each task in a round, in turn; short tasks need many.
        warmup (`int`, defaults to 1): Calls of each before the first round, which count for nothing.
    """
    for _ in range(warmup):
        ours.seconds()
        theirs.seconds()
    sums = ([], [])
    for number in range(rounds):
        totals = [0.0, 0.0]
        for call in range(calls):
            # Whoever comes second finds other caches than who comes first: they take turns at that too.
            order = (0, 1) if (number + call) % 2 == 0 else (1, 0)
            for which in order:
                totals[which] += (ours, theirs)[which].seconds()
        for which in (0, 1):
            sums[which].append(totals[which] / calls)
    return Timing(*sums)


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """The power of its size with which a value grows: the slope of a line through their logarithms."""
    logs = [math.log(max(value, _LEAST)) for value in values]
    return statistics.linear_regression([math.log(size) for size in sizes], logs).slope


@dataclass(frozen=True)
class Row:
    """One result and what it should be."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None
    exactly: float | None = None
    numbers: Mapping[str, Any] = field(default_factory=dict)

    @property
    def target(self) -> dict[str, float]:
        """The target, by its kind; empty if the row is for information."""
        kinds = ("at_most", "at_least", "exactly")
        return {kind: getattr(self, kind) for kind in kinds if getattr(self, kind) is not None}

    @property
    def is_met(self) -> bool | None:
        """Whether the value is on the right side of its target."""
        if not self.target:
            return None
        return (
            (self.at_most is None or self.value <= self.at_most)
            and (self.at_least is None or self.value >= self.at_least)
            and (self.exactly is None or self.value == self.exactly)
        )


class Report:
    """
    The results of one benchmark, written whenever there is one more.

    Args:
        name (`str`): Name of the benchmark and of its file.
        options (`argparse.Namespace`): What `options` returned.
        settings (mapping): What was run, for whoever reads the file later.
    """

    def __init__(self, name: str, options: argparse.Namespace, settings: Mapping[str, Any]):
        self.name = name
        self.options = options
        self.settings = dict(settings)
        self.rows: list[Row] = []
        self._load_before = os.getloadavg()[0]
        self._started = time.perf_counter()

    def add(self, name: str, value: float, unit: str = "x", **more: Any) -> None:
        """Add a row, and write the file; see [`Row`]."""
        self.rows.append(Row(name, value, unit, **more))
        self._write()

    def add_ratio(self, name: str, timing: Timing, *, at_most: float | None = None) -> None:
        """Add a row for our time as a share of theirs."""
        self.add(name, timing.ratio, "of theirs", at_most=at_most, numbers=timing.numbers())

    def finish(self) -> None:
        """Print the table, and write the file of a benchmark that is done."""
        self._print()
        self._write(finished=datetime.now(UTC).isoformat(timespec="seconds"))
        Console().print(f"written to {self.path}")

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.options.output) / f"{self.name}.json"

    def _write(self, finished: str | None = None) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, (json.dumps(self._as_json(finished), indent=2) + "\n").encode())

    def _print(self) -> None:
        table = Table(title=f"{self.name}{' (quick)' if self.options.quick else ''}")
        for column, justify in (("what", "left"), ("ours", "right"), ("theirs", "right"), ("result", "right")):
            table.add_column(column, justify=justify)
        table.add_column("target", justify="right")
        table.add_column("")
        for row in self.rows:
            target = " ".join(f"{_SIGNS[kind]} {_shown(value, row.unit)}" for kind, value in row.target.items())
            table.add_row(
                row.name,
                *(_seconds(row.numbers.get(f"{who}_seconds")) for who in ("ours", "theirs")),
                _shown(row.value, row.unit),
                target,
                _MARKS[row.is_met],
            )
        Console(width=None if Console().is_terminal else 120).print(table)

    def _as_json(self, finished: str | None) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "quick": self.options.quick,
            # Not, as long as there is more to measure.
            "finished": finished,
            "seconds": time.perf_counter() - self._started,
            "clock": clock.kind,
            "settings": self.settings,
            "versions": library_versions(),
            "hardware": {
                "cpu": _cpu_model(),
                "cores": os.cpu_count(),
                "threads": torch.get_num_threads(),
                "cpu_capability": torch.backends.cpu.get_cpu_capability(),
                "load_before": self._load_before,
                "load_after": os.getloadavg()[0],
            },
            "rows": [
                {
                    "name": row.name,
                    "value": row.value,
                    "unit": row.unit,
                    "target": row.target or None,
                    "met": row.is_met,
                    **row.numbers,
                }
                for row in self.rows
            ],
        }


_SIGNS = {"at_most": "≤", "at_least": "≥", "exactly": "="}
_MARKS = {None: "", True: "[green]met[/green]", False: "[red]missed[/red]"}


def _seconds(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _shown(value: float, unit: str) -> str:
    if unit == "s":
        return _seconds(value)
    return f"{value:,.0f} {unit}" if value == int(value) and unit == "bytes" else f"{value:.3g} {unit}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def options(description: str, **extra: Any) -> argparse.Namespace:
    """
    The command line of a benchmark.

    Args:
        description (`str`): Its docstring.
        **extra: Further options, by name, with their defaults.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="small sizes, to see that it runs: the numbers mean little"
    )
    parser.add_argument(
        "--output", default=str(RESULTS), help="folder for the JSON file (default: benchmarks/results)"
    )
    parser.add_argument("--threads", type=int, default=None, help="torch threads (default: as torch chooses)")
    parser.add_argument(
        "--cpu-time", action="store_true", help="time the processor's work instead of what passes, on a shared machine"
    )
    for name, default in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    chosen = parser.parse_args()
    if chosen.cpu_time:
        clock.kind = "cpu"
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    return chosen
