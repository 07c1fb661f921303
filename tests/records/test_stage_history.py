"""What stayed at each line of a ledger: replayed from changes, it is what a full list per line would say."""

import json
import random
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_s3t.errors import FolderError, FormatVersionError
from hf_s3t.records import ledger_chain, ledger_line
from hf_s3t.records.ledger import Ledger, LedgerEntry, line_hash


def first_line(ledger: Ledger, kind: str, ids=(), removed=None, left=None, versions=None) -> Ledger:
    """The ledger with a line of version 1, as earlier releases write it: with all stages that stay."""
    previous = tuple(ledger.hashes[-1:])
    entry = LedgerEntry(kind, "then", tuple(ids), removed or {}, left or {}, previous, versions or {}, version=1)
    return ledger.read_on(entry.to_line() + "\n")


class Machine:
    """
    A copy of a system, and a model of its ledger that keeps in full what stayed at each line.

    Args:
        stayed (`dict`): Of all machines: by the hash of a line, the stages that stayed and the versions then.
        is_old (`bool`): Whether it runs an earlier release, which knows lines of version 1 only.
    """

    def __init__(self, stayed, is_old):
        self.stayed, self.is_old = stayed, is_old
        self.ledger, self.stages, self.versions = Ledger(), {}, {"torch": "1"}

    def grow(self, stage, digest):
        self.stages[stage] = digest

    def lose(self, stage, _):
        self.stages.pop(stage, None)

    def update(self, _, digest):
        self.versions = {"torch": digest[-1]}

    def delete(self, stage, digest):
        removed = {s: d for s, d in self.stages.items() if s == stage}
        left = {s: d for s, d in self.stages.items() if s not in removed}
        if self.is_old:
            self.ledger = first_line(self.ledger, "deletion", [digest], removed, left, self.versions)
        else:
            more = {"removed": removed, "stages_now": dict(self.stages), "versions": self.versions}
            self.ledger = self.ledger.append("deletion", ids=[digest], **more)
        self.stages = left
        self._note(left, self.versions)

    def export(self, stage, _):
        handed_out, left = {stage: self.stages.get(stage, "gone")}, self._before()[0]
        if self.is_old:
            self.ledger = first_line(self.ledger, "export", (), handed_out, None, self.versions)
        else:
            self.ledger = self.ledger.append("export", removed=handed_out, versions=self.versions)
        self._note(left, self.versions)

    def merge(self, other):
        if self.is_old and any(json.loads(line)["version"] == 2 for line in other.ledger.lines):
            return
        known, ours, theirs = set(self.ledger.hashes), self._before(), other._before()
        merged = self.ledger.merge(other.ledger)
        new = [found for found in merged.hashes if found not in known and found not in other.ledger.hashes]
        assert self.ledger == merged or len(merged.lines) > len(known)
        self.ledger = merged
        if new:
            self._note(*ours)
        elif len(merged.lines) > len(known) and merged.hashes[-1] == other.ledger.hashes[-1]:
            assert self._before() == theirs

    def _before(self):
        return self.stayed[self.ledger.hashes[-1]] if self.ledger.lines else ({}, {})

    def _note(self, left, versions):
        self.stayed[self.ledger.hashes[-1]] = dict(left), dict(versions)


STEPS = {"grow": 6, "delete": 6, "lose": 2, "update": 1, "export": 2, "merge": 1, "turn new": 1}


@given(st.integers(0, 2**32))
def test_what_is_replayed_is_what_full_lists_would_say(seed):
    chance, stayed = random.Random(seed), {}
    machines = [Machine(stayed, is_old=chance.random() < 0.5) for _ in range(2)]
    for step in chance.choices(list(STEPS), STEPS.values(), k=chance.randrange(60)):
        ours, theirs = chance.sample(machines, 2)
        if step == "merge":
            ours.merge(theirs)
        elif step == "turn new":
            ours.is_old = False
        else:
            getattr(ours, step)(f"shard-0/{chance.randrange(5)}", f"d{chance.randrange(8)}")
    for machine in machines:
        for ledger in (machine.ledger, Ledger.parse(machine.ledger.text)):
            numbers = list(range(1, len(ledger.lines) + 1))
            # In any order, then one after the other.
            for number in (*chance.sample(numbers, len(numbers)), *numbers):
                left, versions = stayed[ledger.hashes[number - 1]]
                assert ledger.left_at(number) == left and ledger.versions_at(number) == versions
                entry = ledger.entries[number - 1]
                assert entry.left == (left if entry.kind == "deletion" else {})
                assert entry.versions == ({} if entry.kind == "merge" else versions)


