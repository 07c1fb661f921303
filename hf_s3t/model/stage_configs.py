"""The PEFT config of each stage: the user's settings, narrowed to the modules of its layers."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import LayersNotFoundError
from .layers import LayerGroups


# The fields of a config that give single modules a rank or a scale of their own.
PATTERNS = ("rank_pattern", "alpha_pattern")


def stage_configs(
    base: PreTrainedModel, config: LoraConfig, layers: LayerGroups, head: Sequence[str]
) -> tuple[list[list[str]], list[LoraConfig]]:
    """
    By group, the full names of the modules that a stage adapts, and the config by which PEFT adapts these.

    Args:
        base ([`~transformers.PreTrainedModel`]): The bare base model.
        config ([`~peft.LoraConfig`]): The user's settings.
        layers ([`~hf_s3t.model.layers.LayerGroups`]): Which layers each stage adapts.
        head (sequence of `str`): Names of the modules trained as the head.

    Raises:
        [`~hf_s3t.errors.LayersNotFoundError`]: If the config targets nothing in some group.
    """
    names = [name for name, _ in base.named_modules()]
    groups = range(len(layers.groups))
    targets = [_find_targets(base, config, layers, group) for group in groups]
    return targets, [_stage_config(config, layers, g, targets[g], tuple(head), base, names) for g in groups]


def is_all_linear(target_modules: Any) -> bool:
    """Whether target modules are PEFT's shorthand for all linear layers."""
    return isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def _find_targets(base: PreTrainedModel, config: LoraConfig, layers: LayerGroups, group: int) -> list[str]:
    """Full names of the modules that the user's config targets in a group, found on the bare model."""
    names = [
        f"{layer}.{n}" for layer in layers.module_names(group) for n, _ in base.get_submodule(layer).named_modules()
    ]
    if is_all_linear(config.target_modules):
        linear = (nn.Linear, Conv1D)
        matched = [n for n in names if isinstance(base.get_submodule(n.rstrip(".")), linear)]
        # PEFT leaves out what is excluded also of these.
        named = copy.deepcopy(config)
        _set_targets(named, set(matched))
        matched = [n for n in matched if _is_match(named, n)]
    else:
        matched = [n for n in names if check_target_module_exists(config, n) is True or _is_match(config, n)]
    if not matched:
        raise LayersNotFoundError(
            f"`target_modules={config.target_modules!r}` matches nothing in layers {layers.groups[group]} of "
            f"{type(base).__name__}, the group of stage {group}. Modules there: {_leaf_names(base, layers, group)}."
        )
    _refuse_unroutable(base, matched)
    return matched


def _is_match(config: LoraConfig, name: str) -> bool:
    found = check_target_module_exists(config, name)
    return bool(found) and not type(found).__name__.startswith("_Excluded")


def _refuse_unroutable(base: PreTrainedModel, names: Iterable[str]) -> None:
    for name in names:
        module = base.get_submodule(name)
        if isinstance(module, (nn.MultiheadAttention, nn.Embedding)):
            raise LayersNotFoundError(
                f"{name} is a {type(module).__name__}, whose adapters cannot be routed per ensemble member. Target "
                "linear layers."
            )


def _leaf_names(base: PreTrainedModel, layers: LayerGroups, group: int) -> str:
    layer = base.get_submodule(layers.module_names(group)[0])
    return ", ".join(n for n, m in layer.named_modules() if isinstance(m, (nn.Linear, Conv1D))) or "no linear layers"


def _stage_config(
    config: LoraConfig,
    layers: LayerGroups,
    group: int,
    targets: list[str],
    head: tuple[str, ...],
    base: PreTrainedModel,
    names: Sequence[str],
) -> LoraConfig:
    """The user's config narrowed to one group; by layer indices where these name its targets and nothing else."""
    config = copy.deepcopy(config)
    first = f"{layers.module_names(group)[0]}."
    config.exclude_modules = None
    config.modules_to_save = list(head) or None
    config.task_type = None
    # PEFT corrects this flag with a warning; the right value is known.
    config.fan_in_fan_out = all(isinstance(base.get_submodule(t), Conv1D) for t in targets)
    _with_patterns(config, {field: getattr(config, field) or {} for field in PATTERNS}, targets)
    by_index = copy.deepcopy(config)
    _set_targets(by_index, {t.removeprefix(first) for t in targets if t.startswith(first)})
    by_index.layers_to_transform = list(layers.groups[group])
    by_index.layers_pattern = [layers.pattern]
    return (
        by_index
        if names_matched(by_index, names) == set(targets)
        else _matching(_without_indices(config), targets, names)
    )


def config_of_stack(
    config: LoraConfig, patterns: Mapping[str, Mapping[str, int]], targets: set[str], names: Sequence[str]
) -> LoraConfig:
    """
    The config by which PEFT adapts the modules of a whole stack.

    Args:
        config ([`~peft.LoraConfig`]): That of one of its stages.
        patterns (mapping from `str` to mapping): The user's `rank_pattern` and `alpha_pattern`, of all stages.
        targets (`set[str]`): Full names of the modules that the stack adapts.
        names (sequence of `str`): Full names of all modules of the bare base.
    """
    return _matching(_with_patterns(_without_indices(config), patterns, targets), targets, names)


def _with_patterns(
    config: LoraConfig, patterns: Mapping[str, Mapping[str, int]], targets: Iterable[str]
) -> LoraConfig:
    """The config with those of the user's keys that mean a target; PEFT would say of others that none does."""
    for field, values in patterns.items():
        setattr(
            config, field, {k: v for k, v in values.items() if any(pattern_means(k, target) for target in targets)}
        )
    return config


def pattern_means(key: str, name: str) -> bool:
    """Whether a key of a pattern of ranks or alphas means a module, as PEFT has it."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _without_indices(config: LoraConfig) -> LoraConfig:
    """A copy of the config that knows of no layer indices."""
    config = copy.deepcopy(config)
    config.layers_to_transform = config.layers_pattern = None
    return config


def _matching(config: LoraConfig, targets: Iterable[str], names: Sequence[str]) -> LoraConfig:
    """The config with target modules that match these names and nothing else."""
    targets = set(targets)
    _set_targets(config, targets)
    if names_matched(config, names) != targets:
        # A name in a list is that of every module whose name ends with it; an expression has to match all of one.
        config.target_modules = "|".join(map(re.escape, sorted(targets)))
    return config


def names_matched(config: LoraConfig, names: Iterable[str]) -> set[str]:
    """Those of some names of modules that a config matches."""
    return {name for name in names if _is_match(config, name)}


def _set_targets(config: LoraConfig, names: set[str]) -> None:
    # PEFT makes a set of the list that its types ask for; one that is made already it does not make again.
    config.target_modules = names  # type: ignore[assignment]
