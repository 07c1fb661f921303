"""
Supervised fine-tuning and preferences on data that can be deleted: one after the other, or both in one system.

One after the other, a second system's stages stand on the first's stages of the same slices. Here that is done by
hand, to see whether it is exact and what it is worth beside one system that is trained by both losses at once.
"""

import json
import os
import random
import tempfile
import time
from pathlib import Path

import torch
from datasets import Dataset
from harness import Report, options
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from trl import DPOConfig, SFTConfig

from hf_s3t import S3TConfig, S3TDPOTrainer, S3TSFTTrainer
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model.tensor_files import differing_tensors


DATA = Path(os.environ.get("HF_S3T_DATA", "../shared/data"))
BASE = DATA / "stories260K"
COMMON = {
    "per_device_train_batch_size": 8, "lr_scheduler_type": "constant", "bf16": False, "use_cpu": True,
    "report_to": "none", "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "max_length": 160,
    "gradient_checkpointing": False,
}  # fmt: skip


def pairs(authors: range, held_out: bool) -> list[dict]:
    """Questions with their answers, and the answer to another question; an author's rows lie in one slice."""
    told = [json.loads(line) for line in (DATA / "tofu/full.jsonl").read_text(encoding="utf-8").splitlines()]
    ours = [row for number, row in enumerate(told) if row["author"] in authors and (number % 5 == 4) == held_out]
    draw = random.Random(0)
    others = draw.sample(ours, len(ours))
    return [
        {
            "id": number, "shard": 0, "slice": row["author"] % 2, "prompt": f"{row['question']}\n",
            "chosen": row["answer"], "rejected": other["answer"],
        }
        for number, (row, other) in enumerate(zip(ours, others, strict=True))
        if row["answer"] != other["answer"]
    ]  # fmt: skip


def lora() -> LoraConfig:
    """The adapters of a stage."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")


def config(slices: int) -> S3TConfig:
    """One chain of stages over the slices that the rows name."""
    columns = {"id_column": "id", "partition": "column", "shard_column": "shard", "slice_column": "slice"}
    return S3TConfig(num_slices=slices, budget=1, **columns)


def base() -> PreTrainedModel:
    """The base, anew."""
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)


def with_answers(path: Path, rows: list[dict], epochs: int) -> S3TSFTTrainer:
    """A system that learnt the answers."""
    texts = [{**row, "completion": row["chosen"]} for row in rows]
    texts = [{name: value for name, value in row.items() if name not in ("chosen", "rejected")} for row in texts]
    args = SFTConfig(output_dir=str(path), learning_rate=2e-3, num_train_epochs=epochs, **COMMON)
    trainer = S3TSFTTrainer(
        base(), args, train_dataset=Dataset.from_list(texts), processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=lora(), s3t_config=config(2),
    )  # fmt: skip
    trainer.train()
    return trainer


def with_preferences(path: Path, rows: list[dict], epochs: int, model: PreTrainedModel, slices: int = 2, **more):
    """A system that learnt preferences, upon a model."""
    settings = {"learning_rate": 1e-3, "num_train_epochs": epochs, "beta": 0.1, **COMMON, **more}
    rows = rows if slices > 1 else [{**row, "slice": 0} for row in rows]
    trainer = S3TDPOTrainer(
        model, args=DPOConfig(output_dir=str(path), **settings), train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(BASE), peft_config=lora(), s3t_config=config(slices),
    )  # fmt: skip
    trainer.train()
    return trainer


def upon(path: Path, *stages: str) -> PreTrainedModel:
    """The base with stages of a system merged into it."""
    model = base()
    for stage in stages:
        model = PeftModel.from_pretrained(model, str(path / "stages" / stage)).merge_and_unload()
    return model


@torch.no_grad()
def measured(model, rows: list[dict]) -> dict[str, float]:
    """How likely right answers are, per token, and how often a right one is likelier than the other, per token."""
    tokenizer, said = AutoTokenizer.from_pretrained(BASE), []
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        of_pair = []
        for name in ("chosen", "rejected"):
            ids = torch.tensor([tokenizer(row["prompt"] + row[name])["input_ids"][:160]])
            likely = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(-1, ids[0, 1:, None])
            of_pair.append(likely[len(prompt) - 1 :].mean().item())
        said.append(of_pair)
    loss = -sum(chosen for chosen, _ in said) / len(said)
    return {"loss": loss, "prefers": sum(chosen > other for chosen, other in said) / len(said)}


def stage_of(trainer) -> dict[str, torch.Tensor]:
    """The tensors of the one stage of a second system."""
    return load_file(trainer.folder.path / "stages" / "shard-0" / "0" / "adapter_model.safetensors")


def main() -> None:
    """Train, compare, print, write."""
    chosen = options(__doc__)
    authors, epochs = (range(4), 1) if chosen.quick else (range(12), 4)
    rows, unseen = pairs(authors, held_out=False), pairs(authors, held_out=True)
    report = Report("sft_then_dpo", chosen, {"rows": len(rows), "held out": len(unseen), "epochs": epochs})

    def add(name, model, seconds):
        for what, value in measured(model, unseen).items():
            report.add(f"{name}: {what}", value, "", numbers={"seconds": seconds})

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder)
        add("base", base(), 0)
        started = time.perf_counter()
        first = with_answers(path / "answers", rows, epochs)
        seconds = time.perf_counter() - started
        add("answers", first.s3t_model, seconds)
        second = with_preferences(
            path / "upon", rows, epochs, upon(first.folder.path, "shard-0/0", "shard-0/0-1"), slices=1
        )
        add("answers, then preferences upon them", second.s3t_model, time.perf_counter() - started)
        for name, more in (
            ("preferences alone", {}),
            ("both losses in one system", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}),
        ):
            started = time.perf_counter()
            trainer = with_preferences(path / name, rows, epochs, base(), **more)
            add(name, trainer.s3t_model, time.perf_counter() - started)

        # Rows of the second slice go; what stands on the first alone must be what it is without them.
        own = [row for row in rows if row["slice"] == 0]
        gone = [row["id"] for row in rows if row["slice"] == 1][:10]
        stays = with_preferences(path / "stays", own, 1, upon(first.folder.path, "shard-0/0"), slices=1)
        first.s3t_model.unlearn(gone)
        never = with_answers(path / "never", [row for row in rows if row["id"] not in gone], epochs)
        again = with_preferences(path / "again", own, 1, upon(never.folder.path, "shard-0/0"), slices=1)
        differing = differing_tensors(stage_of(stays), stage_of(again))
        report.add("tensors of a second stage that differ", len(differing), "", at_most=0)
        # And of the first, which takes the stage below away: the second system's folder knows nothing of it.
        first.s3t_model.unlearn([own[0]["id"]])
        left = len(SystemFolder(first.folder.path).valid_stages), len(SystemFolder(stays.folder.path).valid_stages)
        report.add("stages left of the first system", left[0], "", at_most=0)
        report.add("stages that serve on in the second, upon what is gone", left[1], "")
    report.finish()


if __name__ == "__main__":
    main()
