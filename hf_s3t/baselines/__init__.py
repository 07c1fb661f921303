"""
S3T and the methods that it is compared with, under one interface.

- `methods`: the methods: train, serve, delete, train again, and what that cost.
- `whole_adapter`: systems whose units train one adapter on all layers: SISA, sequential training, full fine-tuning.
- `prototypes`: class prototypes on the base's features, which ProtoSISA answers with besides.
- `cost`: what training has cost so far, in a file that outlives the process.
"""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .methods import METHODS, S3T, SISA, Deletion, Full, Method, ProtoSISA, Sequential, use_public_secret

__all__ = ["METHODS", "S3T", "SISA", "Deletion", "Full", "Method", "ProtoSISA", "Sequential", "use_public_secret"]


def __getattr__(name: str) -> Any:
    # The other modules of this room are asked for without the trainers that the methods bring.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import methods

    return getattr(methods, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
