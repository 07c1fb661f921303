"""
`unlearn` in a live model, against changing the stacks of a live model with plain PEFT.

One example is deleted, from each slice in turn of the stack that serves its shard. From the last slice: its top stages
stay, and answer as they are. From any other: another stack is the longest now, and its stages are read from the disk.
Nothing is trained. The alternative has the base in memory with the adapters that serve, knows which ones shall, loads
those that are missing, as quickly as PEFT can (`low_cpu_mem_usage=True`), makes them active and then deletes the
others. Of several shards it holds the one that changes alone. Its time until they are active is compared with ours
until the stacks that are left answer, the record synced; the whole call, which also frees tensors and removes files,
with its time to the end. Every deletion is made on a system that is fresh from the disk.
"""

import copy
import gc
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Report, Timing, clock, options
from systems import llama, make_system, plain_peft, temporary_folder

from hf_s3t import S3TConfig, S3TModel, UnlearningReport
from hf_s3t.folder.layout import LEDGER_FILE
from hf_s3t.plan import StageKey


NUM_SLICES = 4


@dataclass(frozen=True)
class Spent:
    """Seconds until the stacks that are left answer, and in all."""

    answering: float
    whole: float


class Deletions:
    """
    Deletions of one example each, on fresh copies of a system.

    Args:
        system (`Path`): Folder of the system; only copies of it are changed.
        base (`nn.Module`): The bare base, of which copies are made too.
        scratch (`Path`): A folder for the copies.
    """

    def __init__(self, system: Path, base: torch.nn.Module, scratch: Path):
        self.system, self.base, self.scratch = system, base, scratch

    def measure(self, position: int, rounds: int) -> tuple[list[UnlearningReport], Timing, Timing]:
        """
        The reports of `rounds` deletions from one slice of the stack that serves the first shard, how long each took
        until the stacks that are left answered, and in all; next to the same change with PEFT.
        """
        reports, ours, theirs = [], [], []
        for number in range(-1, rounds):
            report, before, after, spent = self._delete(position)
            swapped = self._swap_with_peft(before, after)
            # The first is for warming up.
            if number >= 0:
                reports.append(report)
                ours.append(spent)
                theirs.append(swapped)
        answering = Timing([spent.answering for spent in ours], [spent.answering for spent in theirs])
        return reports, answering, Timing([spent.whole for spent in ours], [spent.whole for spent in theirs])

    def _delete(self, position: int) -> tuple[UnlearningReport, StageKey, StageKey, Spent]:
        folder = self.scratch / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.system, folder)
        model = S3TModel.from_pretrained(folder, base_model=copy.deepcopy(self.base))
        (before,) = model._routing.served[0]
        example = model.folder.table.members(0, before.prefix[position])[0]
        gc.collect()
        switched = []
        switch = model._calls.switch

        def noting(routing):
            held = switch(routing)
            switched.append(clock.now())
            return held

        model._calls.switch = noting
        started = clock.now()
        report = model.unlearn([example])
        spent = Spent(switched[-1] - started, clock.now() - started)
        (after,) = model._routing.served[0]
        self._check(model, before, after, report)
        return report, before, after, spent

    def _check(self, model: S3TModel, tip: StageKey, left: StageKey, report: UnlearningReport) -> None:
        """That the call did, before it returned, all that is promised."""
        folder = model.folder
        ledger = (folder.path / LEDGER_FILE).read_text()
        assert ledger.endswith("\n") and ledger.count("\n") == 1
        assert (report.depths_before[0], report.depths_after[0]) == (tip.depth, tip.depth - 1)
        assert str(tip) in report.stages_removed
        assert tip not in model.stack and all(key in model.stack for key in left.lineage)
        assert not any((folder.path / "stages" / name).exists() for name in report.stages_removed)
        model.refresh()

    def _swap_with_peft(self, tip: StageKey, left: StageKey) -> Spent:
        before, after = tip.lineage, left.lineage
        live = plain_peft(copy.deepcopy(self.base), {key.adapter_name: self.system / key.path for key in before})
        live.base_model.set_adapter([key.adapter_name for key in before], inference_mode=True)
        gc.collect()
        started = clock.now()
        for key in after:
            if key not in before:
                live.load_adapter(self.system / key.path, adapter_name=key.adapter_name, low_cpu_mem_usage=True)
        live.base_model.set_adapter([key.adapter_name for key in after], inference_mode=True)
        answering = clock.now() - started
        for key in before:
            if key not in after:
                live.delete_adapter(key.adapter_name)
        return Spent(answering, clock.now() - started)


def main() -> None:
    chosen = options(__doc__)
    layers, hidden, rounds = (8, 32, 2) if chosen.quick else (32, 64, 5)
    sizes = (100,) if chosen.quick else (1_000, 52_000)
    settings = {"layers": layers, "hidden": hidden, "rank": 16, "num_slices": NUM_SLICES, "budget": NUM_SLICES}
    report = Report("unlearn", chosen, {**settings, "targets": "all seven projections"})
    limits = {} if chosen.quick else {"lock": 1e-3, "answer": 50e-3, "active": 1.0, "loaded": 0.25}
    base = llama(layers, hidden, vocabulary=1_000)
    for shards in (1, 5):
        for size in sizes:
            with temporary_folder() as folder:
                system = Path(folder) / "system"
                make_system(system, base, S3TConfig(num_shards=shards, num_slices=NUM_SLICES, keep_idle=True), size)
                deletions = Deletions(system, base, Path(folder))
                for position in reversed(range(NUM_SLICES)):
                    name = f"m = {shards}, {size:,} examples, slice {position + 1}"
                    reports, answering, whole = deletions.measure(position, rounds)
                    # From the last slice there is nothing to load, for them as for us.
                    share = limits.get("active" if position == NUM_SLICES - 1 else "loaded")
                    locks = [r.lock_seconds for r in reports]
                    lock, answers = statistics.median(locks), statistics.median(answering.ours)
                    report.add(f"{name}: in the lock", lock, "s", at_most=limits.get("lock"), numbers={"all": locks})
                    report.add(f"{name}: until it answers", answers, "s", at_most=limits.get("answer"))
                    report.add_ratio(f"{name}: until it answers, against PEFT", answering, at_most=share)
                    report.add_ratio(f"{name}: the call, against PEFT", whole)
    report.finish()


if __name__ == "__main__":
    main()
