"""Sharing what is missing with other trainers on the same folder: taking a stage, keeping it, waiting for others."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from transformers.utils import logging

from ..errors import ConfigError
from ..folder.claims import Claim, HeldClaim
from ..folder.shared_growth import SharedGrowth
from ..folder.versions import own_version
from ..plan.stages import StageKey
from .circumstances import recipe_of
from .stage_run import StageRuns


logger = logging.get_logger(__name__)

# Seconds after which a process that waits says so to the others of its group, whose patience ends.
_ONE_WAIT = 10.0


class Turn(NamedTuple):
    """What a group of processes does next: train a stage, wait and look again, or, if neither, come to its end."""

    key: StageKey | None
    waits: bool = False


class SharedWork(StageRuns):
    """The part of a trainer that shares the missing stages with others. Which are missing, it does not know."""

    _sharing: SharedGrowth
    # Whether somebody was told what is waited for, since a stage was trained last.
    _has_told: bool

    def _begin_sharing(self, lease: float) -> None:
        self._sharing = SharedGrowth(self.folder, lease)
        self._has_told = False

    def _take_turn(
        self, wanted: Callable[[frozenset[StageKey], frozenset[StageKey]], StageKey | None], seconds_left: float
    ) -> Turn:
        """
        Claim a stage, or wait for a while; in the first process of a group alone.

        Args:
            wanted (callable): From the stages that are there, and those that are behind, to the one to take.
            seconds_left (`float`): For how long waiting is of use.
        """
        # Who waits for it may be waited for by it.
        self._refuse_beside_a_stage()
        claim, over, others = self._sharing.take(wanted, self._work_of, self._refuse_unlike)
        for one in over:
            logger.warning(f"{one.holder} has ended without writing {one.key}: it is trained again.")
        if claim is not None:
            self._claim, self._has_told = claim, False
            return Turn(claim.key)
        if not others:
            return Turn(None)
        if not self._has_told:
            who = ", ".join(f"{one.key} ({one.holder})" for one in others)
            logger.warning(f"All that can be trained now is in training: {who}. Waiting for that.")
            self._has_told = True
        self._sharing.wait(min(_ONE_WAIT, seconds_left))
        return Turn(None, waits=True)

    def _work_of(self, key: StageKey) -> dict[str, Any]:
        """What a claim says of how its stage is trained."""
        return {
            "slices": self.folder.slice_digests(key),
            "version": own_version(),
            "recipe": recipe_of(self.args),
            "parts": self._parts,
        }

    def _refuse_unlike(self, claim: Claim) -> None:
        """Refuse to work beside a trainer whose stages would not be ours."""
        said = claim.said
        if said.get("version", own_version()) != own_version():
            raise ConfigError(
                f"{claim.holder} trains {claim.key} of {self.args.output_dir} with hf_s3t {said['version']}, this is "
                f"{own_version()}. Install the same version everywhere, or wait until that process has ended."
            )
        if not isinstance(said.get("recipe"), Mapping) or not isinstance(said.get("parts"), Mapping):
            return
        other = self._other_recipe(dict(said))
        if other:
            raise ConfigError(
                f"{claim.holder} trains {claim.key} of {self.args.output_dir} by another recipe: here {other}. Give "
                "all trainers of one folder the same arguments and parts, or choose another `output_dir`; if that "
                f"process has ended, call again in {claim.lease:g} seconds."
            )

    @contextlib.contextmanager
    def _working_on(self, claim: HeldClaim | None) -> Iterator[None]:
        """Keep a claim while its stage is trained; it ends with that, however it does."""
        self._claim = claim
        try:
            with claim.beating() if claim is not None else contextlib.nullcontext():
                yield
        finally:
            self._claim = None
