"""What the tests with systems on the local Hub share; their fixtures are in `conftest.py`."""

from functools import partial
from pathlib import Path

import torch

from hf_s3t import S3TModel
from hf_s3t.hub.card import description
from hf_s3t.hub.pushing import push
from support.tiny import lm_rows, make_trainer, plant_stages, s3t_config, tiny_llama


ROWS = lm_rows(24)
SETTINGS = {"num_shards": 2, "num_slices": 2, "partition": "balanced"}


def plant(path, rows=ROWS, **settings) -> Path:
    """A system with a stage of random tensors for every planned one."""
    trainer = make_trainer(path, rows=rows, config=s3t_config(**{**SETTINGS, **settings}))
    plant_stages(trainer)
    return trainer.folder.path


def send(folder, repo, **more):
    return push(folder, repo, partial(description, repo_id=repo.repo_id), **more)


def load(repo, **more):
    return S3TModel.from_pretrained(repo.repo_id, base_model=tiny_llama(), **more)


def files_on(repo, revision="main"):
    return set(repo.api.list_repo_files(repo.repo_id, revision=revision))


def member(folder, shard=0, slice_=0):
    return folder.table.members(shard, slice_)[0]


def on_disk(path) -> list[bytes]:
    """Every file of the server's folder of a repository."""
    return [file.read_bytes() for file in path.rglob("*") if file.is_file()]


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ROWS[0]["input_ids"]])).logits
