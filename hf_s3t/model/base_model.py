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
from safetensors import SafetensorError
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoQuantizationConfig

from ..errors import BaseModelMismatchError, IsolationError
from .checkpoint import left_at_random, parts_of, quietly, some_of


_HALVES = ("bfloat16", "float16")
_WIDTHS = (torch.float32, torch.bfloat16, torch.float16)
# What is digested apart, and what it is called.
_PARTS = {
    "layers": "the weights of its layers",
    "rest": "its embeddings, norms or biases",
    "buffers": "its persistent buffers",
    "quantised": "its quantised weights",
}
# Of a config: where it came from, how it was loaded, and what is decided per call.
_NOT_THE_FUNCTION = {
    "_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "quantization_config",
    "use_cache", "architectures", "attn_implementation", "_attn_implementation", "return_dict", "output_hidden_states",
    "output_attentions", "experts_implementation",
}  # fmt: skip
# What users set on a loaded model's config, or what shows in the tensors, and what loading by name restores.
_MAY_BE_SET = {
    "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "num_labels", "problem_type",
    "tie_word_embeddings",
}  # fmt: skip
# By what a base computes, each of its parts its own way: bits depend on it.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")


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
        "module": type(model).__module__,
        "dtype": dtype,
        "main_dtype": _main_dtype(model),
        "other_dtypes": _other_dtypes(model),
        "computed_dtypes": _computed_dtypes(model),
        **{name: _implementation(config, name) for name in _IMPLEMENTATIONS},
        "quantization": _as_dict(quantization),
        "digest": _digests(model, layers_path, head, sorted({dtype, *_dtypes(model), *_HALVES})),
        "num_labels": getattr(config, "num_labels", None) if head else None,
    }


def config_of(model: nn.Module) -> dict[str, Any]:
    """The settings of a base that decide what it computes, as JSON types: its config, less where it came from."""
    return json.loads(json.dumps(_deciding(model.config.to_dict()), default=str))


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    """Of a config's settings and those of its parts the ones that decide what a model computes."""
    kept = {name: value for name, value in settings.items() if name not in _NOT_THE_FUNCTION}
    return {name: _deciding(value) if _is_config(value) else value for name, value in kept.items()}


def _is_config(value: Any) -> bool:
    """Whether a setting is the config of a part, as JSON types."""
    return isinstance(value, dict) and "model_type" in value


def _one_by_one(settings: dict[str, Any], under: str = "") -> dict[str, Any]:
    """Settings that must be the same, those of a config's parts by dotted names."""
    found = {}
    for name, value in _deciding(settings).items():
        if _is_config(value):
            found.update(_one_by_one(value, f"{under}{name}."))
        elif name not in _MAY_BE_SET:
            found[under + name] = value
    return found


def _implementation(config: PreTrainedConfig, name: str) -> Any:
    """By what a model computes its attention or its experts: a name, or where its parts differ, one for each."""
    own = getattr(config, f"_{name}", None)
    parts = {part: _implementation(its, name) for part, its in parts_of(config).items()}
    # A part that is not in use has none.
    return own if all(its in (own, None) for its in parts.values()) else {"": own, **parts}


def generation_of(model: nn.Module) -> dict[str, Any]:
    """What a system records of how its base generates: where a text ends, and what its user has set."""
    settings = getattr(model, "generation_config", None)
    return {} if settings is None else {"generation": json.loads(settings.to_json_string(use_diff=True))}


def name_padding(model: nn.Module, record: dict[str, Any]) -> None:
    """
    Have a base that names no token for padding go by the one at training.

    Decoders that classify look at the last token before the padding: without its name they would look at the padding.
    """
    recorded = record.get("config", {}).get("pad_token_id")
    if recorded is not None and getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = recorded


