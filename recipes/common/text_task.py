"""Text classification as a task: what its options ask for, its rows, its model, and a run from start to end."""

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
from common.options import Options, read_options
from common.options import make_parser as make_recipe_parser
from common.results import HELD_OUT, Results
from common.rows import Source, check_columns
from common.scores import check_metrics
from common.tasks import TEXT_TASKS, TextTask
from common.texts import as_rows, check_template, first_questions, tokenize
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
)

from hf_s3t.errors import ConfigError


RECIPE = "text_classification"
EXAMPLE_MODEL = "FacebookAI/roberta-large"
_LINES = (
    r"For a file with a row in each line give `--line_format`, a regular expression such as "
    r"`(?P<label>\d) (?P<sentence>.*)`."
)


@dataclass
class TextArguments(ClassificationArguments):
    """What the recipe trains on: a task of `common/tasks.py`, or columns and labels that are named here."""

    text_columns: list[str] | None = field(
        default=None, metadata={"help": "One or two columns of text, or templates such as '{word}: {sentence}'."}
    )
    line_format: str | None = field(
        default=None, metadata={"help": r"Regular expression for a row in each line: '(?P<label>\d) (?P<text>.*)'."}
    )
    column_names: list[str] | None = field(
        default=None, metadata={"help": "Columns of a csv or tsv file that has no line with their names."}
    )
    encoding: str = field(default="utf-8", metadata={"help": "Encoding of text files, such as latin-1."})
    max_length: int = field(default=256, metadata={"help": "Tokens at which a row is cut off."})
    is_regression: bool = field(default=False, metadata={"help": "The labels are numbers to be predicted."})


def make_parser() -> HfArgumentParser:
    """The recipe's options: `TextArguments`, `S3TConfig`, `LoraConfig` and `TrainingArguments`."""
    parser = make_recipe_parser(TextArguments, TrainingArguments)
    parser.set_defaults(output_dir="text-classification-s3t", save_strategy="no", logging_strategy="no")
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


def prepare(options: Options, task: TextTask) -> Parts:
    """What the recipe trains and measures with."""
    task, train, evaluation = load_rows(options, task)
    tokenizer = load_tokenizer(options)
    rows, new = tokenize(train, tokenizer, options), None
    if options.script.add_file:
        known, new = parted(tokenize(load_additions(options, task), tokenizer, options), options)
        rows = joined(rows, known, options)
    return Parts(
        task,
        partial(load_model, options, task, tokenizer),
        rows,
        {
            name: replace(rows, dataset=tokenize(rows.dataset, tokenizer, options, keep=()))
            for name, rows in evaluation.items()
        },
        DataCollatorWithPadding(tokenizer),
        tokenizer,
        new,
    )


# The task


def task_of(options: Options) -> TextTask:
    """
    The task that was asked for: one of the table, changed by the options, or one that the options describe.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it is unknown, or not fully described.
    """
    script = options.script
    templates = tuple(t if "{" in t else f"{{{t}}}" for t in script.text_columns or ())
    if len(templates) > 2:
        raise ConfigError(f"`--text_columns` takes one or two columns or templates, got {len(templates)}.")
    for template in templates:
        check_template(template)
    task = named_task(script, templates)
    check_kind_of_labels(script, task)
    changes: dict[str, Any] = {}
    if templates:
        changes["texts"] = templates
    if script.label_column:
        changes["label_column"] = script.label_column
    if script.metrics or not task.metrics:
        changes["metrics"] = tuple(script.metrics or (("pearson",) if script.is_regression else ("accuracy",)))
    if script.dataset_name is None and task.dataset is None:
        raise ConfigError(f"The task {task.name} has no data on the Hub. Give `--dataset_name`.")
    if script.dataset_name is not None:
        changes["dataset"] = None
    return replace(task, **changes)


def named_task(script: TextArguments, templates: Sequence[str]) -> TextTask:
    """
    The task of the table that is named, or one of texts of one's own.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is no such task, or neither is given.
    """
    if script.task_name is None:
        if not (templates and script.dataset_name):
            raise ConfigError(
                "Give `--task_name` (" + ", ".join(TEXT_TASKS) + "), or `--dataset_name`, `--text_columns`, "
                "`--label_column` and `--label_set` for data of your own."
            )
        return TextTask("of your own", tuple(templates), None, ())
    if script.task_name not in TEXT_TASKS:
        raise ConfigError(f"`--task_name {script.task_name}` is unknown. Choose of {', '.join(TEXT_TASKS)}.")
    return TEXT_TASKS[script.task_name]


