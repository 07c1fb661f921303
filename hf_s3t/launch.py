"""Makes `accelerate launch --num_processes N --cpu` mean N processes also where there is no MPI."""

import atexit
import os
import sys
from itertools import pairwise

import psutil


_RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")
_OPTIONS = ("--num_processes", "--num-processes")


def start_cpu_processes() -> None:
    """
    Replace this process by as many as the launcher was asked for, if it started one instead.

    Without MPI, Accelerate's launcher starts a single process for `--cpu`, whatever `--num_processes` says. Call this
    first thing in a script: where that is what happened, it runs the script again under `torchrun` with the processes
    that were asked for. These leave their group when the script ends, without which the interpreter may abort.

    Example:

    ```python
    from hf_s3t.launch import start_cpu_processes

    if __name__ == "__main__":
        start_cpu_processes()
        main()
    ```
    """
    count = asked_for()
    if count > 1:
        script = os.path.abspath(sys.argv[0])
        command = ["-m", "torch.distributed.run", "--nproc_per_node", str(count), "--master_port", _port(), script]
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *command, *sys.argv[1:]])
    if any(name in os.environ for name in _RANKS):
        atexit.register(_leave_group)


def _leave_group() -> None:
    # Whoever is in a group has loaded this.
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def asked_for() -> int:
    """The `--num_processes` of a launcher that started only this one; 1 if there is none."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    # The launcher sets a port only when more than one process was asked for.
    if not on_cpu or "MASTER_PORT" not in os.environ or any(name in os.environ for name in _RANKS):
        return 1
    parent = psutil.Process().parent()
    words = [part for word in (parent.cmdline() if parent else []) for part in word.split("=", 1)]
    for option, value in pairwise(words):
        if option in _OPTIONS and value.isdigit():
            return int(value)
    return 1


def _port() -> str:
    return os.environ["MASTER_PORT"]
