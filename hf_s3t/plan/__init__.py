"""
What is trained: from an example to its slice, and from sets of slices to the tree of stages.

- `partition`: from an example's id or group, the seed and a secret to its shard, its slice and its rank there.
- `later_rows`: where rows go that come after the first partition.
- `stages`: the tree of stages that a system shall have; what a deletion removes from it, and which stack serves.
- `growth`: what is missing of it, on which stages it can stand, and in which order it is worth growing.
- `schedule`: which of it is trained next where many train at once.
"""

from .growth import Growth, Step
from .stages import LEAST_STEPS, Plan, StageKey, relative_cost, stage_seed


__all__ = ["LEAST_STEPS", "Growth", "Plan", "StageKey", "Step", "relative_cost", "stage_seed"]
