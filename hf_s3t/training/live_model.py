"""The live model that serves beside a trainer, on its base and folder."""

import threading
from typing import Any

from ..errors import S3TError
from ..model.modeling import S3TModel
from .trainer_mixin import TrainerMixin


class LiveModel(TrainerMixin):
    """The part of a trainer that has a live model, once somebody asks for it."""

    # The baselines are served by others.
    _model_type: type[S3TModel] = S3TModel

    def _begin_without_live_model(self) -> None:
        self._live: S3TModel | None = None
        self._making_live = threading.RLock()

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

    @property
    def _shared(self) -> tuple[Any, ...]:
        """What copies hold as it is, and what has no state that a stage might bring to the next."""
        return self, self.model, self.args, self.processing_class, self._live, self._stack
