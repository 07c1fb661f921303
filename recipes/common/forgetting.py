"""What a command line names to be forgotten, and what has been forgotten already."""

import os
from typing import Any

from datasets import Dataset

from hf_s3t import S3TConfig
from hf_s3t.errors import UnknownExampleError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.deletion import preview
from hf_s3t.operations.written_ids import groups_from_texts, ids_from_texts
from hf_s3t.records.request import DeletionRequest


def is_asked_for(script: Any) -> bool:
    """Whether a recipe's arguments name something to forget."""
    return bool(script.unlearn or script.unlearn_groups)


def named(script: Any, train: Dataset, s3t: S3TConfig, folder: str | os.PathLike) -> tuple[list, list]:
    """
    The ids and the groups that a recipe's arguments name, in the types that the system's have.

    Args:
        script: The recipe's arguments, with `unlearn` and `unlearn_groups`.
        train (`Dataset`): The training rows.
        s3t ([`~hf_s3t.S3TConfig`]): Says which columns hold ids and groups.
        folder (`str` or `os.PathLike`): The system's folder, which need not be there yet.

    Returns:
        `tuple[list, list]`: Ids and groups.

    Raises:
        [`~hf_s3t.errors.UnknownExampleError`]: If there is no such id or group and never was.
        [`~hf_s3t.errors.ExampleIdError`]: If ids are integers and a name is none.
    """
    if not is_asked_for(script):
        return [], []
    wanted = {"unlearn": script.unlearn or [], "unlearn_groups": script.unlearn_groups or []}
    stored = train.with_format(None)
    columns = {"unlearn": s3t.id_column, "unlearn_groups": s3t.group_column}
    known = {option: {str(v): v for v in stored[column][:]} if column else {} for option, column in columns.items()}
    found = {
        option: [known[option][name] for name in names if name in known[option]] for option, names in wanted.items()
    }
    unknown = {option: [name for name in names if name not in known[option]] for option, names in wanted.items()}
    if SystemFolder.exists(folder):
        # A system that is there may know rows that the data no longer has.
        system = SystemFolder(folder)
        ids = [*found["unlearn"], *ids_from_texts(system, unknown["unlearn"])]
        groups = [*found["unlearn_groups"], *groups_from_texts(system, unknown["unlearn_groups"])]
        preview(system, DeletionRequest(ids, groups))  # refuses what it never saw
        return ids, groups
    for option, names in unknown.items():
        if names:
            other = next(name for name in wanted if name != option)
            hint = f"But `--{other}` would know them." if known[other].keys() >= set(names) else "Name some of these."
            what = {"unlearn": "ids", "unlearn_groups": "groups"}[option]
            such = next(iter(known[option]), None)
            raise UnknownExampleError(
                f"`--{option} {' '.join(names)}`: the training rows have no such {what}"
                f"{', theirs are such as ' + such if such is not None else ''}. {hint} Nothing was trained."
            )
    return found["unlearn"], found["unlearn_groups"]


def must_train(is_finished: bool, folder: str | os.PathLike, ids: list, groups: list) -> bool:
    """
    Whether a run has to train first.

    Not where it was run to its end and only goes on, nor where what it is told to forget is forgotten already: stages
    that a deletion removed are grown again by a run that says so, never by one that is there to forget.

    Args:
        is_finished (`bool`): Whether the same run has been run to its end.
        folder (`str` or `os.PathLike`): The system's folder, which need not be there yet.
        ids (`list`): The ids to forget.
        groups (`list`): The groups to forget.
    """
    if is_finished or not SystemFolder.exists(folder):
        return not is_finished
    return not (ids or groups) or bool(preview(SystemFolder(folder), DeletionRequest(ids, groups)).present)


def num_deletions(folder: str | os.PathLike) -> int:
    """How many deletions a system has in force; 0 where there is none."""
    return SystemFolder(folder).ledger.num_deletions if SystemFolder.exists(folder) else 0
