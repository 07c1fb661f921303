"""The tensors of a base model, in one order, and digests of them by which it is recognised."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TraceableWrapperSubclass, is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from .quantisation import settings_as_dict


# The parts of a base that have digests of their own, and what messages call them.
PARTS = {
    "layers": "the weights of its layers",
    "rest": "its embeddings, norms or biases",
    "buffers": "its persistent buffers",
    "quantised": "its quantised weights",
}


def digests_of_base(
    model: PreTrainedModel, layers_path: str, head: Sequence[str], dtypes: Sequence[str]
) -> dict[str, Any]:
    """
    Digests of the layers' weight matrices and of all other tensors, rounded to each of the precisions.

    A quantised base keeps no exact weight matrices, and may keep buffers of its own: for it both are `None`, so that
    the base is recognised whether it is quantised or not. What tensors of a kind of its own (torchao, quanto) consist
    of has a digest by the way in which it was quantised.
    """
    quantised = getattr(model.config, "quantization_config", None)
    way = json.dumps(settings_as_dict(quantised), sort_keys=True, default=str)
    keys = {part: [way] if part == "quantised" else dtypes for part in PARTS}
    hashers = {part: {key: hashlib.sha256() for key in keys[part]} for part in PARTS}
    has_inner = False
    for part, name, tensor in tensors_of_base(model, layers_path, head):
        has_inner |= part == "quantised"
        for key, hasher in hashers[part].items():
            dtype = tensor.dtype if part == "quantised" else getattr(torch, key)
            rounded = tensor.detach().to("cpu", dtype).contiguous().reshape(-1)
            hasher.update(f"{name}|{tuple(tensor.shape)}|".encode())
            hasher.update(rounded.view(torch.uint8).numpy().data)
    hexed: dict[str, Any] = {
        part: {key: h.hexdigest() for key, h in by_key.items()} for part, by_key in hashers.items()
    }
    hexed = hexed if has_inner else {**hexed, "quantised": None}
    return {**hexed, "layers": None, "buffers": None} if quantised is not None else hexed


def _plain_tensors(name: str, tensor: TraceableWrapperSubclass) -> Iterator[tuple[str, torch.Tensor]]:
    """The plain tensors that a tensor of a kind of its own consists of."""
    for part in sorted(tensor.__tensor_flatten__()[0]):
        inner = getattr(tensor, part)
        if is_traceable_wrapper_subclass(inner):
            yield from _plain_tensors(f"{name}.{part}", inner)
        elif inner is not None:
            yield f"{name}.{part}|{inner.dtype}", inner


def tensors_of_base(
    model: PreTrainedModel, layers_path: str, head: Sequence[str]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Part (see `PARTS`), name and value of each tensor of the bare base, adapters and heads of stages left out."""
    left_out = tuple(f"{name}." for name in head)
    for name, parameter in sorted(model.named_parameters()):
        plain = name.replace(".base_layer.", ".").replace(".original_module.", ".")
        if plain.startswith(left_out) or ".lora_" in name or ".modules_to_save." in name:
            continue
        if is_traceable_wrapper_subclass(parameter):
            yield from (("quantised", *inner) for inner in _plain_tensors(plain, parameter))
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
