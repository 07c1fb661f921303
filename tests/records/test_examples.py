"""The table of examples and the keyed digests that pin slices to their content."""

import datetime
import hashlib
import hmac
import re
import struct
from collections import OrderedDict
from decimal import Decimal

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hf_s3t.errors import ContentChangedError, ExampleIdError, UnknownExampleError
from hf_s3t.records.buffers import from_hexadecimal, sums_of
from hf_s3t.records.digests import PUBLIC_SECRET, DigestKey, KeptNames, encode
from hf_s3t.records.earlier import earlier_slice_digest
from hf_s3t.records.examples import Example, ExampleTable
from hf_s3t.records.ledger import Ledger
from hf_s3t.records.naming import resolve_names


KEY = DigestKey(b"k" * 32)
OTHER_KEY = DigestKey(b"l" * 32)


# Encoding


scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=6),
    st.binary(max_size=6),
    st.dates(),
    st.datetimes(),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.dictionaries(st.integers(0, 9), inner, max_size=3),
    ),
    max_leaves=10,
)


def decoded(data: bytes):
    value, rest = _decode(data)
    assert rest == b""
    return value


def _decode(data: bytes):
    """The value of an encoding, told apart by type: what can be read back cannot be shared by two values."""
    tag, rest = data[:1], data[1:]
    if tag in b"ntf":
        return {b"n": ("none",), b"t": ("bool", True), b"f": ("bool", False)}[tag], rest
    if tag == b"i":
        number, _, rest = rest.partition(b";")
        return ("int", int(number)), rest
    if tag == b"d":
        return ("float", rest[:8]), rest[8:]
    length, _, rest = rest.partition(b":")
    body, rest = rest[: int(length)], rest[int(length) :]
    if tag == b"s":
        return ("str", body.decode("utf-8", "surrogatepass")), rest
    if tag == b"b":
        return ("bytes", body), rest
    if tag == b"D":
        return ("date", body.decode()), rest
    items = []
    while body:
        item, body = _decode(body)
        items.append(item)
    return ({b"l": "list", b"m": "map"}[tag], tuple(items)), rest


def kind_of(value):
    """The name of a case: what stands for an object differs between processes, which share the tests by name."""
    return type(value).__name__


def typed(value):
    """What `decoded` should give."""
    if value is None:
        return ("none",)
    if isinstance(value, bool):
        return ("bool", value)
    if isinstance(value, int):
        return ("int", value)
    if isinstance(value, float):
        return ("float", struct.pack(">d", value))
    if isinstance(value, str):
        return ("str", value)
    if isinstance(value, bytes):
        return ("bytes", value)
    if isinstance(value, datetime.date):
        return ("date", str(value))
    if isinstance(value, dict):
        return ("map", tuple(typed(x) for key in sorted(value, key=str) for x in (key, value[key])))
    return ("list", tuple(typed(item) for item in value))


@settings(max_examples=250)
@given(values)
def test_a_value_can_be_read_back_from_its_encoding_so_no_two_values_share_one(value):
    assert decoded(encode(value)) == typed(value)


LOOKALIKES = [
    1, "1", 1.0, True, b"1", [1], ["1"], {"1": 1}, {1: 1}, {"1": "1"}, [[1]], [1, 1], [1, [1]], [[1], 1], [11],
    0, "0", 0.0, -0.0, False, b"0", None, "", b"", [], {}, [[]], [{}], [None], [""], [[], []],
    "ab", ["a", "b"], ["ab"], "a,b", {"a": "b"}, {"b": "a"}, [["a", "b"]], "n", "i1;", ["s1:a"], "s1:a",
    datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), "2020-01-01", "2020-01-01 00:00:00",
    datetime.time(0, 0), datetime.timedelta(0), datetime.timedelta(1), "1 day, 0:00:00",
    np.array([1]), np.array([1.0]), np.array([[1]]), np.array([1, 0]), np.array(1), np.array([1], dtype="int32"),
    np.array([[1, 2]]), np.array([[1], [2]]), np.array([1, 2]),
]  # fmt: skip


