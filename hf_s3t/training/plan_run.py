"""The stages of a plan, one after the other: which are missing, which is next, and by which recipe they go on."""

import contextlib
import gc
import os
import time
from collections.abc import Iterator
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..errors import CheckpointError, ConfigError, FolderError, S3TError
from ..model.base_precision import check_precision
from ..model.scope import Scope
from ..plan.stages import StageKey, relative_cost
from ..records.validity import fits
from .evaluation import Evaluation
from .progress import PlanProgress
from .publishing import Publishing
from .refusals import evaluation_chooses
from .stage_run import StageRuns
from .stage_sizes import check_batches


logger = logging.get_logger(__name__)

# Seconds between two looks at the ledger of processes that have not read equally far, and how many there are.
_A_MOMENT = 0.1
_ATTEMPTS = 600
# Whether a run has old objects passed over.
_PASSED_OVER = Scope("old objects passed over")


@contextlib.contextmanager
def old_objects_passed_over() -> Iterator[None]:
    """
    Every run of `Trainer.train` collects garbage; what is there already need not be looked through each time. Where
    the process itself has frozen what was there, that stays so.
    """
    if gc.get_freeze_count():
        yield
        return
    gc.collect()
    gc.freeze()
    try:
        with _PASSED_OVER.holding(True):
            yield
    finally:
        gc.unfreeze()


def pass_over_what_stays() -> None:
    """After a stage, when what it left behind is collected: what it put into the model stays."""
    if _PASSED_OVER.get():
        gc.freeze()


