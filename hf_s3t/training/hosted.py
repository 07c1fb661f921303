"""What a trainer class brings along, kept to the stage in training: its forward, its counters, its own arguments."""

import contextlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import Trainer

from ..errors import ConfigError
from ..plan.stages import StageKey
from .additions import Additions
from .assigned import AssignedRuns
from .host import HostedBase, KeptByHost
from .reference import ScoringEnsemble
from .rows import numbered


# What a method that prepares rows may ask for, where it is called again.
_OF_TRAINING = "train"
# Where classes of TRL gather what an evaluation tells besides the loss.
_GATHERED = ("_metrics", "_stored_metrics")


class HostedRuns(AssignedRuns, Additions):
    """The part of a trainer that keeps a trainer class, whichever it is, to what a stage may have of it."""

    _host: type[Trainer]
    _hosted_base: HostedBase
    _kept_by_host: KeptByHost
    # Whether the class made rows of its own of the dataset.
    _is_prepared_by_host: bool

    @contextlib.contextmanager
    def _training(self, key: StageKey, output_dir: Path | None, origin: dict[str, Any]) -> Iterator[None]:
        self._kept_by_host.begin_anew()
        try:
            with self._hosted_base.in_place(), super()._training(key, output_dir, origin):
                yield
        finally:
            # It may hold rows, or what was generated of them.
            self._kept_by_host.begin_anew()

    def _has_moved(self) -> bool:
        return self._kept_by_host.has_moved() or super()._has_moved()

    def _parts_of_stages(self) -> dict[str, Any]:
        # As the class keeps them: of a name it may have made what it names.
        kept = {name: getattr(self, name) for name in self._besides if getattr(self, name, None) is not None}
        return {**super()._parts_of_stages(), **kept}

    @property
    def _ensemble(self) -> Any:
        return ScoringEnsemble(self.s3t_model) if self._hosted_base.has_another_forward else self.s3t_model

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        if self._stage is None and hasattr(self.args, "num_generations"):
            raise ConfigError(
                f"{self._host.__name__} evaluates by what the model in training generates, and no stage is in "
                "training: it would be the bare base. Ask for `eval_strategy`, which evaluates stages, or generate by "
                "`trainer.s3t_model.generate` and score that."
            )
        for name in _GATHERED:
            # What `predict`, or an evaluation that broke off, left there would be counted in.
            gathered = getattr(self, name, None)
            if isinstance(gathered, dict):
                gathered.get("eval", {}).clear()
        with super()._evaluating():
            yield

    def _prepare_whole(self, dataset: Any) -> Any:
        if not self._is_prepared_by_host:
            return dataset
        prepare: Any = getattr(self, "_prepare_dataset", None)
        known = {
            "dataset": numbered(dataset), "processing_class": self.processing_class, "args": self.args,
            "dataset_name": _OF_TRAINING,
        }  # fmt: skip
        asked = inspect.signature(prepare).parameters if prepare is not None else {}
        unknown = [name for name, one in asked.items() if name not in known and one.default is one.empty]
        if prepare is None or unknown:
            raise ConfigError(
                f"{self._host.__name__} prepares rows as it is made, and has no method that could be called again for "
                "those that come. Give your class a `_prepare_dataset(self, dataset)` that prepares them alike, and "
                "keeps columns that it does not know."
            )
        return prepare(**{name: known[name] for name in asked if name in known})
