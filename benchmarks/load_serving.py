"""
The service that never stops, under load: `hf-s3t serve` on the demo's system, which forgets and grows meanwhile.

    make test-serve                                         # ten minutes, twenty erasures
    make test-serve ARGS="--seconds 60 --erasures 6"

Eight clients ask without pause; examples are erased over HTTP, with answers waited for and cancelled, and by `hf-s3t
unlearn`; the training runs again and again beside it. It fails if an answer failed that no erasure cancelled, if one
is not that of plain PEFT on stages that were not erased before it was asked for, or if the server's memory grew.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common.instruction_task import quiet, read
from common.instruction_tuning import make_method
from demo.people_demo import DEMO, demo_base, demo_data
from demo.small_llama import base_model
from serving_story import Asked, Clients, Eraser, History, Naive, Verdict, Watcher, judge, memory_of
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_s3t.analysis.pictures import finish, new_figure, save
from hf_s3t.folder.opening import ReadOnlyFolder
from hf_s3t.folder.status import serving_depths


FIGURES = Path(__file__).resolve().parent.parent / "docs" / "figures"
NAME = "serving"
# The knowledge of the demo needs more epochs; here each stage has to differ from the others, and be grown soon.
_SHORT = ("--num_train_epochs", "2", "--num_people", "8")
_CLIENTS, _MAX_TOKENS, _PROMPTS = 8, 12, 8
# How much more memory the last third of the time may take than the one before.
_GROWTH = 1.1


def method_of(folder: Path) -> tuple[Any, str, Any]:
    """The demo's method on a folder, the folder of its base, and its rows."""
    quiet()
    options = read(["--output_dir", str(folder), *_SHORT], demo_defaults=DEMO)
    base, _ = base_model(demo_base(options.script), options.script.cache_dir)
    _, train, held_out = demo_data(options.script)
    return make_method(options, base, train, held_out), base, train


def grow_on(folder: Path, stop: Path) -> None:
    """Run the training again and again, as long as there is no file that says to stop."""
    method, _, _ = method_of(folder)
    while not stop.exists():
        method.train()
        time.sleep(0.5)


@contextmanager
def process(*command: str, log: Path, **how: Any) -> Iterator[subprocess.Popen[str]]:
    """A process of its own, which is ended."""
    with open(log, "w") as file:
        running = subprocess.Popen(command, stderr=file, text=True, **how)
        try:
            yield running
        finally:
            running.terminate()
            running.wait(120)


@contextmanager
def server(system: Path, base: str, log: Path) -> Iterator[tuple[str, int]]:
    """`hf-s3t serve` on a free port: its URL and process."""
    command = (sys.executable, "-m", "hf_s3t", "serve", str(system), "--port", "0", "--base-model", base)
    with process(*command, "--gate", "none", "--preload", "all", log=log, stdout=subprocess.PIPE) as running:
        said = ""
        while (found := re.search(r"http://[0-9.]+:[0-9]+", said)) is None:
            line = running.stdout.readline() if running.stdout else ""
            if not line:
                raise RuntimeError(f"The server did not start: {log.read_text()[-2000:]}")
            said += line
        yield found.group(), running.pid


class Gauge:
    """What the server's memory and the depths of the system are, looked at twice a second."""

    def __init__(self, pid: int, system: Path):
        self.seen: list[tuple[float, float, list[int]]] = []
        self._pid, self._folder, self._end = pid, ReadOnlyFolder(system), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "Gauge":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._end.set()
        self._thread.join()

    def _watch(self) -> None:
        folder = self._folder
        while not self._end.wait(0.5):
            folder.refresh_ledger()
            folder.look_at_stages()
            self.seen.append((time.time(), memory_of(self._pid), serving_depths(folder, folder.valid_stages)))


def run(seconds: float, erasures: int, work: Path) -> dict[str, Any]:
    """Train, serve, load, erase, grow; returns what was measured and found."""
    system, stop = work / "system", work / "stop"
    method, base, train = method_of(system)
    method.train()
    watcher = Watcher(system, work / "archive")
    prompts = [train[n]["prompt"] for n in range(0, len(train), max(1, len(train) // _PROMPTS))][:_PROMPTS]

    def by_command(one: Any) -> None:
        subprocess.run([sys.executable, "-m", "hf_s3t", "unlearn", str(system), str(one)], check=True, stdout=-3)

    trainer = (sys.executable, __file__, "--trainer", str(system), str(stop))
    with watcher.watching(), server(system, base, work / "server.log") as (url, pid):
        clients = Clients(url, system.name, prompts, _MAX_TOKENS, _CLIENTS)
        eraser = Eraser(url, train["id"], by_command)
        with process(*trainer, log=work / "trainer.log", stdout=subprocess.DEVNULL), Gauge(pid, system) as gauge:
            started = time.time()
            with clients.asking():
                for number in range(erasures):
                    _sleep_until(started + seconds * (number + 0.5) / erasures)
                    while eraser.erase() is None and time.time() < started + seconds:
                        time.sleep(0.5)
                _sleep_until(started + seconds)
            stop.touch()
    history = History(system, watcher.kept, eraser.erased)
    naive = Naive(lambda: AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base), _MAX_TOKENS)
    verdict = judge(history, naive, clients.asked, eraser.erased)
    return _told(started, clients.asked, eraser, gauge, verdict)


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.time()))


