"""
What is done to a folder without a model: deletions, receipts, inspection, purge.

- `deletion`: what a deletion would do, and doing it.
- `pending`: deletions that are recorded now and applied together later.
- `erasures`: requests to erase that a server takes, and what became of each.
- `written_ids`: ids and groups as somebody wrote them, in the type that the system's have.
- `receipts`: what a line of the ledger proves, in words and for machines.
- `signed_receipts`: receipts for who does not have the folder.
- `reports`: what a ledger says of a request or a period, for the file, as a page or as Markdown.
- `audits`: what a third party needs to train stages again, and their signed result taken back.
- `audit_pack`: what goes into a pack for them as it is.
- `inspection`: what is wrong with a folder, and what the next load would remove: `hf-s3t check`.
- `inspected_records`: its look at config, secret, ledger and table.
- `inspected_gate`: its look at the gate.
- `inspected_stages`: its look at stages and checkpoints.
- `inspected_signatures`: its look at what was signed of the ledger.
- `findings`: what all of these find, gathered as sentences.
- `purge`: what a run leaves behind that no deletion reaches, and removing it.
"""
