"""`S3TModel`: serves the ensemble of a system and forgets examples."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn, Self, SupportsIndex

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..config import require_int
from ..errors import ConfigError, ExhaustedError, S3TError, UnknownExampleError
from ..folder.opening import check_method
from ..folder.status import system_status
from ..folder.system import SystemFolder
from ..hub.folder import HubFolder
from ..operations.pending import PendingRequests
from ..records.naming import find_ids, resolve_names
from ..records.request import listed
from .aggregation import check_aggregation, check_one_answer_can_be_made
from .answering import Ensemble
from .batches import bind
from .calls import Routing, refuse_stopped
from .ensemble_loss import take_targets
from .gates import RECORDED, Gate, GateSettings
from .generating import Generating
from .handing_out import HandingOut
from .loading import check_base_fits, check_options, find_base, make_ready, open_system, recorded_shape
from .model_class import AttachedConfigs, model_class, read_from_base
from .stack import StageStack
from .unlearning import Unlearning


class S3TModel(Unlearning, HandingOut, Generating, nn.Module):
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
        gate (`str` or [`~hf_s3t.model.gates.Gate`], *optional*, defaults to `"recorded"`):
            What weighs the shards for each row of a call, or of each prompt of `generate`: `"terms"`, by the words of
            the prompt and of the rows that are still in (the system must have been built with it; see
            `S3TConfig.gate`), or an object of yours; `None` weighs them equally; `"recorded"` is what the config says.
        gate_top_k (`int`, *optional*, defaults to `"recorded"`):
            How many shards answer a row where they stand out; the others compute nothing. `None`: all that have a
            weight.
        gate_temperature (`float`, defaults to `"recorded"`): What the scores of `"terms"` are divided by.

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
    methods: tuple[str, ...] = ("s3t",)

    def __new__(cls, stack: StageStack | None = None, *args: Any, **kwargs: Any) -> Self:
        """An instance of the class made for the base's; see [`~hf_s3t.model.model_class.model_class`]."""
        made: type[Any] = cls if stack is None else model_class(cls, type(stack.base))
        model: Self = super().__new__(made)
        return model

    def __init__(
        self,
        stack: StageStack,
        folder: SystemFolder,
        preload: str = "best",
        when_exhausted: str = "error",
        gate: Gate | str | None = RECORDED,
        gate_top_k: int | str | None = RECORDED,
        gate_temperature: float | str = RECORDED,
    ):
        # Not the base class's, which would build another base.
        nn.Module.__init__(self)
        check_options(preload, when_exhausted, stack.head)
        self._gate_settings = GateSettings(gate, gate_top_k, gate_temperature)
        self._gate_settings.check(folder.config)
        check_method(folder.record, self.methods, folder.path)
        self.add_module("base_model", stack.base)
        self.when_exhausted = when_exhausted
        self.aggregation = folder.record["aggregation"]
        check_aggregation(self.aggregation, self.base_model.config)
        check_one_answer_can_be_made(self.base_model, folder.config.num_shards, folder.config.select)
        self._ensemble = Ensemble(self.base_model)
        if folder.config.num_shards > 1 or folder.config.select == "all":
            stack.share_trunk()
        self._begin_serving(stack, folder, preload)

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        token: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        base_model: PreTrainedModel | str | os.PathLike[str] | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        preload: str = "best",
        when_exhausted: str = "error",
        gate: Gate | str | None = RECORDED,
        gate_top_k: int | str | None = RECORDED,
        gate_temperature: float | str = RECORDED,
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
            gate (`str` or [`~hf_s3t.model.gates.Gate`], *optional*, defaults to `"recorded"`): See [`S3TModel`].
            gate_top_k (`int`, *optional*, defaults to `"recorded"`): See [`S3TModel`].
            gate_temperature (`float`, defaults to `"recorded"`): See [`S3TModel`].

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the folder holds no system, or a file is missing or altered, or the gate
                that is asked for is not there or was made with another tokenizer.
            [`~hf_s3t.errors.ConfigError`]: If `gate_top_k` is more than there are shards, or given without a gate.
            [`~hf_s3t.errors.HubError`]: If the repository or revision cannot be found or reached.
            [`~hf_s3t.errors.BaseModelMismatchError`]: If the base is not the one the stages were trained on.
        """
        folder = open_system(path, revision, token, cache_dir)
        # Before a base model is loaded for it.
        check_method(folder.record, cls.methods, folder.path)
        shape = recorded_shape(folder)
        check_options(preload, when_exhausted, shape.head)
        settings = GateSettings(gate, gate_top_k, gate_temperature)
        settings.check(folder.config)
        if settings.resolved(folder.config).gate == "terms":
            folder.load_gate()
        base = find_base(
            folder.record,
            base_model,
            shape.head,
            dtype=dtype,
            device_map=device_map,
            quantization_config=quantization_config,
            token=token,
            cache_dir=cache_dir,
        )
        is_by_name = not isinstance(base_model, nn.Module)
        as_recorded = is_by_name and dtype is None and quantization_config is None
        check_base_fits(base, folder.record, shape, as_recorded)
        make_ready(base, shape.head, folder.config.seed)
        stack = cls.stack_type(base, shape.peft_config, shape.layers, shape.head)
        served = getattr(cls, "_served_as", cls)
        model: S3TModel = served(
            stack,
            folder,
            preload=preload,
            when_exhausted=when_exhausted,
            gate=gate,
            gate_top_k=gate_top_k,
            gate_temperature=gate_temperature,
        )
        model._refuse_unreadable_gate()
        return model.eval()

    # A Transformers model of its task

    def __getattr__(self, name: str) -> Any:
        try:
            # Not the base class's own, which may hand on to parts of the base.
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            if name == "base_model":
                raise
        return read_from_base(self.base_model, name)

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise S3TError(
            "A served model is neither copied nor pickled: a deletion would not reach the copy. `save_pretrained` "
            "copies the system, and `S3TModel.from_pretrained` loads it, in another process too."
        )

    @property
    def base_model(self) -> PreTrainedModel:
        """The base model, without any stage."""
        found: Any = nn.Module.__getattr__(self, "base_model")
        base: PreTrainedModel = found
        return base

    @property
    def peft_config(self) -> dict[str, Any]:
        """The configs of the adapters in memory by name. No others can be added."""
        return AttachedConfigs(self.base_model.peft_config)

    @property
    def config(self) -> PreTrainedConfig:
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

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        # What moves or casts all there is: `to`, `half`, `float`, and `Trainer` with `bf16_full_eval`.
        self._refuse_other_precision(fn)
        apply: Callable[..., Self] = super()._apply
        return apply(fn, recurse)

    def _refuse_other_precision(self, fn: Callable[..., Any]) -> None:
        """Rounded in place, stages would not be what their files say, and those loaded or grown later would."""
        for dtype in {parameter.dtype for parameter in self.parameters() if parameter.is_floating_point()}:
            wanted = fn(torch.empty(0, dtype=dtype)).dtype
            if wanted != dtype:
                names = " to ".join(str(one).removeprefix("torch.") for one in (dtype, wanted))
                raise ConfigError(
                    f"A served model is not cast, here from {names}: its stages would not be what their files say any "
                    "more, and those that are loaded or grown later would. Load the base as you want it "
                    "(`S3TModel.from_pretrained(..., dtype=...)`), and evaluate without `fp16_full_eval` and "
                    "`bf16_full_eval`; `torch.autocast` and `bf16=True` cast nothing."
                )

    @property
    def generation_config(self) -> GenerationConfig:
        """The base model's generation settings."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value: GenerationConfig) -> None:
        self.base_model.generation_config = value

    def tie_weights(self) -> None:
        """Does nothing: the base's weights were tied when it was loaded. Evaluation harnesses call it."""

    def can_generate(self) -> bool:
        """Whether the base model can."""
        return self.base_model.can_generate()

    def forward(
        self, *args: Any, labels: torch.Tensor | None = None, return_dict: bool | None = None, **kwargs: Any
    ) -> ModelOutput | tuple[Any, ...]:
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
        inputs = bind(self.base_model, args, kwargs)
        # Given by position they are among the inputs.
        labels, return_dict = inputs.pop("labels", labels), inputs.pop("return_dict", return_dict)
        steps = self._calls.steps
        if steps is not None:
            answer = self._answer(steps.routing, inputs, labels)
            refuse_stopped(steps.routing)
        else:
            with self._call() as routing:
                answer = self._answer(routing, inputs, labels)
        return answer.to_tuple() if return_dict is False else answer

    def _answer(self, routing: Routing, inputs: dict[str, Any], labels: torch.Tensor | None) -> ModelOutput:
        with self._calls.computing(routing):
            if self.base_model.training:
                self.eval()
            targets = take_targets(inputs, labels)
            self._ensemble.check(inputs, routing.route)
            if routing.route is None:
                self._check_base_may_answer()
            gating = self._gating(routing, inputs, targets.get("labels"))
            return self._ensemble.answer(routing, inputs, targets, self.aggregation, gating)

    def _check_base_may_answer(self) -> None:
        """Where no stack answers, the base may if that is asked for, and stages are not just out of memory."""
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
        self.catch_up()
        return self._calls.is_exhausted

    def status(self) -> dict[str, Any]:
        """
        Where the system stands.

        Returns:
            `dict` with `examples` (how many are in), `deletions` (requests so far), `pending` (examples
            whose deletion waits for `apply_pending`), `depths` (per shard the depth that
            serves), `sequence_depths` (per shard and sequence), `sets` (per shard and number of slices: sets that
            are there, planned), `stages` (valid, and with those that are missing), `expected_depth` (the mean depth
            over shards and the next requests, as many as a shard has slices, if nothing is trained), `stages_left` and
            `work_left` (what `train()` would train; work in full LoRA fine-tunings of all the data), `stages_behind`
            (valid ones that lack rows which came since), `additions` (how often rows were added), `next_stage`
            (what one more stage would bring: `stage`, its `work`, by how much the mean of `depths`, as `depth`, and
            `expected_depth` rise; `None` if none is missing),
            `deletions_until_first_dead_shard` and `deletions_until_exhausted` (expected numbers of further requests by
            the prior, uniform if none is given; Lemma 1 from the present state), and `failures`: one sentence for each
            thing that could not be done yet beside the calls, and is tried again: requests that are due, the table
            without the deleted rows.
        """
        self.catch_up()
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
        request = resolve_names(folder.table, ids, None, folder.ledger, folder.names)
        places = folder.table.places_of(find_ids(folder.table, ids, folder.ledger, folder.names))
        found = dict(zip(ids, places, strict=True))
        if request.already_deleted:
            gone = ", ".join(repr(i) for i, place in found.items() if place is None)
            raise UnknownExampleError(f"{gone}: deleted, and in no slice any more. Ask for the others.")
        return {i: place for i, place in found.items() if place is not None}

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
