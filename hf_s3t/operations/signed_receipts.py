"""Receipts for who does not have the folder: signed, and where it is wanted, for one person alone."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError, UnknownExampleError
from ..folder.config_file import read_record
from ..folder.identity import identity_of
from ..folder.layout import CONFIG_FILE
from ..folder.secret import load_key
from ..records.statements import receipt_statement
from ..signing.issuing import sign
from ..signing.keys import Signer
from ..signing.person import Commitment, new_salt, salt_text
from .audits import audits_of
from .receipts import Receipts
from .written_ids import candidates


@dataclass(frozen=True)
class SignedReceipt:
    """
    A receipt to hand out.

    Args:
        envelope (`bytes`): The receipt: an in-toto Statement in a DSSE envelope, as JSON.
        salt (`str`, *optional*): Of a person's: what only they are told. It is kept nowhere.
    """

    envelope: bytes
    salt: str | None = None


def signed_receipt(
    path: str | os.PathLike[str],
    number: int,
    signer: Signer,
    for_id: str | None = None,
    for_group: str | None = None,
) -> SignedReceipt:
    """
    The signed receipt of a line of the ledger.

    Args:
        path (`str` or `os.PathLike`): The folder of the system.
        number (`int`): Number of the line, counted from 1.
        signer ([`~hf_s3t.signing.keys.Signer`]): What signs.
        for_id (`str`, *optional*): The id of the person whom it is for. It must have been deleted by this line.
        for_group (`str`, *optional*): Instead, the group that was.

    Returns:
        [`SignedReceipt`]: The receipt, and the salt of a person's.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the ledger is not the chain that it was written as.
        [`~hf_s3t.errors.UnknownExampleError`]: If there is no such line, or it deleted no such id.
    """
    ledger = Receipts.read(path)
    if ledger.ledger is None or ledger.problem is not None:
        raise FolderError(f"Nothing is signed of a ledger that is not verified: {ledger.problem}")
    found = ledger.of_line(number)
    salt = None if for_id is None and for_group is None else new_salt()
    person = None
    if salt is not None:
        names, text = ("id", for_id) if for_id is not None else ("group", for_group or "")
        key = load_key(path)
        digest_of: Callable[[int | str], str] = key.of_id if names == "id" else key.of_group
        listed = found.entry.ids if names == "id" else found.entry.groups
        value = next((one for one in candidates(text or "") if digest_of(one) in listed), None)
        if value is None:
            raise UnknownExampleError(
                f"Line {number} deleted no {names} {text!r}. Find the line by `hf-s3t receipt --id`."
            )
        person = Commitment.of(names, str(value), salt)
    system = str(identity_of(read_record(Path(path) / CONFIG_FILE)))
    when = _line_signed(ledger, found.hash, system, signer)
    audits = audits_of(Path(path), ledger.ledger.left_at(number), system)
    statement = receipt_statement(ledger.ledger, number, system, when, audits, person)
    return SignedReceipt(sign(statement, signer).to_json(), None if salt is None else salt_text(salt))


def _line_signed(ledger: Receipts, line: str, system: str, signer: Signer) -> str | None:
    """When a line was signed by the key that signs its receipt; others are not vouched for."""
    for envelope, statement in ledger.signatures.of_line.get(line, ()):
        ours = any(signer.public_key.holds(one.value, envelope.signed_bytes) for one in envelope.signatures)
        if ours and statement.system == system:
            return statement.signed
    return None
