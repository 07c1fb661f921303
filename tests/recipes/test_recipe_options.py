"""The recipe's options: every field of its configs, on the command line and in a YAML file."""

import dataclasses

import publish
import pytest
from common import text_task
from common.instruction_task import make_parser, read
from common.options import CONFIGS, lora_options, s3t_options
from peft import LoraConfig
from trl import SFTConfig

from hf_s3t import S3TConfig
from hf_s3t.errors import ConfigError


GIVEN = ["--model_name_or_path", "some/model", "--dataset_name", "some/dataset"]


def test_every_field_of_the_configs_is_an_option():
    options = {action.dest for action in make_parser()._actions}
    assert {f.name for f in dataclasses.fields(SFTConfig) if f.init} <= options
    assert {f.name for f in dataclasses.fields(S3TConfig)} == {*(field for field, _ in s3t_options().values()), "seed"}
    assert {f.name for f in dataclasses.fields(LoraConfig) if f.init} == {
        field for field, _ in lora_options().values()
    }
    assert {*s3t_options(), *lora_options()} <= options


def test_no_two_fields_share_an_option():
    names = [*s3t_options(), *lora_options(), *(f.name for f in dataclasses.fields(SFTConfig))]
    assert len(names) == len(set(names))


def test_values_that_are_lists_or_numbers_are_read_as_yaml():
    options = read([*GIVEN, "--layers_per_slice", "[2, 1, 1]", "--num_slices", "3", "--target_modules", "[q_proj]"])
    assert options.s3t.layers_per_slice == [2, 1, 1]
    assert options.lora.target_modules == {"q_proj"}


@pytest.mark.parametrize(
    ("given", "field", "value"),
    [
        ("lattice", "sequence_selection", "lattice"),
        ("[[0, 1], [1]]", "sequence_selection", [[0, 1], [1]]),
        ("null", "sequence_selection", None),
        ("true", "keep_idle", True),
        ("false", "keep_idle", False),
        ("null", "keep_idle", None),
        ("6", "work_budget", 6.0),
        ("6.5", "work_budget", 6.5),
        ("2", "budget", 2),
        ("0.25", "replay", 0.25),
    ],
)
def test_what_is_planned_is_read_from_the_command_line_and_from_a_file(given, field, value, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(f"{field}: {given}\n")
    for argv in (["--config", str(path)], [f"--{field}", given]):
        found = getattr(read([*GIVEN, *argv]).s3t, field)
        assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("field", "wrong", "expected"),
    [("keep_idle", "sometimes", "true or false"), ("work_budget", "much", "a number"), ("budget", "2.5", "a whole")],
)
def test_what_is_planned_is_of_its_type(field, wrong, expected, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(f"{field}: {wrong}\n")
    with pytest.raises(ConfigError, match=f"sets `{field}` to .*, expected {expected}"):
        text_task.read(["--config", str(path)])
    with pytest.raises(ConfigError, match=f"`--{field}` is .*, expected {expected}"):
        text_task.read([f"--{field}", wrong])


def test_one_seed_is_the_seed_of_everything():
    options = read([*GIVEN, "--seed", "7"])
    assert options.s3t.seed == options.training.seed == 7


def test_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("model_name_or_path: a\ndataset_name: b\nnum_shards: 3\nlora_r: 4\nlearning_rate: 1.0e-4\n")
    options = read(["--config", str(path), "--lora_r", "8"])
    assert (options.s3t.num_shards, options.lora.r, options.training.learning_rate) == (3, 8, 1e-4)
    assert options.script.model_name_or_path == "a"


def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("num_slice: 3\n")
    with pytest.raises(ConfigError, match=r"`num_slice`, which is no option. Did you mean `num_slices`\?"):
        read(["--config", str(path)])


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("max_train_samples: [3]", r"`max_train_samples` to \[3\], expected a whole number"),
        ("task_name: [trec]", r"`task_name` to \['trec'\], expected a text\. Mend"),
        ("per_device_train_batch_size: 8.5", "`per_device_train_batch_size` to 8.5, expected a whole number"),
        ("max_length: 12.5", "`max_length` to 12.5, expected a whole number"),
        ("max_length:", "`max_length` to None, expected a whole number"),
        ("encoding: 7", "`encoding` to 7, expected a text. Write it in quotes"),
        ("validation_share: [0.2]", r"`validation_share` to \[0.2\], expected a number"),
        ("learning_rate: fast", "`learning_rate` to 'fast', expected a number"),
        ("overwrite_results: maybe", "`overwrite_results` to 'maybe', expected true or false"),
        ("seed: true", "`seed` to True, expected a whole number"),
        ("label_set: [[a], b]", r"`label_set` to \[\['a'\], 'b'\], expected a list of texts"),
        ("logging_strategy: no", "`logging_strategy` to False, expected one of no, steps, epoch. Write it in quotes"),
        ("logging_strategy: never", "`logging_strategy` to 'never', expected one of no, steps, epoch. Mend"),
        ("lora_r: [3]", r"`lora_r` to \[3\], expected a whole number"),
        ("lora_dropout: little", "`lora_dropout` to 'little', expected a number"),
        ("id_column: [a]", r"`id_column` to \['a'\], expected a text"),
        ("colocate_duplicates: maybe", "`colocate_duplicates` to 'maybe', expected true or false"),
    ],
)
def test_a_value_of_a_wrong_type_names_its_file_and_key(line, expected, tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(f"{line}\n")
    with pytest.raises(ConfigError, match=f"options.yaml sets {expected}"):
        text_task.read(["--config", str(path)])


def test_values_may_be_written_in_a_file_as_on_the_command_line(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text(
        "learning_rate: 1e-4\nnum_train_epochs: 3\nmax_steps: '7'\noverwrite_results: 'yes'\nlora_dropout: 1e-1\n"
        "max_eval_samples:\nid_column: '7'\nlayers_per_slice: [1, 2]\nnum_slices: 2\nlogging_strategy: 'no'\n"
        "report_to: [none]\noptim_target_modules: [a]\nlr_scheduler_kwargs: {a: 1}\ninit_lora_weights: gaussian\n"
    )
    options = text_task.read(["--config", str(path)])
    training, script = options.training, options.script
    assert (training.learning_rate, training.num_train_epochs, training.max_steps) == (1e-4, 3, 7)
    assert script.overwrite_results is True and script.max_eval_samples is None
    assert options.lora.lora_dropout == 0.1 and options.lora.init_lora_weights == "gaussian"
    assert options.s3t.id_column == "7" and options.s3t.layers_per_slice == [1, 2]
    assert training.lr_scheduler_kwargs == {"a": 1}


@pytest.mark.parametrize("given", [["--lora_r", "8.5"], ["--lora_r", "[3]"], ["--colocate_duplicates", "maybe"]])
def test_a_value_of_a_wrong_type_on_the_command_line_names_its_option(given):
    with pytest.raises(ConfigError, match=f"`{given[0]}` is .*, expected (a whole number|true or false)"):
        text_task.read(given)
    named = text_task.read(["--id_column", "12", "--lora_dropout", "1e-1"])
    assert (named.s3t.id_column, named.lora.lora_dropout) == ("12", 0.1)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--metrik", "f1"], r"`--metrik` is no option. Did you mean `--metrics`\?"),
        (["--metrik=f1"], r"`--metrik` is no option. Did you mean `--metrics`\?"),
        (["--bogus"], "`--bogus` is no option. See --help"),
        (["--max-train-sample", "3"], r"Did you mean `--max_train_samples`\?"),
        (["--task_name", "sst2", "cola"], "`cola` is the value of no option"),
    ],
)
def test_an_unknown_option_is_an_error_that_names_the_nearest(argv, message):
    with pytest.raises(ConfigError, match=message):
        text_task.main(argv)


