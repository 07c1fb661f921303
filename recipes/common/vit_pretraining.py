"""Pretraining of a small vision transformer, on the part of a task's images that fine-tuning leaves out."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from common.images import PRETRAINING, ImageSource, Shown, check_images, digits
from common.options import known_options
from common.rows import label_numbers, split_off
from common.tasks import IMAGE_TASKS, ImageTask
from datasets import Dataset
from transformers import (
    DefaultDataCollator,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessorPil,
)

from hf_s3t.errors import ConfigError


@dataclass
class Settings:
    """The model, and what it is pretrained on."""

    output_dir: str = field(metadata={"help": "Folder of the model."})
    task_name: str = field(default="digits", metadata={"help": f"Of {', '.join(IMAGE_TASKS)}."})
    dataset_name: str | None = field(default=None, metadata={"help": "As in `image_classification.py`."})
    share: float = field(default=0.5, metadata={"help": "Share of the training images to pretrain on."})
    image_size: int = field(default=8, metadata={"help": "Height and width that images are brought to."})
    patch_size: int = field(default=2, metadata={"help": "Height and width of a patch."})
    hidden_size: int = field(default=96, metadata={"help": "Width of the model."})
    num_layers: int = field(default=6, metadata={"help": "Number of layers."})
    num_heads: int = field(default=4, metadata={"help": "Number of attention heads."})
    epochs: int = field(default=40, metadata={"help": "Passes over the images."})
    batch_size: int = field(default=64, metadata={"help": "Images in a batch."})
    learning_rate: float = field(default=1e-3, metadata={"help": "Highest learning rate."})
    seed: int = field(default=0, metadata={"help": "Seed of the weights and the order."})


def main(argv: Sequence[str] | None = None) -> str:
    """
    Pretrain and save the model.

    Args:
        argv (sequence of `str`, *optional*): The command line; this process's if not given.

    Returns:
        `str`: Its folder.
    """
    return pretrain(read(argv))


def read(argv: Sequence[str] | None = None) -> Settings:
    """
    The settings that a command line says.

    Args:
        argv (sequence of `str`, *optional*): The command line; this process's if not given.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an option is unknown.
    """
    parser = HfArgumentParser(Settings, allow_abbrev=False)
    known_options(parser, argv)
    (settings,) = parser.parse_args_into_dataclasses(argv)
    return settings


def check(settings: Settings) -> None:
    """
    Refuse settings that no model can be made by.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the task is unknown, or a number does not fit.
    """
    if settings.task_name not in IMAGE_TASKS:
        raise ConfigError(f"`--task_name {settings.task_name}` is unknown. Choose of {', '.join(IMAGE_TASKS)}.")
    if not 0 < settings.share < 1:
        raise ConfigError(f"`--share {settings.share}` leaves nothing for one of the two trainings. Give 0.5, say.")
    if settings.patch_size < 1 or settings.image_size % settings.patch_size:
        raise ConfigError(
            f"`--patch_size {settings.patch_size}` does not divide `--image_size {settings.image_size}`: the patches "
            "would leave a part of every image out. Give a divisor."
        )


def pretrain(settings: Settings) -> str:
    """
    Pretrain and save the model.

    Args:
        settings ([`Settings`]): The model, and what it is pretrained on.

    Returns:
        `str`: Its folder.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: As [`check`], and if the images cannot be read.
    """
    check(settings)
    task = IMAGE_TASKS[settings.task_name]
    rows = training_images(settings, task)
    processor = ViTImageProcessorPil(size={"height": settings.image_size, "width": settings.image_size})
    torch.manual_seed(settings.seed)
    model = fresh_model(settings, len(task.labels))
    rows.set_transform(Shown(processor, task, task.padding, flip=task.name != "digits"))
    started = time.perf_counter()
    trainer = Trainer(model, arguments(settings), train_dataset=rows, data_collator=DefaultDataCollator())
    loss = trainer.train().training_loss
    model.save_pretrained(settings.output_dir)
    processor.save_pretrained(settings.output_dir)
    print(
        f"{settings.output_dir}: {model.num_parameters():,} parameters, pretrained on {len(rows)} images in "
        f"{time.perf_counter() - started:.0f} s, mean loss {loss:.3f}"
    )
    return settings.output_dir


def fresh_model(settings: Settings, num_labels: int) -> ViTForImageClassification:
    """A model of the settings' shape, with the weights that PyTorch's random state draws."""
    return ViTForImageClassification(
        ViTConfig(
            image_size=settings.image_size,
            patch_size=settings.patch_size,
            hidden_size=settings.hidden_size,
            intermediate_size=2 * settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            num_labels=num_labels,
        )
    )


def arguments(settings: Settings) -> TrainingArguments:
    """How it is pretrained."""
    return TrainingArguments(
        output_dir=settings.output_dir,
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        warmup_steps=0.1,  # below 1: a share of the steps
        weight_decay=0.05,
        seed=settings.seed,
        remove_unused_columns=False,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )


def training_images(settings: Settings, task: ImageTask) -> Dataset:
    """The part of the training images that the model is pretrained on."""
    if settings.dataset_name is None and task.dataset is None:
        rows, _ = digits()
        ids = rows["id"][:]
    else:
        hub = task.dataset
        columns = {"image_column": task.image_column, "label_column": task.label_column}
        source = ImageSource(settings.dataset_name or hub.name, **columns)
        rows = source.read(hub.train_split if hub else "train")
        check_images(rows, task, source.name, "Give data in the task's layout, or choose another `--task_name`.")
        ids = range(len(rows))
    _, taken = split_off(rows, ids, settings.share, PRETRAINING)
    labels = label_numbers(taken, task.label_column, task.labels, settings.dataset_name or task.name)
    return taken.remove_columns(task.label_column).add_column("labels", labels)
