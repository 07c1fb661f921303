"""The file of the table of examples: parquet, with a digest of the file and the place in the ledger it goes by."""

import hashlib
import itertools
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..config import S3TConfig
from ..errors import FolderError, FormatVersionError
from ..records.buffers import arrow_digests, arrow_numbers, digests_of, from_hexadecimal, numbers_of
from ..records.columns import Columns
from ..records.digests import KeptNames
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from .files import Stamp, write_atomically
from .ledger_file import pin_of


_DIGEST = b"hf_s3t.digest"
_PIN = b"hf_s3t.ledger"
_VERSION = b"hf_s3t.table"
_SLICES = b"hf_s3t.slices"
# The version that is written. In the first, digests were texts, and those of ids were not there.
TABLE_VERSION = 2
_OF_EVERY_ROW = {1: ("id", "shard", "slice", "digest"), 2: ("id_digest", "shard", "slice", "digest")}
_KNOWN = {"id", "id_digest", "shard", "slice", "digest", "group", "addition"}
# Where the footer of a parquet file says how long it is, and that it is one.
_TAIL = 8


def write_table(path: Path, table: ExampleTable, ledger: Ledger) -> None:
    """
    Write the table of examples, with its own digest and the lines of the ledger it goes by.

    Args:
        path (`Path`): The file.
        table ([`~hf_s3t.records.examples.ExampleTable`]): The examples that are in.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The deletions without whose examples it is written.
    """
    write_atomically(path, table_bytes(table, ledger))


def table_bytes(table: ExampleTable, ledger: Ledger, more: Mapping[bytes, str] | None = None) -> memoryview:
    """What `write_table` writes, and what else its footer shall say."""
    arrow, buffer = _arrow_of(table.settled().columns), pa.BufferOutputStream()
    # The digest covers the whole file, with zeros where it stands itself.
    stand_in = secrets.token_hex(32).encode()
    metadata = {
        _DIGEST: stand_in,
        _PIN: pin_of(ledger),
        _VERSION: str(TABLE_VERSION),
        _SLICES: _slices_of(table),
        **(more or {}),
    }
    # Digests can be made no smaller.
    compression = {name: "NONE" if "digest" in name else "SNAPPY" for name in arrow.column_names}
    repeating = [name for name in ("shard", "slice", "group", "addition") if name in arrow.column_names]
    # Without a stored schema the metadata stand in the file as they are, and once.
    with pq.ParquetWriter(
        buffer, arrow.schema, store_schema=False, compression=compression, use_dictionary=repeating
    ) as writer:
        writer.write_table(arrow)
        writer.add_key_value_metadata(metadata)
    data = memoryview(buffer.getvalue()).cast("B")
    # In its place, and the file's bytes are not copied: there may be a hundred million.
    at = _place_of(data, stand_in)
    data[at : at + len(stand_in)] = _digest_of(data, stand_in)
    return data


def _slices_of(table: ExampleTable) -> str:
    """Size and digest of each slice, shard by shard: whoever opens the table computes none."""
    places = itertools.product(range(table.num_shards), range(table.num_slices))
    return json.dumps([[table.size(*place), table.slice_digest(*place)] for place in places])


def _arrow_of(columns: Columns) -> pa.Table:
    found: dict[str, pa.Array] = {}
    if columns.ids is not None:
        found["id"] = columns.ids if columns.are_texts else arrow_numbers(columns.ids)
    found["id_digest"] = arrow_digests(columns.id_digests)
    found |= {"shard": arrow_numbers(columns.shards), "slice": arrow_numbers(columns.slices)}
    found["digest"] = arrow_digests(columns.digests)
    if columns.group_of is not None and (columns.group_of >= 0).any():
        found["group"] = columns.groups
    if columns.additions is not None:
        found["addition"] = arrow_numbers(columns.additions)
    found |= columns.more
    return pa.Table.from_arrays(list(found.values()), names=list(found))


def _digest_of(data: bytes | memoryview, digest: bytes) -> bytes:
    at = _place_of(data, digest)
    view = memoryview(data)
    found = hashlib.sha256(view[:at])
    found.update(b"0" * len(digest))
    found.update(view[at + len(digest) :])
    return found.hexdigest().encode()


