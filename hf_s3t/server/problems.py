"""What goes wrong, as clients of OpenAI's API expect it: a status, and a body `{"error": {...}}`."""

import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ..errors import (
    CallStoppedError,
    ConfigError,
    ExampleIdError,
    ExhaustedError,
    FolderError,
    HubError,
    S3TError,
    UnknownExampleError,
)


logger = logging.getLogger(__name__)

# Seconds after which a client may ask again: when a queue is full, and when the system is exhausted.
RETRY_SOON = 1
RETRY_LATER = 60
# Those of an absolute path, up to its last part.
_DIRECTORIES = re.compile(r"(?<![^\s'\"(`=])(?:[A-Za-z]:)?[/\\](?:[^\s/\\'\"`]+[/\\])*(?=[^\s/\\])")
_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorAnswer(BaseModel):
    """The body of a response that says what went wrong."""

    error: ErrorDetail


# What the description says of every route.
PROBLEMS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorAnswer, "description": "What is wrong with the request"},
    "5XX": {"model": ErrorAnswer, "description": "Why there is no answer"},
}


class Problem(Exception):
    """
    What ends a request other than by its answer.

    Args:
        status (`int`): The HTTP status.
        message (`str`): What was got, what is expected, what to do. It is sent to the client.
        code (`str`, *optional*): By which programs tell it.
        param (`str`, *optional*): The field of the request that it is about.
        headers (mapping, *optional*): Headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response, which is also what an event of a stream says."""
        kind = _TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The response that says so."""
        return JSONResponse(self.body, self.status, self.headers)


def problem_of(error: BaseException) -> Problem:
    """
    What a client is told of an error. Of one that nobody foresaw it is told nothing but that.

    Args:
        error (`BaseException`): The error.
    """
    if isinstance(error, Problem):
        return error
    if isinstance(error, ExhaustedError):
        message = "No shard of this system is left to answer, until stages are grown again. Ask again later."
        return Problem(503, message, "exhausted", headers={"Retry-After": str(RETRY_LATER)})
    if isinstance(error, CallStoppedError):
        message = "A deletion removed a stage that was answering, and stopped the answer. Ask again."
        return Problem(503, message, "stopped_by_erasure", headers={"Retry-After": "0"})
    if isinstance(error, UnknownExampleError):
        return Problem(404, str(error), "unknown_example")
    if isinstance(error, (ExampleIdError, ConfigError)):
        return Problem(422, without_places(str(error)), "invalid_value")
    if isinstance(error, (FolderError, HubError)):
        # Its sentence names places on this machine: it is logged, and not sent.
        logger.error(error)
        message = "The system's folder or repository cannot be read or written now. Ask again later."
        return Problem(503, message, "storage", headers={"Retry-After": str(RETRY_LATER)})
    if isinstance(error, S3TError):
        return Problem(422, without_places(str(error)), "refused")
    return Problem(500, "The server failed at this request. Its log says at what.", "internal")


def without_places(sentence: str) -> str:
    """
    A sentence with the names of files alone, not where on this machine they are.

    Args:
        sentence (`str`): It may have absolute paths.

    Example:

    ```python
    >>> from hf_s3t.server.problems import without_places

    >>> without_places("/srv/system/ledger.jsonl could not be written.")
    'ledger.jsonl could not be written.'
    ```
    """
    return _DIRECTORIES.sub("", sentence)


def of_invalid_body(error: RequestValidationError) -> Problem:
    """What is wrong with a body: the first fault, by the name of its field; what was sent is not repeated."""
    found = error.errors()
    first = found[0] if found else {}
    place = [str(part) for part in first.get("loc", ()) if part not in ("body", "query", "path", "header")]
    param = ".".join(place) or None
    reason = str(first.get("msg", "it is not valid")).removeprefix("Value error, ")
    if first.get("type") == "json_invalid":
        return Problem(422, "The body is no JSON. Send a JSON object.", "json_invalid")
    if first.get("type") == "extra_forbidden":
        reason = "this server does not know this field, which may change the answer. Leave it out"
    message = f"`{param}`: {reason}." if param else f"The request is not valid: {reason}."
    return Problem(422, message, str(first.get("type", "invalid")), param)


def install(app: FastAPI) -> None:
    """
    Have all errors of an app told this way, those of its framework too.

    Args:
        app (`fastapi.FastAPI`): The app.
    """

    @app.exception_handler(Problem)
    @app.exception_handler(S3TError)
    @app.exception_handler(Exception)
    async def of_errors(request: Request, error: Exception) -> JSONResponse:
        return problem_of(error).response()

    @app.exception_handler(RequestValidationError)
    async def of_bodies(request: Request, error: RequestValidationError) -> JSONResponse:
        return of_invalid_body(error).response()

    @app.exception_handler(HTTPException)
    async def of_framework(request: Request, error: HTTPException) -> JSONResponse:
        message = str(error.detail).rstrip(".") + "."
        if error.status_code == 400:
            # The framework's word for bytes that are no text.
            return Problem(422, "The body is no JSON. Send a JSON object.", "json_invalid").response()
        if error.status_code == 404:
            message = "There is nothing at this path. `/openapi.json` describes what there is."
        return Problem(error.status_code, message, headers=error.headers).response()
