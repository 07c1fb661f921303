"""
Claims: which trainer has which stage in hand, so that any number of them share what is missing.

A claim is a file whose name says the stage and a random token. Its holder writes to it now and then, and nobody else
does; who takes a stage over removes the file, so that the holder's next look at its own file tells that it is lost.
"""

import contextlib
import errno
import json
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..config import S3TConfig
from ..errors import FolderError
from ..plan.stages import StageKey, is_stage_of
from ..records.validity import is_current
from .files import explained, make_folders, unreadable, write_atomically
from .layout import CLAIMS, STAGES
from .processes import is_gone, this_process
from .scratch import names_in


# Seconds without a sign of life after which a claim has ended, and how many signs there are in that time.
LEASE = 60.0
_BEATS = 6
# No holder asks for longer: who edits the file would keep a stage for ever.
_LONGEST_LEASE = 7 * 24 * 3600.0
_NAME = re.compile(r"(?P<shard>shard-[0-9]+)\.(?P<prefix>[0-9]+(?:-[0-9]+)*)\.(?P<token>[0-9a-f]{16})")
_BEAT = "%020d\n"
# What opening a file says that was removed, by another machine, too.
_GONE = (errno.ENOENT, errno.ESTALE)
# The threads of this process that hold claims, by their tokens.
_HOLDERS: dict[str, int] = {}


class ClaimLostError(FolderError):
    """Another trainer has taken the stage over."""


def claimed_by(name: str) -> StageKey | None:
    """The stage that a file of this name claims; `None` if it is no claim."""
    match = _NAME.fullmatch(name)
    if match is not None:
        with contextlib.suppress(FolderError):
            return StageKey.from_path(f"{STAGES}/{match['shard']}/{match['prefix']}")
    return None


@dataclass(frozen=True)
class Claim:
    """
    A claim, as one look at its file found it.

    Args:
        key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
        token (`str`): What tells this claim from all others.
        path (`Path`): Its file.
        data (`bytes`): What is in it, by which the next look tells whether its holder wrote to it since.
        said (mapping): What its holder says of itself and its work; empty where that cannot be read.
    """

    key: StageKey
    token: str
    path: Path
    data: bytes
    said: Mapping[str, Any]

    @property
    def lease(self) -> float:
        """Seconds without a sign of life after which it has ended."""
        lease = self.said.get("lease")
        if isinstance(lease, bool) or not isinstance(lease, (int, float)) or not 0 < lease <= _LONGEST_LEASE:
            return LEASE
        return float(lease)

    @property
    def holder(self) -> str:
        """Who holds it, for people."""
        host, process = self.said.get("host"), self.said.get("process")
        return "an unknown worker" if host is None else f"process {process} on {host}"

    @property
    def is_of_this_thread(self) -> bool:
        """Whether who asks would wait for itself."""
        return _HOLDERS.get(self.token) == threading.get_ident()


