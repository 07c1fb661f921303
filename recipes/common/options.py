"""The options of a recipe: every field of its dataclasses on the command line and in a YAML file."""

import argparse
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml
from common.tasks import IMAGE_TASKS, TEXT_TASKS
from common.workers import check_workers
from peft import LoraConfig
from transformers import HfArgumentParser, TrainingArguments

from hf_s3t import S3TConfig
from hf_s3t.baselines import METHODS
from hf_s3t.errors import ConfigError


# Field of the LoRA config -> its option, where the bare name would say too little.
_LORA_NAMES = {"r": "lora_r", "bias": "bias"}
_COUNTS = (
    "max_train_samples", "max_eval_samples", "eval_size", "eval_limit", "num_people", "base_hidden_size",
    "base_vocab_size", "base_steps",
)  # fmt: skip
AUDITS = ("sample", "all")
CONFIGS = Path(__file__).resolve().parents[1] / "configs"
# What a value in YAML can be, and how that is called.
_KINDS = {
    bool: "true or false", int: "a whole number", float: "a number", str: "a text", list: "a list",
    dict: "a mapping", NoneType: "null",
}  # fmt: skip


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


def make_parser(script: type, training: type[TrainingArguments]) -> HfArgumentParser:
    """A parser with an option for every field of the recipe's arguments, `S3TConfig`, `LoraConfig` and `training`."""
    parser = HfArgumentParser([script, training], allow_abbrev=False, formatter_class=argparse.HelpFormatter)
    parser.add_argument("--config", help="YAML file with options, which the command line overrides.")
    kinds = _config_kinds()
    seed = next(f.metadata["help"] for f in dataclasses.fields(S3TConfig) if f.name == "seed")
    for title, names in (("S3TConfig", s3t_options()), ("LoraConfig", lora_options())):
        group = parser.add_argument_group(title, f"Of --seed: {seed}" if title == "S3TConfig" else None)
        for option, (_, help_text) in names.items():
            group.add_argument(f"--{option}", type=_reader(kinds[option]), default=argparse.SUPPRESS, help=help_text)
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


def _reader(kinds: set[type]) -> Callable[[str], Any]:
    """Reads an option's value as YAML; where a text is expected, `1234` is one too."""

    def read(text: str) -> Any:
        value = _from_yaml(text)
        if isinstance(value, str) and float in kinds:
            # YAML takes `1e-4` for a text.
            with suppress(ValueError):
                return float(value)
        return text if str in kinds and not _is_one_of(value, kinds) else value

    return read


def read_options(parser: HfArgumentParser, argv: Sequence[str] | None = None) -> Options:
    """
    Everything a recipe was told, by its defaults, its YAML file and the command line, the later over the earlier.

    A task of the benchmarks without a model and a file is the paper's: its file in `configs/` names both.

    A method other than S3T gets a folder of its own beside the one that a default or a file names, so that one
    configuration serves all methods.

    Args:
        parser (`HfArgumentParser`): The recipe's parser, from [`make_parser`], with the recipe's defaults set.
        argv (sequence of `str`, *optional*): The command line; this process's if not given.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an option is unknown, on the command line or in the YAML file, or a value
            there is of a wrong type, or the method or another value is unknown.
    """
    defaults = {"report_to": "none"}
    if not torch.cuda.is_available():
        defaults.update(use_cpu=True, bf16=False)
    parser.set_defaults(**defaults)
    first = known_options(parser, argv)
    if first.config is None and first.model_name_or_path is None:
        first.config = own_config(getattr(first, "task_name", None))
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
    for option, kinds in _config_kinds().items():
        if option in chosen and not _is_one_of(chosen[option], kinds):
            raise ConfigError(f"`--{option}` is {chosen[option]!r}, expected {_called(kinds)}. Give such a value.")
    lora = {name: chosen[option] for option, (name, _) in lora_options().items() if option in chosen}
    s3t = {name: chosen[option] for option, (name, _) in s3t_options().items() if option in chosen}
    return Options(script, S3TConfig(seed=training.seed, **s3t), LoraConfig(**lora), training)


def own_config(task: str | None) -> str | None:
    """
    The file with the paper's settings for a task, if there is one.

    Args:
        task (`str`, *optional*): What `--task_name` says.
    """
    known = TEXT_TASKS.get(task) or IMAGE_TASKS.get(task)
    # What has no data on the Hub is a stand-in's, whose model is made first.
    return str(CONFIGS / f"{task}.yaml") if known and known.dataset else None


