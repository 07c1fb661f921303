"""Arrow arrays from numpy arrays and texts, and back, by their buffers: Arrow's own conversions would load pandas."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa


# Of each digest.
DIGEST_BYTES = 32
# What sums of digests are taken modulo.
MODULUS = 2 ** (8 * DIGEST_BYTES)
# Rows of which copies are made at once.
_AT_ONCE = 100_000


def arrow_numbers(values: np.ndarray) -> pa.Array:
    """An Arrow array over the memory of a numpy array of numbers."""
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(_TYPES[values.dtype.str[1:]], len(values), [None, pa.py_buffer(values)])


_TYPES = {"i4": pa.int32(), "i8": pa.int64()}


def arrow_texts(values: Sequence[str], missing: Sequence[bool] | None = None) -> pa.Array:
    """
    An Arrow array of texts.

    Args:
        values (sequence of `str`): The texts.
        missing (sequence of `bool`, *optional*): Which of them stand for nothing.
    """
    encoded = [value.encode() for value in values]
    ends = np.cumsum(np.fromiter(map(len, encoded), np.int64, len(encoded)))
    is_large = bool(len(ends)) and ends[-1] >= 2**31
    offsets = np.zeros(len(encoded) + 1, np.int64 if is_large else np.int32)
    offsets[1:] = ends
    valid = None if missing is None else pa.py_buffer(np.packbits(~np.asarray(missing, bool), bitorder="little"))
    buffers = [valid, pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded))]
    return pa.Array.from_buffers(pa.large_string() if is_large else pa.string(), len(encoded), buffers)


def arrow_digests(values: np.ndarray) -> pa.Array:
    """An Arrow array over the memory of digests, one in each row of a numpy array of bytes."""
    buffers = [None, pa.py_buffer(np.ascontiguousarray(values))]
    return pa.Array.from_buffers(pa.binary(DIGEST_BYTES), len(values), buffers)


def numbers_of(array: pa.Array) -> np.ndarray:
    """The numbers of an Arrow array without nulls, as numpy has them."""
    dtype = np.dtype(str(array.type))
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * dtype.itemsize)


def digests_of(array: pa.Array) -> np.ndarray:
    """
    The digests of an Arrow array, one in each row of a numpy array of bytes.

    Args:
        array (`pyarrow.Array`): Without nulls: 32 bytes each, or texts of 64 hexadecimal digits.

    Raises:
        `ValueError`: If it holds something else.
    """
    if pa.types.is_fixed_size_binary(array.type) and array.type.byte_width == DIGEST_BYTES:
        flat = np.frombuffer(array.buffers()[1], np.uint8, len(array) * DIGEST_BYTES, array.offset * DIGEST_BYTES)
    elif pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        offsets = offsets_of(array)
        if len(array) and not (np.diff(offsets) == 2 * DIGEST_BYTES).all():
            raise ValueError("not all digests have 64 digits")
        text = memoryview(array.buffers()[2] or b"")[int(offsets[0]) : int(offsets[-1])] if len(array) else b""
        flat = np.frombuffer(bytes.fromhex(bytes(text).decode("ascii")), np.uint8)
    else:
        raise ValueError(f"digests of the type {array.type}")
    return flat.reshape(-1, DIGEST_BYTES)


def offsets_of(array: pa.Array) -> np.ndarray:
    """Where each value of an array of texts, bytes or lists begins, and the last ends."""
    is_large = str(array.type).startswith("large_")
    dtype = np.dtype(np.int64 if is_large else np.int32)
    return np.frombuffer(array.buffers()[1], dtype, len(array) + 1, array.offset * dtype.itemsize)


def bytes_of(array: pa.Array) -> list[bytes]:
    """The values of an Arrow array of texts or bytes without nulls."""
    found: list[Any] = array.cast(pa.large_binary()).to_pylist()
    return found


def hexadecimal(digests: np.ndarray) -> list[str]:
    """Digests as texts of 64 digits."""
    text, width = digests.tobytes().hex(), 2 * DIGEST_BYTES
    return [text[at : at + width] for at in range(0, len(text), width)]


def from_hexadecimal(texts: Sequence[Any]) -> tuple[np.ndarray, np.ndarray]:
    """
    The digests that texts say, and which of them say none (theirs are zeros).

    Args:
        texts (sequence): What may be digests in hexadecimal digits.
    """
    no_digest = np.zeros(len(texts), bool)
    parts = []
    for number, text in enumerate(texts):
        part = _digest_of(text)
        no_digest[number] = part is None
        parts.append(part or bytes(DIGEST_BYTES))
    return np.frombuffer(b"".join(parts), np.uint8).reshape(-1, DIGEST_BYTES), no_digest


def _digest_of(text: Any) -> bytes | None:
    if not isinstance(text, str) or len(text) != 2 * DIGEST_BYTES:
        return None
    try:
        found = bytes.fromhex(text)
    except ValueError:
        return None
    # Blanks and capitals are digits to Python, and no other name of the same digest.
    return found if found.hex() == text else None


def in_order(digests: np.ndarray) -> np.ndarray:
    """The positions of digests, one in each row, in the order of what they say: that of their texts."""
    # Of numbers the last that is named counts first.
    return np.lexsort(np.ascontiguousarray(digests).view(">u8").T[::-1])


def sums_of(digests: np.ndarray, places: np.ndarray) -> dict[int, int]:
    """
    The sums of digests, taken for numbers of 256 bits, modulo 2^256.

    Args:
        digests (`numpy.ndarray`): The digests, one in each row.
        places (`numpy.ndarray`): The number of the sum to which each belongs.
    """
    sums: dict[int, int] = {}
    for begin in range(0, len(digests), _AT_ONCE):
        part = places[begin : begin + _AT_ONCE]
        order = np.argsort(part, kind="stable")
        found, first = np.unique(part[order], return_index=True)
        # Of 32 bits each, most significant first: four thousand million of them have a sum of 64.
        words = digests[begin : begin + _AT_ONCE][order].view(">u4").astype(np.uint64)
        for place, total in zip(found.tolist(), np.add.reduceat(words, first, axis=0).tolist(), strict=True):
            value = sum(word << (32 * power) for power, word in enumerate(reversed(total)))
            sums[place] = (sums.get(place, 0) + value) % MODULUS
    return sums


def first_bytes(digests: np.ndarray) -> np.ndarray:
    """The first 8 bytes of each digest as a number: by these digests are sorted and sought."""
    return np.ascontiguousarray(digests[:, :8]).view(np.uint64).reshape(-1)
