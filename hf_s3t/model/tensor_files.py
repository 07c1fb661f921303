"""Tensors from the bytes of files, and whether two sets of tensors are the same to the bit."""

import hashlib
import json
from collections.abc import Mapping

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from ..errors import FolderError
from ..folder.files import REGROW


def read_tensors(data: bytes, source: str) -> dict[str, torch.Tensor]:
    """
    The tensors in the bytes of a safetensors file. Nothing is mapped: they do not follow what becomes of the file.

    Args:
        data (`bytes`): The bytes.
        source (`str`): What they are of, for the error.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If they are no safetensors file.
    """
    try:
        return load(data)
    except SafetensorError as error:
        raise FolderError(f"{source} is no safetensors file: {error}. {REGROW}") from error


def metadata_of(data: bytes) -> dict[str, str]:
    """What the header of a safetensors file says besides its tensors, which `safetensors` reads of files alone."""
    size = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return metadata


def differing_tensors(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that are not the same to the bit, dtype and shape included, wherever they lie."""
    return [
        name
        for name in sorted({*one, *other})
        if name not in one or name not in other or not _same_bits(one[name], other[name])
    ]


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.dtype != other.dtype or one.shape != other.shape or one.is_meta or other.is_meta:
        return False
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    # A scalar has no last dimension to divide into bytes.
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors of any shape: names, dtypes, shapes and bits."""
    hasher = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        hasher.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        hasher.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return hasher.hexdigest()
