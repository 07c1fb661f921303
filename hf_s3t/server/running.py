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
from . import logs
from .access import is_loopback
from .app import create_app
from .engine.model import load_behind_engine
from .engine.passing_on import Engine
from .keys import VARIABLES, Keys
from .limits import impatient
from .service import Service
from .settings import ServerSettings


# The key that the engine was started with, if it was.
ENGINE_KEY = "HF_S3T_ENGINE_KEY"


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
    engine: str | None = None,
    engine_exports: str | os.PathLike[str] | None = None,
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
        engine (`str`, *optional*):
            The address of a vLLM server that answers in the model's place; see [`~hf_s3t.server.engine`]. Its key is
            in the environment variable `HF_S3T_ENGINE_KEY`.
        engine_exports (`str` or `os.PathLike`, *optional*): Where exports for the engine are written.
        say (callable, *optional*): Told, in a line, where the server listens.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If the address cannot be listened at, or others could ask without a key.
        [`~hf_s3t.errors.S3TError`]: If the system cannot be loaded.
    """
    check_address(settings, keys)
    logs.start()
    # Before a model is loaded in vain.
    with contextlib.closing(bound(settings)) as listener:
        if engine is not None:
            _check_options_of_engine(dtype, when_exhausted)
            run(
                service_behind_engine(path, settings, keys, engine, engine_exports, revision, cache_dir, base_model),
                listener,
                say,
            )
            return
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


def service_behind_engine(
    path: str | os.PathLike[str],
    settings: ServerSettings,
    keys: Keys,
    engine: str,
    exports: str | os.PathLike[str] | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    base_model: str | None = None,
) -> Service:
    """
    The service of a system that an engine answers for.

    Args:
        path (`str` or `os.PathLike`): The folder of the system, or its repository on the Hub.
        settings ([`~hf_s3t.server.settings.ServerSettings`]): How it is served.
        keys ([`~hf_s3t.server.keys.Keys`]): Who may ask what.
        engine (`str`): The address of the vLLM server.
        exports (`str` or `os.PathLike`, *optional*): Where exports for it are written.
        revision (`str`, *optional*): Branch, tag or commit of the repository.
        cache_dir (`str` or `os.PathLike`, *optional*): The Hub's cache.
        base_model (`str`, *optional*): Where the tokenizer is, if not in the system's folder.

    Raises:
        [`~hf_s3t.errors.S3TError`]: See [`~hf_s3t.server.engine.model.load_behind_engine`].
    """
    key = os.environ.get(ENGINE_KEY) or None
    model = load_behind_engine(path, engine, exports=exports, engine_key=key, revision=revision, cache_dir=cache_dir)
    try:
        service = Service(model, find_processor(model, base_model), settings, keys)
        service.engine = Engine(model, service.name, settings, service.metrics, key)
    except BaseException:
        model.end()
        raise
    service.on_stop.append(service.engine.end)
    return service


def _check_options_of_engine(dtype: str | None, when_exhausted: str) -> None:
    if dtype is not None:
        raise ConfigError(
            f"dtype={dtype!r} is for a base in this process, and the engine has its own. Leave it out, and start the "
            "engine with `--dtype`."
        )
    if when_exhausted != "error":
        raise ConfigError(
            f'when_exhausted={when_exhausted!r}, expected "error" with an engine: an exhausted system passes nothing '
            "on. Ask the engine for its base where that is meant."
        )


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
        http=impatient(service.settings.body_timeout),
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
