"""How commands end: errors in one line on standard error, with an exit code. Imports nothing of a system."""

import os
from typing import Any

import typer
from typer.core import TyperGroup

from ..errors import ExhaustedError, S3TError
from .exit_codes import EXHAUSTED, REFUSED


class Commands(TyperGroup):
    """Commands whose errors end in one line on standard error, and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
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


def say(text: str, err: bool = False) -> None:
    """A line as it is, with what cannot be printed escaped."""
    typer.echo("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text), err=err)


def _ended(message: str, code: int) -> typer.Exit:
    say(f"Error: {message}", err=True)
    return typer.Exit(code)
