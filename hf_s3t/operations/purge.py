"""Finds what a run leaves behind that no deletion reaches, and removes what may be removed."""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import constants as hub_constants

from ..errors import FolderError
from ..folder.files import read_checked_json
from ..folder.identity import is_same_system
from ..folder.layout import CHECKPOINT_PREFIX, CHECKPOINTS, CLAIMS, CONFIG_FILE, HISTORY, STAGES, is_log
from ..folder.opening import open_folder
from ..folder.shared_growth import end_dead_claims
from ..folder.system import SystemFolder
from .inspection import inspect


BASELINE_SUFFIX = "-full-lora"
# Sizes and, in the Hub's cache, contents of files there are looked at, but nothing is opened that is larger.
_LARGEST_CONFIG = 16 * 2**20

_ADVICE = {
    "stage": "A deletion condemned it.",
    "checkpoint": "A deletion condemned it, or its stage is finished.",
    "leftover": "Left by a write or removal that was interrupted.",
    "rows": "Rewritten without the deleted rows.",
    "resumable checkpoint": "Holds nothing deleted, and an optimizer state; goes when `train()` finishes the stage.",
    "foreign checkpoint": "No checkpoint of a stage: what it saw is not recorded.",
    "optimizer state": "Moments of gradients of whatever it was trained on.",
    "dataset cache": "Written by `Dataset.map` or `filter`; holds rows. Written again when it is needed.",
    "saved dataset": "Holds rows, perhaps tokenised. Keep it only if no deleted row is in it.",
    "tracker logs": "Curves, and perhaps samples, of runs that saw deleted rows. Remove the tracker's copy too.",
    "git history": "May hold earlier versions of stages. Clone the repository again after its history was erased.",
    "baseline": "A model trained on all rows at once: it cannot unlearn.",
    "Hub cache": "Copies of earlier versions. Remove them with `hf cache rm`.",
    "Xet cache": "Chunks of files of all repositories. Remove the folder when nothing is being transferred.",
}
# What the next load removes by itself, so that removing it asks for no consent.
_CONDEMNED = ("stage", "checkpoint", "leftover", "rows")
# Shared with other repositories and managed by the Hub's own tool.
_LISTED_ONLY = ("Hub cache", "Xet cache")


@dataclass(frozen=True)
class Remnant:
    """
    A place that may hold deleted data, or weights that saw them.

    Args:
        path (`Path`): Where it lies.
        kind (`str`): What it is: `"checkpoint"`, `"dataset cache"`, …
        bytes (`int`): Its size.
        action (`str`): `"remove"` where it goes, `"rewrite"` where only rows of it go, `"keep"` where it stays;
            `"removed"` and `"rewritten"` once that is done.
        advice (`str`): What to know about it.
        folder (`Path`, *optional*): For one of a dataset's many cache files, the folder that stands for all of them.
    """

    path: Path
    kind: str
    bytes: int
    action: str = "keep"
    advice: str = ""
    folder: Path | None = None

    @property
    def listed_as(self) -> Path:
        """The path by which it is listed."""
        return self.path if self.folder is None else self.folder


@dataclass(frozen=True)
class Purge:
    """
    What a purge found and did.

    Args:
        remnants (`tuple[Remnant, ...]`): Every place found.
        problems (`tuple[str, ...]`): What was refused or could not be removed, one sentence each.
    """

    remnants: tuple[Remnant, ...]
    problems: tuple[str, ...] = ()

    def size(self, *actions: str) -> int:
        """Bytes of the remnants that one of the actions is for."""
        return sum(remnant.bytes for remnant in self.remnants if remnant.action in actions)


def take_inventory(
    path: str | os.PathLike[str],
    dataset_caches: Sequence[str | os.PathLike[str]] | None = None,
    repo_id: str | None = None,
    consent: Iterable[str | os.PathLike[str]] = (),
) -> Purge:
    """
    List every place of a run that may still hold deleted data or weights. Nothing is changed.

    Args:
        path (`str` or `os.PathLike`): The folder of the system.
        dataset_caches (sequence of paths, *optional*): Where to look for caches of datasets; the datasets library's
            cache if not given. The folder that holds the system's is looked at in any case.
        repo_id (`str`, *optional*): The system's repository on the Hub. Copies that the cache holds of it are found
            without, where they have the system's config.
        consent (iterable of paths): Places outside the system, or not known to be condemned, that shall be removed.
            The folder of a dataset stands for the cache files directly in it.

    Returns:
        [`Purge`]: The remnants, with what [`purge`] would do to each as their action.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the folder holds symbolic links or no intact system, or a place in `consent`
            is none that may be removed.
    """
    folder, given = open_folder(path, read_only=True), Path(path)
    caches = [_datasets_cache()] if dataset_caches is None else map(Path, dataset_caches)
    remnants: dict[str, Remnant] = {}
    for found in (_condemned(folder, given), _beside_stages(given), _outside(given, caches)):
        for remnant in found:
            # A place may be found twice, where one folder looked at lies in another.
            remnants.setdefault(os.path.abspath(remnant.path), remnant)
    for remnant in _in_hub_cache(folder.record, repo_id):
        remnants[os.path.abspath(remnant.path)] = remnant
    problems = [f"{link} is a symbolic link and was not followed. Look where it leads." for link in _links(given)]
    return Purge(tuple(_with_consent(remnants, consent).values()), tuple(problems))


