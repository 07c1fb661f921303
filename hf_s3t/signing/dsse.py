"""The envelope of a signed statement: DSSE (Dead Simple Signing Envelope) 1.0, in its standard form of JSON."""

import base64
import binascii
from dataclasses import dataclass
from typing import Any

from ..errors import ReceiptError
from .strict_json import compact, parse_object


# The media type of an in-toto Statement.
PAYLOAD_TYPE = "application/vnd.in-toto+json"
# Far more than anybody signs with; each costs whoever checks the envelope.
_MOST_SIGNATURES = 64


def pae(payload_type: str, body: bytes) -> bytes:
    """
    What a signature signs: the pre-authentication encoding of the specification.

    Args:
        payload_type (`str`): How the body is to be read.
        body (`bytes`): The body.

    Example:

    ```python
    >>> from hf_s3t.signing.dsse import pae

    >>> pae("http://example.com/HelloWorld", b"hello world")
    b'DSSEv1 29 http://example.com/HelloWorld 11 hello world'
    ```
    """
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(body), body)


@dataclass(frozen=True)
class Signature:
    """
    One signature of an envelope.

    Args:
        keyid (`str`): A hint at the key, which is not signed: nothing is decided by it.
        value (`bytes`): The signature.
    """

    keyid: str
    value: bytes


@dataclass(frozen=True)
class Envelope:
    """
    A body with its signatures.

    Args:
        payload (`bytes`): The body, as it was signed.
        signatures (`tuple[Signature, ...]`): Each signs the same; one that holds is enough.
        payload_type (`str`): How the body is to be read.
    """

    payload: bytes
    signatures: tuple[Signature, ...]
    payload_type: str = PAYLOAD_TYPE

    @property
    def signed_bytes(self) -> bytes:
        """What each of the signatures signs."""
        return pae(self.payload_type, self.payload)

    def to_json(self) -> bytes:
        """The envelope as one line of JSON, without the line break."""
        signatures = [{"keyid": one.keyid, "sig": _encoded(one.value)} for one in self.signatures]
        return compact({"payload": _encoded(self.payload), "payloadType": self.payload_type, "signatures": signatures})

    @classmethod
    def from_json(cls, data: bytes, what: str = "The receipt") -> "Envelope":
        """
        The envelope of a text. Fields that are not known are passed over, as the specification asks.

        Args:
            data (`bytes`): The text.
            what (`str`): What it is, as the subject of a sentence.

        Raises:
            [`~hf_s3t.errors.ReceiptError`]: If it is none.
        """
        values = parse_object(data, what)
        payload, kind, listed = (values.get(name) for name in ("payload", "payloadType", "signatures"))
        if not isinstance(kind, str) or not kind.isascii():
            raise ReceiptError(f"{what} is no signed receipt: it has no `payloadType`. Ask for a signed one.")
        if not isinstance(listed, list) or not 0 < len(listed) <= _MOST_SIGNATURES:
            raise ReceiptError(
                f"{what} has no list of one to {_MOST_SIGNATURES} signatures: it was altered, or never signed. Ask "
                "for a signed one."
            )
        return cls(_decoded(payload, what), tuple(_signature(one, what) for one in listed), kind)


def _signature(value: Any, what: str) -> Signature:
    if not isinstance(value, dict) or not isinstance(value.get("keyid", ""), str):
        raise ReceiptError(f"{what} has a signature of a wrong form: it was altered. Ask for it again.")
    return Signature(value.get("keyid", ""), _decoded(value.get("sig"), what))


def _encoded(value: bytes) -> str:
    return base64.b64encode(value).decode()


def _decoded(value: Any, what: str) -> bytes:
    """The bytes of a text in base64, standard or URL-safe, of which each has one form only."""
    try:
        text = value.translate({ord("-"): "+", ord("_"): "/"})
        found = base64.b64decode(text, validate=True)
    except (AttributeError, ValueError, binascii.Error):
        raise ReceiptError(f"{what} was cut or altered: a part of it is no base64. Ask for it again.") from None
    if _encoded(found) != text:
        raise ReceiptError(f"{what} was altered: a part of it is no base64 as anybody writes it. Ask for it again.")
    return found
