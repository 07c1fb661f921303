"""`/v1/erasures`: examples are forgotten while others are answered, and each request is one however often it comes."""

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Header, Path, Query, Response

from ..errors import S3TError
from ..folder.erasure_requests_file import ErasureBook, RecordedErasure
from ..folder.files import stamp
from ..folder.layout import PENDING_FILE
from ..folder.stage_record import adapter_of
from ..folder.system import SystemFolder
from ..model.following import PATIENCE
from ..operations.deletion import DeletionPreview, preview
from ..operations.erasures import envelopes_of, receipts_of, record_erasure, states_of
from ..operations.written_ids import groups_from_texts, ids_from_texts
from ..plan.stages import StageKey
from ..records.naming import find_ids, resolve_names
from ..records.report import UnlearningReport
from ..records.request import DeletionRequest
from .access import requires
from .erasure_schemas import (
    Erasure,
    ErasureList,
    ErasurePreview,
    ErasureRequest,
    ExampleFound,
    ExampleList,
    Name,
)
from .keys import Scope
from .problems import PROBLEMS, RETRY_SOON, Problem
from .service import Service


logger = logging.getLogger(__name__)
T = TypeVar("T")

RepeatKey = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="Whatever the client likes. A request that comes again with its key is the same request.",
    ),
]
# Seconds between two looks at requests that wait, which other processes record too.
_BETWEEN_LOOKS = 1.0
# Seconds for what is computed and not sent yet, where nobody waits for what is not.
_HANDING_OUT = 1.0
_NOTED = ("stages_removed", "depths_before", "depths_after", "is_exhausted", "seconds")


@dataclass(frozen=True)
class _Request(DeletionRequest):
    """A request whose ids and groups may be gone over more than once."""

    ids: list[int | str] = field(default_factory=list)
    groups: list[int | str] = field(default_factory=list)


@dataclass(frozen=True)
class Taken:
    """
    A request that was carried out.

    Args:
        told ([`~hf_s3t.server.erasure_schemas.Erasure`]): What became of it.
        patience (`float`, *optional*):
            Seconds to wait for answers on their way out that may have been computed before; `None` if there is none.
        cuts (`bool`, defaults to `True`): Whether those that take longer end with an error.
    """

    told: Erasure
    patience: float | None = None
    cuts: bool = True


