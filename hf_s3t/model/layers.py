"""Finds a model's transformer layers and groups them for stages. No architecture is named here."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigError, IsolationError, LayersNotFoundError, counted


@dataclass(frozen=True)
class LayerGroups:
    """
    Where the transformer layers are and which of them each stage adapts.

    Args:
        path (`str`): Name of the module list that holds the layers, such as `model.layers`.
        num_layers (`int`): Number of layers `N`.
        groups (`tuple[tuple[int, ...], ...]`):
            Per stage the indices of its layers; group 0 is the topmost, or the lowest where stages grow bottom-up.
    """

    path: str
    num_layers: int
    groups: tuple[tuple[int, ...], ...]

    @property
    def pattern(self) -> str:
        """The last part of the path, by which PEFT recognises layer indices."""
        return self.path.rpartition(".")[2]

    def module_names(self, group: int) -> list[str]:
        """The full names of the layers of a group."""
        return [f"{self.path}.{index}" for index in self.groups[group]]

    def layers_below(self, group: int) -> int:
        """Number of layers below a group: those that need no backward pass while it trains."""
        return min(self.groups[group])


def find_layers(model: nn.Module, pattern: str | Sequence[str] | None = None) -> tuple[str, nn.ModuleList]:
    """
    The module list that holds the transformer layers, found by structure.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        pattern (`str` or list of `str`, *optional*):
            `layers_pattern` of the PEFT config: name of the list to take where several could be meant.

    Returns:
        `tuple[str, nn.ModuleList]`: Its name and the list.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: If layers are shared across depth.
        [`~hf_s3t.errors.LayersNotFoundError`]: If no list, or more than one, fits.
    """
    lists = _lists(model)
    outer = _outer(lists)
    depth = _configured_depth(model)
    _refuse_shared_layers(outer, depth)
    if pattern is not None:
        patterns = [pattern] if isinstance(pattern, str) else list(pattern)
        fitting = {n: m for n, m in lists.items() if n.rpartition(".")[2] in patterns and n in outer}
    else:
        fitting = {n: m for n, m in outer.items() if len(m) == depth}
        if not fitting:
            plain = {n: m for n, m in outer.items() if not any(isinstance(x, nn.ModuleList) for x in m)}
            longest = max((len(m) for m in plain.values()), default=0)
            fitting = {n: m for n, m in plain.items() if len(m) == longest and len({type(x) for x in m}) == 1}
    if len(fitting) > 1:
        fitting = _in_the_text_part(model, fitting) or fitting
    if len(fitting) != 1:
        found = ", ".join(f"{n} ({len(m)} x {type(m[0]).__name__})" for n, m in outer.items()) or "none"
        raise LayersNotFoundError(
            f"{type(model).__name__} has {'no' if not fitting else 'more than one'} list of transformer layers that "
            f"fits (module lists: {found}). Name the list in the PEFT config: "
            '`LoraConfig(..., layers_pattern="layers", layers_to_transform=[])`, with `target_modules` as a list.'
        )
    path, layers = next(iter(fitting.items()))
    _refuse_tied_modules(path, layers)
    return path, layers


def outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The module lists with parameters that lie in no other such list, by name: layers, of every part of a model."""
    return _outer(_lists(model))


def _lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and _has_parameters(m)}


def _outer(lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    return {n: m for n, m in lists.items() if not any(n.startswith(f"{other}.") for other in lists)}


def _in_the_text_part(model: nn.Module, lists: dict[str, nn.ModuleList]) -> dict[str, nn.ModuleList]:
    """Of lists that fit alike in a language model of several parts, those of the part that reads the words."""
    config = getattr(model, "config", None)
    text = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    if text is config or getattr(model, "get_output_embeddings", lambda: None)() is None:
        return {}
    of_text = tuple(f"{name}." for name, m in model.named_modules() if type(getattr(m, "config", None)) is type(text))
    return {name: m for name, m in lists.items() if name.startswith(of_text)}


def _refuse_tied_modules(path: str, layers: nn.ModuleList) -> None:
    """A module that two layers hold would carry one adapter for both."""
    owners: dict[nn.Module, int] = {}
    for index, layer in enumerate(layers):
        for name, module in layer.named_modules():
            if next(module.parameters(recurse=False), None) is not None and owners.setdefault(module, index) != index:
                raise IsolationError(
                    f"The layers {owners[module]} and {index} of {path} share the module {name or 'itself'!r}, so a "
                    "stage's adapter would act in other stages too. Use a model with separate layers."
                )


def _has_parameters(module: nn.ModuleList) -> bool:
    return len(module) > 0 and next(module.parameters(), None) is not None


def _configured_depth(model: nn.Module) -> int | None:
    config = getattr(model, "config", None)
    if config is None:
        return None
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "num_hidden_layers", None)


def _num_layers(layers: nn.ModuleList) -> int:
    """Number of layers in a list, those of lists inside it counted one by one."""
    return sum(_num_layers(layer) if isinstance(layer, nn.ModuleList) else 1 for layer in layers)


def _refuse_shared_layers(lists: dict[str, nn.ModuleList], depth: int | None) -> None:
    held = max(map(_num_layers, lists.values()), default=0)
    if depth is not None and 0 < held < depth:
        raise IsolationError(
            f"The config says {counted(depth, 'layer')}, but the model holds at most {held} in a list: "
            "layers are shared across depth, so a stage's adapter would act in other stages too. Use a model with "
            "separate layers."
        )


def group_layers(
    num_layers: int, num_slices: int, layers_per_slice: int | Sequence[int] | None, growth: str = "top-down"
) -> tuple[tuple[int, ...], ...]:
    """
    Layer indices of each stage, first stage first.

    Args:
        num_layers (`int`): Number of layers `N`.
        num_slices (`int`): Number of stages `L`.
        layers_per_slice (`int` or sequence of `int`, *optional*): Layers of each stage; `N // L` if not given.
        growth (`str`, defaults to `"top-down"`):
            `"top-down"`: the first stage has the topmost layers, and the lowest layers left over are in none.
            `"bottom-up"` (the ablation of section C.2): it has the lowest, and the topmost left over are in none.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the slices need more layers than there are.

    Example:

    ```python
    >>> from hf_s3t.model.layers import group_layers

    >>> group_layers(7, 3, None)
    ((5, 6), (3, 4), (1, 2))
    >>> group_layers(7, 3, None, growth="bottom-up")
    ((0, 1), (2, 3), (4, 5))
    ```
    """
    if num_slices > num_layers:
        raise ConfigError(
            f"num_slices={num_slices} is more than the model's {counted(num_layers, 'layer')}: every slice needs at "
            "least one. Use fewer slices."
        )
    sizes = layers_per_slice if layers_per_slice is not None else num_layers // num_slices
    sizes = [sizes] * num_slices if isinstance(sizes, int) else list(sizes)
    if sum(sizes) > num_layers:
        raise ConfigError(
            f"layers_per_slice={layers_per_slice} with num_slices={num_slices} needs {counted(sum(sizes), 'layer')}, "
            f"but the model has {num_layers}. Lower one of them."
        )
    if growth == "bottom-up":
        bottoms = [sum(sizes[:i]) for i in range(num_slices)]
        return tuple(tuple(range(bottom, bottom + size)) for bottom, size in zip(bottoms, sizes, strict=True))
    tops = [num_layers - sum(sizes[:i]) for i in range(num_slices)]
    return tuple(tuple(range(top - size, top)) for top, size in zip(tops, sizes, strict=True))
