"""
The stages of a system, and audits of them, over the workers of a cluster of Ray.

- `running`: `train_on_ray` and `verify_on_ray`.
- `driving`: the driver, which knows neither Ray nor folders: hands out, takes in, goes on where workers die.
- `desk`: what it knows of the system, and where stages are written that come over the network.
- `audits`: what it knows of an audit.
- `ray_pool`: workers as actors of Ray.
- `ray_cluster`: a cluster that is joined or started, its room, its head.
- `worker`: what is done in a worker, by a trainer that holds base and data.
- `agreement`: whether workers make the same stages, and on hardware of the same kind.
- `parcels`: what goes between machines that share no folder.
"""

from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from .running import train_on_ray, verify_on_ray

__all__ = ["train_on_ray", "verify_on_ray"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import running

    return getattr(running, name)
