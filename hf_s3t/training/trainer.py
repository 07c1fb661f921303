"""`S3TTrainer`: Transformers' `Trainer`, run once per stage of an S3T system."""

import contextlib
import functools
import gc
import json
import math
import os
import shutil
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftConfig
from safetensors.torch import save_file
from torch import nn
from transformers import (
    PreTrainedTokenizerBase,
    ProcessorMixin,
    ProgressCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.debug_utils import DebugUnderflowOverflow
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput, align_special_tokens
from transformers.utils import logging

from .. import launch
from ..config import S3TConfig
from ..errors import CheckpointError, ConfigError, DivergedError, FolderError, HubError, IsolationError, S3TError
from ..folder.finite import NOT_FINITE
from ..folder.layout import ADAPTER_FILE, TRAINING_WEIGHTS_FILE
from ..folder.system import SystemFolder
from ..hub.card import description
from ..hub.client import told
from ..hub.pushing import PushReport, push
from ..hub.repository import HubRepo
from ..model.base_model import check_precision, keep_4_bit_weights, log_casts_once
from ..model.modeling import S3TModel
from ..model.randomness import RandomStates, own_randomness, preserved_randomness
from ..model.stack import StageStack, seed_head, tensors_digest
from ..model.state import BUFFERS, Look, Mark, TokenizerSettings, difference, fresh_copy, fresh_dataset, mark, shown
from ..model.stateless import changed_for_good
from ..model.targets import refuse_failing_adapter
from ..model.tensor_files import differing_tensors, read_tensors
from ..model.turns import PREPARED, set_attributes
from ..plan.stages import LEAST_STEPS, Plan, StageKey, relative_cost, stage_seed
from ..records.digests import KeptNames
from ..records.examples import ExampleTable
from .audit import VerificationReport, note_trained, verify_stages
from .blueprint import Blueprint, Layout, check_same, draw_up
from .circumstances import circumstances, differing, recipe_of
from .divergence import FiniteWatch, is_finite, refuse_diverged
from .early_checks import check_choice, check_inputs, check_loss, check_rows, collates_as_stored
from .fed_rows import FedRows
from .inputs import check_answers, check_kinds, check_parts
from .optimizers import StageOptimizer, refuse_bound_optimizer
from .parts import accelerator_settings, compiles, differing_parts, lacking, parts_of, recorded_parts, shown_parts
from .progress import PlanProgress
from .refusals import check_accelerator, evaluation_chooses
from .rows import StageRows
from .sampler import EpochSeededSampler
from .tracking import PlanHandler, last_step, tags


logger = logging.get_logger(__name__)

# Seconds between two looks at the ledger of processes that have not read equally far, and how many there are.
_A_MOMENT = 0.1
_ATTEMPTS = 600
# Of these, copies share what cannot be copied.
_FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)


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
        yield
    finally:
        gc.unfreeze()


