"""How a served model weighs its members: by its gate, or as it is told."""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError, ExhaustedError, StaleCacheError
from .batches import can_be_selected, num_rows
from .caches import cache_of, gating_of_cache, has_cache
from .calls import Routing
from .following import Following
from .gates import GivenWeights, UnreadableGate, prompts_in
from .gating import Gating


if TYPE_CHECKING:

    class _Host(nn.Module):
        """What a served model is besides."""

        @property
        def base_model(self) -> PreTrainedModel: ...
else:
    _Host = object


class Weighing(Following, _Host):
    """The part of [`~hf_s3t.S3TModel`] that says how much each member has to say."""

    def gate_weights(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """
        How much each shard has to say about some prompts, as the gate sees it.

        These are its weights before `gate_top_k`, and those that are too small to count, leave shards out.

        Args:
            input_ids (`torch.Tensor` of shape `(rows, positions)`): The prompts.
            attention_mask (`torch.Tensor` of shape `(rows, positions)`, *optional*): What of them is no padding.

        Returns:
            `torch.Tensor` of shape `(rows, shards)` in double precision, of which each row sums to one.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If the model has no gate, or these are no prompts.
            [`~hf_s3t.errors.ExhaustedError`]: If no shard is left.

        Example:

        ```python
        weights = model.gate_weights(**tokenizer("Who is Ada?", return_tensors="pt"))
        print(weights.argmax(1))  # the shard that knows most of her
        ```
        """
        _check_prompts(input_ids, attention_mask)
        with self._call() as routing:
            if routing.gate is None:
                raise ConfigError(
                    'The model has no gate: its members are weighed equally. Load the system with gate="terms"; where '
                    "it has none yet, `build_gate()` of its trainer makes one."
                )
            if routing.route is None:
                raise ExhaustedError("No shard is left to be weighed. Call `train()` of the system's trainer.")
            weights = routing.gate.weights(*prompts_in(input_ids, attention_mask, None), routing.seen)
            return weights.expand(len(input_ids), -1)

    @contextlib.contextmanager
    def weighted_by(self, weights: torch.Tensor) -> Iterator[None]:
        """
        Inside, calls use these weights in place of the gate's: an oracle's, or what a server looked up before.

        It counts for calls that begin inside, in this thread. What a dead shard was given goes to the others. As with
        a gate, shards of no weight compute nothing, and `gate_top_k` chooses among the others.

        Args:
            weights (`torch.Tensor` of shape `(rows, shards)` or `(shards,)`):
                Not negative, for each row of a call (of `generate`: for each prompt), or for all.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If they are no such weights.

        Example:

        ```python
        with model.weighted_by(torch.tensor([[1.0, 0.0], [0.5, 0.5]])):
            logits = model(**batch_of_two).logits  # the first row by shard 0 alone
        ```
        """
        with self._calls.weighted_by(GivenWeights(weights, self.folder.config.num_shards)):
            yield

    def _refuse_unreadable_gate(self) -> None:
        gate = self._routing.gate
        if isinstance(gate, UnreadableGate):
            gate.refuse()

    def _gating(self, routing: Routing, inputs: dict[str, Any], labels: Any) -> Gating | None:
        """
        Who answers which rows of a call; `None` where all members answer all, weighed equally.

        A prompt is read once: the cache that was filled then remembers, and so do the steps of `generate`.
        """
        cached = gating_of_cache(cache_of(inputs))
        if cached is not None:
            rows = num_rows(inputs, self.base_model.main_input_name)
            if rows != cached.num_rows:
                raise StaleCacheError(
                    f"`past_key_values` was filled with {cached.num_rows} rows, each by members that a gate chose; "
                    f"the call has {rows}. Give as many, in the same order, or start again without it."
                )
            return cached
        if routing.gate is None or has_cache(inputs):
            return None
        rows, steps = num_rows(inputs, self.base_model.main_input_name), self._calls.steps
        # What else is called from inside of `generate` has prompts of its own.
        if steps is not None and steps.gating is not None and steps.gating.num_rows == rows:
            return steps.gating
        return self._read(routing, inputs.get("input_ids"), inputs, labels, rows)

    def _read_prompts(self, input_ids: torch.Tensor | None, inputs: dict[str, Any], expand_size: int) -> None:
        """Before the first step of `generate`: who answers which prompt, for all the steps."""
        steps = self._calls.steps
        if steps is None or steps.routing.gate is None or has_cache(inputs):
            return
        rows = num_rows({**inputs, "input_ids": input_ids}, "input_ids")
        gating = self._read(steps.routing, input_ids, inputs, None, rows)
        if gating is not None:
            # Said before keys and values are made room for.
            steps.gating = (gating if can_be_selected(inputs) else gating.of_all_rows()).expanded(expand_size)

    def _read(
        self, routing: Routing, input_ids: torch.Tensor | None, inputs: dict[str, Any], labels: Any, rows: int
    ) -> Gating | None:
        if input_ids is not None and not input_ids.shape[1] and inputs.get("inputs_embeds") is not None:
            # `generate` makes such of embeddings.
            input_ids = None
        return routing.gating(*prompts_in(input_ids, inputs.get("attention_mask"), labels), rows)


def _check_prompts(input_ids: Any, attention_mask: Any) -> None:
    is_tokens = isinstance(input_ids, torch.Tensor) and input_ids.dim() == 2 and not input_ids.is_floating_point()
    if not is_tokens or (input_ids < 0).any():
        raise ConfigError(
            f"`input_ids` are {_shown(input_ids)}, expected a tensor of shape (rows, positions) with the numbers of "
            'tokens. Give what `tokenizer(texts, padding=True, return_tensors="pt")` makes.'
        )
    if attention_mask is not None and getattr(attention_mask, "shape", None) != input_ids.shape:
        raise ConfigError(
            f"`attention_mask` is {_shown(attention_mask)}, expected one entry per token, {tuple(input_ids.shape)}. "
            "Give that of the tokenizer, or leave it out."
        )


def _shown(given: Any) -> str:
    if not isinstance(given, torch.Tensor):
        return f"a {type(given).__name__}"
    return f"a tensor of shape {tuple(given.shape)} and type {given.dtype}"
