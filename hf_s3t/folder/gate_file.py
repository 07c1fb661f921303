"""The file of a gate: the terms of the rows that are in and their counts, with the place in the ledger it goes by."""

import hashlib
import json
import secrets
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from ..config import S3TConfig
from ..errors import FolderError, FormatVersionError
from ..records.buffers import DIGEST_BYTES
from ..records.ledger import Ledger
from ..records.terms import TermCounts, TermRows
from .files import unreadable, write_atomically
from .ledger_file import pin_of


GATE_VERSION = 1
KIND = "terms"
_SAID = "hf_s3t.gate"
_NO_DIGEST = "0" * 64
_OF_ROWS = {"row_digests": "u1", "row_shards": "i4", "row_slices": "i4", "row_ends": "i8", "row_terms": "u4"}
_OF_COUNTS = {"terms": "u4", "ends": "i8", "places": "i4", "counts": "u4", "totals": "i8"}
# Far more than what a file of a gate says of itself.
_LARGEST_HEADER = 2**20
_REMEDY = "Restore it from a backup, or remove it and make it anew by `trainer.build_gate()` with the dataset."


@dataclass(frozen=True)
class StoredGate:
    """
    What a folder keeps of the prompts of its rows, immutable.

    Args:
        rows ([`~hf_s3t.records.terms.TermRows`]): The terms of each row that is in.
        counts ([`~hf_s3t.records.terms.TermCounts`]): In how many rows of each slice a term occurs.
        tokenizer_digest (`str`): Of the tokenizer whose texts were read; see
            [`~hf_s3t.records.terms.vocabulary_digest`].
        build (`str`): Drawn when it was made from rows: others that say the same are this one, less deleted rows.
    """

    rows: TermRows
    counts: TermCounts
    tokenizer_digest: str
    build: str

    @classmethod
    def of(cls, rows: TermRows, num_shards: int, num_slices: int, tokenizer_digest: str) -> "StoredGate":
        """A new one, of rows."""
        return cls(rows, TermCounts.of(rows, num_shards, num_slices), tokenizer_digest, secrets.token_hex(16))

    def without(self, id_digests: Collection[str] | np.ndarray) -> "StoredGate":
        """The gate without some rows, as if they had never been there; those that are not are passed over."""
        gone = self.rows.only(id_digests)
        if not len(gone):
            return self
        return replace(self, rows=self.rows.without(id_digests), counts=self.counts.without(gone))

    def keeping(self, earlier: "StoredGate", id_digests: Collection[str] | np.ndarray) -> "StoredGate":
        """
        The gate with what another knows of rows that it does not know itself.

        Args:
            earlier ([`StoredGate`]): The other. By another tokenizer it knows other words, and nothing is taken of it.
            id_digests (collection of `str`, or `numpy.ndarray`):
                The keyed digests of the rows' ids, in hexadecimal digits or as 32 bytes in each row.
        """
        if earlier.tokenizer_digest != self.tokenizer_digest:
            return self
        kept = earlier.rows.only(id_digests)
        if not len(kept):
            return self
        counts = self.counts
        return StoredGate.of(self.rows.joined(kept), counts.num_shards, counts.num_slices, self.tokenizer_digest)

    def of_shards(self, num_shards: int) -> "StoredGate":
        """The gate of a system with so many shards, of which the last may have come since: it knows no row of them."""
        if num_shards == self.counts.num_shards:
            return self
        return replace(self, counts=self.counts.of_shards(num_shards))

    @property
    def is_settled(self) -> bool:
        """Whether no array holds anything of rows that were removed."""
        return self.rows.is_settled and self.counts.is_settled

    def settled(self) -> "StoredGate":
        """The same in arrays that hold nothing of rows that were removed."""
        return self if self.is_settled else replace(self, rows=self.rows.settled(), counts=self.counts.settled())

    @property
    def is_counted(self) -> bool:
        """Whether its counts are those of its rows: counted anew."""
        own, fresh = self.counts.settled(), TermCounts.of(self.rows, self.counts.num_shards, self.counts.num_slices)
        return all(np.array_equal(getattr(own, name), getattr(fresh, name)) for name in _OF_COUNTS)


