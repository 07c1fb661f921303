"""The audit: train surviving stages again on the data that is left, and compare them bit for bit (contract E3)."""

import random
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.utils import logging

from ..errors import ConfigError, ExampleIdError, S3TError, counted
from ..folder.system import SystemFolder
from ..model.randomness import preserved_randomness
from ..model.tensor_files import differing_tensors, read_tensors
from ..operations.audits import record_audit
from ..plan.stages import StageKey
from ..records.request import some
from .circumstances import differing, threads
from .first_process import in_first_process
from .stage_memory import was_trained_here
from .stage_run import StageRuns


logger = logging.get_logger(__name__)


class AuditKey(StageKey):
    """A stage that is trained again beside the one that serves: the same recipe under another adapter name."""

    __slots__ = ()

    # As tuples the two would be the same key, and lie in memory beside each other.
    def __eq__(self, other: object) -> bool:
        return isinstance(other, AuditKey) and tuple.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(("audit", *self))

    @property
    def parent(self) -> "AuditKey | None":
        """The stage this one stands on, itself trained again."""
        return AuditKey(self.shard, self.prefix[:-1]) if self.depth > 1 else None

    @property
    def lineage(self) -> tuple["AuditKey", ...]:
        """The stack that ends with this stage, all of it trained again."""
        return tuple(AuditKey(self.shard, self.prefix[: i + 1]) for i in range(self.depth))

    @property
    def adapter_name(self) -> str:
        """The adapter's name, different from the serving one's."""
        return "audit_" + super().adapter_name


@dataclass(frozen=True)
class VerificationReport:
    """
    What an audit found.

    Args:
        stages (`tuple[str, ...]`): The stages that were trained again.
        mismatches (`dict[str, list[str]]`): Per stage the names of the tensors that differ.
        circumstances (`dict`): Recorded circumstances that differ from the present ones, as (recorded, present).
        seconds (`float`): Duration.
        trained_here (`tuple[str, ...]`):
            Those of the stages that this very process trained. State that a stage left in the process (in a global, a
            closure, a library) would act on both alike, and not be found: only an audit in a fresh process, where
            this is empty, says that there is none.
        adapters (`dict[str, str]`): Per stage the SHA-256 of the adapter file that it was compared with.
    """

    stages: tuple[str, ...]
    mismatches: dict[str, list[str]]
    circumstances: dict[str, tuple[Any, Any]]
    seconds: float
    trained_here: tuple[str, ...] = ()
    adapters: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every stage came out bit for bit the same."""
        return not self.mismatches

    def __str__(self) -> str:
        if self.ok:
            return f"{counted(len(self.stages), 'stage')} trained again in {self.seconds:.1f} s: bit for bit the same"
        lines = [f"recorded {name}: {then!r}, now {now!r}" for name, (then, now) in self.circumstances.items()]
        lines += [f"{stage} differs in {', '.join(names)}" for stage, names in self.mismatches.items()]
        return "\n".join(lines)


def verify_stages(trainer: StageRuns, stages: str | Sequence[StageKey | str] | None) -> VerificationReport:
    """
    Train stages again and compare; see `S3TTrainer.verify`.

    Each is trained from scratch with all it stands on, under its recorded number of threads, in memory beside the
    stages that serve; nothing of the system is written.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is nothing to audit or no data to audit it with, or recipe (arguments
            and parts), device or number of processes are not the recorded ones.
    """
    started = time.perf_counter()
    if trainer._stage_rows is None:
        raise ConfigError("There is no `train_dataset` to train stages again on. Give it to the trainer.")
    trainer._refuse_changed_accelerator()
    folder = trainer.folder
    folder.refresh()
    # Every process of a group audits the same stages, in the same scratch folder.
    wanted = in_first_process(lambda: choose_stages(stages, folder.current_stages))
    # In this order a stage comes right after the stages it stands on, so that only those have to stay in memory.
    closure = sorted({key for tip in wanted for key in tip.lineage})
    _refuse_rows_not_here(trainer, closure)
    trained_here = tuple(str(key) for key in closure if was_trained_here(folder.adapter_digest(key)))
    if trained_here:
        logger.warning_once(
            "The audit trains stages again in the process that trained them. State that one left in this process "
            "would act on both alike, and not be found. Make the same trainer in a fresh process and call `verify()` "
            "there."
        )
    differences = _compare_circumstances(trainer, closure)
    try:
        mismatches, adapters = _compare_tensors(trainer, closure)
    finally:
        trainer.train_dataset = trainer._prepared
        if trainer._live is not None:
            trainer._live.refresh()
    seconds = time.perf_counter() - started
    return VerificationReport(tuple(map(str, closure)), mismatches, differences, seconds, trained_here, adapters)


def keep_report(folder: SystemFolder, report: VerificationReport) -> None:
    """
    Have receipts and reports of a system tell of an audit, where this process signs what it writes there.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        report ([`VerificationReport`]): What the audit found.
    """
    try:
        record_audit(folder, report)
    except S3TError as error:
        # It found what it found: on a folder that may only be read, too.
        logger.warning(f"The audit is not recorded in {folder.path}: {error}")


def _refuse_rows_not_here(trainer: StageRuns, stages: Iterable[StageKey]) -> None:
    """What another process added or replaced, this one has nothing of: all that saw it would come out otherwise."""
    table, rows = trainer.folder.table, trainer._rows_of_stages
    lacking = rows.lacking(table)
    places = {place for place in table.places_of(lacking) if place is not None}
    if any(key.saw(places) for key in stages):
        raise ExampleIdError(
            f"{counted(len(lacking), 'example')} came to {trainer.folder.path} that `train_dataset` lacks, or has as "
            f"they were before ({some(lacking)}): another process added or replaced them, and stages that are to be "
            "audited saw them. Make the trainer anew with the whole dataset as it is now, and call `verify()` there."
        )


def _compare_circumstances(trainer: StageRuns, stages: Sequence[StageKey]) -> dict[str, tuple[Any, Any]]:
    """Refuse another recipe, and what would change sums; what else differs is returned."""
    differences: dict[str, tuple[Any, Any]] = {}
    trainer._describe_parts()
    trainer._say_what_is_not_compared({key: trainer.folder.stage_record(key) for key in stages})
    for key in stages:
        record = trainer.folder.stage_record(key)
        _refuse_other_recipe(key, record, trainer)
        found = differing(record["circumstances"], trainer._circumstances(key))
        found.pop("threads", None)
        for name in ("world_size", "device"):
            if name in found:
                raise ConfigError(
                    f"{key} was trained with {name} = {found[name][0]!r}, here it is {found[name][1]!r}: the sums "
                    "would differ. Run the audit as the training ran."
                )
        differences.update(found)
    return differences


def _compare_tensors(trainer: StageRuns, stages: Sequence[StageKey]) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Train stages again; the tensors of each that differ, by name, and the digests of what they are compared with."""
    mismatches: dict[str, list[str]] = {}
    adapters: dict[str, str] = {}
    with (
        trainer._occupied(stages[0]),
        preserved_randomness(),
        trainer._unheard(),
        tempfile.TemporaryDirectory() as own,
    ):
        (scratch,) = broadcast_object_list([own])
        try:
            for key in stages:
                again = _retrain(trainer, key, Path(scratch))
                _refuse_deleted_meanwhile(trainer.folder, stages)
                # One that is grown again later is another.
                adapters[str(key)] = trainer.folder.adapter_digest(key)
                unequal = differing_tensors(read_tensors(trainer.folder.read_adapter(key), str(key)), again)
                if unequal:
                    mismatches[str(key)] = unequal
            trainer.accelerator.wait_for_everyone()
        finally:
            trainer._stack.drop([key for key in trainer._stack.loaded if isinstance(key, AuditKey)])
    return mismatches, adapters


