"""Receipts: what a line of the ledger says about a deletion, and that no edit of the ledger goes unseen."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.folders import CONFIG, NAMES, NUMBERS, apply, grow, new_system

from hf_s3t.errors import FolderError, KeyMissingError, UnknownExampleError
from hf_s3t.folder.secret import KEY_VARIABLE, load_key, read_key
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations import receipts as receipt_module
from hf_s3t.operations.receipts import Receipt, Receipts
from hf_s3t.records.ledger import Ledger, LedgerEntry, line_hash


pytestmark = pytest.mark.usefixtures("surroundings")

FIELDS = [
    "receipt_version",
    "line",
    "hash",
    "previous",
    "chain_verified",
    "kind",
    "time",
    "ids",
    "groups",
    "stages_removed",
    "stages_exported",
    "stages_left",
    "versions",
]


@pytest.fixture(scope="module")
def after_three(tmp_path_factory):
    """A system after three deletions, the second of a group; not to be changed."""
    path = tmp_path_factory.mktemp("receipts") / "system"
    folder = grow(new_system(path, NAMES))
    apply(folder, NAMES[:1])
    grow(folder)
    apply(folder, groups=["user-2"])
    apply(folder, NAMES[7:8])
    return path


@pytest.fixture
def system(after_three, tmp_path):
    return Path(shutil.copytree(after_three, tmp_path / "system"))


def lines_of(path) -> list[str]:
    return (path / "ledger.jsonl").read_text().splitlines()


def write_lines(path, lines) -> None:
    (path / "ledger.jsonl").write_text("".join(line + "\n" for line in lines))


# What it says


def test_a_receipt_says_what_was_asked_when_what_went_and_what_stays(system):
    receipt = Receipts.read(system).of_line(2).to_dict()
    assert list(receipt) == FIELDS
    assert receipt["receipt_version"] == 1 and receipt["line"] == 2 and receipt["kind"] == "deletion"
    assert receipt["chain_verified"] is True
    assert receipt["hash"] == line_hash(lines_of(system)[1])
    assert receipt["previous"] == [line_hash(lines_of(system)[0])]
    key = read_key(system)
    assert receipt["ids"] == sorted(map(key.of_id, NAMES[4:6])) and receipt["groups"] == [key.of_group("user-2")]
    entry = SystemFolder(system).ledger.entries[1]
    assert {s["stage"]: s["adapter_sha256"] for s in receipt["stages_removed"]} == entry.removed
    assert {s["stage"]: s["adapter_sha256"] for s in receipt["stages_left"]} == entry.left
    assert receipt["stages_exported"] == [] and receipt["versions"]["python"]


def test_a_receipt_says_on_which_slices_stages_were_trained(system):
    for receipt in Receipts.read(system).receipts:
        for stage in receipt.to_dict()["stages_left"]:
            assert stage["stage"] == f"shard-{stage['shard']}/{'-'.join(map(str, stage['slices']))}"


def test_a_receipt_names_nobody(system):
    text = json.dumps([receipt.to_dict() for receipt in Receipts.read(system).receipts])
    assert not [name for name in (*NAMES, "user-2") if name in text]


def test_an_exported_adapter_has_a_receipt_that_is_no_deletion(system):
    folder = SystemFolder(system)
    tip = next(iter(folder.valid_stages))
    folder.record_export(tip, {})
    receipt = Receipts.read(system).of_line(4).to_dict()
    assert receipt["kind"] == "export" and receipt["stages_removed"] == [] and receipt["ids"] == []
    assert [stage["stage"] for stage in receipt["stages_exported"]] == sorted(map(str, tip.lineage))


def first_version(path) -> list[str]:
    """The lines of a folder's ledger as earlier releases wrote them: each with all stages that stay."""
    lines = []
    for entry in SystemFolder(path).ledger.entries:
        previous = (line_hash(lines[-1]),) if lines else ()
        lines.append(LedgerEntry(**{**vars(entry), "previous": previous, "version": 1}).to_line())
    return lines


