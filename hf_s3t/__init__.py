"""
Exact unlearning for fine-tuned Hugging Face models.

Importing this package costs next to nothing: a name brings its module, and what that module needs, when it is first
used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any


__version__ = "0.1.0"

_MODULE_OF = {
    "S3TConfig": "config",
    "S3TError": "errors",
    "S3TModel": "model.modeling",
    "S3TSFTTrainer": "training.sft_trainer",
    "S3TTrainer": "training.trainer",
    "UnlearningReport": "records.report",
}
_SUBMODULES = ("analysis", "baselines", "errors", "metrics", "plan", "sequences")

__all__ = [
    "S3TConfig",
    "S3TError",
    "S3TModel",
    "S3TSFTTrainer",
    "S3TTrainer",
    "UnlearningReport",
    "__version__",
]

if TYPE_CHECKING:
    from .config import S3TConfig
    from .errors import S3TError
    from .model.modeling import S3TModel
    from .records.report import UnlearningReport
    from .training.sft_trainer import S3TSFTTrainer
    from .training.trainer import S3TTrainer


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        value = getattr(import_module(f".{_MODULE_OF[name]}", __name__), name)
    elif name in _SUBMODULES:
        value = import_module(f".{name}", __name__)
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
