"""Contract E6: arguments, accelerators and datasets that would break isolation are refused by name."""

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import datasets
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, SchedulerType, Trainer, TrainerCallback, TrainingArguments

from ..config import S3TConfig
from ..errors import ConfigError, IsolationError, S3TError
from ..model.refusals import raise_together
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
        return f"lr_scheduler_type={SchedulerType(args.lr_scheduler_type).value}"
    return 'select="metric"' if config.select == "metric" else None


class _Arguments(NamedTuple):
    """The arguments of a trainer that are looked at together."""

    args: TrainingArguments
    callbacks: Sequence[TrainerCallback]


class _Refusal(NamedTuple):
    """One thing that is refused: when, as which error, and what is said (got, expected, the way out)."""

    applies: Callable[[_Arguments], object]
    error: type[ConfigError] | type[IsolationError]
    says: Callable[[_Arguments], str]


def _not_positive(name: str) -> _Refusal:
    return _Refusal(
        lambda given: getattr(given.args, name) < 1,
        ConfigError,
        lambda given: f"`{name}` is {getattr(given.args, name)!r}, expected 1 or more. Give a whole number.",
    )


def _uploads(tracker: str, variable: str) -> _Refusal:
    return _Refusal(
        lambda given: (
            tracker in (given.args.report_to or ())
            and os.environ.get(variable, "").lower() not in ("", "0", "false", "no", "off")
        ),
        ConfigError,
        lambda given: (
            f"`{variable}={os.environ[variable]}` has {tracker} upload weights, which no deletion reaches and no "
            "ledger notes. Unset it; `push_to_hub` and `export_adapter` note what is handed out."
        ),
    )


# What an optimizer or a data loader would refuse when the system's folder is written already.
_OF_NUMBERS = (
    _Refusal(
        lambda given: not 0 <= given.args.learning_rate < math.inf,
        ConfigError,
        lambda given: (
            f"`learning_rate` is {given.args.learning_rate!r}, expected 0 or more. Give a number such as 1e-4."
        ),
    ),
    _Refusal(
        lambda given: given.args.max_steps <= 0 and not 0 < given.args.num_train_epochs < math.inf,
        ConfigError,
        lambda given: (
            f"`num_train_epochs` is {given.args.num_train_epochs!r}, expected more than 0: a stage would take no "
            "step. Give a number such as 3."
        ),
    ),
    _not_positive("per_device_train_batch_size"),
    _not_positive("per_device_eval_batch_size"),
    _not_positive("gradient_accumulation_steps"),
)
_OF_ARGUMENTS = (
    *_OF_NUMBERS,
    _Refusal(
        lambda given: any(map(_stops_early, given.callbacks)) and not given.args.load_best_model_at_end,
        ConfigError,
        lambda given: (
            "`EarlyStoppingCallback` lets an evaluation end a stage, and `load_best_model_at_end` is off. Turn it on, "
            "with an `eval_dataset` that holds no training example."
        ),
    ),
    _Refusal(
        lambda given: given.args.n_gpu > 1,
        ConfigError,
        lambda given: (
            f"This process sees {given.args.n_gpu} GPUs and would split every batch over them (DataParallel). Use "
            "`accelerate launch --num_processes N`, or make one GPU visible with CUDA_VISIBLE_DEVICES."
        ),
    ),
    _Refusal(
        lambda given: given.args.auto_find_batch_size,
        IsolationError,
        lambda given: (
            "`auto_find_batch_size=True` lets free memory decide the batch size, so that a stage could not be trained "
            "again. Set `per_device_train_batch_size`."
        ),
    ),
    _Refusal(
        lambda given: _of_checkpointing(given.args).get("use_reentrant"),
        ConfigError,
        lambda given: (
            "Reentrant gradient checkpointing needs gradients at the model's input and drags the backward pass "
            "through frozen layers. Use `use_reentrant=False`, which is the default."
        ),
    ),
    _Refusal(lambda given: _is_spread(given.args), ConfigError, lambda given: _SPREADS_THE_BASE),
    _Refusal(
        lambda given: _refused_precision(_precision_of(given.args)),
        IsolationError,
        lambda given: str(_refused_precision(_precision_of(given.args))),
    ),
    _Refusal(
        lambda given: given.args.bf16_full_eval or given.args.fp16_full_eval,
        IsolationError,
        lambda given: (
            "`bf16_full_eval`/`fp16_full_eval` cast the base in place, so that stages trained after an evaluation "
            "would stand on another base. Use `bf16=True`, which casts nothing."
        ),
    ),
    _Refusal(
        lambda given: not getattr(given.args.accelerator_config, "use_seedable_sampler", True),
        IsolationError,
        lambda given: _SAMPLES_BY_WHAT_RAN,
    ),
    _Refusal(
        lambda given: not getattr(given.args, "dataloader_in_order", True),
        IsolationError,
        lambda given: (
            "`dataloader_in_order=False` lets the speed of workers decide the order of batches. Leave it on."
        ),
    ),
    _Refusal(
        lambda given: getattr(given.args, "use_liger_kernel", False),
        ConfigError,
        lambda given: (
            "`use_liger_kernel=True` puts layers of its own into the base for good, on which the stages that serve "
            "would stand. Leave it off."
        ),
    ),
    *(_uploads(tracker, variable) for tracker, variable in _UPLOADS.items()),
    _Refusal(
        lambda given: getattr(given.args, "enable_jit_checkpoint", False),
        ConfigError,
        lambda given: (
            "`enable_jit_checkpoint=True` ends the stage in training at a signal, as if it were complete. Leave it "
            "off: with `save_strategy` a stage is resumed from its last checkpoint."
        ),
    ),
    _Refusal(
        lambda given: given.args.ignore_data_skip,
        IsolationError,
        lambda given: (
            "`ignore_data_skip=True` makes a resumed stage see other batches than an uninterrupted one. Leave it off."
        ),
    ),
    _Refusal(
        lambda given: given.args.save_only_model and given.args.save_strategy != "no",
        IsolationError,
        lambda given: (
            "`save_only_model=True` leaves the optimizer out of checkpoints, so a resumed stage would differ from an "
            'uninterrupted one. Leave it off, or use save_strategy="no": a stage then starts again from its beginning.'
        ),
    ),
)


