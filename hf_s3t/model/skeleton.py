"""A base as modules without weights, for putting stages together where another process answers."""

from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import BaseModelMismatchError, S3TError
from .base_loading import class_of
from .checkpoint import quietly
from .randomness import preserved_randomness


def skeleton_of_base(record: dict[str, Any]) -> PreTrainedModel:
    """
    The modules of a system's base, made from the settings that the system recorded: no file of the base is read.

    Every tensor has the shape of the base's and one number for all of its places, so that a base of any size takes a
    few megabytes. It is there for PEFT to find modules in, by their names and kinds; a call of it is refused.

    Args:
        record (`dict`): What a system's config says of its base.

    Returns:
        [`~transformers.PreTrainedModel`]: The modules, on the CPU, in the recorded precision.

    Raises:
        [`~hf_s3t.errors.BaseModelMismatchError`]: If its class is not one of Transformers, or the system did not
            record its settings.
    """
    architecture = class_of(record)
    settings = record.get("config")
    if not settings or architecture.config_class is None:
        raise BaseModelMismatchError(
            "The system did not record the settings of its base, so that its modules cannot be made without its "
            "files: an earlier hf_s3t trained it. Export with `S3TModel.export_adapter`, which loads the base."
        )
    config = architecture.config_class.from_dict(dict(settings))
    with preserved_randomness(), quietly():
        model = _made_without_values(architecture, config, getattr(torch, record.get("main_dtype", record["dtype"])))
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(_one_number(parameter), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = _one_number(buffer)
    model.register_forward_pre_hook(_refuse_calls)
    model.eval()
    return model


def _made_without_values(
    architecture: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = architecture(config)
    finally:
        torch.set_default_dtype(before)
    return model


def _one_number(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of that shape on the CPU that takes the memory of one number."""
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _refuse_calls(module: nn.Module, inputs: Any) -> NoReturn:
    raise S3TError(
        "This process holds the base's modules without their weights, and does not answer: the engine does. Load the "
        "system with `S3TModel.from_pretrained` to have it answer here."
    )
