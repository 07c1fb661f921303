"""
What rows cost with more and more of them: placing, opening, forgetting, compacting, following, copying, publishing.

Rows are four columns (an id that is an address, a group of three, two short texts), in a system of two shards, two
slices each, over a small Llama, so that what is measured is the table's. Times are the processor's, for the machine is
shared: of a thread where others go on meanwhile, of a process where a process is meant, time and peak of memory beyond
what it takes without a system (`--version`). Only how long calls wait beside a compaction is told in time that passes,
next to how long they take beside nothing. The Hub is that of the tests, in a process of its own. What an expert would
take instead is measured in turn in the same process: for opening, reading
the file by pyarrow and making a dictionary of its ids; for one id, a table of sqlite3 with an index, from which the
row goes in a transaction. Growth is told by exponents over four sizes: with 1, twice the rows take twice the time.
"""

import hub_process  # isort: skip
import gc
import itertools
import json
import os
import shutil
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from harness import Report, Task, clock, exponent, interleave, options
from systems import llama, lora, make_system, sharing, temporary_folder
from transformers import TrainingArguments

from hf_s3t import S3TConfig, S3TModel, S3TTrainer
from hf_s3t.folder.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILE, KEY_FILE, TABLE_FILE
from hf_s3t.folder.secret import load_key
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.deletion import apply, record_request
from hf_s3t.operations.inspection import inspect
from hf_s3t.records.columns import Columns
from hf_s3t.records.digests import DigestKey, KeptNames
from hf_s3t.records.examples import ExampleTable
from hf_s3t.records.request import DeletionRequest
from hf_s3t.training.rows import TrainingRows


SHAPE = {"num_shards": 2, "num_slices": 2, "budget": 1}
CONFIG = S3TConfig(**SHAPE, id_column="id", group_column="group")
SIZES = (10_000, 100_000, 300_000, 1_000_000)
QUICK = (500, 1_000)
# Largest growth of what goes through all rows once, on a machine that others use.
LINEAR = 1.1
# Examples that are forgotten, and sought, at once: one in ten.
SHARE = 10
MEBIBYTES = 2**20
# What is promised for a million rows.
GOALS = {
    "digesting rows": 6.0,
    "opening in a process of its own (`status`)": 3.0,
    "opening": 3.0,
    "memory of opening": 600.0,
    "`from_pretrained`": 3.0,
    "memory of `from_pretrained`": 600.0,
    "`unlearn` of one id, the first in a process": 20e-3,
    "`unlearn` of one id": 20e-3,
    "`unlearn` of a tenth at once": 2.0,
    "the next call after a deletion elsewhere": 50e-3,
    "forgetting one id, live": 20e-3,
    "compaction after it": 3.0,
    "forgetting a tenth at once, live": 2.0,
    "compaction after that": 3.0,
    "following a deletion": 50e-3,
    "`hf-s3t unlearn` of one id": 3.0,
}
# Of ten thousand rows.
SMALL_UNLEARN = 0.6

_PEAK = r"""
import re
# Not ru_maxrss, in which the process counts that began this one.
peak = lambda: int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) * 1024
"""
_PROBE = (
    _PEAK
    + r"""
import json, sys, time
from hf_s3t import S3TModel
from hf_s3t.folder.opening import open_folder
from transformers import AutoModelForCausalLM
path, what, base, example = sys.argv[1:]
if what == "opening":
    run = lambda: open_folder(path).prepare()
else:
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    run = lambda: S3TModel.from_pretrained(path, base_model=model)
before, started = peak(), time.process_time()
made = run()
found = {"bytes": peak() - before, "seconds": time.process_time() - started}
if made is not None:
    started = time.thread_time()
    made.unlearn([example])
    found["first"] = time.thread_time() - started
    # What the deletion left to do in the background ends first.
    made.refresh()
print(json.dumps(found))
"""
)
_COMMAND = (
    _PEAK
    + r"""
import atexit, runpy, sys
atexit.register(lambda: print(peak(), file=sys.stderr))
runpy.run_module("hf_s3t", run_name="__main__", alter_sys=True)
"""
)
# Seconds that calls are made one after another, beside nothing.
_QUIET = 1.0
_LONGEST = "longest call"
_NUMBERS = itertools.count()


