"""
Tune a model on preferences as sliced LoRA stacks, measure it, forget, and prove it.

    python recipes/preference_tuning.py --trainer dpo --model_name_or_path M --dataset_name pairs.jsonl
    python recipes/preference_tuning.py --trainer kto ...       # rows with prompt, completion and label, or pairs
    python recipes/preference_tuning.py --trainer reward ...    # a reward model, for `hf-s3t serve` and /v1/classify
    ... --group_column user --unlearn_groups ann --verify sample

Rows have the columns that TRL's trainers read: `chosen` and `rejected`, with `prompt` or without. All options of the
trainer's arguments, `S3TConfig` and `LoraConfig` are options here.
"""

import argparse
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from common import command_line
from common.base_models import check_model_is_there
from common.command_line import console
from common.forgetting import is_asked_for, must_train, named
from common.fresh_process import in_new_process
from common.instruction_task import quiet
from common.options import Options, make_parser, read_options
from common.rows import Source, check_placing_columns, split_off, with_ids
from common.workers import RayArguments, audit_over_workers, train_over_workers
from datasets import Dataset
from trl import DPOConfig, KTOConfig, RewardConfig

import hf_s3t
from hf_s3t.errors import ConfigError
from hf_s3t.launch import start_cpu_processes


TRAINERS = {
    "dpo": (DPOConfig, "S3TDPOTrainer"),
    "kto": (KTOConfig, "S3TKTOTrainer"),
    "reward": (RewardConfig, "S3TRewardTrainer"),
}

EXHAUSTED = "exhausted: every first slice was hit. Without `--unlearn`, stages are grown on the remaining data."
_SHOWN = ("loss", "reward", "accurac", "margin")


@dataclass
class PreferenceArguments(RayArguments):
    """What the recipe takes besides the arguments of training, system and adapters."""

    trainer: str = field(default="dpo", metadata={"help": "dpo, kto or reward."})
    method: str = field(default="s3t", metadata={"help": "s3t: preferences have no baselines."})
    model_name_or_path: str | None = field(default=None, metadata={"help": "The base model."})
    dataset_name: str | None = field(
        default=None, metadata={"help": "A dataset on the Hub, a folder, or a file of rows (.jsonl, .csv, .parquet)."}
    )
    dataset_split: str = field(default="train", metadata={"help": "Split of the dataset to train on."})
    eval_share: float = field(default=0.1, metadata={"help": "Share of the rows, or groups, held out to measure."})
    unlearn: list[str] | None = field(default=None, metadata={"help": "Ids to unlearn after training."})
    unlearn_groups: list[str] | None = field(default=None, metadata={"help": "Groups to unlearn after training."})
    verify: str | None = field(
        default=None, metadata={"help": "Train surviving stages again and compare bit for bit: sample or all."}
    )


def read(argv: Sequence[str] | None = None) -> Options:
    """
    The recipe's options, those of the trainer that is asked for among them.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If something is missing, unknown or of a wrong type.
    """
    name = _named_trainer(argv)
    if name not in TRAINERS:
        raise ConfigError(f"`--trainer {name}` is unknown. Choose one of {', '.join(TRAINERS)}.")
    parser = make_parser(PreferenceArguments, TRAINERS[name][0])
    parser.set_defaults(output_dir=f"preferences-{name}-s3t")
    options = read_options(parser, argv)
    for name in ("model_name_or_path", "dataset_name"):
        if getattr(options.script, name) is None:
            raise ConfigError(f"`--{name}` is missing. Give a base model and rows of preferences.")
    if options.script.method != "s3t":
        raise ConfigError(f"`--method {options.script.method}` is no method of this recipe. Leave it out.")
    if not 0 <= options.script.eval_share < 1:
        raise ConfigError(
            f"`--eval_share {options.script.eval_share}` is no share to hold out, expected 0 or more, and less than "
            "1. Give one such as 0.1, or 0 to hold out none."
        )
    return options


