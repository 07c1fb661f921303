"""What a folder may look like after a crash: its operations recorded, and replayed with the unsynced ones lost."""

import builtins
import copy
import errno
import os
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest


# Files and folders by their paths below a root: the bytes of files, `None` for folders.
Tree = dict[str, bytes | None]
LOCKS = (".lock", ".erasures.lock")


def tree_of(root: Path) -> Tree:
    """What lies below a folder, but for locks, which say nothing."""
    found: Tree = {}
    waiting = [""]
    while waiting:
        above = waiting.pop()
        with os.scandir(os.path.join(root, above)) as entries:
            for entry in entries:
                name = os.path.join(above, entry.name)
                if entry.is_dir(follow_symlinks=False):
                    found[name] = None
                    waiting.append(name)
                elif entry.name not in LOCKS:
                    with open(entry.path, "rb") as file:
                        found[name] = file.read()
    return found


def plant(tree: Tree, root: Path) -> Path:
    """Write a tree into a new folder."""
    root.mkdir(parents=True)
    for name in sorted(tree):
        if tree[name] is None:
            (root / name).mkdir()
    for name, data in tree.items():
        if data is not None:
            (root / name).touch(0o600)
            (root / name).write_bytes(data)
    return root


# Recording


@dataclass(frozen=True)
class Step:
    """
    One operation: `"folder"`, `"write"`, `"link"`, `"move"`, `"remove"`, `"sync"`; or a `"mark"`: a call returned.

    A write has the whole content that the file has after it. Contents are looked at before every other operation, so
    those that a library in C wrote are seen too, as late as they could have been written.
    """

    kind: str
    name: str
    data: bytes = b""
    target: str = ""


