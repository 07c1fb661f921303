"""Contract E6: arguments, accelerators and datasets that would break isolation are refused by name."""

import math
import os
from collections.abc import Sequence

from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from ..config import S3TConfig
from ..errors import ConfigError, IsolationError
from .circumstances import evaluation_trains


# By which variable a tracker is told to upload what is trained.
_UPLOADS = {
    "wandb": "WANDB_LOG_MODEL", "mlflow": "HF_MLFLOW_LOG_ARTIFACTS", "comet_ml": "COMET_LOG_ASSETS",
    "clearml": "CLEARML_LOG_MODEL", "dvclive": "HF_DVCLIVE_LOG_MODEL",
}  # fmt: skip
# By these names Accelerate's launcher asks for what takes a base apart.
_SPREADING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
_SPREADS_THE_BASE = (
    "FSDP and DeepSpeed, tensor and pipeline parallelism spread the frozen base over processes, which stages do not "
    "support, whether an argument asks for them, or Accelerate's config file or environment (ACCELERATE_USE_…). Use "
    "plain data parallelism (`accelerate launch --num_processes N`), with a quantised base if memory is short."
)
_SAMPLES_BY_WHAT_RAN = (
    "`accelerator_config={'use_seedable_sampler': False}` makes the order of examples depend on what ran "
    "before. Leave it on."
)


def evaluation_chooses(args: TrainingArguments, config: S3TConfig) -> str | None:
    """The setting by which an evaluation steers training or serving, if there is one."""
    if args.load_best_model_at_end:
        return "load_best_model_at_end=True"
    if evaluation_trains(args):
        return f"lr_scheduler_type={args.lr_scheduler_type.value}"
    return 'select="metric"' if config.select == "metric" else None


def _check_numbers(args: TrainingArguments) -> None:
    """Refuse what an optimizer or a data loader would refuse when the system's folder is written already."""
    if not 0 <= args.learning_rate < math.inf:
        raise ConfigError(
            f"`learning_rate` is {args.learning_rate!r}, expected 0 or more. Give a number such as 1e-4."
        )
    if args.max_steps <= 0 and not 0 < args.num_train_epochs < math.inf:
        raise ConfigError(
            f"`num_train_epochs` is {args.num_train_epochs!r}, expected more than 0: a stage would take no step. Give "
            "a number such as 3."
        )
    for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ConfigError(f"`{name}` is {getattr(args, name)!r}, expected 1 or more. Give a whole number.")


def check_arguments(args: TrainingArguments, callbacks: Sequence[TrainerCallback] | None = None) -> None:
    """
    Refuse training arguments under which a stage would depend on more than its recipe.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the argument and the way out.
        [`~hf_s3t.errors.ConfigError`]: If an argument cannot be used with stages.
    """
    _check_numbers(args)
    early = any(
        isinstance(c, EarlyStoppingCallback) or (isinstance(c, type) and issubclass(c, EarlyStoppingCallback))
        for c in callbacks or ()
    )
    if early and not args.load_best_model_at_end:
        raise ConfigError(
            "`EarlyStoppingCallback` lets an evaluation end a stage, and `load_best_model_at_end` is off. Turn it on, "
            "with an `eval_dataset` that holds no training example."
        )
    if args.n_gpu > 1:
        raise ConfigError(
            f"This process sees {args.n_gpu} GPUs and would split every batch over them (DataParallel). Use "
            "`accelerate launch --num_processes N`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
        )
    if args.auto_find_batch_size:
        raise IsolationError(
            "`auto_find_batch_size=True` lets free memory decide the batch size, so that a stage could not be trained "
            "again. Set `per_device_train_batch_size`."
        )
    kwargs = getattr(args, "activation_checkpointing_kwargs", None) or getattr(
        args, "gradient_checkpointing_kwargs", None
    )
    if kwargs and kwargs.get("use_reentrant"):
        raise ConfigError(
            "Reentrant gradient checkpointing needs gradients at the model's input and drags the backward pass "
            "through frozen layers. Use `use_reentrant=False`, which is the default."
        )
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None) or _is_spread_by_launcher(args):
        raise ConfigError(_SPREADS_THE_BASE)
    # Accelerate's environment is in it.
    _check_precision("fp16" if args.fp16 else getattr(args, "mixed_precision", "no"))
    if args.bf16_full_eval or args.fp16_full_eval:
        raise IsolationError(
            "`bf16_full_eval`/`fp16_full_eval` cast the base in place, so that stages trained after an evaluation "
            "would stand on another base. Use `bf16=True`, which casts nothing."
        )
    if not args.accelerator_config.use_seedable_sampler:
        raise IsolationError(_SAMPLES_BY_WHAT_RAN)
    if not getattr(args, "dataloader_in_order", True):
        raise IsolationError(
            "`dataloader_in_order=False` lets the speed of workers decide the order of batches. Leave it on."
        )
    for tracker, variable in _UPLOADS.items():
        if tracker in args.report_to and os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off"):
            raise ConfigError(
                f"`{variable}={os.environ[variable]}` has {tracker} upload weights, which no deletion reaches and no "
                "ledger notes. Unset it; `push_to_hub` and `export_adapter` note what is handed out."
            )
    if getattr(args, "enable_jit_checkpoint", False):
        raise ConfigError(
            "`enable_jit_checkpoint=True` ends the stage in training at a signal, as if it were complete. Leave it "
            "off: with `save_strategy` a stage is resumed from its last checkpoint."
        )
    if args.ignore_data_skip:
        raise IsolationError(
            "`ignore_data_skip=True` makes a resumed stage see other batches than an uninterrupted one. Leave it off."
        )
    if args.save_only_model and args.save_strategy != "no":
        raise IsolationError(
            "`save_only_model=True` leaves the optimizer out of checkpoints, so a resumed stage would differ from an "
            'uninterrupted one. Leave it off, or use save_strategy="no": a stage then starts again from its beginning.'
        )


