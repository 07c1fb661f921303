"""What a trainer was given, before anything is made of it: things of another kind, settings left out or in vain."""

import os
from pathlib import Path
from typing import Any

import datasets
from torch import nn
from transformers import TrainingArguments
from transformers.trainer import (
    OPTIMIZER_NAME,
    SCHEDULER_NAME,
    TRAINER_STATE_NAME,
    TRAINING_ARGS_NAME,
)
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import (
    CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_NAME,
    logging,
)
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME, ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME

from ..config import S3TConfig
from ..errors import ConfigError, counted
from ..model.layers import LayerGroups
from ..model.task import find_task
from ..plan.stages import Plan, StageKey, relative_cost
from ..records.examples import ExampleTable
from .dataset_rows import LABELS


logger = logging.get_logger(__name__)

# What `Trainer` and PEFT leave in a folder, besides checkpoints.
_OF_A_PLAIN_RUN = (
    CONFIG_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, ADAPTER_CONFIG_NAME,
    ADAPTER_SAFE_WEIGHTS_NAME, ADAPTER_WEIGHTS_NAME, TRAINER_STATE_NAME, TRAINING_ARGS_NAME, OPTIMIZER_NAME,
    SCHEDULER_NAME,
)  # fmt: skip


def check_kinds(
    model: Any,
    args: Any,
    train_dataset: Any,
    eval_dataset: Any,
    loads_names: bool = False,
    arguments: type[TrainingArguments] = TrainingArguments,
) -> None:
    """
    Refuse what is of another kind than a trainer takes, where it would end in an error about something else.

    Args:
        model: What was given as the base model; `None` is for others to refuse.
        args: What was given as the training arguments.
        train_dataset: What was given to train on.
        eval_dataset: What was given to evaluate on.
        loads_names (`bool`, defaults to `False`): Whether the trainer loads a model that it is given the name of.
        arguments (`type`, defaults to [`~transformers.TrainingArguments`]): What the trainer takes as `args`.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Saying what to give instead.
    """
    if model is not None and not isinstance(model, nn.Module) and not (loads_names and isinstance(model, str)):
        raise ConfigError(
            f"`model` is {_shown(model)}, expected a loaded model{' or its name, a text' if loads_names else ''}. "
            f"{_loading(model, loads_names)}"
        )
    if args is not None and not isinstance(args, arguments):
        name = arguments.__name__
        kind = f"{type(args).__name__}" if isinstance(args, TrainingArguments) else _shown(args)
        packing = ". Nothing is packed here" if getattr(args, "packing", False) else ""
        raise ConfigError(f"`args` is {kind}, expected `{name}`{packing}. Give {name}(output_dir=..., ...).")
    sets = eval_dataset.items() if type(eval_dataset) is dict else [(None, eval_dataset)]
    named = {f"eval_dataset{'' if name is None else f'[{name!r}]'}": dataset for name, dataset in sets}
    for name, dataset in {"train_dataset": train_dataset, **named}.items():
        _check_dataset(name, dataset, loads_names)


def _check_dataset(name: str, dataset: Any, is_prepared: bool) -> None:
    if isinstance(dataset, (str, os.PathLike)):
        how = f'`load_dataset({str(dataset)!r}, split="train")`; of a file, `load_dataset("json", data_files=...)`'
    elif hasattr(dataset, "iloc"):
        how = "`Dataset.from_pandas(frame, preserve_index=False)`"
    elif isinstance(dataset, list) and is_prepared:
        how = "`Dataset.from_list(rows)`"
    else:
        return
    raise ConfigError(f"`{name}` is {_shown(dataset)}, expected a `datasets.Dataset`. Give {how}.")


