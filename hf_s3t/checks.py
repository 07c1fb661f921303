"""Checks of single settings, each with its refusal: what was given, what was expected, and what to do."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from .errors import ConfigError, counted


GATES = ("terms",)
# Far beyond what anybody plans; a config from elsewhere must not fill the memory before it is refused.
_LARGEST_HORIZON = 10**9


def check_gate(gate: Any, top_k: Any, temperature: Any, num_shards: int) -> float:
    """
    Check what says how members are weighed.

    Args:
        gate (`str`, *optional*): As in [`~hf_s3t.S3TConfig`].
        top_k (`int`, *optional*): As in [`~hf_s3t.S3TConfig`].
        temperature (`float`): As in [`~hf_s3t.S3TConfig`].
        num_shards (`int`): The shards of the system.

    Returns:
        `float`: The temperature.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If one is out of range, or contradicts another.
    """
    if gate is not None:
        require_choice("gate", gate, GATES)
    if top_k is not None:
        require_int("gate_top_k", top_k, 1)
        if gate is None:
            raise ConfigError(
                f"gate_top_k={top_k} without a gate, whose weights name the members that answer. Give "
                'gate="terms", or leave out `gate_top_k`.'
            )
        if top_k > num_shards:
            raise ConfigError(
                f"gate_top_k={top_k} is more than num_shards={num_shards}: each shard has one weight. Lower it, or "
                "leave it out for all."
            )
    return require_positive("gate_temperature", temperature)


def check_prior(prior: Sequence[float], num_slices: int) -> None:
    """
    Check a deletion prior over the slices of one shard.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it has not `num_slices` probabilities that sum to one.
    """
    if len(prior) != num_slices:
        raise ConfigError(
            f"`deletion_prior` has {counted(len(prior), 'value')}, expected num_slices={num_slices}. Give one "
            "probability per slice."
        )
    numeric = all(isinstance(p, (int, float)) and not isinstance(p, bool) for p in prior)
    # Compared with a bound, because an integer may be too large for a float; and NaN is within none.
    if not numeric or not all(0 <= p <= sys.float_info.max for p in prior):
        raise ConfigError(f"`deletion_prior` must hold non-negative probabilities, got {prior!r}.")
    total = sum(map(float, prior))
    if abs(total - 1) > 1e-6:
        raise ConfigError(f"`deletion_prior` sums to {total:g}, expected 1. Divide each entry by the sum.")


def require_positive(name: str, value: Any) -> float:
    """A setting as a number above zero, or a [`~hf_s3t.errors.ConfigError`] if it is none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # Compared with a bound, because an integer may be too large for a float; and NaN is within none.
    if not is_number or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"`{name}` must be a number above 0, got {value!r}.")
    return float(value)


def require_int(name: str, value: Any, minimum: int | None) -> None:
    """Raise [`~hf_s3t.errors.ConfigError`] if a setting is no integer, or below its minimum."""
    if isinstance(value, bool) or not isinstance(value, int) or (minimum is not None and value < minimum):
        bound = "" if minimum is None else f" of at least {minimum}"
        raise ConfigError(f"`{name}` must be an integer{bound}, got {value!r}.")


def require_chain(name: str, work: float, num_slices: int, replay: float) -> None:
    """Raise [`~hf_s3t.errors.ConfigError`] if so much work does not pay for one chain of stages to full depth."""
    # A stage at depth i costs (i / L) (L + i) / 2L where it sees all earlier slices, else the share that it sees.
    seen = [1 + replay * below for below in range(num_slices)]
    chain = math.fsum(share * (num_slices + i) for i, share in enumerate(seen, start=1)) / (2 * num_slices**2)
    # The sum of the same floats in another order pays still.
    if work < chain - 1e-9:
        lower = ", or lower `replay`" if replay > 0 and num_slices > 1 else ""
        raise ConfigError(
            f"{name}={work:g}, but one chain of stages with num_slices={num_slices} costs "
            f"{math.ceil(chain * 1e4) / 1e4:g} at replay={replay:g}. Give at least so much{lower}."
        )


def require_share(name: str, value: Any) -> None:
    """Raise [`~hf_s3t.errors.ConfigError`] if a setting is no number from 0 to 1."""
    # NaN is within no bounds.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise ConfigError(f"`{name}` must be a number from 0 to 1, got {value!r}.")


def require_bool(name: str, value: Any) -> None:
    """Raise [`~hf_s3t.errors.ConfigError`] if a switch is neither on nor off."""
    # Taken for a truth, a text such as "no" would be one.
    if not isinstance(value, bool):
        raise ConfigError(f"`{name}` must be True or False, got {value!r}.")


def require_name(name: str, value: Any) -> None:
    """Raise [`~hf_s3t.errors.ConfigError`] if what names a column can name none."""
    if value is not None and not (isinstance(value, str) and value):
        raise ConfigError(f"`{name}` must be the name of a column, got {value!r}. Leave it out if there is none.")


def require_horizon(name: str, value: Any) -> None:
    """Raise [`~hf_s3t.errors.ConfigError`] if a number of deletions to look ahead is none, or beyond all use."""
    require_int(name, value, 0)
    if value > _LARGEST_HORIZON:
        raise ConfigError(f"`{name}` must be at most {_LARGEST_HORIZON}. Lower it.")


def require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise [`~hf_s3t.errors.ConfigError`] if a setting is none of its choices."""
    if value not in choices:
        raise ConfigError(f"`{name}` must be one of {', '.join(choices)}, got {value!r}.")
