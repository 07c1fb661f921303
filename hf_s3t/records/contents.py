"""What rows say, as bytes to be digested: one by one, and by the columns of Arrow a thousand at a time."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .arrow_kinds import is_json
from .buffers import arrow_numbers, bytes_of, offsets_of
from .digests import encode


def said(value: Any) -> Any:
    """
    What a value says, whatever table it stands in: what Arrow adds to a row because of other rows is no part of it.

    A column or a field that one row has is a null in all others: entries without a value are left out, at every depth.
    A column of integers becomes one of floats by one row: a float that is a whole number says what the integer does.
    A column of mappings becomes one of JSON by one row: it says what the mappings do.

    Args:
        value: A row, or what stands in one.
    """
    if isinstance(value, Mapping):
        return {name: said(entry) for name, entry in value.items() if entry is not None}
    if isinstance(value, (list, tuple)):
        return [said(entry) for entry in value]
    if isinstance(value, (float, np.floating)):
        is_negative_zero = value == 0 and math.copysign(1, value) < 0
        return int(value) if float(value).is_integer() and not is_negative_zero else value
    if hasattr(value, "__array__") and np.asarray(value).dtype.kind == "O":
        return said(np.asarray(value).tolist())
    return value


def encode_rows(columns: Mapping[str, pa.Array], rows: int) -> list[bytes]:
    """
    The encoding of what each row says: that of `encode(said(row))` in Python, of columns as a whole.

    Args:
        columns (mapping from name to `pyarrow.Array`): The columns.
        rows (`int`): Their number of rows.
    """
    return bytes_of(_mapping(columns, rows))


def _encoded(array: pa.Array) -> pa.Array:
    """The encoding of each value, null where that is none."""
    kind = array.type
    if is_json(kind):
        return _bytes([None if text is None else encode(said(json.loads(text))) for text in array.storage.to_pylist()])
    if pa.types.is_dictionary(kind):
        return _encoded(array.dictionary_decode())
    for fits, encoder in _ENCODERS:
        if fits(kind):
            return encoder(array)
    return _bytes([None if value is None else encode(said(value)) for value in array.to_pylist()])


def _integers(array: pa.Array) -> pa.Array:
    return _joined(b"i", _as_text(array), b";")


def _texts(array: pa.Array) -> pa.Array:
    return _framed(b"s", array)


def _bits(array: pa.Array) -> pa.Array:
    return _framed(b"b", array)


def _truths(array: pa.Array) -> pa.Array:
    return pc.if_else(array, _constant(b"t"), _constant(b"f"))


def _floats(array: pa.Array) -> pa.Array:
    array = array.cast(pa.float64())
    values = np.frombuffer(array.buffers()[1], np.float64, len(array), array.offset * 8)
    is_whole = np.isfinite(values) & (values == np.floor(values)) & ~((values == 0) & np.signbit(values))
    # What an integer of 64 bits holds.
    fits = is_whole & (np.abs(values) < 2.0**63)
    integers = _integers(arrow_numbers(np.where(fits, values, 0).astype(np.int64)))
    bits = pa.Array.from_buffers(pa.binary(8), len(values), [None, pa.py_buffer(values.astype(">f8"))])
    found = pc.if_else(_flags(fits), integers, _joined(b"d", bits.cast(pa.large_binary())))
    large = np.flatnonzero(is_whole & ~fits)
    if len(large):
        numbers = found.to_pylist()
        for at in large.tolist():
            numbers[at] = b"i%d;" % int(values[at])
        found = _bytes(numbers)
    return _where(array, found)


def _lists(array: pa.Array) -> pa.Array:
    items = _or(_encoded(array.values), b"n")
    # The encodings of a list's items lie behind each other: from where the first begins to where the last ends.
    ends = offsets_of(items)[offsets_of(array)].astype(np.int64)
    bodies = pa.Array.from_buffers(pa.large_binary(), len(array), [None, pa.py_buffer(ends), items.buffers()[2]])
    return _where(array, _framed(b"l", bodies))


def _lists_of_one_size(array: pa.Array) -> pa.Array:
    return _lists(array.cast(pa.large_list(array.type.value_type)))


def _structs(array: pa.Array) -> pa.Array:
    names = [array.type.field(number).name for number in range(array.type.num_fields)]
    return _where(array, _mapping(dict(zip(names, array.flatten(), strict=True)), len(array)))


def _mapping(columns: Mapping[str, pa.Array], rows: int) -> pa.Array:
    entries = [_or(_joined(encode(name), _encoded(columns[name])), b"") for name in sorted(columns)]
    return _framed(b"m", _joined(*entries) if entries else _bytes([b""] * rows))


_ENCODERS = (
    (pa.types.is_integer, _integers),
    (lambda kind: pa.types.is_string(kind) or pa.types.is_large_string(kind), _texts),
    (lambda kind: pa.types.is_binary(kind) or pa.types.is_large_binary(kind), _bits),
    (pa.types.is_fixed_size_binary, _bits),
    (pa.types.is_floating, _floats),
    (pa.types.is_boolean, _truths),
    (lambda kind: pa.types.is_list(kind) or pa.types.is_large_list(kind), _lists),
    (pa.types.is_fixed_size_list, _lists_of_one_size),
    (pa.types.is_struct, _structs),
)


# Arrays of bytes


def _framed(tag: bytes, body: pa.Array) -> pa.Array:
    body = body.cast(pa.large_binary())
    return _joined(tag, _as_text(pc.binary_length(body)), b":", body)


def _as_text(numbers: pa.Array) -> pa.Array:
    return numbers.cast(pa.large_string()).cast(pa.large_binary())


def _joined(*parts: "pa.Array | bytes") -> pa.Array:
    """Row by row one after the other; null where one is."""
    scalars = [_constant(part) if isinstance(part, bytes) else part for part in parts]
    return pc.binary_join_element_wise(*scalars, _constant(b""))


def _or(array: pa.Array, otherwise: bytes) -> pa.Array:
    return pc.fill_null(array, _constant(otherwise)) if array.null_count else array


def _where(array: pa.Array, found: pa.Array) -> pa.Array:
    """What was found, where there is a value in another array."""
    return pc.if_else(array.is_valid(), found, _bytes([None])[0]) if array.null_count else found


def _constant(value: bytes) -> pa.Scalar:
    return _bytes([value])[0]


def _flags(values: np.ndarray) -> pa.Array:
    bits = pa.py_buffer(np.packbits(values, bitorder="little"))
    return pa.Array.from_buffers(pa.bool_(), len(values), [None, bits])


def _bytes(values: Sequence[bytes | None]) -> pa.Array:
    ends = np.cumsum([0, *(len(value or b"") for value in values)], dtype=np.int64)
    valid = _flags(np.array([value is not None for value in values], bool)).buffers()[1]
    data = pa.py_buffer(b"".join(value or b"" for value in values))
    return pa.Array.from_buffers(pa.large_binary(), len(values), [valid, pa.py_buffer(ends), data])
