"""What a stage takes in time and memory, measured: a few steps of training on a user's own model and rows."""

import contextlib
import itertools
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import S3TConfig
from ..errors import ConfigError


if TYPE_CHECKING:
    from datasets import Dataset
    from peft import LoraConfig

# Of each stage: the first one warms up, and between the others lie the times that count.
_STEPS = 6
_MOST_STAGES = 4
_TEXTS = ("text", "sentence")
_LABELS = ("label", "labels")
# What TRL trains on: whole texts, prompts with completions, conversations.
_CONVERSATIONS = ({"messages"}, {"prompt", "completion"})
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Measured:
    """
    What was measured.

    Args:
        rows (`int`): Rows of the data.
        device (`str`): Where it trained.
        depths (`tuple[int, int]`): The first and the last of the stages that were trained, by their trained layers.
        seconds_per_step (`tuple[float, float]`): What a step of these took.
        examples_per_second (`tuple[float, float]`): The same as examples.
        seconds_per_step_of_all_layers (`float`): What one of ordinary fine-tuning takes, which trains all layers.
        peak_bytes (`int`): Most memory: of the device, or of the process where there is none.
        hours_per_epoch (`float`): Hours of an epoch of ordinary fine-tuning on all the data.
    """

    rows: int
    device: str
    depths: tuple[int, int]
    seconds_per_step: tuple[float, float]
    examples_per_second: tuple[float, float]
    seconds_per_step_of_all_layers: float
    peak_bytes: int
    hours_per_epoch: float


def measure(
    model: str,
    data: str,
    *,
    batch_size: int,
    rank: int,
    target_modules: str,
    num_layers: int,
    num_labels: int = 0,
    num_examples: int | None = None,
    max_length: int | None = None,
) -> Measured:
    """
    Train a few steps of the stages of one chain, in a folder that is removed again.

    Args:
        model (`str`): Id on the Hub or folder of the base model.
        data (`str`): A file of rows, or what `datasets.load_dataset` takes.
        batch_size (`int`): Examples per optimizer step.
        rank (`int`): Rank of LoRA.
        target_modules (`str`): `"query-value"` or `"all-linear"`.
        num_layers (`int`): Transformer layers of the model.
        num_labels (`int`, defaults to 0): Classes of a head; those of the rows if not given.
        num_examples (`int`, *optional*): Number of training examples, if not that of the rows.
        max_length (`int`, *optional*): Tokens of an example at most.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the model or the rows cannot be had, or are of a kind that is not known.
    """
    with _no_bars():
        return _measure(
            model, data, batch_size, rank, target_modules, num_layers, num_labels, num_examples, max_length
        )


def _measure(
    model: str,
    data: str,
    batch_size: int,
    rank: int,
    target_modules: str,
    num_layers: int,
    num_labels: int,
    num_examples: int | None,
    max_length: int | None,
) -> Measured:
    import torch

    rows = _rows(data)
    total = len(rows)
    stages = min(_MOST_STAGES, num_layers)
    # Enough for an epoch of each stage's steps, of all lengths.
    some = rows.shuffle(seed=0).select(range(min(total, batch_size * _STEPS * stages)))
    with tempfile.TemporaryDirectory(prefix="hf-s3t-plan-") as folder:
        trainer = _trainer(model, some, folder, stages, batch_size, rank, target_modules, num_labels, max_length)
        device = trainer.args.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # What it prints belongs to nobody's output.
        with contextlib.redirect_stdout(sys.stderr):
            trainer.train()
        starts = trainer.starts
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _most_memory()
    first, last = _seconds(starts[:_STEPS]), _seconds(starts[-_STEPS:])
    per_stage = num_layers // stages
    # A step goes forward through all layers, and backward through those from the trained group up.
    slope = (last - first) / (per_stage * (stages - 1)) if stages > 1 else 0.0
    whole = max(last, last + slope * (num_layers - per_stage * stages))
    return Measured(
        rows=total,
        device=str(device),
        depths=(per_stage, per_stage * stages),
        seconds_per_step=(first, last),
        examples_per_second=(batch_size / first, batch_size / last),
        seconds_per_step_of_all_layers=whole,
        peak_bytes=peak,
        hours_per_epoch=whole * math.ceil((num_examples or total) / batch_size) / 3600,
    )


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """While it is measured, libraries show no progress: of what is loaded and thrown away nobody wants to know."""
    import datasets
    from transformers.utils import logging

    were_shown = logging.is_progress_bar_enabled(), not datasets.are_progress_bars_disabled()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if were_shown[0]:
            logging.enable_progress_bar()
        if were_shown[1]:
            datasets.enable_progress_bars()


def _seconds(starts: list[float]) -> float:
    """What a step takes, from when each of them began."""
    between = [after - before for before, after in itertools.pairwise(starts)]
    return statistics.median(between[1:])


