"""
`unlearn` that truncates stacks in place, against loading the truncated stack from disk with plain PEFT.

One example is deleted from the last slice of a stack that serves: its top stages stay, nothing is loaded, nothing is
trained. The alternative has the base in memory already, and knows which adapters to load: what it takes to swap the
truncated stack in by PEFT's own means. It ends when the truncated stack is there, so it is compared with the time
until the truncated stacks answer, the record synced. The whole call, which then frees tensors and removes files, is
shown too. Every deletion is made on a system that is fresh from the disk.
"""

import copy
import gc
import shutil
import statistics
from pathlib import Path

import torch
from harness import Report, Task, Timing, clock, options
from systems import llama, make_system, plain_peft, temporary_folder

from hf_s3t import S3TConfig, S3TModel, UnlearningReport
from hf_s3t.folder.layout import LEDGER_FILE
from hf_s3t.plan import StageKey


NUM_SLICES = 4


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

    def measure(self, rounds: int) -> tuple[list[UnlearningReport], Timing, Timing]:
        """
        The reports of `rounds` deletions, how long each took until the truncated stacks answered, and in all; next to
        loading what it left.
        """
        reports, answering, whole, theirs = [], [], [], []
        for number in range(-1, rounds):
            report, until_answering, seconds = self._delete()
            loading = self._load_with_peft(report)
            # The first is for warming up.
            if number >= 0:
                reports.append(report)
                answering.append(until_answering)
                whole.append(seconds)
                theirs.append(loading)
        return reports, Timing(answering, theirs), Timing(whole, theirs)

    def _delete(self) -> tuple[UnlearningReport, float, float]:
        folder = self.scratch / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.system, folder)
        model = S3TModel.from_pretrained(folder, base_model=copy.deepcopy(self.base))
        (tip,) = model._routing.served[0]
        example = model.folder.table.members(0, tip.prefix[-1])[0]
        gc.collect()
        reports, switched = [], []
        switch = model._calls.switch

        def noting(routing):
            held = switch(routing)
            switched.append(clock.now())
            return held

        model._calls.switch = noting
        started = clock.now()
        seconds = Task(lambda: reports.append(model.unlearn([example]))).seconds()
        self._check(model, tip, reports[0])
        return reports[0], switched[0] - started, seconds

    def _check(self, model: S3TModel, tip: StageKey, report: UnlearningReport) -> None:
        """That the call did, before it returned, all that is promised."""
        folder = model.folder
        ledger = (folder.path / LEDGER_FILE).read_text()
        assert ledger.endswith("\n") and ledger.count("\n") == 1
        assert (report.depths_before[0], report.depths_after[0]) == (tip.depth, tip.depth - 1)
        assert str(tip) in report.stages_removed
        assert tip not in model.stack and tip.parent in model.stack
        assert not any((folder.path / "stages" / name).exists() for name in report.stages_removed)
        model.refresh()

    def _load_with_peft(self, report: UnlearningReport) -> float:
        base = copy.deepcopy(self.base)
        tip = StageKey(0, tuple(range(report.depths_after[0])))
        adapters = [self.system / key.path for key in tip.lineage]
        gc.collect()
        return Task(lambda: plain_peft(base, adapters)).seconds()


def main() -> None:
    chosen = options(__doc__)
    layers, hidden, rounds = (8, 32, 2) if chosen.quick else (32, 64, 5)
    sizes = (100, 200) if chosen.quick else (1_000, 52_000)
    settings = {"layers": layers, "hidden": hidden, "rank": 16, "num_slices": NUM_SLICES, "budget": NUM_SLICES}
    report = Report("unlearn", chosen, {**settings, "targets": "all seven projections"})
    limits = {} if chosen.quick else {"lock": 1e-3, "call": 20e-3, "share": 0.01}
    base = llama(layers, hidden, vocabulary=1_000)
    for shards in (1, 5):
        for size in sizes:
            with temporary_folder() as folder:
                system = Path(folder) / "system"
                make_system(system, base, S3TConfig(num_shards=shards, num_slices=NUM_SLICES), size)
                reports, answering, whole = Deletions(system, base, Path(folder)).measure(rounds)
            name = f"m = {shards}, {size:,} examples"
            locks = [r.lock_seconds for r in reports]
            report.add(
                f"{name}: in the lock",
                statistics.median(locks),
                "s",
                at_most=limits.get("lock"),
                numbers={"all": locks},
            )
            calls = statistics.median(whole.ours)
            report.add(f"{name}: the call", calls, "s", at_most=limits.get("call"), numbers={"all": whole.ours})
            report.add_ratio(f"{name}: until it answers, against PEFT", answering, at_most=limits.get("share"))
            report.add_ratio(f"{name}: the call, against PEFT", whole)
    report.finish()


if __name__ == "__main__":
    main()
