"""What `Trainer` would find out in a stage's first steps, or after its first evaluation, said before anything is."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.generic import can_return_loss, find_labels

from ..config import S3TConfig
from ..errors import ConfigError
from ..model.ensemble_loss import IGNORED_LABEL
from ..model.task import find_task
from ..records.arrow_kinds import is_list
from .circumstances import evaluation_trains
from .dataset_rows import LABELS


# Under which names rows have tokens: as models take them, and as trainers of preferences make them.
_TOKENS = ("input_ids", "prompt_ids", "completion_ids", "chosen_ids", "rejected_ids")
# What trainers of TRL read of a row, before a model does.
_READ_BY_TRL = (
    "prompt",
    "completion",
    "messages",
    "images",
    "image",
    "tools",
    "chat_template_kwargs",
    "assistant_masks",
)


def check_columns(dataset: Any, model: PreTrainedModel, args: TrainingArguments, config: S3TConfig) -> None:
    """
    Refuse settings that take away what the model is trained on.

    Args:
        dataset: The training examples.
        model ([`~transformers.PreTrainedModel`]): The base model.
        args ([`~transformers.TrainingArguments`]): The recipe of a stage.
        config ([`S3TConfig`]): The settings that name columns.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming the column.
    """
    is_prepared_by_trl = hasattr(args, "dataset_text_field")
    read = set(inspect.signature(model.forward).parameters) | set(LABELS)
    read |= {getattr(args, "dataset_text_field", ""), *_READ_BY_TRL} if is_prepared_by_trl else set()
    for field in ("id_column", "group_column", "shard_column", "slice_column"):
        column = getattr(config, field)
        if column in read and column in (getattr(dataset, "column_names", None) or ()):
            raise ConfigError(
                f"`{field}={column!r}` names a column that the model is trained on, and it would be taken away: "
                "columns of ids, groups and places are kept from it. Give a copy of it another name, such as "
                f"`dataset.add_column({column + '_of_row'!r}, dataset[{column!r}])`, and that one as `{field}`."
            )


def check_inputs(dataset: Any, model: PreTrainedModel, args: TrainingArguments) -> None:
    """
    Refuse rows of which the model would get nothing.

    Args:
        dataset: The training examples.
        model ([`~transformers.PreTrainedModel`]): The base model.
        args ([`~transformers.TrainingArguments`]): The recipe of a stage.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the columns that there are.
    """
    if not args.remove_unused_columns or not _is_stored(dataset):
        return
    taken = inspect.signature(model.forward).parameters.values()
    inputs = {p.name for p in taken if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)} - set(LABELS)
    if inputs and not inputs & set(dataset.column_names):
        raise ConfigError(
            f"`train_dataset` has the columns {', '.join(dataset.column_names)}, and none is an input of "
            f"{type(model).__name__}, such as {getattr(model, 'main_input_name', 'input_ids')}: `Trainer` would take "
            "all of them away. Tokenise it first, row by row (`dataset.map`), or set `remove_unused_columns=False` "
            "where `data_collator` does that."
        )


def check_loss(
    trainer_type: type[Trainer],
    model: PreTrainedModel,
    args: TrainingArguments,
    dataset: Any,
    compute_loss_func: Callable[..., Any] | None,
    data_collator: Callable[..., Any] | None,
) -> None:
    """
    Refuse training without a loss.

    Args:
        trainer_type (`type`): The class of the trainer, which may compute one.
        model ([`~transformers.PreTrainedModel`]): The base model.
        args ([`~transformers.TrainingArguments`]): The recipe of a stage.
        dataset: The training examples.
        compute_loss_func (`Callable`, *optional*): As in `Trainer`.
        data_collator (`Callable`, *optional*): As in `Trainer`.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With what there is instead.
    """
    overridden = trainer_type.compute_loss is not Trainer.compute_loss or args.label_smoothing_factor > 0
    if model is None or overridden or compute_loss_func is not None:
        return
    takes = inspect.signature(type(model).forward).parameters.values()
    # A class of the user's own may take labels by `**kwargs`.
    is_known = type(model).__module__.startswith("transformers.") or not any(p.kind is p.VAR_KEYWORD for p in takes)
    names = find_labels(type(model))
    if not names and not can_return_loss(type(model)) and is_known:
        raise ConfigError(
            f"{type(model).__name__} takes no labels, so it returns no loss to train by. Use a class that takes "
            "`labels`, give `compute_loss_func`, or override `compute_loss` in a trainer of yours."
        )
    if data_collator is None and names and _is_stored(dataset) and not {*names, *LABELS} & set(dataset.column_names):
        raise ConfigError(
            f"`train_dataset` has the columns {', '.join(dataset.column_names)}, and none of {', '.join(names)}: the "
            "model would return no loss. Name the one of the answers so (`rename_column`), or give a `data_collator` "
            "that makes it."
        )


def collates_as_stored(data_collator: Any) -> bool:
    """Whether rows come to the model as they are stored: those of the libraries pad and mask, and change no answer."""
    kind = data_collator if inspect.isroutine(data_collator) else type(data_collator)
    return data_collator is None or (kind.__module__ or "").startswith(("transformers.", "trl."))


def check_rows(dataset: Any, model: PreTrainedModel, head: Sequence[str], args: TrainingArguments) -> None:
    """
    Refuse labels and tokens that the model has no place for.

    Only what is stored is looked at; what a transform, collator or loss of the user's makes of it is not known here.

    Args:
        dataset: The training examples.
        model ([`~transformers.PreTrainedModel`]): The base model.
        head (sequence of `str`): Names of the modules trained as the head; none for a language model.
        args ([`~transformers.TrainingArguments`]): The recipe of a stage, which may cut rows.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming the column and the values.
    """
    if not _is_stored(dataset):
        return
    # In other tasks a label is no class but, say, the number of a choice or a position.
    if head and find_task(model).endswith("-classification"):
        _check_labels(dataset, model)
    # Models that read images or sound too may have tokens outside of the embeddings, and positions of their own.
    config = getattr(model, "config", None)
    is_of_words = config is not None and getattr(model, "main_input_name", None) == "input_ids"
    if is_of_words and model.config.get_text_config() is config:
        for column in [name for name in _TOKENS if name in dataset.column_names]:
            _check_tokens(dataset, column, model)
        if "input_ids" in dataset.column_names:
            _check_length(dataset, model, _cut_to(args))


def _cut_to(args: TrainingArguments) -> float:
    """To which length TRL cuts rows, or packs them; a collator of its own may do without."""
    is_prepared = hasattr(args, "dataset_text_field") and not (getattr(args, "dataset_kwargs", None) or {}).get(
        "skip_prepare_dataset"
    )
    max_length = getattr(args, "max_length", None)
    return max_length if is_prepared and max_length is not None else math.inf


def _check_labels(dataset: datasets.Dataset, model: PreTrainedModel) -> None:
    column = next((name for name in LABELS if name in dataset.column_names), None)
    classes = getattr(model.config, "num_labels", None)
    if column is None or classes is None or "labels" not in inspect.signature(model.forward).parameters:
        return
    kind, (low, high) = _kind_and_range(dataset, column)
    problem = getattr(model.config, "problem_type", None)
    if kind == "text":
        raise ConfigError(
            f"`{column}` of `train_dataset` holds texts, expected the numbers of classes. Map them by a table that is "
            "fixed beforehand, such as `model.config.label2id`."
        )
    if problem == "multi_label_classification" and kind == "whole":
        raise ConfigError(
            f"`{column}` of `train_dataset` holds whole numbers, and {type(model).__name__} with "
            f"problem_type={problem!r} is trained on numbers with a fraction. Cast the column: "
            f'`dataset.cast_column({column!r}, List(Value("float32")))`.'
        )
    is_regression = problem == "regression" or (problem is None and classes == 1)
    if is_regression or kind != "whole" or low is None:
        return
    if not (0 <= low or low == IGNORED_LABEL) or high >= classes:
        raise ConfigError(
            f"`{column}` of `train_dataset` goes from {low} to {high}, and the model has num_labels={classes}: "
            f"expected 0 to {classes - 1}, or {IGNORED_LABEL} for none. Mend the labels, or load the model with all "
            "classes."
        )


def _check_tokens(dataset: datasets.Dataset, column: str, model: PreTrainedModel) -> None:
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:
        return
    kind, (low, high) = _kind_and_range(dataset, column)
    known = getattr(embeddings, "num_embeddings", None)
    if known and kind == "whole" and low is not None and not 0 <= low <= high < known:
        raise ConfigError(
            f"`{column}` of `train_dataset` goes from {low} to {high}, and the model knows the tokens 0 to "
            f"{known - 1}. Tokenise with the model's own tokenizer."
        )


def _check_length(dataset: datasets.Dataset, model: PreTrainedModel, cut_to: float) -> None:
    places = [
        module.num_embeddings
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and _is_of_positions(name.rpartition(".")[2])
    ]
    longest = min(_longest(dataset, "input_ids"), cut_to)
    if places and longest > max(places):
        raise ConfigError(
            f"`input_ids` of `train_dataset` is up to {longest} long, and the model has {max(places)} positions. "
            "Truncate when tokenising: `tokenizer(..., truncation=True)`."
        )


def _is_of_positions(name: str) -> bool:
    return name == "wpe" or ("position" in name and "relative" not in name)


def _longest(dataset: datasets.Dataset, column: str) -> int:
    rows = dataset.with_format("arrow").select_columns([column]).iter(batch_size=1000)
    columns = [batch[column] for batch in rows]
    lengths = [pc.max(pc.list_value_length(part)).as_py() for part in columns if is_list(part.type)]
    return max((length or 0 for length in lengths), default=0)


def _is_stored(dataset: Any) -> bool:
    """Whether what a dataset stores is what a collator gets."""
    return isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"


def _kind_and_range(dataset: datasets.Dataset, column: str) -> tuple[str, tuple[Any, Any]]:
    """What a column holds, however deep in lists: "whole", "text" or "other"; the least and greatest whole number."""
    kind, least, greatest = "other", None, None
    for batch in dataset.with_format("arrow").select_columns([column]).iter(batch_size=1000):
        values = batch[column]
        while is_list(values.type):
            values = pc.list_flatten(values)
        if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
            return "text", (None, None)
        if not pa.types.is_integer(values.type):
            return "other", (None, None)
        kind, found = "whole", pc.min_max(values).as_py()
        if found["min"] is not None:
            # The ignored label is left out of the range, unless a label below it shows that it is none.
            if found["min"] == IGNORED_LABEL:
                found = pc.min_max(values.filter(pc.not_equal(values, IGNORED_LABEL))).as_py()
                if found["min"] is None:
                    continue
            least = found["min"] if least is None else min(least, found["min"])
            greatest = found["max"] if greatest is None else max(greatest, found["max"])
    return kind, (least, greatest)


def check_choice(
    args: TrainingArguments, eval_dataset: Any, compute_metrics: Any, trainer_class: type[Trainer] = Trainer
) -> None:
    """
    Refuse evaluations that cannot be made, or that have no number to choose by.

    Args:
        args ([`~transformers.TrainingArguments`]): The recipe of a stage.
        eval_dataset: One dataset, or a dict of them, if there is any.
        compute_metrics (`Callable`, *optional*): As in `Trainer`.
        trainer_class (`type`, defaults to [`~transformers.Trainer`]): The class that evaluates.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming the argument.
    """
    if args.eval_strategy != "no" and eval_dataset is None:
        raise ConfigError(
            f"`eval_strategy={IntervalStrategy(args.eval_strategy).value}` evaluates while a stage trains, and there "
            'is no `eval_dataset`. Give one, or set eval_strategy="no".'
        )
    metric = args.metric_for_best_model
    chooses = evaluation_trains(args) or args.save_strategy == "best"
    if not chooses or metric is None or eval_dataset is None:
        return
    name = metric.removeprefix("eval_")
    # A class with a log of its own may add numbers to it, as those of TRL do, and they come back with the others.
    has_loss_alone = compute_metrics is None and trainer_class.log is Trainer.log
    is_its_own = compute_metrics is None and not has_loss_alone and not name.endswith("loss")
    if isinstance(eval_dataset, Mapping) and is_its_own:
        raise ConfigError(
            f"`metric_for_best_model={metric!r}` is a number that {trainer_class.__name__} tells of all evaluation "
            f"sets by one name, and `eval_dataset` is a dict of {', '.join(map(str, eval_dataset))}. Give one set, or "
            f"choose by the loss of one, as in metric_for_best_model='eval_{next(iter(eval_dataset), 'name')}_loss'."
        )
    if isinstance(eval_dataset, Mapping) and not any(name.startswith(f"{one}_") for one in eval_dataset):
        first = f"eval_{next(iter(eval_dataset), 'name')}_{name}"
        raise ConfigError(
            f"`metric_for_best_model={metric!r}` is a number of no evaluation set: `eval_dataset` is a dict of "
            f"{', '.join(map(str, eval_dataset))}. Say of which, as in "
            f"metric_for_best_model={first!r}."
        )
    if has_loss_alone and not name.endswith("loss"):
        raise ConfigError(
            f"`metric_for_best_model={metric!r}` shall choose, and without `compute_metrics` an evaluation has the "
            'loss alone. Give `compute_metrics` that returns it, or set metric_for_best_model="loss".'
        )


def check_optimizer(args: TrainingArguments, model: PreTrainedModel) -> None:
    """
    Refuse an optimizer or schedule that cannot be made from the arguments: a library that is not there, say.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With what the library says.
    """
    try:
        Trainer.get_optimizer_cls_and_kwargs(args, model)
    except Exception as error:
        raise ConfigError(
            f"`optim={getattr(args.optim, 'value', args.optim)!r}` cannot be made: {_message_of(error)}. Mend that, "
            "or choose another optimizer."
        ) from error
    settings, steps = args.lr_scheduler_kwargs if isinstance(args.lr_scheduler_kwargs, dict) else {}, 10
    try:
        get_scheduler(
            args.lr_scheduler_type,
            torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0),
            min(args.get_warmup_steps(steps), steps),
            steps,
            dict(settings),
        )
    except Exception as error:
        raise ConfigError(
            f"`lr_scheduler_type={getattr(args.lr_scheduler_type, 'value', args.lr_scheduler_type)!r}` with "
            f"`lr_scheduler_kwargs={settings!r}` makes no schedule: {_message_of(error)}. Mend these settings."
        ) from error


def _message_of(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
