"""A request to forget: what was asked for, and the examples that this names."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..checks import require_choice
from ..errors import ConfigError, ExampleIdError


MISSING = ("error", "ignore")


@dataclass(frozen=True)
class DeletionRequest:
    """
    What somebody asks to be forgotten, as it was given.

    Args:
        ids (sequence of `int` or `str`, *optional*): Ids of the examples.
        groups (sequence of `int` or `str`, *optional*): Groups whose examples are all meant.
        missing (`str`, defaults to `"error"`): `"ignore"` passes over ids this system never saw.
        include_duplicates (`bool`, defaults to `False`):
            The examples whose content equals that of one of these are meant too; of ids that were deleted before the
            content is not known any more.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If neither ids nor groups are given, or `missing` is no choice.

    Example:

    ```python
    >>> from hf_s3t.records.request import DeletionRequest

    >>> DeletionRequest(groups=["user-7"], missing="ignore").passes_over_unknown
    True
    ```
    """

    ids: Iterable[int | str] | None = None
    groups: Iterable[int | str] | None = None
    missing: str = "error"
    include_duplicates: bool = False

    def __post_init__(self) -> None:
        require_choice("missing", self.missing, MISSING)
        if self.ids is None and self.groups is None:
            raise ConfigError("A deletion was asked for with neither `ids` nor `groups`. Name what to forget.")

    @property
    def passes_over_unknown(self) -> bool:
        """Whether what was never trained on is no error."""
        return self.missing == "ignore"


@dataclass(frozen=True)
class RequestedExamples:
    """
    The examples that a request names.

    Args:
        present (`list[int | str]`): The ids that are in, without repetitions, those of its groups included.
        already_deleted (`int`): How many of its ids were deleted before.
        groups (`list[int | str]`): The groups that are in.
        deleted_groups (`tuple[int | str, ...]`): The groups that were deleted before, as they were given.
        unknown (`int`): How many ids were never trained on.
        unknown_groups (`int`): How many groups were never trained on.
    """

    present: list[int | str]
    already_deleted: int
    groups: list[int | str]
    deleted_groups: tuple[int | str, ...] = ()
    unknown: int = 0
    unknown_groups: int = 0

    def with_ids(self, ids: Sequence[int | str]) -> "RequestedExamples":
        """The request with more ids."""
        return replace(self, present=[*self.present, *ids])


def listed(values: Any, name: str) -> list[int | str]:
    """
    The ids or groups of a request as plain integers and strings: of a list, an array, a series, a tensor or a column.

    Args:
        values: What was given; `None` is nothing.
        name (`str`): What it was given as, `"ids"` or `"groups"`.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If it is no list of ids: saying what to give.
    """
    if values is None:
        return []
    expected = f"`{name}` must be a list of integers or strings, got"
    if hasattr(values, "columns") or hasattr(values, "column_names"):
        # A table goes over its columns' names, and a name may be an id.
        kind = type(values).__name__
        column = "id" if name == "ids" else "group"
        raise ExampleIdError(f"{expected} a {kind}. Give one column of it, such as `{kind.lower()}['{column}']`.")
    for method in ("tolist", "to_pylist"):
        if hasattr(values, method):
            values = getattr(values, method)()
    if isinstance(values, (bool, float)):
        raise ExampleIdError(f"{expected} {values!r}. {_remedy(values)}")
    if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
        raise ExampleIdError(f"{expected} {values!r}. A single one is a list of one.")
    # What an array or a tensor holds when it has no axis.
    found = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    wrong = [value for value in found if isinstance(value, bool) or not isinstance(value, (int, str))]
    if wrong:
        raise ExampleIdError(f"{expected} among others {some(wrong)}. {_remedy(wrong[0])}")
    return found


def _remedy(value: Any) -> str:
    """What to do about a value that is no id."""
    if isinstance(value, bool):
        return "A truth names nobody: give the ids of the rows that are meant."
    if isinstance(value, float):
        return "Convert them by `int`; missing values, which turn integers into fractions, have to be dropped first."
    if isinstance(value, (Mapping, list, tuple)):
        return "Give the ids alone, such as `[row['id'] for row in rows]`."
    return "Give the ids as they were at the first training, and leave out what is missing."


def some(values: Sequence[Any], limit: int = 5) -> str:
    """A few of some values, and how many more there are, for a message."""
    shown = ", ".join(map(repr, list(values)[:limit]))
    return shown + (f" and {len(values) - limit} more" if len(values) > limit else "")
