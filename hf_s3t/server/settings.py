"""How a server answers: where it listens, what it batches, and what it refuses."""

from dataclasses import dataclass, fields
from typing import Any

from ..checks import require_choice, require_int, require_positive
from ..errors import ConfigError


ON_RUNNING = ("wait", "cancel")
_LARGEST_PORT = 65535
_NUMBERS = ("max_batch_size", "max_concurrent_batches", "max_queue", "max_body_bytes", "max_new_tokens")
_SECONDS = ("request_timeout", "body_timeout", "shutdown_timeout")


@dataclass(frozen=True)
class ServerSettings:
    """
    The settings of one server. Everything is checked on construction.

    Args:
        host (`str`, defaults to `"127.0.0.1"`): The address to listen on. Without keys it must be one of this machine.
        port (`int`, defaults to 8000): The port; 0 takes a free one.
        name (`str`, *optional*): What clients call the model; the name of its folder or repository if not given.
        max_batch_size (`int`, defaults to 8): How many rows, choices of answers, go through the model together.
        batch_wait (`float`, defaults to 0.005): Seconds that a batch waits for more rows before it begins.
        max_concurrent_batches (`int`, defaults to 2): How many batches are under way at once.
        overlap_wait (`float`, defaults to 0.5):
            Seconds that a row waits for the batch under way to end, before another begins beside it: clients that ask
            again and again then come to share one batch, and a short answer does not wait for a long one for ever.
        max_queue (`int`, defaults to 64): How many requests may wait; further ones are refused with 429.
        max_body_bytes (`int`, defaults to 1048576): The largest body of a request; larger ones are refused with 413.
        max_prompt_tokens (`int`, *optional*): The longest prompt in tokens; what the base has room for if not given.
        max_new_tokens (`int`, defaults to 4096): The most tokens that a request may ask for.
        request_timeout (`float`, defaults to 600): Seconds until an answer is given up with 504.
        body_timeout (`float`, defaults to 30): Seconds that a client has to send the head of a request, and its body.
        shutdown_timeout (`float`, defaults to 60): Seconds that running answers have when the server is stopped.
        on_running (`str`, defaults to `"wait"`):
            What an erasure does, unless it says otherwise, with answers that run on stages which go: `"wait"` for
            them or `"cancel"` them.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If a setting is out of range.

    Example:

    ```python
    >>> from hf_s3t.server.settings import ServerSettings

    >>> ServerSettings(max_batch_size=16).max_queue
    64
    ```
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    max_batch_size: int = 8
    batch_wait: float = 0.005
    max_concurrent_batches: int = 2
    overlap_wait: float = 0.5
    max_queue: int = 64
    max_body_bytes: int = 1_048_576
    max_prompt_tokens: int | None = None
    max_new_tokens: int = 4096
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    shutdown_timeout: float = 60.0
    on_running: str = "wait"

    def __post_init__(self) -> None:
        for name in ("host", "name"):
            _require_text(name, getattr(self, name), may_be_none=name == "name")
        require_int("port", self.port, 0)
        if self.port > _LARGEST_PORT:
            raise ConfigError(f"`port` must be at most {_LARGEST_PORT}, got {self.port}. 0 takes a free one.")
        for name in _NUMBERS:
            require_int(name, getattr(self, name), 1)
        if self.max_prompt_tokens is not None:
            require_int("max_prompt_tokens", self.max_prompt_tokens, 1)
        for name in _SECONDS:
            require_positive(name, getattr(self, name))
        for name in ("batch_wait", "overlap_wait"):
            if getattr(self, name) != 0:
                require_positive(name, getattr(self, name))
        require_choice("on_running", self.on_running, ON_RUNNING)

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """What each setting is where it is not given."""
        return {field.name: field.default for field in fields(cls)}


def _require_text(name: str, value: Any, may_be_none: bool) -> None:
    if value is None and may_be_none:
        return
    if not isinstance(value, str) or not value.strip():
        raise ConfigError(f"`{name}` must be a text, got {value!r}.")
