"""What is to be grown next: which stages are missing, and what each of them is worth."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..config import S3TConfig
from ..sequences.worth import Worth, outlook_of
from .stages import Plan, StageKey


@dataclass(frozen=True)
class Step:
    """
    A stage to grow, and what it brings by itself: nothing where it is grown for one that shall stand on it.

    Args:
        key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
        work (`float`): What training it costs, in full LoRA fine-tunings of all the data.
        depth (`float`): What it adds to the mean depth over shards that serves now, where the deepest stage serves.
        expected_depth (`float`): What it adds to the mean depth over the next requests, as `expected_depth` counts it.
    """

    key: StageKey
    work: float
    depth: float
    expected_depth: float


class Growth:
    """
    The growth of a system: what its plan still lacks, in the order of its worth.

    What is missing, and on which stages it would stand, says `Plan.missing`. What lifts the depth that serves now
    comes first, the most depth for the work; then what lifts the depth that is expected, again for the work; of equals
    the first of the plan. A published plan is grown as it is planned.

    Args:
        plan ([`~hf_s3t.plan.stages.Plan`]): What shall be there.
        config ([`~hf_s3t.S3TConfig`]): By whose prior, horizon and replay stages are weighed.

    Example:

    ```python
    >>> from hf_s3t import S3TConfig
    >>> from hf_s3t.plan import Growth, Plan, StageKey

    >>> config = S3TConfig(num_slices=3)
    >>> plan = Plan.from_config(config)
    >>> valid = [key for key in plan.stages() if not key.saw({(0, 1)})]
    >>> Growth(plan, config).next(valid).key
    StageKey(shard=0, prefix=(0, 2, 1))
    ```
    """

    def __init__(self, plan: Plan, config: S3TConfig):
        self._plan = plan
        self._outlooks = [outlook_of(config, shard) for shard in range(config.num_shards)]
        self._soon = [outlook_of(config, shard, config.num_slices) for shard in range(config.num_shards)]
        # Per shard what was found last, and of which valid stages and empty slices.
        self._known: dict[int, tuple[Any, _Found | None]] = {}

    def expected_depth(self, valid: Collection[StageKey]) -> float:
        """
        The mean depth over shards that valid stages serve over the next requests, if none is grown again: over as many
        that hit each shard as it has slices. After those of the horizon, by which stages are weighed, little is left.
        """
        depths = [
            outlook.expected_depth([key.prefix for key in valid if key.shard == shard])
            for shard, outlook in enumerate(self._soon)
        ]
        return sum(depths) / len(depths)

    def work(self, stages: Collection[StageKey]) -> float:
        """What training stages costs together, in full LoRA fine-tunings of all the data."""
        return sum(self._outlooks[key.shard].work(key.depth) for key in stages) / len(self._outlooks)

    def next(
        self,
        valid: Collection[StageKey],
        empty: Collection[tuple[int, int]] = (),
        behind: Collection[StageKey] = (),
    ) -> Step | None:
        """
        The stage to grow next; `None` if nothing is missing.

        Args:
            valid (collection of [`~hf_s3t.plan.stages.StageKey`]): The valid stages.
            empty (collection of `(shard, slice)`): Slices of which nothing is left: no set with one is grown.
            behind (collection of [`~hf_s3t.plan.stages.StageKey`], *optional*):
                Stages that serve though rows came to their slices since, and so are missing. One that is grown again
                takes the place of the old one, on which others may stand that serve: what lowers no depth comes first.
        """
        return next(self.steps(valid, empty, behind), None)

    def missing(
        self,
        valid: Collection[StageKey],
        empty: Collection[tuple[int, int]] = (),
        behind: Collection[StageKey] = (),
    ) -> list[Step]:
        """All that is to be grown, in its order, if nothing is deleted meanwhile. Arguments as of `next`."""
        return list(self.steps(valid, empty, behind))

    def steps(
        self,
        valid: Collection[StageKey],
        empty: Collection[tuple[int, int]] = (),
        behind: Collection[StageKey] = (),
    ) -> Iterator[Step]:
        """What `missing` lists, one after the other. Arguments as of `next`."""
        old: list[set[StageKey]] = [set() for _ in self._outlooks]
        for key in frozenset(behind).difference(valid):
            old[key.shard].add(key)
        there: list[set[StageKey]] = [set() for _ in self._outlooks]
        for key in valid:
            there[key.shard].add(key)
        if not self._plan.by_sets:
            yield from self._as_planned(there, empty, old)
            return
        found = [self._first(shard, there[shard], empty, old[shard]) for shard in range(len(there))]
        while any(found):
            # The first of equals.
            best = max((step for step in found if step is not None), key=lambda step: step.worth.order)
            yield self._step(best)
            shard = best.key.shard
            there[shard].add(best.key)
            old[shard] = _left_by(best.key, old[shard])
            found[shard] = self._first(shard, there[shard], empty, old[shard])

    def order(
        self,
        valid: Collection[StageKey],
        empty: Collection[tuple[int, int]] = (),
        behind: Collection[StageKey] = (),
    ) -> "Order":
        """The order of `missing`, for several who grow it together. Arguments as of `next`."""
        by_sets = self._plan.by_sets
        if by_sets or behind:
            return Order(valid, (step.key for step in self.steps(valid, empty, behind)), by_sets)
        return Order(valid, self._plan.missing(valid, empty), False)

    def _as_planned(
        self, there: list[set[StageKey]], empty: Collection[tuple[int, int]], old: list[set[StageKey]]
    ) -> Iterator[Step]:
        missing = [key for key in self._plan.stages(empty) if key not in there[key.shard]]
        while missing:
            ready = (key for key in missing if key.parent is None or key.parent in there[key.shard])
            # Where nothing is replaced, nothing is lowered.
            free = (key for key in ready if not any(old) or not _lowers(key, there[key.shard], old[key.shard]))
            key = next(free, missing[0])
            (alone,) = self._soon[key.shard].worths([key.prefix], _prefixes(there[key.shard]))
            yield self._step(_Found(key, alone, alone))
            there[key.shard].add(key)
            old[key.shard] = _left_by(key, old[key.shard])
            missing.remove(key)

    def _first(
        self, shard: int, there: Collection[StageKey], empty: Collection[tuple[int, int]], old: Collection[StageKey]
    ) -> "_Found | None":
        """The stage of a shard to grow first; remembered, as it is asked for again when another shard has grown."""
        state = frozenset(there), frozenset(empty), frozenset(old)
        # Another thread may ask of other stages meanwhile.
        known = self._known.get(shard)
        if known is None or known[0] != state:
            missing_keys = self._plan.missing_in(shard, *state[:2])
            keys = _that_lower_nothing(missing_keys, state[0], state[2]) if old else missing_keys
            missing, outlook = _prefixes(keys), self._outlooks[shard]
            first = outlook.first(missing, _prefixes(there))
            found = None
            if first is not None:
                prefix, worth = first
                (alone,) = self._soon[shard].worths([prefix], _prefixes(there))
                found = _Found(StageKey(shard, prefix), worth, alone)
            known = self._known[shard] = state, found
        return known[1]

    def _step(self, found: "_Found") -> Step:
        shards = len(self._outlooks)
        return Step(found.key, self.work([found.key]), found.alone.now / shards, found.alone.later / shards)


def _left_by(key: StageKey, old: Iterable[StageKey]) -> set[StageKey]:
    """What is left of old stages when one is grown anew: not the one of its name, nor what stands on that."""
    return {one for one in old if one.prefix[: key.depth] != key.prefix}


def _lowers(key: StageKey, there: Collection[StageKey], old: Collection[StageKey]) -> bool:
    """Whether growing a stage anew lowers the depth that its shard serves until more is grown."""
    if key not in old:
        return False
    before = max(one.depth for one in (*there, *old))
    return max(one.depth for one in (key, *there, *_left_by(key, old))) < before


def _that_lower_nothing(
    keys: Sequence[StageKey], there: Collection[StageKey], old: Collection[StageKey]
) -> Sequence[StageKey]:
    """Those of missing stages by which no depth is lowered, and that stand on none that does; all, if none is left."""
    lowering = {key for key in keys if _lowers(key, there, old)}
    free = [key for key in keys if lowering.isdisjoint(key.lineage)]
    return free or keys


class Order:
    """
    What several who grow a system together take next: what one alone would come to, in its order, but for what others
    have in hand, and what stands on it.

    From which stages one alone began decides, in a plan by sets, in which order of its slices a set is grown. So all
    have to go by the order from the same ones, and what they grow together is what one would have grown.

    Args:
        there (collection of [`~hf_s3t.plan.stages.StageKey`]): The stages from which it begins.
        missing (iterable of [`~hf_s3t.plan.stages.StageKey`]): What one alone would grow, one after the other; looked
            at as far as is needed.
        by_sets (`bool`): Whether a stage counts by its set of slices.
    """

    def __init__(self, there: Collection[StageKey], missing: Iterable[StageKey], by_sets: bool):
        self._missing, self._by_sets = iter(missing), by_sets
        self._ids: dict[StageKey, Any] = {}
        self._there = {self._id(key) for key in there}
        self._known: list[tuple[StageKey, Any, StageKey | None]] = []

    def next(self, valid: Collection[StageKey], claimed: Collection[StageKey] = ()) -> StageKey | None:
        """
        The stage to take now; `None` if there is none that nobody has and whose parent is there.

        Args:
            valid (collection of [`~hf_s3t.plan.stages.StageKey`]): The valid stages.
            claimed (collection of [`~hf_s3t.plan.stages.StageKey`]): Those that others train.
        """
        done = {self._id(key) for key in (*valid, *claimed)}
        # Asked by many, for each stage: of a thousand stages nothing is worked out twice.
        return next((key for key, own, below in self if own not in done and (below is None or below in valid)), None)

    def begins_with(self, valid: Collection[StageKey]) -> bool:
        """Whether what was grown since is its beginning: an order that is begun now goes on as this one."""
        grown = {self._id(key) for key in valid} - self._there
        return all(own in grown for _, own, _ in itertools.islice(self, len(grown)))

    def __iter__(self) -> Iterator[tuple[StageKey, Any, StageKey | None]]:
        """Each stage, what it counts by, and the one below it."""
        for number in itertools.count():
            if number == len(self._known):
                key = next(self._missing, None)
                if key is None:
                    return
                self._known.append((key, self._id(key), key.parent))
            yield self._known[number]

    def _id(self, key: StageKey) -> Any:
        if not self._by_sets:
            return key
        if key not in self._ids:
            self._ids[key] = key.slices
        return self._ids[key]


class _Found(NamedTuple):
    key: StageKey
    # With what it is grown for, over the horizon; and by itself, soon.
    worth: Worth
    alone: Worth


def _prefixes(keys: Iterable[StageKey]) -> list[tuple[int, ...]]:
    return [key.prefix for key in keys]
