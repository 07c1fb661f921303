"""Ids and groups that were written as texts, on a command line or in a file, in the type that a system's have."""

import re
from collections.abc import Callable, Collection, Sequence

from ..errors import ExampleIdError
from ..folder.system import SystemFolder


# One way only to write each number, so that a text names one id; 20 digits hold every 64-bit integer.
_NUMBER = re.compile(r"0|-?[1-9][0-9]{0,19}")


def ids_from_texts(folder: SystemFolder, texts: Sequence[str]) -> list[int | str]:
    """
    Ids that were written as texts, in the type that this system's ids have.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system, whose table says what its ids are.
        texts (sequence of `str`): Ids as they stand on a command line or in a file.

    Returns:
        `list[int | str]`: The ids. Where none is left in the table to show the type, those that the ledger knows.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If ids are integers and a text is none.
    """
    deleted = folder.ledger.deleted
    if folder.names.are_digests:
        kept, digest_of = folder.table.rows, folder.key.of_id
        return [_known(text, lambda i: digest_of(i) in kept or digest_of(i) in deleted) for text in texts]
    return [_typed(text, folder.table.rows, lambda i: folder.key.of_id(i) in deleted, "ids") for text in texts]


def groups_from_texts(folder: SystemFolder, texts: Sequence[str]) -> list[int | str]:
    """
    Groups that were written as texts, in the type that this system's groups have.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system, whose table says what its groups are.
        texts (sequence of `str`): Names of groups as they stand on a command line.

    Returns:
        `list[int | str]`: The names.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If names are integers and a text is none, or the system has no groups.
    """
    if texts and folder.config.group_column is None and not folder.table.groups:
        raise ExampleIdError(
            f"Got the group {texts[0]!r}, but this system was trained without a `group_column`. Name the examples by "
            "their ids."
        )
    deleted = folder.ledger.deleted_groups
    if folder.names.are_digests:
        kept, digest_of = folder.table.groups, folder.key.of_group
        return [_known(text, lambda g: digest_of(g) in kept or digest_of(g) in deleted) for text in texts]
    return [_typed(text, folder.table.groups, lambda g: folder.key.of_group(g) in deleted, "groups") for text in texts]


def candidates(text: str) -> tuple[int | str, ...]:
    """What a text can name: the text itself, and the integer where it is written as one."""
    number = _as_number(text)
    return (text,) if number is None else (text, number)


def _typed(text: str, known: Collection[int | str], is_deleted: Callable[[int | str], bool], what: str) -> int | str:
    sample = next(iter(known), None)
    if isinstance(sample, str):
        return text
    number = _as_number(text)
    if sample is None:
        # Everything was deleted, and the table no longer shows the type; the ledger knows which it was.
        return _known(text, is_deleted)
    if number is None:
        raise ExampleIdError(
            f"Got {text!r}, but the {what} of this system are integers such as {sample}. Write each number by "
            "itself, in plain digits without leading zeros."
        )
    return number


def _known(text: str, is_known: Callable[[int | str], bool]) -> int | str:
    return next((value for value in candidates(text) if is_known(value)), text)


def _as_number(text: str) -> int | None:
    stripped = text.strip()
    return int(stripped) if _NUMBER.fullmatch(stripped) else None