def test_far_back_is_replayed_from_a_line_that_is_near(monkeypatch):
    stages = {f"shard-0/{n}": "a" for n in range(4)}
    ledger, expected = Ledger(), []
    for number in range(1200):
        stages[f"shard-0/{number % 4}"] = str(number)
        ledger = ledger.append("deletion", stages_now=stages)
        expected.append(dict(stages))
    read = []
    monkeypatch.setattr(LedgerEntry, "from_line", counting(read, LedgerEntry.from_line))
    for number in (1199, 700, 3, 1, 1200):
        assert ledger.left_at(number) == expected[number - 1]
    assert len(read) < 5 * 260
    read.clear()
    for number in range(500, 900):
        assert ledger.left_at(number) == expected[number - 1]
    assert len(read) < 400 + 260


def counting(seen, function):
    def counted(line):
        seen.append(line)
        return function(line)

    return counted


# A line is as large as what it changes, and costs as much


def stages_of(count) -> dict[str, str]:
    return {f"shard-{n // 64}/{n % 64}": f"{n:064x}" for n in range(count)}


def forgotten(ledger, stages, removed):
    gone = {name: stages[name] for name in removed}
    ledger = ledger.append("deletion", ids=["ab"], removed=gone, stages_now=stages, versions={"torch": "2"})
    return ledger, {name: digest for name, digest in stages.items() if name not in gone}


def test_a_line_says_what_changed_and_not_how_many_stages_there_are():
    sizes = set()
    for count in (20, 1280):
        ledger, stages = forgotten(Ledger(), stages_of(count), ["shard-0/3"])
        ledger, stages = forgotten(ledger, {**stages, "shard-0/3": "new"}, ["shard-0/5", "shard-0/6"])
        assert json.loads(ledger.lines[1])["grown"] == {"shard-0/3": "new"}
        assert ledger.left_at(2) == stages and len(stages) == count - 2
        sizes.add(len(ledger.lines[1]))
    assert len(sizes) == 1


def test_what_a_line_leaves_out_is_empty_or_as_in_the_line_before():
    ledger, stages = forgotten(Ledger(), stages_of(3), [])
    ledger, _ = forgotten(ledger, stages, [])
    assert set(json.loads(ledger.lines[1])) == {"version", "kind", "time", "previous", "ids"}
    del stages["shard-0/1"]
    ledger, _ = forgotten(ledger, stages, [])
    assert json.loads(ledger.lines[2])["missing"] == ["shard-0/1"]
    assert ledger.left_at(3) == stages and ledger.left_at(2) == stages_of(3)


def test_a_new_line_is_all_that_is_read_and_hashed_and_none_before_it(monkeypatch):
    ledger, stages = Ledger(), stages_of(40)
    for _ in range(300):
        ledger, stages = forgotten(ledger, stages, [])
    text = ledger.text
    read, hashed = [], []
    monkeypatch.setattr(LedgerEntry, "from_line", counting(read, LedgerEntry.from_line))
    monkeypatch.setattr(ledger_chain, "line_hash", counting(hashed, line_hash))
    longer, _ = forgotten(ledger, stages, ["shard-0/1"])
    assert (len(read), len(hashed)) == (1, 1)
    assert Ledger.parse(text, known=longer) == ledger and Ledger.parse(longer.text, known=ledger) == longer
    assert longer.merge(ledger) is longer and ledger.merge(longer) is longer
    assert longer.starts_with(ledger) and not ledger.starts_with(longer) and ledger != longer
    # One that was read on from the shorter goes its own way, as the longer one is there.
    assert len(read) <= 2 + 300


