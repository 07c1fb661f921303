"""What format 1 wrote of a system's examples, where its records are to be understood."""

import hashlib

from .buffers import hexadecimal
from .digests import encode
from .examples import ExampleTable


def earlier_slice_digest(table: ExampleTable, shard: int, slice_: int) -> str:
    """
    The digest of a slice's remaining ids and contents as format 1 made it.

    Args:
        table ([`~hf_s3t.records.examples.ExampleTable`]): The examples that are in.
        shard (`int`): Number of the shard.
        slice_ (`int`): Number of the slice.
    """
    rows = table.rows_in(shard, slice_)
    contents = hexadecimal(table.columns.digests[rows])
    lines = sorted(encode(i) + d.encode() for i, d in zip(table.ids_in(shard, slice_), contents, strict=True))
    return hashlib.sha256(b"\n".join(lines)).hexdigest()