def _named_trainer(argv: Sequence[str] | None) -> str:
    """The trainer that the command line asks for, or else the YAML file: which options there are depends on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--trainer")
    parser.add_argument("--config")
    first, _ = parser.parse_known_args(argv)
    values = None
    if first.config and Path(first.config).is_file():
        # What is wrong with the file is said when all of it is read.
        with open(first.config) as file, contextlib.suppress(yaml.YAMLError):
            values = yaml.safe_load(file)
    in_file = values.get("trainer") if isinstance(values, dict) else None
    return str(first.trainer or in_file or PreferenceArguments.trainer)


def make_trainer(options: Options, train: Dataset, held_out: Dataset | None) -> Any:
    """The trainer that is asked for."""
    kind = getattr(hf_s3t, TRAINERS[options.script.trainer][1])
    return kind(
        options.script.model_name_or_path,
        args=options.training,
        train_dataset=train,
        eval_dataset=held_out,
        peft_config=options.lora,
        s3t_config=options.s3t,
    )


def make_method(options: Options, train: Dataset, held_out: Dataset | None) -> Any:
    """The trainer, as what workers make anew and train by."""
    trainer = make_trainer(options, train, held_out)
    return SimpleNamespace(trainer=trainer, train=trainer.train)


def audit(options: Options, train: Dataset, held_out: Dataset | None, device: Any) -> Any:
    """The audit, of a trainer made anew, in a process of its own or by the workers of a cluster."""
    stages = None if options.script.verify == "all" else "sample"
    if options.script.ray_workers is not None:
        return audit_over_workers(device, stages, options.script, make_method, options, train, held_out)
    return in_new_process(_audit, options, train, held_out, stages)


def _audit(options: Options, train: Dataset, held_out: Dataset | None, stages: str | None) -> Any:
    quiet()
    return make_trainer(options, train, held_out).verify(stages)


def rows_of(options: Options) -> tuple[Dataset, Dataset | None]:
    """The rows to train on, and those to measure with."""
    script, s3t = options.script, options.s3t
    rows = Source(script.dataset_name).read(script.dataset_split)
    if s3t.id_column is None:
        rows, s3t.id_column = with_ids(rows, None, None)
    check_placing_columns(rows, s3t, script.dataset_name)
    if not script.eval_share:
        return rows, None
    units = rows[s3t.group_column or s3t.id_column][:]
    train, held_out = split_off(rows, units, script.eval_share, "preferences held out")
    if not len(train):
        raise ConfigError(
            f"`--eval_share {script.eval_share}` holds out all of {len(rows)} rows, expected some to train on. Give a "
            "smaller share, or 0."
        )
    return train, held_out


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """
    Run the recipe.

    Returns:
        `dict[str, Any]`: The numbers that were printed.
    """
    quiet()
    options = read(argv)
    script = options.script
    train, held_out = rows_of(options)
    check_model_is_there(script.model_name_or_path)
    ids, groups = named(script, train, options.s3t, options.training.output_dir)
    # What a deletion took is not grown again by a run that is there to forget.
    trains = must_train(False, options.training.output_dir, ids, groups)
    method = make_method(options, train, held_out)
    trainer = method.trainer
    if trains:
        train_over_workers(method, script, make_method, options, train, held_out)
    found: dict[str, Any] = {"trained": measured(trainer, held_out)}
    if is_asked_for(script):
        report = trainer.s3t_model.unlearn(ids, groups=groups)
        found["deleted"], found["stages_removed"] = report.deleted, len(report.stages_removed)
        found["after"] = measured(trainer, held_out)
    if trainer.s3t_model.is_exhausted:
        console.print(EXHAUSTED)
    elif script.verify:
        audited = audit(options, train, held_out, trainer.args.device)
        found["audit"] = audited.ok
        console.print(str(audited))
    for name, value in found.items():
        console.print(f"{name}: {shown(value)}")
    return found


def measured(trainer: Any, held_out: Dataset | None) -> dict[str, float]:
    """What an evaluation says of the ensemble, if there is one, and rows to ask it of."""
    if held_out is None or trainer.s3t_model.is_exhausted:
        return {}
    numbers: dict[str, float] = trainer.evaluate()
    return numbers


def shown(value: Any) -> Any:
    """What of an evaluation is about preferences."""
    if not isinstance(value, dict):
        return value
    return {name: round(number, 4) for name, number in value.items() if any(part in name for part in _SHOWN)}


if __name__ == "__main__":
    start_cpu_processes()
    command_line.run(main)
