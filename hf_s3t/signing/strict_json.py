"""JSON that says one thing only: no field twice, no fractions, no NaN; anything else is refused in one sentence."""

import json
from collections.abc import Iterable
from typing import Any, NoReturn

from ..errors import ReceiptError


# No receipt is near it: a ledger of a hundred thousand lines makes one of seven million bytes.
LARGEST = 64 * 2**20


def parse_object(data: bytes, what: str) -> dict[str, Any]:
    """
    The JSON object of a text.

    Args:
        data (`bytes`): The text, in UTF-8.
        what (`str`): What it is, as the subject of a sentence.

    Raises:
        [`~hf_s3t.errors.ReceiptError`]: If it is no object, is ambiguous, or is larger than any receipt.
    """
    if len(data) > LARGEST:
        raise ReceiptError(f"{what} has {len(data)} bytes, expected at most {LARGEST}: no receipt is as large.")
    try:
        found = json.loads(
            data.decode(), object_pairs_hook=_once, parse_float=_refuse_number, parse_constant=_refuse_number
        )
    except (ValueError, RecursionError) as error:
        raise ReceiptError(f"{what} is cut, altered, or no receipt: {_reason(error)}. Ask for it again.") from None
    if not isinstance(found, dict):
        raise ReceiptError(f"{what} is no receipt: got JSON that is no object. Ask for it again.")
    return found


def compact(values: Any) -> bytes:
    """Values as compact JSON with sorted keys, in ASCII."""
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def _once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    pairs = list(pairs)
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field stands in it twice")
    return found


def _refuse_number(text: str) -> NoReturn:
    raise ValueError("a number in it is no integer")


def _reason(error: Exception) -> str:
    # What was read is foreign: positions are told, and nothing of its text.
    if isinstance(error, json.JSONDecodeError):
        return f"it is no JSON at character {error.pos}"
    if isinstance(error, UnicodeDecodeError):
        return f"it is no text at byte {error.start}"
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    return str(error) if str(error).endswith(("twice", "integer")) else "a number in it is too long"
