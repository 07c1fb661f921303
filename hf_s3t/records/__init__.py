"""
What a system knows of its examples and deletions, in memory: no disk is touched here.

- `contents`: what rows say, as bytes to be digested.
- `digests`: the secret of a system, and the keyed digests of ids, groups and contents that are made with it.
- `arrow_kinds`: kinds of Arrow columns that several types stand for.
- `buffers`: Arrow arrays from numpy arrays and texts, and back.
- `columns`: the columns of a table of examples.
- `examples`: the table of examples: which id lies in which slice, and what pins each slice to its content.
- `terms`: which terms the prompts of rows hold, and how many rows of each shard hold them.
- `earlier`: what format 1 wrote of a system's examples.
- `validity`: the one rule by which a stage is valid.
- `ledger`: the append-only lines of deletions and additions, each with the hash of the line before.
- `digest_log`: what lines deleted, and which of it came back by an explicit word.
- `ledger_line`: what one line of it says, in both versions of the format.
- `ledger_chain`: what ledgers that go on from each other share: lines, read and hashed once.
- `stage_history`: which stages stayed at each line, from what the lines say of changes.
- `statements`: what is signed of a line.
- `request`: what somebody asked to have forgotten, and what it was found to mean.
- `naming`: which examples ids and groups mean that somebody names.
- `report`: `UnlearningReport`, what a deletion did.
"""
