"""
A system on the Hub: pushed, served from there, erased.

- `repository`: `HubRepo`, the repository of a system, and what one of its commits holds.
- `pushing`: brings a system there, in one commit on top of what is there.
- `folder`: a system that is served from there: files come from the cache, deletions from a folder of this machine.
- `merged_gate`: the words of rows that came by a merge come to the gate.
- `memory`: where this machine remembers a repository's deletions, whatever revision is loaded.
- `erasure`: erases what a deletion removed, from older commits too.
- `large_files`: what must lie in the large-file storage, out of which it can be erased.
- `git_attributes`: what `.gitattributes` say of a path, read as git reads them.
- `card`: the cards of systems, configurations and runs.
- `diagram`: the picture of a system's stacks in its card.
- `client`: calls of the Hub's client: repeated where they may be, their errors told as sentences.
"""