def said(path) -> list[dict]:
    """What receipts say, but for the hashes, which are of other lines."""
    return [{**r.to_dict(), "hash": None, "previous": None} for r in Receipts.read(path).receipts]


def test_a_receipt_is_the_same_of_a_line_that_lists_all_stages_and_of_one_that_says_what_changed(system):
    folder = grow(SystemFolder(system))
    folder.record_export(next(iter(folder.valid_stages)), {"torch": "0"})
    apply(folder, NAMES[8:9])
    new, lines = said(system), first_version(system)
    assert [json.loads(line)["version"] for line in lines_of(system)] == [2] * 5
    assert all("left" in json.loads(line) for line in lines) and len(lines[0]) > len(lines_of(system)[1])
    (system / "ledger.head").unlink()
    write_lines(system, lines)
    # The table was written with lines of the same number and other hashes.
    old = [{**receipt, "chain_verified": True} for receipt in said(system)]
    assert old == new
    assert len({tuple(sorted(receipt["versions"])) for receipt in new}) == 2


def test_what_stayed_is_told_for_lines_behind_a_damaged_one_as_far_as_it_can_be(system):
    before, lines = said(system), lines_of(system)
    write_lines(system, [lines[0], lines[1][:-9], lines[2]])
    receipts = Receipts.read(system)
    assert [receipt.line for receipt in receipts.receipts] == [1, 3] and "cannot be read" in receipts.problem
    assert receipts.of_line(1).to_dict()["stages_left"] == before[0]["stages_left"]
    left = {s["stage"] for s in receipts.of_line(3).to_dict()["stages_left"]}
    assert left == {s["stage"] for s in before[0]["stages_left"]} - {s["stage"] for s in before[2]["stages_removed"]}


def test_a_line_after_a_merge_has_two_lines_before_it(tmp_path):
    folder = new_system(tmp_path / "system")
    ours = Ledger().append("deletion", ids=["a1"], removed={})
    theirs = Ledger().append("deletion", ids=["b2"], removed={})
    write_lines(folder.path, ours.merge(theirs).lines)
    receipts = Receipts.read(folder.path)
    assert receipts.problem is None
    assert receipts.of_line(3).to_dict()["previous"] == [line_hash(ours.lines[0]), line_hash(theirs.lines[0])]


def test_a_stage_that_is_none_has_no_place(system):
    entry = LedgerEntry("deletion", "now", (), {"../../etc": "aa"}, {}, ())
    (stage,) = Receipt(1, "00", entry, False).to_dict()["stages_removed"]
    assert stage == {"stage": "../../etc", "shard": None, "slices": None, "adapter_sha256": "aa"}


# Found by line, by id


def test_an_id_is_found_where_it_was_deleted(system):
    receipts, key = Receipts.read(system), load_key(system)
    assert [r.line for r in receipts.of_id(NAMES[0], key)] == [1]
    assert [r.line for r in receipts.of_id(NAMES[5], key)] == [2]
    assert receipts.of_id(NAMES[1], key) == () == receipts.of_id("nobody", key)


def test_a_number_is_found_by_its_text(tmp_path):
    folder = new_system(tmp_path / "system", NUMBERS)
    apply(folder, [7])
    receipts, key = Receipts.read(folder.path), load_key(folder.path)
    assert [r.line for r in receipts.of_id("7", key)] == [1]
    assert receipts.of_id("07", key) == ()


@pytest.mark.parametrize("number", [0, -1, 4, 10**9])
def test_a_line_that_is_not_there_is_refused(system, number):
    with pytest.raises(UnknownExampleError, match=f"Got line {number}; the ledger holds lines 1 to 3"):
        Receipts.read(system).of_line(number)


def test_a_system_without_deletions_has_no_receipts(tmp_path):
    receipts = Receipts.read(new_system(tmp_path / "system").path)
    assert receipts == Receipts((), None)
    with pytest.raises(UnknownExampleError, match="no line"):
        receipts.of_line(1)


