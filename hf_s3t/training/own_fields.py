"""What Arrow adds to a row because of other rows, taken away before texts are made of it."""

import json
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Features, Json, LargeList, List

from ..errors import IsolationError
from ..records.arrow_kinds import is_json, is_list
from ..records.contents import said


# What chat templates read, of the columns that trainers of TRL know.
_READ_BY_TEMPLATES = (
    "messages", "conversations", "prompt", "completion", "chosen", "rejected", "tools", "documents",
    "chat_template_kwargs",
)  # fmt: skip


def with_own_fields(dataset: Any) -> Any:
    """
    Rows in which a template finds what each says by itself.

    In a table all tools, or all arguments of calls, have the same fields: those of other rows are nulls, and templates
    write their names; a whole number is a float where another row has a fraction. One row, deleted since, would be
    read in the texts of all. Columns where that is so become columns of JSON.

    Args:
        dataset: The dataset as it was given, or several by their names.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: If such a column holds what JSON cannot.
    """
    if isinstance(dataset, dict):
        return {name: with_own_fields(one) for name, one in dataset.items()}
    if not isinstance(dataset, datasets.Dataset) or dataset.format["type"] == "custom":
        return dataset
    there = [name for name in _READ_BY_TEMPLATES if name in dataset.column_names]
    names = [name for name in there if _has_fields_of_others(dataset, name)]
    if not names:
        return dataset
    features = Features({**dataset.features, **{name: _of_json(dataset.features[name]) for name in names}})
    return dataset.with_format(None).map(_as_said, fn_kwargs={"names": names}, features=features)


def _as_said(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: said(row[name]) for name in names}


def _has_fields_of_others(dataset: datasets.Dataset, name: str) -> bool:
    column = dataset.with_format("arrow").select_columns([name])
    kind = column.data.schema.field(name).type
    is_found = _has_mappings(kind) and any(_shows(part) for batch in column.iter(1000) for part in batch[name].chunks)
    if is_found and not _fits_json(kind):
        raise IsolationError(
            f"`{name}` of `train_dataset` is a column of {kind}, whose fields all rows share: what one has is seen in "
            "texts of others, and JSON, where each has its own, cannot hold it. Give it as texts that `json.dumps` "
            "makes, or without what is no number, text, list or mapping."
        )
    return is_found


def _shows(array: pa.Array, is_field: bool = False) -> bool:
    """Whether there is a field without a value, or a whole number in one that is a float."""
    kind = array.type
    if pa.types.is_struct(kind):
        return any(field.null_count > 0 or _shows(field, True) for field in array.flatten())
    if is_list(kind):
        return _shows(array.flatten(), is_field)
    if is_json(kind):
        # As what it is where no row has other fields, so that it is the same to a row whether one has.
        return any(text is not None and _is_said_otherwise(json.loads(text)) for text in array.storage.to_pylist())
    return is_field and pa.types.is_floating(kind) and bool(pc.any(pc.equal(array, pc.floor(array))).as_py())


def _is_said_otherwise(value: Any) -> bool:
    return json.dumps(said(value)) != json.dumps(value)


def _has_mappings(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) or is_json(kind) or (is_list(kind) and _has_mappings(kind.value_type))


def _fits_json(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return all(_fits_json(kind.field(number).type) for number in range(kind.num_fields))
    if is_list(kind):
        return _fits_json(kind.value_type)
    tests = (
        pa.types.is_string, pa.types.is_large_string, pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating,
        pa.types.is_null,
    )  # fmt: skip
    return is_json(kind) or any(test(kind) for test in tests)


def _of_json(feature: Any) -> Any:
    """The feature of a column whose mappings have their own fields."""
    if isinstance(feature, (List, LargeList)):
        return List(_of_json(feature.feature))
    return Json() if isinstance(feature, dict) else feature
