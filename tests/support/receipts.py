"""Signed statements for tests: a key that is always the same, and a ledger that needs no folder."""

import hashlib

from hf_s3t.records.ledger import Ledger
from hf_s3t.records.statements import receipt_statement
from hf_s3t.signing.issuing import sign
from hf_s3t.signing.keys import PublicKey, Signer


# Ed25519 with a seed of 32 bytes, as PKCS 8: no secret, it stands here.
_BODY = "MC4CAQAwBQYDK2VwBCIEIDEyMzQ1Njc4OTAxMjM0NTY3ODkwMTIzNDU2Nzg5MDEy"
OUR_KEY = f"-----BEGIN PRIVATE KEY-----\n{_BODY}\n-----END PRIVATE KEY-----\n"
OTHER_KEY = OUR_KEY.replace("DEyMzQ1", "DEyMzQ2")
SYSTEM, OTHER_SYSTEM = "5e" * 16, "07" * 16


def digest(text: str) -> str:
    """The SHA-256 of a text, as those of ids and adapters look."""
    return hashlib.sha256(text.encode()).hexdigest()


def signer(key: str = OUR_KEY) -> Signer:
    return Signer.from_text(key)


def public(key: str = OUR_KEY) -> PublicKey:
    return signer(key).public_key


def stages(*names: str) -> dict[str, str]:
    return {name: digest(name) for name in names}


def ledger_of(deletions: int = 3) -> Ledger:
    """A ledger whose lines remove one stage each."""
    names = [f"shard-{number}/0" for number in range(deletions + 2)]
    ledger = Ledger()
    for number in range(deletions):
        there = stages(*names[number:])
        gone = {names[number]: there[names[number]]}
        versions = {"python": "3.11.7", "torch": "2.13.0+cpu"}
        ledger = ledger.append(
            "deletion", ids=[digest(str(number))], removed=gone, stages_now=there, versions=versions
        )
    return ledger


def receipt(ledger: Ledger, line: int, system: str = SYSTEM, key: str = OUR_KEY, **more) -> bytes:
    """A signed receipt of a line."""
    return sign(receipt_statement(ledger, line, system, None, **more), signer(key)).to_json()
