"""Texts as rows: what templates make of a row's columns, and the tokens of each row by itself."""

from collections.abc import Sequence
from string import Formatter
from typing import Any

from common.options import Options
from common.rows import label_numbers, label_values
from common.tasks import TextTask, columns_of
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from hf_s3t.errors import ConfigError


_TEXTS = ("text", "text_pair")
_TEMPLATES = "Give the name of a column, or a template such as '{word}: {sentence}'."


def check_template(template: str) -> None:
    """
    Refuse a template that rows could not be put into.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it is none, or names no columns.
    """
    try:
        parts = [part[1:] for part in Formatter().parse(template) if part[1] is not None]
    except ValueError as error:
        raise ConfigError(f"`--text_columns {template}` is no template: {error}. {_TEMPLATES}") from error
    # A number would be a position, and texts have no formats: neither is a column.
    if not parts or any(not name or name.isdecimal() or form or change for name, form, change in parts):
        raise ConfigError(f"`--text_columns {template}` must name a column in each pair of braces. {_TEMPLATES}")
    # A point or a bracket would look into the text.
    if strange := [name for name, _, _ in parts if "." in name or "[" in name]:
        raise ConfigError(
            f"`--text_columns {template}`: a column whose name has a point or a bracket, such as {strange[0]}, cannot "
            "be put into a text. Rename it in the data."
        )


def check_no_nulls(dataset: Dataset, columns: Sequence[str], name: str) -> None:
    """
    Refuse rows without a text, which would be trained on as the word "None".

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With their number.
    """
    stored = dataset.with_format(None)
    for column in columns:
        # A number that is missing is unequal to itself.
        nulls = sum(value is None or value != value for value in stored[column][:])
        if nulls:
            raise ConfigError(
                f"{nulls} of {len(dataset)} rows of {name} have no {column}. Drop these rows, or fill them in."
            )


def as_rows(dataset: Dataset, task: TextTask, options: Options, name: str) -> Dataset:
    """Rows with their texts, their label and their id; of a question's row, a row for each choice."""
    id_column = options.s3t.id_column
    check_no_nulls(dataset, [column for column in task.columns if column != task.label_column], name)
    if task.class_names is None:
        labels = label_values(dataset, task.label_column, task.label_range, name)
    else:
        labels = label_numbers(dataset, task.label_column, task.labels, name)
    kept = [c for c in (id_column, *_own_columns(options)) if c in dataset.column_names]
    # There may be another column of that name.
    dataset = dataset.remove_columns({task.label_column, "label"} & {*dataset.column_names})
    dataset = dataset.add_column("label", labels)

    asked_for = {*columns_of(task.texts)}

    def render(batch: dict[str, list]) -> dict[str, list]:
        found: dict[str, list] = {}
        for values in zip(*batch.values(), strict=True):
            row = dict(zip(batch, values, strict=True))
            for one in expanded(row, task, id_column, name):
                if not asked_for <= one.keys():
                    raise ConfigError(
                        f"`--text_columns` names {', '.join(sorted(asked_for - one.keys()))}, and a row of "
                        f"{task.name} has {', '.join(sorted(one))}. Name some of these."
                    )
                texts = [template.format_map(one) for template in task.texts]
                shown = {
                    **{column: row[column] for column in kept},
                    **dict(zip(_TEXTS, texts, strict=False)),
                    "label": one["label"],
                }
                if task.expand:
                    shown[id_column] = one["id"]
                    shown.update({c: one[c] for c in ("question_id", task.group_column)})
                for column, value in shown.items():
                    found.setdefault(column, []).append(value)
        return found

    return dataset.map(render, batched=True, remove_columns=dataset.column_names)


def expanded(row: dict[str, Any], task: TextTask, id_column: str, name: str) -> list[dict[str, Any]]:
    """
    The row itself, or of a question's row one for each choice.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a question's row is not in the benchmark's layout.
    """
    if task.expand is None:
        return [row]
    try:
        return [*task.expand({**row, "id": row[id_column]})]
    except ConfigError as error:
        raise ConfigError(f"The row {row[id_column]} of {name} is none of {task.name}: {error}") from error


def _own_columns(options: Options) -> list[str]:
    """Columns that say where a row goes."""
    s3t = options.s3t
    return [column for column in (s3t.group_column, s3t.shard_column, s3t.slice_column) if column]


def first_questions(dataset: Dataset, count: int | None) -> Dataset:
    """At most so many rows, each question with all of its own; one question at least."""
    if count is None or count >= len(dataset):
        return dataset
    places: dict[Any, list[int]] = {}
    for place, question in enumerate(dataset["question_id"][:]):
        places.setdefault(question, []).append(place)
    taken: list[int] = []
    for own in places.values():
        if taken and len(taken) + len(own) > count:
            break
        taken += own
    return dataset.select(sorted(taken))


def tokenize(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, options: Options, keep: Sequence[str] | None = None
) -> Dataset:
    """Tokens of each row by itself; padding comes with the batch."""
    if keep is None:
        keep = [c for c in (options.s3t.id_column, *_own_columns(options)) if c in dataset.column_names]
    limit = min(options.script.max_length, tokenizer.model_max_length)

    def tokens(batch: dict[str, list]) -> dict[str, list]:
        pair = batch.get("text_pair")
        return {**tokenizer(batch["text"], pair, truncation=True, max_length=limit), "labels": batch["label"]}

    gone = [column for column in dataset.column_names if column not in keep]
    return dataset.map(tokens, batched=True, remove_columns=gone)
