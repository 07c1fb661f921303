"""Rows that come to a system after its first training, and rows that take the place of others."""

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import datasets
from transformers.utils import logging

from ..checks import require_choice
from ..errors import ConfigError, FolderError, S3TError, counted
from ..folder.addition_file import StoredAddition
from ..folder.config_file import WEIGHTS
from ..folder.files import explained
from ..folder.versions import library_versions
from ..model.aggregation import check_one_answer_can_be_made
from ..model.gates import tokenizer_of_gate
from ..model.randomness import own_randomness
from ..operations.deletion import stages_that_saw
from ..plan.later_rows import Place
from ..plan.stages import StageKey
from ..records.request import listed
from .arriving import INTO, Arrival, Places, added_by, arrival_of, places_of, rows_of_arrival
from .blueprint import Layout
from .early_checks import check_rows, collates_as_stored
from .first_process import in_first_process
from .gate_rows import gate_of, tokenizer_of
from .plan_run import PlanRuns
from .refusals import check_datasets, evaluation_chooses
from .rows import StageRows, TrainingRows


logger = logging.get_logger(__name__)

# Below this share of the others a new shard is said to be small.
_SMALL = 0.5


@dataclass(frozen=True)
class AdditionReport:
    """
    What an addition did, or would do.

    Args:
        added (`int`): How many rows came, or would come; those that take the place of others among them.
        replaced (`int`): How many of them took the place of others.
        known (`int`): How many rows of the dataset were in already.
        passed_over (`int`): How many were deleted before, and do not come back.
        slices (`dict[str, int]`): How many came to each slice, as `shard-0/2`.
        new_shards (`int`): How many shards came.
        weights (`str`): How members weigh from then on: `"equal"`, or by `"size"`.
        stages (`tuple[str, ...]`): What `train()` trains because of it.
        work (`float`): What that costs, in full LoRA fine-tunings of all the data.
        stages_removed (`tuple[str, ...]`): The stages that end at once, because they saw what was replaced.
        is_dry_run (`bool`): Whether nothing was written.
    """

    added: int
    replaced: int
    known: int
    passed_over: int
    slices: dict[str, int]
    new_shards: int
    weights: str
    stages: tuple[str, ...]
    work: float
    stages_removed: tuple[str, ...]
    is_dry_run: bool


@dataclass(frozen=True)
class _Asked:
    """What a call asks for; see the arguments of `add_examples`, and whether rows take the place of others."""

    into: str
    weights: str | None
    again: Collection[int | str]
    dry_run: bool
    replaces: bool


@dataclass(frozen=True)
class _Coming:
    """A dataset, what it brings, and where that goes."""

    rows: TrainingRows
    digests: Any
    arrival: Arrival
    places: Places


