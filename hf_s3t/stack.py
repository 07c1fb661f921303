"""Stage adapters on one base model, over PEFT: attach, train one with the rest frozen, route per call, drop."""

import copy
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import torch
from peft import LoraConfig
from peft.functional import (
    cast_adapter_dtype,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import FolderError, LayersNotFoundError
from .isolation import check_peft_config
from .layers import LayerGroups, is_norm
from .plan import StageKey
from .route import cut_graph, hook
from .storage import ADAPTER_FILE


# What PEFT puts before a module's name in the files of an adapter.
_PREFIX = "base_model.model."


class StageStack:
    """
    The stage adapters in memory, on one base model that is never changed.

    Each stage is one PEFT adapter on the layers of its group, with a copy of the head if the model has one. Adapters
    of other stages may be present at the same time; which ones act is decided per call by a [`Route`], or for
    training by `train_only`.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model. It is frozen and its target modules are wrapped.
        peft_config ([`~peft.LoraConfig`]): The user's settings; target modules are resolved once, on the bare model.
        layers ([`~hf_s3t.layers.LayerGroups`]): Which layers each stage adapts.
        head (sequence of `str`): Names of the modules trained as the head.

    Raises:
        [`~hf_s3t.errors.LayersNotFoundError`]: If the config targets nothing in some group.
    """

    def __init__(self, base: nn.Module, peft_config: LoraConfig, layers: LayerGroups, head: Sequence[str] = ()):
        # One from a folder may ask for anything; some settings name a module that PEFT imports.
        check_peft_config(peft_config, head)
        self.base = base
        self.layers = layers
        self.head = tuple(head)
        self._configs = [
            _stage_config(peft_config, layers, group, _targets(base, peft_config, layers, group), self.head, base)
            for group in range(len(layers.groups))
        ]
        self._modules: dict[StageKey, list[nn.Module]] = {}
        # The digest of each stage's file, by which a stage is told from another one grown under the same name.
        self._digests: dict[StageKey, str | None] = {}
        self.in_training: StageKey | None = None
        self._hooked: set[nn.Module] = set()
        self._is_wrapped = False
        base.requires_grad_(False)
        # Trainer refuses to train a quantised base unless adapters are known to live on it.
        base._hf_peft_config_loaded = True
        base.peft_config = {}
        first = base.get_submodule(layers.path)[0]
        first.register_forward_pre_hook(cut_graph, with_kwargs=True)

    # What is in memory

    @property
    def loaded(self) -> list[StageKey]:
        """The stages whose tensors are in memory."""
        return list(self._modules)

    def __contains__(self, key: StageKey) -> bool:
        return key in self._modules

    def holds(self, key: StageKey, digest: str) -> bool:
        """Whether the stage in memory is the one whose adapter file has this digest."""
        return key in self._modules and self._digests.get(key) == digest

    def mark(self, key: StageKey, digest: str | None) -> None:
        """Note the digest of the file that an attached stage is in; `None` if it is in none."""
        self._digests[key] = digest

    def tensors(self, key: StageKey) -> dict[str, torch.Tensor]:
        """The tensors of a stage by the names they have in its file, head included; they share memory."""
        state = get_peft_model_state_dict(self.base, adapter_name=key.adapter_name, save_embedding_layers=False)
        return {_PREFIX + name: tensor for name, tensor in sorted(state.items())}

    def digest(self, keys: Iterable[StageKey]) -> str:
        """A digest of the tensors of some stages, to show that frozen ones stay what they are."""
        hasher = hashlib.sha256()
        for key in keys:
            hasher.update(str(key).encode())
            hasher.update(tensors_digest(self.tensors(key)).encode())
        return hasher.hexdigest()

    # Attaching and dropping

    def add(self, key: StageKey) -> None:
        """
        Attach a new stage, initialised from torch's current random state: seed before.

        Its head starts as a copy of the head of the stage it stands on (stage 0: as the base's).
        """
        self._inject(key, low_cpu_mem_usage=False)
        if key.parent is not None:
            for wrapper in self._wrappers:
                heads = wrapper.modules_to_save
                heads[key.adapter_name].load_state_dict(heads[key.parent.adapter_name].state_dict())

    def load(self, key: StageKey, folder: Path, digest: str) -> None:
        """Attach a stage from its folder, whose adapter file has the digest, without touching any random state."""
        self.drop([key])
        # Injecting deep-copies the head, and its initialisers draw nothing on the meta device.
        self._inject(key, low_cpu_mem_usage=True)
        device = next(self.base.parameters()).device
        try:
            self.fill(key, load_file(folder / ADAPTER_FILE, device=str(device)))
        except SafetensorError as error:
            self.drop([key])
            raise FolderError(
                f"{folder / ADAPTER_FILE} is no safetensors file: {error}. Restore it, or remove its folder and call "
                "`train()` to grow it again."
            ) from error
        self.mark(key, digest)

    def fill(self, key: StageKey, state: Mapping[str, torch.Tensor]) -> None:
        """Set the tensors of an attached stage, by the names they have in its file."""
        # No more than its own: PEFT would set tensors of the base too, on which all stages stand.
        own = self.tensors(key).keys()
        missing, unexpected = sorted(own - state.keys()), sorted(state.keys() - own)
        if missing or unexpected:
            self._refuse(key, f"missing {missing[:3]}, unexpected {unexpected[:3]}.")
        plain = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
        try:
            set_peft_model_state_dict(
                self.base, plain, adapter_name=key.adapter_name, low_cpu_mem_usage=self._is_meta(key)
            )
        except RuntimeError as error:
            self._refuse(key, str(error))
        self._place(key)

    def _refuse(self, key: StageKey, why: str) -> NoReturn:
        self.drop([key])
        raise LayersNotFoundError(
            f"The adapter of {key} does not fit the base model: {why} Load it on the base model it was trained on."
        )

    def drop(self, keys: Iterable[StageKey]) -> None:
        """Remove stages from memory. Only their own layers are visited."""
        for key in keys:
            for module in self._modules.pop(key, ()):
                if isinstance(module, ModulesToSaveWrapper):
                    module.delete_adapter(key.adapter_name, new_active_adapters=None)
                else:
                    module.delete_adapter(key.adapter_name)
            self.base.peft_config.pop(key.adapter_name, None)
            self._digests.pop(key, None)

    def _inject(self, key: StageKey, low_cpu_mem_usage: bool) -> None:
        known = self.base.__dict__.pop("peft_config")
        config = copy.deepcopy(self._configs[key.group])
        try:
            inject_adapter_in_model(config, self.base, key.adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        finally:
            self.base.peft_config = known
        known[key.adapter_name] = config
        prefixes = tuple(f"{name}." for name in self.layers.module_names(key.group))
        found = {n: m for n, m in self.base.named_modules() if _holds(m, key.adapter_name)}
        self._modules[key] = list(found.values())
        stray = [n for n, m in found.items() if isinstance(m, LoraLayer) and not n.startswith(prefixes)]
        if stray:
            self.drop([key])
            raise LayersNotFoundError(
                f"The adapter of {key} would reach {stray[0]}, outside its layers. Name `target_modules` so that they "
                "match inside the transformer layers only."
            )
        cast_adapter_dtype(self.base, key.adapter_name)
        for module in found.values():
            self._hook(module, key.group)
        self.deactivate()

    def _is_meta(self, key: StageKey) -> bool:
        return any(p.is_meta for m in self._modules[key] for p in m.parameters())

    def _place(self, key: StageKey) -> None:
        for module in self._modules[key]:
            if isinstance(module, LoraLayer):
                module._move_adapter_to_device_of_base_layer(key.adapter_name, _device_of(module))
        cast_adapter_dtype(self.base, key.adapter_name)
        self.deactivate()

    # Training

    @property
    def _wrappers(self) -> list[ModulesToSaveWrapper]:
        return [w for w in map(self.base.get_submodule, self.head) if isinstance(w, ModulesToSaveWrapper)]

    @property
    def _lora_layers(self) -> list[LoraLayer]:
        return [m for m in self._hooked if isinstance(m, LoraLayer)]

    def train_only(self, key: StageKey) -> None:
        """Activate a stage and those it stands on, and let only its own adapter and head have gradients."""
        names = [stage.adapter_name for stage in self._acting(key)]
        for module in self._lora_layers:
            module.enable_adapters(True)
            module.set_adapter(names, inference_mode=True)
            if module in self._modules[key]:
                module.set_requires_grad([key.adapter_name], True)
        for wrapper in self._wrappers:
            wrapper.enable_adapters(True)
            wrapper.set_adapter([key.adapter_name])

    def _acting(self, key: StageKey) -> tuple[StageKey, ...]:
        """The stages that act when a stage answers, topmost group first."""
        return key.lineage

    def deactivate(self) -> None:
        """
        Leave no adapter active outside a route, and none trainable.

        They are also disabled, which attaching another adapter does not undo: calls in other threads go on meanwhile.
        """
        for module in (*self._lora_layers, *self._wrappers):
            module.enable_adapters(False)
            if isinstance(module, LoraLayer):
                # Of one that is active when it is dropped PEFT makes another the successor, and trainable.
                module.set_adapter([], inference_mode=True)

    def wrap(self) -> None:
        """
        Have every module that a stage may adapt wrapped by PEFT, adapters or none.

        Attaching an adapter then changes no module that a call in another thread may be inside of.
        """
        if self._is_wrapped:
            return
        for group in range(len(self.layers.groups)):
            if not any(key.group == group for key in self.loaded):
                key = StageKey(0, tuple(range(group + 1)))
                self._inject(key, low_cpu_mem_usage=True)
                self.drop([key])
        self._is_wrapped = True

    # Files

    def save(self, key: StageKey, folder: Path, base_name: str | None) -> None:
        """Write a stage as a valid PEFT adapter for its own layers."""
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors(key).items()}
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        config = copy.deepcopy(self._configs[key.group])
        config.base_model_name_or_path = base_name
        config.inference_mode = True
        config.save_pretrained(folder)

    def export(self, tip: StageKey, folder: Path, base_name: str | None) -> None:
        """Write a whole stack as one plain PEFT adapter, with the head of its last stage."""
        folder.mkdir(parents=True, exist_ok=True)
        heads = tuple(f"{_PREFIX}{name}." for name in self.head)
        tensors = {
            name: tensor.detach().cpu().contiguous()
            for key in self._acting(tip)
            for name, tensor in self.tensors(key).items()
            if key == tip or not name.startswith(heads)
        }
        save_file(tensors, folder / ADAPTER_FILE, metadata={"format": "pt"})
        configs = self._configs[: tip.depth]
        config = copy.deepcopy(configs[0])
        config.target_modules = set().union(*(self._full_targets(group) for group in range(tip.depth)))
        config.layers_to_transform = config.layers_pattern = None
        config.base_model_name_or_path = base_name
        config.inference_mode = True
        config.save_pretrained(folder)

    def _full_targets(self, group: int) -> set[str]:
        config = self._configs[group]
        if config.layers_to_transform is None:
            return set(config.target_modules)
        return {f"{layer}.{name}" for layer in self.layers.module_names(group) for name in config.target_modules}

    def _hook(self, module: nn.Module, group: int) -> None:
        if module not in self._hooked:
            self._hooked.add(module)
            hook(module, group)


def _holds(module: nn.Module, adapter: str) -> bool:
    if isinstance(module, ModulesToSaveWrapper):
        return adapter in module.modules_to_save
    return isinstance(module, LoraLayer) and adapter in module.lora_A


def _device_of(layer: LoraLayer) -> torch.device:
    return next(layer.get_base_layer().parameters()).device


def _targets(base: nn.Module, config: LoraConfig, layers: LayerGroups, group: int) -> list[str]:
    """Full names of the modules that the user's config targets in a group, found on the bare model."""
    names = [
        f"{layer}.{n}" for layer in layers.module_names(group) for n, _ in base.get_submodule(layer).named_modules()
    ]
    if config.target_modules == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        linear = (nn.Linear, Conv1D)
        matched = [n for n in names if isinstance(base.get_submodule(n.rstrip(".")), linear)]
        # PEFT leaves out what is excluded also of these.
        named = copy.deepcopy(config)
        named.target_modules = set(matched)
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


def _refuse_unroutable(base: nn.Module, names: Iterable[str]) -> None:
    for name in names:
        module = base.get_submodule(name)
        if isinstance(module, (nn.MultiheadAttention, nn.Embedding)):
            raise LayersNotFoundError(
                f"{name} is a {type(module).__name__}, whose adapters cannot be routed per ensemble member. Target "
                "linear layers."
            )


def _leaf_names(base: nn.Module, layers: LayerGroups, group: int) -> str:
    layer = base.get_submodule(layers.module_names(group)[0])
    return ", ".join(n for n, m in layer.named_modules() if isinstance(m, (nn.Linear, Conv1D))) or "no linear layers"


def _stage_config(
    config: LoraConfig, layers: LayerGroups, group: int, targets: list[str], head: tuple[str, ...], base: nn.Module
) -> LoraConfig:
    """The user's config narrowed to one group; by layer indices where these name its targets and nothing else."""
    config = copy.deepcopy(config)
    per_layer = [
        {t.removeprefix(f"{layer}.") for t in targets if t.startswith(f"{layer}.")}
        for layer in layers.module_names(group)
    ]
    config.exclude_modules = None
    config.modules_to_save = list(head) or None
    config.task_type = None
    config.target_modules = per_layer[0]
    config.layers_to_transform = list(layers.groups[group])
    config.layers_pattern = [layers.pattern]
    by_index = {n for n, _ in base.named_modules() if check_target_module_exists(config, n) is True}
    if by_index != set(targets):
        config.target_modules = set(targets)
        config.layers_to_transform = config.layers_pattern = None
    # PEFT corrects this flag with a warning; the right value is known.
    config.fan_in_fan_out = all(isinstance(base.get_submodule(t), Conv1D) for t in targets)
    return config


def seed_head(base: nn.Module, head: Sequence[str], seed: int) -> None:
    """Initialise the base's head from a seed and nothing else: where every first stage starts (section 5)."""
    std = getattr(getattr(base, "config", None), "initializer_range", None) or 0.02
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        for module in (m for name in head for m in base.get_submodule(name).modules()):
            own = list(module.parameters(recurse=False))
            if is_norm(module):
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            for parameter in own:
                values = torch.zeros(parameter.shape)
                if parameter.dim() > 1:
                    values.normal_(0.0, std)
                parameter.copy_(values)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and bits."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        hasher.update(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
    return hasher.hexdigest()
