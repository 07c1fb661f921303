"""A system for workers of a cluster, made in the worker; and what stands in for Ray where no stage is trained."""

import contextlib
import copy
import functools
import os
import threading
import time
from concurrent.futures import ALL_COMPLETED, FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch
from datasets import Dataset
from transformers import TrainerCallback

from support.tiny import lm_rows, lora, make_trainer, s3t_config, tiny_llama, training_arguments


ROWS = lm_rows(32)
_ONE_AT_A_TIME = threading.Lock()


@functools.cache
def _base(seed):
    return tiny_llama(3, seed=seed)


class Slowly(TrainerCallback):
    """Waits in every step, and says in a file who trains what."""

    def __init__(self, folder: str, seconds: float):
        self.folder, self.seconds = folder, seconds

    def on_step_begin(self, args, state, control, **kwargs):
        Path(self.folder, f"step-{os.getpid()}").touch()
        time.sleep(self.seconds)


class System:
    """Makes the trainer of one small system; what `changes` names is another system's."""

    def __init__(self, folder, notes=None, **changes):
        self.folder, self.notes, self.changes = str(folder), notes, changes
        # Threads of one process draw from one generator, so that nothing is drawn in them.
        _base(changes.get("base", 0))

    def __call__(self):
        # Two trainers that are made at once, in one process, would set up one state of Accelerate.
        with _ONE_AT_A_TIME:
            return self._made()

    def _made(self):
        changes = self.changes
        model = copy.deepcopy(_base(changes.get("base", 0))).to(changes.get("dtype", torch.float32))
        rows = changes.get("rows", ROWS)
        callbacks = [] if self.notes is None else [Slowly(str(self.notes), changes.get("seconds", 0.0))]
        return make_trainer(
            self.folder,
            model,
            Dataset.from_list(rows) if isinstance(rows, list) else rows,
            args=training_arguments(self.folder, learning_rate=changes.get("rate", 1e-2)),
            peft_config=lora(model, lora_dropout=0.2),
            config=s3t_config(num_shards=2, num_slices=3, budget=2, partition=changes.get("partition", "hashed")),
            callbacks=callbacks,
        )


def adapters_of(path):
    """The bytes of all adapters of a system."""
    files = Path(path).glob("stages/*/*/adapter_model.safetensors")
    return {f"{file.parent.parent.name}/{file.parent.name}": file.read_bytes() for file in files}


# Ray in threads


class _Errors:
    class RayError(Exception):
        pass

    class GetTimeoutError(RayError):
        pass

    class RayTaskError(RayError):
        pass


class ThreadRay:
    """What is used of Ray, by threads of this process. Its workers share what is global: no stage is trained here."""

    exceptions = _Errors

    def __init__(self):
        self.actors = []

    def remote(self, **options):
        def made(kind):
            return _Kind(self, kind)

        return made

    def put(self, value):
        return value

    def get(self, call, timeout=None):
        try:
            return call.result(timeout)
        except _Killed as killed:
            raise _Errors.RayError("The actor died.\nIt was killed.") from killed

    def wait(self, calls, num_returns=1, timeout=None):
        done, left = wait(calls, timeout, ALL_COMPLETED if num_returns == len(calls) else FIRST_COMPLETED)
        return list(done), list(left)

    def kill(self, actor):
        actor.die()

    def get_runtime_context(self):
        return self

    gcs_address = "127.0.0.1:1"


class _Killed(Exception):
    pass


class _Kind:
    def __init__(self, ray, kind):
        self.ray, self.kind = ray, kind

    def remote(self, *arguments):
        actor = _Actor(self.kind(*arguments))
        self.ray.actors.append(actor)
        return actor


class _Actor:
    def __init__(self, worker):
        self.worker, self.threads, self.is_dead = worker, ThreadPoolExecutor(4), False
        self.calls = []

    def die(self):
        self.is_dead = True
        for call in self.calls:
            with contextlib.suppress(Exception):
                call.set_exception(_Killed())
        # One that waits for its folder waits no longer: a process would be gone.
        self.worker._place.put("/dev/null/gone")
        self.threads.shutdown(wait=False)

    def __getattr__(self, name):
        return _Method(self, name)


class _Method:
    def __init__(self, actor, name):
        self.actor, self.name = actor, name

    def remote(self, *arguments):
        call: Future = Future()
        self.actor.calls.append(call)
        if self.actor.is_dead:
            call.set_exception(_Killed())
            return call

        def work():
            try:
                found = getattr(self.actor.worker, self.name)(*arguments)
            except Exception as error:
                found = error
            with contextlib.suppress(Exception):
                call.set_exception(found) if isinstance(found, Exception) else call.set_result(found)

        self.actor.threads.submit(work)
        return call