def _rows(data: str) -> "Dataset":
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    path = Path(data)
    if path.is_file() and path.suffix not in _READERS:
        raise ConfigError(f"--measure={data}: expected a file of {', '.join(_READERS)}, a folder of one, or an id.")
    try:
        if path.is_file():
            return load_dataset(_READERS[path.suffix], data_files=str(path), split="train")
        return load_dataset(data, split="train")
    # An empty file ends the reader's iteration.
    except (OSError, ValueError, DatasetsError, StopIteration) as error:
        reason = str(error).strip().split("\n")[0].removesuffix(".") or "it holds none"
        raise ConfigError(
            f"--measure={data}: no rows to be had: {reason}. Give a file of rows ({', '.join(_READERS)}), or an id on "
            "the Hub with a split 'train'."
        ) from error


def _trainer(
    model: str,
    rows: "Dataset",
    folder: str,
    stages: int,
    batch_size: int,
    rank: int,
    target_modules: str,
    num_labels: int,
    max_length: int | None,
) -> Any:
    """A trainer of one chain that notes when each step begins."""
    import torch
    from peft import LoraConfig

    has_device = torch.cuda.is_available()
    settings = {
        "output_dir": folder,
        "bf16": has_device and torch.cuda.is_bf16_supported(),
        "dataloader_pin_memory": has_device,
        "per_device_train_batch_size": batch_size,
        "max_steps": _STEPS,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    text = next((name for name in _TEXTS if name in rows.column_names), None)
    label = next((name for name in _LABELS if name in rows.column_names), None)
    # Query and value by the names that PEFT knows of a model.
    lora = LoraConfig(r=rank, target_modules="all-linear" if target_modules == "all-linear" else None)
    chain = S3TConfig(num_slices=stages, sequence_selection=[list(range(stages))])
    if text is not None and label is not None:
        return _classifier(model, rows, text, label, num_labels, max_length, settings, lora, chain)
    if text == "text" or any(names <= set(rows.column_names) for names in _CONVERSATIONS):
        return _language_model(model, rows, max_length, settings, lora, chain)
    raise ConfigError(
        f"--measure: the rows have the columns {', '.join(rows.column_names)}; expected 'text' or 'sentence' with "
        "'label' for a classifier, and 'text', 'messages' or 'prompt' and 'completion' for a language model. Rename "
        "them, or measure an epoch yourself and give --hours-per-epoch."
    )


def _classifier(
    model: str,
    rows: "Dataset",
    text: str,
    label: str,
    num_labels: int,
    max_length: int | None,
    settings: dict[str, Any],
    lora: "LoraConfig",
    chain: S3TConfig,
) -> Any:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

    from ..training.trainer import S3TTrainer

    tokenizer = _loaded(AutoTokenizer, model)
    classes = {name: number for number, name in enumerate(sorted(set(rows[label])))}
    base = _loaded(AutoModelForSequenceClassification, model, num_labels=max(num_labels, len(classes), 2))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    base.config.pad_token_id = tokenizer.pad_token_id

    def encoded(row: dict[str, Any]) -> dict[str, Any]:
        return {**tokenizer(row[text], truncation=True, max_length=max_length), "labels": classes[row[label]]}

    lora.task_type = "SEQ_CLS"
    return _timed(S3TTrainer)(
        model=base,
        args=TrainingArguments(**settings),
        train_dataset=rows.map(encoded, remove_columns=rows.column_names),
        processing_class=tokenizer,
        peft_config=lora,
        s3t_config=chain,
    )


def _language_model(
    model: str,
    rows: "Dataset",
    max_length: int | None,
    settings: dict[str, Any],
    lora: "LoraConfig",
    chain: S3TConfig,
) -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.trainer.sft_config import SFTConfig

    from ..training.sft_trainer import S3TSFTTrainer

    tokenizer = _loaded(AutoTokenizer, model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    lora.task_type = "CAUSAL_LM"
    if max_length is not None:
        settings["max_length"] = max_length
    return _timed(S3TSFTTrainer)(
        model=_loaded(AutoModelForCausalLM, model),
        args=SFTConfig(**settings),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora,
        s3t_config=chain,
    )


def _loaded(kind: Any, model: str, **settings: Any) -> Any:
    try:
        return kind.from_pretrained(model, **settings)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"--model={model} cannot be loaded: {reason} Give a model with its tokenizer.") from error


def _timed(trainer: Any) -> Any:
    class Timed(trainer):
        starts: list[float] = []

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            if self.args.device.type == "cuda":
                import torch

                torch.cuda.synchronize()
            self.starts.append(time.perf_counter())
            return super().training_step(*args, **kwargs)

    return Timed


def _most_memory() -> int:
    """The most memory that the process has had, in bytes."""
    # Not there on Windows.
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
