"""What a trainer knows about its system before anything is changed or written, and the checks that come before."""

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftConfig, TaskType
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments

from ..config import OF_SERVING, S3TConfig
from ..errors import ConfigError
from ..folder.opening import check_method, open_folder
from ..folder.secret import draw_key
from ..folder.system import SystemFolder
from ..model.aggregation import check_one_answer_can_be_made
from ..model.base_recognition import check_base_is
from ..model.base_record import config_of, describe_base, generation_of
from ..model.checkpoint import check_checkpoint
from ..model.head import find_head
from ..model.layers import LayerGroups, find_layers, group_layers
from ..model.refusals import (
    check_base,
    check_has_logits,
    check_has_no_adapters,
    check_is_itself,
    check_peft_config,
    check_task,
)
from ..model.stateless import check_keeps_no_state
from ..model.targets import check_targets
from ..model.task import find_task
from ..plan.stages import Plan
from ..records.digests import DigestKey, KeptNames
from ..records.examples import ExampleTable
from .circumstances import circumstances
from .early_checks import check_columns, check_optimizer
from .elsewhere import settle
from .fed_rows import FedRows
from .inputs import refuse_leftovers, say_what_the_default_costs, say_which_seed_rules
from .refusals import check_arguments, check_datasets, evaluation_chooses
from .rows import TrainingRows


# What a PEFT config says of the model around an adapter, and of files it was read from.
_NOT_OF_AN_ADAPTER = {
    "runtime_config", "task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping",
    "peft_version",
}  # fmt: skip
# What PEFT's models of classification add to `modules_to_save`.
_HEADS_OF_PEFT = ("classifier", "score")
# What decides which stages are planned.
_PLANNED = ("budget", "work_budget", "keep_idle", "sequence_selection")


@dataclass(frozen=True)
class Layout:
    """
    How the stages of a system lie on the model's layers and on the data: S3T's way. The baselines have their own.

    Args:
        method (`str`, defaults to `"s3t"`): Name of the method.
    """

    method: str = "s3t"

    def settings(self, user_config: S3TConfig) -> S3TConfig:
        """The settings of the system, from those that the user gave."""
        return user_config

    def groups(self, num_layers: int, config: S3TConfig) -> tuple[tuple[int, ...], ...]:
        """Layer indices of each stage."""
        return group_layers(num_layers, config.num_slices, config.layers_per_slice, config.growth)

    def rows(self, dataset: Any, user_config: S3TConfig) -> TrainingRows:
        """The dataset, which the user's settings partition."""
        return TrainingRows(dataset, self.settings(user_config))


@dataclass(frozen=True)
class NewSystem:
    """
    What a system that is to be made has before anything of it is written.

    Args:
        key ([`~hf_s3t.records.digests.DigestKey`]): Its secret.
        table ([`~hf_s3t.records.examples.ExampleTable`]): Its examples.
        plan ([`~hf_s3t.plan.stages.Plan`]): The stages that it shall have.
    """

    key: DigestKey
    table: ExampleTable
    plan: Plan


@dataclass(frozen=True)
class Blueprint:
    """
    What a trainer knows about its system before anything is written.

    Args:
        user_config ([`S3TConfig`]): The settings as the user gave them, now or when the system was made.
        layout ([`Layout`]): How stages lie on layers and data.
        config ([`S3TConfig`]): The settings of the system, which the layout makes of those.
        peft_config ([`~peft.LoraConfig`]): The adapters, with target modules.
        layers ([`~hf_s3t.model.layers.LayerGroups`]): Which layers each stage adapts.
        head (`tuple[str, ...]`): Names of the modules trained as the head.
        base (`dict`): What is recorded of the base model.
        rows ([`~hf_s3t.training.rows.TrainingRows`], *optional*): The training data, if there is any.
        new ([`NewSystem`], *optional*): What a system that is to be made begins with; `None` where it is there.
        folder ([`~hf_s3t.folder.system.SystemFolder`], *optional*): The folder of one that is there.
        task (`str`): The task of the base model.
    """

    user_config: S3TConfig
    layout: Layout
    config: S3TConfig
    peft_config: LoraConfig
    layers: LayerGroups
    head: tuple[str, ...]
    base: dict[str, Any]
    rows: TrainingRows | None
    new: NewSystem | None
    folder: SystemFolder | None
    task: str

    def record(self, model: PreTrainedModel, key: DigestKey) -> dict[str, Any]:
        """What `s3t_config.json` says of a system that is made with a secret."""
        baseline = {"method": self.layout.method, "s3t_config": self.user_config.to_dict()}
        return {
            **({} if self.layout.method == "s3t" else {"baseline": baseline}),
            "s3t_config": self.config.to_dict(),
            **({} if self.new is None else {"plan": self.new.plan.to_record()}),
            "base_model": {**self.base, "config": config_of(model), **generation_of(model)},
            "task": self.task,
            "aggregation": self.config.aggregation or _default_aggregation(self.task),
            "peft_config": _plain_peft_config(self.peft_config),
            "layers": {
                "path": self.layers.path,
                "num_layers": self.layers.num_layers,
                "groups": [list(group) for group in self.layers.groups],
            },
            "head": list(self.head),
            "keyed_places": self.config.partition == "balanced" and key.for_places is not None,
            "versions": circumstances(model)["versions"],
        }


