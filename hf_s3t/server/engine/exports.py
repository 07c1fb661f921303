"""Where exports lie that an engine loads: one folder for each name, removed when the engine let go of it."""

import contextlib
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock, Timeout

from ...errors import ConfigError, FolderError
from ...folder.files import explained, write_atomically


_LOCK = ".lock"
_IDENTITY = ".identity"
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Exports:
    """
    The folder of one server's exports. It is held until this process ends: two servers cannot share one.

    A name is made of the folder's own random identity, the digest of the stack and a random part: it says whose it is,
    and none is ever used twice.

    Args:
        path (`Path`): The folder, made if it is not there. Only its owner may read it then.
        system (`Path`): The folder of the system, outside of which it must be.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it is inside the system's folder, others may write to it, or another server
            uses it.
        [`~hf_s3t.errors.FolderError`]: If it cannot be made.
    """

    def __init__(self, path: Path, system: Path):
        if path.resolve().is_relative_to(system.resolve()):
            raise ConfigError(
                f"engine_exports={str(path)!r} is inside the system's folder, where only its own files belong. Give a "
                "folder outside of it."
            )
        with explained(f"{path} cannot be made", "Give another folder for exports (`--engine_exports`)."):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            if path.is_symlink() or path.stat().st_mode & _WRITABLE_BY_OTHERS:
                raise ConfigError(
                    f"engine_exports={str(path)!r} is a link, or others may write to it; expected a folder of this "
                    "user. Give one that only this user may write to (`chmod 700`)."
                )
            self.path = path.resolve()
            self._lock = self._hold()
            self._identity = self._read_identity()
        self._ours = re.compile(rf"s3t-{self._identity}-[0-9a-f]{{12}}-[0-9a-f]{{16}}")

    def _hold(self) -> FileLock:
        # Released by whoever ends the server, in any thread.
        lock = FileLock(self.path / _LOCK, thread_local=False, mode=0o600)
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise ConfigError(
                f"engine_exports={str(self.path)!r} is in use by another server. Stop that one, or give this one a "
                "folder of its own."
            ) from None
        return lock

    def _read_identity(self) -> str:
        file = self.path / _IDENTITY
        with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
            text = file.read_text()
            if re.fullmatch(r"[0-9a-f]{8}", text):
                return text
        identity = secrets.token_hex(4)
        write_atomically(file, identity.encode(), private=True)
        return identity

    def is_ours(self, name: str) -> bool:
        """Whether a name was given by a server with this folder."""
        return self._ours.fullmatch(name) is not None

    def new_name(self, digest: str) -> str:
        """A name for a stack, which nothing ever had."""
        return f"s3t-{self._identity}-{digest[:12]}-{secrets.token_hex(8)}"

    def write(self, name: str, write: Callable[[Path], None]) -> Path:
        """
        Write an export; if that fails, nothing is left of it.

        Args:
            name (`str`): Its name.
            write (callable): Called with an empty folder that only its owner may read.

        Returns:
            `Path`: The folder.
        """
        folder = self.path / name
        try:
            with explained(f"{folder} could not be written", "Make room there, or give another `--engine_exports`."):
                folder.mkdir(mode=0o700)
                write(folder)
                for file in folder.iterdir():
                    file.chmod(0o600)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        return folder

    def remove(self, name: str) -> None:
        """
        Remove an export. One that is not there is no error.

        Raises:
            [`~hf_s3t.errors.FolderError`]: If something of it is left.
        """
        folder = self.path / name
        try:
            shutil.rmtree(folder)
        except FileNotFoundError:
            return
        except OSError as error:
            raise FolderError(
                f"The export {name} could not be removed ({error.strerror}). Make its folder writable."
            ) from error

    def names(self) -> list[str]:
        """The names of the exports that lie there."""
        return sorted(entry.name for entry in self.path.iterdir() if self.is_ours(entry.name))

    def release(self) -> None:
        """Let another server use the folder."""
        self._lock.release()
