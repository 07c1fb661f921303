"""Which stage is handed out next: the worthiest that nobody trains and whose parent is there."""

import heapq
from collections import defaultdict
from collections.abc import Collection, Iterable

from .stages import StageKey


class Schedule:
    """
    The stages that are to be made, each handed out once, when what it stands on has arrived.

    Args:
        missing (iterable of [`~hf_s3t.plan.stages.StageKey`]): What is to be made, the worthiest first.
        there (collection of [`~hf_s3t.plan.stages.StageKey`]): The valid stages.
        taken (collection of [`~hf_s3t.plan.stages.StageKey`], *optional*):
            What is trained now, and counts as handed out.

    Example:

    ```python
    >>> from hf_s3t.plan.schedule import Schedule
    >>> from hf_s3t.plan import StageKey

    >>> first, second = StageKey(0, (0,)), StageKey(0, (0, 1))
    >>> schedule = Schedule([first, second], [])
    >>> schedule.take(), schedule.take()
    (StageKey(shard=0, prefix=(0,)), None)
    >>> schedule.has_arrived(first)
    >>> schedule.take()
    StageKey(shard=0, prefix=(0, 1))
    ```
    """

    def __init__(self, missing: Iterable[StageKey], there: Collection[StageKey], taken: Collection[StageKey] = ()):
        self._taken = set(taken)
        self._ranks = {key: rank for rank, key in enumerate([*sorted(taken), *missing])}
        self._ready: list[tuple[int, StageKey]] = []
        # What waits for a stage to arrive.
        self._waiting: dict[StageKey, list[StageKey]] = defaultdict(list)
        there = frozenset(there)
        for key in self._ranks:
            if key in self._taken:
                continue
            if key.parent is None or key.parent in there:
                self._have_ready(key)
            else:
                self._waiting[key.parent].append(key)

    @property
    def stages(self) -> list[StageKey]:
        """All that was to be made when this was drawn up."""
        return list(self._ranks)

    def take(self) -> StageKey | None:
        """The stage to train next; `None` if none can be begun before another arrives, or none is left."""
        if not self._ready:
            return None
        _, key = heapq.heappop(self._ready)
        self._taken.add(key)
        return key

    def has_arrived(self, key: StageKey) -> None:
        """A stage is there: what stands on it can be begun."""
        for child in self._waiting.pop(key, ()):
            self._have_ready(child)

    def give_back(self, key: StageKey) -> None:
        """A stage that was taken was not trained, and is handed out again; of one that was not, nothing is known."""
        if key in self._taken:
            self._taken.remove(key)
            self._have_ready(key)

    def _have_ready(self, key: StageKey) -> None:
        heapq.heappush(self._ready, (self._ranks[key], key))
