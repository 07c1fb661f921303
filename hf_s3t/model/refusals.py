"""Contract E6: settings, models and data that would break isolation are refused by name, before any training."""

import contextlib
import dataclasses
import inspect
import math
import os
import typing
from collections.abc import Sequence

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.utils import ModelOutput, logging

from ..config import S3TConfig
from ..errors import ConfigError, IsolationError
from ..training.circumstances import evaluation_trains
from .aggregation import logit_fields
from .randomness import preserved_randomness
from .state import Derived, Look, Mark, shown


logger = logging.get_logger(__name__)


# Quantisation that looks at no data; every other method was calibrated on some.
DATA_FREE_QUANTIZATION = {"bitsandbytes", "hqq", "torchao", "quanto", "eetq", "fp8", "fbgemm_fp8", "mxfp4", "bitnet"}

# Initialisations that read training data, or change the base so that what remains is no longer the base.
_INITIALISATIONS = (True, False, "gaussian", "orthogonal")

# LoRA features that touch parameters outside the stage's own layers, or need more than an adapter per layer.
_REFUSED_LORA_FIELDS = {
    "layers_to_transform": "the stages decide which layers they adapt; use `layers_per_slice` of the S3TConfig",
    "trainable_token_indices": "it trains embeddings, which all stages share",
    "layer_replication": "it shares weights between layers",
    "target_parameters": "adapters on bare parameters cannot be routed per ensemble member; use `target_modules`",
    "alora_invocation_tokens": "activated LoRA depends on the prompt and cannot be routed per ensemble member",
    "use_qalora": "it needs a base quantised with GPTQ",
    "use_bdlora": "block-diagonal LoRA cannot be routed per ensemble member",
    "arrow_config": "it mixes adapters by a router of its own",
    "megatron_config": "tensor-parallel layers are not supported",
    "monteclora_config": "its sampling state is shared between adapters",
    "velora_config": "its projections are shared between adapters",
    "kasa_config": "it changes the base model",
    "ensure_weight_tying": "it ties adapters to the embeddings, which all stages share",
}


# By which variable a tracker is told to upload what is trained.
_UPLOADS = {
    "wandb": "WANDB_LOG_MODEL", "mlflow": "HF_MLFLOW_LOG_ARTIFACTS", "comet_ml": "COMET_LOG_ASSETS",
    "clearml": "CLEARML_LOG_MODEL", "dvclive": "HF_DVCLIVE_LOG_MODEL",
}  # fmt: skip

# Under which names `torch.compile`, data parallelism and FSDP hold the model that they wrap.
_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")

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

# The kinds of models that were tried out and found to keep no state, and what each pass makes for itself.
_KNOWN_KINDS: dict[tuple, Derived] = {}


