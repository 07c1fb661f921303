"""Which stages a system has: the prefix tree of its sequences, what a deletion removes, and which stack serves."""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from ..config import S3TConfig
from ..errors import FolderError
from ..sequences.rules import select_sequences


# Optimizer steps below which a stage seldom converges: its adapter starts at nothing, under a fresh schedule.
LEAST_STEPS = 50
# Not every digit of Unicode, nor more digits than Python converts.
_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_PATH = re.compile(rf"stages/shard-({_NUMBER})/({_NUMBER}(?:-{_NUMBER})*)")


class StageKey(NamedTuple):
    """
    The address of a stage: a shard and the slices it is trained on, in the order they were added.

    Args:
        shard (`int`): Number of the shard.
        prefix (`tuple[int, ...]`): The slices of the stage; the last one is new in this stage.

    Example:

    ```python
    >>> from hf_s3t.plan import StageKey

    >>> key = StageKey(0, (2, 0, 1))
    >>> key.path, key.depth, key.parent.path
    ('stages/shard-0/2-0-1', 3, 'stages/shard-0/2-0')
    ```
    """

    shard: int
    prefix: tuple[int, ...]

    @property
    def depth(self) -> int:
        """Number of stages in the stack that ends with this one."""
        return len(self.prefix)

    @property
    def group(self) -> int:
        """The layer group this stage adapts, 0 being the topmost."""
        return self.depth - 1

    @property
    def parent(self) -> "StageKey | None":
        """The stage this one stands on, or `None` for the first stage of a sequence."""
        return StageKey(self.shard, self.prefix[:-1]) if self.depth > 1 else None

    @property
    def lineage(self) -> tuple["StageKey", ...]:
        """The stack that ends with this stage, topmost group first."""
        return tuple(StageKey(self.shard, self.prefix[: i + 1]) for i in range(self.depth))

    @property
    def path(self) -> str:
        """The stage's folder, relative to the system's, with forward slashes."""
        return f"stages/shard-{self.shard}/" + "-".join(map(str, self.prefix))

    @property
    def adapter_name(self) -> str:
        """The name of the stage's PEFT adapter (module names cannot hold dots)."""
        return f"shard{self.shard}_" + "_".join(map(str, self.prefix))

    @classmethod
    @lru_cache(maxsize=4096)
    def from_path(cls, path: str) -> "StageKey":
        """The key whose `path` this is; anything else is a [`~hf_s3t.errors.FolderError`]."""
        match = _PATH.fullmatch(path)
        if match is None:
            raise FolderError(f"{path!r} is not the path of a stage, which looks like stages/shard-0/2-0-1.")
        return cls(int(match[1]), tuple(map(int, match[2].split("-"))))

    def saw(self, hits: Collection[tuple[int, int]]) -> bool:
        """Whether any of the (shard, slice) pairs is among the stage's slices."""
        return any((self.shard, s) in hits for s in self.prefix)

    def __str__(self) -> str:
        return self.path.removeprefix("stages/")


def stage_seed(seed: int, key: StageKey) -> int:
    """
    The seed of a stage: a hash of the system's seed, the shard and the prefix, and of nothing else.

    Returns:
        `int`: A 31-bit seed, good for every library's generator.
    """
    text = f"hf_s3t stage {seed} {key.path}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "big") & 0x7FFFFFFF


