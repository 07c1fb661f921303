"""Signatures beside the ledger: who writes a line signs it, nobody pretends, and keys go nowhere."""

import json
import logging
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from support.folders import NAMES, apply, files_of, grow, new_system
from support.receipts import OTHER_KEY, OUR_KEY, public, signer
from typer.testing import CliRunner

from hf_s3t.cli import app as cli
from hf_s3t.errors import FolderError, SigningKeyError, UnknownExampleError
from hf_s3t.folder.layout import LEDGER_FILE, SIGNATURES_FILE
from hf_s3t.folder.signatures_file import Signatures
from hf_s3t.folder.signed_ledger import sign_unsigned, take_in_signatures
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.signed_receipts import signed_receipt
from hf_s3t.signing.dsse import Envelope
from hf_s3t.signing.keys import SIGNING_VARIABLE, Signer, use_signer
from hf_s3t.signing.stages_digest import stages_digest
from hf_s3t.signing.verification import require_history, require_person, verify


pytestmark = pytest.mark.usefixtures("surroundings")

BODY = OUR_KEY.splitlines()[1]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    path = tmp_path_factory.mktemp("signatures") / "system"
    grow(new_system(path, NAMES))
    return path


@pytest.fixture
def system(grown, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(grown, tmp_path / "system"))


@pytest.fixture
def with_key(monkeypatch):
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)


@pytest.fixture(autouse=True)
def no_signer():
    yield
    use_signer(None)


def said_of(path) -> list[str | None]:
    """When each line of a folder's ledger was signed by our key, in the order of the lines."""
    found = Signatures.read(path)
    said = []
    for hash_ in SystemFolder(path).ledger.hashes:
        signed = found.signed(hash_)
        if signed is not None:
            assert verify(signed[0].to_json(), public()) == signed[1]
        said.append(None if signed is None else signed[1].signed)
    return said


def run(*args, code=0, **kwargs):
    result = CliRunner(env={"COLUMNS": "1000"}).invoke(
        cli.app, [str(arg) for arg in args], prog_name="hf-s3t", **kwargs
    )
    assert result.exit_code == code, result.output
    return result


# Who writes a line signs it


def test_every_line_that_is_written_with_a_key_is_signed(system, with_key):
    folder = SystemFolder(system)
    apply(folder, NAMES[:1])
    apply(folder, groups=["user-2"])
    with folder.lock():
        folder.record_export(next(iter(folder.valid_stages)), {})
    assert said_of(system) == ["written"] * 3 and inspect(system, public_key=public()).problems == ()
    first, second, third = (Signatures.read(system).signed(one)[1] for one in folder.ledger.hashes)
    assert (first.kind, third.kind) == ("deletion", "export") and second.counts["groups"] == 1
    assert first.system == folder.identity and first.after == second.before, "nothing grew in between"


def test_the_subject_is_what_the_shell_computes_in_the_folder(system, with_key):
    def computed() -> str:
        command = "LC_ALL=C sha256sum stages/*/*/adapter_model.safetensors | sha256sum"
        return subprocess.run(["bash", "-c", command], cwd=system, capture_output=True, text=True).stdout.split()[0]

    before = computed()
    folder = SystemFolder(system)
    apply(folder, NAMES[3:4])
    signed = Signatures.read(system).signed(folder.ledger.hashes[0])[1]
    assert (signed.before, signed.after) == (before, computed()) and before != computed()
    assert signed.after == stages_digest(folder.ledger.left_at(1))


def test_a_line_that_was_written_without_a_key_is_told_as_such(system, monkeypatch):
    folder = SystemFolder(system)
    apply(folder, NAMES[:1])
    assert not (system / SIGNATURES_FILE).exists() and inspect(system).problems == inspect(system).notes == ()
    assert "signed" in run("receipt", system, "--line", 1).stdout
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    apply(folder, NAMES[1:2])
    assert said_of(system) == [None, "written"]
    (note,) = [one for one in inspect(system, public_key=public()).notes if "not signed" in one]
    assert "1 line of 2 not signed (the first is 1)" in note
    shown = run("receipt", system, "--line", 1).stdout
    assert next(line for line in shown.splitlines() if line.startswith("signed ")).split() == ["signed", "no"]
    assert "with the line, by the key" in run("receipt", system, "--line", 2).stdout


def test_what_was_not_signed_can_be_signed_later_and_says_so(system, with_key, monkeypatch):
    folder = SystemFolder(system)
    apply(folder, NAMES[:1])
    monkeypatch.delenv(SIGNING_VARIABLE)
    apply(folder, NAMES[1:2])
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    assert "signed 1 line (2), as signed later, by the key" in run("sign", system).stdout
    assert said_of(system) == ["written", "later"]
    assert run("sign", system).stdout == "every line is signed\n"
    receipt = verify(signed_receipt(system, 2, signer()).envelope, public())
    assert receipt.line_signed == "later"


