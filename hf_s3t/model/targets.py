"""What a PEFT config names, against what stages can adapt: nothing is left out in silence, or refused late."""

import contextlib
import copy
import difflib
import re
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.functional import inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import ConfigError, LayersNotFoundError, S3TError
from .layers import LayerGroups
from .plain_adapter import bare_copy
from .randomness import preserved_randomness
from .stage_configs import is_all_linear, pattern_means, stage_configs


logger = logging.get_logger(__name__)

# What was looked at before, and found good.
_KNOWN: set[int] = set()
_SHOWN = 4


def check_targets(model: PreTrainedModel, config: LoraConfig, layers: LayerGroups, head: Sequence[str]) -> None:
    """
    Refuse settings under which PEFT would adapt what stages do not, and those that PEFT itself would refuse.

    PEFT is asked: it adapts a copy of the model's modules, on which nothing is allocated.

    Args:
        model ([`~transformers.PreTrainedModel`]): The bare base model.
        config ([`~peft.LoraConfig`]): The user's settings.
        layers ([`~hf_s3t.model.layers.LayerGroups`]): Which layers the stages adapt.
        head (sequence of `str`): Names of the modules trained as the head.

    Raises:
        [`~hf_s3t.errors.LayersNotFoundError`]: Naming the modules, and the names that match nothing.
        [`~hf_s3t.errors.ConfigError`]: With what PEFT says of the settings.
    """
    modules = tuple((name, type(module)) for name, module in model.named_modules())
    kind = hash((modules, repr(sorted(vars(config).items(), key=str)), layers, tuple(head)))
    if kind in _KNOWN:
        return
    names = [name for name, _ in modules if name]
    # Experts refuse dropout, and are none of ours anyway.
    adapted = _adapted_modules(model, config, lora_dropout=0.0)
    _refuse_unmatched(config, names, adapted)
    _refuse_parameters(layers, adapted)
    _refuse_outside(config, layers, head, adapted)
    targets, configs = stage_configs(model, config, layers, head)
    for group, (expected, own) in enumerate(zip(targets, configs, strict=True)):
        other = set(expected) ^ _adapted_modules(model, own).keys()
        if other:
            raise LayersNotFoundError(
                f"PEFT adapts other modules than the config of stage {group} names: {_shown(other)}. Name "
                "`target_modules` so that they match inside the transformer layers only."
            )
    _KNOWN.add(kind)


def _adapted_modules(model: nn.Module, config: LoraConfig, **changes: Any) -> dict[str, LoraLayer]:
    """The modules that PEFT adapts by a config, by their names; none if it finds none."""
    config = copy.deepcopy(config)
    for name, value in changes.items():
        setattr(config, name, value)
    twin = bare_copy(model)
    try:
        with _flags_kept(model), warnings.catch_warnings():
            # What PEFT warns of is refused here, or said again when it adapts the model itself.
            warnings.simplefilter("ignore")
            inject_adapter_in_model(config, twin, low_cpu_mem_usage=True)
    except NoMatchingPeftModuleError:
        return {}
    except Exception as error:
        said = str(error).strip().rstrip(".")
        raise ConfigError(
            f"PEFT refuses `peft_config` on {type(model).__name__}: {type(error).__name__}: {said}. Change what it "
            "names; a module is left out by `exclude_modules`."
        ) from error
    return {name: module for name, module in twin.named_modules() if isinstance(module, LoraLayer)}


@contextlib.contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Puts back what PEFT does to parameters, which a copy of the modules shares."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        with preserved_randomness():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _refuse_parameters(layers: LayerGroups, adapted: Mapping[str, LoraLayer]) -> None:
    """Experts that are fused into one parameter: `gate_proj`, `w1` and the like name parts of it."""
    fused = [
        f"{name.replace('.base_layer', '')}.{module.parameter_name}"
        for name, module in adapted.items()
        if isinstance(module, ParamWrapper)
    ]
    if fused:
        inside = [name for name in adapted if name.startswith(f"{layers.path}.")]
        others = {name.rpartition(".")[2] for name in inside if not isinstance(adapted[name], ParamWrapper)}
        remedy = f"Give `target_modules={sorted(others)}`" if others else "Target linear layers, of attention say"
        raise LayersNotFoundError(
            f"PEFT would adapt {_shown(fused)}: by `target_modules` it means experts that are bare parameters, whose "
            f"adapters cannot be routed per ensemble member. {remedy}."
        )


