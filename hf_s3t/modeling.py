"""`S3TModel`: serves the ensemble of a system and forgets examples."""

import functools
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import GenerationMixin
from transformers.loss.loss_utils import LOSS_MAPPING

from .analysis import expected_deletions_left
from .base_model import check_base_is, load_base, log_casts_once
from .calls import Calls, Routing
from .ensemble import (
    aggregate,
    bind,
    check_aggregation,
    check_cache,
    first_row,
    num_rows,
    refuse_other_state,
    reorder_cache,
    repeat_rows,
    stamp_cache,
)
from .errors import ConfigError, ExhaustedError, FolderError, S3TError, UnknownExampleError
from .isolation import check_has_no_adapters
from .layers import LayerGroups, find_head, find_layers
from .ledger import UnlearningReport
from .plan import StageKey
from .stack import Route, StageStack, seed_head
from .storage import SystemFolder
from .versions import library_versions


# Seconds: how long running calls are waited for, and how long a call waits before it looks at the ledger again.
_PATIENCE = 60.0
_A_MOMENT = 0.005
_PRELOADS = ("best", "all")
# Marks caches of the base by itself, which answers when no shard is left.
_BASE_ALONE = Route(())
# Methods of the base that would change what all stages stand on, or publish it in the system's place.
_NOT_DELEGATED = {
    "push_to_hub", "resize_token_embeddings", "tie_weights", "init_weights", "load_adapter", "add_adapter",
    "set_adapter", "enable_adapters", "disable_adapters", "delete_adapter", "enable_input_require_grads",
}  # fmt: skip
_WHEN_EXHAUSTED = ("error", "base")


