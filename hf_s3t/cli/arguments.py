"""What commands take: their arguments and options, and the ids and groups that these name."""

import codecs
import os
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ExampleIdError
from ..folder.system import SystemFolder
from ..operations.written_ids import groups_from_texts, ids_from_texts
from ..signing.keys import SIGNING_VARIABLE


_STDIN = "-"


def _existing(path: Path) -> Path:
    # Typer's own check says what is wrong, and not what to give instead.
    if not os.path.exists(path):
        raise typer.BadParameter(
            f"It does not exist: {path}. Give the folder of a system, the `output_dir` of its training run."
        )
    return path


Folder = Annotated[
    Path,
    typer.Argument(
        file_okay=False, callback=_existing, help="The folder of a system: the `output_dir` of its training run."
    ),
]
Ids = Annotated[
    list[str] | None,
    typer.Argument(
        help="Ids of examples; `-` reads them from standard input. Put `--` before one that starts with -."
    ),
]
FromFile = Annotated[
    Path | None,
    typer.Option(exists=True, dir_okay=False, help="A file with one id per line; empty lines are passed over."),
]
Groups = Annotated[list[str] | None, typer.Option("--group", help="A group whose examples are all meant; repeatable.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON with a stable schema.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Show what would be done; change nothing.")]
Repo = Annotated[str, typer.Argument(help="The repository on the Hub, such as me/llama-s3t.")]
Token = Annotated[str | None, typer.Option(help="Token for the Hub; the one of `hf auth login` if not given.")]
SigningKey = Annotated[
    Path | None,
    typer.Option(dir_okay=False, help=f"A file with the private key to sign with; else {SIGNING_VARIABLE} has it."),
]


class Missing(StrEnum):
    """What to do about ids that a system never saw."""

    error = "error"
    ignore = "ignore"


def named_examples(
    system: SystemFolder, ids: Sequence[str] | None, from_file: Path | None, groups: Sequence[str] | None
) -> tuple[list[int | str], list[int | str]]:
    """The ids and groups that a command line names, in the types that this system's have."""
    texts: list[str] = []
    for text in ids or ():
        texts += _lines(sys.stdin.buffer.read(), "standard input") if text == _STDIN else [text]
    if from_file is not None:
        texts += _lines(from_file.read_bytes(), str(from_file))
    # Also where a file or standard input is empty: most likely what should have filled it failed.
    if not texts and not groups:
        raise typer.BadParameter(
            "Got no ids. Name them as arguments, by --from-file, on standard input (-), or --group."
        )
    return ids_from_texts(system, texts), groups_from_texts(system, groups or ())


def _lines(data: bytes, source: str) -> list[str]:
    try:
        # What PowerShell writes into a file says so by its first two bytes.
        text = data.decode("utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise ExampleIdError(f"{source} is no UTF-8 text ({error}). Give one id per line.") from error
    # Not splitlines: ids may hold the other characters that it takes for line breaks.
    return [line for line in (line.removesuffix("\r") for line in text.split("\n")) if line]
