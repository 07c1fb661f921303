"""Stage adapters on one base model, over PEFT: attach, train one with the rest frozen, route per call, drop."""

import contextlib
import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from peft.functional import cast_adapter_dtype, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils import ModulesToSaveWrapper
from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ..errors import FolderError, LayersNotFoundError
from ..folder.files import explained
from ..folder.finite import NOT_FINITE, named, non_finite_tensors
from ..folder.layout import ADAPTER_CONFIG_FILE, ADAPTER_FILE
from ..plan.stages import StageKey
from .layers import LayerGroups, is_norm
from .plain_adapter import differences
from .refusals import check_peft_config
from .route import cut_graph, hook
from .state import CallWatch
from .tensor_files import differing_tensors, read_tensors
from .turns import Turns


logger = logging.get_logger(__name__)

# What PEFT puts before a module's name in the files of an adapter.
# By which single modules have a rank or a scale of their own.
_PATTERNS = ("rank_pattern", "alpha_pattern")
_PREFIX = "base_model.model."

# Kinds of models and configs of which PEFT was seen to make, from a stage's files, what was in memory.
_KNOWN_AS_PLAIN: set[str] = set()


@dataclass(frozen=True)
class _Slot:
    """
    Where a tensor of an adapter lies: at a path from an adapted module, or the wrapper of a head, that leads through
    the adapter's name.
    """

    module: nn.Module
    before: str
    after: str

    def tensor(self, adapter: str) -> torch.Tensor:
        owner, name = self._place(adapter)
        return getattr(owner, name)

    def set(self, adapter: str, tensor: torch.Tensor) -> None:
        """Put a copy there as it is, on the device of the module; PEFT would round it to the base's precision."""
        owner, name = self._place(adapter)
        # Memory of torch's own, aligned as what is trained: products may be summed in another order elsewhere.
        own = tensor.to(_device_of(self.module), copy=True)
        is_parameter = isinstance(getattr(owner, name), nn.Parameter)
        setattr(owner, name, nn.Parameter(own, requires_grad=False) if is_parameter else own)

    def _place(self, adapter: str) -> tuple[nn.Module, str]:
        path, _, name = f"{self.before}{adapter}{self.after}".rpartition(".")
        return self.module.get_submodule(path), name


@dataclass(frozen=True)
class _Places:
    """
    What PEFT makes of the config of a group: where its stages lie.

    Args:
        layers (mapping from `str` to `LoraLayer`): By their names, the adapted modules.
        heads (mapping from `str` to `ModulesToSaveWrapper`): By their names, the wrappers of heads.
        blanks (mapping from `str` to mapping): By the names of adapted modules, what an adapter without tensors is.
        slots (mapping from `str` to `_Slot`): By the names that they have in a file, the tensors.
    """

    layers: Mapping[str, LoraLayer]
    heads: Mapping[str, ModulesToSaveWrapper]
    blanks: Mapping[str, Mapping[str, Any]]
    slots: Mapping[str, _Slot]

    @property
    def modules(self) -> list[nn.Module]:
        return [*self.layers.values(), *self.heads.values()]


