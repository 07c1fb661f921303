"""Receipts that verify without the folder: what is signed, what is refused, and in which words."""

import base64
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.receipts import (
    OTHER_KEY,
    OTHER_SYSTEM,
    OUR_KEY,
    SYSTEM,
    digest,
    ledger_of,
    public,
    receipt,
    signer,
    stages,
)

from hf_s3t.errors import ReceiptError
from hf_s3t.records.ledger import Ledger
from hf_s3t.records.statements import statement_of
from hf_s3t.signing.dsse import PAYLOAD_TYPE, Envelope, Signature, pae
from hf_s3t.signing.issuing import sign
from hf_s3t.signing.person import Commitment, new_salt, salt_from_text, salt_text
from hf_s3t.signing.statement import PREDICATE_TYPE, Statement
from hf_s3t.signing.strict_json import compact
from hf_s3t.signing.verification import read_unverified, require_history, require_person, verify


LEDGER = ledger_of(3)


def signed_payload(payload: bytes, kind: str = PAYLOAD_TYPE) -> bytes:
    """Whatever somebody signs with our key."""
    return Envelope(payload, (Signature("", signer()(pae(kind, payload))),), kind).to_json()


def changed(data: bytes, **fields) -> bytes:
    """A receipt that says something else in its predicate, signed again by whoever made it."""
    statement = json.loads(Envelope.from_json(data).payload)
    statement["predicate"] |= fields
    return signed_payload(compact(statement))


def refusal(data: bytes, key=None, **more) -> str:
    with pytest.raises(ReceiptError) as caught:
        verify(data, key or public(), **more)
    return str(caught.value)


# The envelope is DSSE, what it holds an in-toto Statement


