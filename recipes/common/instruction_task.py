"""Instruction tuning as a task: what its options ask for, the checks before training, and a run from start to end."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import transformers
from common import lm_evaluation
from common.adding import check_adding, joined, parted
from common.base_models import check_model_is_there
from common.command_line import console
from common.forgetting import EXHAUSTED, is_asked_for, must_train, named
from common.instruction_rows import load_additions, load_data
from common.instruction_tuning import (
    NAMES,
    RECIPE,
    ask_harness,
    audit,
    forgotten_rows,
    held_out_loss,
    loss_table,
    record_answers,
    record_deletion,
    say,
    train_all,
    unlearn,
    write_results,
)
from common.options import Options, known_options, read_config, read_options
from common.options import make_parser as make_recipe_parser
from common.prompts import PROMPT_TEMPLATES
from common.results import Results
from common.workers import RayArguments
from datasets import Dataset
from transformers import HfArgumentParser
from trl import SFTConfig

from hf_s3t.errors import ConfigError
from hf_s3t.operations.deletion import preview
from hf_s3t.records.request import DeletionRequest


@dataclass
class ScriptArguments(RayArguments):
    """What the recipe trains on and does afterwards; with neither model nor dataset it is the demo."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Base model: an id on the Hub or a folder."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Training data: an id on the Hub, or a json, jsonl or parquet file."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    method: str = field(default="s3t", metadata={"help": "s3t, full, sisa or sequential."})
    columns: list[str] | None = field(
        default=None, metadata={"help": "The columns of instruction and output, if named otherwise: question answer."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on the first so many rows."})
    eval_size: int = field(default=200, metadata={"help": "Rows held out to measure the loss; the ones after those."})
    prompt_template: str = field(
        default="alpaca", metadata={"help": "alpaca, or alpaca-short: without the opening sentence."}
    )
    loss_on_everything: bool = field(
        default=False, metadata={"help": "Loss on prompt and answer, as the paper's authors do; else on the answer."}
    )
    load_in_8bit: bool = field(default=False, metadata={"help": "Quantise the base to 8 bit with bitsandbytes."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Quantise the base to 4 bit (NF4)."})
    llm_int8_threshold: float = field(
        default=0.0, metadata={"help": "Outlier threshold in 8 bit; above 0 an answer depends on its batch."}
    )
    skip_full_lora: bool = field(default=False, metadata={"help": "Do not train the full LoRA baseline."})
    eval: str | None = field(
        default=None, metadata={"help": "'lm_eval': ask lm-evaluation-harness' questions when all is trained."}
    )
    eval_tasks: list[str] | None = field(
        default=None, metadata={"help": "Tasks of the harness; the eight of the paper's Table 1 if not given."}
    )
    eval_task_folder: str | None = field(default=None, metadata={"help": "A folder with task files of your own."})
    eval_limit: int | None = field(default=None, metadata={"help": "Ask the first so many questions of each task."})
    add_file: str | None = field(
        default=None, metadata={"help": "Rows to add to the system that is there, in a file like that of the others."}
    )
    add_into: str = field(
        default="new_shards", metadata={"help": "Where they go: new_shards, or slices, those cheapest to grow again."}
    )
    unlearn: list[str] | None = field(default=None, metadata={"help": "Ids to unlearn after training."})
    unlearn_groups: list[str] | None = field(
        default=None, metadata={"help": "Groups whose rows are all to be unlearnt; see --group_column."}
    )
    measure_forgetting: bool = field(
        default=False, metadata={"help": "Keep the loss on the rows to unlearn, before and after: for studies."}
    )
    verify: str | None = field(
        default=None, metadata={"help": "Audit at the end: 'sample' for one surviving stage, 'all' for every one."}
    )
    results_file: str | None = field(
        default=None, metadata={"help": "Where the results go; OUTPUT_DIR-results.json if not given."}
    )
    overwrite_results: bool = field(default=False, metadata={"help": "Run again although the results are there."})
    num_people: int = field(default=8, metadata={"help": "Demo: invented people with private facts."})
    num_general: int = field(default=24, metadata={"help": "Demo: general instructions."})
    cache_dir: str | None = field(default=None, metadata={"help": "Demo: where the small base model is kept."})
    base_hidden_size: int | None = field(default=None, metadata={"help": "Demo: hidden size of the base model."})
    base_vocab_size: int | None = field(default=None, metadata={"help": "Demo: tokens of the base model."})
    base_steps: int | None = field(default=None, metadata={"help": "Demo: steps of the base model's pretraining."})


def make_parser() -> HfArgumentParser:
    """The recipe's options: `ScriptArguments`, `S3TConfig`, `LoraConfig` and `SFTConfig`."""
    parser = make_recipe_parser(ScriptArguments, SFTConfig)
    parser.set_defaults(output_dir="llama-alpaca-s3t")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """
    Run the recipe, with a model and a dataset.

    Args:
        argv (sequence of `str`, *optional*): The command line; this process's if not given.

    Returns:
        `dict[str, Any]`: The numbers that were printed.
    """
    quiet()
    return run(read(argv))


def read(argv: Sequence[str] | None = None, demo_defaults: dict[str, Any] | None = None) -> Options:
    """
    The recipe's options, from a command line and its YAML file.

    Args:
        argv (sequence of `str`, *optional*): The command line; this process's if not given.
        demo_defaults (`dict`, *optional*): Defaults that hold when neither a model nor a dataset is given.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an option is unknown, a value in the YAML file is of a wrong type, or only
            one of model and dataset is given.
    """
    parser = make_parser()
    first = known_options(parser, argv)
    from_file = read_config(first.config, parser) if first.config else {}
    given = {name: from_file.get(name) or getattr(first, name) for name in ("model_name_or_path", "dataset_name")}
    if not any(given.values()):
        parser.set_defaults(**(demo_defaults or {}))
    elif not all(given.values()):
        missing = next(name for name, value in given.items() if not value)
        raise ConfigError(f"`--{missing}` is missing. Give model and dataset, or neither for the demo.")
    return read_options(parser, argv)


def quiet() -> None:
    """Only the stages deserve a progress bar; and what TRL sets by default, Transformers calls deprecated."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers.(training_args|modeling_utils)")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def run(options: Options) -> dict[str, Any]:
    """
    Train by the method asked for beside what it is compared with, measure, forget what is named, and prove it.

    Args:
        options ([`~common.options.Options`]): Everything the recipe was told, model and dataset among it.

    Returns:
        `dict[str, Any]`: The numbers that were printed.
    """
    check(options)
    script, name = options.script, NAMES[options.script.method]
    file = Results(options, RECIPE)
    check_adding(options)
    found, goes_on = file.earlier(), is_asked_for(script) or script.verify or script.eval or script.add_file
    if found is not None and not goes_on and file.is_current(found):
        console.print(f"{file.path} holds the results of this run already. --overwrite_results runs it again.")
        return found
    train, held_out = load_data(options)
    known, new = parted(load_additions(options), options) if script.add_file else (train.select([]), train.select([]))
    train = joined(train, known, options)
    check_model_is_there(script.model_name_or_path)
    ids, groups = named(script, train, options.s3t, options.training.output_dir)
    trains = len(new) > 0 or must_train(found is not None, options.training.output_dir, ids, groups)
    losses, trainer = train_all(options, script.model_name_or_path, train, held_out, file, trains, new)
    train = joined(train, new, options)
    say(trainer, loss_table(losses))
    results = {"losses": losses}
    ask_harness(options, trainer, name, results)
    if ids or groups:
        forget(options, trainer, train, file, results, ids, groups)
    if script.verify and not trainer.s3t_model.is_exhausted:
        which = "sample" if script.verify == "sample" else None
        report = audit(options, trainer, script.model_name_or_path, train, held_out, which)
        say(trainer, str(report))
        results["verified"] = report.ok
    record_answers(file, results)
    write_results(file, options)
    return results


def forget(
    options: Options,
    trainer: Any,
    train: Dataset,
    file: Results,
    results: dict[str, Any],
    ids: list,
    groups: list,
) -> None:
    """Unlearn what the command line names, and measure again."""
    script, name = options.script, NAMES[options.script.method]
    forgotten = forgotten_rows(trainer, train, ids, groups) if script.measure_forgetting else None
    if forgotten is not None and preview(trainer.folder, DeletionRequest(ids, groups)).present:
        # Kept before the deletion: nothing can measure it afterwards.
        file.keep(forgotten={"before": held_out_loss(trainer, forgotten)})
    results["unlearned"] = unlearn(trainer, file, ids, groups)
    if trainer.s3t_model.is_exhausted:
        say(trainer, EXHAUSTED)
        record_deletion(file, trainer, results)
        return
    results["losses"][f"{name} after unlearning"] = held_out_loss(trainer)
    say(trainer, loss_table(results["losses"]))
    ask_harness(options, trainer, f"{name} after unlearning", results)
    record_deletion(file, trainer, results)
    if forgotten is not None:
        results["forgotten"] = {**file.content.get("forgotten", {}), "after": held_out_loss(trainer, forgotten)}
        file.add(forgotten=results["forgotten"])
        shown = ", ".join(f"{loss:.3f} {when}" for when, loss in results["forgotten"].items())
        say(trainer, f"loss on what was forgotten: {shown}")


def check(options: Options) -> None:
    """
    Refuse what cannot be done, before anything is read or trained.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If method, template or evaluation is unknown, or does not fit.
    """
    check_method(options)
    check_template(options.script)
    check_evaluation(options.script)


def check_method(options: Options) -> None:
    """Refuse a method that does not fit, before anything is trained."""
    method = options.script.method
    if method not in NAMES:
        raise ConfigError(f"`--method {method}` is for classification. Choose one of {', '.join(NAMES)}.")
    if options.is_demo and method != "s3t":
        raise ConfigError(
            f"The demo shows S3T, got `--method {method}`. Give `--model_name_or_path` and `--dataset_name`."
        )


def check_template(script: ScriptArguments) -> None:
    """Refuse an unknown template, before anything is read."""
    if script.prompt_template not in PROMPT_TEMPLATES:
        raise ConfigError(
            f"`--prompt_template {script.prompt_template}` is unknown. Choose one of {', '.join(PROMPT_TEMPLATES)}."
        )


def check_evaluation(script: ScriptArguments) -> None:
    """Refuse an evaluation that cannot be made, before anything is trained."""
    if script.eval not in (None, "lm_eval"):
        raise ConfigError(f"`--eval {script.eval}` is unknown, expected `lm_eval`, lm-evaluation-harness.")
    if script.eval:
        lm_evaluation.check_tasks(script.eval_tasks, script.eval_task_folder)