def test_an_unknown_option_of_instruction_tuning_is_said_first():
    for argv in (["--columms", "a", "b"], ["--columms", "a", *GIVEN[:2]]):
        with pytest.raises(ConfigError, match=r"`--columms` is no option. Did you mean `--columns`\?"):
            read(argv)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--cards", "--bogus"], "`--bogus` is no option. See --help"),
        (["--cards", "--licence", "mit"], r"`--licence` is no option. Did you mean `--license`\?"),
        (["me/x", "--task_name", "sst2", "--licence", "mit"], r"`--licence` is no option. Did you mean `--license`\?"),
        (["me/x", "--task_name", "sst2", "--metrik", "f1"], r"`--metrik` is no option. Did you mean `--metrics`\?"),
    ],
)
def test_publishing_takes_no_unknown_options(argv, message, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "CARDS", tmp_path / "cards")
    with pytest.raises(ConfigError, match=message):
        publish.main(argv)
    assert not (tmp_path / "cards").exists()


def test_a_file_that_holds_no_options_is_an_error(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="holds a list, expected options"):
        read(["--config", str(path)])


def test_a_model_without_a_dataset_is_an_error():
    with pytest.raises(ConfigError, match="`--dataset_name` is missing"):
        read(["--model_name_or_path", "some/model"])


def test_the_demo_has_defaults_of_its_own():
    assert read([], demo_defaults={"num_shards": 2}).s3t.num_shards == 2
    assert read(GIVEN, demo_defaults={"num_shards": 2}).s3t.num_shards == 1


@pytest.mark.parametrize(("name", "layers"), [("llama2_7b", 8), ("llama2_13b", 10), ("llama3_8b", 8)])
def test_the_papers_configurations_have_the_papers_numbers(name, layers):
    options = read(["--config", str(CONFIGS / f"{name}.yaml")])
    assert options.script.load_in_8bit
    assert options.script.llm_int8_threshold == 0.0
    assert (options.s3t.num_slices, options.s3t.layers_per_slice) == (4, layers)
    lora = options.lora
    assert (lora.r, lora.lora_alpha, lora.use_rslora, lora.lora_dropout) == (32, 64, True, 0.05)
    assert len(lora.target_modules) == 7
    args = options.training
    assert (args.learning_rate, args.num_train_epochs, args.weight_decay, args.max_grad_norm) == (2e-5, 3, 0.001, 0.3)
    assert args.get_warmup_steps(1000) == 30
    assert args.optim == "paged_adamw_32bit"
    assert args.train_sampling_strategy == "group_by_length"


def test_the_help_says_what_runs_that_are_compared_need_besides_the_seed():
    assert "one HF_S3T_KEY" in " ".join(make_parser().format_help().split())
