"""An id named in a receipt by a salted commitment: who has the salt can show that it is theirs, others find nobody."""

import base64
import binascii
import hashlib
import hmac
import secrets
from dataclasses import dataclass
from typing import Any

from ..errors import ReceiptError


# 160 bits: nobody tries them, and they are written in 32 letters and digits.
_SALT_BYTES = 20
SCHEME = "scrypt-16384-8-1"
_CONTEXT = b"hf_s3t receipt for a person, 1\0"


@dataclass(frozen=True)
class Commitment:
    """
    What a receipt says of the person whom it is for. Without the salt it says nothing, about no id.

    Args:
        names (`str`): What was deleted under the name: an `"id"`, or a `"group"`.
        value (`str`): scrypt (n 16384, r 8, p 1, 32 bytes) of the name with the salt, in hexadecimal digits.
    """

    names: str
    value: str

    @classmethod
    def of(cls, names: str, text: str, salt: bytes) -> "Commitment":
        """The commitment to a name."""
        return cls(names, _slow_digest(text, salt))

    def is_to(self, text: str, salt: bytes) -> bool:
        """Whether it is one to this name; spaces around it do not count."""
        return any(hmac.compare_digest(self.value, _slow_digest(one, salt)) for one in {text, text.strip()})

    def to_record(self) -> dict[str, Any]:
        """As it stands in a statement."""
        return {"names": self.names, "scheme": SCHEME, "value": self.value}


def new_salt() -> bytes:
    """A fresh salt."""
    return secrets.token_bytes(_SALT_BYTES)


def salt_text(salt: bytes) -> str:
    """
    A salt as it is handed to a person.

    Example:

    ```python
    >>> from hf_s3t.signing.person import salt_text

    >>> salt_text(bytes(20))
    'AAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAA-AAAA'
    ```
    """
    text = base64.b32encode(salt).decode()
    return "-".join(text[at : at + 4] for at in range(0, len(text), 4))


def salt_from_text(text: str) -> bytes:
    """
    The salt that a person wrote; case, spaces and dashes do not count.

    Raises:
        [`~hf_s3t.errors.ReceiptError`]: If it is none.
    """
    try:
        salt = base64.b32decode("".join(text.split()).replace("-", "").upper())
    except (binascii.Error, ValueError):
        salt = b""
    if len(salt) != _SALT_BYTES:
        raise ReceiptError(
            "The salt has not the 32 letters and digits (A to Z, 2 to 7) of one. Give it as it was handed out with "
            "the receipt."
        )
    return salt


def _slow_digest(text: str, salt: bytes) -> str:
    # Slow, so that who was given the salt and the receipt of somebody else tries few names.
    name = _CONTEXT + text.encode("utf-8", "surrogatepass")
    return hashlib.scrypt(name, salt=salt, n=16384, r=8, p=1, dklen=32).hex()
