"""What the parts of a trainer share. To type checkers each is a `Trainer`, beside which it is put at run time."""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedModel, TrainerCallback

from ..config import S3TConfig
from ..errors import ConfigError, S3TError
from ..folder.claims import HeldClaim
from ..folder.system import SystemFolder
from ..model.layers import LayerGroups
from ..model.stack import StageStack
from ..plan.stages import StageKey
from .rows import StageRows


if TYPE_CHECKING:
    from transformers import Trainer as _Host
else:
    _Host = object


class TrainerMixin(_Host):
    """
    A part of a trainer: a mixin that comes before a class of Transformers' [`~transformers.Trainer`].

    Users derive from the whole. So what the parts, and the functions of this room, use of each other begins with an
    underscore, and their own attributes and methods do not meet it.
    """

    model: PreTrainedModel
    folder: SystemFolder
    s3t_config: S3TConfig
    _stack: StageStack
    _layers: LayerGroups
    # None where there is no training set.
    _stage_rows: StageRows | None
    # The dataset of all stages, ready to be fed.
    _prepared: Any
    # None between stages.
    _stage: StageKey | None
    # What the trainer class was given that no other takes, by name: it decides stages too.
    _besides: dict[str, Any] = {}
    # Under which a stage is trained; None where nobody shares the folder's work, and in all processes but the first.
    _claim: HeldClaim | None = None

    def _have_callbacks(self, callbacks: list[TrainerCallback]) -> None:
        self.callback_handler.callbacks = callbacks

    @property
    def _output_dir(self) -> str:
        # `TrainingArguments` put a name in the place of none.
        return str(self.args.output_dir)

    @property
    def _rows_of_stages(self) -> StageRows:
        if self._stage_rows is None:
            raise ConfigError("There is no `train_dataset` to train on. Give it to the trainer.")
        return self._stage_rows

    @property
    def _stage_in_training(self) -> StageKey:
        if self._stage is None:
            raise S3TError("No stage is in training: this belongs to the steps of one. Call `train()`.")
        return self._stage
