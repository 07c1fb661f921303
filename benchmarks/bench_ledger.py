"""
What the ledger costs: its part of a deletion, of following another process's, its bytes and its memory.

The system is grown again after each deletion, as in a long life: each line removes four stages and names four that
were grown. A deletion's part of the ledger is its line, made, appended and synced, and the head that names it. It is
compared with an append-only table of sqlite3 (write-ahead log, `synchronous=FULL`) that holds the same lines and
hashes, in turn in one process. Times are the processor's, and what grows is told by exponents over four sizes.
"""

import gc
import hashlib
import json
import sqlite3
import statistics
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from harness import Report, Task, clock, exponent, interleave, options

from hf_s3t.errors import FolderError
from hf_s3t.folder.files import stamp
from hf_s3t.folder.layout import LEDGER_FILE
from hf_s3t.folder.ledger_file import append_line, read_ledger, read_on, write_head
from hf_s3t.records.ledger import Ledger, LedgerEntry, line_hash


VERSIONS = dict.fromkeys(("python", "hf_s3t", "torch", "transformers", "peft", "accelerate", "trl"), "1.2.3")
# Stages that go, and that were grown, with each line.
CHANGED = 4
SHARD = 64
MILLISECONDS = 2e-3
# How far from 0 the exponent of what does not grow may be, on a machine that others use.
FLAT = 0.15
MEBIBYTES = 2**20


def digest(*what: object) -> str:
    """A digest like any other."""
    return hashlib.sha256(repr(what).encode()).hexdigest()


class Life:
    """
    Deletions of a system that is grown again after each.

    Args:
        num_stages (`int`): How many stages it has.
    """

    def __init__(self, num_stages: int):
        self.stages = {f"shard-{n // SHARD}/{n % SHARD}": digest(n) for n in range(num_stages)}
        self._names = list(self.stages)
        self._at = 0

    def next(self) -> dict:
        """What the next line says, as `Ledger.append` takes it."""
        names = [self._names[(CHANGED * self._at + n) % len(self._names)] for n in range(CHANGED)]
        self._at += 1
        before = self._names[(CHANGED * self._at + 8 * CHANGED) % len(self._names)]
        self.stages[before] = digest(before, self._at)
        # What went with the line before was grown again since.
        self.stages |= {name: digest(name, self._at) for name in names}
        removed = {name: self.stages[name] for name in names}
        return {
            "ids": [digest("id", self._at)],
            "removed": removed,
            "stages_now": dict(self.stages),
            "versions": VERSIONS,
        }


class Ours:
    """A ledger in its file."""

    def __init__(self, folder: Path, ledger: Ledger):
        self.folder, self.ledger = folder, ledger
        self.file = folder / LEDGER_FILE
        folder.mkdir()
        self.file.write_text(ledger.text)

    def delete(self, change: dict) -> None:
        """The ledger's part of a deletion."""
        self.ledger = self.ledger.append("deletion", **change)
        append_line(self.folder, self.ledger)
        write_head(self.folder, self.ledger)


class Follower:
    """The same ledger in another process."""

    def __init__(self, file: Path):
        self.file, self.before, self.ledger = file, stamp(file), read_ledger(file)

    def read(self) -> None:
        """Read what the writer appended."""
        found = stamp(self.file)
        ledger = read_on(self.file, self.ledger, self.before)
        if ledger is None:
            raise AssertionError("the ledger was to be read as a whole")
        self.ledger, self.before = ledger, found


class Table:
    """The same lines in a table of sqlite3 that is only appended to."""

    def __init__(self, folder: Path, lines: Sequence[str]):
        folder.mkdir()
        self.connection = sqlite3.connect(folder / "ledger.sqlite")
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=FULL")
        self.connection.execute("CREATE TABLE lines (number INTEGER PRIMARY KEY, hash TEXT UNIQUE, line TEXT)")
        rows = ((line_hash(line), line) for line in lines)
        self.connection.executemany("INSERT INTO lines (hash, line) VALUES (?, ?)", rows)
        self.connection.commit()
        self.last = line_hash(lines[-1])

    def delete(self, change: dict) -> None:
        """The table's part of a deletion: the same hash chain, and what changed as the caller knows it."""
        said = {name: change[name] for name in ("ids", "removed")}
        said["grown"] = {name: change["stages_now"][name] for name in change["removed"]}
        line = json.dumps({**said, "previous": self.last, "version": 2}, sort_keys=True, separators=(",", ":"))
        self.last = line_hash(line)
        self.connection.execute("INSERT INTO lines (hash, line) VALUES (?, ?)", (self.last, line))
        self.connection.commit()


def ledger_of(num_stages: int, lines: int) -> tuple[Ledger, Life]:
    """A ledger of so many lines, and the life that it is of."""
    ledger, life = Ledger(), Life(num_stages)
    for _ in range(lines):
        ledger = ledger.append("deletion", **life.next())
    return ledger, life


def first_version(ledger: Ledger) -> Ledger:
    """The same ledger as earlier releases wrote it: each line lists all stages that stay."""
    lines: list[str] = []
    for entry in ledger.entries:
        previous = (line_hash(lines[-1]),) if lines else ()
        values = {**vars(entry), "previous": previous, "version": 1}
        lines.append(LedgerEntry(**values).to_line())
    return Ledger(lines)


def memory_of(make: Callable[[], object]) -> int:
    """Bytes that something takes when it is made, and nothing but it."""
    gc.collect()
    tracemalloc.start()
    made = make()
    gc.collect()
    taken = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del made
    return taken