class HeldClaim:
    """
    A claim that this process holds.

    Args:
        claims ([`Claims`]): Those of the folder.
        key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
        token (`str`): The token.
        head (`int`): How many bytes of the file say who holds it; a sign of life comes after them.
        lease (`float`): Seconds without a sign of life after which it ends.
    """

    def __init__(self, claims: "Claims", key: StageKey, token: str, head: int, lease: float):
        self.key, self.token = key, token
        self.path = claims.file_of(key, token)
        self._claims = claims
        self._head, self._lease = head, lease
        self._beats = 0
        self._lost, self._ended = threading.Event(), threading.Event()

    @property
    def is_lost(self) -> bool:
        """Whether a look at the file has found it gone."""
        return self._lost.is_set()

    def is_held(self) -> bool:
        """
        Look whether it is still there. Only under the folder's lock this stays so for a moment.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If another one has it too.
        """
        if self._lost.is_set():
            return False
        try:
            # Opening asks the server of a network's file system; a look at the name may be answered from memory.
            with open(self.path, "rb"):
                pass
        except OSError as error:
            if error.errno not in _GONE:
                raise unreadable(self.path, error) from error
            self._lost.set()
            return False
        self._claims.refuse_another(self)
        return True

    def beat(self) -> None:
        """Give a sign of life."""
        self._beats += 1
        try:
            # It is never made anew: whoever removed it has taken the stage.
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(self._head)
                file.write((_BEAT % self._beats).encode())
        except OSError as error:
            # A disk that is full or a server that is away may come back before the lease ends.
            if error.errno in _GONE:
                self._lost.set()

    @contextlib.contextmanager
    def beating(self) -> Iterator[None]:
        """Give signs of life from a thread of its own meanwhile, and end the claim afterwards."""
        _HOLDERS[self.token] = threading.get_ident()
        thread = threading.Thread(target=self._go_on_beating, name=f"claim of {self.key}", daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._ended.set()
            thread.join()
            _HOLDERS.pop(self.token, None)
            self.end()

    def _go_on_beating(self) -> None:
        while not self._ended.wait(self._lease / _BEATS) and not self._lost.is_set():
            self.beat()

    def end(self) -> None:
        """Hold it no more."""
        self._ended.set()
        with contextlib.suppress(OSError):
            self.path.unlink()


class Claims:
    """
    The claims in a system's folder.

    Args:
        path (`Path`): The folder of the system.
        config ([`~hf_s3t.S3TConfig`]): Its settings: claims of stages that it cannot have are passed over.
        by_sets (`bool`): Whether a stage counts by its set of slices, in whatever order.
    """

    def __init__(self, path: Path, config: S3TConfig, by_sets: bool):
        self._path = path / CLAIMS
        self._config = config
        self._by_sets = by_sets
        self._known: dict[str, Claim] = {}

    def file_of(self, key: StageKey, token: str) -> Path:
        """Where a claim lies."""
        shard, _, prefix = str(key).partition("/")
        return self._path / f"{shard}.{prefix}.{token}"

    def keys(self) -> list[StageKey]:
        """The stages that are claimed, by one look at the folder."""
        return sorted({key for key, _ in self._names()})

    def names(self) -> list[str]:
        """The names of the files of claims."""
        return [self.file_of(key, token).name for key, token in self._names()]

    def look(self) -> list[Claim]:
        """Read all claims."""
        found = [claim for key, token in self._names() if (claim := self._read(key, token)) is not None]
        self._known = {claim.token: claim for claim in found}
        return found

    def standing(self) -> list[Claim]:
        """All claims, as they were read first: what they say does not change, only their signs of life do."""
        known, self._known = self._known, {}
        for key, token in self._names():
            claim = known.get(token) or self._read(key, token)
            if claim is not None:
                self._known[token] = claim
        return list(self._known.values())

    def take(self, key: StageKey, work: Mapping[str, Any], lease: float = LEASE) -> HeldClaim | None:
        """
        Claim a stage; the folder's lock must be held.

        Args:
            key ([`~hf_s3t.plan.stages.StageKey`]): The stage.
            work (mapping): What the claim shall say of how it is trained: `slices`, the digests of what it is trained
                on, and what others compare with their own.
            lease (`float`): Seconds without a sign of life after which it ends.

        Returns:
            [`HeldClaim`]: The claim; `None` if somebody has it. Enter `beating()` of it at once.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If it cannot be written.
        """
        if any(self._is_same(key, other) for other in self.keys()):
            return None
        token = secrets.token_hex(8)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        said = {**work, **this_process(), "stage": str(key), "lease": lease, "since": since}
        head = json.dumps(said).encode() + b"\n"
        with explained(f"{key} could not be claimed in {self._path}", "Make room, or make it writable; call again."):
            make_folders(self._path)
            # Who lost it in a crash has ended, too.
            write_atomically(self.file_of(key, token), head + (_BEAT % 0).encode(), synced=False)
        return HeldClaim(self, key, token, len(head), lease)

    def end_stale(self, slices_of: Callable[[StageKey], Sequence[str]], is_there: Callable[[StageKey], bool]) -> None:
        """End the claims that are `stale`, whoever holds them; the folder's lock must be held."""
        for claim in self.stale(slices_of, is_there):
            with contextlib.suppress(FileNotFoundError):
                claim.path.unlink()

    def end(self, claim: Claim) -> bool:
        """
        End a claim whose holder is taken for dead, unless it lives as is seen now; the folder's lock must be held.

        Returns:
            `bool`: Whether it has ended.
        """
        now = self._read(claim.key, claim.token)
        if now is not None and now.data != claim.data:
            return False
        with contextlib.suppress(FileNotFoundError):
            claim.path.unlink()
        return True

    def stale(
        self, slices_of: Callable[[StageKey], Sequence[str]], is_there: Callable[[StageKey], bool]
    ) -> list[Claim]:
        """
        Claims of stages that a deletion reached since they were begun, and of stages that are there.

        Args:
            slices_of (callable): From a stage to the digests of its slices as they are now.
            is_there (callable): Whether a stage needs no training.
        """

        def is_stale(claim: Claim) -> bool:
            is_hit = "slices" in claim.said and not is_current(claim.said, slices_of(claim.key))
            return is_hit or is_there(claim.key)

        return list(filter(is_stale, self.standing()))

    def refuse_another(self, held: HeldClaim) -> None:
        """
        Raise [`~hf_s3t.errors.FolderError`] if a stage has two claims: the folder's lock keeps nobody out.

        Args:
            held ([`HeldClaim`]): One of them.
        """
        for key, token in self._names():
            if token != held.token and self._is_same(key, held.key):
                other = self._read(key, token)
                by = "somebody" if other is None else other.holder
                raise FolderError(
                    f"{held.key} is claimed twice in {self._path}, also by {by}: a lock that one of the two "
                    "machines takes does not keep the other out. Mount the folder with locks that hold across "
                    "machines (NFS: without `nolock` and `local_lock`), then call again. Nothing was written."
                )

    def tidy(self) -> None:
        """Remove the folder of claims where none is left; the folder's lock must be held."""
        with contextlib.suppress(OSError):
            self._path.rmdir()

    def _is_same(self, one: StageKey, other: StageKey) -> bool:
        return one.slices == other.slices if self._by_sets else one == other

    def _names(self) -> list[tuple[StageKey, str]]:
        named = ((claimed_by(name), name.rpartition(".")[2]) for name in names_in(self._path))
        return [(key, token) for key, token in named if key is not None and is_stage_of(key, self._config)]

    def _read(self, key: StageKey, token: str) -> Claim | None:
        """A claim; `None` if it has ended meanwhile."""
        path = self.file_of(key, token)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError:
            # Nobody can say what is in it, so it is judged by its silence.
            data = b""
        said: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            said = json.loads(data.partition(b"\n")[0])
        return Claim(key, token, path, data, said if isinstance(said, dict) else {})


class ClaimWatch:
    """
    Judges which claims are of trainers that have ended.

    A claim is over if its process was on this machine and is gone, or if this watcher itself, by its own clock, has
    seen no change of the claim for its lease. No time that another machine wrote is compared with one of this machine.

    Args:
        claims ([`Claims`]): The claims.
        clock (callable): Seconds, from wherever, that only grow.
    """

    def __init__(self, claims: Claims, clock: Callable[[], float] = time.monotonic):
        self._claims = claims
        self._clock = clock
        # By token: what the file held when it was found changed, and when that was.
        self._seen: dict[str, tuple[bytes, float]] = {}

    def look(self) -> list[tuple[Claim, float]]:
        """All claims, each with the seconds for which it is known to be silent."""
        found = self._claims.look()
        now = self._clock()
        seen: dict[str, tuple[bytes, float]] = {}
        for claim in found:
            data, since = self._seen.get(claim.token, (None, now))
            seen[claim.token] = (claim.data, since if data == claim.data else now)
        self._seen = seen
        return [(claim, now - seen[claim.token][1]) for claim in found]

    def dead(self) -> list[Claim]:
        """The claims that are over. End them under the folder's lock, by `Claims.end`."""
        return [claim for claim, silent in self.look() if silent >= claim.lease or is_gone(claim.said)]
