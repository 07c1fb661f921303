"""`/v1/status`, `/metrics`, `/healthz`, `/readyz`: where the system stands, for people and for what watches it."""

import time
from typing import Any, Literal

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Response
from pydantic import BaseModel

from ..folder.system import SystemFolder
from ..folder.versions import own_version
from ..operations.pending import PendingRequests
from ..plan.stages import StageKey
from .access import requires
from .keys import Scope
from .problems import RETRY_LATER, RETRY_SOON, without_places
from .service import Service
from .watching import CONTENT_TYPE, SystemMetrics, exposition


class StageShown(BaseModel):
    """A stage that is there."""

    stage: str
    slices: list[int]
    is_serving: bool


class ShardShown(BaseModel):
    """A shard: what is planned of it, what is there, and what serves."""

    shard: int
    depth: int
    num_slices: int
    planned: list[str]
    stages: list[StageShown]


class Queue(BaseModel):
    """Answers that wait, and those under way."""

    waiting: int
    running: int


class WaitingErasure(BaseModel):
    """A request to erase that is recorded and not in force yet, whoever recorded it."""

    apply_by: str | None
    examples: int


class NextStage(BaseModel):
    """What is grown next, and what it brings by itself."""

    stage: str
    work: float
    depth: float | None
    expected_depth: float


class Status(BaseModel):
    """Where the system stands."""

    object: Literal["status"] = "status"
    model: str
    version: str
    uptime_seconds: float
    examples: int
    deletions: int
    pending: int
    num_shards: int
    depths: list[int]
    sequence_depths: list[Any]
    sets: list[Any]
    stages: list[int]
    stages_behind: int
    additions: int
    expected_depth: float
    stages_left: int
    work_left: float
    next_stage: NextStage | None
    deletions_until_first_dead_shard: float
    deletions_until_exhausted: float
    gate: dict[str, Any] | None
    failures: list[str]
    is_exhausted: bool
    shards: list[ShardShown]
    queue: Queue
    erasures_waiting: list[WaitingErasure]
    engine: dict[str, Any] | None = None


class Health(BaseModel):
    """Whether the server lives, or is ready."""

    status: Literal["alive", "ready", "exhausted", "engine not ready"]


def status_of(service: Service) -> Status:
    """
    Where a system stands. The model follows its folder for it: what was grown meanwhile shows without a request.

    Args:
        service ([`~hf_s3t.server.service.Service`]): What is served.
    """
    model, folder = service.model, service.model.folder
    is_exhausted = model.is_exhausted
    found = model.status()
    # They name places on this machine, for whoever has its log.
    found["failures"] = [without_places(one.replace(str(folder.path), folder.path.name)) for one in found["failures"]]
    return Status(
        **found,
        model=service.name,
        version=own_version(),
        uptime_seconds=time.time() - service.started,
        num_shards=folder.config.num_shards,
        is_exhausted=is_exhausted,
        shards=_shards(folder, found["depths"]),
        queue=Queue(waiting=service.batcher.num_waiting, running=service.batcher.num_running),
        erasures_waiting=[WaitingErasure(apply_by=due, examples=n) for due, n in PendingRequests(folder).waiting()],
        engine=None if service.engine is None else service.engine.status(),
    )


def _shards(folder: SystemFolder, depths: list[int]) -> list[ShardShown]:
    valid = folder.valid_stages
    served = folder.served(valid)
    serving = {stage for tips in served for tip in tips for stage in tip.lineage}
    planned = folder.plan.stages()
    return [
        ShardShown(
            shard=shard,
            depth=depth,
            num_slices=folder.config.num_slices,
            planned=[str(key) for key in planned if key.shard == shard],
            stages=[_stage(key, serving) for key in sorted(valid) if key.shard == shard],
        )
        for shard, depth in enumerate(depths)
    ]


def _stage(key: StageKey, serving: set[StageKey]) -> StageShown:
    return StageShown(stage=str(key), slices=list(key.prefix), is_serving=key in serving)


def routes(service: Service) -> APIRouter:
    """The routes that say where the system stands."""
    router, system = APIRouter(tags=["status"]), SystemMetrics(service.model)
    looking = CapacityLimiter(2)

    @router.get("/v1/status", dependencies=[requires(Scope.STATUS)])
    async def show_status() -> Status:
        """Where the system stands: its shards and their stacks, what serves, what waits, what is expected."""
        return await to_thread.run_sync(status_of, service, limiter=looking)

    @router.get(
        "/metrics",
        dependencies=[requires(Scope.STATUS)],
        response_class=Response,
        responses={200: {"content": {"text/plain": {}}, "description": "In the format of Prometheus."}},
    )
    async def show_metrics() -> Response:
        """What is measured."""
        text = await to_thread.run_sync(exposition, service.metrics, system, limiter=looking)
        return Response(text, media_type=CONTENT_TYPE)

    @router.get("/healthz")
    async def is_alive() -> Health:
        """Whether the process lives."""
        return Health(status="alive")

    @router.get("/readyz", responses={503: {"model": Health, "description": "No shard is left to answer."}})
    async def is_ready(response: Response) -> Health:
        """Whether it answers: its model is loaded, and not exhausted."""
        if await to_thread.run_sync(lambda: service.model.is_exhausted, limiter=looking):
            response.status_code = 503
            response.headers["Retry-After"] = str(RETRY_LATER)
            return Health(status="exhausted")
        if service.engine is not None and not service.engine.status()["is_ready"]:
            response.status_code = 503
            response.headers["Retry-After"] = str(RETRY_SOON)
            return Health(status="engine not ready")
        return Health(status="ready")

    return router
