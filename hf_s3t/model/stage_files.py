"""The files of a stage, or of a whole stack: one plain PEFT adapter, of which PEFT makes what is in memory."""

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import nn

from ..errors import FolderError, LayersNotFoundError
from ..folder.files import explained
from ..folder.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from .peft_layers import PEFT_PREFIX, AdaptedLayer
from .plain_adapter import differences
from .tensor_files import differing_tensors, read_tensors


def write_adapter(
    folder: Path,
    config: LoraConfig,
    tensors: Mapping[str, torch.Tensor],
    base_class: type,
    base_name: str | None,
    revision: str | None,
) -> None:
    """
    Write a plain PEFT adapter.

    Args:
        folder (`Path`): A folder that is there.
        config ([`~peft.LoraConfig`]): By which PEFT adapts the modules that the tensors are of.
        tensors (mapping from `str` to `torch.Tensor`): The tensors by the names that PEFT gives them in files.
        base_class (`type`): The class of the base model.
        base_name (`str`, *optional*): Id or path of the base model.
        revision (`str`, *optional*): Its revision.
    """
    save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / ADAPTER_FILE, {"format": "pt"})
    config = copy.deepcopy(config)
    config.base_model_name_or_path, config.revision = base_name, revision
    config.inference_mode = True
    # By which PEFT's auto classes find the base's class. A task would do, and have modules trained for it too.
    config.auto_mapping = {"base_model_class": base_class.__name__, "parent_library": base_class.__module__}
    config.save_pretrained(str(folder))


def check_is_written(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """
    Read an adapter's file again.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it does not hold the tensors, to the bit.
    """
    path = folder / ADAPTER_FILE
    if differing_tensors(read_tensors(path.read_bytes(), str(folder)), tensors):
        raise FolderError(f"{path} does not hold what was written. Export to another disk.")


def check_peft_reads(
    base: nn.Module,
    folder: Path,
    layers: Mapping[str, tuple[AdaptedLayer, str]],
    heads: Mapping[str, nn.Module],
    what: str,
) -> None:
    """
    Compare what PEFT makes of an adapter's files with what is in memory.

    Args:
        base (`nn.Module`): The base model.
        folder (`Path`): The adapter's folder.
        layers (mapping from `str` to `tuple[AdaptedLayer, str]`): As for `differences`.
        heads (mapping from `str` to `nn.Module`): As for `differences`.
        what (`str`): What the files are of, for the error.

    Raises:
        [`~hf_s3t.errors.LayersNotFoundError`]: If PEFT makes something else of them.
    """
    problems = differences(base, folder, layers, heads)
    if problems:
        raise LayersNotFoundError(
            f"PEFT would make something else of the files of {what} than is in memory: {'; '.join(problems[:3])} "
            f"({len(problems)} in all). Nothing is written. Name the modules in `target_modules` in full, and "
            "please report this."
        )


def likeness(
    config: LoraConfig,
    names: Sequence[str],
    layers: Mapping[str, AdaptedLayer],
    tensors: Mapping[str, torch.Tensor],
) -> str:
    """
    All that decides what PEFT makes of a stage's files in its own layers, whichever these are: the config, the kinds
    of modules, and the tensors. Where modules have ranks or scales by their names, these names count too.

    Args:
        config ([`~peft.LoraConfig`]): The config in the files, which matches no module outside the stage's layers.
        names (sequence of `str`): The names of these layers.
        layers (mapping from `str` to `AdaptedLayer`): By their names, the adapted modules.
        tensors (mapping from `str` to `torch.Tensor`): The tensors by the names that they have in the files.
    """
    numbers = {name: str(number) for number, name in enumerate(names)}
    parts = names[0].count(".") + 1

    def relative(name: str) -> str:
        layer = ".".join(name.split(".")[:parts])
        return numbers[layer] + name.removeprefix(layer) if layer in numbers else name

    settings = {name: value for name, value in vars(config).items() if name != "layers_to_transform"}
    place = str if config.rank_pattern or config.alpha_pattern else relative
    modules = [(place(name), type(layer), type(layer.get_base_layer())) for name, layer in layers.items()]
    held = [(place(n.removeprefix(PEFT_PREFIX)), str(t.dtype), tuple(t.shape)) for n, t in tensors.items()]
    return f"{settings} {sorted(modules, key=str)} {sorted(held)}"


@contextlib.contextmanager
def whole_or_nothing(folder: Path) -> Iterator[None]:
    """
    Make a folder for an adapter; if what is done inside raises, no file of the adapter is left in it.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the folder cannot be made.
    """
    was_there = folder.is_dir()
    try:
        with explained(f"{folder} cannot be made", "Give another folder."):
            folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)
        # What others put there meanwhile keeps it from being removed.
        with contextlib.suppress(OSError):
            if not was_there:
                folder.rmdir()
        raise
