"""Workers as actors of Ray: how they come in, what they are told, and what becomes of those that die."""

import contextlib
import hashlib
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils import logging

from ..errors import ClusterError, ExampleIdError, S3TError, counted
from ..folder.files import write_atomically
from ..folder.layout import ADAPTER_FILE, LOCK_FILE, STAGES
from ..folder.secret import KEY_VARIABLE
from ..folder.system import SystemFolder
from ..plan.stages import StageKey
from ..records.request import some
from .agreement import Agreement, error_from, refuse_other_version
from .driving import MOST_ATTEMPTS, Outcome
from .parcels import pack_rows, pack_stage, pack_system, unpack_system
from .ray_cluster import actor_options, head_of, is_head_there
from .worker import Worker, nonce_beside


logger = logging.get_logger(__name__)

# Seconds between two looks at how far stages are, and at whether the head is there.
_A_MOMENT = 0.5
_BETWEEN_LOOKS = 5.0
# Looks in a row that find no head, until it is given up: Ray ends this process after a minute.
_LOOKS = 4
# Seconds that an actor may take for what needs no training.
_SHORT = 120.0
# Seconds after which it is said that workers are waited for.
_LONG = 60.0
_CALLS_AT_ONCE = 4


@dataclass
class Hired:
    """
    A worker, as the driver knows it.

    Args:
        number (`int`): Counted from 1, over all that there were.
        actor: Its handle.
        name (`str`): How messages call it.
        empty (`list`): The `(shard, slice)` of which it has nothing to train on.
        lacking (`list`): The ids that came since, and that its dataset lacks or has otherwise.
        has (`dict`): The stages in a folder of its own, with the digests of their adapters.
        stage ([`~hf_s3t.plan.stages.StageKey`], *optional*): What it trains.
        share (`float`): How much of that is done.
    """

    number: int
    actor: Any
    name: str
    empty: list[tuple[int, int]] = field(default_factory=list)
    lacking: list[int | str] = field(default_factory=list)
    has: dict[StageKey, str] = field(default_factory=dict)
    stage: StageKey | None = None
    share: float = 0.0


class Terms:
    """
    How workers come to the folder.

    Args:
        shared_folder (`bool`, *optional*): Whether they share it; `None` to find out.
        same_kind (`bool`): Whether workers on other hardware than recorded are refused.
    """

    def __init__(self, shared_folder: bool | None, same_kind: bool):
        self.is_shared = shared_folder
        self.is_asked = shared_folder is None
        self.same_kind = same_kind


