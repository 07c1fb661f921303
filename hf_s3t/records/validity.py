"""The one rule by which a stage is valid: it saw what its slices hold now, and stands on the adapter that is there."""

from collections.abc import Mapping, Sequence
from typing import Any


def is_current(record: Mapping[str, Any], slices_now: Sequence[str]) -> bool:
    """
    Whether a stage, or a checkpoint of one, saw exactly what its slices hold now.

    Args:
        record (mapping): What was written down of it; `slices` are the digests of the slices it saw.
        slices_now (sequence of `str`): The digests of its slices as they are now.
    """
    return record.get("slices") == list(slices_now)


def fits(record: Mapping[str, Any], slices_now: Sequence[str], adapter_below: str | None) -> bool:
    """
    Whether a stage saw exactly what its slices hold now, on top of the adapter that lies below it now.

    That the adapter below is valid itself is for the caller to know, who goes from the base upwards.

    Args:
        record (mapping): What was written down of the stage; `below` is the digest of the adapter it was trained on.
        slices_now (sequence of `str`): The digests of its slices as they are now.
        adapter_below (`str`, *optional*): The digest of the adapter of its parent; `None` if it stands on the base.
    """
    return is_current(record, slices_now) and record["below"] == adapter_below
