"""One line of the ledger: what it says, in both versions of the format."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import FolderError, FormatVersionError


LEDGER_VERSION = 2
KINDS = ("deletion", "export", "merge", "addition", "replacement")
# Of a replacement: rows go and others of their ids come, by one line.
_DELETING, _ADDING = ("deletion", "replacement"), ("addition", "replacement")
_FIRST_KINDS = ("deletion", "export", "merge")
_FIRST_FIELDS = {"kind", "time", "ids", "removed", "left", "previous", "versions", "groups"}
# What a line of version 2 says besides kind, time and the line before; what is empty is left out.
_SAID = {
    "deletion": ("ids", "groups", "removed", "grown", "missing", "versions"),
    "export": ("exported", "versions"),
    "merge": (),
    "addition": ("rows", "rows_sha256", "again", "again_groups"),
    "replacement": (
        *("ids", "groups", "removed", "grown", "missing", "versions"),
        *("rows", "rows_sha256", "again", "again_groups"),
    ),
}
# What is not said where there is nothing to say.
_LEFT_OUT_IF_EMPTY = (
    *("ids", "groups", "grown", "missing"),
    *("rows", "rows_sha256", "again", "again_groups"),
)


@dataclass(frozen=True)
class LedgerEntry:
    """
    What one line of the ledger says. It names nobody: ids appear as digests keyed with the system's secret.

    A line of version 1 lists every stage that stays; one of version 2 says only what changed since the line before,
    its first `previous`. The `entries` of a [`~hf_s3t.records.ledger.Ledger`] have `left` and `versions` in full.

    Args:
        kind (`str`): `"deletion"`; `"export"` for an adapter handed out that must be revoked by hand; `"merge"`;
            `"addition"` of rows; `"replacement"`, a deletion and an addition in one.
        time (`str`): UTC time, ISO 8601.
        ids (`tuple[str, ...]`): Keyed digests of the ids, sorted.
        removed (`dict[str, str]`): Stages removed (or exported) and the digests of their adapters.
        left (`dict[str, str]`): Stages that stay and the digests of their adapters.
        previous (`tuple[str, ...]`): Hash of the line before; two after a merge, none in the first line.
        versions (`dict[str, str]`, *optional*): Library versions; `None` if they are those of the line before.
        groups (`tuple[str, ...]`): Keyed digests of the groups that were named, sorted.
        grown (`dict[str, str]`): Stages that stay, and were not there at the line before or had another adapter.
        missing (`tuple[str, ...]`): Stages that went since the line before, and that no line says of, sorted.
        version (`int`): Of the format.
        rows (`int`): How many rows came.
        rows_sha256 (`str`): SHA-256 of the file that they came in, by which whoever finds both finishes the addition.
        again (`tuple[str, ...]`): Keyed digests of ids among them that were deleted before, sorted.
        again_groups (`tuple[str, ...]`): The same of groups.
    """

    kind: str
    time: str
    ids: tuple[str, ...]
    removed: dict[str, str]
    left: dict[str, str]
    previous: tuple[str, ...]
    versions: dict[str, str] | None = None
    groups: tuple[str, ...] = ()
    grown: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    version: int = LEDGER_VERSION
    rows: int = 0
    rows_sha256: str = ""
    again: tuple[str, ...] = ()
    again_groups: tuple[str, ...] = ()

    @property
    def deletes(self) -> bool:
        """Whether examples were deleted."""
        return self.kind in _DELETING

    @property
    def back(self) -> tuple[str, ...]:
        """Keyed digests of the ids that are in again: those that were replaced come with what takes their place."""
        return (*self.again, *self.ids) if self.kind == "replacement" else self.again

    @property
    def adds(self) -> bool:
        """Whether examples came."""
        return self.kind in _ADDING

    def to_line(self) -> str:
        """The entry as one line of JSON, without the line break."""
        if self.version == 1:
            return _as_line({"version": 1, **{name: getattr(self, name) for name in _FIRST_FIELDS}})
        values: dict[str, Any] = {name: getattr(self, name) for name in _LEFT_OUT_IF_EMPTY}
        values["exported" if self.kind == "export" else "removed"] = self.removed
        values = {name: value for name, value in values.items() if value}
        if self.versions is not None:
            values["versions"] = self.versions
        always = {"version": self.version, "kind": self.kind, "time": self.time, "previous": self.previous}
        return _as_line({**values, **always})

    @classmethod
    def from_line(cls, line: str) -> "LedgerEntry":
        """The entry of a line; raises [`~hf_s3t.errors.FolderError`] if it is none."""
        try:
            values = json.loads(line)
            version = values.pop("version")
            if version not in (1, LEDGER_VERSION):
                raise FormatVersionError(
                    f"A ledger line has version {version!r}; this hf_s3t reads versions 1 and {LEDGER_VERSION}."
                )
            entry = cls._first(values) if version == 1 else cls._second(values)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FolderError(f"A ledger line cannot be read ({error}): {line[:80]!r}") from error
        texts: tuple[Any, ...] = (entry.time, *entry.ids, *entry.previous, *entry.groups, *entry.missing)
        texts += (entry.rows_sha256, *entry.again, *entry.again_groups)
        versions = {} if version != 1 and entry.versions is None else entry.versions
        maps: tuple[Any, ...] = (entry.removed, entry.left, entry.grown, versions)
        if (
            not (
                entry.kind in (_FIRST_KINDS if version == 1 else KINDS)
                or (isinstance(entry.kind, str) and values.get("optional") is True)
            )
            or not all(isinstance(text, str) for text in texts)
            or not all(isinstance(m, dict) for m in maps)
            or type(entry.rows) is not int
            or not (version == 1 or all(isinstance(text, str) for m in maps for text in m.values()))
        ):
            raise FolderError(f"A ledger line has fields of a wrong type: {line[:80]!r}")
        return entry

    @classmethod
    def _first(cls, values: dict[str, Any]) -> "LedgerEntry":
        if not values.keys() <= _FIRST_FIELDS:
            raise TypeError(f"unknown fields {sorted(values.keys() - _FIRST_FIELDS)}")
        lists = {name: tuple(values[name]) for name in ("ids", "previous", "groups")}
        return cls(**{"versions": {}, **values, **lists}, version=1)

    @classmethod
    def _second(cls, values: dict[str, Any]) -> "LedgerEntry":
        kind = values["kind"]
        known = kind in KINDS
        if isinstance(kind, str) and not known and values.get("optional") is not True:
            raise FormatVersionError(
                f"A ledger line is of the kind {kind!r}, which this hf_s3t does not know: a newer one wrote it. "
                "Update hf_s3t (`pip install -U hf_s3t`)."
            )
        # What else a newer hf_s3t says in a line is covered by its hash like this, and passed over.
        said = {name: values[name] for name in (_SAID[kind] if known else ()) if name in values}
        if said.get("versions", {}) is None:
            raise TypeError("versions are null")
        return cls(
            kind=kind,
            time=values["time"],
            ids=_listed(said.get("ids", [])),
            removed=said.get("exported" if kind == "export" else "removed", {}),
            left={},
            previous=_listed(values["previous"]),
            versions=said.get("versions"),
            groups=_listed(said.get("groups", [])),
            grown=said.get("grown", {}),
            missing=_listed(said.get("missing", [])),
            rows=said.get("rows", 0),
            rows_sha256=said.get("rows_sha256", ""),
            again=_listed(said.get("again", [])),
            again_groups=_listed(said.get("again_groups", [])),
        )


def _listed(value: Any) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise TypeError(f"got {value!r}, expected a list")
    return tuple(value)


def _as_line(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, separators=(",", ":"))


def line_hash(line: str) -> str:
    """The hash by which the next line refers to this one."""
    return hashlib.sha256(line.encode()).hexdigest()
