"""Receipts that were written by an earlier version verify for ever, and say what they said."""

import hashlib
from pathlib import Path

import pytest
from support.receipts import SYSTEM, stages

from hf_s3t.errors import ReceiptError
from hf_s3t.signing.audit_statement import AuditStatement
from hf_s3t.signing.dsse import Envelope
from hf_s3t.signing.keys import PublicKey
from hf_s3t.signing.verification import require_history, require_person, verify


FOLDER = Path(__file__).resolve().parents[1] / "fixtures" / "receipts"
KEY = PublicKey.read(FOLDER / "signing.key.pub")


def statement(name: str):
    return verify((FOLDER / name).read_bytes(), KEY, SYSTEM)


@pytest.mark.parametrize(
    "name", ["line-1.json", "line-3.json", "receipt.json", "later.json", "person.json", "audited.json"]
)
def test_it_verifies_by_its_key_and_no_other(name):
    assert statement(name).system == SYSTEM
    with pytest.raises(ReceiptError, match="not signed by the key"):
        verify((FOLDER / name).read_bytes(), PublicKey.read(FOLDER / "other.key.pub"))


def test_it_says_what_it_said():
    found = statement("receipt.json")
    assert (found.line, found.kind, found.line_signed, found.signed) == (2, "deletion", "written", "receipt")
    assert found.removed == stages("shard-1/0") and found.left == stages("shard-2/0", "shard-3/0", "shard-4/0")
    assert len(found.history) == 1
    assert statement("later.json").exported == stages("shard-4/0")
    assert (statement("line-1.json").signed, statement("line-3.json").signed) == ("written", "later")


def test_the_later_one_contains_the_earlier_ones():
    for name in ("line-1.json", "receipt.json", "line-3.json", "person.json"):
        require_history(statement(name), statement("later.json"))


def test_the_person_it_is_for_can_show_it():
    name, salt = (FOLDER / "person.txt").read_text().splitlines()
    require_person(statement("person.json"), name, salt)
    with pytest.raises(ReceiptError, match="not of this id"):
        require_person(statement("person.json"), "someone-b@example.org", salt)


def test_the_audit_verifies_by_the_auditor_s_key_and_the_receipt_tells_of_it():
    key = PublicKey.read(FOLDER / "auditor.key.pub")
    data = (FOLDER / "audit.json").read_bytes()
    found = AuditStatement.verified(Envelope.from_json(data), key)
    assert (found.system, found.stages, found.differing, found.fresh) == (SYSTEM, stages("shard-2/0"), (), True)
    (told,) = statement("audited.json").audits
    assert (told["by"], told["equal"], told["differing"]) == (key.keyid, 1, 0)
    assert told["envelope"] == hashlib.sha256(data.strip()).hexdigest()
    with pytest.raises(ReceiptError, match="not signed by the key"):
        AuditStatement.verified(Envelope.from_json(data), KEY)
