"""`/v1/completions`: what comes after a text."""

from fastapi import APIRouter

from .access import requires
from .answers import answer
from .keys import Scope
from .schemas import CompletionAnswer, CompletionChoice, CompletionRequest
from .service import Service


def routes(service: Service) -> APIRouter:
    """The routes that complete texts."""
    router = APIRouter(prefix="/v1", tags=["answers"], dependencies=[requires(Scope.ANSWER)])

    @router.post("/completions")
    async def complete(body: CompletionRequest) -> CompletionAnswer:
        """Complete a text."""
        text, usage = await answer(service, body.prompt, body.max_tokens)
        choice = CompletionChoice(index=0, text=text, finish_reason="stop")
        return CompletionAnswer(model=service.name, choices=[choice], usage=usage)

    return router
