"""`S3TDPOTrainer`: TRL's `DPOTrainer`, run once per stage of an S3T system."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from datasets import Dataset
from peft import PeftConfig
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from ..config import S3TConfig
from ..errors import ConfigError
from .blueprint import Blueprint
from .bytecode import codes_in
from .preference import PAIRS, check_preferences, said_of_each
from .trainer import S3TTrainerMixin


class S3TDPOTrainer(S3TTrainerMixin, DPOTrainer):
    """
    TRL's [`~trl.DPOTrainer`] for S3T systems: direct preference optimisation on pairs that can be deleted.

    Takes what `DPOTrainer` takes, in its order, and `s3t_config`. Rows are pairs, `"chosen"` and `"rejected"`, with a
    `"prompt"` or without, as texts or chats. The reference of every stage is the base with adapters off: there is no
    second copy of it. With `precompute_ref_log_probs=True` the reference is asked once for each row, by itself.
    `evaluate()` compares the ensemble with the reference; while a stage trains, the stack so far.

    Args:
        model (`str` or [`~transformers.PreTrainedModel`]): The base model, or its id or path. It is never changed.
        ref_model: Refused: the base is the reference.
        args ([`~trl.DPOConfig`], *optional*):
            The recipe of a stage; see [`S3TTrainer`] for what differs. `sync_ref_model`, `padding_free` and
            `use_liger_kernel` are refused.
        data_collator, train_dataset, eval_dataset, processing_class: As in `DPOTrainer`. Pictures are refused.
        compute_metrics, callbacks: As in `DPOTrainer`.
        optimizers: Refused: every stage starts a fresh optimizer.
        quantization_config ([`~transformers.BitsAndBytesConfig`], *optional*): As in [`S3TSFTTrainer`].
        peft_config ([`~peft.LoraConfig`], *optional*): The adapters; may be left out for a folder that has them. As in
            `DPOTrainer`, `disable_dropout=True` (the default) holds for them too.
        s3t_config ([`S3TConfig`], *optional*): The system; may be left out for a folder that has one.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Its children, before any training; see `hf_s3t.errors`.

    Example:

    ```python
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import DPOConfig
    from hf_s3t import S3TConfig, S3TDPOTrainer

    trainer = S3TDPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=DPOConfig(output_dir="qwen-dpo-s3t", learning_rate=5e-6),
        train_dataset=load_dataset("trl-lib/ultrafeedback_binarized", split="train"),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
        s3t_config=S3TConfig(num_shards=5, num_slices=4),
    )
    trainer.train()
    trainer.s3t_model.unlearn([17, 4211])
    ```
    """

    args: DPOConfig
    processing_class: PreTrainedTokenizerBase

    _said_by_models = ("ref_chosen_logps", "ref_rejected_logps")

    def __init__(
        self,
        model: str | PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        args: DPOConfig | None = None,
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

    def _look_at_given(self, given: dict[str, Any]) -> None:
        super()._look_at_given(given)
        if type(self)._compute_loss is DPOTrainer._compute_loss:
            check_losses(given["args"])

    def _check_rows_given(self, given: Mapping[str, Any], blueprint: Blueprint) -> None:
        super()._check_rows_given(given, blueprint)
        check_preferences(given, PAIRS, self._made_here(given["args"]))

    def _check_rows_that_come(self, dataset: Any) -> None:
        check_preferences(self._as_given(dataset), PAIRS, self._made_here(self.args))
        super()._check_rows_that_come(dataset)

    def _made_here(self, args: DPOConfig) -> tuple[str, ...]:
        return self._said_by_models if args.precompute_ref_log_probs else ()

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        """As in `DPOTrainer`, of every row by itself, and anew: what others have kept was computed in batches."""

        def ask(batch: dict[str, Any]) -> dict[str, Any]:
            chosen, rejected = self.compute_ref_log_probs(self.ref_model, batch)
            return dict(zip(self._said_by_models, (chosen, rejected), strict=True))

        return said_of_each(self, dataset, ask)

    def _prepare_whole(self, dataset: Any) -> Any:
        prepared = super()._prepare_whole(dataset)
        return self._precompute_ref_logps(prepared, "train", 1) if self.precompute_ref_logps else prepared


def check_losses(args: DPOConfig) -> None:
    """
    Refuse losses that `DPOTrainer` would find unknown in a stage's first step, when the folder is written.

    It lists them nowhere: they are compared with, one after the other, where the loss is computed. Where not even the
    usual ones are found there, that is done elsewhere, and the judgement is left to it.

    Args:
        args ([`~trl.DPOConfig`]): The recipe of a stage.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming the argument.
    """
    known = {value for code in codes_in(DPOTrainer._compute_loss.__code__) for value in code.co_consts}
    for name in ("loss_type", "f_divergence_type"):
        if not known.issuperset(_listed(_usual(name))):
            continue
        unknown = [one for one in _listed(getattr(args, name)) if one not in known]
        if unknown:
            raise ConfigError(
                f"`{name}={unknown[0]!r}` is unknown to DPOTrainer, expected one of those that TRL's DPOConfig "
                "describes. Mend the name, or leave it out."
            )


def _usual(name: str) -> Any:
    """What an argument of [`~trl.DPOConfig`] is where nothing is given."""
    (field,) = (one for one in fields(DPOConfig) if one.name == name)
    return field.default if field.default_factory is MISSING else field.default_factory()


def _listed(given: Any) -> list[Any]:
    return given if isinstance(given, list) else [given]
