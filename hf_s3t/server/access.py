"""Who is let in: the key of each request, its scope, and without keys that it comes from this machine itself."""

from typing import Annotated, Any
from urllib.parse import urlsplit

from fastapi import Depends, Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as Connection

from .keys import Keys, Scope
from .problems import Problem


# What needs no key: whether the server lives, its page and what describes it.
_GUARDED = ("/v1/", "/metrics")
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
# What a proxy adds, which may have changed `Host` to this machine's name.
_OF_PROXIES = ("forwarded", "x-forwarded-for", "x-forwarded-host", "via")
_BEARER = HTTPBearer(auto_error=False, description="A key of this server; not needed where it has none.")


class Guard:
    """
    Refuses, before anything of its body is read, a request without a key of this server.

    Without keys the server listens on this machine only. What comes from a web page in a browser here, which could ask
    it too, is refused: by its `Host`, its `Origin`, and by the content type that a form cannot have.

    Args:
        app (ASGI app): What is guarded.
        keys ([`~hf_s3t.server.keys.Keys`]): The keys.
    """

    def __init__(self, app: ASGIApp, keys: Keys):
        self._app, self._keys = app, keys

    async def __call__(self, scope: Connection, receive: Receive, send: Send) -> None:
        """As any ASGI app."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            try:
                if self._keys:
                    scope["hf_s3t.scopes"] = self._scopes(scope["path"], headers)
                else:
                    refuse_web_pages(scope["method"], headers)
                    scope["hf_s3t.scopes"] = frozenset(Scope)
            except Problem as problem:
                await problem.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _scopes(self, path: str, headers: Headers) -> frozenset[Scope]:
        kind, _, key = headers.get("authorization", "").partition(" ")
        scopes = self._keys.scopes_of(key.strip()) if kind.lower() == "bearer" else frozenset[Scope]()
        if not scopes and path.startswith(_GUARDED):
            raise Problem(
                401,
                "No valid key was given. Send `Authorization: Bearer` with a key of this server.",
                "invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        return scopes


def requires(scope: Scope) -> Any:
    """
    What a route depends on that is for one scope only.

    Args:
        scope ([`~hf_s3t.server.keys.Scope`]): The scope.

    Example:

    ```python
    router = APIRouter(dependencies=[requires(Scope.ANSWER)])
    ```
    """

    async def check(
        request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_BEARER)]
    ) -> None:
        if scope not in request.scope["hf_s3t.scopes"]:
            raise Problem(
                403, f"This key is not for what this path does. Use one of the scope `{scope.value}`.", "wrong_scope"
            )

    return Depends(check)


def is_loopback(host: str) -> bool:
    """Whether a host name is this machine's own, which nothing outside reaches."""
    return host.lower() in _LOOPBACK


def refuse_web_pages(method: str, headers: Headers) -> None:
    """
    Refuse what a page of another site may have sent through a browser on this machine.

    Raises:
        [`~hf_s3t.server.problems.Problem`]: 403 for a foreign `Host` or `Origin` and for what came through a
            proxy, 415 for a content type of forms.
    """
    if not is_loopback(_host_of("//" + headers.get("host", ""))):
        raise Problem(
            403,
            "This server has no keys and answers to `localhost` only. Ask it by that name, or give it keys.",
            "wrong_host",
        )
    if any(name in headers for name in _OF_PROXIES):
        raise Problem(
            403,
            "This server has no keys, and by the proxy that this came through others may reach it. Give it keys.",
            "behind_a_proxy",
        )
    origin = headers.get("origin")
    if origin is not None and not is_loopback(_host_of(origin)):
        raise Problem(403, "This server has no keys and answers no pages of other sites.", "wrong_origin")
    if method == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Problem(415, "Send the body as JSON, with `Content-Type: application/json`.", "wrong_content_type")


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).hostname or ""
    except ValueError:
        return ""