def check_base_is(
    model: nn.Module,
    record: dict[str, Any],
    layers_path: str,
    head: Sequence[str],
    for_training: bool = False,
    as_recorded: bool = False,
) -> None:
    """
    Check that a model is the recorded base, whatever precision or quantisation it was loaded in.

    Stages that are added must stand on exactly what the others stand on: `for_training` the precision and quantisation
    must be the recorded ones too. Where it was loaded `as_recorded`, and is rounded otherwise nevertheless, that is
    said.

    Raises:
        [`~hf_s3t.errors.BaseModelMismatchError`]: If a tensor differs.
    """
    now, then = _one_by_one(config_of(model)), _one_by_one(record.get("config", {}))
    other = sorted(k for k in {*now, *then} if now.get(k) != then.get(k))
    given = getattr(model.config, "_name_or_path", None)
    if then and other:
        shown = ", ".join(f"{k}={now.get(k)!r} (was {then.get(k)!r})" for k in other[:5])
        raise BaseModelMismatchError(
            f"The base model is configured otherwise than at training: {shown}. Load it with the settings that it "
            f"had. {_which_base(given, record, for_training)}"
        )
    if for_training:
        check_precision(model, record)
    expected = record["digest"]
    recorded = {dtype for part, its in expected.items() if part != "quantised" for dtype in its or ()}
    found = _digests(model, layers_path, head, sorted({_dtype_name(model), record["dtype"], *_HALVES, *recorded}))
    parts = [part for part in _PARTS if found[part] and expected.get(part)]
    # One that agrees is enough: a checkpoint in one half precision that was trained on in the other is the same base.
    # Weights that were quantised in another way say nothing of it.
    differing = [
        part
        for part in parts
        if found[part].keys() & expected[part].keys() and not found[part].items() & expected[part].items()
    ]
    if differing:
        where = " and ".join(_PARTS[part] for part in differing)
        raise BaseModelMismatchError(
            f"The base model is not the one these stages were trained on: {where} differ"
            f"{_of_other_size(given, record)}. {_which_base(given, record, for_training)}"
        )
    if as_recorded and any(set(expected[part].items()) - set(found[part].items()) for part in parts):
        _say_that_it_is_rounded_otherwise(record)


def _which_base(given: str | None, record: dict[str, Any], for_training: bool = False) -> str:
    """Which base was recorded, which was given, and where to give the right one."""
    name, argument = record["id"] or record.get("folder"), "model" if for_training else "base_model"
    if name and given == name:
        return (
            f"It is what {name!r} holds now: that has changed since, or the base was changed in memory before it was "
            f"trained on. Give the base as it was then as `{argument}`."
        )
    revision = f", revision {record['revision']}" if record["revision"] else ""
    got = f", got {given!r}" if given else ""
    return f"Expected {name or 'the model given at training'!r}{revision}{got}; give it as `{argument}`."


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


def _say_that_it_is_rounded_otherwise(record: dict[str, Any]) -> None:
    transformers.logging.get_logger(__name__).warning_once(
        f"At training the base held some tensors in another precision than {record['dtype']}, or had rounded them "
        "before, and loaded by its name it does not: answers are rounded otherwise. Give the module, as it was then, "
        "as `base_model`."
    )


def check_precision(model: nn.Module, record: dict[str, Any]) -> None:
    """
    Check that a model is in the precision and quantisation of the recorded base.

    Raises:
        [`~hf_s3t.errors.BaseModelMismatchError`]: Naming what is otherwise.
    """
    for name, was in (("dtype", record["dtype"]), ("quantization", _method(record["quantization"]))):
        quantization = getattr(model.config, "quantization_config", None)
        now = _dtype_name(model) if name == "dtype" else _method(quantization)
        if now != was:
            raise BaseModelMismatchError(
                f"The system's stages stand on a base with {name} {was}, and this one has {now}. Load the base as it "
                "was at training."
            )
    other = _differently_held(model, record)
    if other:
        raise BaseModelMismatchError(
            f"The base holds other tensors in {record['dtype']} than the one that the system's stages stand on: "
            f"{'; '.join(other[:3])} ({len(other)} in all). Load the base as it was at training."
        )


def _method(quantization: Any) -> str | None:
    quantization = _as_dict(quantization)
    if not quantization:
        return None
    bits = [name for name in ("load_in_8bit", "load_in_4bit") if quantization.get(name)]
    method = quantization.get("quant_method")
    # An enumeration of texts on a loaded model, the text itself in a record.
    return " ".join([str(getattr(method, "value", method)), *bits])


def _dtype_name(model: nn.Module) -> str:
    own = (p for name, p in model.named_parameters() if ".lora_" not in name)
    return str(next(p.dtype for p in own if p.is_floating_point())).removeprefix("torch.")


def _main_dtype(model: nn.Module) -> str:
    """The precision that most of a base is held in."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return str(max(sizes, key=sizes.get)).removeprefix("torch.")


def _dtypes(model: nn.Module) -> set[str]:
    """All precisions that a base's tensors are held in."""
    tensors = (tensor for _, _, tensor in _base_tensors(model, "", ()))
    return {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.dtype in _WIDTHS}


def _differently_held(model: nn.Module, record: dict[str, Any]) -> list[str]:
    """Which tensors are in another precision than at training, then or now."""
    present = {"other_dtypes": _other_dtypes, "computed_dtypes": _computed_dtypes}
    # Systems made before these were recorded say nothing of them.
    return sorted({each for name, of in present.items() if name in record for each in {*record[name]} ^ {*of(model)}})


