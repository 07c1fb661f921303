"""The file of the table of examples: what of it is read when, which versions are, and what a later one may add."""

import threading

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support.folders import NAMES, apply, grow, new_system, record
from support.tables import rewrite_table, write_first_version

import hf_s3t.folder.system as system_module
import hf_s3t.folder.table_view as view
import hf_s3t.folder.versions as versions
from hf_s3t.folder.layout import TABLE_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.deletion import record_request
from hf_s3t.operations.inspection import inspect
from hf_s3t.records.digests import DigestKey
from hf_s3t.records.earlier import earlier_slice_digest
from hf_s3t.records.request import DeletionRequest


PLACES = [(shard, slice_) for shard in range(2) for slice_ in range(3)]


@pytest.fixture
def system(tmp_path):
    return grow(new_system(tmp_path / "system", NAMES)).path


@pytest.fixture
def reads(monkeypatch):
    """The tables that are read as a whole."""
    read, seen = view.read_table, []
    monkeypatch.setattr(view, "read_table", lambda path: (seen.append(path), read(path))[1])
    return seen


def seen_in(table):
    return dict(table.rows), [table.slice_digest(*place) for place in PLACES], dict(table.groups)


def test_a_table_that_did_not_change_is_read_once(system, reads):
    folder = SystemFolder(system)
    for _ in range(3):
        folder.refresh()
    apply(folder, NAMES[:1])
    folder.refresh()
    assert len(reads) == 1 and seen_in(folder.table) == seen_in(SystemFolder(system).table)


@pytest.mark.parametrize("follows", [True, False])
def test_a_table_from_which_only_deleted_rows_went_is_not_read_again(system, reads, follows):
    folder, other = SystemFolder(system), SystemFolder(system)
    del reads[:]
    for name in NAMES[:3]:
        apply(other, [name])
        if follows:
            folder.refresh()
    folder.refresh()
    assert reads == [] and not folder.is_table_behind
    assert seen_in(folder.table) == seen_in(other.table) == seen_in(SystemFolder(system).table)


def test_a_table_with_other_rows_is_read(system, reads):
    folder = SystemFolder(system)
    other = SystemFolder(system)
    apply(other, NAMES[:1])
    # Somebody took the table from a backup and had it written anew by the ledger.
    changed = other.table.without(NAMES[1:2])
    view_of_it = seen_in(changed)
    other.table = changed
    other.compact()
    del reads[:]
    folder.refresh()
    assert len(reads) == 1 and seen_in(folder.table) == view_of_it


def test_opening_digests_nothing_and_checking_everything(system, monkeypatch):
    digested = []
    for name in ("of_ids", "of_rows"):
        method = getattr(DigestKey, name)
        monkeypatch.setattr(
            DigestKey, name, lambda key, *what, m=method: (digested.append(len(list(what[0]))), m(key, *what))[1]
        )
    folder = SystemFolder(system)
    folder.prepare()
    assert len(folder.valid_stages) and digested == []
    apply(folder, NAMES[:1])
    assert max(digested) == 1
    del digested[:]
    assert inspect(system).problems == () and digested == [len(NAMES) - 1] * 2


def test_who_prepares_has_read_the_versions_of_libraries_that_a_deletion_notes(system, monkeypatch):
    versions.library_versions.cache_clear()
    folder = SystemFolder(system)
    folder.prepare()
    monkeypatch.setattr(versions, "version", lambda library: pytest.fail(f"{library} was looked up"))
    with folder.lock():
        record_request(folder, DeletionRequest(NAMES[:1]))
    assert folder.ledger.entries[0].versions["torch"]


@pytest.mark.parametrize("column", ["id_digest", "digest", "id"])
def test_digests_that_are_not_those_of_the_rows_are_told(system, column):
    def swapped(columns):
        first, second, *rest = columns[column].to_pylist()
        return {**columns, column: pa.array([second, first, *rest], columns[column].type)}

    rewrite_table(system / TABLE_FILE, swapped)
    (problem,) = [problem for problem in inspect(system).problems if TABLE_FILE in problem]
    assert "carries digests that are not those of its rows" in problem or "no examples" in problem