def test_values_that_look_alike_have_different_encodings():
    encodings = [encode(value) for value in LOOKALIKES]
    shared = [
        (LOOKALIKES[a], LOOKALIKES[b]) for a in range(len(encodings)) for b in range(a) if encodings[a] == encodings[b]
    ]
    assert not shared


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (5, np.int64(5)),
        (0.5, np.float64(0.5)),
        (True, np.bool_(True)),
        ("a", np.str_("a")),
        ([1, 2], (1, 2)),
        (b"a", bytearray(b"a")),
        ({"a": 1, "b": 2}, OrderedDict([("b", 2), ("a", 1)])),
        (np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6).reshape(2, 3))),
        (np.array(["a", None], dtype=object), ["a", None]),
    ],
)
def test_the_same_value_in_another_dress_has_the_same_encoding(one, other):
    assert encode(one) == encode(other)


@pytest.mark.parametrize("value", [object(), {1, 2}, Decimal("1.5"), 1j, [object()], {"a": object()}], ids=kind_of)
def test_a_value_without_stable_bytes_is_refused_by_its_type(value):
    with pytest.raises(ExampleIdError, match=r"A row holds a \w+, whose content cannot be digested. Give the dataset"):
        encode(value)


# Keys


@given(st.one_of(st.integers(), st.text()))
def test_another_key_gives_other_digests(example_id):
    assert KEY.of_id(example_id) == DigestKey(b"k" * 32).of_id(example_id)
    assert KEY.of_id(example_id) != OTHER_KEY.of_id(example_id)
    assert KEY.of_content({"id": example_id}) != OTHER_KEY.of_content({"id": example_id})


@given(st.integers())
def test_a_number_and_its_text_are_different_ids(number):
    assert KEY.of_id(number) != KEY.of_id(str(number))


@given(st.one_of(st.integers(), st.text()), st.one_of(st.integers(), st.text()))
def test_distinct_ids_have_distinct_digests(one, other):
    assume(one != other)
    assert KEY.of_id(one) != KEY.of_id(other)


def test_a_digest_shows_neither_the_id_nor_whether_it_is_an_id_or_a_row():
    assert re.fullmatch("[0-9a-f]{64}", KEY.of_id("person@example.org"))
    assert re.fullmatch("[0-9a-f]{64}", KEY.of_content({"text": "hello"}))
    # The same bytes for another purpose are another digest: a row that looks like an id gives nothing away.
    assert len({KEY._digest(purpose, b"x") for purpose in (b"id", b"group", b"row", b"check")}) == 4
    assert KEY.of_id("ann") != KEY.of_group("ann")


@given(st.dictionaries(st.text(max_size=3), scalars, min_size=2, max_size=4), st.data())
def test_the_content_of_a_row_does_not_depend_on_the_order_of_its_columns_but_on_every_value(row, data):
    assert KEY.of_content(row) == KEY.of_content(dict(reversed(row.items())))
    column = data.draw(st.sampled_from(sorted(row)))
    assert KEY.of_content(row) != KEY.of_content({**row, column: ["another value"]})
    assert KEY.of_content(row) != KEY.of_content({k: v for k, v in row.items() if k != column})


def test_the_key_for_places_is_one_for_each_secret_and_none_where_all_know_it():
    assert len({KEY.for_places, OTHER_KEY.for_places, KEY.secret}) == 3 and len(KEY.for_places) == 32
    assert KEY.for_places == DigestKey(b"k" * 32).for_places
    # No digest that is published gives it away.
    assert KEY.for_places.hex() not in {KEY.check, KEY.of_id("places"), KEY.of_id(""), KEY.of_group("places")}
    public = DigestKey(PUBLIC_SECRET.encode())
    assert public.is_public and public.for_places is None and not KEY.is_public


# The table


NAMES = KeptNames(KEY, "plain")


def content(text: str) -> str:
    """The digest of some content."""
    return hashlib.sha256(text.encode()).hexdigest()


def table_of(rows, names=NAMES) -> ExampleTable:
    return ExampleTable.of(dict(rows), num_shards=2, num_slices=3, seed=7, names=names)


def rows_with(groups):
    contents = st.sampled_from("abcdefgh").map(content)
    return st.builds(Example, st.integers(0, 1), st.integers(0, 2), contents, st.none() | groups)


ids = st.sampled_from([st.integers(-(2**63), 2**63 - 1), st.integers(0, 50), st.text(max_size=3)])
groups = st.sampled_from([st.none(), st.integers(-2, 2), st.text("ab", max_size=1)])
tables = st.tuples(ids, groups).flatmap(lambda kinds: st.dictionaries(kinds[0], rows_with(kinds[1]), max_size=15))
tables = tables.map(table_of)
PLACES = [(shard, slice_) for shard in range(2) for slice_ in range(3)]


