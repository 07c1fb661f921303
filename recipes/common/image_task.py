"""Image classification as a task: what its options ask for, its rows, its model, and a run from start to end."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from common.adding import joined, parted
from common.base_models import check_model_is_given, reading_model
from common.classification import (
    ClassificationArguments,
    EvaluationSet,
    Parts,
    choose_rows,
    first_rows,
    prepared_eval_ids,
    prepared_ids,
    quiet,
    read_sets,
    resolve_labels,
    run_classification,
    say_it_is_done,
)
from common.images import PRETRAINING, ImageSource, Shown, check_images, digits
from common.options import Options, read_options
from common.options import make_parser as make_recipe_parser
from common.results import HELD_OUT, Results
from common.rows import label_numbers, split_off
from common.scores import check_metrics
from common.tasks import IMAGE_TASKS, ImageTask
from datasets import Dataset
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    BaseImageProcessor,
    DefaultDataCollator,
    HfArgumentParser,
    PreTrainedModel,
    TrainingArguments,
)

from hf_s3t.errors import ConfigError


RECIPE = "image_classification"
EXAMPLE_MODEL = "google/vit-base-patch16-224-in21k"


@dataclass
class ImageArguments(ClassificationArguments):
    """What the recipe trains on: a task of `common/tasks.py`, or columns and labels that are named here."""

    image_column: str | None = field(default=None, metadata={"help": "Column of images."})
    augmentation: str = field(
        default="crop-flip", metadata={"help": "crop-flip, crop, or none: what happens to an image in every epoch."}
    )
    padding: int | None = field(default=None, metadata={"help": "Pixels around an image before it is cropped."})
    leave_out_share: float = field(
        default=0.0, metadata={"help": "Share of the training images that `pretrain_vit.py --share` has used."}
    )


def make_parser() -> HfArgumentParser:
    """The recipe's options: `ImageArguments`, `S3TConfig`, `LoraConfig` and `TrainingArguments`."""
    parser = make_recipe_parser(ImageArguments, TrainingArguments)
    parser.set_defaults(
        output_dir="image-classification-s3t",
        save_strategy="no",
        logging_strategy="no",
        # The column of images is not the model's input: pixels are made of it with the batch.
        remove_unused_columns=False,
        # PEFT has a choice of its own for some image models only.
        target_modules="all-linear",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Run the recipe.

    Args:
        argv (sequence of `str`, *optional*): The command line; this process's if not given.

    Returns:
        `dict[str, Any]`: What the results file holds.
    """
    return run(read(argv))


def read(argv: Sequence[str] | None = None) -> Options:
    """
    The recipe's options.

    Args:
        argv (sequence of `str`, *optional*): The command line; this process's if not given.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: As [`~common.options.read_options`].
    """
    return read_options(make_parser(), argv)


def run(options: Options) -> dict[str, Any]:
    """
    Train by the method asked for, measure at every depth, forget what is named, and write the results.

    Args:
        options ([`~common.options.Options`]): Everything the recipe was told.

    Returns:
        `dict[str, Any]`: What the results file holds.
    """
    quiet()
    check_model_is_given(options.script.model_name_or_path, EXAMPLE_MODEL)
    task = task_of(options)
    results = Results(options, RECIPE)
    if (found := say_it_is_done(results, options)) is not None:
        return found
    with results.timed("load"):
        parts = prepare(options, task)
    return run_classification(options, results, parts)


def prepare(options: Options, task: ImageTask) -> Parts:
    """What the recipe trains and measures with."""
    task, train, sets = load_rows(options, task)
    processor = load_processor(options)
    flip = options.script.augmentation == "crop-flip"
    padding = None if options.script.augmentation == "none" else task.padding
    new = None
    if options.script.add_file:
        known, new = parted(load_additions(options, task), options)
        train = joined(train, known, options)
        new.set_transform(Shown(processor, task, padding, flip))
    train.set_transform(Shown(processor, task, padding, flip))
    evaluation = {name: evaluation_set(dataset, options, Shown(processor, task)) for name, dataset in sets.items()}
    return Parts(task, partial(load_model, options, task), train, evaluation, DefaultDataCollator(), processor, new)


def task_of(options: Options) -> ImageTask:
    """
    The task that was asked for: one of the table, changed by the options, or one that the options describe.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it is unknown, or not fully described.
    """
    script = options.script
    if script.augmentation not in ("crop-flip", "crop", "none"):
        raise ConfigError(f"`--augmentation {script.augmentation}` is unknown. Choose crop-flip, crop or none.")
    if options.training.remove_unused_columns:
        raise ConfigError("`--remove_unused_columns True` would remove the images. Leave it out.")
    if script.task_name is None:
        if not script.dataset_name:
            raise ConfigError(
                f"Give `--task_name` ({', '.join(IMAGE_TASKS)}), or `--dataset_name` and `--label_set` for images of "
                "your own."
            )
        task = ImageTask("of your own", None)
    elif script.task_name not in IMAGE_TASKS:
        raise ConfigError(f"`--task_name {script.task_name}` is unknown. Choose of {', '.join(IMAGE_TASKS)}.")
    else:
        task = IMAGE_TASKS[script.task_name]
    if script.padding is not None and script.padding < 0:
        raise ConfigError(f"`--padding {script.padding}` is no number of pixels. Give 0 or more.")
    changes: dict[str, Any] = {
        name: getattr(script, name)
        for name in ("image_column", "label_column", "padding")
        if getattr(script, name) is not None
    }
    if script.metrics:
        changes["metrics"] = tuple(script.metrics)
    if script.dataset_name is not None:
        changes["dataset"] = None
    return replace(task, **changes)


def load_rows(options: Options, task: ImageTask) -> tuple[ImageTask, Dataset, dict[str, Dataset]]:
    """The task with its label set, the rows to train on, and those to evaluate on; all checked."""
    script, hub = options.script, task.dataset
    if not 0 <= script.leave_out_share < 1:
        raise ConfigError(
            f"`--leave_out_share {script.leave_out_share}` is no share of the training images. Give 0.5, for example."
        )
    if script.dataset_name is None and hub is None:
        name = task.name
        train, test = digits()
        numbers = train["id"][:]
        others = {} if script.validation_share else {"test": test}
    else:
        source = ImageSource(
            hub.name if hub else script.dataset_name,
            script.dataset_config_name or (hub.config if hub else None),
            revision=script.dataset_revision or (hub.revision if hub else None),
            image_column=task.image_column,
            label_column=task.label_column,
        )
        name = source.name
        source.check()
        train, others = read_sets(options, task, source)
        numbers = range(len(train))
    remedy = "Name the right ones by `--image_column` and `--label_column`."
    check_images(train, task, name, remedy)
    task = resolve_labels(options, task, train, name)
    check_metrics(task)
    train = with_labels(prepared_ids(train, options, task, name), task, name)
    id_column = options.s3t.id_column
    if script.leave_out_share:
        # By row numbers, whatever the ids are: `pretrain_vit.py` knows no others.
        train, _ = split_off(train, numbers, script.leave_out_share, PRETRAINING)
    train, held_out = choose_rows(options, train)
    sets = {} if held_out is None else {HELD_OUT: held_out}
    for set_name, dataset in others.items():
        shown = f"the evaluation rows ({set_name})"
        check_images(dataset, task, shown, remedy)
        sets[set_name] = with_labels(prepared_eval_ids(dataset, id_column), task, shown)
    return task, train, sets


def load_additions(options: Options, task: ImageTask) -> Dataset:
    """The images of `--add_file`, a file or folder, with the labels of the others, and checked."""
    name = options.script.add_file
    source = ImageSource(name, image_column=task.image_column, label_column=task.label_column)
    source.check()
    rows = source.read("train")
    check_images(rows, task, name, "Name the right ones by `--image_column` and `--label_column`.")
    return with_labels(rows, task, name)


def with_labels(dataset: Dataset, task: ImageTask, name: str) -> Dataset:
    """The rows with their labels as numbers, in a column of their own."""
    labels = label_numbers(dataset, task.label_column, task.labels, name)
    # There may be another column of that name.
    dataset = dataset.remove_columns({task.label_column, "labels"} & {*dataset.column_names})
    return dataset.add_column("labels", labels)


def evaluation_set(dataset: Dataset, options: Options, shown: Shown) -> EvaluationSet:
    """Rows to evaluate on, with what their answers are compared to."""
    dataset = first_rows(dataset, options.script.max_eval_samples)
    ids, labels = dataset[options.s3t.id_column][:], dataset["labels"][:]
    dataset.set_transform(shown)
    return EvaluationSet(dataset, ids, labels)


def load_processor(options: Options) -> BaseImageProcessor:
    """What turns images into the base's pixels."""
    with reading_model(options.script.model_name_or_path):
        return AutoImageProcessor.from_pretrained(options.script.model_name_or_path, backend="pil")


def load_model(options: Options, task: ImageTask) -> PreTrainedModel:
    """The base model with a head for the task's classes."""
    names = dict(enumerate(task.labels))
    with reading_model(options.script.model_name_or_path):
        return AutoModelForImageClassification.from_pretrained(
            options.script.model_name_or_path,
            num_labels=len(names),
            id2label=names,
            label2id={label: number for number, label in names.items()},
            # A head that the checkpoint has for other classes is not used: every stage's starts from the seed.
            ignore_mismatched_sizes=True,
        )
