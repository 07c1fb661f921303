"""
What is done with a folder of many stages, from 64 of one shard to 1,280 of twenty (L = B = 8): seconds, peak of memory
(Python's and numpy's own), and how both grow.

There is nobody to be compared with; what counts is that nothing grows faster than linearly: the exponent is that of
the best line through the logarithms of the four largest sizes. Every system has few rows (how things grow with rows is
for `bench_scale.py`), and stages of random numbers in the shape of real ones. What writes works on a fresh copy each
time. The Hub is that of the tests, in a process of its own, whose work is not counted.
"""

# First: it says where the Hub is, which the libraries read once.
import hub_process  # isort: skip
import contextlib
import copy
import dataclasses
import functools
import gc
import io
import itertools
import os
import shutil
import statistics
import tracemalloc
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import safetensors.torch
import torch
from datasets import Dataset
from harness import Report, clock, exponent, options
from peft import LoraConfig
from systems import llama, temporary_folder
from transformers import TrainingArguments

from hf_s3t import S3TConfig, S3TModel, S3TTrainer
from hf_s3t.baselines import use_public_secret
from hf_s3t.cli.app import app
from hf_s3t.folder.layout import ADAPTER_FILE, KEY_FILE, STAGE_FILES
from hf_s3t.folder.opening import open_folder
from hf_s3t.folder.status import system_status
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub.card import description, render_card
from hf_s3t.hub.diagram import render_diagram
from hf_s3t.hub.folder import HubFolder
from hf_s3t.hub.pushing import push
from hf_s3t.hub.repository import HubRepo
from hf_s3t.operations.deletion import apply, preview
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.purge import take_inventory
from hf_s3t.operations.receipts import Receipts
from hf_s3t.plan import StageKey, stage_seed
from hf_s3t.records.request import DeletionRequest


NUM_SLICES = 8
ROWS_PER_SLICE = 2
# What is linear may show an exponent a little above 1 on a machine that others use.
STEEPEST = 1.1
REPO = f"{hub_process.OWNER}/wide"


@dataclass
class Wide:
    """
    A system of many stages, and what operations on it need.

    Args:
        path (`Path`): Its folder, alone in the folder above it.
        base (`nn.Module`): The base.
        config ([`~hf_s3t.S3TConfig`]): The settings.
        rows (`Dataset`): What it would have been trained on.
    """

    path: Path
    base: torch.nn.Module
    config: S3TConfig
    rows: Dataset
    _numbers: Any = field(default_factory=itertools.count, repr=False)

    def trainer(self) -> S3TTrainer:
        """A trainer on the folder."""
        return S3TTrainer(
            model=copy.deepcopy(self.base),
            args=TrainingArguments(
                output_dir=str(self.path), report_to="none", use_cpu=True, disable_tqdm=True, save_strategy="no"
            ),
            train_dataset=self.rows,
            peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]),
            s3t_config=self.config,
        )

    def new(self, name: str) -> Path:
        """A path beside the system where nothing is, in a folder of its own."""
        path = self.path.parent.parent / "new" / f"{next(self._numbers)}" / name
        path.parent.mkdir(parents=True)
        return path

    def copied(self) -> Path:
        """A copy to write to. Files of stages are replaced and removed, never written into: they need no copy."""

        def copied(source: str, target: str) -> None:
            if os.path.basename(source) in STAGE_FILES:
                os.link(source, target)
            else:
                shutil.copy2(source, target)

        return shutil.copytree(self.path, self.new("copy"), copy_function=copied)


