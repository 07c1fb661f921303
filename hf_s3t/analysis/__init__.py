"""What to expect of a system before it is trained, and while it serves: deletion rate, retention and depth."""

from .rates import deletion_rate, deletion_rate_paper, expected_deletions_left, simulate_deletions
from .retention import expected_depth, retention, retention_paper, retention_random, simulate_depths


__all__ = [
    "deletion_rate",
    "deletion_rate_paper",
    "expected_deletions_left",
    "expected_depth",
    "retention",
    "retention_paper",
    "retention_random",
    "simulate_deletions",
    "simulate_depths",
]
