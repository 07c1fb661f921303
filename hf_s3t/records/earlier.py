"""What earlier versions wrote down of a table: by this their stages are known again."""

import hashlib
from typing import TYPE_CHECKING

from .buffers import hexadecimal
from .digests import encode


if TYPE_CHECKING:
    from .examples import ExampleTable


def earlier_slice_digest(table: "ExampleTable", shard: int, slice_: int) -> str:
    """
    The digest of a slice as systems of format 1 have it: of its ids and contents, sorted, without a secret.

    Args:
        table ([`~hf_s3t.records.examples.ExampleTable`]): The table.
        shard (`int`): Number of the shard.
        slice_ (`int`): Number of the slice.
    """
    rows = table.rows_in(shard, slice_)
    contents = hexadecimal(table.columns.digests[rows])
    lines = sorted(encode(i) + d.encode() for i, d in zip(table.columns.kept(rows), contents, strict=True))
    return hashlib.sha256(b"\n".join(lines)).hexdigest()