def check_peft_config(config: PeftConfig, head: Sequence[str] = ()) -> None:
    """
    Refuse PEFT settings that would break E1.

    Args:
        config ([`~peft.PeftConfig`]): The user's config.
        head (sequence of `str`): Names of the modules that are trained as the head, the only `modules_to_save`.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the setting and the way out.
        [`~hf_s3t.errors.ConfigError`]: If the rank or the dropout is none.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        name = getattr(config, "peft_type", None) or type(config).__name__
        raise IsolationError(
            f"`peft_config` is a {getattr(name, 'value', name)}; stages are LoRA adapters. Use `peft.LoraConfig` "
            "(rsLoRA and DoRA by its flags)."
        )
    if config.bias != "none":
        raise IsolationError(
            f'`peft_config.bias="{config.bias}"` trains biases of the base, which all stages share. Use bias="none".'
        )
    if config.init_lora_weights not in _INITIALISATIONS:
        raise IsolationError(
            f'`peft_config.init_lora_weights="{config.init_lora_weights}"` changes the base or reads training data. '
            "Use True, False, 'gaussian' or 'orthogonal'."
        )
    for field, reason in _REFUSED_LORA_FIELDS.items():
        # The index 0 is a layer, no absence of one.
        value = getattr(config, field, None)
        if value or (type(value) is int and value == 0):
            raise IsolationError(f"`peft_config.{field}` cannot be used: {reason}.")
    for rank in (config.r, *dict(config.rank_pattern or {}).values()):
        if type(rank) is not int or rank < 1:
            raise ConfigError(
                f"`peft_config` has the rank {rank!r}, expected 1 or more. Give a whole number such as 16."
            )
    if type(config.lora_dropout) not in (int, float) or not 0 <= config.lora_dropout < 1:
        raise ConfigError(
            f"`peft_config.lora_dropout` is {config.lora_dropout!r}, expected a share, from 0 to below 1. Give 0.05."
        )
    extra = sorted(set(config.modules_to_save or ()) - set(head))
    if extra:
        raise IsolationError(
            f"`peft_config.modules_to_save` names {', '.join(extra)}, which every stage would train in full. Only the "
            f"head ({', '.join(head) or 'a language model trains none'}) is, and it is found without being named."
        )


def check_base(model: nn.Module, config: S3TConfig) -> None:
    """
    Refuse base models in which a stage could depend on more than its prefix.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the property and the way out.
    """
    if _has_two_stacks(model):
        raise IsolationError(
            f"{type(model).__name__} is an encoder-decoder: it has two stacks of layers, and S3T's top-to-bottom "
            "order is defined for one. Use a decoder-only or encoder-only model."
        )
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        raise IsolationError(
            f"The base model has batch norms ({norms[0]} and {len(norms) - 1} more) whose running statistics change "
            "with every batch and are shared by all stages. Use a model with layer norms."
        )
    if any("dynamic" in str(getattr(module, "rope_type", "")) for module in model.modules()):
        raise IsolationError(
            "The base model has dynamic rotary embeddings (`rope_type`), whose frequencies depend on the longest "
            "input that it has seen, whichever stage or call that was of. Use a model with a fixed scaling (linear, "
            "yarn, llama3 or longrope)."
        )
    if any(_checkpoints_reentrantly(module) for module in model.modules()):
        raise ConfigError(
            "The base model has gradient checkpointing on with `use_reentrant=True`, which needs gradients at the "
            "model's input and drags the backward pass through frozen layers. Call "
            "`model.gradient_checkpointing_disable()` and set `gradient_checkpointing=True` in the training arguments."
        )
    method = _quantization_method(model)
    if method is not None and method not in DATA_FREE_QUANTIZATION and not config.base_is_public:
        raise IsolationError(
            f"The base model is quantised by {method}, which calibrates on data that cannot be unlearned. If that "
            "data is public, say so with S3TConfig(base_is_public=True); otherwise use bitsandbytes."
        )
    _check_embeddings(model)


def _has_two_stacks(model: nn.Module) -> bool:
    """Whether a model has a decoder beside its encoder; one whose config says so may be the encoder with a head."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    takes = inspect.signature(type(model).forward).parameters
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return len(outer) != 1 or any(name.startswith("decoder_") for name in takes)


def check_has_logits(model: nn.Module) -> None:
    """
    Refuse models that say that they answer with something else than logits: backbones, which users put heads on.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With what they answer with, and the way out.
    """
    answers = _answer_class(model)
    fields = [field.name for field in dataclasses.fields(answers)] if answers is not None else []
    if fields and not logit_fields(fields):
        told = ", ".join(name for name in fields if name not in ("loss", "hidden_states", "attentions"))
        raise ConfigError(
            f"{type(model).__name__} has no logits: it answers with {told}, and the members of an ensemble are "
            "aggregated by their logits. Use a class with a head, such as AutoModelForSequenceClassification; or, for "
            "embeddings and losses of your own, a class of yours around the backbone whose forward returns them as "
            '`logits`, with aggregation="mean_logits".'
        )


def _answer_class(model: nn.Module) -> type[ModelOutput] | None:
    """The class of what a model's forward returns, if it says so."""
    returned = inspect.signature(type(model).forward).return_annotation
    if isinstance(returned, str):
        with contextlib.suppress(Exception):
            returned = typing.get_type_hints(type(model).forward).get("return")
    found = [
        one
        for one in (returned, *typing.get_args(returned))
        if isinstance(one, type) and issubclass(one, ModelOutput) and dataclasses.is_dataclass(one)
    ]
    return found[0] if len(found) == 1 else None


