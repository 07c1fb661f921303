"""The name that requests are passed on to, and the requests that are under way on it and on those before."""

import asyncio
import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from ...plan.stages import StageKey


@dataclass(frozen=True)
class Loaded:
    """
    A stack that the engine has loaded.

    Args:
        name (`str`): The name it was loaded under.
        stages (`tuple[tuple[StageKey, str], ...]`): Its stages and the digests of their files, topmost group first.
        engine_started (`float`, *optional*): When the engine's process began that loaded it, if it says so.
    """

    name: str
    stages: tuple[tuple[StageKey, str], ...]
    engine_started: float | None = None

    @property
    def depth(self) -> int:
        """How many stages it has."""
        return len(self.stages)


class Lease:
    """
    One request under way on a name.

    Args:
        loaded ([`Loaded`]): What it is on.
        stop (callable): Called once, from any thread, when a deletion wants the request to end.
    """

    def __init__(self, loaded: Loaded, stop: Callable[[], None]):
        self.loaded = loaded
        self.is_stopped = False
        self._stop = stop

    def stop(self) -> None:
        """Have the request end."""
        if not self.is_stopped:
            self.is_stopped = True
            self._stop()


class Names:
    """
    Which name new requests are passed on to, if any, and who is under way on which.

    Its one lock is held to count, or to change a pointer; never while anything waits or is asked of the engine.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition(threading.Lock())
        self._loaded: Loaded | None = None
        # Why nothing is passed on; `None` while what comes next is on its way, for which requests wait.
        self._why: Exception | None = None
        self._leases: dict[str, set[Lease]] = {}
        self._version = 0
        self._waiting: list[Callable[[], None]] = []

    @property
    def loaded(self) -> Loaded | None:
        """What new requests are passed on to."""
        return self._loaded

    @property
    def why(self) -> Exception | None:
        """Why nothing is passed on, where nothing is and nothing is on its way."""
        return self._why

    @property
    def version(self) -> int:
        """A number that grows with every change."""
        return self._version

    @property
    def running(self) -> int:
        """How many requests are under way."""
        with self._changed:
            return sum(map(len, self._leases.values()))

    def open(self, loaded: Loaded) -> None:
        """Pass new requests on to a name from here on."""
        self._change(loaded, None)

    def close(self, why: Exception | None = None) -> None:
        """
        Pass nothing on from here on.

        Args:
            why (`Exception`, *optional*): What requests are answered with; without it they wait for what comes next.
        """
        self._change(None, why)

    def tell(self) -> None:
        """Have whoever waits for a change look again."""
        self._change(self._loaded, self._why)

    def _change(self, loaded: Loaded | None, why: Exception | None) -> None:
        with self._changed:
            self._loaded, self._why = loaded, why
            self._version += 1
            waiting, self._waiting = self._waiting, []
            self._changed.notify_all()
        for wake in waiting:
            wake()

    def take(self, stop: Callable[[], None]) -> Lease | None:
        """Begin a request on what is passed on to now; `None` if nothing is."""
        with self._changed:
            if self._loaded is None:
                return None
            lease = Lease(self._loaded, stop)
            self._leases.setdefault(self._loaded.name, set()).add(lease)
            return lease

    def release(self, lease: Lease) -> None:
        """End a request: nothing of it is under way at the engine any more."""
        with self._changed:
            leases = self._leases[lease.loaded.name]
            leases.discard(lease)
            if not leases:
                del self._leases[lease.loaded.name]
                self._changed.notify_all()

    def wait_until_free(self, name: str, timeout: float | None) -> bool:
        """Wait until no request is under way on a name; returns whether none is."""
        with self._changed:
            return self._changed.wait_for(lambda: name not in self._leases, timeout)

    def stop(self, name: str) -> None:
        """Have the requests on a name end."""
        with self._changed:
            leases = list(self._leases.get(name, ()))
        for lease in leases:
            lease.stop()

    async def wait_for_change(self, version: int, timeout: float) -> None:
        """
        Wait, in an event loop, until something has changed.

        Args:
            version (`int`): The `version` that was looked at.
            timeout (`float`): Seconds to wait at most.
        """
        loop, event = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            # A loop that has ended waits for nothing.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(event.set)

        with self._changed:
            if self._version != version:
                return
            self._waiting.append(wake)
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await event.wait()
        finally:
            with self._changed:
                if wake in self._waiting:
                    self._waiting.remove(wake)
