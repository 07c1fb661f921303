"""The page at `/`: plain files that draw what the API says. They hold nothing of a system, so they need no key."""

import hashlib
from collections.abc import Callable
from importlib import resources

from fastapi import APIRouter, Request, Response


_KINDS = {
    "css": "text/css; charset=utf-8",
    "html": "text/html; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing written into the page is run, no other page frames it, and texts never become markup.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # Asked for anew each time, and sent only if it is another: after an update no old part meets a new one.
    "Cache-Control": "no-cache",
}


def routes() -> APIRouter:
    """
    The routes of the page: `/`, and below `/page/` its files. They are no part of the API's description.

    Returns:
        `fastapi.APIRouter`: To include in the app.

    Example:

    ```python
    >>> from fastapi import FastAPI
    >>> from hf_s3t.server.pages import routes

    >>> app = FastAPI()
    >>> app.include_router(routes())
    ```
    """
    router = APIRouter(include_in_schema=False)
    for name, content in _files().items():
        path = "/" if name == "index.html" else f"/page/{name}"
        router.add_api_route(path, _sending(name, content), methods=["GET", "HEAD"])
    return router


def _files() -> dict[str, bytes]:
    files = (resources.files(__package__) / "page").iterdir()
    return {file.name: file.read_bytes() for file in files if file.name.rpartition(".")[2] in _KINDS}


def _sending(name: str, content: bytes) -> Callable[[Request], Response]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**_HEADERS, "ETag": tag}
    kind = _KINDS[name.rpartition(".")[2]]

    def send(request: Request) -> Response:
        if tag in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=kind, headers=headers)

    return send
