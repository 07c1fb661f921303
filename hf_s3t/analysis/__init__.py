"""
What to expect of a system before it is trained, and while it serves: deletion rate, retention and depth.

- `rates`: how many deletions a system outlives (Lemma 1): in closed form, exactly, simulated.
- `retention`: how much of a shard is left after some deletions (Lemma 2), and how deep it answers then.
- `growing`: in what order a family of stages is grown, over bit masks.
- `streams`: what a system serves through a stream of requests, and what keeping it up costs; SISA's beside it.
- `frontiers`: the most quality that each method has for its work over such a stream.
- `backbone`: the model that a plan is made for: its layers, and the weights of adapters on them.
- `options`: ways to set up a system and to keep it up, with what to expect of each.
- `purposes`: what a system is to learn, and what follows for its shards and for who answers.
- `planning`: what `hf-s3t plan` recommends of them.
- `speedup`: how much sooner more workers are done with its first training.
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