@dataclass(frozen=True)
class TrainerInputs:
    """
    What a trainer was given of which its system is made.

    Args:
        model ([`~transformers.PreTrainedModel`]): The bare base model.
        args ([`~transformers.TrainingArguments`]): The recipe of a stage.
        train_dataset (`Dataset`, *optional*): All rows; may be missing where a system exists.
        eval_dataset (*optional*): As in `Trainer`.
        callbacks (`list`, *optional*): As in `Trainer`.
        peft_config ([`~peft.LoraConfig`], *optional*): The adapters; the recorded ones if not given.
        s3t_config ([`S3TConfig`], *optional*): The system; the recorded one if not given.
    """

    model: PreTrainedModel
    args: TrainingArguments
    train_dataset: Any
    eval_dataset: Any
    callbacks: Sequence[TrainerCallback] | None
    peft_config: PeftConfig | None
    s3t_config: S3TConfig | None


def draw_up(given: TrainerInputs, layout: Layout) -> Blueprint:
    """
    Check everything that can be checked before anything is changed or written.

    Args:
        given ([`TrainerInputs`]): What the trainer was given.
        layout ([`Layout`]): How stages lie on layers and data.

    Raises:
        [`~hf_s3t.errors.S3TError`]: The child that says what does not fit.
    """
    settle(given.args)
    model, args, output_dir = given.model, given.args, str(given.args.output_dir)
    if isinstance(model, nn.Module):
        check_is_itself(model)
    check_has_no_adapters(model)
    folder, key = _system_or_new(args)
    recorded = None if folder is None else copy.deepcopy(folder.record)
    if recorded is not None:
        check_method(recorded, (layout.method,), output_dir)
    user_config = _merged_config(given.s3t_config, recorded)
    config = layout.settings(user_config)
    peft_config = _merged_peft_config(given.peft_config, recorded, model)
    check_arguments(args, given.callbacks)
    check_datasets(given.train_dataset, given.eval_dataset, args, config)
    layers, head = _layers_and_head(model, config, peft_config, layout)
    if recorded is None:
        check_targets(model, peft_config, layers, head)
    check_keeps_no_state(model)
    check_optimizer(args, model)
    rows = None
    if given.train_dataset is not None:
        check_columns(given.train_dataset, model, args, user_config)
        rows = layout.rows(given.train_dataset, user_config)
    if recorded is not None:
        check_base_is(model, recorded["base_model"], layers.path, head, for_training=True)
        base = recorded["base_model"]
    elif rows is None:
        raise ConfigError(f"{output_dir} holds no system yet, and there is no `train_dataset` to make one with.")
    else:
        base = describe_base(model, layers.path, head)
    if rows is not None and evaluation_chooses(args, config):
        if FedRows(model).refuse_shared(given.train_dataset, given.eval_dataset, rows.own_columns):
            rows.compared_with = given.eval_dataset
    new = None
    if rows is not None and key is not None:
        # Searched, if need be: once, and before anything expensive.
        new = NewSystem(key, _planned(rows, key, config), Plan.from_config(config))
        if given.s3t_config is None:
            say_what_the_default_costs(config, new.plan, layers, new.table, args.max_steps)
    elif rows is not None and folder is not None:
        _match(rows, folder)
    say_which_seed_rules(args, config)
    return Blueprint(user_config, layout, config, peft_config, layers, head, base, rows, new, folder, find_task(model))


