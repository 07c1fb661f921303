"""Gates: how much each shard knows of a prompt. They are computed from what is in, and never trained."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn, Protocol

import numpy as np
import torch
from transformers import AutoTokenizer

from ..checks import check_gate
from ..config import S3TConfig
from ..errors import ConfigError, FolderError, S3TError
from ..folder.system import SystemFolder
from ..hub.folder import HubFolder
from ..records.digests import DigestKey
from ..records.terms import TermCounts, terms_of, vocabulary_digest


# The setting is what the system's config says.
RECORDED = "recorded"
# What a member must add at least to be asked: where there are more shards than it allows for, half of an equal share.
LEAST_WEIGHT = 1e-3
# Of the weight that equal weights would not give them, how much the best members have where they stand out.
_STANDING_OUT = 0.5


class Gate(Protocol):
    """
    Gives each row of a call weights over the shards. It is never changed: a deletion puts another in its place.

    What it goes by must be a pure function of the rows that are still in, or of nothing: what was learned from rows
    otherwise would outlive them.
    """

    def weights(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, seen: Sequence[frozenset[int]]
    ) -> torch.Tensor:
        """
        How much each shard shall have to say.

        Args:
            input_ids (`torch.Tensor` of shape `(rows, positions)`, *optional*): The prompts.
            attention_mask (`torch.Tensor` of shape `(rows, positions)`, *optional*): What of them counts; all if not
                given.
            seen (sequence of `frozenset[int]`): Per shard the slices that what serves has seen; none, it is dead.

        Returns:
            `torch.Tensor` of shape `(rows, shards)` in double precision: of each row they sum to one over the living
            shards, and are 0 for dead ones.
        """
        ...


class GivenWeights:
    """
    A gate that says what it was told: an oracle's weights, or those that a server looked up elsewhere.

    Args:
        given (`torch.Tensor` of shape `(rows, shards)` or `(shards,)`):
            Weights of each row, or for all rows; not negative, not all 0.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If they are something else.

    Example:

    ```python
    >>> import torch
    >>> from hf_s3t.model.gates import GivenWeights

    >>> gate = GivenWeights(torch.tensor([[3.0, 1.0, 0.0]]), num_shards=3)
    >>> gate.weights(None, None, [frozenset({0}), frozenset({0, 1}), frozenset()]).tolist()
    [[0.75, 0.25, 0.0]]
    ```
    """

    def __init__(self, given: torch.Tensor, num_shards: int):
        shape = tuple(given.shape) if isinstance(given, torch.Tensor) else f"a {type(given).__name__}"
        if not isinstance(given, torch.Tensor) or given.dim() not in (1, 2) or given.shape[-1] != num_shards:
            raise ConfigError(
                f"Weights are a tensor of shape (rows, {num_shards}), one for each shard, or ({num_shards},) for all "
                f"rows; got {shape}. `gate_weights` gives such."
            )
        self._given = given.detach().to("cpu", torch.float64).reshape(-1, num_shards)
        if not (self._given.isfinite().all() and (self._given >= 0).all() and (self._given.sum(1) > 0).all()):
            raise ConfigError(
                f"Weights are not negative, and of each row some are above 0; got {given.tolist()}. Give 1 to a shard "
                "that is to answer alone."
            )

    def weights(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, seen: Sequence[frozenset[int]]
    ) -> torch.Tensor:
        """As [`Gate.weights`]; what dead shards were given goes to the living ones, equally where they have none."""
        alive = alive_of(seen)
        weights = self._given * alive
        weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, alive)
        return weights / weights.sum(1, keepdim=True)


class UsersGate:
    """
    A gate of the user's, of which nobody knows what it says until it says it.

    Args:
        gate ([`Gate`]): The gate.
    """

    def __init__(self, gate: Gate):
        self._gate = gate

    def weights(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, seen: Sequence[frozenset[int]]
    ) -> torch.Tensor:
        """
        As [`Gate.weights`]; what it gives dead shards goes to the living ones.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If it says something else than weights.
        """
        try:
            given = GivenWeights(self._gate.weights(input_ids, attention_mask, seen), len(seen))
        except ConfigError as error:
            raise ConfigError(f"What `{type(self._gate).__name__}.weights` returned are no weights. {error}") from None
        return given.weights(input_ids, attention_mask, seen)


class TermsGate:
    """
    Weighs shards by the words of a prompt: a softmax of what BM25 says, with the rows of each shard that are still in
    as one document. Of a prompt that no shard knows a word of, all are weighed equally.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): That with which the rows were made.
        key ([`~hf_s3t.records.digests.DigestKey`]): The system's secret, by which words are found among the terms.
        counts ([`~hf_s3t.records.terms.TermCounts`]): In how many rows of each slice a term occurs.
        temperature (`float`, defaults to 3.0): What the scores are divided by.
    """

    def __init__(self, tokenizer: Any, key: DigestKey, counts: TermCounts, temperature: float = 3.0):
        self.tokenizer, self._key = tokenizer, key
        self.counts, self.temperature = counts, temperature

    def weights(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, seen: Sequence[frozenset[int]]
    ) -> torch.Tensor:
        """
        As [`Gate.weights`].

        Raises:
            [`~hf_s3t.errors.S3TError`]: If there are no `input_ids`.
        """
        if input_ids is None:
            raise S3TError(
                "The gate reads a prompt by its `input_ids`, and the call has none. Give them to `generate` beside "
                "`inputs_embeds`; else call inside `model.weighted_by(model.gate_weights(input_ids))`, or load the "
                "system with gate=None."
            )
        counted = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        prompts = [
            [token for token, counts in zip(*row, strict=True) if counts]
            for row in zip(input_ids.tolist(), counted.tolist(), strict=True)
        ]
        texts: list[str] = self.tokenizer.batch_decode(prompts, skip_special_tokens=True)
        scores = np.stack([self.counts.scores(terms_of(text, self._key), seen) for text in texts])
        # Of the best, so that no temperature makes a number of it that is too large.
        weighed = torch.from_numpy(scores - scores.max(axis=1, keepdims=True)) / self.temperature
        return weighed.masked_fill(alive_of(seen) == 0, -torch.inf).softmax(1)


class UnreadableGate:
    """
    Stands for a gate that could not be read: calls raise why, and are not answered by a mean that nobody asked for.

    Args:
        error (`Exception`): Why.
    """

    def __init__(self, error: Exception):
        self._error = error

    def weights(
        self, input_ids: torch.Tensor | None, attention_mask: torch.Tensor | None, seen: Sequence[frozenset[int]]
    ) -> torch.Tensor:
        """Raises what was raised when the gate was read."""
        self.refuse()

    def refuse(self) -> NoReturn:
        """Raises it too."""
        raise self._error.with_traceback(None)


def tokenizer_of_gate(folder: SystemFolder, expected: str) -> Any:
    """
    The tokenizer that a system's folder or repository holds, by which prompts are read.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The folder.
        expected (`str`): The digest of the vocabulary that the gate was made with.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If there is none, or another one.
    """
    where, how = str(folder.path), {}
    if isinstance(folder, HubFolder):
        repo = folder.repo
        where, how = repo.repo_id, {"revision": folder.commit, "token": repo.token, "cache_dir": repo.cache_dir}
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **how)
    except (OSError, ValueError) as error:
        raise FolderError(
            f"The gate of {where} reads prompts with the tokenizer there, which cannot be loaded ({error}). Save that "
            "of the rows there with its `save_pretrained`, or load the system with gate=None."
        ) from error
    found = vocabulary_digest(tokenizer.get_vocab())
    if found != expected:
        raise FolderError(
            f"The gate of {where} was made with a tokenizer whose vocabulary has the digest {expected[:16]}…, and the "
            f"one there has {found[:16]}…. Put the tokenizer of the rows back, or make the gate anew with "
            "`build_gate()` of the trainer; gate=None serves without it."
        )
    return tokenizer


@dataclass(frozen=True)
class GateSettings:
    """
    Which gate a model was asked to serve with.

    Args:
        gate (`str` or [`Gate`], *optional*): `"terms"`, a gate, `None` for equal weights, `"recorded"` for what the
            system's config says.
        top_k (`int` or `str`, *optional*): How many shards answer a row where they stand out; or `"recorded"`.
        temperature (`float` or `str`): What the scores of terms are divided by; or `"recorded"`.
    """

    gate: Any = RECORDED
    top_k: int | str | None = RECORDED
    temperature: float | str = RECORDED

    def check(self, config: S3TConfig) -> None:
        """
        Refuse what is no setting for a system.

        Args:
            config ([`~hf_s3t.S3TConfig`]): Its config.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: With what was got, what is expected and what to do.
        """
        gate, top_k, temperature = self.resolved(config)
        # An object of the user's is a gate of no name.
        name = "terms" if hasattr(gate, "weights") else gate
        check_gate(name, top_k, temperature, config.num_shards)

    def resolved(self, config: S3TConfig) -> "ChosenGate":
        """What they are where a system's config has a say."""
        gate = config.gate if self.gate == RECORDED else self.gate
        recorded = config.gate_top_k if gate is not None else None
        top_k = recorded if self.top_k == RECORDED else self.top_k
        temperature = config.gate_temperature if self.temperature == RECORDED else self.temperature
        return ChosenGate(gate, top_k, temperature)


