"""
Training one sequence with `S3TTrainer`, against the procedure the paper's authors published, done by hand.

By hand, every stage loads the base from disk again, puts LoRA on all layers, loads what the stages before it learnt,
unfreezes its own group of layers, and trains with gradient checkpointing and gradients of the inputs, from the data of
the slices so far. Both run the same `Trainer` on the same batches. `S3TTrainer` keeps one base, and layers below the
stage's group build no graph; it is measured with gradient checkpointing, as the published procedure needs it, and
without, which is what it costs where memory allows.
"""

import itertools
from pathlib import Path

import torch
from datasets import Dataset
from harness import Report, Task, interleave, options
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from systems import by_hand_model, llama, lora, temporary_folder
from transformers import AutoModelForCausalLM, PrinterCallback, Trainer, TrainingArguments

from hf_s3t import S3TConfig, S3TTrainer


NUM_SLICES = 4


def arguments(folder: Path, gradient_checkpointing: bool) -> TrainingArguments:
    """The recipe of a stage."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        gradient_checkpointing=gradient_checkpointing,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def make_rows(rows: int, tokens: int, vocabulary: int) -> Dataset:
    """Random rows with labels and ids."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "id": list(range(rows))})


def ours(base: Path, rows: Dataset, folder: Path, gradient_checkpointing: bool) -> None:
    """One sequence with `S3TTrainer`, the base loaded once."""
    trainer = S3TTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=arguments(folder, gradient_checkpointing),
        train_dataset=rows,
        peft_config=lora(),
        s3t_config=S3TConfig(num_shards=1, num_slices=NUM_SLICES, budget=1, id_column="id"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def by_hand(base: Path, rows: Dataset, folder: Path) -> None:
    """One sequence as published: top to bottom, one group of layers per stage."""
    rows = rows.remove_columns("id")
    learnt: dict[str, torch.Tensor] = {}
    for stage in range(NUM_SLICES):
        model = by_hand_model(AutoModelForCausalLM.from_pretrained(base), lora(), stage, NUM_SLICES)
        if learnt:
            set_peft_model_state_dict(model, learnt)
        seen = rows.select(range(len(rows) * (stage + 1) // NUM_SLICES))
        trainer = Trainer(model=model, args=arguments(folder, True), train_dataset=seen)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        learnt = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}


def main() -> None:
    chosen = options(__doc__)
    hidden, rows, tokens, vocabulary = (64, 32, 16, 100) if chosen.quick else (256, 256, 64, 1_000)
    settings = {"layers": 8, "hidden": hidden, "num_slices": NUM_SLICES, "rows": rows, "tokens": tokens}
    report = Report("training", chosen, {**settings, "rank": 16, "batch": 8, "vocabulary": vocabulary})
    model = llama(8, hidden, vocabulary)
    dataset = make_rows(rows, tokens, vocabulary)
    with temporary_folder() as folder:
        base, systems = Path(folder) / "base", itertools.count()
        model.save_pretrained(base)

        for name, gradient_checkpointing in (("with gradient checkpointing", True), ("without", False)):
            timing = interleave(
                Task(lambda g=gradient_checkpointing: ours(base, dataset, Path(folder) / f"ours-{next(systems)}", g)),
                Task(lambda: by_hand(base, dataset, Path(folder) / "by-hand")),
                rounds=2 if chosen.quick else 5,
            )
            report.add_ratio(f"one sequence, {name}", timing, at_most=None if chosen.quick else 0.8)
    report.finish()


if __name__ == "__main__":
    main()
