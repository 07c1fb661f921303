"""The options of a recipe: every field of its dataclasses on the command line and in a YAML file."""

import argparse
import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments
from trl import SFTConfig

from hf_s3t import S3TConfig
from hf_s3t.baselines import METHODS
from hf_s3t.errors import ConfigError


# Field of the LoRA config -> its option, where the bare name would say too little.
_LORA_NAMES = {"r": "lora_r", "bias": "bias"}
_COUNTS = ("max_train_samples", "max_eval_samples", "eval_size", "eval_limit")
AUDITS = ("sample", "all")


@dataclass
class ScriptArguments:
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


@dataclass
class Options:
    """Everything a recipe was told."""

    script: Any
    s3t: S3TConfig
    lora: LoraConfig
    training: TrainingArguments

    @property
    def is_demo(self) -> bool:
        """Whether neither a model nor a dataset was given."""
        return self.script.model_name_or_path is None and self.script.dataset_name is None


def make_parser(script: type = ScriptArguments, training: type[TrainingArguments] = SFTConfig) -> HfArgumentParser:
    """A parser with an option for every field of the recipe's arguments, `S3TConfig`, `LoraConfig` and `training`."""
    parser = HfArgumentParser([script, training], allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    parser.add_argument("--config", help="YAML file with options, which the command line overrides.")
    for title, names in (("S3TConfig", s3t_options()), ("LoraConfig", lora_options())):
        group = parser.add_argument_group(title)
        for option, (_, help_text) in names.items():
            group.add_argument(f"--{option}", type=_from_yaml, default=argparse.SUPPRESS, help=help_text)
    return parser


def s3t_options() -> dict[str, tuple[str, str]]:
    """Option -> (field of S3TConfig, help). `seed` is SFTConfig's option, which sets the system's one seed."""
    return {f.name: (f.name, f.metadata["help"]) for f in dataclasses.fields(S3TConfig) if f.name != "seed"}


def lora_options() -> dict[str, tuple[str, str]]:
    """Option -> (field of LoraConfig, help)."""
    fields = (f for f in dataclasses.fields(LoraConfig) if f.init)
    return {
        _LORA_NAMES.get(f.name, f.name): (f.name, str(f.metadata.get("help", "")).split(". ")[0].replace("%", "%%"))
        for f in fields
    }


def _from_yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no YAML value: {error}") from error


def parse(argv: Sequence[str] | None = None, demo_defaults: dict[str, Any] | None = None) -> Options:
    """
    The options of `llama_alpaca.py`, from a command line and its YAML file.

    Args:
        argv (sequence of `str`, *optional*): The command line; this process's if not given.
        demo_defaults (`dict`, *optional*): Defaults that hold when neither a model nor a dataset is given.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the YAML file has an unknown key, or only one of model and dataset is given.
    """
    parser = make_parser()
    parser.set_defaults(output_dir="llama-alpaca-s3t")
    first, _ = parser.parse_known_args(argv)
    from_file = read_config(first.config, parser) if first.config else {}
    given = {name: from_file.get(name) or getattr(first, name) for name in ("model_name_or_path", "dataset_name")}
    if not any(given.values()):
        parser.set_defaults(**(demo_defaults or {}))
    elif not all(given.values()):
        missing = next(name for name, value in given.items() if not value)
        raise ConfigError(f"`--{missing}` is missing. Give model and dataset, or neither for the demo.")
    return read_options(parser, argv)


def read_options(parser: HfArgumentParser, argv: Sequence[str] | None = None) -> Options:
    """
    Everything a recipe was told, by its defaults, its YAML file and the command line, the later over the earlier.

    A method other than S3T gets a folder of its own beside the one that a default or a file names, so that one
    configuration serves all methods.

    Args:
        parser (`HfArgumentParser`): The recipe's parser, from [`make_parser`], with the recipe's defaults set.
        argv (sequence of `str`, *optional*): The command line; this process's if not given.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the YAML file has an unknown key, or the method or another value is unknown.
    """
    defaults = {"report_to": "none"}
    if not torch.cuda.is_available():
        defaults.update(use_cpu=True, bf16=False)
    parser.set_defaults(**defaults)
    first, _ = parser.parse_known_args(argv)
    if first.config:
        parser.set_defaults(**read_config(first.config, parser))
    shared_folder = parser.get_default("output_dir")
    script, training, others = parser.parse_args_into_dataclasses(argv, return_remaining_strings=False)
    check_values(script)
    if script.method not in METHODS:
        raise ConfigError(f"`--method {script.method}` is unknown. Choose one of {', '.join(METHODS)}.")
    if script.method != "s3t" and training.output_dir == shared_folder:
        training.output_dir = f"{shared_folder}-{script.method}"
    chosen = vars(others)
    lora = {name: chosen[option] for option, (name, _) in lora_options().items() if option in chosen}
    s3t = {name: chosen[option] for option, (name, _) in s3t_options().items() if option in chosen}
    return Options(script, S3TConfig(seed=training.seed, **s3t), LoraConfig(**lora), training)


def check_values(script: Any) -> None:
    """
    Refuse values that no recipe takes.

    Args:
        script: A recipe's arguments.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a count is below 1, the audit is unknown, or a label is named twice.
    """
    for name in _COUNTS:
        count = getattr(script, name, None)
        if count is not None and count < 1:
            raise ConfigError(f"`--{name} {count}` would leave none. Give 1 or more, or leave it out.")
    if script.verify not in (None, *AUDITS):
        raise ConfigError(
            f"`--verify {script.verify}` is unknown. Give `sample` to audit one surviving stage, or `all`."
        )
    labels = getattr(script, "label_set", None) or ()
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"`--label_set` names {', '.join(twice)} more than once. Name each label once, in order.")


def read_config(path: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The options in a YAML file, each a known one."""
    if not Path(path).is_file():
        raise ConfigError(
            f"`--config {path}` is no file. The configurations that come with the recipes are in configs/."
        )
    with open(path) as file:
        try:
            values = yaml.safe_load(file) or {}
        except yaml.YAMLError as error:
            raise ConfigError(f"{path} is no YAML: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} holds a {type(values).__name__}, expected options as `name: value` lines.")
    known = {action.dest for action in parser._actions}
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f" Did you mean `{near[0]}`?" if near else " See --help for all options."
            raise ConfigError(f"{path} sets `{name}`, which is no option.{hint}")
    lists = {action.dest for action in parser._actions if action.nargs in ("+", "*") and action.type in (None, str)}
    # As on the command line, where one value is a list of one, and a number is what was typed.
    return {name: _texts(value) if name in lists and value is not None else value for name, value in values.items()}


def _texts(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value])]
