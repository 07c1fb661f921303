"""From what clients send to tokens, and what of it is too much."""

import threading
from collections.abc import Sequence
from typing import Any

from jinja2.exceptions import TemplateError

from ..model.modeling import S3TModel
from .problems import Problem
from .schemas import CompletionRequest, Message
from .settings import ServerSettings


class Prompts:
    """
    Makes tokens of prompts and chats.

    Args:
        model ([`~hf_s3t.S3TModel`]): The model.
        tokenizer: Its tokenizer.
        settings ([`~hf_s3t.server.settings.ServerSettings`]): What is too long.
    """

    def __init__(self, model: S3TModel, tokenizer: Any, settings: ServerSettings):
        self._tokenizer, self._settings = tokenizer, settings
        self.vocabulary = int(getattr(model.config.get_text_config(), "vocab_size", 0))
        self.room = _room(model, tokenizer)
        # A fast tokenizer is not for two threads at once.
        self._lock = threading.Lock()

    def of_completion(self, request: CompletionRequest) -> list[tuple[int, ...]]:
        """
        The tokens of each prompt.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: 422 for tokens that there are not, and for no tokens.
        """
        given = request.prompt
        prompts: list[Any] = [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)
        return [self._of_prompt(prompt) for prompt in prompts]

    def of_chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """
        The tokens of a chat, up to where the assistant goes on.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: 422 if the tokenizer has no template, or that refuses the messages.
        """
        if not getattr(self._tokenizer, "chat_template", None):
            raise Problem(
                422,
                "The tokenizer of this system has no chat template. Ask `/v1/completions`; or save the tokenizer into "
                "the system's folder with a `chat_template`, and start the server again.",
                "no_chat_template",
            )
        # Templates know the elder name.
        chat = [{"role": _ROLES.get(one.role, one.role), "content": one.text} for one in messages]
        try:
            with self._lock:
                text = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
                ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        except TemplateError as error:
            raise Problem(422, f"The chat template refuses these messages: {error}.", "messages", "messages") from None
        return self._checked(ids)

    def fields_of(self, text: str) -> dict[str, Any]:
        """
        What a classifier takes of a text.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: 422 if it has no tokens, or too many.
        """
        with self._lock:
            fields = dict(self._tokenizer(text))
        ids = self._checked(fields["input_ids"])
        most = min(filter(None, (self.room, self._settings.max_prompt_tokens)), default=len(ids))
        if len(ids) > most:
            raise _too_long(f"A text has {len(ids)} tokens, and {most} are taken here. Send less.")
        return fields

    def most_tokens(self, prompt: Sequence[int], wanted: int | None) -> int:
        """
        How many tokens may follow a prompt.

        Args:
            prompt (sequence of `int`): Its tokens.
            wanted (`int`, *optional*): How many were asked for; as many as there is room for if not given.

        Raises:
            [`~hf_s3t.server.problems.Problem`]: 422 if prompt or answer are too long.
        """
        longest = self._settings.max_prompt_tokens
        if longest is not None and len(prompt) > longest:
            raise _too_long(f"The prompt has {len(prompt)} tokens, and this server takes {longest}. Send less.")
        if wanted is not None and wanted > self._settings.max_new_tokens:
            most = self._settings.max_new_tokens
            raise Problem(422, f"`max_tokens` is {wanted}, and at most {most} here.", "max_tokens", "max_tokens")
        if self.room is None:
            return wanted or self._settings.max_new_tokens
        if len(prompt) + (wanted or 1) > self.room:
            raise _too_long(
                f"The model has room for {self.room} tokens: the prompt has {len(prompt)}, and {wanted or 1} more "
                "were asked for. Send or ask for less."
            )
        return wanted or min(self._settings.max_new_tokens, self.room - len(prompt))

    def _of_prompt(self, prompt: Any) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            return self._checked(prompt)
        with self._lock:
            ids = self._tokenizer(prompt)["input_ids"]
        if not ids and getattr(self._tokenizer, "bos_token_id", None) is not None:
            ids = [self._tokenizer.bos_token_id]
        return self._checked(ids)

    def _checked(self, ids: Sequence[int]) -> tuple[int, ...]:
        if not ids:
            raise Problem(422, "The prompt has no tokens. Send some text.", "empty_prompt", "prompt")
        if not all(0 <= one < self.vocabulary for one in ids):
            message = f"Tokens of this model are numbers from 0 to {self.vocabulary - 1}."
            raise Problem(422, message, "unknown_token", "prompt")
        return tuple(ids)


_ROLES = {"developer": "system"}


def _too_long(message: str) -> Problem:
    return Problem(422, message, "context_length_exceeded", "prompt")


def _room(model: S3TModel, tokenizer: Any) -> int | None:
    """How many tokens the base takes, where it says so."""
    config = model.config.get_text_config()
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        found = getattr(config, name, None)
        if isinstance(found, int):
            return found
    longest = getattr(tokenizer, "model_max_length", None)
    # Tokenizers that do not know say a number without meaning.
    return longest if isinstance(longest, int) and longest < 10**9 else None
