"""Tables of examples that no version of hf_s3t writes, with a digest that matches, and those of earlier versions."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from hf_s3t.folder import table_file
from hf_s3t.folder.ledger_file import pin_of
from hf_s3t.folder.system import SystemFolder
from hf_s3t.records.ledger import Ledger


def write_own(path: Path, arrow: pa.Table, metadata: dict[bytes, bytes]) -> None:
    """A table of any kind with a digest that matches, as `write_table` makes it."""
    stand_in = hashlib.sha256(b"stand-in").hexdigest().encode()
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(buffer, arrow.schema, store_schema=False) as writer:
        writer.write_table(arrow)
        writer.add_key_value_metadata({**metadata, table_file._DIGEST: stand_in})
    data = buffer.getvalue().to_pybytes()
    path.write_bytes(data.replace(stand_in, table_file._digest_of(data, stand_in)))


def rewrite_table(
    path: Path, change: Callable[[dict[str, pa.Array]], dict[str, pa.Array]], rows: int | None = None, **metadata: str
) -> None:
    """Change the columns of a table, of which some rows may be kept, and what its metadata say."""
    arrow = pq.read_table(path).slice(0, rows)
    said = {
        name: value
        for name, value in pq.read_metadata(path).metadata.items()
        if name in (table_file._PIN, table_file._VERSION, table_file._SLICES)
    }
    said |= {b"hf_s3t." + name.encode(): value.encode() for name, value in metadata.items()}
    columns = change({name: arrow[name].combine_chunks() for name in arrow.column_names})
    write_own(path, pa.table(columns), said)


def write_first_version(folder: SystemFolder) -> None:
    """Write the table of a folder as the first version had it."""
    rows = folder.table.rows
    columns = {
        "id": list(rows),
        "shard": pa.array([row.shard for row in rows.values()], pa.int32()),
        "slice": pa.array([row.slice for row in rows.values()], pa.int32()),
        "digest": [row.digest for row in rows.values()],
    }
    if any(row.group is not None for row in rows.values()):
        columns["group"] = [row.group for row in rows.values()]
    pin = pin_of(Ledger.parse((folder.path / "ledger.jsonl").read_text()))
    write_own(folder.path / "examples.parquet", pa.table(columns), {table_file._PIN: pin.encode()})