def _is_spread_by_launcher(args: TrainingArguments) -> bool:
    """Whether Accelerate's launcher, or an environment like the one it makes, asks for what spreads the base."""
    asked = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in _SPREADING)
    return asked or getattr(args, "deepspeed_plugin", None) is not None


def _check_precision(mixed_precision: str) -> None:
    if mixed_precision == "fp16":
        raise IsolationError(
            "`fp16=True` (or `mixed_precision: fp16` in Accelerate's config file or environment) scales the loss by a "
            "factor that goes from stage to stage, so that a stage would depend on what was trained before it. Use "
            "`bf16=True`."
        )
    if mixed_precision not in ("no", "bf16"):
        raise IsolationError(
            f"`mixed_precision: {mixed_precision}` in Accelerate's config file or environment puts layers of its own "
            "in the place of the base's, and may scale by what earlier batches held. Use `bf16=True`."
        )


def check_accelerator(accelerator: Accelerator) -> None:
    """
    Refuse what `check_arguments` refuses where it is the accelerator that says so, whoever told it: the config file of
    `accelerate launch`, the environment, or a trainer class that makes its own.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the setting and the way out.
        [`~hf_s3t.errors.ConfigError`]: If the base would be spread over processes.
    """
    state = accelerator.state
    # A state that was not set up for one has no such attribute.
    plugins = [getattr(state, f"{name}_plugin", None) for name in ("fsdp", "deepspeed", "megatron_lm")]
    spreading = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    parallel = getattr(accelerator, "parallelism_config", None)
    is_split = parallel is not None and (parallel.dp_shard_enabled or parallel.non_data_parallel_size > 1)
    if any(plugins) or state.distributed_type in spreading or is_split:
        raise ConfigError(_SPREADS_THE_BASE)
    _check_precision("fp16" if accelerator.scaler is not None else accelerator.mixed_precision)
    if not accelerator.dataloader_config.use_seedable_sampler:
        raise IsolationError(_SAMPLES_BY_WHAT_RAN)


def check_datasets(train_dataset, eval_dataset, args: TrainingArguments, config: S3TConfig) -> None:
    """
    Refuse datasets whose rows cannot be told apart, and evaluation that would let training rows choose a model.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the problem and the way out.
    """
    if train_dataset is None:
        return
    if isinstance(train_dataset, IterableDataset) or not hasattr(train_dataset, "__len__"):
        raise IsolationError(
            f"`train_dataset` is a streaming {type(train_dataset).__name__}: its rows have no ids and no order that "
            "could be repeated. Give a map-style dataset (`load_dataset(..., streaming=False)`)."
        )
    if isinstance(train_dataset, dict):
        raise ConfigError(
            f"`train_dataset` is a {type(train_dataset).__name__} of {', '.join(map(str, train_dataset))}, expected "
            "one dataset. Give the split to train on."
        )
    if "seq_lengths" in (getattr(train_dataset, "column_names", None) or ()):
        raise IsolationError(
            "`train_dataset` is packed already: its rows mix examples across slices. Give the unpacked dataset and "
            "set `packing=True`, which packs every stage's own examples."
        )
    if config.select == "metric" and isinstance(eval_dataset, dict):
        raise ConfigError(
            f'`select="metric"` needs one evaluation set to compare stacks on, and `eval_dataset` is a dict of '
            f"{len(eval_dataset)}. Give the one that shall decide."
        )
    setting = evaluation_chooses(args, config)
    sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if setting and (eval_dataset is None or any(dataset is train_dataset for dataset in sets)):
        raise IsolationError(
            f"`{setting}` lets an evaluation choose the model, and there is no separate `eval_dataset`. Give one that "
            "holds no training example."
        )
