"""Deletion requests that are recorded now, to be applied together later."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ..errors import FolderError
from ..folder.erasure_requests_file import due_after
from ..folder.files import explained, sync, unreadable
from ..folder.layout import PENDING_FILE
from ..folder.system import SystemFolder
from ..records.report import UnlearningReport
from ..records.request import DeletionRequest
from .deletion import apply, resolve


_VERSION = 1


@dataclass(frozen=True)
class PendingReceipt:
    """
    What one call of `unlearn_later` recorded.

    Args:
        time (`str`): UTC time of the request, ISO 8601.
        requested (`int`): Number of distinct examples that this request will delete.
        already_deleted (`int`): How many of the ids the ledger knew as deleted before.
        pending (`int`): Number of distinct examples that wait in all.
        apply_by (`str`, *optional*):
            UTC time, ISO 8601, from which a process that loads the system applies what waits; the earliest of all
            requests.
        deleted_groups (`tuple[int | str, ...]`): The groups among those asked for that were deleted before.
        unknown (`int`): How many ids were never trained on, and passed over by `missing="ignore"`.
        unknown_groups (`int`): The same of groups.
    """

    time: str
    requested: int
    already_deleted: int
    pending: int
    apply_by: str | None
    deleted_groups: tuple[int | str, ...] = ()
    unknown: int = 0
    unknown_groups: int = 0


class PendingRequests:
    """
    The requests that wait in a folder, in a file of their own, which names nobody: ids are keyed digests.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
    """

    def __init__(self, folder: SystemFolder):
        self.folder = folder
        self.path = folder.path / PENDING_FILE

    def add(self, ids: Sequence[int | str], groups: Sequence[int | str], max_delay: float | None) -> str:
        """
        Record a request and sync it; under the folder's lock.

        Args:
            ids (sequence): The examples, those of the groups included.
            groups (sequence): The groups that were named.
            max_delay (`float`, *optional*): Seconds after which it shall be applied at the latest.

        Returns:
            `str`: The time of the request.
        """
        now = datetime.now(UTC)
        due = None if max_delay is None else due_after(now, max_delay)
        time = now.isoformat(timespec="milliseconds")
        line = {
            "version": _VERSION,
            "time": time,
            "ids": sorted(self.folder.names.id_digests(ids)),
            "groups": sorted(map(self.folder.names.group_digest, groups)),
            "apply_by": None if due is None else due.isoformat(),
        }
        advice = "The request may be lost. Make room, or make the folder writable, then call again."
        with explained(f"{self.path} could not be written", advice):
            with open(self.path, "ab") as file:
                # What a crash left of a line was never acknowledged.
                file.truncate(self._acknowledged())
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            # Also where the file was there: who made it may have died before this.
            sync(self.path.parent)
        return time

    def ids(self) -> list[int | str]:
        """The examples that wait and are still in."""
        digests = self.id_digests()
        return self.folder.table.of_digests(digests) if digests else []

    def id_digests(self) -> frozenset[str]:
        """The digests of the examples that were asked for, whether they are still in or not."""
        return frozenset(digest for line in self._lines() for digest in line["ids"])

    def groups(self) -> list[int | str]:
        """The groups that were named and still have examples."""
        digests = {digest for line in self._lines() for digest in line["groups"]}
        # Its examples stand in the request too, as far as they are still in.
        groups = self.folder.table.groups_of(self.ids()) if digests else []
        return [group for group in groups if self.folder.names.group_digest(group) in digests]

    def waiting(self) -> list[tuple[str | None, int]]:
        """Of each request of which something is still in: by when it is to be applied, and how many examples."""
        lines, deleted = self._lines(), self.folder.ledger.deleted
        left = [(line["apply_by"], sum(one not in deleted for one in line["ids"])) for line in lines]
        return [(due, examples) for due, examples in left if examples]

    def request(self) -> DeletionRequest:
        """All that waits, as one request."""
        return DeletionRequest(self.ids(), self.groups(), missing="ignore")

    def apply_by(self) -> datetime | None:
        """The time by which the most urgent request is to be applied, if any has one."""
        times = [datetime.fromisoformat(line["apply_by"]) for line in self._lines() if line["apply_by"]]
        return min(times, default=None)

    def clear(self) -> None:
        """Drop all requests: they are in the ledger now."""
        advice = "The deletions it asks for are in force. Make the folder writable, then call again."
        with explained(f"{self.path} could not be removed", advice):
            if self.path.exists():
                self.path.unlink()
                sync(self.path.parent)

    def _acknowledged(self) -> int:
        return self.path.read_bytes().rfind(b"\n") + 1 if self.path.exists() else 0

    def _lines(self) -> list[dict[str, Any]]:
        if not self.path.exists():
            return []
        try:
            lines = self.path.read_bytes()[: self._acknowledged()].splitlines()
        except OSError as error:
            raise unreadable(self.path, error) from error
        return [self._read(number, line) for number, line in enumerate(lines, start=1)]

    def _read(self, number: int, line: bytes) -> dict[str, Any]:
        try:
            values: dict[str, Any] = json.loads(line)
            texts = [*values["ids"], *values["groups"]]
            if values["version"] != _VERSION or not all(isinstance(text, str) for text in texts):
                raise ValueError("its fields are not those of a request")
            # Times with and without a zone cannot be compared.
            if values["apply_by"] is not None and datetime.fromisoformat(values["apply_by"]).tzinfo is None:
                raise ValueError("its time has no zone")
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FolderError(
                f"{self.path} line {number} cannot be read ({error}): requests would be forgotten. Restore it from a "
                "backup, or call `unlearn` for the requests and remove the file."
            ) from error
        return values


def request_later(folder: SystemFolder, request: DeletionRequest, max_delay: float | None = None) -> PendingReceipt:
    """
    Record a deletion request durably, to be applied with others: see [`~hf_s3t.S3TModel.unlearn_later`].

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        request ([`~hf_s3t.records.request.DeletionRequest`]): What to forget.
        max_delay (`float`, *optional*): Seconds after which it shall be applied at the latest.

    Returns:
        [`PendingReceipt`]: What was recorded.

    Raises:
        [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
        [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
    """
    with folder.lock():
        folder.refresh_ledger()
        examples, _ = resolve(folder, request)
        pending = PendingRequests(folder)
        time_of_request = pending.add(examples.present, examples.groups, max_delay)
        apply_by = pending.apply_by()
        return PendingReceipt(
            time=time_of_request,
            requested=len(examples.present),
            already_deleted=examples.already_deleted,
            pending=len(pending.ids()),
            apply_by=None if apply_by is None else apply_by.isoformat(),
            deleted_groups=examples.deleted_groups,
            unknown=examples.unknown,
            unknown_groups=examples.unknown_groups,
        )


def apply_pending(folder: SystemFolder) -> UnlearningReport:
    """
    Delete what waits from a folder, in one go and without a model: see [`~hf_s3t.S3TModel.apply_pending`].

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.

    Returns:
        [`~hf_s3t.records.report.UnlearningReport`]:
            As of [`~hf_s3t.operations.deletion.apply`]; `deleted` is 0 if nothing was waiting.
    """
    with folder.lock():
        folder.refresh()
        pending = PendingRequests(folder)
        report = apply(folder, pending.request())
        # In the ledger now; a crash before this line finds them there, and nothing to delete.
        pending.clear()
    return report
