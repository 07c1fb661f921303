"""Rows that a recipe adds to the system that it trained before."""

from typing import Any

from accelerate import PartialState
from common.command_line import console
from common.options import Options
from datasets import Dataset, concatenate_datasets

from hf_s3t.errors import ConfigError, counted
from hf_s3t.folder.system import SystemFolder
from hf_s3t.training.additions import AdditionReport


def check_adding(options: Options) -> None:
    """
    Refuse to add rows where there is nothing to add them to.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the method is another than S3T, or its folder holds no system.
    """
    script, folder = options.script, options.training.output_dir
    if script.add_file is None:
        return
    if script.method != "s3t":
        raise ConfigError(f"`--add_file` with `--method {script.method}`, expected s3t: rows come to no other.")
    if not SystemFolder.exists(folder):
        raise ConfigError(
            f"`--add_file {script.add_file}` and no system in {folder}. Train it first, by the same command without "
            "`--add_file`."
        )


def parted(rows: Dataset, options: Options) -> tuple[Dataset, Dataset]:
    """
    The rows of a file that the system has already, from an earlier run with it, and those that are new; what was
    deleted since stays out.

    Args:
        rows (`Dataset`): The rows of `--add_file`, prepared as the others.
        options ([`~common.options.Options`]): Everything the recipe was told.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If they have no ids.
    """
    column = options.s3t.id_column
    if column is None or column not in rows.column_names:
        raise ConfigError(
            f"The rows of {options.script.add_file} have the columns {', '.join(rows.column_names)}, expected ids in "
            f"`{column}` among them. Give each row an id that no other has."
        )
    folder = SystemFolder(options.training.output_dir)
    ids = rows[column][:]
    numbers = folder.table.rows_of([folder.names.of_id(one) for one in ids]).tolist()
    known = [row for row, number in enumerate(numbers) if number >= 0]
    deleted = {row for row, one in enumerate(ids) if numbers[row] < 0 and folder.is_deleted(one)}
    if deleted and PartialState().is_main_process:
        console.print(
            f"{counted(len(deleted), 'row')} of {options.script.add_file} passed over: deleted from this system before"
        )
    return rows.select(known), rows.select([row for row in range(len(rows)) if row not in deleted.union(known)])


def joined(train: Dataset, more: Dataset, options: Options) -> Dataset:
    """The rows to train on with others behind them; of an id that both have, those of the others."""
    if not len(more):
        return train
    given = set(more[options.s3t.id_column][:])
    kept = [row for row, one in enumerate(train[options.s3t.id_column][:]) if one not in given]
    return concatenate_datasets([train.select(kept), more.cast(train.features)])


def add_rows(trainer: Any, new: Dataset, options: Options) -> AdditionReport | None:
    """Add rows to a system, and say what they cost."""
    if not len(new):
        return None
    report: AdditionReport = trainer.add_examples(new, into=options.script.add_into)
    if trainer.is_world_process_zero():
        places = (report.new_shards, "new shard") if report.new_shards else (len(report.slices), "slice")
        console.print(
            f"{counted(report.added, 'row')} of {options.script.add_file} came to {counted(*places)}: "
            f"{counted(len(report.stages), 'stage')} to train, {report.work:.2f} full fine-tunings"
        )
    return report