class StageStack:
    """
    The stage adapters in memory, on one base model that is never changed.

    Each stage is one PEFT adapter on the layers of its group, with a copy of the head if the model has one. Adapters
    of other stages may be present at the same time; which ones act is decided per call by a [`Route`], or for
    training by `train_only`.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model. It is frozen and its target modules are wrapped.
        peft_config ([`~peft.LoraConfig`]): The user's settings; target modules are resolved once, on the bare model.
        layers ([`~hf_s3t.model.layers.LayerGroups`]): Which layers each stage adapts.
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
        # Full names, on the bare model: what PEFT shall adapt, whatever its config calls it.
        self._names = [name for name, _ in base.named_modules()]
        self._targets, self._configs = stage_configs(base, peft_config, layers, self.head)
        self._patterns = {field: getattr(peft_config, field) or {} for field in _PATTERNS}
        self._places: dict[int, _Places] = {}
        self._kind = hash(tuple((name, type(module)) for name, module in base.named_modules()))
        self._modules: dict[StageKey, list[nn.Module]] = {}
        # The digest of each stage's file, by which a stage is told from another one grown under the same name.
        self._digests: dict[StageKey, str | None] = {}
        self.in_training: StageKey | None = None
        self.turns = Turns(base)
        self.watch = CallWatch(base, self.turns)
        self._hooked: set[nn.Module] = set()
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

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """Around a call of what serves: takes turns with a stage in training, and is watched for what it leaves."""
        outermost = not self.turns.is_inside
        with self.turns.call(), self.watch.call() if outermost else contextlib.nullcontext():
            yield

    def holds(self, key: StageKey, digest: str) -> bool:
        """Whether the stage in memory is the one whose adapter file has this digest."""
        return key in self._modules and self._digests.get(key) == digest

    def mark(self, key: StageKey, digest: str | None) -> None:
        """Note the digest of the file that an attached stage is in; `None` if it is in none."""
        self._digests[key] = digest

    def tensors(self, key: StageKey) -> dict[str, torch.Tensor]:
        """The tensors of a stage by the names they have in its file, head included; they share memory."""
        slots = self._places[key.group].slots
        return {name: slot.tensor(key.adapter_name).detach() for name, slot in slots.items()}

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
        with _single_precision():
            self._inject(key, low_cpu_mem_usage=False)
        cast_adapter_dtype(self.base, key.adapter_name)
        if key.parent is not None:
            for wrapper in self._wrappers:
                heads = wrapper.modules_to_save
                heads[key.adapter_name].load_state_dict(heads[key.parent.adapter_name].state_dict())

    def load(self, key: StageKey, data: bytes, digest: str) -> None:
        """
        Attach a stage from the bytes of its adapter file, without touching any random state.

        What is in memory then is what the file says, bit for bit, whatever the base's precision or quantisation.

        Args:
            key ([`StageKey`]): The stage.
            data (`bytes`): The bytes of its adapter file; see [`~hf_s3t.folder.system.SystemFolder.read_adapter`].
            digest (`str`): Their digest.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If they are no safetensors file, or memory does not hold what they say.
            [`~hf_s3t.errors.LayersNotFoundError`]: If the adapter does not fit the base.
        """
        self.drop([key])
        # A call under `torch.inference_mode` may be what loads it, and training stand on it later.
        with torch.inference_mode(False):
            state = read_tensors(data, f"The adapter of {key}")
            try:
                self._attach(key)
                self._require_fit(key, state)
                for name, slot in self._places[key.group].slots.items():
                    slot.set(key.adapter_name, state[name])
                self._require_bits(key, state)
            except BaseException:
                self.drop([key])
                raise
        self.mark(key, digest)
        # Written before such stages were refused, or elsewhere. It cannot be left out: which stages serve follows from
        # what they saw, the same for everyone.
        found = non_finite_tensors(data)
        if found:
            logger.warning_once(f"{key} is NaN or infinite, in {named(found)}. {NOT_FINITE}")

    def load_all(self, files: list[tuple[StageKey, bytes, str]]) -> None:
        """
        Attach stages, each from the bytes of its adapter file, with their digest: all, or where one fails none.

        Args:
            files (list of `tuple[StageKey, bytes, str]`): It is emptied: no bytes are kept beside the tensors.
        """
        attached = []
        try:
            while files:
                key, data, digest = files.pop()
                self.load(key, data, digest)
                attached.append(key)
        except BaseException:
            self.drop(attached)
            raise

    def fill(self, key: StageKey, data: bytes) -> None:
        """
        Set the tensors of an attached stage, in place, from the bytes of a file that `save` wrote.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If they are no safetensors file, or memory does not hold what they say.
            [`~hf_s3t.errors.LayersNotFoundError`]: If the adapter does not fit the base.
        """
        state = read_tensors(data, f"The checkpoint of {key}")
        self._require_fit(key, state)
        with torch.no_grad():
            for name, slot in self._places[key.group].slots.items():
                slot.tensor(key.adapter_name).copy_(state[name])
        self._require_bits(key, state)

    def _require_fit(self, key: StageKey, state: Mapping[str, torch.Tensor]) -> None:
        own = self.tensors(key)
        missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
        if missing or unexpected:
            self._refuse(key, f"missing {missing[:3]}, unexpected {unexpected[:3]}.")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                found, expected = tuple(state[name].shape), tuple(tensor.shape)
                self._refuse(key, f"size mismatch of {name}: {found}, expected {expected}.")

    def _require_bits(self, key: StageKey, state: Mapping[str, torch.Tensor]) -> None:
        unequal = differing_tensors(state, self.tensors(key))
        if unequal:
            self.drop([key])
            raise FolderError(
                f"{key} would not serve what its file says: {len(unequal)} of {len(state)} tensors, the first of them "
                f"{unequal[0]}, are others in memory. Load the base as it was at training."
            )

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

    def _attach(self, key: StageKey) -> None:
        """Make room for a stage in its modules; PEFT, which looks through the whole model, finds them once a group."""
        places = self._places.get(key.group)
        if places is None:
            # Injecting deep-copies the head, and its initialisers draw nothing on the meta device.
            self._inject(key, low_cpu_mem_usage=True)
            return
        self._modules[key] = places.modules
        self.base.peft_config[key.adapter_name] = copy.deepcopy(self._configs[key.group])
        for name, layer in places.layers.items():
            for part, blank in places.blanks[name].items():
                getattr(layer, part)[key.adapter_name] = copy.deepcopy(blank)
        for wrapper in places.heads.values():
            wrapper.update(key.adapter_name)

    def _inject(self, key: StageKey, low_cpu_mem_usage: bool) -> None:
        known = self.base.__dict__.pop("peft_config")
        config = copy.deepcopy(self._configs[key.group])
        try:
            inject_adapter_in_model(config, self.base, key.adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        finally:
            self.base.peft_config = known
        known[key.adapter_name] = config
        found = {n: m for n, m in self.base.named_modules() if _holds(m, key.adapter_name)}
        self._modules[key] = list(found.values())
        adapted = {n for n, m in found.items() if isinstance(m, LoraLayer)}
        if adapted != set(self._targets[key.group]):
            self.drop([key])
            raise LayersNotFoundError(
                f"PEFT adapts other modules than the config of {key} names: "
                f"{sorted(adapted ^ set(self._targets[key.group]))[:3]}. Name `target_modules` so that they match "
                "inside the transformer layers only."
            )
        if key.group not in self._places:
            self._places[key.group] = self._found(key, found)
        for module in found.values():
            self._hook(module, key.group)
        self.deactivate()

    def _found(self, key: StageKey, modules: Mapping[str, nn.Module]) -> _Places:
        """Where the tensors of an injected adapter lie, by the names that PEFT gives them in files."""
        adapter = key.adapter_name
        # The tensors themselves, by which they are found again.
        state = get_peft_model_state_dict(
            self.base, self.base.state_dict(keep_vars=True), adapter_name=adapter, save_embedding_layers=False
        )
        paths = {
            id(tensor): _Slot(module, *path.split(adapter, 1))
            for module in modules.values()
            for path, tensor in (*module.named_parameters(), *module.named_buffers())
            if adapter in path.split(".")
        }
        slots = {_PREFIX + name: paths[id(tensor)] for name, tensor in sorted(state.items())}
        layers = {name: module for name, module in modules.items() if isinstance(module, LoraLayer)}
        heads = {name: module for name, module in modules.items() if isinstance(module, ModulesToSaveWrapper)}
        return _Places(layers, heads, {name: _blank(layer, adapter) for name, layer in layers.items()}, slots)

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
        for group in range(len(self.layers.groups)):
            if group not in self._places:
                key = StageKey(0, tuple(range(group + 1)))
                self._inject(key, low_cpu_mem_usage=True)
                self.drop([key])

    # Files

    def save(self, key: StageKey, folder: Path, base_name: str | None, revision: str | None = None) -> None:
        """
        Write a stage as a valid PEFT adapter for its own layers.

        Raises:
            [`~hf_s3t.errors.LayersNotFoundError`]: If PEFT makes something else of the files.
        """
        self._write(folder, self._configs[key.group], self.tensors(key), base_name, revision)
        kind = f"{self._kind} {self._configs[key.group].to_dict()}"
        if kind not in _KNOWN_AS_PLAIN:
            self._require_plain(folder, [key], str(key))
            _KNOWN_AS_PLAIN.add(kind)

    def export(self, tip: StageKey, folder: Path, base_name: str | None, revision: str | None = None) -> None:
        """
        Write a whole stack as one plain PEFT adapter, with the head of its last stage, to a folder that is not there
        or empty. What PEFT makes of it is compared with what serves.

        Raises:
            [`~hf_s3t.errors.LayersNotFoundError`]: If PEFT makes something else of it. No file of it is left then.
        """
        was_there = folder.is_dir()
        acting = self._acting(tip)
        heads = tuple(f"{_PREFIX}{name}." for name in self.head)
        tensors = {
            name: tensor
            for key in acting
            for name, tensor in self.tensors(key).items()
            if key == tip or not name.startswith(heads)
        }
        targets = {name for key in acting for name in self._places[key.group].layers}
        try:
            with explained(f"{folder} cannot be made", "Give another folder."):
                folder.mkdir(parents=True, exist_ok=True)
            config = _with_patterns(_anywhere(self._configs[tip.group]), self._patterns, targets)
            config = _matching(config, targets, self._names)
            self._write(folder, config, tensors, base_name, revision)
            if differing_tensors(read_tensors((folder / ADAPTER_FILE).read_bytes(), str(folder)), tensors):
                raise FolderError(f"{folder / ADAPTER_FILE} does not hold what was written. Export to another disk.")
            self._require_plain(folder, acting, f"the stack of {tip}")
        except BaseException:
            for name in (ADAPTER_FILE, ADAPTER_CONFIG_FILE):
                with contextlib.suppress(OSError):
                    (folder / name).unlink(missing_ok=True)
            # What others put there meanwhile keeps it from being removed.
            with contextlib.suppress(OSError):
                if not was_there:
                    folder.rmdir()
            raise

    def _write(
        self,
        folder: Path,
        config: LoraConfig,
        tensors: Mapping[str, torch.Tensor],
        base_name: str | None,
        revision: str | None,
    ) -> None:
        save_file({n: t.cpu().contiguous() for n, t in tensors.items()}, folder / ADAPTER_FILE, {"format": "pt"})
        config = copy.deepcopy(config)
        config.base_model_name_or_path, config.revision = base_name, revision
        config.inference_mode = True
        # By which PEFT's auto classes find the base's class. A task would do, and have modules trained for it too.
        kind = type(self.base)
        config.auto_mapping = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
        config.save_pretrained(folder)

    def _require_plain(self, folder: Path, acting: Sequence[StageKey], what: str) -> None:
        places = [self._places[key.group] for key in acting]
        layers = {
            name: (layer, key.adapter_name)
            for key, place in zip(acting, places, strict=True)
            for name, layer in place.layers.items()
        }
        tip = acting[-1].adapter_name
        heads = {name: wrapper.modules_to_save[tip] for name, wrapper in places[-1].heads.items()}
        problems = differences(self.base, folder, layers, heads)
        if problems:
            raise LayersNotFoundError(
                f"PEFT would make something else of the files of {what} than is in memory: {'; '.join(problems[:3])} "
                f"({len(problems)} in all). Nothing is written. Name the modules in `target_modules` in full, and "
                "please report this."
            )

    def _hook(self, module: nn.Module, group: int) -> None:
        if module not in self._hooked:
            self._hooked.add(module)
            hook(module, group)


def _holds(module: nn.Module, adapter: str) -> bool:
    if isinstance(module, ModulesToSaveWrapper):
        return adapter in module.modules_to_save
    return isinstance(module, LoraLayer) and adapter in module.lora_A


def _blank(layer: LoraLayer, adapter: str) -> dict[str, Any]:
    """What an adapter is in a layer besides its tensors, which are on the meta device."""
    found = {}
    for part in (*layer.adapter_layer_names, *layer.other_param_names, "lora_variant"):
        if adapter in getattr(layer, part):
            blank = copy.deepcopy(getattr(layer, part)[adapter])
            found[part] = blank.to("meta") if isinstance(blank, nn.Module) else blank
    return found


def _device_of(module: nn.Module) -> torch.device:
    """Where an adapted module, or the wrapper of a head, computes."""
    inner = module.original_module if isinstance(module, ModulesToSaveWrapper) else module.get_base_layer()
    return next(inner.parameters()).device


@contextlib.contextmanager
def _single_precision() -> Iterator[None]:
    """Inside, torch draws initial values in single precision, whatever this process has set before."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def stage_configs(
    base: nn.Module, config: LoraConfig, layers: LayerGroups, head: Sequence[str]
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
    targets = [_targets(base, config, layers, group) for group in groups]
    return targets, [_stage_config(config, layers, g, targets[g], tuple(head), base, names) for g in groups]


