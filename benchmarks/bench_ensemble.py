"""
An ensemble of five stacks in one pass, against the ways there are without it; and what a token of one stack costs.

Five full stacks are compared with what a user of PEFT would take: five passes of plain PEFT (every stack exported as
one plain adapter, five `PeftModel`s that are never switched), PEFT's own batch of several adapters (`adapter_names`,
one pass over the repeated rows), and five merged models. All share the tensors of one base where they can. Each
answers as the ensemble does, so all average the probabilities; our time against that of the members' logits alone is
beside it in the file. How far anybody could get is measured too: the bare base over the rows of all members, with the
products of the adapters written by hand.

With stacks of one stage of four, members share what lies below: that is compared with a pass in which they do not, and
the keys and values in the caches are counted. A token of one stack is compared with plain PEFT's `generate`.
"""

import contextlib
import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from harness import Report, Task, Timing, clock, interleave, options
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from systems import llama, make_system, sharing, temporary_folder
from torch import nn
from transformers import DynamicCache

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.model.trunk import Trunks


MEMBERS = 5
SLICES = 4
# What bounds all ways from below; no way that a user has.
BY_HAND = "by hand"


@dataclass(frozen=True)
class Shape:
    """A batch: rows, tokens per row, and tokens already in the cache of keys and values (`None`: no cache)."""

    rows: int
    tokens: int
    cached: int | None = None

    @property
    def name(self) -> str:
        cache = "" if self.cached is None else f", {self.cached} in the cache"
        return f"batch {self.rows} x {self.tokens}{cache}"


# Shapes with their targets, against the best of the alternatives, and how many calls make a round.
SHAPES = [
    (Shape(1, 1), 0.7, 12),
    (Shape(1, 1, cached=64), 0.7, 12),
    (Shape(1, 1, cached=512), 0.7, 8),
    (Shape(1, 64), 0.7, 6),
    (Shape(8, 64), 0.9, 1),
    (Shape(4, 256), 0.9, 1),
]
QUICK = [(Shape(1, 1, cached=4), None, 1), (Shape(2, 8), None, 1)]
# Layers and hidden size of the models whose tokens are timed, and how many tokens a call generates.
SIZES = [(4, 64, 64), (8, 256, 32)]
QUICK_SIZES = [(4, 64, 4)]


