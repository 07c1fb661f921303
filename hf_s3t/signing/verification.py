"""Whether a receipt says what was signed, whose it is, and whether another goes on from it."""

from ..errors import ReceiptError
from .dsse import PAYLOAD_TYPE, Envelope
from .keys import PublicKey
from .person import salt_from_text
from .statement import Statement


def verify(data: bytes, key: PublicKey, system: str | None = None) -> Statement:
    """
    What a signed receipt says, if a key signed it.

    Args:
        data (`bytes`): The receipt.
        key ([`~hf_s3t.signing.keys.PublicKey`]): The key of whoever it is from.
        system (`str`, *optional*): The identity of the system that it must be of.

    Returns:
        [`~hf_s3t.signing.statement.Statement`]: What was signed.

    Raises:
        [`~hf_s3t.errors.ReceiptError`]:
            If it was altered or cut, another key signed it, it is of another system, or of an unknown version.

    Example:

    ```python
    >>> from hf_s3t.signing.keys import PublicKey
    >>> from hf_s3t.signing.verification import verify

    >>> key = PublicKey.read("tests/fixtures/receipts/signing.key.pub")
    >>> with open("tests/fixtures/receipts/receipt.json", "rb") as file:
    ...     statement = verify(file.read(), key)
    >>> statement.kind, statement.counts["examples"]
    ('deletion', 1)
    ```
    """
    envelope = Envelope.from_json(data)
    signed = envelope.signed_bytes
    if not any(key.holds(one.value, signed) for one in envelope.signatures):
        # The hint is not signed: what it says decides only which sentence is likely to help.
        if any(one.keyid == key.keyid for one in envelope.signatures):
            raise ReceiptError(
                "The receipt was altered after it was signed: the signature is not one of what it says. Ask for it "
                "again."
            )
        raise ReceiptError(
            f"The receipt is not signed by the key {key.keyid[:12]}…: another signed it, or it was altered. Give the "
            "public key of whoever it is from."
        )
    statement = _statement_in(envelope)
    if system is not None and statement.system != system:
        raise ReceiptError(
            f"The receipt is of another system: got {statement.system}, expected the one that was given. Ask for a "
            "receipt of that."
        )
    return statement


def read_unverified(data: bytes) -> Statement:
    """
    What a receipt says, whoever wrote it: no signature is checked.

    Raises:
        [`~hf_s3t.errors.ReceiptError`]: If it is no receipt of a known version.
    """
    return _statement_in(Envelope.from_json(data))


def require_person(statement: Statement, name: str, salt: str) -> None:
    """
    Check that a receipt is the one of a person.

    Args:
        statement ([`~hf_s3t.signing.statement.Statement`]): What the receipt says.
        name (`str`): Their id, or the group that their examples are.
        salt (`str`): What was handed to them with the receipt.

    Raises:
        [`~hf_s3t.errors.ReceiptError`]: If it names somebody else, or nobody.
    """
    if statement.person is None:
        raise ReceiptError("The receipt names nobody. Ask for one made with `hf-s3t receipt --for`.")
    if not statement.person.is_to(name, salt_from_text(salt)):
        raise ReceiptError(
            "The receipt is not of this id with this salt. Give both as they were when the receipt was handed out."
        )


def require_history(earlier: Statement, later: Statement) -> None:
    """
    Check that the history of one receipt contains that of another: no line that it had was edited or dropped since.

    Args:
        earlier ([`~hf_s3t.signing.statement.Statement`]): What the earlier receipt says.
        later ([`~hf_s3t.signing.statement.Statement`]): What the later one says.

    Raises:
        [`~hf_s3t.errors.ReceiptError`]: If it does not, or they are of two systems.
    """
    if earlier.system != later.system:
        raise ReceiptError(
            f"The receipts are of two systems, {earlier.system} and {later.system}. Give two of the same."
        )
    if earlier.hash == later.hash:
        return
    if later.hash in (*(earlier.history or ()), *earlier.previous):
        raise ReceiptError("The second receipt is the earlier one. Give them the other way round.")
    if later.history is None and earlier.hash not in later.previous:
        raise ReceiptError(
            "The second receipt does not list its history. Have it made by `hf-s3t receipt --signed` with the key."
        )
    if later.history is None:
        # The line names the hash of the line before, and with that all that came before.
        return
    if _is_in_order((*(earlier.history or ()), earlier.hash), later.history):
        return
    raise ReceiptError(
        f"The history of the second receipt does not contain line {earlier.line} of the first: the ledger was written "
        "anew in between, or these are copies that were never merged. Ask the issuer for the ledger."
    )


def _is_in_order(some: tuple[str, ...], of: tuple[str, ...]) -> bool:
    """Whether hashes stand among others in the same order: a merge may put others between them."""
    rest = iter(of)
    return all(one in rest for one in some)


def _statement_in(envelope: Envelope) -> Statement:
    if envelope.payload_type != PAYLOAD_TYPE:
        raise ReceiptError("What was signed is no in-toto Statement, and so no receipt. Ask for the receipt.")
    return Statement.from_payload(envelope.payload)
