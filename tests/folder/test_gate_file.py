"""The gate in a folder: it goes by the ledger as the table does, and is refused where it is not what was written."""

import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
from support.folders import (
    CONFIG,
    NAMES,
    VOCABULARY,
    apply,
    delete_and_die,
    gate_of,
    gate_says,
    gate_that_never_had,
    grow,
    new_system,
    own_surroundings,
    prompt_of,
    record,
    stored_gate,
)
from typer.testing import CliRunner

from hf_s3t.cli.app import app
from hf_s3t.errors import FolderError, FormatVersionError
from hf_s3t.folder.gate_file import StoredGate, write_gate
from hf_s3t.folder.layout import GATE_FILE, KEY_FILE, LEDGER_FILE, TABLE_FILE
from hf_s3t.folder.opening import ReadOnlyFolder
from hf_s3t.folder.system import SystemFolder
from hf_s3t.folder.table_file import read_table
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.purge import purge
from hf_s3t.records.terms import TermRows, terms_of


GATED = replace(CONFIG, gate="terms", group_column=None)
SEEN = [range(CONFIG.num_slices)] * CONFIG.num_shards


@pytest.fixture(autouse=True)
def surroundings(tmp_path_factory):
    with own_surroundings(tmp_path_factory.mktemp("home")):
        yield


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    path = tmp_path_factory.mktemp("planted") / "system"
    grow(new_system(path, NAMES, GATED, None))
    return path


@pytest.fixture
def path(planted, tmp_path):
    return shutil.copytree(planted, tmp_path / "system")


def mode_of(file) -> int:
    return stat.S_IMODE(file.stat().st_mode)


def test_a_deletion_leaves_the_gate_of_a_system_that_never_had_the_rows(path):
    folder, other = SystemFolder(path), SystemFolder(path)
    before, lonely = other.load_gate(), terms_of(prompt_of(NAMES[3]), folder.key)
    digest = folder.key.of_ids(NAMES[3:4]).tobytes()
    own = np.setdiff1d(
        lonely, np.concatenate([terms_of(prompt_of(name), folder.key) for name in NAMES if name != NAMES[3]])
    )
    assert len(own) == 1 and own.tobytes() in (path / GATE_FILE).read_bytes() and mode_of(path / GATE_FILE) == 0o600

    apply(folder, NAMES[3:5])
    assert stored_gate(folder) == gate_that_never_had(folder) == gate_says(folder.load_gate())
    assert mode_of(path / GATE_FILE) == 0o600
    # Of the row neither what names it nor what it said; the ledger has the digest of its id in hexadecimal digits.
    for file in path.rglob("*.*"):
        if file.is_file():
            assert digest not in file.read_bytes() and own.tobytes() not in file.read_bytes(), file

    # Who has the folder open follows the line, and reads no rows again.
    assert before.counts.scores(own, SEEN).any()
    assert gate_says(other.load_gate()) == gate_that_never_had(other) and not other.term_counts.scores(own, SEEN).any()
    assert other.load_gate().rows.terms is before.rows.terms and other.holds_deleted_rows
    other.let_go_of_deleted_rows()
    assert other.load_gate().is_settled and not other.holds_deleted_rows
    assert other.load_gate() is other.load_gate()


def test_the_scores_after_a_deletion_are_to_the_bit_those_of_a_gate_without_the_rows(path):
    folder = SystemFolder(path)
    apply(folder, NAMES[:2])
    fresh = gate_of(folder.table, folder.key)
    for name in NAMES:
        prompt = terms_of(prompt_of(name), folder.key)
        assert folder.term_counts.scores(prompt, SEEN).tobytes() == fresh.counts.scores(prompt, SEEN).tobytes()


def test_a_removal_that_was_interrupted_is_finished_and_masked_until_then(path):
    delete_and_die(SystemFolder(path), NAMES[:1])
    as_written = (path / GATE_FILE).read_bytes()
    looked_at = ReadOnlyFolder(path)
    assert looked_at.is_gate_behind and gate_says(looked_at.load_gate()) == gate_that_never_had(looked_at)
    assert (path / GATE_FILE).read_bytes() == as_written
    folder = SystemFolder(path)
    assert not folder.is_gate_behind and stored_gate(folder) == gate_that_never_had(folder)


