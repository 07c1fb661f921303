"""The recipe's options: every field of its configs, on the command line and in a YAML file."""

import dataclasses
import sys
from pathlib import Path

import pytest
from peft import LoraConfig
from trl import SFTConfig

from hf_s3t import S3TConfig
from hf_s3t.errors import ConfigError


RECIPES = Path(__file__).parent.parent / "recipes"
sys.path.insert(0, str(RECIPES))

from options import lora_options, make_parser, parse, s3t_options  # noqa: E402


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
    options = parse([*GIVEN, "--layers_per_slice", "[2, 1, 1]", "--num_slices", "3", "--target_modules", "[q_proj]"])
    assert options.s3t.layers_per_slice == [2, 1, 1]
    assert options.lora.target_modules == {"q_proj"}


def test_one_seed_is_the_seed_of_everything():
    options = parse([*GIVEN, "--seed", "7"])
    assert options.s3t.seed == options.training.seed == 7


def test_the_command_line_overrides_the_file(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("model_name_or_path: a\ndataset_name: b\nnum_shards: 3\nlora_r: 4\nlearning_rate: 1.0e-4\n")
    options = parse(["--config", str(path), "--lora_r", "8"])
    assert (options.s3t.num_shards, options.lora.r, options.training.learning_rate) == (3, 8, 1e-4)
    assert options.script.model_name_or_path == "a"


def test_an_unknown_key_is_an_error_that_names_the_nearest(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("num_slice: 3\n")
    with pytest.raises(ConfigError, match=r"`num_slice`, which is no option. Did you mean `num_slices`\?"):
        parse(["--config", str(path)])


def test_a_file_that_holds_no_options_is_an_error(tmp_path):
    path = tmp_path / "options.yaml"
    path.write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match="holds a list, expected options"):
        parse(["--config", str(path)])


def test_a_model_without_a_dataset_is_an_error():
    with pytest.raises(ConfigError, match="`--dataset_name` is missing"):
        parse(["--model_name_or_path", "some/model"])


def test_the_demo_has_defaults_of_its_own():
    assert parse([], demo_defaults={"num_shards": 2}).s3t.num_shards == 2
    assert parse(GIVEN, demo_defaults={"num_shards": 2}).s3t.num_shards == 1


@pytest.mark.parametrize(("name", "layers"), [("llama2_7b", 8), ("llama2_13b", 10), ("llama3_8b", 8)])
def test_the_papers_configurations_have_the_papers_numbers(name, layers):
    options = parse(["--config", str(RECIPES / "configs" / f"{name}.yaml")])
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
