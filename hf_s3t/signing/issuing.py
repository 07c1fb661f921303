"""Signing a statement."""

from ..errors import ReceiptError
from .dsse import PAYLOAD_TYPE, Envelope, Signature, pae
from .keys import Signer
from .statement import Statement


def sign(statement: Statement, signer: Signer) -> Envelope:
    """
    The signed envelope of a statement, which was read again as whoever checks it reads it.

    Args:
        statement ([`~hf_s3t.signing.statement.Statement`]): What to sign.
        signer ([`~hf_s3t.signing.keys.Signer`]): What signs.

    Raises:
        [`~hf_s3t.errors.ReceiptError`]: If the statement says what no receipt can say.
        [`~hf_s3t.errors.SigningKeyError`]: If no signature by the key comes back.
    """
    try:
        payload = statement.to_payload()
    except ValueError:
        raise ReceiptError(
            f"Line {statement.line} names a stage that no system has, and cannot be signed. Run `hf-s3t check`."
        ) from None
    Statement.from_payload(payload)
    return Envelope(payload, (Signature(signer.public_key.keyid, signer(pae(PAYLOAD_TYPE, payload))),))
