"""Whether modules train or evaluate: put aside for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """
    Leave every module in the mode in which it was.

    Args:
        model (`nn.Module`): The model.
    """
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
