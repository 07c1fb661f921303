"""The command that serves a system over HTTP."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..server.keys import Keys
from ..server.settings import ServerSettings
from ..signing.keys import current_signer, signing_with
from . import rendering
from .arguments import SigningKey


_DEFAULT = ServerSettings()
# What the extra brings, by the names of its modules.
_OF_EXTRA = ("anyio", "fastapi", "httpx2", "prometheus_client", "pydantic", "starlette", "uvicorn")


# As `from_pretrained` writes them, options have underscores too.
def serve(
    system: Annotated[str, typer.Argument(help="The folder of a system, or its repository on the Hub.")],
    host: Annotated[str, typer.Option(help="The address to listen on; without keys one of this machine.")] = (
        _DEFAULT.host
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port; 0 takes a free one.")] = _DEFAULT.port,
    name: Annotated[
        str | None,
        typer.Option(help="What clients call the model; else the name of its folder or repository."),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(help="A JSON file of keys by scope, which others cannot read; else they are in the environment."),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model", "--base_model", help="Id or path of the base model; the recorded one if not given."
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the repository.")] = None,
    cache_dir: Annotated[Path | None, typer.Option("--cache-dir", "--cache_dir", help="The Hub's cache.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Precision of the base; as at training if not given.")] = None,
    preload: Annotated[str, typer.Option(help="`best`: hold the stacks that serve in memory; `all`: every stage.")] = (
        "best"
    ),
    when_exhausted: Annotated[
        str,
        typer.Option(
            "--when-exhausted",
            "--when_exhausted",
            help="With no shard left: `error`, or `base` to let a language model answer as its base.",
        ),
    ] = "error",
    gate: Annotated[str, typer.Option(help="What weighs the shards: `recorded`, `terms` or `none`.")] = "recorded",
    engine: Annotated[
        str | None,
        typer.Option(help="The address of a vLLM server that answers in the model's place; for systems of one shard."),
    ] = None,
    engine_exports: Annotated[
        Path | None, typer.Option(help="Where exports for the engine are written; beside the system if not given.")
    ] = None,
    on_running: Annotated[
        str, typer.Option(help="What an erasure does with running answers on stages that go: `wait` or `cancel`.")
    ] = _DEFAULT.on_running,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Choices of answers that run together.")] = (
        _DEFAULT.max_batch_size
    ),
    batch_wait: Annotated[float, typer.Option(min=0, help="Seconds that a batch waits for more.")] = (
        _DEFAULT.batch_wait
    ),
    max_concurrent_batches: Annotated[int, typer.Option(min=1, help="Batches under way at once.")] = (
        _DEFAULT.max_concurrent_batches
    ),
    overlap_wait: Annotated[
        float, typer.Option(min=0, help="Seconds until a batch begins beside the one under way.")
    ] = _DEFAULT.overlap_wait,
    max_queue: Annotated[int, typer.Option(min=1, help="Requests that may wait; more are refused with 429.")] = (
        _DEFAULT.max_queue
    ),
    max_body_bytes: Annotated[int, typer.Option(min=1, help="The largest body; larger ones are refused with 413.")] = (
        _DEFAULT.max_body_bytes
    ),
    max_prompt_tokens: Annotated[int | None, typer.Option(min=1, help="The longest prompt.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens that a request may ask for.")] = (
        _DEFAULT.max_new_tokens
    ),
    request_timeout: Annotated[float, typer.Option(help="Seconds until an answer is given up with 504.")] = (
        _DEFAULT.request_timeout
    ),
    body_timeout: Annotated[float, typer.Option(help="Seconds that a client has to send its request.")] = (
        _DEFAULT.body_timeout
    ),
    shutdown_timeout: Annotated[
        float, typer.Option(help="Seconds that running answers have when the server is stopped.")
    ] = _DEFAULT.shutdown_timeout,
    signing_key: SigningKey = None,
) -> None:
    """
    Serve a system over HTTP: answers in OpenAI's API, erasures, its state, and a page to see and steer it.

    With --engine a vLLM server answers, with the stack that serves; its key comes from HF_S3T_ENGINE_KEY.

    Keys come from --keys, or from HF_S3T_ANSWER_KEYS, HF_S3T_ERASE_KEYS and HF_S3T_STATUS_KEYS. SIGTERM and Ctrl+C end
    it when running answers have ended.
    """
    settings = ServerSettings(
        host=host,
        port=port,
        name=name,
        max_batch_size=max_batch_size,
        batch_wait=batch_wait,
        max_concurrent_batches=max_concurrent_batches,
        overlap_wait=overlap_wait,
        max_queue=max_queue,
        max_body_bytes=max_body_bytes,
        max_prompt_tokens=max_prompt_tokens,
        max_new_tokens=max_new_tokens,
        request_timeout=request_timeout,
        body_timeout=body_timeout,
        shutdown_timeout=shutdown_timeout,
        on_running=on_running,
    )
    found = Keys.load(keys)
    try:
        # Slow to import, and it needs the extra.
        from ..server.running import serve as run
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _OF_EXTRA:
            raise
        raise ConfigError(f"Serving needs {error.name}, which is not here: `pip install hf_s3t[serve]`.") from error
    with signing_with(signing_key):
        # One that cannot sign is told of before it serves, and not by the first erasure.
        current_signer()
        run(
            system,
            settings,
            found,
            revision=revision,
            cache_dir=cache_dir,
            base_model=base_model,
            dtype=dtype,
            preload=preload,
            when_exhausted=when_exhausted,
            gate=None if gate == "none" else gate,
            engine=engine,
            engine_exports=engine_exports,
            say=rendering.say,
        )
