"""Checkpoints inside a stage: where they lie, whether a resume from one is exact, and reading them."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn
from transformers.trainer import OPTIMIZER_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from ..errors import CheckpointError, FolderError, S3TError
from ..folder.claims import ClaimLostError
from ..folder.layout import TRAINING_WEIGHTS_FILE
from ..plan.stages import StageKey
from .divergence import is_finite
from .first_process import in_first_process
from .parts import differing_parts, recorded_parts
from .stage_watch import StageWatch


logger = logging.get_logger(__name__)


class StageCheckpoints(StageWatch):
    """The part of a trainer that writes and reads checkpoints of the stage in training."""

    @contextlib.contextmanager
    def _scratch_of_its_own(self) -> Iterator[None]:
        """While a stage trains, the folder for its checkpoints, once it has one, is no other trainer's."""
        self._scratch: Path | None = None
        with contextlib.ExitStack() as self._held_scratch:
            yield

    def _take_scratch(self, key: StageKey, origin: dict[str, Any]) -> None:
        """Have a folder for checkpoints, the same in all processes, unless the claim is lost; the first holds it."""

        def take() -> Path | None:
            with contextlib.suppress(ClaimLostError):
                scratch = self.folder.scratch(key, origin["slices"], self._claim)
                return self._held_scratch.enter_context(scratch)
            return None

        self._scratch = in_first_process(take)

    def _is_condemned(self) -> bool:
        """Also where another trainer has taken the stage over: what is written by this one would be in its way."""
        return super()._is_condemned() or (self._claim is not None and not self._claim.is_held())

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in `Trainer`; a stage that another trainer has taken over goes no further."""
        loss = super().training_step(*args, **kwargs)
        if self._claim is not None and self._claim.is_lost and self.accelerator.num_processes == 1:
            self.control.should_training_stop = True
        return loss

    def _get_output_dir(self, trial: Any) -> str:
        if self._stage is None:
            return super()._get_output_dir(trial)
        return str(self._stage_output_dir or self.folder.checkpoints(self._stage))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        if any(gather_object([self._is_condemned()])):
            # A checkpoint would write down what was deleted, and more steps would be for nothing.
            self.control.should_training_stop = True
            return
        if self._stage_output_dir is None:
            # By `save_strategy` there are none; a callback asks for one.
            self._take_scratch(self._stage_in_training, self._stage_origin)
            self._stage_output_dir = self._scratch
        self._know_optimizer().serve()
        self._refuse_diverged()
        checkpoint = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        try:
            with self._failing_together():
                super()._save_checkpoint(model, trial)
            # The record is what makes a checkpoint resumable: it comes when every process has written its part.
            if any(gather_object([self._is_condemned()])):
                # Nobody resumes from it.
                raise CheckpointError(f"{checkpoint} is of a stage that is discarded.")
            in_first_process(lambda: self._record_checkpoint(checkpoint))
        except (OSError, RuntimeError) as error:
            # The former is raised in every process, and what fails else perhaps in one alone.
            is_told = isinstance(error, CheckpointError)
            if not is_told and (self.accelerator.num_processes > 1 or not self._is_condemned()):
                raise
            shutil.rmtree(checkpoint, ignore_errors=True)
            self.control.should_training_stop = True

    @contextlib.contextmanager
    def _failing_together(self) -> Iterator[None]:
        """Inside, what fails in one process is raised in all, when each has done its part."""
        failed: Exception | None = None
        try:
            yield
        except (OSError, RuntimeError) as error:
            if self.accelerator.num_processes == 1:
                raise
            failed = error
        told = [one for one in gather_object([f"{type(failed).__name__}: {failed}" if failed else None]) if one]
        if failed is not None:
            raise failed
        if told:
            raise S3TError(f"A checkpoint could not be written: {told[0]}")

    def _record_checkpoint(self, checkpoint: Path) -> None:
        # Workers make batches ahead of the steps, but between epochs there are none unless they persist.
        between = float(self.state.epoch).is_integer() and not self.args.dataloader_persistent_workers
        at_rest = not self._batches_are_random or between
        exact = at_rest and not self._has_moved() and self._is_optimizer_held()
        self.folder.write_checkpoint_record(checkpoint, {**self._stage_origin, "resumes_exactly": exact})

    def _is_optimizer_held(self) -> bool:
        """Whether a checkpoint brings the optimizer back; where it does not, that is said once."""
        optimizer = self._know_optimizer()
        why = optimizer.not_held()
        if why is not None:
            logger.warning_once(
                f"Checkpoints inside a stage do not hold all of {optimizer.name}: {why}. A stage that is "
                "interrupted is trained again from its beginning. Stages that are done stay. Choose another optimizer "
                'to resume inside of stages, or `save_strategy="no"` to save the room.'
            )
        return why is None

    def _last_checkpoint(self, key: StageKey, origin: dict[str, Any]) -> str | None:
        """The newest checkpoint of a stage that saw what the stage shall see, by the same recipe."""
        wanted = _as_json({**origin, "resumes_exactly": True})
        for checkpoint, record in self._checkpoints(key, *([] if self._scratch is None else [self._scratch])):
            is_same = {**record, "parts": None} == {**wanted, "parts": None}
            if is_same and not differing_parts(recorded_parts(record), wanted["parts"]):
                return str(checkpoint)
        return None

    def _checkpoints(self, key: StageKey, *folders: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
        """The checkpoints inside a stage that are whole, with what they say, the newest first."""
        found = [checkpoint for folder in folders for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
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
                folder = Path(output_dir if output_dir is not None else self._get_output_dir(None))
                folder.mkdir(parents=True, exist_ok=True)
                self._stack.save(self._stage_in_training, folder, self.folder.base_id)
        elif output_dir is not None and self.is_world_process_zero():
            self.s3t_model.save_pretrained(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        key = self._stage_in_training
        self._stack.fill(key, self.folder.read_checkpoint_adapter(Path(resume_from_checkpoint)))
        self._stack.train_only(key)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        optimizer = self._know_optimizer()
        if optimizer.has_two_weights and self.is_world_process_zero():
            with optimizer.weights_of_training():
                tensors = {n: t.cpu().contiguous() for n, t in self._stack.tensors(self._stage_in_training).items()}
                save_file(tensors, Path(output_dir) / TRAINING_WEIGHTS_FILE, {"format": "pt"})

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        # Its attributes are noted as they begin, so before anything is read into them.
        self._know_optimizer()
        try:
            why = self._read_optimizer(Path(checkpoint))
        except Exception as error:
            if isinstance(error, (RuntimeError, OSError)) and not isinstance(error, S3TError):
                # Memory or disk failed, and not the checkpoint.
                raise
            why = f"{type(error).__name__}: {error}"
        if why is None and not is_finite(self._stack.tensors(self._stage_in_training)):
            why = "its weights are NaN or infinite"
        if why is not None:
            raise CheckpointError(f"{Path(checkpoint).name} is not resumed from: {why}.")
        # The folder may have another path than when the checkpoint was written.
        best = Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)

    def _read_optimizer(self, checkpoint: Path) -> str | None:
        """Have the optimizer of a checkpoint; or what of it cannot be read back, as a message names it."""
        super()._load_optimizer_and_scheduler(str(checkpoint))
        if (checkpoint / OPTIMIZER_NAME).is_file():
            saved = torch.load(checkpoint / OPTIMIZER_NAME, map_location="cpu", weights_only=True)
            _restore_precision(self.optimizer, saved["state"])
        optimizer = self._know_optimizer()
        if optimizer.has_two_weights:
            data = self.folder.read_checkpoint_file(checkpoint, TRAINING_WEIGHTS_FILE)
            optimizer.put_aside(lambda: self._stack.fill(self._stage_in_training, data))
        return optimizer.not_read_back()

    def _load_best_model(self) -> None:
        # A checkpoint holds the weights that serve, so these have to be the ones in the model.
        self._know_optimizer().serve()
        try:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
        except OSError:
            if not self._is_condemned():
                raise

    def _has_ended(self) -> bool:
        """Whether the checkpoint that is resumed from was written as the stage came to its end, or was ended."""
        # Where nothing is resumed, the state is still that of the stage before.
        # Declared as the list of which `TrainerState` makes a dict.
        states: dict[str, Any] = self.state.stateful_callbacks  # type: ignore[assignment]
        control = states.get("TrainerControl", {}).get("args", {})
        return self.args.restore_callback_states_from_checkpoint and bool(control.get("should_training_stop", False))

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As in `Trainer`, which would go on for a step where the checkpoint is of the last one, inside an epoch."""
        if self._has_ended():
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))


def _restore_precision(optimizer: Any, saved: dict[int, dict[str, Any]]) -> None:
    """Put what an optimizer keeps back as it was: PyTorch rounds it to the precision of its parameter in loading."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in saved.items():
        own = optimizer.state[parameters[number]]
        for name, value in values.items():
            loaded = own.get(name)
            if isinstance(value, torch.Tensor) and isinstance(loaded, torch.Tensor) and loaded.dtype != value.dtype:
                own[name] = value.to(loaded.device)
