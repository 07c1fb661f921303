"""Ed25519 keys: made, read, used to sign and to check; and which key this process signs with."""

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SigningKeyError


if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey


SIGNING_VARIABLE = "HF_S3T_SIGNING_KEY"
PUBLIC_VARIABLE = "HF_S3T_PUBLIC_KEY"
# By its presence a folder is a system's; rooms above have the name too.
_OF_A_SYSTEM = "s3t_config.json"
_MAKE_ONE = "Make a pair of keys by `hf-s3t keygen`"


class PublicKey:
    """
    A public key, by which signatures are checked.

    Args:
        key (`Ed25519PublicKey`): The key, of `cryptography`.
    """

    def __init__(self, key: "Ed25519PublicKey"):
        self._key = key
        self.keyid = hashlib.sha256(_der_of(key)).hexdigest()

    @classmethod
    def from_text(cls, text: str) -> "PublicKey":
        """
        The key of a PEM text, or of its base64 alone.

        Raises:
            [`~hf_s3t.errors.SigningKeyError`]: If it is none, or a private key.
        """
        _require_library()
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        if "PRIVATE KEY" in text:
            raise SigningKeyError(
                "Got a private key, expected the public one, the file that ends in .pub. Whoever is given the private "
                "key can sign in your name."
            )
        try:
            key = load_pem_public_key(_as_pem(text, "PUBLIC KEY"))
        except Exception:
            raise SigningKeyError(f"Got no public key, expected the PEM text of one. {_MAKE_ONE}.") from None
        if not isinstance(key, Ed25519PublicKey):
            raise SigningKeyError(f"Got a public key of another kind, expected Ed25519. {_MAKE_ONE}.")
        return cls(key)

    @classmethod
    def read(cls, source: str | os.PathLike[str]) -> "PublicKey":
        """
        The key of a file, or that a text is itself.

        Args:
            source (`str` or `os.PathLike`): The path of the file, or the key as a text.

        Raises:
            [`~hf_s3t.errors.SigningKeyError`]: If there is none.
        """
        text = _text_of(source)
        if text is None:
            # What was given may be the other half of a pair, mistyped: it is not shown.
            raise SigningKeyError(f"What was given as public key is no file that is there, and no key. {_MAKE_ONE}.")
        return cls.from_text(text)

    @property
    def pem(self) -> str:
        """The key as a PEM text."""
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        return self._key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()

    def holds(self, signature: bytes, data: bytes) -> bool:
        """Whether a signature of some bytes is one by this key's other half."""
        from cryptography.exceptions import InvalidSignature

        try:
            self._key.verify(signature, data)
        except InvalidSignature:
            return False
        return True

    def __repr__(self) -> str:
        return f"PublicKey({self.keyid[:12]}…)"


class Signer:
    """
    What signs, and the public key by which its signatures are checked. Of a key in an HSM or KMS it is a callable.

    Args:
        sign (callable): From bytes to the 64 bytes of their Ed25519 signature.
        public_key ([`PublicKey`], `str` or `os.PathLike`): The public key, its PEM text, or a file with that.

    Example:

    ```python
    >>> from hf_s3t.signing.keys import Signer, generate, use_signer

    >>> private, public = generate()
    >>> signer = Signer(Signer.from_text(private), public)  # in the place of the first: `lambda data: kms.sign(data)`
    >>> use_signer(signer)  # from now on this process signs each line of a ledger that it writes
    >>> use_signer(None)
    ```
    """

    def __init__(self, sign: Callable[[bytes], bytes], public_key: PublicKey | str | os.PathLike[str]):
        self._sign = sign
        self.public_key = public_key if isinstance(public_key, PublicKey) else PublicKey.read(public_key)

    @classmethod
    def from_text(cls, text: str) -> "Signer":
        """
        What signs with the private key of a PEM text, or of its base64 alone. No error shows anything of it.

        Raises:
            [`~hf_s3t.errors.SigningKeyError`]: If it is no such key, or encrypted.
        """
        key = _private_key(text)
        return cls(key.sign, PublicKey(key.public_key()))

    @classmethod
    def read(cls, file: str | os.PathLike[str]) -> "Signer":
        """
        What signs with the private key in a file.

        Raises:
            [`~hf_s3t.errors.SigningKeyError`]: If there is none, or it lies in the folder of a system.
        """
        path = Path(file)
        refuse_in_system(path, "A signing key")
        text = _read(path)
        if text is None:
            raise SigningKeyError(f"{path} is no file that is there, expected one with a signing key. {_MAKE_ONE}.")
        return cls.from_text(text)

    def __call__(self, data: bytes) -> bytes:
        """
        The signature of some bytes.

        Raises:
            [`~hf_s3t.errors.SigningKeyError`]: If what came back is not a signature by the public key.
        """
        found = self._sign(data)
        if not isinstance(found, bytes) or not self.public_key.holds(found, data):
            raise SigningKeyError(
                f"What was to sign returned no signature by the key {self.public_key.keyid[:12]}…, expected 64 bytes "
                "of Ed25519. Give the public key that belongs to it."
            )
        return found

    def __repr__(self) -> str:
        return f"Signer({self.public_key.keyid[:12]}…)"


def generate() -> tuple[str, str]:
    """A new private key and its public one, as PEM texts."""
    _require_library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    return private, PublicKey(key.public_key()).pem


