"""Contract E6: settings, models and data that would break isolation are refused by name, before any training."""

import contextlib
import inspect
import json
import math
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import nn
from torch.utils.data import IterableDataset
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging

from .config import S3TConfig
from .errors import ConfigError, IsolationError
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
        if getattr(config, field, None):
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
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
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
    from transformers import AutoConfig

    name = getattr(getattr(model, "config", None), "_name_or_path", None)
    if not name or not hasattr(model, "get_input_embeddings"):
        return
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # models of audio or images may have none
        return
    if not isinstance(embeddings, nn.Embedding):
        return
    try:
        original = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError):
        return
    expected = getattr(original.get_text_config(), "vocab_size", None)
    if type(model.config) is type(original) and expected not in (None, embeddings.num_embeddings):
        raise IsolationError(
            f"The embeddings were resized from {expected} to {embeddings.num_embeddings} rows: the new rows are in no "
            "checkpoint, so nobody could load this base again. Save the resized model with `save_pretrained` and "
            "train on that folder."
        )


def check_checkpoint(model: nn.Module, layers_path: str, head: Sequence[str]) -> None:
    """
    Refuse a base with parameters that its checkpoint lacks, besides the head: they are random, and nobody could load
    them again.

    Looks only at checkpoints on this machine; a model made in memory has none.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the parameters and the way out.
    """
    keys = _checkpoint_keys(getattr(model.config, "_name_or_path", None))
    if not keys:
        return
    output = getattr(model, "get_output_embeddings", lambda: None)()
    skipped = tuple(f"{name}." for name in (layers_path, *head))
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    missing = []
    for name, module in model.named_modules():
        own = next(module.parameters(recurse=False), None)
        if own is None or module is output or f"{name}.".startswith(skipped):
            continue
        relative = name.removeprefix(prefix)
        if not any(key.startswith(f"{relative}.") or f".{relative}." in key for key in keys):
            missing.append(name)
    if missing:
        raise IsolationError(
            f"The checkpoint {model.config._name_or_path!r} has no parameters for {', '.join(missing)}: they were "
            "initialised at random, and a system loaded later would stand on others. Save the model once with "
            "`save_pretrained` and train on that folder."
        )


def _checkpoint_keys(name: str | None) -> set[str]:
    if not name:
        return set()
    path = cached_file(
        name, SAFE_WEIGHTS_INDEX_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False
    )
    if path is not None:
        with open(path) as file:
            return set(json.load(file)["weight_map"])
    path = cached_file(name, SAFE_WEIGHTS_NAME, local_files_only=True, _raise_exceptions_for_missing_entries=False)
    if path is None:
        return set()
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def evaluation_chooses(args: TrainingArguments, config: S3TConfig) -> str | None:
    """The setting by which an evaluation steers training or serving, if there is one."""
    if args.load_best_model_at_end:
        return "load_best_model_at_end=True"
    if args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy"):
        return f"lr_scheduler_type={args.lr_scheduler_type.value}"
    return 'select="metric"' if config.select == "metric" else None


def check_task(model: nn.Module, aggregation: str) -> None:
    """
    Refuse tasks whose answers cannot be made into one, before a system is trained for them.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming the task and the way out.
    """
    if "start_positions" in inspect.signature(type(model).forward).parameters:
        raise ConfigError(
            f"{type(model).__name__} answers with start and end positions, which S3T does not aggregate. Use a "
            "classification or causal language model."
        )
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
    if getattr(args, "fsdp", None) or getattr(args, "deepspeed", None):
        raise ConfigError(
            "FSDP and DeepSpeed spread the frozen base over processes, which stages do not support. Use plain data "
            "parallelism (`accelerate launch --num_processes N`), with a quantised base if memory is short."
        )
    if args.fp16:
        raise IsolationError(
            "`fp16=True` scales the loss by a factor that goes from stage to stage, so that a stage would depend on "
            "what was trained before it. Use `bf16=True`."
        )
    if args.bf16_full_eval or args.fp16_full_eval:
        raise IsolationError(
            "`bf16_full_eval`/`fp16_full_eval` cast the base in place, so that stages trained after an evaluation "
            "would stand on another base. Use `bf16=True`, which casts nothing."
        )
    if not args.accelerator_config.use_seedable_sampler:
        raise IsolationError(
            "`accelerator_config={'use_seedable_sampler': False}` makes the order of examples depend on what ran "
            "before. Leave it on."
        )
    if not getattr(args, "dataloader_in_order", True):
        raise IsolationError(
            "`dataloader_in_order=False` lets the speed of workers decide the order of batches. Leave it on."
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
