"""Which stages a system has: the prefix tree of its sequences, what a deletion removes, and which stack serves."""

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Any, NamedTuple, TypeVar

from ..config import FAMILY_MOST_SLICES, LATTICE, S3TConfig
from ..errors import FolderError
from ..sequences.families import best_family, family_of, lattice, stages_of, work_of
from ..sequences.rules import select_sequences
from ..sequences.worth import outlook_of


# Optimizer steps below which a stage seldom converges: its adapter starts at nothing, under a fresh schedule.
LEAST_STEPS = 50
# Up to so many slices one stage for each set of them is no more work than as many rotations as there are slices.
_LATTICE_FOR_NO_MORE = 5
# Not every digit of Unicode, nor more digits than Python converts.
_NUMBER = r"(?:0|[1-9][0-9]{0,17})"
_T = TypeVar("_T")
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
    def slices(self) -> tuple[int, frozenset[int]]:
        """The shard and the set of slices that the stage saw, in whatever order."""
        return self.shard, frozenset(self.prefix)

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


def is_stage_of(key: StageKey, config: S3TConfig) -> bool:
    """Whether a system of these settings can have the stage: it has the shard and the slices, each of them once."""
    # Asked of every stage in a folder at every look at it.
    shard, prefix = key
    return shard < config.num_shards and max(prefix) < config.num_slices and len(set(prefix)) == len(prefix)


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
    What every shard shall have: a tree of stages each, in which a stage adds one slice to the one it stands on.

    What a shard can serve after deletions depends on the sets of slices that its stages saw, not on their order. So a
    plan is sets: a planned set is there if any valid stage saw it, and a missing one is grown on any valid stage that
    saw all of it but one slice (`by_sets`). The published plans are sequences, in which a set may come twice; they are
    grown as they are planned.

    Args:
        families (`tuple` of `tuple` of prefixes):
            Per shard its stages, in the order in which they are first trained, parents before children; or its
            sequences, of which these are all prefixes.
        by_sets (`bool`, defaults to `False`):
            Whether a stage counts by its set. Then a stage whose set an earlier one has is left out, and what stood on
            it stands on that one.

    Example:

    ```python
    >>> from hf_s3t import S3TConfig
    >>> from hf_s3t.plan import Plan

    >>> plan = Plan.from_config(S3TConfig(num_slices=2))
    >>> [str(key) for key in plan.stages()]
    ['shard-0/0', 'shard-0/0-1', 'shard-0/1']
    >>> [str(key) for key in plan.removed_by({(0, 1)}, plan.stages())]
    ['shard-0/0-1', 'shard-0/1']
    ```
    """

    families: tuple[tuple[tuple[int, ...], ...], ...]
    by_sets: bool = False
    # Per shard all stages as they were given, idle ones too: of systems that were planned with them, what serves stays
    # what it was.
    _given: tuple[tuple[tuple[int, ...], ...], ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        given = tuple(map(stages_of, self.families))
        object.__setattr__(self, "_given", given)
        object.__setattr__(self, "families", tuple(map(family_of, given)) if self.by_sets else given)

    @classmethod
    def from_config(cls, config: S3TConfig) -> "Plan":
        """
        The plan of a new system, which a config asks for.

        What is asked for by work is searched, which takes seconds; of a system that is there the plan is written down.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If the work asked for is too little for one chain of stages.
        """
        plan = cls.as_asked_for(config)
        if not plan.by_sets:
            return plan
        # Most shards ask the same.
        order = cache(lambda outlook, family: outlook.order(family))
        families = (order(outlook_of(config, shard), family) for shard, family in enumerate(plan.families))
        return cls(tuple(families), by_sets=True)

    @classmethod
    def as_asked_for(cls, config: S3TConfig) -> "Plan":
        """The same stages in the order of the sequences that a config asks for, as plans once were."""
        return cls(tuple(_family(config, shard) for shard in range(config.num_shards)), not config.keeps_idle)

    def with_shards(self, num_shards: int, first: int) -> "Plan":
        """
        The plan of a system to which whole shards were added: each is planned as one of the first, in their order.

        Args:
            num_shards (`int`): How many shards there are then.
            first (`int`): How many there were at first.
        """
        later = (self._given[shard % first] for shard in range(self.num_shards, num_shards))
        return Plan((*self._given, *later), self.by_sets)

    @classmethod
    def from_record(cls, record: Any, config: S3TConfig) -> "Plan":
        """
        The plan that `to_record` wrote down. Nothing is searched.

        Args:
            record (`list`): What was written.
            config ([`~hf_s3t.S3TConfig`]): The settings of its system.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If it is no plan of so many shards and slices.
        """
        num_shards, num_slices = config.num_shards, config.num_slices
        expected = f"expected one of {num_shards} shards and {num_slices} slices"
        if not isinstance(record, list) or len(record) != num_shards:
            found = f"{len(record)} shards" if isinstance(record, list) else repr(record)
            raise FolderError(f"The plan that is written down is of {found}, {expected}.")
        for shard, stages in enumerate(record):
            if not _is_tree(stages, num_slices):
                raise FolderError(f"The plan that is written down for shard {shard} is no tree of stages, {expected}.")
        families = tuple(tuple(tuple(stage["prefix"]) for stage in stages) for stages in record)
        return cls(families, by_sets=not config.keeps_idle)

    def to_record(self) -> list[list[dict[str, list[int]]]]:
        """
        The plan as it is written down: per shard its stages in training order, each with the set of its slices and
        their order. The first one of a set has the first of its orders. Idle stages that it was made of stay in it:
        they may be there, and settle which of equally deep stages serves.
        """
        return [[{"slices": sorted(prefix), "prefix": list(prefix)} for prefix in stages] for stages in self._given]

    @cached_property
    def sequences(self) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Per shard the stages on which no other is planned to stand, in order: of published plans, the sequences."""
        return tuple(map(_leaves, self.families))

    @cached_property
    def _ordered(self) -> tuple[StageKey, ...]:
        return tuple(StageKey(shard, prefix) for shard, family in enumerate(self.families) for prefix in family)

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

    @cached_property
    def _places(self) -> dict[StageKey, int]:
        keys = [StageKey(shard, prefix) for shard, stages in enumerate(self._given) for prefix in stages]
        return {key: place for place, key in enumerate(keys)}

    @cached_property
    def _places_of_sets(self) -> dict[tuple[int, frozenset[int]], int]:
        # Of two the first one: later ones are written first, and over.
        return {key.slices: place for key, place in reversed(self._places.items())}

    @property
    def num_shards(self) -> int:
        """Number of shards."""
        return len(self.families)

    def unnamed_slices(self, num_slices: int) -> list[tuple[int, int]]:
        """The (shard, slice) pairs, of so many slices a shard, that no planned stage sees, as listed sequences may."""
        named = [set().union(*family) for family in self.families]
        return [(shard, s) for shard, own in enumerate(named) for s in range(num_slices) if s not in own]

    def __contains__(self, key: StageKey) -> bool:
        return key in self._planned

    def rank(self, key: StageKey) -> tuple[int, bool, StageKey]:
        """
        The place of a stage in the one order by which ties between equally deep stages are settled.

        Planned stages as they are planned, idle ones too where they once were planned; a stage whose set is planned in
        another order only right behind that one; then all others, by shard and prefix.
        """
        place = self._places.get(key)
        of_set = self._places_of_sets.get(key.slices, len(self._places))
        return (of_set, True, key) if place is None else (place, False, key)

    def stages(self, empty: Collection[tuple[int, int]] = ()) -> list[StageKey]:
        """
        Every planned stage, parents before children, by its first prefix.

        Args:
            empty (collection of `(shard, slice)`): Slices that deletions have emptied; a sequence ends before one.
        """
        return [key for key in self._ordered if not key.saw(empty)] if empty else list(self._ordered)

    def missing(self, valid: Collection[StageKey], empty: Collection[tuple[int, int]] = ()) -> list[StageKey]:
        """
        The stages that `train()` has to make, in the plan's order, parents first.

        By sets, a set that no valid stage saw is grown by its first prefix if that one's parent is valid; else on the
        valid stage that `rank` puts first among those that saw all of it but one slice; else on what is missing too.

        Args:
            valid (collection of [`StageKey`]): The valid stages.
            empty (collection of `(shard, slice)`): Slices of which nothing is left: no set that has one is grown.
        """
        if not self.by_sets:
            return [key for key in self.stages(empty) if key not in valid]
        there: list[set[StageKey]] = [set() for _ in range(self.num_shards)]
        for key in valid:
            there[key.shard].add(key)
        return [key for shard, keys in enumerate(there) for key in self.missing_in(shard, keys, empty)]

    def missing_in(
        self, shard: int, valid: Collection[StageKey], empty: Collection[tuple[int, int]] = ()
    ) -> list[StageKey]:
        """What `missing` says of one shard of a plan by sets, whose valid stages are given."""
        first: dict[frozenset[int], StageKey] = {}
        for key in sorted(valid, key=self.rank):
            first.setdefault(frozenset(key.prefix), key)
        missing: dict[frozenset[int], StageKey] = {}
        for prefix in self.families[shard]:
            key, slices = StageKey(shard, prefix), frozenset(prefix)
            if slices in first or key.saw(empty):
                continue
            below = key.parent
            if below is not None and below not in valid:
                others = [first[rest] for rest in (slices - {slice_} for slice_ in slices) if rest in first]
                below = min(others, key=self.rank) if others else missing[frozenset(below.prefix)]
            stands_on = () if below is None else below.prefix
            missing[slices] = StageKey(shard, (*stands_on, *slices.difference(stands_on)))
        return list(missing.values())

    def sequence_of(self, key: StageKey) -> int:
        """The number of the first sequence of its shard that has the stage, or else its set; 0 if there is none."""
        stacks = self._stacks[key.shard]
        exact = [number for number, stack in enumerate(stacks) if key in stack]
        by_set = [number for number, stack in enumerate(stacks) if any(key.slices == other.slices for other in stack)]
        return (exact or by_set or [0])[0]

    def removed_by(self, hits: Collection[tuple[int, int]], stages: Iterable[StageKey]) -> list[StageKey]:
        """Those of `stages` that a deletion in the (shard, slice) pairs removes (Algorithm 4)."""
        return [key for key in stages if key.saw(hits)]

    def depths(self, valid: Collection[StageKey]) -> list[list[int]]:
        """Per shard and sequence, the length of the longest prefix whose stages, or sets, are all there."""
        if not self.by_sets:
            return [[_valid_depth(stack, valid) for stack in stacks] for stacks in self._stacks]
        sets = {key.slices for key in valid}
        stacks_of_sets = [[[key.slices for key in stack] for stack in stacks] for stacks in self._stacks]
        return [[_valid_depth(stack, sets) for stack in stacks] for stacks in stacks_of_sets]

    def sets(
        self, valid: Collection[StageKey], empty: Collection[tuple[int, int]] = ()
    ) -> list[list[tuple[int, int]]]:
        """
        Per shard and number of slices, of how many sets of so many slices valid stages saw, and how many are planned.

        Args:
            valid (collection of [`StageKey`]): The valid stages.
            empty (collection of `(shard, slice)`): Slices of which nothing is left: no set that has one counts.
        """
        there = {key.slices for key in valid}
        counts: list[list[tuple[int, int]]] = []
        for shard, family in enumerate(self.families):
            planned = {key.slices for key in (StageKey(shard, prefix) for prefix in family) if not key.saw(empty)}
            sizes = range(1, max(map(len, family)) + 1)
            by_size = [[own for own in planned if len(own[1]) == size] for size in sizes]
            counts.append([(sum(own in there for own in owns), len(owns)) for owns in by_size])
        return counts

    def served(
        self,
        valid: Collection[StageKey],
        select: str = "longest",
        losses: Mapping[StageKey, float] | None = None,
        behind: Collection[StageKey] = (),
    ) -> tuple[tuple[StageKey, ...], ...]:
        """
        Which stacks answer, as a pure function of the valid stages, planned or not.

        Args:
            valid (collection of [`StageKey`]): The valid stages.
            select (`str`, defaults to `"longest"`):
                `"longest"`: per shard the deepest valid stage. `"metric"`: the valid stage with the lowest recorded
                loss (section B.3 of the paper); those without one come last, and the deepest of equals is taken.
                `"all"`: the longest valid prefix of every sequence (Figure 16), and valid stages beyond them on which
                no other stands. Ties are settled by `rank`.
            losses (mapping from [`StageKey`] to `float`, *optional*): Recorded evaluation losses, for `"metric"`.
            behind (collection of [`StageKey`], *optional*):
                Valid stages that lack rows which came to their slices since: of equally deep ones the others serve.

        Returns:
            `tuple[tuple[StageKey, ...], ...]`: Per shard the last stages of the stacks that serve; empty if none is
            left.
        """
        there = frozenset(valid)
        of_shards: list[list[StageKey]] = [[] for _ in range(self.num_shards)]
        for key in there:
            of_shards[key.shard].append(key)
        if select == "longest":
            return tuple(self._deepest(keys, there, behind) for keys in of_shards)
        whole = [[key for key in keys if there.issuperset(key.lineage)] for keys in of_shards]
        return tuple(self._served_of(shard, keys, select, losses or {}) for shard, keys in enumerate(whole))

    def _deepest(
        self, keys: Sequence[StageKey], valid: frozenset[StageKey], behind: Collection[StageKey]
    ) -> tuple[StageKey, ...]:
        by_depth: dict[int, list[StageKey]] = {}
        for key in keys:
            by_depth.setdefault(len(key.prefix), []).append(key)
        for depth in sorted(by_depth, reverse=True):
            # Nothing serves whose stack has a gap.
            whole = [key for key in by_depth[depth] if valid.issuperset(key.lineage)]
            if whole:
                return (min(whole, key=lambda key: (key in behind, self.rank(key))),)
        return ()

    def _served_of(
        self, shard: int, valid: Sequence[StageKey], select: str, losses: Mapping[StageKey, float]
    ) -> tuple[StageKey, ...]:
        if not valid:
            return ()
        if select == "all":
            return self._tips(shard, set(valid))
        return (min(valid, key=lambda key: (_rank(losses.get(key)), -key.depth, self.rank(key))),)

    def _tips(self, shard: int, valid: Collection[StageKey]) -> tuple[StageKey, ...]:
        planned = [stack[:depth] for stack in self._stacks[shard] if (depth := _valid_depth(stack, valid))]
        seen = {key for stack in planned for key in stack}
        parents = {key.parent for key in valid}
        others = sorted(key for key in valid if key not in seen and key not in parents)
        return tuple(dict.fromkeys([*(stack[-1] for stack in planned), *others]))

    def first_slices_alive(self, valid: Collection[StageKey]) -> list[set[int]]:
        """Per shard, the slices of valid first stages: what keeps the shard alive."""
        alive: list[set[int]] = [set() for _ in range(self.num_shards)]
        for key in valid:
            if key.depth == 1:
                alive[key.shard].update(key.prefix)
        return alive