def _refuse_outside(config: LoraConfig, layers: LayerGroups, head: Sequence[str], adapted: Iterable[str]) -> None:
    """Modules outside the layers are no stage's. Of what "all-linear" means, leaving them out is said."""
    outside = sorted(name for name in adapted if not name.startswith(f"{layers.path}."))
    heads = [name for name in outside if any(name == own or name.startswith(f"{own}.") for own in head)]
    others = [name for name in outside if name not in heads]
    inside = [name for name in adapted if name.startswith(f"{layers.path}.")]
    wanted = _exclusion(others, layers, inside)
    if is_all_linear(config.target_modules):
        if others:
            logger.warning_once(
                f'`target_modules="all-linear"` would adapt {_shown(others)} in plain PEFT. Stages adapt the layers '
                f"{layers.path} alone, and leave these as they are. To say that you know: `exclude_modules={wanted}`."
            )
        return
    if others:
        raise LayersNotFoundError(
            f"`target_modules` matches {_shown(others)} outside the transformer layers {layers.path}: "
            "PEFT would adapt them, and a stage adapts its own layers alone, since what lies outside is shared by all "
            f"stages. Leave them out of `target_modules`, or by `exclude_modules={wanted}`."
        )
    if heads:
        raise LayersNotFoundError(
            f"`target_modules` matches {_shown(heads)} of the head, which every stage trains in full, without an "
            f"adapter. Leave it out of `target_modules`, or by `exclude_modules={_exclusion(heads, layers, inside)}`."
        )


def _exclusion(names: Sequence[str], layers: LayerGroups, inside: Sequence[str]) -> str:
    """What leaves out modules outside the layers and no other: their names, or if these are many an expression."""
    is_exact = not any(_is_named_by(other, name) for other in inside for name in names)
    return repr(list(names)) if is_exact and len(names) <= _SHOWN else f'r"(?!{re.escape(layers.path)}\\.).*"'


def _refuse_unmatched(config: LoraConfig, names: Sequence[str], adapted: Mapping[str, LoraLayer]) -> None:
    """Names that mean nothing on this model, though others do."""
    # Experts that are fused into one parameter have no modules of those names any more.
    is_fused = any(isinstance(module, ParamWrapper) for module in adapted.values())
    for field in ("target_modules", "exclude_modules"):
        given = getattr(config, field)
        if not given or isinstance(given, str) or (field == "target_modules" and (is_fused or not adapted)):
            continue
        wrong = sorted(target for target in given if not any(_is_named_by(name, target) for name in names))
        if wrong:
            raise LayersNotFoundError(
                f"`{field}` names {', '.join(map(repr, wrong))}, and no module of the model ends so"
                f"{_nearest_names(wrong, names)}. Expected names that all match something: correct or remove them."
            )
    for field in ("rank_pattern", "alpha_pattern"):
        wrong = sorted(
            key
            for key in getattr(config, field) or {}
            if adapted and not any(pattern_means(key, name) for name in adapted)
        )
        if wrong:
            raise LayersNotFoundError(
                f"`{field}` names {', '.join(map(repr, wrong))}, and no adapted module ends so: it would be passed "
                "over. Expected names that all match something: correct or remove them."
            )


def refuse_failing_adapter(error: BaseException, model: nn.Module) -> None:
    """
    Say of an error in a step which adapted module it came from: PEFT adapts by a module's type, and some are not used
    as what they are.

    Args:
        error (`BaseException`): What a step of training raised.
        model (`nn.Module`): The model with adapters.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it came from inside of an adapter, and not for want of memory.
    """
    if isinstance(error, (S3TError, torch.OutOfMemoryError)):
        return
    inside = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
    failing = {id(part) for part in inside if isinstance(part, LoraLayer)}
    name = next((name for name, module in model.named_modules() if id(module) in failing), None)
    if name is not None:
        raise ConfigError(
            f"The adapter on `{name}` failed in the first step: {type(error).__name__}: {error}. Where PEFT cannot "
            f"adapt that module, leave it out, by `exclude_modules` or by naming others in `target_modules`, in a new "
            "folder."
        ) from error


def _nearest_names(wrong: Sequence[str], names: Sequence[str]) -> str:
    ends = {name.rpartition(".")[2] for name in names}
    near = sorted({match for name in wrong for match in difflib.get_close_matches(name, ends, n=1, cutoff=0.8)})
    return f" (nearest: {', '.join(near)})" if near else ""


def _is_named_by(name: str, target: str) -> bool:
    """Whether a name in a list means a module, as PEFT has it."""
    return name == target or name.endswith(f".{target}")


def _shown(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