def small_table() -> ExampleTable:
    return table_of(
        {
            "a": Example(0, 0, content("d0"), "ann"),
            "b": Example(0, 0, content("d1"), "ann"),
            "c": Example(0, 1, content("d2"), "bob"),
            "d": Example(1, 2, content("d3"), "cat"),
            "e": Example(1, 2, content("d4"), "cat"),
        }
    )


def seen_from_outside(table: ExampleTable):
    return (
        {place: table.members(*place) for place in PLACES},
        {place: table.slice_digest(*place) for place in PLACES},
        {place: table.size(*place) for place in PLACES},
        table.empty,
        dict(table.groups),
        dict(table.rows),
        [*table.rows],
        {i: table.duplicates_of([i]) for i in table.rows},
        len(table),
    )


@settings(max_examples=150)
@given(tables, st.data())
def test_a_table_without_some_examples_is_the_table_of_the_others(table, data):
    for place in PLACES[::2]:
        table.slice_digest(*place)  # some digests are known before, some are not
    before = dict(table.rows)
    if data.draw(st.booleans()):
        table.index()
    removed = data.draw(st.sets(st.sampled_from(list(table.rows)))) if table.rows else set()
    first, second = list(removed)[::2], list(removed)[1::2]
    left = table.without(first).without(second)
    expected = seen_from_outside(table_of((i, row) for i, row in before.items() if i not in removed))
    assert seen_from_outside(left) == seen_from_outside(left.settled()) == expected
    assert table.rows == before
    assert seen_from_outside(table) == seen_from_outside(table_of(before))


@given(tables, st.data())
def test_a_slice_digest_changes_with_its_slice_and_with_no_other(table, data):
    assume(table.rows)
    removed = data.draw(st.sampled_from(list(table.rows)))
    place = (table.rows[removed].shard, table.rows[removed].slice)
    left = table.without([removed])
    changed = [other for other in PLACES if table.slice_digest(*other) != left.slice_digest(*other)]
    assert changed == [place]


@given(tables, st.data())
def test_a_slice_digest_changes_with_the_content_of_any_of_its_examples(table, data):
    assume(table.rows)
    touched = data.draw(st.sampled_from(list(table.rows)))
    row = table.rows[touched]
    other = table_of({**table.rows, touched: Example(row.shard, row.slice, content("other"))})
    changed = [place for place in PLACES if table.slice_digest(*place) != other.slice_digest(*place)]
    assert changed == [(row.shard, row.slice)]


def test_a_slice_digest_tells_an_id_from_its_text_and_one_example_from_two():
    tables = [[1], ["1"], [1, 2], [12], ["1\n2"], ["1", "2"], []]
    digests = {table_of((i, Example(0, 0, content("d"))) for i in ids).slice_digest(0, 0) for ids in tables}
    assert len(digests) == len(tables)


@given(tables, st.randoms(use_true_random=False))
def test_the_order_of_the_datasets_rows_does_not_matter(table, generator):
    rows = list(table.rows.items())
    generator.shuffle(rows)
    shuffled = table_of(rows)
    assert [shuffled.members(*place) for place in PLACES] == [table.members(*place) for place in PLACES]
    assert [shuffled.slice_digest(*place) for place in PLACES] == [table.slice_digest(*place) for place in PLACES]


@given(tables)
def test_every_example_lies_in_exactly_one_slice(table):
    members = [i for place in PLACES for i in table.members(*place)]
    assert sorted(members, key=repr) == sorted(table.rows, key=repr)
    assert table.empty == {place for place in PLACES if not table.members(*place)}


def test_another_seed_orders_a_slice_otherwise():
    rows = {number: Example(0, 0, content("d")) for number in range(20)}
    orders = {tuple(ExampleTable.of(rows, 1, 1, seed, NAMES).members(0, 0)) for seed in range(5)}
    assert len(orders) == 5


def test_places_and_groups_are_those_of_the_rows():
    table = small_table()
    assert table.places(["a", "b", "d"]) == {(0, 0), (1, 2)}
    assert table.groups == {"ann": ["a", "b"], "bob": ["c"], "cat": ["d", "e"]}
    assert table.without(["c", "d"]).groups == {"ann": ["a", "b"], "cat": ["e"]}


# Requests


def resolve(table, ids=None, groups=None, deleted=(), deleted_groups=(), **more):
    """What of a request is in, how many ids of it were deleted before, and which of its groups are in."""
    digests = {"ids": [KEY.of_id(i) for i in deleted], "groups": [KEY.of_group(g) for g in deleted_groups]}
    ledger = Ledger().append("deletion", removed={}, **digests)
    request = resolve_names(table, ids, groups, ledger, NAMES, **more)
    return request.present, request.already_deleted, request.groups


