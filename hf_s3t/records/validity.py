"""
The one rule by which a stage is valid: all rows that it saw are in, and it stands on the adapter that is there.

Rows that came later do not end it: it goes on serving until it is grown again with them. So a slice has a digest of
its remaining rows for each state that the system was in, and a stage is valid if it saw each of its slices in one of
them. It is current if that is the newest: the others are grown again, and only current stages are stood upon.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any


def is_current(record: Mapping[str, Any], slices_now: Sequence[str]) -> bool:
    """
    Whether a stage, or a checkpoint of one, saw exactly what its slices hold now.

    Args:
        record (mapping): What was written down of it; `slices` are the digests of the slices it saw.
        slices_now (sequence of `str`): The digests of its slices as they are now.
    """
    return record.get("slices") == list(slices_now)


def saw_what_is_in(record: Mapping[str, Any], slices: Sequence[Collection[str]]) -> bool:
    """
    Whether all rows that a stage saw are still in, whatever came to its slices since.

    Args:
        record (mapping): What was written down of it; `slices` are the digests of the slices it saw.
        slices (sequence of collections of `str`): Of each of its slices the digests that its remaining rows ever had.
    """
    saw = record.get("slices")
    return (
        isinstance(saw, list)
        and len(saw) == len(slices)
        and all(digest in known for digest, known in zip(saw, slices, strict=True))
    )


def fits(record: Mapping[str, Any], slices: Sequence[Collection[str]], adapter_below: str | None) -> bool:
    """
    Whether all rows that a stage saw are still in, and it stands on the adapter that lies below it now.

    That the adapter below is valid itself is for the caller to know, who goes from the base upwards.

    Args:
        record (mapping): What was written down of the stage; `below` is the digest of the adapter it was trained on.
        slices (sequence of collections of `str`): Of each of its slices the digests that its remaining rows ever had.
        adapter_below (`str`, *optional*): The digest of the adapter of its parent; `None` if it stands on the base.
    """
    return saw_what_is_in(record, slices) and record["below"] == adapter_below
