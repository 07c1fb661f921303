"""What clients of completions and chats send and get: the fields of OpenAI's API, and some of vLLM's."""

import time
import uuid
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator


FinishReason = Literal["stop", "length"]
# They change nothing in an answer.
_HARMLESS = (
    "metadata",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
)
_MOST_STOPS = 16
_MOST_CHOICES = 128
_MOST_BIASES = 1024


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _whole(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("it has half of a surrogate pair, which is no character") from None
    return text


# JSON can say what no tokenizer reads.
Text = Annotated[str, AfterValidator(_whole)]
Stop = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=1024)]],
    BeforeValidator(_as_list, json_schema_input_type=str | list[str]),
    Field(max_length=_MOST_STOPS),
]


class Request(BaseModel):
    """What is asked. A field that this server does not know is refused, since it may change the answer."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_harmless(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known = cls.model_fields
        # A null says what leaving out says; what is known decides itself about it.
        return {
            name: value
            for name, value in data.items()
            if name not in _HARMLESS and (value is not None or (name in known and known[name].is_required()))
        }


class StreamOptions(Request):
    """What a stream tells besides."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(Request):
    """What completions and chats have in common."""

    model: str | None = Field(default=None, description="The name that `/v1/models` says.")
    n: int = Field(default=1, ge=1, le=_MOST_CHOICES, description="How many choices.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 takes the most probable token.")
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=1_000_000, description="-1 and 0: of all tokens.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    presence_penalty: float = Field(default=0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, ge=0.01, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default={}, max_length=_MOST_BIASES)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1, description="What is drawn is the same again.")
    stop: Stop = Field(default=[], description="The answer ends before the first of these.")
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _options_of_streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` is for streams. Leave it out, or give `stream`")
        return self

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest):
    """A text, or several, to be completed; as texts or as tokens."""

    prompt: (
        Text
        | Annotated[list[Text], Field(min_length=1, max_length=_MOST_CHOICES)]
        | Annotated[list[int], Field(min_length=1)]
        | Annotated[list[Annotated[list[int], Field(min_length=1)]], Field(min_length=1, max_length=_MOST_CHOICES)]
    )
    max_tokens: int = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=20, description="How many alternatives each token has.")
    echo: Literal[False] = False
    best_of: Literal[1] = 1
    suffix: Literal[""] = ""

    @model_validator(mode="after")
    def _choices(self) -> Self:
        of_many = isinstance(self.prompt, list) and not isinstance(self.prompt[0], int)
        if of_many and len(self.prompt) * self.n > _MOST_CHOICES:
            raise ValueError(f"`n` choices of each prompt are more than {_MOST_CHOICES}. Ask for less at once")
        return self


class TextPart(Request):
    """A part of what a message says."""

    type: Literal["text"]
    text: Text


class Message(Request):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: str | None = None

    @property
    def text(self) -> str:
        """All that it says."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ResponseFormat(Request):
    """The form of an answer: text."""

    type: Literal["text"]


class ChatRequest(GenerationRequest):
    """A chat that is to be continued by the assistant."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _logprobs(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`. Give it, or leave both out")
        return self


class Usage(BaseModel):
    """How many tokens went in and came out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt: int, completion: int) -> Self:
        """Of so many."""
        return cls(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class CompletionLogprobs(BaseModel):
    """The tokens of a completion."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One completion, or in a stream a part of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


def _now() -> int:
    return int(time.time())


class CompletionAnswer(BaseModel):
    """Completions, or in a stream parts of them."""

    id: str = Field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=_now)
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TopLogprob(BaseModel):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(TopLogprob):
    """A token that came, and those that might have."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """The tokens of an answer."""

    content: list[ChatLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """What the assistant says."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason


class ChatAnswer(BaseModel):
    """The answers to a chat."""

    id: str = Field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=_now)
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What comes next in an answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A part of one answer."""

    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None


class ChatChunk(BaseModel):
    """Parts of the answers to a chat."""

    id: str = Field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = Field(default_factory=_now)
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
