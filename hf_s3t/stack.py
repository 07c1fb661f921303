"""Stage adapters on one base model, over PEFT: attach, train one with the rest frozen, route per call, drop."""

import contextlib
import copy
import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

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
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from .errors import CallStoppedError, LayersNotFoundError, S3TError
from .layers import LayerGroups, is_norm
from .plan import StageKey
from .storage import ADAPTER_FILE


# What PEFT puts before a module's name in the files of an adapter.
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class Route:
    """
    Which adapters the rows of a batch go through: the batch holds one block of rows per ensemble member.

    Args:
        members (`tuple[StageKey, ...]`): The last stage of each member's stack.
        stopped (`threading.Event`): Set by a deletion to stop the calls that go this way.
    """

    members: tuple[StageKey, ...]
    stopped: threading.Event = field(default_factory=threading.Event, compare=False, repr=False)

    def __len__(self):
        return len(self.members)

    def __deepcopy__(self, memo):
        # A copied cache was made with the same stacks, and they are compared by identity.
        return self

    def refuse_stopped(self) -> None:
        """
        Raise if a deletion stopped the calls that go this way.

        Raises:
            [`~hf_s3t.errors.CallStoppedError`]: With what to do.
        """
        if self.stopped.is_set():
            raise CallStoppedError(
                "A deletion removed a stage that this call was using, and stopped it. Call again, from the full "
                "prompt: the stacks that are left answer."
            )

    @cached_property
    def heads(self) -> tuple[str, ...]:
        """Per member the adapter whose head answers: the last surviving stage's."""
        return tuple(key.adapter_name for key in self.members)

    @cached_property
    def by_group(self) -> dict[int, tuple[str | None, ...]]:
        """Per layer group and member the adapter to apply; `None` below the member's stack."""
        depth = max(key.depth for key in self.members)
        return {
            group: tuple(key.lineage[group].adapter_name if group < key.depth else None for key in self.members)
            for group in range(depth)
        }


# The route of the call under way; unset, the base behaves as PEFT's active adapters say (which is how stages train).
_ROUTE: ContextVar[Route | None] = ContextVar("hf_s3t_route", default=None)

# While set, the length of what each adapted module and head is given is noted here, call by call.
_LENGTHS: ContextVar[list[int] | None] = ContextVar("hf_s3t_lengths", default=None)


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
        first.register_forward_pre_hook(_cut_graph, with_kwargs=True)

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

    def mark(self, key: StageKey, digest: str) -> None:
        """Note the digest of the file that an attached stage was written to."""
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
        state = load_file(folder / ADAPTER_FILE, device=str(device))
        self.fill(key, state)
        self.mark(key, digest)

    def fill(self, key: StageKey, state: Mapping[str, torch.Tensor]) -> None:
        """Set the tensors of an attached stage, by the names they have in its file."""
        plain = {name.removeprefix(_PREFIX): tensor for name, tensor in state.items()}
        result = set_peft_model_state_dict(
            self.base, plain, adapter_name=key.adapter_name, low_cpu_mem_usage=self._is_meta(key)
        )
        missing = [name for name in result.missing_keys if f".{key.adapter_name}." in name]
        if missing or result.unexpected_keys:
            self.drop([key])
            raise LayersNotFoundError(
                f"The adapter of {key} does not fit the base model: missing {missing[:3]}, unexpected "
                f"{result.unexpected_keys[:3]}. Load it on the base model it was trained on."
            )
        self._place(key)

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
        names = [stage.adapter_name for stage in key.lineage]
        for module in self._lora_layers:
            module.enable_adapters(True)
            module.set_adapter(names, inference_mode=True)
            if module in self._modules[key]:
                module.set_requires_grad([key.adapter_name], True)
        for wrapper in self._wrappers:
            wrapper.enable_adapters(True)
            wrapper.set_adapter([key.adapter_name])

    def deactivate(self) -> None:
        """
        Leave no adapter active outside a route, and none trainable.

        They are also disabled, which attaching another adapter does not undo: calls in other threads go on meanwhile.
        """
        for module in (*self._lora_layers, *self._wrappers):
            module.enable_adapters(False)
            if isinstance(module, LoraLayer):
                module.set_adapter([], inference_mode=True)
            else:
                module.set_adapter([])

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
            for key in tip.lineage
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

    # Serving

    @contextlib.contextmanager
    def routed(self, route: Route) -> Iterator[None]:
        """Inside, calls of the base in this thread go through the route."""
        token = _ROUTE.set(route)
        try:
            yield
        finally:
            _ROUTE.reset(token)

    @contextlib.contextmanager
    def noting_lengths(self) -> Iterator[list[int]]:
        """Inside, calls of the base in this thread note the length of what each adapted module and head is given."""
        lengths: list[int] = []
        token = _LENGTHS.set(lengths)
        try:
            yield lengths
        finally:
            _LENGTHS.reset(token)

    def _hook(self, module: nn.Module, group: int) -> None:
        if module in self._hooked:
            return
        self._hooked.add(module)
        module.register_forward_pre_hook(_note_length, with_kwargs=True)
        if isinstance(module, ModulesToSaveWrapper):
            module.register_forward_hook(_answer_with_heads, with_kwargs=True)
        else:
            module.register_forward_pre_hook(_base_only, with_kwargs=True)
            module.register_forward_hook(_adder(group))


