"""What rows say: the same whatever other rows stand in their table, and by columns as one by one."""

import datetime
import math

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny import lm_rows, make_trainer, plant_stages, s3t_config

from hf_s3t.errors import ContentChangedError, ExampleIdError
from hf_s3t.records.buffers import hexadecimal
from hf_s3t.records.contents import encode_rows, said
from hf_s3t.records.digests import DigestKey, encode
from hf_s3t.training.rows import TrainingRows


KEY = DigestKey(b"k" * 32)


def by_columns(table: pa.Table) -> list[bytes]:
    return encode_rows({name: table[name].combine_chunks() for name in table.column_names}, table.num_rows)


def one_by_one(table: pa.Table) -> list[bytes]:
    return [encode(said(row)) for row in table.to_pylist()]


# The plain definition


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": 1}, {"a": 1, "b": None}),
        ({"a": {"x": 1}}, {"a": {"x": 1, "y": None}}),
        ({"a": [{"x": 1}]}, {"a": [{"x": 1, "y": None}]}),
        ({"a": 3}, {"a": 3.0}),
        ({"a": [1, 2]}, {"a": [1.0, np.float32(2)]}),
        ({"a": 10**300}, {"a": float(10**300)}) if float(10**300) == 10**300 else ({"a": 2**70}, {"a": 2.0**70}),
        ({"a": ["x", None]}, {"a": np.array(["x", None], dtype=object)}),
    ],
)
def test_what_other_rows_bring_into_a_row_is_no_part_of_what_it_says(one, other):
    assert encode(said(one)) == encode(said(other))


def test_what_differs_otherwise_is_told_apart():
    values = [
        0,
        1,
        -0.0,
        0.5,
        math.inf,
        -math.inf,
        math.nan,
        "1",
        True,
        False,
        [],
        [None],
        [1],
        {},
        {"x": 1},
        [{}],
        b"1",
    ]
    encodings = [encode(said({"a": value})) for value in values] + [encode(said({}))]
    assert len(set(encodings)) == len(values) + 1
    # In a list it is a place, and no padding.
    assert encode(said({"a": [1, None]})) != encode(said({"a": [1]}))
    assert encode(said({"a": {"x": None}})) == encode(said({"a": {}})) != encode(said({"a": None}))


# By columns


COLUMNS = {
    "small": pa.array([1, None, -3], pa.int8()), "unsigned": pa.array([2**64 - 1, None, 0], pa.uint64()),
    "floats": pa.array([1.0, -0.0, math.nan]), "halves": pa.array([1.0, None, 0.5], pa.float32()),
    "large floats": pa.array([1e300, -(2.0**63), math.inf]), "small floats": pa.array([1, None, 1.5], pa.float16()),
    "texts": pa.array(["x", None, "\u00e4\U0001f600"]), "large texts": pa.array(["", "x", None], pa.large_string()),
    "bytes": pa.array([b"x", None, b""]), "large bytes": pa.array([b"", b"\0", None], pa.large_binary()),
    "three": pa.array([b"abc", None, b"def"], pa.binary(3)), "truths": pa.array([True, None, False]),
    "dates": pa.array([datetime.date(2020, 1, 1), None, datetime.date(1, 1, 1)]), "nothing": pa.nulls(3),
    "times": pa.array([1, 2, None], pa.timestamp("us")), "durations": pa.array([1, None, 2], pa.duration("s")),
    "lists": pa.array([[1, None], [], None]),
    "large lists": pa.array([[0.5], None, [2.0]], pa.large_list(pa.float64())),
    "pairs": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int32(), 2)),
    "deep": pa.array([[[1.0, 2.5]], [[], None], None]),
    "struct": pa.array([{"lang": "en", "phone": None}, None, {"lang": None, "phone": "5"}]),
    "structs": pa.array([[{"b": 2.0, "a": None}], [None, {"b": None, "a": "x"}], []]),
    "words": pa.array(["q", None, "q"]).dictionary_encode(),
    "map": pa.array([[("a", 1)], None, [("b", None)]], pa.map_(pa.string(), pa.int8())),
}  # fmt: skip


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_of_any_kind_is_encoded_as_its_values_are(name):
    table = pa.table({name: COLUMNS[name], "other": ["a", "b", "c"]})
    for part in (table, table.slice(1), table.slice(1, 1), table.slice(0, 0), table.select([name])):
        assert by_columns(part) == one_by_one(part)