def purge(
    path: str | os.PathLike[str],
    dataset_caches: Sequence[str | os.PathLike[str]] | None = None,
    repo_id: str | None = None,
    consent: Iterable[str | os.PathLike[str]] = (),
) -> Purge:
    """
    Remove what deletions condemned and what interrupted writes left in a system's folder, and what consent names.

    Args:
        path (`str` or `os.PathLike`): The folder of the system.
        dataset_caches (sequence of paths, *optional*): As in [`take_inventory`].
        repo_id (`str`, *optional*): As in [`take_inventory`].
        consent (iterable of paths): As in [`take_inventory`].

    Returns:
        [`Purge`]: Every place found, with what was done to it.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If the folder holds symbolic links or no intact system, or a place in `consent`
            is none that may be removed. Nothing is removed then.
    """
    inventory = take_inventory(path, dataset_caches, repo_id, consent)
    # Opening finishes the removals that the ledger asks for.
    folder = open_folder(path)
    folder.remove_finished_checkpoints()
    end_dead_claims(folder)
    problems = list(inventory.problems)
    done = tuple(_carried_out(remnant, problems) for remnant in inventory.remnants)
    return Purge(done, tuple(problems))


def _carried_out(remnant: Remnant, problems: list[str]) -> Remnant:
    if remnant.action == "keep":
        return remnant
    if remnant.kind == "rows":
        return replace(remnant, action="rewritten")
    if remnant.kind not in _CONDEMNED:
        try:
            _remove(remnant.path)
        except OSError as error:
            problems.append(f"{remnant.path} could not be removed ({error.strerror or error}). Remove it by hand.")
    elif os.path.lexists(remnant.path):
        problems.append(
            f"{remnant.path} is still there: someone is writing it, or its permissions forbid removing it."
        )
    return replace(remnant, action="keep" if os.path.lexists(remnant.path) else "removed")


def _remove(path: Path) -> None:
    """Remove a file or folder, never through a symbolic link."""
    if path.is_symlink():
        raise OSError(f"{path} became a symbolic link")
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# What may go, and what must not


def _with_consent(remnants: dict[str, Remnant], consent: Iterable[str | os.PathLike[str]]) -> dict[str, Remnant]:
    for place in consent:
        address = os.path.abspath(place)
        named = [r for r in remnants.values() if address in map(os.path.abspath, (r.path, r.listed_as))]
        if not named:
            raise FolderError(
                f"Got consent to remove {Path(place)}, which is none of the places found. Name one as a dry run lists "
                "it. Nothing was removed."
            )
        for remnant in named:
            if remnant.kind in _LISTED_ONLY:
                raise FolderError(
                    f"{remnant.path} is a cache that other repositories share and hf-s3t only lists. {remnant.advice} "
                    "Nothing was removed."
                )
            if remnant.action == "keep":
                remnants[os.path.abspath(remnant.path)] = replace(remnant, action="remove")
    return remnants


def _remnant(path: Path, kind: str, folder: Path | None = None) -> Remnant:
    action = "rewrite" if kind == "rows" else "remove" if kind in _CONDEMNED else "keep"
    return Remnant(path, kind, _size(path), action, _ADVICE[kind], folder)


# In the system's folder


def _condemned(folder: SystemFolder, path: Path) -> Iterator[Remnant]:
    """What a load removes, and the checkpoints that training would resume from."""
    inspection = inspect(path, adapters=False)
    for condemned in inspection.to_remove:
        yield _remnant(condemned.path, condemned.kind)
    finished = folder.finished_checkpoints()
    for checkpoint in inspection.checkpoints:
        is_finished = checkpoint.parent.absolute() in finished
        yield _remnant(checkpoint, "checkpoint" if is_finished else "resumable checkpoint")


def _beside_stages(path: Path) -> Iterator[Remnant]:
    """What other libraries write into an output folder."""
    for entry in _children(path):
        if entry.name in (STAGES, CHECKPOINTS, CLAIMS):
            continue
        kind = _kind_in_output(entry)
        if kind is not None:
            yield _remnant(entry, kind)
        elif entry.is_dir():
            yield from _rows_below(entry, _below)
        elif _is_cache(entry):
            yield _remnant(entry, "dataset cache")
    # A stage that trains may log below its own checkpoints.
    for entry in _below(path / CHECKPOINTS):
        if is_log(entry.name) and not is_log(entry.parent.name):
            yield _remnant(entry, "tracker logs")


