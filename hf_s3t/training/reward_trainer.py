"""`S3TRewardTrainer`: TRL's `RewardTrainer`, run once per stage of an S3T system."""

from collections.abc import Callable, Mapping
from typing import Any

from peft import PeftConfig
from transformers import (
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainingArguments,
)
from trl.trainer.reward_config import RewardConfig
from trl.trainer.reward_trainer import RewardTrainer

from ..config import S3TConfig
from ..errors import ConfigError
from ..model.task import find_task
from .blueprint import Blueprint
from .named_base import load_base
from .preference import TOKENISED_PAIRS, check_preferences
from .trainer import S3TTrainerMixin


class S3TRewardTrainer(S3TTrainerMixin, RewardTrainer):
    """
    TRL's [`~trl.RewardTrainer`] for S3T systems: reward models whose pairs can be deleted.

    Takes what `RewardTrainer` takes, in its order, and `s3t_config`. Rows are pairs, `"chosen"` and `"rejected"`, with
    a `"prompt"` or without, as texts, chats or tokens. Every stage trains its copy of the head that gives the reward,
    which begins from the seed. The ensemble's reward is the mean of its members' rewards; `hf-s3t serve` tells it at
    `/v1/classify`.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]):
            The base model, a sequence classifier with `num_labels=1`, or the id or path of any. It is never changed.
        args ([`~trl.RewardConfig`], *optional*): The recipe of a stage; see [`S3TTrainer`] for what differs.
        data_collator, train_dataset, eval_dataset, processing_class: As in `RewardTrainer`.
        compute_metrics, callbacks: As in `RewardTrainer`.
        optimizers: Refused: every stage starts a fresh optimizer.
        optimizer_cls_and_kwargs: As in [`S3TTrainer`].
        preprocess_logits_for_metrics: As in `RewardTrainer`.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): As in [`S3TSFTTrainer`].
        peft_config ([`~peft.LoraConfig`], *optional*): The adapters; may be left out for a folder that has them. The
            head needs no `modules_to_save`.
        s3t_config ([`S3TConfig`], *optional*): The system; may be left out for a folder that has one.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Its children, before any training; see `hf_s3t.errors`.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import RewardConfig
    from hf_s3t import S3TConfig, S3TRewardTrainer

    trainer = S3TRewardTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=RewardConfig(output_dir="qwen-reward-s3t", learning_rate=1e-4),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        s3t_config=S3TConfig(num_shards=5, num_slices=4),
    )
    trainer.train()
    ```
    """

    args: RewardConfig
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: RewardConfig | None = None,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_metrics: Callable[..., Any] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[type, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[..., Any] | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        s3t_config: S3TConfig | None = None,
    ):
        super().__init__(
            model=model,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            quantization_config=quantization_config,
            peft_config=peft_config,
            s3t_config=s3t_config,
        )

    def _load_base(self, name: str, args: TrainingArguments, quantization_config: Any) -> PreTrainedModel:
        kinds = {"architecture": AutoModelForSequenceClassification, "num_labels": 1}
        return load_base(name, args, quantization_config, **kinds)

    def _look_at_given(self, given: dict[str, Any]) -> None:
        super()._look_at_given(given)
        outputs = getattr(getattr(given["model"], "config", None), "num_labels", None)
        if find_task(given["model"]) != "text-classification" or outputs != 1:
            raise ConfigError(
                f"{type(given['model']).__name__} has `num_labels={outputs}`, expected a sequence classifier with 1, "
                "the reward. Load it by `AutoModelForSequenceClassification.from_pretrained(..., num_labels=1)`, or "
                "give its name."
            )

    def _check_rows_given(self, given: Mapping[str, Any], blueprint: Blueprint) -> None:
        super()._check_rows_given(given, blueprint)
        check_preferences(given, TOKENISED_PAIRS)

    def _check_rows_that_come(self, dataset: Any) -> None:
        check_preferences(self._as_given(dataset), TOKENISED_PAIRS)
        super()._check_rows_that_come(dataset)
