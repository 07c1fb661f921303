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
    "S3TDPOTrainer": "training.dpo_trainer",
    "S3TError": "errors",
    "S3TKTOTrainer": "training.kto_trainer",
    "S3TModel": "model.modeling",
    "S3TRewardTrainer": "training.reward_trainer",
    "S3TSFTTrainer": "training.sft_trainer",
    "S3TTrainer": "training.trainer",
    "S3TTrainerMixin": "training.trainer",
    "UnlearningReport": "records.report",
}
_SUBMODULES = ("analysis", "baselines", "errors", "metrics", "plan", "sequences")

__all__ = [
    "S3TConfig",
    "S3TDPOTrainer",
    "S3TError",
    "S3TKTOTrainer",
    "S3TModel",
    "S3TRewardTrainer",
    "S3TSFTTrainer",
    "S3TTrainer",
    "S3TTrainerMixin",
    "UnlearningReport",
    "__version__",
]

if TYPE_CHECKING:
    from .config import S3TConfig
    from .errors import S3TError
    from .model.modeling import S3TModel
    from .records.report import UnlearningReport
    from .training.dpo_trainer import S3TDPOTrainer
    from .training.kto_trainer import S3TKTOTrainer
    from .training.reward_trainer import S3TRewardTrainer
    from .training.sft_trainer import S3TSFTTrainer
    from .training.trainer import S3TTrainer, S3TTrainerMixin


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
