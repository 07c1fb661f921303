"""`S3TModel`: serves the ensemble of a system and forgets examples."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.utils import logging

from ..config import require_int
from ..errors import ConfigError, ExhaustedError, S3TError, UnknownExampleError
from ..folder.opening import check_method
from ..folder.status import system_status
from ..folder.system import SystemFolder
from ..folder.versions import library_versions
from ..hub.card import description
from ..hub.erasure import ErasureReport, erase
from ..hub.folder import HubFolder
from ..hub.pushing import PushReport, push
from ..hub.repository import HubRepo
from ..operations.pending import PendingRequests
from ..records.examples import listed
from .aggregation import (
    answers_of,
    check_aggregation,
    check_is_no_set,
    check_one_answer_can_be_made,
    logit_fields,
    of_sets,
)
from .base_model import check_base_is, keep_4_bit_weights, load_base, log_casts_once, name_padding
from .batches import bind, first_row, knows_rows, num_rows, refuse_unknown_positions, repeat_rows
from .caches import (
    cache_of,
    caches_in,
    check_cache,
    has_cache,
    refuse_other_state,
    reorder_cache,
    stamp_cache,
    without_cache,
)
from .calls import Routing
from .ensemble_loss import EnsembleLoss, take_targets
from .layers import find_head
from .loading import check_options, layers_path, open_system, recorded_shape
from .model_class import AttachedConfigs, brings_own_ways, model_class, read
from .refusals import check_has_no_adapters, check_is_itself
from .route import NoWay, Route, noting_lengths, routed
from .stack import StageStack, seed_head
from .stateless import check_keeps_no_state
from .streaming import ending, streamer_of
from .unlearning import Unlearning


logger = logging.get_logger(__name__)
# Marks caches of the base by itself, which answers when no shard is left.
_BASE_ALONE = Route(())
# Where code that came with the base generates, its `base_model` is not meant to be the base without stages.
_NO_WAY = NoWay(())


class S3TModel(Unlearning, nn.Module):
    """
    The ensemble of an S3T system on one base model, which behaves as a Transformers model of its task.

    One member per shard answers: the longest stack of stages that survived the deletions so far. All members run in
    one batched pass over one base. Load it with [`S3TModel.from_pretrained`]; a trainer's live model is
    `trainer.s3t_model`.

    A model is an instance of its base's class too, so that Transformers decodes with it as with the base. What would
    compute with parts of the base alone, past the stages, raises [`~hf_s3t.errors.NotServedError`]; the base itself is
    `model.base_model`. A model is neither copied nor pickled: a deletion would not reach the copy.

    What voids the guarantee of [`~S3TModel.unlearn`]: copies of the folder or of its tensors made elsewhere (other
    processes that do not read the folder again, exported adapters, backups), a base model that was itself trained on
    the deleted examples, and ids that do not name all copies of what is to be forgotten.

    Args:
        stack ([`~hf_s3t.model.stack.StageStack`]): The adapters in memory.
        folder ([`~hf_s3t.folder.system.SystemFolder`]):
            The folder that this model serves and that `unlearn` writes to.
        preload (`str`, defaults to `"best"`):
            `"best"` holds the stacks that serve in memory, others when a deletion makes them best; `"all"` holds every
            valid stage, so that a deletion never waits for the disk.
        when_exhausted (`str`, defaults to `"error"`):
            With no shard left, `"error"` raises [`~hf_s3t.errors.ExhaustedError`]; `"base"` lets a language model
            answer as its base.

    Example:

    ```python
    from hf_s3t import S3TModel

    model = S3TModel.from_pretrained("llama-alpaca-s3t")
    report = model.unlearn([17, 4211])
    print(report.depths_before, "->", report.depths_after)
    ```
    """

    # How adapters are attached, and whose folders this class serves: the baselines have others.
    stack_type = StageStack
    methods = ("s3t",)

    def __new__(cls, stack: StageStack | None = None, *args, **kwargs):
        """An instance of the class made for the base's; see [`~hf_s3t.model.model_class.model_class`]."""
        return super().__new__(cls if stack is None else model_class(cls, type(stack.base)))

    def __init__(self, stack: StageStack, folder: SystemFolder, preload: str = "best", when_exhausted: str = "error"):
        # Not the base class's, which would build another base.
        nn.Module.__init__(self)
        check_options(preload, when_exhausted, stack.head)
        check_method(folder.record, self.methods, folder.path)
        self.base_model = stack.base
        self.when_exhausted = when_exhausted
        self.aggregation = folder.record["aggregation"]
        check_aggregation(self.aggregation, self.base_model.config)
        check_one_answer_can_be_made(self.base_model, folder.config.num_shards, folder.config.select)
        self._one_pass: dict[frozenset[str], bool] = {}
        self._loss_of_several = EnsembleLoss(self.base_model)
        self._begin_serving(stack, folder, preload)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        base_model: nn.Module | str | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        preload: str = "best",
        when_exhausted: str = "error",
    ) -> "S3TModel":
        """
        Load a system. The model is bound to the folder: `unlearn` writes there.

        From the Hub, only the stages that serve are downloaded, and the table of ids when `unlearn` or `locate` first
        needs it. Deletions are then recorded on this machine, for every revision and cache of the repository, until
        [`~S3TModel.push_to_hub`] brings them to the Hub.

        Args:
            path (`str` or `os.PathLike`): The folder of the system, or its repository on the Hub, such as `"me/repo"`.
            revision (`str`, *optional*): Branch, tag or commit of the repository.
            token (`str`, *optional*):
                Token for the Hub, for the base as well; the one of `hf auth login` if not given.
            cache_dir (`str` or `os.PathLike`, *optional*): The Hub's cache; the usual one if not given.
            base_model (`nn.Module` or `str`, *optional*):
                The base model, or an id or path to load it from; the recorded one if not given. It is recognised by a
                digest of its tensors.
            dtype (`str` or `torch.dtype`, *optional*): Precision of the base; as at training if not given.
            device_map (*optional*): As in Transformers.
            quantization_config (*optional*):
                `None` quantises the base as at training, `False` does not quantise it, anything else is passed on. For
                8-bit the outlier threshold is 0 unless set to other than its default, because with outlier columns
                an answer depends on the other rows of its batch.
            preload (`str`, defaults to `"best"`): See [`S3TModel`].
            when_exhausted (`str`, defaults to `"error"`): See [`S3TModel`].

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the folder holds no system, or a file is missing or altered.
            [`~hf_s3t.errors.HubError`]: If the repository or revision cannot be found or reached.
            [`~hf_s3t.errors.BaseModelMismatchError`]: If the base is not the one the stages were trained on.
        """
        folder = open_system(path, revision, token, cache_dir)
        record = folder.record
        # Before a base model is loaded for it.
        check_method(record, cls.methods, folder.path)
        layers, head, peft_config = recorded_shape(folder)
        check_options(preload, when_exhausted, head)
        by_name = not isinstance(base_model, nn.Module)
        if not by_name:
            check_is_itself(base_model)
            check_has_no_adapters(base_model)
            base = base_model
            name_padding(base, record["base_model"])
        elif base_model is not None and not isinstance(base_model, (str, os.PathLike)):
            raise ConfigError(
                f"`base_model` is {'a class' if isinstance(base_model, type) else f'a {type(base_model).__name__}'}, "
                "expected a loaded model, its id or its folder. Give one of them, or leave it out to load the "
                "recorded one."
            )
        else:
            base = load_base(
                record["base_model"],
                name=base_model,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization_config,
                head=head,
                token=token,
                cache_dir=cache_dir,
            )
            check_is_itself(base)
            check_has_no_adapters(base)
        found = layers_path(base, layers)
        if found != layers.path or find_head(base, found) != head:
            raise ConfigError(
                f"The base has its layers at {found} and the head {find_head(base, found)}; the system was trained "
                f"with {layers.path} and {head}. Load the base as a {record['base_model']['architecture']}."
            )
        as_recorded = by_name and dtype is None and quantization_config is None
        check_base_is(base, record["base_model"], layers.path, head, as_recorded=as_recorded)
        keep_4_bit_weights(base)
        check_keeps_no_state(base)
        seed_head(base, head, folder.config.seed)
        log_casts_once(base)
        stack = cls.stack_type(base, peft_config, layers, head)
        served = getattr(cls, "_served_as", cls)
        return served(stack, folder, preload=preload, when_exhausted=when_exhausted).eval()

    # A Transformers model of its task

    def __getattr__(self, name: str):
        try:
            # Not the base class's own, which may hand on to parts of the base.
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base_model":
                raise
        return read(self.base_model, name)

    def __reduce_ex__(self, protocol):
        raise S3TError(
            "A served model is neither copied nor pickled: a deletion would not reach the copy. `save_pretrained` "
            "copies the system, and `S3TModel.from_pretrained` loads it, in another process too."
        )

    @property
    def base_model(self) -> nn.Module:
        """The base model, without any stage."""
        return nn.Module.__getattr__(self, "base_model")

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of the adapters in memory by name. No others can be added."""
        return AttachedConfigs(self.base_model.peft_config)

    @property
    def config(self):
        """The base model's configuration."""
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        """Where the base model is."""
        return self.base_model.device

    @property
    def dtype(self) -> torch.dtype:
        """The base model's precision."""
        return self.base_model.dtype

    def _apply(self, fn: Callable, recurse: bool = True):
        # What moves or casts all there is: `to`, `half`, `float`, and `Trainer` with `bf16_full_eval`.
        self._refuse_other_precision(fn)
        return super()._apply(fn, recurse)

    def _refuse_other_precision(self, fn: Callable) -> None:
        """Rounded in place, stages would not be what their files say, and those loaded or grown later would."""
        for dtype in {parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()}:
            asked = fn(torch.empty(0, dtype=dtype)).dtype
            if asked != dtype:
                names = " to ".join(str(one).removeprefix("torch.") for one in (dtype, asked))
                raise ConfigError(
                    f"A served model is not cast, here from {names}: its stages would not be what their files say any "
                    "more, and those that are loaded or grown later would. Load the base as you want it "
                    "(`S3TModel.from_pretrained(..., dtype=...)`), and evaluate without `fp16_full_eval` and "
                    "`bf16_full_eval`; `torch.autocast` and `bf16=True` cast nothing."
                )

    @property
    def generation_config(self):
        """The base model's generation settings."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value):
        self.base_model.generation_config = value

    def generate_batch(self, *args, **kwargs):
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

    def tie_weights(self) -> None:
        """Does nothing: the base's weights were tied when it was loaded. Evaluation harnesses call it."""

    def can_generate(self) -> bool:
        """Whether the base model can."""
        return self.base_model.can_generate()

    # What `generate` asks on its way

    def get_compiled_call(self, compile_config: Any) -> Callable:
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

    def _prepare_static_cache(self, *args, batch_size: int, **kwargs):
        with self._calls.call() as routing:
            # What is made before the first pass is made for the rows of all members.
            return super()._prepare_static_cache(*args, batch_size=batch_size * _members(routing), **kwargs)

    def _prepare_multimodal_encoder_kwargs_for_generation(self, model_kwargs: dict[str, Any]) -> dict[str, Any]:
        if self.base_model.training:
            self.eval()
        with self._calls.call() as routing, self._calls.computing(routing), noting_lengths() as adapted:
            several = _members(routing) > 1
            with routed(None if several else routing.route):
                prepared = self.base_model._prepare_multimodal_encoder_kwargs_for_generation(model_kwargs)
        if adapted and several:
            raise S3TError(
                "`generate` encodes images once, and the stages of the members adapt the encoder, each its own way. "
                "Call the model itself, or export a shard with `export_adapter` and use plain PEFT."
            )
        return prepared

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict[str, Any], *args, **kwargs):
        updated = self.base_model._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
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

    def _reorder_cache(self, past_key_values, beam_idx):
        members = max(1, len(getattr(past_key_values, "_s3t_route", _BASE_ALONE)))
        return reorder_cache(past_key_values, beam_idx, members)

    def forward(self, *args, labels: torch.Tensor | None = None, return_dict: bool | None = None, **kwargs):
        """
        The ensemble's answer to the inputs that the base model's `forward` takes.

        Args:
            *args: As for the base model.
            **kwargs: As for the base model.
            labels (`torch.Tensor`, *optional*):
                As for the base model. The loss of one member is what the base computes, that of several what the task
                defines on their joint logits; see [`~hf_s3t.model.ensemble_loss.EnsembleLoss`].
            return_dict (`bool`, *optional*): `False` for a tuple.

        Returns:
            The output class of the base model with `logits` of shape `(rows, ..., classes)`, or where it answers with
            spans `start_logits` and `end_logits`, each aggregated by itself; `loss` if there are labels, and the cache
            where the base returns one. With mean probabilities, `logits` is the logarithm of the mean where several
            members answer, and the member's own logits where one does: the same distribution, shifted by a constant
            per position. When deletions leave one shard alive, the scale changes so.

        Raises:
            [`~hf_s3t.errors.ExhaustedError`]: If no shard is left.
            [`~hf_s3t.errors.StaleCacheError`]: If `past_key_values` was made with stacks that answer no more.
            [`~hf_s3t.errors.S3TError`]: If labels are given and the base makes its loss of something else than the
                logits, or several members cannot share a cache that is given.
        """
        with self._call() as routing, self._calls.computing(routing):
            inputs = bind(self.base_model, args, kwargs)
            # Given by position they are among the inputs.
            labels, return_dict = inputs.pop("labels", labels), inputs.pop("return_dict", return_dict)
            return self._answer(routing, inputs, labels, return_dict)

    def generate(self, *args, **kwargs):
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
        with ending(streamer_of(args, kwargs)) as end_is_told:
            if not self.can_generate():
                raise ConfigError(f"{type(self).__name__} is no model that generates. Call it for its logits.")
            own_ways = brings_own_ways(type(self.base_model))
            with self._call(), routed(_NO_WAY) if own_ways else contextlib.nullcontext():
                answer = super().generate(*args, **kwargs)
                end_is_told()
            return answer

    def _answer(self, routing: Routing, inputs: dict[str, Any], labels, return_dict):
        if self.base_model.training:
            self.eval()
        targets = take_targets(inputs, labels)
        if inputs.get("output_hidden_states") or inputs.get("output_attentions"):
            raise S3TError(
                "An ensemble has no single set of hidden states or attentions. Export a shard with `export_adapter` "
                "and look at it with plain PEFT."
            )
        refuse_other_state(inputs)
        cache = cache_of(inputs)
        check_cache(cache, routing.route or _BASE_ALONE)
        if routing.route is None:
            return self._answer_as_base(inputs, targets, return_dict)
        members = len(routing.route)
        rows = num_rows(inputs, self.base_model.main_input_name)
        if members > 1 and not (knows_rows(inputs, rows) and self._answers_in_one_pass(inputs, rows)):
            return self._answer_in_turn(routing, inputs, targets, return_dict)
        if members > 1:
            refuse_unknown_positions(self.base_model, inputs, rows)
        with routed(routing.route):
            given = {**inputs, **targets} if members == 1 else repeat_rows(inputs, rows, members)
            outputs = self.base_model(**given, return_dict=True)
        stamp_cache(cache, routing.route)
        stamp_cache(cache_of(outputs), routing.route)
        answers = answers_of([outputs], routing.weights, self.aggregation)
        loss = outputs.get("loss") if members == 1 else self._loss(routing, answers, targets, inputs)
        return self._output(outputs, answers, loss, return_dict, members)

    @torch.no_grad()
    def _answers_in_one_pass(self, inputs: dict[str, Any], rows: int) -> bool:
        """
        Whether every adapted module takes rows in its first dimension, so that members can share a pass.

        Sequence-first models, and projections of positions that all rows share, do not. Two passes of the base over
        one row and over two tell; they are run once for each choice of inputs, for pictures go through other modules
        than text does.
        """
        given = frozenset(name for name, value in inputs.items() if value is not None)
        if given not in self._one_pass:
            inputs = without_cache(inputs)
            try:
                lengths = self._lengths(first_row(inputs, rows), 1)
            except Exception:
                # Some cannot be cut: the first row's pictures may not be the first one. Then over all rows.
                lengths = self._lengths(inputs, rows)
            self._one_pass[given] = lengths[1] == [2 * length for length in lengths[0]]
        return self._one_pass[given]

    def _lengths(self, inputs: dict[str, Any], rows: int) -> tuple[list[int], list[int]]:
        """What length the base gives its adapted modules, for the rows and for twice the rows."""
        with routed(None), noting_lengths() as lengths:
            self.base_model(**inputs, return_dict=True)
        with routed(None), noting_lengths() as doubled:
            self.base_model(**repeat_rows(inputs, rows, 2), return_dict=True)
        return lengths, doubled

    def _answer_in_turn(self, routing: Routing, inputs, targets, return_dict):
        """One pass per member."""
        if caches_in(inputs):
            raise S3TError(
                f"{type(self.base_model).__name__} does not keep rows in the first dimension, or some input has not "
                "one entry per row, so the members of the ensemble answer one after the other and cannot share "
                f"`{next(iter(caches_in(inputs)))}`. Call with use_cache=False."
            )
        each = []
        for route in _one_by_one(routing.route):
            with routed(route):
                outputs = self.base_model(**inputs, return_dict=True)
            each.append(outputs)
        for name in caches_in(outputs):
            outputs[name] = None
        answers = answers_of(each, routing.weights, self.aggregation)
        loss = self._loss(routing, answers, targets, inputs)
        return self._output(outputs, answers, loss, return_dict, len(each))

    def _answer_as_base(self, inputs, targets, return_dict):
        if self.stack.in_training is not None and self.folder.valid_stages:
            raise S3TError(
                f"What {self.folder.path} holds is not in memory, and nothing is attached to the base while "
                f"{self.stack.in_training} trains on it. Call again after `train()`, or serve the folder by another "
                "process."
            )
        if self.when_exhausted == "error":
            if not self.folder.ledger.num_deletions:
                raise ExhaustedError(
                    f"{self.folder.path} has no trained stage yet. Call `train()` of its trainer first."
                )
            raise ExhaustedError(
                f"{self.folder.path} is exhausted: deletions reached the first slice of every sequence of every "
                "shard. Call `train()` of its trainer to grow stages on the remaining data, or load it with "
                'when_exhausted="base" to let a language model answer as its base.'
            )
        # By a route of no members: the adapters of a stage in training must not act.
        with routed(_BASE_ALONE):
            outputs = self.base_model(**inputs, **targets, return_dict=True)
        stamp_cache(cache_of(inputs), _BASE_ALONE)
        stamp_cache(cache_of(outputs), _BASE_ALONE)
        answers = {name: outputs[name] for name in logit_fields(outputs.keys())}
        return self._output(outputs, answers, outputs.get("loss"), return_dict)

    def _output(self, outputs, answers, loss, return_dict, members: int = 1):
        check_is_no_set(outputs, type(self.base_model), members)
        # What comes with the logits of a set of predictions is of one member: several are refused.
        kept = dict(outputs) if of_sets(outputs) else caches_in(outputs)
        kept = {**kept, "loss": loss, **answers}
        answer = type(outputs)(**{k: v for k, v in kept.items() if v is not None})
        return answer.to_tuple() if return_dict is False else answer

    def _loss(
        self, routing: Routing, answers: dict[str, torch.Tensor], targets: dict[str, Any], inputs: dict[str, Any]
    ):
        if not targets:
            return None
        if routing.route is None:
            return self._loss_of_several(answers, targets, inputs, [(_BASE_ALONE, 1.0)])
        members = zip(_one_by_one(routing.route), routing.weights.tolist(), strict=True)
        return self._loss_of_several(answers, targets, inputs, list(members))

    @contextlib.contextmanager
    def limited_to(self, depth: int) -> Iterator[None]:
        """
        Inside, every shard answers with its longest stack cut to some stages: the system at a smaller depth.

        It counts for calls that begin inside, in this thread; those of other threads, and those under way, go on as
        they were. A deletion takes effect inside as it does outside.

        Args:
            depth (`int`): Number of stages to answer with at most.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If `depth` is no positive integer.

        Example:

        ```python
        with model.limited_to(1):
            first_stages_only = model(**batch).logits
        ```
        """
        require_int("depth", depth, 1)
        with self._calls.limited_to(depth):
            yield

    # What the system is

    @property
    def is_exhausted(self) -> bool:
        """Whether no shard is left to answer, as the folder says now: a system that was grown again is not."""
        self._catch_up()
        return self._calls.is_exhausted

    def status(self) -> dict[str, Any]:
        """
        Where the system stands.

        Returns:
            `dict` with `examples` (how many are in), `deletions` (requests so far), `pending` (examples
            whose deletion waits for `apply_pending`), `depths` (per shard the depth that
            serves), `sequence_depths` (per shard and sequence), `stages` (valid, planned),
            `deletions_until_first_dead_shard` and `deletions_until_exhausted` (expected numbers of further requests by
            the prior, uniform if none is given; Lemma 1 from the present state), and `failures`: one sentence for each
            thing that could not be done yet beside the calls, and is tried again: requests that are due, the table
            without the deleted rows.
        """
        self._catch_up()
        return {
            **system_status(self.folder),
            "depths": self._routing.depths,
            "pending": len(PendingRequests(self.folder).ids()),
            "failures": self._failures,
        }

    def locate(self, ids: Sequence[int | str]) -> dict[int | str, tuple[int, int]]:
        """
        The (shard, slice) of examples.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If one is not in the system, deleted ones included.
        """
        folder, ids = self.folder, listed([None] if ids is None else ids, "ids")
        request = folder.table.resolve(ids, None, folder.ledger, folder.names)
        found = {i: folder.table.rows.get(folder.table.find(i, folder.ledger, folder.names)) for i in ids}
        if request.already_deleted:
            gone = ", ".join(repr(i) for i, row in found.items() if row is None)
            raise UnknownExampleError(f"{gone}: deleted, and in no slice any more. Ask for the others.")
        return {i: (row.shard, row.slice) for i, row in found.items()}

    def check(self) -> list[str]:
        """
        Read everything in the folder again and say what is wrong with it: digests, chain of the ledger, validity.

        Returns:
            `list[str]`: One sentence per problem; empty if all is well.
        """
        # Whoever only serves does not load the inspector.
        from ..operations.inspection import inspect

        self._wait_for_cleaner()
        if isinstance(self.folder, HubFolder):
            with self._deletion_lock:
                return self.folder.problems()
        return list(inspect(self.folder.path).problems)

    # Handing out

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """
        Copy what is valid of the system into another, empty folder (into its own, only make sure that all is written).

        The copy is a second system, with the secret of this one: no deletion here reaches it, and what is forgotten
        here must be forgotten there too. The ledger notes it with the stages that were handed out, as it notes
        exported adapters. (Of a model that is served from the Hub it is a pull, which nothing notes.) A deletion that
        is under way is waited for.

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
            **kwargs: Refused: how files are written is the system's own.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If anything else is given, as `Trainer.save_model` does.
            [`~hf_s3t.errors.FolderError`]: If the folder is not empty, or the copy cannot be noted in the ledger.
            [`~hf_s3t.errors.S3TError`]: If called from inside a running call of this model.
        """
        if kwargs:
            raise ConfigError(
                f"`save_pretrained` of a served model copies the system and takes no `{next(iter(kwargs))}`. Call it "
                "with a folder alone, instead of a trainer's `save_model`; for a plain adapter use `export_adapter`."
            )
        self._calls.refuse_inside("save_pretrained")
        with self._deletion_lock:
            self._wait_for_cleaner()
            if Path(save_directory).resolve() != self.folder.path.resolve():
                self.folder.copy_to(save_directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        erase_history: bool = False,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str | None = None,
        merge: bool = False,
        datasets: Sequence[str] = (),
        license: str | None = None,
        evaluation: Mapping[str, float] | None = None,
    ) -> PushReport | ErasureReport:
        """
        Bring the system to the Hub, with its deletions and a model card: one commit, of what is not there yet.

        A deletion pushed by itself leaves what it removed in older commits. `erase_history=True` rewrites the history,
        deletes branches and tags that hold an old state, and erases the large files that nothing holds any more.

        Args:
            repo_id (`str`): The repository; made if it does not exist.
            erase_history (`bool`, defaults to `False`): Erase on the Hub what deletions removed.
            private (`bool`, *optional*): Whether a new repository is private; the owner's default if not given.
            token (`str`, *optional*): Token with write access; the one of `hf auth login` if not given.
            commit_message (`str`, *optional*): Title of the commit.
            merge (`bool`, defaults to `False`):
                Forget here, too, what the Hub knows as deleted and this folder does not. Without it such a push is
                refused, because it would bring examples back. A model loaded from the Hub always merges.
            datasets (sequence of `str`, *optional*): For the card: ids of the datasets it was trained on.
            license (`str`, *optional*): For the card: identifier of the licence.
            evaluation (mapping from `str` to `float`, *optional*):
                For the card: numbers measured with the system as it is now. They are dropped with the next deletion.

        Returns:
            [`~hf_s3t.hub.pushing.PushReport`], or with `erase_history=True` an
            [`~hf_s3t.hub.erasure.ErasureReport`], which separates what is confirmed gone from what cannot be
            confirmed from here.

        Raises:
            [`~hf_s3t.errors.MergeNeededError`]: If the Hub knows deletions that this folder does not.
            [`~hf_s3t.errors.HubError`]: If the Hub refuses or cannot be reached. Calling again finishes the work.
        """
        self._calls.refuse_inside("push_to_hub")
        with self._deletion_lock:
            self.refresh()
            repo = HubRepo(repo_id, token or getattr(getattr(self.folder, "repo", None), "token", None))
            if isinstance(self.folder, HubFolder):
                if repo_id != self.folder.repo.repo_id:
                    raise ConfigError(
                        f"This model is served from {self.folder.repo.repo_id}. To push it to {repo_id}, pull it to a "
                        "folder first (`save_pretrained`), and push that."
                    )
                merge = True
            describe = functools.partial(
                description, repo_id=repo_id, datasets=datasets, license=license, evaluation=evaluation
            )
            try:
                pushed = push(
                    self.folder,
                    repo,
                    describe,
                    private=private,
                    commit_message=commit_message,
                    merge=merge,
                    on_merge=self._serve,
                )
            finally:
                self.refresh()
        return erase(repo) if erase_history else pushed

    def export_adapter(self, shard: int, folder: str | os.PathLike) -> None:
        """
        Write the stack that serves a shard as one plain PEFT adapter, for use without hf_s3t.

        The ledger notes it: a later deletion cannot reach the copy, which must be revoked by hand. The note comes
        first, and stays if the export fails. What PEFT makes of the files is compared with what serves.

        Args:
            shard (`int`): Number of the shard.
            folder (`str` or `os.PathLike`): A new folder to write the adapter to, outside the system's own.

        Raises:
            [`~hf_s3t.errors.ExhaustedError`]: If the shard has no stage left.
            [`~hf_s3t.errors.ConfigError`]: If there is no such shard, or several stacks answer for it together.
            [`~hf_s3t.errors.FolderError`]: If something is in the folder, it is inside the system's, or cannot be
                made.
            [`~hf_s3t.errors.LayersNotFoundError`]: If PEFT would make something else of it; nothing is left then.
        """
        if not 0 <= shard < self.folder.plan.num_shards:
            raise ConfigError(f"shard={shard}, expected 0 to {self.folder.plan.num_shards - 1}.")
        self.folder.check_target(Path(folder))
        self._calls.refuse_inside("export_adapter")
        with self._deletion_lock:
            # Whoever writes the table now needs the folder's lock for it.
            self._wait_for_cleaner()
            # Nobody deletes between the look at what serves and its writing.
            with self.folder.lock():
                self._export(shard, Path(folder))

    def _export(self, shard: int, folder: Path) -> None:
        self.refresh()
        tips = self._routing.served[shard]
        if not tips:
            raise ExhaustedError(f"Shard {shard} has no stage left to export. Call `train()` to grow it again.")
        if len(tips) > 1:
            raise ConfigError(
                f'{len(tips)} stacks answer for shard {shard} together (select="all"), and a plain adapter is '
                "one. Export from a system that serves one stack a shard."
            )
        self.folder.record_export(tips[0], library_versions())
        # This line changes nothing that serves.
        self._has_followed(self._state())
        self.stack.export(tips[0], folder, self.folder.base_id, self.folder.base_revision)


def _members(routing: Routing) -> int:
    return max(1, len(routing.route or ()))


def _one_by_one(route: Route) -> list[Route]:
    """The members of a route by themselves; what stops the one stops them too."""
    return [replace(route, members=(tip,)) for tip in route.members]