def check_arguments(args: TrainingArguments, callbacks: Sequence[TrainerCallback] | None = None) -> None:
    """
    Refuse training arguments under which a stage would depend on more than its recipe. Of several that are refused
    one error tells; it is an `IsolationError` if one of them alone would be.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the arguments and the ways out.
        [`~hf_s3t.errors.ConfigError`]: If arguments cannot be used with stages, and none breaks isolation.
    """
    given = _Arguments(args, tuple(callbacks or ()))
    refused = (refusal for refusal in _OF_ARGUMENTS if refusal.applies(given))
    raise_together((refusal.error(refusal.says(given)) for refusal in refused), "These training arguments")


def _stops_early(callback: Any) -> bool:
    kind = callback if isinstance(callback, type) else type(callback)
    return issubclass(kind, EarlyStoppingCallback)


def _of_checkpointing(args: TrainingArguments) -> dict[str, Any]:
    names = ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs")
    return next(filter(None, (getattr(args, name, None) for name in names)), {})


def _is_spread(args: TrainingArguments) -> bool:
    return bool(getattr(args, "fsdp", None) or getattr(args, "deepspeed", None)) or _is_spread_by_launcher(args)


def _precision_of(args: TrainingArguments) -> str:
    # `mixed_precision` knows what Accelerate's environment says.
    return "fp16" if args.fp16 else getattr(args, "mixed_precision", "no")


def _is_spread_by_launcher(args: TrainingArguments) -> bool:
    """Whether Accelerate's launcher, or an environment like the one it makes, asks for what spreads the base."""
    is_asked = any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in _SPREADING)
    return is_asked or getattr(args, "deepspeed_plugin", None) is not None


def _refused_precision(mixed_precision: str) -> str | None:
    """Why a mixed precision is refused, if it is."""
    if mixed_precision == "fp16":
        return (
            "`fp16=True` (or `mixed_precision: fp16` in Accelerate's config file or environment) scales the loss by a "
            "factor that goes from stage to stage, so that a stage would depend on what was trained before it. Use "
            "`bf16=True`."
        )
    if mixed_precision not in ("no", "bf16"):
        return (
            f"`mixed_precision: {mixed_precision}` in Accelerate's config file or environment puts layers of its own "
            "in the place of the base's, and may scale by what earlier batches held. Use `bf16=True`."
        )
    return None


