"""The steps of loading a served system, before a model is made: its folder, its shape, its base."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import PreTrainedModel

from ..config import require_choice
from ..errors import ConfigError, FolderError
from ..folder.opening import open_folder
from ..folder.system import SystemFolder
from ..hub.client import is_repo_id
from ..hub.folder import HubFolder
from .base_loading import load_base, name_padding
from .base_recognition import check_base_is
from .head import find_head, seed_head
from .layers import LayerGroups, find_layers
from .quantisation import keep_4_bit_weights, log_casts_once
from .refusals import check_has_no_adapters, check_is_itself
from .stateless import check_keeps_no_state


_PRELOADS = ("best", "all")
_WHEN_EXHAUSTED = ("error", "base")


@dataclass(frozen=True)
class Shape:
    """
    What a system's stages are on its base.

    Args:
        layers ([`~hf_s3t.model.layers.LayerGroups`]): Which layers each stage adapts.
        head (`tuple[str, ...]`): Names of the modules trained as the head.
        peft_config ([`~peft.LoraConfig`]): The adapters.
    """

    layers: LayerGroups
    head: tuple[str, ...]
    peft_config: LoraConfig


def recorded_shape(folder: SystemFolder) -> Shape:
    """What the config of a folder says of layers, head and adapters."""
    record = folder.record
    try:
        layers = LayerGroups(
            str(record["layers"]["path"]),
            int(record["layers"]["num_layers"]),
            tuple(tuple(map(int, group)) for group in record["layers"]["groups"]),
        )
        _ = record["base_model"]["digest"], record["aggregation"]
        return Shape(layers, tuple(map(str, record["head"])), LoraConfig(**record["peft_config"]))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FolderError(
            f"The config of {folder.path} does not say what a system is ({type(error).__name__}: {error}). Restore it "
            "from a backup."
        ) from error


def open_system(
    path: str | os.PathLike[str], revision: str | None, token: str | None, cache_dir: str | os.PathLike[str] | None
) -> SystemFolder:
    """The folder of a system, on this machine or on the Hub."""
    if not isinstance(path, (str, os.PathLike)):
        raise ConfigError(
            f"The system is given by its folder or its repository on the Hub, got a {type(path).__name__}. Give the "
            "`output_dir` of a training run; the live model of a trainer is its `s3t_model`."
        )
    if os.path.isdir(path):
        if revision is not None:
            raise ConfigError(
                f"revision={revision!r} is for repositories on the Hub; {path} is a folder. Leave it out."
            )
        return open_folder(path)
    if not is_repo_id(path):
        raise FolderError(
            f"{path} is not a folder. Give the `output_dir` of a training run, or a repository on the Hub such as "
            "me/llama-s3t."
        )
    return HubFolder(str(path), revision, token, cache_dir)


def check_options(preload: str, when_exhausted: str, head: Sequence[str]) -> None:
    """Refuse what a model cannot be loaded with."""
    require_choice("preload", preload, _PRELOADS)
    require_choice("when_exhausted", when_exhausted, _WHEN_EXHAUSTED)
    if when_exhausted == "base" and head:
        raise ConfigError(
            'when_exhausted="base" is for language models: a classifier\'s base has no trained head. Use "error".'
        )


def find_base(
    record: dict[str, Any],
    given: PreTrainedModel | str | os.PathLike[str] | None,
    head: Sequence[str],
    *,
    dtype: str | torch.dtype | None,
    device_map: Any,
    quantization_config: Any,
    token: str | None,
    cache_dir: str | os.PathLike[str] | None,
) -> PreTrainedModel:
    """
    The base model for a system: the one that is given, or else loaded by its name, plain in any case.

    Args:
        record (`dict`): The folder's config.
        given ([`~transformers.PreTrainedModel`], `str` or `os.PathLike`, *optional*): The base, its id or its folder.
        head (sequence of `str`): Names of the modules trained as the head.
        dtype (`str` or `torch.dtype`, *optional*): As for [`~hf_s3t.model.base_loading.load_base`].
        device_map (*optional*): As in Transformers.
        quantization_config (*optional*): As for [`~hf_s3t.model.base_loading.load_base`].
        token (`str`, *optional*): Token for the Hub; the one of `hf auth login` if not given.
        cache_dir (`str` or `os.PathLike`, *optional*): The Hub's cache; the usual one if not given.

    Raises:
        [`~hf_s3t.errors.BaseModelMismatchError`]: If it cannot be loaded.
        [`~hf_s3t.errors.ConfigError`]: If something else is given, or something is wrapped around it.
        [`~hf_s3t.errors.IsolationError`]: If it carries adapters.
    """
    if isinstance(given, nn.Module):
        _check_is_plain(given)
        name_padding(given, record["base_model"])
        return given
    if given is not None and not isinstance(given, (str, os.PathLike)):
        raise ConfigError(
            f"`base_model` is {'a class' if isinstance(given, type) else f'a {type(given).__name__}'}, "
            "expected a loaded model, its id or its folder. Give one of them, or leave it out to load the "
            "recorded one."
        )
    base = load_base(
        record["base_model"],
        name=given,
        dtype=dtype,
        device_map=device_map,
        quantization_config=quantization_config,
        head=head,
        token=token,
        cache_dir=cache_dir,
    )
    _check_is_plain(base)
    return base


def _check_is_plain(base: PreTrainedModel) -> None:
    check_is_itself(base)
    check_has_no_adapters(base)


def check_base_fits(base: PreTrainedModel, record: dict[str, Any], shape: Shape, as_recorded: bool) -> None:
    """
    Check that a base is the recorded one, with its layers and its head where the stages expect them.

    Args:
        base ([`~transformers.PreTrainedModel`]): The bare base model.
        record (`dict`): The folder's config.
        shape ([`Shape`]): What that says of layers and head.
        as_recorded (`bool`): Whether it was loaded as it is recorded; see
            [`~hf_s3t.model.base_recognition.check_base_is`].

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If layers or head are elsewhere.
        [`~hf_s3t.errors.BaseModelMismatchError`]: If it is another base.
    """
    layers, head = shape.layers, shape.head
    path = layers_path(base, layers)
    found = find_head(base, path)
    if path != layers.path or found != head:
        raise ConfigError(
            f"The base has its layers at {path} and the head {found}; the system was trained "
            f"with {layers.path} and {head}. Load the base as a {record['base_model']['architecture']}."
        )
    check_base_is(base, record["base_model"], layers.path, head, as_recorded=as_recorded)


def make_ready(base: PreTrainedModel, head: Sequence[str], seed: int) -> None:
    """
    Have a base keep no state and its weights as they are, and start its head from the system's seed.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: If its passes change it.
    """
    keep_4_bit_weights(base)
    check_keeps_no_state(base)
    seed_head(base, head, seed)
    log_casts_once(base)


def layers_path(base: nn.Module, layers: LayerGroups) -> str:
    """Where a base holds as many layers as the system's, at the recorded place if it can be."""
    try:
        recorded = base.get_submodule(layers.path)
    except AttributeError:
        return find_layers(base)[0]
    return layers.path if isinstance(recorded, nn.ModuleList) else find_layers(base)[0]
