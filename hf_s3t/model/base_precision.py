"""In which precision the tensors of a base model are held: read, compared with the recorded one, restored."""

import re
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import BaseModelMismatchError
from .base_tensors import tensors_of_base
from .quantisation import settings_as_dict


logger = logging.get_logger(__name__)


HALVES = ("bfloat16", "float16")
_WIDTHS = (torch.float32, torch.bfloat16, torch.float16)


def check_precision(model: PreTrainedModel, record: dict[str, Any]) -> None:
    """
    Check that a model is in the precision and quantisation of the recorded base.

    Raises:
        [`~hf_s3t.errors.BaseModelMismatchError`]: Naming what is otherwise.
    """
    for name, was in (("dtype", record["dtype"]), ("quantization", _method_and_bits(record["quantization"]))):
        quantization = getattr(model.config, "quantization_config", None)
        now = first_dtype(model) if name == "dtype" else _method_and_bits(quantization)
        if now != was:
            raise BaseModelMismatchError(
                f"The system's stages stand on a base with {name} {was}, and this one has {now}. Load the base as it "
                "was at training."
            )
    other = held_differently(model, record)
    if other:
        raise BaseModelMismatchError(
            f"The base holds other tensors in {record['dtype']} than the one that the system's stages stand on: "
            f"{'; '.join(other[:3])} ({len(other)} in all). Load the base as it was at training."
        )


def _method_and_bits(quantization: Any) -> str | None:
    quantization = settings_as_dict(quantization)
    if not quantization:
        return None
    bits = [name for name in ("load_in_8bit", "load_in_4bit") if quantization.get(name)]
    method = quantization.get("quant_method")
    # An enumeration of texts on a loaded model, the text itself in a record.
    return " ".join([str(getattr(method, "value", method)), *bits])


def first_dtype(model: PreTrainedModel) -> str:
    """The precision of a base's first parameter, as a record names it."""
    own = (p for name, p in model.named_parameters() if ".lora_" not in name)
    return str(next(p.dtype for p in own if p.is_floating_point())).removeprefix("torch.")


def main_dtype(model: PreTrainedModel) -> str:
    """The precision that most of a base is held in."""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")


def dtypes_held(model: PreTrainedModel) -> set[str]:
    """All precisions that a base's tensors are held in."""
    tensors = (tensor for _, _, tensor in tensors_of_base(model, "", ()))
    return {str(tensor.dtype).removeprefix("torch.") for tensor in tensors if tensor.dtype in _WIDTHS}


def held_differently(model: PreTrainedModel, record: dict[str, Any]) -> list[str]:
    """Which tensors are in another precision than at training, then or now."""
    present = {"other_dtypes": other_dtypes, "computed_dtypes": computed_dtypes}
    # Systems made before these were recorded say nothing of them.
    return sorted({each for name, of in present.items() if name in record for each in {*record[name]} ^ {*of(model)}})


def other_dtypes(model: PreTrainedModel) -> list[str]:
    """Which of the base's tensors, its head included, are in another precision than its first."""
    first = first_dtype(model)
    held = [
        _place_and_dtype(name, tensor)
        for _, name, tensor in tensors_of_base(model, "", ())
        if tensor.is_floating_point()
    ]
    return sorted({text for text in held if not text.endswith(f" in {first}")})


def computed_dtypes(model: PreTrainedModel) -> list[str]:
    """In which precision the buffers are that no checkpoint holds: casting a model casts them, loading it does not."""
    stored = model.state_dict().keys()
    computed = [(name, buffer) for name, buffer in model.named_buffers() if name not in stored]
    return sorted({_place_and_dtype(name, buffer) for name, buffer in computed if buffer.is_floating_point()})


def _place_and_dtype(name: str, tensor: torch.Tensor) -> str:
    # The same of every layer is said once.
    return f"{re.sub(r'[0-9]+', '*', name)} in {str(tensor.dtype).removeprefix('torch.')}"


@torch.no_grad()
def hold_as_recorded(model: PreTrainedModel, record: dict[str, Any]) -> None:
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
        dtypes = held.get(_place_and_dtype(name, tensor).rpartition(" in ")[0], default)
        # Where some layers' are in one and some in another, which ones is not on record.
        wanted: torch.dtype = getattr(torch, *dtypes) if len(dtypes) == 1 else tensor.dtype
        if tensor.dtype != wanted:
            tensor.data = tensor.data.to(wanted)


def warn_of_other_rounding(record: dict[str, Any]) -> None:
    """Say once that a base, loaded by its name, is rounded otherwise than at training."""
    logger.warning_once(
        f"At training the base held some tensors in another precision than {record['dtype']}, or had rounded them "
        "before, and loaded by its name it does not: answers are rounded otherwise. Give the module, as it was then, "
        "as `base_model`."
    )