@dataclass(frozen=True)
class Plan:
    """
    The sequences of every shard and the tree of stages they share.

    Args:
        sequences (`tuple` of `tuple` of permutations): Per shard its sequences, in the order of their numbers.

    Example:

    ```python
    >>> from hf_s3t import S3TConfig
    >>> from hf_s3t.plan import Plan

    >>> plan = Plan.from_config(S3TConfig(num_slices=2))
    >>> [str(key) for key in plan.stages()]
    ['shard-0/0', 'shard-0/0-1', 'shard-0/1', 'shard-0/1-0']
    >>> [str(key) for key in plan.removed_by({(0, 1)}, plan.stages())]
    ['shard-0/0-1', 'shard-0/1', 'shard-0/1-0']
    ```
    """

    sequences: tuple[tuple[tuple[int, ...], ...], ...]

    @classmethod
    def from_config(cls, config: S3TConfig) -> "Plan":
        """The plan that a config describes."""
        shards = []
        for shard in range(config.num_shards):
            sequences = config.explicit_sequences_of(shard) or select_sequences(
                config.num_slices,
                config.budget or config.num_slices,
                method=str(config.sequence_selection),
                prior=config.prior_of(shard),
                horizon=config.score_horizon,
                seed=config.seed,
            )
            shards.append(tuple(tuple(sequence) for sequence in sequences))
        return cls(tuple(shards))

    @classmethod
    def from_record(cls, record: Any, num_shards: int, num_slices: int) -> "Plan":
        """
        The plan that `to_record` wrote down. Nothing is searched.

        Args:
            record (`list`): What was written.
            num_shards (`int`): Number of shards.
            num_slices (`int`): Number of slices per shard.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If it is no plan of so many shards and slices.
        """
        expected = f"expected one of {num_shards} shards and {num_slices} slices"
        if not isinstance(record, list) or len(record) != num_shards:
            found = f"{len(record)} shards" if isinstance(record, list) else repr(record)
            raise FolderError(f"The plan that is written down is of {found}, {expected}.")
        sequences = []
        for shard, stages in enumerate(record):
            if not _is_tree(stages, num_slices):
                raise FolderError(f"The plan that is written down for shard {shard} is no tree of stages, {expected}.")
            prefixes = (tuple(stage["prefix"]) for stage in stages)
            sequences.append(tuple(prefix for prefix in prefixes if len(prefix) == num_slices))
        return cls(tuple(sequences))

    def to_record(self) -> list[list[dict[str, list[int]]]]:
        """
        The plan as it is written down: per shard its stages in training order, each with the set of its slices and
        their order. The first one of a set has the first of its orders.
        """
        shards: list[list[dict[str, list[int]]]] = [[] for _ in range(self.num_shards)]
        for key in self._ordered:
            shards[key.shard].append({"slices": sorted(key.prefix), "prefix": list(key.prefix)})
        return shards

    @cached_property
    def _ordered(self) -> tuple[StageKey, ...]:
        # A dict keeps the order of first use, so a parent precedes its children and shared prefixes appear once.
        return tuple(dict.fromkeys(key for stacks in self._stacks for stack in stacks for key in stack))

    @cached_property
    def _stacks(self) -> tuple[tuple[tuple[StageKey, ...], ...], ...]:
        """Per shard and sequence, its stages: made once, as every deletion looks at all of them."""
        return tuple(
            tuple(StageKey(shard, sequence).lineage for sequence in sequences)
            for shard, sequences in enumerate(self.sequences)
        )

    @cached_property
    def _planned(self) -> frozenset[StageKey]:
        return frozenset(self._ordered)

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.sequences)

    def __contains__(self, key: StageKey) -> bool:
        return key in self._planned

    def stages(self, empty: Collection[tuple[int, int]] = ()) -> list[StageKey]:
        """
        Every stage that should exist, parents before children, shared prefixes once.

        Args:
            empty (collection of `(shard, slice)`): Slices that deletions have emptied; a sequence ends before one.
        """
        return [key for key in self._ordered if not key.saw(empty)] if empty else list(self._ordered)

    def missing(self, valid: Collection[StageKey], empty: Collection[tuple[int, int]] = ()) -> list[StageKey]:
        """The stages that `train()` has to make, in training order."""
        return [key for key in self.stages(empty) if key not in valid]

    def removed_by(self, hits: Collection[tuple[int, int]], stages: Iterable[StageKey]) -> list[StageKey]:
        """Those of `stages` that a deletion in the (shard, slice) pairs removes (Algorithm 4)."""
        return [key for key in stages if key.saw(hits)]

    def depths(self, valid: Collection[StageKey]) -> list[list[int]]:
        """Per shard and sequence, the length of the longest prefix whose stages are all valid."""
        return [[_valid_depth(stack, valid) for stack in stacks] for stacks in self._stacks]

    def served(
        self,
        valid: Collection[StageKey],
        select: str = "longest",
        losses: Mapping[StageKey, float] | None = None,
    ) -> tuple[tuple[StageKey, ...], ...]:
        """
        Which stacks answer, as a pure function of the valid stages.

        Args:
            valid (collection of [`StageKey`]): The valid stages.
            select (`str`, defaults to `"longest"`):
                `"longest"`: per shard the longest valid prefix, ties to the lowest sequence number. `"metric"`: the
                valid prefix with the lowest recorded loss (section B.3 of the paper); stages without one come last.
                `"all"`: the longest valid prefix of every sequence (Figure 16).
            losses (mapping from [`StageKey`] to `float`, *optional*): Recorded evaluation losses, for `"metric"`.

        Returns:
            `tuple[tuple[StageKey, ...], ...]`: Per shard the last stages of the stacks that serve; empty if none is
            left.
        """
        return tuple(
            self._served_of(shard, depths, select, losses or {}) for shard, depths in enumerate(self.depths(valid))
        )

    def _served_of(
        self, shard: int, depths: Sequence[int], select: str, losses: Mapping[StageKey, float]
    ) -> tuple[StageKey, ...]:
        tips = [StageKey(shard, seq[:d]) for seq, d in zip(self.sequences[shard], depths, strict=True) if d]
        if not tips:
            return ()
        if select == "all":
            return tuple(dict.fromkeys(tips))
        if select == "metric":
            candidates = dict.fromkeys(key for tip in tips for key in tip.lineage)
            return (min(candidates, key=lambda key: (_rank(losses.get(key)), -key.depth)),)
        return (max(tips, key=lambda key: key.depth),)

    def first_slices_alive(self, valid: Collection[StageKey]) -> list[set[int]]:
        """Per shard, the distinct first slices of sequences whose first stage is valid: what keeps the shard alive."""
        return [
            {sequence[0] for sequence in sequences if StageKey(shard, sequence[:1]) in valid}
            for shard, sequences in enumerate(self.sequences)
        ]


