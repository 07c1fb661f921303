"""In what order a shard's family is grown, as `plan.growth` has it, over bit masks: for long simulations."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..checks import check_prior, require_horizon, require_int
from ..sequences.families import family_of, stage_work, stages_of
from ..sequences.worth import Outlook, patterns


class Next(NamedTuple):
    """
    The stage of a shard that is grown next.

    Args:
        order (`tuple[float, float]`): What is worthier compares greater, between shards too.
        place (`int`): Which of the family's stages it is.
    """

    order: tuple[float, float]
    place: int


class Growing:
    """
    A family of stages, of which some are there.

    A state is a whole number: bit `i` says whether stage `i` is there, of those in `stages`. Of a state all is found
    once, as states come again; decisions are those of [`~hf_s3t.plan.growth.Growth`].

    Args:
        family (sequence of prefixes):
            The stages; published ones in the order in which they are planned, parents before children. By sets they
            are ordered here, by their worth, as [`~hf_s3t.plan.stages.Plan`] orders those of a new system.
        num_slices (`int`): Number of slices `L`.
        by_sets (`bool`, defaults to `True`): Whether a stage counts by its set, as in plans without idle stages.
        prior (sequence of `float`, *optional*): Probability of each slice to be hit; uniform if not given.
        horizon (`int`, defaults to 100): Number of requests over which the depth is averaged that stages are worth.
        replay (`float`, defaults to 1.0): Share of the earlier slices' rows in an epoch.

    Example:

    ```python
    >>> from hf_s3t.analysis.growing import Growing

    >>> growing = Growing([(0,), (1,), (0, 1)], 2)
    >>> left = growing.without(growing.all, 0)
    >>> growing.depth(left), growing.stages[growing.next(left).place]
    (1, (0, 1))
    ```
    """

    def __init__(
        self,
        family: Sequence[tuple[int, ...]],
        num_slices: int,
        *,
        by_sets: bool = True,
        prior: Sequence[float] | None = None,
        horizon: int = 100,
        replay: float = 1.0,
    ):
        require_int("num_slices", num_slices, 1)
        require_horizon("horizon", horizon)
        if prior is not None:
            check_prior(prior, num_slices)
        self.stages = stages_of(family)
        self.by_sets = by_sets
        if by_sets:
            # As `Plan.from_config` has it: of equals the first of the plan is grown.
            outlook = Outlook(num_slices, None if prior is None else tuple(prior), horizon, replay)
            self.stages = outlook.order(family_of(family))
        self.all = (1 << len(self.stages)) - 1
        sets = [sum(1 << s for s in prefix) for prefix in self.stages]
        self._hit_by = [_bits(set_ >> s & 1 for set_ in sets) for s in range(num_slices)]
        self._of_depth = [_bits(len(p) == depth for p in self.stages) for depth in range(1, num_slices + 1)]
        self._next: dict[int, Next | None] = {}
        self._depth: dict[int, int] = {}
        self._until: dict[tuple[int, int], tuple[int, ...]] = {}
        if by_sets:
            uniform = (1 / num_slices,) * num_slices
            hits, self._weights, self._total = patterns(uniform if prior is None else tuple(prior), horizon)
            self._look_up(hits, sets, [stage_work(depth, num_slices, replay) for depth in range(1, num_slices + 1)])

    def _look_up(self, hits: np.ndarray, sets: list[int], works: list[float]) -> None:
        """What decisions need: per stage its size, work and depth by slices hit, and on which others it can stand."""
        count, places = len(sets), {set_: place for place, set_ in enumerate(sets)}
        self._sizes = np.array(list(map(len, self.stages)))
        self._works = np.array([works[size - 1] for size in self._sizes])
        self._depths = np.array([np.where(hits[:, p].any(axis=1), 0, len(p)) for p in self.stages], dtype=np.int8)
        # Row `count` is of no stage: what the first stages stand on.
        self._parents = np.array([places.get(sum(1 << s for s in p[:-1]), count) for p in self.stages])
        self._below = np.full((count, len(self._of_depth)), count)
        for place, prefix in enumerate(self.stages):
            others = [places[set_] for s in prefix if (set_ := sets[place] ^ 1 << s) in places]
            self._below[place, : len(others)] = others
        self._levels = [np.flatnonzero(self._sizes == size) for size in np.unique(self._sizes)]

    def without(self, state: int, slice_: int) -> int:
        """What is left of a state when an example of a slice is forgotten."""
        return state & ~self._hit_by[slice_]

    def depth(self, state: int) -> int:
        """The depth that serves."""
        if state not in self._depth:
            of_depth = enumerate(self._of_depth, start=1)
            self._depth[state] = max((depth for depth, stages in of_depth if state & stages), default=0)
        return self._depth[state]

    def until(self, state: int, depth: int) -> tuple[int, ...]:
        """The stages that are grown one after the other until a depth serves."""
        if (state, depth) not in self._until:
            places = list[int]()
            reached = state
            while self.depth(reached) < depth and (step := self.next(reached)) is not None:
                places.append(step.place)
                reached |= 1 << step.place
            self._until[state, depth] = tuple(places)
        return self._until[state, depth]

    def next(self, state: int) -> Next | None:
        """The stage that is grown next; `None` if all are there."""
        if state == self.all:
            return None
        if state not in self._next:
            self._next[state] = self._worthiest(state) if self.by_sets else self._first(state)
        return self._next[state]

    def _first(self, state: int) -> Next:
        """Published plans are grown as they are planned."""
        missing = self.all & ~state
        return Next((0.0, 0.0), (missing & -missing).bit_length() - 1)

    def _worthiest(self, state: int) -> Next:
        count = len(self.stages)
        there = np.zeros(count + 1, dtype=bool)
        there[:count] = np.unpackbits(
            np.frombuffer(state.to_bytes((count + 7) // 8, "little"), np.uint8), count=count, bitorder="little"
        )
        served = self._depths[there[:count]].max(axis=0, initial=0)
        # On a valid stage, or on what is missing too; the last row is what is there.
        stands = there[self._below].any(axis=1) | (self._parents == count)
        below = np.where(stands, count, self._parents)
        after, work = np.empty((count + 1, len(served)), dtype=np.int8), np.zeros(count + 1)
        after[count] = served
        for level in self._levels:
            after[level] = np.maximum(after[below[level]], self._depths[level])
            work[level] = work[below[level]] + self._works[level]
        missing = np.flatnonzero(~there[:count])
        now = np.maximum(self._sizes[missing] - self.depth(state), 0) / work[missing]
        later = (after[missing] - served) @ self._weights / self._total / work[missing]
        # The first of equals.
        best = np.lexsort((-later, -now))[0]
        place = int(missing[best])
        order = float(now[best]), float(later[best])
        while not stands[place]:
            place = int(self._parents[place])
        return Next(order, place)


def _bits(flags: Iterable[int]) -> int:
    return sum(1 << place for place, flag in enumerate(flags) if flag)
