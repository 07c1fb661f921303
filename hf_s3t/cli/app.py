"""
The command line `hf-s3t`: its commands, and how they end. They work on the folder of a system on this machine, on its
repository on the Hub, or before there is one (`plan`). Only `export` and `serve` load a model.
"""

from typing import Annotated

import typer

from .. import __version__
from . import audits, folder, hub, plan, report, serve, signing, verify
from .ending import Commands
from .exit_codes import EXIT_CODES


app = typer.Typer(
    cls=Commands,
    name="hf-s3t",
    help="Look after an S3T system: its state, deletions, receipts and remains. " + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf-s3t {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command."""


# In the order of the help.
for command in (
    folder.status,
    folder.locate,
    folder.unlearn,
    folder.apply_pending,
    folder.check,
    folder.receipt,
    signing.sign,
    verify.keygen,
    verify.verify_receipt,
    report.report,
    audits.audit_pack,
    audits.audit_add,
    folder.purge,
    hub.push,
    hub.pull,
    hub.erase,
    folder.export,
    plan.plan,
    serve.serve,
):
    app.command(epilog=EXIT_CODES)(command)


def main() -> None:
    """Run the command line."""
    app(prog_name="hf-s3t")
