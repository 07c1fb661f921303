"""
Several trainers on one folder: two processes with one thread each against one; 64 simulated slots, 1,280 stages.

One worker and two train the same plan of two shards in turn; the time counts from when all of them are ready, and what
it takes until then, imports and the making of the trainer, is shown apart. For the slots time is simulated: a stage is
50 ms in which its slot is busy, and what has to be done one after the other, choosing a stage and, where slots share
the folder, claiming and writing it under its lock, takes the time that it is measured to take. They are judged against
the same slots where that takes no time, so that what the tree itself leaves idle does not count.
"""

import heapq
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from harness import Report, clock, options
from systems import arguments, llama, lora, make_rows, temporary_folder

from hf_s3t import S3TConfig, S3TTrainer
from hf_s3t.folder.claims import HeldClaim
from hf_s3t.folder.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from hf_s3t.folder.shared_growth import SharedGrowth
from hf_s3t.folder.stage_record import adapter_of
from hf_s3t.folder.system import SystemFolder
from hf_s3t.plan import Growth, StageKey


STAGE_SECONDS = 0.05
SLOTS = 64


# Two workers against one


def work(path: Path, number: int, rows: int, hidden: int) -> None:
    """A worker's whole process: it is made, waits until all are, and trains."""
    started = time.perf_counter()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trainer = S3TTrainer(
        model=llama(4, hidden, vocabulary=256),
        args=arguments(path, gradient_checkpointing=False),
        train_dataset=make_rows(rows, 64, 256),
        peft_config=lora(),
        s3t_config=S3TConfig(num_shards=2, num_slices=2, keep_idle=True, id_column="id"),
    )
    signs = path.parent
    (signs / f"ready-{number}").write_text(str(time.perf_counter() - started))
    while not (signs / "go").exists():
        time.sleep(0.005)
    done = trainer.train()
    (signs / f"done-{number}").write_text(json.dumps(done.metrics["stages_trained"]))


def train(workers: int, rows: int, hidden: int) -> dict[str, Any]:
    """Train the plan with so many workers: seconds until all are ready, seconds after that, stages of each."""
    with temporary_folder() as folder:
        root, environment = Path(folder), {**os.environ, "OMP_NUM_THREADS": "1"}
        path, begun = root / "system", time.perf_counter()
        command = [sys.executable, __file__, "--work", str(path), str(rows), str(hidden)]
        processes = [subprocess.Popen([*command, str(n)], env=environment) for n in range(workers)]
        while len(list(root.glob("ready-*"))) < workers:
            time.sleep(0.005)
        ready = time.perf_counter()
        (root / "go").touch()
        codes = [process.wait() for process in processes]
        ended = time.perf_counter()
        if any(codes):
            raise RuntimeError(f"Workers ended with {codes}. See what they printed.")
        stages = [json.loads(file.read_text()) for file in sorted(root.glob("done-*"))]
    return {"start_up": ready - begun, "seconds": ended - ready, "stages": stages}


def measure_workers(report: Report, rounds: int, rows: int, hidden: int) -> None:
    """Two workers' time as a share of one's."""
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number in range(rounds):
        runs = {workers: train(workers, rows, hidden) for workers in ((1, 2) if number % 2 == 0 else (2, 1))}
        found.append((runs[1], runs[2]))
    ratios = [two["seconds"] / one["seconds"] for one, two in found]
    numbers = {"ratios": ratios, "rounds": found, "cores": len(os.sched_getaffinity(0))}
    at_most = None if report.options.quick else 0.6
    report.add("two workers", statistics.median(ratios), "of one's", at_most=at_most, numbers=numbers)
    twice = statistics.median(sum(two["stages"]) / sum(one["stages"]) for one, two in found)
    report.add("stages that two train, against one", twice, exactly=1.0)
    for index, name in enumerate(("one worker", "two workers")):
        seconds = statistics.median(pair[index]["start_up"] for pair in found)
        report.add(f"start-up of {name}, not counted", seconds, "s")


# Simulated slots


