"""The app: all routes on one service, behind what lets requests in."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from anyio import to_thread
from fastapi import APIRouter, FastAPI

from ..folder.versions import own_version
from . import chat, classify, completions, erasures, models, pages, status
from .access import Guard
from .limits import BodyLimits
from .logs import Observed
from .problems import install
from .service import Service


# Each gives the routes of one part, in the order in which the description lists them.
PARTS: tuple[Callable[[Service], APIRouter], ...] = (
    models.routes,
    completions.routes,
    chat.routes,
    classify.routes,
    erasures.routes,
    status.routes,
)


def create_app(service: Service) -> FastAPI:
    """
    The app of a server, for any ASGI server.

    Args:
        service ([`~hf_s3t.server.service.Service`]): What is served.

    Returns:
        `fastapi.FastAPI`: The app. Its description is at `/openapi.json`.

    Example:

    ```python
    import uvicorn

    model = S3TModel.from_pretrained("llama-alpaca-s3t")
    service = Service(model, AutoTokenizer.from_pretrained("llama-alpaca-s3t"))
    uvicorn.run(create_app(service), port=8000)
    ```
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await to_thread.run_sync(service.start)
        try:
            yield
        finally:
            await to_thread.run_sync(service.stop)

    # The pages that FastAPI has for its description load scripts from elsewhere.
    app = FastAPI(
        title="hf_s3t",
        version=own_version(),
        summary="An S3T system in production: it answers, forgets while it answers, and comes back to full strength.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        # It would send clients that came by TLS on without it.
        redirect_slashes=False,
    )
    app.state.service = service
    install(app)
    for part in PARTS:
        app.include_router(part(service))
    app.include_router(pages.routes())
    # The last added is the outermost.
    app.add_middleware(BodyLimits, settings=service.settings)
    app.add_middleware(Guard, keys=service.keys)
    app.add_middleware(Observed, metrics=service.metrics)
    return app
