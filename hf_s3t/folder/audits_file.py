"""The file of audits: signed results of who trained stages again, each with the key that it was checked by."""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from ..errors import FolderError, S3TError
from ..signing.audit_statement import AuditStatement
from ..signing.dsse import Envelope
from ..signing.keys import PublicKey
from ..signing.strict_json import compact
from .files import sync, unreadable
from .layout import AUDITS_FILE


@dataclass(frozen=True)
class StoredAudit:
    """
    A result that was taken in.

    Args:
        envelope ([`~hf_s3t.signing.dsse.Envelope`]): The result as it was signed.
        key ([`~hf_s3t.signing.keys.PublicKey`]): The key that signed it.
        statement ([`~hf_s3t.signing.audit_statement.AuditStatement`]): What it says.
    """

    envelope: Envelope
    key: PublicKey
    statement: AuditStatement


def read_audits(path: Path) -> tuple[StoredAudit, ...]:
    """
    The audits of a system's folder, each signature checked again.

    Args:
        path (`Path`): The folder.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the file cannot be read, or holds anything else.
    """
    file = path / AUDITS_FILE
    try:
        text = file.read_bytes().decode()
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise unreadable(file, error) from error
    except UnicodeDecodeError as error:
        raise FolderError(f"{file} is not text: {error}. Restore it from a backup.") from error
    # An unterminated last line was never whole.
    return tuple(_stored(file, number, line) for number, line in enumerate(text.split("\n")[:-1], start=1))


def append_audit(path: Path, envelope: Envelope, key: PublicKey) -> None:
    """Add a result that was checked to a system's folder, synced. The folder's lock must be held."""
    file = path / AUDITS_FILE
    is_new = not file.exists()
    line = compact({"envelope": json.loads(envelope.to_json()), "public_key": key.pem})
    with open(file, "a+b") as opened:
        opened.truncate(file.read_bytes().rfind(b"\n") + 1)
        opened.write(line + b"\n")
        opened.flush()
        os.fsync(opened.fileno())
    if is_new:
        sync(path)


def _stored(file: Path, number: int, line: str) -> StoredAudit:
    try:
        values = json.loads(line)
        envelope = Envelope.from_json(compact(values["envelope"]))
        key = PublicKey.from_text(str(values["public_key"]))
        return StoredAudit(envelope, key, AuditStatement.verified(envelope, key))
    except (S3TError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise FolderError(
            f"{file} line {number} is no audit as it was taken in: it was altered. Remove the line, and take the "
            "result in again by `hf-s3t audit-add`."
        ) from error