def write_pair(file: str | os.PathLike[str]) -> PublicKey:
    """
    Make a pair of keys: the private one in a file that only its owner may read, the public one beside it, as `.pub`.

    Args:
        file (`str` or `os.PathLike`): A new file, outside of every system's folder.

    Returns:
        [`PublicKey`]: The public key.

    Raises:
        [`~hf_s3t.errors.SigningKeyError`]: If either file is there, or a system's folder is above it.
    """
    path = Path(file)
    public_path = path.with_name(path.name + ".pub")
    refuse_in_system(path, "A signing key")
    for one in (path, public_path):
        if os.path.lexists(one):
            raise SigningKeyError(f"{one} is there, and a key is not written over. Name a new file.")
    private, public = generate()
    for one, text, mode in ((path, private, 0o600), (public_path, public, 0o644)):
        try:
            descriptor = os.open(one, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        except OSError as error:
            raise SigningKeyError(f"{one} cannot be written: {error.strerror}. Name another file.") from None
        with os.fdopen(descriptor, "w") as opened:
            opened.write(text)
            opened.flush()
            os.fsync(opened.fileno())
    return PublicKey.from_text(public)


def refuse_in_system(path: Path, what: str) -> None:
    """
    Refuse a path in the folder of a system: what lies there is copied and pushed with it.

    Raises:
        [`~hf_s3t.errors.SigningKeyError`]: Naming the folder.
    """
    for folder in path.absolute().resolve().parents:
        if (folder / _OF_A_SYSTEM).exists():
            raise SigningKeyError(
                f"{what} does not belong into the folder of a system ({folder}), which is copied and pushed. Keep it "
                "elsewhere."
            )


_chosen: list[Signer] = []


def use_signer(signer: Signer | None) -> None:
    """
    Have this process sign every line of a ledger that it writes from now on.

    Args:
        signer ([`Signer`], *optional*): What signs; `None` goes back to what `HF_S3T_SIGNING_KEY` says.
    """
    _chosen[:] = [] if signer is None else [signer]


@contextlib.contextmanager
def signing_with(file: str | os.PathLike[str] | None) -> Iterator[None]:
    """
    Sign with the key of a file for as long as this lasts; without one, as before.

    Raises:
        [`~hf_s3t.errors.SigningKeyError`]: If there is no key in it.
    """
    before = list(_chosen)
    if file is not None:
        use_signer(Signer.read(file))
    try:
        yield
    finally:
        _chosen[:] = before


def current_signer() -> Signer | None:
    """
    What this process signs with: what `use_signer` was given, else the key that `HF_S3T_SIGNING_KEY` is or names.

    Returns:
        [`Signer`] or `None`: `None` where there is no key.

    Raises:
        [`~hf_s3t.errors.SigningKeyError`]: If the variable is set, and is no key and names none.
    """
    if _chosen:
        return _chosen[0]
    value = os.environ.get(SIGNING_VARIABLE, "").strip()
    if not value:
        return None
    if _is_key_itself(value):
        return Signer.from_text(value)
    # What is set may be a key that was damaged: it is not shown.
    if not _is_file(value):
        raise SigningKeyError(
            f"{SIGNING_VARIABLE} is no private key and names no file that is there. Set it to either, or unset it to "
            "sign nothing."
        )
    return Signer.read(value)


def required_signer() -> Signer:
    """
    The same where something cannot be done without it.

    Raises:
        [`~hf_s3t.errors.SigningKeyError`]: If there is no key.
    """
    signer = current_signer()
    if signer is None:
        raise SigningKeyError(
            f"There is no key to sign with: set {SIGNING_VARIABLE} to a private key or its file, or give "
            f"--signing-key. {_MAKE_ONE}."
        )
    return signer


def _private_key(text: str) -> "Ed25519PrivateKey":
    _require_library()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        key = load_pem_private_key(_as_pem(text, "PRIVATE KEY"), password=None)
    except TypeError:
        raise SigningKeyError(
            "The signing key is encrypted, expected one without a password. Decrypt it into the environment, or sign "
            "by a callable."
        ) from None
    except Exception:
        # Whatever the library says of it is not passed on: it may show a part of the key.
        raise SigningKeyError(f"Got no private key to sign with, expected the PEM text of one. {_MAKE_ONE}.") from None
    if not isinstance(key, Ed25519PrivateKey):
        raise SigningKeyError(f"Got a private key of another kind, expected Ed25519. {_MAKE_ONE}.")
    return key


def _as_pem(text: str, kind: str) -> bytes:
    # In the environment line breaks are often written as two characters, or left out with the frame.
    text = text.strip().replace("\\n", "\n")
    return (text if "-----BEGIN" in text else f"-----BEGIN {kind}-----\n{text}\n-----END {kind}-----\n").encode()


def _is_key_itself(text: str) -> bool:
    # The base64 of every key of this kind begins so, in either form.
    return "-----BEGIN" in text or text.startswith(("MC4CAQAwBQYDK2Vw", "MCowBQYDK2Vw", "MFECAQEwBQYDK2Vw"))


def _is_file(text: str | os.PathLike[str]) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):
        return False


def _text_of(source: str | os.PathLike[str]) -> str | None:
    if isinstance(source, str) and _is_key_itself(source):
        return source
    return _read(Path(source)) if _is_file(source) else None


def _read(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, IsADirectoryError):
        return None
    except UnicodeDecodeError:
        raise SigningKeyError(f"{path} is no text, expected the PEM text of a key. {_MAKE_ONE}.") from None
    except OSError as error:
        raise SigningKeyError(f"{path} cannot be read: {error.strerror}. Check its permissions.") from None


def _der_of(key: "Ed25519PublicKey") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _require_library() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise SigningKeyError(
            "Signatures need the library `cryptography`, which is not installed. Run `pip install hf_s3t[sign]`."
        ) from None
