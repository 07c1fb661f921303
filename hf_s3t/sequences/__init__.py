"""Which orders of its slices a shard trains: the selection rules of the paper, and the search for better ones."""

from .rules import check_sequences, mean_edit_distance, score, select_sequences


__all__ = ["check_sequences", "mean_edit_distance", "score", "select_sequences"]