def make(shards: int, path: Path) -> Wide:
    """A system of some shards with all of its stages, none of them trained."""
    base = llama(NUM_SLICES, 16, vocabulary=64)
    count = shards * NUM_SLICES * ROWS_PER_SLICE
    tokens = [[number % 60] for number in range(count)]
    rows = Dataset.from_dict({"id": [f"row-{n:06d}" for n in range(count)], "input_ids": tokens, "labels": tokens})
    config = S3TConfig(num_shards=shards, num_slices=NUM_SLICES, keep_idle=True, id_column="id")
    wide = Wide(path, base, config, rows)
    path.parent.mkdir(parents=True)
    use_public_secret(path)
    trainer = wide.trainer()
    folder, shapes = trainer.folder, {}
    # A machine that dies now loses nothing but the benchmark.
    with mock.patch("os.fsync"):
        for key in folder.plan.stages():
            if key.depth not in shapes:
                shapes[key.depth] = _shape(trainer, key, path.parent.parent / f"shape-{key.depth}")
            folder.write_stage(key, {**trainer._origin(key), "metrics": {}}, _filling(key, shapes[key.depth]))
    return wide


def _shape(trainer: S3TTrainer, key: StageKey, path: Path) -> Path:
    """The files of a stage, of which others of its depth have the shape."""
    trainer._stack.add(key)
    path.mkdir()
    trainer._stack.save(key, path, None)
    trainer._stack.drop([key])
    return path


def _filling(key: StageKey, shape: Path) -> Callable[[Path], None]:
    def fill(path: Path) -> None:
        shutil.copytree(shape, path, dirs_exist_ok=True)
        generator = torch.Generator().manual_seed(stage_seed(0, key))
        tensors = safetensors.torch.load_file(path / ADAPTER_FILE)
        drawn = {name: torch.randn(tensor.shape, generator=generator) / 50 for name, tensor in tensors.items()}
        safetensors.torch.save_file(drawn, path / ADAPTER_FILE)

    return fill


@dataclass(frozen=True)
class Operation:
    """
    Something that is done with a system.

    Args:
        name (`str`): What the row says.
        run (callable): Is timed; called with what `prepare` returned.
        prepare (callable, *optional*): Called with the system before every timed call; the system itself if not given.
        rounds (`int`, defaults to 3): How often it is timed. Of what syncs thousands of files, less often.
    """

    name: str
    run: Callable[[Any], object]
    prepare: Callable[[Wide], Any] = lambda wide: wide
    rounds: int = 3


def command(*arguments: object) -> None:
    """A command of `hf-s3t`, in this process."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        code = app([str(argument) for argument in arguments], prog_name="hf-s3t", standalone_mode=False)
    assert not code, said.getvalue()


def opened(wide: Wide) -> SystemFolder:
    """The folder, opened to be looked at."""
    return open_folder(wide.path, read_only=True)


def writable(wide: Wide) -> SystemFolder:
    """A copy of the folder, opened to be written to."""
    return open_folder(wide.copied())


def an_id(folder: SystemFolder, slice_: int = 4) -> str:
    """An example of which about half of a shard's stages saw the slice."""
    return folder.table.members(0, slice_)[0]


def forget(folder: SystemFolder, slice_: int = 4) -> None:
    """Forget one example."""
    report = apply(folder, DeletionRequest([an_id(folder, slice_)]))
    assert report.stages_removed


def forget_in_all_shards(folder: SystemFolder) -> None:
    """Forget an example of every shard, by which more than half of all stages go."""
    ids = [folder.table.members(shard, 4)[0] for shard in range(folder.config.num_shards)]
    assert len(apply(folder, DeletionRequest(ids)).stages_removed) > len(folder.plan.stages()) // 2


def behind(wide: Wide) -> SystemFolder:
    """An open folder to which another process wrote a deletion."""
    folder = writable(wide)
    forget(open_folder(folder.path))
    return folder


def interrupted(wide: Wide) -> Path:
    """A folder in which the process of a deletion in every shard died before anything was removed."""
    folder = writable(wide)
    with mock.patch.object(SystemFolder, "remove_stages"), mock.patch.object(SystemFolder, "compact"):
        forget_in_all_shards(folder)
    return folder.path


def grown(wide: Wide) -> SystemFolder:
    """An open folder of which another process removed a stage, and made it again."""
    folder = writable(wide)
    stage = folder.path / folder.plan.stages()[-1].path
    shutil.copytree(stage, stage.with_name("other"))
    shutil.rmtree(stage)
    stage.with_name("other").rename(stage)
    return folder


