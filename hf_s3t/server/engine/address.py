"""Where an engine listens: its address, checked, and who else can reach it."""

import ipaddress
from dataclasses import dataclass
from urllib.parse import urlsplit

from ...errors import ConfigError


_EXPECTED = "expected the address of a vLLM server's API, such as http://127.0.0.1:8001/v1"


@dataclass(frozen=True)
class EngineAddress:
    """
    The address of an engine's API.

    Args:
        url (`str`): The address, ending in `/v1`, without a slash behind it.

    Example:

    ```python
    >>> from hf_s3t.server.engine.address import EngineAddress

    >>> address = EngineAddress.parse("http://127.0.0.1:8001")
    >>> address.url, address.is_loopback
    ('http://127.0.0.1:8001/v1', True)
    ```
    """

    url: str

    @classmethod
    def parse(cls, text: str) -> "EngineAddress":
        """
        The address that a text gives; `/v1` may be left out.

        Args:
            text (`str`): What the user gave.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If it is no address of a server, or holds a password.
        """
        try:
            parts = urlsplit(text)
            is_address = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            is_address = False
        if not is_address or parts.query or parts.fragment:
            raise ConfigError(f"engine={text!r}, {_EXPECTED}. Start vLLM first, and give what it listens on.")
        if parts.username is not None or parts.password is not None:
            # What it holds is not shown.
            raise ConfigError(
                f"The address of the engine holds a name or a password, {_EXPECTED}. Give the engine's key in the "
                "environment variable HF_S3T_ENGINE_KEY."
            )
        return cls(f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}/v1")

    @property
    def root(self) -> str:
        """The server's address, without `/v1`."""
        return self.url.removesuffix("/v1")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach it by this address. It may listen on others besides."""
        host = urlsplit(self.url).hostname or ""
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost" or host.endswith(".localhost")
