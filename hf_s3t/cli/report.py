"""The command that writes a report for the file."""

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..folder.foreign import refuse_foreign_parts
from ..operations.reports import make_report, render
from ..signing.keys import PUBLIC_VARIABLE, PublicKey
from . import rendering
from .arguments import Folder


class Form(StrEnum):
    """What a report is written as."""

    html = "html"
    md = "md"


def report(
    folder: Folder,
    line: Annotated[int | None, typer.Option(min=1, help="Of the request in this line of the ledger.")] = None,
    since: Annotated[str | None, typer.Option(help="Of what came from this date on, such as 2026-11-01; UTC.")] = None,
    until: Annotated[str | None, typer.Option(help="Of what came up to this date, to its end.")] = None,
    form: Annotated[Form, typer.Option("--format", help="`html`, a page that needs nothing else, or `md`.")] = Form.md,
    output: Annotated[Path | None, typer.Option(help="A new file to write it to; printed if not given.")] = None,
    public_key: Annotated[
        str | None,
        typer.Option(envvar=PUBLIC_VARIABLE, help="The public key of whoever signs: a file, or the key itself."),
    ] = None,
) -> None:
    """Report on a request, a period, or everything: from ledger, signatures and checks, without ids."""
    if output is not None and os.path.lexists(output):
        raise ConfigError(f"{output} is there, and a report is not written over. Name a new file.")
    refuse_foreign_parts(folder)
    key = None if public_key is None else PublicKey.read(public_key)
    text = render(make_report(folder, line=line, since=since, until=until, public_key=key), form.value)
    if output is None:
        typer.echo(text, nl=False)
        return
    with open(output, "x", encoding="utf-8") as file:
        file.write(text)
    rendering.say(f"the report is in {output}")
