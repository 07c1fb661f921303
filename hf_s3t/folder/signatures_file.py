"""The file of signatures: what somebody who had a key signed of lines of the ledger, one envelope in each line."""

import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import FolderError, ReceiptError, S3TError
from ..records.ledger import Ledger
from ..records.statements import statement_of
from ..signing.dsse import Envelope
from ..signing.issuing import sign
from ..signing.keys import Signer, current_signer
from ..signing.statement import Statement
from ..signing.verification import read_unverified
from .files import sync, unreadable, write_atomically
from .layout import SIGNATURES_FILE


class Signatures:
    """
    The signatures that a text holds. Lines that are none, or are cut, are passed over here and told by `check`.

    Args:
        text (`str`): What the file holds.
    """

    def __init__(self, text: str = ""):
        # An unterminated last line was never whole.
        self.lines = [line for line in text.split("\n")[:-1] if line]
        self.damaged: list[int] = []
        self.of_line: dict[str, list[tuple[Envelope, Statement]]] = {}
        for number, line in enumerate(self.lines, start=1):
            try:
                statement = read_unverified(line.encode())
                self.of_line.setdefault(statement.hash, []).append((Envelope.from_json(line.encode()), statement))
            except ReceiptError:
                self.damaged.append(number)

    @classmethod
    def read(cls, path: Path) -> "Signatures":
        """
        Those of a system's folder; none where there is no file.

        Args:
            path (`Path`): The folder.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If the file cannot be read.
        """
        try:
            return cls((path / SIGNATURES_FILE).read_bytes().decode(errors="replace"))
        except FileNotFoundError:
            return cls()
        except OSError as error:
            raise unreadable(path / SIGNATURES_FILE, error) from error

    def signed(self, hash_: str) -> tuple[Envelope, Statement] | None:
        """The first signature of a line, by its hash; `None` where nobody signed it."""
        return next(iter(self.of_line.get(hash_, ())), None)

    def text_for(self, ledger: Ledger, more: "Signatures | None" = None) -> str:
        """
        These, and others, of the lines that a ledger has, each once and in its order: what goes where the ledger goes.

        Args:
            ledger ([`~hf_s3t.records.ledger.Ledger`]): The ledger.
            more ([`Signatures`], *optional*): Those of another copy of the system.
        """
        found: dict[str, dict[str, None]] = {}
        for one in (self, more or Signatures()):
            for hash_, envelopes in one.of_line.items():
                for envelope, _ in envelopes:
                    found.setdefault(hash_, {})[envelope.to_json().decode()] = None
        return "".join(f"{line}\n" for hash_ in ledger.hashes for line in found.get(hash_, ()))


def take_in(path: Path, ledger: Ledger, more: Signatures) -> None:
    """
    Put what another copy of the system has of signatures into its folder. The folder's lock must be held.

    Args:
        path (`Path`): The folder.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): Its ledger.
        more ([`Signatures`]): The other copy's.
    """
    known = Signatures.read(path)
    text = known.text_for(ledger, more)
    if text and text != known.text_for(ledger):
        write_atomically(path / SIGNATURES_FILE, text.encode())


def append_signatures(path: Path, envelopes: Sequence[Envelope]) -> None:
    """
    Add signatures to those of a system's folder, synced. The folder's lock must be held.

    A torn last line was never whole; the new one takes its place.
    """
    file = path / SIGNATURES_FILE
    is_new = not file.exists()
    with open(file, "a+b") as opened:
        opened.truncate(_whole_bytes(file))
        opened.write(b"".join(one.to_json() + b"\n" for one in envelopes))
        opened.flush()
        os.fsync(opened.fileno())
    if is_new:
        sync(path)


def _whole_bytes(file: Path) -> int:
    return file.read_bytes().rfind(b"\n") + 1


def sign_written(path: Path, ledger: Ledger, lines: Iterable[int], system: str, signer: Signer | None) -> None:
    """
    Sign lines that this process has just written into a system's folder. The folder's lock must be held.

    They are in force: where they cannot be signed, that is a warning, and they can be signed later.

    Args:
        path (`Path`): The folder.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): Its ledger.
        lines (iterable of `int`): Their numbers, counted from 1.
        system (`str`): The identity of the system.
        signer ([`~hf_s3t.signing.keys.Signer`], *optional*): What signs; without one, nothing is.
    """
    numbers = list(lines)
    if signer is None or not numbers:
        return
    try:
        append_signatures(path, [sign(statement_of(ledger, one, system, "written"), signer) for one in numbers])
    # A callable of the user's may raise anything.
    except Exception as error:
        why = str(error) if isinstance(error, (S3TError, OSError)) else type(error).__name__
        warnings.warn(
            f"Line {numbers[-1]} of the ledger is in force and could not be signed ({why.rstrip('.')}). Sign it later "
            "by `hf-s3t sign`.",
            stacklevel=2,
        )


class NewLines:
    """
    Lines that were written under a folder's lock, to be signed before that is let go, and after all else: a signature
    may take its time, and neither a removal nor a reader waits for it.
    """

    def __init__(self) -> None:
        self._lines: list[tuple[int, Signer]] = []

    def note(self, number: int, signer: Signer | None) -> None:
        """
        Remember a line.

        Args:
            number (`int`): Its number, counted from 1.
            signer ([`~hf_s3t.signing.keys.Signer`], *optional*): What signs it; without one, nothing does.
        """
        if signer is not None:
            self._lines.append((number, signer))

    def sign(self, path: Path, ledger: Ledger, system: str) -> None:
        """
        Sign what was written, whatever came of the rest: it is in force.

        Args:
            path (`Path`): The folder.
            ledger ([`~hf_s3t.records.ledger.Ledger`]): Its ledger.
            system (`str`): The identity of the system.
        """
        lines, self._lines = self._lines, []
        for number, signer in lines:
            sign_written(path, ledger, [number], system, signer)


def sign_merge(path: Path, merged: Ledger, other: Ledger, system: str) -> None:
    """
    Sign the line by which this process joined two ledgers, if it wrote one. The folder's lock must be held.

    Args:
        path (`Path`): The folder.
        merged ([`~hf_s3t.records.ledger.Ledger`]): Its ledger now.
        other ([`~hf_s3t.records.ledger.Ledger`]): The other copy's.
        system (`str`): The identity of the system.
    """
    if merged.hashes[-1] not in other.hashes:
        sign_written(path, merged, [len(merged.lines)], system, current_signer())


def sign_later(path: Path, ledger: Ledger, system: str, signer: Signer) -> list[int]:
    """
    Sign every line of a system's ledger that nobody signed, saying that it was done later. The folder's lock must be
    held.

    Args:
        path (`Path`): The folder.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): Its ledger.
        system (`str`): The identity of the system.
        signer ([`~hf_s3t.signing.keys.Signer`]): What signs.

    Returns:
        `list[int]`: The numbers of the lines.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If they cannot be written.
    """
    known = Signatures.read(path)
    missing = [number for number, one in enumerate(ledger.hashes, start=1) if one not in known.of_line]
    envelopes = [sign(statement_of(ledger, number, system, "later"), signer) for number in missing]
    if envelopes:
        try:
            append_signatures(path, envelopes)
        except OSError as error:
            raise FolderError(
                f"{path / SIGNATURES_FILE} could not be written ({error}). Nothing was signed. Make room, or make it "
                "writable, then call again."
            ) from error
    return missing