def rows(number: int) -> Iterator[dict]:
    """Examples like those of somebody who trains on what people wrote."""
    for n in range(number):
        yield {"id": f"person-{n:09d}@example.org", "group": f"family-{n // 3}", "prompt": f"Who lives at number {n}?",
               "answer": f"At number {n} lives the family {n // 3}."}  # fmt: skip


def ids(numbers: Sequence[int]) -> list[str]:
    """Their ids."""
    return [f"person-{n:09d}@example.org" for n in numbers]


class Scaled:
    """
    A system of many rows, whose stages are those of a small one: no stage is trained, and none depends on the size.

    Args:
        path (`Path`): Its folder.
        small (`Path`): The small system.
        dataset ([`~datasets.Dataset`]): The rows.
    """

    def __init__(self, path: Path, small: Path, dataset: Dataset):
        record = json.loads((small / "s3t_config.json").read_text())
        made_anew = ("digest", "format_version", "system_id", "plan", "key_check", "row_digests")
        record = {**{n: v for n, v in record.items() if n not in made_anew}, "s3t_config": CONFIG.to_dict()}
        path.mkdir()
        shutil.copy2(small / KEY_FILE, path / KEY_FILE)
        key = load_key(small)
        started = clock.now()
        table = digested(dataset, key)
        self.digesting = clock.now() - started
        SystemFolder.create(path, record, table, key)
        self.path, folder = path, SystemFolder(path)
        for stage in folder.plan.stages():
            below = folder.stage_record(stage.parent)["files"][ADAPTER_FILE] if stage.parent else None
            written = {"slices": folder.slice_digests(stage), "below": below, "metrics": {}}
            folder.write_stage(stage, written, lambda target, stage=stage: self._fill(target, small / stage.path))

    @staticmethod
    def _fill(target: Path, stage: Path) -> None:
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            shutil.copyfile(stage / name, target / name)

    def copy(self) -> Path:
        """A copy, to forget examples of."""
        target = self.path.with_name("copy")
        shutil.rmtree(target, ignore_errors=True)
        return Path(shutil.copytree(self.path, target))


def digested(dataset: Dataset, key: DigestKey) -> ExampleTable:
    """Everything that is digested of rows where a system is made: contents, ids, and slices. Places are given."""
    made = TrainingRows(dataset, CONFIG)
    cells = np.arange(len(dataset)) % (SHAPE["num_shards"] * SHAPE["num_slices"])
    shards, slices = (part.astype(np.int32) for part in divmod(cells, SHAPE["num_slices"]))
    columns = Columns.of(KeptNames(key, "plain"), made.ids, shards, slices, made.digests(key), made.groups)
    return ExampleTable(columns, SHAPE["num_shards"], SHAPE["num_slices"], CONFIG.seed).index()


def command(*arguments: str, **environment: str) -> np.ndarray:
    """Seconds of the processor that a command line takes, and bytes of memory at its peak."""
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"hf-s3t {' '.join(arguments)} ended with {process.returncode}: {said}")
    return np.array([usage.ru_utime + usage.ru_stime, int(said.split()[-1])])


def of_this_thread(run: Callable[[], object]) -> float:
    """Seconds of the processor that a call takes in the thread that waits for it."""
    gc.collect()
    started = time.thread_time()
    run()
    return time.thread_time() - started


def of_this_process(run: Callable[[], object]) -> float:
    """The same in all threads."""
    gc.collect()
    started = time.process_time()
    run()
    return time.process_time() - started