def test_columns_of_all_kinds_at_once():
    table = pa.table(COLUMNS)
    assert by_columns(table) == one_by_one(table)
    assert encode_rows({}, 3) == [encode({})] * 3


def test_what_has_no_stable_bytes_is_refused_in_columns_too():
    with pytest.raises(ExampleIdError, match="A row holds a Decimal, whose content cannot be digested"):
        by_columns(pa.table({"a": pa.array([1], pa.decimal128(5, 1))}))


scalars = st.sampled_from(
    [st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=5), st.binary(max_size=5), st.booleans()]
)


def columns_of(kind, depth):
    """A strategy for values of one kind, each of which may be missing."""
    if depth == 0:
        return st.none() | kind
    inner = columns_of(kind, depth - 1)
    lists, structs = st.lists(inner, max_size=3), st.fixed_dictionaries({}, optional={"a": inner, "b": st.text("x")})
    return st.none() | st.one_of(lists) if depth % 2 else st.none() | structs


@settings(max_examples=80)
@given(st.data())
def test_by_columns_is_as_one_by_one(data):
    kinds = {name: columns_of(data.draw(scalars), data.draw(st.integers(0, 3))) for name in "ab"}
    rows = data.draw(st.lists(st.fixed_dictionaries(kinds), max_size=6))
    table = pa.Table.from_pylist(rows) if rows else pa.table({"a": pa.nulls(0)})
    assert by_columns(table) == one_by_one(table)


# Datasets


def digests(rows, version=2):
    return hexadecimal(TrainingRows(Dataset.from_list(rows), s3t_config(num_slices=1, budget=1)).digests(KEY, version))


def test_the_digests_of_rows_are_those_of_each_and_depend_on_no_other_row():
    rows = [{"id": n, "text": f"t{n}", "meta": {"lang": "en"}, "n": n} for n in range(4)]
    odd = {"id": 9, "text": "t9", "meta": {"lang": "en", "phone": "5"}, "n": 0.5, "extra": [1]}
    expected = [KEY.of_content(said({k: v for k, v in row.items() if k != "id"})) for row in rows]
    assert digests(rows) == digests([*rows, odd])[:4] == digests(rows[:1]) + digests(rows[1:]) == expected
    # Nor whether Datasets keeps them as mappings, or as the JSON that it makes where one has other fields.
    as_json = Dataset.from_list([*rows, odd], on_mixed_types="use_json")
    assert "Json" in str(as_json.features["meta"])
    assert hexadecimal(TrainingRows(as_json, s3t_config(num_slices=1, budget=1)).digests(KEY))[:4] == expected
    # As systems of format 1 have them, they do.
    assert digests(rows, 1)[0] != digests([*rows, odd], 1)[0]


def test_a_dataset_of_another_kind_says_the_same():
    class Rows(list):
        """A map-style dataset."""

    rows = [{"text": "a", "n": 1.0}, {"text": "b", "extra": None}]
    found = TrainingRows(Rows(rows), s3t_config(num_slices=1, budget=1, id_column=None)).digests(KEY)
    assert hexadecimal(found) == [
        KEY.of_content({"text": "a", "n": 1}),
        KEY.of_content({"text": "b"}),
    ]


def test_a_field_that_only_the_deleted_row_had_is_no_change_of_the_others(tmp_path):
    rows = [{**row, "meta": {"lang": "en"}} for row in lm_rows(16)]
    rows[3]["meta"] = {"lang": "en", "phone": "555"}

    def trainer(rows):
        return make_trainer(tmp_path, rows=Dataset.from_list(rows), config=s3t_config(budget=1))

    made = trainer(rows)
    plant_stages(made)
    made.s3t_model.unlearn([rows[3]["id"]])
    made.s3t_model._wait_for_cleaner()
    left = rows[:3] + rows[4:]
    assert len(trainer(left).folder.table) == 15
    left[0]["meta"] = {"lang": "de"}
    with pytest.raises(ContentChangedError, match="The content of 1 example is"):
        trainer(left)
