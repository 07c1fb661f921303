"""The book of erasures (`erasures.jsonl`): the requests a server took, so that a repeated one is the same request."""

import contextlib
import json
import os
import secrets
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock

from ..errors import ConfigError, FolderError
from .files import explained, sync, unreadable
from .layout import ERASURES_FILE, ERASURES_LOCK_FILE, STAGES
from .system import SystemFolder


_VERSION = 1
_KINDS = ("request", "waiting", "done")
_ADVICE = (
    "Restore it from a backup, or move it away: a request that is repeated then counts as a new one. No deletion is "
    "lost by that."
)
# Seconds between two looks at the lock that another process holds.
_POLL = 0.01


@dataclass(frozen=True)
class RecordedErasure:
    """
    A request to erase, as the book knows it. It names nobody: ids and groups are digests keyed with the secret.

    Args:
        id (`str`): The name of the request, drawn when it was recorded.
        time (`str`): UTC time of the request, ISO 8601.
        key (`str`, *optional*): Keyed digest of what the client repeats a request by.
        body (`str`): Keyed digest of what was asked for.
        ids (`tuple[str, ...]`): Digests of the examples that were in, those of its groups included.
        earlier (`tuple[str, ...]`): Digests of the ids that were deleted before.
        groups (`tuple[str, ...]`): Digests of the groups that were named.
        unknown (`int`, defaults to 0): How many ids were never trained on, and passed over.
        unknown_groups (`int`, defaults to 0): The same of groups.
        max_delay (`float`, *optional*): Seconds for which it may wait; `None` where it is not to wait.
        waits (`bool`, defaults to `False`): Whether it was handed over to the requests that wait.
        report (mapping, *optional*): What the deletion did, in numbers and stages; `None` until that is noted.
    """

    id: str
    time: str
    key: str | None
    body: str
    ids: tuple[str, ...] = ()
    earlier: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()
    unknown: int = 0
    unknown_groups: int = 0
    max_delay: float | None = None
    waits: bool = False
    report: Mapping[str, Any] | None = None

    @property
    def apply_by(self) -> datetime | None:
        """When it is to be in force at the latest; `None` where it does not wait."""
        return None if self.max_delay is None else due_after(datetime.fromisoformat(self.time), self.max_delay)


def due_after(time: datetime, max_delay: float) -> datetime:
    """
    The time after so many seconds.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there is no such date.
    """
    try:
        return time + timedelta(seconds=max_delay)
    except (OverflowError, ValueError) as error:
        raise ConfigError(
            f"`max_delay` must be a number of seconds that leads to a date, got {max_delay!r}. Leave it out to set no "
            "time."
        ) from error


class _Known:
    """What was read of the file: up to which byte, its last line, and what its lines say, oldest first."""

    def __init__(self, number: int = -1):
        self.number, self.end, self.lines, self.last = number, 0, 0, b""
        self.erasures: dict[str, RecordedErasure] = {}
        self.by_key: dict[str, str] = {}

    def take_in(self, path: Path, whole: bytes) -> None:
        """Take in more lines: all of them, or none where one cannot be understood."""
        lines = [_read(path, self.lines + n, line) for n, line in enumerate(whole.splitlines(), start=1)]
        names = set[str]()
        for number, line in enumerate(lines, start=self.lines + 1):
            if line["kind"] == "request":
                names.add(line["id"])
            elif line["id"] not in names and line["id"] not in self.erasures:
                raise FolderError(f"{path} line {number} goes on with a request that is not in it. {_ADVICE}")
        for line in lines:
            self._take_in(line)
        self.end, self.lines = self.end + len(whole), self.lines + len(lines)
        self.last = whole[whole.rfind(b"\n", 0, -1) + 1 :] or self.last

    def _take_in(self, line: Mapping[str, Any]) -> None:
        if line["kind"] == "request":
            erasure = _request(line)
            self.erasures[erasure.id] = erasure
            if erasure.key is not None:
                self.by_key.setdefault(erasure.key, erasure.id)
            return
        erasure = self.erasures[line["id"]]
        if line["kind"] == "waiting":
            self.erasures[erasure.id] = replace(erasure, waits=True)
        elif erasure.report is None:
            self.erasures[erasure.id] = replace(erasure, report=line["report"])