def _kind_in_output(entry: Path) -> str | None:
    if is_log(entry.name):
        return "tracker logs"
    if entry.name == HISTORY:
        return "git history"
    if entry.name.startswith(CHECKPOINT_PREFIX):
        return "foreign checkpoint"
    if entry.name.startswith(("optimizer.", "scheduler.", "global_step", "rng_state")):
        return "optimizer state"
    return "saved dataset" if _is_saved_dataset(entry) else None


# Outside of it


def _outside(path: Path, caches: Iterable[Path]) -> Iterator[Remnant]:
    name, parent = os.path.basename(os.path.abspath(path)), _parent(path)
    baseline = parent / f"{name}{BASELINE_SUFFIX}"
    if baseline.is_dir() and not baseline.is_symlink():
        yield _remnant(baseline, "baseline")
    for cache in caches:
        yield from _rows_below(cache, _below)
    # Beside the output folder, and one level down: further, this could be anybody's home.
    for entry in _children(parent):
        if _is_cache(entry):
            yield _remnant(entry, "dataset cache")
        elif entry.is_dir() and entry.name not in (name, baseline.name):
            yield from _rows_below(entry, _children)


def _rows_below(folder: Path, below: Callable[[Path], Iterable[Path]]) -> Iterator[Remnant]:
    """Caches of datasets and saved datasets in a folder, which may be one itself."""
    if _is_saved_dataset(folder):
        yield _remnant(folder, "saved dataset")
    for entry in below(folder):
        if _is_cache(entry):
            yield _remnant(entry, "dataset cache", folder=entry.parent)
        elif _is_saved_dataset(entry):
            yield _remnant(entry, "saved dataset")


def _is_cache(entry: Path) -> bool:
    return entry.name.startswith("cache-") and entry.suffix == ".arrow" and entry.is_file()


def _is_saved_dataset(entry: Path) -> bool:
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote a folder."""
    one = (entry / "state.json").is_file() and (entry / "dataset_info.json").is_file()
    return one or (entry / "dataset_dict.json").is_file()


def _datasets_cache() -> Path:
    # As the datasets library finds it, which is slow to import.
    return Path(os.environ.get("HF_DATASETS_CACHE") or Path(hub_constants.HF_HOME) / "datasets")


# The caches of the Hub's client


def _in_hub_cache(record: Mapping[str, Any], repo_id: str | None) -> Iterator[Remnant]:
    cache = Path(hub_constants.HF_HUB_CACHE)
    named = None if repo_id is None else f"models--{repo_id.replace('/', '--')}"
    repositories = [
        entry
        for entry in _children(cache)
        if entry.name.startswith("models--") and (entry.name == named or _holds_system(entry, record))
    ]
    for repository in repositories:
        yield _remnant(repository, "Hub cache")
    xet = Path(hub_constants.HF_XET_CACHE)
    if repositories and xet.is_dir():
        yield _remnant(xet, "Xet cache")


def _holds_system(repository: Path, record: Mapping[str, Any]) -> bool:
    """Whether the cache of a repository has a version of the system, in whatever format."""
    return any(_is_of_system(config, record) for config in repository.glob(f"snapshots/*/{CONFIG_FILE}"))


def _is_of_system(config: Path, record: Mapping[str, Any]) -> bool:
    with contextlib.suppress(OSError):
        if config.is_file() and config.stat().st_size <= _LARGEST_CONFIG:
            return is_same_system(read_checked_json(config), record)
    return False


# Files


def _children(folder: Path) -> list[Path]:
    """The entries of a folder but symbolic links; nothing where it cannot be read."""
    try:
        return [entry for entry in sorted(folder.iterdir()) if not entry.is_symlink()]
    except OSError:
        return []


def _below(folder: Path) -> Iterator[Path]:
    """Everything below a folder but symbolic links."""
    waiting = [folder]
    while waiting:
        entries = _children(waiting.pop())
        yield from entries
        waiting.extend(entry for entry in reversed(entries) if entry.is_dir())


def _links(path: Path) -> list[Path]:
    return [entry for entry in sorted(path.iterdir()) if entry.is_symlink()]


def _size(path: Path) -> int:
    size = 0
    for entry in (path, *_below(path)):
        with contextlib.suppress(OSError):
            size += os.lstat(entry).st_size if entry.is_file() else 0
    return size


def _parent(path: Path) -> Path:
    """The folder above a system's, relative where the system's path is."""
    above = os.path.dirname(os.path.abspath(path))
    return Path(above if path.is_absolute() else os.path.relpath(above))