class PlanRuns(Evaluation, Publishing, StageRuns):
    """The part of a trainer that makes every stage of the plan exist."""

    _progress: PlanProgress

    @old_objects_passed_over()
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Make every planned stage exist, training only what is missing (Algorithm 3).

        A fresh run, a resume after a crash, and the regrowth of deleted stages on the remaining data are all this.

        Args:
            resume_from_checkpoint (`bool`, *optional*):
                `False` starts a stage that was interrupted again from its beginning; otherwise its last checkpoint is
                resumed, if what it saw is still what the stage shall see.
            trial (*optional*): Must be `None`: hyperparameters cannot change between stages.
            ignore_keys_for_eval (`list[str]`, *optional*): As in `Trainer.train`.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: Steps done, mean training loss over them, and metrics.

        Raises:
            [`~hf_s3t.errors.ConfigError`]:
                If stages, or one that was begun, were trained by another recipe: other arguments, optimizer, loss,
                collator, tokenizer, overridden methods, callbacks that take part in steps, settings of Accelerate, or
                rows that were prepared otherwise. Of lambdas, closures and what an earlier version did not record
                only the names, or nothing, can be compared, and a warning says so.
            [`~hf_s3t.errors.DivergedError`]: If a stage comes out NaN or infinite, or stands on one that is: it is not
                written. What was written before stays.
        """
        self._refuse_to_choose(resume_from_checkpoint, trial)
        rows = self._rows_of_stages
        self._look_before_training(resume_from_checkpoint is not False)
        self._agreed = self.folder.valid_stages
        keys = self._stage_order(self._missing())
        check_batches(keys, rows, self.folder.table, self.args, self.accelerator.num_processes)
        costs = [self._cost(key) for key in keys]
        self._progress.begin(sum(costs), self.is_world_process_zero() and not self.args.disable_tqdm and bool(keys))
        self._logs = {}
        self.callback_handler.begin_run()
        try:
            outputs = self._train_missing(len(keys), resume_from_checkpoint is not False, ignore_keys_for_eval)
        except BaseException:
            if self._live is not None:
                # Stages that training changed before it stopped must not answer.
                with contextlib.suppress(S3TError):
                    self._live.refresh()
            raise
        finally:
            self._progress.end()
            self.train_dataset = self._prepared
            self._sum_up_state()
        self._tidy_up()
        self.callback_handler.end_run(self.args, self.state, self.control)
        if self._live is not None:
            self._live.refresh()
            # Requests that became due meanwhile.
            self._live._apply_in_time()
        if self.args.push_to_hub and outputs:
            self.push_to_hub()
        return _summary(outputs)

    def _refuse_to_choose(self, resume_from_checkpoint: Any, trial: Any) -> None:
        if trial is not None or isinstance(resume_from_checkpoint, (str, os.PathLike)):
            raise ConfigError(
                f"`train(resume_from_checkpoint={resume_from_checkpoint!r}, trial={trial!r})`: stages resume by "
                "themselves from the output folder, and hyperparameters cannot change between stages. Call `train()`."
            )

    def _look_before_training(self, resume: bool) -> None:
        """Refuse to train where something is not as it was when the trainer, or stages that are there, were made."""
        self._refuse_changed_accelerator()
        if evaluation_chooses(self.args, self.s3t_config):
            self._compare_evaluation_set()
        self.folder.refresh()
        # The base may have been cast since the trainer was made.
        check_precision(self.model, self.folder.record["base_model"])
        self._describe_parts()
        self._refuse_other_recipe(resume)

    def _train_missing(self, planned: int, resume: bool, ignore_keys_for_eval: list[str] | None) -> list[TrainOutput]:
        """Train what is missing. A deletion may arrive meanwhile: what that is, is asked again after every stage."""
        outputs: list[TrainOutput] = []
        key = None
        try:
            while (key := self._next_stage()) is not None:
                number = len(outputs) + 1
                self._progress.begin_stage(str(key), number, max(planned, number), self._cost(key))
                output = self._train_unless_overtaken(key, resume, ignore_keys_for_eval)
                pass_over_what_stays()
                if output is not None:
                    outputs.append(output)
                    self._after_stage(key)
        except KeyboardInterrupt:
            self._say_what_is_kept(key)
            raise
        return outputs

    def _train_unless_overtaken(
        self, key: StageKey, resume: bool, ignore_keys_for_eval: list[str] | None
    ) -> TrainOutput | None:
        """Train a stage; `None` if its checkpoint is of no use, or a deletion took what it stands on."""
        known = len(self.folder.ledger.lines)
        try:
            return self._train_stage(key, resume, ignore_keys_for_eval)
        except CheckpointError as error:
            logger.warning(f"{key} is trained again from its beginning: {error}")
            self.folder.remove_checkpoints(key)
        except FolderError:
            # A deletion by another process may have taken what the stage stands on: then another is next.
            self.folder.refresh_ledger()
            if self.accelerator.num_processes > 1 or len(self.folder.ledger.lines) == known:
                raise
        return None

    def _after_stage(self, key: StageKey) -> None:
        self._agreed |= {key}
        if self._live is not None and self.accelerator.num_processes == 1:
            # A model that was exhausted can answer again.
            self._live._catch_up()
        if self.args.push_to_hub and self.args.hub_strategy != "end" and self._completes(key):
            self._push_meanwhile(f"Sequence {key}")

    def _say_what_is_kept(self, key: StageKey | None) -> None:
        """Before an interrupt ends the run: what is there, and that nothing else has to be done than to call again."""
        if not self.is_world_process_zero():
            return
        self.folder.refresh_stages()
        valid = self.folder.valid_stages
        where = "its last checkpoint" if self.args.save_strategy != "no" else "its beginning"
        goes_on = f", {key} from {where}" if key is not None and key not in valid else ""
        logger.warning(
            f"Interrupted: {len(valid)} stages are in {self.folder.path}, whole, and stay. Call `train()` again, here "
            f"or by the same script: it trains the {len(self._missing())} that are missing{goes_on}."
        )

    def _tidy_up(self) -> None:
        """Remove what trainers that died left of stages that are there."""
        if self.is_world_process_zero():
            self.folder.remove_finished_checkpoints()

    def _next_stage(self) -> StageKey | None:
        """The stage to train next, the same in every process."""
        folder = self.folder
        self._agree_on_deletions()
        folder.refresh_stages()
        # Told from the records of all stages, so no more often than it has to be.
        valid = folder.valid_stages
        if not valid <= self._agreed:
            # Another trainer is at work on the folder.
            self._refuse_other_recipe(resume=False)
            self._agreed = valid
        missing = self._stage_order(self._missing(valid))
        key: StageKey | None
        (key,) = broadcast_object_list([missing[0] if missing else None])
        return key

    def _missing(self, valid: frozenset[StageKey] | None = None) -> list[StageKey]:
        """The stages to make. A sequence ends before a slice of which deletions and truncation leave nothing."""
        folder = self.folder
        valid = folder.valid_stages if valid is None else valid
        return folder.plan.missing(valid, self._rows_of_stages.empty(folder.table))

    def _stage_order(self, keys: list[StageKey]) -> list[StageKey]:
        """The order in which missing stages are trained; any that has parents first gives the same tensors."""
        return keys

    def _cost(self, key: StageKey) -> float:
        sizes = [self.folder.table.size(key.shard, s) for s in self._rows_of_stages.slices(key)]
        examples = self.s3t_config.examples_per_epoch(sizes)
        return relative_cost(key, examples, self._layers.num_layers, self._layers.layers_below(key.group))

    def _completes(self, key: StageKey) -> bool:
        return key.prefix in self.folder.plan.sequences[key.shard]

    def _agree_on_deletions(self) -> None:
        """
        Have all processes read the ledger as far as each other.

        The first one says what a stage saw. One that knew of fewer deletions would train it on more than that.
        """
        folder = self.folder
        folder.refresh_ledger()
        for _ in range(_ATTEMPTS):
            lines = gather_object([len(folder.ledger.lines)])
            if min(lines) == max(lines):
                return
            time.sleep(_A_MOMENT)
            folder.refresh()
        raise FolderError(
            f"The processes read {lines} lines in the ledger of {folder.path}. Let all of them see the same folder."
        )

    def _refuse_other_recipe(self, resume: bool) -> None:
        """
        Refuse to go on by another recipe, from stages or from a checkpoint inside of one: no trainer could then audit
        the whole system.
        """
        folder = self.folder
        records = {key: folder.stage_record(key) for key in sorted(folder.valid_stages)}
        for record in records.values():
            other = self._other_recipe(record)
            if other:
                raise ConfigError(
                    f"The stages of {self.args.output_dir} were trained by another recipe: {other}. Give the trainer "
                    "the recorded arguments and parts to go on, or choose another `output_dir`."
                )
        self._say_what_is_not_compared(records)
        missing = self._missing()
        if missing:
            self._refuse_rows_fed_otherwise(records)
        for key in missing if resume else ():
            begun = self._unfinished(key)
            other = None if begun is None else self._other_recipe(begun) or self._fed_otherwise(key, begun)
            if other:
                raise ConfigError(
                    f"{key} was begun by another recipe: {other}. Give the trainer the recorded arguments and parts "
                    "to go on from its checkpoint, or begin it again by `train(resume_from_checkpoint=False)`."
                )

    def _refuse_rows_fed_otherwise(self, records: dict[StageKey, dict[str, Any]]) -> None:
        """Refuse to go on with rows that are prepared otherwise. Deep stages first: they saw what others saw."""
        seen: set[tuple[int, int]] = set()
        for key in sorted(records, key=lambda key: -key.depth):
            places = {(key.shard, slice_) for slice_ in self._rows_of_stages.slices(key)}
            other = None if places <= seen else self._fed_otherwise(key, records[key])
            seen |= places
            if other:
                raise ConfigError(
                    f"{key} was trained on {other}. Prepare `train_dataset` as it was then to go on, or choose "
                    "another `output_dir`."
                )

    def _unfinished(self, key: StageKey) -> dict[str, Any] | None:
        """The record of the newest checkpoint of a stage that another recipe alone would keep from being resumed."""
        folder = self.folder
        if key.parent is not None and not folder.is_valid(key.parent):
            return None
        below = folder.adapter_digest(key.parent) if key.parent else None
        for _, record in self._checkpoints(key, self.folder.checkpoints(key)):
            whole = record.get("resumes_exactly") and "recipe" in record and "circumstances" in record
            if whole and fits(record, folder.slice_digests(key), below):
                return record
        return None


def _summary(outputs: list[TrainOutput]) -> TrainOutput:
    steps = sum(output.global_step for output in outputs)
    loss = sum(output.training_loss * output.global_step for output in outputs) / steps if steps else 0.0
    runtime = sum(output.metrics.get("train_runtime", 0.0) for output in outputs)
    return TrainOutput(steps, loss, {"train_runtime": runtime, "train_loss": loss, "stages_trained": len(outputs)})