@dataclass(frozen=True)
class GateHead:
    """
    What the file of a gate says of it as a whole.

    Args:
        pin (`str`): The lines of the ledger that it goes by; see [`~hf_s3t.folder.ledger_file.pin_of`].
        tokenizer_digest (`str`): See [`StoredGate`].
        build (`str`): See [`StoredGate`].
        rows (`int`): Number of rows.
        terms (`int`): Number of distinct terms.
    """

    pin: str
    tokenizer_digest: str
    build: str
    rows: int
    terms: int


def write_gate(path: Path, gate: StoredGate, ledger: Ledger, key_check: str) -> None:
    """
    Write a gate, with its own digest and the lines of the ledger it goes by; only its owner may read the file.

    Args:
        path (`Path`): The file.
        gate ([`StoredGate`]): The gate.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The deletions without whose rows it is written.
        key_check (`str`): What tells the system's secret from others.
    """
    write_atomically(path, gate_bytes(gate, ledger, key_check), private=True)


def gate_bytes(gate: StoredGate, ledger: Ledger, key_check: str) -> memoryview:
    """What `write_gate` writes."""
    gate = gate.settled()
    rows, counts = gate.rows, gate.counts
    arrays = [rows.digests, rows.shards, rows.slices, rows.ends, rows.terms]
    arrays += [counts.terms, counts.ends, counts.places, counts.counts, counts.totals]
    tensors = dict(zip((*_OF_ROWS, *_OF_COUNTS), map(np.ascontiguousarray, arrays), strict=True))
    # The digest covers the whole file, with zeros where it stands itself.
    said = {
        "version": GATE_VERSION,
        "kind": KIND,
        "ledger": pin_of(ledger),
        "tokenizer": gate.tokenizer_digest,
        "build": gate.build,
        "key_check": key_check,
        "digest": _NO_DIGEST,
    }
    # One text, sorted: of several, each would stand elsewhere in each file.
    data = memoryview(bytearray(save(tensors, {_SAID: json.dumps(said, sort_keys=True)})))
    at = _place_of(data, _NO_DIGEST)
    data[at : at + len(_NO_DIGEST)] = hashlib.sha256(data).hexdigest().encode()
    return data


def _place_of(data: bytes | memoryview, digest: str) -> int:
    """Where the digest stands: in the header."""
    return bytes(data[: 8 + _LARGEST_HEADER]).index(digest.encode())


def read_gate_head(path: Path, key_check: str) -> GateHead:
    """
    The head of a gate, from the beginning of its file alone.

    Args:
        path (`Path`): The file.
        key_check (`str`): What tells the system's secret from others.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the file is missing or is no gate of this system.
        [`~hf_s3t.errors.FormatVersionError`]: If a newer hf_s3t wrote it.
    """
    try:
        with open(path, "rb") as file:
            begin = file.read(8 + _LARGEST_HEADER)
    except FileNotFoundError:
        raise no_gate(path) from None
    except OSError as error:
        raise unreadable(path, error) from error
    return _head_of(path, begin, key_check)


def no_gate(path: Path) -> FolderError:
    """The error to raise where a gate is asked for that is not there."""
    return FolderError(
        f"{path} is missing: the system has no gate, expected one of its rows' terms. Make it by "
        "`trainer.build_gate()` with the dataset, or load the model with gate=None."
    )


def _head_of(path: Path, data: bytes, key_check: str) -> GateHead:
    try:
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size]) if size <= _LARGEST_HEADER else {}
        said = _said_in(header)
        version, kind, found = said["version"], said["kind"], said["key_check"]
        if version != GATE_VERSION or kind != KIND:
            raise FormatVersionError(
                f"{path} holds a gate of the kind {kind!r} in version {version}; this hf_s3t reads {KIND!r} in "
                f"version {GATE_VERSION}. Install the version of hf_s3t that wrote it, or remove the file and make "
                "it anew by `trainer.build_gate()`."
            )
        shapes = [header[name]["shape"][0] for name in ("row_ends", "terms")]
        head = GateHead(str(said["ledger"]), str(said["tokenizer"]), str(said["build"]), *shapes)
    except (KeyError, IndexError, TypeError, ValueError, RecursionError) as error:
        raise _is_no_gate(path, error) from error
    if found != key_check:
        raise FolderError(
            f"{path} was made with another secret than this system's: its terms are of other words. {_REMEDY}"
        )
    return head


