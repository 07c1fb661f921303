"""`/v1/chat/completions`: what the assistant says next in a chat."""

from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from anyio import to_thread
from fastapi import APIRouter
from starlette.responses import Response

from .access import requires
from .answers import Answer, AnswerResponse
from .asking import check_task, rows_of, usage_of
from .engine.asking import ask_engine
from .keys import Scope
from .models import check_model
from .problems import PROBLEMS
from .row_text import TokenLogprob
from .rows import Part
from .schemas import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatRequest,
    Delta,
    TopLogprob,
    Usage,
)
from .service import Service


def routes(service: Service) -> APIRouter:
    """The routes that continue chats."""
    router = APIRouter(prefix="/v1", tags=["answers"], dependencies=[requires(Scope.ANSWER)], responses=PROBLEMS)

    @router.post("/chat/completions", response_model=ChatAnswer)
    async def chat(request: ChatRequest) -> Response:
        """Say what the assistant says next; with `stream`, as server-sent events."""
        check_task(service)
        check_model(service, request.model)
        if service.engine is not None:
            return await ask_engine(service, request)
        prompt = await to_thread.run_sync(service.prompts.of_chat, request.messages)
        logprobs = (request.top_logprobs or 0) if request.logprobs else None
        answer = rows_of(service, request, [prompt], request.max_completion_tokens or request.max_tokens, logprobs)
        chatting = _Chatting(service, request, answer, len(prompt))
        if request.stream:
            return AnswerResponse(service.answers, answer, streamed=chatting.events())
        return AnswerResponse(service.answers, answer, collected=chatting.collect)

    return router


class _Chatting:
    """The answer to one request."""

    def __init__(self, service: Service, request: ChatRequest, answer: Answer[Part], prompt_tokens: int):
        self._service, self._request, self._answer = service, request, answer
        self._usage_of = partial(usage_of, service, answer, prompt_tokens)
        self._head = ChatChunk(model=service.name, choices=[])

    async def collect(self) -> dict[str, Any]:
        parts = await self._answer.all()
        choices = [
            ChatChoice.model_construct(
                index=index,
                message=AnswerMessage(content=part.text),
                logprobs=self._logprobs(part),
                finish_reason=part.finish_reason,
            )
            for index, part in enumerate(parts)
        ]
        return ChatAnswer(model=self._service.name, choices=choices, usage=self._usage_of(parts)).model_dump()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        last: dict[int, Part] = {}
        async for index, part in self._answer.parts():
            if index not in last:
                yield self._chunk([self._choice(index, Delta(role="assistant", content=""))])
            last[index] = part
            delta = Delta(content=part.text) if part.text else Delta()
            yield self._chunk([self._choice(index, delta, part)])
        usage = self._usage_of(list(last.values()))
        if self._request.tells_usage:
            yield self._chunk([], usage)

    def _choice(self, index: int, delta: Delta, part: Part | None = None) -> ChatChunkChoice:
        return ChatChunkChoice.model_construct(
            index=index,
            delta=delta,
            logprobs=self._logprobs(part) if part is not None else None,
            finish_reason=part.finish_reason if part is not None else None,
        )

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> dict[str, Any]:
        chunk = self._head.model_copy(update={"choices": choices, "usage": usage}).model_dump()
        for choice in chunk["choices"]:
            choice["delta"] = {name: value for name, value in choice["delta"].items() if value is not None}
        return chunk

    def _logprobs(self, part: Part) -> ChatLogprobs | None:
        if not self._request.logprobs:
            return None
        return ChatLogprobs(content=[_of_token(told) for told in part.logprobs])


def _of_token(told: TokenLogprob) -> ChatLogprob:
    top = [TopLogprob(token=text, logprob=value, bytes=_bytes(text)) for text, value in told.top]
    return ChatLogprob(token=told.token, logprob=told.logprob, bytes=_bytes(told.token), top_logprobs=top)


def _bytes(text: str) -> list[int]:
    return list(text.encode("utf-8", "surrogatepass"))
