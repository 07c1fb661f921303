"""
What to expect of a system before it is trained, and while it serves: deletion rate, retention and depth.

- `rates`: how many deletions a system outlives (Lemma 1): in closed form, exactly, simulated.
- `growing`: in what order a family is grown, over bit masks, for streams.
- `frontiers`: the most quality that each method has for its work, over its policies.
- `retention`: how much of a shard is left after some deletions (Lemma 2), and how deep it answers then.
- `backbone`: the model that a plan is made for: its layers, and the weights of adapters on them.
- `streams`: what a system serves through a stream of requests, and what keeping it up costs; SISA's beside it.
- `planning`: what `hf-s3t plan` computes: shards, slices, sequences and epochs, what they cost, how long they last.
- `plan_figure`: the picture of such a plan.
- `pictures`: what all pictures have in common; the recipes draw by it too.
"""

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
