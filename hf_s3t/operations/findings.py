"""What a look at a folder finds, gathered as sentences: problems with their remedies, notes, and what is to go."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import FolderError, S3TError
from ..folder.foreign import foreign_problem, is_foreign, printable


_NEXT_LOAD = "The next load (`hf-s3t purge`, say) finishes the removal."
_WHY = {
    "stage": f"saw an example that was deleted since: its removal is under way or was interrupted. {_NEXT_LOAD}",
    "checkpoint": f"saw, or may have seen, an example that was deleted since. {_NEXT_LOAD}",
    "leftover": f"is left of a write or a removal that is under way or was interrupted. {_NEXT_LOAD}",
    "rows": f"was written before the last deletion, so that deleted rows may still be in it. {_NEXT_LOAD}",
}


@dataclass(frozen=True)
class ToRemove:
    """
    Something that a deletion condemned, or an interrupted write left behind: the next load removes it.

    Args:
        path (`Path`): Where it lies.
        kind (`str`): `"stage"`, `"checkpoint"`, `"leftover"`, or `"rows"` for the table of examples or the gate.
    """

    path: Path
    kind: str


@dataclass(frozen=True)
class Inspection:
    """
    What a look at a folder found.

    Args:
        problems (`tuple[str, ...]`): One sentence per problem, with the remedy; empty if all is well.
        notes (`tuple[str, ...]`): What is no problem, but good to know.
        to_remove (`tuple[ToRemove, ...]`): What the next load removes; each is among the problems too.
        checkpoints (`tuple[Path, ...]`): Unfinished checkpoints that hold nothing deleted and can be resumed.
    """

    problems: tuple[str, ...]
    notes: tuple[str, ...]
    to_remove: tuple[ToRemove, ...]
    checkpoints: tuple[Path, ...]


@dataclass
class Findings:
    """What was found so far. What could not be read is told, and what depends on it is passed over."""

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    to_remove: list[ToRemove] = field(default_factory=list)
    checkpoints: list[Path] = field(default_factory=list)

    def result(self) -> Inspection:
        """All of it, each problem once."""
        # Names from a foreign folder stand in the sentences.
        problems = tuple(dict.fromkeys(map(printable, self.problems)))
        notes = tuple(map(printable, self.notes))
        return Inspection(problems, notes, tuple(self.to_remove), tuple(self.checkpoints))

    @contextmanager
    def reading(self, what: Path) -> Iterator[None]:
        """Turns whatever reading may raise into a sentence."""
        try:
            yield
        except S3TError as error:
            self.problems.append(str(error))
        except OSError as error:
            where = error.filename or what
            self.problems.append(f"{where} cannot be read: {error.strerror or error}. Check its permissions.")
        # A digest needs no secret: who edits a file can make it match, so that its contents may be anything. A check
        # that ends in a traceback would say less than this.
        except Exception as error:
            self.problems.append(
                f"{what} holds values that no version of hf_s3t writes ({type(error).__name__}: {error}). "
                "Restore it from a backup; do not serve this system."
            )

    def condemned(self, path: Path, kind: str) -> None:
        """Tell of something that the next load removes."""
        self.to_remove.append(ToRemove(path, kind))
        self.problems.append(f"{path} {_WHY[kind]}")

    def unknown(self, entry: Path) -> None:
        """Tell of something that is no part of a system; of links and the like it is told already."""
        if not is_foreign(entry):
            self.problems.append(
                f"{entry} is no part of a system: no deletion reaches what it may hold. Move it out of the folder, "
                "or remove it."
            )


def require_file(path: Path, advice: str = "Restore it from a backup.") -> None:
    """
    Check that a file is there.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it is missing, or a folder, a link or a pipe.
    """
    if is_foreign(path):
        raise FolderError(foreign_problem(path))
    if path.is_dir():
        raise FolderError(f"{path} is a folder, expected a file. {advice}")
    if not os.path.lexists(path):
        raise FolderError(f"{path} is missing. {advice}")


def require_private(file: Path, findings: Findings, why: str) -> None:
    """Tell of a file that others than its owner may read."""
    mode = stat.S_IMODE(os.lstat(file).st_mode)
    if os.name == "posix" and mode != 0o600:
        findings.problems.append(f"{file} has mode {mode:03o}, expected 600: {why}. Run `chmod 600` on it.")
