"""Contract E6: PEFT settings and base models that would break isolation are refused by name, before any training."""

import contextlib
import dataclasses
import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging
from transformers.utils.generic import ModelOutput

from ..config import S3TConfig
from ..errors import ConfigError, IsolationError, S3TError
from .aggregation import NOT_OF_EXCLUSIVE_CLASSES, logit_fields
from .quantisation import quantization_method


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
# Under which names `torch.compile`, data parallelism and FSDP hold the model that they wrap.
_WRAPPED = ("_orig_mod", "module", "_fsdp_wrapped_module")


def _is_unset(value: Any) -> bool:
    # The index 0 is a layer, no absence of one.
    return not value and not (type(value) is int and value == 0)


# Of a PEFT config: a field, what it may hold, and what is wrong with anything else.
_LORA_SETTINGS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    (
        "bias",
        lambda value: value == "none",
        '`peft_config.bias="{value}"` trains biases of the base, which all stages share. Use bias="none".',
    ),
    (
        "init_lora_weights",
        lambda value: value in _INITIALISATIONS,
        '`peft_config.init_lora_weights="{value}"` changes the base or reads training data. Use True, False, '
        "'gaussian' or 'orthogonal'.",
    ),
    *(
        (field, _is_unset, f"`peft_config.{field}` cannot be used: {reason}.")
        for field, reason in _REFUSED_LORA_FIELDS.items()
    ),
)


def raise_together(problems: Iterable[S3TError], what: str) -> None:
    """
    Raise what is found, if anything is: one problem by itself, several as one error.

    Args:
        problems (`Iterable[S3TError]`): The problems, each with its way out. What is asked after another was found
            may be of a kind that nothing can be asked of; those found are told then.
        what (`str`): What cannot be used.

    Raises:
        [`~hf_s3t.errors.S3TError`]: An `IsolationError` if one of several problems is; else of the first one's class.
    """
    found: list[S3TError] = []
    try:
        for problem in problems:
            found.append(problem)
    except Exception:
        if not found:
            raise
    if len(found) == 1:
        raise found[0]
    if found:
        worst = next((problem for problem in found if isinstance(problem, IsolationError)), found[0])
        listed = "".join(f"\n- {problem}" for problem in found)
        raise type(worst)(f"{what} cannot be used, for {len(found)} reasons:{listed}")


def check_peft_config(config: PeftConfig, head: Sequence[str] = ()) -> None:
    """
    Refuse PEFT settings that would break E1, all of them in one error.

    Args:
        config ([`~peft.PeftConfig`]): The user's config.
        head (sequence of `str`): Names of the modules that are trained as the head, the only `modules_to_save`.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the settings and the ways out.
        [`~hf_s3t.errors.ConfigError`]: If the rank or the dropout is none, and nothing worse is wrong.
    """
    if not isinstance(config, LoraConfig) or config.peft_type != PeftType.LORA:
        name = getattr(config, "peft_type", None) or type(config).__name__
        raise IsolationError(
            f"`peft_config` is a {getattr(name, 'value', name)}; stages are LoRA adapters. Use `peft.LoraConfig` "
            "(rsLoRA and DoRA by its flags)."
        )
    raise_together(chain(_isolation_problems(config, head), _number_problems(config)), "`peft_config`")


def _isolation_problems(config: LoraConfig, head: Sequence[str]) -> Iterator[S3TError]:
    for field, may_be, sentence in _LORA_SETTINGS:
        value = getattr(config, field, None)
        if not may_be(value):
            yield IsolationError(sentence.format(value=value))
    extra = sorted(set(config.modules_to_save or ()) - set(head))
    if extra:
        yield IsolationError(
            f"`peft_config.modules_to_save` names {', '.join(extra)}, which every stage would train in full. Only the "
            f"head ({', '.join(head) or 'a language model trains none'}) is, and it is found without being named."
        )


def _number_problems(config: LoraConfig) -> Iterator[S3TError]:
    for rank in (config.r, *dict(config.rank_pattern or {}).values()):
        if type(rank) is not int or rank < 1:
            yield ConfigError(
                f"`peft_config` has the rank {rank!r}, expected 1 or more. Give a whole number such as 16."
            )
    if type(config.lora_dropout) not in (int, float) or not 0 <= config.lora_dropout < 1:
        yield ConfigError(
            f"`peft_config.lora_dropout` is {config.lora_dropout!r}, expected a share, from 0 to below 1. Give 0.05."
        )


def check_base(model: PreTrainedModel, config: S3TConfig) -> None:
    """
    Refuse base models in which a stage could depend on more than its prefix, with all that is wrong in one error.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming the properties and the ways out.
        [`~hf_s3t.errors.ConfigError`]: If gradient checkpointing is reentrant, and nothing worse is wrong.
    """
    raise_together(_base_problems(model, config), "The base model")