class Recording:
    """
    The operations on a folder while [`Recording.running`] is entered, by all threads. Nothing is synced in truth.

    Args:
        root (`Path`): The folder.
    """

    def __init__(self, root: Path):
        self.root = os.path.realpath(root)
        self.start = tree_of(root)
        self.steps: list[Step] = []
        self._tree = dict(self.start)
        self._lock = threading.RLock()

    @contextmanager
    def running(self) -> Iterator["Recording"]:
        """Record what is done meanwhile."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "fsync", self._sync)
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._recorded(getattr(os, name), self._moved))
            for name in ("unlink", "remove", "rmdir"):
                patch.setattr(os, name, self._recorded(getattr(os, name), self._removed))
            patch.setattr(os, "mkdir", self._recorded(os.mkdir, self._made))
            patch.setattr(os, "link", self._recorded(os.link, self._linked))
            yield self
        with self._lock:
            self._look()

    def mark(self, what: str) -> None:
        """Note that a call returned."""
        with self._lock:
            self._look()
            self.steps.append(Step("mark", what))

    def _recorded(self, operation: Callable, note: Callable) -> Callable:
        def operate(*args, **kwargs):
            with self._lock:
                self._look()
                names = [self._name(path, kwargs) for path in args[:2] if isinstance(path, (str, os.PathLike))]
                result = operation(*args, **kwargs)
                if all(name is not None for name in names):
                    note(*names)
                return result

        return operate

    def _sync(self, descriptor) -> None:
        number = descriptor if isinstance(descriptor, int) else descriptor.fileno()
        with self._lock:
            self._look()
            name = self._name(os.readlink(f"/proc/self/fd/{number}"), {})
            if name is not None:
                self.steps.append(Step("sync", name))

    def _name(self, path: str | os.PathLike, options) -> str | None:
        path = os.fspath(path)
        if options.get("dir_fd") is not None:
            path = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), path)
        path = os.path.join(os.path.realpath(os.path.dirname(os.path.abspath(path))), os.path.basename(path))
        if path == self.root:
            return ""
        inside = path.startswith(self.root + os.sep) and os.path.basename(path) not in LOCKS
        return os.path.relpath(path, self.root) if inside else None

    def _look(self) -> None:
        """Note what was written since the last operation."""
        for name, data in sorted(tree_of(self.root).items()):
            if name not in self._tree or self._tree[name] != data:
                self.steps.append(Step("folder" if data is None else "write", name, data or b""))
                self._tree[name] = data

    def _made(self, name: str) -> None:
        self.steps.append(Step("folder", name))
        self._tree[name] = None

    def _linked(self, source: str, target: str) -> None:
        self.steps.append(Step("link", source, target=target))
        self._tree[target] = self._tree[source]

    def _moved(self, source: str, target: str) -> None:
        self.steps.append(Step("move", source, target=target))
        for name in [n for n in self._tree if n == target or n.startswith(target + os.sep)]:
            del self._tree[name]
        for name in [n for n in self._tree if n == source or n.startswith(source + os.sep)]:
            self._tree[target + name[len(source) :]] = self._tree.pop(name)

    def _removed(self, name: str) -> None:
        self.steps.append(Step("remove", name))
        self._tree.pop(name, None)


# A disk that forgets


@dataclass(eq=False)
class _File:
    data: bytes
    synced: bytes


@dataclass(eq=False)
class _Folder:
    """The entries that last through a crash, and the changes of entries that may not, each whole or not at all."""

    synced: dict = field(default_factory=dict)
    changes: list = field(default_factory=list)

    def entries(self, changes: list | None = None) -> dict:
        found = dict(self.synced)
        for change in self.changes if changes is None else changes:
            for name, node in change:
                if node is None:
                    found.pop(name, None)
                else:
                    found[name] = node
        return found


class Disk:
    """
    A disk on which an operation lasts through a crash only if the file or folder it is about was synced since.

    What POSIX promises and no more: syncing a file says nothing of its name, and syncing a folder nothing of the
    contents of its files.

    Args:
        tree (`Tree`): What is on it, synced.
    """

    def __init__(self, tree: Tree):
        self._root = _Folder()
        for name in sorted(tree):
            above, last = self._above(name)
            data = tree[name]
            above.synced[last] = _Folder() if data is None else _File(data, data)

    def do(self, step: Step) -> None:
        """Carry a step out."""
        if step.kind == "mark":
            return
        if step.kind == "sync":
            node = self._node(step.name)
            if isinstance(node, _File):
                node.synced = node.data
            else:
                node.synced, node.changes = node.entries(), []
            return
        above, last = self._above(step.name)
        node = above.entries().get(last)
        if step.kind == "write" and node is not None:
            node.data = step.data
        elif step.kind in ("write", "folder"):
            above.changes.append([(last, _File(step.data, b"") if step.kind == "write" else _Folder())])
        elif step.kind == "remove":
            above.changes.append([(last, None)])
        else:
            other, name = self._above(step.target)
            if step.kind == "link":
                other.changes.append([(name, node)])
            elif other is above:
                above.changes.append([(last, None), (name, node)])
            else:
                other.changes.append([(name, node)])
                above.changes.append([(last, None)])

    def crashes(self, some: random.Random, count: int = 1) -> Iterator[tuple[str, Tree]]:
        """What may be found after a crash now: a description of what lasted, and the tree."""
        yield "everything lasts", self._tree(_all, _new)
        yield "nothing unsynced lasts", self._tree(_none, _old)
        yield "names last, contents do not", self._tree(_all, _old)
        yield "names last, contents by half", self._tree(_all, _half)
        yield "names last, contents are zeros", self._tree(_all, _zeros)
        yield "contents last, names do not", self._tree(_none, _new)
        for _ in range(count):
            yield (
                "some of each lasts",
                self._tree(
                    lambda changes: [change for change in changes if some.random() < 0.5],
                    lambda file: some.choice((_new, _old, _half, _zeros))(file),
                ),
            )

    def _tree(self, lasting: Callable, content: Callable) -> Tree:
        found: Tree = {}
        waiting = [("", self._root)]
        while waiting:
            above, folder = waiting.pop()
            for last, node in folder.entries(lasting(folder.changes)).items():
                name = os.path.join(above, last)
                found[name] = content(node) if isinstance(node, _File) else None
                if isinstance(node, _Folder):
                    waiting.append((name, node))
        return found

    def _node(self, name: str):
        node = self._root
        for part in Path(name).parts:
            node = node.entries()[part]
        return node

    def _above(self, name: str) -> tuple[_Folder, str]:
        return self._node(os.path.dirname(name)), os.path.basename(name)


def _all(changes: list) -> list:
    return changes


def _none(changes: list) -> list:
    return []


def _new(file: _File) -> bytes:
    return file.data


def _old(file: _File) -> bytes:
    return file.synced


def _half(file: _File) -> bytes:
    common = _common(file)
    return file.data[: common + (len(file.data) - common) // 2] if file.data != file.synced else file.data


def _zeros(file: _File) -> bytes:
    return file.data[: _common(file)].ljust(len(file.data), b"\0") if file.data != file.synced else file.data


def _common(file: _File) -> int:
    pairs = zip(file.data, file.synced, strict=False)
    return next((n for n, (new, old) in enumerate(pairs) if new != old), min(len(file.data), len(file.synced)))


@dataclass(frozen=True)
class Crash:
    """
    What a crash left.

    Args:
        after (`int`): Number of steps that were carried out.
        what (`str`): What lasted.
        told (`frozenset[str]`): What the caller had been told: the marks among these steps.
        tree (`Tree`): What is found afterwards.
    """

    after: int
    what: str
    told: frozenset[str]
    tree: Tree

    def __str__(self):
        return f"after step {self.after}: {self.what}"


def crashes(recording: Recording, disk: Disk | None = None, count: int = 1) -> Iterator[Crash]:
    """
    Every crash during what was recorded, those that leave the same once.

    Args:
        recording ([`Recording`]): The operations.
        disk ([`Disk`], *optional*): What came before them, if not all of it was synced.
        count (`int`, defaults to 1): Number of random choices of what lasts, after each step.
    """
    disk = Disk(recording.start) if disk is None else copy.deepcopy(disk)
    some, seen, told = random.Random(0), set(), frozenset()
    for after, step in enumerate([None, *recording.steps]):
        if step is not None:
            disk.do(step)
            told |= {step.name} if step.kind == "mark" else set()
        for what, tree in disk.crashes(some, count):
            state = (told, frozenset(tree.items()))
            if state not in seen:
                seen.add(state)
                yield Crash(after, what, told, tree)


# A disk that refuses


class Faults:
    """
    Lets a number of operations that change the disk succeed, and all after them fail.

    Args:
        after (`int`): How many succeed.
        number (`int`): The error, such as `errno.ENOSPC`.
        once (`bool`): Only one fails, and those after it succeed again.
    """

    def __init__(self, after: int, number: int = errno.ENOSPC, once: bool = False):
        self.left = after
        self.happened = 0
        self._number = number
        self._once = once

    @contextmanager
    def running(self) -> Iterator["Faults"]:
        """Fail meanwhile."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "rename", "replace", "link", "unlink", "rmdir", "mkdir"):
                patch.setattr(os, name, self._counted(getattr(os, name)))
            patch.setattr(builtins, "open", self._opened(open))
            patch.setattr(os, "open", self._opened_below(os.open))
            yield self

    def _fails(self) -> bool:
        self.left -= 1
        fails = self.left == -1 if self._once else self.left < 0
        self.happened += fails
        return fails

    def _error(self, path=None) -> OSError:
        return OSError(self._number, os.strerror(self._number), path if isinstance(path, str) else None)

    def _counted(self, operation: Callable) -> Callable:
        def operate(path, *args, **kwargs):
            if self._fails():
                raise self._error(str(path))
            return operation(path, *args, **kwargs)

        return operate

    def _opened_below(self, operation: Callable) -> Callable:
        def operate(path, flags, *args, **kwargs):
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self._fails():
                raise self._error(str(path))
            return operation(path, flags, *args, **kwargs)

        return operate

    def _opened(self, operation: Callable) -> Callable:
        def operate(path, mode="r", *args, **kwargs):
            if not set(mode) & set("wax+"):
                return operation(path, mode, *args, **kwargs)
            if self._fails():
                raise self._error(str(path))
            return _Failing(operation(path, mode, *args, **kwargs), self)

        return operate


class _Failing:
    """A file of which a write may fail when half of it is on the disk."""

    def __init__(self, file, faults: Faults):
        self._file, self._faults = file, faults

    def write(self, data) -> int:
        if self._faults._fails():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise self._faults._error()
        return self._file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)
