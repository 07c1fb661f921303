"""
What does not fit a system that is there, or is asked of a model that serves, is refused and changes nothing (E6).
"""

import copy
import hashlib
import json
import re
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas
import peft
import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig
from support.folders import forge
from support.insides import routing_of, wait_for_cleaner
from support.refusals import CARRIES, Refusal, cases, digest_of, files_of, inactive_adapters, with_lora
from support.tiny import (
    batch_of,
    ids_of,
    lm_rows,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from torch import nn

from hf_s3t import S3TModel, S3TTrainer
from hf_s3t.errors import (
    BaseModelMismatchError,
    ConfigError,
    ContentChangedError,
    ExampleIdError,
    ExhaustedError,
    FolderError,
    FormatVersionError,
    IsolationError,
    KeyMissingError,
    S3TError,
    UnknownExampleError,
)


pytestmark = pytest.mark.usefixtures("one_thread")


# A system that is there


ROWS = lm_rows(16)
PEOPLE = [{**row, "person": f"person-{n // 4}"} for n, row in enumerate(ROWS)]
GROUPED = s3t_config(group_column="person", partition="balanced")


def base(seed: int = 0):
    return tiny_llama(layers=2, seed=seed)


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A system on a two-layer Llama whose examples belong to four people, all stages there; not to be changed."""
    path = tmp_path_factory.mktemp("grown") / "system"
    plant_stages(make_trainer(path, base(), PEOPLE, config=GROUPED))
    return path


@pytest.fixture
def system(grown, tmp_path):
    return Path(shutil.copytree(grown, tmp_path / "system"))


def rewritten(number: int, **changes) -> list[dict]:
    rows = copy.deepcopy(PEOPLE)
    rows[number].update(changes)
    return rows


@cases(
    Refusal(ContentChangedError, "content that changed", "content of 1 example is not what it was .*'example-003'",
        "what it was at the first training", "Restore the rows", rows=rewritten(3,
        labels=[9] * 8)),
    Refusal(ContentChangedError, "a group that changed", "content of 1 example .*'example-003'",
        "what it was at the first training", "Restore the rows", rows=rewritten(3,
        person="person-3")),
    Refusal(UnknownExampleError, "a new example", "has 1 example that this system does not know: 'new'",
        "does not know", "Leave them out, make the trainer with the rest and add them by `trainer.add_examples`",
        rows=[*PEOPLE, {**PEOPLE[0], "id": "new"}]),
    Refusal(ExampleIdError, "examples that are not there any more",
        "lacks 2 examples that this system holds: 'example-014', 'example-015'", "otherwise give the full dataset",
        "If they are to be forgotten, call `unlearn` with these ids", rows=PEOPLE[:-2]),
    Refusal(ConfigError, "other settings", r"num_slices=1 \(was 2\)",
        "differs from the one this folder's system was made with",
        "Leave it out to go on with the system, or choose another `output_dir`",
        config=s3t_config(group_column="person", partition="balanced", num_slices=1)),
    Refusal(ConfigError, "other PEFT settings", "`peft_config` differs", "the one this folder's system was made with",
        "Leave it out to go on with the system, or choose another `output_dir`", peft_config=LoraConfig(r=8,
        target_modules="all-linear")),
    Refusal(BaseModelMismatchError, "a base of another precision", "this one has bfloat16", "dtype float32",
        "Load the base as it was at training", model=tiny_llama(layers=2).to(torch.bfloat16)),
    Refusal(BaseModelMismatchError, "a base configured otherwise", r"rms_norm_eps=0.1 \(was 1e-06\)",
        "configured otherwise than at training", "was", model=tiny_llama(layers=2, rms_norm_eps=0.1)),
    Refusal(BaseModelMismatchError, "another base model",
        "the weights of its layers and its embeddings, norms or biases differ",
        "Expected 'the model given at training'", "give it as `model`", model=tiny_llama(layers=2, seed=1)),
    Refusal(BaseModelMismatchError, "a base of another depth", r"num_hidden_layers=4 \(was 2\)",
        "Expected 'the model given at training'", "give it as `model`", model=tiny_llama(layers=4)),
)  # fmt: skip
def test_what_does_not_fit_the_system_that_is_there_is_refused_and_leaves_it_alone(case, system):
    before = files_of(system)
    given = {"model": base(), "rows": PEOPLE, "config": GROUPED, **case.given}
    weights = digest_of(given["model"])
    with pytest.raises(S3TError) as caught:
        make_trainer(system, args=training_arguments(system), **given)
    case.check(caught)
    assert files_of(system) == before and digest_of(given["model"]) == weights


def test_deleted_rows_that_are_still_in_the_dataset_are_no_error(system):
    model = S3TModel.from_pretrained(system, base_model=base())
    model.unlearn(["example-003"])
    wait_for_cleaner(model)
    trainer = make_trainer(system, base(), rewritten(3, labels=[9] * 8), config=GROUPED)
    assert "example-003" not in trainer.folder.table.rows


# Calls of a model that serves


@pytest.fixture
def model(system):
    return S3TModel.from_pretrained(system, base_model=base())


@pytest.fixture(scope="module")
def untouched(grown, tmp_path_factory):
    """A model for tests that show that they change nothing."""
    path = Path(shutil.copytree(grown, tmp_path_factory.mktemp("untouched") / "system"))
    return S3TModel.from_pretrained(path, base_model=base())


def state_of(model: S3TModel):
    with torch.no_grad():
        logits = model(**batch_of(ROWS[:3])).logits
    return (
        files_of(model.folder.path),
        digest_of(model.base_model),
        sorted(map(str, model.stack.loaded)),
        routing_of(model),
        dict(model.folder.table.rows),
        model.folder.ledger,
        logits.numpy().tobytes(),
    )


def no_list(name: str, got: str, remedy: str, **given) -> Refusal:
    return Refusal(ExampleIdError, name, got, "must be a list of integers or strings", remedy, **given)


def unknown(name: str, got: str, remedy: str, **given) -> Refusal:
    return Refusal(UnknownExampleError, name, got, r"are texts\. Name examples by the ids", remedy, **given)


@cases(
    no_list("a single text", "`ids` .*got 'example-001'", "A single one is a list of one", ids="example-001"),
    no_list("a single number", "`ids` .*got 3", "A single one is a list of one", ids=3),
    no_list("bytes", "`ids` .*got b'x'", "A single one is a list of one", ids=b"x"),
    no_list("a mapping", "`ids` .*got {'example-001': 1}", "A single one is a list of one", ids={"example-001": 1}),
    no_list("a single group", "`groups` .*got 'person-1'", "A single one is a list of one", groups="person-1"),
    no_list("fractions", r"among others 1.0", "Convert them by `int`", ids=["example-001", 1.0]),
    no_list("truths", r"among others True", "give the ids of the rows that are meant", ids=[True]),
    no_list("nothing at all in a list", r"among others None", "leave out what is missing", ids=["example-001", None]),
    no_list("lists in a list", r"among others \['example-001'\]", r"ids alone, such as `\[row\['id'\] for row in rows",
        ids=[["example-001"]]),
    no_list("rows", "among others {'id': 'example-001'}", "Give the ids alone", ids=[{"id": "example-001"}]),
    no_list("a single fraction", "`ids` .*got 1.5", "Convert them by `int`", ids=1.5),
    no_list("a single truth", "`ids` .*got True", "give the ids of the rows that are meant", ids=True),
    no_list("a tensor without an axis", "got 3", "A single one is a list of one", ids=torch.tensor(3)),
    no_list("a mask", "among others False, True", "give the ids of the rows that are meant",
        ids=torch.tensor([False, True])),
    no_list("a series with gaps", "among others 1.0, nan", "missing values, .* have to be dropped first",
        ids=pandas.Series([1, None])),
    no_list("a table of pandas", "got a DataFrame", r"Give one column of it, such as `dataframe\['id'\]`",
        ids=pandas.DataFrame({"id": ["example-001"]})),
    # Its column bears the name of an example.
    no_list("a table with an id for a column's name", "got a DataFrame", "Give one column of it", missing="ignore",
        ids=pandas.DataFrame({"example-001": [1]})),
    no_list("a dataset", "got a Dataset", r"Give one column of it, such as `dataset\['id'\]`",
        ids=Dataset.from_list(lm_rows(2))),
    no_list("a table as groups", "`groups` .*got a DataFrame", r"Give one column .*`dataframe\['group'\]`",
        groups=pandas.DataFrame({"g": []})),
    no_list("numbers of another kind", "among others 1j", "Give the ids as they were", ids=[1j]),
    unknown("a tensor of numbers where ids are texts", "Unknown ids: 3, 4", "Nothing was deleted",
        ids=torch.tensor([3, 4])),
    no_list("an array of fractions", "among others 0.5", "must be a list", ids=np.array([0.5])),
    unknown("an unknown id", "Unknown ids: 'nobody'", 'at the first training. Nothing was deleted; missing="ignore"',
        ids=["nobody"]),
    unknown("an unknown id among known ones", "Unknown ids: 'nobody'", "Nothing was deleted", ids=["example-001",
        "nobody", "example-002"]),
    unknown("a row number where ids are texts", "Unknown ids: 3", "Nothing was deleted", ids=[3]),
    unknown("an unknown id beside a known group", "Unknown ids: 'nobody'", "Nothing was deleted", ids=["nobody"],
        groups=["person-1"]),
    Refusal(UnknownExampleError, "an unknown group", "Unknown groups: 'nobody'",
        "values of `group_column` at the first training", "Nothing was deleted",
        groups=["person-1", "nobody"]),
    Refusal(ConfigError, "neither ids nor groups", "with neither `ids` nor `groups`", "Name what to forget",
        "Name what to forget"),
    Refusal(ConfigError, "an unknown way with missing ids", "got 'skip'", "`missing` must be one of error, ignore",
        "one of", ids=["example-001"], missing="skip"),
)  # fmt: skip
def test_an_unlearn_that_is_refused_changes_nothing(case, untouched):
    before = state_of(untouched)
    with pytest.raises(S3TError) as caught:
        untouched.unlearn(**case.given)
    case.check(caught)
    wait_for_cleaner(untouched)
    assert state_of(untouched) == before


def test_ids_that_were_deleted_before_are_no_error_and_no_second_deletion(model):
    model.unlearn(["example-001"])
    wait_for_cleaner(model)
    before = state_of(model)
    report = model.unlearn(["example-001"])
    assert (report.requested, report.deleted, report.already_deleted, report.stages_removed) == (1, 0, 1, ())
    assert model.unlearn([]).requested == 0
    assert state_of(model) == before


def test_unknown_ids_may_be_passed_over(model):
    report = model.unlearn(["nobody", "example-001"], groups=["nobody"], missing="ignore")
    assert report.deleted == 1 and model.folder.is_deleted("example-001")
    assert (report.unknown, report.unknown_groups) == (1, 1)


@cases(
    no_list("a single text", "`ids` .*got 'example-001'", "A single one", ids="example-001"),
    unknown("an unknown id", "Unknown ids: 'nobody'", r"at the first training\.$", ids=["nobody"]),
    no_list("nothing", "among others None", "leave out what is missing", ids=None),
    no_list("a table", "got a DataFrame", "Give one column of it", ids=pandas.DataFrame({"example-001": [1]})),
)  # fmt: skip
def test_a_place_is_told_of_known_examples_only(case, untouched):
    with pytest.raises(S3TError) as caught:
        untouched.locate(**case.given)
    case.check(caught)


def test_no_place_is_told_of_a_deleted_example(model):
    model.unlearn(["example-001"])
    with pytest.raises(UnknownExampleError, match=r"^'example-001': deleted, and in no slice any more\. Ask for the"):
        model.locate(["example-000", "example-001"])
    assert set(model.locate(["example-000"])) == {"example-000"}


def test_an_exhausted_system_says_so_and_what_to_do(model):
    model.unlearn(ids_of(16))
    case = Refusal(ExhaustedError, "", "is exhausted", "every shard", r"Call `train\(\)` .*or load it with")
    with pytest.raises(ExhaustedError) as caught:
        model(**batch_of(ROWS[:1]))
    case.check(caught)
    with pytest.raises(
        ExhaustedError, match=r"Shard 0 has no stage left to export. Call `train\(\)` to grow it again"
    ):
        model.export_adapter(0, model.folder.path.parent / "exported")
    assert model.is_exhausted and not (model.folder.path.parent / "exported").exists()
    with pytest.raises(ConfigError, match="shard=7, expected 0 to 0"):
        model.export_adapter(7, model.folder.path.parent / "exported")


def test_an_exhausted_language_model_may_answer_as_its_base_if_told_to(system):
    S3TModel.from_pretrained(system, base_model=base()).unlearn(ids_of(16))
    model = S3TModel.from_pretrained(system, base_model=base(), when_exhausted="base")
    batch = batch_of(ROWS[:2])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, base()(**batch).logits)


# Loading


def altered(name: str):
    def alter(path: Path):
        file = path / name
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    return alter


def removed(name: str):
    return lambda path: (path / name).unlink()


def truncated(name: str):
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-20])


def of_version(version: int):
    def write(path: Path):
        file = path / "s3t_config.json"
        record = {**json.loads(file.read_text()), "format_version": version}
        del record["digest"]
        digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
        file.write_text(json.dumps({**record, "digest": digest}))

    return write


SERVED = "stages/shard-0/0-1"


@pytest.mark.parametrize("through", ["the model", "the trainer"])
@cases(
    Refusal(FolderError, "a missing table", "examples.parquet", "is missing", "Restore it",
        damage=removed("examples.parquet")),
    Refusal(FolderError, "a missing ledger", "ledger.jsonl", "is missing", "Restore it",
        damage=removed("ledger.jsonl")),
    Refusal(FolderError, "a missing stage record", f"{SERVED}/stage.json", "is missing", "Restore it",
        damage=removed(f"{SERVED}/stage.json")),
    Refusal(FolderError, "an altered config", "s3t_config.json", "is not the JSON|was altered",
        "Restore it", damage=altered("s3t_config.json")),
    Refusal(FolderError, "an altered table", "examples.parquet", "was altered|is not the table",
        "Restore it", damage=altered("examples.parquet")),
    Refusal(FolderError, "an altered stage record", f"{SERVED}/stage.json", "is not the JSON|was altered",
        "Restore it", damage=altered(f"{SERVED}/stage.json")),
    Refusal(FolderError, "a truncated config", "s3t_config.json", "is not the JSON", "Restore it",
        damage=truncated("s3t_config.json")),
    Refusal(FolderError, "a truncated table", "examples.parquet", "is not the table", "Restore it",
        damage=truncated("examples.parquet")),
    Refusal(FormatVersionError, "an unknown version", "format version 4", "reads versions 1 to 3",
        "Install the version of hf_s3t that wrote it", damage=of_version(4)),
    Refusal(KeyMissingError, "a missing key", "Neither HF_S3T_KEY nor", "holds the secret",
        "Restore the file, or set the variable", damage=removed("ledger.key")),
)  # fmt: skip
def test_a_damaged_folder_is_refused_and_left_as_it_is(case, through, system):
    case.given["damage"](system)
    before, weights, module = files_of(system), digest_of(base()), base()
    with pytest.raises(S3TError) as caught:
        if through == "the model":
            S3TModel.from_pretrained(system, base_model=module)
        else:
            make_trainer(system, module, PEOPLE, config=GROUPED)
    case.check(caught)
    assert files_of(system) == before and digest_of(module) == weights


@pytest.mark.parametrize("damage", [removed, altered, truncated])
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("stage", ["shard-0/0", "shard-0/0-1"])
def test_a_damaged_adapter_is_refused_before_any_is_attached(damage, name, stage, system):
    damage(f"stages/{stage}/{name}")(system)
    before, module = files_of(system), base()
    tensors = {key: tensor.clone() for key, tensor in module.state_dict().items()}
    with pytest.raises(FolderError) as caught:
        S3TModel.from_pretrained(system, base_model=module)
    message = str(caught.value)
    assert f"{stage}/{name}" in message and re.search("is missing|was altered or cut short: its digest is", message)
    assert "remove its folder and call `train()` to grow it again" in message
    assert files_of(system) == before
    assert module.state_dict().keys() == tensors.keys()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in module.state_dict().items())


def test_a_system_whose_config_is_gone_is_not_taken_for_an_empty_folder(system):
    (system / "s3t_config.json").unlink()
    before = files_of(system)
    said = ("s3t_config.json is missing", "holds stages or deletions", "Restore it from a backup")
    case = Refusal(FolderError, "", *said)
    with pytest.raises(FolderError) as caught:
        make_trainer(system, base(), PEOPLE, config=GROUPED)
    case.check(caught)
    with pytest.raises(FolderError, match=r"holds no S3T system: there is no s3t_config.json. Give the `output_dir`"):
        S3TModel.from_pretrained(system, base_model=base())
    assert files_of(system) == before


@cases(
    Refusal(BaseModelMismatchError, "other weights",
        "the weights of its layers and its embeddings, norms or biases differ",
        "Expected 'the model given at training'", "give it as `base_model`", base_model=partial(base, 1)),
    Refusal(BaseModelMismatchError, "one other weight", "the weights of its layers differ",
        "Expected 'the model given at training'", "give it as `base_model`", base_model=lambda: nudged(base(),
        "model.layers.0.self_attn.q_proj.weight")),
    Refusal(BaseModelMismatchError, "one other norm", "its embeddings, norms or biases differ",
        "Expected 'the model given at training'", "give it as `base_model`", base_model=lambda: nudged(base(),
        "model.norm.weight")),
    Refusal(ConfigError, "another class", "The base has its layers at", "the system was trained with",
        "Load the base as a Llama", base_model=partial(tiny_bert, 2)),
    Refusal(IsolationError, "a PeftModel", *CARRIES, base_model=lambda: peft.get_peft_model(base(), with_lora())),
    Refusal(IsolationError, "inactive adapters", *CARRIES, base_model=inactive_adapters),
    Refusal(ConfigError, "preload", "got 'some'", "must be one of best, all", "one of", preload="some"),
    Refusal(ConfigError, "when exhausted", "got 'guess'", "must be one of error, base", "one of",
        when_exhausted="guess"),
    Refusal(BaseModelMismatchError, "another depth", r"num_hidden_layers=4 \(was 2\)",
        "Expected 'the model given at training'", "give it as `base_model`", base_model=partial(tiny_llama, 4)),
    Refusal(BaseModelMismatchError, "no base at all", "was trained on a model made in memory",
        "cannot be found by name", "Give it as `base_model`", base_model=None),
)  # fmt: skip
def test_a_load_that_is_refused_changes_neither_folder_nor_base(case, system):
    given = {"base_model": base, **case.given}
    module = given["base_model"]() if callable(given["base_model"]) else given["base_model"]
    weights, before = digest_of(module) if module is not None else None, files_of(system)
    with pytest.raises(S3TError) as caught:
        S3TModel.from_pretrained(system, **{**given, "base_model": module})
    case.check(caught)
    assert files_of(system) == before
    if module is not None:
        assert digest_of(module) == weights


@pytest.mark.parametrize(
    ("changes", "differs"),
    [
        ({"layers": 1}, r"has num_hidden_layers=1 \(was 2\)"),
        ({"layers": 4}, r"has num_hidden_layers=4 \(was 2\)"),
        ({"layers": 2, "hidden_size": 32}, r"has head_dim=16 \(was 8\), hidden_size=32 \(was 16\)"),
    ],
    ids=["shallower", "deeper", "wider"],
)
def test_a_base_of_another_size_is_told_by_its_name_and_size(changes, differs, system, tmp_path):
    tiny_llama(**changes).save_pretrained(tmp_path / "other")
    with pytest.raises(BaseModelMismatchError) as caught:
        S3TModel.from_pretrained(system, base_model=tmp_path / "other")
    expected = r"Expected 'the model given at training', got '.*other'"
    Refusal(BaseModelMismatchError, "", rf"other' {differs}", expected, "give it as `base_model`").check(caught)


@pytest.mark.parametrize(
    "given", [transformers.LlamaForCausalLM, transformers.LlamaConfig(), 3], ids=["class", "config", "3"]
)
def test_what_is_neither_a_base_nor_a_name_of_one_is_refused(given, system):
    with pytest.raises(
        ConfigError, match=r"`base_model` is a .*, expected a loaded model, its id or its folder\. Give"
    ):
        S3TModel.from_pretrained(system, base_model=given)


def test_what_is_no_place_of_a_system_is_refused(untouched):
    for given, kind in ((None, "NoneType"), (untouched, "LlamaForCausalLM")):
        with pytest.raises(ConfigError, match=rf"got a {kind}\. Give the `output_dir` of a training run"):
            S3TModel.from_pretrained(given)


def routed_by_a_buffer(bias: float) -> nn.Module:
    """A base with a buffer in its checkpoint that decides what it computes, as mixtures of experts have."""
    model = base()
    model.model.layers[0].mlp.register_buffer("correction_bias", torch.full((4,), bias))
    return model


def test_a_base_with_another_buffer_in_its_checkpoint_is_another_base(tmp_path):
    trainer = make_trainer(tmp_path / "system", routed_by_a_buffer(0.5), PEOPLE, config=GROUPED)
    S3TModel.from_pretrained(trainer.folder.path, base_model=routed_by_a_buffer(0.5))
    with pytest.raises(BaseModelMismatchError, match=r"its persistent buffers differ. Expected 'the model given"):
        S3TModel.from_pretrained(trainer.folder.path, base_model=routed_by_a_buffer(0.25))


def test_a_private_base_is_asked_for_with_the_systems_token(tmp_path, monkeypatch):
    model = base()
    model.save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "system", type(model).from_pretrained(tmp_path / "base"), PEOPLE, config=GROUPED)
    asked = []

    def gated(name, **kwargs):
        asked.append(kwargs)
        raise OSError("401: gated")

    monkeypatch.setattr(transformers.LlamaConfig, "from_pretrained", gated)
    said = r"The base model cannot be loaded from .*: 401: gated Give `token` if it is private, or `base_model`"
    with pytest.raises(BaseModelMismatchError, match=said):
        S3TModel.from_pretrained(trainer.folder.path, token="hf_mine", cache_dir=tmp_path / "cache")
    assert asked == [{"token": "hf_mine", "cache_dir": tmp_path / "cache"}]


def nudged(model: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] += 0.5
    return model


def test_a_base_that_serves_one_system_is_not_given_to_another(untouched, system):
    before = state_of(untouched)
    with pytest.raises(IsolationError, match="carries adapters"):
        S3TModel.from_pretrained(system, base_model=untouched.base_model)
    assert state_of(untouched) == before


def test_a_path_that_is_no_folder_is_refused(tmp_path):
    for path in (tmp_path / "nowhere", str(tmp_path / "nowhere")):
        with pytest.raises(FolderError, match=r"nowhere is not a folder. Give the `output_dir` of a training run"):
            S3TModel.from_pretrained(path)
    assert not list(tmp_path.iterdir())


def test_a_system_is_saved_into_an_empty_folder_only(untouched, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("mine")
    with pytest.raises(FolderError, match=r"is no empty folder. Give a new one"):
        untouched.save_pretrained(tmp_path / "taken")
    assert (tmp_path / "taken" / "file").read_text() == "mine" and len(list((tmp_path / "taken").iterdir())) == 1


# Calls of a trainer that is there


@pytest.fixture(scope="module")
def trainer(grown, tmp_path_factory):
    path = Path(shutil.copytree(grown, tmp_path_factory.mktemp("trainer") / "system"))
    return make_trainer(path, base(), PEOPLE, config=GROUPED)


@cases(
    Refusal(ConfigError, "a checkpoint by name", "resume_from_checkpoint='checkpoint-5'", "resume by themselves",
        r"Call `train\(\)`", resume_from_checkpoint="checkpoint-5"),
    Refusal(ConfigError, "a trial", "trial=7", "hyperparameters cannot change between stages", r"Call `train\(\)`",
        trial=7),
)  # fmt: skip
def test_training_takes_no_checkpoint_and_no_trial(case, trainer):
    before = files_of(trainer.folder.path)
    with pytest.raises(ConfigError) as caught:
        trainer.train(**case.given)
    case.check(caught)
    assert files_of(trainer.folder.path) == before


@pytest.mark.parametrize(
    ("stages", "error", "message"),
    [
        ("some", ConfigError, "`stages` must be None, \"sample\" or a list of stages, got 'some'"),
        (["shard-0/1-0-2"], ConfigError, "shard-0/1-0-2 is not a valid stage of this system, or lacks rows"),
        (["shard-5/0"], ConfigError, "shard-5/0 is not a valid stage of this system, or lacks rows"),
        (["0-1"], FolderError, "is not the path of a stage, which looks like stages/shard-0/2-0-1"),
    ],
)
def test_an_audit_takes_stages_of_the_system_only(stages, error, message, trainer):
    before = files_of(trainer.folder.path)
    with pytest.raises(error, match=re.escape(message)):
        trainer.verify(stages)
    assert files_of(trainer.folder.path) == before


def test_there_is_nothing_to_audit_before_training(tmp_path):
    with pytest.raises(
        ConfigError, match=r"There is no stage to audit that saw all that its slices hold. Call `train\(\)` first"
    ):
        make_trainer(tmp_path / "system", base(), ROWS).verify()


def test_a_system_can_be_opened_without_data_but_not_trained(system):
    args = training_arguments(system)
    opened = S3TTrainer(model=base(), args=args)
    with pytest.raises(ConfigError, match=r"There is no `train_dataset` to train on. Give it to the trainer"):
        opened.train()
    assert routing_of(opened.s3t_model).depths == [2]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("layers", {}),
        ("layers", {"path": "x", "num_layers": "many", "groups": []}),
        ("head", 5),
        ("peft_config", {"nonsense": 1}),
        ("peft_config", None),
        ("base_model", "x"),
        ("base_model", {}),
    ],
    ids=str,
)
def test_a_config_whose_digest_matches_and_which_says_nonsense_is_refused(field, value, grown, tmp_path):
    path = Path(shutil.copytree(grown, tmp_path / "system"))
    forge(path / "s3t_config.json", **{field: value})
    with pytest.raises(FolderError, match="does not say what a system is"):
        S3TModel.from_pretrained(path, base_model=base())