def _other_dtypes(model: nn.Module) -> list[str]:
    """Which of the base's tensors, its head included, are in another precision than its first."""
    first = _dtype_name(model)
    held = [_held(name, tensor) for _, name, tensor in _base_tensors(model, "", ()) if tensor.is_floating_point()]
    return sorted({text for text in held if not text.endswith(f" in {first}")})


def _computed_dtypes(model: nn.Module) -> list[str]:
    """In which precision the buffers are that no checkpoint holds: casting a model casts them, loading it does not."""
    stored = model.state_dict().keys()
    computed = [(name, buffer) for name, buffer in model.named_buffers() if name not in stored]
    return sorted({_held(name, buffer) for name, buffer in computed if buffer.is_floating_point()})


def _held(name: str, tensor: torch.Tensor) -> str:
    # The same of every layer is said once.
    return f"{re.sub(r'[0-9]+', '*', name)} in {str(tensor.dtype).removeprefix('torch.')}"


def _digests(model: nn.Module, layers_path: str, head: Sequence[str], dtypes: Sequence[str]) -> dict[str, Any]:
    """
    Digests of the layers' weight matrices and of all other tensors, rounded to each of the precisions.

    A quantised base keeps no exact weight matrices, and may keep buffers of its own: for it both are `None`, so that
    the base is recognised whether it is quantised or not. What tensors of a kind of its own (torchao, quanto) consist
    of has a digest by the way in which it was quantised.
    """
    quantised = getattr(model.config, "quantization_config", None)
    way = json.dumps(_as_dict(quantised), sort_keys=True, default=str)
    keys = {part: [way] if part == "quantised" else dtypes for part in _PARTS}
    hashers = {part: {key: hashlib.sha256() for key in keys[part]} for part in _PARTS}
    has_inner = False
    for part, name, tensor in _base_tensors(model, layers_path, head):
        has_inner |= part == "quantised"
        for key, hasher in hashers[part].items():
            dtype = tensor.dtype if part == "quantised" else getattr(torch, key)
            rounded = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
            hasher.update(f"{name}|{tuple(tensor.shape)}|".encode())
            hasher.update(memoryview(rounded.view(torch.uint8).numpy()))
    hexed = {part: {key: h.hexdigest() for key, h in by_key.items()} for part, by_key in hashers.items()}
    hexed = hexed if has_inner else {**hexed, "quantised": None}
    return {**hexed, "layers": None, "buffers": None} if quantised is not None else hexed


