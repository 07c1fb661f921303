"""`/v1/completions`: what comes after a text."""

from collections.abc import AsyncIterator, Sequence
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
from .schemas import CompletionAnswer, CompletionChoice, CompletionLogprobs, CompletionRequest, Usage
from .service import Service


def routes(service: Service) -> APIRouter:
    """The routes that complete texts."""
    router = APIRouter(prefix="/v1", tags=["answers"], dependencies=[requires(Scope.ANSWER)], responses=PROBLEMS)

    @router.post("/completions", response_model=CompletionAnswer)
    async def complete(request: CompletionRequest) -> Response:
        """Complete a text, or several; with `stream`, as server-sent events."""
        check_task(service)
        check_model(service, request.model)
        if service.engine is not None:
            return await ask_engine(service, request)
        prompts = await to_thread.run_sync(service.prompts.of_completion, request)
        answer = rows_of(service, request, prompts, request.max_tokens, request.logprobs)
        completing = _Completing(service, request, answer, sum(map(len, prompts)))
        if request.stream:
            return AnswerResponse(service.answers, answer, streamed=completing.events())
        return AnswerResponse(service.answers, answer, collected=completing.collect)

    return router


class _Completing:
    """The answer to one request."""

    def __init__(self, service: Service, request: CompletionRequest, answer: Answer[Part], prompt_tokens: int):
        self._service, self._request, self._answer = service, request, answer
        self._usage_of = partial(usage_of, service, answer, prompt_tokens)
        self._head = CompletionAnswer(model=service.name, choices=[])

    async def collect(self) -> dict[str, Any]:
        parts = await self._answer.all()
        choices = [self._choice(index, part) for index, part in enumerate(parts)]
        return self._head.model_copy(update={"choices": choices, "usage": self._usage_of(parts)}).model_dump()

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        last: dict[int, Part] = {}
        async for index, part in self._answer.parts():
            last[index] = part
            yield self._chunk([self._choice(index, part)])
        usage = self._usage_of(list(last.values()))
        if self._request.tells_usage:
            yield self._chunk([], usage)

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> dict[str, Any]:
        return self._head.model_copy(update={"choices": choices, "usage": usage}).model_dump()

    def _choice(self, index: int, part: Part) -> CompletionChoice:
        wanted = self._request.logprobs
        logprobs = None if wanted is None else _logprobs(part.logprobs, wanted)
        return CompletionChoice.model_construct(
            index=index, text=part.text, logprobs=logprobs, finish_reason=part.finish_reason
        )


def _logprobs(told: Sequence[TokenLogprob], wanted: int) -> CompletionLogprobs:
    return CompletionLogprobs(
        tokens=[one.token for one in told],
        token_logprobs=[one.logprob for one in told],
        top_logprobs=[dict(one.top) for one in told] if wanted else None,
        text_offset=[one.start for one in told],
    )
