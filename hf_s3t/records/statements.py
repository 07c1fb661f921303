"""What is signed of a line of the ledger."""

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

from ..signing.person import Commitment
from ..signing.stages_digest import stages_digest
from ..signing.statement import Statement
from .ledger import Ledger


def statement_of(ledger: Ledger, number: int, system: str, signed: str) -> Statement:
    """
    What a line changed, to be signed and kept beside the ledger. As large as the change, less its ids, which the hash
    of the line covers.

    Args:
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The ledger.
        number (`int`): Number of the line, counted from 1.
        system (`str`): The identity of the system.
        signed (`str`): When it is signed: `"written"` with the line, or `"later"`.

    Example:

    ```python
    >>> from hf_s3t.records.ledger import Ledger
    >>> from hf_s3t.records.statements import statement_of

    >>> ledger = Ledger().append("deletion", ids=["5e0f"], removed={"shard-0/1": "a1" * 32})
    >>> dict(statement_of(ledger, 1, "00" * 16, "written").counts)
    {'examples': 1, 'groups': 0, 'removed': 1, 'exported': 0, 'left': 0}
    ```
    """
    entry, left = ledger.entries[number - 1], ledger.left_at(number)
    moved = entry.removed
    # A replacement takes stages as a deletion does.
    removed, exported = ({}, moved) if entry.kind == "export" else (moved, {})
    return Statement(
        system=system,
        line=number,
        hash=ledger.hashes[number - 1],
        previous=tuple(entry.previous),
        kind=entry.kind,
        time=entry.time,
        before=stages_digest({**left, **removed}),
        after=stages_digest(left),
        removed=removed,
        exported=exported,
        counts={
            "examples": len(entry.ids),
            "groups": len(entry.groups),
            "removed": len(removed),
            "exported": len(exported),
            "left": len(left),
        },
        versions=ledger.versions_at(number),
        signed=signed,
        signed_time=datetime.now(UTC).isoformat(timespec="milliseconds"),
    )


def receipt_statement(
    ledger: Ledger,
    number: int,
    system: str,
    line_signed: str | None,
    audits: Iterable[Mapping[str, Any]] = (),
    person: Commitment | None = None,
) -> Statement:
    """
    What a receipt of a line says: also which stages stayed, and the hashes of all lines before.

    Args:
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The ledger.
        number (`int`): Number of the line, counted from 1.
        system (`str`): The identity of the system.
        line_signed (`str`, *optional*): When the line itself was signed; `None` where it was not.
        audits (iterable of mappings): What audits of stages that stayed came to.
        person ([`~hf_s3t.signing.person.Commitment`], *optional*):
            For whom it is; such a receipt lists nobody else's digests.
    """
    said, entry = statement_of(ledger, number, system, "receipt"), ledger.entries[number - 1]
    listed = {} if person is not None else {"ids": tuple(entry.ids), "groups": tuple(entry.groups)}
    more = {
        "left": ledger.left_at(number),
        "history": tuple(ledger.hashes[: number - 1]),
        "line_signed": line_signed,
        "audits": tuple(audits),
        "person": person,
    }
    return Statement(**{**vars(said), **listed, **more})
