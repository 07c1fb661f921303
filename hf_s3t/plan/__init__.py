"""What is trained: from an example to its slice, and from sequences of slices to the tree of stages."""

from .stages import LEAST_STEPS, Plan, StageKey, relative_cost, stage_seed


__all__ = ["LEAST_STEPS", "Plan", "StageKey", "relative_cost", "stage_seed"]
