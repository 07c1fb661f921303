"""The text of one answer as its tokens come: characters are handed out whole, and nothing of a stop string ever is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


# What stands for bytes that are no whole character yet.
_UNKNOWN = "\ufffd"
# How many tokens of the prompt the first ones are read with: some tokenizers drop a space at a beginning.
_BEFORE = 6


@dataclass
class TokenLogprob:
    """
    What is told of a token.

    Args:
        token (`str`): Its text.
        logprob (`float`): The logarithm of its probability, in the ensemble's own distribution.
        top (`list` of `tuple[str, float]`): The most probable tokens there, with theirs.
        start (`int`, defaults to 0): Where in the answer its text begins, in characters.
        end (`int`, defaults to 0): Where it ends.
    """

    token: str
    logprob: float
    top: list[tuple[str, float]]
    start: int = 0
    end: int = 0


class Detokenizer:
    """
    From tokens to text, one by one; all that it gives, joined, is the text of the whole.

    Args:
        tokenizer: With `decode`.
        before (sequence of `int`): Tokens that come before the first one.
    """

    def __init__(self, tokenizer: Any, before: Sequence[int] = ()):
        self._tokenizer = tokenizer
        # The tokens that are read with the next one, how many of them are handed out, and the text of those.
        self._ids = list(before[-_BEFORE:])
        self._read = len(self._ids)
        self._known = self._decode(self._ids)

    def take(self, token: int) -> str:
        """The text that a token adds; nothing while it is part of a character."""
        self._ids.append(token)
        text = self._decode(self._ids)
        if len(text) <= len(self._known) or text.endswith(_UNKNOWN):
            return ""
        added = text[len(self._known) :]
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        self._known = self._decode(self._ids)
        return added

    def rest(self) -> str:
        """What was held back, at the end."""
        return self._decode(self._ids)[len(self._known) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class StopStrings:
    """
    Cuts a text that comes in pieces before the first of some strings.

    Args:
        strings (sequence of `str`): The strings, none of them empty.

    Example:

    ```python
    >>> from hf_s3t.server.row_text import StopStrings

    >>> stop = StopStrings(["END"])
    >>> stop.take("the E"), stop.take("ve and the EN"), stop.take("D of it"), stop.is_found
    ('the ', 'Eve and the ', '', True)
    ```
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = tuple(strings)
        self._held = ""
        self.is_found = False

    def take(self, text: str) -> str:
        """What of the text so far can be handed out now."""
        text, self._held = self._held + text, ""
        found = [place for place in map(text.find, self._strings) if place >= 0]
        if found:
            self.is_found = True
            return text[: min(found)]
        held = max((_overlap(text, string) for string in self._strings), default=0)
        if held:
            self._held = text[-held:]
            return text[:-held]
        return text

    def rest(self) -> str:
        """What was held back, at the end."""
        return "" if self.is_found else self._held


def _overlap(text: str, string: str) -> int:
    """How long the end of a text is with which a string, that is not in it, may begin."""
    longest = min(len(text), len(string) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(string[:length])), 0)


class RowText:
    """
    The text of one answer.

    Args:
        tokenizer: That of the model.
        prompt (sequence of `int`): The tokens before it.
        stop (sequence of `str`): Strings before which it ends.
    """

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stop: Sequence[str]):
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop = StopStrings(stop)
        # How much was read, and handed out or ready to be, in characters.
        self._length = self._safe = 0
        self._ready: list[str] = []
        # Of tokens whose text is not known yet, and of those that wait for theirs to be handed out.
        self._unread: list[TokenLogprob] = []
        self._logprobs: list[TokenLogprob] = []
        self._is_finished = False

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found."""
        return self._stop.is_found

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        """Go on by one token."""
        if logprob is not None:
            self._unread.append(logprob)
        self._add(self._detokenizer.take(token))

    def finish(self) -> None:
        """There are no more tokens."""
        if not self.is_stopped:
            self._add(self._detokenizer.rest())
        self._hand_out(self._stop.rest())
        if not self.is_stopped:
            self._place(self._length)
        self._is_finished = True

    def ready(self) -> tuple[str, list[TokenLogprob]]:
        """The text that can be handed out since this was last asked, and its tokens."""
        text, self._ready = "".join(self._ready), []
        whole = [entry for entry in self._logprobs if entry.end <= self._safe]
        self._logprobs = [entry for entry in self._logprobs if entry.end > self._safe]
        return text, whole

    def _add(self, text: str) -> None:
        if text:
            self._place(self._length + len(text))
            self._hand_out(self._stop.take(text))

    def _place(self, end: int) -> None:
        """Tokens whose text came together begin and end together."""
        for entry in self._unread:
            entry.start, entry.end = self._length, end
        self._logprobs += self._unread
        self._unread, self._length = [], end

    def _hand_out(self, text: str) -> None:
        self._safe += len(text)
        self._ready.append(text)