def _told(started: float, asked: Sequence[Asked], eraser: Eraser, gauge: Gauge, verdict: Verdict) -> dict[str, Any]:
    erased = [(item.start - started, item.end - started) for item in eraser.erased]
    answers = [(round(one.start - started, 2), round(one.end - one.start, 3)) for one in asked if one.code is None]
    during = [took for at, took in answers if any(start < at + took and at < end for start, end in erased)]
    beside = [took for at, took in answers if all(start >= at + took or at >= end for start, end in erased)]
    return {
        "answers": verdict.answers,
        "cancelled": verdict.cancelled,
        "too_close": verdict.too_close,
        "failed": verdict.failed,
        "wrong": verdict.wrong,
        "seconds": {"during_an_erasure": _quantiles(during), "without": _quantiles(beside)},
        "erasures": [
            {"how": item.how, "at": round(at, 2), "seconds": round(end - at, 3), "stages": len(item.stages)}
            for item, (at, end) in zip(eraser.erased, erased, strict=True)
        ],
        "latencies": sorted(answers),
        "memory": [(round(at - started, 1), round(size, 1)) for at, size, _ in gauge.seen],
        "depths": [(round(at - started, 1), depths) for at, _, depths in gauge.seen],
    }


def _quantiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    found = {f"p{share}": round(float(np.percentile(values, share)), 3) for share in (50, 90, 99)}
    return {**found, "count": len(values)}


def problems(found: dict[str, Any], erasures: int) -> list[str]:
    """What of it must not be."""
    sizes = [size for _, size in found["memory"]]
    third = len(sizes) // 3
    told = [*found["failed"][:5], *found["wrong"][:5]]
    if len(found["erasures"]) < erasures:
        told.append(f"{len(found['erasures'])} erasures, expected {erasures}")
    if third and max(sizes[-third:]) > _GROWTH * max(sizes[third : 2 * third]):
        told.append(f"memory grew from {max(sizes[third : 2 * third]):.0f} to {max(sizes[-third:]):.0f} MiB")
    if found["too_close"] > found["answers"] / 100:
        told.append(f"{found['too_close']} answers were too close to tell")
    return told


def draw(found: dict[str, Any], path: Path) -> None:
    """The picture: latencies with the erasures, depths, memory."""
    figure, panels = new_figure(3, (8, 7.5), columns=1)
    latency, depth, memory = panels
    latency.scatter(*zip(*found["latencies"], strict=True), s=3, label="an answer", color="tab:blue", alpha=0.5)
    for number, erasure in enumerate(found["erasures"]):
        label = "an erasure" if number == 0 else None
        for axes in panels:
            axes.axvline(erasure["at"], color="tab:red", linewidth=0.8, label=label if axes is latency else None)
    latency.set(title="Seconds from a request to the last byte of its answer", yscale="log")
    times = [at for at, _ in found["depths"]]
    for shard in range(len(found["depths"][0][1])):
        depths = [depths[shard] for _, depths in found["depths"]]
        depth.step(times, depths, where="post", label=f"shard {shard}")
    depth.set(title="Depth of the stack that serves")
    memory.plot(*zip(*found["memory"], strict=True), label="the server's process", color="tab:green")
    largest = max(size for _, size in found["memory"])
    memory.set(title="Resident memory, MiB", xlabel="seconds", ylim=(0, 1.25 * largest))
    finish(*panels)
    save(figure, path)


def main() -> None:
    """The load, its verdict, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0, help="how long the load lasts")
    parser.add_argument("--erasures", type=int, default=20, help="how many examples are erased meanwhile")
    parser.add_argument("--output", type=Path, default=FIGURES, help="folder of the JSON and the picture")
    parser.add_argument("--trainer", nargs=2, type=Path, metavar=("FOLDER", "STOP"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.trainer:
        grow_on(*options.trainer)
        return
    with tempfile.TemporaryDirectory() as work:
        found = run(options.seconds, options.erasures, Path(work))
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{NAME}.json").write_text(json.dumps(found) + "\n")
    draw(found, options.output / f"{NAME}.png")
    seconds = found["seconds"]
    print(f"{found['answers']} answers, {found['cancelled']} cancelled, {len(found['erasures'])} erasures")
    print(f"seconds of an answer: {seconds['without']}; during an erasure: {seconds['during_an_erasure']}")
    told = problems(found, options.erasures)
    if told:
        sys.exit("\n".join(told))


if __name__ == "__main__":
    main()