def _loading(model: Any, loads_names: bool) -> str:
    """How to come to a model from what was given in its place."""
    if isinstance(model, os.PathLike) and loads_names:
        return f"Give {str(model)!r}."
    of_class = model.__name__ if isinstance(model, type) and hasattr(model, "from_pretrained") else "AutoModelFor..."
    name = repr(str(model)) if isinstance(model, (str, os.PathLike)) else "..."
    language = "; a language model is loaded by its name by `S3TSFTTrainer`" if isinstance(model, str) else ""
    return f"Like `Trainer`, it loads none: give `{of_class}.from_pretrained({name})`, of your task's class{language}."


def _shown(value: Any) -> str:
    if isinstance(value, (str, os.PathLike)):
        return f"{'the text' if isinstance(value, str) else 'the path'} {str(value)!r}"
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def check_parts(processing_class: Any, **functions: Any) -> None:
    """
    Refuse names in the place of what they name, which would be found out when the system's folder is written.

    Args:
        processing_class: What was given as the tokenizer or processor.
        **functions: Arguments that are called, by their names.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Saying what to give instead.
    """
    if processing_class is not None and not hasattr(processing_class, "save_pretrained"):
        raise ConfigError(
            f"`processing_class` is {_shown(processing_class)}, expected a tokenizer or processor. Give what "
            "`AutoTokenizer.from_pretrained(...)` returns."
        )
    for name, part in functions.items():
        if part is not None and not callable(part):
            raise ConfigError(f"`{name}` is {_shown(part)}, expected something that can be called. Give a function.")


def check_answers(dataset: Any, is_labelled_later: bool) -> None:
    """
    Refuse rows without an answer.

    Args:
        dataset: What was given to train on. Only columns of a [`~datasets.Dataset`] without a transform can be told.
        is_labelled_later (`bool`): Whether a collator or a loss that was given may know of other answers.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With how many there are.
    """
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom" or is_labelled_later:
        return
    for name in LABELS:
        if name in dataset.column_names:
            refuse_gaps(dataset, name)


def check_texts(model: Any, dataset: Any, args: Any, formatting_func: Any) -> None:
    """
    Refuse what `SFTTrainer` would end with an error about something else: models and rows of another kind.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        dataset: What was given to train on.
        args ([`~trl.SFTConfig`]): The recipe of a stage.
        formatting_func: What was given to make texts of rows.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Saying what to give instead.
    """
    if find_task(model) in ("text-classification", "image-classification"):
        raise ConfigError(
            f"{type(model).__name__} is no language model, which `S3TSFTTrainer` trains. Give a model with a language "
            "modelling head, or use `S3TTrainer`."
        )
    if not isinstance(dataset, datasets.Dataset) or (args.dataset_kwargs or {}).get("skip_prepare_dataset"):
        return
    columns = dataset.column_names
    single = [name for name in ("input_ids", "messages", "conversations", args.dataset_text_field) if name in columns]
    pair = ["prompt", "completion"]
    if formatting_func is None and not single and not set(pair) <= set(columns):
        raise ConfigError(
            f"`train_dataset` has the columns {', '.join(columns)}, expected {args.dataset_text_field!r}, 'messages', "
            "or 'prompt' and 'completion'. Rename them (`rename_columns`), set `dataset_text_field`, or give a "
            "`formatting_func`."
        )
    # TRL reads the first of these that a row has.
    chat = next((name for name in ("input_ids", "messages", "conversations") if name in columns), None)
    read = [chat] if chat is not None and not set(pair) <= set(columns) else single or pair
    for name in () if formatting_func is not None else read:
        refuse_gaps(dataset, name)


def check_tokenizer(model: Any, processing_class: Any) -> None:
    """
    Refuse a base of which a trainer could not tell the tokenizer.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        processing_class: What was given as the tokenizer or processor.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If none was given, and the base has no name.
    """
    if processing_class is None and not model.config._name_or_path:
        raise ConfigError(
            "`processing_class` is missing, and the model was made in memory, so that its tokenizer cannot be found "
            "by its name. Give the tokenizer."
        )