def test_lines_of_the_first_version_are_kept_without_repeating_what_they_repeat():
    stages, ledger = stages_of(1280), Ledger()
    for number in range(8):
        ledger = first_line(ledger, "deletion", [f"{number:064x}"], {}, stages)
    again = Ledger.parse(ledger.text)
    assert again.lines == ledger.lines and again.left_at(8) == stages
    parts = {id(part) for line in again._chain._lines for part in line}
    assert len(parts) < 1280 + 8 * 12


# Ledgers that share lines


def test_two_that_go_on_from_one_do_not_see_each_other():
    common = Ledger().append("deletion", ids=["a"], stages_now={"s": "1", "t": "1"})
    ours = common.append("deletion", ids=["b"], groups=["g"], removed={"s": "1"})
    theirs = common.append("deletion", ids=["c"], removed={"t": "1"})
    assert (common.deleted, ours.deleted, theirs.deleted) == ({"a"}, {"a", "b"}, {"a", "c"})
    assert (
        common.left_at(1) == {"s": "1", "t": "1"} and ours.left_at(2) == {"t": "1"} and theirs.left_at(2) == {"s": "1"}
    )
    assert not common.deleted_groups and theirs.line_of_group("g") is None and ours.line_of_group("g") == 2
    assert (common.num_deletions, ours.num_deletions, ours.num_deletions_since(1)) == (1, 2, 1)
    assert (
        list(ours.deleted_since(1)) == ["b"]
        and list(ours.deleted_since(0)) == ["a", "b"]
        and not ours.deleted_since(9)
    )
    assert common.deleted <= ours.deleted and not ours.deleted <= theirs.deleted and ours.deleted >= common.deleted
    assert ours.deleted - common.deleted == {"b"} == ours.deleted - theirs.deleted and common.deleted | {"x"} == {
        "a",
        "x",
    }


def test_a_line_that_could_not_be_written_is_not_in_the_next():
    ledger = Ledger().append("deletion", ids=["a"])
    ledger.append("deletion", ids=["lost"])
    again = ledger.append("deletion", ids=["b"])
    assert again.deleted == {"a", "b"} and len(again.lines) == 2 and Ledger.parse(again.text) == again


def test_lines_that_are_refused_leave_a_ledger_as_it_was():
    ledger = Ledger().append("deletion", ids=["a"])
    good = ledger.append("deletion", ids=["b"]).lines[1]
    with pytest.raises(FolderError):
        ledger.read_on(good + "\n{}\n")
    assert ledger.append("deletion", ids=["c"]).deleted == {"a", "c"} and len(ledger.lines) == 1
    assert ledger.read_on(good + "\n{torn").deleted == {"a", "b"}


def test_one_thread_reads_while_another_appends():
    ledger, stop, wrong = Ledger().append("deletion", ids=["0"], stages_now={"s": "0"}), threading.Event(), []

    def read(mine: Ledger):
        while not stop.is_set():
            if list(mine.deleted) != ["0"] or mine.left_at(1) != {"s": "0"} or len(mine.entries) != 1:
                wrong.append(mine)

    reader = threading.Thread(target=read, args=(ledger,))
    reader.start()
    longer = ledger
    for number in range(1, 400):
        longer = longer.append("deletion", ids=[str(number)], stages_now={"s": str(number)})
    stop.set()
    reader.join()
    assert not wrong and len(longer.deleted) == 400


def test_a_part_that_ends_between_two_processes_lines_is_no_ledger():
    common = Ledger().append("deletion", ids=["a"])
    merged = common.append("deletion", ids=["b"]).merge(common.append("deletion", ids=["c"]))
    cut = "".join(line + "\n" for line in merged.lines[:3])
    for known in (None, merged):
        with pytest.raises(FolderError, match="does not continue"):
            Ledger.parse(cut, known)


# What a newer hf_s3t may add


def with_fields(ledger: Ledger, **fields) -> str:
    entry = {"version": 2, "time": "later", "previous": list(ledger.hashes[-1:]), **fields}
    return json.dumps(entry, sort_keys=True, separators=(",", ":")) + "\n"


SIGNED = {"salt": "00ff", "signature": {"by": "key-1", "value": "aa"}}


