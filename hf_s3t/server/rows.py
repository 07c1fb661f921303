"""The rows of a batch that generates: a prompt each, what is asked of it, and the parts of its answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .batching import Item
from .problems import Problem
from .row_text import RowText, TokenLogprob


@dataclass(frozen=True)
class Sampling:
    """
    How the next token is drawn. Rows that share a batch have it in common.

    Args:
        temperature (`float`): 0 takes the most probable token.
        top_p (`float`): The share of probability from which it is drawn.
        top_k (`int`): From how many tokens it is drawn at most; 0 for all.
        min_p (`float`): The least probability of a token, as a share of the largest.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn."""
        return self.temperature == 0


@dataclass(frozen=True)
class Adjustments:
    """
    How the scores of tokens are changed before one is drawn, for one row.

    Args:
        presence_penalty (`float`): Taken from the score of each token that the answer has already.
        frequency_penalty (`float`): The same, as often as it has it.
        repetition_penalty (`float`): By which the score of each token is divided that prompt or answer have.
        bias (mapping of `int` to `float`): Added to the scores of these tokens.
    """

    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    bias: Mapping[int, float] = field(default_factory=dict)

    def __bool__(self) -> bool:
        is_penalised = self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1
        return bool(is_penalised or self.bias)


@dataclass
class Part:
    """
    A part of the answer of one row; of a row that is not streamed there is one.

    Args:
        text (`str`): What comes next.
        logprobs (`list` of [`~hf_s3t.server.row_text.TokenLogprob`]): Of its tokens, if they were asked for.
        num_tokens (`int`): How many tokens were made so far.
        finish_reason (`str`, *optional*): `"stop"` or `"length"` in the last part.
    """

    text: str
    logprobs: list[TokenLogprob]
    num_tokens: int
    finish_reason: str | None = None

    @property
    def is_last(self) -> bool:
        """Whether nothing follows."""
        return self.finish_reason is not None


@dataclass(frozen=True)
class Wanted:
    """
    What is asked of one row.

    Args:
        prompt (`tuple[int, ...]`): Its tokens.
        max_tokens (`int`): How many are made at most.
        sampling ([`Sampling`], *optional*): How they are drawn.
        stop (`tuple[str, ...]`, *optional*): Texts before which the answer ends.
        logprobs (`int`, *optional*): How many alternatives each token is told with; `None` for no logprobs.
        adjustments ([`Adjustments`], *optional*): How scores are changed.
        is_streamed (`bool`, defaults to `False`): Whether parts are handed out as they are made.
        seed (`int`, *optional*): With which what is drawn is always the same.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling = Sampling()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    adjustments: Adjustments = Adjustments()
    is_streamed: bool = False
    seed: int | None = None


class Row(Item):
    """
    One choice of an answer.

    Args:
        wanted ([`Wanted`]): What is asked.
        tokenizer: That of the model.
        eos (`frozenset[int]`): The tokens that end an answer.
        put (callable): Given each part, or the problem, from the thread of the batch.
        first (callable): Called at the first token.
    """

    def __init__(
        self,
        wanted: Wanted,
        tokenizer: Any,
        eos: frozenset[int],
        put: Callable[[Part | Problem], None],
        first: Callable[[], None] = lambda: None,
    ):
        super().__init__(wanted.sampling, put)
        self.wanted, self._tokenizer, self._eos, self._put, self._first = wanted, tokenizer, eos, put, first
        self.begin_again()

    def begin_again(self) -> None:
        """As before its batch began."""
        super().begin_again()
        self.tokens: list[int] = []
        # Made in the thread of the batch: it reads the end of the prompt.
        self._text: RowText | None = None

    @property
    def is_over(self) -> bool:
        """Whether no more tokens are wanted."""
        return self.is_ended or self.is_cancelled

    def take(self, token: int, logprob: TokenLogprob | None) -> None:
        """
        Go on by one token.

        Args:
            token (`int`): The token.
            logprob ([`~hf_s3t.server.row_text.TokenLogprob`], *optional*): What is told of it.
        """
        if not self.tokens:
            self._first()
        self.tokens.append(token)
        if self._text is None:
            self._text = RowText(self._tokenizer, self.wanted.prompt, self.wanted.stop)
        if token in self._eos:
            self._end(self._text, "stop")
            return
        self._text.take(token, logprob)
        if self._text.is_stopped:
            self._end(self._text, "stop")
        elif len(self.tokens) >= self.wanted.max_tokens:
            self._end(self._text, "length")
        elif self.wanted.is_streamed:
            text, logprobs = self._text.ready()
            if text:
                self.has_sent = True
                self._put(Part(text, logprobs, len(self.tokens)))

    def _end(self, of_row: RowText, finish_reason: str) -> None:
        of_row.finish()
        text, logprobs = of_row.ready()
        self.is_ended = self.has_sent = True
        self._put(Part(text, logprobs, len(self.tokens), finish_reason))
