"""
What every refusal has to be: an error of a kind that Python knows, which says what was got, what was expected and
what to do; and nothing has changed.
"""

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from hf_s3t.errors import (
    BaseModelMismatchError,
    ConfigError,
    ContentChangedError,
    EmptySliceError,
    ExampleIdError,
    ExhaustedError,
    FolderError,
    FormatVersionError,
    IsolationError,
    KeyMissingError,
    LayersNotFoundError,
    S3TError,
    UnknownExampleError,
)
from support.tiny import (
    make_trainer,
    tiny_llama,
    training_arguments,
)


# What each error is for those who never heard of hf_s3t.
DOUBLES_AS = {
    BaseModelMismatchError: ValueError,
    ConfigError: ValueError,
    ContentChangedError: ValueError,
    EmptySliceError: ValueError,
    ExampleIdError: ValueError,
    ExhaustedError: RuntimeError,
    FolderError: OSError,
    FormatVersionError: FolderError,
    IsolationError: ValueError,
    KeyMissingError: FolderError,
    LayersNotFoundError: ValueError,
    UnknownExampleError: KeyError,
}


class Refusal:
    """An error, what its message says (patterns: what was got, what was expected, what to do), and what is given."""

    def __init__(self, error: type[S3TError], name: str, got: str, expected: str, remedy: str, **given):
        self.error, self.name, self.parts, self.given = error, name, (got, expected, remedy), given

    def check(self, caught) -> None:
        assert type(caught.value) is self.error
        assert isinstance(caught.value, DOUBLES_AS[self.error]) and isinstance(caught.value, S3TError)
        message = str(caught.value)
        for part in self.parts:
            assert re.search(part, message), f"{part!r} is not in: {message}"
        assert message.endswith((".", '"')) and "\n" not in message


def cases(*refusals: Refusal):
    return pytest.mark.parametrize("case", refusals, ids=lambda refusal: refusal.name)


def digest_of(model: nn.Module) -> str:
    """Of everything a refused call might change in a base model: tensors, modules, hooks, flags."""
    hasher = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        hasher.update(f"{name} {type(module).__name__} {hooks} {module.training} {sorted(vars(module))}".encode())
    return hasher.hexdigest()


def files_of(path: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file below a folder but the lock's."""
    return {
        str(file.relative_to(path)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


def assert_trainer_refuses(case: Refusal, output_dir: Path, given: dict[str, Any]) -> None:
    """The refusal is what the case says; the folder was not made and the model is as it was."""
    given = dict(given)
    given.setdefault("model", tiny_llama(layers=2))
    changes = given.pop("arguments", {})
    args = given.pop("args", None) or training_arguments(output_dir, **changes)
    before = digest_of(given["model"]) if isinstance(given["model"], nn.Module) else None
    with pytest.raises(S3TError) as caught:
        make_trainer(output_dir, args=args, **given)
    case.check(caught)
    assert not output_dir.exists()
    if before is not None:
        assert digest_of(given["model"]) == before


TARGETS = ["q_proj", "v_proj"]
with_lora = partial(LoraConfig, r=2, target_modules=TARGETS)


CARRIES = ("carries adapters", "whose data nobody could unlearn", "Give the plain base model")


def inactive_adapters():
    model = tiny_llama(layers=2)
    model.add_adapter(with_lora(), "old")
    model.disable_adapters()
    return model
