"""What trainers of preferences share: which rows they take, and what the reference says of one row by itself."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import datasets
import torch
from accelerate.utils import gather_object

from ..errors import ConfigError
from ..model.fresh_copies import fresh_copy
from ..model.modes import modes_kept
from ..model.randomness import preserved_randomness, seed_all
from .inputs import refuse_gaps
from .trainer_mixin import TrainerMixin


# What a row may be stored as, by what is read of it.
PAIRS = (("chosen", "rejected"),)
TOKENISED_PAIRS = (*PAIRS, ("chosen_ids", "rejected_ids"))
JUDGED = (("prompt", "completion", "label"), *PAIRS)


def check_preferences(dataset: Any, forms: Sequence[tuple[str, ...]], made: Collection[str] = ()) -> None:
    """
    Refuse rows that are no preferences, lack something of them, or have what is made of them here.

    Args:
        dataset: What was given to train on.
        forms (sequence of tuples of `str`): The columns of each form that a row may have.
        made (collection of `str`, *optional*): Columns that the trainer makes.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With what there is instead.
    """
    if not isinstance(dataset, datasets.Dataset):
        return
    columns = dataset.column_names
    form = next((form for form in forms if set(form) <= set(columns)), None)
    if form is None:
        expected = "; or ".join(" and ".join(map(repr, form)) for form in forms)
        raise ConfigError(
            f"`train_dataset` has the columns {', '.join(columns)}, expected {expected}. Rename them "
            "(`rename_columns`), or make them (`map`)."
        )
    there = [name for name in columns if name in made]
    if there:
        raise ConfigError(
            f"`train_dataset` has a column {there[0]!r}, which is made here, of the rows of each stage or of each row "
            f"by itself. Take it out: `dataset.remove_columns({there!r})`."
        )
    for name in form:
        refuse_gaps(dataset, name)


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
