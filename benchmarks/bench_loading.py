"""
Loading: a system, by the number of its stages, and one stage more, against plain PEFT.

Both have the base in memory. `S3TModel.from_pretrained` reads a folder, looks whether the base is the one that was
trained on, and loads every stage that serves; PEFT loads as many adapters from the same files, the first on the bare
base and the others beside it, without initial values (`low_cpu_mem_usage=True`). A stage more is loaded into a model
that holds others of the same layers already, as a deletion or a trainer has it done.
"""

import copy
import gc
import statistics
from pathlib import Path

import torch
from harness import Report, Task, exponent, interleave, options
from peft import LoraConfig
from systems import llama, lora, make_system, plain_peft, temporary_folder
from transformers import LlamaForSequenceClassification

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.folder.layout import ADAPTER_FILE
from hf_s3t.folder.opening import open_folder
from hf_s3t.model.layers import LayerGroups, group_layers
from hf_s3t.model.stack import StageStack
from hf_s3t.plan import StageKey


# Numbers of shards and slices, of which all stages serve; the last ones are as many stages on fewer layers each.
SYSTEMS = ((1, 4), (2, 4), (6, 4), (16, 4))
QUICK = ((1, 4), (2, 4), (3, 4), (4, 4))
DEEPER = (1, 8)
KINDS = {
    "plain": {},
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "rsLoRA, a head": {"use_rslora": True},
}


class Systems:
    """
    Systems on one base, of which everything serves, to be loaded by us and by PEFT.

    Args:
        base (`nn.Module`): The bare base. Only copies are adapted.
        scratch (`Path`): A folder for the systems.
    """

    def __init__(self, base: torch.nn.Module, scratch: Path):
        self.base, self.scratch = base, scratch

    def make(self, shards: int, slices: int) -> tuple[Task, Task, int]:
        """Loading one by us, loading its adapters by PEFT, and how many these are."""
        path = self.scratch / f"{shards}-{slices}"
        make_system(path, self.base, S3TConfig(num_shards=shards, num_slices=slices, budget=1), 20 * shards + 100)
        adapters = {key.adapter_name: path / key.path for key in open_folder(path).valid_stages}
        ours = Task(lambda base: self._load(path, base, len(adapters)), self._fresh_base)
        return ours, Task(lambda base: plain_peft(base, adapters), self._fresh_base), len(adapters)

    def _fresh_base(self) -> torch.nn.Module:
        gc.collect()
        return copy.deepcopy(self.base)

    def _load(self, path: Path, base: torch.nn.Module, stages: int) -> None:
        assert len(S3TModel.from_pretrained(path, base_model=base).stack.loaded) == stages


def measure_systems(report: Report, base: torch.nn.Module, scratch: Path, rounds: int, is_quick: bool) -> None:
    """How loading grows with the stages, and against PEFT."""
    systems = Systems(base, scratch)
    growing = QUICK if is_quick else SYSTEMS
    sizes, times = [], []
    for shards, slices in (*growing, DEEPER):
        ours, theirs, stages = systems.make(shards, slices)
        timing = interleave(ours, theirs, rounds=rounds)
        name = f"{stages} stages, m = {shards}, L = {slices}: from_pretrained, against PEFT"
        is_goal = stages == 8 and not (is_quick and slices == 8)
        report.add_ratio(name, timing, at_most=1.0 if is_goal else None)
        if (shards, slices) in growing:
            sizes.append(stages)
            times.append(timing)
    for who in ("ours", "theirs"):
        seconds = [statistics.median(getattr(timing, who)) for timing in times]
        limit = 1.05 if who == "ours" else None
        span = f"{sizes[0]} to {sizes[-1]} stages"
        name = "from_pretrained" if who == "ours" else "PEFT"
        numbers = {"stages": sizes, "seconds": seconds}
        report.add(f"{name}, {span}: exponent", exponent(sizes, seconds), "", at_most=limit, numbers=numbers)
        # Where what comes once is the smallest part.
        last = exponent(sizes[-2:], seconds[-2:])
        report.add(f"{name}, {sizes[-2]} to {sizes[-1]} stages: exponent", last, "", at_most=limit)


def measure_stage(report: Report, base: torch.nn.Module, kind: str, scratch: Path, rounds: int, limit: float | None):
    """One stage more, beside one of the same layers that is there."""
    head = ("score",) if kind.endswith("head") else ()
    if head:
        torch.manual_seed(0)
        base = LlamaForSequenceClassification(base.config).eval()
    config = LoraConfig(**{**lora().to_dict(), **KINDS[kind]})
    count = base.config.num_hidden_layers
    groups = LayerGroups("model.layers", count, tuple(map(tuple, group_layers(count, 4, None))))
    stack = StageStack(copy.deepcopy(base), config, groups, head)
    key, other = StageKey(0, (0,)), StageKey(1, (0,))
    stack.add(key)
    folder = scratch / kind.replace(" ", "-")
    folder.mkdir()
    stack.save(key, folder, None)
    stack.load(other, (folder / ADAPTER_FILE).read_bytes(), "")
    theirs = plain_peft(copy.deepcopy(base), {"other": folder})

    def forget() -> None:
        if "more" in theirs.peft_config:
            theirs.delete_adapter("more")
        gc.collect()

    timing = interleave(
        Task(lambda _: stack.load(key, (folder / ADAPTER_FILE).read_bytes(), ""), lambda: stack.drop([key])),
        Task(lambda _: theirs.load_adapter(folder, adapter_name="more", low_cpu_mem_usage=True), forget),
        rounds=rounds,
    )
    report.add(f"{kind}: a stage more", statistics.median(timing.ours), "s", at_most=limit)
    report.add_ratio(f"{kind}: a stage more, against PEFT", timing, at_most=0.5)
    again = Task(lambda _: stack.drop([key]), lambda: load_again(stack, key, folder))
    dropping = [again.seconds() for _ in range(rounds)]
    report.add(f"{kind}: dropping it", statistics.median(dropping), "s", numbers={"all": dropping})


def load_again(stack: StageStack, key: StageKey, folder: Path) -> None:
    """Have something to drop."""
    stack.load(key, (folder / ADAPTER_FILE).read_bytes(), "")


def main() -> None:
    chosen = options(__doc__)
    layers, hidden, rounds = (8, 32, 2) if chosen.quick else (16, 64, 5)
    deep = 8 if chosen.quick else 32
    settings = {"layers": layers, "layers_of_a_stage_more": deep, "hidden": hidden, "rank": 16}
    report = Report("loading", chosen, {**settings, "targets": "all seven projections"})
    with temporary_folder() as folder:
        measure_systems(report, llama(layers, hidden, vocabulary=1_000), Path(folder), rounds, chosen.quick)
        base = llama(deep, hidden, vocabulary=1_000)
        for kind in KINDS:
            measure_stage(report, base, kind, Path(folder), rounds, None if chosen.quick else 20e-3)
    report.finish()


if __name__ == "__main__":
    main()