def _layers_and_head(
    model: PreTrainedModel, config: S3TConfig, peft_config: LoraConfig, layout: Layout
) -> tuple[LayerGroups, tuple[str, ...]]:
    """Where stages and their head lie in a model that has places for them."""
    check_base(model, config)
    check_has_logits(model)
    path, module_list = find_layers(model, peft_config.layers_pattern)
    layers = LayerGroups(path, len(module_list), layout.groups(len(module_list), config))
    head = find_head(model, path)
    check_checkpoint(model, head)
    check_task(model, config.aggregation or _default_aggregation(find_task(model)))
    check_one_answer_can_be_made(model, config.num_shards, config.select)
    check_peft_config(peft_config, head)
    return layers, head


def _planned(rows: TrainingRows, key: DigestKey, config: S3TConfig) -> ExampleTable:
    """The table of a system that is to be made: every row in its shard and slice."""
    names = KeptNames(key, config.keep_ids)
    placed = rows.partition(rows.digests(key), names)
    return ExampleTable(placed, config.num_shards, config.num_slices, config.seed)


def check_same(blueprint: Blueprint, model: PreTrainedModel, output_dir: str) -> None:
    """
    Check that the system which is in the folder by now is the one that a trainer was about to make there.

    Args:
        blueprint ([`Blueprint`]): What the trainer knows about its system.
        model ([`~transformers.PreTrainedModel`]): The base model.
        output_dir (`str`): The folder.

    Raises:
        [`~hf_s3t.errors.S3TError`]: The child that says what does not fit.
    """
    folder = open_folder(output_dir)
    recorded = folder.record
    check_method(recorded, (blueprint.layout.method,), output_dir)
    _merged_config(blueprint.user_config, recorded)
    _merged_peft_config(blueprint.peft_config, recorded, model)
    check_base_is(model, recorded["base_model"], blueprint.layers.path, blueprint.head, for_training=True)
    if blueprint.rows is not None:
        _match(blueprint.rows, folder)


def _match(rows: TrainingRows, folder: SystemFolder) -> None:
    """Refuse a dataset that does not fit the system, before the trainer spends time on preparing it."""
    digests = rows.digests(folder.key, folder.record["row_digests"])
    folder.table.check_dataset(rows.ids, digests, folder.ledger, folder.names, rows.groups)


def _system_or_new(args: TrainingArguments) -> tuple[SystemFolder | None, DigestKey | None]:
    """The folder of the system; where none is there yet, the secret that it will have."""
    output_dir = str(args.output_dir)
    folder = _system_in(output_dir)
    key = draw_key(output_dir) if folder is None else None
    if args.world_size > 1:
        # All processes must place rows alike. And what the first one found holds: it may be making the folder already.
        (key,) = broadcast_object_list([key])
        if key is None and folder is None:
            # The first process found one: this one must see it too.
            folder = open_folder(output_dir)
    return (folder if key is None else None), key


def _system_in(output_dir: str) -> SystemFolder | None:
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise ConfigError(f"`output_dir={output_dir!r}` is a file, expected a folder. Choose another `output_dir`.")
    if not SystemFolder.exists(path):
        refuse_leftovers(output_dir)
        return None
    # The folder may come from anywhere, and opening it to write removes files: `open_folder` refuses links in it.
    return open_folder(output_dir)


def _merged_config(given: S3TConfig | None, recorded: dict[str, Any] | None) -> S3TConfig:
    if given is not None and not isinstance(given, S3TConfig):
        raise ConfigError(f"`s3t_config` must be an S3TConfig, got {type(given).__name__}.")
    if recorded is None:
        return given if given is not None else S3TConfig()
    config = S3TConfig.from_dict(recorded.get("baseline", recorded).get("s3t_config"))
    differing = [] if given is None else [f.name for f in fields(config) if _differs(f.name, given, config)]
    if given is not None and differing and not _asks_for_the_same(given, config, differing):
        raise ConfigError(
            "`s3t_config` differs from the one this folder's system was made with: "
            + ", ".join(_difference(name, given, config) for name in differing)
            + ". Leave it out to go on with the system, or choose another `output_dir`; a folder in which nothing has "
            "been trained yet can be removed."
        )
    if given is not None and given.gate is not None:
        return replace(config, **{name: getattr(given, name) for name in OF_SERVING})
    return config