def refuse_gaps(dataset: datasets.Dataset, column: str, name: str = "train_dataset") -> None:
    """
    Refuse a column of which some rows have nothing.

    Args:
        dataset ([`~datasets.Dataset`]): The rows.
        column (`str`): The column.
        name (`str`, defaults to `"train_dataset"`): As what they were given.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With how many there are.
    """
    # This counts all rows of the table, of which the dataset may have selected some: it only says whether to look.
    if dataset.data.column(column).null_count:
        missing = sum(value is None for value in dataset.with_format(None)[column][:])
        if missing:
            raise ConfigError(
                f"`{name}` lacks `{column}` in {missing} of {counted(len(dataset), 'row')}. Drop them: "
                f"`dataset.filter(lambda row: row[{column!r}] is not None)`."
            )


def leftovers_of_a_plain_run(folder: Path) -> list[str]:
    """
    What `Trainer` or PEFT left in a folder: weights, and checkpoints, that no deletion would reach.

    Args:
        folder (`Path`): The folder, which need not be there.
    """
    checkpoints = sorted(path.name for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))
    return [name for name in _OF_A_PLAIN_RUN if (folder / name).exists()] + checkpoints


def refuse_leftovers(output_dir: str) -> None:
    """
    Refuse to make a system in the folder of a plain run.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming what is there, and the way out.
    """
    found = leftovers_of_a_plain_run(Path(output_dir))
    if found:
        what = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise ConfigError(
            f"`output_dir={output_dir!r}` holds what a plain run left ({what}), and a system has a folder of its own: "
            "it resumes from none of this, and no deletion would reach it. Choose another `output_dir`, or move this "
            "away."
        )


def say_which_seed_rules(args: TrainingArguments, config: S3TConfig) -> None:
    """
    Say that a seed of the training arguments decides nothing, where one was set that is another than the system's.

    Args:
        args ([`~transformers.TrainingArguments`]): The recipe of a stage, as it was given.
        config ([`S3TConfig`]): The system.
    """
    seeds = {name: getattr(args, name) for name in ("seed", "data_seed")}
    default = {name: getattr(TrainingArguments, name) for name in seeds}
    other = {name: seed for name, seed in seeds.items() if seed not in (default[name], config.seed)}
    if other:
        shown = " and ".join(f"`{name}={seed}`" for name, seed in other.items())
        logger.warning_once(
            f"{shown} of the training arguments decides nothing: every stage's randomness follows from "
            f"`s3t_config.seed`, which is {config.seed}. Give S3TConfig(seed=...), or leave it out there."
        )


def say_what_the_default_costs(
    config: S3TConfig, plan: Plan, layers: LayerGroups, table: ExampleTable, max_steps: int
) -> None:
    """
    Say how much more than one plain run a system costs that nobody chose the settings of.

    Args:
        config ([`S3TConfig`]): The system.
        plan ([`~hf_s3t.plan.stages.Plan`]): Its stages.
        layers ([`~hf_s3t.model.layers.LayerGroups`]): The layers of its stages.
        table ([`~hf_s3t.records.examples.ExampleTable`]): Its examples.
        max_steps (`int`): Steps of a stage, or of a plain run, whatever it is trained on; 0 or less for epochs.
    """
    stages = plan.stages()
    if len(stages) == 1:
        return

    def examples(key: StageKey) -> int:
        return 1 if max_steps > 0 else sum(table.size(key.shard, s) for s in config.slices_trained_on(key.prefix))

    depth = layers.num_layers
    costs = [relative_cost(key, examples(key), depth, layers.layers_below(key.group)) for key in stages]
    plain = 2 * depth * (1 if max_steps > 0 else len(table))
    logger.warning_once(
        f"`s3t_config` was left out: with {counted(config.num_shards, 'shard')} and "
        f"{counted(config.num_slices, 'slice')} `train()` trains {len(stages)} stages, one for each set of slices, at "
        f"about {sum(costs) / plain:.1f} times the cost of one plain run. Give S3TConfig(num_shards=..., "
        "num_slices=..., work_budget=...), a smaller budget costs less; `hf-s3t plan` recommends them, and "
        "S3TConfig() says that these are meant."
    )