def is_all_linear(target_modules: Any) -> bool:
    """Whether target modules are PEFT's shorthand for all linear layers."""
    return isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def _targets(base: nn.Module, config: LoraConfig, layers: LayerGroups, group: int) -> list[str]:
    """Full names of the modules that the user's config targets in a group, found on the bare model."""
    names = [
        f"{layer}.{n}" for layer in layers.module_names(group) for n, _ in base.get_submodule(layer).named_modules()
    ]
    if is_all_linear(config.target_modules):
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
    config: LoraConfig,
    layers: LayerGroups,
    group: int,
    targets: list[str],
    head: tuple[str, ...],
    base: nn.Module,
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
    _with_patterns(config, {field: getattr(config, field) or {} for field in _PATTERNS}, targets)
    by_index = copy.deepcopy(config)
    by_index.target_modules = {t.removeprefix(first) for t in targets if t.startswith(first)}
    by_index.layers_to_transform = list(layers.groups[group])
    by_index.layers_pattern = [layers.pattern]
    return by_index if _matched(by_index, names) == set(targets) else _matching(_anywhere(config), targets, names)


def _with_patterns(config: LoraConfig, patterns: Mapping[str, Mapping], targets: Iterable[str]) -> LoraConfig:
    """The config with those of the user's keys that mean a target; PEFT would say of others that none does."""
    for field, values in patterns.items():
        setattr(config, field, {k: v for k, v in values.items() if any(_means(k, target) for target in targets)})
    return config


