"""Stage adapters on one base model, over PEFT: attach, train one with the rest frozen, route per call, drop."""

import contextlib
import copy
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from peft import LoraConfig
from peft.functional import cast_adapter_dtype, inject_adapter_in_model
from peft.utils import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import FolderError, LayersNotFoundError
from ..folder.finite import NOT_FINITE, named, non_finite_tensors
from ..plan.stages import StageKey
from .adapter_places import AdapterPlaces, find_places, holds_adapter
from .call_watch import CallWatch
from .layers import LayerGroups
from .peft_layers import PEFT_PREFIX, AdaptedLayer, AdapterHolder
from .refusals import check_peft_config
from .route import cut_graph
from .routed_layers import route_through
from .sections import Sections
from .stage_configs import PATTERNS, config_of_stack, names_matched, stage_configs
from .stage_files import check_is_written, check_peft_reads, likeness, whole_or_nothing, write_adapter
from .tensor_files import differing_tensors, read_tensors, tensors_digest
from .trunk import hook_layers
from .turns import Turns


logger = logging.get_logger(__name__)

# Kinds of models and configs of which PEFT was seen to make, from a stage's files, what was in memory.
_KNOWN_AS_PLAIN: set[str] = set()


class StageStack:
    """
    The stage adapters in memory, on one base model that is never changed.

    Each stage is one PEFT adapter on the layers of its group, with a copy of the head if the model has one. Adapters
    of other stages may be present at the same time; which ones act is decided per call by a
    [`~hf_s3t.model.route.Route`], or for training by `train_only`.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model. It is frozen and its target modules are wrapped.
        peft_config ([`~peft.LoraConfig`]): The user's settings; target modules are resolved once, on the bare model.
        layers ([`~hf_s3t.model.layers.LayerGroups`]): Which layers each stage adapts.
        head (sequence of `str`): Names of the modules trained as the head.

    Raises:
        [`~hf_s3t.errors.LayersNotFoundError`]: If the config targets nothing in some group.
    """

    def __init__(self, base: PreTrainedModel, peft_config: LoraConfig, layers: LayerGroups, head: Sequence[str] = ()):
        # One from a folder may ask for anything; some settings name a module that PEFT imports.
        check_peft_config(peft_config, head)
        self.base = base
        self.layers = layers
        self.head = tuple(head)
        # Full names, on the bare model: what PEFT shall adapt, whatever its config calls it.
        self._names = [name for name, _ in base.named_modules()]
        self._targets, self._configs = stage_configs(base, peft_config, layers, self.head)
        self._patterns = {field: getattr(peft_config, field) or {} for field in PATTERNS}
        self._sections = Sections(base, layers)
        self._places: dict[int, AdapterPlaces] = {}
        self._kind = hash(tuple((name, type(module)) for name, module in base.named_modules()))
        self._modules: dict[StageKey, list[AdapterHolder]] = {}
        # The digest of each stage's file, by which a stage is told from another one grown under the same name.
        self._digests: dict[StageKey, str | None] = {}
        self.in_training: StageKey | None = None
        self.turns = Turns(base)
        self.watch = CallWatch(base, self.turns)
        self._hooked: set[AdapterHolder] = set()
        base.requires_grad_(False)
        # Trainer refuses to train a quantised base unless adapters are known to live on it.
        base._hf_peft_config_loaded = True
        base.peft_config = {}
        first = next(base.get_submodule(layers.path).children())
        first.register_forward_pre_hook(cut_graph, with_kwargs=True)
        self._shares_trunk = False

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

    def share_trunk(self) -> None:
        """Have the base's layers compute once for all members what lies below their stages; see `trunk`."""
        if not self._shares_trunk:
            self._shares_trunk = True
            hook_layers(self.base, self.layers)

    def holds(self, key: StageKey, digest: str) -> bool:
        """Whether the stage in memory is the one whose adapter file has this digest."""
        return key in self._modules and self._digests.get(key) == digest

    def mark(self, key: StageKey, digest: str | None) -> None:
        """Note the digest of the file that an attached stage is in; `None` if it is in none."""
        self._digests[key] = digest

    def tensors(self, key: StageKey) -> dict[str, torch.Tensor]:
        """The tensors of a stage by the names they have in its file, head included; they share memory."""
        tensors = self._places[key.group].tensors(key.adapter_name)
        return {name: tensor.detach() for name, tensor in tensors.items()}

    def digest(self, keys: Iterable[StageKey]) -> str:
        """A digest of the tensors of some stages, to show that frozen ones stay what they are."""
        return combined_digest({key: tensors_digest(self.tensors(key)) for key in keys})

    def section(self, key: StageKey) -> nn.Module:
        """What of the base is around the modules of a stage: without the layers of other groups where that is all."""
        return self._sections.of(key.group, self._configs[key.group])

    # Attaching and dropping

    def add(self, key: StageKey) -> None:
        """
        Attach a new stage, initialised from torch's current random state: seed before.

        Its head starts as a copy of the head of the stage it stands on (stage 0: as the base's).
        """
        with _single_precision():
            self._inject(key, low_cpu_mem_usage=False)
        cast_adapter_dtype(self.section(key), key.adapter_name)
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
                self._places[key.group].fill(key.adapter_name, state)
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
            for name, tensor in self._places[key.group].tensors(key.adapter_name).items():
                tensor.copy_(state[name])
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
        if places is None or not places.is_all:
            self._inject(key, low_cpu_mem_usage=True)
            return
        self._modules[key] = places.modules
        attached: dict[str, Any] = self.base.peft_config
        attached[key.adapter_name] = copy.deepcopy(places.config)
        places.add(key.adapter_name)

    def _inject(self, key: StageKey, low_cpu_mem_usage: bool) -> None:
        config = copy.deepcopy(self._configs[key.group])
        if low_cpu_mem_usage:
            # Some initialisers draw random numbers for tensors without values too.
            config.init_lora_weights = False
        section = self._sections.of(key.group, config)
        known = vars(section).pop("peft_config")
        try:
            inject_adapter_in_model(config, section, key.adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        finally:
            self.base.peft_config = vars(section)["peft_config"] = known
            self._sections.put_back(section)
        config.init_lora_weights = self._configs[key.group].init_lora_weights
        known[key.adapter_name] = config
        holders = {n: m for n, m in section.named_modules() if isinstance(m, (AdaptedLayer, ModulesToSaveWrapper))}
        found = {n: m for n, m in holders.items() if holds_adapter(m, key.adapter_name)}
        self._modules[key] = list(found.values())
        adapted = {n for n, m in found.items() if isinstance(m, AdaptedLayer)}
        if adapted != set(self._targets[key.group]):
            self.drop([key])
            raise LayersNotFoundError(
                f"PEFT adapts other modules than the config of {key} names: "
                f"{sorted(adapted ^ set(self._targets[key.group]))[:3]}. Name `target_modules` so that they match "
                "inside the transformer layers only."
            )
        if key.group not in self._places:
            self._places[key.group] = find_places(section, key.adapter_name, config, found)
        for module in found.values():
            self._hook(module, key.group)
        # PEFT makes an adapter active in all that it was shown.
        _put_to_rest(holders.values())

    # Training

    @property
    def _wrappers(self) -> list[ModulesToSaveWrapper]:
        return [w for w in map(self.base.get_submodule, self.head) if isinstance(w, ModulesToSaveWrapper)]

    @property
    def _lora_layers(self) -> list[AdaptedLayer]:
        return [m for m in self._hooked if isinstance(m, AdaptedLayer)]

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
        _put_to_rest([*self._lora_layers, *self._wrappers])

    @contextlib.contextmanager
    def bare(self) -> Iterator[None]:
        """Inside, the base answers this thread by itself, also amid a stage, of which nothing else is touched."""
        # PEFT's own way to enable adapters again has all of them trained.
        holders: list[Any] = [*self._lora_layers, *self._wrappers]
        acting = [module for module in holders if not module._disable_adapters]
        for module in acting:
            module._disable_adapters = True
        try:
            yield
        finally:
            for module in acting:
                module._disable_adapters = False

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
        config = self._configs[key.group]
        write_adapter(folder, config, self.tensors(key), type(self.base), base_name, revision)
        kind = f"{self._kind} {vars(config)}"
        if kind not in _KNOWN_AS_PLAIN:
            self._check_stage_reads(key, folder)
            _KNOWN_AS_PLAIN.add(kind)

    def _check_stage_reads(self, key: StageKey, folder: Path) -> None:
        """Compare what PEFT makes of a stage's files, unless it did so for a group that is like this one."""
        # What is written, and not what is in memory, decides what PEFT would adapt elsewhere.
        config = LoraConfig.from_pretrained(str(folder))
        is_own = names_matched(config, self._names) == set(self._targets[key.group])
        base = self._sections.of(key.group, config) if is_own else self.base
        layers = self._places[key.group].layers
        kind = f"{self._kind} {likeness(config, self.layers.module_names(key.group), layers, self.tensors(key))}"
        if base is self.base or kind not in _KNOWN_AS_PLAIN:
            self._check_peft_reads(base, folder, [key], str(key))
            _KNOWN_AS_PLAIN.add(kind)

    def export(self, tip: StageKey, folder: Path, base_name: str | None, revision: str | None = None) -> None:
        """
        Write a whole stack as one plain PEFT adapter, with the head of its last stage, to a folder that is not there
        or empty. What PEFT makes of it is compared with what serves.

        Raises:
            [`~hf_s3t.errors.LayersNotFoundError`]: If PEFT makes something else of it. No file of it is left then.
        """
        acting = self._acting(tip)
        heads = tuple(f"{PEFT_PREFIX}{name}." for name in self.head)
        tensors = {
            name: tensor
            for key in acting
            for name, tensor in self.tensors(key).items()
            if key == tip or not name.startswith(heads)
        }
        targets = {name for key in acting for name in self._places[key.group].layers}
        with whole_or_nothing(folder):
            config = config_of_stack(self._configs[tip.group], self._patterns, targets, self._names)
            write_adapter(folder, config, tensors, type(self.base), base_name, revision)
            check_is_written(folder, tensors)
            self._check_peft_reads(self.base, folder, acting, f"the stack of {tip}")

    def _check_peft_reads(self, base: nn.Module, folder: Path, acting: Sequence[StageKey], what: str) -> None:
        places = [self._places[key.group] for key in acting]
        layers = {
            name: (layer, key.adapter_name)
            for key, place in zip(acting, places, strict=True)
            for name, layer in place.layers.items()
        }
        tip = acting[-1].adapter_name
        heads = {name: wrapper.modules_to_save[tip] for name, wrapper in places[-1].heads.items()}
        check_peft_reads(base, folder, layers, heads, what)

    def _hook(self, module: AdapterHolder, group: int) -> None:
        if module not in self._hooked:
            self._hooked.add(module)
            route_through(module, group)


def combined_digest(digests: Mapping[StageKey, str]) -> str:
    """One digest of some stages, of those of their tensors."""
    hasher = hashlib.sha256()
    for key, digest in digests.items():
        hasher.update(f"{key}{digest}".encode())
    return hasher.hexdigest()


def _put_to_rest(holders: Iterable[AdapterHolder]) -> None:
    for module in holders:
        # Where adapters are disabled already, no more is to be done: gradients are taken from all of them below.
        if isinstance(module, ModulesToSaveWrapper) or not module.disable_adapters:
            module.enable_adapters(False)
        if isinstance(module, AdaptedLayer):
            # When an active adapter is dropped, PEFT makes another one active, and trainable.
            module.set_adapter([], inference_mode=True)


@contextlib.contextmanager
def _single_precision() -> Iterator[None]:
    """Inside, torch draws initial values in single precision, whatever this process has set before."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