def check_accelerator(accelerator: Accelerator) -> None:
    """
    Refuse what `check_arguments` refuses where it is the accelerator that says so, whoever told it: the config file of
    `accelerate launch`, the environment, or a trainer class that makes its own.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the setting and the way out.
        [`~hf_s3t.errors.ConfigError`]: If the base would be spread over processes.
    """
    state = accelerator.state
    # Accelerate makes these attributes only where it was set up for them.
    plugins = [getattr(state, f"{name}_plugin", None) for name in ("fsdp", "deepspeed", "megatron_lm")]
    spreading = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    parallel = getattr(accelerator, "parallelism_config", None)
    is_split = parallel is not None and (parallel.dp_shard_enabled or parallel.non_data_parallel_size > 1)
    if any(plugins) or state.distributed_type in spreading or is_split:
        raise ConfigError(_SPREADS_THE_BASE)
    precision = _refused_precision("fp16" if accelerator.scaler is not None else accelerator.mixed_precision)
    if precision is not None:
        raise IsolationError(precision)
    if not accelerator.dataloader_config.use_seedable_sampler:
        raise IsolationError(_SAMPLES_BY_WHAT_RAN)


def check_datasets(train_dataset: Any, eval_dataset: Any, args: TrainingArguments, config: S3TConfig) -> None:
    """
    Refuse datasets whose rows cannot be told apart, and evaluation that would let training rows choose a model. Of
    several problems one error tells, as in `check_arguments`.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the problems and the ways out.
        [`~hf_s3t.errors.ConfigError`]: If there is not one dataset to train on, or to choose by.
    """
    if train_dataset is None:
        return
    problems: list[S3TError] = []
    if isinstance(train_dataset, IterableDataset) or not hasattr(train_dataset, "__len__"):
        streaming = (
            f"`train_dataset` is a streaming {type(train_dataset).__name__}: its rows have no ids and no order that "
            "could be repeated. Give a map-style dataset (`load_dataset(..., streaming=False)`)."
        )
        problems.append(IsolationError(streaming))
    if isinstance(train_dataset, dict):
        several = (
            f"`train_dataset` is a {type(train_dataset).__name__} of {', '.join(map(str, train_dataset))}, expected "
            "one dataset. Give the split to train on."
        )
        problems.append(ConfigError(several))
    if "seq_lengths" in (getattr(train_dataset, "column_names", None) or ()):
        packed = (
            "`train_dataset` is packed already: its rows mix examples across slices. Give the unpacked dataset and "
            "set `packing=True`, which packs every stage's own examples."
        )
        problems.append(IsolationError(packed))
    if config.select == "metric" and isinstance(eval_dataset, dict):
        which = (
            f'`select="metric"` needs one evaluation set to compare stacks on, and `eval_dataset` is a dict of '
            f"{len(eval_dataset)}. Give the one that shall decide."
        )
        problems.append(ConfigError(which))
    setting = evaluation_chooses(args, config)
    sets = eval_dataset.values() if isinstance(eval_dataset, dict) else [eval_dataset]
    if setting and (eval_dataset is None or any(dataset is train_dataset for dataset in sets)):
        separate = (
            f"`{setting}` lets an evaluation choose the model, and there is no separate `eval_dataset`. Give one that "
            "holds no training example."
        )
        problems.append(IsolationError(separate))
    raise_together(problems, "These datasets")


# What a trainer class may be told, and its stages must not have: when, as which error, and what is said.
_OF_HOSTS = (
    _Refusal(
        lambda given: getattr(given.args, "sync_ref_model", False),
        IsolationError,
        lambda given: (
            "`sync_ref_model=True` has the reference follow what is trained: a stage would be compared with what "
            "earlier ones made of their rows. Leave it off: the base is the reference."
        ),
    ),
    _Refusal(
        lambda given: getattr(given.args, "padding_free", False) or getattr(given.args, "packing", False),
        ConfigError,
        lambda given: (
            "`padding_free` or `packing` is on, and rows are not packed here: each is fed by itself, padded. Leave it "
            "off."
        ),
    ),
    _Refusal(
        lambda given: getattr(given.args, "use_vllm", False),
        IsolationError,
        lambda given: (
            "`use_vllm=True` has another engine generate, in which stages are not and whose numbers no audit repeats. "
            "Leave it off: the model in training generates."
        ),
    ),
    _Refusal(
        lambda given: getattr(given.args, "log_completions", False),
        ConfigError,
        lambda given: (
            "`log_completions=True` writes prompts and what was generated of them into the system's folder, where no "
            "deletion reaches them. Leave it off; a function of rewards is shown both and may print them."
        ),
    ),
)


