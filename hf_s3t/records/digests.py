"""The secret of a system, and the keyed digests of ids, groups and contents that are made with it."""

import hashlib
import hmac
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date, datetime, time, timedelta
from functools import cached_property
from typing import Any, overload

import numpy as np

from ..errors import ExampleIdError, KeyMissingError
from .buffers import DIGEST_BYTES, hexadecimal


# For systems that are compared with each other, on data that is public or invented.
PUBLIC_SECRET = "hf_s3t: known to all, hides nothing"

# Bytes of a block of SHA-256.
_BLOCK = 64


class DigestKey:
    """
    The secret that ids and contents are digested with, so that published digests cannot be guessed back (E5).

    Where it is kept is for [`hf_s3t.folder.secret`] to know.

    Args:
        secret (`bytes`): At least 16 bytes.

    Raises:
        [`~hf_s3t.errors.KeyMissingError`]: If it is shorter.
    """

    def __init__(self, secret: bytes):
        if len(secret) < 16:
            raise KeyMissingError(
                f"The secret has {len(secret)} bytes, expected at least 16. Make one with `openssl rand -hex 32`."
            )
        self.secret = secret

    @property
    def is_public(self) -> bool:
        """Whether this is `PUBLIC_SECRET`, with which everybody can test who was deleted."""
        return hmac.compare_digest(self.secret, PUBLIC_SECRET.encode())

    @property
    def for_places(self) -> bytes | None:
        """
        The key of [`~hf_s3t.plan.partition.assign`], from which nobody learns the secret. `None` for
        `PUBLIC_SECRET`: what everybody knows hides nothing, and ids and seed alone decide.
        """
        return None if self.is_public else bytes.fromhex(self._digest(b"places", b""))

    def of_id(self, example_id: int | str) -> str:
        """Keyed digest of an id; 1 and "1" differ."""
        return self._digest(b"id", encode(example_id))

    def of_ids(self, ids: Iterable[int | str]) -> np.ndarray:
        """Keyed digests of many ids, as bytes: one in each row."""
        return self._digests(b"id", map(encode, ids))

    def of_rows(self, ids: np.ndarray, contents: np.ndarray) -> np.ndarray:
        """Keyed digests of examples: of the digests of their ids and contents, one in each row of bytes."""
        pairs, width = np.concatenate([ids, contents], axis=1).tobytes(), 2 * DIGEST_BYTES
        return self._digests(b"slice", (pairs[at : at + width] for at in range(0, len(pairs), width)))

    def of_group(self, group: int | str) -> str:
        """Keyed digest of a group's name."""
        return self._digest(b"group", encode(group))

    def of_content(self, row: Mapping[str, Any]) -> str:
        """Keyed digest of the content of a row, as it stands there; see [`hf_s3t.records.contents`]."""
        return self._digest(b"row", encode(dict(row)))

    def of_contents(self, encoded: Iterable[bytes]) -> np.ndarray:
        """Keyed digests of the contents of many rows that are encoded, as bytes: one in each row."""
        return self._digests(b"row", encoded)

    def of_terms(self, words: Iterable[str]) -> np.ndarray:
        """
        What stands for words where the terms of prompts are kept: of the keyed digest of each the first 4 bytes, as
        uint32. Without the secret nobody tells words from them.
        """
        digests = self._digests(b"term", (word.encode("utf-8", "surrogatepass") for word in words))
        return np.ascontiguousarray(digests[:, :4]).view("<u4").reshape(-1)

    def of_part(self, content: bytes) -> str:
        """Keyed digest of what was given to a trainer besides rows."""
        return self._digest(b"part", content)

    def of_repeat_key(self, text: str) -> str:
        """Keyed digest of what a client repeats a request by."""
        return self._digest(b"repeat", text.encode("utf-8", "surrogatepass"))

    def of_erasure(self, request: Mapping[str, Any]) -> str:
        """Keyed digest of what a request to erase asks for, by which it is told from another one."""
        return self._digest(b"erasure", encode(request))

    @property
    def check(self) -> str:
        """What tells this secret from another without giving it away."""
        return self._digest(b"check", b"")

    def _digest(self, purpose: bytes, message: bytes) -> str:
        return hmac.digest(self.secret, purpose + b"\0" + message, "sha256").hex()

    def _digests(self, purpose: bytes, messages: Iterable[bytes]) -> np.ndarray:
        """What `_digest` gives of each message. A million take 0.6 seconds instead of 1.4: the key is read once."""
        inner, outer = self._states
        inner = inner.copy()
        inner.update(purpose + b"\0")
        begin, end = inner.copy, outer.copy
        found = []
        for message in messages:
            inside = begin()
            inside.update(message)
            outside = end()
            outside.update(inside.digest())
            found.append(outside.digest())
        return np.frombuffer(b"".join(found), np.uint8).reshape(-1, DIGEST_BYTES)

    @cached_property
    def _states(self) -> "tuple[hashlib._Hash, hashlib._Hash]":
        """SHA-256 after the two blocks with which HMAC (RFC 2104) begins under this key."""
        key = self.secret if len(self.secret) <= _BLOCK else hashlib.sha256(self.secret).digest()
        inner, outer = (bytes(byte ^ pad for byte in key.ljust(_BLOCK, b"\0")) for pad in (0x36, 0x5C))
        return hashlib.sha256(inner), hashlib.sha256(outer)


