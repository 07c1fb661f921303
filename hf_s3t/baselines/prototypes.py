"""Class prototypes on the base's features: what ProtoSISA answers with besides its adapters."""

import contextlib
import functools
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..errors import ConfigError, FolderError
from ..folder.earlier_slices import EarlierSlices
from ..folder.files import is_read_only, write_atomically
from ..folder.layout import PROTOTYPES_FILE
from ..folder.system import SystemFolder
from ..model.aggregation import NOT_OF_EXCLUSIVE_CLASSES, aggregate
from ..model.calls import Routing
from ..model.ensemble_loss import take_targets
from ..model.head import find_head
from ..model.layers import find_layers
from ..model.route import BASE_ALONE, routed
from ..model.stack import StageStack
from ..model.tensor_files import metadata_of
from ..records.examples import ExampleTable
from .whole_adapter import WholeAdapterModel


# Cosines lie between -1 and 1; divided by this, they are logits.
_TEMPERATURE = 0.1


@dataclass(frozen=True)
class _Sums:
    """
    What one slice adds to the prototypes.

    Args:
        digest (`str`): The slice's digest.
        features (`torch.Tensor` of shape `(classes, features)`): Per class the sum of its examples' features.
        counts (`torch.Tensor` of shape `(classes,)`): Per class the number of its examples.
    """

    digest: str
    features: torch.Tensor
    counts: torch.Tensor