def check_hosted(name: str, given: Mapping[str, Any]) -> None:
    """
    Refuse what a trainer class takes, besides what `Trainer` takes, that would break stages.

    Args:
        name (`str`): The name of the class.
        given (mapping of `str`): What it was given, `args` among it.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the problems and the ways out.
        [`~hf_s3t.errors.ConfigError`]: If something cannot be used with stages, and nothing breaks isolation.
    """
    about = _Arguments(given["args"], ())
    problems: list[S3TError] = [one.error(one.says(about)) for one in _OF_HOSTS if one.applies(about)]
    if given.get("ref_model") is not None:
        problems.append(
            ConfigError(
                f"`ref_model` is a {type(given['ref_model']).__name__}, expected none: the reference of every stage "
                "is the base with adapters off, without a second copy. Leave it out; for another reference, train on "
                "that model as the base."
            )
        )
    beta = getattr(given["args"], "beta", 0.0)
    # Whose arguments know of a reference, and who takes none, loads one.
    if beta and "ref_model" not in given and hasattr(given["args"], "sync_ref_model"):
        problems.append(
            ConfigError(
                f"`beta={beta!r}` has {name} load a second copy of the base as its reference, and it takes no other: "
                "expected a recipe without. Set `beta=0.0`."
            )
        )
    columns = getattr(given["train_dataset"], "column_names", None) or ()
    images = [column for column in ("image", "images") if column in columns]
    if images and type(given["train_dataset"]).__module__.startswith("datasets.") and _is_of_words(given["args"]):
        problems.append(
            ConfigError(
                f"`train_dataset` has a column `{images[0]}`, and {name} with stages reads texts alone. Take it out: "
                f"`dataset.remove_columns({images!r})`."
            )
        )
    raise_together(problems, "What this trainer was given")


def check_callbacks(name: str, callbacks: Sequence[TrainerCallback]) -> None:
    """
    Refuse a class that has a second model follow what is trained.

    Args:
        name (`str`): The name of the class.
        callbacks (sequence of [`~transformers.TrainerCallback`]): Those that it has, once it is set up.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: With the way out.
    """
    # By this name those of TRL mix what is trained into a reference or a teacher.
    following = next((one for one in callbacks if hasattr(one, "sync_target_model")), None)
    if following is not None:
        raise IsolationError(
            f"{name} has a {type(following).__name__}, by which another model follows what is trained: it would bring "
            "what one stage saw into the next. Choose a setting with a teacher or reference that stays as it is."
        )


def check_lengths(trainer: Trainer) -> None:
    """
    Refuse an order of rows by their lengths where nothing tells these, which `Trainer` finds when a stage begins.

    Args:
        trainer ([`~transformers.Trainer`]): The trainer, its dataset prepared.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the way out.
    """
    args, dataset = trainer.args, trainer.train_dataset
    strategy = getattr(args, "train_sampling_strategy", "random")
    is_stored = isinstance(dataset, datasets.Dataset) and dataset.format["type"] != "custom"
    if strategy not in ("group_by_length", "batch_rebalance") or not is_stored:
        return
    words = (getattr(trainer.processing_class, "model_input_names", None) or ["input_ids"])[0]
    length = args.length_column_name
    if not {words, length} & set(trainer._remove_unused_columns(dataset).column_names):
        raise ConfigError(
            f"`train_sampling_strategy={strategy!r}` puts rows in order by their lengths, and of the prepared rows no "
            f"column {words!r} is left to take them from, nor {length!r} that says them. Give the rows a column "
            f"{length!r} and set `remove_unused_columns=False`, or leave the strategy out."
        )


def _is_of_words(args: TrainingArguments) -> bool:
    """Whether these are arguments of a trainer that loads, and prepares for, language models."""
    return hasattr(args, "model_init_kwargs")
