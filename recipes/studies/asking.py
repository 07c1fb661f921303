"""How rows are answered, token by token: by a model, or by members that are weighed in several ways."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from hf_s3t import S3TModel


Batch = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Answers:
    """
    How rows are answered, one entry per row.

    Args:
        right (`np.ndarray`): Whether greedy decoding would give the answer, to the letter.
        tokens (`np.ndarray`): The share of its tokens that would come next.
        loss (`np.ndarray`): Their mean negative log likelihood.
    """

    right: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray


@torch.no_grad()
def answers(model: Any, batches: Iterable[Batch]) -> Answers:
    """
    Ask a model for the answers of rows, given their questions.

    Args:
        model: What answers.
        batches (iterable of mappings): The rows: `input_ids`, `attention_mask`, and `labels` on the answers alone.
    """
    return _put_together([_judged(_said(model, batch), batch) for batch in batches])


@torch.no_grad()
def answers_by(model: S3TModel, batches: Sequence[Batch], weights: Mapping[Any, torch.Tensor]) -> dict[Any, Answers]:
    """
    Ask each member once, and weigh what they say in several ways.

    Args:
        model ([`~hf_s3t.S3TModel`]): The ensemble.
        batches (sequence of mappings): The rows, as [`answers`] takes them.
        weights (mapping to `torch.Tensor` of shape `(rows, num_shards)`): Way -> what weighs the shards.
    """
    found: dict[Any, list[Answers]] = {way: [] for way in weights}
    done = 0
    for batch in batches:
        size = len(batch["input_ids"])
        members = []
        for one in torch.eye(next(iter(weights.values())).shape[1]).double():
            with model.weighted_by(one.expand(size, -1)):
                members.append(_said(model, batch))
        stacked = torch.stack(members, -1)
        rows = _is_asked(batch).nonzero()[:, 0]
        for way, shares in weights.items():
            log_weights = shares[done : done + size].to(stacked).log()[rows, None]
            found[way].append(_judged((stacked + log_weights).logsumexp(-1), batch))
        done += size
    return {way: _put_together(parts) for way, parts in found.items()}


def _is_asked(batch: Batch) -> torch.Tensor:
    """Which tokens after the first belong to answers, `(rows, tokens - 1)`."""
    return batch["labels"][:, 1:] != -100


def _said(model: Any, batch: Batch) -> torch.Tensor:
    """The log probabilities of words where answers are asked for, row after row, `(places, words)`."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits[:, :-1]
    return logits[_is_asked(batch).to(logits.device)].float().log_softmax(-1).cpu()


def _judged(scores: torch.Tensor, batch: Batch) -> Answers:
    """What log probabilities, `(places, words)`, are worth as answers of a batch."""
    asked = _is_asked(batch)
    labels, counts = batch["labels"][:, 1:][asked], asked.sum(1)

    def of_rows(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(asked.shape, dtype=torch.float64).masked_scatter(asked, values.double()).sum(1)

    hits = of_rows(scores.argmax(-1) == labels)
    loss = of_rows(-scores.gather(-1, labels[:, None])[:, 0])
    return Answers(*(one.numpy() for one in ((hits == counts).double(), hits / counts, loss / counts)))


def _put_together(parts: Sequence[Answers]) -> Answers:
    return Answers(*(np.concatenate([getattr(one, field.name) for one in parts]) for field in fields(Answers)))