def _inner_tensors(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that a tensor of a kind of its own consists of."""
    for part in sorted(tensor.__tensor_flatten__()[0]):
        inner = getattr(tensor, part)
        if is_traceable_wrapper_subclass(inner):
            yield from _inner_tensors(f"{name}.{part}", inner)
        elif inner is not None:
            yield f"{name}.{part}|{inner.dtype}", inner


def _as_dict(quantization: Any) -> Any:
    return quantization.to_dict() if hasattr(quantization, "to_dict") else quantization


def _base_tensors(model: nn.Module, layers_path: str, head: Sequence[str]) -> Iterator[tuple[str, str, torch.Tensor]]:
    left_out = tuple(f"{name}." for name in head)
    for name, parameter in sorted(model.named_parameters()):
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if plain.startswith(left_out) or ".lora_" in name or ".modules_to_save." in name:
            continue
        if is_traceable_wrapper_subclass(parameter):
            yield from (("quantised", *inner) for inner in _inner_tensors(plain, parameter))
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
    architecture = _class_of(record)
    if quantization_config is None and record["quantization"]:
        quantization_config = AutoQuantizationConfig.from_dict(dict(record["quantization"]))
    kwargs: dict[str, Any] = {}
    if name == record["id"] and record["revision"]:
        kwargs["revision"] = record["revision"]
    kwargs.update(token=token, cache_dir=cache_dir)
    config = _found(name, architecture.config_class.from_pretrained, **kwargs)
    _restore(config, record.get("config", {}))
    # Not all have a main one on record.
    kwargs.update(config=config, dtype=dtype or record.get("main_dtype", record["dtype"]))
    if device_map is not None:
        kwargs["device_map"] = device_map
    if quantization_config:
        kwargs["quantization_config"] = rowwise(quantization_config, head)
    implementations = {n: record[n] for n in _IMPLEMENTATIONS if record.get(n)}
    try:
        model, report = _loaded(architecture, name, **kwargs, **implementations)
    except (ImportError, ValueError) as error:
        model, report = _loaded_by_other_means(architecture, name, implementations, error, **kwargs)
    missing = left_at_random(model, report, head)
    if missing:
        raise BaseModelMismatchError(
            f"The base model is not the one these stages were trained on: {name!r} has no parameters for "
            f"{some_of(missing)}, or has them in another size"
            f"{_of_other_size(name, record)}. {_which_base(str(name), record)}"
        )
    if record.get("generation") and getattr(model, "generation_config", None) is not None:
        model.generation_config = GenerationConfig.from_dict(record["generation"])
    if as_recorded:
        _hold_as_recorded(model, record)
        if _differently_held(model, record):
            _say_that_it_is_rounded_otherwise(record)
    return model


def _class_of(record: dict[str, Any]) -> type[PreTrainedModel]:
    """The class of Transformers that a base was of, which decides what is read of its checkpoint."""
    # Code of one's own, or that came with a checkpoint, often calls its classes as Transformers does.
    origin, name = record.get("module", "transformers"), record["architecture"]
    architecture = getattr(transformers, name, None) if origin.partition(".")[0] == "transformers" else None
    if isinstance(architecture, type) and issubclass(architecture, PreTrainedModel):
        return architecture
    if origin.partition(".")[0] == "transformers_modules":
        raise BaseModelMismatchError(
            f"The base was a {name} of the code that came with its checkpoint, which is not run unasked. Load it with "
            "`trust_remote_code=True`, as at training, and give the module as `base_model`."
        )
    raise BaseModelMismatchError(
        f"The base was a {origin}.{name}, which is no class of transformers {transformers.__version__}. Load it with "
        "that class, and give the module as `base_model`."
    )


def _restore(config: PreTrainedConfig, recorded: dict[str, Any]) -> None:
    """Make a config, and those of a composite model's parts, say what was recorded."""
    # Compared as JSON, as it was recorded; there the keys of a mapping of labels are no numbers.
    present = json.loads(json.dumps(config.to_dict(), default=str))
    for setting, value in _deciding(recorded).items():
        part = getattr(config, setting, None)
        if isinstance(part, PreTrainedConfig) and isinstance(value, dict):
            _restore(part, value)
        elif setting != "model_type" and present.get(setting) != value:
            setattr(config, setting, {int(k): v for k, v in value.items()} if setting == "id2label" else value)


def _loaded(architecture: type[PreTrainedModel], name: str, **kwargs: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model, and the report of loading it."""
    # The checkpoint's head may be missing, or for other classes: ours replaces it, and the report would mislead.
    with quietly(bars=False):
        return _found(
            name, architecture.from_pretrained, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )


def _loaded_by_other_means(
    architecture: type[PreTrainedModel], name: str, implementations: dict[str, Any], error: Exception, **kwargs: Any
) -> tuple[nn.Module, dict[str, Any]]:
    """A model that computes by what there is on this machine, where what it was trained with may be missing."""
    try:
        model, report = _loaded(architecture, name, **kwargs)
    except (ImportError, ValueError) as error:
        raise BaseModelMismatchError(
            f"The base model cannot be loaded from {name!r} as it was at training: {error} Mend that, or load it "
            "yourself and give the module as `base_model`."
        ) from error
    for kind, then in implementations.items():
        now = _implementation(model.config, kind)
        if now != then:
            transformers.logging.get_logger(__name__).warning_once(
                f"The base was trained on with {kind}={then!r}, which cannot be had here ({error}), and is loaded "
                f"with {now!r}: answers are rounded otherwise. Install what is missing, or give the module as "
                "`base_model`."
            )
    return model, report


@torch.no_grad()
def _hold_as_recorded(model: nn.Module, record: dict[str, Any]) -> None:
    """
    Cast the tensors that were held in another precision at training than a checkpoint is loaded in: of a model that
    was cast as a whole those that its class keeps in full, and those that were cast by themselves.
    """
    then = [*record.get("other_dtypes", ()), *record.get("computed_dtypes", ())]
    held: dict[str, set[str]] = {}
    for text in then:
        name, _, dtype = text.rpartition(" in ")
        held.setdefault(name, set()).add(dtype)
    stored = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not tensor.is_floating_point() or tensor.is_meta:
            continue
        default = {record["dtype"]} if "other_dtypes" in record and name in stored else set()
        dtypes = held.get(_held(name, tensor).rpartition(" in ")[0], default)
        # Where some layers' are in one and some in another, which ones is not on record.
        wanted = {getattr(torch, dtype) for dtype in dtypes} if len(dtypes) == 1 else {tensor.dtype}
        if tensor.dtype not in wanted:
            tensor.data = tensor.data.to(*wanted)


def _found(name: str, load: Callable, **kwargs: Any) -> Any:
    try:
        return load(name, **kwargs)
    # Also where a file ends too early, or is none of its kind.
    except (OSError, EOFError, SafetensorError) as error:
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
