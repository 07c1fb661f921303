"""A cluster of Ray: joined, or started on this machine; whether it has room for workers, and whether it is there."""

import contextlib
import math
import os
import socket
from collections.abc import Iterator, Mapping
from typing import Any

from ..errors import ClusterError, ConfigError, counted


# Read as Ray is imported. It tells nobody that it is used; and a cluster on this machine is seen from here alone: with
# this variable unset a head on Linux takes this machine's outer address, whatever address it is given.
_LOCAL_CLUSTER = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}

# Bytes of the object store of a cluster on one machine, where workers share the folder and send little.
_STORE = 128 * 2**20
_LOCALHOST = "127.0.0.1"
# Seconds that the head may take to answer.
_PATIENCE = 5.0


def load_ray(address: str | None = None) -> Any:
    """
    The module `ray`.

    Args:
        address (`str`, *optional*): Of the cluster that is to be joined; a new one stays on this machine.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it is not installed.
    """
    for name, value in _LOCAL_CLUSTER.items() if address is None else ():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError as error:
        raise ConfigError(
            f"Ray is not there ({error}), which shares stages over a cluster. Install it on every machine by `pip "
            "install hf_s3t[ray]`; without it, processes on one folder share the stages that are missing."
        ) from error
    return ray


def resources_of(resources_per_worker: Mapping[str, float] | None) -> dict[str, float]:
    """
    What a worker takes of a cluster, one CPU where none is named.

    Args:
        resources_per_worker (mapping from `str` to `float`, *optional*): As it was given.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If an amount is no number above 0.
    """
    needs = {"CPU": 1.0, **(resources_per_worker or {})}
    for name, amount in needs.items():
        is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not isinstance(name, str) or not is_number or not 0 <= amount < math.inf or (amount == 0 and name != "CPU"):
            raise ConfigError(
                f"`resources_per_worker` has {name!r}: {amount!r}, expected an amount above 0 such as "
                '{"GPU": 1, "CPU": 4}. Leave out what a worker does not need.'
            )
    return {name: float(amount) for name, amount in needs.items()}


def actor_options(needs: Mapping[str, float]) -> dict[str, Any]:
    """What a worker takes, as the options of an actor."""
    others = {name: amount for name, amount in needs.items() if name not in ("CPU", "GPU", "memory")}
    return {
        "num_cpus": needs["CPU"],
        "num_gpus": needs.get("GPU", 0),
        **({"memory": needs["memory"]} if "memory" in needs else {}),
        **({"resources": others} if others else {}),
    }


def room_for(nodes: list[Mapping[str, Any]], needs: Mapping[str, float]) -> int:
    """
    How many workers a cluster has room for.

    Args:
        nodes (list of mappings): What each machine has, in all.
        needs (mapping from `str` to `float`): What a worker takes.
    """
    # A sum of tenths may lack a little.
    return sum(
        min(math.floor(node.get(name, 0.0) / amount + 1e-6) for name, amount in needs.items() if amount)
        for node in nodes
    )


@contextlib.contextmanager
def joined(address: str | None, num_workers: int, needs: Mapping[str, float]) -> Iterator[Any]:
    """
    Be in a cluster: the one at an address, the one that this process is in already, or a new one on this machine.

    Args:
        address (`str`, *optional*): `"auto"`, or host and port of the head.
        num_workers (`int`): How many workers there shall be.
        needs (mapping from `str` to `float`): What each takes.

    Yields:
        The module `ray`.

    Raises:
        [`~hf_s3t.errors.ClusterError`]: If there is no such cluster, or it has no room for the workers.
    """
    ray = load_ray(address)
    is_ours = not ray.is_initialized()
    if is_ours:
        _join(ray, address, num_workers, needs)
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        room = room_for(nodes, needs)
        if room < num_workers:
            wanted = ", ".join(f"{name} {amount:g}" for name, amount in needs.items())
            raise ClusterError(
                f"The cluster has room for {counted(room, 'worker')} of {wanted} each on "
                f"{counted(len(nodes), 'machine')}, expected {num_workers}. Ask for fewer by `num_workers`, or for "
                "less by `resources_per_worker`."
            )
        yield ray
    finally:
        if is_ours:
            ray.shutdown()


def _join(ray: Any, address: str | None, num_workers: int, needs: Mapping[str, float]) -> None:
    quiet = {"logging_level": "error", "log_to_driver": True}
    if address is not None:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            raise ClusterError(
                f"No cluster of Ray answers at `address={address!r}`: {str(error).splitlines()[0]} Start its head by "
                "`ray start --head`, and give host and port, or leave the address out for a cluster on this machine."
            ) from error
        return
    others = {name: amount * num_workers for name, amount in needs.items() if name not in ("CPU", "GPU", "memory")}
    # A variable that names a cluster would have it joined.
    ray.init(
        address="local",
        num_cpus=math.ceil(needs["CPU"] * num_workers),
        resources=others or None,
        object_store_memory=_STORE,
        include_dashboard=False,
        _node_ip_address=_LOCALHOST,
        **quiet,
    )


def head_of(ray: Any) -> str:
    """Host and port of the head of the cluster that this process is in."""
    return str(ray.get_runtime_context().gcs_address)


def is_head_there(head: str) -> bool:
    """Whether the head takes connections: Ray itself ends the process when it has waited long enough for it."""
    host, _, port = head.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_PATIENCE):
            return True
    except OSError:
        return False
