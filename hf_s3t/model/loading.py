"""What loading a served system reads and checks before a model is made."""

import os
from collections.abc import Sequence

from peft import LoraConfig
from torch import nn

from ..config import require_choice
from ..errors import ConfigError, FolderError
from ..folder.opening import open_folder
from ..folder.system import SystemFolder
from ..hub.client import is_repo_id
from ..hub.folder import HubFolder
from .layers import LayerGroups, find_layers


_PRELOADS = ("best", "all")
_WHEN_EXHAUSTED = ("error", "base")


def recorded_shape(folder: SystemFolder) -> tuple[LayerGroups, tuple[str, ...], LoraConfig]:
    """What the config says of layers, head and adapters."""
    record = folder.record
    try:
        layers = LayerGroups(
            str(record["layers"]["path"]),
            int(record["layers"]["num_layers"]),
            tuple(tuple(map(int, group)) for group in record["layers"]["groups"]),
        )
        _ = record["base_model"]["digest"], record["aggregation"]
        return layers, tuple(map(str, record["head"])), LoraConfig(**record["peft_config"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FolderError(
            f"The config of {folder.path} does not say what a system is ({type(error).__name__}: {error}). Restore it "
            "from a backup."
        ) from error


def open_system(path, revision, token, cache_dir) -> SystemFolder:
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
    return HubFolder(path, revision, token, cache_dir)


def check_options(preload: str, when_exhausted: str, head: Sequence[str]) -> None:
    """Refuse what a model cannot be loaded with."""
    require_choice("preload", preload, _PRELOADS)
    require_choice("when_exhausted", when_exhausted, _WHEN_EXHAUSTED)
    if when_exhausted == "base" and head:
        raise ConfigError(
            'when_exhausted="base" is for language models: a classifier\'s base has no trained head. Use "error".'
        )


def layers_path(base: nn.Module, layers: LayerGroups) -> str:
    """Where a base holds as many layers as the system's, at the recorded place if it can be."""
    try:
        recorded = base.get_submodule(layers.path)
    except AttributeError:
        return find_layers(base)[0]
    return layers.path if isinstance(recorded, nn.ModuleList) else find_layers(base)[0]