def _refuse_deleted_meanwhile(folder: SystemFolder, stages: Iterable[StageKey]) -> None:
    folder.refresh()
    gone = ", ".join(str(key) for key in stages if key not in folder.current_stages)
    if gone:
        raise S3TError(
            f"A deletion removed {gone} while the audit ran, or rows came to its slices: nothing is left to compare. "
            "Run the audit again."
        )


def choose_stages(stages: str | Sequence[StageKey | str] | None, valid: Iterable[StageKey]) -> list[StageKey]:
    """
    The stages that an audit is to train again.

    Args:
        stages: As of `S3TTrainer.verify`.
        valid (iterable of [`~hf_s3t.plan.stages.StageKey`]): The valid stages.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there are none, or what is named is none of them.
    """
    valid = sorted(valid)
    if not valid:
        raise ConfigError("There is no stage to audit that saw all that its slices hold. Call `train()` first.")
    if stages is None:
        return valid
    if stages == "sample":
        # An audit that can be foreseen is none: this draw is not seeded.
        return [random.SystemRandom().choice(valid)]
    if isinstance(stages, str):
        raise ConfigError(f'`stages` must be None, "sample" or a list of stages, got {stages!r}.')
    keys = [StageKey.from_path(f"stages/{s}") if isinstance(s, str) else s for s in stages]
    if not keys:
        raise ConfigError("`stages` is empty, and an audit of nothing finds nothing. Name stages, or leave it out.")
    unknown = [str(key) for key in keys if key not in valid]
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} is not a valid stage of this system, or lacks rows that came since, on which it "
            f"would be trained again. It has {', '.join(map(str, valid))}."
        )
    return keys


def _refuse_other_recipe(key: StageKey, record: dict[str, Any], trainer: StageRuns) -> None:
    other = trainer._other_recipe(record)
    if other:
        raise ConfigError(
            f"{key} was trained by another recipe: {other}. Give the trainer the recorded arguments and parts."
        )


def _retrain(trainer: StageRuns, key: StageKey, scratch: Path) -> dict[str, torch.Tensor]:
    shadow = AuditKey(key.shard, key.prefix)
    record = trainer.folder.stage_record(key)
    origin = {name: record[name] for name in ("slices", "below", "recipe")}
    trainer._make_room(shadow.lineage[:-1])
    with threads(record["circumstances"]["threads"]), trainer._training(shadow, scratch / str(key), origin):
        trainer._fit(shadow, None, None)
    return {name: tensor.detach().cpu().clone() for name, tensor in trainer._stack.tensors(shadow).items()}