def _family(config: S3TConfig, shard: int) -> tuple[tuple[int, ...], ...]:
    """The stages that a config asks for in one shard."""
    explicit, prior = config.explicit_sequences_of(shard), config.prior_of(shard)
    if explicit is not None:
        return stages_of([tuple(sequence) for sequence in explicit])
    size, rule, work = config.num_slices, config.sequence_selection, config.work_budget
    if rule is None and work is None and config.budget is None and not config.keeps_idle:
        # Up to five slices the lattice costs no more than the rotations, and nothing serves deeper.
        if size <= _LATTICE_FOR_NO_MORE:
            rule = LATTICE
        elif size <= FAMILY_MOST_SLICES:
            work = work_of(stages_of(select_sequences(size, size)), size, config.replay)
    if rule == LATTICE:
        return lattice(size)
    if work is not None:
        return best_family(size, work, prior, config.score_horizon, config.replay)
    budget = config.budget or size
    method = str(rule or "cyclic")
    return stages_of(select_sequences(size, budget, method, prior, config.score_horizon, config.seed))


def _leaves(family: Sequence[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    parents = {prefix[:-1] for prefix in family}
    return tuple(prefix for prefix in family if prefix not in parents)


def _is_tree(stages: Any, num_slices: int) -> bool:
    """Whether stages that are written down are a tree, parents before children."""
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
    return len(seen) > 1


def _rank(loss: float | None) -> float:
    # A training that diverged records NaN, which compares with nothing.
    return float("inf") if loss is None or loss != loss else loss


def _valid_depth(stack: Sequence[_T], valid: Collection[_T]) -> int:
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
