"""Training and audits of a recipe over the workers of a Ray cluster, where `--ray_workers` asks for some."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_s3t.baselines import Method
from hf_s3t.cluster import train_on_ray, verify_on_ray
from hf_s3t.errors import ConfigError
from hf_s3t.training.audit import VerificationReport


@dataclass
class RayArguments:
    """How many workers share what is to be trained, and where."""

    ray_workers: int | None = field(
        default=None, metadata={"help": "Train, and audit, over so many workers of a Ray cluster."}
    )
    ray_address: str | None = field(
        default=None, metadata={"help": "Of the cluster: auto, or host:port; one on this machine if not given."}
    )


def check_workers(script: RayArguments) -> None:
    """
    Refuse numbers of workers that are none.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming the option.
    """
    if script.ray_workers is not None and script.ray_workers < 1:
        raise ConfigError(f"`--ray_workers {script.ray_workers}` would leave none. Give 1 or more, or leave it out.")
    if script.ray_address is not None and script.ray_workers is None:
        raise ConfigError("`--ray_address` names a cluster, and no workers are asked for. Give `--ray_workers` too.")


def train_over_workers(
    method: Method, script: RayArguments, make_method: Callable[..., Method], *arguments: Any
) -> None:
    """
    Train what a method lacks, by this process or over workers, which make it anew.

    Args:
        method ([`~hf_s3t.baselines.Method`]): The method.
        script ([`RayArguments`]): Whether there are workers.
        make_method (callable): A function of a module that makes the method.
        arguments: What it is called with, sent to each worker.
    """
    if script.ray_workers is not None:
        train_on_ray(_Maker(make_method, *arguments), **_cluster(script, method.trainer.args.device))
        # What others trained is taken in, by what comes next.
        method.trainer.folder.refresh()
    method.train()


def audit_over_workers(
    device: torch.device, stages: Any, script: RayArguments, make_method: Callable[..., Method], *arguments: Any
) -> VerificationReport:
    """
    The audit over workers, which have trained nothing.

    Args:
        device (`torch.device`): What the system was trained on.
        stages: As of `S3TTrainer.verify`.
        script ([`RayArguments`]): How many workers there are.
        make_method (callable): A function of a module that makes the method.
        arguments: What it is called with, sent to each worker.
    """
    return verify_on_ray(_Maker(make_method, *arguments), stages, **_cluster(script, device))


class _Maker:
    """Makes the trainer of a method, in a worker."""

    def __init__(self, make_method: Callable[..., Method], *arguments: Any):
        self._make_method, self._arguments = make_method, arguments

    def __call__(self) -> Any:
        return self._make_method(*self._arguments).trainer


def _cluster(script: RayArguments, device: torch.device) -> dict[str, Any]:
    """A GPU for each worker where this process trains on one; else as many CPUs as it computes with threads."""
    needs = {"GPU": 1} if device.type == "cuda" else {"CPU": torch.get_num_threads()}
    return {"num_workers": script.ray_workers, "resources_per_worker": needs, "address": script.ray_address}