class Index:
    """What an expert would keep ids in: a table of sqlite3 with an index, from which a row goes in a transaction."""

    def __init__(self, path: Path, table: Path):
        path.unlink(missing_ok=True)
        self.connection = sqlite3.connect(path)
        self.connection.execute("PRAGMA journal_mode=WAL")
        self.connection.execute("PRAGMA synchronous=FULL")
        self.connection.execute("CREATE TABLE examples (id TEXT PRIMARY KEY, shard INT, slice INT, digest TEXT)")
        columns = pq.read_table(table, columns=["id", "shard", "slice", "digest"]).to_pydict().values()
        self.connection.executemany("INSERT INTO examples VALUES (?, ?, ?, ?)", zip(*columns, strict=True))
        self.connection.execute("CREATE INDEX by_content ON examples (digest)")
        self.connection.commit()

    def forget(self, example: str) -> None:
        """Find the row, look for others of its content, and delete it."""
        where = (example,)
        (found,) = self.connection.execute("SELECT digest FROM examples WHERE id = ?", where)
        self.connection.execute("SELECT id FROM examples WHERE digest = ? AND id != ?", (*found, example)).fetchall()
        self.connection.execute("DELETE FROM examples WHERE id = ?", where)
        self.connection.commit()


def measure_opening(scaled: Scaled, base: Path) -> dict[str, float]:
    """What it takes to open a system, and to load a model of it, in a process of its own each, and to ask it much."""
    opened, loaded = (_probed(scaled.copy(), what, base) for what in ("opening", "from_pretrained"))
    folder = SystemFolder(scaled.path)
    wanted = ids(range(0, len(folder.table), SHARE))
    return {
        "opening": opened["seconds"],
        "memory of opening": opened["bytes"] / MEBIBYTES,
        "`from_pretrained`": loaded["seconds"],
        "memory of `from_pretrained`": loaded["bytes"] / MEBIBYTES,
        "`unlearn` of one id, the first in a process": loaded["first"],
        "locating a tenth": of_this_process(lambda: folder.table.places_of(wanted)),
        "`check`": of_this_process(lambda: _refuse(inspect(scaled.path).problems)),
        "`save_pretrained`": of_this_process(lambda: _saved(scaled)),
    }


def _saved(scaled: Scaled) -> None:
    folder, target = SystemFolder(scaled.path.with_name("copy")), scaled.path.with_name("saved")
    folder.copy_to(target)
    shutil.rmtree(target)


def _probed(path: Path, what: str, base: Path) -> dict[str, float]:
    """What a process of its own takes that opens a system or loads it."""
    asked = [sys.executable, "-c", _PROBE, str(path), what, str(base), *ids([3])]
    found: dict[str, float] = json.loads(subprocess.run(asked, capture_output=True, text=True, check=True).stdout)
    return found


def measure_commands(scaled: Scaled, base: Path, nothing: np.ndarray) -> dict[str, float]:
    """What commands take, each in a process of its own: seconds, and memory at the peak."""
    read, path = str(scaled.path), str(scaled.copy())
    repository = f"{hub_process.OWNER}/scaled-{next(_NUMBERS)}"
    key = {"HF_S3T_KEY": (scaled.path / KEY_FILE).read_text().strip()}
    exported, pulled = str(scaled.path.with_name("exported")), str(scaled.path.with_name("pulled"))
    found = {
        "opening in a process of its own (`status`)": command("status", read),
        "`hf-s3t locate` of one id": command("locate", read, *ids([3])),
        "`hf-s3t check`": command("check", read),
        "`hf-s3t push` of all": command("push", path, repository),
        "`hf-s3t push` of nothing": command("push", path, repository),
        "`hf-s3t unlearn` of one id": command("unlearn", path, *ids([5])),
        "`hf-s3t push` of a deletion": command("push", path, repository),
        "`hf-s3t receipt`": command("receipt", path, "--line", "1"),
        "`hf-s3t purge`": command("purge", path),
        "`hf-s3t export`": command("export", path, "0", exported, "--base-model", str(base)),
        "`hf-s3t pull`": command("pull", repository, pulled, **key),
    }
    for made in (exported, pulled):
        shutil.rmtree(made)
    beyond = {name: both - nothing for name, both in found.items()}
    return {name: seconds for name, (seconds, _) in beyond.items()} | {
        f"memory of {name}": size / MEBIBYTES for name, (_, size) in beyond.items()
    }


