"""Folders of release 0.1.0, whose plans have idle stages: all that is valid serves, and goes on as it was."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load as read_tensors
from support.folders import apply, files_of, forge, grow, stages_on_disk
from transformers import AutoModelForCausalLM

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.folder.layout import CONFIG_FILE, STAGE_FILE
from hf_s3t.folder.opening import ReadOnlyFolder
from hf_s3t.folder.system import SystemFolder
from hf_s3t.hub.repository import HubRepo
from hf_s3t.operations.inspection import inspect
from hf_s3t.plan import Plan, StageKey


FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
WRITTEN = FIXTURES / "release-0.1.0"
VERDICTS = json.loads((WRITTEN / "verdicts.json").read_text())
INPUTS = {"input_ids": torch.arange(3, 11).reshape(1, 8)}

pytestmark = pytest.mark.usefixtures("shared_key", "one_thread")


@pytest.fixture(params=sorted(VERDICTS))
def name(request):
    return request.param


def copy_of(name, target) -> Path:
    return Path(shutil.copytree(WRITTEN / name, target / name))


def base():
    return AutoModelForCausalLM.from_pretrained(FIXTURES / "format-1" / "base")


def answer(model):
    with torch.no_grad():
        return model(**INPUTS).logits


def served(folder, valid):
    return [[str(tip) for tip in tips] for tips in folder.plan.served(valid)]


def sets_of(keys):
    return {key.slices for key in keys}


def test_the_same_stages_are_valid_and_serve_now_and_after_every_deletion_and_looking_changes_nothing(name):
    path = WRITTEN / name
    before = files_of(path)
    folder = ReadOnlyFolder(path)
    assert folder.plan.by_sets and sorted(map(str, folder.valid_stages)) == VERDICTS[name]["valid"]
    assert served(folder, folder.valid_stages) == VERDICTS[name]["served"]
    for hit, expected in VERDICTS[name]["served_after"].items():
        place = tuple(map(int, hit.split("-")))
        assert served(folder, [key for key in folder.valid_stages if not key.saw({place})]) == expected
    assert files_of(path) == before


def test_its_idle_stages_are_no_strangers_in_the_folder(tmp_path, name):
    path = copy_of(name, tmp_path)
    found = inspect(path)
    assert [problem for problem in found.problems if "unknown" in problem] == []
    folder = SystemFolder(path)
    assert inspect(path).problems == ()
    assert stages_on_disk(path) >= {str(key) for key in folder.valid_stages}


def test_a_deletion_takes_idle_stages_too_and_they_are_not_grown_again(tmp_path, name):
    folder = SystemFolder(copy_of(name, tmp_path))
    before = folder.valid_stages
    row = min(folder.table.rows)
    (place,) = folder.table.places([row])
    apply(folder, [row])
    kept = folder.valid_stages
    assert kept == {key for key in before if not key.saw({place})}
    assert stages_on_disk(folder.path) == set(map(str, kept))
    grow(folder)
    # One valid stage of each planned set is enough.
    grown = folder.valid_stages - kept
    assert folder.missing_stages() == [] and len(sets_of(grown)) == len(grown)
    assert sets_of(grown).isdisjoint(sets_of(kept))
    planned = {key.slices for key in folder.plan.stages(folder.table.empty)}
    assert sets_of(folder.valid_stages) == planned
    for again in (SystemFolder(folder.path), ReadOnlyFolder(folder.path)):
        assert again.valid_stages == folder.valid_stages
        assert served(again, again.valid_stages) == served(folder, folder.valid_stages)
    assert inspect(folder.path).problems == ()


def test_training_goes_on_where_it_died_without_what_is_idle(tmp_path):
    folder = SystemFolder(copy_of("half", tmp_path))
    recorded = Plan.from_record(folder.record["plan"], replace(folder.config, keep_idle=True))
    left = recorded.missing(folder.valid_stages)
    missing = folder.missing_stages()
    assert 0 < len(missing) < len(left) and sets_of(missing) < sets_of(left)
    # What was begun is among them.
    assert inspect(folder.path).checkpoints and folder.has_checkpoints(missing[0])
    grow(folder)
    assert folder.missing_stages() == [] and inspect(folder.path).problems == ()


def test_what_is_written_down_stays_as_it_is(tmp_path, name):
    path = copy_of(name, tmp_path)
    recorded = json.loads((path / CONFIG_FILE).read_bytes())
    folder = SystemFolder(path)
    apply(folder, [min(folder.table.rows)])
    grow(folder)
    assert json.loads((path / CONFIG_FILE).read_bytes()) == recorded
    assert folder.plan.to_record() == recorded["plan"]
    # It says budget and rule, as they were resolved then.
    assert folder.config == S3TConfig.from_dict(recorded["s3t_config"])
    assert (folder.config.budget, folder.config.keep_idle) == (folder.config.num_slices, None)


def test_a_model_answers_by_the_stage_that_served_unlearns_and_answers_the_same_when_it_is_loaded_again(tmp_path):
    path = copy_of("trained", tmp_path)
    model = S3TModel.from_pretrained(path, base_model=base())
    assert [[str(key) for key in tips] for tips in model.folder.plan.served(model.folder.valid_stages)] == [
        list(VERDICTS["trained"]["served"][0])
    ]
    before = answer(model)
    model.unlearn(groups=["person-1"])
    after = answer(model)
    assert model.check() == [] and not torch.equal(before, after)
    assert torch.equal(answer(S3TModel.from_pretrained(path, base_model=base())), after)


def test_it_is_pushed_with_its_idle_stages_and_served_from_there(tmp_path, hub):
    path = copy_of("trained", tmp_path)
    model = S3TModel.from_pretrained(path, base_model=base())
    repo = HubRepo(f"{hub.user}/older")
    model.push_to_hub(repo.repo_id)
    pulled = S3TModel.from_pretrained(repo.repo_id, base_model=base())
    assert torch.equal(answer(pulled), answer(model))
    assert pulled.folder.plan == model.folder.plan
    idle = [key for key in model.folder.valid_stages if key not in model.folder.plan]
    assert idle and set(idle) <= set(pulled.folder.valid_stages)
    assert all(
        read_tensors(pulled.folder.read_adapter(key))
        for key in model.folder.plan.served(pulled.folder.valid_stages)[0]
    )


# What is no stage of the system


FOREIGN = {"shard-0/3": "0", "shard-0/0-3": "0-1", "shard-2/0": "0", "shard-0/0-1-0": "0-1-2"}


@pytest.mark.parametrize("stage", FOREIGN)
def test_what_no_system_of_its_shape_has_is_never_valid_and_is_reported(tmp_path, stage):
    path = copy_of("half", tmp_path)
    valid = ReadOnlyFolder(path).valid_stages
    (path / "stages" / stage).parent.mkdir(exist_ok=True)
    shutil.copytree(path / "stages/shard-0" / FOREIGN[stage], path / "stages" / stage)
    forge(path / "stages" / stage / STAGE_FILE, stage=stage)
    for folder in (ReadOnlyFolder(path), SystemFolder(path)):
        assert folder.valid_stages == valid and not folder.is_valid(StageKey.from_path(f"stages/{stage}"))
        assert served(folder, folder.valid_stages) == VERDICTS["half"]["served"]
    (problem,) = inspect(path).problems
    assert problem.startswith(f"{path / 'stages' / stage} is no part of a system")
