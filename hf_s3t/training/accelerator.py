"""The settings of an accelerator that decide how it trains, and whether they are still the same."""

from typing import Any

from accelerate import Accelerator

from ..errors import S3TError
from .circumstances import differing


def accelerator_settings(accelerator: Accelerator) -> dict[str, Any]:
    """What an accelerator says of how it trains, whether arguments, a config file or the environment told it."""
    dynamo, state = accelerator.state.dynamo_plugin, accelerator.gradient_state
    feeding = accelerator.dataloader_config
    return {
        "mixed_precision": accelerator.mixed_precision,
        "dynamo": {name: str(value) for name, value in dynamo.to_dict().items()} if compiles(accelerator) else None,
        "split_batches": feeding.split_batches,
        "dispatch_batches": feeding.dispatch_batches,
        "even_batches": feeding.even_batches,
        "use_seedable_sampler": feeding.use_seedable_sampler,
        "gradient_accumulation": dict(state.plugin_kwargs),
        "step_scheduler_with_optimizer": accelerator.step_scheduler_with_optimizer,
        "autocast": str(accelerator.autocast_handler) if accelerator.autocast_handler is not None else None,
    }


def compiles(accelerator: Accelerator) -> bool:
    """Whether an accelerator compiles the models that it prepares."""
    return bool(accelerator.state.dynamo_plugin.backend.value != "NO")


def refuse_changed_accelerator(accelerator: Accelerator, settings: dict[str, Any]) -> None:
    """
    Refuse an accelerator that is set otherwise than it was: all accelerators of a process share one state, which the
    next trainer or its arguments may have replaced.

    Args:
        accelerator ([`~accelerate.Accelerator`]): The trainer's.
        settings (`dict`): What [`accelerator_settings`] said when the trainer was made.

    Raises:
        [`~hf_s3t.errors.S3TError`]: Naming the settings.
    """
    try:
        now = accelerator_settings(accelerator)
    except AttributeError:
        # The state that all accelerators share was reset, and nobody has set it up again.
        now = None
    if now != settings:
        what = "" if now is None else f" ({', '.join(differing(settings, now))})"
        raise S3TError(
            f"Other training arguments or another trainer of this process set Accelerate up anew{what} since "
            "this trainer was made, for all of them: a stage would be trained otherwise than its record says. "
            "Make this trainer again, with its arguments, after the others."
        )
