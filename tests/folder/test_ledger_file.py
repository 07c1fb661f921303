"""The file of the ledger: of one that grew, what is new is read; of any other, everything, and it is compared."""

import json
import os
import shutil
from pathlib import Path

import pytest
from support.folders import NUMBERS, apply, grow, new_system

from hf_s3t.errors import FolderError
from hf_s3t.folder import ledger_file
from hf_s3t.folder import table_view as view
from hf_s3t.folder.files import stamp
from hf_s3t.folder.layout import TABLE_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.folder.table_file import write_table
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.receipts import Receipts
from hf_s3t.plan import StageKey
from hf_s3t.records.ledger import Ledger, LedgerEntry, line_hash


pytestmark = pytest.mark.usefixtures("surroundings")
TORN = b'{"ids":["to'


@pytest.fixture
def path(tmp_path):
    """The folder of a system with one deletion."""
    folder = grow(new_system(tmp_path / "system"))
    apply(folder, NUMBERS[:1])
    return folder.path


@pytest.fixture
def whole_reads(monkeypatch):
    """The files of ledgers that are read as a whole."""
    seen, read = [], ledger_file.read_ledger_text
    monkeypatch.setattr(ledger_file, "read_ledger_text", lambda file, *more: seen.append(file) or read(file, *more))
    return seen


@pytest.fixture
def lines_read(monkeypatch):
    seen, read = [], LedgerEntry.from_line
    monkeypatch.setattr(LedgerEntry, "from_line", lambda line: seen.append(line) or read(line))
    return seen


def file_of(path) -> Path:
    return path / "ledger.jsonl"


def grown_since(folder) -> set[StageKey]:
    """The stages that did not stay at the last line of the ledger."""
    left = folder.ledger.left_at(len(folder.ledger.lines))
    return {key for key in folder.stages if str(key) not in left}


def turn_old(path, victim=None) -> None:
    """Write a folder's ledger as earlier releases did, with the deletion of one more example if one is given."""
    folder = SystemFolder(path)
    if victim is not None:
        apply(folder, [victim])
    lines = []
    for entry in folder.ledger.entries:
        previous = (line_hash(lines[-1]),) if lines else ()
        lines.append(LedgerEntry(**{**vars(entry), "previous": previous, "version": 1}).to_line())
    old = Ledger(lines)
    ledger_file.write_head(path, old)
    write_table(path / TABLE_FILE, folder.table, old)
    file_of(path).write_text(old.text)


def test_of_a_deletion_of_another_process_only_its_line_is_read(path, whole_reads, lines_read):
    follower, writer = SystemFolder(path), SystemFolder(path)
    for victim in NUMBERS[1:4]:
        apply(writer, [victim])
        whole_reads.clear()
        lines_read.clear()
        follower.refresh_ledger()
        assert follower.is_deleted(victim) and follower.ledger == writer.ledger
        assert lines_read == [writer.ledger.lines[-1]] and not whole_reads


def test_a_deletion_writes_its_line_and_reads_none_before_it(path, whole_reads, lines_read):
    folder = SystemFolder(path)
    before = file_of(path).read_bytes()
    whole_reads.clear()
    lines_read.clear()
    folder.record_deletion(NUMBERS[4:5], [], {})
    assert file_of(path).read_bytes() == before + (folder.ledger.lines[-1] + "\n").encode()
    assert lines_read == [folder.ledger.lines[-1]] and not whole_reads


def test_a_line_that_is_torn_when_it_is_looked_at_is_read_when_it_is_whole(path):
    follower, whole = SystemFolder(path), file_of(path).read_bytes()
    with open(file_of(path), "ab") as file:
        file.write(TORN)
    follower.refresh_ledger()
    assert len(follower.ledger.lines) == 1
    apply(SystemFolder(path), NUMBERS[1:2])
    follower.refresh_ledger()
    assert follower.is_deleted(NUMBERS[1]) and file_of(path).read_bytes().startswith(whole)
    with open(file_of(path), "ab") as file:
        file.write(TORN)
    apply(follower, NUMBERS[2:3])
    assert TORN not in file_of(path).read_bytes()
    assert SystemFolder(path).ledger == follower.ledger


