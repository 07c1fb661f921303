"""The book of erasures: lines that only grow, each synced before anything is done because of it."""

import os
import stat
import threading

import pytest
from support.folders import new_system
from support.format_1 import copy_of

from hf_s3t.errors import FolderError
from hf_s3t.folder.erasure_requests_file import ErasureBook, RecordedErasure
from hf_s3t.folder.layout import ERASURES_FILE
from hf_s3t.folder.system import SystemFolder


@pytest.fixture
def folder(tmp_path):
    return new_system(tmp_path / "system")


@pytest.fixture
def book(folder):
    return ErasureBook(folder)


def request(key=None, **values) -> RecordedErasure:
    return RecordedErasure("", "", key, "b0d7", **{"ids": ("1d", "2d"), **values})


def in_another_process(book) -> ErasureBook:
    return ErasureBook(SystemFolder(book.folder.path))


def test_a_book_that_was_never_written_holds_nothing(book):
    assert book.latest() == [] and book.find("era-1") is None and book.of_key("7f3") is None
    assert not book.path.exists()


def test_what_was_recorded_is_found_by_its_name_and_by_its_key_here_and_elsewhere(book):
    one, other = book.add(request("7f3")), book.add(request(max_delay=60.0, groups=("9a",), unknown=2))
    assert one.id != other.id and one.id.startswith("era-")
    for reader in (book, in_another_process(book)):
        assert reader.find(one.id) == reader.of_key("7f3") == one and reader.find(other.id) == other
        assert reader.latest() == [other, one] and reader.latest(1) == [other]
    assert one.apply_by is None and (other.apply_by - other.apply_by.fromisoformat(other.time)).seconds == 60


def test_a_line_by_one_process_is_news_to_the_other(book):
    other = in_another_process(book)
    erasure = book.add(request())
    assert other.note_waiting(erasure.id).waits and book.find(erasure.id).waits
    assert book.note_done(erasure.id, {"deleted": 2}).report == other.find(erasure.id).report == {"deleted": 2}


def test_of_two_notes_that_it_is_done_the_first_holds(book):
    erasure = book.add(request())
    book.note_done(erasure.id, {"deleted": 2})
    assert book.note_done(erasure.id, {"deleted": 0}).report == {"deleted": 2}


def test_only_its_owner_may_read_it(book):
    before = os.umask(0)
    try:
        book.add(request())
    finally:
        os.umask(before)
    assert stat.S_IMODE(book.path.stat().st_mode) == 0o600


def test_a_torn_last_line_was_never_acknowledged(book):
    erasure = book.add(request())
    with open(book.path, "ab") as file:
        file.write(b'{"version":1,"kind":"do')
    for reader in (book, in_another_process(book)):
        assert reader.latest() == [erasure]
    assert in_another_process(book).note_waiting(erasure.id).waits and len(book.path.read_bytes().splitlines()) == 2


def test_another_file_in_its_place_is_read_anew(book, tmp_path):
    book.add(request("7f3"))
    other = ErasureBook(new_system(tmp_path / "other"))
    expected = [other.add(request("8a4")) for _ in range(3)]
    book.path.write_bytes(other.path.read_bytes())
    assert book.latest() == expected[::-1] and book.of_key("7f3") is None
    book.path.unlink()
    assert book.latest() == []


@pytest.mark.parametrize(
    "line",
    [
        "nonsense",
        "[]",
        "{}",
        '{"version":2,"kind":"request","id":"era-1"}',
        '{"version":1,"kind":"waiting","id":"era-of-nobody"}',
        '{"version":1,"kind":"request","id":"era-1","time":"2026-11-29T10:00:00","key":null,"body":"b","ids":[],'
        '"earlier":[],"groups":[],"unknown":0,"unknown_groups":0,"max_delay":null}',
    ],
    ids=["no JSON", "a list", "no fields", "a later version", "what it goes on with is missing", "no zone"],
)
def test_a_corrupt_line_is_an_error_that_names_it_and_what_to_do(book, line):
    book.add(request())
    with open(book.path, "a") as file:
        file.write(line + "\n")
    for reader in (book, in_another_process(book)):
        with pytest.raises(FolderError, match=rf"{ERASURES_FILE} line 2 .*Restore it from a backup"):
            reader.latest()
    with pytest.raises(FolderError, match="line 2"):
        book.add(request())


def test_who_takes_a_request_is_waited_for_here_and_elsewhere(book):
    readers, order = (book, in_another_process(book)), []

    def take(reader):
        with reader.taking():
            order.append("in")
            order.append("out")

    with book.taking():
        threads = [threading.Thread(target=take, args=(reader,)) for reader in readers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(0.05)
        assert order == []
    for thread in threads:
        thread.join()
    assert order == ["in", "out"] * 2


def test_a_folder_of_format_1_is_migrated_before_it_is_written(tmp_path, shared_key):
    folder = SystemFolder(copy_of("trained", tmp_path))
    assert not folder.is_migrated
    ErasureBook(folder).add(request())
    assert SystemFolder(folder.path).is_migrated