def test_a_request_names_ids_and_groups_each_example_once():
    table = small_table()
    assert resolve(table, ["c", "c", "a"]) == (["c", "a"], 0, [])
    assert resolve(table, groups=["cat"]) == (["d", "e"], 0, ["cat"])
    assert resolve(table, ["a", "d"], ["ann", "cat", "ann"]) == (["a", "d", "b", "e"], 0, ["ann", "cat"])
    assert resolve(table, [], []) == ([], 0, [])


def column(values):
    return Dataset.from_dict({"id": list(values)})["id"]


@pytest.mark.parametrize(
    "collection",
    [list, tuple, set, np.array, iter, pd.Series, pd.Index, column, pa.array, lambda v: pa.chunked_array([v])],
)
def test_ids_and_groups_may_come_in_any_collection(collection):
    table = table_of({number: Example(0, 0, content("d"), f"group {number // 2}") for number in range(6)})
    present, already, groups = resolve(table, collection([1, 2]), collection(["group 1", "group 2"]))
    assert (sorted(present), already, sorted(groups)) == ([1, 2, 3, 4, 5], 0, ["group 1", "group 2"])
    assert all(type(i) is int for i in present)


@pytest.mark.parametrize("ids", [torch.tensor([1, 2]), [torch.tensor(1), np.int64(2)], np.array([1, 2], dtype=object)])
def test_numbers_of_tensors_and_arrays_are_ids(ids):
    table = table_of({number: Example(0, 0, content("d")) for number in range(6)})
    present, _, _ = resolve(table, ids)
    assert present == [1, 2] and all(type(i) is int for i in present)


def test_a_system_without_groups_says_so():
    table = table_of({1: Example(0, 0, content("d"))})
    with pytest.raises(UnknownExampleError, match=r"this system has none, so name examples by their ids\.$"):
        resolve_names(table, None, ["ann"], Ledger(), NAMES)


def test_ids_and_groups_deleted_before_are_counted_and_are_no_error():
    table = small_table().without(["a", "c"])
    assert resolve(table, ["a", "b", "a"], deleted=["a", "c"]) == (["b"], 1, [])
    assert resolve(table, ["b"], ["bob"], deleted=["a", "c"], deleted_groups=["bob"]) == (["b"], 0, [])


def test_unknown_ids_and_groups_are_named_all_at_once_and_before_anything_else():
    table = small_table().without(["a"])
    with pytest.raises(UnknownExampleError, match=r"Unknown ids: 'x', 'y'\. .* are texts\. Name") as caught:
        resolve(table, ["b", "x", "a", "y"], deleted=["a"])
    assert isinstance(caught.value, KeyError)
    # Nobody else is named.
    assert not re.search("'[abcde]'", str(caught.value))
    with pytest.raises(UnknownExampleError, match=r"Unknown ids: 9\. The ids .* are integers such as 1\."):
        resolve(table_of({1: Example(0, 0, content("d"))}), [9])
    with pytest.raises(UnknownExampleError, match=r"Unknown groups: 'dan'\. Groups are the values of `group_column`"):
        resolve(table, ["b"], ["cat", "dan"])


def test_unknown_ids_and_groups_may_be_passed_over():
    table = small_table().without(["a"])
    request = resolve(table, ["b", "x", "a"], ["cat", "dan"], deleted=["a"], ignore_unknown=True)
    assert request == (["b", "d", "e"], 1, ["cat"])
    with pytest.raises(ExampleIdError, match="must be a list"):
        resolve(table, "b", ignore_unknown=True)


def test_a_request_counts_what_it_passes_over_and_names_groups_that_are_gone():
    ledger = Ledger().append("deletion", removed={}, ids=[], groups=[KEY.of_group("ann")])
    request = resolve_names(small_table(), ["c", "x", "y"], ["ann", "dan"], ledger, NAMES, ignore_unknown=True)
    # A group whose name was deleted and which is in again is in.
    assert (request.groups, request.deleted_groups) == (["ann"], ())
    assert (request.unknown, request.unknown_groups) == (2, 1)
    gone = resolve_names(small_table().without(["a", "b"]), None, ["ann"], ledger, NAMES)
    assert (gone.groups, gone.deleted_groups, gone.unknown_groups) == ([], ("ann",), 0)
    assert gone.with_ids(["c"]).deleted_groups == ("ann",)