def test_what_is_signed_is_the_encoding_of_the_specification():
    assert pae("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    assert pae("", b"") == b"DSSEv1 0  0 "
    assert pae("é", b"\x00") == b"DSSEv1 2 \xc3\xa9 1 \x00", "lengths are of bytes"


def test_an_envelope_is_what_other_tools_read():
    envelope = json.loads(receipt(LEDGER, 2))
    assert envelope.keys() == {"payload", "payloadType", "signatures"}
    assert envelope["payloadType"] == "application/vnd.in-toto+json"
    payload = base64.b64decode(envelope["payload"])
    (signature,) = envelope["signatures"]
    assert signature["keyid"] == public().keyid
    # By the library alone, without anything of ours.
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = load_pem_public_key(public().pem.encode())
    key.verify(
        base64.b64decode(signature["sig"]), b"DSSEv1 28 application/vnd.in-toto+json %d " % len(payload) + payload
    )
    statement = json.loads(payload)
    assert statement["_type"] == "https://in-toto.io/Statement/v1" and statement["predicateType"] == PREDICATE_TYPE
    assert [one["name"] for one in statement["subject"]] == ["system before", "system after"]
    assert all(re.fullmatch("[0-9a-f]{64}", one["digest"]["sha256"]) for one in statement["subject"])


def test_base64_for_urls_is_accepted_too():
    # Of signatures of several lines at least one has a character that differs.
    for line in range(1, 20):
        envelope = json.loads(receipt(ledger_of(20), line))
        (one,) = envelope["signatures"]
        if set("+/") & set(one["sig"]):
            break
    one["sig"] = one["sig"].replace("+", "-").replace("/", "_")
    assert set("-_") & set(one["sig"]) and verify(json.dumps(envelope).encode(), public()).line == line


def test_fields_that_are_not_known_are_passed_over():
    envelope = json.loads(receipt(LEDGER, 1))
    envelope["more"] = {"of": "a later version"}
    assert verify(json.dumps(envelope).encode(), public()).line == 1
    assert verify(changed(receipt(LEDGER, 1), more=[1]), public()).line == 1


def test_one_of_several_signatures_is_enough():
    envelope = Envelope.from_json(receipt(LEDGER, 1))
    other = Envelope(envelope.payload, (Signature("x", b"\x00" * 64), *envelope.signatures))
    assert verify(other.to_json(), public()).line == 1


# What it says


def test_a_receipt_says_what_went_what_stayed_and_on_which_slices():
    found = verify(receipt(LEDGER, 2), public())
    assert (found.system, found.line, found.hash, found.previous) == (SYSTEM, 2, LEDGER.hashes[1], (LEDGER.hashes[0],))
    assert found.removed == stages("shard-1/0") and found.left == stages("shard-2/0", "shard-3/0", "shard-4/0")
    assert found.history == (LEDGER.hashes[0],) and found.ids == (digest("1"),)
    assert found.versions == {"python": "3.11.7", "torch": "2.13.0+cpu"}
    told = json.loads(Envelope.from_json(receipt(LEDGER, 2)).payload)["predicate"]
    assert {one["stage"]: (one["shard"], one["slices"]) for one in told["left"]}["shard-3/0"] == (3, [0])


def test_a_line_is_signed_by_what_it_changes_however_many_stages_and_lines_there_are():
    def size(deletions: int, line: int) -> int:
        return len(sign(statement_of(ledger_of(deletions), line, SYSTEM, "written"), signer()).to_json())

    # But for the digits of the count of stages.
    assert size(200, 3) - size(4, 3) < 16 and size(200, 190) - size(4, 3) < 32


def test_the_sentence_says_what_a_person_needs():
    said = verify(receipt(LEDGER, 2), public()).sentence()
    assert said.startswith(f"line 2 of the ledger of system {SYSTEM} is a deletion of 1 example on 20")
    assert "by which 1 stage went and 3 stayed; signed 20" in said


def test_exports_merges_and_kinds_to_come_have_receipts():
    exported = LEDGER.append("export", removed=stages("shard-4/0"))
    found = verify(receipt(exported, 4), public())
    assert (
        found.before == found.after
        and found.exported == stages("shard-4/0")
        and "an export of 1 stage" in found.sentence()
    )
    merged = LEDGER.append("deletion", ids=[digest("a")]).merge(LEDGER.append("deletion", ids=[digest("b")]))
    found = verify(receipt(merged, len(merged.lines)), public())
    assert found.kind == "merge" and len(found.previous) == 2
    later = json.dumps(
        {"version": 2, "kind": "addition", "optional": True, "time": found.time, "previous": [LEDGER.hashes[-1]]}
    )
    known = Ledger.parse(LEDGER.text + json.dumps(json.loads(later), sort_keys=True, separators=(",", ":")) + "\n")
    assert verify(receipt(known, 4), public()).kind == "addition"


def test_a_replacement_takes_stages_as_a_deletion_does_and_an_addition_none():
    there = stages("shard-3/0", "shard-4/0")
    more = dict(rows=1, rows_sha256=digest("file"), versions={"python": "3.11.7"})
    ledger = LEDGER.append(
        "replacement", ids=[digest("r")], removed=stages("shard-3/0"), stages_now=there, **more
    ).append("addition", rows=2, rows_sha256=digest("other file"))
    replaced, added = (verify(receipt(ledger, line), public()) for line in (4, 5))
    assert replaced.removed == stages("shard-3/0") and replaced.left == stages("shard-4/0") == added.left
    assert replaced.before != replaced.after == added.before == added.after and added.kind == "addition"


# What is refused, in one sentence each


def test_an_altered_receipt_is_refused():
    data = receipt(LEDGER, 2)
    envelope = json.loads(data)
    payload = base64.b64decode(envelope["payload"]).replace(b'"examples":1', b'"examples":7')
    envelope["payload"] = base64.b64encode(payload).decode()
    assert "was altered after it was signed" in refusal(json.dumps(envelope).encode())


@pytest.mark.parametrize("length", [0, 1, 100, -1, -2, -10])
def test_a_cut_receipt_is_refused(length):
    data = receipt(LEDGER, 2)
    assert "is cut, altered, or no receipt" in refusal(data[:length])


def test_another_key_is_told():
    assert f"not signed by the key {public(OTHER_KEY).keyid[:12]}…" in refusal(receipt(LEDGER, 2), public(OTHER_KEY))


def test_a_hint_at_the_key_decides_nothing():
    envelope = Envelope.from_json(receipt(LEDGER, 2, key=OTHER_KEY))
    forged = replace(envelope, signatures=(Signature(public().keyid, envelope.signatures[0].value),))
    assert "altered" in refusal(forged.to_json())
    honest = Envelope.from_json(receipt(LEDGER, 2))
    assert (
        verify(replace(honest, signatures=(Signature("", honest.signatures[0].value),)).to_json(), public()).line == 2
    )


def test_another_system_is_told():
    data = receipt(LEDGER, 2, system=OTHER_SYSTEM)
    assert f"of another system: got {OTHER_SYSTEM}" in refusal(data, system=SYSTEM)
    assert verify(data, public(), system=OTHER_SYSTEM).system == OTHER_SYSTEM


@pytest.mark.parametrize("version", ["2", "17"])
def test_an_unknown_version_is_told(version):
    payload = Envelope.from_json(receipt(LEDGER, 2)).payload.replace(
        PREDICATE_TYPE.encode(), PREDICATE_TYPE[:-1].encode() + version.encode()
    )
    assert f"The receipt is of version {version}; this hf_s3t reads version 1. Update" in refusal(
        signed_payload(payload)
    )


def test_what_is_signed_and_no_receipt_is_told():
    assert "no in-toto Statement" in refusal(signed_payload(b"hello", "text/plain"))
    payload = Envelope.from_json(receipt(LEDGER, 2)).payload
    assert "something else" in refusal(
        signed_payload(payload.replace(PREDICATE_TYPE.encode(), b"https://slsa.dev/provenance/v1"))
    )
    assert "something else" in refusal(signed_payload(payload.replace(b"Statement/v1", b"Statement/v0.1")))


def test_a_field_that_stands_twice_is_refused():
    payload = Envelope.from_json(receipt(LEDGER, 2)).payload
    twice = payload.replace(b'"line":{', b'"line":{"number":9,', 1)
    assert "stands in it twice" in refusal(signed_payload(twice))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("left", []),
        ("removed", []),
        ("history", []),
        ("history", [digest("x")]),
        ("ids", []),
        ("counts", {"examples": 1}),
        ("counts", {"examples": 1, "groups": 0, "removed": 1, "exported": 0, "left": 4}),
        ("signed", {"when": "never", "time": "2026-11-29T00:00:00.000+00:00"}),
    ],
)
def test_a_receipt_that_contradicts_itself_is_refused(field, value):
    assert "contradicts itself" in refusal(changed(receipt(LEDGER, 2), **{field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("system", 7),
        ("system", "\x1b[31mred"),
        ("line", []),
        ("line", {"number": True}),
        ("ids", ["someone@example.org"]),
        ("versions", {"python": "\n"}),
        ("left", [{"stage": "../../etc", "adapter_sha256": digest("x")}]),
        ("left", [{"stage": "shard-0/0", "shard": 1, "slices": [0], "adapter_sha256": digest("x")}]),
        ("counts", {"examples": -1}),
        ("person", {"names": "id", "scheme": "plain", "value": digest("x")}),
        ("audits", [{}]),
    ],
)
def test_a_value_that_no_receipt_has_is_refused_without_being_shown(field, value):
    said = refusal(changed(receipt(LEDGER, 2), **{field: value}))
    assert "someone" not in said and "\x1b" not in said and said.isprintable()


def test_what_cannot_be_signed_is_refused_before():
    odd = Ledger().append("deletion", ids=[digest("x")], removed={"somewhere": digest("y")})
    with pytest.raises(ReceiptError, match="names a stage that no system has"):
        receipt(odd, 1)
    short = Ledger().append("deletion", ids=[digest("x")], removed={"shard-0/0": "a1"})
    with pytest.raises(ReceiptError, match="expected a SHA-256"):
        receipt(short, 1)


# Two receipts


def both(earlier: bytes, later: bytes) -> None:
    require_history(verify(earlier, public()), verify(later, public()))


def test_a_later_receipt_contains_the_earlier():
    both(receipt(LEDGER, 1), receipt(LEDGER, 3))
    both(receipt(LEDGER, 2), receipt(LEDGER, 2))
    # What was signed with the line counts as well as a receipt.
    both(sign(statement_of(LEDGER, 1, SYSTEM, "written"), signer()).to_json(), receipt(LEDGER, 3))


def test_a_merge_contains_both_copies():
    ours, theirs = (LEDGER.append("deletion", ids=[digest(one)]) for one in "ab")
    merged = ours.merge(theirs)
    last = len(merged.lines)
    both(receipt(ours, 4), receipt(merged, last))
    both(receipt(theirs, 4), receipt(merged, last))
    with pytest.raises(ReceiptError, match="does not contain line 4"):
        both(receipt(ours, 4), receipt(theirs, 4))


def test_a_ledger_that_was_written_anew_is_told():
    anew = ledger_of(1).append("deletion", ids=[digest("another")])
    with pytest.raises(ReceiptError, match="does not contain line 2 of the first: the ledger was written anew"):
        both(receipt(LEDGER, 2), receipt(anew, 2))


def test_the_wrong_order_is_told():
    with pytest.raises(ReceiptError, match="The second receipt is the earlier one"):
        both(receipt(LEDGER, 3), receipt(LEDGER, 1))


def test_receipts_of_two_systems_are_told():
    with pytest.raises(ReceiptError, match="of two systems"):
        both(receipt(LEDGER, 1), receipt(LEDGER, 3, system=OTHER_SYSTEM))


def test_a_signature_of_a_line_lists_no_history():
    later = sign(statement_of(LEDGER, 3, SYSTEM, "written"), signer()).to_json()
    both(receipt(LEDGER, 2), later)
    with pytest.raises(ReceiptError, match="does not list its history"):
        both(receipt(LEDGER, 1), later)


# For a person


def test_a_receipt_names_a_person_only_to_who_has_the_salt():
    salt = new_salt()
    data = receipt(LEDGER, 2, person=Commitment.of("id", "someone@example.org", salt))
    found = verify(data, public())
    require_person(found, "someone@example.org", salt_text(salt))
    require_person(found, " someone@example.org ", salt_text(salt).lower().replace("-", " "))
    for name, other in (("another@example.org", salt), ("someone@example.org", new_salt())):
        with pytest.raises(ReceiptError, match="not of this id with this salt"):
            require_person(found, name, salt_text(other))
    with pytest.raises(ReceiptError, match="has not the 32 letters"):
        require_person(found, "someone@example.org", "short")
    assert len(salt) * 8 >= 128


def test_a_receipt_of_a_person_holds_neither_salt_nor_id_nor_the_digests_of_others():
    salt = new_salt()
    payload = Envelope.from_json(receipt(LEDGER, 2, person=Commitment.of("id", "someone", salt))).payload
    assert b"someone" not in payload and salt.hex().encode() not in payload and salt_text(salt).encode() not in payload
    assert digest("1").encode() not in payload, "the keyed digest"


def test_two_receipts_of_one_person_have_nothing_in_common():
    one, two = (Commitment.of("id", "someone", new_salt()) for _ in range(2))
    assert one.value != two.value


def test_a_receipt_for_nobody_is_nobody_s():
    with pytest.raises(ReceiptError, match="names nobody"):
        require_person(verify(receipt(LEDGER, 2), public()), "someone", salt_text(new_salt()))


def test_a_salt_is_read_as_it_was_written():
    salt = new_salt()
    assert salt_from_text(salt_text(salt)) == salt


# What it takes


def test_a_receipt_is_checked_without_a_folder_a_model_or_a_network(tmp_path):
    """In a fresh process, by the command that people type, which names what it imported."""
    (tmp_path / "receipt.json").write_bytes(receipt(LEDGER, 2))
    (tmp_path / "key.pub").write_text(public().pem)
    code = (
        "import sys\n"
        "sys.argv = ['hf-s3t', 'verify-receipt', 'receipt.json', '--public-key', 'key.pub']\n"
        "from hf_s3t.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    print(end.code, *sorted(sys.modules), file=sys.stderr)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(root)}
    )
    ended, *loaded = done.stderr.split()
    assert ended == "0" and done.stdout.startswith("Verified, signed by the key"), done.stderr
    ours = {name.split(".")[1] for name in loaded if name.startswith("hf_s3t.")}
    assert ours == {"cli", "errors", "signing"}
    heavy = {
        "torch",
        "transformers",
        "numpy",
        "pyarrow",
        "huggingface_hub",
        "peft",
        "datasets",
        "safetensors",
        "requests",
    }
    assert not heavy & {name.split(".")[0] for name in loaded}
    assert "http" not in loaded and "httpx" not in loaded


def test_read_unverified_says_what_nobody_vouches_for():
    assert read_unverified(receipt(LEDGER, 2, key=OTHER_KEY)).line == 2
    assert isinstance(Statement.from_payload(Envelope.from_json(receipt(LEDGER, 1)).payload), Statement)
    assert public(OUR_KEY).keyid != public(OTHER_KEY).keyid
