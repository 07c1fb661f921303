"""What trainers of preferences share: which rows they take, and what the reference says of one row by itself."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import torch
from accelerate.utils import gather_object
from transformers import AutoTokenizer

from ..errors import ConfigError
from ..model.fresh_copies import fresh_copy
from ..model.modes import modes_kept
from ..model.randomness import preserved_randomness, seed_all
from ..records.arrow_kinds import is_list
from .inputs import refuse_gaps
from .trainer_mixin import TrainerMixin


# What a row may be stored as, by what is read of it.
PAIRS = (("chosen", "rejected"),)
TOKENISED_PAIRS = (*PAIRS, ("chosen_ids", "rejected_ids"))
JUDGED = (("prompt", "completion", "label"), *PAIRS)
# What a row's prompt is called, which pairs may lack.
_PROMPT = "prompt"
_REMEDY = {
    "texts": "A text is one string, a chat a list of messages with `role` and `content`: make them so (`map`).",
    "tokens": "Give a list of their numbers for each row, or the texts as 'chosen' and 'rejected'.",
}


def check_preferences(given: Mapping[str, Any], forms: Sequence[tuple[str, ...]], made: Collection[str] = ()) -> None:
    """
    Refuse rows that are no preferences, lack something of them, hold what no text is made of, or have what is made of
    them here: those to train on and those to evaluate on.

    Args:
        given (mapping from `str`): What the trainer was given, by name.
        forms (sequence of tuples of `str`): The columns of each form that a row may have.
        made (collection of `str`, *optional*): Columns that the trainer makes.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With what there is instead.
    """
    held_out = given.get("eval_dataset")
    sets = held_out.items() if isinstance(held_out, dict) else [(None, held_out)]
    named = {f"eval_dataset{'' if name is None else f'[{name!r}]'}": dataset for name, dataset in sets}
    for name, dataset in {"train_dataset": given["train_dataset"], **named}.items():
        if isinstance(dataset, datasets.Dataset):
            _check_rows(dataset, name, forms, made, given)


def _check_rows(
    dataset: datasets.Dataset,
    name: str,
    forms: Sequence[tuple[str, ...]],
    made: Collection[str],
    given: Mapping[str, Any],
) -> None:
    columns = dataset.column_names
    form = next((form for form in forms if set(form) <= set(columns)), None)
    if form is None:
        expected = "; or ".join(" and ".join(map(repr, form)) for form in forms)
        raise ConfigError(
            f"`{name}` has the columns {', '.join(columns)}, expected {expected}. Rename them (`rename_columns`), or "
            "make them (`map`)."
        )
    there = [column for column in columns if column in made]
    if there:
        raise ConfigError(
            f"`{name}` has a column {there[0]!r}, which is made here, of the rows of each stage or of each row by "
            f"itself. Take it out: `dataset.remove_columns({there!r})`."
        )
    if not len(dataset):
        raise ConfigError(f"`{name}` has no rows, expected one or more. Give some, or leave it out.")
    if dataset.format["type"] == "custom":
        if name != "train_dataset":
            return
        raise ConfigError(
            "`train_dataset` has a transform, of whose rows nobody could tell which examples they were made from: "
            "expected rows as they are stored. Make them once, by `dataset.map(...)` in the place of `with_transform`."
        )
    read = (_PROMPT, *form) if form in PAIRS and _PROMPT in columns else form
    for column in read:
        refuse_gaps(dataset, column, name)
    kinds = {column: _kind(dataset, column) for column in read if column != "label"}
    if "label" in read and not _are_judgements(dataset, "label"):
        raise ConfigError(
            f"`label` of `{name}` holds other than judgements, expected True where an answer was liked and False "
            "where it was not. Make them so: `dataset.map(lambda row: {'label': row['label'] == ...})`."
        )
    readable = ("tokens",) if form[0].endswith("_ids") else ("texts", "chats")
    if len(set(kinds.values())) > 1 or kinds[form[0]] not in readable:
        shown = ", ".join(f"{kind} in `{column}`" for column, kind in kinds.items())
        raise ConfigError(
            f"`{name}` has {shown}, expected {' or '.join(readable)} in all of them. {_REMEDY[readable[0]]}"
        )
    if "chats" in kinds.values():
        _check_template(name, given)


def _kind(dataset: datasets.Dataset, column: str) -> str:
    """What a column holds, as its type tells."""
    kind = dataset.features.arrow_schema.field(column).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "texts"
    # Messages of several forms are stored as JSON, each or all of a chat.
    if isinstance(kind, pa.BaseExtensionType):
        return "chats"
    if not is_list(kind):
        return "numbers" if pa.types.is_integer(kind) or pa.types.is_floating(kind) else "something else"
    inner = kind.value_type
    if pa.types.is_struct(inner):
        return "chats" if {"role", "content"} <= {field.name for field in inner} else "lists of something else"
    if isinstance(inner, pa.BaseExtensionType):
        return "chats"
    return "tokens" if pa.types.is_integer(inner) else "lists"


def _are_judgements(dataset: datasets.Dataset, column: str) -> bool:
    kind = dataset.features.arrow_schema.field(column).type
    if pa.types.is_boolean(kind):
        return True
    return pa.types.is_integer(kind) and set(dataset.with_format(None)[column][:]) <= {0, 1}


def _check_template(name: str, given: Mapping[str, Any]) -> None:
    """Refuse chats that no template makes a text of."""
    tokenizer, args = given.get("processing_class"), given["args"]
    if getattr(args, "chat_template_path", None) is not None:
        return
    if tokenizer is None:
        trust = getattr(args, "trust_remote_code", False)
        tokenizer = AutoTokenizer.from_pretrained(given["model"].config._name_or_path, trust_remote_code=trust)
    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError(
            f"`{name}` holds chats, and the tokenizer has no chat template to make texts of them. Give a "
            "`processing_class` with one (`tokenizer.chat_template = ...`), that of an instruct model, say; or rows "
            "of texts."
        )


def said_of_each(
    trainer: TrainerMixin, dataset: datasets.Dataset, ask: Callable[[dict[str, Any]], Mapping[str, torch.Tensor]]
) -> datasets.Dataset:
    """
    Rows with what the reference says of each, asked of each by itself: in a batch the last bits of a number depend on
    the rows beside it, which may be of another slice. So do what dropout or a collator draws, and what a collator
    keeps, on the rows before: the reference is asked as one that evaluates, and for each row all begins anew.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, whose collator makes a batch of a row.
        dataset ([`~datasets.Dataset`]): The rows, prepared.
        ask (`Callable`): Given a batch of one row, says numbers of it by name.
    """
    index, count = trainer.accelerator.process_index, trainer.accelerator.num_processes
    said = []
    with modes_kept(trainer.model), preserved_randomness():
        trainer.model.eval()
        for position in range(index, len(dataset), count):
            seed_all(0)
            collate = fresh_copy(trainer.data_collator, (trainer.model,))
            batch = trainer._prepare_inputs(collate([dataset[position]]))
            said.append((position, {name: value.item() for name, value in ask(batch).items()}))
    in_order = [numbers for _, numbers in sorted(gather_object(said), key=lambda one: one[0])]
    for name in in_order[0] if in_order else ():
        dataset = dataset.add_column(name, [numbers[name] for numbers in in_order])
    return dataset
