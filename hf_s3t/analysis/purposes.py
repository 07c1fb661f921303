"""What a system is to learn, and what follows for its shards and for how they answer together."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Purpose:
    """
    What was measured to serve a purpose; see the layouts in docs/gates.md.

    Args:
        max_shards (`int`): Shards at most, unless something else is said.
        gate (mapping): The settings of `S3TConfig` by which members are weighed.
        answered_by (`str`): Who answers, in words.
    """

    max_shards: int
    gate: Mapping[str, Any] = field(default_factory=dict)
    answered_by: str = "the mean of all shards"


_TERMS = {"gate": "terms", "gate_top_k": 1}
_KNOWING = "the shard that was taught it; of what none was, the mean of all"
# Where nobody said what is learnt.
UNSAID = Purpose(5)
# What is learnt -> what follows.
PURPOSES: Mapping[str, Purpose] = {
    # Whoever asks about nobody is not expected: as it was measured.
    "facts": Purpose(20, {**_TERMS, "gate_temperature": 1.0}, answered_by=_KNOWING),
    "skills": UNSAID,
    "both": Purpose(5, _TERMS, answered_by=_KNOWING),
}