class Additions(PlanRuns):
    """The part of a trainer that adds rows to its system."""

    _layout: Layout
    # The dataset of all stages, as it was given.
    _training_rows: TrainingRows | None

    def add_examples(
        self,
        dataset: Any,
        into: str = "new_shards",
        *,
        weights: str | None = None,
        again: Sequence[int | str] = (),
        dry_run: bool = False,
    ) -> AdditionReport:
        """
        Add rows to the system: those of a dataset that it does not know. Nothing is trained; `train()` does that.

        What serves goes on serving. Into new shards, nothing that exists changes. Into slices, their stages lack the
        new rows, and serve on until `train()` has grown them again; a deletion of what they saw ends them as ever. The
        rows are in when this returns, whatever dies then; models that serve the folder follow at their next call.

        Args:
            dataset ([`~datasets.Dataset`]): The new rows, with the columns of the others; or all rows, as it must be
                where ids are row numbers. Rows that are in already, as they are, are passed over.
            into (`str`, defaults to `"new_shards"`):
                `"new_shards"`: whole shards of about the present size. `"slices"`: the slices that cost least to grow
                again, so many that none is more than about doubled. Rows of a group that is in go where it is, and
                with `colocate_duplicates` so do equal rows. `partition="hashed"` and `"column"` say where rows go by
                themselves.
            weights (`str`, *optional*):
                `"equal"`, or `"size"` to weigh each member by the rows of its shard that are in; recorded. As it is
                recorded if not given, which is equal at first. A gate goes before.
            again (sequence of ids and groups, *optional*):
                What was deleted before and may come back. Without this word it may not, as somebody asked for it.
            dry_run (`bool`, defaults to `False`): Say what it would do, and do nothing.

        Returns:
            [`AdditionReport`]: What came, where, and what `train()` has to train because of it.

        Raises:
            [`~hf_s3t.errors.S3TError`]: Its children; a refused call changes nothing.

        Example:

        ```python
        print(trainer.add_examples(more_rows, into="slices", dry_run=True).work)
        trainer.add_examples(more_rows, into="slices")
        trainer.train()
        ```
        """
        require_choice("into", into, INTO)
        if weights is not None:
            require_choice("weights", weights, WEIGHTS)
        return self._add(dataset, _Asked(into, weights, listed(again, "again"), dry_run, replaces=False))

    def replace_examples(self, dataset: Any, *, dry_run: bool = False) -> AdditionReport:
        """
        Put rows that were edited in the place of those of their ids: a deletion and an addition, all or nothing.

        Stages that saw the old rows end, as after `unlearn`. The new ones come to the same slices, and are trained on
        by `train()`.

        Args:
            dataset ([`~datasets.Dataset`]): The rows as they are now; those that are in as they are change nothing.
            dry_run (`bool`, defaults to `False`): Say what it would do, and do nothing.

        Returns:
            [`AdditionReport`]: What came, and what went.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If an id is not in.
            [`~hf_s3t.errors.S3TError`]: Its other children; a refused call changes nothing.

        Example:

        ```python
        trainer.replace_examples(Dataset.from_list([{"id": 17, "text": "What it should have said."}]))
        trainer.train()
        ```
        """
        return self._add(dataset, _Asked("slices", None, [], dry_run, replaces=True))

    @own_randomness()
    def _add(self, dataset: Any, asked: _Asked) -> AdditionReport:
        rows = self._rows_that_may_come(dataset)
        digests = rows.digests(self.folder.key, self.folder.record["row_digests"])
        whole = self._with_rows(rows, digests)
        # Prepared before anything is written: preparing may refuse rows, or leave nothing of them.
        prepared = None if asked.dry_run else self._prepared_rows_of(whole)
        if self.accelerator.num_processes > 1:
            # Each that sees a folder of its own would lack what the first one writes.
            self._agree_on_what_is_there()
        report = in_first_process(lambda: self._add_under_lock(rows, digests, asked))
        if not self.is_world_process_zero():
            self.folder.refresh()
        if prepared is not None:
            self._take_up(whole, prepared, report)
        return report

    def _rows_that_may_come(self, dataset: Any) -> TrainingRows:
        """A dataset of which rows may come, as far as it tells by itself."""
        if self._layout.method != "s3t":
            raise ConfigError(
                f"{self.folder.path} holds the baseline {self._layout.method!r}, expected an S3T system: no rows come "
                "to others. Make a baseline of all rows in another `output_dir`."
            )
        if self._stage is not None or self._stack.in_training is not None:
            raise S3TError(f"{self._stack.in_training} is in training here. Add rows after `train()`.")
        self._rows_of_stages.lacking(self.folder.table)
        check_datasets(dataset, self.eval_dataset, self.args, self.s3t_config)
        rows = self._layout.rows(dataset, self.s3t_config)
        self._check_rows_that_come(dataset)
        if evaluation_chooses(self.args, self.s3t_config):
            self._fed_rows.refuse_shared(dataset, self.eval_dataset, rows.own_columns)
        return rows

    def _as_given(self, dataset: Any) -> dict[str, Any]:
        """What the trainer is given, as if the dataset were the one to begin with."""
        tokenizer = self.processing_class
        return {"train_dataset": dataset, "args": self.args, "model": self.model, "processing_class": tokenizer}

    def _check_rows_that_come(self, dataset: Any) -> None:
        """Refuse what would have been refused in the first dataset, as far as what is stored tells."""
        if collates_as_stored(self.data_collator):
            check_rows(dataset, self.model, self._stack.head, self.args)

    @property
    def _own_rows(self) -> TrainingRows:
        if self._training_rows is None:
            raise ConfigError("Rows are added to those that the trainer has. Give it the system's `train_dataset`.")
        return self._training_rows

    def _with_rows(self, rows: TrainingRows, digests: Any) -> TrainingRows:
        """The trainer's dataset with rows of another: those of an id that both have are the other's."""
        own = self._own_rows
        given = frozenset(rows.ids)
        if given.issuperset(own.ids):
            return rows
        if rows.config.id_column is None:
            raise ConfigError(
                f"Ids are row numbers here, and the dataset has {counted(len(rows.ids), 'row')}, fewer than the "
                f"{len(own.ids)} that are known. Give the whole dataset, with the new rows behind the others."
            )
        kept = [number for number, one in enumerate(own.ids) if one not in given]
        first, second = own.dataset, rows.dataset
        if not isinstance(first, datasets.Dataset) or not isinstance(second, datasets.Dataset):
            raise ConfigError(
                f"Got a {type(second).__name__} beside a {type(first).__name__}, expected two `datasets.Dataset`. "
                "Give these, or one dataset that has all rows."
            )
        if set(first.column_names) != set(second.column_names):
            raise ConfigError(
                f"The dataset has the columns {', '.join(sorted(second.column_names))}, expected those of "
                f"`train_dataset`, {', '.join(sorted(first.column_names))}. Nothing was added."
            )
        try:
            second = second.select_columns(first.column_names)
            second = second if second.features == first.features else second.cast(first.features)
        except (ValueError, TypeError, datasets.exceptions.DatasetGenerationError) as error:
            raise ConfigError(
                f"The columns of the dataset are not of the types of `train_dataset`: {error}. Nothing was added."
            ) from error
        # Of two formats Datasets would keep neither.
        whole = datasets.concatenate_datasets([first.select(kept).with_format(None), second.with_format(None)])
        return self._layout.rows(whole.with_format(**_format_of(first)), self.s3t_config)

    def _prepared_rows_of(self, whole: TrainingRows) -> tuple[Any, StageRows]:
        prepared = self._prepare_whole(whole.dataset)
        folder = self.folder
        return prepared, StageRows(prepared, whole, folder.names, folder.record["row_digests"])

    def _prepare_whole(self, dataset: Any) -> Any:
        """A dataset as the trainer would have prepared it when it was made."""
        return dataset

    def _add_under_lock(self, rows: TrainingRows, digests: Any, asked: _Asked) -> AdditionReport:
        folder, weights = self.folder, asked.weights
        # Before the lock, for which others wait.
        versions = library_versions()
        with folder.lock():
            folder.refresh()
            arrival = arrival_of(rows, digests, folder, asked.again, frozenset(self._own_rows.ids), asked.replaces)
            if arrival.new:
                places = places_of(arrival, rows, digests, folder, asked.into)
            else:
                places = Places([], folder.config.num_shards)
            if places.num_shards > folder.config.num_shards:
                check_one_answer_can_be_made(self.model, places.num_shards, folder.config.select)
            coming = _Coming(rows, digests, arrival, places)
            report = self._report_of(coming, asked)
            if not asked.dry_run and (arrival.new or (weights or report.weights) != _recorded_weights(folder.record)):
                removed = [StageKey.from_path(f"stages/{name}") for name in report.stages_removed]
                addition = StoredAddition(
                    rows_of_arrival(arrival, rows, digests, places, folder), added_by(folder.record, places, weights)
                )
                folder.record_addition(
                    addition, versions, arrival.replaced, removed, arrival.again, arrival.again_groups
                )
        return report

    def _report_of(self, coming: _Coming, asked: _Asked) -> AdditionReport:
        folder, places, arrival = self.folder, coming.places, coming.arrival
        added = added_by(folder.record, places, asked.weights)
        plan = folder.plan.with_shards(places.num_shards, folder.record["s3t_config"]["num_shards"])
        sizes, current = places.sizes, folder.current_stages
        standing = set(folder.stages).difference(folder.condemned_stages())
        removed = stages_that_saw(folder, arrival.replaced, standing) if arrival.replaced else []
        left = {key for key in current if not key.saw(sizes)}
        empty = folder.table.empty - sizes.keys()
        before = set(folder.plan.missing(current, folder.table.empty))
        because = [key for key in plan.missing(left, empty) if key not in before]
        new_shards = places.num_shards - folder.config.num_shards
        self._say_what_is_small(sizes, new_shards, added["weights"])
        return AdditionReport(
            added=len(arrival.new),
            replaced=len(arrival.replaced),
            known=arrival.known,
            passed_over=arrival.passed_over,
            slices={f"shard-{shard}/{slice_}": rows for (shard, slice_), rows in sizes.items()},
            new_shards=new_shards,
            weights=added["weights"],
            stages=tuple(map(str, because)),
            work=folder.growth.work([StageKey(key.shard % folder.config.num_shards, key.prefix) for key in because]),
            stages_removed=tuple(map(str, removed)),
            is_dry_run=asked.dry_run,
        )

    def _say_what_is_small(self, sizes: dict[Place, int], new_shards: int, weights: str) -> None:
        table = self.folder.table
        mean = len(table) / table.num_shards
        rows = sum(sizes.values()) / new_shards if new_shards else mean
        if new_shards and rows < _SMALL * mean and weights == "equal":
            logger.warning(
                f"The new shard has {rows:.0f} rows, the others {mean:.0f} on average, and its member weighs as much "
                'as theirs. Add the rows with weights="size", or into="slices".'
            )

    def _take_up(self, whole: TrainingRows, prepared: tuple[Any, StageRows], report: AdditionReport) -> None:
        """Train on the rows that came from now on, and have the gate and the live model know of them."""
        self._training_rows = whole
        self.train_dataset = self._prepared = prepared[0]
        self._stage_rows = prepared[1]
        self._described = None
        if self.folder.has_gate and report.added + report.known:
            if tokenizer_of(self.processing_class) is not None:
                with _rows_are_in():
                    # Of rows that are known, a call may have died before it wrote the gate.
                    self._write_gate({}, if_it_lacks_words=not report.added)
            elif report.added and self.is_world_process_zero():
                logger.warning(
                    "The gate does not know the rows that came. Give `processing_class`, and call `build_gate()`."
                )
        self.accelerator.wait_for_everyone()
        if self._live is not None:
            self._live.refresh()

    def _rows_the_gate_lacks(self) -> int:
        """How many rows that are here the gate has no words of: who brought them died, or had no tokenizer."""
        table = self.folder.table
        return max(0, len(table) - self._rows_of_stages.dropped(table) - self.folder.gate_head().rows)

    def _say_what_the_gate_lacks(self) -> None:
        # One that is damaged is none of training's; who serves it is told.
        with contextlib.suppress(FolderError):
            lacking = self._rows_the_gate_lacks() if self.folder.has_gate else 0
            if lacking:
                logger.warning_once(
                    f"The gate lacks the words of {lacking} of {counted(len(self.folder.table), 'example')}: who "
                    "brought them ended before it was written, or had no tokenizer. Call `build_gate()`."
                )

    def _write_gate(self, settings: Mapping[str, Any], if_it_lacks_words: bool = False) -> None:
        """Write the gate of the rows that are in, with what is said of its use; or only where it lacks some."""
        tokenizer, folder = tokenizer_of(self.processing_class), self.folder

        def write() -> None:
            if if_it_lacks_words and not self._rows_the_gate_lacks():
                return
            rows = self._rows_of_stages
            while tokenizer is not None:
                folder.refresh_ledger()
                additions = folder.ledger.additions
                gate = gate_of(rows, folder.table, folder.key, tokenizer)
                with folder.lock():
                    folder.refresh_ledger()
                    # What came while texts were read may be rows that are here, and not in what was made of these, or
                    # elsewhere: a row that was deleted, and came back.
                    if folder.ledger.additions == additions:
                        have_tokenizer = partial(self._have_tokenizer, gate.tokenizer_digest)
                        folder.put_gate(gate, settings, rows.lacking, have_tokenizer)
                        return

        in_first_process(write)

    def _have_tokenizer(self, digest: str) -> None:
        """Have the folder hold the tokenizer that a gate goes by: models that serve it read prompts with that."""
        path, saved = self.folder.path, cast(Any, self.processing_class)
        try:
            tokenizer_of_gate(self.folder, digest)
        except FolderError:
            with explained(f"The tokenizer could not be written to {path}", "Make room, then call again."):
                saved.save_pretrained(path)


@contextlib.contextmanager
def _rows_are_in() -> Iterator[None]:
    """Says of a gate that could not be written that the rows came all the same."""
    try:
        yield
    except FolderError as error:
        raise FolderError(f"The rows are in, and the gate lacks them: {error} Then call `build_gate()`.") from error


def _recorded_weights(record: Any) -> str:
    weights: str = record.get("added", {}).get("weights", "equal")
    return weights


def _format_of(dataset: datasets.Dataset) -> dict[str, Any]:
    found = dataset.format
    columns = found["columns"] if found["type"] is not None else None
    return {"type": found["type"], "columns": columns, **(found["format_kwargs"] or {})}