class KeptNames:
    """
    How ids and groups stand in the table: as they are, or, where they are personal themselves, as keyed digests.

    Args:
        key ([`DigestKey`] or callable): The system's secret, or what gives it when it is first needed.
        keep_ids (`str`): [`S3TConfig.keep_ids`], `"plain"` or `"digest"`.
    """

    def __init__(self, key: DigestKey | Callable[[], DigestKey], keep_ids: str):
        self._given = key
        self.are_digests = keep_ids == "digest"

    @property
    def key(self) -> DigestKey:
        """The system's secret."""
        return self._given if isinstance(self._given, DigestKey) else self._given()

    def of_id(self, example_id: int | str) -> int | str:
        """What stands in the table for an id."""
        return self.key.of_id(example_id) if self.are_digests else example_id

    @overload
    def of_group(self, group: int | str) -> int | str: ...

    @overload
    def of_group(self, group: None) -> None: ...

    def of_group(self, group: int | str | None) -> int | str | None:
        """What stands in the table for a group."""
        return self.key.of_group(group) if self.are_digests and group is not None else group

    def id_digest(self, kept: int | str) -> str:
        """What the ledger says for an id of the table."""
        return str(kept) if self.are_digests else self.key.of_id(kept)

    def group_digest(self, kept: int | str) -> str:
        """What the ledger says for a group of the table."""
        return str(kept) if self.are_digests else self.key.of_group(kept)

    def id_digests(self, kept: Sequence[int | str]) -> list[str]:
        """What the ledger says for many ids of the table."""
        return list(map(str, kept)) if self.are_digests else hexadecimal(self.key.of_ids(kept))


def encode(value: Any) -> bytes:
    """
    An unambiguous byte string of a value made of JSON types, bytes, dates, arrays and nested containers.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If a value has no stable byte representation.
    """
    # Most values are texts and integers; a million take a third of the time that the rest of this would.
    if type(value) is str:
        return _framed(b"s", value.encode("utf-8", "surrogatepass"))
    if type(value) is int:
        return b"i%d;" % value
    if value is None:
        return b"n"
    if isinstance(value, (bool, np.bool_)):
        return b"t" if value else b"f"
    if isinstance(value, (int, np.integer)):
        return b"i%d;" % int(value)
    if isinstance(value, (float, np.floating)):
        return b"d" + struct.pack(">d", float(value))
    if isinstance(value, str):
        return _framed(b"s", value.encode("utf-8", "surrogatepass"))
    if isinstance(value, (bytes, bytearray, memoryview)):
        return _framed(b"b", bytes(value))
    if isinstance(value, (date, datetime, time, timedelta)):
        return _framed(b"D", str(value).encode())
    if isinstance(value, Mapping):
        return _framed(b"m", b"".join(encode(k) + encode(value[k]) for k in sorted(value, key=str)))
    if isinstance(value, (list, tuple)):
        return _framed(b"l", b"".join(map(encode, value)))
    if hasattr(value, "__array__"):
        array = np.asarray(value)
        if array.dtype != object:
            return _framed(b"a", f"{array.dtype.str}{array.shape}".encode() + array.tobytes())
        return encode(array.tolist())
    raise ExampleIdError(
        f"A row holds a {type(value).__name__}, whose content cannot be digested. Give the dataset columns of plain "
        "values, lists, arrays or bytes."
    )


def _framed(tag: bytes, body: bytes) -> bytes:
    return tag + b"%d:" % len(body) + body