def test_a_number_does_not_name_the_example_with_that_text():
    table = table_of({"1": Example(0, 0, content("d"))})
    with pytest.raises(UnknownExampleError, match="Unknown ids: 1"):
        resolve(table, [1])


def test_many_unknown_ids_are_not_all_listed():
    with pytest.raises(UnknownExampleError, match=r"0, 1, 2, 3, 4 and 995 more"):
        resolve(small_table(), range(1000))


WRONG_REQUESTS = [
    "a", b"a", 5, 5.0, True, object(), {"a": 1}, [1.0], [True], [None], [["a"]], [b"a"], ["a", 1.5], np.array([0.5]),
    np.array(3), [{"a"}], [object()],
]  # fmt: skip


@pytest.mark.parametrize("name", ["ids", "groups"])
@pytest.mark.parametrize("request_", WRONG_REQUESTS, ids=kind_of)
def test_what_is_no_list_of_ids_is_refused_by_name(name, request_):
    with pytest.raises(ExampleIdError, match=f"`{name}` must be a list of integers or strings, got ") as caught:
        resolve(small_table(), **{name: request_})
    assert isinstance(caught.value, ValueError)


# Datasets


def check(table, rows, deleted=()):
    ledger = Ledger().append("deletion", ids=[KEY.of_id(i) for i in deleted], removed={})
    digests, _ = from_hexadecimal([digest for _, digest in rows])
    return table.check_dataset([i for i, _ in rows], digests, ledger, NAMES)


def test_a_dataset_in_any_order_fits_and_its_row_numbers_are_kept():
    table = small_table()
    rows = [(i, row.digest) for i, row in table.rows.items()]
    assert check(table, rows) == [0, 1, 2, 3, 4]
    assert check(table, rows[::-1]) == [0, 1, 2, 3, 4]


def test_rows_that_were_deleted_are_passed_over_whatever_they_hold():
    table = small_table().without(["b", "d"])
    rows = [
        ("a", content("d0")),
        ("b", content("anything")),
        ("c", content("d2")),
        ("d", content("d3")),
        ("e", content("d4")),
    ]
    assert check(table, rows, deleted=["b", "d"]) == [0, 2, 4]
    assert check(table, [rows[0], rows[2], rows[4]], deleted=["b", "d"]) == [0, 1, 2]


def test_changed_content_is_an_error_that_names_the_ids():
    rows = [
        ("a", content("d0")),
        ("b", content("different")),
        ("c", content("d2")),
        ("d", content("d3")),
        ("e", content("d4")),
    ]
    with pytest.raises(ContentChangedError, match=r"content of 1 example is not .*: 'b'\. Restore the rows"):
        check(small_table(), rows)


def test_new_rows_are_an_error_that_names_the_ids():
    rows = [(i, row.digest) for i, row in small_table().rows.items()] + [("new", content("d9"))]
    with pytest.raises(UnknownExampleError, match=r"1 example that this system does not know: 'new'\. Leave"):
        check(small_table(), rows)


def test_missing_rows_are_an_error_that_names_the_ids():
    with pytest.raises(ExampleIdError, match=r"lacks 2 examples that this system holds: 'd', 'e'\. .*call `unlearn`"):
        check(small_table(), [("a", content("d0")), ("b", content("d1")), ("c", content("d2"))])


def test_what_is_left_of_rows_is_a_mapping_like_any_other():
    table = small_table()
    left = table.without(["a"]).without(["c"]).rows
    same = {i: row for i, row in table.rows.items() if i not in ("a", "c")}
    assert left == same and same == left and len(left) == len(same) and list(left) == list(same)
    assert "a" not in left and left.get("a") is None and left["b"] == table.rows["b"]
    assert not any(odd in left for odd in (None, 1, 1.5, b"b", ("b",), ["b"], "B", ""))
    with pytest.raises(KeyError):
        left["a"]
    with pytest.raises(KeyError, match="'c'"):
        table.without(["c"]).without(["b", "c"])


def test_a_settled_table_is_the_same_and_holds_nothing_of_what_went():
    table = small_table().without(["a"]).without(["c"])
    settled = table.settled()
    assert seen_from_outside(settled) == seen_from_outside(table) and len(settled.columns) == 3
    assert settled.columns.group_names.to_pylist() == ["ann", "cat"]
    assert settled.settled() is settled


