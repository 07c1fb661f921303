"""`--ray_workers`: workers that make the method anew train what is missing, and the recipe goes on from there."""

import pytest
import torch
from common import workers
from common.workers import RayArguments, check_workers

from hf_s3t.errors import ConfigError


class Folder:
    def __init__(self, told):
        self.refresh = lambda: told.append("refreshed")


class Method:
    """A method that only tells what was asked of it."""

    def __init__(self, told):
        self.told = told
        args = type("Args", (), {"device": torch.device("cpu")})
        self.trainer = type("Trainer", (), {"args": args, "folder": Folder(told)})

    def train(self):
        self.told.append("trained")


def test_workers_train_first_and_the_method_takes_in_what_they_made(monkeypatch):
    told = []

    def train_on_ray(make_trainer, **cluster):
        told.append(cluster)
        # As in a worker: by a function of a module and its arguments.
        assert make_trainer() is made.trainer

    made = Method([])
    monkeypatch.setattr(workers, "train_on_ray", train_on_ray)
    workers.train_over_workers(Method(told), RayArguments(2, "auto"), lambda one: one, made)
    cluster = {"num_workers": 2, "resources_per_worker": {"CPU": torch.get_num_threads()}, "address": "auto"}
    assert told == [cluster, "refreshed", "trained"]


def test_without_workers_the_method_trains_alone(monkeypatch):
    monkeypatch.setattr(workers, "train_on_ray", lambda *args, **more: pytest.fail("no worker was asked for"))
    told = []
    workers.train_over_workers(Method(told), RayArguments(), lambda: None)
    assert told == ["trained"]


@pytest.mark.parametrize(
    "script, says",
    [
        (RayArguments(0), r"`--ray_workers 0` would leave none"),
        (RayArguments(None, "auto"), "Give `--ray_workers` too"),
    ],
)
def test_workers_that_are_none_are_refused(script, says):
    with pytest.raises(ConfigError, match=says):
        check_workers(script)