def check_keeps_no_state(model: nn.Module) -> None:
    """
    Refuse base models whose forward pass leaves in their modules what a later pass could read.

    A few passes over three words tell, once for every kind of model. Models of other inputs than words, and quantised
    ones, whose passes are not for trying, are watched while stages train and calls run.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming what changed and the way out.
    """
    _settle_on_pictures(model)
    kind = _kind_of(model)
    if kind is None:
        return
    if kind in _KNOWN_KINDS:
        _KNOWN_KINDS[kind].hold_for(model)
        return
    words = getattr(model.config.get_text_config(), "vocab_size", 0)
    one, other = [words // 5, words // 3, words // 2], [words // 2, words // 5, words // 3]
    modes = {module: module.training for module in model.modules()}
    before = Look(model)
    try:
        with preserved_randomness():
            looks = [_look_after(model, read) for read in (one, other, [*one, *other], one)]
            left = looks[1].changed(looks[0]) or changed_for_good(model, before, looks[1])
    except Exception as error:
        # It needs something else than words.
        logger.debug(f"{type(model).__name__} cannot be tried out on words alone: {error}")
        return
    finally:
        before.put_back()
        for module, mode in modes.items():
            module.training = mode
    if left:
        raise IsolationError(
            f"The forward pass of {type(model).__name__} changes the model, in {shown(left)}: what one batch was "
            "would reach into the next, from stage to stage and from answer to answer. Use a model whose forward pass "
            "leaves nothing behind; if it is a setting, load the model with what it changes to."
        )
    _KNOWN_KINDS[kind] = Derived.of(looks[0], looks[2], looks[3])
    _KNOWN_KINDS[kind].hold_for(model)


def _settle_on_pictures(model: nn.Module) -> None:
    """
    Show a model of pictures one of the size that it is configured for.

    Some set for good, by the first picture, what follows from its size. They shall have done so before it counts:
    what pictures of another size would change is then found.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    height_width = (size, size) if isinstance(size, int) else size
    is_whole = not any(parameter.is_meta for parameter in model.parameters())
    if getattr(model, "main_input_name", None) != "pixel_values" or not height_width or not is_whole:
        return
    modes = {module: module.training for module in model.modules()}
    shape = (1, getattr(config, "num_channels", 3), *height_width)
    before = Look(model)
    try:
        with preserved_randomness(), torch.no_grad():
            model.eval()(pixel_values=torch.zeros(shape, dtype=model.dtype, device=model.device))
    except Exception as error:
        # It needs something else than pictures.
        logger.debug(f"{type(model).__name__} cannot be tried out on a picture alone: {error}")
    finally:
        only_sizes = all(_is_a_size(model, name) for name in Look(model).changed(before))
        before.put_back(settings=not only_sizes)
        for module, mode in modes.items():
            module.training = mode


def _is_a_size(model: nn.Module, attribute: str) -> bool:
    """Whether an attribute of a module of the model is a whole number."""
    path, _, name = attribute.rpartition(".")
    try:
        return type(getattr(model.get_submodule(path), name)) is int
    except AttributeError:
        return False


def _look_after(model: nn.Module, words: Sequence[int]) -> Look:
    read(model, words)
    return Look(model)


def changed_for_good(model: nn.Module, before: Look, after: Look) -> dict[str, tuple[Mark, Mark]]:
    """What changed between two looks, and does not come back by a pass in training mode, as in some models it does."""
    left = after.changed(before)
    words = getattr(getattr(model, "config", None), "vocab_size", None)
    if left and isinstance(words, int):
        with contextlib.suppress(Exception):
            read(model, [words // 5, words // 3, words // 2], training=True)
            left = Look(model).changed(before)
    return left


@torch.no_grad()
def read(model: nn.Module, words: Sequence[int], training: bool = False) -> None:
    """Have a model read a few words."""
    model.train(training)
    model(input_ids=torch.tensor([list(words)], device=next(model.parameters()).device))


def _kind_of(model: nn.Module) -> tuple | None:
    """What decides whether a model keeps state: models of one kind need to be tried out once. `None`: never."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "input_ids" or getattr(model, "is_quantized", False):
        return None
    if config is None or any(parameter.is_meta for parameter in model.parameters()):
        return None
    kinds = tuple((type(module), "forward" in vars(module)) for module in model.modules())
    return type(model), config.to_json_string(), kinds


def _checkpoints_reentrantly(module: nn.Module) -> bool:
    function = getattr(module, "_gradient_checkpointing_func", None)
    return bool(
        getattr(module, "gradient_checkpointing", False) and getattr(function, "keywords", {}).get("use_reentrant")
    )


def check_is_itself(model: nn.Module) -> None:
    """
    Refuse a base that something is wrapped around, or whose tensors are elsewhere.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: With the way out.
    """
    inner = next((getattr(model, name) for name in _WRAPPED if _is_around(model, name)), None)
    if inner is not None:
        raise ConfigError(
            f"The model is a {type(model).__name__} around a {type(inner).__name__}, expected the latter by itself: "
            "modules are found, and stages stored, by their names in it. Give the model as it was loaded; the trainer "
            "wraps it where it is asked to compile (`torch_compile=True`) or was launched in several processes."
        )
    if any(module._compiled_call_impl is not None for module in model.modules()):
        raise ConfigError(
            "The base was compiled in place (`model.compile()`): stages would be computed in a way that no recipe "
            "tells, and what is compiled does not look at the stages that serve again. Give it as it was loaded, and "
            "train with `torch_compile=True`."
        )
    offloaded = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if offloaded:
        raise ConfigError(
            f"{len(offloaded)} parameters of the base, {offloaded[0]} among them, are not in memory: they are on the "
            "device `meta`, for it was made empty, or `device_map` fetches them layer by layer from the disk or the "
            "CPU. Nobody could tell which base this is. Load it where there is room for it, quantised if need be."
        )


def _is_around(model: nn.Module, name: str) -> bool:
    """Whether all that a module holds is, under this name, a whole model."""
    return list(dict(model.named_children())) == [name] and hasattr(getattr(model, name), "config")


def check_has_no_adapters(model: nn.Module) -> None:
    """
    Refuse a base that carries adapters: of another training, or of a system that is live on it.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: With the way out.
    """
    if isinstance(model, PeftModel):
        name = model.active_adapter
        raise IsolationError(
            f"The base model carries adapters: it is a {type(model).__name__}, whose data nobody could unlearn. Give "
            f"the plain base model, `model=model.unload()`, and the PEFT settings, "
            f"`peft_config=model.peft_config[{name!r}]`."
        )
    if any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise IsolationError(
            "The base model carries adapters (active, inactive or merged) whose data nobody could unlearn, or a "
            "system is live on it. Give the plain base model, loaded anew, and the PEFT settings as `peft_config`."
        )


def _quantization_method(model: nn.Module) -> str | None:
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if settings is None:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return getattr(method, "value", method)


def _check_embeddings(model: nn.Module) -> None:
    """Embeddings with other rows than the checkpoint's were resized: the new rows are in no checkpoint."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if not name or not hasattr(model, "get_input_embeddings"):
        return
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # models of audio or images may have none
        return
    if not isinstance(embeddings, nn.Embedding):
        return
    revision = getattr(config, "_commit_hash", None)
    try:
        # By the model's own class: what came with its own code is found by no other way without running it.
        original = type(config).from_pretrained(
            name, local_files_only=True, **({"revision": revision} if revision else {})
        )
    except (OSError, ValueError):
        return
    expected = getattr(original.get_text_config(), "vocab_size", None)
    if expected not in (None, embeddings.num_embeddings):
        raise IsolationError(
            f"The embeddings were resized from {expected} to {embeddings.num_embeddings} rows: the new rows are in no "
            "checkpoint, so nobody could load this base again. Save the resized model with `save_pretrained` and "
            "train on that folder."
        )


def evaluation_chooses(args: TrainingArguments, config: S3TConfig) -> str | None:
    """The setting by which an evaluation steers training or serving, if there is one."""
    if args.load_best_model_at_end:
        return "load_best_model_at_end=True"
    if evaluation_trains(args):
        return f"lr_scheduler_type={args.lr_scheduler_type.value}"
    return 'select="metric"' if config.select == "metric" else None


def check_task(model: nn.Module, aggregation: str) -> None:
    """
    Refuse tasks whose answers cannot be made into one, before a system is trained for them.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming the task and the way out.
    """
    is_language_model = getattr(model, "get_output_embeddings", lambda: None)() is not None
    if is_language_model and aggregation == "majority_vote":
        raise ConfigError(
            'aggregation="majority_vote" leaves a language model no probabilities to choose words by. Use '
            '"mean_probabilities" or "mean_logits".'
        )
    config = model.config
    regression = not is_language_model and getattr(config, "num_labels", 2) == 1
    problem = getattr(config, "problem_type", None)
    if aggregation != "mean_logits" and (regression or problem in ("regression", "multi_label_classification")):
        raise ConfigError(
            f'aggregation="{aggregation}" needs exclusive classes, and the task is {problem or "regression"}. Use '
            'aggregation="mean_logits".'
        )


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