def test_another_secret_finds_nothing_and_is_refused(system, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "0" * 32)
    with pytest.raises(KeyMissingError, match="is not the one"):
        load_key(system)
    monkeypatch.delenv(KEY_VARIABLE)
    (system / "ledger.key").write_bytes(b"\xff" * 32)
    with pytest.raises(KeyMissingError, match="is not text"):
        load_key(system)
    (system / "ledger.key").unlink()
    with pytest.raises(KeyMissingError, match="Neither"):
        load_key(system)


# The chain


@pytest.mark.parametrize("dropped", [0, 1, 2])
def test_a_dropped_line_shows(system, dropped):
    lines = lines_of(system)
    write_lines(system, lines[:dropped] + lines[dropped + 1 :])
    receipts = Receipts.read(system)
    assert receipts.problem
    assert not any(receipt.to_dict()["chain_verified"] for receipt in receipts.receipts)


@pytest.mark.parametrize("edited", [0, 1, 2])
def test_an_edited_line_shows_and_the_others_can_still_be_read(system, edited):
    lines = lines_of(system)
    lines[edited] = lines[edited].replace("2026", "2025").replace('"python":"3', '"python":"2')
    write_lines(system, lines)
    receipts = Receipts.read(system)
    assert receipts.problem and len(receipts.receipts) == 3


def test_swapped_lines_show(system):
    first, second, third = lines_of(system)
    write_lines(system, [second, first, third])
    assert "does not continue" in Receipts.read(system).problem


def test_a_line_that_is_no_receipt_is_told_and_passed_over(system):
    lines = lines_of(system)
    write_lines(system, [lines[0], "{}", lines[2]])
    receipts = Receipts.read(system)
    assert receipts.problem and [receipt.line for receipt in receipts.receipts] == [1, 3]


@settings(max_examples=60)
@given(data=st.data())
def test_no_change_of_a_byte_goes_unseen(after_three, tmp_path_factory, data):
    whole = (after_three / "ledger.jsonl").read_bytes()
    position = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != whole[position]))
    system = Path(shutil.copytree(after_three, tmp_path_factory.mktemp("edited") / "system"))
    (system / "ledger.jsonl").write_bytes(whole[:position] + bytes([other]) + whole[position + 1 :])
    try:
        assert Receipts.read(system).problem
    except FolderError as error:
        assert "is not text" in str(error)


def test_a_deletion_between_the_reads_of_table_and_ledger_is_no_problem(system, monkeypatch):
    read = receipt_module.read_pin

    def overtaken(path):
        apply(SystemFolder(system), NAMES[1:2])
        return read(path)

    monkeypatch.setattr(receipt_module, "read_pin", overtaken)
    assert Receipts.read(system).problem is None


def test_a_missing_ledger_is_told(system):
    (system / "ledger.jsonl").unlink()
    with pytest.raises(FolderError, match="is missing"):
        Receipts.read(system)


@pytest.mark.parametrize("part", ["ledger.jsonl", "examples.parquet"])
def test_a_link_in_the_place_of_what_is_read_is_refused_and_not_followed(part, system):
    (system / part).rename(system.parent / part)
    (system / part).symlink_to(system.parent / part)
    with pytest.raises(FolderError, match=part):
        Receipts.read(system)


def test_without_the_table_the_end_of_the_ledger_is_not_verified(system):
    (system / "examples.parquet").write_bytes(b"")
    receipts = Receipts.read(system)
    assert "cannot be told" in receipts.problem and len(receipts.receipts) == 3


def test_a_deletion_whose_table_is_not_yet_written_is_verified(tmp_path):
    folder = new_system(tmp_path / "system", config=CONFIG)
    folder.record_deletion([3], [], {})
    receipts = Receipts.read(folder.path)
    assert receipts.problem is None and receipts.of_line(1).chain_verified