def with_prior(wide: Wide) -> SystemFolder:
    """The folder, as if its slices were hit with probabilities of their own."""
    folder = opened(wide)
    weights = np.random.default_rng(0).random((folder.config.num_shards, NUM_SLICES)) + 0.1
    prior = (weights / weights.sum(axis=1, keepdims=True)).tolist()
    folder.config = dataclasses.replace(folder.config, deletion_prior=prior)
    return folder


def pushed(wide: Wide) -> HubRepo:
    """A repository of its own that holds the system."""
    repo = HubRepo(f"{REPO}-{wide.config.num_shards}-{next(wide._numbers)}")
    send(open_folder(wide.path), repo)
    return repo


def send(folder: SystemFolder, repo: HubRepo) -> object:
    """Push a system."""
    return push(folder, repo, functools.partial(description, repo_id=repo.repo_id), merge=True)


def pulling(wide: Wide) -> tuple[HubFolder, Path]:
    """A pushed system as it is served from the Hub, and where a pull shall go."""
    system = HubFolder(pushed(wide).repo_id)
    shutil.copy2(wide.path / KEY_FILE, system.path)
    return system, wide.new("pulled")


def pulling_half(wide: Wide) -> tuple[HubFolder, Path]:
    """The same where this machine forgot an example of every shard since, and has not pushed that."""
    system, target = pulling(wide)
    forget_in_all_shards(system)
    return system, target


def served(wide: Wide) -> S3TModel:
    """A model that serves a copy of the folder."""
    return S3TModel.from_pretrained(wide.copied(), base_model=copy.deepcopy(wide.base))


def pushed_and_deleted(wide: Wide) -> tuple[SystemFolder, HubRepo]:
    """A system that is on the Hub, and of which an example was forgotten since."""
    repo, folder = pushed(wide), writable(wide)
    forget(folder)
    return folder, repo


def with_receipts(wide: Wide) -> Path:
    """A folder whose ledger has two deletions."""
    folder = writable(wide)
    for slice_ in (4, 5):
        forget(folder, slice_)
    return folder.path


OPERATIONS = (
    Operation("open, to look", opened),
    Operation("open, to write", lambda wide: open_folder(wide.path)),
    Operation("open, and finish an interrupted removal of half of all stages", open_folder, interrupted),
    Operation("follow nothing new (each call of a model)", lambda folder: folder.stages_stamp(), opened),
    Operation("follow a stage grown again elsewhere", lambda folder: folder.refresh_stages(), grown),
    Operation("follow a deletion elsewhere", lambda folder: folder.refresh(), behind),
    Operation("valid and condemned stages", lambda folder: (folder.valid_stages, folder.condemned_stages()), opened),
    Operation("status", system_status, opened),
    Operation("status, slices of unequal prior", system_status, with_prior),
    Operation("preview of a deletion", lambda folder: preview(folder, DeletionRequest([an_id(folder)])), opened),
    Operation("unlearn one example", forget, writable),
    Operation("unlearn an example of every shard", forget_in_all_shards, writable),
    Operation("check, adapters read", lambda wide: inspect(wide.path)),
    Operation("check, adapters not read", lambda wide: inspect(wide.path, adapters=False)),
    Operation("receipts", Receipts.read, with_receipts),
    Operation("purge, what is found", lambda wide: take_inventory(wide.path, dataset_caches=[])),
    Operation("save_pretrained", lambda pair: pair[0].copy_to(pair[1]), lambda w: (writable(w), w.new("saved")), 1),
    Operation("model card", lambda folder: render_card(folder, REPO), opened),
    Operation("picture of the stacks", lambda folder: render_diagram(folder.plan, folder.valid_stages), opened),
    Operation("hf-s3t status", lambda wide: command("status", wide.path)),
    Operation("hf-s3t locate", lambda wide: command("locate", wide.path, "row-000000")),
    Operation("hf-s3t unlearn", lambda path: command("unlearn", path, "row-000000"), Wide.copied),
    Operation("hf-s3t receipt --line", lambda path: command("receipt", path, "--line", 1), with_receipts),
    Operation("hf-s3t purge", lambda path: command("purge", path), interrupted),
    Operation("model: unlearn one example", lambda model: model.unlearn([an_id(model.folder)]), served),
    Operation(
        "model: export_adapter", lambda pair: pair[0].export_adapter(0, pair[1]), lambda w: (served(w), w.new("x"))
    ),
    Operation("trainer on a folder that is there", Wide.trainer),
    Operation("train() with nothing missing", lambda trainer: trainer.train(), Wide.trainer),
    Operation("push, all of it", lambda folder: send(folder, HubRepo(f"{REPO}-{next(_NUMBERS)}")), writable),
    Operation("push, nothing new", lambda pair: send(*pair), lambda wide: (open_folder(wide.path), pushed(wide))),
    Operation("push, after a deletion", lambda pair: send(*pair), pushed_and_deleted),
    Operation("open from the Hub", lambda repo: HubFolder(repo.repo_id), pushed),
    Operation("pull", lambda pair: pair[0].copy_to(pair[1]), pulling, 1),
    Operation("pull, half of all stages deleted here", lambda pair: pair[0].copy_to(pair[1]), pulling_half, 1),
)
_NUMBERS = itertools.count()