class Erasures:
    """
    The requests to erase that a server takes.

    Each goes this way: it is checked; it stands in the book, synced; it is carried out; that is noted, synced; it is
    answered. Whoever repeats it with its key after any of these gets on from there.

    Args:
        service ([`~hf_s3t.server.service.Service`]): What is served.
    """

    def __init__(self, service: Service):
        self._service = service
        self.book = ErasureBook(service.model.folder)
        self._running = set[str]()
        self._lock = threading.Lock()
        self._asked = 0
        # One after the other, as the model forgets; questions are answered meanwhile.
        self._taking, self._looking = CapacityLimiter(1), CapacityLimiter(4)
        self._is_over = threading.Event()

    @property
    def _folder(self) -> SystemFolder:
        return self._service.model.folder

    # What others record

    def start(self) -> None:
        """Apply in time what other processes record to be erased later, also those that are gone by then."""
        self._is_over.clear()
        threading.Thread(target=self._watch, name="hf-s3t-waiting-erasures", daemon=True).start()

    def stop(self) -> None:
        """Look no more."""
        self._is_over.set()

    def _watch(self) -> None:
        model, seen = self._service.model, None
        while not self._is_over.wait(_BETWEEN_LOOKS):
            # In this order: what comes meanwhile is news again.
            found = stamp(self._folder.path / PENDING_FILE)
            if found == seen:
                continue
            seen = found
            try:
                with model._deletion_lock:
                    model._apply_in_time()
            except (S3TError, OSError) as error:
                logger.error(error)

    # From the event loop

    async def erase(self, wanted: ErasureRequest, key: str | None) -> Erasure:
        """
        Carry a request out, or what is left of it.

        Args:
            wanted ([`~hf_s3t.server.erasure_schemas.ErasureRequest`]): What to forget.
            key (`str`, *optional*): What the client repeats the request by.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: 422 if the key came with another request, 429 if too many wait.
        """
        if self._asked >= self._service.settings.max_queue:
            raise Problem(
                429,
                f"{self._asked} requests to erase wait already. Ask again in a moment.",
                "queue_full",
                headers={"Retry-After": str(RETRY_SOON)},
            )
        self._asked += 1
        try:
            # A client that goes away does not stop it.
            taken = await to_thread.run_sync(self.take, wanted, key, limiter=self._taking)
            if taken.patience is not None:
                # What was computed before has left the server when this is acknowledged.
                await self._service.answers.settled(taken.patience, taken.cuts)
            return taken.told
        finally:
            self._asked -= 1

    async def look(self, question: Callable[..., T], *args: Any) -> T:
        """Answer a question that reads the folder, beside the event loop."""
        return await to_thread.run_sync(question, *args, limiter=self._looking)

    # Carrying out

    def take(self, wanted: ErasureRequest, key: str | None = None) -> "Taken":
        """What `erase` does, in a thread, but for answers on their way out; arguments as there."""
        names = self._folder.key
        body, repeat_key = names.of_erasure(wanted.canonical()), None if key is None else names.of_repeat_key(key)
        with self.book.taking():
            erasure = None if repeat_key is None else self.book.of_key(repeat_key)
            if erasure is not None and erasure.body != body:
                raise Problem(
                    422,
                    "This `Idempotency-Key` came with another request before. Give each request a key of its own.",
                    "idempotency_key_reused",
                    "Idempotency-Key",
                )
            request = self._request(wanted)
            if erasure is None:
                erasure = record_erasure(self.book, request, body, repeat_key, wanted.max_delay)
            with self._lock:
                self._running.add(erasure.id)
            try:
                return self._carry_out(erasure, request, wanted.on_running or self._service.settings.on_running)
            finally:
                with self._lock:
                    self._running.discard(erasure.id)

    def _carry_out(self, erasure: RecordedErasure, request: "_Request", on_running: str) -> "Taken":
        model = self._service.model
        if erasure.max_delay is not None:
            told = self._hand_over(erasure, request)
            if told.status != "done":
                return Taken(told)
            # Whoever applied it may not be through, or have died before that.
            model.unlearn(request.ids, groups=request.groups, missing="ignore", on_running=on_running)
            return Taken(told, PATIENCE)
        if erasure.report is not None and states_of(self._folder, [erasure]) == ["done"]:
            # What it stopped may still be on its way out, where it is repeated a moment later.
            return Taken(self._told(erasure), PATIENCE)
        serving = _serving(self._folder)
        # Also where the ledger has it already: whoever wrote it there may have died before the stages went.
        report = model.unlearn(
            request.ids,
            groups=request.groups,
            missing=request.missing,
            include_duplicates=request.include_duplicates,
            on_running=on_running,
        )
        self._service.metrics.erasure(report.deleted, report.seconds)
        engine = None if self._service.engine is None else self._service.engine.receipt()
        erasure = self.book.note_done(erasure.id, self._noted(erasure, report, engine))
        # Of what an earlier attempt deleted the content is not known any more.
        told = self._told(erasure, duplicates=report.duplicates if report.deleted or not erasure.ids else None)
        if not told.stages_removed:
            return Taken(told)
        if serving.isdisjoint(told.stages_removed):
            # They may have served until something better was grown: what they gave is on its way out at most.
            return Taken(told, _HANDING_OUT, cuts=False)
        return Taken(told, PATIENCE if on_running == "wait" else _HANDING_OUT)

    def _hand_over(self, erasure: RecordedErasure, request: "_Request") -> Erasure:
        (state,) = states_of(self._folder, [erasure])
        if state == "interrupted":
            self._service.model.unlearn_later(
                request.ids, groups=request.groups, missing=request.missing, max_delay=_left_until(erasure.apply_by)
            )
            erasure = self.book.note_waiting(erasure.id)
        return self._told(erasure)

    def _noted(
        self, erasure: RecordedErasure, report: UnlearningReport, engine: dict[str, Any] | None
    ) -> dict[str, Any]:
        said = {name: getattr(report, name) for name in _NOTED}
        # Of what an earlier attempt had in the ledger already, the ledger tells which stages it took.
        stages = {*report.stages_removed, *(() if report.deleted else self._stages_removed(erasure))}
        return {**said, "stages_removed": sorted(stages), **({} if engine is None else {"engine": engine})}

    def _stages_removed(self, erasure: RecordedErasure) -> set[str]:
        ids = set(erasure.ids)
        entries = (receipt.entry for receipt in receipts_of(self._folder, erasure))
        return {stage for entry in entries if ids.intersection(entry.ids) for stage in entry.removed}

    def _request(self, wanted: ErasureRequest) -> "_Request":
        self._folder.refresh_ledger()
        return _Request(
            ids_from_texts(self._folder, _texts(wanted.ids)),
            groups_from_texts(self._folder, _texts(wanted.groups)),
            wanted.missing,
            wanted.include_duplicates,
        )

    # Telling

    def _told(
        self,
        erasure: RecordedErasure,
        state: str | None = None,
        duplicates: Sequence[Name] | None = None,
        is_whole: bool = True,
    ) -> Erasure:
        """What is told of a request: what was noted, and of what was not, what ledger and folder say."""
        folder = self._folder
        state = state or states_of(folder, [erasure])[0]
        report = erasure.report or {}
        is_done, due = state == "done", erasure.apply_by
        known = {name: report[name] for name in (*_NOTED, "engine") if name in report}
        if is_done and not report:
            known = {
                "stages_removed": sorted(self._stages_removed(erasure)),
                "is_exhausted": self._service.model.is_exhausted,
            }
        receipts = receipts_of(folder, erasure) if is_whole else None
        return Erasure(
            **{
                "stages_removed": [],
                **known,
                "id": erasure.id,
                "status": state,
                "created": erasure.time,
                "apply_by": None if due is None else due.isoformat(timespec="milliseconds"),
                "requested": len(erasure.ids) + len(erasure.earlier),
                "deleted": len(erasure.ids) if is_done else 0,
                "already_deleted": len(erasure.earlier),
                "unknown": erasure.unknown,
                "unknown_groups": erasure.unknown_groups,
                "duplicates": None if duplicates is None else list(duplicates),
                "receipts": None if receipts is None else [one.to_dict() for one in receipts],
                "signatures": None if receipts is None else envelopes_of(folder, receipts),
            }
        )

    def _states(self, erasures: Sequence[RecordedErasure]) -> list[str]:
        self._folder.refresh_ledger()
        with self._lock:
            running = set(self._running)
        found = states_of(self._folder, erasures)
        # What is under way is not told as done before it is; nor is what others, or a due time, put into the ledger.
        told = list(zip(erasures, found, strict=True))
        is_asked = any(state == "done" and erasure.report is None for erasure, state in told)
        is_under_way = is_asked and not self._is_through()
        return [
            "running"
            if erasure.report is None
            and ((erasure.id in running and not erasure.waits) or (state == "done" and is_under_way))
            else state
            for erasure, state in told
        ]

    def _is_through(self) -> bool:
        """Whether nothing that the ledger takes back is in memory, or at the engine, any more."""
        service = self._service
        # Where nobody asks, nobody else follows what other processes did.
        service.model.catch_up()
        records, stack = self._folder.valid_records, service.model.stack
        if service.engine is not None and service.engine.status()["to_let_go"]:
            return False
        return all(key in records and stack.holds(key, adapter_of(records[key])) for key in stack.loaded)

    def show(self, erasure_id: str) -> Erasure:
        """
        What became of a request.

        Args:
            erasure_id (`str`): Its name.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: 404 if there is none.
        """
        erasure = self.book.find(erasure_id)
        if erasure is None:
            raise Problem(404, "There is no request to erase of this name here.", "unknown_erasure")
        return self._told(erasure, self._states([erasure])[0])

    def latest(self, limit: int) -> ErasureList:
        """What became of so many requests, the newest first, without their receipts."""
        found = self.book.latest(limit)
        told = zip(found, self._states(found), strict=True)
        return ErasureList(data=[self._told(erasure, state, is_whole=False) for erasure, state in told])

    def preview(self, wanted: ErasureRequest) -> ErasurePreview:
        """What a request would do. Nothing is recorded."""
        folder = self._folder
        found = preview(folder, self._request(wanted))
        return ErasurePreview(
            requested=found.requested,
            deleted=len(found.present),
            already_deleted=found.already_deleted,
            unknown=found.unknown,
            unknown_groups=found.unknown_groups,
            stages=list(found.stages_removed),
            depths_before=found.depths_before,
            depths_after=found.depths_after,
            is_exhausted=found.would_exhaust,
            deletions_left_before=found.deletions_left_before,
            deletions_left_after=found.deletions_left_after,
            duplicates=list(found.duplicates),
            work_to_regrow=_work_to_regrow(folder, found),
        )

    def find(self, ids: Sequence[str], groups: Sequence[str]) -> ExampleList:
        """
        Where examples are, or that they were deleted.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If one was never trained on.
        """
        folder = self._folder
        folder.refresh_ledger()
        given, named = ids_from_texts(folder, ids), groups_from_texts(folder, groups)
        table, names = folder.table, folder.names
        known = resolve_names(table, given, named, folder.ledger, names)
        kept = find_ids(table, given, folder.ledger, names)
        # Those of the groups follow, as far as they were not named themselves.
        members = [one for one in known.present if one not in set(kept)]
        found = [
            ExampleFound(id=one, deleted=True)
            if example is None
            else ExampleFound(id=one, deleted=False, shard=example.shard, slice=example.slice, group=example.group)
            for one, example in zip([*given, *members], table.examples([*kept, *members]), strict=True)
        ]
        gone = [ExampleFound(id=None, deleted=True, group=group) for group in known.deleted_groups]
        return ExampleList(data=[*found, *gone])