def check_kind_of_labels(script: TextArguments, task: TextTask) -> None:
    """
    Refuse options for labels of another kind than the task's.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the one to leave out.
    """
    if script.is_regression and task.labels is not None:
        raise ConfigError(
            f"`--is_regression` does not fit {task.name}, whose labels are {', '.join(task.labels)}. Leave it out."
        )
    if script.label_set and (script.is_regression or (script.task_name and task.labels is None)):
        raise ConfigError(
            f"`--label_set {' '.join(script.label_set)}` does not fit a regression, whose labels are numbers. Leave "
            "it out, or `--is_regression`."
        )


def source_of(options: Options, task: TextTask) -> Source:
    """Where the rows come from."""
    script, hub = options.script, task.dataset
    how = {name: getattr(script, name) for name in ("line_format", "column_names", "encoding")}
    if hub is not None:
        return Source(
            hub.name, script.dataset_config_name or hub.config, hub.data_dir, script.dataset_revision or hub.revision
        )
    return Source(
        script.dataset_name, script.dataset_config_name, revision=script.dataset_revision, remedy=_LINES, **how
    )


# The rows


def load_rows(options: Options, task: TextTask) -> tuple[TextTask, Dataset, dict[str, EvaluationSet]]:
    """The task with its label set, the rows to train on, and those to evaluate on; all checked."""
    script = options.script
    source = source_of(options, task)
    source.check()
    is_regression = script.is_regression or (task.name in TEXT_TASKS and task.labels is None)
    if task.labels is not None or is_regression:
        check_metrics(task)
    train, others = read_sets(options, task, source)
    name = source.name
    check_task_columns(train, task, name)
    if not is_regression:
        task = resolve_labels(options, task, train, name)
    check_metrics(task)
    train = as_rows(prepared_ids(train, options, task, name), task, options, name)
    if task.group_column and options.s3t.group_column is None:
        options.s3t.group_column = task.group_column
    train, held_out = choose_rows(options, train)
    sets = {} if held_out is None else {HELD_OUT: held_out}
    for set_name, dataset in others.items():
        check_task_columns(dataset, task, f"the evaluation rows ({set_name})")
        dataset = prepared_eval_ids(dataset, options.s3t.id_column)
        sets[set_name] = as_rows(dataset, task, options, f"the evaluation rows ({set_name})")
    return task, train, {key: evaluation_set(dataset, options) for key, dataset in sets.items()}


def load_additions(options: Options, task: TextTask) -> Dataset:
    """The rows of `--add_file`, as those of the training set are prepared, and checked."""
    name = options.script.add_file
    source = replace(source_of(options, replace(task, dataset=None)), name=name, config=None, revision=None)
    source.check()
    rows = source.read("train")
    check_task_columns(rows, task, name)
    return as_rows(rows, task, options, name)


def check_task_columns(dataset: Dataset, task: TextTask, name: str) -> None:
    """Refuse rows without the task's columns."""
    remedy = "Name the right ones by `--text_columns` and `--label_column`."
    if task.expand is not None:
        remedy = "Give data in the layout of SuperGLUE on the Hub."
    check_columns(dataset, task.columns, task.name, name, remedy)


def evaluation_set(dataset: Dataset, options: Options) -> EvaluationSet:
    """Rows to evaluate on, with what their answers are compared to."""
    most = options.script.max_eval_samples
    if "question_id" not in dataset.column_names:
        dataset, questions = first_rows(dataset, most), None
    else:
        dataset = first_questions(dataset, most)
        questions = dataset["question_id"][:]
    return EvaluationSet(dataset, dataset[options.s3t.id_column][:], dataset["label"][:], questions)


# The model


def load_tokenizer(options: Options) -> PreTrainedTokenizerBase:
    """The base's tokenizer; one without a padding token pads with the end."""
    with reading_model(options.script.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(options.script.model_name_or_path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(options: Options, task: TextTask, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The base model with a head for the task's classes."""
    if task.class_names is None:
        head = {"num_labels": 1, "problem_type": "regression"}
    else:
        names = dict(enumerate(task.class_names))
        head = {"num_labels": len(names), "id2label": names, "label2id": {label: i for i, label in names.items()}}
    # A head that the checkpoint has for other classes is not used: every stage's starts from the seed.
    with reading_model(options.script.model_name_or_path):
        model = AutoModelForSequenceClassification.from_pretrained(
            options.script.model_name_or_path, ignore_mismatched_sizes=True, **head
        )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    return model