def seconds_of(operation: Operation, wide: Wide) -> float:
    """How long an operation takes."""
    argument = operation.prepare(wide)
    gc.collect()
    started = clock.now()
    operation.run(argument)
    return clock.now() - started


def peak_of(operation: Operation, wide: Wide) -> int:
    """Bytes that Python and numpy hold more at the peak of an operation than before it."""
    argument = operation.prepare(wide)
    gc.collect()
    tracemalloc.start()
    try:
        operation.run(argument)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def measure(operation: Operation, systems: dict[int, Wide], chosen: Namespace, report: Report) -> None:
    """The rows of an operation."""
    # The smallest first, once more than it counts: what is imported or cached at the first call is no matter of size.
    seconds_of(operation, next(iter(systems.values())))
    rounds = 1 if chosen.quick else operation.rounds
    # Every size in turn, so that what else the machine does hits all of them.
    found = [[seconds_of(operation, wide) for wide in systems.values()] for _ in range(rounds)]
    seconds = [statistics.median(times) for times in zip(*found, strict=True)]
    peaks = [peak_of(operation, wide) for wide in systems.values()]
    limits = {} if chosen.quick else {"at_most": STEEPEST}
    by_size = dict(zip(map(str, systems), seconds, strict=True))
    most = max(systems)
    report.add(f"{operation.name}: {most:,} stages", seconds[-1], "s", numbers={"seconds": by_size, "rounds": found})
    report.add(f"{operation.name}: growth of time", exponent(list(systems)[-4:], seconds[-4:]), "exponent", **limits)
    numbers = {"bytes": dict(zip(map(str, systems), peaks, strict=True))}
    report.add(f"{operation.name}: peak of memory", peaks[-1], "bytes", numbers=numbers)
    report.add(f"{operation.name}: growth of memory", exponent(list(systems)[-4:], peaks[-4:]), "exponent", **limits)


def main() -> None:
    chosen = options(__doc__, only="")
    shards = (1, 2) if chosen.quick else (1, 2, 5, 10, 20)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # What was imported need not be looked through before every call.
    gc.collect()
    gc.freeze()
    settings = {"num_slices": NUM_SLICES, "budget": NUM_SLICES, "shards": shards, "rows_per_slice": ROWS_PER_SLICE}
    report = Report("folder", chosen, {**settings, "rank": 2, "layers": NUM_SLICES, "hidden": 16})
    with temporary_folder() as scratch:
        systems = {m * NUM_SLICES**2: make(m, Path(scratch) / f"{m}" / "own" / "system") for m in shards}
        for operation in OPERATIONS:
            if chosen.only in operation.name:
                measure(operation, systems, chosen, report)
                for wide in systems.values():
                    shutil.rmtree(wide.path.parent.parent / "new", ignore_errors=True)
    report.finish()


if __name__ == "__main__":
    main()