def replaced(path, lines):
    """Another file in the place of the ledger."""
    new = path / "new"
    new.write_text("".join(line + "\n" for line in lines))
    os.replace(new, file_of(path))


def written_over(path, lines):
    """Other content in the same file."""
    number = stamp(file_of(path)).number
    file_of(path).write_text("".join(line + "\n" for line in lines))
    assert stamp(file_of(path)).number == number


@pytest.mark.parametrize("write", [replaced, written_over])
def test_what_takes_the_place_of_the_ledger_is_compared_with_what_was_known(path, write, tmp_path, whole_reads):
    follower = SystemFolder(path)
    elsewhere = SystemFolder(shutil.copytree(path, tmp_path / "elsewhere"))
    apply(elsewhere, NUMBERS[1:2])
    apply(follower, NUMBERS[2:3])
    merged = follower.ledger.merge(elsewhere.ledger)
    other_way = elsewhere.ledger.merge(follower.ledger)
    whole_reads.clear()
    write(path, merged.lines)
    follower.refresh_ledger()
    assert follower.is_deleted(NUMBERS[1]) and follower.ledger == merged
    assert bool(whole_reads) == (write is replaced)
    for lines in (other_way.lines, merged.lines[:1], Ledger().append("deletion", ids=["ab"] * 40).lines):
        write(path, lines)
        with pytest.raises(FolderError, match=r"ledger.jsonl lacks lines that it had"):
            follower.refresh_ledger()
        assert follower.ledger == merged
    write(path, merged.lines)
    follower.refresh_ledger()
    assert follower.ledger == merged


def test_a_damaged_line_behind_what_is_known_is_told_as_when_all_is_read(path):
    follower = SystemFolder(path)
    line = Ledger().append("deletion", ids=["ab"]).lines[0]
    for more in (line, "{}", "no json"):
        file_of(path).write_text(follower.ledger.text + more + "\n")
        with pytest.raises(FolderError) as told:
            follower.refresh_ledger()
        with pytest.raises(FolderError) as told_anew:
            SystemFolder(path)
        assert str(told.value) == str(told_anew.value) and "ledger.jsonl" in str(told.value)
    assert len(follower.ledger.lines) == 1


def test_a_line_that_comes_while_new_ones_are_read_is_news_again(path, monkeypatch):
    follower, writer, read = SystemFolder(path), SystemFolder(path), view.read_on

    def overtaken(*arguments):
        found = read(*arguments)
        monkeypatch.setattr(view, "read_on", read)
        apply(writer, NUMBERS[2:3])
        return found

    apply(writer, NUMBERS[1:2])
    monkeypatch.setattr(view, "read_on", overtaken)
    follower.refresh_ledger()
    assert [follower.is_deleted(i) for i in NUMBERS[1:3]] == [True, False] and follower.has_news()
    follower.refresh_ledger()
    assert follower.is_deleted(NUMBERS[2]) and not follower.has_news()


def test_a_deletion_that_could_not_be_written_is_made_again(path, monkeypatch):
    folder = SystemFolder(path)
    before = file_of(path).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("hf_s3t.folder.system.append_line", full)
        with pytest.raises(FolderError, match="No space left"):
            apply(folder, NUMBERS[1:2])
    assert file_of(path).read_bytes() == before and not folder.is_deleted(NUMBERS[1])
    apply(folder, NUMBERS[2:3])
    assert [folder.is_deleted(i) for i in NUMBERS[1:3]] == [False, True]
    assert SystemFolder(path).ledger == folder.ledger and len(folder.ledger.lines) == 2


