"""Instructions and answers as rows to train on: Alpaca's columns, prompts and completions, or texts."""

from typing import Any

from common.command_line import console
from common.options import Options
from common.prompts import render_prompt
from common.rows import Source, check_placing_columns
from datasets import Dataset

from hf_s3t.errors import ConfigError


QUESTION_COLUMNS = ("instruction", "input", "output")


def load_data(options: Options) -> tuple[Dataset, Dataset]:
    """The training rows and the rows held out, as prompt and completion (or text), with their ids and groups."""
    script, s3t = options.script, options.s3t
    name = script.dataset_name
    dataset = Source(name).read(script.dataset_split)
    if s3t.id_column is None:
        # Row numbers of the whole source stay what they are when rows leave the selection.
        s3t.id_column = "id"
        if "id" not in dataset.column_names:
            dataset = dataset.add_column("id", list(range(len(dataset))))
            console.print(f"No --id_column: ids are the row numbers of {name}.")
    check_placing_columns(dataset, s3t, name)
    train_size = min(script.max_train_samples or len(dataset), len(dataset) - script.eval_size)
    if train_size < 1:
        raise ConfigError(
            f"{name} has {len(dataset)} rows, and --eval_size {script.eval_size} leaves none to train on."
        )
    dataset = dataset.select(range(train_size + script.eval_size))
    if script.columns:
        dataset = with_question_columns(dataset, script.columns, name)
    check_example_columns(dataset, options.training.dataset_text_field, name)
    dataset = as_examples(dataset, script.prompt_template, script.loss_on_everything)
    return dataset.select(range(train_size)), dataset.select(range(train_size, len(dataset)))


def load_additions(options: Options) -> Dataset:
    """The rows of `--add_file`, as those of the training set are prepared."""
    script = options.script
    dataset = Source(script.add_file).read("train")
    if script.columns:
        dataset = with_question_columns(dataset, script.columns, script.add_file)
    check_example_columns(dataset, options.training.dataset_text_field, script.add_file)
    return as_examples(dataset, script.prompt_template, script.loss_on_everything)


def with_question_columns(dataset: Dataset, columns: list[str], name: str) -> Dataset:
    """The dataset with its columns of instruction and output under the names of Alpaca's."""
    missing = [column for column in columns if column not in dataset.column_names]
    if len(columns) != 2 or missing:
        raise ConfigError(
            f"`--columns {' '.join(columns)}` must name the columns of instruction and output; {name} has "
            f"{', '.join(dataset.column_names)}."
        )
    return dataset.rename_columns(dict(zip(columns, ("instruction", "output"), strict=True)))


def check_example_columns(dataset: Dataset, text_field: str, name: str) -> None:
    """Refuse rows that are neither Alpaca's nor what TRL trains on, and rows without a question or an answer."""
    columns = set(dataset.column_names)
    layouts = (("instruction", "output"), ("prompt", "completion"), (text_field,), ("messages",), ("input_ids",))
    found = [layout for layout in layouts if columns >= set(layout)]
    # Rows with an instruction are Alpaca's, whatever else they hold.
    if not found or ("instruction" in columns and "output" not in columns):
        raise ConfigError(
            f"{name} has the columns {', '.join(dataset.column_names)}. Expected instruction and output, prompt and "
            f"completion, {text_field}, or messages. Name those of question and answer by `--columns`."
        )
    for column in found[0]:
        nulls = sum(value is None for value in dataset[column])
        if nulls:
            raise ConfigError(
                f"{nulls} of {len(dataset)} rows of {name} have no {column}. Drop these rows, or fill them in."
            )


def as_examples(dataset: Dataset, template: str, loss_on_everything: bool) -> Dataset:
    """Alpaca rows as prompt and completion, or as one text to take the loss on all of it; others stay as they are."""
    if "instruction" not in dataset.column_names:
        return dataset

    def render(row: dict[str, Any]) -> dict[str, str]:
        prompt = render_prompt(row["instruction"], row.get("input") or "", template)
        if loss_on_everything:
            return {"text": prompt + row["output"]}
        return {"prompt": prompt, "completion": row["output"]}

    gone = [column for column in (*QUESTION_COLUMNS, "text") if column in dataset.column_names]
    return dataset.map(render, remove_columns=gone)