class S3TTrainerMixin:
    """
    What makes a [`~transformers.Trainer`] train an S3T system: a run of `Trainer.train` per stage, on that stage's
    examples, with only that stage's adapter trainable.

    Put it before the trainer class: `class MyTrainer(S3TTrainerMixin, SomeTrainer)`.
    """

    # How stages lie on layers and data, and what serves them: the baselines have others.
    _layout = Layout()
    _model_type = S3TModel

    # Setting up

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; what Accelerate was told besides arguments meets their refusals."""
        super().create_accelerator_and_postprocess()
        check_accelerator(self.accelerator)
        self._accelerator_settings = accelerator_settings(self.accelerator)

    def _refuse_changed_accelerator(self) -> None:
        """All accelerators of a process share one state, which the next trainer or its arguments may have replaced."""
        try:
            now = accelerator_settings(self.accelerator)
        except AttributeError:
            # Cleared, and not set up again.
            now = None
        if now != self._accelerator_settings:
            what = "" if now is None else f" ({', '.join(differing(self._accelerator_settings, now))})"
            raise S3TError(
                f"Other training arguments or another trainer of this process set Accelerate up anew{what} since "
                "this trainer was made, for all of them: a stage would be trained otherwise than its record says. "
                "Make this trainer again, with its arguments, after the others."
            )

    def _set_up(self, blueprint: Blueprint) -> None:
        """Open the system's folder, or make it, and get ready to train."""
        output_dir = self.args.output_dir
        self._live: S3TModel | None = None
        self._making_live = threading.RLock()
        rows, planned, key = blueprint.rows, blueprint.planned, blueprint.key
        self._fed_rows = FedRows(self.model, self.data_collator)
        self._align_tokens()
        self._compared_with = rows.compared_with if rows is not None and self.train_dataset is rows.dataset else None
        if rows is not None and evaluation_chooses(self.args, blueprint.config):
            self._compare_evaluation_set()
            for part in (self.compute_metrics, self.preprocess_logits_for_metrics):
                self._copy(part)
        if planned is not None:
            # Before anything is written: truncation and filtering may have emptied a slice.
            names = KeptNames(key, blueprint.config.keep_ids)
            prepared = StageRows(self.train_dataset, rows, names)
            prepared.check_slices(planned)
            if self.train_dataset is not rows.dataset and collates_as_stored(self.data_collator):
                check_rows(self.train_dataset, self.model, blueprint.head, self.args)
            self._check_batches(Plan.from_config(blueprint.config).stages(planned.empty), prepared, planned)
        if planned is not None and self.is_world_process_zero():
            self._make_folder(blueprint)
        self.accelerator.wait_for_everyone()
        self.folder = SystemFolder(output_dir)
        self._stage_rows = None if rows is None else StageRows(self.train_dataset, rows, self.folder.names)
        self.s3t_config = blueprint.config
        self._layers = blueprint.layers
        # The parts of the recipe, once somebody asks.
        self._described: dict[str, Any] | None = None
        self._stage: StageKey | None = None
        self._stage_output_dir: Path | None = None
        # The model as Trainer has set it up for training, which it is once.
        self._set_up_model: Look | None = None
        self._prepared = self.train_dataset
        if self._stage_rows is not None:
            self._say_what_is_suboptimal()
        self._progress = PlanProgress()
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(self._progress)
        self.callback_handler = PlanHandler(self.callback_handler, self._stack.turns)
        # On the curve over the whole plan: where the stage in training begins, where the last one that was trained to
        # its end has its end, and how far a stage came.
        self._first_step = self._last_step = self._reached = 0
        self._is_logging = False
        self._logs: dict[StageKey, tuple[list[str], list[dict[str, Any]]]] = {}

    def _make_folder(self, blueprint: Blueprint) -> None:
        """Make the system, unless another trainer made the same one while this one was being set up."""
        output_dir = self.args.output_dir
        with SystemFolder.making(output_dir):
            if SystemFolder.exists(output_dir):
                check_same(blueprint, self.model, output_dir)
                return
            blueprint.key.write(output_dir)
            SystemFolder.create(output_dir, blueprint.record(self.model), blueprint.planned.rows, blueprint.key)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(output_dir)

    def _align_tokens(self) -> None:
        """
        Have the base name the tokenizer's special tokens, as `Trainer.train` would: they decide where a text ends and
        which token a classifier looks at, and are recorded for whoever loads the system.
        """
        if isinstance(self.processing_class, (PreTrainedTokenizerBase, ProcessorMixin)):
            align_special_tokens(self.model, self.processing_class)

    def _check_batches(self, keys: Sequence[StageKey], rows: StageRows, table: ExampleTable) -> None:
        """Refuse stages of too few rows to make a batch; packing makes of rows no more than they are."""
        size = self.args.train_batch_size * self.accelerator.num_processes
        few = [key for key in keys if len(rows.positions(key, table)) < size] if self.args.dataloader_drop_last else []
        if few:
            raise ConfigError(
                f"`dataloader_drop_last=True` leaves {few[0]} ({len(few)} stages in all) without a batch: it has "
                f"{len(rows.positions(few[0], table))} examples, and a batch {size}. Leave it off, or have smaller "
                "batches, fewer shards or fewer slices."
            )

    def _compare_evaluation_set(self) -> None:
        """Refuse an evaluation set with training examples in it: it may have been prepared, or given, since."""
        if self.eval_dataset is not self._compared_with:
            self._fed_rows.refuse_shared(self.train_dataset, self._evaluation_rows())
            self._compared_with = self.eval_dataset

    def _evaluation_rows(self) -> Any:
        """The evaluation sets, row by row as those of training."""
        return self.eval_dataset

    def _say_what_is_suboptimal(self) -> None:
        dropped = self._stage_rows.dropped(self.folder.table)
        if dropped:
            logger.warning_once(
                f"{dropped} of {len(self.folder.table)} examples are not trained on: truncation or filtering left "
                "nothing of them. Their ids stay in the table. Raise `max_length` to train on them."
            )
        if launch.asked_for() > 1 and self.accelerator.num_processes == 1:
            logger.warning_once(
                f"{launch.asked_for()} processes were asked for and the launcher started one, as it does on a CPU "
                "without MPI. Call `hf_s3t.launch.start_cpu_processes()` first thing in your script."
            )
        if self.args.device.type == "cuda" and not self.args.full_determinism:
            logger.warning_once(
                "Without `full_determinism=True` some CUDA kernels add in another order from run to run, and an audit "
                "may find other bits. The guarantee of `unlearn` does not depend on it."
            )
        steps = self._fewest_steps()
        if steps is not None and steps < LEAST_STEPS:
            logger.warning_once(
                f"The shortest stage gets {steps} optimizer steps; with fewer than about {LEAST_STEPS} a stage seldom "
                "converges. Raise `num_train_epochs`, lower `per_device_train_batch_size` or "
                "`gradient_accumulation_steps`, or have fewer shards or slices."
            )

    def _fewest_steps(self) -> int | None:
        """Optimizer steps of the shortest stage that is missing, if there is one and they are known beforehand."""
        args, table = self.args, self.folder.table
        missing = self._missing()
        if not missing or getattr(args, "packing", False):
            return None
        if args.max_steps > 0:
            return args.max_steps
        rows = self._stage_rows
        kept = {
            (shard, s): len(rows.positions(StageKey(shard, (s,)), table))
            for shard in {key.shard for key in missing}
            for s in range(table.num_slices)
        }
        examples = min(sum(kept[key.shard, s] for s in rows.slices(key)) for key in missing)
        share = examples / (args.train_batch_size * self.accelerator.num_processes)
        batches = math.floor(share) if args.dataloader_drop_last else math.ceil(share)
        return math.ceil(args.num_train_epochs * max(1, math.ceil(batches / args.gradient_accumulation_steps)))

    # Training

    @old_objects_passed_over()
    def train(
        self,
        resume_from_checkpoint: bool | None = None,
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
        if trial is not None or isinstance(resume_from_checkpoint, (str, os.PathLike)):
            raise ConfigError(
                f"`train(resume_from_checkpoint={resume_from_checkpoint!r}, trial={trial!r})`: stages resume by "
                "themselves from the output folder, and hyperparameters cannot change between stages. Call `train()`."
            )
        if self._stage_rows is None:
            raise ConfigError("There is no `train_dataset` to train on. Give it to the trainer.")
        self._refuse_changed_accelerator()
        if evaluation_chooses(self.args, self.s3t_config):
            self._compare_evaluation_set()
        self.folder.refresh()
        # It may have been cast since, by way of the base itself.
        check_precision(self.model, self.folder.record["base_model"])
        self._describe_parts()
        self._refuse_other_recipe(resume_from_checkpoint is not False)
        self._agreed = self.folder.valid_stages
        keys = self._stage_order(self._missing())
        self._check_batches(keys, self._stage_rows, self.folder.table)
        costs = [self._cost(key) for key in keys]
        self._progress.begin(sum(costs), self.is_world_process_zero() and not self.args.disable_tqdm and bool(keys))
        outputs, key = [], None
        self._logs = {}
        self.callback_handler.begin_run()
        try:
            # A deletion may arrive meanwhile: what is missing is asked again after every stage.
            while (key := self._next_stage()) is not None:
                self._progress.begin_stage(
                    str(key), len(outputs) + 1, max(len(keys), len(outputs) + 1), self._cost(key)
                )
                known = len(self.folder.ledger.lines)
                try:
                    outputs.append(self._train_stage(key, resume_from_checkpoint is not False, ignore_keys_for_eval))
                except CheckpointError as error:
                    logger.warning(f"{key} is trained again from its beginning: {error}")
                    self.folder.remove_checkpoints(key)
                    continue
                except FolderError:
                    # A deletion by another process may have taken what the stage stands on: then another is next.
                    self.folder.refresh_ledger()
                    if self.accelerator.num_processes > 1 or len(self.folder.ledger.lines) == known:
                        raise
                    continue
                self._agreed |= {key}
                if self._live is not None and self.accelerator.num_processes == 1:
                    # One that was exhausted answers again.
                    self._live._catch_up()
                if self.args.push_to_hub and self.args.hub_strategy != "end" and self._completes(key):
                    self._push_meanwhile(f"Sequence {key}")
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                self._say_what_is_kept(key)
            if self._live is not None:
                # What training did to stages that serve, before it was stopped, answers no more.
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

    def _sum_up_state(self) -> None:
        """Have `state` tell of all stages that were trained, but not of what was deleted since (E5)."""
        if self._logs:
            self.state.log_history = [
                entry
                for key, (slices, entries) in self._logs.items()
                if slices == self.folder.slice_digests(key)
                for entry in entries
            ]
            self.state.global_step = self.state.max_steps = self._reached

    def _next_stage(self) -> StageKey | None:
        """The stage to train next, the same in every process."""
        folder = self.folder
        self._agree_on_deletions()
        folder.refresh_stages()
        if not folder.valid_stages <= self._agreed:
            # Another trainer is at work on the folder.
            self._refuse_other_recipe(resume=False)
            self._agreed = folder.valid_stages
        missing = self._stage_order(self._missing())
        (key,) = broadcast_object_list([missing[0] if missing else None])
        return key

    def _missing(self) -> list[StageKey]:
        """The stages to make. A sequence ends before a slice of which deletions and truncation leave nothing."""
        folder = self.folder
        return folder.plan.missing(folder.valid_stages, self._stage_rows.empty(folder.table))

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
            record = self._unfinished(key)
            other = record and (self._other_recipe(record) or self._fed_otherwise(key, record))
            if other:
                raise ConfigError(
                    f"{key} was begun by another recipe: {other}. Give the trainer the recorded arguments and parts "
                    "to go on from its checkpoint, or begin it again by `train(resume_from_checkpoint=False)`."
                )

    def _other_recipe(self, record: dict[str, Any]) -> str | None:
        """How arguments and parts of this trainer differ from the recorded ones; `None` if they do not."""
        arguments = differing(record["recipe"], recipe_of(self.args))
        shown = [f"{name}={new!r} (was {old!r})" for name, (old, new) in arguments.items()]
        parts = differing_parts(recorded_parts(record), self._parts)
        return ", ".join([*shown, *([shown_parts(parts)] if parts else [])]) or None

    def _say_what_is_not_compared(self, records: dict[StageKey, dict[str, Any]]) -> None:
        recorded = map(recorded_parts, records.values())
        unknown = sorted({part for parts in recorded for part in lacking(parts, self._parts)})
        if unknown:
            logger.warning_once(
                f"Stages of {self.args.output_dir} were trained by an earlier hf_s3t, or in another version of "
                f"Python, and their records cannot be compared in: {', '.join(unknown)}. Make sure that these are "
                "the same."
            )

    def _refuse_rows_fed_otherwise(self, records: dict[StageKey, dict[str, Any]]) -> None:
        """Refuse to go on with rows that are prepared otherwise. Deep stages first: they saw what others saw."""
        seen: set[tuple[int, int]] = set()
        for key in sorted(records, key=lambda key: -key.depth):
            places = {(key.shard, slice_) for slice_ in self._stage_rows.slices(key)}
            other = None if places <= seen else self._fed_otherwise(key, records[key])
            seen |= places
            if other:
                raise ConfigError(
                    f"{key} was trained on {other}. Prepare `train_dataset` as it was then to go on, or choose "
                    "another `output_dir`."
                )

    def _fed_otherwise(self, key: StageKey, record: dict[str, Any]) -> str | None:
        then = record.get("circumstances", {}).get("data_digest")
        if then is None or self._stage_rows.digest(key, self.folder.table, self.folder.key) in (None, then):
            return None
        return "rows that were fed otherwise (by another tokenizer, template, `formatting_func` or `max_length`)"

    def _unfinished(self, key: StageKey) -> dict[str, Any] | None:
        """The record of the newest checkpoint of a stage that another recipe alone would keep from being resumed."""
        folder = self.folder
        if key.parent is not None and not folder.is_valid(key.parent):
            return None
        below = folder.adapter_digest(key.parent) if key.parent else None
        for _, record in self._checkpoints(key, self.folder.checkpoints(key)):
            whole = record.get("resumes_exactly") and "recipe" in record and "circumstances" in record
            if whole and record["slices"] == folder.slice_digests(key) and record["below"] == below:
                return record
        return None

    def _describe_parts(self) -> None:
        """Look at the parts anew. What knows its rank is told as the first process, which writes records, has it."""
        self._described = None
        if self.accelerator.num_processes > 1:
            (self._described,) = broadcast_object_list([self._parts])

    @property
    def _parts(self) -> dict[str, Any]:
        """What was given to this trainer besides arguments and rows, as `train` or `verify` found it."""
        if self._described is None:
            self._described, unstable = parts_of(self, self.folder.key)
            if unstable:
                logger.warning_once(
                    f"What decides the stages includes {', '.join(unstable)}: of these only names are recorded, and "
                    "another of the same name would go unnoticed. Give functions and classes that are defined by "
                    "name, with what they need as arguments of `functools.partial` or as attributes, and seeds in "
                    "the place of generators."
                )
        return self._described

    def _stage_order(self, keys: list[StageKey]) -> list[StageKey]:
        """The order in which missing stages are trained; any that has parents first gives the same tensors."""
        return keys

    def _cost(self, key: StageKey) -> float:
        examples = sum(self.folder.table.size(key.shard, s) for s in self._stage_rows.slices(key))
        return relative_cost(key, examples, self._layers.num_layers, self._layers.layers_below(key.group))

    def _train_stage(self, key: StageKey, resume: bool, ignore_keys_for_eval: list[str] | None = None) -> TrainOutput:
        with self._occupied(key), self._dropped_on_error(key), self._scratch_of_its_own():
            self._bring_in(key)
            self._refuse_upon_diverged(key)
            origin = self._origin(key)
            (is_begun,) = broadcast_object_list([self.folder.has_checkpoints(key)])
            if self.args.save_strategy != "no" or is_begun:
                self._take_scratch(key, origin)
            (checkpoint,) = broadcast_object_list([self._last_checkpoint(key, origin) if resume else None])
            frozen, buffers = self._stack.digest(key.lineage[:-1]), self._buffers_digest()
            # What was trained by others, or before, is on the curve already.
            self._first_step = max(self._last_step, last_step(self.folder.stage_records))
            with self._training(key, self._scratch, origin):
                output = self._fit(key, checkpoint, ignore_keys_for_eval)
                self._refuse_half_trained(key)
                self._refuse_diverged()
                self._say_what_was_not_finite(key)
                metrics = {**output.metrics, **self._stage_metrics()}
                self._last_step = self._first_step + self.state.global_step
                self._refuse_changed_model(key)
            frozen_after = self._stack.digest(key.lineage[:-1])
            if frozen_after != frozen:
                # Not what their files say any more: whoever needs them loads them again.
                for stage in key.lineage[:-1]:
                    self._stack.mark(stage, None)
                raise S3TError(
                    f"Training {key} changed a stage below it, which must be frozen. A callback or optimizer wrote to "
                    "parameters without gradients; remove it."
                )
            if self._buffers_digest() != buffers:
                raise IsolationError(
                    f"Training {key} changed buffers of the base model, on which all stages stand: the next stage "
                    "would depend on what this one saw. Use a model whose forward pass keeps nothing."
                )
            self._write(key, self._record(key, origin, frozen, frozen_after, metrics))
        return output

    def _refuse_half_trained(self, key: StageKey) -> None:
        """A stage is trained to its end, or to where an evaluation ends it, or it is none."""
        done, planned = self.state.global_step, self.state.max_steps
        if done >= planned or self.args.load_best_model_at_end or any(gather_object([self._is_condemned()])):
            return
        raise IsolationError(
            f"{key} was ended after {done} of {planned} steps, and is discarded: nothing in the recipe says where. A "
            "callback ended it, or its examples make no batch (`dataloader_drop_last`). Mend that, and call `train()` "
            "again; an evaluation may end a stage with `load_best_model_at_end=True`."
        )

    def _refuse_upon_diverged(self, key: StageKey) -> None:
        """A stage that stands on NaN, as earlier versions wrote, would be nothing else."""
        for stage in key.lineage[:-1]:
            if not is_finite(self._stack.tensors(stage)):
                raise DivergedError(f"{stage}, on which {key} stands, is NaN or infinite. {NOT_FINITE}")

    def _refuse_diverged(self) -> None:
        """Go no further with a stage that is NaN: it would only cost time, and never be anything else."""
        refuse_diverged(self._stage, self._stack.tensors(self._stage), self._finite, self.state.global_step)

    def _say_what_was_not_finite(self, key: StageKey) -> None:
        """A loss that was NaN, and left the weights alone: nothing is wrong with the stage, but with a batch."""
        first = self._finite.first_step
        if first is not None:
            logger.warning(
                f"{key} is finite, though a loss or its gradient was not, first in step {first}: that batch taught "
                "nothing. Look through the examples for values that are not finite and rows without a label that "
                "counts."
            )

    def _refuse_changed_model(self, key: StageKey) -> None:
        """A stage that left something in the modules of the base is not written: the next one would read it."""
        if self._set_up_model is None:
            return
        now = Look(self.model)
        left = {**now.changed(self._settled_model), **changed_for_good(self.model, self._set_up_model, now)}
        # Buffers are compared by themselves.
        left = {name: marks for name, marks in left.items() if not name.endswith(BUFFERS)}
        if left:
            raise IsolationError(
                f"Training {key} changed {shown(left)} of the base model, on which all stages stand: the next stage "
                "would depend on what this one saw. Use a model whose forward pass leaves nothing behind, and change "
                "no setting of it in a callback."
            )

    def _origin(self, key: StageKey) -> dict[str, Any]:
        """What a stage is made from; by it a checkpoint is told from one of other data or another recipe."""
        folder = self.folder
        return {
            "slices": folder.slice_digests(key),
            "below": folder.stage_record(key.parent)["files"][ADAPTER_FILE] if key.parent else None,
            "recipe": recipe_of(self.args),
            "parts": self._parts,
            "circumstances": self._circumstances(key),
        }

    def _record(self, key: StageKey, origin, frozen: str, frozen_after: str, metrics: dict) -> dict[str, Any]:
        """What `stage.json` says of a stage that is trained."""
        return {
            **origin,
            "seed": stage_seed(self.s3t_config.seed, key),
            "layers": list(self._layers.groups[key.group]),
            "counts": [self.folder.table.size(key.shard, s) for s in key.prefix],
            "examples_dropped": self._dropped(key),
            "frozen_before": frozen,
            "frozen_after": frozen_after,
            "steps": [self._first_step, self._last_step],
            # NaN is no JSON.
            "metrics": {n: v for n, v in metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)},
        }

    def _buffers_digest(self) -> str:
        """What the base keeps besides parameters; frequencies are computed anew in every pass (see `check_base`)."""
        own = (".lora_", ".modules_to_save.")
        # Modules that PEFT wraps meanwhile may have buffers: they stay what they are under another name.
        buffers = {
            n.replace(".base_layer.", "."): b
            for n, b in self.model.named_buffers()
            if not any(part in n for part in own)
        }
        return tensors_digest({n: b for n, b in buffers.items() if not n.endswith("inv_freq")})

    def _completes(self, key: StageKey) -> bool:
        return key.prefix in self.folder.plan.sequences[key.shard]

    def _push_meanwhile(self, message: str) -> None:
        """A Hub that cannot be reached is no reason to lose training: the push at the end brings what is missing."""
        try:
            self.push_to_hub(message)
        except HubError as error:
            logger.warning(f"{message} could not be pushed: {error} It is tried again with the next.")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Checkpoints hold an optimizer's state; the system is pushed as its sequences complete."""

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs,
    ) -> PushReport | None:
        """
        Bring the system to the Hub, into `args.hub_model_id` or a repository named like the output folder.

        Args:
            commit_message (`str`, *optional*): Title of the commit.
            blocking (`bool`, defaults to `True`): Must be true: the push is one commit on top of what it has read.
            token (`str`, *optional*): Token with write access; `args.hub_token`, else that of `hf auth login`.
            revision (`str`, *optional*): Must be `None` or `"main"`: a deletion has one branch to reach.
            private (`bool`, *optional*): Whether a new repository is private; `args.hub_private_repo` if not given.
            kwargs: `merge`, `datasets`, `license` and `evaluation`, as in [`~hf_s3t.S3TModel.push_to_hub`].

        Returns:
            [`~hf_s3t.hub.pushing.PushReport`]: What was pushed; `None` in all processes but the first.

        Raises:
            [`~hf_s3t.errors.HubError`]: If the Hub refuses or cannot be reached.
            [`~hf_s3t.errors.ConfigError`]: If `blocking` is false, or another branch is named.
        """
        if not blocking or revision not in (None, "main"):
            raise ConfigError(
                f"`push_to_hub(blocking={blocking}, revision={revision!r})`: a system is pushed at once, to the main "
                "branch. Leave both out."
            )
        if not self.is_world_process_zero():
            return None
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self._name_repo(token, private)
        merge = kwargs.pop("merge", False)
        describe = functools.partial(description, repo_id=self.hub_model_id, **kwargs)
        try:
            return push(
                self.folder, HubRepo(self.hub_model_id, token), describe, commit_message=commit_message, merge=merge
            )
        finally:
            if self._live is not None and self._stack.in_training is None:
                self._live.refresh()

    def _name_repo(self, token: str | None, private: bool | None) -> None:
        with told(self.args.hub_model_id or self.args.output_dir, "The push ended"):
            self.init_hf_repo(token=token, private=private)

    def _write(self, key: StageKey, record: dict[str, Any]) -> None:
        if self.is_world_process_zero():
            base = self.folder.base_id, self.folder.base_revision
            self.folder.write_stage(key, record, lambda path: self._stack.save(key, path, *base))
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            self.folder.refresh()
        if self.folder.is_valid(key):
            self._take_as_written(key)
        else:
            self._stack.drop([key])

    def _take_as_written(self, key: StageKey) -> None:
        """Know a stage in memory by its file. Where another trainer wrote it first, that one takes its place."""
        data, digest = self.folder.read_adapter(key), self.folder.adapter_digest(key)
        if differing_tensors(read_tensors(data, str(key)), self._stack.tensors(key)):
            self._stack.load(key, data, digest)
        else:
            self._stack.mark(key, digest)
            note_trained(digest)

    def _circumstances(self, key: StageKey) -> dict[str, Any]:
        fed = self._stage_rows.digest(key, self.folder.table, self.folder.key)
        return {**circumstances(self.model, self.accelerator), "data_digest": fed}

    def _dropped(self, key: StageKey) -> int:
        owned = sum(self.folder.table.size(key.shard, s) for s in self._stage_rows.slices(key))
        return owned - len(self._stage_rows.positions(key, self.folder.table))

    def _bring_in(self, key: StageKey) -> None:
        """Have the stages below in memory, and of the others only those that serve."""
        below = key.lineage[:-1]
        self._make_room(below)
        for stage in below:
            digest = self.folder.adapter_digest(stage)
            if not self._stack.holds(stage, digest):
                self._stack.load(stage, self.folder.read_adapter(stage), digest)

    def _make_room(self, below: Sequence[StageKey]) -> None:
        """Drop stages that neither serve nor are stood on; with several processes all must hold the same tensors."""
        alone = self.accelerator.num_processes == 1
        serving = self._live._routing.stages if self._live is not None and alone else frozenset()
        idle = frozenset(self._stack.loaded).difference(below, serving)
        if self._live is not None:
            self._live.free(idle)
        self._stack.drop(idle)

    @contextlib.contextmanager
    def _occupied(self, key: StageKey) -> Iterator[None]:
        """The base is a stage's: a live model on it switches stages off meanwhile, and attaches and drops none."""
        self._stack.turns.refuse_inside("train")
        with self._making_live:
            if self._stack.in_training is not None:
                raise S3TError(
                    f"The stage {self._stack.in_training} is in training on the same base. Let its `train()` come to "
                    "its end first."
                )
            with self._live.at_rest() if self._live is not None else contextlib.nullcontext():
                self._stack.in_training = key
        try:
            # Not before: whoever holds the live model's lock may wait for a call.
            with own_randomness(), self._stack.turns.taken():
                yield
        finally:
            self._stack.in_training = None
            self._stack.watch.begin_anew()

    @contextlib.contextmanager
    def _dropped_on_error(self, key: StageKey) -> Iterator[None]:
        """A stage that was not written is not left in memory."""
        try:
            yield
        except BaseException:
            self._stack.drop([key])
            raise

    @contextlib.contextmanager
    def _training(self, key: StageKey, output_dir: Path | None, origin: dict[str, Any]) -> Iterator[None]:
        """Everything that one run of `Trainer.train` shares with the next, fresh before and put back after."""
        # Packing shuffles by this seed: it must be the stage's before its dataset is made.
        given, self.args.seed = self.args.seed, stage_seed(self.s3t_config.seed, key)
        self.train_dataset = fresh_dataset(self._stage_dataset(key), self._shared)
        self._stage, self._stage_output_dir, self._stage_origin = key, output_dir, origin
        self._batches_are_random = self.args.dataloader_num_workers > 0
        self._settled_model: Look | None = None
        self._finite = FiniteWatch()
        self._stage_optimizer: StageOptimizer | None = None
        # Loaders of evaluations that keep their workers keep what these have drawn.
        vars(self).pop("_eval_dataloaders", None)
        paged, state = len(_paged_tensors()), self.state
        self.optimizer, self.lr_scheduler, self._created_lr_scheduler = None, None, False
        self.model_wrapped = self.model
        try:
            with self._unprepared(), self._fresh_state():
                yield
        finally:
            self.args.seed = given
            self._stage = self._stage_output_dir = None
            if self._stage_optimizer is not None:
                self._stage_optimizer.release()
            if self.state is not state:
                self._logs.pop(key, None)
                self._logs[key] = (origin["slices"], self.state.log_history)
                self._reached = self._first_step + self.state.global_step
            # Nothing of a stage stays behind: what it trained may be unlearned at any time.
            vars(self).pop("_epoch_iterator", None)
            self.accelerator.free_memory()
            for name in ("optimizer", "lr_scheduler", "train_dataloader"):
                setattr(self.callback_handler, name, None)
            del _paged_tensors()[paged:]
            self._remove_noise()
            self._remove_watchers()
            if hasattr(self.model, "disable_input_require_grads"):
                self.model.disable_input_require_grads()
            self.optimizer = self.lr_scheduler = None
            self.model_wrapped = self.model
            self._stack.deactivate()
            if self._set_up_model is not None:
                self._set_up_model.put_back()
            self.model.eval()

    def _remove_noise(self) -> None:
        """NEFTune's hook, which `Trainer` removes only where training came to its end."""
        handle = self.__dict__.pop("neftune_hook_handle", None)
        if handle is not None:
            handle.remove()
            vars(self.model.get_input_embeddings()).pop("neftune_noise_alpha", None)

    def _remove_watchers(self) -> None:
        """The hooks of `debug="underflow_overflow"`, which `Trainer` puts on every module whenever training begins."""
        for module in self.model.modules():
            for number, hooked in list(module._forward_hooks.items()):
                if isinstance(getattr(hooked, "__self__", None), DebugUnderflowOverflow):
                    del module._forward_hooks[number]

    @contextlib.contextmanager
    def _unprepared(self) -> Iterator[None]:
        """
        A model that Accelerate has not seen, before and after.

        For mixed precision it wraps the forward of the model it prepares and marks the model, so that the next stage
        would train without; and a base that serves must not stay wrapped.
        """
        before = {name: vars(self.model).get(name) for name in PREPARED}
        self.model.__dict__.pop("_is_accelerate_prepared", None)
        self.accelerator._models.clear()
        try:
            yield
        finally:
            self.accelerator._models.clear()
            set_attributes(self.model, before)
            self.model.__dict__.pop("_is_accelerate_prepared", None)

    def _fit(self, key: StageKey, checkpoint: str | None, ignore_keys_for_eval: list[str] | None) -> TrainOutput:
        """One run of `Trainer.train`: the only place where a stage's randomness begins."""
        self.args.data_seed = self.accelerator.dataloader_config.data_seed = None
        # Callbacks go on counting where the checkpoint left them.
        self.args.restore_callback_states_from_checkpoint = checkpoint is not None
        if compiles(self.accelerator):
            # What was compiled for other stages decides what is compiled for this one.
            torch.compiler.reset()
        set_seed(self.args.seed)
        self._stack.add(key)
        self._stack.train_only(key)
        try:
            output = super().train(resume_from_checkpoint=checkpoint, ignore_keys_for_eval=ignore_keys_for_eval)
        except BaseException:
            self.is_in_train = False
            raise
        if self._stage_optimizer is not None:
            # Whether or not an evaluation came last: a stage is what serves.
            self._stage_optimizer.serve()
        return output

    def _stage_dataset(self, key: StageKey) -> Any:
        """The dataset a stage trains on, ready for the data loader."""
        return self._stage_rows.select(key, self.folder.table)

    @contextlib.contextmanager
    def _fresh_state(self) -> Iterator[None]:
        """
        What may keep state (callbacks such as early stopping, a loss) is a copy of what was given, which stays as it
        is, or the stage is none.
        """
        given = list(self.callback_handler.callbacks)
        parts = self._parts_of_stages()
        before = {name: mark(part, self._shared) for name, part in parts.items()}
        self._copies: list[tuple[Any, Mark]] = []
        # Large, and shared by all copies.
        self._tokenizers = TokenizerSettings([self.processing_class, *parts.values()])
        self._note_state(self.train_dataset)
        try:
            for name in parts.keys() - {"train_dataset", "data_collator"}:
                copied = fresh_dataset(parts[name], self._shared) if "dataset" in name else self._copy(parts[name])
                setattr(self, name, copied)
                self._note_state(copied)
            for position, callback in enumerate(given):
                if isinstance(callback, ExportableState):
                    self.callback_handler.callbacks[position] = self._copy(callback)
            yield
            for name, part in parts.items():
                # A collator that is an object is copied for every loader, or was refused.
                if name != "data_collator" or isinstance(part, _FUNCTIONS):
                    self._refuse_changed_part(name, before[name], mark(part, self._shared))
        finally:
            self._tokenizers.put_back()
            for name in parts.keys() - {"train_dataset", "data_collator"}:
                setattr(self, name, parts[name])
            # Others may have come and gone. In the place of those that keep state a resume has put ones of its own.
            kinds = {type(callback) for callback in given if isinstance(callback, ExportableState)}
            now = [callback for callback in self.callback_handler.callbacks if type(callback) not in kinds]
            kept = [callback for callback in given if type(callback) in kinds or callback in now]
            self.callback_handler.callbacks = kept + [callback for callback in now if callback not in kept]

    def _parts_of_stages(self) -> dict[str, Any]:
        """What was given to the trainer and may keep state that a stage depends on."""
        names = ["data_collator", "compute_loss_func", "optimizer_cls_and_kwargs"]
        if evaluation_chooses(self.args, self.s3t_config):
            names += ["eval_dataset", "compute_metrics", "preprocess_logits_for_metrics"]
        return {"train_dataset": self._prepared, **{name: getattr(self, name) for name in names}}

    def _note_state(self, copied: Any) -> None:
        """Remember in which state a copy begins the stage."""
        self._copies.append((copied, mark(copied, self._shared)))

    def _refuse_changed_part(self, name: str, before: Mark, after: Mark) -> None:
        where = difference(before, after)
        if where is not None:
            raise IsolationError(
                f"{self._stage} changed `{name}`{f' in `{where}`' if where else ''}, which all stages share: the next "
                "one would depend on what this one saw. Each stage gets a copy where `copy.deepcopy` makes one; this "
                "is reached around it, by a callback or a global name, or cannot be copied. Let it keep no state."
            )

    def _get_dataloader(self, *args, **kwargs):
        """As in `Trainer`; each collates by a copy of the collator, so that what one draws moves no other."""
        given = self.data_collator
        self.data_collator = self._copy(given)
        if kwargs.get("is_training"):
            self._note_state(self.data_collator)
        try:
            return super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = given

    def _copy(self, part: Any) -> Any:
        """A copy of a collator or callback, state and all; what it shares with the trainer is not copied."""
        return fresh_copy(part, self._shared)

    @property
    def _shared(self) -> tuple:
        """What copies hold as it is, and what has no state that a stage might bring to the next."""
        return self, self.model, self.args, self.processing_class, self._live, self._stack

    def _stage_metrics(self) -> dict[str, float]:
        """The stage's own evaluation, if there is a set to evaluate on and someone asks for the numbers."""
        if self.eval_dataset is None or (self.s3t_config.select != "metric" and self.args.eval_strategy == "no"):
            return {}
        return self.evaluate()

    def _run_epoch(self, *args, **kwargs):
        """As in `Trainer`, which would go on for a step where the checkpoint is of the last one, inside an epoch."""
        if self._has_ended():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _has_ended(self) -> bool:
        """Whether the checkpoint that is resumed from was written as the stage came to its end, or was ended."""
        # Of a stage that begins, this says how the one before it ended.
        control = self.state.stateful_callbacks.get("TrainerControl", {}).get("args", {})
        return self.args.restore_callback_states_from_checkpoint and control.get("should_training_stop", False)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """As in `Trainer`; notes whether making batches draws random numbers, which a resume would not repeat."""
        # An epoch's first batch always draws: the data loader seeds its workers with it.
        begun = epoch_iterator is getattr(self, "_epoch_iterator", None)
        self._epoch_iterator = epoch_iterator
        before = RandomStates()
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._batches_are_random |= begun and RandomStates() != before
        return batches

    def training_step(self, model, inputs, *args, **kwargs):
        """As in `Trainer`; the first of a stage shows what the model is set up to, and what it makes for itself."""
        is_first = self._settled_model is None
        if is_first:
            self._know_optimizer()
            self._set_up_model = Look(self.model)
        try:
            loss = super().training_step(model, inputs, *args, **kwargs)
        except Exception as error:
            if is_first:
                refuse_failing_adapter(error, self.model)
            raise
        if is_first:
            self._settled_model = Look(self.model)
        # Trainer's own logs leave out what is not finite (`logging_nan_inf_filter`).
        self._finite.note(loss, self.state.global_step + 1)
        return loss

    def create_scheduler(self, *args, **kwargs):
        """As in `Trainer`, which has prepared the optimizer by then and makes no other for the stage."""
        self._know_optimizer()
        return super().create_scheduler(*args, **kwargs)

    def _know_optimizer(self) -> None:
        if self._stage_optimizer is None and self._stage is not None:
            self._stage_optimizer = StageOptimizer(self.optimizer, self.model, self._shared)

    def _get_grad_norm(self, model, grad_norm=None):
        norm = super()._get_grad_norm(model, grad_norm)
        self._finite.note(norm, self.state.global_step + 1)
        return norm

    def _get_train_sampler(self, train_dataset=None):
        sampler = super()._get_train_sampler(train_dataset)
        if isinstance(sampler, LengthGroupedSampler):
            return EpochSeededSampler(sampler, self.args.seed)
        return sampler

    # Checkpoints inside a stage

    @contextlib.contextmanager
    def _scratch_of_its_own(self) -> Iterator[None]:
        """While a stage trains, the folder for its checkpoints, once it has one, is no other trainer's."""
        self._scratch: Path | None = None
        with contextlib.ExitStack() as self._held_scratch:
            yield

    def _take_scratch(self, key: StageKey, origin: dict[str, Any]) -> None:
        """Have a folder for checkpoints, the same in every process; the first one holds it."""
        folder = None
        if self.is_world_process_zero():
            folder = self._held_scratch.enter_context(self.folder.scratch(key, origin["slices"]))
        (self._scratch,) = broadcast_object_list([folder])

    def _get_output_dir(self, trial):
        if self._stage is None:
            return super()._get_output_dir(trial)
        return str(self._stage_output_dir or self.folder.checkpoints(self._stage))

    def _save_checkpoint(self, model, trial):
        if any(gather_object([self._is_condemned()])):
            # A checkpoint would write down what was deleted, and more steps would be for nothing.
            self.control.should_training_stop = True
            return
        if self._stage_output_dir is None:
            # By `save_strategy` there are none; a callback asks for one.
            self._take_scratch(self._stage, self._stage_origin)
            self._stage_output_dir = self._scratch
        self._stage_optimizer.serve()
        self._refuse_diverged()
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
            # The record is what makes a checkpoint resumable: it comes when every process has written its part.
            self.accelerator.wait_for_everyone()
            if self.is_world_process_zero():
                # Between epochs there are no workers, unless they live on.
                between = float(self.state.epoch).is_integer() and not self.args.dataloader_persistent_workers
                at_rest = not self._batches_are_random or between
                exact = at_rest and not self._has_moved() and self._is_optimizer_held()
                self.folder.write_checkpoint_record(checkpoint, {**self._stage_origin, "resumes_exactly": exact})
        except (OSError, RuntimeError):
            if self.accelerator.num_processes > 1 or not self._is_condemned():
                raise
            shutil.rmtree(checkpoint, ignore_errors=True)
            self.control.should_training_stop = True

    def _is_condemned(self) -> bool:
        """
        Whether the stage in training saw what was deleted since: its checkpoints were removed, also one that was being
        written, and it will be discarded.
        """
        self.folder.refresh_ledger()
        return self._stage_origin["slices"] != self.folder.slice_digests(self._stage)

    def _is_optimizer_held(self) -> bool:
        """Whether a checkpoint brings the optimizer back; where it does not, that is said once."""
        why = self._stage_optimizer.not_held()
        if why is not None:
            logger.warning_once(
                f"Checkpoints inside a stage do not hold all of {self._stage_optimizer.name}: {why}. A stage that is "
                "interrupted is trained again from its beginning. Stages that are done stay. Choose another optimizer "
                'to resume inside of stages, or `save_strategy="no"` to save the room.'
            )
        return why is None

    def _has_moved(self) -> bool:
        """Whether what a resume would begin anew is not as the stage began: collator, data, loss, the model itself."""
        if self._tokenizers.have_changed():
            return True
        if any(mark(copied, self._shared) != begun for copied, begun in self._copies):
            return True
        return self._settled_model is not None and Look(self.model).differs(self._settled_model)

    def _last_checkpoint(self, key: StageKey, origin: dict[str, Any]) -> str | None:
        """The newest checkpoint of a stage that saw what the stage shall see, by the same recipe."""
        wanted = _as_json({**origin, "resumes_exactly": True})
        for checkpoint, record in self._checkpoints(key, self._scratch):
            is_same = {**record, "parts": None} == {**wanted, "parts": None}
            if is_same and not differing_parts(recorded_parts(record), wanted["parts"]):
                return str(checkpoint)
        return None

    def _checkpoints(self, key: StageKey, folder: Path | None) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The checkpoints inside a stage that are whole, with what they say, the newest first."""
        found = folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if folder is not None else ()
        for checkpoint in sorted(found, key=lambda path: int(path.name.rpartition("-")[2]), reverse=True):
            try:
                yield checkpoint, self.folder.read_checkpoint_record(checkpoint)
            except FolderError as error:
                logger.warning_once(f"{checkpoint.name} of {key} is not resumed from: {error}")

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the system: into its own folder, where everything is already written; into another, a copy.

        Args:
            output_dir (`str`, *optional*): The folder; `args.output_dir` if not given.
        """
        if _internal_call:
            if self.is_world_process_zero():
                Path(output_dir).mkdir(parents=True, exist_ok=True)
                self._stack.save(self._stage, Path(output_dir), self.folder.base_id)
        elif output_dir is not None and self.is_world_process_zero():
            self.s3t_model.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self._stack.fill(self._stage, self.folder.read_checkpoint_adapter(Path(resume_from_checkpoint)))
        self._stack.train_only(self._stage)

    def _save_optimizer_and_scheduler(self, output_dir):
        super()._save_optimizer_and_scheduler(output_dir)
        if self._stage_optimizer.has_two_weights and self.is_world_process_zero():
            with self._stage_optimizer.weights_of_training():
                tensors = {n: t.cpu().contiguous() for n, t in self._stack.tensors(self._stage).items()}
                save_file(tensors, Path(output_dir) / TRAINING_WEIGHTS_FILE, {"format": "pt"})

    def _load_optimizer_and_scheduler(self, checkpoint):
        self._know_optimizer()
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
            if (Path(checkpoint) / OPTIMIZER_NAME).is_file():
                saved = torch.load(Path(checkpoint) / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
                _restore_precision(self.optimizer, saved["state"])
            if self._stage_optimizer.has_two_weights:
                data = self.folder.read_checkpoint_file(Path(checkpoint), TRAINING_WEIGHTS_FILE)
                self._stage_optimizer.put_aside(lambda: self._stack.fill(self._stage, data))
            why = self._stage_optimizer.not_read_back()
        except Exception as error:
            if isinstance(error, (RuntimeError, OSError)) and not isinstance(error, S3TError):
                # No memory, no disk: the checkpoint has no part in it.
                raise
            why = f"{type(error).__name__}: {error}"
        if why is None and not is_finite(self._stack.tensors(self._stage)):
            why = "its weights are NaN or infinite"
        if why is not None:
            raise CheckpointError(f"{Path(checkpoint).name} is not resumed from: {why}.")
        # The folder may have another path than when the checkpoint was written.
        best = Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if checkpoint is not None and best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _load_best_model(self):
        # What is loaded are weights that serve.
        self._stage_optimizer.serve()
        try:
            self._load_from_checkpoint(self.state.best_model_checkpoint)
        except OSError:
            if not self._is_condemned():
                raise

    def create_model_card(self, *args, **kwargs) -> None:
        """Checkpoints of a stage get no model card; the system's is written when it is published."""

    # Evaluation and serving

    @property
    def s3t_model(self) -> S3TModel:
        """The live [`S3TModel`], which shares the trainer's base and folder."""
        with self._making_live:
            if self._live is None and self._stack.in_training is not None:
                raise S3TError(
                    f"The stage {self._stack.in_training} is in training, and a model that serves beside it must be "
                    "there before. Ask for `trainer.s3t_model` once before `train()`."
                )
            if self._live is None:
                self._live = self._model_type(self._stack, self.folder)
        return self._live

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        turns, given = self._stack.turns, self.compute_metrics
        turns.refuse_beside("evaluate")
        if given is not None:
            # It may ask the live model from another thread, and wait for the answer.
            self.compute_metrics = turns.callbacks("compute_metrics")(given)
        try:
            with (
                own_randomness(),
                preserved_randomness(),
                self._unprepared() if self._stage is None else contextlib.nullcontext(),
            ):
                yield
        finally:
            self.compute_metrics = given

    def evaluate(self, *args, **kwargs):
        """
        As `Trainer.evaluate`: with the ensemble, or while a stage trains with the stack so far. It draws from no
        random state that training uses.
        """
        with self._evaluating():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args, **kwargs):
        """As `Trainer.predict`, with the ensemble."""
        with self._evaluating():
            return super().predict(*args, **kwargs)

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """As in `Trainer`, with the ensemble unless a stage is training."""
        model = model if self._stage is not None else self.s3t_model
        return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys=ignore_keys)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """
        As in `Trainer`. Inside a stage logs carry `shard`, `sequence` (its number in the plan) and `depth`, entries of
        `log_history` also `stage`, its address. Steps, as `on_log` finds them in `state`, go on from stage to stage.
        """
        if self._stage is None:
            super().log(logs, start_time)
            return
        state, steps, number = self.state, self.state.global_step, len(self.state.log_history)
        # Not twice where a callback of `on_log` logs.
        state.global_step += 0 if self._is_logging else self._first_step
        outer, self._is_logging = self._is_logging, True
        try:
            super().log({**logs, **tags(self._stage, self.folder.plan)}, start_time)
        finally:
            state.global_step, self._is_logging = steps, outer
        state.log_history[number]["stage"] = str(self._stage)
        # Here Trainer has waited for the device anyway.
        self._refuse_diverged()

    @contextlib.contextmanager
    def _unheard(self) -> Iterator[None]:
        """What is trained for an audit is no part of the plan: no tracker hears of it, and no state tells of it."""
        state, logs, steps = self.state, self._logs, self._first_step
        self._logs, self._first_step = {}, 0
        try:
            with self.callback_handler.silenced():
                yield
        finally:
            self.state, self._logs, self._first_step = state, logs, steps

    # The audit

    @old_objects_passed_over()
    def verify(self, stages: str | Sequence[StageKey | str] | None = None) -> VerificationReport:
        """
        Train surviving stages again, from their first stage up, on the data left, and compare bit for bit (E3).

        Do it in a fresh process: in the one that trained the stages, state that a stage left there (in a global, a
        closure, a library) acts on the audit too, and is not found. The report says which stages that is so for, and a
        warning says so once.

        Args:
            stages (`"sample"` or a list of stages, *optional*):
                `None` for every valid stage, `"sample"` for one drawn at random, or keys such as `"shard-0/2-0"`.

        Returns:
            [`~hf_s3t.training.audit.VerificationReport`]:
                Which stages were trained again, and every tensor that differs.
        """
        return verify_stages(self, stages)


