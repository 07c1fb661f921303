"""The file of the table of examples: parquet, with a digest of the file and the place in the ledger it goes by."""

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..config import S3TConfig
from ..errors import FolderError
from ..records.examples import Example, ExampleTable
from ..records.ledger import Ledger
from .files import write_atomically
from .ledger_file import pin_of


_DIGEST = b"hf_s3t.digest"
_PIN = b"hf_s3t.ledger"


def write_table(path: Path, table: ExampleTable, ledger: Ledger) -> None:
    """
    Write the table of examples, with its own digest and the lines of the ledger it goes by.

    Args:
        path (`Path`): The file.
        table ([`~hf_s3t.records.examples.ExampleTable`]): The examples that are in.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The deletions without whose examples it is written.
    """
    rows = table.rows
    columns = {
        "id": pa.array(list(rows)),
        "shard": pa.array([r.shard for r in rows.values()], pa.int32()),
        "slice": pa.array([r.slice for r in rows.values()], pa.int32()),
        "digest": pa.array([r.digest for r in rows.values()], pa.string()),
    }
    if any(r.group is not None for r in rows.values()):
        columns["group"] = pa.array([r.group for r in rows.values()])
    # The digest covers the whole file, with zeros where it stands itself.
    stand_in = secrets.token_hex(32).encode()
    metadata = {_DIGEST: stand_in, _PIN: pin_of(ledger)}
    arrow, buffer = pa.table(columns), pa.BufferOutputStream()
    # Without a stored schema the metadata stand in the file as they are, and once.
    with pq.ParquetWriter(buffer, arrow.schema, store_schema=False) as writer:
        writer.write_table(arrow)
        writer.add_key_value_metadata(metadata)
    data = buffer.getvalue().to_pybytes()
    write_atomically(path, data.replace(stand_in, _digest_of(data, stand_in)))


def _digest_of(data: bytes, digest: bytes) -> bytes:
    return hashlib.sha256(data.replace(digest, b"0" * len(digest))).hexdigest().encode()


def read_table(path: Path) -> tuple[dict[int | str, Example], str]:
    """
    The examples by id, and the pin: see `pin_of`.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the file is missing or altered.
    """
    try:
        data = path.read_bytes()
        file = pq.ParquetFile(pa.BufferReader(data))
        # In this thread: one of Arrow's own may outlive the interpreter with what it read, and end it with a signal.
        arrow, metadata = file.read(use_threads=False), file.metadata.metadata or {}
        digest, pin = metadata[_DIGEST], metadata[_PIN].decode()
        intact = digest == _digest_of(data, digest)
        columns = arrow.to_pydict()
        groups = columns.get("group", [None] * arrow.num_rows)
        rows = {
            example_id: Example(shard, slice_, content, group)
            for example_id, shard, slice_, content, group in zip(
                columns["id"], columns["shard"], columns["slice"], columns["digest"], groups, strict=True
            )
        }
    except FileNotFoundError:
        raise FolderError(f"{path} is missing. Restore it from a backup.") from None
    except (pa.ArrowException, KeyError, OverflowError, ValueError, TypeError, OSError) as error:
        raise FolderError(
            f"{path} is not the table it was written as: {_said(error)}. Restore it from a backup."
        ) from error
    if not intact:
        raise FolderError(f"{path} was altered: its rows do not match the digest it carries. Restore it.")
    return rows, pin


def _said(error: Exception) -> str:
    return str(error).rstrip(".")


def check_rows(file: Path, rows: Mapping[Any, Any], config: S3TConfig) -> None:
    """
    Check that the rows of a table are examples.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If one is not, or lies outside the system's shards and slices.
    """
    if not all(_is_row(example_id, row, config) for example_id, row in rows.items()):
        raise FolderError(
            f"{file} holds rows that are no examples of this system's shards and slices. Restore it from a backup."
        )


def _is_row(example_id: Any, row: Any, config: S3TConfig) -> bool:
    return (
        isinstance(example_id, (int, str))
        and not isinstance(example_id, bool)
        and isinstance(row.shard, int)
        and isinstance(row.slice, int)
        and isinstance(row.digest, str)
        and isinstance(row.group, (int, str, type(None)))
        and 0 <= row.shard < config.num_shards
        and 0 <= row.slice < config.num_slices
    )
