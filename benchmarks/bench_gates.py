"""
What a gate costs with up to a million rows of 20 words each, drawn by Zipf's law from 300,000.

Of a prompt: its words hashed, and the scores of all shards. Of a deletion: what it takes from rows and counts, first
and after a thousand others. Beside the calls: counting all rows, writing the file without the deleted ones, opening
it, its size, and the memory of what was opened. Times are the processor's; what should not grow is told by exponents.
"""

import gc
import statistics
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
from harness import Report, Task, clock, exponent, options

from hf_s3t import S3TConfig
from hf_s3t.folder.gate_file import StoredGate, read_gate, write_gate
from hf_s3t.records.buffers import hexadecimal
from hf_s3t.records.digests import DigestKey
from hf_s3t.records.ledger import Ledger
from hf_s3t.records.terms import TermRows, terms_of


KEY = DigestKey(b"of the benchmark, and of nobody")
WORDS = 20
VOCABULARY = 300_000
ZIPF = 1.1
LONG = 300
PROMPT_SECONDS = 2e-3
DELETION_SECONDS = 5e-3
# How far the exponent of what does not grow may be above 0, on a machine that others use.
FLAT = 0.15
MEBIBYTES = 2**20


class Prompts:
    """
    Rows of words, and what stands for them.

    Args:
        rng (`numpy.random.Generator`): Draws them.
        vocabulary (`int`): Number of distinct words.
    """

    def __init__(self, rng: np.random.Generator, vocabulary: int):
        self.rng = rng
        self.terms = KEY.of_terms(map(self.word, range(vocabulary)))
        share = np.arange(1, vocabulary + 1, dtype=np.float64) ** -ZIPF
        self._ends = np.cumsum(share / share.sum())

    @staticmethod
    def word(number: int) -> str:
        """A word."""
        return f"word{number}"

    def draw(self, count: int) -> np.ndarray:
        """Numbers of words, frequent ones first."""
        return np.minimum(np.searchsorted(self._ends, self.rng.random(count)), len(self.terms) - 1)

    def text(self, length: int) -> str:
        """A prompt."""
        return " ".join(map(self.word, self.draw(length).tolist()))

    def rows(self, count: int, config: S3TConfig) -> TermRows:
        """The terms of many rows."""
        digests = np.sort(np.frombuffer(self.rng.bytes(32 * count), "S32")).view(np.uint8).reshape(-1, 32)
        terms = np.sort(self.terms[self.draw(count * WORDS)].reshape(count, WORDS), axis=1)
        is_new = np.ones(terms.shape, bool)
        is_new[:, 1:] = terms[:, 1:] != terms[:, :-1]
        ends = np.cumsum(is_new.sum(axis=1), dtype=np.int64)
        places = [self.rng.integers(0, most, count, np.int32) for most in (config.num_shards, config.num_slices)]
        return TermRows(digests, *places, ends, terms[is_new])


class Bench:
    """The measurements, at sizes that `--quick` makes small."""

    def __init__(self, report: Report, scratch: Path, quick: bool):
        self.report, self.file = report, scratch / "gate.safetensors"
        self.sizes = (500, 1_000, 2_000) if quick else (10_000, 100_000, 1_000_000)
        self.layouts = ((2, 2), (5, 2)) if quick else ((1, 4), (5, 2), (20, 4), (50, 8))
        self.calls, self.deletions = (5, 10) if quick else (100, 1_000)
        self.limits = (lambda **_: {}) if quick else (lambda **limits: limits)
        self.prompts = Prompts(np.random.default_rng(0), 2_000 if quick else VOCABULARY)

    def run(self) -> None:
        """All of them."""
        found = []
        for count in self.sizes:
            found.append(self.calls_of(count, *self.layouts[1]))
        for name, times in zip(("a prompt", "a deletion"), zip(*found, strict=True), strict=True):
            numbers = {"sizes": list(self.sizes), "seconds": list(times)}
            growth = exponent(self.sizes, times)
            self.report.add(
                f"{name}: growth with rows", growth, "exponent", numbers=numbers, **self.limits(at_most=FLAT)
            )
        for layout in self.layouts:
            if layout != self.layouts[1]:
                self.calls_of(self.sizes[-1], *layout)

    def calls_of(self, count: int, num_shards: int, num_slices: int) -> tuple[float, float]:
        """All of one size: the seconds of a prompt and of a deletion."""
        config = S3TConfig(num_shards=num_shards, num_slices=num_slices, keep_idle=True)
        rows = self.prompts.rows(count, config)
        what = f"{count:,} rows, m = {num_shards}, L = {num_slices}"
        started = clock.now()
        gate = StoredGate.of(rows, num_shards, num_slices, "")
        self.report.add(f"counting: {what}", clock.now() - started, "s")
        prompt = self.asked(gate, WORDS, what)
        self.asked(gate, LONG, what)
        deletion, gate = self.forgotten(gate, what)
        self.asked(gate, WORDS, f"{what}, after {self.deletions:,} deletions")
        self.stored(gate, config, what)
        return prompt, deletion

    def asked(self, gate: StoredGate, length: int, what: str) -> float:
        """The scores of a prompt, from its text."""
        counts = gate.counts
        seen = [range(counts.num_slices)] * counts.num_shards
        task = Task(lambda text: counts.scores(terms_of(text, KEY), seen), lambda: self.prompts.text(length))
        median = statistics.median(task.seconds() for _ in range(self.calls))
        self.report.add(f"a prompt of {length} words: {what}", median, "s", **self.limits(at_most=PROMPT_SECONDS))
        return median

    def forgotten(self, gate: StoredGate, what: str) -> tuple[float, StoredGate]:
        """Deletions of a row each, one after the other."""
        numbers = self.prompts.rng.permutation(len(gate.rows))[: self.deletions]
        times = []
        for digest in hexadecimal(gate.rows.digests[numbers]):
            started = clock.now()
            gate = gate.without([digest])
            times.append(clock.now() - started)
        tenth = len(times) // 10
        median = statistics.median(times[:tenth])
        self.report.add(f"a deletion: {what}", median, "s", **self.limits(at_most=DELETION_SECONDS))
        last = statistics.median(times[-tenth:])
        self.report.add(f"the last of {len(times):,}: {what}", last, "s", **self.limits(at_most=DELETION_SECONDS))
        return median, gate

    def stored(self, gate: StoredGate, config: S3TConfig, what: str) -> None:
        """The file without the deleted rows."""
        written = Task(lambda: write_gate(self.file, gate, Ledger(), KEY.check)).seconds()
        self.report.add(f"writing without them: {what}", written, "s")
        self.report.add(f"the file: {what}", self.file.stat().st_size / MEBIBYTES, "MiB")
        gc.collect()
        tracemalloc.start()
        started = clock.now()
        read, _ = read_gate(self.file, KEY.check, config)
        seconds = clock.now() - started
        gc.collect()
        taken, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        self.report.add(f"opening: {what}", seconds, "s")
        self.report.add(f"memory: {what}", taken / MEBIBYTES, "MiB", numbers={"peak": peak / MEBIBYTES})
        if len(read.rows) != len(gate.rows):
            raise AssertionError("another number of rows was read than written")


def main() -> None:
    """Measure, print, write."""
    chosen = options(__doc__)
    clock.kind = "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        settings = {"words_per_row": WORDS, "vocabulary": VOCABULARY, "zipf": ZIPF}
        report = Report("gates", chosen, settings)
        Bench(report, Path(scratch), chosen.quick).run()
    report.finish()


if __name__ == "__main__":
    main()
