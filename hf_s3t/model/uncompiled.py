"""Functions that no compiled graph takes in."""

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch


_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")


def uncompiled(function: Callable[_Args, _Result]) -> Callable[_Args, _Result]:
    """`torch.compiler.disable`, which hides the types of what it is put on."""
    disabled: Callable[_Args, _Result] = torch.compiler.disable(function)
    return disabled
