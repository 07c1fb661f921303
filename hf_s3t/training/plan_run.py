"""The stages of a plan, one after the other: which are missing, which is next, and by which recipe they go on."""

import contextlib
import gc
import itertools
import os
import time
from collections.abc import Iterator
from statistics import fmean
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..checks import require_positive
from ..errors import CheckpointError, ConfigError, ExampleIdError, FolderError, S3TError, counted
from ..folder.claims import LEASE
from ..folder.stage_record import adapter_of
from ..folder.status import serving_depths
from ..model.base_precision import check_precision
from ..model.scope import Scope
from ..plan.stages import StageKey, relative_cost
from ..records.request import some
from ..records.validity import is_current
from .evaluation import Evaluation
from .first_process import in_first_process
from .limits import Limits
from .progress import PlanProgress
from .publishing import Publishing
from .refusals import evaluation_chooses
from .shared_work import SharedWork, Turn
from .stage_run import RowsMoved
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


class PlanRuns(Evaluation, Publishing, SharedWork):
    """The part of a trainer that makes every stage of the plan exist."""

    _progress: PlanProgress
    _limits: Limits
    # The valid stages that all processes know, whose recipe is ours.
    _agreed: frozenset[StageKey]
    # How many lines the ledger had when the stage that is trained was chosen.
    _lines_then: int

    @old_objects_passed_over()
    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        *,
        max_stages: int | None = None,
        max_seconds: float | None = None,
        lease_seconds: float = LEASE,
    ) -> TrainOutput:
        """
        Make every planned stage exist, training only what is missing (Algorithm 3), or as much as is worth it.

        A fresh run, a resume after a crash, and the regrowth of deleted stages on the remaining data are all this.
        What is missing is trained in the order of its worth: first what lifts the depth that serves now, then what
        lifts the depth to expect over the requests to come, the most for its work first. So a call may stop early; the
        next one goes on where it stopped, and no tensor depends on how many calls there were.

        Any number of processes, on any number of machines that have the folder, may call this at the same time: they
        share what is missing. Each stage is trained by one of them, who has it by a claim in the folder; whoever finds
        none that is free waits for the others, whose stages let further ones begin, or are free again when they die.

        Args:
            resume_from_checkpoint (`bool`, *optional*):
                `False` starts a stage that was interrupted again from its beginning; otherwise its last checkpoint is
                resumed, if what it saw is still what the stage shall see.
            trial (*optional*): Must be `None`: hyperparameters cannot change between stages.
            ignore_keys_for_eval (`list[str]`, *optional*): As in `Trainer.train`.
            max_stages (`int`, *optional*):
                Stop after so many stages. 0 trains nothing and reports.
            max_seconds (`float`, *optional*):
                Begin no stage later than so many seconds after the call began. The one under way is finished: give
                less than you have by the time that a stage takes. The first process's clock counts for all.
            lease_seconds (`float`, defaults to 60):
                Where others work on the same folder: how long they wait for a sign of life of this process before they
                take its stage over. A process of their own machine that has ended they notice at once.

        Returns:
            [`~transformers.trainer_utils.TrainOutput`]: Steps done, mean training loss over them, and metrics, among
            them `stages_trained`; `depth` that serves now, the mean over shards, and `expected_depth`, its mean over
            the next requests (as many that hit each shard as it has slices) if nothing more is trained; `stages_left`
            and `work_left`, what is still missing, in stages and in full LoRA fine-tunings of all the data.

        Raises:
            [`~hf_s3t.errors.ConfigError`]:
                If `max_stages`, `max_seconds` or `lease_seconds` is no number, or too small; if another process that
                trains stages of the folder does so by another recipe or another version of hf_s3t; or if stages, or
                one that was begun, were trained by another recipe: other arguments, optimizer, loss, collator,
                tokenizer, overridden methods, callbacks that take part in steps, settings of Accelerate, or rows that
                were prepared otherwise. Of lambdas, closures and what an earlier version did not record only the
                names, or nothing, can be compared, and a warning says so.
            [`~hf_s3t.errors.DivergedError`]: If a stage comes out NaN or infinite, or stands on one that is: it is not
                written. What was written before stays.
        """
        limits = self._limits = Limits(max_stages, max_seconds)
        require_positive("lease_seconds", lease_seconds)
        self._refuse_to_choose(resume_from_checkpoint, trial)
        rows = self._rows_of_stages
        self._look_before_training(resume_from_checkpoint is not False)
        self._refuse_rows_that_came()
        self._agreed = self.folder.valid_stages
        self._begin_sharing(lease_seconds)
        keys = self._missing()
        check_batches(keys, rows, self.folder.table, self.args, self.accelerator.num_processes)
        self._progress.begin(self._cost_of_run(keys, limits), self._shows_progress and limits.of(len(keys)) > 0)
        self._logs_of_stages = {}
        self.callback_handler.begin_run()
        try:
            resume = resume_from_checkpoint is not False
            outputs = self._train_missing(limits, resume, ignore_keys_for_eval)
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
        self._refuse_rows_that_came()
        return self._report(outputs)

    def _refuse_rows_that_came(self) -> None:
        """Say that another process added rows: stages that are to see them cannot be trained without."""
        came = self._rows_of_stages.lacking(self.folder.table)
        if came:
            raise ExampleIdError(
                f"{counted(len(came), 'example')} came to {self.folder.path} that `train_dataset` lacks, or has as "
                f"they were before ({some(came)}): another process added or replaced them. What was trained stays. "
                "Make the trainer anew with the whole dataset as it is now, and call `train()` again."
            )

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

    def _train_missing(
        self, limits: Limits, resume: bool, ignore_keys_for_eval: list[str] | None
    ) -> list[TrainOutput]:
        """
        Train what is missing and nobody else trains, within limits. A deletion may arrive meanwhile: what that is, is
        asked again after every stage.
        """
        outputs: list[TrainOutput] = []
        key = None
        try:
            while not self._is_enough(limits, len(outputs)) and (key := self._next_stage()) is not None:
                with self._working_on(self._claim):
                    number = len(outputs) + 1
                    count = max(limits.of(len(outputs) + len(self._missing(self._agreed))), number)
                    self._progress.begin_stage(str(key), number, count, self._cost(key))
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
        """Train a stage; `None` if its checkpoint is of no use, or a deletion took it, or what it stands on."""
        try:
            return self._train_stage(key, resume, ignore_keys_for_eval)
        except RowsMoved:
            # Before it began. What is missing now is asked again.
            return None
        except CheckpointError as error:
            logger.warning(f"{key} is trained again from its beginning: {error}")
            with self.folder.lock():
                self.folder.remove_checkpoints(key)
        except FolderError:
            if self._claim is not None and self._claim.is_lost and self.accelerator.num_processes == 1:
                # What another trainer has taken over may be gone under the hands of this one.
                return None
            # A deletion may have taken what the stage stands on, since it was chosen: then another is next.
            if self.accelerator.num_processes > 1 or not self._is_overtaken(key):
                raise
        return None

    def _is_overtaken(self, key: StageKey) -> bool:
        """Whether others deleted since a stage was chosen, or removed what it stands on."""
        self.folder.refresh_ledger()
        self.folder.refresh_stages()
        is_standing = key.parent is None or self.folder.is_valid(key.parent)
        return not is_standing or len(self.folder.ledger.lines) != self._lines_then

    def _after_stage(self, key: StageKey) -> None:
        self._agreed |= {key}
        if self._live is not None and self.accelerator.num_processes == 1:
            # A model that was exhausted can answer again.
            self._live.catch_up()
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
            f"or by the same script, for the {len(self._missing())} that are missing{goes_on}."
        )

    def _tidy_up(self) -> None:
        """Remove what trainers that died left of stages that are there, and of claims."""
        if self.is_world_process_zero():
            self.folder.remove_finished_checkpoints()
            self._sharing.tidy()

    def _is_enough(self, limits: Limits, trained: int) -> bool:
        """Whether a limit is reached: the first process says so, as clocks differ."""
        is_enough: bool
        (is_enough,) = broadcast_object_list([limits.are_reached(trained)])
        return is_enough

    def _next_stage(self) -> StageKey | None:
        """
        The stage to train next, the same in every process, which the first one has claimed; `None` if nothing is left
        to train or to wait for, or a limit is reached meanwhile.
        """
        while True:
            valid = self._agree_on_what_is_there()
            if not valid <= self._agreed:
                # Another trainer is at work on the folder.
                self._refuse_other_recipe(resume=False)
                self._progress.pass_by(sum(map(self._cost, valid - self._agreed)))
                self._agreed = valid
            turn = self._turn_of_all()
            if not turn.waits:
                return turn.key
            if self._is_enough(self._limits, 0):
                return None

    def _turn_of_all(self) -> Turn:
        """What the first process finds to do; what it refuses, all refuse."""

        def take() -> Turn:
            turn = self._take_turn(self._first_of_missing, self._limits.seconds_left)
            self._lines_then = len(self.folder.ledger.lines)
            return turn

        return in_first_process(take)

    def _first_of_missing(self, current: frozenset[StageKey], behind: frozenset[StageKey]) -> StageKey | None:
        """
        The missing stage that is trained next, if nobody has claimed it. In another order the same stages come out
        with the same tensors, as far as they stand on the same ones.
        """
        return self._sharing.first(current, self._rows_of_stages.empty(self.folder.table), behind)

    def _missing(self, valid: frozenset[StageKey] | None = None) -> list[StageKey]:
        """The stages to make. A sequence ends before a slice of which deletions and truncation leave nothing."""
        folder = self.folder
        current = folder.current_stages if valid is None else valid & folder.current_stages
        return folder.plan.missing(current, self._rows_of_stages.empty(folder.table))

    def _cost(self, key: StageKey) -> float:
        sizes = [self.folder.table.size(key.shard, s) for s in self._rows_of_stages.slices(key)]
        examples = self.s3t_config.examples_per_epoch(sizes)
        return relative_cost(key, examples, self._layers.num_layers, self._layers.layers_below(key.group))

    def _cost_of_run(self, missing: list[StageKey], limits: Limits) -> float:
        """What the stages cost that are trained within limits, if nothing is deleted meanwhile."""
        if limits.of(len(missing)) < len(missing):
            current, empty = self.folder.current_stages, self._rows_of_stages.empty(self.folder.table)
            steps = self.folder.growth.steps(current, empty, self.folder.valid_stages - current)
            missing = [step.key for step in itertools.islice(steps, limits.of(len(missing)))]
        return sum(map(self._cost, missing))

    @property
    def _shows_progress(self) -> bool:
        return self.is_world_process_zero() and not self.args.disable_tqdm

    def _report(self, outputs: list[TrainOutput]) -> TrainOutput:
        """What a run did, and what it left."""
        valid = self.folder.valid_stages
        missing = self._missing(valid)
        metrics = {
            **_summary(outputs),
            "stages_trained": len(outputs),
            "stages_left": len(missing),
            "work_left": self.folder.growth.work(missing),
            "depth": fmean(serving_depths(self.folder, valid)),
            "expected_depth": self.folder.growth.expected_depth(valid),
        }
        return TrainOutput(sum(output.global_step for output in outputs), metrics["train_loss"], metrics)

    def _completes(self, key: StageKey) -> bool:
        """Whether a sequence is whole with a stage: on its set, in whatever order, no other is planned to stand."""
        return any(key.slices == (key.shard, frozenset(leaf)) for leaf in self.folder.plan.sequences[key.shard])

    def _agree_on_what_is_there(self) -> frozenset[StageKey]:
        """Have all processes read the ledger as far as each other, and know the same valid stages; tells these."""
        folder = self.folder
        folder.refresh_ledger()
        folder.refresh_stages()
        for _ in range(_ATTEMPTS):
            self._lines_then = len(folder.ledger.lines)
            # Told from the records of all stages, so no more often than it has to be.
            valid = folder.valid_stages
            read = gather_object([(self._lines_then, valid)])
            if all(one == read[0] for one in read):
                return valid
            time.sleep(_A_MOMENT)
            folder.refresh()
        lines, stages = [lines for lines, _ in read], [len(valid) for _, valid in read]
        raise FolderError(
            f"The processes read {lines} lines in the ledger of {folder.path}, and {stages} valid stages. Let all of "
            "them see the same folder."
        )

    def _refuse_other_recipe(self, resume: bool) -> None:
        """
        Refuse to go on by another recipe, from stages or from a checkpoint inside of one: no trainer could then audit
        the whole system.
        """
        folder = self.folder
        records = dict(sorted(folder.valid_records.items()))
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
        # What saw fewer rows than there are now was fed others.
        current = self.folder.current_stages.intersection(records)
        for key in sorted(current, key=lambda key: -key.depth):
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
        folder, valid = self.folder, self.folder.valid_records
        if key.parent is not None and key.parent not in valid:
            return None
        below = adapter_of(valid[key.parent]) if key.parent else None
        for _, record in self._checkpoints(key, *self.folder.folders_of_checkpoints(key)):
            whole = record.get("resumes_exactly") and "recipe" in record and "circumstances" in record
            if whole and is_current(record, folder.slice_digests(key)) and record["below"] == below:
                return record
        return None


def _summary(outputs: list[TrainOutput]) -> dict[str, float]:
    steps = sum(output.global_step for output in outputs)
    loss = sum(output.training_loss * output.global_step for output in outputs) / steps if steps else 0.0
    runtime = sum(output.metrics.get("train_runtime", 0.0) for output in outputs)
    return {"train_runtime": runtime, "train_loss": loss}
