"""Work that is done beside, and tried again until it is done."""

import threading
from collections.abc import Callable

from transformers.utils import logging

from ..errors import S3TError


logger = logging.get_logger(__name__)

# Seconds until work that failed is tried again for the first time, and at the latest.
_SOON = 1.0
_AT_THE_LATEST = 60.0


class Retrying:
    """
    Work in a thread of its own. Whatever error ends it, it is tried again, after pauses that grow, until it is done.

    Args:
        work (callable): What to do. It is not held back by what an earlier attempt left.
        sentence (`str`): What could not be done, for whoever looks: `"The table could not be written"`.

    Example:

    ```python
    >>> from hf_s3t.model.retrying import Retrying

    >>> done = []
    >>> task = Retrying(lambda: done.append(1), "Nothing was noted")
    >>> task.start()
    >>> task.wait()
    >>> done, task.problem
    ([1], None)
    ```
    """

    def __init__(self, work: Callable[[], None], sentence: str):
        self.problem: str | None = None
        self._work = work
        self._sentence = sentence
        self._pause = _SOON
        self._attempt: threading.Thread | None = None
        self._next: threading.Timer | None = None

    def start(self) -> None:
        """Try now. The interpreter does not end before this attempt has."""
        self.cancel()
        self._attempt = threading.Thread(target=self._try, name="hf_s3t-work")
        self._attempt.start()

    def start_in(self, seconds: float) -> None:
        """Try in so many seconds, if the process lives that long, instead of when it was to be tried before."""
        self.cancel()
        self._next = threading.Timer(min(max(0.0, seconds), threading.TIMEOUT_MAX), self._try)
        self._next.daemon = True
        self._next.start()

    def cancel(self) -> None:
        """Let go of an attempt that has not begun."""
        self.problem = None
        if self._next is not None:
            self._next.cancel()

    def wait(self) -> None:
        """Wait for an attempt that was started and runs; not for one that is to come."""
        if self._attempt is not None:
            self._attempt.join()

    def _try(self) -> None:
        try:
            self._work()
        except Exception as error:
            self._failed(error)
        else:
            self.problem, self._pause = None, _SOON

    def _failed(self, error: Exception) -> None:
        # Errors of hf_s3t are sentences; of others the name says most.
        what = str(error) if isinstance(error, S3TError) else f"{type(error).__name__}: {error}."
        problem = f"{self._sentence}: {what} It is tried again, every {_AT_THE_LATEST:.0f} seconds at the latest."
        if problem != self.problem:
            logger.error(problem)
        self.start_in(self._pause)
        self.problem = problem
        self._pause = min(2 * self._pause, _AT_THE_LATEST)