def _cut_graph(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """
    Let no gradient-requiring tensor enter the lowest layer, so that layers below the trained group build no graph.

    Gradient checkpointing and k-bit preparation make embeddings require gradients; with non-reentrant checkpointing
    nothing needs that. An ensemble that serves may be differentiated by its inputs.
    """
    if _ROUTE.get() is not None:
        return None
    args = tuple(a.detach() if isinstance(a, torch.Tensor) and a.requires_grad else a for a in args)
    kwargs = {k: v.detach() if isinstance(v, torch.Tensor) and v.requires_grad else v for k, v in kwargs.items()}
    return args, kwargs


def _note_length(module: nn.Module, args: tuple, kwargs: dict) -> None:
    lengths = _LENGTHS.get()
    if lengths is not None:
        lengths.append(_length(args, kwargs))


def _base_only(layer: LoraLayer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """With a route, PEFT computes the base layer alone, whatever adapters are active."""
    if _ROUTE.get() is None or layer.disable_adapters:
        return None
    return args, {**kwargs, "adapter_names": ["__base__"] * len(args[0])}


def _adder(group: int):
    def add_members(layer: LoraLayer, args: tuple, output: torch.Tensor) -> torch.Tensor | None:
        """With a route, add each member's adapter to its block of rows."""
        route = _ROUTE.get()
        if route is None:
            return None
        route.refuse_stopped()
        names = route.by_group.get(group)
        if names is None:
            return None
        if len(output) % len(names):
            raise S3TError(
                f"An adapted {type(layer).__name__} was given {len(output)} rows for {len(names)} ensemble members: "
                "it selects among them, so they cannot be told apart. Leave it out of `target_modules`."
            )
        in_place = not output.requires_grad and not torch.is_grad_enabled()
        if in_place and _add_products(layer, names, args[0], output):
            return output
        blocks = output.chunk(len(names))
        inputs = args[0].chunk(len(names))
        if in_place:
            for name, x, block in zip(names, inputs, blocks, strict=True):
                if name is not None:
                    _apply(layer, name, x, block, in_place=True)
            return output
        return torch.cat(
            [
                block if name is None else _apply(layer, name, x, block, in_place=False)
                for name, x, block in zip(names, inputs, blocks, strict=True)
            ]
        )

    return add_members


def _add_products(layer: LoraLayer, names: Sequence[str | None], x: torch.Tensor, output: torch.Tensor) -> bool:
    """
    Add each member's adapter to its block of rows by one product of matrices, writing nothing in between.

    Returns:
        `bool`: False, and nothing is changed, if they are no plain LoRA of linear layers in the output's precision.
    """
    lora_A, lora_B = layer.lora_A, layer.lora_B
    pairs = [None if name is None else (lora_A[name], lora_B[name]) for name in names]
    if not output.is_contiguous() or not all(_is_plain(*pair, output.dtype) for pair in pairs if pair is not None):
        return False
    if any(name in layer.lora_variant for name in names):
        return False
    blocks = output.view(-1, output.shape[-1]).chunk(len(names))
    inputs = x.to(output.dtype).flatten(0, -2).chunk(len(names))
    for name, pair, rows, block in zip(names, pairs, inputs, blocks, strict=True):
        if pair is not None:
            low = nn.functional.linear(rows, pair[0].weight)
            block.addmm_(low, pair[1].weight.t(), alpha=layer.scaling[name])
    return True


def _is_plain(lora_A: nn.Module, lora_B: nn.Module, dtype: torch.dtype) -> bool:
    return type(lora_A) is type(lora_B) is nn.Linear and lora_B.bias is None and lora_B.weight.dtype == dtype


def _apply(layer: LoraLayer, name: str, x: torch.Tensor, result: torch.Tensor, in_place: bool) -> torch.Tensor:
    lora_A = layer.lora_A[name]
    x = x.to(lora_A.weight.dtype)
    if name in layer.lora_variant:
        combined = layer.lora_variant[name].forward(layer, active_adapter=name, x=x, result=result).to(result.dtype)
        return result.copy_(combined) if in_place else combined
    # As PEFT does: the sum in the adapter's precision, rounded once.
    combined = (result + layer.lora_B[name](lora_A(x)) * layer.scaling[name]).to(result.dtype)
    return result.copy_(combined) if in_place else combined


def _answer_with_heads(wrapper: ModulesToSaveWrapper, args: tuple, kwargs: dict, output):
    """With a route, each member's block of rows goes through that member's head."""
    route = _ROUTE.get()
    if route is None:
        return None
    rows = _length(args, kwargs)

    def block(value, member: int):
        of_rows = isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == rows
        return value.chunk(len(route))[member] if of_rows else value

    return torch.cat(
        [
            wrapper.modules_to_save[name](
                *(block(value, member) for value in args), **{k: block(value, member) for k, value in kwargs.items()}
            )
            for member, name in enumerate(route.heads)
        ]
    )


def _length(args: tuple, kwargs: dict) -> int:
    """Length of the first tensor that a module is given."""
    return next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))


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
