"""The deletion ledger: a chain of lines that names nobody and in which no edit goes unseen."""

import json
import random
import re
from datetime import datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_s3t.errors import FolderError, FormatVersionError
from hf_s3t.records.ledger import KINDS, Ledger, LedgerEntry, line_hash
from hf_s3t.records.report import UnlearningReport


def ledger_of(lines: int) -> Ledger:
    ledger = Ledger()
    for number in range(lines):
        ledger = ledger.append(
            "deletion",
            ids=[f"{number:064x}", f"{number + 1000:064x}"],
            removed={f"shard-0/{number}": "aa"},
            stages_now={"shard-1/0": "bb"},
            versions={"torch": "2"},
        )
    return ledger


def text_of(lines) -> str:
    return "".join(line + "\n" for line in lines)


# Writing


def test_a_ledger_read_from_its_own_text_is_the_same():
    for lines in range(4):
        ledger = ledger_of(lines)
        assert Ledger.parse(ledger.text) == ledger
        assert len(ledger.entries) == lines


def test_going_on_from_what_is_known_reads_the_same():
    ledger = ledger_of(4)
    for known in range(5):
        again = Ledger.parse(ledger.text, known=Ledger(ledger.lines[:known]))
        assert again == ledger and again.entries == ledger.entries


def test_what_was_known_hides_no_edit():
    ledger = ledger_of(3)
    edited = ledger.text.replace("shard-0/1", "shard-0/7")
    with pytest.raises(FolderError, match="line 3 does not continue line 2"):
        Ledger.parse(edited, known=ledger)


def test_every_line_names_the_hash_of_the_line_before():
    ledger = ledger_of(4)
    assert ledger.entries[0].previous == ()
    for before, entry in zip(ledger.lines, ledger.entries[1:]):
        assert entry.previous == (line_hash(before),)


def test_appending_leaves_the_ledger_it_started_from_as_it_was():
    ledger = ledger_of(2)
    before = ledger.lines
    longer = ledger.append("deletion", ids=["00"], removed={})
    assert ledger.lines == before and longer.lines[:2] == before and len(longer.lines) == 3


def test_a_line_says_when_and_what():
    (entry,) = ledger_of(1).entries
    age = datetime.now(datetime.fromisoformat(entry.time).tzinfo) - datetime.fromisoformat(entry.time)
    assert abs(age) < timedelta(minutes=1)
    assert datetime.fromisoformat(entry.time).utcoffset() == timedelta(0)
    assert entry.removed == {"shard-0/0": "aa"} and entry.left == {"shard-1/0": "bb"}
    assert entry.versions == {"torch": "2"} and entry.kind == "deletion"


@given(st.lists(st.text("0123456789abcdef", min_size=4, max_size=4), unique=True))
def test_ids_are_written_sorted_so_that_a_line_does_not_show_the_order_of_the_request(ids):
    random.Random(0).shuffle(ids)
    assert Ledger().append("deletion", ids=ids, removed={}).entries[0].ids == tuple(sorted(ids))


def test_the_deleted_are_the_ids_of_all_deletions_and_of_nothing_else():
    ledger = Ledger().append("deletion", ids=["b", "a"], removed={}, groups=["h", "g"])
    ledger = ledger.append("export", ids=["never"], removed={"shard-0/1": "aa"})
    ledger = ledger.append("deletion", ids=["c"], removed={})
    assert ledger.deleted == {"a", "b", "c"}
    assert ledger.deleted_groups == {"g", "h"} and ledger.entries[0].groups == ("g", "h")
    assert ledger.num_deletions == 2


@given(st.text(max_size=20), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3))
def test_a_line_is_one_line_whatever_it_holds(text, versions):
    entry = LedgerEntry("deletion", text, (text,), {text: text}, {}, (), versions)
    line = entry.to_line()
    assert line.isascii() and "\n" not in line and "\r" not in line
    assert LedgerEntry.from_line(line) == entry


# What shows


def changed_digit(text: str, position: int) -> str:
    return text[:position] + ("0" if text[position] != "0" else "1") + text[position + 1 :]


def test_an_edited_line_shows_wherever_it_is_edited():
    lines = ledger_of(3).lines
    for number in (0, 1):  # the last line has no successor: storage pins it by the table
        for position in range(len(lines[number])):
            edited = [*lines[:number], changed_digit(lines[number], position), *lines[number + 1 :]]
            with pytest.raises(FolderError):
                Ledger.parse(text_of(edited))


def test_a_dropped_line_shows():
    lines = ledger_of(4).lines
    for number in range(3):
        with pytest.raises(FolderError, match=rf"ledger.jsonl line {number + 1} does not continue line {number}"):
            Ledger.parse(text_of([*lines[:number], *lines[number + 1 :]]))


