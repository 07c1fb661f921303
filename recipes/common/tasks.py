"""
The benchmarks' tasks as a table: columns, label sets, metrics and where the data is.

A label set is part of a task, never read off training rows: a class that only deleted rows had would stay in the head.
"""

import string
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from hf_s3t.errors import ConfigError


# What COPA's rows ask for -> how a choice goes on from the premise.
_CONNECTIVES = {"cause": "because", "effect": "so"}
# Metric -> what it can score.
METRICS = {
    "accuracy": "classes",
    "f1": "two classes",
    "macro_f1": "classes",
    "matthews_correlation": "classes",
    "pearson": "numbers",
    "spearman": "numbers",
    "copa": "choices of questions",
    "multirc": "answers of questions",
}


@dataclass(frozen=True)
class Dataset:
    """Where a task's data is on the Hub."""

    name: str
    config: str | None = None
    data_dir: str | None = None
    revision: str | None = None
    train_split: str = "train"
    # Benchmarks keep the labels of their test sets to themselves: these are the sets one can score.
    eval_splits: tuple[str, ...] = ("validation",)


@dataclass(frozen=True)
class TextTask:
    """
    A task on texts.

    Args:
        name (`str`): Its name, as `--task_name` takes it.
        texts (tuple of `str`): One or two templates over the columns: what the tokenizer gets.
        labels (tuple of `str`, *optional*): The label set in the order of the label numbers; `None` for regression.
        metrics (tuple of `str`): As the benchmark scores it; the first one is the main one.
        dataset ([`Dataset`], *optional*): Where its data is.
        label_column (`str`): Column of labels, as numbers or as names.
        label_range (pair of `float`, *optional*): Bounds of the labels of a regression.
        id_column (`str`, *optional*): Column of ids, where the benchmark has one.
        expects (tuple of `str`): Columns besides those of the templates.
        expand (function, *optional*): From a row to the rows that are trained on and scored together.
        row_labels (tuple of `str`, *optional*): The label set of the expanded rows.
        group_column (`str`, *optional*): Column of the expanded rows that shall lie in one slice.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...] | None
    metrics: tuple[str, ...]
    dataset: Dataset | None = None
    label_column: str = "label"
    label_range: tuple[float, float] | None = None
    id_column: str | None = "idx"
    expects: tuple[str, ...] = ()
    expand: Callable[[dict[str, Any]], Iterator[dict[str, Any]]] | None = None
    row_labels: tuple[str, ...] | None = None
    group_column: str | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a dataset of this task has."""
        named = self.expects if self.expand else (*self.expects, *columns_of(self.texts))
        return tuple(dict.fromkeys([*named, self.label_column]))

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes that the head tells apart; `None` for regression."""
        return self.row_labels or self.labels

    @property
    def has_questions(self) -> bool:
        """Whether several rows are one question, which is scored as one."""
        return self.expand is not None


@dataclass(frozen=True)
class ImageTask:
    """
    A task on images.

    Args:
        name (`str`): Its name, as `--task_name` takes it.
        labels (tuple of `str`): The label set in the order of the label numbers.
        dataset ([`Dataset`], *optional*): Where its data is.
        image_column (`str`): Column of images.
        label_column (`str`): Column of labels, as numbers or as names.
        metrics (tuple of `str`): The first one is the main one.
        padding (`int`): Pixels around an image before it is cropped at random.
    """

    name: str
    labels: tuple[str, ...] | None
    dataset: Dataset | None = None
    image_column: str = "image"
    label_column: str = "label"
    metrics: tuple[str, ...] = ("accuracy",)
    padding: int = 4
    label_range: None = field(default=None, init=False)
    id_column: None = field(default=None, init=False)
    has_questions: bool = field(default=False, init=False)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a dataset of this task has."""
        return (self.image_column, self.label_column)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """The classes that the head tells apart."""
        return self.labels


def columns_of(templates: tuple[str, ...]) -> list[str]:
    """The columns that templates name."""
    return [name for template in templates for _, name, _, _ in string.Formatter().parse(template) if name]


