"""Envelopes that nobody made on purpose: each ends in one sentence, or says exactly what was signed."""

import base64
import json
import random
from pathlib import Path

import pytest
from support.receipts import SYSTEM, ledger_of, public, receipt, signer, stages
from typer.testing import CliRunner

from hf_s3t.cli.verify import app
from hf_s3t.errors import ReceiptError, S3TError
from hf_s3t.signing.audit_statement import AuditStatement
from hf_s3t.signing.dsse import PAYLOAD_TYPE, Envelope, Signature, pae
from hf_s3t.signing.verification import read_unverified, require_history, verify


RECEIPT = receipt(ledger_of(3), 3)
PAYLOAD = Envelope.from_json(RECEIPT).payload
AUDIT = (
    AuditStatement(SYSTEM, stages("shard-0/0"), (), ("device",), True, "2026-11-29T12:00:00.000+00:00", {"torch": "2"})
    .signed_by(signer())
    .payload
)
OTHER = verify(receipt(ledger_of(3), 2), public())
ODD = [
    None,
    True,
    0,
    -1,
    2**70,
    10**400,
    1.5,
    float("nan"),
    float("inf"),
    "",
    "\x00\x1b[2J\n",
    "\ud800",
    "a" * 10_000,
    [],
    [[]],
    {},
    {"": {}},
    "../../etc/passwd",
    "urn:hf-s3t:deletion-receipt:v999999",
]


def nested(draw: random.Random) -> str:
    depth = draw.choice([3, 100, 900, 5_000, 100_000])
    opening, closing = draw.choice([("[", "]"), ('{"a":', "}")])
    return opening * depth + "1" + closing * depth


def mutated(draw: random.Random, value, depth: int = 0):
    """A value with something of it changed, wherever."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        name = draw.choice(list(value))
        kind = draw.randrange(6)
        rest = {one: inner for one, inner in value.items() if one != name}
        if kind == 0:
            return rest
        if kind == 1:
            return {**rest, draw.choice(["x", name + " ", "_type", "version"]): value[name]}
        return {**value, name: mutated(draw, value[name], depth + 1)}
    if isinstance(value, list) and value and draw.random() < 0.85:
        at = draw.randrange(len(value))
        kind = draw.randrange(5)
        if kind == 0:
            return value[:at] + value[at + 1 :]
        if kind == 1:
            return [*value, value[at]]
        return [*value[:at], mutated(draw, value[at], depth + 1), *value[at + 1 :]]
    if isinstance(value, str) and value and draw.random() < 0.4:
        at = draw.randrange(len(value))
        return value[:at] + draw.choice("0aZ \x00é") + value[at + 1 :]
    if isinstance(value, int) and draw.random() < 0.4:
        return value + draw.choice([-1, 1, 2**40])
    return draw.choice(ODD)


def flipped(draw: random.Random, data: bytes) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 2, 20])):
        changed[draw.randrange(len(changed))] = draw.randrange(256)
    return bytes(changed)


def signed(payload: bytes, kind: str = PAYLOAD_TYPE) -> bytes:
    """Signed by the right key: all that is between it and who reads it is the check of what it says."""
    return Envelope(payload, (Signature("", signer()(pae(kind, payload))),), kind).to_json()


def envelopes(draw: random.Random):
    """One more envelope, each time."""
    while True:
        kind = draw.randrange(13)
        if kind == 0:
            yield flipped(draw, RECEIPT)
        elif kind == 1:
            yield RECEIPT[: draw.randrange(len(RECEIPT))]
        elif kind == 2:
            yield json.dumps(mutated(draw, json.loads(RECEIPT))).encode()
        elif kind == 3:
            yield signed(flipped(draw, PAYLOAD))
        elif kind == 4:
            yield signed(PAYLOAD[: draw.randrange(len(PAYLOAD))])
        elif kind in (5, 6, 7):
            statement = json.loads(PAYLOAD)
            for _ in range(draw.choice([1, 1, 2, 5])):
                statement = mutated(draw, statement)
            yield signed(json.dumps(statement).encode())
        elif kind == 12:
            yield signed(json.dumps(mutated(draw, json.loads(AUDIT))).encode())
        elif kind == 8:
            text = draw.choice([RECEIPT, PAYLOAD]).decode()
            at = text.index('"', draw.randrange(len(text) // 2))
            twice = (text[:at] + '"payload":1,"payload":2,"version":NaN,' + text[at:]).encode()
            yield draw.choice([twice, signed(twice)])
        elif kind == 9:
            deep = nested(draw).encode()
            yield draw.choice([deep, signed(deep), RECEIPT[:-1] + b',"more":' + deep + b"}"])
        elif kind == 10:
            yield draw.choice(
                [draw.randbytes(draw.randrange(300)), signed(draw.randbytes(50), draw.choice(["", "a"]))]
            )
        else:
            huge = base64.b64encode(b"0" * draw.choice([10, 10**5])).decode()
            signature = {"keyid": draw.choice(ODD[9:12]), "sig": draw.choice([huge, "====", "AA"])}
            yield json.dumps({"payload": huge, "payloadType": PAYLOAD_TYPE, "signatures": [signature] * 3}).encode()


def check(data: bytes) -> None:
    """Everything that is done with an envelope ends in one sentence, or it is the statement that was signed."""
    for act in (lambda: verify(data, public()), lambda: read_unverified(data)):
        try:
            found = act()
            found.sentence()
            require_history(OTHER, found)
            require_history(found, OTHER)
        except ReceiptError as error:
            said = str(error)
            assert said.isprintable() and said.endswith((".", ").")) and len(said) < 400, said
            assert said.count(". ") <= 1, said
    try:
        AuditStatement.verified(Envelope.from_json(data), public())
    except ReceiptError as error:
        assert str(error).isprintable() and len(str(error)) < 400
    try:
        found = verify(data, public(), SYSTEM)
    except S3TError:
        return
    assert found.to_payload() == PAYLOAD or Envelope.from_json(data).payload != PAYLOAD


def test_hundreds_of_envelopes_end_in_one_sentence_each():
    draw = random.Random(0)
    for _, data in zip(range(300), envelopes(draw)):
        check(data)


@pytest.mark.slow
def test_ten_thousand_envelopes_end_in_one_sentence_each():
    draw = random.Random(1)
    for _, data in zip(range(10_000), envelopes(draw)):
        check(data)


def test_the_command_ends_in_one_line_whatever_is_in_the_file(tmp_path):
    draw = random.Random(2)
    (tmp_path / "key.pub").write_text(public().pem)
    (tmp_path / "good.json").write_bytes(RECEIPT)
    for _, data in zip(range(25), envelopes(draw)):
        (tmp_path / "receipt.json").write_bytes(data)
        key = ["--public-key", str(tmp_path / "key.pub")]
        for words in ([], [str(tmp_path / "good.json")]):
            result = CliRunner().invoke(app, ["verify-receipt", str(tmp_path / "receipt.json"), *words, *key])
            assert isinstance(result.exception, (SystemExit, type(None))), result.exc_info
            assert result.exit_code in (0, 1) and result.output.count("\n") == 1, result.output


def test_a_file_without_end_is_refused(tmp_path):
    (tmp_path / "key.pub").write_text(public().pem)
    if not Path("/dev/zero").exists():
        pytest.skip("needs a file without end")
    result = CliRunner().invoke(app, ["verify-receipt", "/dev/zero", "--public-key", str(tmp_path / "key.pub")])
    assert result.exit_code == 1 and "no receipt is as large" in result.output