def _serving(folder: SystemFolder) -> set[str]:
    """The stages that answer now."""
    served = folder.served()
    return {str(stage) for tips in served for tip in tips for stage in tip.lineage}


def _texts(names: Sequence[Name] | None) -> list[str]:
    return list(map(str, names or []))


def _left_until(due: datetime | None) -> float | None:
    return None if due is None else max(0.0, (due - datetime.now(UTC)).total_seconds())


def _work_to_regrow(folder: SystemFolder, found: DeletionPreview) -> float:
    removed = {StageKey.from_path(f"stages/{stage}") for stage in found.stages_removed}
    current = folder.current_stages
    missing = folder.plan.missing(current, folder.table.empty)
    after = folder.plan.missing(current - removed, folder.table.empty)
    return max(0.0, folder.growth.work(after) - folder.growth.work(missing))


_ERRORS: dict[int | str, dict[str, Any]] = {
    404: {"description": "Something that was named is not known here. Nothing was changed."},
    422: {"description": "The request is not valid, or its key came with another one. Nothing was changed."},
    429: {"description": "Too many requests wait."},
    503: {"description": "The system's folder cannot be read or written now. Repeat the request with its key."},
}


def routes(service: Service) -> APIRouter:
    """The routes that erase, and that say what would go and what went."""
    erasures = service.erasures = Erasures(service)
    service.on_start.append(erasures.start)
    service.on_stop.append(erasures.stop)
    router = APIRouter(prefix="/v1", tags=["erasures"], dependencies=[requires(Scope.ERASE)], responses=PROBLEMS)

    @router.post(
        "/erasures",
        responses={202: {"model": Erasure, "description": "Recorded: it waits, until `apply_by`."}, **_ERRORS},
    )
    async def erase(
        body: ErasureRequest,
        response: Response,
        key: RepeatKey = None,
        dry_run: Annotated[bool, Query(description="Say what would go, and change nothing.")] = False,
    ) -> Erasure | ErasurePreview:
        """
        Forget examples. When the answer is there, no answer of this server is computed with what saw them, its ledger
        proves it, and a crash does not undo it.
        """
        if dry_run:
            return await erasures.look(erasures.preview, body)
        told = await erasures.erase(body, key)
        response.status_code = 202 if told.status == "waiting" else 200
        return told

    @router.get("/erasures")
    async def list_erasures(limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> ErasureList:
        """The latest requests to erase."""
        return await erasures.look(erasures.latest, limit)

    @router.get("/erasures/{erasure_id}", responses={404: {"description": "There is none of this name."}})
    async def show_erasure(erasure_id: Annotated[str, Path(max_length=100)]) -> Erasure:
        """What became of a request to erase."""
        return await erasures.look(erasures.show, erasure_id)

    @router.get("/examples", responses={404: _ERRORS[404]})
    async def find_examples(
        ids: Annotated[list[str] | None, Query(alias="id", max_length=1000)] = None,
        groups: Annotated[list[str] | None, Query(alias="group", max_length=1000)] = None,
    ) -> ExampleList:
        """Where examples are: by ids, and by groups."""
        return await erasures.look(erasures.find, ids or [], groups or [])

    return router
