"""Stages that somebody else chose: what a driver, which holds no model, has the trainer of a worker do."""

import math
from typing import Any

from transformers import PrinterCallback

from ..errors import ConfigError
from ..folder.claims import LEASE
from ..plan.stages import StageKey
from .circumstances import circumstances, recipe_of
from .plan_run import PlanRuns
from .progress import PlanProgress
from .stage_sizes import check_batches


class AssignedRuns(PlanRuns):
    """The part of a trainer that trains the stages which it is told to, one after the other."""

    def _begin_assigned(self) -> dict[str, Any]:
        """
        Look at all that is looked at before training, and tell by what this trainer trains, as JSON types: two that
        tell the same make the same stages.

        Raises:
            [`~hf_s3t.errors.S3TError`]: As `train`.
        """
        if self.accelerator.num_processes > 1:
            raise ConfigError(
                f"A worker of a cluster got {self.accelerator.num_processes} data-parallel processes, expected one. "
                "Start groups of processes by `accelerate launch`, each on the same folder: they share its stages."
            )
        rows = self._rows_of_stages
        self._look_before_training(resume=True)
        self._agreed = self.folder.valid_stages
        self._begin_sharing(LEASE)
        check_batches(self._missing(), rows, self.folder.table, self.args, 1)
        # Others show how far it is.
        for kind in (PlanProgress, PrinterCallback):
            self.pop_callback(kind)
        self._logs_of_stages = {}
        self.callback_handler.begin_run()
        table = self.folder.table
        places = [(shard, slice_) for shard in range(table.num_shards) for slice_ in range(table.num_slices)]
        without = table.empty.union(table.places_of(rows.lacking(table)))
        return {
            "recipe": recipe_of(self.args),
            "parts": self._parts,
            "circumstances": circumstances(self.model, self.accelerator),
            # What is in a slice, and what is fed of it: others may look when rows went or came.
            "rows": {
                f"{s}/{p}": [table.slice_digest(s, p), self._fed(StageKey(s, (p,)))]
                for s, p in places
                if (s, p) not in without
            },
            "kind": type(self).__name__,
        }

    def _train_assigned(self, key: StageKey) -> dict[str, Any] | None:
        """
        Train a stage; what `train` would tell of it, or `None` if a deletion took it, or what it stands on, or if
        another trainer on the folder, for which it waits, made it.

        Raises:
            [`~hf_s3t.errors.S3TError`]: As `train`.
        """
        self.folder.refresh_ledger()
        self.folder.refresh_stages()
        self._lines_then = len(self.folder.ledger.lines)
        self._refuse_to_stand_on_others(key)
        if not self._claims(key):
            return None
        try:
            with self._working_on(self._claim):
                output = self._train_unless_overtaken(key, True, None)
                if output is None and not self._is_overtaken(key):
                    # Its checkpoint was of no use, and is gone.
                    output = self._train_unless_overtaken(key, True, None)
        finally:
            self.train_dataset = self._prepared
            self._sum_up_state()
        if output is None:
            return None
        self._agreed |= {key}
        return {
            "steps": output.global_step,
            "loss": output.training_loss,
            "seconds": output.metrics.get("train_runtime", 0.0),
        }

    def _claims(self, key: StageKey) -> bool:
        """Claim a stage, when whoever has it is done; `False` if it needs no training any more."""

        def wanted(current: frozenset[StageKey], behind: frozenset[StageKey]) -> StageKey | None:
            sets = {one.slices for one in current} if self.folder.plan.by_sets else set()
            return None if key in current or key.slices in sets else key

        # Others may have other stages in hand as long as they like: only who has this one is waited for.
        while wanted(self.folder.current_stages, frozenset()) is not None:
            turn = self._take_turn(wanted, math.inf)
            if not turn.waits:
                return turn.key is not None
            self.folder.refresh_ledger()
            self.folder.refresh_stages()
        return False

    def _refuse_to_stand_on_others(self, key: StageKey) -> None:
        """Refuse to go on from stages that another trainer made by another recipe since this one looked."""
        for stage in key.lineage[:-1]:
            if stage in self._agreed or not self.folder.is_valid(stage):
                continue
            other = self._other_recipe(self.folder.stage_record(stage))
            if other:
                raise ConfigError(
                    f"{stage}, on which {key} is to stand, was trained by another recipe: {other}. Give all workers "
                    "the same arguments and parts, or choose another `output_dir`."
                )
            self._agreed |= {stage}

    def _share_of_stage(self) -> float:
        """How much of the stage in training is done, from 0 to 1; another thread may ask."""
        state = self.state
        return state.global_step / state.max_steps if self._stage is not None and state.max_steps > 0 else 0.0

    def _end_assigned(self) -> None:
        """Tell trackers that the run has come to its end."""
        self.callback_handler.end_run(self.args, self.state, self.control)
