"""Signatures of a ledger that is there: those that are missing, and those that another copy of the system has."""

from ..signing.keys import required_signer
from .signatures_file import Signatures, sign_later, take_in
from .system import SystemFolder


def sign_unsigned(folder: SystemFolder) -> list[int]:
    """
    Sign the lines of a ledger that nobody signed, each as signed later.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.

    Returns:
        `list[int]`: The numbers of the lines, counted from 1.

    Raises:
        [`~hf_s3t.errors.SigningKeyError`]: If this process has no key.
        [`~hf_s3t.errors.FolderError`]: If the folder cannot be written to.
    """
    signer = required_signer()
    with folder.writing():
        folder.refresh_ledger()
        return sign_later(folder.path, folder.ledger, folder.identity, signer)


def take_in_signatures(folder: SystemFolder, more: Signatures) -> None:
    """
    Take in what another copy of a system has of signatures of the lines that are here.

    Args:
        folder ([`~hf_s3t.folder.system.SystemFolder`]): The system.
        more ([`~hf_s3t.folder.signatures_file.Signatures`]): The other copy's.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the folder cannot be written to.
    """
    if more.of_line:
        with folder.writing():
            folder.refresh_ledger()
            take_in(folder.path, folder.ledger, more)