@dataclass
class Way:
    """
    A way to get the answer of five members.

    Args:
        models (list of `nn.Module`): What is called, each with a cache of its own.
        rows (`dict`, *optional*): What names the adapter of each block of rows, for a model that takes all members'.
        is_ensemble (`bool`, defaults to `False`): Whether there is nothing left to average.
        is_repeated (`bool`, defaults to `False`): Whether a model takes a block of rows for each member.
    """

    models: list
    rows: dict | None = None
    is_ensemble: bool = False
    is_repeated: bool = False
    seconds_to_logits: list[float] = field(default_factory=list)

    def caches(self, config, shape: Shape) -> list:
        """The caches after a prompt, one per model; `None` where there shall be none."""
        if shape.cached is None:
            return [None for _ in self.models]
        prompt = torch.randint(0, config.vocab_size, (shape.rows, shape.cached), generator=seeded(2))
        caches = [DynamicCache(config=config) for _ in self.models]
        for model, cache in zip(self.models, caches, strict=True):
            self.call(model, prompt, cache)
        return caches

    def answer(self, input_ids: torch.Tensor, caches: list) -> torch.Tensor:
        """The logarithm of the mean of the members' probabilities. It leaves caches as long as they were."""
        started = clock.now()
        logits = [self.call(model, input_ids, cache) for model, cache in zip(self.models, caches, strict=True)]
        for cache in caches:
            if cache is not None:
                cache.crop(-input_ids.shape[1])
        self.seconds_to_logits.append(clock.now() - started)
        if self.is_ensemble:
            return logits[0]
        members = [block for one in logits for block in one.chunk(MEMBERS // len(logits))]
        mean = members[0].softmax(-1)
        for member in members[1:]:
            mean += member.softmax(-1)
        return mean.div_(MEMBERS).log_()

    def call(self, model, input_ids: torch.Tensor, cache) -> torch.Tensor:
        """The logits of one model."""
        named = {name: [n for n in names for _ in input_ids] for name, names in (self.rows or {}).items()}
        settings = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
        repeated = input_ids.repeat(MEMBERS, 1) if self.is_repeated else input_ids
        return model(input_ids=repeated, **settings, **named).logits


class ByHand(nn.Module):
    """A linear layer with an adapter for each block of rows, and nothing around it."""

    def __init__(self, layer: LoraLayer):
        super().__init__()
        self.base, self.scaling = layer.get_base_layer(), layer.scaling["0"]
        self.down = torch.stack([layer.lora_A[str(number)].weight.t() for number in range(MEMBERS)])
        self.up = torch.stack([layer.lora_B[str(number)].weight.t() for number in range(MEMBERS)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = nn.functional.linear(x, self.base.weight)
        low = torch.bmm(x.view(MEMBERS, -1, x.shape[-1]), self.down)
        output.view(MEMBERS, -1, output.shape[-1]).baddbmm_(low, self.up, alpha=self.scaling)
        return output


def by_hand(base, mixed: PeftModel):
    """The base with the adapters of a model of several."""
    model = sharing(base)
    for name, layer in mixed.base_model.model.named_modules():
        if isinstance(layer, LoraLayer):
            model.set_submodule(name, ByHand(layer))
    return model


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def alternatives(ensemble: S3TModel, base, folder: Path) -> dict[str, Way]:
    """What a user of PEFT would take, by name."""
    paths = [folder / f"shard-{shard}" for shard in range(MEMBERS)]
    for shard, path in enumerate(paths):
        ensemble.export_adapter(shard, path)
    passes = [PeftModel.from_pretrained(sharing(base), path).eval() for path in paths]
    mixed = PeftModel.from_pretrained(sharing(base), paths[0], adapter_name="0").eval()
    for number, path in enumerate(paths[1:], start=1):
        mixed.load_adapter(path, adapter_name=str(number))
    merged = [PeftModel.from_pretrained(copy.deepcopy(base), path).merge_and_unload().eval() for path in paths]
    return {
        "five passes": Way(passes),
        "adapter_names": Way([mixed], {"adapter_names": [str(n) for n in range(MEMBERS)]}, is_repeated=True),
        "five merged models": Way(merged),
        BY_HAND: Way([by_hand(base, mixed)], is_repeated=True),
    }


def compare(report: Report, ways: dict[str, Way], config, case: tuple, rounds: int) -> float:
    """A row for each alternative, and one for the best of them; returns how far the answers are apart."""
    shape, target, calls = case
    input_ids = torch.randint(0, config.vocab_size, (shape.rows, shape.tokens), generator=seeded(1))
    caches = {name: way.caches(config, shape) for name, way in ways.items()}
    answers = {name: way.answer(input_ids, caches[name]) for name, way in ways.items()}
    times, to_logits = {name: [] for name in ways}, {name: [] for name in ways}
    # The first round warms up.
    for number in range(rounds + 1):
        for way in ways.values():
            way.seconds_to_logits.clear()
        sums = dict.fromkeys(ways, 0.0)
        for call in range(calls):
            # Whoever comes second finds other caches than who comes first.
            for name in list(ways)[:: 1 if (number + call) % 2 == 0 else -1]:
                sums[name] += Task(lambda name=name: ways[name].answer(input_ids, caches[name])).seconds()
        if number:
            for name, way in ways.items():
                times[name].append(sums[name] / calls)
                to_logits[name].append(sum(way.seconds_to_logits) / calls)
    others = [name for name in ways if name not in ("ours", BY_HAND)]
    for name in others:
        timing = Timing(times["ours"], times[name])
        alone = Timing(times["ours"], to_logits[name]).ratio
        report.add(f"{shape.name}: {name}", timing.ratio, "of theirs", numbers={**timing.numbers(), "alone": alone})
    best = min(others, key=lambda name: sum(times[name]))
    report.add_ratio(f"{shape.name}: the best, {best}", Timing(times["ours"], times[best]), at_most=target)
    floor = Timing(times[BY_HAND], times[best])
    report.add(f"{shape.name}: {BY_HAND}, not ours", floor.ratio, "of the best", numbers=floor.numbers())
    return max((answers["ours"] - answer).abs().max().item() for answer in answers.values())


class NoTrunks(Trunks):
    """Every member computes, and keeps, what lies below its stages by itself."""

    @contextlib.contextmanager
    def shared(self, *given):
        yield


def compare_trunk(report: Report, ensemble: S3TModel, shape: Shape, calls: int, rounds: int, target: float | None):
    """What sharing the layers below the stages saves, at one stage of four: time, and keys and values."""
    config, with_trunk, without = ensemble.config, ensemble._ensemble._trunks, NoTrunks(ensemble.base_model)
    input_ids = torch.randint(0, config.vocab_size, (shape.rows, shape.tokens), generator=seeded(1))

    def answer(trunks: Trunks):
        ensemble._ensemble._trunks = trunks
        return ensemble(input_ids=input_ids, use_cache=True)

    with ensemble.limited_to(1):
        shared, each = answer(with_trunk), answer(without)
        ours, theirs = Task(lambda: answer(with_trunk)), Task(lambda: answer(without))
        timing = interleave(ours, theirs, rounds=rounds, calls=calls, warmup=2)
    ensemble._ensemble._trunks = with_trunk
    name = f"one stage of {SLICES}, {shape.name}"
    report.add_ratio(f"{name}: members share what lies below", timing, at_most=target)
    layers = config.num_hidden_layers
    adapted = layers // SLICES
    share = (layers - adapted + MEMBERS * adapted) / (MEMBERS * layers)
    held, before = (
        sum(layer.keys.numel() + layer.values.numel() for layer in answered.past_key_values.layers)
        for answered in (shared, each)
    )
    report.add(f"{name}: keys and values", held / before, "of them", exactly=share)
    return (shared.logits - each.logits).abs().max().item()


def compare_tokens(
    report: Report, size: tuple[int, int, int], folder: Path, rounds: int, target: float | None
) -> None:
    """A token of one stack, with one stage of four and with all, against plain PEFT."""
    layers, hidden, tokens = size
    base = llama(layers, hidden)
    make_system(folder, base, S3TConfig(num_shards=1, num_slices=SLICES, budget=1), examples=40)
    model = S3TModel.from_pretrained(folder, base_model=sharing(base))
    model.export_adapter(0, folder.parent / f"{folder.name}-all")
    input_ids = torch.arange(8)[None]
    asked = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pad_token_id": 0}
    asked |= {"max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}
    for depth, adapter in ((1, folder / "stages" / "shard-0" / "0"), (SLICES, folder.parent / f"{folder.name}-all")):
        plain = PeftModel.from_pretrained(sharing(base), adapter).eval()
        with model.limited_to(depth):
            if not torch.equal(model.generate(**asked), plain.generate(**asked)):
                raise RuntimeError(f"The texts of {layers} x {hidden} at depth {depth} differ.")
            ours, theirs = Task(lambda: model.generate(**asked)), Task(lambda plain=plain: plain.generate(**asked))
            timing = interleave(ours, theirs, rounds=rounds, calls=2, warmup=2)
        report.add_ratio(f"m = 1, {layers} x {hidden}, {depth} of {SLICES} stages: a token", timing, at_most=target)


def main() -> None:
    chosen = options(__doc__)
    layers, hidden, rank = (4, 64, 4) if chosen.quick else (8, 512, 16)
    settings = {
        "layers": layers,
        "hidden": hidden,
        "rank": rank,
        "members": MEMBERS,
        "num_slices": SLICES,
        "vocabulary": 32_000,
    }
    report = Report("ensemble", chosen, settings)
    base = llama(layers, hidden)
    config = S3TConfig(num_shards=MEMBERS, num_slices=SLICES, budget=1)
    rounds = 2 if chosen.quick else 5
    with temporary_folder() as folder, torch.inference_mode():
        for size in QUICK_SIZES if chosen.quick else SIZES:
            system = Path(folder) / f"of-one-{size[0]}-{size[1]}"
            compare_tokens(report, size, system, 2 if chosen.quick else 9, None if chosen.quick else 1.05)
        system = Path(folder) / "system"
        make_system(system, base, config, examples=200, rank=rank)
        ensemble = S3TModel.from_pretrained(system, base_model=sharing(base))
        shape, calls = (Shape(2, 8), 1) if chosen.quick else (Shape(1, 64), 6)
        worst = compare_trunk(report, ensemble, shape, calls, rounds, None if chosen.quick else 0.7)
        ways = {"ours": Way([ensemble], is_ensemble=True), **alternatives(ensemble, base, Path(folder))}
        for case in QUICK if chosen.quick else SHAPES:
            worst = max(worst, compare(report, ways, ensemble.config, case, rounds))
        report.add("largest difference of the answers", worst, "", at_most=1e-5)
    report.finish()


if __name__ == "__main__":
    main()