class S3TModel(GenerationMixin, nn.Module):
    """
    The ensemble of an S3T system on one base model, which behaves as a Transformers model of its task.

    One member per shard answers: the longest stack of stages that survived the deletions so far. All members run in
    one batched pass over one base. Load it with [`S3TModel.from_pretrained`]; a trainer's live model is
    `trainer.s3t_model`.

    What voids the guarantee of [`~S3TModel.unlearn`]: copies of the folder or of its tensors made elsewhere (other
    processes that do not read the folder again, exported adapters, backups), a base model that was itself trained on
    the deleted examples, and ids that do not name all copies of what is to be forgotten.

    Args:
        stack ([`~hf_s3t.stack.StageStack`]): The adapters in memory.
        folder ([`~hf_s3t.storage.SystemFolder`]): The folder that this model serves and that `unlearn` writes to.
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

    def __init__(self, stack: StageStack, folder: SystemFolder, preload: str = "best", when_exhausted: str = "error"):
        super().__init__()
        _check_options(preload, when_exhausted, stack.head)
        self.base_model = stack.base
        self.stack = stack
        self.folder = folder
        self.preload = preload
        self.when_exhausted = when_exhausted
        self.aggregation = folder.record["aggregation"]
        check_aggregation(self.aggregation, self.base_model.config)
        # Trainer, pipelines and `generate` look at the signature of an instance's forward.
        self.forward = functools.wraps(self.base_model.forward)(functools.partial(S3TModel.forward, self))
        self._calls = Calls(Routing(()))
        self._deletion_lock = threading.RLock()
        self._cleaner: threading.Thread | None = None
        self._one_pass: bool | None = None
        stack.wrap()
        self.refresh()

    @classmethod
    def from_pretrained(
        cls,
        path: str | os.PathLike,
        *,
        base_model: nn.Module | str | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: Any = None,
        quantization_config: Any = None,
        preload: str = "best",
        when_exhausted: str = "error",
    ) -> "S3TModel":
        """
        Load a system. The model is bound to the folder: `unlearn` writes there.

        Args:
            path (`str` or `os.PathLike`): The folder of the system.
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
            [`~hf_s3t.errors.BaseModelMismatchError`]: If the base is not the one the stages were trained on.
        """
        if not os.path.isdir(path):
            raise FolderError(f"{path} is not a folder. Give the `output_dir` of a training run.")
        folder = SystemFolder(path)
        record = folder.record
        layers = LayerGroups(
            record["layers"]["path"], record["layers"]["num_layers"], tuple(map(tuple, record["layers"]["groups"]))
        )
        head = tuple(record["head"])
        _check_options(preload, when_exhausted, head)
        if isinstance(base_model, nn.Module):
            check_has_no_adapters(base_model)
            base = base_model
        else:
            base = load_base(
                record["base_model"],
                name=base_model,
                dtype=dtype,
                device_map=device_map,
                quantization_config=quantization_config,
                head=head,
            )
        found = _layers_path(base, layers)
        if found != layers.path or find_head(base, found) != head:
            raise ConfigError(
                f"The base has its layers at {found} and the head {find_head(base, found)}; the system was trained "
                f"with {layers.path} and {head}. Load the base as a {record['base_model']['architecture']}."
            )
        check_base_is(base, record["base_model"], layers.path, head)
        seed_head(base, head, folder.config.seed)
        log_casts_once(base)
        stack = StageStack(base, LoraConfig(**record["peft_config"]), layers, head)
        return cls(stack, folder, preload=preload, when_exhausted=when_exhausted).eval()

    # A Transformers model of its task

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":
                raise
            if name in _NOT_DELEGATED:
                raise AttributeError(
                    f"S3TModel has no `{name}`: the base model's would change or publish the base, which all stages "
                    "stand on. Use the base model by itself."
                ) from None
            return getattr(self.base_model, name)

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

    @property
    def generation_config(self):
        """The base model's generation settings."""
        return self.base_model.generation_config

    @generation_config.setter
    def generation_config(self, value):
        self.base_model.generation_config = value

    def can_generate(self) -> bool:
        """Whether the base model can."""
        return self.base_model.can_generate()

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """As the base model does."""
        return self.base_model.prepare_inputs_for_generation(*args, **kwargs)

    def _reorder_cache(self, past_key_values, beam_idx):
        members = max(1, len(getattr(past_key_values, "_s3t_route", _BASE_ALONE)))
        return reorder_cache(past_key_values, beam_idx, members)

    def forward(self, *args, labels: torch.Tensor | None = None, return_dict: bool | None = None, **kwargs):
        """
        The ensemble's answer to the inputs that the base model's `forward` takes.

        Args:
            *args: As for the base model.
            **kwargs: As for the base model.
            labels (`torch.Tensor`, *optional*): As for the base model; the loss is that of the ensemble's answer.
            return_dict (`bool`, *optional*): `False` for a tuple.

        Returns:
            The output class of the base model with `logits` of shape `(rows, ..., classes)`, `loss` if there are
            labels, and `past_key_values` where the base returns them. With mean probabilities, `logits` is the
            logarithm of the mean.

        Raises:
            [`~hf_s3t.errors.ExhaustedError`]: If no shard is left.
            [`~hf_s3t.errors.StaleCacheError`]: If `past_key_values` was made with stacks that answer no more.
        """
        self._follow()
        with self._calls.call() as routing, self._calls.computing(routing):
            return self._answer(routing, bind(self.base_model, args, kwargs), labels, return_dict)

    def generate(self, *args, **kwargs):
        """
        As the base model's `generate`, with the ensemble: from its first token to its last with the same stacks.

        Raises:
            [`~hf_s3t.errors.ExhaustedError`]: If no shard is left.
            [`~hf_s3t.errors.CallStoppedError`]: If a deletion stopped the call; see [`~S3TModel.unlearn`].
        """
        self._follow()
        with self._calls.call():
            return super().generate(*args, **kwargs)

    def _follow(self) -> None:
        """Before a call: do what the ledger says since another process wrote to it."""
        if self._calls.is_inside or self.stack.in_training is not None:
            return
        while self.folder.has_news():
            # Whoever holds this lock is reading the ledger, or writing to it: soon there is no news any more.
            if self._deletion_lock.acquire(timeout=_A_MOMENT):
                try:
                    if self.folder.has_news():
                        self.refresh()
                finally:
                    self._deletion_lock.release()

    def _answer(self, routing: Routing, inputs: dict[str, Any], labels, return_dict):
        if self.base_model.training:
            self.eval()
        loss_kwargs = {k: inputs.pop(k) for k in ("num_items_in_batch", "shift_labels") if k in inputs}
        if inputs.get("output_hidden_states") or inputs.get("output_attentions"):
            raise S3TError(
                "An ensemble has no single set of hidden states or attentions. Export a shard with `export_adapter` "
                "and look at it with plain PEFT."
            )
        cache = inputs.get("past_key_values")
        refuse_other_state(inputs)
        check_cache(cache, routing.route or _BASE_ALONE)
        if routing.route is None:
            return self._answer_as_base(inputs, labels, return_dict, loss_kwargs)
        members = len(routing.route)
        rows = num_rows(inputs, self.main_input_name)
        if members > 1 and not self._answers_in_one_pass(inputs, rows):
            return self._answer_in_turn(routing, inputs, labels, return_dict, loss_kwargs)
        with self.stack.routed(routing.route):
            outputs = self.base_model(**repeat_rows(inputs, rows, members), return_dict=True)
        if cache is not None and outputs.get("past_key_values") is None:
            stamp_cache(cache, routing.route)
        stamp_cache(outputs.get("past_key_values"), routing.route)
        logits = aggregate(outputs.logits, routing.weights, self.aggregation)
        return self._output(outputs, logits, labels, return_dict, loss_kwargs)

    @torch.no_grad()
    def _answers_in_one_pass(self, inputs: dict[str, Any], rows: int) -> bool:
        """
        Whether every adapted module takes rows in its first dimension, so that members can share a pass.

        Sequence-first models, and projections of positions that all rows share, do not. Two passes of the base over
        one row and over two tell; they are run once.
        """
        if self._one_pass is None:
            one = first_row(inputs, rows)
            with self.stack.noting_lengths() as lengths:
                self.base_model(**one, return_dict=True)
            with self.stack.noting_lengths() as doubled:
                self.base_model(**repeat_rows(one, 1, 2), return_dict=True)
            self._one_pass = doubled == [2 * length for length in lengths]
        return self._one_pass

    def _answer_in_turn(self, routing: Routing, inputs, labels, return_dict, loss_kwargs):
        """One pass per member."""
        if inputs.get("past_key_values") is not None:
            raise S3TError(
                f"{type(self.base_model).__name__} does not keep rows in the first dimension, so the members of the "
                "ensemble answer one after the other and cannot share `past_key_values`. Call with use_cache=False."
            )
        logits = []
        for tip in routing.route.members:
            with self.stack.routed(Route((tip,), routing.route.stopped)):
                outputs = self.base_model(**inputs, return_dict=True)
            logits.append(outputs.logits)
            outputs["past_key_values"] = None
        return self._output(
            outputs, aggregate(torch.cat(logits), routing.weights, self.aggregation), labels, return_dict, loss_kwargs
        )

    def _answer_as_base(self, inputs, labels, return_dict, loss_kwargs):
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
        outputs = self.base_model(**inputs, return_dict=True)
        stamp_cache(inputs.get("past_key_values"), _BASE_ALONE)
        stamp_cache(outputs.get("past_key_values"), _BASE_ALONE)
        return self._output(outputs, outputs.logits, labels, return_dict, loss_kwargs)

    def _output(self, outputs, logits, labels, return_dict, loss_kwargs):
        loss = None if labels is None else self._loss(logits, labels, loss_kwargs)
        kept = {"loss": loss, "logits": logits, "past_key_values": outputs.get("past_key_values")}
        answer = type(outputs)(**{k: v for k, v in kept.items() if v is not None})
        return answer.to_tuple() if return_dict is False else answer

    def _loss(self, logits: torch.Tensor, labels: torch.Tensor, loss_kwargs: dict) -> torch.Tensor:
        named = {"logits": logits, "pooled_logits": logits, "config": self.config}
        vocabulary = getattr(self.config.get_text_config(), "vocab_size", None)
        function = self.base_model.loss_function
        if self.stack.head and function is LOSS_MAPPING["ForCausalLM"]:
            # What Transformers falls back to for classes it does not know.
            function = LOSS_MAPPING["ForSequenceClassification"]
        return function(labels=labels, vocab_size=vocabulary, **named, **loss_kwargs)

    # What the system is

    @property
    def is_exhausted(self) -> bool:
        """Whether no shard is left to answer."""
        return self._routing.route is None

    def status(self) -> dict[str, Any]:
        """
        Where the system stands.

        Returns:
            `dict` with `examples` (how many are in), `deletions` (requests so far), `depths` (per shard the depth that
            serves), `sequence_depths` (per shard and sequence), `stages` (valid, planned),
            `deletions_until_first_dead_shard` and `deletions_until_exhausted` (expected numbers of further requests by
            the prior, uniform if none is given; Lemma 1 from the present state).
        """
        folder = self.folder
        valid = folder.valid_stages
        config = folder.config
        prior = config.deletion_prior
        alive = folder.plan.first_slices_alive(valid)

        def left(until: str) -> float:
            return expected_deletions_left(alive, config.num_shards, config.num_slices, prior=prior, until=until)

        return {
            "examples": len(folder.table),
            "deletions": folder.ledger.num_deletions,
            "depths": self._routing.depths,
            "sequence_depths": folder.plan.depths(valid),
            "stages": (len(valid), len(folder.plan.stages(folder.table.empty))),
            "deletions_until_first_dead_shard": left("first_shard"),
            "deletions_until_exhausted": left("exhausted"),
        }

    def locate(self, ids: Sequence[int | str]) -> dict[int | str, tuple[int, int]]:
        """
        The (shard, slice) of examples.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If one is not in the system, deleted ones included.
        """
        request = self.folder.table.resolve(ids, None, self.folder.ledger, self.folder.key)
        if request.already_deleted:
            raise UnknownExampleError(
                f"{request.already_deleted} of the ids were deleted and are in no slice. Ask for the others."
            )
        rows = self.folder.table.rows
        return {i: (rows[i].shard, rows[i].slice) for i in request.present}

    def check(self) -> list[str]:
        """
        Read everything in the folder again and say what is wrong with it: digests, chain of the ledger, validity.

        Returns:
            `list[str]`: One sentence per problem; empty if all is well.
        """
        try:
            folder = SystemFolder(self.folder.path)
        except S3TError as error:
            return [str(error)]
        problems = []
        valid = folder.valid_stages
        for key in folder.plan.stages():
            if key not in folder.stages:
                continue
            if key not in valid:
                problems.append(
                    f"{key} does not match the examples of its slices, or a stage it stands on is missing."
                )
            try:
                folder.adapter_path(key)
            except FolderError as error:
                problems.append(str(error))
        return problems

    # Serving and forgetting

    def refresh(self) -> None:
        """
        Follow what is in the folder now: deletions by other processes, stages a trainer added.

        Calls notice deletions by other processes by themselves when they begin; this is for not waiting for one. Calls
        under way on a stage that has gone are waited for, as in [`~S3TModel.unlearn`].

        Raises:
            [`~hf_s3t.errors.S3TError`]: If called while a stage trains, or from inside a running call of this model.
        """
        self._calls.refuse_inside("refresh")
        with self._deletion_lock:
            self._refuse_while_training()
            self._wait_for_cleaner()
            self.folder.refresh()
            self._serve(self.folder.valid_stages)

    def _refuse_while_training(self) -> None:
        if self.stack.in_training is not None:
            raise S3TError(
                f"The stage {self.stack.in_training} is in training on this model's base. Call this after `train()`, "
                "or on a model that another process loaded from the folder."
            )

    def _serve(self, valid: frozenset[StageKey], on_running: str = "wait", timeout: float = _PATIENCE) -> float:
        """Load what shall be in memory, switch to it, and drop the rest; returns how long the lock was held."""
        folder, stack, calls = self.folder, self.stack, self._calls
        present = frozenset(key for key in valid if stack.holds(key, folder.adapter_digest(key)))
        routing = self._routing_of(valid)
        # What is in memory and may stay answers first: loading what is not may fail, and a removed stage must not
        # answer then. Where nothing was removed, the stacks that serve go on until the new ones are there.
        lock_seconds = 0.0 if self._routing.stages <= present else calls.switch(self._routing_of(present))
        gone = frozenset(stack.loaded) - present
        if on_running == "cancel" or not calls.wait_for(gone, timeout):
            calls.stop(gone)
        stack.drop(gone)
        wanted = set(valid) if self.preload == "all" else routing.stages
        new = sorted(wanted - present, key=lambda key: (key.shard, key.depth, key.prefix))
        # All files are checked before any is attached.
        for key, path in [(key, folder.adapter_path(key)) for key in new]:
            stack.load(key, path, folder.adapter_digest(key))
        lock_seconds = max(lock_seconds, calls.switch(routing))
        spare = frozenset(stack.loaded) - wanted
        # These may answer: calls that use them run to their end, and if that takes long they are dropped another time.
        if calls.wait_for(spare, timeout):
            stack.drop(spare)
        return lock_seconds

    def _routing_of(self, valid: frozenset[StageKey]) -> "Routing":
        folder = self.folder
        served = folder.plan.served(valid, folder.config.select, folder.losses())
        return Routing(served, [folder.adapter_digest(tip) for tips in served for tip in tips])

    @property
    def _routing(self) -> Routing:
        return self._calls.routing

    def unlearn(
        self,
        ids: Sequence[int | str] | None = None,
        *,
        groups: Sequence[int | str] | None = None,
        missing: str = "error",
        include_duplicates: bool = False,
        on_running: str = "wait",
        timeout: float = _PATIENCE,
    ) -> UnlearningReport:
        """
        Forget examples: switch off, and remove, every stage that saw one (Algorithm 4). No training, no restart.

        When it has returned, no call on this model returns a value computed with a stage that saw one of the ids; the
        tensors are out of memory and the stage folders out of the system's folder. The deletion is in the ledger, and
        synced, before anything else changes: whatever dies afterwards, the next load finishes the removal.

        Other threads may call the model meanwhile. New calls work on what is left at once. Calls that are running on a
        stage that goes are waited for, or stopped with [`~hf_s3t.errors.CallStoppedError`]; the tensors are freed, and
        this returns, when none of them computes any more.

        All ids are checked first; a refused call changes nothing. Ids that were deleted before are no error.

        Args:
            ids (sequence of `int` or `str`, *optional*): Ids of the examples.
            groups (sequence of `int` or `str`, *optional*): Groups whose examples are all meant.
            missing (`str`, defaults to `"error"`): `"ignore"` passes over ids this system never saw.
            include_duplicates (`bool`, defaults to `False`):
                Delete the examples too whose content equals that of one of these. Otherwise the report names them.
            on_running (`str`, defaults to `"wait"`):
                `"wait"` lets running calls on the old stacks end, `"cancel"` stops them.
            timeout (`float`, defaults to 60): Seconds to wait at most for running calls; then they are stopped.

        Returns:
            [`~hf_s3t.ledger.UnlearningReport`]: What went, and what is left.

        Raises:
            [`~hf_s3t.errors.UnknownExampleError`]: If an id or group is unknown and `missing="error"`.
            [`~hf_s3t.errors.ExampleIdError`]: If `ids` or `groups` is no list of ids.
            [`~hf_s3t.errors.S3TError`]: If called while a stage trains on this model's base, or from inside a running
                call of this model.
        """
        _require("missing", missing, ("error", "ignore"))
        _require("on_running", on_running, ("wait", "cancel"))
        if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not timeout >= 0:
            raise ConfigError(f"`timeout` must be a number of seconds, got {timeout!r}.")
        self._calls.refuse_inside("unlearn")
        if ids is None and groups is None:
            raise ConfigError("`unlearn` was called with neither `ids` nor `groups`. Name what to forget.")
        started = time.perf_counter()
        with self._deletion_lock:
            self._refuse_while_training()
            self._wait_for_cleaner()
            with self.folder.lock():
                return self._unlearn(ids, groups, missing, include_duplicates, on_running, timeout, started)

    def _unlearn(self, ids, groups, missing, include_duplicates, on_running, timeout, started) -> UnlearningReport:
        folder = self.folder
        folder.refresh_ledger()
        request = folder.table.resolve(ids, groups, folder.ledger, folder.key, ignore_unknown=missing == "ignore")
        before = self._routing.depths
        duplicates = folder.table.duplicates_of(request.present)
        if include_duplicates:
            request = request.with_ids(duplicates)
            duplicates = []
        if request.present:
            removed = folder.plan.removed_by(folder.table.places(request.present), folder.stages)
            folder.record_deletion(request.present, removed, library_versions(), request.groups)
        # Also what an earlier call condemned and did not live to remove.
        condemned = folder.condemned_stages()
        lock_seconds = self._serve(folder.valid_stages, on_running, timeout)
        folder.remove_stages(condemned)
        folder.remove_stale_checkpoints()
        if request.present:
            self._cleaner = threading.Thread(target=folder.compact, name="hf_s3t-compact")
            self._cleaner.start()
        return UnlearningReport(
            requested=len(request.present) + request.already_deleted,
            deleted=len(request.present),
            already_deleted=request.already_deleted,
            stages_removed=tuple(str(key) for key in condemned),
            depths_before=before,
            depths_after=self._routing.depths,
            is_exhausted=self.is_exhausted,
            seconds=time.perf_counter() - started,
            lock_seconds=lock_seconds,
            duplicates=tuple(duplicates),
        )

    def _wait_for_cleaner(self) -> None:
        """The id table is written without the deleted rows a moment after `unlearn` returned."""
        if self._cleaner is not None:
            self._cleaner.join()
            self._cleaner = None

    # Handing out

    def save_pretrained(self, save_directory: str | os.PathLike) -> None:
        """
        Copy the system into another, empty folder (into its own, only make sure that all is written).

        Args:
            save_directory (`str` or `os.PathLike`): The folder.
        """
        self._wait_for_cleaner()
        if Path(save_directory).resolve() != self.folder.path.resolve():
            self.folder.copy_to(save_directory)

    def export_adapter(self, shard: int, folder: str | os.PathLike) -> None:
        """
        Write the stack that serves a shard as one plain PEFT adapter, for use without hf_s3t.

        The ledger notes it: a later deletion cannot reach the copy, which must be revoked by hand.

        Args:
            shard (`int`): Number of the shard.
            folder (`str` or `os.PathLike`): Where to write the adapter.

        Raises:
            [`~hf_s3t.errors.ExhaustedError`]: If the shard has no stage left.
        """
        if not 0 <= shard < self.folder.plan.num_shards:
            raise ConfigError(f"shard={shard}, expected 0 to {self.folder.plan.num_shards - 1}.")
        tips = self._routing.served[shard]
        if not tips:
            raise ExhaustedError(f"Shard {shard} has no stage left to export. Call `train()` to grow it again.")
        with self._deletion_lock, self.folder.lock():
            self.folder.record_export(tips[0], library_versions())
            self.stack.export(tips[0], Path(folder), self.folder.record["base_model"]["id"])


def _check_options(preload: str, when_exhausted: str, head: Sequence[str]) -> None:
    _require("preload", preload, _PRELOADS)
    _require("when_exhausted", when_exhausted, _WHEN_EXHAUSTED)
    if when_exhausted == "base" and head:
        raise ConfigError(
            'when_exhausted="base" is for language models: a classifier\'s base has no trained head. Use "error".'
        )


def _layers_path(base: nn.Module, layers: LayerGroups) -> str:
    """Where a base holds as many layers as the system's, at the recorded place if it can be."""
    try:
        recorded = base.get_submodule(layers.path)
    except AttributeError:
        return find_layers(base)[0]
    return layers.path if isinstance(recorded, nn.ModuleList) else find_layers(base)[0]


def _require(name: str, value, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"`{name}` must be one of {', '.join(map(repr, choices))}, got {value!r}.")