class ClassPrototypes:
    """
    Per class the mean feature of its examples, and a classifier by the cosine to them.

    Features are what the base's head is given, without any adapter, the mean over positions where it is given a
    sequence. They are a function of the base and a row, and sums are kept slice by slice, so that a deletion costs one
    pass over what is left of the slice. A slice's sums count only while the slice is what they were made of.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system, in whose folder the sums are kept.
        base ([`~transformers.PreTrainedModel`]): The base model.
        head (sequence of `str`): Names of the modules that are its head.
    """

    def __init__(self, folder: SystemFolder, base: PreTrainedModel, head: Sequence[str]):
        self.folder = folder
        self.path = folder.path / PROTOTYPES_FILE
        self.base = base
        self._head = tuple(head)
        self._classes = base.config.num_labels or 0
        self._sums: dict[tuple[int, int], _Sums] = _read(self.path, folder.earlier_slices())
        # The mean of all, the mean of each class, and which classes have examples; nothing if none has.
        self._means: tuple[torch.Tensor, ...] = ()
        self._average()

    @property
    def is_empty(self) -> bool:
        """Whether there is no prototype."""
        return not self._means

    def drop_stale(self, table: ExampleTable) -> None:
        """Leave out, in memory and in the file, slices that are not what they were when their sums were made."""
        current = {place: s for place, s in self._sums.items() if s.digest == table.slice_digest(*place)}
        if len(current) < len(self._sums):
            self._replace(current)
            self._write()

    def missing(self, table: ExampleTable) -> list[tuple[int, int]]:
        """The (shard, slice) pairs that hold examples and have no sums."""
        places = ((k, s) for k in range(table.num_shards) for s in range(table.num_slices))
        return [place for place in places if table.size(*place) and place not in self._sums]

    def add(self, sums: Mapping[tuple[int, int], _Sums]) -> None:
        """Take slices in; see [`ClassPrototypes.sum_up`]."""
        self._replace({**self._sums, **sums})
        self._write()

    def sum_up(self, batches: Iterable[Mapping[str, Any]], digest: str) -> _Sums:
        """
        The sums of a slice.

        Args:
            batches (iterable of mappings): The slice's examples as a data loader gives them, with `labels`.
            digest (`str`): The slice's digest.
        """
        # As wide as the first batch's features.
        features = torch.zeros(self._classes, 0, dtype=torch.float64)
        counts = torch.zeros(self._classes, dtype=torch.int64)
        for batch in batches:
            batch = dict(batch)
            if "labels" not in batch:
                raise ConfigError(
                    f"Batches of the training data hold {', '.join(batch)} and no `labels`, of which prototypes are "
                    "made. Name the column of labels `label` or `labels`."
                )
            labels = batch.pop("labels").cpu()
            _, found = self._look_at(batch)
            found = found.cpu().double()
            if not features.shape[1]:
                features = torch.zeros(self._classes, found.shape[1], dtype=torch.float64)
            # A label below zero stands for none.
            known = labels >= 0
            features.index_add_(0, labels[known], found[known])
            counts += torch.bincount(labels[known], minlength=self._classes)
        return _Sums(digest, features, counts)

    def logits(self, inputs: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
        """
        What the prototypes say to a batch.

        Args:
            inputs (mapping): The inputs of the base model, without labels: tensors of shape `(rows, ...)`.

        Returns:
            The base's own outputs, for their type, and a `torch.Tensor` of shape `(rows, classes)`: cosines to the
            prototypes, both measured from the mean of all examples, times 10. A class without examples has the
            smallest value.
        """
        outputs, features = self._look_at(inputs)
        mean, means, known = (tensor.to(features.device) for tensor in self._means)
        cosines = nn.functional.cosine_similarity((features - mean)[:, None], (means - mean)[None], dim=-1)
        return outputs, torch.where(known, cosines, -1.0) / _TEMPERATURE

    @torch.no_grad()
    def _look_at(self, inputs: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
        """The base's outputs, and what its head was given: a `torch.Tensor` of shape `(rows, features)`."""
        device = next(self.base.parameters()).device
        inputs = {name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in inputs.items()}
        # A route of no members keeps the adapters of a stage in training from acting.
        with routed(BASE_ALONE), _noting(map(self.base.get_submodule, self._head)) as given:
            outputs = self.base(**inputs, return_dict=True)
        return outputs, _pooled(given[0].float(), inputs.get("attention_mask"))

    def _replace(self, sums: dict[tuple[int, int], _Sums]) -> None:
        self._sums = dict(sorted(sums.items()))
        self._average()

    def _write(self) -> None:
        try:
            # Without the lock, another process that tidies the folder up would take the new file for a dead one's.
            with self.folder.writing():
                # Another process may have deleted what some were made of.
                self.folder.refresh_ledger()
                table = self.folder.table
                self._replace({p: s for p, s in self._sums.items() if s.digest == table.slice_digest(*p)})
                self._write_file()
        except FolderError as error:
            # The file is for who may write; what is left out here answers no more.
            if not is_read_only(error):
                raise

    def _write_file(self) -> None:
        tensors: dict[str, torch.Tensor] = {}
        digests: dict[str, str] = {}
        for (shard, slice_), s in self._sums.items():
            tensors |= {f"{shard}.{slice_}.features": s.features, f"{shard}.{slice_}.counts": s.counts}
            digests[f"{shard}.{slice_}"] = s.digest
        # safetensors cannot read what it writes of no tensors with empty metadata.
        write_atomically(self.path, save(tensors, metadata=digests or None))

    def _average(self) -> None:
        # In one order whatever order they came in: sums of floats depend on it.
        full = [s for _, s in sorted(self._sums.items()) if s.counts.sum()]
        if not full:
            self._means = ()
            return
        features, counts = _total([s.features for s in full]), _total([s.counts for s in full])
        means = features / counts.clamp(min=1)[:, None]
        self._means = ((features.sum(0) / counts.sum()).float(), means.float(), counts > 0)


def _total(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of tensors of one shape, from the first to the last."""
    return functools.reduce(torch.add, tensors, torch.zeros_like(tensors[0]))


def _read(path: Path, earlier: EarlierSlices) -> dict[tuple[int, int], _Sums]:
    if not path.exists():
        return {}
    try:
        data = path.read_bytes()
        tensors = load(data)
        sums = {}
        for name, digest in metadata_of(data).items():
            shard, slice_ = map(int, name.split("."))
            sums[shard, slice_] = _Sums(
                earlier.digest_now(digest), tensors[f"{name}.features"], tensors[f"{name}.counts"]
            )
        return sums
    except (SafetensorError, LookupError, ValueError) as error:
        raise FolderError(f"{path} is damaged: {error}. Remove it; training makes it again.") from error


@contextlib.contextmanager
def _noting(modules: Iterable[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Inside, note the first tensor that each call of the modules in this thread is given."""
    given: list[torch.Tensor] = []
    thread = threading.get_ident()

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if threading.get_ident() == thread:
            given.append(next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor)))

    hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _pooled(features: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    One vector per row: the mean over positions, those of padding left out.

    Args:
        features (`torch.Tensor` of shape `(rows, features)` or `(rows, ..., features)`): What a head is given.
        mask (`torch.Tensor` of shape `(rows, positions)`, *optional*): 1 where a position is none of padding.

    Returns:
        `torch.Tensor` of shape `(rows, features)`.
    """
    if features.dim() == 2:
        return features
    features = features.flatten(1, -2)
    if mask is None or mask.shape != features.shape[:2]:
        return features.mean(1)
    weights = mask.to(features)[..., None]
    return (features * weights).sum(1) / weights.sum(1).clamp(min=1)


def check_is_classifier(model: PreTrainedModel, layers_pattern: str | Sequence[str] | None = None) -> None:
    """
    Refuse a model without classes to have prototypes of.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        layers_pattern (`str` or list of `str`, *optional*): As in [`~hf_s3t.model.layers.find_layers`].

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If its task is not to choose one of several classes.
    """
    head = find_head(model, find_layers(model, layers_pattern)[0])
    problem = getattr(model.config, "problem_type", None)
    if not head or (model.config.num_labels or 0) < 2 or problem in NOT_OF_EXCLUSIVE_CLASSES:
        task = "has no classification head" if not head else f"has the task {problem or 'regression'}"
        raise ConfigError(
            f'{type(model).__name__} {task}, and the prototypes of "protosisa" are means of exclusive classes. Use '
            '"sisa".'
        )


class ProtoSISAModel(WholeAdapterModel):
    """
    SISA's model with a class-prototype classifier beside it: logits are mixed, and where no shard is left the
    prototypes answer alone.

    A deletion takes the sums of the slices it hits out of the prototypes before `unlearn` returns; calls that other
    threads have begun are waited for as far as they use adapters that go.
    """

    methods = ("protosisa",)

    @property
    def prototype_weight(self) -> float:
        """Weight `w` of the prototypes' logits, between 0 (SISA alone) and 1; may be set at any time."""
        return self._prototype_weight

    @prototype_weight.setter
    def prototype_weight(self, value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise ConfigError(f"`prototype_weight` must be a number between 0 and 1, got {value!r}.")
        self._prototype_weight = float(value)

    def _begin_serving(self, stack: StageStack, folder: SystemFolder, preload: str) -> None:
        self.prototypes = ClassPrototypes(folder, stack.base, stack.head)
        self.prototype_weight = 0.5
        super()._begin_serving(stack, folder, preload)

    def _serve(self, *args: Any) -> float:
        seconds = super()._serve(*args)
        self.prototypes.drop_stale(self.folder.table)
        return seconds

    def _answer(self, routing: Routing, inputs: dict[str, Any], labels: torch.Tensor | None) -> ModelOutput:
        if self.prototypes.is_empty:
            return super()._answer(routing, inputs, labels)
        if self.base_model.training:
            self.eval()
        targets = take_targets(inputs, labels)
        outputs, logits = self.prototypes.logits(inputs)
        # The same kind of numbers as the ensemble's: logits, logarithms of probabilities, or votes.
        logits = aggregate(logits, torch.ones(1), self.aggregation)
        if routing.route is not None:
            outputs = super()._answer(routing, inputs, None)
            theirs = outputs["logits"]
            logits = torch.lerp(theirs, logits.to(theirs), self.prototype_weight)
        answers = {"logits": logits}
        loss = self._ensemble.loss(routing, answers, targets, inputs)
        return self._ensemble.output(outputs, answers, loss)