class ErasureBook:
    """
    The requests to erase that servers of a system took: a file of lines that only grows, read by its owner alone.

    A line is in it, and synced, before anything is done because of it; another one when it waits, and when it is done.
    What died between two of them is found out from ledger and waiting requests.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
    """

    def __init__(self, folder: SystemFolder):
        self.folder = folder
        self.path = folder.path / ERASURES_FILE
        self._known = _Known()
        self._reading = threading.RLock()
        self._taking = threading.Lock()

    @contextlib.contextmanager
    def taking(self) -> Iterator[None]:
        """
        Held from looking a request up until it is done: of two alike that come at once, here or in another process,
        the second finds what the first has done.

        Take it before any lock of the folder or of a model.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the folder cannot be written to.
        """
        with self._taking:
            lock = FileLock(self.folder.path / STAGES / ERASURES_LOCK_FILE, poll_interval=_POLL)
            with explained(f"{self.folder.path} cannot be changed", "Nothing was. Make it writable, then call again."):
                lock.acquire()
            try:
                yield
            finally:
                lock.release()

    def add(self, erasure: RecordedErasure) -> RecordedErasure:
        """
        Record a request and sync it.

        Args:
            erasure ([`RecordedErasure`]): The request. Name and time are drawn here.

        Returns:
            [`RecordedErasure`]: With both.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If its delay leads to no date.
            [`~hf_s3t.errors.FolderError`]: If it cannot be written, or a line of the book not be read.
        """
        time = datetime.now(UTC).isoformat(timespec="milliseconds")
        erasure = replace(erasure, id=f"era-{secrets.token_hex(12)}", time=time)
        # What leads to no date is refused before it is written.
        _ = erasure.apply_by
        said = {name: getattr(erasure, name) for name in _OF_REQUEST}
        self._append({"kind": "request", "id": erasure.id, "time": time, **said})
        return self._known.erasures[erasure.id]

    def note_waiting(self, erasure_id: str) -> RecordedErasure:
        """Note, and sync, that a request is among those that wait."""
        self._append({"kind": "waiting", "id": erasure_id})
        return self._known.erasures[erasure_id]

    def note_done(self, erasure_id: str, report: Mapping[str, Any]) -> RecordedErasure:
        """
        Note, and sync, what the deletion did. Of a request that is noted as done already, the first note holds.

        Args:
            erasure_id (`str`): The request.
            report (mapping): Numbers, names of stages and depths; nothing that names an example.
        """
        self._append({"kind": "done", "id": erasure_id, "report": dict(report)})
        return self._known.erasures[erasure_id]

    def find(self, erasure_id: str) -> RecordedErasure | None:
        """The request of a name; `None` if there is none."""
        return self._refreshed().erasures.get(erasure_id)

    def of_key(self, key: str) -> RecordedErasure | None:
        """The request that came with a key, by the key's digest; `None` if there is none."""
        known = self._refreshed()
        return known.erasures.get(known.by_key.get(key, ""))

    def latest(self, limit: int | None = None) -> list[RecordedErasure]:
        """So many requests, or all, the newest first."""
        with self._reading:
            return list(islice(reversed(self._refreshed().erasures.values()), limit))

    # The file

    def _append(self, line: Mapping[str, Any]) -> None:
        is_new = line["kind"] == "request"
        known_of = "Nothing was deleted because of this request" if is_new else "The ledger says what was deleted"
        advice = f"{known_of}. Make room, or make the folder writable, then repeat the request."
        with self.folder.writing(), self._reading, explained(f"{self.path} could not be written", advice):
            known = self._refreshed()
            with open(self.path, "ab", opener=_open_private) as file:
                # What a crash left of a line was never acknowledged.
                file.truncate(known.end)
                file.write(json.dumps({"version": _VERSION, **line}, separators=(",", ":")).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            # Also where the file was there: who made it may have died before this.
            sync(self.path.parent)
            self._read_on()

    def _refreshed(self) -> _Known:
        with self._reading:
            if self._read_on():
                # Whoever wrote a line may have died before syncing it: nothing is said by what a crash could undo.
                _sync_if_possible(self.path)
            return self._known

    def _read_on(self) -> bool:
        """Take in the lines that came since; returns whether there were any."""
        known = self._known
        try:
            with open(self.path, "rb") as file:
                status = os.fstat(file.fileno())
                is_same = status.st_ino == known.number and status.st_size >= known.end
                file.seek(known.end - len(known.last) if is_same else 0)
                read = file.read()
                # Another file may have the number of one that is gone.
                if not is_same or not read.startswith(known.last):
                    known = _Known(status.st_ino)
                    file.seek(0)
                    read = file.read()
        except FileNotFoundError:
            self._known = _Known()
            return False
        except OSError as error:
            raise unreadable(self.path, error) from error
        whole = read[len(known.last) : read.rfind(b"\n") + 1]
        known.take_in(self.path, whole)
        self._known = known
        return bool(whole)


_OF_REQUEST = ("key", "body", "ids", "earlier", "groups", "unknown", "unknown_groups", "max_delay")


def _request(line: Mapping[str, Any]) -> RecordedErasure:
    texts = {name: tuple(line[name]) for name in ("ids", "earlier", "groups")}
    return RecordedErasure(line["id"], line["time"], **{**{name: line[name] for name in _OF_REQUEST}, **texts})


def _read(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(line)
        if values["version"] != _VERSION:
            raise ValueError(f"its version is {values['version']!r}, this hf_s3t reads {_VERSION}: update hf_s3t")
        if values["kind"] not in _KINDS or not isinstance(values["id"], str):
            raise ValueError("it is no line of a request")
        if values["kind"] == "request":
            _check_request(values)
        elif values["kind"] == "done" and not isinstance(values["report"], dict):
            raise ValueError("its report is none")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FolderError(f"{path} line {number} cannot be read ({error}). {_ADVICE}") from error
    return values


def _check_request(values: Mapping[str, Any]) -> None:
    texts = [*values["ids"], *values["earlier"], *values["groups"], values["body"]]
    texts += [] if values["key"] is None else [values["key"]]
    numbers: Sequence[Any] = [values["unknown"], values["unknown_groups"]]
    delay = values["max_delay"]
    if not all(isinstance(text, str) for text in texts) or not all(type(number) is int for number in numbers):
        raise ValueError("its fields are not those of a request")
    # Times with and without a zone cannot be compared.
    if datetime.fromisoformat(values["time"]).tzinfo is None:
        raise ValueError("its time has no zone")
    if delay is not None:
        if isinstance(delay, bool) or not isinstance(delay, (int, float)):
            raise ValueError("its delay is no number of seconds")
        due_after(datetime.fromisoformat(values["time"]), delay)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _sync_if_possible(path: Path) -> None:
    # Where nothing can be written, nothing waits to be synced.
    with contextlib.suppress(OSError):
        sync(path)
        sync(path.parent)