class ChosenGate(NamedTuple):
    """Settings of a gate as they are for a system; see [`GateSettings`]."""

    gate: Any
    top_k: Any
    temperature: Any


def alive_of(seen: Sequence[frozenset[int]]) -> torch.Tensor:
    """1 for each shard of which something serves and 0 for the others, of shape `(shards,)`, in double precision."""
    return torch.tensor([float(bool(slices)) for slices in seen], dtype=torch.float64)


def chosen(weights: torch.Tensor, seen: Sequence[frozenset[int]], top_k: int | None) -> torch.Tensor:
    """
    What a gate says, without the shards that are not worth asking.

    Args:
        weights (`torch.Tensor` of shape `(rows, shards)`): What it says.
        seen (sequence of `frozenset[int]`): Per shard the slices that what serves has seen; none, it is dead.
        top_k (`int`, *optional*): How many shards answer a row where they stand out; where none does, all do.

    Returns:
        `torch.Tensor` of shape `(rows, shards)`: 0 for those that are not asked; the others sum to one.

    Example:

    ```python
    >>> import torch
    >>> from hf_s3t.model.gates import chosen

    >>> weights = torch.tensor([[0.9, 0.06, 0.04], [0.4, 0.3, 0.3]], dtype=torch.float64)
    >>> chosen(weights, [frozenset({0})] * 3, top_k=1).tolist()
    [[1.0, 0.0, 0.0], [0.4, 0.3, 0.3]]
    ```
    """
    alive = sum(map(bool, seen))
    if top_k is not None and top_k < alive:
        # In a stable order: which of two equal shards is taken must not depend on the machine.
        best = weights.sort(dim=1, descending=True, stable=True)
        of_best = best.values[:, :top_k]
        share = top_k / alive
        stand_out = (of_best.sum(1, keepdim=True) - share) / (1 - share) >= _STANDING_OUT
        kept = torch.zeros_like(weights).scatter(1, best.indices[:, :top_k], of_best)
        weights = torch.where(stand_out, kept, weights)
    weights = weights.masked_fill(weights < min(LEAST_WEIGHT, 0.5 / max(1, alive)), 0)
    return weights / weights.sum(1, keepdim=True)


def prompts_in(
    input_ids: torch.Tensor | None, attention_mask: Any, labels: Any
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """
    The prompts of a call, and what of them counts: what stands before the first label, where tokens have labels.

    A row without an unlabelled beginning has no prompt; one of which nothing is labelled is all prompt.

    Args:
        input_ids (`torch.Tensor` of shape `(rows, positions)`, *optional*): The tokens.
        attention_mask (`torch.Tensor`, *optional*):
            As the base takes it; passed over if it has not one entry per token.
        labels (`torch.Tensor`, *optional*): As the base takes them: of shape `(rows, positions)`, or one for each row.
    """
    if input_ids is None:
        return None, None
    mask = attention_mask if isinstance(attention_mask, torch.Tensor) else None
    if mask is None or mask.shape != input_ids.shape:
        mask = torch.ones_like(input_ids)
    if isinstance(labels, torch.Tensor) and labels.shape == input_ids.shape:
        mask = mask.bool() & ~(labels.to(mask.device) != -100).cumsum(1).bool()
    return input_ids, mask.bool()
