"""Commands that need no system: making keys, and checking receipts. They start without what reads a folder."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ReceiptError, S3TError
from ..signing.keys import PUBLIC_VARIABLE, PublicKey, write_pair
from ..signing.statement import Statement
from ..signing.strict_json import LARGEST
from ..signing.verification import read_unverified, require_history, require_person, verify
from .ending import Commands, say
from .exit_codes import EXIT_CODES


def keygen(
    file: Annotated[
        Path, typer.Argument(help="A new file for the private key; the public one gets `.pub` at its end.")
    ],
) -> None:
    """Make a pair of Ed25519 keys to sign receipts with. The private one stays with you, outside of every system."""
    key = write_pair(file)
    say(f"private key: {file} (mode 600; keep it, back it up, show it to nobody)")
    say(f"public key: {file}.pub, keyid {key.keyid}")


def verify_receipt(
    receipt: Annotated[Path, typer.Argument(dir_okay=False, help="A signed receipt.")],
    later: Annotated[
        Path | None, typer.Argument(dir_okay=False, help="A later one, whose history shall contain the first.")
    ] = None,
    public_key: Annotated[
        str | None,
        typer.Option(envvar=PUBLIC_VARIABLE, help="The public key of whoever it is from: a file, or the key itself."),
    ] = None,
    example_id: Annotated[
        str | None, typer.Option("--id", help="Show that the receipt is of this id; needs --salt.")
    ] = None,
    salt: Annotated[str | None, typer.Option(help="What was handed out with the receipt.")] = None,
    system: Annotated[str | None, typer.Option(help="The identity of the system that it must be of.")] = None,
) -> None:
    """
    Check a signed receipt, with nothing but the public key: no folder of a system, no model, no network.

    With two receipts, check that the history of the second contains the first.
    """
    if public_key is None and later is None:
        raise typer.BadParameter(
            "Without the public key nothing can be checked. Name it by --public-key, as whoever signs published it."
        )
    if (example_id is None) != (salt is None):
        raise typer.BadParameter("--id and --salt go together. Give both, or neither.")
    key = None if public_key is None else PublicKey.read(public_key)
    first = _checked(receipt, key, system)
    if example_id is not None and salt is not None:
        with _named(receipt):
            require_person(first, example_id, salt)
    if later is None:
        whose = ", which is this id's" if example_id is not None else ""
        say(f"Verified, signed by the key {_short(key)} and unaltered{whose}: {first.sentence()}.")
        return
    second = _checked(later, key, system)
    require_history(first, second)
    signed = "No signature was checked: give --public-key." if key is None else f"Both are signed by {_short(key)}."
    say(f"The history of {later}, {_lines(second)}, contains line {first.line} of {receipt}. {signed}")


def _checked(file: Path, key: PublicKey | None, system: str | None) -> Statement:
    with _named(file):
        data = _read(file)
        if key is not None:
            return verify(data, key, system)
        found = read_unverified(data)
        if system is not None and found.system != system:
            raise ReceiptError(f"The receipt is of another system, {found.system}. Ask for a receipt of that one.")
        return found


def _read(file: Path) -> bytes:
    # A pipe or device may never end: one byte more than the largest is enough to refuse it.
    with open(file, "rb") as opened:
        return opened.read(LARGEST + 1)


@contextmanager
def _named(file: Path) -> Iterator[None]:
    """Names the file that an error is about."""
    try:
        yield
    except S3TError as error:
        raise type(error)(f"{os.fspath(file)}: {error}") from None


def _short(key: PublicKey | None) -> str:
    return "" if key is None else f"{key.keyid[:12]}…"


def _lines(statement: Statement) -> str:
    return f"up to line {statement.line} of the ledger of system {statement.system}"


app = typer.Typer(
    cls=Commands, name="hf-s3t", add_completion=False, pretty_exceptions_enable=False, no_args_is_help=True
)
for command in (keygen, verify_receipt):
    app.command(epilog=EXIT_CODES)(command)
