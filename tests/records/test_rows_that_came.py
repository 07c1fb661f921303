"""Ledgers of systems that grew: which states there were, and what counts as deleted where something came back."""

import pytest

from hf_s3t.records.ledger import Ledger
from hf_s3t.records.validity import fits, is_current, saw_what_is_in


def added(ledger, **more):
    return ledger.append("addition", rows=1, rows_sha256="ab", **more)


def deleted(ledger, *ids):
    return ledger.append("deletion", ids=ids)


def test_each_addition_is_a_state_more():
    ledger = deleted(added(deleted(added(Ledger()), "1")), "2")
    assert ledger.additions == (1, 3)
    assert ledger.generations == (frozenset({1, 2}), frozenset({1}), frozenset())
    assert Ledger.parse(ledger.text).generations == ledger.generations
    assert Ledger().generations == (frozenset(),)


def test_where_two_copies_grew_each_had_its_own_rows_and_then_both_have_all():
    common = added(Ledger())
    ours, theirs = added(common, again=["o"]), added(added(common, again=["t"]))
    merged = ours.merge(theirs)
    states = [set(), {1}, {1, 2}, {1, 3}, {1, 3, 4}, {1, 2, 3, 4}]
    assert set(merged.generations) == set(map(frozenset, states))


def test_what_came_back_is_deleted_no_more_until_it_is_deleted_again():
    ledger = deleted(Ledger(), "1", "2")
    back = added(ledger, again=["1"])
    again = deleted(back, "1")
    assert (set(ledger.deleted), set(back.deleted), set(again.deleted)) == ({"1", "2"}, {"2"}, {"1", "2"})
    assert len(back.deleted) == 1 and list(back.deleted) == ["2"] and "1" not in back.deleted
    assert back.deleted <= ledger.deleted and not ledger.deleted <= back.deleted
    assert ledger.deleted - back.deleted == {"1"} and back.deleted - ledger.deleted == frozenset()
    # A row that was there before the first line is out; one that came by the second goes by the third.
    assert list(again.deleted_since(0)) == ["1", "2", "1"] and list(again.deleted_since(2)) == ["1"]
    assert again.deleted.line_of("1") == 3 and back.deleted.line_of("1") == 1


def test_a_deletion_that_the_line_which_brings_back_did_not_know_stays_in_force():
    common = deleted(Ledger(), "0")
    ours = added(deleted(common, "1"), again=["1", "0"])
    theirs = deleted(common, "1", "9")
    for merged in (ours.merge(theirs), theirs.merge(ours)):
        assert set(merged.deleted) == {"1", "9"}, "of 0 all deletions were known"
    assert not ours.deleted


@pytest.mark.parametrize("kind", ["addition", "replacement"])
def test_a_line_says_what_came_and_is_read_again(kind):
    more = {"ids": ["3"], "removed": {"shard-0/1": "a1"}} if kind == "replacement" else {}
    ledger = Ledger().append(kind, rows=2, rows_sha256="cd", again=["2", "1"], again_groups=["g"], **more)
    (entry,) = Ledger.parse(ledger.text).entries
    assert (entry.rows, entry.rows_sha256, entry.again, entry.again_groups) == (2, "cd", ("1", "2"), ("g",))
    assert entry.adds and entry.deletes == (kind == "replacement") and ledger.num_deletions == entry.deletes
    assert not ledger.deleted, "what was replaced is in"


def test_a_line_of_a_system_to_which_nothing_came_says_nothing_of_it():
    assert '"rows' not in deleted(Ledger(), "1").text and "again" not in deleted(Ledger(), "1").text


def test_a_stage_is_valid_though_rows_came_and_current_only_if_it_saw_them():
    record = {"slices": ["old", "b"], "below": None}
    assert fits(record, [("new", "old"), ("b",)], None) and not is_current(record, ["new", "b"])
    assert not fits(record, [("new", "older"), ("b",)], None), "a row that it saw is out"
    assert not fits(record, [("new", "old")], None) and not saw_what_is_in({}, [])