def _base_problems(model: PreTrainedModel, config: S3TConfig) -> Iterator[S3TError]:
    if _has_two_stacks(model):
        yield IsolationError(
            f"{type(model).__name__} is an encoder-decoder: it has two stacks of layers, and S3T's top-to-bottom "
            "order is defined for one. Use a decoder-only or encoder-only model."
        )
    norms = [n for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if norms:
        yield IsolationError(
            f"The base model has batch norms ({norms[0]} and {len(norms) - 1} more) whose running statistics change "
            "with every batch and are shared by all stages. Use a model with layer norms."
        )
    if any("dynamic" in str(getattr(module, "rope_type", "")) for module in model.modules()):
        yield IsolationError(
            "The base model has dynamic rotary embeddings (`rope_type`), whose frequencies depend on the longest "
            "input that it has seen, whichever stage or call that was of. Use a model with a fixed scaling (linear, "
            "yarn, llama3 or longrope)."
        )
    if any(_checkpoints_reentrantly(module) for module in model.modules()):
        yield ConfigError(
            "The base model has gradient checkpointing on with `use_reentrant=True`, which needs gradients at the "
            "model's input and drags the backward pass through frozen layers. Call "
            "`model.gradient_checkpointing_disable()` and set `gradient_checkpointing=True` in the training arguments."
        )
    method = quantization_method(model)
    if method is not None and method not in DATA_FREE_QUANTIZATION and not config.base_is_public:
        yield IsolationError(
            f"The base model is quantised by {method}, which calibrates on data that cannot be unlearned. If that "
            "data is public, say so with S3TConfig(base_is_public=True); otherwise use bitsandbytes."
        )
    resized = _resized_embeddings(model)
    if resized is not None:
        expected, found = resized
        yield IsolationError(
            f"The embeddings were resized from {expected} to {found} rows: the new rows are in no "
            "checkpoint, so nobody could load this base again. Save the resized model with `save_pretrained` and "
            "train on that folder."
        )


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
    fields = _answer_fields(model)
    if fields and not logit_fields(fields):
        others = ", ".join(name for name in fields if name not in ("loss", "hidden_states", "attentions"))
        raise ConfigError(
            f"{type(model).__name__} has no logits: it answers with {others}, and the members of an ensemble are "
            "aggregated by their logits. Use a class with a head, such as AutoModelForSequenceClassification; or, for "
            "embeddings and losses of your own, a class of yours around the backbone whose forward returns them as "
            '`logits`, with aggregation="mean_logits".'
        )


def _answer_fields(model: nn.Module) -> list[str]:
    """The fields of what a model's forward returns, if it says so of one class; none otherwise."""
    returned = inspect.signature(type(model).forward).return_annotation
    if isinstance(returned, str):
        with contextlib.suppress(Exception):
            returned = typing.get_type_hints(type(model).forward).get("return")
    found = [
        [field.name for field in dataclasses.fields(one)]
        for one in (returned, *typing.get_args(returned))
        if isinstance(one, type) and issubclass(one, ModelOutput) and dataclasses.is_dataclass(one)
    ]
    return found[0] if len(found) == 1 else []


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
    inner = next((getattr(model, name) for name in _WRAPPED if _is_wrapper_of(model, name)), None)
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


def _is_wrapper_of(model: nn.Module, name: str) -> bool:
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


def _resized_embeddings(model: PreTrainedModel) -> tuple[int, int] | None:
    """How many rows the checkpoint's embeddings have and how many the model's, if they were resized."""
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", None)
    if config is None or not name or not hasattr(model, "get_input_embeddings"):
        return None
    try:
        embeddings = model.get_input_embeddings()
    except NotImplementedError:  # models of audio or images may have none
        return None
    if not isinstance(embeddings, nn.Embedding):
        return None
    revision = getattr(config, "_commit_hash", None)
    try:
        # By the model's own class: what came with its own code is found by no other way without running it.
        original = type(config).from_pretrained(
            name, local_files_only=True, **({"revision": revision} if revision else {})
        )
        expected = getattr(original.get_text_config(), "vocab_size", None)
    except (OSError, ValueError):
        return None
    return None if expected in (None, embeddings.num_embeddings) else (expected, embeddings.num_embeddings)


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
    if aggregation != "mean_logits" and (regression or problem in NOT_OF_EXCLUSIVE_CLASSES):
        raise ConfigError(
            f'aggregation="{aggregation}" needs exclusive classes, and the task is {problem or "regression"}. Use '
            'aggregation="mean_logits".'
        )
