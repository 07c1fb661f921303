"""Commands for an audit by somebody else: the pack that they get, and their result taken back."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import counted
from ..folder.opening import open_folder
from ..operations.audits import add_audit, write_audit_pack
from ..signing.keys import PublicKey, signing_with
from . import rendering
from .arguments import Folder, SigningKey


def audit_pack(
    folder: Folder,
    target: Annotated[Path, typer.Argument(help="A new folder to write the pack to.")],
    stage: Annotated[list[str], typer.Option(help="A stage to train again, such as shard-0/2-0; repeatable.")],
    signing_key: SigningKey = None,
) -> None:
    """
    Write what somebody else needs to train stages again: recipe, versions, seeds, layout, digests, and a script.

    The stages are handed out by this, which the ledger notes. There is no secret and no data in it.
    """
    with signing_with(signing_key):
        packed = write_audit_pack(open_folder(folder), target, stage)
    rendering.say(f"{counted(len(packed), 'stage')} ({', '.join(packed)}) in {target}; its README says what to do")


def audit_add(
    folder: Folder,
    result: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="The signed result of an audit.")],
    public_key: Annotated[str, typer.Option(help="The public key of whoever did it: a file, or the key itself.")],
) -> None:
    """Take the signed result of an audit into the folder: receipts and reports tell of it."""
    key = PublicKey.read(public_key)
    found = add_audit(open_folder(folder), result.read_bytes(), key)
    equal = len(found.stages) - len(found.differing)
    rendering.say(
        f"audit by the key {key.keyid[:12]}…: {counted(equal, 'stage')} bit for bit the same, {len(found.differing)} "
        "otherwise"
    )