def test_pins_are_those_of_the_lines_without_hashing_them_again(path, monkeypatch):
    folder = SystemFolder(path)
    apply(folder, NUMBERS[1:2])
    expected = ["0 ", *(f"{n} {line_hash(line)}" for n, line in enumerate(folder.ledger.lines, start=1))]
    monkeypatch.setattr(ledger_file, "line_hash", None)
    assert [ledger_file.pin_of(folder.ledger, count) for count in range(3)] == expected
    assert ledger_file.pin_of(folder.ledger) == expected[-1] and ledger_file.pin_of(Ledger()) == "0 "
    assert all(ledger_file.holds(folder.ledger, pin) for pin in expected)
    assert not any(ledger_file.holds(folder.ledger, pin) for pin in ("3 ab", "1 ab", "-1 ", "x", "9" * 30))


def test_the_line_of_a_deletion_says_what_was_grown_since_the_line_before(path):
    folder = SystemFolder(path)
    grow(folder)
    fresh = grown_since(folder)
    shards = {key.shard for key in fresh}
    apply(folder, [next(i for i, row in folder.table.rows.items() if row.shard not in shards)])
    entry = LedgerEntry.from_line(folder.ledger.lines[1])
    assert set(entry.grown) == set(map(str, fresh)) and fresh and entry.removed and not entry.missing
    assert folder.ledger.left_at(2) == {str(key): folder.adapter_digest(key) for key in folder.stages}
    # A stage that nobody deleted.
    shutil.rmtree(path / folder.stages[0].path)
    missing = str(folder.stages[0])
    folder.refresh_stages()
    folder.record_deletion([], [], {})
    assert LedgerEntry.from_line(folder.ledger.lines[2]).missing == (missing,)


# Lines of earlier releases


def test_lines_of_earlier_releases_stay_as_they_are_and_new_ones_follow(path):
    turn_old(path)
    old = file_of(path).read_bytes()
    folder = grow(SystemFolder(path))
    shards = {key.shard for key in grown_since(folder)}
    apply(folder, [next(i for i, row in folder.table.rows.items() if row.shard not in shards)])
    assert file_of(path).read_bytes().startswith(old)
    assert [json.loads(line)["version"] for line in folder.ledger.lines] == [1, 2]
    entry = LedgerEntry.from_line(folder.ledger.lines[1])
    assert entry.versions is None and entry.grown and not entry.missing
    again = SystemFolder(path)
    assert again.ledger == folder.ledger and inspect(path).problems == ()
    assert again.ledger.left_at(2) == {str(key): again.adapter_digest(key) for key in again.stages}
    assert Receipts.read(path).of_line(2).chain_verified


def test_a_copy_that_knows_lines_of_an_earlier_release_only_and_one_with_new_lines_are_merged(path, tmp_path):
    turn_old(path)
    other = Path(shutil.copytree(path, tmp_path / "other"))
    new = SystemFolder(path)
    apply(new, NUMBERS[1:2])
    before = [entry.left for entry in new.ledger.entries]
    # What an earlier release would have added there.
    entry = LedgerEntry(
        "deletion", "then", (new.names.id_digest(NUMBERS[2]),), {}, {}, (new.ledger.hashes[0],), version=1
    )
    old = Ledger([new.ledger.lines[0], LedgerEntry(**{**vars(entry), "versions": {}}).to_line()])
    file_of(other).write_text(old.text)
    older = SystemFolder(other)
    new.merge_ledger(older.ledger)
    older.merge_ledger(new.ledger)
    for folder in (new, older):
        again = SystemFolder(folder.path)
        assert all(map(again.is_deleted, NUMBERS[:3])) and set(again.ledger.lines) == set(new.ledger.lines)
        assert inspect(folder.path).problems == () and Receipts.read(folder.path).problem is None
        left = {found: again.ledger.left_at(n) for n, found in enumerate(again.ledger.hashes, start=1)}
        assert [left[found] for found in new.ledger.hashes] == [*before, {}, before[1]]
    # The next line names what the merge took.
    apply(new, NUMBERS[4:5])
    assert new.ledger.left_at(5) == {str(key): new.adapter_digest(key) for key in new.stages}
