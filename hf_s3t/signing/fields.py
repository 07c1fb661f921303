"""Checks of single fields of a statement: foreign values are refused by the name of the field, and never shown."""

import re
from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import ReceiptError


_DIGEST = re.compile(r"[0-9a-f]{64}")
_STAGE = re.compile(r"shard-[0-9]{1,9}/[0-9]{1,9}(-[0-9]{1,9})*")
_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:.]{5,20}(\+00:00|Z)?")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+ -]{0,99}")
# More than any ledger has lines, or any system examples.
_LARGEST = 2**63 - 1
_ABSENT = object()


class Fields:
    """
    The fields of a JSON object, each checked when it is asked for.

    Args:
        values (`Any`): What should be the object.
        where (`str`): Where it stands, for errors.
    """

    def __init__(self, values: Any, where: str = "the statement"):
        self._values: Mapping[str, Any] = values if isinstance(values, dict) else _refuse(where, "an object")
        self._where = where

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return name in self._values

    def below(self, name: str) -> "Fields":
        """The fields of an object in a field."""
        return Fields(self._values.get(name, _ABSENT), name)

    def each(self, name: str) -> "list[Fields]":
        """The fields of each object in a list."""
        return [Fields(one, name) for one in self._list(name)]

    def text(self, name: str) -> str:
        """Any text."""
        value = self._values.get(name, _ABSENT)
        return value if isinstance(value, str) else self._refused(name, "a text")

    def word(self, name: str) -> str:
        """A short text of letters, digits and a few signs, which may be printed."""
        return self._matching(name, _WORD, "a short text")

    def stage(self, name: str) -> str:
        """The name of a stage."""
        return self._matching(name, _STAGE, "the name of a stage")

    def digest(self, name: str) -> str:
        """64 hexadecimal digits."""
        return self._matching(name, _DIGEST, "a SHA-256")

    def time(self, name: str) -> str:
        """A time in UTC."""
        return self._matching(name, _TIME, "a time in UTC")

    def number(self, name: str) -> int:
        """An integer that counts something."""
        value = self._values.get(name, _ABSENT)
        if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST:
            return value
        return self._refused(name, "a number from 0")

    def digests(self, name: str) -> tuple[str, ...]:
        """A list of digests."""
        values = self._list(name)
        if not all(isinstance(one, str) and _DIGEST.fullmatch(one) for one in values):
            self._refused(name, "a list of SHA-256")
        return tuple(values)

    def words(self, name: str) -> dict[str, str]:
        """An object of short texts."""
        values = self.below(name)._values
        if not all(isinstance(one, str) and _WORD.fullmatch(one) for pair in values.items() for one in pair):
            self._refused(name, "short texts")
        return dict(values)

    def counts(self, name: str) -> dict[str, int]:
        """An object of numbers."""
        below = self.below(name)
        return {one: below.number(one) for one in below._values}

    def stages(self, name: str) -> dict[str, str]:
        """A list of stages with their places, as their names and the digests of their adapters."""
        found: dict[str, str] = {}
        for one in self.each(name):
            stage = one.stage("stage")
            found[stage] = one.digest("adapter_sha256")
            if {field: one._values.get(field) for field in ("shard", "slices")} != place_of(stage):
                one._refused("slices", "those that the name of the stage says")
        if len(found) != len(self._list(name)):
            self._refused(name, "each stage once")
        return found

    def _list(self, name: str) -> list[Any]:
        value = self._values.get(name, _ABSENT)
        return value if isinstance(value, list) else self._refused(name, "a list")

    def _matching(self, name: str, pattern: re.Pattern[str], what: str) -> str:
        value = self._values.get(name, _ABSENT)
        return value if isinstance(value, str) and pattern.fullmatch(value) else self._refused(name, what)

    def _refused(self, name: str, expected: str) -> NoReturn:
        _refuse(f"{self._where}, {name}", expected)


def place_of(stage: str) -> dict[str, Any]:
    """The shard of a stage and the slices it was trained on, by its name."""
    shard, _, prefix = stage.removeprefix("shard-").partition("/")
    return {"shard": int(shard), "slices": list(map(int, prefix.split("-")))}


def _refuse(where: str, expected: str) -> NoReturn:
    raise ReceiptError(
        f"What was signed says something that none says ({where}: expected {expected}): it was made by another "
        "program. Ask its issuer for one by hf_s3t."
    )
