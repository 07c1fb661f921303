"""The recipe of preferences: trained by each trainer on local rows, measured, forgotten and audited."""

import preference_tuning
import pytest
from common import workers
from datasets import Dataset
from support.preferences import judged, pairs, tokenizer
from support.refusals import files_of
from support.tiny import tiny_llama

from hf_s3t.errors import ConfigError


pytestmark = pytest.mark.usefixtures("one_thread")


def command(folder, trainer: str, *more: str) -> list[str]:
    """A command line on rows of six users, and a base, in a folder."""
    tiny_llama(2).save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    rows = judged() if trainer == "kto" else pairs()
    rows = [{**row, "user": f"user {number % 6}"} for number, row in enumerate(rows)]
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    given = {
        "trainer": trainer, "model_name_or_path": folder / "base", "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / "system", "group_column": "user", "num_slices": 2, "max_length": 24,
        "per_device_train_batch_size": 2, "lora_r": 2, "target_modules": "all-linear", "eval_share": 0.3,
        "disable_tqdm": True, "save_strategy": "no", "num_train_epochs": 1, "learning_rate": 0.01,
    }  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))] + list(more)


@pytest.mark.parametrize("trainer", ["dpo", *(pytest.param(one, marks=pytest.mark.slow) for one in ("kto", "reward"))])
def test_each_trainer_trains_measures_and_forgets(tmp_path, trainer):
    words = command(tmp_path, trainer)
    users = set(preference_tuning.rows_of(preference_tuning.read(words))[0]["user"])
    found = preference_tuning.main([*words, "--unlearn_groups", min(users)])
    assert 0 < found["trained"]["eval_loss"] < 5 and found["deleted"] == 2 and found["stages_removed"]
    assert 0 < found["after"]["eval_loss"] < 5 and len(users) == 4


@pytest.mark.slow
def test_what_stays_is_audited_in_a_process_of_its_own(tmp_path):
    assert preference_tuning.main(command(tmp_path, "dpo", "--verify", "all"))["audit"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--trainer", "ppo"), "`--trainer ppo` is unknown. Choose one of dpo, kto, reward"),
        (("--trainer", "dpo"), "`--model_name_or_path` is missing. Give a base model"),
        (("--model_name_or_path", "m", "--dataset_name", "d", "--method", "sisa"), "Leave it out"),
        (("--trainer", "kto", "--precompute_ref_batch_sise", "3"), "precompute_ref_batch_size"),
        (
            ("--model_name_or_path", "m", "--dataset_name", "d", "--eval_share", "1.5"),
            "`--eval_share 1.5` is no share",
        ),
    ],
)
def test_what_it_cannot_do_is_said(more, says):
    with pytest.raises(ConfigError, match=says):
        preference_tuning.read(list(more))


def test_a_file_of_options_may_name_the_trainer(tmp_path):
    (tmp_path / "kto.yaml").write_text("trainer: kto\nmodel_name_or_path: m\ndataset_name: d\ndesirable_weight: 1.5\n")
    options = preference_tuning.read(["--config", str(tmp_path / "kto.yaml")])
    assert options.script.trainer == "kto" and options.training.desirable_weight == 1.5
    assert options.training.output_dir == "preferences-kto-s3t"
    with pytest.raises(ConfigError, match="sets `desirable_weight`, which is no option"):
        preference_tuning.read(["--config", str(tmp_path / "kto.yaml"), "--trainer", "dpo"])


def test_a_share_that_leaves_no_rows_is_refused(tmp_path):
    options = preference_tuning.read([*command(tmp_path, "dpo"), "--eval_share", "0.99"])
    with pytest.raises(ConfigError, match=r"`--eval_share 0\.99` holds out all of 12 rows.*smaller share"):
        preference_tuning.rows_of(options)


def test_what_is_forgotten_already_is_not_grown_again_by_forgetting_it_twice(tmp_path):
    words = [*command(tmp_path, "dpo"), "--eval_share", "0", "--max_steps", "1", "--unlearn", "example-000"]
    once, stages = preference_tuning.main(words), files_of(tmp_path / "system" / "stages")
    assert once["deleted"] == 1 and once["stages_removed"]
    assert preference_tuning.main(words)["stages_removed"] == 0
    assert files_of(tmp_path / "system" / "stages") == stages


def test_workers_of_a_cluster_train_where_some_are_asked_for(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(workers, "train_on_ray", lambda make, **cluster: told.append(cluster["num_workers"]))
    preference_tuning.main([*command(tmp_path, "dpo"), "--eval_share", "0", "--ray_workers", "2"])
    assert told == [2]
