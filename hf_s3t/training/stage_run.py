"""One run of `Trainer.train`, which makes one stage: what comes before and after, and the hooks of its steps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list, gather_object
from transformers import set_seed
from transformers.trainer_pt_utils import BatchRebalanceSampler, LengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..errors import IsolationError, S3TError
from ..model.fresh_copies import fresh_copy, fresh_dataset
from ..model.randomness import own_randomness
from ..plan.stages import StageKey, stage_seed
from .accelerator import accelerator_settings, compiles, refuse_changed_accelerator
from .checkpoints import StageCheckpoints
from .fresh_parts import FreshParts
from .prepared_base import buffers_digest, paged_tensors, remove_watchers, unprepared
from .refusals import check_accelerator, evaluation_chooses
from .sampler import EpochSeededSampler, ReplayBatches, ReplayDraw, ReplaySampler
from .stage_memory import StageMemory
from .stage_records import StageRecords


logger = logging.get_logger(__name__)


class StageRuns(StageMemory, StageRecords, StageCheckpoints):
    """The part of a trainer that runs `Trainer.train` for a stage. Which stages shall be there, it does not know."""

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; what Accelerate was told besides arguments meets their refusals."""
        super().create_accelerator_and_postprocess()
        check_accelerator(self.accelerator)
        self._accelerator_settings = accelerator_settings(self.accelerator)

    def _refuse_changed_accelerator(self) -> None:
        refuse_changed_accelerator(self.accelerator, self._accelerator_settings)

    def _train_stage(self, key: StageKey, resume: bool, ignore_keys_for_eval: list[str] | None = None) -> TrainOutput:
        with self._occupied(key), self._dropped_on_error(key), self._scratch_of_its_own():
            frozen = self._bring_in(key)
            self._refuse_upon_diverged(key)
            origin = self._origin(key)
            (is_begun,) = broadcast_object_list([self.folder.has_checkpoints(key)])
            if self.args.save_strategy != "no" or is_begun:
                self._take_scratch(key, origin)
            (checkpoint,) = broadcast_object_list([self._last_checkpoint(key, origin) if resume else None])
            buffers = buffers_digest(self.model)
            self._begin_stage_on_curve()
            with self._training(key, self._scratch, origin):
                output = self._fit(key, checkpoint, ignore_keys_for_eval)
                self._refuse_half_trained(key)
                self._refuse_diverged()
                self._say_what_was_not_finite(key)
                metrics = {**output.metrics, **self._stage_metrics()}
                self._last_step = self._first_step + self.state.global_step
                self._refuse_changed_model(key)
            frozen_after = self._stack.digest(key.lineage[:-1])
            self._refuse_changed_below(key, frozen, frozen_after)
            if buffers_digest(self.model) != buffers:
                raise IsolationError(
                    f"Training {key} changed buffers of the base model, on which all stages stand: the next stage "
                    "would depend on what this one saw. Use a model whose forward pass keeps nothing."
                )
            self._write(key, self._record(key, origin, frozen, frozen_after, metrics))
        return output

    def _refuse_changed_below(self, key: StageKey, before: str, after: str) -> None:
        if after == before:
            return
        # They differ from their files now, so they are loaded again when they are needed.
        for stage in key.lineage[:-1]:
            self._stack.mark(stage, None)
        raise S3TError(
            f"Training {key} changed a stage below it, which must be frozen. A callback or optimizer wrote to "
            "parameters without gradients; remove it."
        )

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
            # After the live model's lock is released: its holder may wait for a call, which waits for its turn.
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
        self._begin_watch(key, output_dir, origin)
        # Persistent workers of evaluations keep random states from stage to stage: each stage makes its own.
        vars(self).pop("_eval_dataloaders", None)
        paged, state = len(paged_tensors()), self.state
        self.optimizer, self.lr_scheduler, self._created_lr_scheduler = None, None, False
        self.model_wrapped = self.model
        try:
            with unprepared(self.model, self.accelerator):
                self._fresh_parts = FreshParts(self, key, self._parts_of_stages())
                with self._fresh_parts.in_place():
                    yield
        finally:
            self.args.seed = given
            self._stage = self._stage_output_dir = None
            if self._stage_optimizer is not None:
                self._stage_optimizer.release()
            if self.state is not state:
                self._keep_logs(key, origin)
            self._let_go(paged)

    def _let_go(self, paged: int) -> None:
        """Keep nothing of a stage: what it trained may be unlearned at any time."""
        for name in ("_epoch_iterator", "_fresh_parts", "_sampler_of_stage"):
            vars(self).pop(name, None)
        self.accelerator.free_memory()
        for name in ("optimizer", "lr_scheduler", "train_dataloader"):
            setattr(self.callback_handler, name, None)
        del paged_tensors()[paged:]
        self._remove_noise()
        remove_watchers(self.model)
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
            # A stage is the weights that serve, also where no evaluation has put them into the model.
            self._stage_optimizer.serve()
        return output

    def _stage_metrics(self) -> dict[str, float]:
        """What is measured of a stage that is trained, for its record."""
        return {}

    def _stage_dataset(self, key: StageKey) -> Any:
        """The dataset a stage trains on, ready for the data loader: what earlier slices hold, then the new slice."""
        self._num_earlier = sum(self._rows_of_stages.sizes(key, self.folder.table)[:-1])
        return self._rows_of_stages.select(key, self.folder.table)

    def _parts_of_stages(self) -> dict[str, Any]:
        """What was given to the trainer and may keep state that a stage depends on."""
        names = ["data_collator", "compute_loss_func", "optimizer_cls_and_kwargs"]
        if evaluation_chooses(self.args, self.s3t_config):
            names += ["eval_dataset", "compute_metrics", "preprocess_logits_for_metrics"]
        return {"train_dataset": self._prepared, **{name: getattr(self, name) for name in names}}

    def _copy(self, part: Any) -> Any:
        """A copy of a collator or callback, state and all; what it shares with the trainer is not copied."""
        return fresh_copy(part, self._shared)

    def _get_dataloader(self, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; each collates by a copy of the collator, so that what one draws moves no other."""
        given, trains = self.data_collator, kwargs.get("is_training") and self._stage is not None
        self.data_collator = self._copy(given)
        if trains:
            self._fresh_parts.note(self.data_collator)
        try:
            loader = super()._get_dataloader(*args, **kwargs)
        finally:
            self.data_collator = given
        if trains and hasattr(self._sampler_of_stage, "set_epoch"):
            # Of several processes in mid-epoch, the loader would not find it to announce the epoch to.
            loader.set_sampler(self._sampler_of_stage)
        return loader

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """As in `Trainer`, which looks through a whole model, and for each parameter of it through all these names."""
        if model is self.model and self._stage is not None:
            # What a stage does not train comes to no optimizer.
            model = self._stack.section(self._stage)
        return super().get_decay_parameter_names(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = self._sampler_of_stage = self._in_epochs(super()._get_train_sampler(train_dataset), train_dataset)
        return sampler

    def _in_epochs(self, sampler: Any, train_dataset: Any) -> Any:
        """Trainer's sampler, or one in its place that makes every epoch of the stage's seed and the epoch alone."""
        if self._stage is not None and self._num_earlier and self.s3t_config.replay < 1:
            dataset = self.train_dataset if train_dataset is None else train_dataset
            num_new = len(dataset) - self._num_earlier
            num_drawn = self.s3t_config.num_replayed(self._num_earlier)
            draw = ReplayDraw(self._num_earlier, num_new, num_drawn, self.args.seed)
            batches = isinstance(sampler, BatchRebalanceSampler)
            return ReplayBatches(sampler, draw) if batches else ReplaySampler(sampler, draw)
        if isinstance(sampler, LengthGroupedSampler):
            return EpochSeededSampler(sampler, self.args.seed)
        return sampler

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; a stage that is not finite is noticed here, where `Trainer` has waited for the device."""
        super().log(logs, start_time)
        if self._stage is not None:
            self._refuse_diverged()