def _is_tree(stages: Any, num_slices: int) -> bool:
    """Whether stages that are written down are a tree, parents before children, whose leaves hold all slices."""
    seen: set[tuple[int, ...]] = {()}
    try:
        for stage in stages:
            prefix = tuple(stage["prefix"])
            # A truth, or a float, may equal a number.
            is_read = all(type(slice_) is int and 0 <= slice_ < num_slices for slice_ in prefix)
            if not is_read or len(set(prefix)) < len(prefix) or sorted(prefix) != stage["slices"]:
                return False
            if prefix in seen or prefix[:-1] not in seen:
                return False
            seen.add(prefix)
    except (TypeError, KeyError):
        return False
    leaves = seen.difference(prefix[:-1] for prefix in seen)
    return bool(leaves) and all(len(leaf) == num_slices for leaf in leaves)


def _rank(loss: float | None) -> float:
    # A training that diverged records NaN, which compares with nothing.
    return float("inf") if loss is None or loss != loss else loss


def _valid_depth(stack: Sequence[StageKey], valid: Collection[StageKey]) -> int:
    return next((depth for depth, key in enumerate(stack) if key not in valid), len(stack))


def relative_cost(key: StageKey, num_examples: int, num_layers: int, layers_below: int) -> float:
    """
    What training one epoch of a stage costs, in forward passes of one layer for one example.

    Forward through all layers, and backward through those from the trained group up: as the base is frozen, a layer
    costs as much backward as forward.

    Args:
        key ([`StageKey`]): The stage.
        num_examples (`int`): Examples in its slices.
        num_layers (`int`): Layers of the base model.
        layers_below (`int`): Layers below the stage's group, which need no backward pass.
    """
    return float(num_examples * (num_layers + (num_layers - layers_below)))