def test_columns_that_a_later_version_adds_go_with_their_rows(system):
    rewrite_table(system / TABLE_FILE, lambda columns: {**columns, "statistic": pa.array(range(len(NAMES)))})
    folder = SystemFolder(system)
    apply(folder, [NAMES[2]])
    left = pq.read_table(system / TABLE_FILE)
    assert left["statistic"].to_pylist() == [n for n in range(len(NAMES)) if n != 2]
    assert left["id"].to_pylist() == [name for name in NAMES if name != NAMES[2]]
    assert inspect(system).problems == ()


@pytest.mark.parametrize("write", ["apply", "refresh and apply", "compact"])
def test_columns_that_a_later_version_adds_while_this_one_is_at_work_are_not_lost(system, write):
    folder = SystemFolder(system)
    rewrite_table(system / TABLE_FILE, lambda columns: {**columns, "statistic": pa.array(range(len(NAMES)))})
    if write == "compact":
        # As a live model does it: what it deletes it does not look at the table for.
        with folder.lock():
            folder.remove_stages(record(folder, [NAMES[2]]).condemned)
        folder.compact()
    else:
        if "refresh" in write:
            folder.refresh()
        apply(folder, [NAMES[2]])
    assert pq.read_table(system / TABLE_FILE)["statistic"].to_pylist() == [n for n in range(len(NAMES)) if n != 2]
    assert inspect(system).problems == ()


def test_a_table_of_the_first_version_says_the_same_and_is_written_anew_as_of_this_one(system):
    folder = SystemFolder(system)
    expected, earlier = seen_in(folder.table), [earlier_slice_digest(folder.table, *place) for place in PLACES]
    write_first_version(folder)
    assert "id_digest" not in pq.read_schema(system / TABLE_FILE).names
    opened = SystemFolder(system)
    assert seen_in(opened.table) == expected and len(opened.valid_stages) == len(folder.valid_stages)
    assert [earlier_slice_digest(opened.table, *place) for place in PLACES] == earlier
    assert inspect(system).problems == ()
    apply(opened, NAMES[:1])
    assert "id_digest" in pq.read_schema(system / TABLE_FILE).names
    assert seen_in(SystemFolder(system).table) == seen_in(folder.table.without(NAMES[:1]))


def test_what_a_copy_of_the_first_version_kept_of_a_deletion_is_masked_and_written_anew(system):
    """Its table could say that it went by a line whose rows it held."""
    knows_nothing = SystemFolder(system)
    apply(SystemFolder(system), NAMES[:1])
    write_first_version(knows_nothing)
    assert NAMES[0] in pq.read_table(system / TABLE_FILE)["id"].to_pylist()
    opened = SystemFolder(system)
    assert NAMES[0] not in opened.table.rows
    assert opened.valid_stages == {key for key in knows_nothing.valid_stages if key in opened.stages}
    assert NAMES[0] not in pq.read_table(system / TABLE_FILE)["id"].to_pylist()


def test_whoever_looks_while_a_deletion_is_recorded_sees_its_line_without_its_rows_or_neither(system, monkeypatch):
    """A copy that held both would keep the rows: a table is masked only by the lines after those that it goes by."""
    folder = SystemFolder(system)
    write_head, seen = system_module.write_head, []

    def look():
        copied = folder.snapshot()
        seen.append((len(copied.table), len(copied.ledger.deleted)))

    other = threading.Thread(target=look)

    def written(path, ledger):
        write_head(path, ledger)
        # The line is in the file: another thread looks, which may have to wait.
        other.start()
        other.join(0.2)

    monkeypatch.setattr(system_module, "write_head", written)
    with folder.lock():
        record(folder, NAMES[:2])
    other.join()
    assert seen == [(len(NAMES) - 2, 2)]