def test_lines_in_another_order_show():
    lines = ledger_of(3).lines
    orders = [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    for order in orders:
        with pytest.raises(FolderError, match="does not continue"):
            Ledger.parse(text_of(lines[number] for number in order))


def test_a_line_that_comes_twice_shows():
    lines = ledger_of(2).lines
    with pytest.raises(FolderError, match=r"ledger.jsonl line 3 does not continue line 2"):
        Ledger.parse(text_of([*lines, lines[1]]))


def test_a_line_of_another_ledger_shows():
    lines = ledger_of(2).lines
    stranger = Ledger().append("deletion", ids=["ff"], removed={}).lines[0]
    with pytest.raises(FolderError, match=r"ledger.jsonl line 3 does not continue line 2"):
        Ledger.parse(text_of([*lines, stranger]))


def test_the_message_says_what_to_do():
    lines = ledger_of(2).lines
    with pytest.raises(FolderError, match=r"edited or dropped. Restore the ledger from a backup; do not serve"):
        Ledger.parse(text_of(lines[1:]))


def test_a_torn_last_line_was_never_acknowledged_and_is_left_out():
    ledger = ledger_of(3)
    last = len(ledger.lines[-1])
    for kept in range(last + 1):
        torn = text_of(ledger.lines[:-1]) + ledger.lines[-1][:kept]
        assert Ledger.parse(torn).lines == ledger.lines[:-1]


def test_the_next_line_takes_the_place_of_a_torn_one():
    ledger = ledger_of(2)
    torn = Ledger.parse(ledger.text[:-5])
    again = torn.append("deletion", ids=["0c"], removed={})
    assert Ledger.parse(again.text).deleted == {*ledger.entries[0].ids, "0c"}


@pytest.mark.parametrize(
    "line",
    [
        "",
        "deletion",
        "null",
        "[]",
        "{}",
        '{"version":1}',
        '"version"',
        "{" * 5000,
        ledger_of(1).lines[0].replace('"kind"', '"sort"'),
        re.sub(r'"removed":\{[^}]*\}', '"removed":[]', ledger_of(1).lines[0]),
        re.sub(r'"ids":\[[^]]*\]', '"ids":[1,2]', ledger_of(1).lines[0]),
        re.sub(r'"ids":\[[^]]*\]', '"ids":7', ledger_of(1).lines[0]),
        re.sub(r'"time":"[^"]*"', '"time":0', ledger_of(1).lines[0]),
    ],
)
def test_what_is_no_ledger_line_is_refused(line):
    with pytest.raises(FolderError, match=r"A ledger line (cannot be read|has fields of a wrong type)"):
        Ledger.parse(line + "\n")


@pytest.mark.parametrize("version", [0, 3, "1", None])
def test_a_line_of_an_unknown_version_is_refused_by_its_version(version):
    line = ledger_of(1).lines[0].replace('"version":2', f'"version":{json.dumps(version)}')
    said = f"version {version!r}; this hf_s3t reads versions 1 and 2"
    with pytest.raises(FormatVersionError, match=re.escape(said)):
        Ledger.parse(line + "\n")


def test_there_are_deletions_exports_and_merges():
    assert KINDS == ("deletion", "export", "merge", "addition", "replacement")


def grown(ledger, *ids):
    for digest in ids:
        ledger = ledger.append("deletion", ids=[digest], removed={})
    return ledger


@pytest.mark.parametrize("common", [Ledger(), grown(Ledger(), "a", "b")], ids=["nothing", "two lines"])
def test_what_two_recorded_apart_is_merged_and_nothing_is_lost(common):
    ours, theirs = grown(common, "c", "d"), grown(common, "e")
    merged = ours.merge(theirs)
    assert merged.deleted == ours.deleted | theirs.deleted
    assert merged.lines[: len(ours.lines)] == ours.lines
    assert merged.entries[-1].previous == (ours.hashes[-1], theirs.hashes[-1])
    assert Ledger.parse(merged.text) == merged
    # The other side goes on from the merge, without one of its own.
    caught_up = theirs.merge(merged)
    assert set(caught_up.lines) == set(merged.lines) and caught_up.lines[: len(theirs.lines)] == theirs.lines
    assert Ledger.parse(caught_up.text) == caught_up
    assert caught_up.merge(merged) is caught_up and merged.merge(ours) is merged
    # And both can be written to again.
    for again in (grown(merged, "f"), grown(caught_up, "f")):
        assert Ledger.parse(again.text, known=merged) == again


def test_merging_with_less_changes_nothing_and_with_more_is_that():
    less = grown(Ledger(), "a")
    more = less.append("export", ids=[], removed={})
    assert more.merge(less) is more
    assert Ledger().merge(more).lines == more.lines


def test_a_merged_ledger_shows_every_line_that_is_dropped():
    merged = grown(Ledger(), "a", "b").merge(grown(Ledger(), "c")).append("deletion", ids=["d"], removed={})
    for number in range(len(merged.lines) - 1):
        left = [line for n, line in enumerate(merged.lines) if n != number]
        with pytest.raises(FolderError, match="does not continue line"):
            Ledger.parse("".join(line + "\n" for line in left))


def test_a_report_names_stages_and_numbers_but_no_ids():
    report = UnlearningReport(2, 1, 1, ("shard-0/1",), [2], [1], False, 0.01, 0.0001)
    assert "ids" not in vars(report)
    with pytest.raises(AttributeError):
        report.deleted = 5
