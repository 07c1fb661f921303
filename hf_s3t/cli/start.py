"""Starts the command line, with no more of the package than the command needs."""

import sys


# Who checks a receipt has no system: these start without all that reads one.
_LIGHT = ("keygen", "verify-receipt")


def main() -> None:
    """Run the command line."""
    if sys.argv[1:2] and sys.argv[1] in _LIGHT:
        from .verify import app
    else:
        from .app import app
    app(prog_name="hf-s3t")
