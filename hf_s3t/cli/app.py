"""
The command line `hf-s3t`: its commands, and how they end. They work on the folder of a system on this machine, on its
repository on the Hub, or before there is one (`plan`). Only `export` and `serve` load a model.
"""

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from .. import __version__
from ..errors import ExhaustedError, S3TError
from . import folder, hub, plan, rendering, serve
from .exit_codes import EXHAUSTED, EXIT_CODES, REFUSED


class _Commands(TyperGroup):
    """Commands whose errors end in one line on standard error, and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ExhaustedError as error:
            raise _ended(str(error), EXHAUSTED) from error
        except S3TError as error:
            raise _ended(str(error), REFUSED) from error
        except BrokenPipeError:
            # Typer ends quietly when who read the output is gone.
            raise
        except OSError as error:
            where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
            raise _ended(f"{where}{error.strerror or error}. Check the path and its permissions.", REFUSED) from error


def _ended(message: str, code: int) -> typer.Exit:
    rendering.complain(f"Error: {message}")
    return typer.Exit(code)


app = typer.Typer(
    cls=_Commands,
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
