"""Where an example goes: from its id or group, seed and key alone, evenly, and the same everywhere."""

import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.places_by_row import order_by_row, place_hash, places_by_row, units_by_row

from hf_s3t.errors import ConfigError, EmptySliceError, ExampleIdError
from hf_s3t.plan.partition import assign, check_ids, in_order, order_key, units_of


numbers = st.lists(st.integers(-(10**12), 10**12), min_size=1, max_size=30, unique=True)
names = st.lists(st.text(max_size=6), min_size=1, max_size=30, unique=True)
id_lists = st.one_of(numbers, names)


@st.composite
def cases(draw):
    """Ids with as many shards and slices as they can fill."""
    ids = draw(id_lists)
    shards = draw(st.integers(1, min(4, len(ids))))
    slices = draw(st.integers(1, len(ids) // shards))
    return ids, dict(num_shards=shards, num_slices=slices, seed=draw(st.integers(-5, 1000)))


@st.composite
def grouped_cases(draw):
    """Ids with a group for each, and as many slices as the groups can fill."""
    groups = draw(st.lists(st.integers(0, 12), min_size=4, max_size=40))
    shards = draw(st.integers(1, min(3, len(set(groups)))))
    slices = draw(st.integers(1, len(set(groups)) // shards))
    return groups, dict(num_shards=shards, num_slices=slices, seed=draw(st.integers(0, 99)))


def spread(counts) -> int:
    return max(counts) - min(counts)


class TestIds:
    def test_integers_and_strings_stay(self):
        assert check_ids([3, 1, 2]) == [3, 1, 2]
        assert check_ids(["b", "a", ""]) == ["b", "a", ""]
        assert check_ids(range(3)) == [0, 1, 2]

    def test_numpy_scalars_become_plain(self):
        checked = check_ids(np.array([5, 6], dtype=np.uint16)) + check_ids([np.int64(7), 8])
        assert checked == [5, 6, 7, 8]
        assert {type(i) for i in checked} == {int}
        assert {type(i) for i in check_ids(np.array(["a", "b"]))} == {str}

    @pytest.mark.parametrize("wrong", [None, float("nan"), True, np.True_, 1.0, np.float32(2), b"a", (1,), [1]])
    def test_what_cannot_be_an_id_is_named(self, wrong):
        with pytest.raises(ExampleIdError, match=r"\(row 1\).*Expected integers or strings.*`id_column`"):
            check_ids([10, wrong, 12])

    def test_mixed_types_are_refused(self):
        with pytest.raises(ExampleIdError, match=r"mix integers and strings.*convert the column to strings"):
            check_ids([1, "1"])

    def test_repeated_ids_are_named(self):
        with pytest.raises(ExampleIdError, match=r"'a'.*`group_column`"):
            check_ids(["a", "b", "a"])

    def test_at_most_five_offenders_are_named(self):
        with pytest.raises(ExampleIdError, match=r"\(20\): 0, 1, 2, 3, 4 and 15 more"):
            check_ids([*range(20), *range(20)])
        with pytest.raises(ExampleIdError, match=r"\(7\): .*\(row 4\) and 2 more"):
            check_ids([None] * 7)

    @pytest.mark.parametrize("nothing", [[], None, 5, "abc", b"abc", ()])
    def test_no_ids_are_refused(self, nothing):
        with pytest.raises(ExampleIdError, match="expected a list with one integer or string per example"):
            check_ids(nothing)


class TestBalanced:
    @given(cases())
    @settings(max_examples=50)
    def test_sizes_are_within_one_of_each_other(self, case):
        ids, config = case
        places = assign(ids, **config)
        m, size = config["num_shards"], config["num_slices"]
        slices = Counter(places)
        shards = Counter(shard for shard, _ in places)
        assert set(slices) == {(i, j) for i in range(m) for j in range(size)}
        assert spread(slices.values()) <= 1
        assert spread(shards.values()) <= 1

    @given(cases(), st.randoms(use_true_random=False))
    @settings(max_examples=50)
    def test_depends_on_the_set_of_ids_not_on_their_order(self, case, rng):
        ids, config = case
        before = dict(zip(ids, assign(ids, **config)))
        shuffled = rng.sample(ids, len(ids))
        assert dict(zip(shuffled, assign(shuffled, **config))) == before

    def test_seeds_differ(self):
        places = {tuple(assign(range(40), num_shards=2, num_slices=4, seed=seed)) for seed in (-1, 0, 1, 2, 10**30)}
        assert len(places) == 5

    def test_looks_random(self):
        # Neighbouring ids (one person's, one day's) are spread: 4 slices get about 50 of 200 from any 200 in a row.
        places = assign(range(2000), num_shards=1, num_slices=4)
        for start in range(0, 2000, 200):
            counts = Counter(places[start : start + 200])
            assert all(abs(count - 50) < 4.5 * 50**0.5 for count in counts.values())


class TestGroups:
    @given(grouped_cases(), st.sampled_from(["balanced", "hashed"]))
    @settings(max_examples=50)
    def test_a_group_lies_in_one_slice(self, case, method):
        groups, config = case
        try:
            places = assign(range(len(groups)), groups=groups, method=method, **config)
        except EmptySliceError:
            assert method == "hashed"
            return
        place_of = dict(zip(groups, places))
        assert [place_of[group] for group in groups] == places

    @given(grouped_cases())
    @settings(max_examples=50)
    def test_every_slice_has_a_group_and_sizes_differ_by_at_most_the_largest(self, case):
        groups, config = case
        places = assign(range(len(groups)), groups=groups, **config)
        assert len(set(places)) == config["num_shards"] * config["num_slices"]
        assert spread(Counter(places).values()) <= max(Counter(groups).values())

    def test_large_groups_do_not_pile_up(self):
        groups = ["a"] * 50 + ["b"] * 50 + ["c"] * 50 + [f"single {i}" for i in range(150)]
        places = assign(range(300), num_shards=2, num_slices=3, groups=groups)
        assert set(Counter(places).values()) == {50}

    @given(grouped_cases(), st.randoms(use_true_random=False))
    @settings(max_examples=50)
    def test_row_order_does_not_matter(self, case, rng):
        groups, config = case
        before = dict(zip(groups, assign(range(len(groups)), groups=groups, **config)))
        rows = rng.sample(range(len(groups)), len(groups))
        after = assign(rows, groups=[groups[row] for row in rows], **config)
        assert [before[groups[row]] for row in rows] == after

    @pytest.mark.parametrize("wrong", [None, float("nan"), 1.5, False])
    def test_a_missing_group_is_refused(self, wrong):
        with pytest.raises(ExampleIdError, match=r"group.*\(row 2\).*Give every row a group"):
            assign(range(3), num_shards=1, num_slices=1, groups=[1, 2, wrong])

    def test_one_group_per_row(self):
        with pytest.raises(ConfigError, match="2 values for 3 ids"):
            assign(range(3), num_shards=1, num_slices=1, groups=["a", "b"])


KEY, OTHER_KEY = b"k" * 32, b"l" * 32
# Of range(8) in two slices of two shards, under the first.
KEYED = [(1, 1), (1, 1), (1, 0), (0, 1), (1, 0), (0, 0), (0, 0), (0, 1)]


class TestKey:
    @given(cases())
    @settings(max_examples=50)
    def test_sizes_stay_within_one_of_each_other(self, case):
        ids, config = case
        for key in (KEY, OTHER_KEY):
            places = assign(ids, **config, key=key)
            assert len(set(places)) == config["num_shards"] * config["num_slices"]
            assert spread(Counter(places).values()) <= 1
            assert spread(Counter(shard for shard, _ in places).values()) <= 1

    def test_keys_seeds_and_no_key_differ_in_places_and_not_in_sizes(self):
        config = dict(num_shards=2, num_slices=3)
        keys = (None, KEY, OTHER_KEY, b"k" * 16, b"k" * 100)
        found = [assign(range(40), **config, seed=seed, key=key) for seed in (1, 2) for key in keys]
        assert len({tuple(places) for places in found}) == 10
        assert len({tuple(sorted(Counter(places).items())) for places in found}) == 1

    @given(cases(), st.randoms(use_true_random=False))
    @settings(max_examples=50)
    def test_one_key_gives_the_same_places_whatever_the_order_of_the_rows(self, case, rng):
        ids, config = case
        before = dict(zip(ids, assign(ids, **config, key=KEY)))
        shuffled = rng.sample(ids, len(ids))
        assert dict(zip(shuffled, assign(shuffled, **config, key=KEY))) == before

    @given(grouped_cases(), st.randoms(use_true_random=False))
    @settings(max_examples=50)
    def test_groups_lie_together_fill_every_slice_and_their_rows_have_no_order(self, case, rng):
        groups, config = case
        places = assign(range(len(groups)), groups=groups, **config, key=KEY)
        place_of = dict(zip(groups, places))
        assert [place_of[group] for group in groups] == places
        assert len(set(places)) == config["num_shards"] * config["num_slices"]
        assert spread(Counter(places).values()) <= max(Counter(groups).values())
        rows = rng.sample(range(len(groups)), len(groups))
        assert assign(rows, groups=[groups[row] for row in rows], **config, key=KEY) == [places[row] for row in rows]

    def test_large_groups_do_not_pile_up(self):
        # They tend to come first, but not surely: from that who lost a row could be told.
        groups = ["a"] * 50 + ["b"] * 50 + ["c"] * 50 + [f"single {i}" for i in range(150)]
        for number in range(20):
            places = assign(range(300), num_shards=2, num_slices=3, groups=groups, key=bytes([number] * 16))
            assert len({place for place, group in zip(places, groups) if len(group) == 1}) == 3
            assert spread(Counter(places).values()) <= 6

    def test_an_order_that_anybody_can_compute_says_nothing_of_places(self):
        # Without a key the places of ids in that order are dealt in turn.
        in_turn = sorted(range(1200), key=lambda i: place_hash(i, 42))
        cells = [shard + 2 * slice_ for shard, slice_ in assign(in_turn, num_shards=2, num_slices=3)]
        assert cells == [n % 6 for n in range(1200)]
        cells = [shard + 2 * slice_ for shard, slice_ in assign(in_turn, num_shards=2, num_slices=3, key=KEY)]
        steps = Counter((b - a) % 6 for a, b in pairwise(cells))
        assert all(abs(count - 200) < 4.5 * 200**0.5 for count in steps.values())

    @pytest.mark.parametrize("method", ["hashed", "column"])
    def test_it_has_a_say_in_balanced_places_alone(self, method):
        columns = {"shards": [0, 1] * 10, "slices": [0, 0, 1, 1] * 5} if method == "column" else {}
        config = dict(num_shards=2, num_slices=2, method=method, **columns)
        assert assign(range(20), **config, key=KEY) == assign(range(20), **config)

    @pytest.mark.parametrize("key", [b"", b"k" * 15, "k" * 32, 7])
    def test_what_is_no_key_is_refused(self, key):
        with pytest.raises(
            ConfigError, match=r"`key` must be at least 16 bytes, got (0 bytes|15 bytes|str|int)\. Leave"
        ):
            assign(range(9), num_shards=1, num_slices=3, key=key)


class TestHashed:
    @given(st.integers(-99, 99), st.integers(1, 60))
    @settings(max_examples=50)
    def test_places_hold_when_other_rows_leave(self, seed, leaving):
        ids = random.Random(seed).sample(range(10**6), 160)
        config = dict(num_shards=2, num_slices=2, method="hashed", seed=seed)
        before = dict(zip(ids, assign(ids, **config)))
        staying = ids[leaving:]
        assert assign(staying, **config) == [before[i] for i in staying]

    def test_places_of_groups_hold_when_their_members_change(self):
        groups = [f"user {i % 40}" for i in range(120)]
        config = dict(num_shards=1, num_slices=3, method="hashed")
        whole = dict(zip(groups, assign(range(120), groups=groups, **config)))
        part = dict(zip(groups[:40], assign(range(500, 540), groups=groups[:40], **config)))
        assert part == whole

    def test_slices_are_about_even(self):
        counts = Counter(assign(range(6000), num_shards=2, num_slices=3, method="hashed"))
        assert all(abs(count - 1000) < 4.5 * 1000**0.5 for count in counts.values())


class TestColumn:
    def test_the_columns_say_it(self):
        places = assign(
            ["a", "b", "c", "d"],
            num_shards=2,
            num_slices=2,
            method="column",
            shards=np.array([0, 1, 1, 0]),
            slices=[0, 0, 1, 1],
        )
        assert places == [(0, 0), (1, 0), (1, 1), (0, 1)]
        assert all(type(n) is int for place in places for n in place)

    @pytest.mark.parametrize("wrong", [None, -1, 2, 0.0, "0", True])
    def test_wrong_numbers_are_named(self, wrong):
        with pytest.raises(ConfigError, match=r"wrong shard number \(1\): .* \(id 'b'\).*from 0 to 1"):
            assign(["a", "b"], num_shards=2, num_slices=1, method="column", shards=[0, wrong], slices=[0, 0])

    def test_one_number_per_row(self):
        with pytest.raises(ConfigError, match="`slices` has 1 value for 2 ids"):
            assign(["a", "b"], num_shards=2, num_slices=1, method="column", shards=[0, 1], slices=[0])

    def test_a_group_in_two_slices_is_refused(self):
        with pytest.raises(ConfigError, match="'x' in shard 0 slice 0 and shard 0 slice 1"):
            assign(
                range(3),
                num_shards=1,
                num_slices=2,
                method="column",
                shards=[0] * 3,
                slices=[0, 1, 1],
                groups=["x", "x", "y"],
            )

    @pytest.mark.parametrize(
        "method, columns",
        [
            ("column", {}),
            ("column", {"shards": [0, 0]}),
            ("column", {"slices": [0, 0]}),
            ("balanced", {"shards": [0, 0], "slices": [0, 0]}),
            ("hashed", {"slices": [0, 0]}),
        ],
    )
    def test_both_columns_belong_to_it_and_to_it_alone(self, method, columns):
        with pytest.raises(ConfigError, match='Both belong to method="column"'):
            assign([1, 2], num_shards=1, num_slices=1, method=method, **columns)


class TestEmptySlices:
    @pytest.mark.parametrize("method", ["balanced", "hashed"])
    def test_fewer_examples_than_slices(self, method):
        with pytest.raises(EmptySliceError, match="5 examples cannot fill num_shards=2 times num_slices=3"):
            assign(range(5), num_shards=2, num_slices=3, method=method)

    def test_fewer_groups_than_slices(self):
        with pytest.raises(EmptySliceError, match="2 groups cannot fill"):
            assign(range(100), num_shards=1, num_slices=3, groups=["a", "b"] * 50)

    def test_empty_slices_of_a_column_are_named(self):
        with pytest.raises(EmptySliceError, match=r"\(1 of 2\): shard 0 slice 1\. .*mend the columns"):
            assign(range(3), num_shards=1, num_slices=2, method="column", shards=[0] * 3, slices=[0] * 3)

    def test_empty_slices_of_a_hash_are_named(self):
        with pytest.raises(EmptySliceError, match=r'shard . slice .*partition="balanced"'):
            assign(range(40), num_shards=4, num_slices=10, method="hashed")


class TestHashing:
    def test_a_number_and_its_digits_differ(self):
        assert order_key(1, seed=42) != order_key("1", seed=42)
        by_number = assign(range(64), num_shards=1, num_slices=4)
        assert by_number != assign([str(i) for i in range(64)], num_shards=1, num_slices=4)

    @given(id_lists, st.integers(-5, 5))
    def test_order_keys_differ_between_ids_and_seeds(self, ids, seed):
        assert len({order_key(i, seed) for i in ids}) == len(ids)
        assert order_key(ids[0], seed) != order_key(ids[0], seed + 1)
        assert {len(order_key(i, seed)) for i in ids} == {16}

    def test_the_order_inside_a_slice_is_no_trace_of_the_place(self):
        # Placing and ordering by one hash would give the first slice the lowest keys.
        ids = list(range(2000))
        first = [i for i, place in zip(ids, assign(ids, num_shards=1, num_slices=2)) if place == (0, 0)]
        low_half = set(sorted(ids, key=lambda i: order_key(i, 42))[:1000])
        assert 400 < len(low_half.intersection(first)) < 600

    def test_any_string_can_be_an_id(self):
        assert len({order_key(name, 0) for name in ("", "\u00e9", "e\u0301", "\ud800", "\0", "i1")}) == 6

    def test_is_the_same_in_every_version(self):
        # The recorded assignment of trained systems, and the order in which their stages saw the examples.
        assert order_key("ann", 42).hex() == "418cf1839cf7e53a0e250be86424b1f4"
        assert order_key(17, 42).hex() == "0eb01e1302d22c10e0e5f98ac99ce513"
        assert assign(range(8), num_shards=2, num_slices=2) == [
            (1, 0),
            (0, 1),
            (0, 0),
            (1, 0),
            (1, 1),
            (0, 1),
            (0, 0),
            (1, 1),
        ]
        assert assign(range(8), num_shards=2, num_slices=2, key=KEY) == KEYED
        assert assign(range(8), num_shards=1, num_slices=2, method="hashed") == [
            (0, 1),
            (0, 0),
            (0, 0),
            (0, 0),
            (0, 1),
            (0, 0),
            (0, 1),
            (0, 1),
        ]

    @pytest.mark.parametrize("hash_seed", ["0", "1"])
    def test_is_the_same_in_another_process(self, hash_seed):
        ids = [f"id {i}" for i in random.Random(0).sample(range(1000), 50)]
        code = (
            "import json, sys; from hf_s3t.plan.partition import assign; ids = json.loads(sys.argv[1]);"
            "shape = dict(num_shards=2, num_slices=2, key=b'k' * 32);"
            "print(json.dumps([assign(ids, **shape, method=m) for m in ('balanced', 'hashed')]))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(ids)],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
        )
        shape = dict(num_shards=2, num_slices=2, key=KEY)
        here = [assign(ids, **shape, method=method) for method in ("balanced", "hashed")]
        assert [[tuple(place) for place in places] for places in json.loads(done.stdout)] == here


@pytest.mark.parametrize(
    "change", [{"num_shards": 0}, {"num_slices": 0}, {"num_slices": 1.0}, {"seed": "42"}, {"method": "dealt"}]
)
def test_wrong_settings_are_refused(change):
    with pytest.raises(ConfigError, match="must be"):
        assign([1, 2, 3], **{"num_shards": 1, "num_slices": 1, **change})


@st.composite
def any_cases(draw):
    """Ids, with or without groups, of integers or texts, and as many slices as they can fill."""
    ids = draw(id_lists)
    some = draw(st.sampled_from([st.one_of(st.sampled_from([-1, 10**18]), st.integers(0, 8)), st.text(max_size=2)]))
    groups = draw(st.none() | st.lists(some, min_size=len(ids), max_size=len(ids)))
    units = len(set(ids if groups is None else groups))
    shards = draw(st.integers(1, min(4, units)))
    slices = draw(st.integers(1, units // shards))
    return ids, dict(num_shards=shards, num_slices=slices, seed=draw(st.integers(-5, 1000)), groups=groups)


class TestRowByRow:
    """What is computed of columns as a whole is what rows give one by one: recorded systems go on with it."""

    @settings(max_examples=200, deadline=None)
    @given(any_cases(), st.none() | st.binary(min_size=16, max_size=40))
    def test_balanced_places(self, case, key):
        ids, how = case
        assert assign(ids, **how, key=key) == places_by_row(ids, **how, key=key)

    @settings(max_examples=200, deadline=None)
    @given(any_cases(), st.none() | st.binary(min_size=16, max_size=40))
    def test_hashed_places(self, case, key):
        ids, how = case
        expected = places_by_row(ids, **how, method="hashed")
        if len(set(expected)) == how["num_shards"] * how["num_slices"]:
            assert assign(ids, **how, method="hashed", key=key) == expected
        else:
            with pytest.raises(EmptySliceError):
                assign(ids, **how, method="hashed", key=key)

    def test_many_rows_in_many_cells(self):
        ids, rng = [f"person-{n}" for n in range(20_000)], random.Random(0)
        groups = [rng.randrange(6_000) for _ in ids]
        keyed, grouped = {"key": bytes(16)}, {"groups": groups}
        for how in ({}, keyed, grouped, {**keyed, **grouped}, {"method": "hashed"}, {"method": "hashed", **grouped}):
            how = {"num_shards": 13, "num_slices": 37, **how}
            assert assign(ids, **how) == places_by_row(ids, **how)

    @settings(max_examples=100, deadline=None)
    @given(id_lists, st.integers(0, 9))
    def test_the_order_in_a_slice(self, ids, seed):
        assert [ids[position] for position in in_order(ids, seed)] == order_by_row(ids, seed)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(st.tuples(st.integers(-2, 12), st.sampled_from("abcdef")), min_size=1, max_size=20), st.booleans())
    def test_units(self, rows, are_grouped):
        groups, contents = zip(*rows, strict=True)
        ids = list(range(7, 7 + len(rows)))
        groups = groups if are_grouped else None
        assert units_of(ids, groups, contents) == units_by_row(ids, groups, contents)

    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 1), st.integers(0, 2)), max_size=9), st.randoms())
    def test_groups_that_are_torn(self, more, rng):
        rows = [*((3 * shard + slice_, shard, slice_) for shard in (0, 1) for slice_ in (0, 1, 2)), *more]
        rng.shuffle(rows)
        groups, shards, slices = map(list, zip(*rows, strict=True))
        spread = {group: sorted({tuple(at) for g, *at in rows if g == group}) for group in dict.fromkeys(groups)}
        torn = [
            f"{group} in " + " and ".join(f"shard {shard} slice {slice_}" for shard, slice_ in where)
            for group, where in spread.items()
            if len(where) > 1
        ]
        how = dict(num_shards=2, num_slices=3, method="column", groups=groups, shards=shards, slices=slices)
        if torn:
            with pytest.raises(ConfigError, match=re.escape(f"({len(torn)}): {', '.join(torn[:5])}")):
                assign(range(len(rows)), **how)
        else:
            assert assign(range(len(rows)), **how) == list(zip(shards, slices))
