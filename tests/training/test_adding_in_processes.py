"""Rows that are added and replaced in data-parallel processes: once, for all of them, and to the bit."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from datasets import Dataset
from support.launched import launched
from support.tiny import make_trainer, rows_for, s3t_config, tiny_llama

from hf_s3t import launch
from hf_s3t.errors import ContentChangedError, S3TError
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.plan.stages import StageKey
from hf_s3t.training import plan_run


ROWS = rows_for(tiny_llama(), 24)
FIRST, MORE = ROWS[:12], ROWS[12:18]
EDITED = {**FIRST[3], "labels": FIRST[4]["labels"]}
GROWN = [EDITED if row is FIRST[3] else row for row in (*FIRST, *MORE)]


def trainer_of(path, rows, **settings):
    return make_trainer(path, tiny_llama(3), rows=rows, config=s3t_config(num_slices=2, budget=1, **settings))


def grow(path):
    """A system that rows come to in all processes, and after it one that had them from the start."""
    trainer = trainer_of(path / "grown", FIRST, num_shards=1, partition="balanced")
    trainer.train()
    with pytest.raises(ContentChangedError, match="Nothing was added"):
        trainer.add_examples(Dataset.from_list([EDITED, *MORE]), into="slices")
    planned = trainer.add_examples(Dataset.from_list(MORE), into="slices", dry_run=True)
    added = trainer.add_examples(Dataset.from_list(MORE), into="slices")
    assert (added.slices, added.stages) == (planned.slices, planned.stages) and added.added == len(MORE)
    assert trainer.replace_examples(Dataset.from_list([EDITED])).replaced == 1
    trainer.train()
    assert trainer.verify([trainer.folder.plan.stages()[0]]).ok

    places = trainer.folder.table.places_of([row["id"] for row in GROWN])
    placed = [{**row, "shard": place[0], "slice": place[1]} for row, place in zip(GROWN, places, strict=True)]
    columns = {"partition": "column", "shard_column": "shard", "slice_column": "slice"}
    trainer_of(path / "fresh", placed, num_shards=1, **columns).train()


def with_folders_of_their_own(path):
    """Processes of which each sees a folder of its own, where another stage is missing."""
    mine = path / f"seen-by-{os.environ['RANK']}"
    shutil.copytree(path / "system", mine)
    if os.environ["RANK"] == "1":
        shutil.rmtree(mine / StageKey(0, (0, 1)).path)
    # That folders are seen late by others is not waited for.
    plan_run._ATTEMPTS = 3
    trainer = trainer_of(mine, FIRST, num_shards=1, partition="balanced")
    with pytest.raises(S3TError, match="folder"):
        trainer.add_examples(Dataset.from_list(MORE), into="slices")
    assert not SystemFolder(mine).ledger.lines


@pytest.mark.slow
def test_rows_come_nowhere_where_processes_see_folders_of_their_own(tmp_path):
    trainer_of(tmp_path / "system", FIRST, num_shards=1, partition="balanced").train()
    arguments = (str(tmp_path), "folders")
    launched(Path(__file__), *arguments, processes=2, environment={"OMP_NUM_THREADS": "1"})


@pytest.mark.slow
def test_rows_come_once_and_each_process_trains_on_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_S3T_KEY", "of both of these systems")
    launched(Path(__file__), str(tmp_path), processes=2, environment={"OMP_NUM_THREADS": "1"})
    grown, fresh = SystemFolder(tmp_path / "grown"), SystemFolder(tmp_path / "fresh")
    assert [entry.kind for entry in grown.ledger.entries] == ["addition", "replacement"]
    stages = grown.plan.stages()
    assert grown.current_stages == fresh.current_stages == set(stages)
    assert [grown.adapter_digest(key) for key in stages] == [fresh.adapter_digest(key) for key in stages]
    assert inspect(grown.path).problems == ()


if __name__ == "__main__":
    launch.start_cpu_processes()
    (with_folders_of_their_own if sys.argv[2:] else grow)(Path(sys.argv[1]))
