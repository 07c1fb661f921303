"""The base model: loading it, telling which one it is, and recognising it again by a digest of its tensors."""

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from .errors import BaseModelMismatchError, IsolationError, LayersNotFoundError


_HALVES = ("bfloat16", "float16")
# What is digested apart, and what it is called.
_PARTS = {
    "layers": "the weights of its layers",
    "rest": "its embeddings, norms or biases",
    "buffers": "its persistent buffers",
}
# Of a config: where it came from, how it was loaded, and what is decided per call.
_NOT_THE_FUNCTION = {
    "_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "quantization_config",
    "use_cache", "architectures", "attn_implementation", "_attn_implementation", "return_dict", "output_hidden_states",
    "output_attentions", "problem_type", "tie_word_embeddings", "experts_implementation",
}  # fmt: skip
# What users set on a loaded model's config, and what loading by name restores.
_MAY_BE_SET = {"pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "num_labels"}


def describe_base(model: nn.Module, layers_path: str, head: Sequence[str]) -> dict[str, Any]:
    """
    What a system records of its base: where it came from, its class, precision, quantisation and digests.

    Args:
        model ([`~transformers.PreTrainedModel`]): The bare base model.
        layers_path (`str`): Name of the list of transformer layers.
        head (sequence of `str`): Modules left out, since every stage has its own copy.
    """
    config = model.config
    quantization = getattr(config, "quantization_config", None)
    dtype = _dtype_name(model)
    return {
        "id": getattr(config, "_name_or_path", "") or None,
        "revision": getattr(config, "_commit_hash", None),
        "architecture": type(model).__name__,
        "dtype": dtype,
        "other_dtypes": _other_dtypes(model),
        "attn_implementation": getattr(config, "_attn_implementation", None),
        "quantization": quantization.to_dict() if hasattr(quantization, "to_dict") else quantization,
        "digest": _digests(model, layers_path, head, sorted({dtype, *_HALVES})),
        "num_labels": getattr(config, "num_labels", None) if head else None,
    }


def config_of(model: nn.Module) -> dict[str, Any]:
    """The settings of a base that decide what it computes, as JSON types: its config, less where it came from."""
    settings = {k: v for k, v in model.config.to_dict().items() if k not in _NOT_THE_FUNCTION}
    return json.loads(json.dumps(settings, default=str))


def check_base_is(
    model: nn.Module, record: dict[str, Any], layers_path: str, head: Sequence[str], for_training: bool = False
) -> None:
    """
    Check that a model is the recorded base, whatever precision or quantisation it was loaded in.

    Stages that are added must stand on exactly what the others stand on: `for_training` the precision and quantisation
    must be the recorded ones too.

    Raises:
        [`~hf_s3t.errors.BaseModelMismatchError`]: If a tensor differs.
    """
    now, then = config_of(model), record.get("config", {})
    other = sorted(k for k in {*now, *then} if now.get(k) != then.get(k) and k not in _MAY_BE_SET)
    right = _expected(getattr(model.config, "_name_or_path", None), record, for_training)
    if then and other:
        shown = ", ".join(f"{k}={now.get(k)!r} (was {then.get(k)!r})" for k in other[:5])
        raise BaseModelMismatchError(f"The base model is configured otherwise than at training: {shown}. {right}")
    if for_training:
        _check_precision(model, record)
    dtypes = sorted({_dtype_name(model), record["dtype"], *_HALVES})
    found, expected = _digests(model, layers_path, head, dtypes), record["digest"]
    parts = [part for part in _PARTS if found[part] and expected.get(part)]
    # One that agrees is enough: a checkpoint in one half precision that was trained on in the other is the same base.
    differing = [part for part in parts if not set(found[part].items()) & set(expected[part].items())]
    if differing:
        where = " and ".join(_PARTS[part] for part in differing)
        raise BaseModelMismatchError(
            f"The base model is not the one these stages were trained on: {where} differ"
            f"{_of_other_size(getattr(model.config, '_name_or_path', None), record)}. {right}"
        )


def _expected(given: str | None, record: dict[str, Any], for_training: bool = False) -> str:
    """Which base was recorded, which was given, and where to give the right one."""
    name = record["id"] or record.get("folder") or "the model given at training"
    revision = f", revision {record['revision']}" if record["revision"] else ""
    got = f", got {given!r}" if given and given != name else ""
    return f"Expected {name!r}{revision}{got}; give it as `{'model' if for_training else 'base_model'}`."


def _of_other_size(name: str | os.PathLike | None, record: dict[str, Any]) -> str:
    """
    How the model of a name differs in size from the recorded base, if it does: loaded by its name it gets the recorded
    size, and its weights are not for that.
    """
    try:
        found = json.loads(AutoConfig.from_pretrained(name, local_files_only=True).to_json_string(use_diff=False))
    except Exception:
        # It has no name by which anything could be told.
        return ""
    now, then = _sizes(found), _sizes(record.get("config", {}))
    other = [f"{k}={now[k]!r} (was {then[k]!r})" for k in now.keys() & then.keys() if now[k] != then[k]]
    return f", and {str(name)!r} has {', '.join(sorted(other))}" if other else ""


def _sizes(settings: dict[str, Any]) -> dict[str, int]:
    """The settings that say how many of something a model has, those of its parts included."""
    sizes = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            sizes |= {f"{name}.{inner}": size for inner, size in _sizes(value).items()}
        elif type(value) is int and (name.endswith(("_size", "_dim")) or name.startswith(("n_", "num_"))):
            sizes[name] = value
    return sizes


def _check_precision(model: nn.Module, record: dict[str, Any]) -> None:
    for name, was in (("dtype", record["dtype"]), ("quantization", _method(record["quantization"]))):
        quantization = getattr(model.config, "quantization_config", None)
        now = _dtype_name(model) if name == "dtype" else _method(quantization)
        if now != was:
            raise BaseModelMismatchError(
                f"The system's stages stand on a base with {name} {was}, and this one has {now}. Load the base as it "
                "was at training."
            )
    # Systems made before these were recorded say nothing of them.
    then = record.get("other_dtypes")
    other = sorted({*then} ^ {*_other_dtypes(model)}) if then is not None else []
    if other:
        raise BaseModelMismatchError(
            f"The base holds other tensors in {record['dtype']} than the one that the system's stages stand on: "
            f"{'; '.join(other[:3])} ({len(other)} in all). Load the base as it was at training."
        )


def _method(quantization: Any) -> str | None:
    if hasattr(quantization, "to_dict"):
        quantization = quantization.to_dict()
    if not quantization:
        return None
    bits = [name for name in ("load_in_8bit", "load_in_4bit") if quantization.get(name)]
    method = quantization.get("quant_method")
    # An enumeration of texts on a loaded model, the text itself in a record.
    return " ".join([str(getattr(method, "value", method)), *bits])


def _dtype_name(model: nn.Module) -> str:
    return str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")


def _other_dtypes(model: nn.Module) -> list[str]:
    """Which of the base's tensors, its head included, are in another precision than its first."""
    first, found = _dtype_name(model), set()
    for _, name, tensor in _base_tensors(model, "", ()):
        # The same of every layer is said once.
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.is_floating_point() and dtype != first:
            found.add(f"{re.sub(r'[0-9]+', '*', name)} in {dtype}")
    return sorted(found)


def _digests(model: nn.Module, layers_path: str, head: Sequence[str], dtypes: Sequence[str]) -> dict[str, Any]:
    """
    Digests of the layers' weight matrices and of all other tensors, rounded to each of the precisions.

    A quantised base keeps no exact weight matrices, and may keep buffers of its own: for it both are `None`, so that
    the base is recognised whether it is quantised or not.
    """
    quantised = getattr(model.config, "quantization_config", None) is not None
    hashers = {part: {d: hashlib.sha256() for d in dtypes} for part in _PARTS}
    for part, name, tensor in _base_tensors(model, layers_path, head):
        for dtype, hasher in hashers[part].items():
            rounded = tensor.detach().to("cpu", getattr(torch, dtype)).contiguous().reshape(-1)
            hasher.update(f"{name}|{tuple(tensor.shape)}|".encode())
            hasher.update(memoryview(rounded.view(torch.uint8).numpy()))
    hexed = {part: {d: h.hexdigest() for d, h in by_dtype.items()} for part, by_dtype in hashers.items()}
    return {**hexed, "layers": None, "buffers": None} if quantised else hexed


def _base_tensors(model: nn.Module, layers_path: str, head: Sequence[str]) -> Iterator[tuple[str, str, torch.Tensor]]:
    left_out = tuple(f"{name}." for name in head)
    for name, parameter in sorted(model.named_parameters()):
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if plain.startswith(left_out) or ".lora_" in name or ".modules_to_save." in name:
            continue
        is_matrix = plain.startswith(f"{layers_path}.") and parameter.dim() > 1
        if is_matrix and not parameter.is_floating_point():
            continue
        yield "layers" if is_matrix else "rest", plain, parameter
    # What a checkpoint holds besides parameters, such as the biases of a router. Others are computed from the config.
    kept = model.state_dict().keys()
    for name, buffer in sorted(model.named_buffers()):
        if name in kept and not name.startswith(left_out):
            yield "buffers", name.replace(".base_layer.", "."), buffer


def load_base(
    record: dict[str, Any],
    *,
    name: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    quantization_config: Any = None,
    head: Sequence[str] = (),
    token: str | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> nn.Module:
    """
    Load the base of a system, by default as it was at training.

    Args:
        record (`dict`): What `describe_base` said.
        name (`str`, *optional*): Id or path to use instead of the recorded one.
        dtype (`str` or `torch.dtype`, *optional*): Precision; the recorded one if not given.
        device_map (*optional*): As in Transformers.
        quantization_config (*optional*): `None` for the recorded quantisation, `False` for none.
        head (sequence of `str`): Modules that must not be quantised.
        token (`str`, *optional*): Token for the Hub; the one of `hf auth login` if not given.
        cache_dir (`str` or `os.PathLike`, *optional*): The Hub's cache; the usual one if not given.

    Raises:
        [`~hf_s3t.errors.BaseModelMismatchError`]: If no id or path of the base is known, or none is found by it.
    """
    name = name or record["id"]
    as_recorded = dtype is None and quantization_config is None
    if not name and record.get("folder"):
        raise BaseModelMismatchError(
            f"This system stands on a base model that was the folder {record['folder']!r} of another machine, so it "
            "cannot be found by name. Give it as `base_model`: the module, its folder here, or its id on the Hub."
        )
    if not name:
        raise BaseModelMismatchError(
            "This system was trained on a model made in memory, so its base cannot be found by name. Give it as "
            "`base_model`: the module, or the folder it was saved to."
        )
    architecture = getattr(transformers, record["architecture"], None)
    if architecture is None:
        raise LayersNotFoundError(
            f"{record['architecture']} is no class of transformers {transformers.__version__}. Load the base yourself "
            "and give the module as `base_model`."
        )
    kwargs: dict[str, Any] = {"dtype": dtype or record["dtype"]}
    if record.get("attn_implementation"):
        kwargs["attn_implementation"] = record["attn_implementation"]
    if device_map is not None:
        kwargs["device_map"] = device_map
    if quantization_config is None and record["quantization"]:
        quantization_config = AutoQuantizationConfig.from_dict(dict(record["quantization"]))
    if quantization_config:
        kwargs["quantization_config"] = rowwise(quantization_config, head)
    if name == record["id"] and record["revision"]:
        kwargs["revision"] = record["revision"]
    kwargs.update(token=token, cache_dir=cache_dir)
    config = _found(name, AutoConfig.from_pretrained, **{k: kwargs.get(k) for k in ("revision", "token", "cache_dir")})
    for setting, value in record.get("config", {}).items():
        # Compared as JSON, as it was recorded; there the keys of a mapping of labels are no numbers.
        if json.loads(json.dumps(config.to_dict().get(setting), default=str)) != value:
            setattr(config, setting, {int(k): v for k, v in value.items()} if setting == "id2label" else value)
    kwargs["config"] = config
    if head:
        # The checkpoint's head may be for other classes. Anything else that does not fit shows in the base's digest.
        kwargs["ignore_mismatched_sizes"] = True
    # The head's parameters are missing in most checkpoints; ours replace them, and the report would mislead.
    try:
        with _quietly():
            model = _found(name, architecture.from_pretrained, **kwargs)
    except RuntimeError as error:
        size = _of_other_size(name, record)
        if not size:
            raise
        raise BaseModelMismatchError(
            f"The base model cannot be loaded as it was at training{size}. {_expected(str(name), record)}"
        ) from error
    if as_recorded and _other_dtypes(model) != record.get("other_dtypes", _other_dtypes(model)):
        transformers.logging.get_logger(__name__).warning_once(
            f"At training the base held some tensors in another precision than {record['dtype']}, and loaded by its "
            "name it does not: answers are rounded otherwise. Give the module, as it was then, as `base_model`."
        )
    return model


def _found(name: str, load: Callable, **kwargs: Any) -> Any:
    try:
        return load(name, **kwargs)
    except OSError as error:
        raise BaseModelMismatchError(
            f"The base model cannot be loaded from {name!r}: {error} Give `token` if it is private, or `base_model`: "
            "the module, its folder here, or another id."
        ) from error


def rowwise(quantization_config: Any, head: Sequence[str] = ()) -> Any:
    """
    An 8-bit config under which a row's answer does not depend on the other rows of its batch.

    With outlier columns on (the default threshold 6.0) it does: a threshold set on purpose is any other value.
    """
    if getattr(quantization_config, "load_in_8bit", False) and quantization_config.llm_int8_threshold == 6.0:
        quantization_config.llm_int8_threshold = 0.0
    if head and hasattr(quantization_config, "llm_int8_skip_modules"):
        skip = quantization_config.llm_int8_skip_modules or []
        quantization_config.llm_int8_skip_modules = sorted({*skip, *head})
    return quantization_config


class _Once(logging.Filter):
    """Lets every message through once."""

    def __init__(self):
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        first = message not in self.seen
        self.seen.add(message)
        return first


def log_casts_once(model: nn.Module) -> None:
    """
    Have bitsandbytes say once, not per layer and call, that it casts the inputs of an 8-bit base; and say once if the
    base answers a row depending on the other rows of its batch.
    """
    settings = getattr(getattr(model, "config", None), "quantization_config", None)
    if getattr(settings, "load_in_8bit", False) and settings.llm_int8_threshold > 0:
        transformers.logging.get_logger(__name__).warning_once(
            f"The base is in 8 bit with llm_int8_threshold={settings.llm_int8_threshold}: a row's answer depends on "
            "the other rows of its batch, ensemble members included. Load it with llm_int8_threshold=0.0."
        )
    casts = logging.getLogger("bitsandbytes.autograd._functions")
    if getattr(model, "is_loaded_in_8bit", False) and not any(isinstance(f, _Once) for f in casts.filters):
        casts.addFilter(_Once())


def keep_4_bit_weights(model: nn.Module) -> None:
    """
    Have bitsandbytes leave the weights of a 4-bit base as they are.

    On CPUs that compute in bfloat16, it packs them when the model first answers: it rounds what they are scaled by,
    which it cannot undo, and passes no gradients through them. A stage trained then would stand on another base than
    one that is trained in a fresh process.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: If the model has answered before, and its weights are packed.
    """
    for name, module in model.named_modules():
        if hasattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu"):
            raise IsolationError(
                f"The 4-bit base has answered before, and bitsandbytes has rounded its weights for this CPU ({name} "
                "and others): it is not what its checkpoint says any more. Load it again, and give it before it is "
                "called."
            )
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


class _quietly:
    """Holds back Transformers' load report."""

    def __enter__(self):
        self.verbosity = transformers.logging.get_verbosity()
        transformers.logging.set_verbosity_error()

    def __exit__(self, *exc):
        transformers.logging.set_verbosity(self.verbosity)