def measure_making(scaled: Scaled, base, dataset: Dataset) -> dict[str, float]:
    """What it takes to make a trainer: of a new system, and of one that is there."""
    tokens = [[number % 100] for number in range(len(dataset))]
    fed = Dataset.from_dict(
        {"id": dataset["id"][:], "group": dataset["group"][:], "input_ids": tokens, "labels": tokens}
    )
    path = scaled.path.with_name("made")

    def make() -> None:
        S3TTrainer(
            model=sharing(base),
            args=TrainingArguments(output_dir=str(path), report_to="none", use_cpu=True, disable_tqdm=True),
            train_dataset=fed,
            peft_config=lora(4),
            s3t_config=CONFIG,
        )

    found = {"a trainer of a new system": of_this_process(make), "a trainer that goes on": of_this_process(make)}
    shutil.rmtree(path)
    return found


def _refuse(problems: Sequence[str]) -> None:
    if problems:
        raise RuntimeError(" ".join(problems))


def measure_calls(scaled: Scaled, base) -> dict[str, float]:
    """Whole calls of a served model: `unlearn`, the next answer after another process's, and answers meanwhile."""
    model = S3TModel.from_pretrained(scaled.copy(), base_model=sharing(base))
    other, tokens = SystemFolder(model.folder.path), torch.arange(5)[None]
    # Of the last slice of the second shard alone: a stack is left to answer.
    of_last = iter(ids(range(3, len(other.table), 4)))
    longest, singles, followed = {"nothing": _longest(model, tokens, time.perf_counter() + _QUIET)}, [], []
    for beside in ("a compaction", "another", "a third"):
        singles.append(of_this_thread(lambda: model.unlearn([next(of_last)])))
        longest[beside] = _longest(model, tokens)
    for _ in range(3):
        apply(other, DeletionRequest([next(of_last)]))
        followed.append(of_this_thread(lambda: model(input_ids=tokens)))
    tenth = list(itertools.islice(of_last, len(other.table) // SHARE))
    at_once = of_this_thread(lambda: model.unlearn(tenth))
    after = _longest(model, tokens)
    quiet, *others = longest.values()
    return {
        "`unlearn` of one id": statistics.median(singles),
        "`unlearn` of a tenth at once": at_once,
        "the next call after a deletion elsewhere": statistics.median(followed),
        f"{_LONGEST} beside nothing": quiet,
        f"{_LONGEST} beside a compaction": statistics.median(others),
        f"{_LONGEST} beside the compaction after a tenth": after,
    }


def _longest(model: S3TModel, tokens: torch.Tensor, until: float = 0.0) -> float:
    """The longest of the calls that are made until a time, or until the table is written, in time that passes."""
    written, longest = threading.Event(), 0.0
    threading.Thread(target=lambda: (model._cleaner.wait(), written.set())).start()
    while not written.is_set() or time.perf_counter() < until:
        started = time.perf_counter()
        model(input_ids=tokens)
        longest = max(longest, time.perf_counter() - started)
    return longest


def measure_forgetting(scaled: Scaled, base) -> dict[str, float]:
    """What the table takes of that, and to write it, without stages: one id and many forgotten, others followed."""
    path = scaled.copy()
    model = S3TModel.from_pretrained(path, base_model=sharing(base))
    folder, size = model.folder, len(model.folder.table)
    compact, model._cleaner.start = folder.compact, lambda: None
    first = iter(ids(range(7, size, SHARE)))
    singles = [of_this_thread(lambda: folder_part(folder, [next(first)])) for _ in range(5)]
    compacting = of_this_process(lambda: (compact(), folder.prepare()))
    # Others than before, and half of all that are asked for.
    many = ids(range(8, size, SHARE))
    at_once = of_this_thread(lambda: folder_part(folder, many))
    after = of_this_process(lambda: (compact(), folder.prepare()))
    del model
    gc.collect()
    served = S3TModel.from_pretrained(scaled.copy(), base_model=sharing(base))
    other = SystemFolder(served.folder.path)
    followed = []
    for number in range(1, 4):
        # An id of the last slice of the second shard: the stacks stay, and no stage is loaded.
        apply(other, DeletionRequest(ids([4 * number + 3])))
        followed.append(of_this_thread(lambda: (served.folder.refresh(), served.folder.prepare())))
        if served.folder.table.rows.keys() & ids([4 * number + 3]):
            raise RuntimeError("the deletion was not followed")
    return {
        "forgetting one id, live": statistics.median(singles),
        "compaction after it": compacting,
        "forgetting a tenth at once, live": at_once,
        "compaction after that": after,
        "following a deletion": statistics.median(followed),
    }


def folder_part(folder: SystemFolder, examples: list[str]) -> None:
    """What `unlearn` of a served model does besides its stacks."""
    with folder.lock():
        folder.refresh_ledger()
        folder.refresh_stages()
        deletion = record_request(folder, DeletionRequest(examples))
        if len(deletion.examples.present) != len(examples):
            raise RuntimeError("not all were deleted")
        folder.remove_stages(deletion.condemned)
        folder.remove_stale_checkpoints()


def measure_alternatives(scaled: Scaled, report: Report, rounds: int, goal: float | None) -> None:
    """Opening and forgetting of one id, next to what an expert would take instead."""
    table, size = scaled.path / TABLE_FILE, len(SystemFolder(scaled.path).table)

    def as_dictionary() -> None:
        columns = pq.read_table(table, use_threads=False).select(["id", "shard", "slice", "digest"]).to_pydict()
        dict(zip(columns["id"], zip(columns["shard"], columns["slice"], columns["digest"]), strict=True))

    opening = interleave(Task(lambda: SystemFolder(scaled.path).prepare()), Task(as_dictionary), rounds=rounds)
    report.add_ratio(f"{size:,} rows: opening, against pyarrow and a dictionary", opening, at_most=goal)
    folder, index = SystemFolder(scaled.copy()), Index(scaled.path.with_name("index.sqlite"), table)
    folder.prepare()
    ours, theirs = iter(ids(range(9, size, SHARE))), iter(ids(range(9, size, SHARE)))
    single = interleave(
        Task(lambda: folder_part(folder, [next(ours)])), Task(lambda: index.forget(next(theirs))), rounds=rounds
    )
    report.add_ratio(f"{size:,} rows: forgetting one id (lock, ledger, stages too), against a row of sqlite3", single)


def main() -> None:
    chosen = options(__doc__)
    # Times of processes and threads are the processor's anyway.
    clock.kind = "cpu"
    sizes, rounds = (QUICK, 1) if chosen.quick else (SIZES, 3)
    report = Report("scale", chosen, {**SHAPE, "sizes": sizes, "layers": 4})
    base = llama(4, 32, vocabulary=1_000)
    found: dict[str, list[float]] = {}
    with temporary_folder() as scratch:
        small, saved = Path(scratch) / "small", Path(scratch) / "base"
        make_system(small, base, S3TConfig(**SHAPE), 16)
        base.save_pretrained(saved)
        nothing = np.median([command("--version") for _ in range(3)], axis=0)
        for size in sizes:
            dataset = Dataset.from_list(list(rows(size)))
            scaled = Scaled(Path(scratch) / f"of-{size}", small, dataset)
            measured = {"digesting rows": scaled.digesting, **measure_opening(scaled, saved)}
            measured |= measure_commands(scaled, saved, nothing)
            measured |= measure_calls(scaled, base)
            measured |= measure_forgetting(scaled, base)
            measured |= measure_making(scaled, base, dataset)
            for name, value in measured.items():
                if not name.startswith(_LONGEST):
                    found.setdefault(name, []).append(value)
                report.add(f"{size:,} rows: {name}", value, _unit(name), at_most=_goal(name, size, chosen.quick))
            if size == sizes[-1]:
                measure_alternatives(scaled, report, rounds, None if chosen.quick else 1.0)
            shutil.rmtree(scaled.path)
    for name, values in found.items():
        report.add(f"growth: {name}", exponent(sizes, values), "", at_most=None if chosen.quick else LINEAR)
    report.finish()


def _unit(name: str) -> str:
    return "MiB" if name.startswith("memory") else "s"


def _goal(name: str, size: int, is_quick: bool) -> float | None:
    if name == "`hf-s3t unlearn` of one id" and size == SIZES[0]:
        return SMALL_UNLEARN
    return GOALS.get(name) if size == SIZES[-1] and not is_quick else None


if __name__ == "__main__":
    main()