class Slots:
    """
    Slots that take stages in turn, in simulated time.

    Args:
        take (callable): From the number of a slot to what it trains; `None` if there is nothing that is free.
        finish (callable): Called with the number of a slot and what it has trained.
        measured (`bool`): Whether what the two take is counted, one slot after the other; otherwise they take no time.
    """

    def __init__(self, take: Callable[[int], Any], finish: Callable[[int, Any], None], measured: bool):
        self._take, self._finish, self._measured = take, finish, measured
        self.free_at, self.costs = 0.0, list[float]()

    def run(self) -> float:
        """Seconds until nothing is left to train."""
        idle, busy, now = list(range(SLOTS)), list[tuple[float, int, Any]](), 0.0
        while True:
            while idle:
                taken, since = self._timed(now, self._take, idle[0])
                if taken is None:
                    # Nor is there anything for the others, which look at the same time, and hold no lock for it.
                    break
                heapq.heappush(busy, (since + STAGE_SECONDS, idle.pop(0), taken))
            if not busy:
                return now
            now, slot, taken = heapq.heappop(busy)
            _, now = self._timed(now, self._finish, slot, taken)
            idle.append(slot)

    def _timed(self, now: float, do: Callable[..., Any], *what: Any) -> tuple[Any, float]:
        begun = clock.now()
        result = do(*what)
        if not self._measured or (do == self._take and result is None):
            return result, now
        cost = clock.now() - begun
        self.costs.append(cost)
        self.free_at = max(now, self.free_at) + cost
        return result, self.free_at


def choices(folder: SystemFolder, measured: bool) -> Slots:
    """Slots to which one process that knows the tree hands out stages."""
    order, valid, claimed = Growth(folder.plan, folder.config).order(()), set[StageKey](), set[StageKey]()

    def take(slot: int) -> StageKey | None:
        key = order.next(valid, claimed)
        if key is not None:
            claimed.add(key)
        return key

    def finish(slot: int, key: StageKey) -> None:
        claimed.remove(key)
        valid.add(key)

    return Slots(take, finish, measured)


def sharing(path: Path) -> Slots:
    """Slots that share a folder, each with its own view of it."""
    folders = [SystemFolder(path) for _ in range(SLOTS)]
    shares = [SharedGrowth(folder) for folder in folders]

    def take(slot: int) -> HeldClaim | None:
        folder = folders[slot]
        return (
            shares[slot]
            .take(
                lambda there, behind: shares[slot].first(there, folder.table.empty, behind),
                lambda key: {"slices": folder.slice_digests(key)},
                lambda claim: None,
            )
            .claim
        )

    def finish(slot: int, claim: HeldClaim) -> None:
        folder, key = folders[slot], claim.key
        below = None if key.parent is None else adapter_of(folder.stage_record(key.parent))
        folder.write_stage(key, {"slices": folder.slice_digests(key), "below": below, "metrics": {}}, _fill, claim)

    return Slots(take, finish, True)


def _fill(path: Path) -> None:
    safetensors.numpy.save_file({"lora": np.zeros(64, np.float32)}, path / ADAPTER_FILE)
    (path / ADAPTER_CONFIG_FILE).write_text("{}", encoding="utf-8")


def measure_slots(report: Report, shards: int, slices: int) -> None:
    """How busy slots are, apart from what the tree leaves idle."""
    with temporary_folder() as root:
        path = Path(root) / "system"
        folder = S3TTrainer(
            model=llama(slices, 16, vocabulary=64),
            args=arguments(path, gradient_checkpointing=False),
            train_dataset=make_rows(shards * slices * 8, 4, 64),
            peft_config=lora(2),
            s3t_config=S3TConfig(num_shards=shards, num_slices=slices, keep_idle=True, id_column="id"),
        ).folder
        count = len(folder.plan.stages())
        ideal = choices(folder, measured=False).run()
        for name, slots, target in (
            ("handed out by one process", choices(folder, measured=True), 0.9),
            ("that share a folder", sharing(path), None),
        ):
            seconds = slots.run()
            each = 1e3 * sum(slots.costs) / count
            numbers = {"stages": count, "seconds": seconds, "without_choices": ideal, "milliseconds_a_stage": each}
            label = f"{SLOTS} slots, {count} stages of 50 ms, {name}"
            goal = None if report.options.quick else target
            goal = None if report.options.quick else target
            report.add(label, ideal / seconds, "busy", at_least=goal, numbers=numbers)
            report.add(f"  one after the other, for each stage, {name}", each, "ms")


def main() -> None:
    """Measure, print, and write the results."""
    chosen = options(__doc__.partition("\n\n")[0].strip())
    rows, hidden, rounds = (64, 32, 1) if chosen.quick else (1024, 256, 3)
    shards, slices = (4, 4) if chosen.quick else (20, 8)
    settings = {"rows": rows, "hidden": hidden, "rounds": rounds, "shards": shards, "slices": slices, "slots": SLOTS}
    report = Report("workers", chosen, settings)
    measure_slots(report, shards, slices)
    measure_workers(report, rounds, rows, hidden)
    report.finish()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        where, of_rows, of_hidden, which = sys.argv[2:6]
        work(Path(where), int(which), int(of_rows), int(of_hidden))
    else:
        main()
