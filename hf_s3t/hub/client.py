"""Calls of the Hub's client: repeated where they may be, their errors told as sentences."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    XetDownloadError,
)

# The client imports these two without exporting them: its HTTP library's error, and a check of its own.
from huggingface_hub.errors import HTTPError as HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ..errors import HubError, S3TError, TransferError


ATTEMPTS = 6
LONGEST_WAIT = 8.0
_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def is_repo_id(path: str | os.PathLike[str]) -> bool:
    """Whether a text can name a repository on the Hub: an owner and a name."""
    if not isinstance(path, str) or path.count("/") != 1:
        return False
    try:
        validate_repo_id(path)
    except HFValidationError:
        return False
    return True


def call_with_retries(
    call: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs
) -> _Result:
    """
    Call the Hub again where it fails for a moment (5xx, 429, a broken connection). For calls that may be repeated.

    Args:
        call (callable): A method of the client.
        *args: For the call.
        **kwargs: For the call.
    """
    for attempt in range(ATTEMPTS - 1):
        try:
            return call_once(call, *args, **kwargs)
        except (HTTPError, TransferError) as error:
            if not is_passing(error):
                raise
        time.sleep(min(0.5 * 2**attempt, LONGEST_WAIT))
    return call_once(call, *args, **kwargs)


def call_once(call: Callable[_Parameters, _Result], *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
    """
    Call the Hub. Where the transfer of a file, by Xet or LFS, raises what Python has for anything, that is told.

    Args:
        call (callable): A method of the client.
        *args: For the call.
        **kwargs: For the call.

    Raises:
        [`~hf_s3t.errors.TransferError`]: If the client raised no error of its own.
    """
    try:
        return call(*args, **kwargs)
    except (HTTPError, EntryNotFoundError, OfflineModeIsEnabled, HFValidationError, S3TError):
        raise
    except (OSError, RuntimeError, ValueError, XetDownloadError) as error:
        if isinstance(error.__cause__, HTTPError):
            # The client wraps what the upload of a file ended with.
            raise error.__cause__ from error
        raise TransferError(
            f"A file could not be transferred ({type(error).__name__}: {first_line(error)}). See that the token is "
            "valid, the connection stands and there is room in the cache, then call again; what was done is not done "
            "twice."
        ) from error


def is_passing(error: Exception) -> bool:
    """Whether an error of the Hub may be gone when it is asked again."""
    if isinstance(error, TransferError):
        return isinstance(error.__cause__, (RuntimeError, ConnectionError, TimeoutError, XetDownloadError))
    if isinstance(error, (OfflineModeIsEnabled, EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError)):
        return False
    return not isinstance(error, HfHubHTTPError) or http_status(error) >= 500 or http_status(error) == 429


def http_status(error: HfHubHTTPError) -> int:
    """The status the Hub answered with, 0 if it did not."""
    return getattr(error.response, "status_code", 0) or 0


@contextlib.contextmanager
def hub_errors_as_sentences(repo_id: str, doing: str) -> Iterator[None]:
    """Turn the client's errors into sentences with a remedy."""
    try:
        yield
    except HFValidationError as error:
        raise HubError(
            f"{repo_id} names no repository: {first_line(error)}. Give one such as me/llama-s3t."
        ) from error
    except RepositoryNotFoundError as error:
        raise HubError(
            f"{repo_id} is not on the Hub, or your token may not see it. Check the name; for a private repository log "
            "in with `hf auth login` or give `token`."
        ) from error
    except RevisionNotFoundError as error:
        raise HubError(f"{repo_id} has no such revision. Give a branch, a tag or a commit id that it has.") from error
    except LocalEntryNotFoundError as error:
        raise HubError(
            f"{repo_id} cannot be reached, and what is needed of it is not in the cache. Go online, then call again: "
            "what is fetched once serves offline too."
        ) from error
    except EntryNotFoundError as error:
        raise HubError(f"{doing}: {repo_id} lacks a file. {first_line(error)}") from error
    except HfHubHTTPError as error:
        raise HubError(f"{doing}: {_refusal(repo_id, error)}") from error
    except (HTTPError, OfflineModeIsEnabled) as error:
        raise HubError(
            f"{doing}: the Hub cannot be reached ({first_line(error)}). Go online, then call again."
        ) from error


def _refusal(repo_id: str, error: HfHubHTTPError) -> str:
    status = http_status(error)
    if status == 401:
        return "the Hub does not accept the token. Log in with `hf auth login`, or give a valid `token`."
    if status == 403:
        return f"the token may not write to {repo_id}. Give one with write access."
    return (
        f"the Hub answered {status or 'nothing'} ({first_line(error)}). Call again; what was done is not done twice."
    )


def first_line(error: Exception) -> str:
    """What an error says first, without its full stop."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
