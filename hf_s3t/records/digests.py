"""The secret of a system, and the keyed digests of ids, groups and contents that are made with it."""

import hmac
import os
import secrets
import struct
from collections.abc import Mapping
from datetime import date, datetime, time, timedelta
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ExampleIdError, FolderError, KeyMissingError


KEY_VARIABLE = "HF_S3T_KEY"
KEY_FILE = "ledger.key"
# For systems that are compared with each other, on data that is public or invented.
PUBLIC_SECRET = "hf_s3t: known to all, hides nothing"


class DigestKey:
    """
    The secret that ids and contents are digested with, so that published digests cannot be guessed back (E5).

    Args:
        secret (`bytes`): At least 16 bytes.
        is_new (`bool`, defaults to `True`): Whether there may be no system yet that was made with it.
    """

    def __init__(self, secret: bytes, is_new: bool = True):
        if len(secret) < 16:
            # A new secret would match no deletion of a system that is there.
            advice = "Make one with `openssl rand -hex 32`." if is_new else "Restore it as it was at training."
            raise KeyMissingError(
                f"The secret in {KEY_VARIABLE} or {KEY_FILE} has {len(secret)} bytes, expected at least 16. {advice}"
            )
        self._secret = secret

    @classmethod
    def load(cls, folder: str | os.PathLike, create: bool = False) -> "DigestKey":
        """
        The secret from the environment variable `HF_S3T_KEY`, else from `ledger.key` in the folder.

        Raises:
            [`~hf_s3t.errors.KeyMissingError`]: If there is none and `create` is false.
        """
        if os.environ.get(KEY_VARIABLE):
            return cls(os.environ[KEY_VARIABLE].encode(), is_new=create)
        path = Path(folder) / KEY_FILE
        if create and not path.exists():
            _write_secret(path, secrets.token_hex(32))
        try:
            secret = path.read_text().strip().encode()
        except FileNotFoundError:
            raise KeyMissingError(
                f"Neither {KEY_VARIABLE} nor {path} holds the secret of this system's digests. Restore the file, or "
                "set the variable to what it was at training."
            ) from None
        except UnicodeDecodeError as error:
            raise KeyMissingError(f"{path} is not text: {error}. Restore the file as it was at training.") from error
        except OSError as error:
            raise KeyMissingError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from error
        return cls(secret, is_new=create)

    @classmethod
    def draw(cls, folder: str | os.PathLike) -> "DigestKey":
        """
        The secret of a system that is to be made in the folder: the one that is there for it already, else a new one,
        in memory until [`DigestKey.write`].

        Raises:
            [`~hf_s3t.errors.KeyMissingError`]: If the one that is there is too short or cannot be read.
        """
        if os.environ.get(KEY_VARIABLE) or (Path(folder) / KEY_FILE).exists():
            return cls.load(folder, create=True)
        return cls(secrets.token_hex(32).encode())

    def write(self, folder: str | os.PathLike) -> None:
        """
        Put the secret into the folder of a system that is made with it, unless the environment holds it.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If another secret came there meanwhile.
        """
        if os.environ.get(KEY_VARIABLE):
            return
        path = Path(folder) / KEY_FILE
        if not path.exists():
            _write_secret(path, self._secret.decode())
        if DigestKey.load(folder).check != self.check:
            raise FolderError(
                f"{path} holds another secret than a moment ago: another process makes a system there. Choose another "
                "`output_dir`, or call again to go on with that one."
            )

    @property
    def is_public(self) -> bool:
        """Whether this is `PUBLIC_SECRET`, with which everybody can test who was deleted."""
        return hmac.compare_digest(self._secret, PUBLIC_SECRET.encode())

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

    def of_group(self, group: int | str) -> str:
        """Keyed digest of a group's name."""
        return self._digest(b"group", encode(group))

    def of_content(self, row: Mapping[str, Any]) -> str:
        """Keyed digest of the content of a row."""
        return self._digest(b"row", encode(dict(row)))

    def of_part(self, content: bytes) -> str:
        """Keyed digest of what was given to a trainer besides rows."""
        return self._digest(b"part", content)

    @property
    def check(self) -> str:
        """What tells this secret from another without giving it away."""
        return self._digest(b"check", b"")

    def _digest(self, purpose: bytes, message: bytes) -> str:
        return hmac.digest(self._secret, purpose + b"\0" + message, "sha256").hex()


class KeptNames:
    """
    How ids and groups stand in the table: as they are, or, where they are personal themselves, as keyed digests.

    Args:
        key ([`DigestKey`]): The system's secret.
        keep_ids (`str`): [`S3TConfig.keep_ids`], `"plain"` or `"digest"`.
    """

    def __init__(self, key: DigestKey, keep_ids: str):
        self._key = key
        self.are_digests = keep_ids == "digest"

    def of_id(self, example_id: int | str) -> int | str:
        """What stands in the table for an id."""
        return self._key.of_id(example_id) if self.are_digests else example_id

    def of_group(self, group: int | str | None) -> int | str | None:
        """What stands in the table for a group."""
        return self._key.of_group(group) if self.are_digests and group is not None else group

    def id_digest(self, kept: int | str) -> str:
        """What the ledger says for an id of the table."""
        return str(kept) if self.are_digests else self._key.of_id(kept)

    def group_digest(self, kept: int | str) -> str:
        """What the ledger says for a group of the table."""
        return str(kept) if self.are_digests else self._key.of_group(kept)


def _write_secret(path: Path, secret: str) -> None:
    """Make a file with a secret, whole or not at all, and never in the place of another."""
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secret)
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)
        except FileExistsError:
            # Another process was first: its secret is the one.
            return
        except OSError:
            # No hard links here.
            os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def encode(value: Any) -> bytes:
    """
    An unambiguous byte string of a value made of JSON types, bytes, dates, arrays and nested containers.

    Raises:
        [`~hf_s3t.errors.ExampleIdError`]: If a value has no stable byte representation.
    """
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
