"""Keys: who may ask the server for answers, who may have it erase, and who may watch it."""

import hmac
import json
import os
import stat
from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import Any, Self

from ..errors import ConfigError


_SHORTEST = 8


class Scope(StrEnum):
    """What a key is for."""

    ANSWER = "answer"
    ERASE = "erase"
    STATUS = "status"


# Where keys are looked for if no file is given: several are separated by commas.
VARIABLES = {scope: f"HF_S3T_{scope.value.upper()}_KEYS" for scope in Scope}
# Who may erase sees what there is to erase.
_IMPLIED = {Scope.ERASE: frozenset({Scope.ERASE, Scope.STATUS})}


class Keys:
    """
    The keys of a server. Of each only a hash is kept, and nothing shows them.

    Where there is any key, each request needs one: of a scope without keys nothing can be asked.

    Args:
        keys (mapping of [`Scope`] to a collection of `str`): The keys of each scope. One key may have several scopes.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If one is shorter than eight characters, or cannot stand in a header.

    Example:

    ```python
    >>> from hf_s3t.server.keys import Keys, Scope

    >>> keys = Keys({Scope.ANSWER: ["a-key-of-a-client"], Scope.ERASE: ["a-key-of-the-office"]})
    >>> sorted(keys.scopes_of("a-key-of-the-office"))
    [<Scope.ERASE: 'erase'>, <Scope.STATUS: 'status'>]
    >>> keys.scopes_of("a guess")
    frozenset()
    ```
    """

    def __init__(self, keys: Mapping[Scope, Collection[str]]):
        self._hashes: dict[bytes, frozenset[Scope]] = {}
        for scope, of_scope in keys.items():
            for key in of_scope:
                _check(key, scope)
                digest, scopes = _hash(key), _IMPLIED.get(scope, frozenset({scope}))
                self._hashes[digest] = self._hashes.get(digest, frozenset()) | scopes

    def __repr__(self) -> str:
        return f"Keys({len(self._hashes)})"

    def __bool__(self) -> bool:
        return bool(self._hashes)

    @classmethod
    def load(cls, file: str | os.PathLike[str] | None, environment: Mapping[str, str] = os.environ) -> Self:
        """
        The keys of a file, or else of the environment.

        Args:
            file (`str` or `os.PathLike`, *optional*):
                A JSON file such as `{"answer": ["…"], "erase": ["…"], "status": ["…"]}` that only its owner can read.
            environment (mapping, *optional*):
                Where `HF_S3T_ANSWER_KEYS`, `HF_S3T_ERASE_KEYS` and `HF_S3T_STATUS_KEYS` are looked for.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If both are given, or the file is none of keys, or others can read it.
        """
        given = {scope: environment[name] for scope, name in VARIABLES.items() if environment.get(name)}
        if file is None:
            found = {scope: _split(text) for scope, text in given.items()}
            for scope in (scope for scope, keys in found.items() if not keys):
                raise ConfigError(f"{VARIABLES[scope]} has no key. Give one, or unset it.")
            return cls(found)
        if given:
            names = ", ".join(VARIABLES[scope] for scope in given)
            raise ConfigError(f"Keys are in {file} and in the environment ({names}). Give them in one place.")
        return cls(_read(Path(file)))

    def scopes_of(self, key: str) -> frozenset[Scope]:
        """What a key is for; nothing, if it is none. It takes as long whichever key it is."""
        digest, found = _hash(key), frozenset[Scope]()
        for known, scopes in self._hashes.items():
            if hmac.compare_digest(known, digest):
                found |= scopes
        return found


def _hash(key: str) -> bytes:
    return sha256(key.encode("utf-8", "surrogatepass")).digest()


def _split(text: str) -> list[str]:
    return [key.strip() for key in text.split(",") if key.strip()]


def _check(key: Any, scope: Scope) -> None:
    # Never with the key in the message.
    if not isinstance(key, str) or not key.isascii() or not key.isprintable() or " " in key or "," in key:
        raise ConfigError(
            f"A key of the scope {scope.value} is no text of printable ASCII characters without spaces and commas. "
            'Make one by `python -c "import secrets; print(secrets.token_urlsafe())"`.'
        )
    if len(key) < _SHORTEST:
        raise ConfigError(
            f"A key of the scope {scope.value} has {len(key)} characters, expected at least {_SHORTEST}. Make one by "
            '`python -c "import secrets; print(secrets.token_urlsafe())"`.'
        )


def _read(path: Path) -> dict[Scope, Sequence[str]]:
    expected = 'a JSON object such as {"answer": ["…"], "erase": ["…"], "status": ["…"]}'
    try:
        mode = path.stat().st_mode
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}. Give a file of keys.") from error
    except ValueError as error:
        # What does not parse may be a key: neither it nor the parser's words are shown.
        raise ConfigError(f"{path} is no file of keys, expected {expected}.") from error
    if os.name == "posix" and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{path} can be read or written by others (mode {stat.S_IMODE(mode):o}). `chmod 600` it; and make new "
            "keys if somebody may have read these."
        )
    names = {scope.value for scope in Scope}
    is_of_lists = isinstance(record, dict) and all(isinstance(keys, list) for keys in record.values())
    if not is_of_lists or not set(record) <= names or not any(record.values()):
        raise ConfigError(f"{path} is no file of keys, expected {expected}, with at least one key.")
    return {Scope(name): keys for name, keys in record.items()}
