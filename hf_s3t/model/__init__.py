"""The model that serves a system: its base, its stacks of adapters, answers and deletions."""
