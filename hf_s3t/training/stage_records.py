"""What a stage is made from, as its record has it, and whether another trainer would make it from the same."""

import math
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers.utils import logging

from ..plan.stages import StageKey, stage_seed
from .circumstances import circumstances, differing, recipe_of
from .curve import TrainingCurve
from .parts import differing_parts, lacking, parts_of, recorded_parts, shown_parts


logger = logging.get_logger(__name__)


class StageRecords(TrainingCurve):
    """The part of a trainer that tells what its stages are made from, and compares that with records."""

    # Columns of numbers that a model made of rows: the last bits of these follow from circumstances, and the rest from
    # the base, the recipe and what is fed besides.
    _said_by_models: tuple[str, ...] = ()

    def _begin_undescribed(self) -> None:
        # The parts of the recipe, once somebody asks.
        self._described: dict[str, Any] | None = None

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

    def _origin(self, key: StageKey) -> dict[str, Any]:
        """What a stage is made from; by it a checkpoint is told from one of other data or another recipe."""
        folder = self.folder
        return {
            "slices": folder.slice_digests(key),
            "below": folder.adapter_digest(key.parent) if key.parent else None,
            "recipe": recipe_of(self.args),
            "parts": self._parts,
            "circumstances": self._circumstances(key),
        }

    def _origin_of_all(self, key: StageKey) -> dict[str, Any] | None:
        """
        What a stage is made from, the same in every process; `None` if there is no more of it, or the processes have
        not read equally far. The first one says what a stage saw: one that knew less would train it on more than that.
        """
        folder = self.folder
        stands = key.parent is None or key.parent in folder.current_stages
        is_whole = stands and not key.saw(self._rows_of_stages.empty(folder.table))
        origin = self._origin(key) if is_whole else None
        known = gather_object([origin and (origin["slices"], origin["below"])])
        return origin if all(one == known[0] for one in known) else None

    def _record(
        self,
        key: StageKey,
        origin: dict[str, Any],
        counts: dict[str, Any],
        frozen: str,
        frozen_after: str,
        metrics: dict[str, float],
    ) -> dict[str, Any]:
        """What `stage.json` says of a stage that is trained."""
        return {
            **origin,
            "seed": stage_seed(self.s3t_config.seed, key),
            "layers": list(self._layers.groups[key.group]),
            **counts,
            "frozen_before": frozen,
            "frozen_after": frozen_after,
            "steps": [self._first_step, self._last_step],
            # NaN is no JSON.
            "metrics": {n: v for n, v in metrics.items() if isinstance(v, (int, float)) and math.isfinite(v)},
        }

    def _counts(self, key: StageKey) -> dict[str, Any]:
        """How many examples a stage is about to see of each slice, and how many of them preparation dropped."""
        return {
            "counts": [self.folder.table.size(key.shard, s) for s in key.prefix],
            "examples_dropped": self._dropped(key),
        }

    def _circumstances(self, key: StageKey) -> dict[str, Any]:
        return {**circumstances(self.model, self.accelerator), "data_digest": self._fed(key)}

    def _fed(self, key: StageKey) -> str | None:
        return self._rows_of_stages.digest(key, self.folder.table, self.folder.key, self._said_by_models)

    def _dropped(self, key: StageKey) -> int:
        return self._rows_of_stages.dropped_of(key, self.folder.table)

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

    def _fed_otherwise(self, key: StageKey, record: dict[str, Any]) -> str | None:
        then = record.get("circumstances", {}).get("data_digest")
        if then is None or self._fed(key) in (None, then):
            return None
        return "rows that were fed otherwise (by another tokenizer, template, `formatting_func` or `max_length`)"