class Bench:
    """The measurements, at sizes that `--quick` makes small."""

    def __init__(self, report: Report, scratch: Path, quick: bool):
        self.report, self.scratch = report, scratch
        self.lines = (20, 40, 80, 160) if quick else (100, 1_000, 10_000, 100_000)
        self.stages = (20, 40, 80, 160) if quick else (20, 80, 320, 1_280)
        # In the quick run the ratios and exponents of some calls mean nothing, and are not judged.
        self.calls, self.rounds = (2, 2) if quick else (20, 5)
        self.limits = (lambda **_: {}) if quick else (lambda **limits: limits)

    def run(self) -> None:
        """All of them."""
        most = self.stages[-1]
        longest, life = ledger_of(most, self.lines[-1])
        by_lines = []
        for count in self.lines:
            part = Ledger(longest.lines[:count])
            by_lines.append(self.deletion(f"{count:,} lines, {most:,} stages", part, life, count == self.lines[-1]))
        self.growth("deletion: growth with lines", self.lines, by_lines)
        by_stages = []
        for count in self.stages:
            ledger, life = ledger_of(count, self.lines[1])
            by_stages.append(self.deletion(f"{self.lines[1]:,} lines, {count:,} stages", ledger, life))
        self.growth("deletion: growth with stages", self.stages, by_stages)
        self.following(longest, life)
        self.sizes()
        self.damaged(longest)

    def growth(self, name: str, sizes: Sequence[int], times: Sequence[float]) -> None:
        """An exponent that should be 0."""
        numbers = {"sizes": list(sizes), "seconds": list(times)}
        self.report.add(name, exponent(sizes, times), "exponent", numbers=numbers, **self.limits(at_most=FLAT))

    def deletion(self, name: str, ledger: Ledger, life: Life, is_goal: bool = False) -> float:
        """The ledger's part of one deletion, against the table's; returns seconds."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        ours, theirs = Ours(folder / "ours", ledger), Table(folder / "theirs", ledger.lines)
        timing = interleave(
            Task(ours.delete, life.next), Task(theirs.delete, life.next), rounds=self.rounds, calls=self.calls
        )
        self.report.add_ratio(f"deletion: {name}, against sqlite3", timing)
        median = statistics.median(timing.ours)
        if is_goal:
            self.report.add(f"deletion: {name}", median, "s", **self.limits(at_most=MILLISECONDS))
        theirs.connection.close()
        return median

    def following(self, longest: Ledger, life: Life) -> None:
        """Reading one line that another process wrote, against reading the whole file."""
        times = []
        for count in self.lines:
            writer = Ours(self.scratch / f"followed-{count}", Ledger(longest.lines[:count]))
            # In another process: nothing of it is shared with the writer's.
            follower = Follower(writer.file)
            timed = []
            for _ in range(self.rounds * self.calls):
                writer.delete(life.next())
                timed.append(Task(follower.read).seconds())
            times.append(statistics.median(timed))
            whole = Task(partial(read_ledger, writer.file)).seconds()
            self.report.add(
                f"following: one line behind {count:,}, against reading all",
                times[-1] / whole,
                "of theirs",
                numbers={"ours_seconds": times[-1], "theirs_seconds": whole},
            )
        self.growth("following: growth with lines", self.lines, times)

    def sizes(self) -> None:
        """Bytes of a line, and memory of a ledger, beside those of the first version."""
        lines = min(self.lines[1], 1_000)
        found = []
        for count in self.stages:
            ledger, _ = ledger_of(count, lines)
            # The first line names all stages that were grown before it.
            found.append((ledger.size() - ledger.size(1)) / (lines - 1))
            self.report.add(f"a line, {count:,} stages", round(found[-1]), "bytes")
        self.growth("a line: growth with stages", self.stages, found)
        old = first_version(ledger)
        self.report.add(f"a line of the first version, {self.stages[-1]:,} stages", old.size() // lines, "bytes")
        for name, one in (("", ledger), (" of the first version", old)):
            text = one.text
            taken = memory_of(lambda text=text: Ledger.parse(text))
            limit = self.limits(at_most=16 * MEBIBYTES)
            self.report.add(f"memory of {lines:,} lines{name}, {self.stages[-1]:,} stages", taken, "bytes", **limit)

    def damaged(self, longest: Ledger) -> None:
        """Refusing a ledger that is damaged in its middle, against reading it whole."""
        count = self.lines[-2]
        lines = list(longest.lines[:count])
        whole = self.scratch / "whole.jsonl"
        whole.write_text("".join(line + "\n" for line in lines))
        lines[count // 2] = lines[count // 2].replace('"kind"', '"sort"')
        damaged = self.scratch / "damaged.jsonl"
        damaged.write_text("".join(line + "\n" for line in lines))

        def refused() -> None:
            with suppress(FolderError):
                read_ledger(damaged)
                raise AssertionError("a damaged ledger was read")

        timing = interleave(Task(refused), Task(lambda: read_ledger(whole)), rounds=self.rounds)
        name = f"refused: damaged in the middle of {count:,} lines, against reading a whole one"
        self.report.add_ratio(name, timing, **self.limits(at_most=1))


def main() -> None:
    """Measure, print, write."""
    chosen = options(__doc__)
    clock.kind = "cpu"
    with tempfile.TemporaryDirectory() as scratch:
        report = Report("ledger", chosen, {"changed_stages_per_line": CHANGED})
        Bench(report, Path(scratch), chosen.quick).run()
    report.finish()


if __name__ == "__main__":
    main()
