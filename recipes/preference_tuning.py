"""
Tune a model on preferences as sliced LoRA stacks, measure it, forget, and prove it.

    python recipes/preference_tuning.py --trainer dpo --model_name_or_path M --dataset_name pairs.jsonl
    python recipes/preference_tuning.py --trainer kto ...       # rows with prompt, completion and label, or pairs
    python recipes/preference_tuning.py --trainer reward ...    # a reward model, for `hf-s3t serve` and /v1/classify
    ... --group_column user --unlearn_groups ann --verify sample

Rows have the columns that TRL's trainers read: `chosen` and `rejected`, with `prompt` or without. All options of the
trainer's arguments, `S3TConfig` and `LoraConfig` are options here.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from common import command_line
from common.command_line import console
from common.forgetting import is_asked_for, named
from common.fresh_process import in_new_process
from common.instruction_task import quiet
from common.options import Options, make_parser, read_options
from common.rows import Source, check_placing_columns, split_off, with_ids
from common.workers import RayArguments
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
    first, _ = make_parser(PreferenceArguments, DPOConfig).parse_known_args(argv)
    if first.trainer not in TRAINERS:
        raise ConfigError(f"`--trainer {first.trainer}` is unknown. Choose one of {', '.join(TRAINERS)}.")
    parser = make_parser(PreferenceArguments, TRAINERS[first.trainer][0])
    parser.set_defaults(output_dir=f"preferences-{first.trainer}-s3t")
    options = read_options(parser, argv)
    for name in ("model_name_or_path", "dataset_name"):
        if getattr(options.script, name) is None:
            raise ConfigError(f"`--{name}` is missing. Give a base model and rows of preferences.")
    if options.script.method != "s3t":
        raise ConfigError(f"`--method {options.script.method}` is no method of this recipe. Leave it out.")
    return options


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


def audit(options: Options, train: Dataset, held_out: Dataset | None) -> Any:
    """The audit, of a trainer made anew."""
    return make_trainer(options, train, held_out).verify(None if options.script.verify == "all" else "sample")


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
    return split_off(rows, units, script.eval_share, "preferences held out")


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """
    Run the recipe.

    Returns:
        `dict[str, Any]`: The numbers that were printed.
    """
    quiet()
    options = read(argv)
    train, held_out = rows_of(options)
    ids, groups = named(options.script, train, options.s3t, options.training.output_dir)
    trainer = make_trainer(options, train, held_out)
    trainer.train()
    found: dict[str, Any] = {"trained": {} if held_out is None else trainer.evaluate()}
    if is_asked_for(options.script):
        report = trainer.s3t_model.unlearn(ids, groups=groups)
        found["deleted"], found["stages_removed"] = report.deleted, len(report.stages_removed)
        if held_out is not None and not trainer.s3t_model.is_exhausted:
            found["after"] = trainer.evaluate()
    if options.script.verify:
        audited = in_new_process(audit, options, train, held_out)
        found["audit"] = audited.ok
        console.print(str(audited))
    for name, value in found.items():
        console.print(f"{name}: {shown(value)}")
    return found


def shown(value: Any) -> Any:
    """What of an evaluation is about preferences."""
    if not isinstance(value, dict):
        return value
    return {name: round(number, 4) for name, number in value.items() if any(part in name for part in _SHOWN)}


if __name__ == "__main__":
    start_cpu_processes()
    command_line.run(main)
