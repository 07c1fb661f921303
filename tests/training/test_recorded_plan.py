"""The plan that a folder has recorded: it rules where a config leaves it out; what contradicts it is refused."""

import json
import shutil

import pytest
from support.folders import files_of
from support.tiny import lm_rows, make_trainer, tiny_llama

from hf_s3t import S3TConfig
from hf_s3t.errors import ConfigError
from hf_s3t.folder.layout import CONFIG_FILE


pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = lm_rows(16)
SHAPE = {"num_slices": 4, "id_column": "id", "partition": "hashed", "seed": 3}
PLANS = {
    "default": {},
    "lattice": {"sequence_selection": "lattice"},
    "work budget": {"work_budget": 5.0},
    "rotations": {"budget": 4},
    "two rotations": {"sequence_selection": "cyclic", "budget": 2},
    "published": {"keep_idle": True},
    "listed": {"sequence_selection": [[0, 1], [2], [3, 0, 1, 2]]},
}


def trainer_on(path, config):
    return make_trainer(path, tiny_llama(), ROWS, config=config)


@pytest.fixture(scope="module")
def systems(tmp_path_factory):
    """A folder of each plan, in which nothing is trained yet."""
    root = tmp_path_factory.mktemp("systems")
    for name, plan in PLANS.items():
        trainer_on(root / name, S3TConfig(**SHAPE, **plan))
    return root


@pytest.fixture
def folder(systems, tmp_path):
    return lambda name: shutil.copytree(systems / name, tmp_path / name)


@pytest.mark.parametrize("name", PLANS)
def test_a_config_that_leaves_out_what_is_planned_goes_on_with_what_is_recorded(folder, name):
    path = folder(name)
    recorded = json.loads((path / CONFIG_FILE).read_bytes())
    asked = S3TConfig(**SHAPE, **PLANS[name])
    for config in (S3TConfig(**SHAPE), asked):
        trainer = trainer_on(path, config)
        assert trainer.folder.plan.to_record() == recorded["plan"] and trainer.s3t_config == asked


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("rotations", {"sequence_selection": "cyclic"}),
        ("rotations", {"sequence_selection": "cyclic", "budget": 4}),
        ("two rotations", {"budget": 2}),
        ("published", {"budget": 4, "keep_idle": True}),
        ("default", {"sequence_selection": "lattice"}),
        ("lattice", {"keep_idle": False}),
        ("listed", {"sequence_selection": [[0, 1], [2], [3, 0, 1, 2]], "budget": 3}),
    ],
)
def test_a_config_that_asks_for_the_recorded_plan_in_other_words_goes_on_with_it(folder, name, given):
    path = folder(name)
    before = files_of(path)
    trainer_on(path, S3TConfig(**SHAPE, **given))
    assert files_of(path) == before


@pytest.mark.parametrize(
    ("name", "given", "got", "was"),
    [
        ("lattice", {"budget": 4}, "budget=4", "was left out, beside sequence_selection='lattice'"),
        ("default", {"budget": 4}, "budget=4", r"was left out\)"),
        ("default", {"work_budget": 5.0}, "work_budget=5.0", r"was left out\)"),
        ("default", {"keep_idle": True}, "keep_idle=True", r"was left out\)"),
        ("rotations", {"budget": 2}, "budget=2", "was 4"),
        (
            "rotations",
            {"sequence_selection": "lattice"},
            "sequence_selection='lattice'",
            "was left out, beside budget=4",
        ),
        (
            "two rotations",
            {"sequence_selection": "random", "budget": 2},
            "sequence_selection='random'",
            "was 'cyclic'",
        ),
        ("work budget", {"work_budget": 6.5}, "work_budget=6.5", "was 5.0"),
        ("work budget", {"keep_idle": False}, "keep_idle=False", "was left out, beside work_budget=5.0"),
        ("published", {"keep_idle": False}, "keep_idle=False", "was True"),
        ("listed", {"sequence_selection": [[0, 1], [2]]}, r"sequence_selection=\[\[0, 1\], \[2\]\]", "was"),
    ],
)
def test_a_config_that_contradicts_the_recorded_plan_is_refused_and_nothing_is_written(folder, name, given, got, was):
    path = folder(name)
    before = files_of(path)
    with pytest.raises(
        ConfigError, match=rf"differs from the one .* made with: .*{got} \({was}.*Leave it out to go on"
    ):
        trainer_on(path, S3TConfig(**SHAPE, **given))
    assert files_of(path) == before


def test_a_setting_that_is_left_out_now_is_named_as_that(folder, tmp_path):
    trainer_on(tmp_path / "uneven", S3TConfig(**SHAPE, layers_per_slice=1, sequence_selection="lattice"))
    with pytest.raises(ConfigError, match=r"with: `layers_per_slice` left out \(was 1\)\. Leave it out to go on"):
        trainer_on(tmp_path / "uneven", S3TConfig(**SHAPE))
