"""`S3TSFTTrainer`: TRL's `SFTTrainer`, run once per stage of an S3T system."""

import copy
from collections.abc import Callable, Mapping
from typing import Any

from datasets import concatenate_datasets
from peft import PeftConfig
from torch import nn
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..config import S3TConfig
from ..errors import IsolationError
from ..model.marks import difference, mark
from ..model.randomness import RandomStates
from ..plan.stages import StageKey
from .blueprint import Blueprint
from .inputs import check_texts
from .refusals import evaluation_chooses
from .rows import numbered
from .trainer import S3TTrainerMixin


class S3TSFTTrainer(S3TTrainerMixin, SFTTrainer):
    """
    TRL's [`~trl.SFTTrainer`] for S3T systems: supervised fine-tuning of causal language models.

    Takes what `SFTTrainer` takes, in its order, and `s3t_config`. Every dataset format of TRL works (text,
    prompt-completion, chat), and so does packing: a stage packs its own examples only. With `S3TConfig(replay=...)`
    below 1 it packs its new slice and the earlier ones apart, once; each epoch takes every pack of the new slice and
    draws the share of the others' packs, so that every epoch has equally many steps. Examples whose answer is
    truncated away are not trained on; their ids stay in the table and can be unlearned.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): The base model, or its id or path. It is never changed.
        args ([`~trl.SFTConfig`], *optional*): The recipe of a stage; see [`S3TTrainer`] for what differs.
        data_collator, train_dataset, eval_dataset, processing_class: As in `SFTTrainer`.
        compute_loss_func, compute_metrics, callbacks: As in `SFTTrainer`.
        optimizers: Refused: every stage starts a fresh optimizer.
        optimizer_cls_and_kwargs: As in [`S3TTrainer`].
        preprocess_logits_for_metrics: As in `SFTTrainer`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*):
            For a base given by name. In 8 bit the outlier threshold is 0 unless it is set to other than its default.
        peft_config ([`~peft.LoraConfig`], *optional*): The adapters; may be left out for a folder that has them.
            Without `target_modules` PEFT chooses them, where it has a default for the architecture.
        formatting_func (`Callable`, *optional*): As in `SFTTrainer`.
        s3t_config ([`S3TConfig`], *optional*): The system; may be left out for a folder that has one.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Its children, before any training; see `hf_s3t.errors`.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig
    from hf_s3t import S3TConfig, S3TSFTTrainer

    trainer = S3TSFTTrainer(
        model="meta-llama/Llama-2-7b-hf",
        args=SFTConfig(output_dir="llama-alpaca-s3t", learning_rate=2e-5, num_train_epochs=3),
        train_dataset=load_dataset("tatsu-lab/alpaca", split="train"),
        peft_config=LoraConfig(r=32, lora_alpha=64, use_rslora=True, target_modules="all-linear"),
        s3t_config=S3TConfig(num_shards=5, num_slices=4, budget=4),
    )
    trainer.train()
    ```
    """

    args: SFTConfig
    processing_class: PreTrainedTokenizerBase | ProcessorMixin

    # Not before they are prepared: what makes texts of them is watched meanwhile.
    _numbers_rows = False

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: SFTConfig | TrainingArguments | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., Any] | None = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[..., Any] | None = None,
        s3t_config: S3TConfig | None = None,
    ):
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            formatting_func=formatting_func,
            s3t_config=s3t_config,
        )

    def _arguments_type(self) -> type[TrainingArguments]:
        return TrainingArguments

    def _arguments_of(self, given: Mapping[str, Any]) -> TrainingArguments:
        args = given["args"]
        if args is None or isinstance(args, SFTConfig):
            return super()._arguments_of(given)
        values = args.to_dict()
        values["hub_token"] = args.hub_token
        return SFTConfig(**values)

    def _look_at_given(self, given: dict[str, Any]) -> None:
        """What `SFTTrainer` itself takes is looked at already."""

    def _check_rows_given(self, given: Mapping[str, Any], blueprint: Blueprint) -> None:
        args, rows, self._formatting = given["args"], given["train_dataset"], given["formatting_func"]
        check_texts(given["model"], rows, args, self._formatting)
        super()._check_rows_given(given, blueprint)
        # Where evaluation chooses, evaluation sets as they are before packing, by their names.
        self._unpacked: dict[str, Any] | None = {} if evaluation_chooses(args, blueprint.config) else None
        self._awaits_training_set = rows is not None

    def _check_rows_that_come(self, dataset: Any) -> None:
        check_texts(self.model, dataset, self.args, self._formatting)
        super()._check_rows_that_come(dataset)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Any:
        whole = copy.copy(args)
        if packing:
            whole.max_length = None
        # An evaluation set may be named "train" too. The training set is prepared first, and once.
        if dataset_name != "train" or not self._awaits_training_set:
            if packing and self._unpacked is not None:
                self._unpacked[dataset_name] = super()._prepare_dataset(
                    dataset, processing_class, whole, False, formatting_func, dataset_name
                )
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        self._awaits_training_set = False
        # Rows keep their number through tokenisation and filtering. Packing waits: a stage packs its own examples.
        dataset = numbered(dataset)
        args = whole
        before, drawn = mark(formatting_func), RandomStates()
        is_shared_out = (args.dataset_num_proc or 1) > 1 and "input_ids" not in dataset.column_names
        if formatting_func is not None and is_shared_out and len(dataset):
            # What it counts or draws in other processes is not seen here, so it is called here once.
            formatting_func(dataset[0])
        prepared = super()._prepare_dataset(dataset, processing_class, args, False, formatting_func, dataset_name)
        where = difference(before, mark(formatting_func))
        if where is not None or RandomStates() != drawn:
            changed = "random states" if where is None else f"`formatting_func` in `{where}`"
            raise IsolationError(
                f"Preparing `train_dataset` changed {changed}: what one row became depends on the rows before it. "
                "Give a `formatting_func` that makes each row from itself alone."
            )
        return prepared

    def _prepare_whole(self, dataset: Any) -> Any:
        if self._skip_prepare_dataset:
            return dataset
        self._awaits_training_set = True
        args = self.args
        return self._prepare_dataset(dataset, self.processing_class, args, args.packing, self._formatting, "train")

    def _evaluation_rows(self) -> Any:
        # In packed rows, training examples would be parts of rows and not be found.
        unpacked, self._unpacked = self._unpacked, None
        return unpacked or super()._evaluation_rows()

    def _stage_dataset(self, key: StageKey) -> Any:
        dataset = super()._stage_dataset(key)
        if not self.args.packing or self._skip_prepare_dataset:
            return dataset
        earlier = self._num_earlier
        if not earlier or self.s3t_config.replay == 1:
            return self._packed(dataset, key)
        parts = dataset.select(range(earlier)), dataset.select(range(earlier, len(dataset)))
        packs = [self._packed(part, key) for part in parts]
        self._num_earlier = len(packs[0])
        return concatenate_datasets(packs)

    def _packed(self, dataset: Any, key: StageKey) -> Any:
        return SFTTrainer._prepare_dataset(self, dataset, self.processing_class, self.args, True, None, str(key))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """As in `SFTTrainer` while a stage trains; otherwise the loss of the ensemble, from its own logits."""
        if self._stage is not None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        inputs = {**inputs, "use_cache": False}
        return Trainer.compute_loss(self, self.s3t_model, inputs, return_outputs, num_items_in_batch)