def test_without_a_key_sign_is_refused(system):
    before = files_of(system)
    assert "There is no key to sign with" in run("sign", system, code=1).stderr
    assert files_of(system) == before


def test_a_key_that_cannot_be_read_refuses_the_deletion_before_anything_changes(system, monkeypatch):
    monkeypatch.setenv(SIGNING_VARIABLE, "/nowhere/key")
    folder, before = SystemFolder(system), files_of(system)
    with pytest.raises(SigningKeyError, match="names no file that is there"):
        apply(folder, NAMES[:1])
    assert files_of(system) == before and not folder.ledger.lines
    monkeypatch.delenv(SIGNING_VARIABLE)
    assert apply(folder, NAMES[:1]).deleted == 1


def test_a_callable_that_fails_keeps_no_deletion_up(system):
    def broken(data: bytes) -> bytes:
        raise ConnectionError("the HSM is away")

    use_signer(Signer(broken, public()))
    folder = SystemFolder(system)
    with pytest.warns(UserWarning, match=r"Line 1 of the ledger is in force and could not be signed .*hf-s3t sign"):
        assert apply(folder, NAMES[:1]).deleted == 1
    assert said_of(system) == [None]
    use_signer(signer())
    assert sign_unsigned(folder) == [1] and said_of(system) == ["later"]


def test_neither_removal_nor_reader_waits_for_a_signature(system):
    stages, seen = SystemFolder(system).valid_stages, []

    def slow(data: bytes) -> bytes:
        seen.append(len(list(system.glob("stages/*/*/stage.json"))))
        return signer()(data)

    use_signer(Signer(slow, public()))
    folder = SystemFolder(system)
    report = apply(folder, NAMES[:1])
    assert seen == [len(stages) - len(report.stages_removed)], "what was to go was gone"
    assert said_of(system) == ["written"]


def test_a_process_that_dies_between_line_and_signature_leaves_an_unsigned_line(system):
    code = (
        "import os, sys\n"
        "from hf_s3t.folder import signatures_file\n"
        "from hf_s3t.signing.keys import Signer, use_signer\n"
        "from hf_s3t.folder.system import SystemFolder\n"
        "from hf_s3t.operations.deletion import apply\n"
        "from hf_s3t.records.request import DeletionRequest\n"
        "use_signer(Signer(lambda data: os._exit(7), sys.argv[2]))\n"
        "apply(SystemFolder(sys.argv[1]), DeletionRequest([sys.argv[3]], None, 'error', False))"
    )
    root = str(Path(__file__).resolve().parents[2])
    done = subprocess.run(
        [sys.executable, "-c", code, str(system), public().pem, NAMES[0]],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
    )
    assert done.returncode == 7, done.stderr
    folder = SystemFolder(system)
    assert len(folder.ledger.lines) == 1 and not folder.condemned_stages() and said_of(system) == [None]
    assert inspect(system).problems == ()


def test_a_torn_signature_is_no_signature_and_the_next_takes_its_place(system, with_key):
    folder = SystemFolder(system)
    apply(folder, NAMES[:1])
    apply(folder, NAMES[1:2])
    file = system / SIGNATURES_FILE
    file.write_bytes(file.read_bytes()[:-10])
    assert said_of(system) == ["written", None]
    apply(folder, NAMES[2:3])
    assert said_of(system) == ["written", None, "written"] and inspect(system).problems == ()
    assert sign_unsigned(folder) == [2] and said_of(system) == ["written", "later", "written"]


# Where the ledger goes, they go


def test_copies_have_them(system, with_key, tmp_path):
    folder = SystemFolder(system)
    apply(folder, NAMES[:1])
    folder.copy_to(tmp_path / "copy")
    assert said_of(tmp_path / "copy") == ["written", "written"]
    assert inspect(tmp_path / "copy", public_key=public()).problems == ()


def test_a_merge_is_signed_by_who_joins_and_each_line_by_who_wrote_it(system, with_key, tmp_path, monkeypatch):
    other = SystemFolder(shutil.copytree(system, tmp_path / "other"))
    folder = SystemFolder(system)
    apply(folder, NAMES[:1])
    monkeypatch.delenv(SIGNING_VARIABLE)
    apply(other, NAMES[1:2])
    monkeypatch.setenv(SIGNING_VARIABLE, OUR_KEY)
    folder.merge_ledger(other.ledger)
    assert said_of(system) == ["written", None, "written"] and folder.ledger.entries[2].kind == "merge"
    sign_unsigned(other)
    take_in_signatures(folder, other.signatures)
    assert said_of(system) == ["written", "later", "written"]
    assert inspect(system, public_key=public()).problems == (), "its line has another number here"


