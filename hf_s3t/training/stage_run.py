"""One run of `Trainer.train`, which makes one stage: what comes before and after, and the hooks of its steps."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import get_sampler
from accelerate.utils import broadcast_object_list, gather_object
from torch.utils.data import DataLoader
from transformers import set_seed
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from ..errors import ConfigError, IsolationError, S3TError, counted
from ..model.fresh_copies import fresh_copy, fresh_dataset
from ..model.randomness import own_randomness
from ..plan.stages import StageKey, stage_seed
from ..records.validity import is_current
from .accelerator import accelerator_settings, compiles, refuse_changed_accelerator
from .checkpoints import StageCheckpoints
from .fresh_parts import FreshParts
from .prepared_base import buffers_digest, paged_tensors, remove_watchers, unprepared
from .refusals import check_accelerator, evaluation_chooses
from .sampler import EpochSeededSampler, ReplayDraw, replayed
from .stage_memory import StageMemory
from .stage_records import StageRecords


logger = logging.get_logger(__name__)


class RowsMoved(S3TError):
    """Rows came to the slices of a stage, or went, between the choice of what it is trained on and its beginning."""


class StageRuns(StageMemory, StageRecords, StageCheckpoints):
    """The part of a trainer that runs `Trainer.train` for a stage. Which stages shall be there, it does not know."""

    # Of the stage in training: how many rows (or packs), the first ones, are of earlier slices, and what draws them.
    _num_earlier: int
    _draw: ReplayDraw | None
    _sampler_of_stage: Any

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`; what Accelerate was told besides arguments meets their refusals."""
        super().create_accelerator_and_postprocess()
        check_accelerator(self.accelerator)
        self._accelerator_settings = accelerator_settings(self.accelerator)

    def _refuse_changed_accelerator(self) -> None:
        refuse_changed_accelerator(self.accelerator, self._accelerator_settings)

    def _train_stage(
        self, key: StageKey, resume: bool, ignore_keys_for_eval: list[str] | None = None
    ) -> TrainOutput | None:
        """Train a stage; `None` if a deletion was first, before it began or before it was written."""
        with self._occupied(key, anew=True), self._dropped_on_error(key), self._scratch_of_its_own():
            # A live model may have deleted since the stage was chosen.
            origin = self._origin_of_all(key)
            if origin is None:
                return None
            counts = self._counts(key)
            # After it was told what that is: what is loaded now is that, or the stage is not written.
            frozen = self._bring_in(key)
            self._refuse_upon_diverged(key)
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
            is_kept = self._write(key, self._record(key, origin, counts, frozen, frozen_after, metrics))
        return output if is_kept else None

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
            f"{key} was ended after {done} of {counted(planned, 'step')}, and is discarded: nothing in the recipe "
            "says where. A callback ended it, or its examples make no batch (`dataloader_drop_last`). Mend that, and "
            "call `train()` again; an evaluation may end a stage with `load_best_model_at_end=True`."
        )

    @contextlib.contextmanager
    def _occupied(self, key: StageKey, anew: bool = False) -> Iterator[None]:
        """The base is a stage's: a live model on it switches stages off meanwhile, and attaches and drops none."""
        self._stack.turns.refuse_inside("train")
        with self._making_live:
            self._refuse_beside_a_stage()
            with self._live.at_rest() if self._live is not None else contextlib.nullcontext():
                # What is to be grown anew, and serves without rows that came, with what stands on it.
                old = frozenset(one for one in self._stack.loaded if anew and key in one.lineage)
                if self._live is not None and old:
                    self._live.give_up(old)
                self._stack.in_training = key
        try:
            # After the live model's lock is released: its holder may wait for a call, which waits for its turn.
            with own_randomness(), self._stack.turns.taken():
                yield
        finally:
            self._stack.in_training = None
            self._stack.watch.begin_anew()

    def _refuse_beside_a_stage(self) -> None:
        if self._stack.in_training is not None:
            raise S3TError(
                f"The stage {self._stack.in_training} is in training on the same base. Let its `train()` come to its "
                "end first."
            )

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
        if any(gather_object([not is_current(origin, self.folder.slice_digests(key))])):
            # A stage that saw more than it says would outlive what it saw.
            self.args.seed, self.train_dataset = given, self._prepared
            raise RowsMoved(
                f"Rows came to the slices of {key}, or went, as it was about to begin. Call `train()` again."
            )
        self._draw, self._sampler_of_stage = self._draw_of(self.train_dataset), None
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
        for name in ("_epoch_iterator", "_fresh_parts", "_sampler_of_stage", "_draw"):
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

    def _draw_of(self, dataset: Any) -> ReplayDraw | None:
        """What the epochs of a stage take of its dataset, where that is not everything."""
        earlier, config = self._num_earlier, self.s3t_config
        if not earlier or config.replay == 1:
            return None
        return ReplayDraw(earlier, len(dataset) - earlier, config.num_replayed(earlier), self.args.seed)

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
        if trains:
            # Accelerate may have put one of its own in the place of Trainer's.
            sampler = get_sampler(loader)
            self._sampler_of_stage = self._sampler_of_stage if sampler is None else sampler
        return loader

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """As in `Trainer`, which looks through a whole model, and for each parameter of it through all these names."""
        if model is self.model and self._stage is not None:
            # What a stage does not train comes to no optimizer.
            model = self._stack.section(self._stage)
        return super().get_decay_parameter_names(model)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        sampler = super()._get_train_sampler(train_dataset)
        if self._stage is not None and self._draw is not None:
            sampler = replayed(sampler, self._draw)
        elif isinstance(sampler, LengthGroupedSampler):
            sampler = EpochSeededSampler(sampler, self.args.seed)
        self._sampler_of_stage = sampler
        return sampler

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        """As in `Trainer`; an epoch that a resume begins inside of is drawn as what it is, not as the first."""
        begins = epoch_iterator is not getattr(self, "_epoch_iterator", None)
        if begins and hasattr(self._sampler_of_stage, "set_epoch"):
            # The loader does not find it below what skips batches, where processes share or are sent them.
            self._sampler_of_stage.set_epoch(int(self.state.epoch))
        batches = super().get_batch_samples(epoch_iterator, num_batches, device)
        if begins:
            self._refuse_undrawn()
        return batches

    def _refuse_undrawn(self) -> None:
        """A trainer class that samples its own way would see all rows, and record a share of them."""
        if self._draw is not None and not self._draw.is_used and self.is_world_process_zero():
            raise ConfigError(
                f"replay={self.s3t_config.replay}, but nothing draws a share of the earlier slices: "
                f"{type(self).__name__} has samplers or data loaders of its own. Have its `_get_train_sampler` or "
                "`get_train_dataloader` go on from what `super()` returns, or leave `replay` out."
            )

    def num_examples(self, dataloader: Any) -> int:
        """As in `Trainer`, which looks at the dataset, of which an epoch may take a share."""
        draw = getattr(get_sampler(dataloader), "draw", None) if isinstance(dataloader, DataLoader) else None
        return len(draw) if draw is not None else super().num_examples(dataloader)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `Trainer`; a stage that is not finite is noticed here, where `Trainer` has waited for the device."""
        super().log(logs, start_time)
        if self._stage is not None:
            self._refuse_diverged()
