"""
A token where a gate names one shard for each row, against plain PEFT with one shard for all rows.

Five full stacks; each row of a batch is answered by the one that knows it, so that a batch of eight mixes all five.
Plain PEFT serves one of them, exported as an adapter, which answers every row: what a single model costs. The text of
each row is compared with what plain PEFT generates with the row's own shard. The weights are given: what it takes to
read a prompt is measured with the counts of terms, in `bench_gates.py`.
"""

from pathlib import Path

import torch
from harness import Report, Task, interleave, options
from peft import PeftModel
from systems import llama, make_system, sharing, temporary_folder

from hf_s3t import S3TConfig, S3TModel


SHARDS = 5
SLICES = 4
# Layers and hidden size of the models whose tokens are timed, and how many tokens a call generates.
SIZES = [(4, 64, 64), (8, 256, 32), (8, 512, 16)]
QUICK_SIZES = [(4, 64, 4)]
BATCHES = [1, 8]
PROMPT = 32
GOAL = 1.2


def asked_of(rows: int, tokens: int) -> dict:
    """What is generated from: prompts of one length, and so many tokens whatever they are."""
    input_ids = torch.randint(4, 32_000, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    asked = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids), "pad_token_id": 0}
    return {**asked, "max_new_tokens": tokens, "do_sample": False, "eos_token_id": None}


def compare(report: Report, size: tuple[int, int, int], folder: Path, rounds: int, goal: float | None) -> None:
    """A row for each size of a batch."""
    layers, hidden, tokens = size
    base = llama(layers, hidden)
    make_system(folder, base, S3TConfig(num_shards=SHARDS, num_slices=SLICES, budget=1), examples=200)
    model = S3TModel.from_pretrained(folder, base_model=sharing(base))
    paths = [folder.parent / f"{folder.name}-{shard}" for shard in range(SHARDS)]
    for shard, path in enumerate(paths):
        model.export_adapter(shard, path)
    plain = [PeftModel.from_pretrained(sharing(base), path).eval() for path in paths]
    for rows in BATCHES:
        asked = asked_of(rows, tokens)
        shards = torch.arange(rows) % SHARDS
        with model.weighted_by(torch.nn.functional.one_hot(shards, SHARDS).double()):
            text = model.generate(**asked)
            for row, shard in enumerate(shards.tolist()):
                if not torch.equal(plain[shard].generate(**asked)[row], text[row]):
                    raise RuntimeError(f"The texts of row {row} of {layers} x {hidden} differ.")
            ours, theirs = (
                Task(lambda asked=asked: model.generate(**asked)),
                Task(lambda asked=asked: plain[0].generate(**asked)),
            )
            timing = interleave(ours, theirs, rounds=rounds, calls=2, warmup=2)
        report.add_ratio(f"{layers} x {hidden}, batch {rows} of {min(rows, SHARDS)} shards", timing, at_most=goal)


def main() -> None:
    chosen = options(__doc__)
    settings = {"shards": SHARDS, "num_slices": SLICES, "rank": 16, "prompt": PROMPT, "vocabulary": 32_000}
    report = Report("gated_tokens", chosen, settings)
    with temporary_folder() as folder, torch.inference_mode():
        for size in QUICK_SIZES if chosen.quick else SIZES:
            system = Path(folder) / f"of-{size[0]}-{size[1]}"
            compare(report, size, system, 2 if chosen.quick else 5, None if chosen.quick else GOAL)
    report.finish()


if __name__ == "__main__":
    main()