def _means(key: str, name: str) -> bool:
    """Whether a key of a pattern of ranks or alphas means a module, as PEFT has it."""
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _anywhere(config: LoraConfig) -> LoraConfig:
    """A copy of the config that knows of no layer indices."""
    config = copy.deepcopy(config)
    config.layers_to_transform = config.layers_pattern = None
    return config


def _matching(config: LoraConfig, targets: Iterable[str], names: Sequence[str]) -> LoraConfig:
    """The config with target modules that match these names and nothing else."""
    targets = set(targets)
    config.target_modules = targets
    if _matched(config, names) != targets:
        # A name in a list is that of every module whose name ends with it; an expression has to match all of one.
        config.target_modules = "|".join(map(re.escape, sorted(targets)))
    return config


def _matched(config: LoraConfig, names: Iterable[str]) -> set[str]:
    return {name for name in names if _is_match(config, name)}


def seed_head(base: nn.Module, head: Sequence[str], seed: int) -> None:
    """Initialise the base's head from a seed and nothing else: where every first stage starts (section 5)."""
    std = getattr(getattr(base, "config", None), "initializer_range", None) or 0.02
    # Not the process's random states: a stage in another thread may be drawing from them.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (m for name in head for m in base.get_submodule(name).modules()):
            own = list(module.parameters(recurse=False))
            if is_norm(module):
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            for parameter in own:
                values = torch.zeros(parameter.shape, dtype=torch.float32)
                if parameter.dim() > 1:
                    values.normal_(0.0, std, generator=generator)
                parameter.copy_(values)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors: names, dtypes, shapes and bits."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        hasher.update(memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else b"")
    return hasher.hexdigest()