@given(tables)
def test_a_slice_digest_is_the_sum_of_keyed_digests_of_its_rows(table):
    for place in PLACES:
        pairs = [(KEY.of_id(i), row.digest) for i, row in table.rows.items() if (row.shard, row.slice) == place]
        total = sum(
            int(hmac.digest(KEY.secret, b"slice\0" + bytes.fromhex(i + c), "sha256").hex(), 16) for i, c in pairs
        )
        assert table.slice_digest(*place) == f"{total % 2**256:064x}"


def test_another_secret_gives_other_slice_digests_and_the_earlier_one_needed_none():
    rows = dict(small_table().rows)
    ours, theirs = table_of(rows), table_of(rows, KeptNames(OTHER_KEY, "plain"))
    assert ours.slice_digest(0, 0) != theirs.slice_digest(0, 0)
    assert earlier_slice_digest(ours, 0, 0) == earlier_slice_digest(theirs, 0, 0)


def test_adding_rows_by_the_hundred_thousand_is_adding_them_one_by_one(monkeypatch):
    digests = KEY.of_ids(range(25))
    places = np.array([number * 7 % 3 for number in range(25)])
    expected = {p: sum(int(d.tobytes().hex(), 16) for d in digests[places == p]) % 2**256 for p in range(3)}
    for at_once in (1, 4, 100):
        monkeypatch.setattr("hf_s3t.records.buffers._AT_ONCE", at_once)
        assert sums_of(digests, places) == expected


@given(tables, st.data())
def test_a_table_is_masked_by_digests_alone(table, data):
    removed = data.draw(st.lists(st.sampled_from([*table.rows]))) if table.rows else []
    digests = [KEY.of_id(i) for i in removed] + [KEY.of_id("never there"), "no digest", "A" * 64]
    assert table.of_digests(digests) == [i for i in table.rows if i in removed]
    assert seen_from_outside(table.without_digests(digests)) == seen_from_outside(table.without(removed))


@given(tables, st.data())
def test_places_rows_and_groups_of_many_are_those_of_each(table, data):
    known = st.sampled_from([*table.rows]) if table.rows else st.nothing()
    ids = data.draw(st.lists(known | st.sampled_from([99, "nobody"])))
    rows = dict(table.rows)
    assert table.examples(ids) == [rows.get(i) for i in ids]
    assert table.places_of(ids) == [None if i not in rows else (rows[i].shard, rows[i].slice) for i in ids]
    there = [i for i in ids if i in rows]
    assert table.groups_of(there) == [g for g in dict.fromkeys(rows[i].group for i in there) if g is not None]
    left = set(table.rows).difference(there)
    emptied = [g for g in table.groups_of(there) if not left.intersection(table.groups[g])]
    assert table.emptied_by([*dict.fromkeys(there)]) == emptied
    assert table.places(there) == {(rows[i].shard, rows[i].slice) for i in there}


@given(tables)
def test_a_table_whose_ids_are_digests_says_the_same_of_them(table):
    digests = table_of(
        {KEY.of_id(i): Example(r.shard, r.slice, r.digest, r.group) for i, r in table.rows.items()},
        KeptNames(KEY, "digest"),
    )
    original = {KEY.of_id(i): i for i in table.rows}
    assert {i: digests.rows[KEY.of_id(i)] for i in table.rows} == dict(table.rows)
    for place in PLACES:
        assert [original[kept] for kept in digests.members(*place, original)] == table.members(*place)
    assert all(odd not in digests.rows for odd in ("", "x" * 64, None, 1)) and not digests.of_digests(["A" * 64])


def test_ids_whose_digests_begin_alike_are_told_apart():
    table = small_table()
    # Nobody can make such ids; a table that was tampered with can say that they are such.
    alike = table.columns.id_digests.copy()
    alike[:, :8] = 7
    table.columns.__dict__["id_digests"] = alike
    assert table.columns.are_unique
    assert table.columns.rows_of_digests(alike[[3, 0, 4]]).tolist() == [3, 0, 4]
    other = alike[:1].copy()
    other[0, 31] ^= 1
    assert table.columns.rows_of_digests(other).tolist() == [-1]


def test_many_digests_at_once_are_those_of_hmac():
    for secret in (b"k" * 16, b"k" * 64, b"k" * 65, b"k" * 200):
        key = DigestKey(secret)
        ids = [0, -1, 2**63, "", "a", "\u00e4\ud800", "x" * 500]
        assert [row.tobytes().hex() for row in key.of_ids(ids)] == [key.of_id(i) for i in ids]