def _said_in(header: Mapping[str, Any]) -> Mapping[str, Any]:
    said: Mapping[str, Any] = json.loads(header["__metadata__"][_SAID])
    return said


def read_gate(path: Path, key_check: str, config: S3TConfig) -> tuple[StoredGate, str]:
    """
    The gate in a file, and the lines of the ledger that it goes by.

    Args:
        path (`Path`): The file.
        key_check (`str`): What tells the system's secret from others.
        config ([`~hf_s3t.S3TConfig`]): The settings of the system.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the file is missing, altered, or no gate of this system.
        [`~hf_s3t.errors.FormatVersionError`]: If a newer hf_s3t wrote it.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise no_gate(path) from None
    except OSError as error:
        raise unreadable(path, error) from error
    head = _head_of(path, data[: 8 + _LARGEST_HEADER], key_check)
    try:
        _require_intact(path, data)
        arrays = load(data)
        for name, kind in (_OF_ROWS | _OF_COUNTS).items():
            if arrays[name].dtype.str[1:] != kind:
                raise ValueError(f"{name} is of the type {arrays[name].dtype}")
        rows = TermRows(*(arrays[name] for name in _OF_ROWS))
        # One that was made before the last shards were added.
        num_shards = min(config.num_shards, len(arrays["totals"]) // config.num_slices)
        counts = TermCounts(num_shards, config.num_slices, *(arrays[name] for name in _OF_COUNTS))
        _require_whole(rows, counts)
    except (SafetensorError, KeyError, IndexError, ValueError, TypeError) as error:
        raise _is_no_gate(path, error) from error
    return StoredGate(rows, counts, head.tokenizer_digest, head.build).of_shards(config.num_shards), head.pin


def _require_intact(path: Path, data: bytes) -> None:
    size = int.from_bytes(data[:8], "little")
    digest = str(_said_in(json.loads(data[8 : 8 + size]))["digest"])
    at = _place_of(data, digest)
    view = memoryview(data)
    found = hashlib.sha256(view[:at])
    found.update(_NO_DIGEST.encode())
    found.update(view[at + len(_NO_DIGEST) :])
    if found.hexdigest() != digest:
        raise FolderError(f"{path} was altered or cut short: its rows do not match the digest it carries. {_REMEDY}")


def _require_whole(rows: TermRows, counts: TermCounts) -> None:
    """Refuse arrays that do not belong together; who edits a file can make its digest match."""
    num_rows, num_places = len(rows.ends), counts.num_shards * counts.num_slices
    shapes = rows.digests.shape == (num_rows, DIGEST_BYTES) and counts.totals.shape == (num_places,)
    lengths = rows.shards.shape == rows.slices.shape == rows.ends.shape and counts.ends.shape == counts.terms.shape
    lengths = lengths and counts.places.shape == counts.counts.shape
    if not (shapes and lengths and _are_ends(rows.ends, rows.terms) and _are_ends(counts.ends, counts.places)):
        raise ValueError("its arrays do not belong together")
    bounds = (rows.shards, counts.num_shards), (rows.slices, counts.num_slices), (counts.places, num_places)
    if not all(((values >= 0) & (values < bound)).all() for values, bound in bounds):
        raise ValueError("a place that is out of range")
    if not (counts.terms[1:] > counts.terms[:-1]).all():
        raise ValueError("its terms are in no order")


def _are_ends(ends: np.ndarray, values: np.ndarray) -> bool:
    last = int(ends[-1]) if len(ends) else 0
    return bool((np.diff(ends, prepend=0) >= 0).all()) and last == len(values)


def _is_no_gate(path: Path, error: Exception) -> FolderError:
    said = str(error).rstrip(".")
    return FolderError(f"{path} is not the gate it was written as: {said}. {_REMEDY}")