def test_an_older_ledger_stays_as_it_is(system, with_key):
    folder = SystemFolder(system)
    text = (system / LEDGER_FILE).read_bytes()
    apply(folder, NAMES[:1])
    assert (system / LEDGER_FILE).read_bytes().startswith(text)
    assert b"signature" not in (system / LEDGER_FILE).read_bytes()


# Receipts


def test_a_signed_receipt_verifies_and_later_ones_contain_it(system, with_key):
    folder = SystemFolder(system)
    apply(folder, NAMES[:1])
    early = signed_receipt(system, 1, signer()).envelope
    apply(folder, NAMES[4:5])
    late = signed_receipt(system, 2, signer()).envelope
    earlier, later = (verify(one, public(), folder.identity) for one in (early, late))
    require_history(earlier, later)
    assert later.left == folder.ledger.left_at(2) and later.line_signed == "written" and len(later.ids) == 1


def test_a_receipt_names_nobody_and_no_place(system, with_key):
    apply(SystemFolder(system), groups=["user-2"])
    text = Envelope.from_json(signed_receipt(system, 1, signer()).envelope).payload.decode()
    text += (system / SIGNATURES_FILE).read_text()
    here = [*NAMES, "user-2", str(system), str(Path.home()), os.uname().nodename, "system/stages"]
    assert not [one for one in here if one in text]


def test_a_ledger_that_is_not_verified_is_not_signed(system, with_key):
    folder = SystemFolder(system)
    apply(folder, NAMES[:1])
    apply(folder, NAMES[1:2])
    lines = (system / LEDGER_FILE).read_text().splitlines()
    (system / LEDGER_FILE).write_text(lines[0] + "\n")
    with pytest.raises(FolderError, match="Nothing is signed of a ledger that is not verified"):
        signed_receipt(system, 1, signer())


def test_the_signature_of_another_is_not_vouched_for(system, monkeypatch):
    monkeypatch.setenv(SIGNING_VARIABLE, OTHER_KEY)
    apply(SystemFolder(system), NAMES[:1])
    assert verify(signed_receipt(system, 1, signer()).envelope, public()).line_signed is None


def test_a_receipt_for_a_person_is_theirs_by_the_salt(system, with_key):
    apply(SystemFolder(system), NAMES[:2])
    made = signed_receipt(system, 1, signer(), for_id=NAMES[1])
    found = verify(made.envelope, public())
    require_person(found, NAMES[1], made.salt)
    assert found.ids is None and found.counts["examples"] == 2
    assert made.salt.replace("-", "") not in "".join(map(str, files_of(system).values()))
    again = signed_receipt(system, 1, signer(), for_id=NAMES[1])
    assert again.salt != made.salt and verify(again.envelope, public()).person.value != found.person.value


def test_a_receipt_for_a_person_needs_their_id_in_the_line(system, with_key):
    folder = SystemFolder(system)
    apply(folder, NAMES[:1])
    apply(folder, groups=["user-2"])
    for line, names in ((1, {"for_id": NAMES[5]}), (2, {"for_id": NAMES[0]}), (1, {"for_group": "user-2"})):
        with pytest.raises(UnknownExampleError, match=f"Line {line} deleted no"):
            signed_receipt(system, line, signer(), **names)
    require_person(
        verify((made := signed_receipt(system, 2, signer(), for_group="user-2")).envelope, public()),
        "user-2",
        made.salt,
    )


# What check finds


def changed(path, at: int, change) -> None:
    lines = (path / SIGNATURES_FILE).read_text().splitlines()
    lines[at] = change(lines[at])
    (path / SIGNATURES_FILE).write_text("".join(f"{line}\n" for line in lines))


def problems_of(path, key=None) -> str:
    return " ".join(inspect(path, public_key=key).problems)


def test_check_finds_what_was_signed_and_cut_from_the_ledger(system, with_key):
    folder = SystemFolder(system)
    apply(folder, NAMES[:1])
    older = shutil.copytree(system, system.parent / "older")
    apply(folder, NAMES[1:2])
    shutil.copy2(system / SIGNATURES_FILE, older / SIGNATURES_FILE)
    assert "line 2 of the ledger was signed, and ledger.jsonl lacks it" in problems_of(older)