def test_fields_that_a_newer_release_adds_are_covered_and_passed_over():
    ledger = Ledger().append("deletion", ids=["a"], stages_now={"s": "1"})
    line = with_fields(ledger, kind="deletion", ids=["b"], gates={"0/1": [1, 2]}, left={"t": "1"}, **SIGNED)
    longer = ledger.read_on(line)
    assert longer.deleted == {"a", "b"} and longer.left_at(2) == {"s": "1"} and longer.text == ledger.text + line
    again = longer.append("deletion", ids=["c"])
    with pytest.raises(FolderError, match="line 3 does not continue line 2"):
        Ledger.parse(again.text.replace("[1,2]", "[1,3]"))
    with pytest.raises(FolderError, match="line 3 does not continue line 2"):
        Ledger.parse(again.text.replace('"value":"aa"', '"value":"ab"'))


def test_a_line_of_an_unknown_kind_is_refused_as_newer_unless_it_may_be_passed_over():
    ledger = Ledger().append("deletion", ids=["a"], stages_now={"s": "1"}, versions={"torch": "2"})
    added = {"kind": "rows added", "ids": ["b"], "groups": ["g"], "removed": {"s": "1"}, "versions": {"torch": "3"}}
    with pytest.raises(FormatVersionError, match=r"kind 'rows added', which this hf_s3t does not know.*Update hf_s3t"):
        ledger.read_on(with_fields(ledger, **added))
    sealed = ledger.read_on(with_fields(ledger, **{**added, "kind": "seal"}, optional=True))
    assert sealed.deleted == {"a"} and not sealed.deleted_groups and sealed.num_deletions == 1
    assert sealed.left_at(2) == {"s": "1"} and sealed.versions_at(2) == {"torch": "2"}
    assert sealed.append("deletion", ids=["c"]).entries[2].previous == (sealed.hashes[1],)


@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "deletion", "ids": "abc"},
        {"kind": "deletion", "ids": [1]},
        {"kind": "deletion", "grown": ["s"]},
        {"kind": "deletion", "grown": {"s": 1}},
        {"kind": "deletion", "missing": {"s": "1"}},
        {"kind": "deletion", "missing": [None]},
        {"kind": "deletion", "versions": None},
        {"kind": "export", "exported": 7},
        {"kind": 7, "optional": True},
        {"kind": None},
        {"kind": "seal", "optional": True, "time": 7},
        {"kind": "merge", "previous": "abc"},
    ],
)
def test_a_second_version_line_of_wrong_types_is_refused(fields):
    with pytest.raises(FolderError, match=r"A ledger line (cannot be read|has fields of a wrong type)"):
        Ledger().read_on(with_fields(Ledger(), **fields))


def test_a_line_of_the_first_version_has_its_fields_and_no_others():
    line = first_line(Ledger(), "deletion", ["a"], {"s": "1"}, {"t": "1"}, {"torch": "2"}).lines[0]
    assert LedgerEntry.from_line(line).to_line() == line
    for more in ({"grown": {}}, {"salt": "00"}, {"missing": []}):
        with pytest.raises(FolderError, match="cannot be read"):
            ledger_line.LedgerEntry.from_line(json.dumps({**json.loads(line), **more}))
    with pytest.raises(FolderError, match="wrong type"):
        LedgerEntry.from_line(line.replace('"deletion"', '"addition"'))


def test_a_ledger_of_many_lines_with_one_damaged_in_its_middle_is_told_by_that_line():
    ledger = Ledger()
    for number in range(200):
        ledger = ledger.append("deletion", ids=[f"{number:04x}"])
    lines = list(ledger.lines)
    chance = random.Random(0)
    for _ in range(20):
        at = chance.randrange(1, 199)
        damaged = [*lines[:at], lines[at].replace('"ids":["0', '"ids":["1'), *lines[at + 1 :]]
        with pytest.raises(FolderError, match=rf"ledger.jsonl line {at + 2} does not continue line {at + 1}"):
            Ledger.parse("".join(line + "\n" for line in damaged), known=ledger)
        with pytest.raises(FolderError, match="A ledger line cannot be read"):
            Ledger.parse("".join(line + "\n" for line in [*lines[:at], lines[at][:-5], *lines[at + 1 :]]))
