"""`S3TKTOTrainer`: TRL's `KTOTrainer`, run once per stage of an S3T system."""

from collections.abc import Callable, Mapping
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

from ..config import S3TConfig
from ..errors import ConfigError
from ..plan.stages import StageKey
from .blueprint import Blueprint
from .preference import JUDGED, check_preferences, said_of_each
from .rows import ROW_COLUMN
from .trainer import S3TTrainerMixin


class S3TKTOTrainer(S3TTrainerMixin, KTOTrainer):
    """
    TRL's [`~trl.KTOTrainer`] for S3T systems: answers that somebody liked or did not, and can be deleted.

    Takes what `KTOTrainer` takes, in its order, and `s3t_config`. Rows are a `"prompt"`, a `"completion"` and a
    `"label"`, or pairs, `"chosen"` and `"rejected"`; of a pair two rows are made, which lie together, and go together.
    The reference of every stage is the base with adapters off. The prompts with answers of other rows, by which the
    loss `"kto"` estimates a divergence, are put together for every stage from its own rows alone, in the batches that
    it takes. With `precompute_ref_log_probs=True` each stage asks the reference once for each of its rows, by itself.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): The base model, or its id or path. It is never changed.
        ref_model: Refused: the base is the reference.
        args ([`~trl.KTOConfig`], *optional*):
            The recipe of a stage; see [`S3TTrainer`] for what differs. `sync_ref_model` and `use_liger_kernel` are
            refused.
        data_collator, train_dataset, eval_dataset, processing_class: As in `KTOTrainer`. Pictures are refused.
        compute_metrics, callbacks: As in `KTOTrainer`.
        optimizers: Refused: every stage starts a fresh optimizer.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): As in [`S3TSFTTrainer`].
        peft_config ([`~peft.LoraConfig`], *optional*): The adapters; may be left out for a folder that has them.
        s3t_config ([`S3TConfig`], *optional*):
            The system; may be left out for a folder that has one. With the loss `"kto"` `replay` stays 1.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Its children, before any training; see `hf_s3t.errors`.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import KTOConfig
    from hf_s3t import S3TConfig, S3TKTOTrainer

    trainer = S3TKTOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=KTOConfig(output_dir="qwen-kto-s3t", learning_rate=5e-6),
        train_dataset=load_dataset("trl-lib/kto-mix-14k", split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        s3t_config=S3TConfig(num_shards=5, num_slices=4),
    )
    trainer.train()
    ```
    """

    args: KTOConfig
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: KTOConfig | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        s3t_config: S3TConfig | None = None,
    ):
        super().__init__(
            model=model,
            ref_model=ref_model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            s3t_config=s3t_config,
        )

    def _check_rows_given(self, given: Mapping[str, Any], blueprint: Blueprint) -> None:
        super()._check_rows_given(given, blueprint)
        check_preferences(given, JUDGED, self._made_here(given["args"]))
        replay, loss = blueprint.config.replay, given["args"].loss_type
        if replay < 1 and loss == "kto":
            raise ConfigError(
                f"`S3TConfig(replay={replay})` draws other batches in each epoch, and loss_type={loss!r} compares the "
                "rows of a batch with each other's answers, put together once. Leave `replay` out, or use "
                'loss_type="apo_zero_unpaired".'
            )
        size = given["args"].per_device_train_batch_size
        if size < 2 and loss == "kto":
            raise ConfigError(
                f"`per_device_train_batch_size={size}` leaves no other row's answer to compare with, expected 2 or "
                f'more with loss_type={loss!r}. Raise it, or use loss_type="apo_zero_unpaired".'
            )

    def _check_rows_that_come(self, dataset: Any) -> None:
        check_preferences(self._as_given(dataset), JUDGED, self._made_here(self.args))
        super()._check_rows_that_come(dataset)

    def _made_here(self, args: KTOConfig) -> tuple[str, ...]:
        return ("KL_completion_ids", *(("ref_logps", "ref_KL_logps") if args.precompute_ref_log_probs else ()))

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, dataset_name: str) -> Dataset:
        if ROW_COLUMN not in dataset.column_names:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        # Rows of all slices are no batch: a stage puts its own together.
        given, self.calculate_KL = self.calculate_KL, False
        try:
            return super()._prepare_dataset(dataset, processing_class, args, dataset_name)
        finally:
            self.calculate_KL = given

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """As in `KTOTrainer`, of every row by itself; of training rows when a stage has put its own together."""
        return dataset if ROW_COLUMN in dataset.column_names else self._with_reference(dataset)

    def _with_reference(self, dataset: Dataset) -> Dataset:
        def ask(batch: dict[str, Any]) -> dict[str, Any]:
            said = zip(("ref_logps", "ref_KL_logps"), self.compute_ref_log_probs(self.ref_model, batch), strict=True)
            return {name: value for name, value in said if value is not None}

        return said_of_each(self, dataset, ask)

    def _stage_dataset(self, key: StageKey) -> Dataset:
        dataset: Dataset = super()._stage_dataset(key)
        if self.calculate_KL:
            dataset = dataset.add_column("KL_completion_ids", self._answers_of_others(dataset["completion_ids"][:]))
        return self._with_reference(dataset) if self.precompute_ref_logps else dataset

    def _answers_of_others(self, answers: list[list[int]]) -> list[list[int]]:
        """To each row the answer of the one before it in its batch, to the first that of the last."""
        size = self.args.per_device_train_batch_size
        batches = [answers[start : start + size] for start in range(0, len(answers), size)]
        return [answer for batch in batches for answer in [batch[-1], *batch[:-1]]]
