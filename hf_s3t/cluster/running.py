"""Training and audits on a cluster of Ray."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from transformers.trainer_utils import TrainOutput

from ..checks import require_int
from ..errors import ConfigError
from ..folder.status import serving_depths
from ..plan.stages import StageKey
from ..training.audit import VerificationReport, choose_stages, keep_report
from .audits import AuditDesk, AuditPool
from .desk import ShownDesk
from .driving import Driver, Tally
from .ray_cluster import joined, resources_of
from .ray_pool import RayPool, Terms


def train_on_ray(
    make_trainer: Callable[[], Any],
    num_workers: int = 1,
    resources_per_worker: Mapping[str, float] | None = None,
    address: str | None = None,
    *,
    shared_folder: bool | None = None,
    same_kind: bool = False,
    runtime_env: Mapping[str, Any] | None = None,
) -> TrainOutput:
    """
    Make every planned stage of a system exist, by the workers of a cluster of Ray; what is there is not trained.

    The driver, this process, holds neither base nor data. It hands stages out as those arrive on which they stand, the
    worthiest first. A stage is the same to the bit whoever trains it, as long as the workers are of one kind; that is
    compared with the stages that are there. A worker that dies costs the time of its stage; what is deleted meanwhile
    is discarded as in `train()`.

    Args:
        make_trainer (callable):
            Makes a trainer, [`S3TTrainer`] or [`S3TSFTTrainer`], with base and data. It is called once in each worker,
            and must do the same in each. `output_dir` is taken as the driver's, from its working directory.
        num_workers (`int`, defaults to 1): Workers, each a process with a trainer.
        resources_per_worker (mapping from `str` to `float`, *optional*):
            What a worker takes of the cluster, such as `{"GPU": 1, "CPU": 4}`; one CPU if not given. Without a GPU a
            worker computes with as many threads as it has CPUs, or as the stages that are there were trained with.
        address (`str`, *optional*):
            `"auto"`, or host and port of the head of a cluster. If not given, the one that this process is in, or a
            new one on this machine, at 127.0.0.1.
        shared_folder (`bool`, *optional*):
            Whether the workers share `output_dir`, and write their stages there themselves. If not, stages go to and
            fro over the network, each worker works on a folder of its own, which it removes, and the driver alone
            writes. Found out if not given.
        same_kind (`bool`, defaults to `False`):
            Refuse workers of another CPU capability, GPU, number of threads or versions of libraries than recorded;
            otherwise they are told of.
        runtime_env (mapping, *optional*): As in Ray: packages and variables of the workers.

    Returns:
        [`~transformers.trainer_utils.TrainOutput`]: As of `S3TTrainer.train`; among the metrics too `workers`,
        `deaths` of workers, and `seconds_to_start`, until the first stage was handed out.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If Ray is not installed or an argument is out of range.
        [`~hf_s3t.errors.ClusterError`]:
            If there is no cluster, or no room in it; if workers have another hf_s3t, recipe or dataset than each
            other, or only some see the folder; if one stage costs one worker after the other, or the head is lost.
        [`~hf_s3t.errors.ExampleIdError`]: If another process added rows meanwhile, which no worker has.
        [`~hf_s3t.errors.S3TError`]: What making a trainer or training raises in a worker, which is named.

    Example:

    ```python
    from hf_s3t.cluster import train_on_ray

    def make_trainer():
        return S3TTrainer(load_base(), TrainingArguments(output_dir="llama-s3t"), train_dataset=load_rows(), ...)

    train_on_ray(make_trainer, num_workers=8, resources_per_worker={"GPU": 1}, address="auto")
    ```
    """
    started = time.perf_counter()
    needs = _checked(make_trainer, num_workers, resources_per_worker)
    with joined(address, num_workers, needs) as ray:
        pool = RayPool(ray, make_trainer, num_workers, needs, Terms(shared_folder, same_kind), runtime_env)
        with _closing(pool):
            pool.come_in()
            desk = ShownDesk(pool.folder, pool.is_shared, pool.empty, pool.shares, pool.is_shown)
            driver = Driver(desk, pool)
            ready = time.perf_counter()
            try:
                tally = driver.run()
            finally:
                desk.close()
            if tally.trained:
                pool.push()
            metrics = {"seconds_to_start": ready - started, "workers": num_workers}
            output = _output(desk, tally, metrics, time.perf_counter() - ready)
            pool.refuse_rows_that_came()
            return output


def verify_on_ray(
    make_trainer: Callable[[], Any],
    stages: str | Sequence[StageKey | str] | None = None,
    num_workers: int = 1,
    resources_per_worker: Mapping[str, float] | None = None,
    address: str | None = None,
    *,
    shared_folder: bool | None = None,
    runtime_env: Mapping[str, Any] | None = None,
) -> VerificationReport:
    """
    The audit of `S3TTrainer.verify`, spread over the workers of a cluster of Ray, which have trained none of it.

    What stands on one first stage is trained again by one worker.

    Args:
        make_trainer (callable): As of [`train_on_ray`].
        stages (`"sample"` or a list of stages, *optional*): As of `S3TTrainer.verify`.
        num_workers (`int`, defaults to 1): As of [`train_on_ray`], like those that follow.
        resources_per_worker (mapping from `str` to `float`, *optional*): As of [`train_on_ray`].
        address (`str`, *optional*): As of [`train_on_ray`].
        shared_folder (`bool`, *optional*): As of [`train_on_ray`].
        runtime_env (mapping, *optional*): As of [`train_on_ray`].

    Returns:
        [`~hf_s3t.training.audit.VerificationReport`]: What was found, of all workers.

    Raises:
        [`~hf_s3t.errors.S3TError`]: As [`train_on_ray`] and `S3TTrainer.verify`.

    Example:

    ```python
    from hf_s3t.cluster import verify_on_ray

    report = verify_on_ray(make_trainer, num_workers=8, resources_per_worker={"GPU": 1}, address="auto")
    print(report)
    ```
    """
    needs = _checked(make_trainer, num_workers, resources_per_worker)
    with joined(address, num_workers, needs) as ray:
        pool = AuditPool(ray, make_trainer, num_workers, needs, Terms(shared_folder, same_kind=False), runtime_env)
        with _closing(pool):
            pool.come_in()
            started = time.perf_counter()
            desk = AuditDesk(choose_stages(stages, pool.folder.current_stages))
            pool.chains = desk.chains
            Driver(desk, pool).run()
            report = desk.report(time.perf_counter() - started)
            keep_report(pool.folder, report)
            return report


def _checked(
    make_trainer: Callable[[], Any], num_workers: int, resources_per_worker: Mapping[str, float] | None
) -> dict[str, float]:
    """What a worker takes, when all arguments are checked."""
    if not callable(make_trainer):
        raise ConfigError(
            f"`make_trainer` is {type(make_trainer).__name__}, expected a function without arguments that makes a "
            "trainer. Base and data are loaded in each worker, by that."
        )
    require_int("num_workers", num_workers, 1)
    return resources_of(resources_per_worker)


@contextlib.contextmanager
def _closing(pool: RayPool) -> Iterator[None]:
    try:
        yield
    finally:
        pool.close()


def _output(desk: ShownDesk, tally: Tally, metrics: Mapping[str, float], seconds: float) -> TrainOutput:
    folder = desk.folder
    folder.refresh()
    left, steps = desk.plan(()).stages, sum(told["steps"] for told in tally.results)
    loss = sum(told["loss"] * told["steps"] for told in tally.results) / steps if steps else 0.0
    valid = folder.valid_stages
    told = {
        "train_runtime": seconds,
        "train_loss": loss,
        "stages_trained": len(tally.trained),
        "stages_left": len(left),
        "work_left": folder.growth.work(left),
        "depth": fmean(serving_depths(folder, valid)),
        "expected_depth": folder.growth.expected_depth(valid),
        "deaths": tally.deaths,
        **metrics,
    }
    return TrainOutput(steps, loss, told)