def test_a_gate_that_fell_behind_a_table_is_brought_in_step(path):
    """As a release writes the table that knows no gates, or a backup of the gate that was restored."""
    earlier = (path / GATE_FILE).read_bytes()
    apply(SystemFolder(path), NAMES[:1])
    (path / GATE_FILE).write_bytes(earlier)
    folder = SystemFolder(path)
    assert stored_gate(folder) == gate_that_never_had(folder)


def test_a_gate_that_was_made_anew_is_taken_in_by_who_has_the_folder_open(path):
    folder, other = SystemFolder(path), SystemFolder(path)
    first = other.load_gate()
    anew = replace(gate_of(folder.table, folder.key), tokenizer_digest="another")
    apply(folder, NAMES[:1])
    folder.put_gate(anew, {"gate": "terms", "gate_top_k": 1})
    assert SystemFolder(path).config.gate_top_k == 1 and folder.config.gate_top_k == 1
    assert first.tokenizer_digest != other.gate_tokenizer_digest == "another"
    # It has no row that was deleted meanwhile, and the ledger came with it.
    assert gate_says(other.load_gate()) == gate_that_never_had(folder) == stored_gate(folder)
    assert other.is_deleted(NAMES[0])


def test_a_copy_has_the_gate_without_what_was_deleted(path, tmp_path):
    folder = SystemFolder(path)
    folder.load_gate()
    with folder.lock():
        record(folder, NAMES[:1])
    folder.copy_to(tmp_path / "copy")
    copied = SystemFolder(tmp_path / "copy")
    assert stored_gate(copied) == gate_that_never_had(copied) and mode_of(tmp_path / "copy" / GATE_FILE) == 0o600
    assert not inspect(tmp_path / "copy").problems


def test_a_folder_without_one_says_how_to_make_it(path):
    (path / GATE_FILE).unlink()
    folder = SystemFolder(path)
    assert not folder.has_gate
    for ask in (folder.load_gate, lambda: folder.term_counts, lambda: folder.gate_tokenizer_digest):
        with pytest.raises(
            FolderError, match=r"is missing: the system has no gate, expected.*`trainer.build_gate\(\)`"
        ):
            ask()
    apply(folder, NAMES[:1])
    (problem,) = inspect(path).problems
    assert "gate.safetensors is missing" in problem and 'gate="terms"' in problem


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-3])


