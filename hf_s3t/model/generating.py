"""How a served model generates: by the steps of Transformers, with the ensemble at each of them."""

import contextlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from ..errors import ConfigError, S3TError
from .caches import has_cache, reorder_cache
from .model_class import brings_own_ways
from .route import NoWay, noting_lengths, routed
from .streaming import ending, streamer_of
from .weighing import Weighing


logger = logging.get_logger(__name__)
# Where code that came with the base generates, its `base_model` is not meant to be the base without stages.
_NO_WAY = NoWay(())

if TYPE_CHECKING:

    class _Host(nn.Module):
        """What a served model is besides, and what its made class has from Transformers."""

        @property
        def base_model(self) -> PreTrainedModel: ...

        def can_generate(self) -> bool: ...

        def generate(self, *args: Any, **kwargs: Any) -> Any: ...

        def _expand_inputs_for_generation(self, *args: Any, **kwargs: Any) -> Any: ...

        def _prepare_static_cache(self, *args: Any, **kwargs: Any) -> Any: ...
else:
    _Host = object


class Generating(Weighing, _Host):
    """The part of [`~hf_s3t.S3TModel`] that generates."""

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """
        As the base model's `generate`, with the ensemble: from its first token to its last with the same stacks.

        A `streamer` is ended in any case, so that its reader does not wait for ever. What the reader sees of a call
        that an error or a deletion stopped is a text that ends early, like any other: whether it is whole tells the
        call, which raises.

        Raises:
            [`~hf_s3t.errors.ExhaustedError`]: If no shard is left.
            [`~hf_s3t.errors.CallStoppedError`]: If a deletion stopped the call; see [`~S3TModel.unlearn`].
            [`~hf_s3t.errors.ConfigError`]: If the base model does not generate.
            [`~hf_s3t.errors.NotServedError`]: If the base's own way to generate would compute with the base alone.

        Example:

        ```python
        with ThreadPoolExecutor() as pool:
            answer = pool.submit(model.generate, **inputs, streamer=streamer)
            for text in streamer:
                print(text, end="")
            answer.result()  # raises CallStoppedError if a deletion cut the text short
        ```
        """
        with ending(streamer_of(args, kwargs)) as has_ended_itself:
            if not self.can_generate():
                raise ConfigError(f"{type(self).__name__} is no model that generates. Call it for its logits.")
            with self._call() as routing, routed(_NO_WAY) if self._brings_own_ways else contextlib.nullcontext():
                # Each token is a call of this model, and is not counted, or given a turn, by itself.
                with self._calls.stepping(routing):
                    answer = super().generate(*args, **kwargs)
                has_ended_itself()
            return answer

    @cached_property
    def _brings_own_ways(self) -> bool:
        return brings_own_ways(type(self.base_model))

    def generate_batch(self, *args: Any, **kwargs: Any) -> NoReturn:
        """
        Refused, like the other ways into continuous batching: a request that runs while something is unlearned would
        go on from the keys and values of a stage that is gone.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: Always.
        """
        raise ConfigError(
            "Continuous batching keeps the keys and values of stages that a deletion may remove while a request runs. "
            "Use `generate`, which takes batches."
        )

    init_continuous_batching = continuous_batching_context_manager = generate_batch

    # Steps of `generate` that an ensemble takes otherwise

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        """
        The model itself, not compiled: a compiled step keeps what it computed, with stages that a deletion must remove
        from memory, and does not look at the routing again.
        """
        logger.warning_once(
            "The ensemble's decoding steps are not compiled, so that a static cache brings no speed. Leave out "
            "`cache_implementation` and `compile_config`."
        )
        return self.__call__

    def _optimize_model_for_decode(self) -> contextlib.AbstractContextManager[None]:
        # It would change the base's config under the calls of other threads.
        return contextlib.nullcontext()

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs: Any,
    ) -> Any:
        # Before beams: those of one prompt are answered by the same members.
        self._read_prompts(input_ids, model_kwargs, expand_size)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _prepare_static_cache(self, *args: Any, batch_size: int, **kwargs: Any) -> Any:
        with self._calls.call() as routing:
            # What is made before the first pass is made for the rows of all members, or those that a gate gave each.
            rows, steps = batch_size * routing.num_blocks, self._calls.steps
            if steps is not None and steps.gating is not None and steps.gating.num_rows == batch_size:
                rows = steps.gating.num_entries
            return super()._prepare_static_cache(*args, batch_size=rows, **kwargs)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        base: Any = self.base_model
        if base.training:
            self.eval()
        with self._calls.call() as routing, self._calls.computing(routing), noting_lengths() as adapted:
            several = routing.num_blocks > 1
            with routed(None if several else routing.route):
                prepared: dict[str, Any] = base._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        if adapted and several:
            raise S3TError(
                "`generate` encodes images once, and the stages of the members adapt the encoder, each its own way. "
                "Call the model itself, or export a shard with `export_adapter` and use plain PEFT."
            )
        return prepared

    def _update_model_kwargs_for_generation(
        self, outputs: ModelOutput, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        base: Any = self.base_model
        updated: dict[str, Any] = base._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if updated.get("use_cache") and not has_cache(updated):
            if updated.get("inputs_embeds") is not None:
                raise S3TError(
                    f"{type(self).__name__} keeps its state in a form that an ensemble cannot carry from token to "
                    "token, and without it `inputs_embeds` reach the first alone. Call `generate` with `input_ids`."
                )
            logger.warning_once(
                f"{type(self).__name__} keeps its state in a form that an ensemble cannot carry from token to token: "
                "every step reads the whole text. Where that takes too long, export a shard with `export_adapter` and "
                "use plain PEFT."
            )
            updated["use_cache"] = False
        return updated

    def _reorder_cache(self, past_key_values: Any, beam_idx: torch.Tensor) -> Any:
        return reorder_cache(past_key_values, beam_idx)
