"""
How long the analysis takes: lifetimes drawn, exact values, the searches for sequences and families, a plan.

Unlike the other benchmarks this one has nobody to be compared with; its targets are in seconds.
"""

import subprocess
import sys

from harness import Report, Task, options

from hf_s3t.analysis import deletion_rate, expected_depth, retention, simulate_deletions, simulate_depths
from hf_s3t.sequences import select_sequences
from hf_s3t.sequences.families import best_family, stages_of, work_of


def main() -> None:
    """Time, print, write."""
    chosen = options(__doc__)
    runs = 100 if chosen.quick else 10_000
    skewed = [2.0**k for k in range(20)]
    skewed = [p / sum(skewed) for p in skewed]
    many = [k / 2080 for k in range(1, 65)]
    rotations = select_sequences(20, 20)
    report = Report("analysis", chosen, {"runs": runs, "rounds": 3})

    def add(name, run, at_most):
        # The best of three: what else the machine does only makes it slower.
        times = [Task(run).seconds() for _ in range(3)]
        report.add(name, min(times), "s", at_most=at_most, numbers={"rounds_seconds": times})

    figure_6 = (5, 64, 64)
    add("simulated: m = 5, L = 64, B = 64", lambda: simulate_deletions(*figure_6, runs=runs), 10)
    add(
        "simulated, each of 100,000 examples once",
        lambda: simulate_deletions(*figure_6, num_examples=100_000, runs=runs),
        10,
    )
    add("simulated depths: L = 20, B = 20, 100 hits", lambda: simulate_depths(rotations, 100, runs=runs), 10)
    for until in ("exhausted", "first_shard"):
        add(f"exact, {until}, uniform", lambda until=until: deletion_rate(*figure_6, until=until), 1)
        add(f"exact, {until}, a prior", lambda until=until: deletion_rate(*figure_6, prior=many, until=until), 1)
        add(
            f"exact, {until}, a prior, each of 100,000 examples once",
            lambda until=until: deletion_rate(*figure_6, prior=many, num_examples=100_000, until=until),
            1,
        )
    add("exact retention: L = 20, B = 20", lambda: retention(rotations, 10, 4), 1)
    add("exact depth: L = 20, B = 20, a prior", lambda: expected_depth(rotations, 10, prior=skewed), 1)

    def search():
        # Asked again, the answer is remembered.
        select_sequences.__globals__["_optimal"].cache_clear()
        select_sequences(8, 8, "optimal", skewed[:7] + [1 - sum(skewed[:7])])

    add("optimal sequences: L = 8, B = 8", search, 5)

    def search_family(size):
        # Asked again, both are remembered: the answer, and the sequences that the search starts from.
        best_family.__globals__["_best_family"].cache_clear()
        select_sequences.__globals__["_optimal"].cache_clear()
        best_family(size, work_of(stages_of(select_sequences(size, size)), size))

    for size in (6, 8, 10):
        add(f"best family: L = {size}, the work of B = {size}", lambda size=size: search_family(size), 5)
    command = [
        "plan",
        "--examples",
        "52000",
        "--deletions-per-month",
        "4",
        "--hours-per-epoch",
        "3",
        "--num-layers",
        "32",
    ]
    add(
        "hf-s3t plan, the process started",
        lambda: subprocess.run([sys.executable, "-m", "hf_s3t", *command], check=True, capture_output=True),
        5,
    )
    report.finish()


if __name__ == "__main__":
    main()
