"""Looks at the signatures of a ledger: whether they are of its lines, and say what these say."""

import os
from dataclasses import replace
from pathlib import Path

from ..errors import FolderError, counted
from ..folder.config_file import read_record
from ..folder.identity import identity_of
from ..folder.layout import CONFIG_FILE, LEDGER_FILE, SIGNATURES_FILE
from ..folder.signatures_file import Signatures
from ..records.ledger import Ledger
from ..records.statements import statement_of
from ..signing.dsse import Envelope
from ..signing.keys import PUBLIC_VARIABLE, PublicKey
from ..signing.statement import Statement
from .findings import Findings, require_file


def inspect_signatures(path: Path, ledger: Ledger | None, key: PublicKey | None, findings: Findings) -> None:
    """
    Compare what was signed with what the ledger says, and where there is a key, check who signed it.

    Args:
        path (`Path`): The folder of the system.
        ledger ([`~hf_s3t.records.ledger.Ledger`], *optional*): Its ledger; `None` if it cannot be trusted.
        key ([`~hf_s3t.signing.keys.PublicKey`], *optional*): Of whoever should have signed.
        findings ([`~hf_s3t.operations.findings.Findings`]): Gets what is wrong.
    """
    file = path / SIGNATURES_FILE
    # What was signed of a ledger that is damaged is compared when that is mended.
    if not os.path.lexists(file) or ledger is None:
        return
    require_file(file)
    found, system = Signatures.read(path), str(identity_of(read_record(path / CONFIG_FILE)))
    if found.damaged:
        raise FolderError(
            f"{file} line {found.damaged[0]} is no signature: it was altered. Remove the line, and sign that of the "
            "ledger again by `hf-s3t sign`."
        )
    numbers = {hash_: number for number, hash_ in enumerate(ledger.hashes, start=1)}
    for hash_, signed in found.of_line.items():
        for envelope, statement in signed:
            problem = _problem(ledger, numbers.get(hash_), system, envelope, statement, key)
            if problem is not None:
                findings.problems.append(f"{file}: {problem}")
    missing = [number for hash_, number in numbers.items() if hash_ not in found.of_line]
    if missing:
        findings.notes.append(
            f"{path / LEDGER_FILE}: {counted(len(missing), 'line')} of {len(numbers)} not signed (the first is "
            f"{missing[0]}). `hf-s3t sign` signs them later, and says so."
        )
    if key is None:
        findings.notes.append(
            f"{file}: who signed was not checked. Name the public key by {PUBLIC_VARIABLE}, or --public-key."
        )


def _problem(
    ledger: Ledger, number: int | None, system: str, envelope: Envelope, statement: Statement, key: PublicKey | None
) -> str | None:
    if statement.system != system:
        return "a signature is of a line of another system. Remove it."
    if number is None:
        return (
            f"line {statement.line} of the ledger was signed, and {LEDGER_FILE} lacks it or has another: lines were "
            "cut off or edited. Restore the newest ledger from a backup; do not serve this system."
        )
    # A merge may have given the line another number.
    same = replace(
        statement_of(ledger, number, system, statement.signed),
        line=statement.line,
        signed_time=statement.signed_time,
    )
    if same != statement:
        return f"what was signed of line {number} is not what {LEDGER_FILE} says. Remove it, and sign the line again."
    if key is not None and not any(key.holds(one.value, envelope.signed_bytes) for one in envelope.signatures):
        return f"line {number} is not signed by the key {key.keyid[:12]}…. Give the key of who signs, or remove it."
    return None