def known_options(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None, others: Iterable[str] = ()
) -> argparse.Namespace:
    """
    What a command line says, each word of it known to the parser.

    Args:
        parser (`ArgumentParser`): A recipe's.
        argv (sequence of `str`, *optional*): The command line; this process's if not given.
        others (iterable of `str`): Options that the command has beside the recipe's: where one of them is near, it was
            meant.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the option that is nearest to an unknown one.
    """
    found, unknown = parser.parse_known_args(argv)
    if unknown:
        name = next((word for word in unknown if word.startswith("-")), None)
        if name is None:
            raise ConfigError(f"`{unknown[0]}` is the value of no option. See --help for all options.")
        name = name.partition("=")[0]
        own = difflib.get_close_matches(name.lstrip("-"), [*others], n=1, cutoff=0.8)
        raise ConfigError(f"`{name}` is no option.{_meant(name.lstrip('-'), own or _names(parser), '--')}")
    return found


def _names(parser: argparse.ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions}


def _meant(name: str, known: Iterable[str], dashes: str = "") -> str:
    near = difflib.get_close_matches(name, [*known], n=1)
    return f" Did you mean `{dashes}{near[0]}`?" if near else " See --help for all options."


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
    if getattr(script, "num_general", 0) < 0:
        raise ConfigError(f"`--num_general {script.num_general}` is less than none. Give 0 or more.")
    if script.verify not in (None, *AUDITS):
        raise ConfigError(
            f"`--verify {script.verify}` is unknown. Give `sample` to audit one surviving stage, or `all`."
        )
    check_workers(script)
    labels = getattr(script, "label_set", None) or ()
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ConfigError(f"`--label_set` names {', '.join(twice)} more than once. Name each label once, in order.")


def read_config(path: str, parser: HfArgumentParser) -> dict[str, Any]:
    """The options in a YAML file, each a known one with a value of its type."""
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
    known = _names(parser) - {"help", "config"}
    for name in values:
        if name not in known:
            raise ConfigError(f"{path} sets `{name}`, which is no option.{_meant(str(name), known)}")
    # An option that can be switched off has two actions; the first one is its own.
    actions = {action.dest: action for action in reversed(parser._actions)}
    kinds = {name: _kinds(hint) for own in parser.dataclass_types for name, hint in get_type_hints(own).items()}
    kinds |= _config_kinds()
    return {name: _checked(value, actions[name], kinds[name], path) for name, value in values.items()}


def _checked(value: Any, action: argparse.Action, kinds: set[type], path: str) -> Any:
    """A value in a YAML file as an option takes it; refused if it is of another type."""
    if value is None and action.default is None:
        return value
    if action.nargs in ("+", "*") and action.type in (None, str):
        # As on the command line, where one value is a list of one, and a number is what was typed.
        values = value if isinstance(value, list) else [value]
        if all(isinstance(one, (str, int, float)) for one in values):
            return [str(one) for one in values]
        expected, fits = "a list of texts", False
    elif action.choices is not None:
        expected, fits = f"one of {', '.join(map(str, action.choices))}", value in [*action.choices]
    else:
        expected, fits = _called(kinds), _is_one_of(value, kinds) or _reads_as_one_of(value, action, kinds)
    if fits:
        return value
    # `no` and `2024-01-01` are no texts in YAML.
    remedy = "Write it in quotes." if str in kinds and not isinstance(value, (str, list, dict)) else "Mend this line."
    raise ConfigError(f"{path} sets `{action.dest}` to {value!r}, expected {expected}. {remedy}")


def _reads_as_one_of(value: Any, action: argparse.Action, kinds: set[type]) -> bool:
    """Whether a text is what one would type on the command line, such as `1e-4`."""
    if not isinstance(value, str) or action.type is None:
        return False
    try:
        return _is_one_of(action.type(value), kinds)
    except (argparse.ArgumentTypeError, ValueError, TypeError):
        return False


def _config_kinds() -> dict[str, set[type]]:
    """The types of the options that are fields of `S3TConfig` and `LoraConfig`."""
    found = {}
    for config, options in ((S3TConfig, s3t_options()), (LoraConfig, lora_options())):
        hints = get_type_hints(config)
        found.update({option: _kinds(hints[name]) for option, (name, _) in options.items()})
    return found


def _kinds(hint: Any) -> set[type]:
    """The types in YAML that a type hint stands for."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return set().union(*map(_kinds, get_args(hint)))
    if origin is Literal:
        return {type(value) for value in get_args(hint)}
    kind = origin or hint
    if kind in _KINDS:
        return {kind}
    # Anything else is a config of its own.
    return {str} if issubclass(kind, Enum) else {dict}


def _is_one_of(value: Any, kinds: set[type]) -> bool:
    return type(value) in kinds or (type(value) is int and float in kinds)


def _called(kinds: set[type]) -> str:
    return " or ".join(name for kind, name in _KINDS.items() if kind in kinds - {NoneType})
