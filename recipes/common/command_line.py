"""How a recipe runs from the command line: what is wrong is said in one line."""

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console

from hf_s3t.errors import S3TError


console = Console(highlight=False)


def run(main: Callable[[], Any]) -> None:
    """
    Run a recipe, and end with status 1 and one line where it refuses.

    The recipe itself raises, for those who call it from Python; an error that nobody foresaw keeps its traceback.

    Args:
        main (function): The recipe's.
    """
    try:
        main()
    except S3TError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
