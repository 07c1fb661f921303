"""What is asked of a vLLM server beside answers: which adapters it has, loading one, letting go of one."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx2

from ...errors import S3TError
from .address import EngineAddress


# Seconds: to connect, until an adapter is loaded, and until anything else is done.
CONNECT_TIMEOUT = 5.0
_LOADING_TIMEOUT = 120.0
_TIMEOUT = 15.0
# How much of what an engine says of an error is repeated.
_SHOWN = 300
_STARTED = re.compile(rb"^process_start_time_seconds(?:\{[^}]*\})? ([0-9.e+]+)", re.MULTILINE)


class EngineError(S3TError, RuntimeError):
    """The engine refuses what is asked of it, or says what it should not."""


class EngineDownError(EngineError):
    """
    The engine cannot be reached, or did not answer in time.

    Args:
        message (`str`): What to do.
        was_asked (`bool`, defaults to `True`): Whether it may have done what was asked of it.
    """

    def __init__(self, message: str, was_asked: bool = True):
        super().__init__(message)
        self.was_asked = was_asked


class Vllm:
    """
    A vLLM server with runtime updating of LoRA adapters.

    Args:
        address ([`~hf_s3t.server.engine.address.EngineAddress`]): Where it listens.
        key (`str`, *optional*): The key it was started with.
    """

    def __init__(self, address: EngineAddress, key: str | None = None):
        self.address = address
        # How many tokens it takes, prompt and answer together, as it said last.
        self.room: int | None = None
        # No proxy of the environment: adapters and prompts go to this address and nowhere else.
        self._client = httpx2.Client(headers=authorization(key), trust_env=False)

    def models(self) -> dict[str, str | None]:
        """
        The names that the engine answers to, each with what it was loaded from.

        Raises:
            [`EngineError`]: If it cannot be asked.
        """
        answer = self._ask("GET", f"{self.address.url}/models", None)
        try:
            cards = answer.json()["data"]
            self.room = next((int(card["max_model_len"]) for card in cards if card.get("max_model_len")), None)
            return {str(card["id"]): card.get("root") for card in cards}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EngineError(
                f"{self.address.url}/models says something else than a list of models. Give the address of a vLLM "
                "server's API, such as http://127.0.0.1:8001/v1."
            ) from error

    def load(self, name: str, folder: Path) -> None:
        """
        Have the engine load an adapter under a name.

        Args:
            name (`str`): The name.
            folder (`Path`): Where the adapter lies, for the engine as for this process.

        Raises:
            [`EngineDownError`]: If it is not known whether the engine loaded it.
            [`EngineError`]: If the engine refuses.
        """
        self._ask(
            "POST",
            f"{self.address.url}/load_lora_adapter",
            {"lora_name": name, "lora_path": str(folder.resolve())},
            _LOADING_TIMEOUT,
        )

    def unload(self, name: str) -> None:
        """
        Have the engine let go of a name. One that it does not have is no error.

        Raises:
            [`EngineError`]: If it cannot be asked, or has the name nevertheless.
        """
        try:
            self._ask("POST", f"{self.address.url}/unload_lora_adapter", {"lora_name": name})
        except EngineDownError:
            raise
        except EngineError:
            # What it says of a name that it does not have differs between versions.
            if name in self.models():
                raise
            return
        if name in self.models():
            raise EngineError(f"The engine says that it let go of {name}, and lists it still. Restart the engine.")

    def started(self) -> float | None:
        """When the engine's process began, as it says; `None` if it does not."""
        try:
            answer = self._client.get(f"{self.address.root}/metrics", timeout=CONNECT_TIMEOUT)
        except httpx2.HTTPError:
            return None
        found = _STARTED.search(answer.content) if answer.is_success else None
        return float(found[1]) if found else None

    def close(self) -> None:
        """Let go of connections."""
        self._client.close()

    def _ask(
        self, method: str, url: str, body: Mapping[str, Any] | None, timeout: float = _TIMEOUT
    ) -> httpx2.Response:
        try:
            answer = self._client.request(
                method, url, json=body, timeout=httpx2.Timeout(timeout, connect=CONNECT_TIMEOUT)
            )
        except httpx2.HTTPError as error:
            raise EngineDownError(
                f"No engine answers at {self.address.url} ({type(error).__name__}). Start vLLM there, or give its "
                "address.",
                was_asked=not isinstance(error, (httpx2.ConnectError, httpx2.ConnectTimeout)),
            ) from error
        if answer.is_success:
            return answer
        raise self._refusal(answer)

    def _refusal(self, answer: httpx2.Response) -> EngineError:
        said = said_of_error(answer.content)
        if answer.status_code in (401, 403):
            return EngineError(
                f"The engine at {self.address.url} refuses this server's key. Put the key that vLLM was started with "
                "(`--api-key`) into the environment variable HF_S3T_ENGINE_KEY."
            )
        if answer.status_code in (404, 405) and "lora" not in said.lower():
            return EngineError(
                f"The engine at {self.address.url} does not load adapters while it runs. Start it as "
                "`VLLM_ALLOW_RUNTIME_LORA_UPDATING=True vllm serve BASE --enable-lora`."
            )
        return EngineError(f"The engine at {self.address.url} refuses ({answer.status_code}): {said}")


def authorization(key: str | None) -> dict[str, str]:
    """The header that an engine with a key asks for."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def said_of_error(content: bytes) -> str:
    """What an engine says of an error, in one line."""
    text = content.decode(errors="replace")
    found = re.search(r'"message"\s*:\s*"((?:[^"\\]|\\.)*)"', text)
    return " ".join((found[1] if found else text).split())[:_SHOWN]
