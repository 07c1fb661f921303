"""A worker: holds a trainer, with base and data, and trains the stages that the driver names. It knows no Ray."""

import contextlib
import os
import queue
import shutil
import socket
import tempfile
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from .. import __version__
from ..errors import ConfigError, S3TError
from ..folder.layout import TEMPORARY
from ..folder.secret import KEY_VARIABLE
from ..folder.versions import library_versions
from ..plan.stages import StageKey
from ..training.audit import verify_stages
from ..training.elsewhere import ELSEWHERE
from ..training.trainer import S3TTrainerMixin
from .parcels import Parcel, pack_stage, pack_system, take_in, unpack_stages, unpack_system


# A worker's own folder, where it does not share the system's; beside the folder of the same name, its lock.
_PREFIX = "hf-s3t-worker-"


class Worker:
    """
    One worker. Its methods return JSON types and bytes, and errors as such: `{"error": ..., "message": ...}`.

    All that a trainer does is done in one thread, so that others can ask how far it is, and tell what was deleted.

    Args:
        directory (`str`): The driver's working directory, where this machine has it.
        secret (`str`, *optional*): What `HF_S3T_KEY` is where the driver runs.
    """

    def __init__(self, directory: str, secret: str | None):
        if os.path.isdir(directory):
            os.chdir(directory)
        os.environ.pop(KEY_VARIABLE, None)
        if secret is not None:
            os.environ[KEY_VARIABLE] = secret
        # What the trainer does, it does in this thread.
        self._hand = ThreadPoolExecutor(1, "hf-s3t-stage")
        self._given: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._place: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._made: Future[S3TTrainerMixin] | None = None
        self._trainer: S3TTrainerMixin | None = None
        self._own: Path | None = None
        self._own_lock: FileLock | None = None

    def greet(self) -> dict[str, Any]:
        """Who this is, before anything is loaded."""
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "hf_s3t": __version__,
            "versions": library_versions(),
        }

    # A trainer

    def begin(self, make_trainer: Callable[[], Any]) -> dict[str, Any]:
        """Load base and data, up to where a trainer asks for its folder; tells the `output_dir` that was given."""
        self._made = self._hand.submit(self._make, make_trainer)
        while True:
            with contextlib.suppress(queue.Empty):
                return {"output_dir": self._given.get(timeout=0.05)}
            if self._made.done():
                return self._told(lambda: self._refuse_no_trainer(self._made))

    def _make(self, make_trainer: Callable[[], Any]) -> Any:
        places: dict[str, str] = {}

        def place(output_dir: str) -> str:
            if not places:
                self._given.put(output_dir)
                places[output_dir] = self._place.get()
            return places.get(output_dir, output_dir)

        with ELSEWHERE.holding(place):
            return make_trainer()

    def _refuse_no_trainer(self, made: "Future[Any] | None") -> dict[str, Any]:
        found = made.result() if made is not None else None
        raise ConfigError(
            f"`make_trainer` returned {type(found).__name__}, expected an S3TTrainer or S3TSFTTrainer that it makes "
            "when it is called. Have it load base and data, and return a new trainer."
        )

    def sees(self, path: str, nonce: str) -> bool:
        """Whether the driver's folder is one here too, with what the driver put there."""
        try:
            return Path(path).read_text(encoding="utf-8") == nonce
        except OSError:
            return False

    def make(self, folder: str | None, system: Parcel | None, threads: int | None) -> dict[str, Any]:
        """
        Have the trainer.

        Args:
            folder (`str`, *optional*): The system's folder; `None` where this worker has one of its own.
            system (`Parcel`, *optional*): The system, for a folder of its own.
            threads (`int`, *optional*): With how many to compute, so that sums are as they were.

        Returns:
            By what the trainer trains; and of a system that it made in a folder of its own, the files.
        """

        def made() -> dict[str, Any]:
            if self._made is None:
                raise S3TError("A worker was told of its folder before its trainer. Call `begin` first.")
            place = folder if folder is not None else str(self._folder_of_its_own(system))
            self._place.put(place)
            trainer = self._made.result()
            if not isinstance(trainer, S3TTrainerMixin):
                self._refuse_no_trainer(self._made)
            if str(trainer.folder.path) != str(Path(place).absolute()):
                raise ConfigError(
                    f"`make_trainer` returned a trainer of {trainer.folder.path}, expected one that it made itself, "
                    f"of {place}. Have it make one trainer, and return it."
                )
            self._trainer = trainer
            statement = self._hand.submit(self._settled, trainer, threads).result()
            statement["folder"] = {
                "system_id": trainer.folder.record["system_id"],
                "lines": len(trainer.folder.ledger.lines),
            }
            statement["empty"] = self._empty()
            statement["shows"] = not trainer.args.disable_tqdm
            statement["pushes"] = bool(trainer.args.push_to_hub)
            if folder is None and system is None:
                statement["system"] = dict(pack_system(trainer.folder))
            return statement

        return self._told(made)

    def _settled(self, trainer: S3TTrainerMixin, threads: int | None) -> dict[str, Any]:
        if threads is not None:
            torch.set_num_threads(threads)
        return trainer._begin_assigned()

    def _folder_of_its_own(self, system: Parcel | None) -> Path:
        remove_folders_of_the_dead(Path(tempfile.gettempdir()))
        path = Path(tempfile.gettempdir(), f"{_PREFIX}{uuid.uuid4().hex}")
        # Held as long as this process lives: by it what a killed one left is known. Threads of this one take turns.
        self._own, self._own_lock = path, FileLock(f"{path}.lock", thread_local=False)
        self._own_lock.acquire()
        path.mkdir(mode=0o700)
        if system is not None:
            unpack_system(system, path)
        return path

    # Stages

    def train(self, stage: str, names: Sequence[str], *parcels: Parcel) -> dict[str, Any]:
        """
        Train a stage.

        Args:
            stage (`str`): Its path in the system's folder.
            names (sequence of `str`): The paths of stages that it stands on and this worker lacks, parents first.
            parcels (`Parcel`): Their files.
        """

        def trained() -> dict[str, Any]:
            trainer, key = self._here, StageKey.from_path(stage)
            given = {StageKey.from_path(name): parcel for name, parcel in zip(names, parcels, strict=True)}
            if given:
                unpack_stages(given, trainer.folder)
            told = self._hand.submit(trainer._train_assigned, key).result()
            if told is None:
                return {"is_kept": False}
            files = {"files": dict(pack_stage(trainer.folder, key))} if self._own is not None else {}
            return {"is_kept": True, **told, **files}

        return self._told(trained)

    def verify(self, stages: Sequence[str], names: Sequence[str], *parcels: Parcel) -> dict[str, Any]:
        """Train stages again and compare them; arguments as of `train`, of several stages."""

        def verified() -> dict[str, Any]:
            trainer = self._here
            given = {StageKey.from_path(name): parcel for name, parcel in zip(names, parcels, strict=True)}
            if given:
                unpack_stages(given, trainer.folder)
            keys = [StageKey.from_path(stage) for stage in stages]
            # Not `trainer.verify`: what all workers found is recorded once, by the driver.
            report = self._hand.submit(verify_stages, trainer, keys).result()
            return {
                "stages": list(report.stages),
                "mismatches": report.mismatches,
                "circumstances": {name: list(pair) for name, pair in report.circumstances.items()},
                "trained_here": list(report.trained_here),
                "adapters": report.adapters,
            }

        return self._told(verified)

    def follow(self, ledger: str | None, rows: bytes | None = None) -> dict[str, Any]:
        """
        Take in what was deleted, also while a stage trains, which then ends at its next checkpoint; and what came.

        Args:
            ledger (`str`, *optional*): What the driver's ledger says; `None` where this worker reads it itself.
            rows (`bytes`, *optional*): The driver's table, if rows came.

        Returns:
            The `(shard, slice)` of which nothing is left to train on, and the ids that came and are not here.
        """

        def followed() -> dict[str, Any]:
            folder = self._here.folder
            if ledger is not None:
                take_in(folder, ledger, rows)
            folder.refresh_ledger()
            return {"empty": self._empty(), "lacking": self._here._rows_of_stages.lacking(folder.table)}

        return self._told(followed)

    def share(self) -> float:
        """How much of the stage in training is done."""
        return 0.0 if self._trainer is None else self._trainer._share_of_stage()

    def push(self) -> dict[str, Any]:
        """Bring the system to the Hub, as its arguments say."""

        def pushed() -> dict[str, Any]:
            self._here.folder.refresh()
            self._hand.submit(self._here.push_to_hub).result()
            return {}

        return self._told(pushed)

    def close(self) -> None:
        """Tell trackers that it is over, and leave nothing behind."""
        try:
            if self._trainer is not None:
                self._hand.submit(self._trainer._end_assigned).result()
        finally:
            if self._own is not None and self._own_lock is not None:
                shutil.rmtree(self._own, ignore_errors=True)
                self._own_lock.release()
                Path(self._own_lock.lock_file).unlink(missing_ok=True)

    # Parts

    @property
    def _here(self) -> S3TTrainerMixin:
        if self._trainer is None:
            raise S3TError("This worker has no trainer yet. Have it make one first.")
        return self._trainer

    def _empty(self) -> list[list[int]]:
        return sorted(map(list, self._here._rows_of_stages.empty(self._here.folder.table)))

    def _told(self, work: Callable[[], Mapping[str, Any]]) -> dict[str, Any]:
        """What some work returns, or what it raised, in words: the driver may not have what is needed to read it."""
        try:
            return dict(work())
        except Exception as error:
            told = {"error": type(error).__name__, "message": str(error), "is_ours": isinstance(error, S3TError)}
            return {**told, "where": None if told["is_ours"] else "".join(traceback.format_exception(error)[-4:])}


def remove_folders_of_the_dead(root: Path) -> None:
    """
    Remove what workers left that were killed: nothing of a system stays on a machine that does not share its folder.

    Args:
        root (`Path`): Where workers make their folders.
    """
    for path in root.glob(f"{_PREFIX}*"):
        if not path.is_dir() or path.is_symlink():
            continue
        lock = FileLock(f"{path}.lock")
        with contextlib.suppress(Timeout, OSError):
            with lock.acquire(timeout=0):
                shutil.rmtree(path, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def nonce_beside(folder: Path, nonce: str) -> Path:
    """Where the driver puts what workers shall see; a crash leaves there what the next load removes."""
    return folder / f"{TEMPORARY}cluster-{nonce[:8]}"
