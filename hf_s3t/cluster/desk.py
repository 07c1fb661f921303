"""What the driver knows of the system: what is missing and what it costs; and where stages from afar are written."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from tqdm.auto import tqdm

from ..errors import ClusterError, counted
from ..folder.system import SystemFolder
from ..plan.schedule import Schedule
from ..plan.stages import StageKey, relative_cost
from ..records.validity import is_current
from .driving import Outcome
from .parcels import accept_stage


# How long a stage that was written on another machine may take to be seen here, in seconds.
_A_WHILE = 30.0
_A_MOMENT = 0.2
# As many stages are named beside the bar.
_SHOWN = 3


class FolderDesk:
    """
    The driver's view of a system's folder.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        is_shared (`bool`): Whether workers write their stages themselves.
        empty (callable): Tells the `(shard, slice)` of which nothing is left to train on: what truncation leaves of
            the rows, workers know.
    """

    def __init__(
        self, folder: SystemFolder, is_shared: bool, empty: Callable[[], Collection[tuple[int, int]]]
    ) -> None:
        self.folder = folder
        self._is_shared = is_shared
        self._empty = empty
        self._lines = len(folder.ledger.lines)
        # What a stage that was handed out is trained on.
        self._slices: dict[StageKey, list[str]] = {}
        self._valid: frozenset[StageKey] = frozenset()

    def has_news(self) -> bool:
        """Whether something was deleted since, or stages came that others trained."""
        self.folder.refresh_ledger()
        before, self._lines = self._lines, len(self.folder.ledger.lines)
        return self._lines != before

    def plan(self, under_way: Collection[StageKey]) -> Schedule:
        """What is to be made beside the stages that are trained now, but for those that a deletion has condemned."""
        # Of the ledger only what `has_news` has read, and workers were told.
        folder = self.folder
        folder.refresh_stages()
        valid, current = folder.valid_stages, folder.current_stages
        good = {key for key in under_way if is_current({"slices": self._slices[key]}, folder.slice_digests(key))}
        steps = folder.growth.missing(current | good, self._empty(), valid - current - good)
        return Schedule([step.key for step in steps], current, good)

    def begin(self, key: StageKey) -> None:
        """Note what a stage is trained on that is handed out."""
        self._slices[key] = self.folder.slice_digests(key)

    def accept(self, outcome: Outcome) -> bool:
        """Have a stage that was trained be in the folder; whether it is, and valid."""
        result, key = outcome.result or {}, outcome.key
        if not result.get("is_kept"):
            return False
        if not self._is_shared:
            return accept_stage(self.folder, key, result["files"])
        until = time.monotonic() + _A_WHILE
        while True:
            self.folder.refresh_ledger()
            self.folder.refresh_stages()
            if key in self.folder.current_stages:
                return True
            if not is_current({"slices": self._slices[key]}, self.folder.slice_digests(key)):
                return False
            if time.monotonic() > until:
                raise ClusterError(
                    f"{outcome.worker} wrote {key}, and {self.folder.path} does not have it after {_A_WHILE:g} s: it "
                    "is another folder there than here. Mount one folder on every machine, or give "
                    "`shared_folder=False`."
                )
            time.sleep(_A_MOMENT)

    def cost(self, key: StageKey) -> float:
        """What training a stage costs, as the bar counts it."""
        folder, layers = self.folder, self.folder.record["layers"]
        sizes = [folder.table.size(key.shard, slice_) for slice_ in key.prefix]
        lowest = min(layers["groups"][key.group])
        return relative_cost(key, folder.config.examples_per_epoch(sizes), layers["num_layers"], lowest)

    def show(self, under_way: Iterable[StageKey]) -> None:
        """Nothing: see [`ShownDesk`]."""


class ShownDesk(FolderDesk):
    """
    A desk with one bar over all workers.

    Args:
        folder, is_shared, empty: As of [`FolderDesk`].
        shares (callable): Tells of the stages that are trained what share of each is done.
        is_shown (`bool`): Whether there is a bar.
    """

    def __init__(
        self,
        folder: SystemFolder,
        is_shared: bool,
        empty: Callable[[], Collection[tuple[int, int]]],
        shares: Callable[[], Mapping[StageKey, float]],
        is_shown: bool,
    ) -> None:
        super().__init__(folder, is_shared, empty)
        self._shares = shares
        self._is_shown = is_shown
        self._bar: Any = None
        self._done = 0.0
        self._stages = 0

    def plan(self, under_way: Collection[StageKey]) -> Schedule:
        """As of [`FolderDesk`]; what is missing is how long the bar is."""
        schedule = super().plan(under_way)
        if self._is_shown and self._bar is None and schedule.stages:
            self._bar = tqdm(
                total=1.0,
                desc="S3T",
                dynamic_ncols=True,
                bar_format="{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}",
            )
        if self._bar is not None:
            left = sum(map(self.cost, schedule.stages))
            self._bar.total = max(self._done + left, self._bar.n)
        self._stages = len(schedule.stages)
        return schedule

    def accept(self, outcome: Outcome) -> bool:
        """As of [`FolderDesk`]; the bar moves."""
        is_there = super().accept(outcome)
        if is_there:
            self._done += self.cost(outcome.key)
            self._stages -= 1
        return is_there

    def show(self, under_way: Iterable[StageKey]) -> None:
        """Move the bar, and name the stages that are trained."""
        if self._bar is None:
            return
        keys, shares = sorted(under_way), self._shares()
        done = self._done + sum(self.cost(key) * shares.get(key, 0.0) for key in keys)
        names = ", ".join(map(str, keys[:_SHOWN])) + (f" and {len(keys) - _SHOWN} more" if len(keys) > _SHOWN else "")
        left = f"{counted(self._stages, 'stage')} left"
        self._bar.set_postfix_str(f"{left}: {names}" if names else left, refresh=False)
        self._bar.update(max(min(done, self._bar.total) - self._bar.n, 0.0))

    def close(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.close()
