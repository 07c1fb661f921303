"""What clients send and get: the fields of OpenAI's API that this server knows."""

import time
import uuid
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class CompletionRequest(BaseModel):
    """A text to be completed."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    prompt: str
    max_tokens: int = Field(default=16, ge=1)
    temperature: float = Field(default=0.0, ge=0, le=2)


class Usage(BaseModel):
    """How many tokens went in and came out."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """One completion."""

    index: int
    text: str
    finish_reason: Literal["stop", "length"] | None


class CompletionAnswer(BaseModel):
    """The completions of a text."""

    id: str = Field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[CompletionChoice]
    usage: Usage
