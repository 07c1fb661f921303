"""
Which orders of its slices a shard trains: the selection rules of the paper, and the search for better ones.

- `rules`: the selection rules, one function each, and measures of what they chose.
- `optimal`: the search behind `sequence_selection="optimal"`, by the depth that a shard really serves.
- `families`: the stages of sequences without idle ones, the lattice, and the search for the best family for some work.
"""

from .rules import check_sequences, mean_edit_distance, score, select_sequences


__all__ = ["check_sequences", "mean_edit_distance", "score", "select_sequences"]