def copa_rows(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """
    A row for each choice of a question, labelled 1 for the right one.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the question is none of COPA's.
    """
    if row["question"] not in [*_CONNECTIVES]:
        raise ConfigError(
            f"its `question` is {row['question']!r}, expected {' or '.join(_CONNECTIVES)}. Mend or drop such rows."
        )
    for number, choice in enumerate((row["choice1"], row["choice2"])):
        yield {
            "id": f"{row['id']}-{number}",
            "question_id": str(row["id"]),
            "premise": row["premise"],
            "connective": _CONNECTIVES[row["question"]],
            "choice": choice,
            "label": int(row["label"] == number),
        }


def multirc_rows(row: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """
    The row itself, with the ids of its paragraph and question.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the row does not say which they are.
    """
    place = row["idx"] if isinstance(row["idx"], dict) else {}
    paragraph, question, answer = (place.get(name) for name in ("paragraph", "question", "answer"))
    if paragraph is None or question is None or answer is None:
        raise ConfigError(
            f"its `idx` is {row['idx']!r}, expected the numbers of its paragraph, question and answer, such as "
            "{'paragraph': 0, 'question': 3, 'answer': 12}. Give data in the layout of SuperGLUE on the Hub."
        )
    yield {
        **row,
        "id": f"{paragraph}-{question}-{answer}",
        "question_id": f"{paragraph}-{question}",
        "paragraph_id": str(paragraph),
    }


def _glue(config: str, *eval_splits: str) -> Dataset:
    return Dataset("nyu-mll/glue", config, eval_splits=eval_splits or ("validation",))


def _super_glue(config: str) -> Dataset:
    # The main branch holds a loading script, which `datasets` runs no more; this branch holds its rows.
    return Dataset("aps/super_glue", data_dir=config, revision="refs/convert/parquet")


_SENTENCES = ("{sentence1}", "{sentence2}")
_ENTAILMENT = ("entailment", "not_entailment")
_TRUTH = ("False", "True")

TEXT_TASKS = {
    task.name: task
    for task in (
        TextTask("sst2", ("{sentence}",), ("negative", "positive"), ("accuracy",), _glue("sst2")),
        TextTask("cola", ("{sentence}",), ("unacceptable", "acceptable"), ("matthews_correlation",), _glue("cola")),
        TextTask("stsb", _SENTENCES, None, ("pearson", "spearman"), _glue("stsb"), label_range=(0.0, 5.0)),
        TextTask("qnli", ("{question}", "{sentence}"), _ENTAILMENT, ("accuracy",), _glue("qnli")),
        TextTask(
            "qqp",
            ("{question1}", "{question2}"),
            ("not_duplicate", "duplicate"),
            ("accuracy", "f1"),
            _glue("qqp"),
        ),
        TextTask("mrpc", _SENTENCES, ("not_equivalent", "equivalent"), ("accuracy", "f1"), _glue("mrpc")),
        TextTask(
            "mnli",
            ("{premise}", "{hypothesis}"),
            ("entailment", "neutral", "contradiction"),
            ("accuracy",),
            _glue("mnli", "validation_matched", "validation_mismatched"),
        ),
        TextTask("rte", ("{premise}", "{hypothesis}"), _ENTAILMENT, ("accuracy",), _super_glue("rte")),
        TextTask("wic", ("{word}: {sentence1}", "{sentence2}"), _TRUTH, ("accuracy",), _super_glue("wic")),
        TextTask(
            "cb",
            ("{premise}", "{hypothesis}"),
            ("entailment", "contradiction", "neutral"),
            ("accuracy", "macro_f1"),
            _super_glue("cb"),
        ),
        TextTask(
            "copa",
            ("{premise}", "{connective} {choice}"),
            ("choice1", "choice2"),
            ("copa",),
            _super_glue("copa"),
            expects=("premise", "choice1", "choice2", "question"),
            expand=copa_rows,
            row_labels=("wrong", "right"),
            group_column="question_id",
        ),
        TextTask("boolq", ("{question}", "{passage}"), _TRUTH, ("accuracy",), _super_glue("boolq")),
        TextTask(
            "multirc",
            ("{paragraph}", "{question} {answer}"),
            _TRUTH,
            ("multirc",),
            _super_glue("multirc"),
            id_column=None,
            expects=("paragraph", "question", "answer", "idx"),
            expand=multirc_rows,
            group_column="paragraph_id",
        ),
        # Not of the paper: small, and with more classes than two.
        TextTask("trec", ("{text}",), ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"), ("accuracy",), id_column=None),
    )
}

_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")

IMAGE_TASKS = {
    task.name: task
    for task in (
        ImageTask("cifar10", _CIFAR10, Dataset("uoft-cs/cifar10", eval_splits=("test",)), "img"),
        ImageTask(
            "cifar100",
            tuple(map(str, range(100))),
            Dataset("uoft-cs/cifar100", eval_splits=("test",)),
            "img",
            "fine_label",
        ),
        ImageTask(
            "tiny_imagenet",
            tuple(map(str, range(200))),
            Dataset("zh-plus/tiny-imagenet", eval_splits=("valid",)),
            padding=8,
        ),
        ImageTask("digits", tuple(map(str, range(10))), padding=1),
    )
}
