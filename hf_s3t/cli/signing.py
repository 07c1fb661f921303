"""The command that signs lines of a ledger, and the writing of signed receipts."""

import os
from pathlib import Path

import typer

from ..errors import ConfigError, counted
from ..folder.opening import open_folder
from ..folder.signed_ledger import sign_unsigned
from ..operations.signed_receipts import signed_receipt
from ..signing.keys import required_signer, signing_with
from . import rendering
from .arguments import Folder, SigningKey


def sign(folder: Folder, signing_key: SigningKey = None) -> None:
    """Sign the lines of the ledger that nobody signed when they were written, each as signed later."""
    with signing_with(signing_key):
        signer = required_signer()
        signed = sign_unsigned(open_folder(folder))
    if not signed:
        rendering.say("every line is signed")
        return
    rendering.say(
        f"signed {counted(len(signed), 'line')} ({', '.join(map(str, signed))}), as signed later, by the key "
        f"{signer.public_key.keyid[:12]}…"
    )


def write_signed_receipt(
    folder: Path, line: int, target: Path | None, for_id: str | None, for_group: str | None, signing_key: Path | None
) -> None:
    """Print the signed receipt of a line, or write it to a new file; the salt of a person's is shown once."""
    if target is not None and os.path.lexists(target):
        raise ConfigError(f"{target} is there, and a receipt is not written over. Name a new file.")
    with signing_with(signing_key):
        made = signed_receipt(folder, line, required_signer(), for_id, for_group)
    if target is None:
        typer.echo(made.envelope.decode())
    else:
        with open(target, "xb") as file:
            file.write(made.envelope + b"\n")
        rendering.say(f"the signed receipt of line {line} is in {target}")
    if made.salt is not None:
        # Not where the receipt is: who has both can try names.
        told = f"salt: {made.salt} (for the person alone; it is shown once and kept nowhere)"
        rendering.complain(told) if target is None else rendering.say(told)
