"""What an engine is asked for a request: its fields, with the limits of this server."""

from collections.abc import Sequence
from typing import Any

from anyio import to_thread

from ..schemas import ChatRequest, CompletionRequest
from ..service import Service
from .passing_on import Engine, PassedOn


# What the schemas take of a client because it asks for nothing, and some engines do not know.
_ASKS_NOTHING = {"echo", "best_of", "suffix", "response_format", "stream_options"}


async def ask_engine(service: Service, request: CompletionRequest | ChatRequest) -> PassedOn:
    """
    Have the engine answer a request that this server takes.

    Prompts are counted with this server's tokenizer, so that its limits are those of a system that answers itself; a
    chat for whose messages the engine alone has a template is counted by the engine.

    Args:
        service ([`~hf_s3t.server.service.Service`]): The service, with an engine.
        request ([`~hf_s3t.server.schemas.CompletionRequest`] or [`~hf_s3t.server.schemas.ChatRequest`]): The request.

    Raises:
        [`~hf_s3t.server.problems.Problem`]: If it is refused.
    """
    engine: Engine = service.engine
    fields = request.model_dump(exclude_unset=True, exclude=_ASKS_NOTHING)
    if request.tells_usage:
        fields["stream_options"] = {"include_usage": True}
    if isinstance(request, CompletionRequest):
        prompts = await to_thread.run_sync(service.prompts.of_completion, request)
        fields["max_tokens"] = min(_most(service, prompt, request.max_tokens) for prompt in prompts)
        return engine.complete("/completions", fields, request.stream)
    asked = request.max_completion_tokens or request.max_tokens
    fields.pop("max_completion_tokens", None)
    prompt: Sequence[int] = ()
    if getattr(service.processor, "chat_template", None):
        prompt = await to_thread.run_sync(service.prompts.of_chat, request.messages)
    fields["max_tokens"] = _most(service, prompt, asked)
    if not prompt and asked is None:
        # The engine knows how much the prompt leaves.
        del fields["max_tokens"]
    return engine.complete("/chat/completions", fields, request.stream)


def _most(service: Service, prompt: Sequence[Any], asked: int | None) -> int:
    most = service.prompts.most_tokens(prompt, asked)
    room = service.engine.room
    return most if asked is not None or room is None else max(1, min(most, room - len(prompt)))