def altered(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def pinned_otherwise(file):
    """As if it had been written without what was deleted since."""
    file.write_bytes(file.read_bytes().replace(b'\\"ledger\\": \\"0 \\"', b'\\"ledger\\": \\"1 \\"'))


def emptied(file):
    file.write_bytes(b"")


@pytest.mark.parametrize("damage", [cut_short, altered, emptied])
def test_a_damaged_gate_is_refused_and_never_passed_over(path, damage):
    damage(path / GATE_FILE)
    with pytest.raises(FolderError, match=r"gate.safetensors (was altered or cut short|is not the gate).*remove it"):
        SystemFolder(path).load_gate()
    (problem,) = inspect(path).problems
    assert "gate.safetensors" in problem
    # As it says: without the file the system is as it was.
    (path / GATE_FILE).unlink()
    apply(SystemFolder(path), NAMES[:1])


def test_a_gate_is_not_put_where_another_system_lies_by_now(path, tmp_path):
    folder = SystemFolder(path)
    gate = folder.load_gate()
    path.rename(tmp_path / "moved")
    new_system(path, NAMES, GATED, None)
    of_the_other = (path / GATE_FILE).read_bytes()
    with pytest.raises(FolderError, match="another system now"):
        folder.put_gate(gate, {"gate": "terms"})
    assert (path / GATE_FILE).read_bytes() == of_the_other


def test_a_damaged_gate_keeps_no_deleted_row_in_the_table(path):
    folder = SystemFolder(path)
    altered(path / GATE_FILE)
    with pytest.raises(FolderError, match=r"gate.safetensors was altered"):
        apply(folder, NAMES[:1])
    assert NAMES[0] not in read_table(path / TABLE_FILE).columns["id"].to_pylist()
    (path / GATE_FILE).unlink()
    assert SystemFolder(path).is_deleted(NAMES[0])


def test_a_gate_that_says_of_itself_what_it_was_not_written_with_is_refused(path):
    pinned_otherwise(path / GATE_FILE)
    with pytest.raises(FolderError, match=r"gate.safetensors|ledger.jsonl"):
        SystemFolder(path).load_gate()


def test_a_gate_of_another_system_or_release_is_refused_before_anything_is_deleted(path, tmp_path):
    other = new_system(tmp_path / "other", NAMES, GATED, None)
    assert (path / KEY_FILE).read_text() != (tmp_path / "other" / KEY_FILE).read_text()
    folder = SystemFolder(path)
    own = (path / GATE_FILE).read_bytes()
    of_another_kind = own.replace(b'\\"kind\\": \\"terms', b'\\"kind\\": \\"which')
    for data, error, match in (
        ((tmp_path / "other" / GATE_FILE).read_bytes(), FolderError, "with another secret than this system's"),
        (
            own.replace(b'\\"version\\": 1', b'\\"version\\": 9'),
            FormatVersionError,
            "'terms' in version 9; this hf_s3t reads",
        ),
        (
            of_another_kind,
            FormatVersionError,
            "kind 'which'.*Install the version",
        ),
    ):
        (path / GATE_FILE).write_bytes(data)
        with pytest.raises(error, match=match):
            apply(folder, NAMES[:1])
        assert not (path / LEDGER_FILE).read_bytes()
    assert other.load_gate().counts.totals.sum()


def test_arrays_that_do_not_belong_together_are_refused_though_their_digest_matches(path):
    folder = SystemFolder(path)
    gate = folder.load_gate()
    outside = TermRows(
        gate.rows.digests, gate.rows.shards + 9, *(getattr(gate.rows, n) for n in ("slices", "ends", "terms"))
    )
    folder.put_gate(replace(gate, rows=outside, build="1"), {})
    with pytest.raises(FolderError, match="a place that is out of range"):
        SystemFolder(path).load_gate()


def test_check_and_purge_know_the_gate(path):
    assert not inspect(path).problems and not inspect(path).notes
    said = CliRunner().invoke(app, ["status", str(path)]).stdout
    assert f"gate: terms, of the prompts of {len(NAMES)} rows, 19 distinct words" in said
    folder = SystemFolder(path)
    gate, fewer = folder.load_gate(), folder.table.without(NAMES[:1])

    folder.put_gate(replace(gate, counts=gate_of(fewer, folder.key).counts, build="1"), {})
    (problem,) = inspect(path).problems
    assert "counts that are not those of its rows" in problem and "build_gate()" in problem

    folder.put_gate(gate, {})
    (path / GATE_FILE).chmod(0o644)
    (problem,) = inspect(path).problems
    assert "has mode 644, expected 600" in problem and "chmod 600" in problem
    (path / GATE_FILE).chmod(0o600)

    delete_and_die(SystemFolder(path), NAMES[:1])
    behind = [found.path.name for found in inspect(path).to_remove if found.kind == "rows"]
    assert sorted(behind) == ["examples.parquet", "gate.safetensors"]
    rewritten = [remnant for remnant in purge(path).remnants if remnant.action == "rewritten"]
    assert GATE_FILE in {remnant.path.name for remnant in rewritten} and not inspect(path).problems

    folder = SystemFolder(path)
    write_gate(path / GATE_FILE, gate, folder.ledger, folder.key.check)
    (still,) = inspect(path).problems
    assert "still holds 1 deleted example" in still
    rows = gate.rows
    moved = TermRows(rows.digests, 1 - rows.shards, rows.slices, rows.ends, rows.terms)
    folder.put_gate(StoredGate.of(moved, CONFIG.num_shards, CONFIG.num_slices, VOCABULARY), {})
    (elsewhere,) = inspect(path).problems
    assert "holds rows that" in elsewhere and "has elsewhere" in elsewhere
