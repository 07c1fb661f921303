"""`/v1/classify`: what texts or images are, in the form that vLLM has."""

import base64
import binascii
import io
import time
import uuid
from typing import Annotated, Any, Literal, Self

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from starlette.responses import Response

from ..errors import ConfigError
from .access import requires
from .answers import Answer, AnswerResponse, submit
from .classification import Classified, Input
from .keys import Scope
from .models import check_model
from .problems import PROBLEMS, Problem
from .schemas import Request, Text, Usage
from .service import Service, Task


_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
# Of all images of a request. A small file may hold an image that fills the memory.
_MOST_PIXELS = 50_000_000
# A processor that resizes the shorter side makes much of one that is long and thin.
_MOST_ELONGATED = 200
_MOST_INPUTS = 128


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Inputs = Annotated[
    list[Text],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
    Field(min_length=1, max_length=_MOST_INPUTS),
]


class ClassifyRequest(Request):
    """Texts, or images as data URLs (`data:image/png;base64,…`), to be classified."""

    model: str | None = None
    input: Inputs | None = None
    images: Inputs | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if (self.input is None) == (self.images is None):
            raise ValueError("Give either `input` or `images`")
        return self


class Classification(BaseModel):
    """What one input is; of a model with one output, which gives rewards say, the score that it gives."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    score: float | None = None


class ClassifyAnswer(BaseModel):
    """What the inputs are, in their order."""

    id: str = Field(default_factory=lambda: f"classify-{uuid.uuid4().hex}")
    object: Literal["list"] = "list"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    data: list[Classification]
    usage: Usage


def routes(service: Service) -> APIRouter:
    """The routes that classify."""
    router = APIRouter(prefix="/v1", tags=["answers"], dependencies=[requires(Scope.ANSWER)], responses=PROBLEMS)
    # Images take memory while they are read.
    reading = CapacityLimiter(2)

    @router.post("/classify", response_model=ClassifyAnswer)
    async def classify(request: ClassifyRequest) -> Response:
        """Say of each text or image what it is."""
        check_model(service, request.model)
        fields = await to_thread.run_sync(_fields_of, service, request, limiter=reading)
        answer = service.answers.open()
        inputs = [Input(one, answer.put_for(index)) for index, one in enumerate(fields)]
        submit(service.batcher, service.answers, answer, inputs)
        num_tokens = sum(len(one["input_ids"]) for one in fields if "input_ids" in one)

        async def collect() -> dict[str, Any]:
            return await _collect(service, answer, num_tokens)

        return AnswerResponse(service.answers, answer, collected=collect)

    return router


async def _collect(service: Service, answer: Answer[Classified], num_tokens: int) -> dict[str, Any]:
    labels: dict[Any, str] = dict(service.model.config.id2label or {})
    data = []
    for index, one in enumerate(await answer.all()):
        number, count = max(range(len(one.probs)), key=one.probs.__getitem__), len(one.probs)
        label = labels.get(number, str(number))
        data.append(Classification(index=index, label=label, probs=one.probs, num_classes=count, score=one.score))
    service.metrics.tokens(num_tokens, 0)
    answer.tokens = (num_tokens, 0)
    told = ClassifyAnswer(model=service.name, data=data, usage=Usage.of(num_tokens, 0))
    # To classes no score belongs, not even none.
    return told.model_dump(exclude_none=True)


def _fields_of(service: Service, request: ClassifyRequest) -> list[dict[str, Any]]:
    """What the model takes, of each input."""
    if service.task is Task.GENERATION:
        raise Problem(404, "This system makes text. Ask `/v1/completions` or `/v1/chat/completions`.", "wrong_task")
    if service.task is Task.IMAGE_CLASSIFICATION:
        # vLLM's clients know the one field.
        found, room = [], _MOST_PIXELS
        for one in request.images or request.input or ():
            image = _read_image(one, room)
            room -= image.width * image.height
            found.append(_of_image(service.processor, image))
        return found
    if request.input is None:
        raise Problem(422, "This system classifies texts. Send them as `input`.", "wrong_input", "images")
    return [service.prompts.fields_of(text) for text in request.input]


def _of_image(processor: Any, image: Any) -> dict[str, Any]:
    return {name: value[0] for name, value in processor(images=[image], return_tensors="pt").items()}


def _read_image(url: str, most: int) -> Any:
    """The image of a data URL, if it has so many pixels at most."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ConfigError("Images are read by Pillow, which is not here: `pip install hf_s3t[vision]`.") from error
    head, _, data = url.partition(",")
    if not (head.startswith("data:") and head.endswith(";base64")):
        raise _no_image("it is no data URL with base64")
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=_FORMATS) as opened:
            if opened.width * opened.height > most:
                raise _no_image(f"those of a request have more than {_MOST_PIXELS} pixels")
            if max(opened.size) > _MOST_ELONGATED * min(opened.size):
                raise _no_image(f"one side is more than {_MOST_ELONGATED} times as long as the other")
            return opened.convert("RGB")
    except (OSError, ValueError, binascii.Error, SyntaxError, Image.DecompressionBombError):
        raise _no_image(f"it cannot be read as {', '.join(_FORMATS)}") from None


def _no_image(why: str) -> Problem:
    expected = "Send `data:image/png;base64,` and the bytes in base64"
    return Problem(422, f"An image is not taken: {why}. {expected}.", "invalid_image", "images")