def test_check_finds_what_was_altered_forged_or_is_of_another(system, with_key, monkeypatch):
    apply(SystemFolder(system), NAMES[:1])
    assert problems_of(system, public()) == ""
    assert "is not signed by the key" in problems_of(system, public(OTHER_KEY))
    good = (system / SIGNATURES_FILE).read_text()
    changed(system, 0, lambda line: line[:-5])
    assert "signatures.jsonl line 1 is no signature: it was altered" in problems_of(system)

    def with_another_time(line: str) -> str:
        envelope = Envelope.from_json(line.encode())
        payload = json.loads(envelope.payload)
        payload["predicate"]["counts"]["examples"] = 7
        return Envelope(json.dumps(payload).encode(), envelope.signatures).to_json().decode()

    (system / SIGNATURES_FILE).write_text(good)
    changed(system, 0, with_another_time)
    assert "what was signed of line 1 is not what ledger.jsonl says" in problems_of(system)


def test_check_says_that_it_did_not_look_who_signed(system, with_key):
    apply(SystemFolder(system), NAMES[:1])
    (note,) = inspect(system).notes
    assert "who signed was not checked" in note
    assert inspect(system, public_key=public()).notes == ()


# Keys go nowhere


def test_the_key_is_in_no_file_no_log_and_no_output(system, monkeypatch, tmp_path, caplog):
    (tmp_path / "signing.key").write_text(OUR_KEY)
    (tmp_path / "signing.key").chmod(0o600)
    caplog.set_level(logging.DEBUG)
    shown = ""
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for words in (
            ["unlearn", system, NAMES[0], "--signing-key", "signing.key"],
            ["unlearn", system, NAMES[1], "--later"],
            ["apply-pending", system, "--signing-key", "signing.key"],
            ["sign", system, "--signing-key", "signing.key"],
            ["receipt", system, "--line", 1, "--signed", "-", "--signing-key", "signing.key"],
            ["receipt", system, "--line", 1, "--for", NAMES[0], "--signed", "r.json", "--signing-key", "signing.key"],
            ["check", system],
        ):
            shown += run(*words).output
        monkeypatch.setenv(SIGNING_VARIABLE, BODY)
        shown += run("unlearn", system, NAMES[2]).output
        monkeypatch.setenv(SIGNING_VARIABLE, BODY[:-3])
        shown += run("unlearn", system, NAMES[3], code=1).output
    assert said_of(system) == ["written"] * 3
    shown += "".join(map(str, warned)) + caplog.text
    shown += "".join(
        path.read_bytes().decode("latin-1")
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != "signing.key"
    )
    for secret in (BODY, BODY[20:50], b"12345678901234567890123456789012".decode()):
        assert secret not in shown


def test_the_salt_is_shown_once(system, with_key, tmp_path):
    apply(SystemFolder(system), NAMES[:1])
    result = run("receipt", system, "--line", 1, "--for", NAMES[0], "--signed", "receipt.json")
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("salt: ")]
    salt = line.split()[1]
    (tmp_path / "key.pub").write_text(public().pem)
    shown = run("verify-receipt", "receipt.json", "--public-key", "key.pub", "--id", NAMES[0], "--salt", salt).stdout
    assert shown.startswith("Verified, signed by the key") and "which is this id's" in shown and shown.count("\n") == 1
    refused = run(
        "verify-receipt", "receipt.json", "--public-key", "key.pub", "--id", NAMES[1], "--salt", salt, code=1
    )
    assert "not of this id" in refused.stderr and refused.stdout == ""
    printed = run("receipt", system, "--line", 1, "--for", NAMES[0])
    assert "salt: " in printed.stderr and "salt" not in printed.stdout and verify(printed.stdout.encode(), public())
    files = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert salt.encode() not in files and salt.replace("-", "").encode() not in files


def test_a_receipt_is_not_written_over(system, with_key):
    apply(SystemFolder(system), NAMES[:1])
    run("receipt", system, "--line", 1, "--signed", "receipt.json")
    assert "is not written over" in run("receipt", system, "--line", 1, "--signed", "receipt.json", code=1).stderr


def test_two_receipts_on_the_command_line(system, with_key, tmp_path):
    folder = SystemFolder(system)
    for number in (1, 2):
        apply(folder, NAMES[number : number + 1])
        run("receipt", system, "--line", number, "--signed", f"{number}.json")
    (tmp_path / "key.pub").write_text(public().pem)
    shown = run("verify-receipt", "1.json", "2.json", "--public-key", "key.pub").stdout
    assert "contains line 1 of 1.json. Both are signed by" in shown
    assert "No signature was checked" in run("verify-receipt", "1.json", "2.json").stdout
    assert "is the earlier one" in run("verify-receipt", "2.json", "1.json", code=1).stderr
    assert "nothing can be checked" in " ".join(
        run("verify-receipt", "1.json", code=2).stderr.replace("│", " ").split()
    )
