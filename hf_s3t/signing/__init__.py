"""
What signs receipts and checks them, with nothing else at hand: no folder, no model, no network.

- `strict_json`: JSON that says one thing only, or is refused.
- `dsse`: the envelope, and what exactly a signature signs.
- `keys`: Ed25519 keys: made, read, used to sign and to check; which key this process signs with.
- `stages_digest`: the digest of a system, over its stages.
- `fields`: the checks of single fields of a statement.
- `person`: an id named by a salted commitment, which only who has the salt can recognise.
- `statement`: what a receipt says, as an in-toto Statement.
- `issuing`: signing it.
- `audit_statement`: what somebody signs who has trained stages again.
- `verification`: whether a receipt says what was signed, whose it is, and whether another goes on from it.
"""
