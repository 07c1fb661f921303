"""How trainers share what a system lacks: who takes which stage next, and what one that finds none waits for."""

import contextlib
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import FolderError
from ..plan.growth import Order
from ..plan.stages import StageKey
from .claims import LEASE, Claim, ClaimWatch, HeldClaim
from .files import digested_json, read_checked_json, stamp, write_atomically
from .layout import CLAIMS, LEDGER_FILE, ORDER_FILE
from .system import SystemFolder


# Seconds between two looks at the folder: at first, and at most.
_FIRST_LOOK, _LAST_LOOK = 0.05, 1.0


class Taken(NamedTuple):
    """
    What came of asking for a stage.

    Args:
        claim ([`~hf_s3t.folder.claims.HeldClaim`], *optional*): The claim of the stage to train.
        over (`list[Claim]`): Claims of trainers that had ended, whose stages are free again.
        others (`list[Claim]`): Claims for whose end, or whose stage, it is worth waiting, where there is no stage.
    """

    claim: HeldClaim | None
    over: list[Claim]
    others: list[Claim]


class SharedGrowth:
    """
    One trainer's share in the growth of a system.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        lease (`float`): Seconds without a sign of life after which others take its stage.
    """

    def __init__(self, folder: SystemFolder, lease: float = LEASE):
        self._folder = folder
        self._lease = lease
        self._watch = ClaimWatch(folder.claims)
        self._compared: set[str] = set()
        self._then: Any = None
        self._found_over: list[Claim] = []
        self._looked = -math.inf
        # The order that is gone by, and what it was made of.
        self._order: tuple[Any, Order] | None = None

    def take(
        self,
        choose: Callable[[frozenset[StageKey], frozenset[StageKey]], StageKey | None],
        work: Callable[[StageKey], Mapping[str, Any]],
        compare: Callable[[Claim], None],
    ) -> Taken:
        """
        Claim the stage to train next.

        Args:
            choose (callable): From the stages that are there, and those that are behind, to the one to take; see
                `first`.
            work (callable): From it to what its claim says of how it is trained.
            compare (callable): Called with each claim of another trainer once; may raise.

        Returns:
            [`Taken`]: The claim, or who has what is left.
        """
        # Before anything is looked at: what changes meanwhile is not waited for.
        self._then = self._signs()
        folder, over = self._folder, self._over()
        current, behind = _current_and_behind(folder)
        is_stale = bool(folder.claims.stale(folder.slice_digests, _is_there(folder, current)))
        if not over and not is_stale and choose(current, behind) is None:
            # Nobody has to wait for the lock because of that.
            return Taken(None, [], self._others())
        with folder.lock():
            folder.refresh_ledger()
            folder.refresh_stages()
            current, behind = _current_and_behind(folder)
            over = [claim for claim in over if folder.claims.end(claim)]
            folder.claims.end_stale(folder.slice_digests, _is_there(folder, current))
            self._compare_new(compare)
            key = choose(current, behind)
            claim = None if key is None else folder.claims.take(key, work(key), self._lease)
            if claim is not None:
                self._compared.add(claim.token)
                self._keep_order()
        return Taken(claim, over, [] if claim is not None else self._others())

    def first(
        self,
        current: frozenset[StageKey],
        empty: Collection[tuple[int, int]],
        behind: Collection[StageKey] = (),
    ) -> StageKey | None:
        """
        The worthiest stage that is missing, that nobody has, and whose parent is there; `None` if there is none.

        Args:
            current (`frozenset[StageKey]`): The stages that are there, but for those that are behind.
            empty (collection of `(shard, slice)`): Slices of which nothing is left.
            behind (collection of [`~hf_s3t.plan.stages.StageKey`], *optional*):
                Stages that serve though rows came to their slices since, and so are missing.
        """
        claimed = self._folder.claims.keys()
        key = self._order_from(current, empty, behind).next(current, claimed)
        if key is None and not claimed and self._folder.growth.next(current, empty, behind) is not None:
            # What was grown otherwise meanwhile, in another order of its slices, say, has to be begun from.
            self._order = self._begun(current, empty, behind)
            key = self._order[1].next(current)
        return key

    def wait(self, seconds: float) -> None:
        """
        Return when something has changed among stages, deletions or claims since `take` was called, at the latest
        after so many seconds.
        """
        pause, end = _FIRST_LOOK, time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0 and self._signs() == self._then:
            self._found_over = self._watch.dead()
            if self._found_over:
                return
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, _LAST_LOOK)

    def tidy(self) -> None:
        """Remove what trainers that ended left among the claims."""
        folder = self._folder
        if not (folder.path / CLAIMS).exists():
            return
        over = self._watch.dead()
        with contextlib.suppress(FolderError), folder.lock():
            folder.refresh_ledger()
            folder.refresh_stages()
            end_claims(folder, over)
            is_of_use = self._order is not None and not self._order[1].begins_with(folder.current_stages)
            if not is_of_use and not folder.claims.keys():
                self._order_file.unlink(missing_ok=True)
            folder.claims.tidy()

    def _compare_new(self, compare: Callable[[Claim], None]) -> None:
        for claim in self._folder.claims.standing():
            if claim.token not in self._compared:
                compare(claim)
                self._compared.add(claim.token)

    def _others(self) -> list[Claim]:
        """Who trains something; who asks does not wait for itself."""
        return [claim for claim in self._folder.claims.standing() if not claim.is_of_this_thread]

    def _over(self) -> list[Claim]:
        """Claims of trainers that have ended. Between short stages not all claims are read each time."""
        found, self._found_over = self._found_over, []
        now = time.monotonic()
        if not found and now - self._looked >= _LAST_LOOK:
            self._looked = now
            found = self._watch.dead()
        return found

    def _signs(self) -> Any:
        folder = self._folder
        return folder.stages_stamp(), stamp(folder.path / LEDGER_FILE), folder.claims.names()

    # In which order

    @property
    def _order_file(self) -> Path:
        return self._folder.path / CLAIMS / ORDER_FILE

    def _order_from(
        self, current: frozenset[StageKey], empty: Collection[tuple[int, int]], behind: Collection[StageKey]
    ) -> Order:
        """
        The order that all go by: from what was there when the first of them began, or after rows last went or came.

        In a plan by sets it decides in which order of its slices a set is grown, so it is written down.
        """
        changes = self._changes
        if self._order is not None:
            (then, there), order = self._order
            if then == changes and there <= current:
                return order
        there = self._written(changes) if self._folder.plan.by_sets else None
        self._order = self._begun(current if there is None or not there <= current else there, empty, behind)
        return self._order[1]

    @property
    def _changes(self) -> int:
        """How often rows went or came."""
        return self._folder.ledger.num_deletions + len(self._folder.ledger.additions)

    def _begun(
        self, there: frozenset[StageKey], empty: Collection[tuple[int, int]], behind: Collection[StageKey]
    ) -> tuple[Any, Order]:
        return (self._changes, there), self._folder.growth.order(there, empty, behind)

    def _written(self, changes: int) -> frozenset[StageKey] | None:
        with contextlib.suppress(FolderError, KeyError, TypeError, AttributeError):
            said = read_checked_json(self._order_file)
            if said["changes"] == changes:
                return frozenset(StageKey.from_path(f"stages/{name}") for name in said["there"])
        return None

    def _keep_order(self) -> None:
        """Write down from what the order was begun; the folder's lock must be held."""
        if self._order is None or not self._folder.plan.by_sets:
            return
        (changes, there), _ = self._order
        if self._written(changes) != there:
            said = {"changes": changes, "there": sorted(map(str, there))}
            # A crash of the machine ends all who go by it.
            write_atomically(self._order_file, digested_json(said), synced=False)