def _differs(name: str, given: S3TConfig, recorded: S3TConfig) -> bool:
    """Whether a setting contradicts the recorded one. What is planned is written down: left out, that is meant."""
    if name in OF_SERVING:
        return False
    value = getattr(given, name)
    return value != getattr(recorded, name) and not (name in _PLANNED and value is None)


def _difference(name: str, given: S3TConfig, recorded: S3TConfig) -> str:
    """A setting and the recorded one, as a message says them: `None` is what nobody wrote."""
    now, then = getattr(given, name), getattr(recorded, name)
    was = repr(then)
    if then is None:
        planned = {other: getattr(recorded, other) for other in _PLANNED if name in _PLANNED}
        beside = " and ".join(f"{other}={value!r}" for other, value in planned.items() if value is not None)
        was = "left out" + (f", beside {beside}" if beside else "")
    return f"{f'{name}={now!r}' if now is not None else f'`{name}` left out'} (was {was})"


def _asks_for_the_same(given: S3TConfig, recorded: S3TConfig, differing: list[str]) -> bool:
    """Whether what differs are two names of one plan: rotations asked for by budget alone, or "cyclic" beside it."""
    if not set(differing) <= set(_PLANNED):
        return False
    keep_idle = recorded.keep_idle if given.keep_idle is None else given.keep_idle
    return Plan.as_asked_for(replace(given, keep_idle=keep_idle)) == Plan.as_asked_for(recorded)


def _merged_peft_config(
    given: PeftConfig | None, recorded: dict[str, Any] | None, model: PreTrainedModel
) -> LoraConfig:
    settings = None
    if given is not None:
        check_peft_config(given, getattr(given, "modules_to_save", None) or ())
    if isinstance(given, LoraConfig):
        settings = _with_targets(_without_absent_heads(given, model), model)
    if recorded is None:
        if settings is None:
            raise ConfigError(
                "`peft_config` is missing. Give a `peft.LoraConfig`, such as LoraConfig(r=16, lora_alpha=32)."
            )
        return settings
    config = LoraConfig(**recorded["peft_config"])
    if settings is not None and _plain_peft_config(settings) != _plain_peft_config(config):
        raise ConfigError(
            "`peft_config` differs from the one this folder's system was made with "
            f"({recorded['peft_config']}). Leave it out to go on with the system, or choose another `output_dir`."
        )
    return config


def _without_absent_heads(config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """Settings without the heads that `get_peft_model` writes into them for its task and the model does not have."""
    saved = config.modules_to_save
    if config.task_type not in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS) or not saved:
        return config
    there = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    config = copy.deepcopy(config)
    config.modules_to_save = [n for n in saved if n in there or n not in _HEADS_OF_PEFT] or None
    return config


def _with_targets(config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """Settings that name target modules: where the user names none, PEFT's own choice for the architecture."""
    if config.target_modules is not None:
        return config
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in DEFAULT_TARGETS:
        raise ConfigError(
            f"`peft_config` names no `target_modules`, and PEFT has no default for {kind or type(model).__name__}. "
            'Name them, such as LoraConfig(..., target_modules="all-linear").'
        )
    config = copy.deepcopy(config)
    # Of some architectures the default is a regular expression.
    default = DEFAULT_TARGETS[kind]
    # Declared is the list of which PEFT makes a set.
    config.target_modules = default if isinstance(default, str) else set(default)  # type: ignore[assignment]
    return config


def _plain_peft_config(config: LoraConfig) -> dict[str, Any]:
    """The settings of a LoRA config that differ from its defaults, as JSON types."""
    default = LoraConfig()
    plain = {}
    for field in fields(LoraConfig):
        value = getattr(config, field.name, None)
        if field.init and value != getattr(default, field.name) and field.name not in _NOT_OF_AN_ADAPTER:
            plain[field.name] = sorted(value) if isinstance(value, set) else value
    as_json: dict[str, Any] = json.loads(json.dumps(plain))
    return as_json


def _default_aggregation(task: str) -> str:
    return "mean_probabilities" if task == "text-generation" else "mean_logits"
