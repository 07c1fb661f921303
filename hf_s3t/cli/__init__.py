"""The command line `hf-s3t`."""

from .app import main


__all__ = ["main"]
