"""
An ensemble of five full stacks in one pass, against five passes of plain PEFT.

The alternative is plain PEFT at its best: every stack exported as one plain adapter, five `PeftModel`s that are never
switched, on one base whose tensors they share, each pass giving its logits. What they would still have to do to answer
as the ensemble, average their probabilities, is not in their time; it is in ours.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from harness import Report, Task, interleave, options
from peft import PeftModel
from systems import llama, make_system, sharing, temporary_folder
from transformers import DynamicCache

from hf_s3t import S3TConfig, S3TModel


MEMBERS = 5


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


# Shapes with their targets, and how many calls make a round.
SHAPES = [
    (Shape(1, 1), 0.5, 12),
    (Shape(1, 1, cached=64), 0.5, 12),
    (Shape(1, 1, cached=512), 0.5, 8),
    (Shape(1, 64), 0.8, 6),
    (Shape(8, 64), 1.0, 1),
    (Shape(4, 256), 1.0, 1),
]
QUICK = [(Shape(1, 1, cached=4), None, 1), (Shape(2, 8), None, 1)]


def filled_cache(model, config, shape: Shape, vocabulary: int):
    """The cache after a prompt, or `None`."""
    if shape.cached is None:
        return None
    prompt = torch.randint(0, vocabulary, (shape.rows, shape.cached), generator=torch.Generator().manual_seed(2))
    cache = DynamicCache(config=config)
    model(input_ids=prompt, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def step(model, input_ids: torch.Tensor, cache) -> torch.Tensor:
    """One call, which leaves the cache as long as it was."""
    if cache is None:
        return model(input_ids=input_ids, use_cache=False).logits
    logits = model(input_ids=input_ids, past_key_values=cache, use_cache=True).logits
    cache.crop(-input_ids.shape[1])
    return logits


def compare(ensemble: S3TModel, plain: list[PeftModel], shape: Shape, calls: int, rounds: int):
    """The timing of a shape, and how far the two answers are apart."""
    vocabulary = ensemble.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(0, vocabulary, (shape.rows, shape.tokens), generator=generator)
    our_cache = filled_cache(ensemble, ensemble.config, shape, vocabulary)
    their_caches = [filled_cache(model, ensemble.config, shape, vocabulary) for model in plain]

    def ours():
        return step(ensemble, input_ids, our_cache)

    def theirs():
        return [step(model, input_ids, cache) for model, cache in zip(plain, their_caches, strict=True)]

    expected = torch.stack([logits.softmax(-1) for logits in theirs()]).mean(0).log()
    difference = (ours() - expected).abs().max().item()
    return interleave(Task(ours), Task(theirs), rounds=rounds, calls=calls, warmup=2), difference


def main() -> None:
    chosen = options(__doc__)
    layers, hidden, rank = (4, 64, 4) if chosen.quick else (8, 512, 16)
    settings = {
        "layers": layers,
        "hidden": hidden,
        "rank": rank,
        "members": MEMBERS,
        "num_slices": 4,
        "vocabulary": 32_000,
    }
    report = Report("ensemble", chosen, settings)
    base = llama(layers, hidden)
    config = S3TConfig(num_shards=MEMBERS, num_slices=4, budget=1)
    with temporary_folder() as folder, torch.inference_mode():
        system = Path(folder) / "system"
        make_system(system, base, config, examples=200, rank=rank)
        ensemble = S3TModel.from_pretrained(system, base_model=sharing(base))
        plain = []
        for shard in range(MEMBERS):
            ensemble.export_adapter(shard, Path(folder) / f"shard-{shard}")
            plain.append(PeftModel.from_pretrained(sharing(base), Path(folder) / f"shard-{shard}").eval())
        worst = 0.0
        for shape, target, calls in QUICK if chosen.quick else SHAPES:
            timing, difference = compare(ensemble, plain, shape, calls, rounds=2 if chosen.quick else 5)
            report.add_ratio(shape.name, timing, at_most=target)
            worst = max(worst, difference)
        report.add("largest difference of the answers", worst, "", at_most=1e-5)
    report.finish()


if __name__ == "__main__":
    main()