class S3TTrainer(S3TTrainerMixin, Trainer):
    """
    [`~transformers.Trainer`] for S3T systems: sequence and image classification, and any other task with one stack of
    transformer layers.

    Takes what `Trainer` takes, in its order, and two arguments more. `args.output_dir` is the system's folder;
    `num_train_epochs` and `max_steps` count per stage; `args.seed` is overridden by `s3t_config.seed`.

    To a callback every stage is a training, with its `on_train_begin`, its `state` and its steps. Trackers (those that
    `report_to` knows, and classes derived from them) see one run over all stages. In `on_log` steps go on from stage
    to stage, for every callback, and begin where the stages that are there end; logs carry `shard`, `sequence`
    (its number in the plan) and `depth`. After `train()`, `state.log_history` has the entries of all stages that it
    trained, in order, without those that saw what was deleted since.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model. It is never changed, and its head is initialised
            from the seed.
        args ([`~transformers.TrainingArguments`], *optional*): The recipe of a stage.
        data_collator, train_dataset, eval_dataset, processing_class: As in `Trainer`.
        compute_loss_func, compute_metrics, callbacks: As in `Trainer`.
        optimizer_cls_and_kwargs (`tuple[type, dict]`, *optional*):
            As in `Trainer`; every stage gives a copy of the arguments, and its own parameters, to the class. Arguments
            that hold parameters, a model or an optimizer are refused. Of an optimizer with two weights, as
            schedule-free ones have, a stage is the weights of its `eval()`.
        preprocess_logits_for_metrics: As in `Trainer`.
        model_init, optimizers: Refused: every stage starts a fresh optimizer on the one base model.
        peft_config ([`~peft.LoraConfig`], *optional*): The adapters; may be left out for a folder that has them.
            Without `target_modules` PEFT chooses them, where it has a default for the architecture.
        s3t_config ([`S3TConfig`], *optional*): The system; may be left out for a folder that has one.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Its children, before any training; see `hf_s3t.errors`.

    Example:

    ```python
    from peft import LoraConfig
    from transformers import AutoModelForSequenceClassification, TrainingArguments
    from hf_s3t import S3TConfig, S3TTrainer

    trainer = S3TTrainer(
        model=AutoModelForSequenceClassification.from_pretrained("roberta-large", num_labels=2),
        args=TrainingArguments(output_dir="roberta-sst2-s3t", learning_rate=1e-5, num_train_epochs=10),
        train_dataset=tokenized_dataset,
        peft_config=LoraConfig(r=16, lora_alpha=32, use_rslora=True, target_modules=["query", "value"]),
        s3t_config=S3TConfig(num_shards=5, num_slices=7, layers_per_slice=3, id_column="id"),
    )
    trainer.train()
    trainer.s3t_model.unlearn([17, 4211])
    ```
    """

    @own_randomness()
    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable | None = None,
        compute_loss_func: Callable | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list | None = None,
        optimizers: tuple = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict] | None = None,
        preprocess_logits_for_metrics: Callable | None = None,
        peft_config: PeftConfig | None = None,
        s3t_config: S3TConfig | None = None,
    ):
        check_kinds(model, args, train_dataset, eval_dataset)
        check_parts(
            processing_class,
            data_collator=data_collator,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        args = args if args is not None else TrainingArguments(output_dir="s3t_system")
        refuse_shared_state(model, model_init, optimizers, data_collator, compute_loss_func)
        refuse_bound_optimizer(optimizer_cls_and_kwargs, callbacks)
        blueprint = draw_up(model, args, train_dataset, eval_dataset, callbacks, peft_config, s3t_config, self._layout)
        reads_its_own_way = self._reads_rows_its_own_way()
        if not reads_its_own_way:
            check_inputs(train_dataset, model, args)
            check_loss(type(self), model, args, train_dataset, (compute_loss_func, data_collator))
        makes_answers = data_collator is not None or compute_loss_func is not None
        check_answers(train_dataset, makes_answers or reads_its_own_way)
        if compute_loss_func is None and not reads_its_own_way and collates_as_stored(data_collator):
            check_rows(train_dataset, model, blueprint.head, args)
        check_choice(args, eval_dataset, compute_metrics)
        self._stack = stack_of(model, blueprint, self._model_type.stack_type)
        default_ddp_arguments(args)
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        self._set_up(blueprint)

    def _reads_rows_its_own_way(self) -> bool:
        """Whether a class made of this one decides what is done with rows."""
        names = (
            "compute_loss", "training_step", "get_train_dataloader", "_get_dataloader", "_prepare_inputs",
            "_set_signature_columns_if_needed", "_remove_unused_columns", "_get_collator_with_removed_columns",
        )  # fmt: skip
        return any(getattr(type(self), name) is not getattr(S3TTrainer, name) for name in names)


def stack_of(model: nn.Module, blueprint: Blueprint, stack_type: type[StageStack]) -> StageStack:
    """The stack of a blueprint, on its base model with a head from the seed."""
    # First what may be refused: nothing of the base has changed then.
    keep_4_bit_weights(model)
    stack = stack_type(model, blueprint.peft_config, blueprint.layers, blueprint.head)
    seed_head(model, blueprint.head, blueprint.config.seed)
    checkpoint_without_reentry(model)
    log_casts_once(model)
    return stack


def checkpoint_without_reentry(model: nn.Module) -> None:
    """
    Have a base that checkpoints activations do so in the way that needs no gradients at its input.

    `peft.prepare_model_for_kbit_training` turns checkpointing on without saying which way, and PyTorch's default is
    the other.
    """
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.gradient_checkpointing_enable({"use_reentrant": False})


def refuse_shared_state(model, model_init, optimizers, data_collator, compute_loss_func) -> None:
    """Refuse arguments that would carry state from one stage into the next."""
    for part in (data_collator, compute_loss_func):
        fresh_copy(part, (model,))
    if model is None or model_init is not None:
        raise ConfigError(
            "S3TTrainer needs `model`, the base that all stages share; `model_init` would make another one for every "
            "stage. Give the model."
        )
    if any(part is not None for part in optimizers):
        raise ConfigError(
            "`optimizers` would carry an optimizer's state from stage to stage. Give `optimizer_cls_and_kwargs`, from "
            "which every stage makes its own."
        )


def default_ddp_arguments(args: TrainingArguments) -> None:
    """Every trainable parameter of a stage takes part in every step, so DDP has none to look for."""
    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _paged_tensors() -> list:
    """What bitsandbytes keeps of every paged optimizer for as long as the process lives."""
    functional = sys.modules.get("bitsandbytes.functional")
    return functional.GlobalPageManager.get_instance().paged_tensors if functional is not None else []


def _restore_precision(optimizer: Any, saved: dict[int, dict[str, Any]]) -> None:
    """Put what an optimizer keeps back as it was: PyTorch rounds it to the precision of its parameter in loading."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in saved.items():
        own = optimizer.state[parameters[number]]
        for name, value in values.items():
            loaded = own.get(name)
            if isinstance(value, torch.Tensor) and isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
                own[name] = value.to(loaded.device)


def _summary(outputs: list[TrainOutput]) -> TrainOutput:
    steps = sum(output.global_step for output in outputs)
    loss = sum(output.training_loss * output.global_step for output in outputs) / steps if steps else 0.0
    runtime = sum(output.metrics.get("train_runtime", 0.0) for output in outputs)
    return TrainOutput(steps, loss, {"train_runtime": runtime, "train_loss": loss, "stages_trained": len(outputs)})
