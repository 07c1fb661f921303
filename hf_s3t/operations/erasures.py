"""Requests to erase that a server takes: recorded in the book, and what became of them, as ledger and folder say."""

import json
from collections.abc import Sequence
from typing import Any

from ..folder.erasure_requests_file import ErasureBook, RecordedErasure
from ..folder.signatures_file import Signatures
from ..folder.system import SystemFolder
from ..records.naming import find_ids
from ..records.request import DeletionRequest, RequestedExamples, listed
from .deletion import resolve
from .pending import PendingRequests
from .receipts import Receipt


STATES = ("done", "waiting", "interrupted")


def record_erasure(
    book: ErasureBook, request: DeletionRequest, body: str, key: str | None = None, max_delay: float | None = None
) -> RecordedErasure:
    """
    Check a request to erase and put it into the book, before anything is deleted. One that is refused is not in it.

    Args:
        book ([`~hf_s3t.folder.erasure_requests_file.ErasureBook`]): The system's book, held by `taking`.
        request ([`~hf_s3t.records.request.DeletionRequest`]): What to forget.
        body (`str`): Keyed digest of what was asked for.
        key (`str`, *optional*): Keyed digest of what the client repeats the request by.
        max_delay (`float`, *optional*): Seconds for which it may wait.

    Returns:
        [`~hf_s3t.folder.erasure_requests_file.RecordedErasure`]: The request as it stands in the book.

    Raises:
        [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
        [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
        [`~hf_s3t.errors.ConfigError`]: If `max_delay` leads to no date.
    """
    folder = book.folder
    with folder.lock():
        folder.refresh_ledger()
        examples, _ = resolve(folder, request)
        erasure = RecordedErasure(
            id="",
            time="",
            key=key,
            body=body,
            ids=tuple(sorted(folder.names.id_digests(examples.present))),
            earlier=_deleted_before(folder, request),
            groups=_named_groups(folder, examples),
            unknown=examples.unknown,
            unknown_groups=examples.unknown_groups,
            max_delay=max_delay,
        )
        return book.add(erasure)


def _deleted_before(folder: SystemFolder, request: DeletionRequest) -> tuple[str, ...]:
    """Digests of the ids of a request that the ledger knows, so that it is answered with their receipts too."""
    ids = find_ids(folder.table, listed(request.ids, "ids"), folder.ledger, folder.names)
    return tuple(sorted({one for one in folder.names.id_digests(ids) if one in folder.ledger.deleted}))


def _named_groups(folder: SystemFolder, examples: RequestedExamples) -> tuple[str, ...]:
    present = map(folder.names.group_digest, examples.groups)
    # As they were given, which may be the digest itself.
    known = folder.ledger.deleted_groups
    gone = (
        str(group) if group in known else folder.names.group_digest(folder.names.of_group(group))
        for group in examples.deleted_groups
    )
    return tuple(sorted({*present, *gone}))


def state_of(folder: SystemFolder, erasure: RecordedErasure) -> str:
    """
    What became of a request: what ledger and waiting requests say counts, whoever died when.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        erasure ([`~hf_s3t.folder.erasure_requests_file.RecordedErasure`]): The request.

    Returns:
        `str`: `"done"` if all of it is in the ledger, `"waiting"` if it is among the requests that wait, and
            `"interrupted"` if it is in neither: whoever took it died before.
    """
    return states_of(folder, [erasure])[0]


def states_of(folder: SystemFolder, erasures: Sequence[RecordedErasure]) -> list[str]:
    """What became of several requests; see `state_of`. What waits is read once."""
    missing = [[one for one in erasure.ids if not _is_erased(folder, one, erasure)] for erasure in erasures]
    is_asked = any(erasure.waits and ids for erasure, ids in zip(erasures, missing, strict=True))
    waiting = PendingRequests(folder).id_digests() if is_asked else frozenset[str]()
    return [
        "done" if not ids else "waiting" if erasure.waits and waiting.issuperset(ids) else "interrupted"
        for erasure, ids in zip(erasures, missing, strict=True)
    ]


def envelopes_of(folder: SystemFolder, receipts: Sequence[Receipt]) -> list[dict[str, Any] | None]:
    """
    The signed envelopes of lines of the ledger, as this machine has them; `None` where nobody signed one.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        receipts (sequence of [`~hf_s3t.operations.receipts.Receipt`]): The lines.
    """
    signed = map(Signatures.read(folder.path).signed, (one.hash for one in receipts))
    return [None if one is None else json.loads(one[0].to_json()) for one in signed]


def _is_erased(folder: SystemFolder, digest: str, erasure: RecordedErasure) -> bool:
    """Whether an id of a request is out, or was deleted since and came back by an explicit word."""
    ledger = folder.ledger
    if digest in ledger.deleted:
        return True
    line = ledger.deleted.line_of(digest)
    return line is not None and ledger.entries[line - 1].time >= erasure.time


def receipts_of(folder: SystemFolder, erasure: RecordedErasure) -> list[Receipt]:
    """
    The lines of the ledger that prove a request, oldest first: of its examples, and of those deleted before.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        erasure ([`~hf_s3t.folder.erasure_requests_file.RecordedErasure`]): The request.
    """
    ledger = folder.ledger
    lines = {ledger.deleted.line_of(one) for one in (*erasure.ids, *erasure.earlier)}
    lines.update(map(ledger.line_of_group, erasure.groups))
    # A ledger in memory was checked as a chain, and against what remembers its length.
    return [
        Receipt(line, ledger.hashes[line - 1], ledger.entries[line - 1], True)
        for line in sorted(line for line in lines if line is not None)
    ]