def _place_of(data: bytes | memoryview, digest: bytes) -> int:
    """Where the digest stands: in the footer, at the end of the file."""
    size = len(data)
    footer = max(0, size - _TAIL - int.from_bytes(data[max(0, size - _TAIL) : max(0, size - _TAIL // 2)], "little"))
    return footer + bytes(data[footer:]).index(digest)


@dataclass(frozen=True)
class TableHead:
    """
    What the file of a table says of it as a whole.

    Args:
        pin (`str`): The lines of the ledger that it goes by; see [`~hf_s3t.folder.ledger_file.pin_of`].
        stamp ([`~hf_s3t.folder.files.Stamp`], *optional*): The file's when this was read.
        slices (`str`, *optional*): Sizes and digests of its slices as JSON; not known of a file that did not change.
        more (`frozenset[str]`): Names of the columns that a later version added; not known of such a file either.
    """

    pin: str
    stamp: Stamp | None
    slices: str | None = None
    more: frozenset[str] = frozenset()

    def says_of(self, table: ExampleTable) -> bool:
        """Whether it is the head of this table."""
        return self.slices == _slices_of(table) and not self.says_more_than(table)

    def says_more_than(self, table: ExampleTable) -> bool:
        """Whether the file has other columns than a table, of those that a later version added."""
        return self.slices is not None and self.more != table.columns.more.keys()


def read_head_of_table(path: Path, found: Stamp | None) -> TableHead | None:
    """
    The head of a table, from the end of its file alone; `None` where that says none, and the file has to be read.

    Args:
        path (`Path`): The file.
        found ([`~hf_s3t.folder.files.Stamp`], *optional*): Its stamp, taken before.
    """
    try:
        footer = pq.read_metadata(path)
        metadata, more = footer.metadata, frozenset(footer.schema.to_arrow_schema().names) - _KNOWN
        return TableHead(metadata[_PIN].decode(), found, metadata[_SLICES].decode(), more)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError):
        return None


@dataclass(frozen=True)
class StoredTable:
    """
    A table as it was read.

    Args:
        file (`Path`): Where from.
        version (`int`): The version of its columns.
        columns (mapping from name to `pyarrow.Array`): Its columns.
        pin (`str`): The lines of the ledger that it goes by; see [`~hf_s3t.folder.ledger_file.pin_of`].
        slices (`str`, *optional*): Sizes and digests of its slices as JSON, if it has them.
        said (mapping from `bytes` to `bytes`): All that the footer says.
    """

    file: Path
    version: int
    columns: dict[str, pa.Array]
    pin: str
    slices: str | None = None
    said: Mapping[bytes, bytes] = field(default_factory=dict)

    def num_shards(self, config: S3TConfig) -> int:
        """Of how many shards it is: it may have been written before the last ones of these settings were added."""
        try:
            places = 0 if self.slices is None else len(json.loads(self.slices))
        except (ValueError, TypeError, RecursionError):
            return config.num_shards
        return places // config.num_slices or config.num_shards

    def examples(self, config: S3TConfig, names: KeptNames) -> ExampleTable:
        """
        The examples, checked to be some of a system.

        Args:
            config ([`~hf_s3t.S3TConfig`]): The settings of the system.
            names ([`~hf_s3t.records.digests.KeptNames`]): How ids and groups stand in the table.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If one is none, or lies outside the system's shards and slices.
        """
        num_shards = self.num_shards(config)
        try:
            found = Columns(
                names,
                ids=None if "id" not in self.columns else _ids(self.columns["id"], names),
                id_digests=self._id_digests(names),
                shards=_within(self.columns["shard"], num_shards),
                slices=_within(self.columns["slice"], config.num_slices),
                digests=_digests(self.columns["digest"]),
                groups=_groups(self.columns.get("group")),
                additions=_additions(self.columns.get("addition")),
                more={name: column for name, column in self.columns.items() if name not in _KNOWN},
            )
            if self.version > 1 and (found.ids is None) != names.are_digests:
                raise ValueError("ids stand there otherwise than the settings say")
            if not found.are_unique:
                raise ValueError("an id stands there twice")
            digests = None if self.slices is None else _slice_digests(self.slices, num_shards, config.num_slices)
            table = ExampleTable(found, num_shards, config.num_slices, config.seed, digests)
            if self.slices is not None and self.slices != _slices_of(table):
                raise ValueError("slices are of other sizes than it says")
            return table
        except (ValueError, TypeError, RecursionError) as error:
            raise FolderError(
                f"{self.file} holds rows that are no examples of this system's shards and slices. Restore it from a "
                "backup."
            ) from error

    def _id_digests(self, names: KeptNames) -> np.ndarray | None:
        if self.version > 1:
            return _digests(self.columns["id_digest"])
        # The first version has them in the place of ids, or not at all.
        return _digests(self.columns["id"]) if names.are_digests else None


def read_table(path: Path) -> StoredTable:
    """
    The table in a file.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the file is missing or altered.
        [`~hf_s3t.errors.FormatVersionError`]: If a newer hf_s3t wrote it.
    """
    try:
        data, metadata = _read_intact(path)
        version = int(metadata.get(_VERSION, b"1"))
        if version not in _OF_EVERY_ROW:
            raise FormatVersionError(
                f"{path} has the version {version} of a table; this hf_s3t reads versions 1 and {TABLE_VERSION}. "
                "Install the version of hf_s3t that wrote it."
            )
        # In this thread: one of Arrow's own may outlive the interpreter with what it read, and end it with a signal.
        arrow = pq.ParquetFile(pa.BufferReader(data)).read(use_threads=False)
        columns = {name: arrow[name].combine_chunks() for name in arrow.column_names}
        _ = [columns[name] for name in _OF_EVERY_ROW[version]]
        slices = metadata[_SLICES].decode() if version > 1 else None
        return StoredTable(path, version, columns, metadata[_PIN].decode(), slices, metadata)
    except (pa.ArrowException, KeyError, OverflowError, ValueError, TypeError) as error:
        raise _is_no_table(path, error) from error


def read_pin(path: Path) -> str:
    """
    The lines of the ledger that a table goes by, without its rows.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the file is missing or altered.
    """
    try:
        return _read_intact(path)[1][_PIN].decode()
    except (pa.ArrowException, KeyError, ValueError) as error:
        raise _is_no_table(path, error) from error


def _read_intact(path: Path) -> tuple[bytes, dict[bytes, bytes]]:
    """The bytes of a table, which are those that were written, and what its footer says."""
    try:
        data = path.read_bytes()
        metadata: dict[bytes, bytes] = pq.read_metadata(pa.BufferReader(data)).metadata or {}
    except FileNotFoundError:
        raise FolderError(f"{path} is missing. Restore it from a backup.") from None
    except OSError as error:
        raise _is_no_table(path, error) from error
    if metadata[_DIGEST] != _digest_of(data, metadata[_DIGEST]):
        raise FolderError(f"{path} was altered: its rows do not match the digest it carries. Restore it.")
    return data, metadata


def _is_no_table(path: Path, error: Exception) -> FolderError:
    said = str(error).rstrip(".")
    return FolderError(f"{path} is not the table it was written as: {said}. Restore it from a backup.")


def _slice_digests(text: str, num_shards: int, num_slices: int) -> dict[tuple[int, int], str]:
    places = itertools.product(range(num_shards), range(num_slices))
    digests = [digest for _, digest in json.loads(text)]
    _, no_digest = from_hexadecimal(digests)
    if no_digest.any():
        raise ValueError("a slice without a digest")
    return dict(zip(places, digests, strict=True))


# Columns, checked as a whole


def _ids(column: pa.Array, names: KeptNames) -> Any:
    if names.are_digests:
        return None
    _refuse_nulls(column)
    if pa.types.is_string(column.type):
        return column
    if not pa.types.is_signed_integer(column.type):
        # A table without rows has forgotten of which type they were.
        if len(column):
            raise ValueError(f"ids of the type {column.type}")
        return np.zeros(0, np.int64)
    return numbers_of(column.cast(pa.int64()))


def _within(column: pa.Array, bound: int) -> np.ndarray:
    _refuse_nulls(column)
    if not len(column):
        return np.zeros(0, np.int32)
    if not pa.types.is_integer(column.type):
        raise ValueError(f"numbers of the type {column.type}")
    numbers = numbers_of(column)
    if not ((numbers >= 0) & (numbers < bound)).all():
        raise ValueError("a number that is out of range")
    return numbers.astype(np.int32)


def _digests(column: pa.Array) -> np.ndarray:
    _refuse_nulls(column)
    return digests_of(column) if len(column) else np.zeros((0, 32), np.uint8)


def _groups(column: pa.Array | None) -> pa.Array | None:
    if column is None or column.null_count == len(column):
        return None
    if pa.types.is_signed_integer(column.type):
        return column.cast(pa.int64())
    if not pa.types.is_string(column.type):
        raise ValueError(f"groups of the type {column.type}")
    return column


def _additions(column: pa.Array | None) -> np.ndarray | None:
    return None if column is None else _within(column, 2**31 - 1)


def _refuse_nulls(column: pa.Array) -> None:
    if column.null_count:
        raise ValueError("a value is missing")
