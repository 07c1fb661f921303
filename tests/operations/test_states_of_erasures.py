"""Requests to erase: recorded before anything is deleted, and what became of each, whoever died when."""

import json
import shutil
from pathlib import Path

import pytest
from support.folders import CONFIG, NAMES, USERS, apply, files_of, grow, new_system, own_surroundings, request_later

from hf_s3t.errors import ConfigError, UnknownExampleError
from hf_s3t.folder.erasure_requests_file import ErasureBook
from hf_s3t.folder.layout import ERASURES_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.erasures import receipts_of, record_erasure, state_of, states_of
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.pending import apply_pending
from hf_s3t.operations.purge import purge
from hf_s3t.operations.receipts import Receipts
from hf_s3t.records.request import DeletionRequest


@pytest.fixture(autouse=True, scope="module")
def surroundings(tmp_path_factory):
    with own_surroundings(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A system with every stage, not to be changed."""
    path = tmp_path_factory.mktemp("made") / "system"
    grow(new_system(path, NAMES))
    return path


@pytest.fixture
def folder(made, tmp_path):
    return SystemFolder(shutil.copytree(made, tmp_path / "system"))


@pytest.fixture
def book(folder):
    return ErasureBook(folder)


def erase(book, ids=None, groups=None, key=None, max_delay=None, missing="error"):
    return record_erasure(book, DeletionRequest(ids, groups, missing), "b0d7", key, max_delay)


def test_a_request_stands_in_the_book_before_anything_is_deleted(folder, book):
    erasure = erase(book, NAMES[:2], key="7f3")
    assert folder.ledger.lines == () and state_of(folder, erasure) == "interrupted"
    apply(folder, NAMES[:2])
    assert state_of(folder, erasure) == "done" and ErasureBook(SystemFolder(folder.path)).of_key("7f3") == erasure


def test_a_request_that_is_refused_writes_nothing(folder, book):
    before = files_of(folder.path)
    with pytest.raises(UnknownExampleError, match="nobody"):
        erase(book, [NAMES[0], "nobody"])
    with pytest.raises(UnknownExampleError, match="nothing of them"):
        erase(book, groups=["nothing of them"])
    with pytest.raises(ConfigError, match="leads to a date"):
        erase(book, NAMES[:1], max_delay=1e300)
    assert files_of(folder.path) == before
    assert erase(book, [NAMES[0], "nobody"], missing="ignore").unknown == 1


def test_the_book_names_nobody(folder, book):
    apply(folder, groups=[USERS[4]])
    erase(book, NAMES[:2], groups=[USERS[2], USERS[4]], key=folder.key.of_repeat_key("please, once"))
    text = book.path.read_text()
    assert not [name for name in (*NAMES, *USERS, "please") if name in text]


def test_the_receipts_of_a_request_are_the_lines_that_deleted_its_examples_and_groups(folder, book):
    apply(folder, NAMES[:1])
    apply(folder, groups=[USERS[8]])
    erasure = erase(book, NAMES[:2], groups=[USERS[8], USERS[6]])
    apply(folder, NAMES[4:5])
    apply(folder, NAMES[1:2], groups=[USERS[6]])
    found = receipts_of(folder, erasure)
    assert [receipt.line for receipt in found] == [1, 2, 4]
    expected = Receipts.read(folder.path)
    assert [receipt.to_dict() for receipt in found] == [expected.of_line(n).to_dict() for n in (1, 2, 4)]


def test_a_request_waits_until_what_waits_is_applied(folder, book):
    erasure = erase(book, NAMES[:2], max_delay=600)
    # Who took it died before it was among those that wait.
    assert state_of(folder, erasure) == "interrupted"
    request_later(folder, NAMES[:2], max_delay=600)
    erasure = book.note_waiting(erasure.id)
    assert state_of(folder, erasure) == "waiting" and erasure.apply_by is not None
    apply_pending(folder)
    assert state_of(folder, erasure) == "done" and [r.line for r in receipts_of(folder, erasure)] == [1]


def test_a_request_that_waits_by_chance_only_is_not_one_that_waits(folder, book):
    """Another one asks for the same, perhaps later: it was not handed over with its own time."""
    request_later(folder, NAMES[:2])
    assert state_of(folder, erase(book, NAMES[:2], max_delay=1)) == "interrupted"


def test_a_request_of_what_was_deleted_before_is_done(folder, book):
    apply(folder, NAMES[:2])
    assert state_of(folder, erase(book, NAMES[:2])) == state_of(folder, erase(book, [], max_delay=5)) == "done"


def test_states_of_many_are_those_of_each(folder, book):
    erasures = [erase(book, NAMES[n : n + 1], max_delay=9) for n in range(4)]
    request_later(folder, NAMES[:2])
    erasures[0], erasures[1] = (book.note_waiting(one.id) for one in erasures[:2])
    apply(folder, NAMES[1:3])
    assert states_of(folder, erasures) == ["waiting", "done", "done", "interrupted"]
    assert states_of(folder, erasures) == [state_of(folder, one) for one in erasures]


@pytest.mark.parametrize("keep_ids", ["plain", "digest"])
def test_a_request_is_known_however_a_system_keeps_its_ids(tmp_path, keep_ids):
    from dataclasses import replace

    config = replace(CONFIG, keep_ids=keep_ids)
    names = NAMES
    if keep_ids == "digest":
        key = new_system(tmp_path / "system", NAMES, replace(config, keep_ids="plain")).key
        names = [key.of_id(name) for name in NAMES]
    folder = new_system(tmp_path / keep_ids, names, config, None)
    assert folder.config.keep_ids == keep_ids
    book = ErasureBook(folder)
    one = folder.table.members(0, 0)[0]
    erasure = erase(book, [one])
    apply(folder, [one])
    assert state_of(folder, erasure) == "done" and erase(book, [one]).earlier == erasure.ids


# What others make of the book


def test_an_intact_book_is_no_problem_and_what_came_to_nothing_is_noted(folder, book):
    done, lost = erase(book, NAMES[:1]), erase(book, NAMES[1:2])
    apply(folder, NAMES[:1])
    book.note_done(done.id, {"deleted": 1})
    found = inspect(folder.path)
    assert found.problems == () and len(found.notes) == 1
    assert "1 request to erase came to nothing" in found.notes[0] and lost.id in found.notes[0]


def test_a_ledger_that_is_older_than_the_book_is_a_problem(folder, book, made):
    erasure = erase(book, NAMES[:1])
    apply(folder, NAMES[:1])
    book.note_done(erasure.id, {"deleted": 1})
    assert inspect(folder.path).problems == ()
    # As a backup of all but the book would.
    restored = Path(shutil.copytree(made, folder.path.parent / "restored"))
    shutil.copy2(book.path, restored / ERASURES_FILE)
    (problem,) = inspect(restored).problems
    assert "lacks deletions of 1 request" in problem and erasure.id in problem and "backup" in problem


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda file: file.chmod(0o644), "mode 644, expected 600"),
        (lambda file: file.write_text("nonsense\n"), "line 1 cannot be read"),
        (lambda file: (file.unlink(), file.symlink_to("elsewhere")), "symbolic link"),
        (lambda file: (file.unlink(), file.mkdir()), "is a folder"),
    ],
    ids=["readable by others", "corrupt", "a link", "a folder"],
)
def test_a_book_that_is_not_as_it_was_written_is_a_problem(folder, book, spoil, says):
    erase(book, NAMES[:1])
    spoil(book.path)
    assert any(says in problem for problem in inspect(folder.path).problems)


def test_a_purge_leaves_the_book_and_a_copy_is_without_it(folder, book, tmp_path):
    erase(book, NAMES[:1])
    apply(folder, NAMES[:1])
    before = book.path.read_bytes()
    assert not [remnant for remnant in purge(folder.path).remnants if "erasures" in str(remnant.path)]
    assert book.path.read_bytes() == before
    folder.copy_to(tmp_path / "copy")
    assert not (tmp_path / "copy" / ERASURES_FILE).exists() and inspect(tmp_path / "copy").problems == ()


def test_its_lines_are_json_of_a_few_fields(book):
    erasure = erase(book, NAMES[:1])
    book.note_waiting(erasure.id)
    book.note_done(erasure.id, {"deleted": 1})
    lines = [json.loads(line) for line in book.path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["request", "waiting", "done"]
    assert {line["version"] for line in lines} == {1} and {line["id"] for line in lines} == {erasure.id}