def end_claims(folder: SystemFolder, over: Iterable[Claim] = ()) -> None:
    """
    End claims of trainers that are gone, and of stages that are there or are not what they were; the folder's lock
    must be held.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system, as it is now.
        over (iterable of [`~hf_s3t.folder.claims.Claim`]): Claims of trainers that are gone.
    """
    for claim in over:
        folder.claims.end(claim)
    folder.claims.end_stale(folder.slice_digests, _is_there(folder, folder.current_stages))
    folder.claims.tidy()


def end_dead_claims(folder: SystemFolder) -> None:
    """End claims of processes of this machine that are gone, and what `end_claims` ends besides."""
    over = ClaimWatch(folder.claims).dead()
    if over or folder.claims.keys():
        with folder.lock():
            folder.refresh()
            end_claims(folder, over)


def _current_and_behind(folder: SystemFolder) -> tuple[frozenset[StageKey], frozenset[StageKey]]:
    """The valid stages that saw all that their slices hold, and the others."""
    valid = folder.valid_stages
    # Told from the records of all stages, so no more often than it has to be.
    current = folder.current_stages & valid if folder.ledger.additions else valid
    return current, valid - current


def _is_there(folder: SystemFolder, current: frozenset[StageKey]) -> Callable[[StageKey], bool]:
    """Whether a stage needs no training."""
    if not folder.plan.by_sets:
        return current.__contains__
    sets = {key.slices for key in current}
    return lambda key: key.slices in sets
