"""
What is trained: from an example to its slice, and from sequences of slices to the tree of stages.

- `partition`: from an example's id or group, the seed and a secret to its shard, its slice and its rank there.
- `stages`: the prefix tree of a system's sequences; what a deletion removes from it, and which stack serves.
"""

from .stages import LEAST_STEPS, Plan, StageKey, relative_cost, stage_seed


__all__ = ["LEAST_STEPS", "Plan", "StageKey", "relative_cost", "stage_seed"]
