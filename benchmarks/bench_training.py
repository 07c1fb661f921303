"""
Training one sequence with `S3TTrainer`, against the loop that an expert would write for the same stack.

The expert keeps one base in memory with LoRA on all its layers, and per stage unfreezes that of one group: what stages
before it learnt stays in the model. Every stage is a plain `Trainer` with the same arguments, on as many batches of as
many rows. Two settings make most of what is published slower than that: gradient checkpointing, and the gradients of
inputs that the way it is usually turned on needs (`enable_input_require_grads`), which draw the backward pass through
all layers. Each is shown alone and both together; with checkpointing in theirs, ours has it too.

Two rows say where the floor is. They compute what ours computes, on layers that have an adapter by then and no others:
by `Trainer`, and by a bare loop of PyTorch, in which nothing is checked, logged or written.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from datasets import Dataset
from harness import Report, Task, Timing, options
from peft import PeftModel, get_peft_model
from systems import BATCH, LEARNING_RATE, arguments, llama, lora, make_rows, temporary_folder
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    get_linear_schedule_with_warmup,
)

from hf_s3t import S3TConfig, S3TTrainer
from hf_s3t.model.layers import group_layers


NUM_SLICES = 4
# Trains a model, in which what shall be trained has gradients, on the rows of a stage.
TrainStage = Callable[[PeftModel, Dataset], None]


def ours(base: Path, rows: Dataset, systems: Callable[[], Path], gradient_checkpointing: bool = False) -> None:
    """One sequence with `S3TTrainer`, written to a folder of its own."""
    trainer = S3TTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        args=arguments(systems(), gradient_checkpointing),
        train_dataset=rows,
        peft_config=lora(),
        s3t_config=S3TConfig(num_shards=1, num_slices=NUM_SLICES, budget=1, id_column="id"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def expert(base: Path, rows: Dataset, train: TrainStage, input_gradients: bool = False) -> None:
    """One sequence in one model with LoRA on all layers, of which a stage trains its own group's."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    if input_gradients:
        model.enable_input_require_grads()
    for stage, group in enumerate(groups(model)):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = "lora_" in name and any(f".layers.{layer}." in name for layer in group)
        train(model, seen(rows, stage))


def stacked(base: Path, rows: Dataset, train: TrainStage) -> None:
    """One sequence of adapters, each on the layers of its own group: the others have none until it is their turn."""
    model, names = AutoModelForCausalLM.from_pretrained(base), []
    for stage, group in enumerate(groups(model)):
        settings = lora()
        settings.layers_to_transform = list(group)
        names.append(f"stage-{stage}")
        if stage:
            model.add_adapter(names[-1], settings)
        else:
            model = get_peft_model(model, settings, adapter_name=names[-1])
        model.base_model.set_adapter(names)
        for name, parameter in model.named_parameters():
            parameter.requires_grad = f".{names[-1]}." in name
        train(model, seen(rows, stage))


def groups(model: nn.Module) -> tuple[tuple[int, ...], ...]:
    """The layers that each stage trains, top to bottom."""
    return group_layers(model.config.num_hidden_layers, NUM_SLICES, None)


def seen(rows: Dataset, stage: int) -> Dataset:
    """The rows of a stage: those of the slices so far."""
    return rows.remove_columns("id").select(range(len(rows) * (stage + 1) // NUM_SLICES))


def by_trainer(model: PeftModel, rows: Dataset, folder: Path, gradient_checkpointing: bool = False) -> None:
    """A stage by a plain `Trainer`."""
    trainer = Trainer(model=model, args=arguments(folder, gradient_checkpointing), train_dataset=rows)
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def by_bare_loop(model: PeftModel, rows: Dataset) -> None:
    """A stage by a loop of PyTorch: the steps that `Trainer` takes, and nothing beside them."""
    words = torch.tensor(rows["input_ids"][:])
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    batches = torch.randperm(len(words)).split(BATCH)
    scheduler = get_linear_schedule_with_warmup(optimizer, 0, len(batches))
    model.train()
    for batch in batches:
        model(input_ids=words[batch], labels=words[batch]).loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()


def in_turn(ways: Mapping[str, Callable[[], None]], rounds: int) -> Iterator[dict[str, list[float]]]:
    """Seconds of each way in the rounds so far, after each round: all run once, in every second round backwards."""
    tasks = {name: Task(way) for name, way in ways.items()}
    tasks["ours"].seconds()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds):
        for name in list(tasks)[:: 1 if number % 2 == 0 else -1]:
            seconds[name].append(tasks[name].seconds())
        yield seconds


def add_rows(report: Report, seconds: Mapping[str, list[float]]) -> None:
    """The rows of the report, of the rounds so far."""
    report.rows.clear()
    for name, mine, theirs, at_most in (
        ("the expert's loop", "ours", "neither", 0.75),
        ("with gradients of inputs in theirs", "ours", "input gradients", None),
        ("with gradient checkpointing in both", "ours, checkpointing", "checkpointing", None),
        ("with checkpointing in both, gradients of inputs in theirs", "ours, checkpointing", "both", 0.8),
        ("without either, theirs with both", "ours", "both", None),
        ("the floor: adapters on no more layers, by Trainer", "ours", "stacked", None),
        ("the floor: the same by a bare loop of PyTorch", "ours", "bare", None),
    ):
        timing = Timing(seconds[mine], seconds[theirs])
        report.add_ratio(f"one sequence: {name}", timing, at_most=None if report.options.quick else at_most)


def main() -> None:
    chosen = options(__doc__)
    hidden, rows, tokens, vocabulary = (64, 32, 16, 100) if chosen.quick else (256, 256, 64, 1_000)
    settings = {"layers": 8, "hidden": hidden, "num_slices": NUM_SLICES, "rows": rows, "tokens": tokens}
    report = Report("training", chosen, {**settings, "rank": 16, "batch": BATCH, "vocabulary": vocabulary})
    model = llama(8, hidden, vocabulary)
    given = make_rows(rows, tokens, vocabulary)
    with temporary_folder() as folder:
        base, aside, numbers = Path(folder) / "base", Path(folder) / "by-hand", itertools.count()
        model.save_pretrained(base)

        mine = partial(ours, base, given, lambda: Path(folder) / f"ours-{next(numbers)}")
        plain = partial(by_trainer, folder=aside)
        checkpointing = partial(by_trainer, folder=aside, gradient_checkpointing=True)
        ways = {
            "ours": mine,
            "ours, checkpointing": partial(mine, gradient_checkpointing=True),
            "neither": partial(expert, base, given, plain),
            "input gradients": partial(expert, base, given, plain, input_gradients=True),
            "checkpointing": partial(expert, base, given, checkpointing),
            "both": partial(expert, base, given, checkpointing, input_gradients=True),
            "stacked": partial(stacked, base, given, plain),
            "bare": partial(stacked, base, given, by_bare_loop),
        }
        # What was measured is in the file after every round.
        for seconds in in_turn(ways, rounds=2 if chosen.quick else 3):
            add_rows(report, seconds)
    report.finish()


if __name__ == "__main__":
    main()
