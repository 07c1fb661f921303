"""A batch of rows through `model.generate`: each row is read, and ended, by itself."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from ..model.modeling import S3TModel
from .row_text import TokenLogprob
from .rows import Row, Sampling


class Generator:
    """
    Runs batches of rows.

    Args:
        model ([`~hf_s3t.S3TModel`]): The model.
        tokenizer: Its tokenizer.
        largest (`int`): How many rows go through the model at once.
    """

    def __init__(self, model: S3TModel, tokenizer: Any, largest: int):
        self._model, self._tokenizer, self._largest = model, tokenizer, largest
        self._eos = eos_tokens(model, tokenizer)
        self._pad = _pad_token(model, tokenizer, self._eos)

    def run(self, rows: Sequence[Row]) -> None:
        """
        Answer rows of equal sampling.

        Raises:
            [`~hf_s3t.errors.CallStoppedError`]: If a deletion stopped it.
            [`~hf_s3t.errors.ExhaustedError`]: If no shard is left.
        """
        seed = rows[0].wanted.seed
        if seed is None:
            self._generate(rows)
            return
        # Nothing runs beside it, and what comes after is as random as before.
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for first in range(0, len(rows), self._largest):
                some = rows[first : first + self._largest]
                if not all(row.is_over for row in some):
                    self._generate(some)

    def _generate(self, rows: Sequence[Row]) -> None:
        ids, mask = self._padded([row.wanted.prompt for row in rows])
        scoring = Scoring(rows, self._tokenizer)
        self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=self._settings(rows[0].wanted.sampling, max(row.wanted.max_tokens for row in rows)),
            logits_processor=LogitsProcessorList([scoring] if scoring.has_work else []),
            stopping_criteria=StoppingCriteriaList([Reading(rows, scoring)]),
        )

    def _padded(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        length = max(map(len, prompts))
        ids = [[self._pad] * (length - len(prompt)) + list(prompt) for prompt in prompts]
        mask = [[0] * (length - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        device = self._model.device
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device)

    def _settings(self, sampling: Sampling, max_tokens: int) -> GenerationConfig:
        # What is not named is the model's own.
        settings: dict[str, Any] = dict(
            max_new_tokens=max_tokens,
            num_beams=1,
            repetition_penalty=1.0,
            pad_token_id=self._pad,
            eos_token_id=sorted(self._eos) or None,
            do_sample=not sampling.is_greedy,
        )
        if not sampling.is_greedy:
            settings |= dict(temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k)
            settings |= dict(min_p=sampling.min_p) if sampling.min_p else {}
        return GenerationConfig(**settings)


class Scoring(LogitsProcessor):
    """
    Changes the scores of each row as it asks, and keeps what the ensemble itself said, for logprobs.

    Args:
        rows (sequence of [`~hf_s3t.server.rows.Row`]): The rows of the batch.
        tokenizer: By which tokens are told.
    """

    def __init__(self, rows: Sequence[Row], tokenizer: Any):
        self._rows, self._tokenizer = rows, tokenizer
        self._most = max((row.wanted.logprobs for row in rows if row.wanted.logprobs is not None), default=None)
        self._changed = [number for number, row in enumerate(rows) if row.wanted.adjustments]
        self._logprobs: torch.Tensor | None = None

    @property
    def has_work(self) -> bool:
        """Whether a row asks for anything of it."""
        return self._most is not None or bool(self._changed)

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """As in Transformers."""
        if self._most is not None:
            self._logprobs = scores.log_softmax(-1)
        for number in self._changed:
            adjust(scores[number], self._rows[number])
        return scores

    def told(self, tokens: Sequence[int]) -> list[TokenLogprob | None]:
        """What is told of the tokens that were taken, one of each row."""
        if self._logprobs is None or self._most is None:
            return [None] * len(tokens)
        chosen = self._logprobs.gather(1, torch.tensor(tokens, device=self._logprobs.device)[:, None])[:, 0].tolist()
        top = self._logprobs.topk(min(self._most, self._logprobs.shape[1]))
        best = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return [
            self._of_token(token, logprob, list(zip(*of_row, strict=True)), row)
            for token, logprob, of_row, row in zip(tokens, chosen, best, self._rows, strict=True)
        ]

    def _of_token(
        self, token: int, logprob: float, best: Sequence[tuple[int, float]], row: Row
    ) -> TokenLogprob | None:
        wanted = row.wanted.logprobs
        if wanted is None:
            return None
        top = [(self._tokenizer.decode([other]), value) for other, value in best[:wanted]]
        return TokenLogprob(self._tokenizer.decode([token]), logprob, top)


def adjust(scores: torch.Tensor, row: Row) -> None:
    """
    Change the scores of one row in place.

    Args:
        scores (`torch.Tensor` of shape `(vocabulary,)`): Of each token.
        row ([`~hf_s3t.server.rows.Row`]): The row, with the tokens that it has by now.
    """
    wanted = row.wanted.adjustments
    if wanted.repetition_penalty != 1:
        seen = torch.tensor(sorted({*row.wanted.prompt, *row.tokens}), device=scores.device)
        before = scores[seen]
        factor = wanted.repetition_penalty
        scores[seen] = torch.where(before < 0, before * factor, before / factor)
    if row.tokens and (wanted.presence_penalty or wanted.frequency_penalty):
        made, counts = torch.tensor(row.tokens, device=scores.device).unique(return_counts=True)
        scores[made] -= wanted.presence_penalty + wanted.frequency_penalty * counts
    if wanted.bias:
        tokens, values = zip(*wanted.bias.items(), strict=True)
        scores[list(tokens)] += torch.tensor(values, device=scores.device, dtype=scores.dtype)


class Reading(StoppingCriteria):
    """
    Gives each row the token that was made for it, and says which rows go on.

    Args:
        rows (sequence of [`~hf_s3t.server.rows.Row`]): The rows of the batch.
        scoring ([`Scoring`]): What is told of the tokens.
    """

    def __init__(self, rows: Sequence[Row], scoring: Scoring):
        self._rows, self._scoring = rows, scoring

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        """As in Transformers: per row whether it has ended."""
        tokens = input_ids[:, -1].tolist()
        for row, token, told in zip(self._rows, tokens, self._scoring.told(tokens), strict=True):
            if not row.is_over:
                row.take(token, told)
        return cast(torch.BoolTensor, torch.tensor([row.is_over for row in self._rows], device=input_ids.device))


def eos_tokens(model: S3TModel, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: the model's, or else the tokenizer's."""
    found = model.generation_config.eos_token_id
    if found is None:
        found = getattr(tokenizer, "eos_token_id", None)
    return frozenset() if found is None else frozenset([found] if isinstance(found, int) else found)


def _pad_token(model: S3TModel, tokenizer: Any, eos: frozenset[int]) -> int:
    """What stands where a prompt is shorter than others: it counts for nothing."""
    for found in (model.generation_config.pad_token_id, getattr(tokenizer, "pad_token_id", None)):
        if isinstance(found, int):
            return found
    return min(eos, default=0)
