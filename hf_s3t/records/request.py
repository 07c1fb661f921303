"""A request to forget: what was asked for, and the examples that this names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..config import require_choice
from ..errors import ConfigError


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
