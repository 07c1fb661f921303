"""`/v1/models`: the one model that is served."""

from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from .access import requires
from .keys import Scope
from .problems import Problem
from .service import Service, Task


class ModelCard(BaseModel):
    """A model, as clients list it; and what it can be asked, for those that look."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "hf_s3t"
    task: Task
    has_chat_template: bool


class ModelList(BaseModel):
    """All there are: one."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


def routes(service: Service) -> APIRouter:
    """The routes that say which model there is."""
    router = APIRouter(prefix="/v1/models", tags=["models"], dependencies=[requires(Scope.ANSWER)])
    has_template = getattr(service.processor, "chat_template", None) is not None
    card = ModelCard(id=service.name, created=int(service.started), task=service.task, has_chat_template=has_template)

    @router.get("")
    async def list_models() -> ModelList:
        """The model that this server serves."""
        return ModelList(data=[card])

    @router.get("/{name:path}")
    async def show_model(name: str) -> ModelCard:
        """The model of this name."""
        check_model(service, name)
        return card

    return router


def check_model(service: Service, name: str | None) -> None:
    """
    Refuse a request for another model.

    Raises:
        [`~hf_s3t.server.problems.Problem`]: 404, with the name of the one there is.
    """
    if name is not None and name != service.name:
        raise Problem(
            404, f"There is no model of this name here. Ask for {service.name!r}.", "model_not_found", "model"
        )