class RayPool:
    """
    Workers as actors of Ray, one for each; those that die are replaced.

    Args:
        ray: The module.
        make_trainer (callable): Makes a trainer, where it is called.
        num_workers (`int`): How many there shall be.
        needs (mapping from `str` to `float`): What each takes of the cluster.
        terms ([`Terms`]): How they come to the folder.
        runtime_env (mapping, *optional*): As of Ray's actors: packages and variables that workers need.
    """

    def __init__(
        self,
        ray: Any,
        make_trainer: Callable[[], Any],
        num_workers: int,
        needs: Mapping[str, float],
        terms: Terms,
        runtime_env: Mapping[str, Any] | None = None,
    ):
        self._ray = ray
        self._options = {
            **actor_options(needs),
            **({"runtime_env": dict(runtime_env)} if runtime_env else {}),
            "max_concurrency": _CALLS_AT_ONCE,
            "max_restarts": 0,
        }
        self._make_trainer = ray.put(make_trainer)
        self._num_workers = num_workers
        self._terms = terms
        self._agreement: Agreement | None = None
        # All that were hired, and those that train.
        self._actors: list[Any] = []
        self._hired: list[Hired] = []
        self._count = 0
        # Calls that are under way, with whose they are.
        self._working: dict[Any, Hired] = {}
        self._coming: dict[Any, tuple[Hired, str]] = {}
        self._asked: dict[Any, Hired] = {}
        # Those that wait for another to make the system.
        self._waiting: list[Hired] = []
        self._failed_to_come: Counter[str] = Counter()
        self._folder: SystemFolder | None = None
        # Where the system is to be, and whether the folder was made for it here.
        self._path, self._made = Path(), False
        self._statement: Mapping[str, Any] = {}
        self._head = head_of(ray)
        self._looked_at, self._lost_looks = time.monotonic(), 0
        self.is_shown = False

    # The system

    @property
    def folder(self) -> SystemFolder:
        """The system's folder, as the driver sees it."""
        if self._folder is None:
            raise ClusterError("No worker is there yet, and only workers know the folder. Have them come in first.")
        return self._folder

    @property
    def is_shared(self) -> bool:
        """Whether workers share the folder."""
        return bool(self._terms.is_shared)

    def empty(self) -> list[tuple[int, int]]:
        """The `(shard, slice)` of which nothing is left to train on, as the workers know them."""
        lists = [hired.empty for hired in self._hired]
        return sorted(set().union(*map(set, lists))) if lists else []

    # Coming in

    def come_in(self) -> None:
        """
        Have all workers come in, and agree, before anything is trained.

        Raises:
            [`~hf_s3t.errors.S3TError`]: If one cannot train the system's stages.
        """
        for _ in range(self._num_workers):
            self._hire()
        started = said = time.monotonic()
        while len(self._hired) < self._num_workers:
            self._look_at_head()
            self._let_in()
            if time.monotonic() - said > _LONG:
                said = time.monotonic()
                logger.warning(
                    f"{len(self._hired)} of {counted(self._num_workers, 'worker')} are there after "
                    f"{said - started:.0f} s. The others wait for room in the cluster, or load base and data."
                )

    def _let_in_if_possible(self) -> None:
        """Go on with workers that come in the place of dead ones: one that is refused costs the others nothing."""
        try:
            self._let_in()
        except S3TError as refused:
            if not self._hired:
                raise
            logger.warning(f"{refused} The others go on without it.")

    def _hire(self) -> None:
        self._count += 1
        actor = self._ray.remote(**self._options)(Worker).remote(os.getcwd(), os.environ.get(KEY_VARIABLE))
        self._actors.append(actor)
        hired = Hired(self._count, actor, f"Worker {self._count}")
        self._coming[actor.greet.remote()] = hired, "greet"

    def _let_in(self) -> None:
        """Go on with workers that are coming in; the first one makes a system that no other can have."""
        if not self._coming:
            return
        done, _ = self._ray.wait(list(self._coming), timeout=0 if self._working else _A_MOMENT)
        for call in done:
            hired, step = self._coming.pop(call)
            try:
                told = self._answer(call)
            except _Died as died:
                self._missing(hired, step, str(died))
                continue
            if "error" in told:
                raise error_from(hired.name, told)
            getattr(self, f"_after_{step}")(hired, told)

    def _missing(self, hired: Hired, step: str, why: str) -> None:
        """A worker died before it had trained anything."""
        self._wait_for_head()
        self._failed_to_come[step] += 1
        if self._failed_to_come[step] >= MOST_ATTEMPTS:
            raise ClusterError(
                f"{counted(self._failed_to_come[step], 'worker')} died before they could train, the last one, "
                f"{hired.name}: {why} Nothing was trained with it. See that hf_s3t and what `make_trainer` needs are "
                "installed on every machine, and that base and data fit into its memory."
            )
        logger.warning(f"{hired.name} died before it could train, and another one comes in its place: {why}")
        self._hire()

    def _after_greet(self, hired: Hired, told: Mapping[str, Any]) -> None:
        hired.name = f"Worker {hired.number} ({told['host']}, process {told['pid']})"
        refuse_other_version(hired.name, told)
        self._coming[hired.actor.begin.remote(self._make_trainer)] = hired, "begin"

    def _after_begin(self, hired: Hired, told: Mapping[str, Any]) -> None:
        path = Path(told["output_dir"]).absolute()
        if self._folder is not None and path != self._folder.path:
            raise ClusterError(
                f"{hired.name} has `output_dir={told['output_dir']!r}`, expected {self._folder.path} as the others. "
                "Have `make_trainer` name one folder."
            )
        self._path = path
        self._settle_sharing(hired, path)
        if self._folder is None and SystemFolder.exists(path):
            self._know(SystemFolder(path))
        if self._folder is None and any(step == "make" for _, step in self._coming.values()):
            # One of them makes the system, the others go on with that.
            self._waiting.append(hired)
            return
        self._have_make(hired)

    def _have_make(self, hired: Hired) -> None:
        """Have a worker make its trainer, on the system that is there, or that it makes."""
        system = None
        if not self.is_shared and self._folder is not None:
            system = self._ray.put(dict(pack_system(self._folder)))
        threads = self._agreement.threads if self._agreement is not None else None
        call = hired.actor.make.remote(str(self._path) if self.is_shared else None, system, threads)
        self._coming[call] = hired, "make"

    def _settle_sharing(self, hired: Hired, path: Path) -> None:
        """Find out whether a worker sees the folder, by what is put there for a moment."""
        if self._terms.is_shared is False and not self._terms.is_asked:
            return
        self._made |= not path.exists()
        nonce = uuid.uuid4().hex
        file = nonce_beside(path, nonce)
        # Under the lock nobody takes it for what a crash left.
        with SystemFolder.making(path):
            write_atomically(file, nonce.encode())
            try:
                sees = bool(self._answer(hired.actor.sees.remote(str(file), nonce)))
            except _Died as died:
                raise ClusterError(f"{hired.name} died before it could train: {died} Call again.") from None
            finally:
                file.unlink(missing_ok=True)
        if self._terms.is_shared is None:
            self._terms.is_shared = sees
        if sees != self._terms.is_shared:
            others = "other workers" if self._terms.is_asked else "`shared_folder=True` says that all"
            raise ClusterError(
                f"{hired.name} {'sees' if sees else 'does not see'} the folder {path} that is here, and {others} "
                f"{'do not' if sees else 'do'}. Mount it under this name on every machine, or give "
                "`shared_folder=False`: then stages come back over the network."
            )

    def _after_make(self, hired: Hired, told: Mapping[str, Any]) -> None:
        if self._folder is None:
            if "system" in told:
                unpack_system(told["system"], self._path)
            self._know(SystemFolder(self._path))
        if self._agreement is not None:
            self._agreement.check(hired.name, told)
        if told["folder"]["system_id"] != self.folder.record["system_id"]:
            raise ClusterError(
                f"{hired.name} works on another system than {self.folder.path} holds here. Mount one folder on every "
                "machine, or give `shared_folder=False`."
            )
        hired.empty = [(shard, slice_) for shard, slice_ in told["empty"]]
        self._statement = told
        self.is_shown |= told["shows"]
        self._failed_to_come.clear()
        self._hired.append(hired)
        if told["folder"]["lines"] != len(self.folder.ledger.lines):
            # Something was deleted while it came in.
            self.tell()

    def _know(self, folder: SystemFolder) -> None:
        self._folder = folder
        self._agreement = Agreement(folder.valid_records.values(), self._terms.same_kind)
        for hired in self._waiting:
            self._have_make(hired)
        self._waiting = []

    # Work

    @property
    def free(self) -> int:
        """How many workers wait for a stage."""
        return sum(hired.stage is None for hired in self._hired)

    def start(self, key: StageKey) -> str:
        """Have a worker train a stage: of those that wait, one that has what it stands on; tells which."""
        hired = max(
            (hired for hired in self._hired if hired.stage is None),
            key=lambda hired: (len(set(key.lineage) & set(hired.has)), -hired.number),
        )
        call = self._begin(hired, key)
        hired.stage, hired.share = key, 0.0
        self._working[call] = hired
        return hired.name

    def _begin(self, hired: Hired, key: StageKey) -> Any:
        names, parcels = self._lacking(hired, [key])
        return hired.actor.train.remote(key.path, names, *parcels)

    def _lacking(self, hired: Hired, keys: Sequence[StageKey], whole: bool = False) -> tuple[list[str], list[Any]]:
        """What a worker lacks of what stages stand on (or, whole, of them too), as paths and parcels."""
        if self.is_shared:
            return [], []
        names, parcels = list[str](), list[Any]()
        chains = (key.lineage if whole else key.lineage[:-1] for key in keys)
        for key in sorted({stage for chain in chains for stage in chain}):
            digest = self.folder.adapter_digest(key)
            if hired.has.get(key) != digest:
                names.append(key.path)
                parcels.append(self._ray.put(dict(pack_stage(self.folder, key))))
                hired.has[key] = digest
        return names, parcels

    def outcomes(self) -> list[Outcome]:
        """What ended since; waits a moment for it. Dead workers are replaced meanwhile."""
        self._look_at_head()
        self._let_in_if_possible()
        found = []
        done, _ = self._ray.wait(list(self._working), timeout=_A_MOMENT) if self._working else ([], [])
        if not self._working and not self._coming:
            time.sleep(_A_MOMENT)
        for call in done:
            hired = self._working.pop(call)
            found.append(self._outcome(hired, call))
        self._ask_for_shares()
        return found

    def _outcome(self, hired: Hired, call: Any) -> Outcome:
        key = hired.stage
        if key is None:
            raise ClusterError(f"{hired.name} told of a stage that it was not given. Call again.")
        hired.stage = None
        try:
            told = self._answer(call)
        except _Died as died:
            self._wait_for_head()
            self._dismiss(hired)
            self._hire()
            return Outcome(key, hired.name, died=str(died))
        if "error" in told:
            return Outcome(key, hired.name, error=error_from(hired.name, told))
        if "files" in told:
            # It stays in the worker's own folder too.
            hired.has[key] = hashlib.sha256(told["files"][ADAPTER_FILE]).hexdigest()
        return Outcome(key, hired.name, result=told)

    def _dismiss(self, hired: Hired) -> None:
        self._hired = [one for one in self._hired if one is not hired]
        # One that cannot be reached may be alive, and must not be heard of again.
        self._ray.kill(hired.actor)

    def tell(self) -> None:
        """Have every worker know what was deleted."""
        told = (None, None) if self.is_shared else (self.folder.ledger.text, pack_rows(self.folder))
        calls = {hired.actor.follow.remote(*told): hired for hired in self._hired}
        for call, hired in calls.items():
            try:
                found = self._answer(call)
            except _Died:
                # What it trained is told of where its stage is waited for.
                continue
            if "error" in found:
                raise error_from(hired.name, found)
            hired.empty = [(shard, slice_) for shard, slice_ in found["empty"]]
            hired.lacking = found["lacking"]

    def refuse_rows_that_came(self) -> None:
        """
        Say that rows came that no worker could train on.

        Raises:
            [`~hf_s3t.errors.ExampleIdError`]: With some of them.
        """
        came = list(dict.fromkeys(one for hired in self._hired for one in hired.lacking))
        if came:
            raise ExampleIdError(
                f"{counted(len(came), 'example')} came to {self.folder.path} that the dataset of the workers lacks, "
                f"or has as they were before ({some(came)}): another process added or replaced them. What was trained "
                "stays. Have `make_trainer` give the whole dataset as it is now, and call again."
            )

    def shares(self) -> dict[StageKey, float]:
        """What share is done of each stage that is trained."""
        return {hired.stage: hired.share for hired in self._hired if hired.stage is not None}

    def _ask_for_shares(self) -> None:
        """Asked in passing: no answer is waited for."""
        asked = list(self._asked)
        for call in self._ray.wait(asked, num_returns=len(asked), timeout=0)[0] if asked else ():
            hired = self._asked.pop(call)
            try:
                hired.share = self._answer(call)
            except _Died:
                continue
        waited_for = {id(hired) for hired in self._asked.values()}
        for hired in self._hired:
            if hired.stage is not None and id(hired) not in waited_for:
                self._asked[hired.actor.share.remote()] = hired

    # The end

    def push(self) -> None:
        """Have a worker that shares the folder bring the system to the Hub, if its arguments say so."""
        if self._statement.get("pushes") and self.is_shared and self._hired:
            told = self._ray.get(self._hired[0].actor.push.remote())
            if "error" in told:
                raise error_from(self._hired[0].name, told)
        elif self._statement.get("pushes"):
            logger.warning(
                "The system is not pushed: workers without a shared folder do not have all of it. Push it from here, "
                "by `hf-s3t push`."
            )

    def close(self) -> None:
        """Let every worker go."""
        # Without a head nobody can be told, and Ray would wait for it; its workers end by themselves.
        if is_head_there(self._head):
            calls = [hired.actor.close.remote() for hired in self._hired if hired.stage is None]
            if calls:
                self._ray.wait(calls, num_returns=len(calls), timeout=_SHORT / 10)
            for actor in self._actors:
                self._ray.kill(actor)
        if self._made and self._folder is None:
            # Nothing came of it, so nothing is left.
            with contextlib.suppress(OSError):
                (self._path / STAGES / LOCK_FILE).unlink(missing_ok=True)
                (self._path / STAGES).rmdir()
                self._path.rmdir()

    # Ray

    def _answer(self, call: Any) -> Any:
        """What an actor returned; what happens to actors is told as [`_Died`], and nothing else."""
        exceptions = self._ray.exceptions
        try:
            return self._ray.get(call, timeout=_SHORT)
        except exceptions.GetTimeoutError:
            raise _Died(f"it did not answer for {_SHORT:g} s.") from None
        except exceptions.RayTaskError as error:
            cause = str(error).strip().splitlines()[-1]
            raise ClusterError(
                f"A worker could not do what it was told: {cause}. Have what `make_trainer` names be importable on "
                "every machine, by `runtime_env` if need be; the logs of Ray have more."
            ) from error
        except exceptions.RayError as error:
            raise _Died(_first_sentence(error)) from None

    def _look_at_head(self) -> None:
        now = time.monotonic()
        if now - self._looked_at < _BETWEEN_LOOKS:
            return
        self._looked_at = now
        self._look_once()

    def _wait_for_head(self) -> None:
        """Before what Ray does by its head, for which it would wait until it ends this process."""
        while not self._look_once():
            time.sleep(_BETWEEN_LOOKS)

    def _look_once(self) -> bool:
        """Whether the head is there; a lost one is given up after some looks."""
        is_there = is_head_there(self._head)
        self._lost_looks = 0 if is_there else self._lost_looks + 1
        if self._lost_looks >= _LOOKS:
            raise ClusterError(
                f"The head of the Ray cluster at {self._head} does not answer any more. The stages that were finished "
                "are in the folder. Start the cluster again, and call again: only what is missing is trained."
            )
        return is_there


class _Died(S3TError):
    """A worker that is not there any more."""


def _first_sentence(error: Exception) -> str:
    """What an error of Ray says: its first line and, of a traceback, what was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    raised = lines[-1] if len(lines) > 1 and "Error" in lines[-1].partition(":")[0] else ""
    return " ".join(filter(None, (lines[0], raised))).rstrip(".:,") + "."
