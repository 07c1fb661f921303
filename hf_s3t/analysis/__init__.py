"""What to expect of a system before it is trained, and while it serves: deletion rate and retention."""

from .deletion import deletion_rate, expected_deletions_left, simulate_deletions
from .retention import retention, retention_paper, retention_random


__all__ = [
    "deletion_rate",
    "expected_deletions_left",
    "retention",
    "retention_paper",
    "retention_random",
    "simulate_deletions",
]
