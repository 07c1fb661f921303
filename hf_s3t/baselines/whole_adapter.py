"""Systems whose units train one adapter on all layers: SISA, sequential training, full fine-tuning."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch

from ..config import S3TConfig
from ..model.calls import Routing
from ..model.modeling import S3TModel
from ..model.peft_layers import AdapterHolder
from ..model.route import Route
from ..model.stack import StageStack
from ..plan.stages import StageKey
from ..records.digests import DigestKey
from ..training.blueprint import Layout
from ..training.rows import TrainingRows


# Data and layers


@dataclass(frozen=True)
class SliceBySlice(Layout):
    """
    One sequence a shard, the slices in their order; every unit continues training the adapter of the one before.

    A unit's folder is the checkpoint after its slice. A deletion removes those from its slice on, and what is left is
    the checkpoint before the slice.

    Args:
        method (`str`): Name of the method.
        stage_data (`str`, *optional*): What a unit is trained on, whatever the user's settings say.
    """

    stage_data: str | None = None

    def settings(self, user_config: S3TConfig) -> S3TConfig:
        """The settings of the system, from those that the user gave."""
        return replace(
            user_config,
            budget=None,
            work_budget=None,
            sequence_selection=[list(range(user_config.num_slices))],
            layers_per_slice=None,
            stage_data=self.stage_data or user_config.stage_data,
            replay=0.0 if self.stage_data == "slice" else user_config.replay,
        )

    def groups(self, num_layers: int, config: S3TConfig) -> tuple[tuple[int, ...], ...]:
        """All layers, in every unit."""
        return (tuple(range(num_layers)),) * config.num_slices


@dataclass(frozen=True)
class AtOnce(Layout):
    """
    One unit a shard, trained on all that the shard holds: plain LoRA fine-tuning where there is one shard.

    The shards are those of the user's settings; their slices are taken together.
    """

    method: str = "full"

    def settings(self, user_config: S3TConfig) -> S3TConfig:
        """The settings of the system, from those that the user gave."""
        return replace(
            user_config,
            num_slices=1,
            budget=None,
            work_budget=None,
            sequence_selection="cyclic",
            deletion_prior=None,
            layers_per_slice=None,
            stage_data="cumulative",
            replay=1.0,
        )

    def groups(self, num_layers: int, config: S3TConfig) -> tuple[tuple[int, ...], ...]:
        """All layers."""
        return (tuple(range(num_layers)),)

    def rows(self, dataset: Any, user_config: S3TConfig) -> TrainingRows:
        """The dataset, which the user's settings partition."""
        return _SlicesTogether(dataset, user_config)


class _SlicesTogether(TrainingRows):
    """A training dataset that is partitioned into slices, of which only the shards are kept."""

    def _places(self, digests: np.ndarray, key: DigestKey) -> tuple[np.ndarray, np.ndarray]:
        """The shard of each row, and everywhere the same slice."""
        shards, slices = super()._places(digests, key)
        return shards, np.zeros_like(slices)


# Adapters


class WholeAdapterStack(StageStack):
    """
    Adapters on all layers, of which one acts at a time. A unit's starts as a copy of the one before it, head included.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model. It is frozen and its target modules are wrapped.
        peft_config ([`~peft.LoraConfig`]): The user's settings.
        layers ([`~hf_s3t.model.layers.LayerGroups`]): All layers, once per unit of a sequence.
        head (sequence of `str`): Names of the modules trained as the head.
    """

    def add(self, key: StageKey) -> None:
        """Attach a new unit's adapter, initialised from torch's current random state, or as the one before it is."""
        super().add(key)
        if key.parent is not None:
            before = self.tensors(key.parent)
            with torch.no_grad():
                for name, tensor in self.tensors(key).items():
                    tensor.copy_(before[name])

    def _acting(self, key: StageKey) -> tuple[StageKey, ...]:
        return (key,)

    def _hook(self, module: AdapterHolder, group: int) -> None:
        super()._hook(module, 0)


# Serving


@dataclass(frozen=True)
class WholeAdapterRoute(Route):
    """Which adapters the rows of a batch go through: of each member the one of its last unit, in all layers."""

    @cached_property
    def by_group(self) -> dict[int, tuple[str | None, ...]]:
        """Per layer group, of which there is one, and member the adapter to apply."""
        return {0: self.heads}


class WholeAdapterRouting(Routing):
    """A snapshot of which adapters answer; see [`~hf_s3t.model.calls.Routing`]."""

    route_type = WholeAdapterRoute


class WholeAdapterModel(S3TModel):
    """
    [`S3TModel`] for a baseline whose units train one adapter on all layers.

    It serves, deletes, generates and is loaded as an [`S3TModel`] is. The guarantee of `unlearn` is the same: what
    answers is the checkpoint before the slice of a deleted example.
    """

    stack_type = WholeAdapterStack
    methods: tuple[str, ...] = ("full", "sisa", "sequential")
    routing_type = WholeAdapterRouting
