"""What `hf-s3t serve` runs: a system loaded with its tokenizer, on a port, until it is told to stop."""

import contextlib
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from transformers import AutoImageProcessor, AutoTokenizer

from ..errors import ConfigError, FolderError
from ..hub.folder import HubFolder
from ..model.gates import RECORDED
from ..model.modeling import S3TModel
from .access import is_loopback
from .app import create_app
from .keys import VARIABLES, Keys
from .service import Service
from .settings import ServerSettings


def serve(
    path: str | os.PathLike[str],
    settings: ServerSettings,
    keys: Keys,
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
    dtype: str | None = None,
    preload: str = "best",
    when_exhausted: str = "error",
    gate: str | None = RECORDED,
    say: Callable[[str], None] = print,
) -> None:
    """
    Serve a system until the process is told to stop (SIGTERM, or SIGINT).

    Then running answers end, for `settings.shutdown_timeout` at most, and what waits to be erased stays recorded.

    Args:
        path (`str` or `os.PathLike`): The folder of the system, or its repository on the Hub.
        settings ([`~hf_s3t.server.settings.ServerSettings`]): How it is served.
        keys ([`~hf_s3t.server.keys.Keys`]): Who may ask what.
        revision (`str`, *optional*): As [`~hf_s3t.S3TModel.from_pretrained`] has it; so the following.
        cache_dir (`str` or `os.PathLike`, *optional*): See there.
        base_model (`str`, *optional*): See there.
        dtype (`str`, *optional*): See there.
        preload (`str`, defaults to `"best"`): See there.
        when_exhausted (`str`, defaults to `"error"`): See there.
        gate (`str`, *optional*, defaults to `"recorded"`): See there.
        say (callable, *optional*): Told, in a line, where the server listens.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the address cannot be listened at, or others could ask without a key.
        [`~hf_s3t.errors.S3TError`]: If the system cannot be loaded.
    """
    check_address(settings, keys)
    # Before a model is loaded in vain.
    with contextlib.closing(bound(settings)) as listener:
        model = S3TModel.from_pretrained(
            path,
            revision=revision,
            cache_dir=cache_dir,
            base_model=base_model,
            dtype=dtype,
            preload=preload,
            when_exhausted=when_exhausted,
            gate=gate,
        )
        service = Service(model, find_processor(model, base_model), settings, keys)
        run(service, listener, say)


def run(service: Service, listener: socket.socket, say: Callable[[str], None]) -> None:
    """
    Answer what comes to a socket until the process is told to stop.

    Args:
        service ([`~hf_s3t.server.service.Service`]): What is served.
        listener (`socket.socket`): A bound socket.
        say (callable): Told, in a line, that it listens.
    """
    config = uvicorn.Config(
        create_app(service),
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=max(1, round(service.settings.shutdown_timeout)),
    )
    server = _Server(config, lambda: say(announcement(service, listener)))
    # It ends what runs before it raises what interrupted it.
    with contextlib.suppress(KeyboardInterrupt):
        server.run([listener])


class _Server(uvicorn.Server):
    """One that says when it listens."""

    def __init__(self, config: uvicorn.Config, say: Callable[[], None]):
        super().__init__(config)
        self._say = say

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._say()


def check_address(settings: ServerSettings, keys: Keys) -> None:
    """
    Refuse to let others than this machine ask without a key.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With how keys are given.
    """
    if not keys and not is_loopback(settings.host):
        names = ", ".join(VARIABLES.values())
        raise ConfigError(
            f"Without keys the server listens on this machine only, got host={settings.host!r}. Give keys, in a file "
            f"or by {names}; or listen on 127.0.0.1."
        )


def bound(settings: ServerSettings) -> socket.socket:
    """
    A socket at the address; it does not listen yet.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it cannot be had.
    """
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            if os.name == "posix" and sys.platform != "cygwin":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ConfigError(
            f"The server cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}. Give "
            "another host or port; port 0 takes a free one."
        ) from error
    return listener


def announcement(service: Service, listener: socket.socket) -> str:
    """Where the server listens, and who may ask."""
    host, port = listener.getsockname()[:2]
    where = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    who = "with a key" if service.keys else "by anybody on this machine, and by nobody else: it has no keys"
    return f"{service.name} is at {where}, and can be asked {who}"


def find_processor(model: S3TModel, base_model: str | None = None) -> Any:
    """
    The tokenizer of a system, or of one of images its image processor: from its folder, or else from its base.

    Args:
        model ([`~hf_s3t.S3TModel`]): The model.
        base_model (`str`, *optional*): Id or path of the base; the recorded one if not given.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If neither has one.
    """
    is_of_images = not model.can_generate() and model.base_model.main_input_name == "pixel_values"
    auto: Any = AutoImageProcessor if is_of_images else AutoTokenizer
    problems = []
    for where, how in _places(model, base_model):
        try:
            return auto.from_pretrained(where, **how)
        except (OSError, ValueError) as error:
            problems.append(f"{where}: {' '.join(str(error).split())}")
    what = "image processor" if is_of_images else "tokenizer"
    raise FolderError(
        f"There is no {what} for {model.folder.path} ({'; '.join(problems)}). Save that of the training data into the "
        "system's folder with its `save_pretrained`."
    )


def _places(model: S3TModel, base_model: str | None) -> list[tuple[str, dict[str, Any]]]:
    folder = model.folder
    base = base_model or folder.record["base_model"].get("id")
    if not isinstance(folder, HubFolder):
        own: tuple[str, dict[str, Any]] = (str(folder.path), {})
        return [own, *([(str(base), {})] if base else [])]
    repo = folder.repo
    access = {"token": repo.token, "cache_dir": repo.cache_dir}
    own = (repo.repo_id, {"revision": folder.commit, **access})
    return [own, *([(str(base), access)] if base else [])]
