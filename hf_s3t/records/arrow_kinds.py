"""Kinds of Arrow columns that several types stand for."""

import pyarrow as pa


def is_list(kind: pa.DataType) -> bool:
    """Whether a column holds lists, of whatever lengths."""
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_json(kind: pa.DataType) -> bool:
    """Whether a column holds JSON: as which Datasets keeps mappings once one row has other fields than the others."""
    return getattr(kind, "extension_name", "") == "arrow.json"
