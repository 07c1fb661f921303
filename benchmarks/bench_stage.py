"""
What a stage costs beyond its steps: by part, for bases of several sizes, for many stages and for many rows.

`S3TTrainer` trains systems of tiny rows; what is spent inside of epochs are a stage's steps, and all else is overhead:
attaching the adapter, what `Trainer` sets up anew, selecting and digesting rows, looking whether the base stayed as it
was, writing the stage. An overhead is judged against 0.3 s and 2 % of the steps of one epoch, of which no stage has
fewer than hf_s3t warns of. There is nobody to be compared with: parts and limits are of the same run.
"""

import contextlib
import copy
import statistics
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import Report, clock, exponent, options
from systems import BATCH, arguments, llama, lora, make_rows, temporary_folder
from transformers import PreTrainedModel, PrinterCallback

from hf_s3t import S3TConfig, S3TTrainer
from hf_s3t.plan.stages import LEAST_STEPS


SECONDS, SHARE = 0.3, 0.02
STEPS = "steps"


class Parts:
    """Where time goes: of parts inside of parts, the inner one has it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Inside, time is that of a part."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def _turn(self) -> None:
        now = clock.now()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now


class MeasuredTrainer(S3TTrainer):
    """A trainer that notes of each stage where its time went."""

    def measure(self) -> list[Counter[str]]:
        """Train what is missing; per stage, seconds by part."""
        self.stages_seen: list[Counter[str]] = []
        self.train()
        return self.stages_seen

    def _next_stage(self) -> Any:
        self.parts = Parts()
        with self.parts.part("which is next"):
            return super()._next_stage()

    def _train_stage(self, *args: Any, **kwargs: Any) -> Any:
        attach, digest = self._stack.add, self._stack.digest
        self._stack.add, self._stack.digest = self._within("adapter", attach), self._within("frozen digests", digest)
        try:
            with self.parts.part("checks"):
                return super()._train_stage(*args, **kwargs)
        finally:
            del self._stack.add, self._stack.digest
            self.stages_seen.append(self.parts.seconds)

    def _within(self, name: str, function: Any) -> Any:
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self.parts.part(name):
                return function(*args, **kwargs)

        return inside

    def _origin(self, *args: Any) -> Any:
        with self.parts.part("rows digested"):
            return super()._origin(*args)

    def _stage_dataset(self, *args: Any) -> Any:
        with self.parts.part("rows selected"):
            return super()._stage_dataset(*args)

    def _fit(self, *args: Any) -> Any:
        with self.parts.part("Trainer's set-up"):
            return super()._fit(*args)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        with self.parts.part(STEPS):
            super()._run_epoch(*args, **kwargs)

    def _let_go(self, *args: Any) -> None:
        with self.parts.part("letting go"):
            super()._let_go(*args)

    def _write(self, *args: Any) -> None:
        with self.parts.part("writing"):
            super()._write(*args)


def stages(base: PreTrainedModel, rows: int, steps: int, config: S3TConfig, rank: int = 16) -> list[Counter[str]]:
    """A system trained from its beginning; per stage, seconds by part."""
    with temporary_folder() as folder:
        args = arguments(Path(folder) / "system", gradient_checkpointing=False)
        args.max_steps = steps
        trainer = MeasuredTrainer(
            model=copy.deepcopy(base),
            args=args,
            train_dataset=make_rows(rows, 8, 1_000),
            peft_config=lora(rank),
            s3t_config=config,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer.measure()


def overhead(stage: Counter[str]) -> float:
    """Seconds of a stage beyond its steps."""
    return stage.total() - stage[STEPS]


def by_part(measured: list[Counter[str]]) -> dict[str, float]:
    """The mean of each part, the largest first."""
    total = sum(measured, Counter())
    return {part: seconds / len(measured) for part, seconds in total.most_common() if part != STEPS}


def add_sizes(report: Report, sizes: list[tuple[int, int]], steps: int, is_held: bool) -> None:
    """Bases of several sizes: the stage that is furthest beyond what it may cost, as a share of that."""
    for layers, hidden in sizes:
        measured = stages(llama(layers, hidden, 1_000), 4 * BATCH, steps, S3TConfig(num_slices=4, budget=1))
        shares = [overhead(stage) / (SECONDS + SHARE * stage[STEPS]) for stage in measured]
        report.add(
            f"{layers} layers of {hidden}: of 0.3 s + 2 %, the worst of 4 stages",
            max(shares),
            at_most=1.0 if is_held else None,
            numbers={
                "overheads": [overhead(stage) for stage in measured],
                "steps": [stage[STEPS] for stage in measured],
                "parts": by_part(measured),
            },
        )


def add_stages(report: Report, slices: int, is_held: bool) -> None:
    """Many stages: those of the last sequence against those of the second, which finds all layers wrapped too."""
    config = S3TConfig(num_shards=2, num_slices=slices, budget=slices, keep_idle=True)
    measured = stages(llama(slices, 16, 1_000), 4 * slices, 1, config, rank=2)
    seconds = [overhead(stage) for stage in measured]
    early, late = (statistics.median(some) for some in (seconds[slices : 2 * slices], seconds[-slices:]))
    report.add(
        f"{len(seconds)} stages: the last sequence's overhead, of the second's",
        late / early,
        at_most=1.1 if is_held else None,
        numbers={"overheads": seconds},
    )


def add_rows(report: Report, sizes: list[int], is_held: bool) -> None:
    """Many rows: overheads of the first stage, which looks at all rows, and of the last; and how they grow."""
    base, few = llama(4, 64, 1_000), 20
    runs = {rows: stages(base, rows, few, S3TConfig(num_slices=4, budget=1)) for rows in sizes}
    for which, name in ((0, "first"), (-1, "last")):
        seconds = [overhead(measured[which]) for measured in runs.values()]
        stage = runs[sizes[-1]][which]
        epoch = stage[STEPS] / few * max(LEAST_STEPS, sizes[-1] // BATCH * (1 if which else 0.25))
        report.add(
            f"{sizes[-1]:,} rows: of 0.3 s + 2 % of an epoch, the {name} stage",
            seconds[-1] / (SECONDS + SHARE * epoch),
            at_most=1.0 if is_held else None,
            numbers={"overheads": dict(zip(map(str, sizes), seconds, strict=True)), "parts": dict(stage)},
        )
        report.add(
            f"{sizes[0]:,} to {sizes[-1]:,} rows: exponent of the {name} stage's overhead",
            exponent(sizes, seconds),
            unit="",
            at_most=1.05 if is_held else None,
        )


def main() -> None:
    chosen = options(__doc__)
    is_held, steps = not chosen.quick, 2 if chosen.quick else LEAST_STEPS
    sizes = [(4, 16)] if chosen.quick else [(4, 64), (16, 64), (16, 512), (64, 64)]
    rows = [64, 128] if chosen.quick else [12_500, 25_000, 50_000, 100_000]
    slices = 2 if chosen.quick else 6
    report = Report("stage", chosen, {"batch": BATCH, "tokens": 8, "steps": steps, "slices": slices, "rows": rows})
    # What a process does once is nobody's overhead.
    stages(llama(4, 16, 1_000), 4 * BATCH, 1, S3TConfig(num_slices=4, budget=1))
    add_sizes(report, sizes, steps, is_held)
    add_stages(report, slices, is_held)
    add_rows(report, rows, is_held)
    report.finish()


if __name__ == "__main__":
    main()
