"""
Bad input gets an error that says what was got, what was expected and what to do, before any training; and a refused
call changes nothing, in memory or on disk.
"""

import copy
import hashlib
import json
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import peft
import pytest
import tokenizers
import torch
import transformers
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from support.folders import forge
from support.tiny import (
    batch_of,
    build,
    classification_rows,
    ids_of,
    image_rows,
    lm_rows,
    lora,
    make_trainer,
    plant_stages,
    rows_for,
    s3t_config,
    tiny_bert,
    tiny_llama,
    tiny_vit,
    training_arguments,
)
from torch import nn

from hf_s3t import S3TConfig, S3TModel, S3TTrainer
from hf_s3t.errors import (
    BaseModelMismatchError,
    ConfigError,
    ContentChangedError,
    EmptySliceError,
    ExampleIdError,
    ExhaustedError,
    FolderError,
    FormatVersionError,
    IsolationError,
    KeyMissingError,
    LayersNotFoundError,
    S3TError,
    UnknownExampleError,
)
from hf_s3t.folder.system import SystemFolder
from hf_s3t.training.refusals import check_arguments


pytestmark = pytest.mark.usefixtures("one_thread")


# What every refusal has to be


# What each error is for those who never heard of hf_s3t.
DOUBLES_AS = {
    BaseModelMismatchError: ValueError,
    ConfigError: ValueError,
    ContentChangedError: ValueError,
    EmptySliceError: ValueError,
    ExampleIdError: ValueError,
    ExhaustedError: RuntimeError,
    FolderError: OSError,
    FormatVersionError: FolderError,
    IsolationError: ValueError,
    KeyMissingError: FolderError,
    LayersNotFoundError: ValueError,
    UnknownExampleError: KeyError,
}


class Refusal:
    """An error, what its message says (patterns: what was got, what was expected, what to do), and what is given."""

    def __init__(self, error: type[S3TError], name: str, got: str, expected: str, remedy: str, **given):
        self.error, self.name, self.parts, self.given = error, name, (got, expected, remedy), given

    def check(self, caught) -> None:
        assert type(caught.value) is self.error
        assert isinstance(caught.value, DOUBLES_AS[self.error]) and isinstance(caught.value, S3TError)
        message = str(caught.value)
        for part in self.parts:
            assert re.search(part, message), f"{part!r} is not in: {message}"
        assert message.endswith((".", '"')) and "\n" not in message


def cases(*refusals: Refusal):
    return pytest.mark.parametrize("case", refusals, ids=lambda refusal: refusal.name)


def digest_of(model: nn.Module) -> str:
    """Of everything a refused call might change in a base model: tensors, modules, hooks, flags."""
    hasher = hashlib.sha256()
    for name, tensor in sorted([*model.named_parameters(), *model.named_buffers()]):
        hasher.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        hasher.update(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for name, module in model.named_modules():
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks), len(module._backward_hooks))
        hasher.update(f"{name} {type(module).__name__} {hooks} {module.training} {sorted(vars(module))}".encode())
    return hasher.hexdigest()


def files_of(path: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file below a folder but the lock's."""
    return {
        str(file.relative_to(path)): (hashlib.sha256(file.read_bytes()).hexdigest(), file.stat().st_mtime_ns)
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != ".lock"
    }


# Settings


@cases(
    Refusal(ConfigError, "no shard", "got 0", "`num_shards` must be an integer of at least 1", "at least 1",
        num_shards=0),
    Refusal(ConfigError, "half a slice", "got 2.5", "`num_slices` must be an integer", "of at least 1",
        num_slices=2.5),
    Refusal(ConfigError, "a text as number", "got '4'", "`num_slices` must be an integer", "of at least 1",
        num_slices="4"),
    Refusal(ConfigError, "a truth as number", "got True", "`budget` must be an integer", "of at least 1", budget=True),
    Refusal(ConfigError, "a text as seed", "got 'x'", "`seed` must be an integer", "must be", seed="x"),
    Refusal(ConfigError, "budget of none", "got 0", "`budget` must be an integer", "of at least 1", budget=0),
    Refusal(ConfigError, "budget beyond the permutations", "budget=7", "the 6 permutations of num_slices=3",
        "Lower the budget", num_slices=3, budget=7),
    Refusal(ConfigError, "prior that does not sum to one", "sums to 0.7", "expected 1", "Divide each entry by the sum",
        num_slices=2, deletion_prior=[0.5, 0.2]),
    Refusal(ConfigError, "prior of a wrong length", "has 3 entries", "expected num_slices=2",
        "Give one probability per slice", num_slices=2, deletion_prior=[0.5, 0.25, 0.25]),
    Refusal(ConfigError, "prior of a wrong length in one shard", "has 1 entries", "expected num_slices=2",
        "Give one probability per slice", num_shards=2, num_slices=2, deletion_prior=[[0.5, 0.5], [1.0]]),
    Refusal(ConfigError, "priors for other shards", "has 3 lists", "num_shards=2",
        "Give one list for all shards or one list per shard", num_shards=2, num_slices=1, deletion_prior=[[1.0]] * 3),
    Refusal(ConfigError, "negative prior", r"got \[1.5, -0.5\]", "must hold non-negative probabilities", "must hold",
        num_slices=2, deletion_prior=[1.5, -0.5]),
    Refusal(ConfigError, "prior that is no number", r"got \[nan, 1.0\]", "must hold non-negative probabilities",
        "must hold", num_slices=2, deletion_prior=[float("nan"), 1.0]),
    Refusal(ConfigError, "prior that is no list", "got 0.5", "a list of one probability", "per slice",
        deletion_prior=0.5),
    Refusal(ConfigError, "prior of both kinds", r"got \[\[1.0\], 0.5\]", "a list of one probability per slice",
        "or one such list per shard", num_slices=1, num_shards=2, deletion_prior=[[1.0], 0.5]),
    Refusal(ConfigError, "prior in an array of a wrong length", "has 2 entries", "expected num_slices=4", "Give one",
        deletion_prior=np.array([0.5, 0.5])),
    Refusal(ConfigError, "unknown selection", "got 'best'",
        "must be one of cyclic, cyclic-paper, bms, conditional, random, sorted-cyclic", "one of",
        sequence_selection="best"),
    Refusal(ConfigError, "selection that is neither a name nor a list", "got 5", "must be one of cyclic",
        "or a list of permutations", sequence_selection=5),
    Refusal(ConfigError, "sequence that is no permutation", r"holds \[0, 0\]", r"a permutation of the slices 0..1",
        "num_slices=2", num_slices=2, sequence_selection=[[0, 0]]),
    Refusal(ConfigError, "sequence listed twice", "lists a sequence twice", "must be distinct", "must be distinct",
        num_slices=2, sequence_selection=[[0, 1], [0, 1]]),
    Refusal(ConfigError, "no sequence", "is empty", "at least one permutation", "List at least one",
        sequence_selection=[]),
    Refusal(ConfigError, "sequences for other shards", "for 2 shards", "num_shards=1", "num_shards=1", num_slices=2,
        sequence_selection=[[[0, 1]], [[1, 0]]]),
    Refusal(ConfigError, "budget beside listed sequences", "budget=3", "lists 2 sequences", "Leave `budget` out",
        num_slices=2, budget=3, sequence_selection=[[0, 1], [1, 0]]),
    Refusal(ConfigError, "a rule that needs a prior", 'sequence_selection="bms"', "needs `deletion_prior`",
        'Give it, or use "cyclic"', sequence_selection="bms"),
    Refusal(ConfigError, "a rule that selects fewer", "got budget=5", "at most num_slices=4",
        'Lower the budget or use "conditional"', budget=5, sequence_selection="bms", deletion_prior=[0.25] * 4),
    Refusal(ConfigError, "unknown partition", "got 'even'", "one of balanced, hashed, column", "one of",
        partition="even"),
    Refusal(ConfigError, "columns without their partition", "shard_column='s'", 'belong to partition="column"',
        "and to it alone", shard_column="s", slice_column="t"),
    Refusal(ConfigError, "one column without its partition", "shard_column='s' and slice_column=None",
        'belong to partition="column"', "and to it alone", shard_column="s"),
    Refusal(ConfigError, "a partition without its columns", "slice_column=None",
        'Both columns belong to partition="column"', "Both columns", partition="column", shard_column="s"),
    Refusal(ConfigError, "unknown aggregation", "got 'sum'", "one of mean_logits, mean_prob", "one of",
        aggregation="sum"),
    Refusal(ConfigError, "unknown routing", "got 'best'", "one of longest, metric, all", "one of", select="best"),
    Refusal(ConfigError, "no layer per slice", "got 0", "`layers_per_slice` must be an integer", "at least 1",
        layers_per_slice=0),
    Refusal(ConfigError, "a text as switch", "got 'no'", "`colocate_duplicates` must be True or False", "must be",
        colocate_duplicates="no"),
    Refusal(ConfigError, "a text as permission", "got 'no'", "`base_is_public` must be True or False", "must be",
        base_is_public="no"),
    Refusal(ConfigError, "a number as switch", "got 1", "`base_is_public` must be True or False", "must be",
        base_is_public=1),
    *(
        Refusal(ConfigError, f"an empty {column}", "got ''", f"`{column}` must be the name of a column",
            "Leave it out if there is none", **{column: ""})
        for column in ("id_column", "group_column", "shard_column", "slice_column")
    ),
    Refusal(ConfigError, "a column by its number", "got 3", "`id_column` must be the name of a column", "Leave it out",
        id_column=3),
    Refusal(ConfigError, "layers for other slices", "has 2 entries", "num_slices=4",
        "Give one number of layers per slice, top first, or a single number", layers_per_slice=[1, 2]),
)  # fmt: skip
def test_a_setting_out_of_range_is_refused_on_construction(case):
    with pytest.raises(ConfigError) as caught:
        S3TConfig(**case.given)
    case.check(caught)


def test_an_array_is_as_good_a_prior_as_a_list():
    assert S3TConfig(num_slices=2, deletion_prior=np.array([0.5, 0.5])).deletion_prior == [0.5, 0.5]


@pytest.mark.parametrize(
    ("error", "text", "message"),
    [
        (ConfigError, '{"shards": 2}', "Unknown S3TConfig keys: shards. Known: aggregation, base_is_public, budget"),
        (ConfigError, "[1]", "is read from a JSON object, got list"),
        (ConfigError, "{", "is read from JSON, and this is none"),
        (
            FormatVersionError,
            '{"format_version": 9}',
            "has format version 9; this hf_s3t reads version 1. Install the",
        ),
    ],
)
def test_settings_that_cannot_be_read_are_refused(error, text, message):
    with pytest.raises(error, match=re.escape(message)):
        S3TConfig.from_json(text)


# Before training: everything that a trainer is given


def assert_trainer_refuses(case: Refusal, output_dir: Path, given: dict[str, Any]) -> None:
    """The refusal is what the case says; the folder was not made and the model is as it was."""
    given = dict(given)
    given.setdefault("model", tiny_llama(layers=2))
    changes = given.pop("arguments", {})
    args = given.pop("args", None) or training_arguments(output_dir, **changes)
    before = digest_of(given["model"]) if isinstance(given["model"], nn.Module) else None
    with pytest.raises(S3TError) as caught:
        make_trainer(output_dir, args=args, **given)
    case.check(caught)
    assert not output_dir.exists()
    if before is not None:
        assert digest_of(given["model"]) == before


def rows_with(**columns) -> list[dict]:
    rows = lm_rows(12)
    return [{**row, **{name: values[n] for name, values in columns.items()}} for n, row in enumerate(rows)]


class RowsOfAnyType:
    """A map-style dataset whose columns may hold what Arrow's cannot."""

    def __init__(self, ids):
        self.rows = [{**row, "id": i} for row, i in zip(lm_rows(len(ids)), ids)]
        self.column_names = list(self.rows[0])

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, item):
        return [row[item] for row in self.rows] if isinstance(item, str) else self.rows[item]

    def with_format(self, kind):
        return self


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(lm_rows(4))


@cases(
    Refusal(ExampleIdError, "repeated ids", r"more than once \(1\): 'x'", "Expected an id to name one example",
        "drop the repeated rows, choose another `id_column`", rows=rows_with(id=["x", "x", *"abcdefghij"])),
    Refusal(ExampleIdError, "missing ids", r"missing .*\(1\): None \(row 3\)", "Expected integers or strings",
        "Fill or drop these rows, or leave `id_column` out", rows=rows_with(id=["a", "b", "c", None, *"defghijk"])),
    Refusal(ExampleIdError, "ids of two types", r"mix integers and strings, 2 \(row 11\) and '1' \(row 10\)",
        "Expected one type", "convert the column to strings", rows=RowsOfAnyType([*range(3, 10), 10, 11, 1, "1", 2])),
    Refusal(ExampleIdError, "ids that are fractions", r"0.0 \(row 0\), .* and 7 more", "Expected integers or strings",
        "Fill or drop", rows=rows_with(id=[float(n) for n in range(12)])),
    Refusal(ExampleIdError, "ids of more than 64 bits", r"beyond 64 bits \(1\): 18446744073709551616 \(row 11\)",
        "integers beyond 64 bits", "Convert the column to strings", rows=RowsOfAnyType([*range(11), 2**64])),
    Refusal(ExampleIdError, "ids that are lists", r"\['a'\] \(row 0\)", "Expected integers or strings", "Fill or drop",
        rows=rows_with(id=[["a"]] * 12)),
    Refusal(ExampleIdError, "missing groups", r"None \(row 0\)", "Expected integers or strings",
        "Give every row a group", rows=rows_with(person=[None, *"abcdefghijk"]),
        config=s3t_config(group_column="person")),
    Refusal(ConfigError, "an id column that does not exist", "`id_column='name'` is no column",
        "which has id, input_ids, labels", "which has", config=s3t_config(id_column="name")),
    Refusal(ConfigError, "a group column that does not exist", "`group_column='user'` is no column",
        "which has id, input_ids, labels", "which has", config=s3t_config(group_column="user")),
    Refusal(ConfigError, "an id column in a dataset without columns",
        "`id_column='id'` names a column, but `train_dataset` is a Subset", "which has none",
        "Give a `datasets.Dataset`", rows=torch.utils.data.Subset(lm_rows(12), range(12))),
    Refusal(ConfigError, "shard numbers out of range", r"wrong shard number \(1\): 2 \(id 'example-000'\)",
        "Expected integers from 0 to 1", "num_shards=2", rows=rows_with(s=[2] + [0, 1] * 5 + [0], t=[0, 1] * 6),
        config=s3t_config(partition="column", shard_column="s", slice_column="t", num_shards=2)),
    Refusal(ConfigError, "a group torn apart by the columns",
        r"more than one slice \(1\): 'ann' in shard 0 slice 0 and shard 0 slice 1", "Expected one slice per group",
        "mend the columns, or leave `group_column` out", rows=rows_with(s=[0] * 12, t=[0, 1] * 6, g=["ann", "ann",
        *"abcdefghij"]), config=s3t_config(partition="column", shard_column="s", slice_column="t", group_column="g")),
    Refusal(EmptySliceError, "more shards than examples",
        "3 examples cannot fill num_shards=4 times num_slices=2 slices", "at least 8 examples are expected",
        "Lower `num_shards` or `num_slices`", rows=lm_rows(3), config=s3t_config(num_shards=4, partition="balanced")),
    Refusal(EmptySliceError, "fewer groups than slices", "1 groups cannot fill", "at least 2 groups are expected",
        "Lower `num_shards` or `num_slices`", rows=rows_with(g=["ann"] * 12), config=s3t_config(group_column="g",
        partition="balanced")),
    Refusal(EmptySliceError, "an empty slice by columns", r"Slices without an example \(1 of 2\): shard 0 slice 1",
        "Expected at least one in each", "lower `num_shards` or `num_slices`, or mend the columns",
        rows=rows_with(s=[0] * 12, t=[0] * 12), config=s3t_config(partition="column", shard_column="s",
        slice_column="t")),
    Refusal(EmptySliceError, "an empty slice by hashing", "Slices without an example", "Expected at least one in each",
        'use partition="balanced" or another seed', rows=lm_rows(8), config=s3t_config(num_shards=4)),
    Refusal(ExampleIdError, "no rows", "has no rows", "at least one example per slice", "Give at least one",
        rows=Dataset.from_dict({"id": [], "input_ids": [], "labels": []})),
    Refusal(ConfigError, "all splits", "`train_dataset` is a DatasetDict of train, test", "expected one dataset",
        "Give the split", rows=DatasetDict({name: Dataset.from_list(lm_rows(12)) for name in ("train", "test")})),
    Refusal(IsolationError, "a stream of torch", "`train_dataset` is a streaming Stream", "Give a map-style dataset",
        "streaming=False", rows=Stream()),
    Refusal(IsolationError, "a stream of datasets", "`train_dataset` is a streaming IterableDataset",
        "Give a map-style dataset", "streaming=False", rows=Dataset.from_list(lm_rows(12)).to_iterable_dataset()),
    Refusal(IsolationError, "a generator", "`train_dataset` is a streaming generator", "Give a map-style dataset",
        "streaming=False", rows=(row for row in lm_rows(2))),
    Refusal(IsolationError, "a packed dataset", "`train_dataset` is packed already", "Give the unpacked dataset",
        "set `packing=True`", rows=rows_with(seq_lengths=[[4, 4]] * 12)),
)  # fmt: skip
def test_a_dataset_that_cannot_be_cut_up_is_refused_before_anything_is_written(case, tmp_path):
    assert isinstance(case.given.get("rows", []), (list, Dataset, IterableDataset, object))
    assert_trainer_refuses(case, tmp_path / "system", case.given)


CHOOSING = dict(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")
TWELVE = Dataset.from_list(lm_rows(12))


@cases(
    Refusal(IsolationError, "no evaluation set", "`load_best_model_at_end=True` lets an evaluation choose",
        "no separate `eval_dataset`", "Give one that holds no training example", arguments=CHOOSING),
    Refusal(IsolationError, "the training set as evaluation set",
        "`load_best_model_at_end=True` lets an evaluation choose", "no separate `eval_dataset`",
        "Give one that holds no training example", arguments=CHOOSING, rows=TWELVE, eval_dataset=TWELVE),
    Refusal(IsolationError, "the training set among evaluation sets", "`load_best_model_at_end=True`",
        "no separate `eval_dataset`", "Give one that holds no training example", arguments=CHOOSING, rows=TWELVE,
        eval_dataset={"held out": Dataset.from_list(lm_rows(4, seed=9)), "train": TWELVE}),
    Refusal(IsolationError, "training examples in the evaluation set",
        "2 rows of `eval_dataset` are training examples", "evaluation chooses the model",
        "Take them out of `eval_dataset`", arguments=CHOOSING, rows=TWELVE, eval_dataset=Dataset.from_list(lm_rows(4,
        seed=9) + lm_rows(2))),
    Refusal(IsolationError, "routing by a metric of no set", '`select="metric"` lets an evaluation choose',
        "no separate `eval_dataset`", "Give one that holds no training example", config=s3t_config(select="metric")),
    Refusal(ConfigError, "stacks chosen by several sets at once", "is a dict of 2", "needs one evaluation set",
        "Give the one that shall decide", config=s3t_config(select="metric"),
        eval_dataset={n: Dataset.from_list(lm_rows(4, seed=9)) for n in "ab"}),
)  # fmt: skip
def test_an_evaluation_that_chooses_a_model_needs_a_set_of_its_own(case, tmp_path):
    assert_trainer_refuses(case, tmp_path / "system", case.given)


@cases(
    Refusal(IsolationError, "a batch size found by trial", "`auto_find_batch_size=True`", "could not be trained again",
        "Set `per_device_train_batch_size`", auto_find_batch_size=True),
    Refusal(IsolationError, "batches as workers finish them", "`dataloader_in_order=False`", "decide the order",
        "Leave it on", dataloader_in_order=False),
    Refusal(ConfigError, "an end at a signal", "`enable_jit_checkpoint=True`", "as if it were complete",
        "Leave it off", enable_jit_checkpoint=True),
    Refusal(ConfigError, "a rate below 0", "`learning_rate` is -1.0", "expected 0 or more", "such as 1e-4",
        learning_rate=-1.0),
    Refusal(ConfigError, "no epochs", "`num_train_epochs` is 0", "expected more than 0", "such as 3",
        num_train_epochs=0),
    Refusal(ConfigError, "empty batches", "`per_device_train_batch_size` is 0", "expected 1 or more",
        "Give a whole number", per_device_train_batch_size=0),
    Refusal(ConfigError, "reentrant checkpointing", "Reentrant gradient checkpointing",
        "needs gradients at the model's input", "Use `use_reentrant=False`", gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True}),
    Refusal(IsolationError, "a base cast by evaluation", "`bf16_full_eval`", "would stand on another base",
        "Use `bf16=True`", bf16_full_eval=True),
    Refusal(IsolationError, "an order that depends on what ran before", "'use_seedable_sampler': False",
        "depend on what ran before", "Leave it on", accelerator_config={"use_seedable_sampler": False}),
    Refusal(IsolationError, "batches seen twice after a resume", "`ignore_data_skip=True`",
        "other batches than an uninterrupted one", "Leave it off", ignore_data_skip=True),
    Refusal(IsolationError, "checkpoints without the optimizer", "`save_only_model=True`",
        "would differ from an uninterrupted one", 'Leave it off, or use save_strategy="no"', save_only_model=True,
        save_strategy="epoch"),
)  # fmt: skip
def test_an_argument_under_which_a_stage_would_depend_on_more_than_its_recipe_is_refused(case, tmp_path):
    assert_trainer_refuses(case, tmp_path / "system", {"arguments": case.given})


@pytest.mark.parametrize(
    ("tracker", "variable", "value"),
    [("wandb", "WANDB_LOG_MODEL", "checkpoint"), ("mlflow", "HF_MLFLOW_LOG_ARTIFACTS", "1")],
)
def test_a_tracker_that_uploads_weights_is_refused(tracker, variable, value, monkeypatch, tmp_path):
    monkeypatch.setenv(variable, value)
    case = Refusal(ConfigError, variable, f"`{variable}={value}`", "no deletion reaches", "Unset it")
    assert_trainer_refuses(case, tmp_path / "system", {"arguments": {"report_to": [tracker]}})
    # Nobody is asked.
    check_arguments(training_arguments(tmp_path / "other", report_to=[]))


@pytest.mark.parametrize(
    ("error", "broken"),
    [(ConfigError, {"max_steps": -1, "num_train_epochs": 0}), (IsolationError, {"ignore_data_skip": True})],
)
def test_all_arguments_that_are_refused_are_told_at_once(error, broken, tmp_path):
    args = training_arguments(tmp_path / "system", learning_rate=-1.0, **broken)
    with pytest.raises(error) as raised:
        check_arguments(args)
    first, *told = str(raised.value).split("\n- ")
    assert first == "2 things are refused:"
    assert [sentence.split("`")[1].partition("=")[0] for sentence in told] == ["learning_rate", list(broken)[-1]]


@pytest.mark.parametrize(("name", "value"), [("deepspeed", "zero2.json"), ("fsdp", ["full_shard"])])
def test_a_base_spread_over_processes_is_refused(name, value, tmp_path):
    case = Refusal(
        ConfigError, name, "FSDP and DeepSpeed", "which stages do not support", "Use plain data parallelism"
    )
    args = training_arguments(tmp_path / "system")
    object.__setattr__(args, name, value)
    assert_trainer_refuses(case, tmp_path / "system", {"args": args})


def test_stopping_early_without_keeping_the_best_model_is_refused(tmp_path):
    said = (
        "`EarlyStoppingCallback` lets an evaluation end",
        "`load_best_model_at_end` is off",
        "Turn it on, with an `eval",
    )
    case = Refusal(ConfigError, "", *said)
    for callback in (transformers.EarlyStoppingCallback(), transformers.EarlyStoppingCallback):
        assert_trainer_refuses(case, tmp_path / "system", {"callbacks": [callback]})


# Tasks


def backbone():
    return build("BertModel", "BertConfig", **ENCODER)


def backbone_of_pictures():
    return build("DINOv3ViTModel", "DINOv3ViTConfig", **ENCODER_OF_PICTURES)


ENCODER = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
ENCODER_OF_PICTURES = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
)


@cases(
    Refusal(ConfigError, "embeddings", "BertModel has no logits: it answers with last_hidden_state, pooler_output",
        "are aggregated by their logits", "Use a class with a head.*returns them as `logits`", model=backbone(),
        compute_loss_func=print),
    Refusal(ConfigError, "embeddings of pictures", "DINOv3ViTModel has no logits: it answers with last_hidden_state",
        "are aggregated by their logits", "Use a class with a head", model=backbone_of_pictures(),
        compute_loss_func=print),
    Refusal(ConfigError, "a vote on words", 'aggregation="majority_vote"', "no probabilities to choose words by",
        'Use "mean_probabilities" or "mean_logits"', config=s3t_config(aggregation="majority_vote")),
    Refusal(ConfigError, "probabilities of a number", 'aggregation="mean_probabilities"', "needs exclusive classes",
        'Use aggregation="mean_logits"', model=tiny_bert(layers=2, labels=1),
        config=s3t_config(aggregation="mean_probabilities")),
    Refusal(ConfigError, "a vote on several labels", "the task is multi_label_classification",
        "needs exclusive classes", 'Use aggregation="mean_logits"',
        model=tiny_bert(layers=2, problem_type="multi_label_classification"),
        config=s3t_config(aggregation="majority_vote")),
)  # fmt: skip
def test_a_task_whose_answers_cannot_be_made_into_one_is_refused(case, tmp_path):
    given = {"rows": classification_rows(12), **case.given}
    assert_trainer_refuses(case, tmp_path / "system", given)


# PEFT settings


TARGETS = ["q_proj", "v_proj"]
with_lora = partial(LoraConfig, r=2, target_modules=TARGETS)


def not_lora(name: str, peft_config) -> Refusal:
    said = (f"`peft_config` is a {name}", "stages are LoRA adapters", "Use `peft.LoraConfig`")
    return Refusal(IsolationError, name, *said, peft_config=peft_config)


@cases(
    not_lora("IA3", peft.IA3Config(target_modules=TARGETS, feedforward_modules=[])),
    not_lora("PREFIX_TUNING", peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
    not_lora("PROMPT_TUNING", peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")),
    not_lora("ADALORA", peft.AdaLoraConfig(target_modules=TARGETS, total_step=10)),
    not_lora("LOHA", peft.LoHaConfig(target_modules=TARGETS)),
    not_lora("OFT", peft.OFTConfig(target_modules=TARGETS)),
    not_lora("VERA", peft.VeraConfig(target_modules=TARGETS)),
)  # fmt: skip
def test_peft_methods_other_than_lora_are_refused_by_name(case, tmp_path):
    assert_trainer_refuses(case, tmp_path / "system", case.given)


@cases(
    Refusal(IsolationError, "all biases", 'bias="all"', "which all stages share", 'Use bias="none"',
        peft_config=with_lora(bias="all")),
    Refusal(IsolationError, "LoRA's biases", 'bias="lora_only"', "which all stages share", 'Use bias="none"',
        peft_config=with_lora(bias="lora_only")),
    Refusal(IsolationError, "norms in full", "names norm, which every stage would train", "Only the head",
        "trains none", peft_config=with_lora(modules_to_save=["norm"])),
    Refusal(IsolationError, "embeddings in full", "names embed_tokens", "Only the head", "found without being named",
        peft_config=with_lora(modules_to_save=["embed_tokens"])),
    Refusal(IsolationError, "tokens", "trainable_token_indices", "which all stages share", "cannot be used",
        peft_config=with_lora(trainable_token_indices=[1])),
    Refusal(IsolationError, "layers of its own", "layers_to_transform", "decide which layers",
        "use `layers_per_slice`", peft_config=with_lora(layers_to_transform=[0])),
    Refusal(IsolationError, "repeated layers", "layer_replication", "shares weights between layers", "cannot be used",
        peft_config=with_lora(layer_replication=[(0, 2), (0, 2)])),
    Refusal(IsolationError, "a base that changes", 'init_lora_weights="pissa"', "changes the base", "Use True, False",
        peft_config=with_lora(init_lora_weights="pissa")),
    Refusal(IsolationError, "a start from data", 'init_lora_weights="eva"', "reads training data", "Use True, False",
        peft_config=with_lora(init_lora_weights="eva")),
    Refusal(ConfigError, "no rank", "the rank 0", "expected 1 or more", "such as 16", peft_config=with_lora(r=0)),
    Refusal(ConfigError, "no rank in a pattern", "the rank -1", "expected 1 or more", "such as 16",
        peft_config=with_lora(rank_pattern={"q_proj": -1})),
    Refusal(ConfigError, "all dropped", "lora_dropout` is 2.0", "from 0 to below 1", r"Give 0\.05",
        peft_config=with_lora(lora_dropout=2.0)),
    Refusal(LayersNotFoundError, "targets that are nowhere",
        r"`target_modules=\{'query'\}` matches nothing in layers \(1,\)", "the group of stage 0",
        "Modules there: .*q_proj", peft_config=LoraConfig(target_modules=["query"])),
    Refusal(LayersNotFoundError, "targets that are in one group only", r"matches nothing in layers \(0,\)",
        "the group of stage 1", "Modules there: .*q_proj",
        peft_config=LoraConfig(target_modules=r"model\.layers\.1\..*q_proj")),
    Refusal(LayersNotFoundError, "targets outside the layers", "matches model.embed_tokens outside",
        "a stage adapts its own layers alone", "exclude_modules=",
        peft_config=LoraConfig(target_modules=["embed_tokens"])),
    Refusal(IsolationError, "the lowest layer alone", "layers_to_transform", "decide which layers",
        "use `layers_per_slice`", peft_config=with_lora(layers_to_transform=0)),
    Refusal(LayersNotFoundError, "a list of layers that is not there",
        r"module lists: model.layers \(2 x LlamaDecoderLayer\)", "no list of transformer layers that fits",
        "Name the list in the PEFT config", peft_config=with_lora(layers_pattern="blocks", layers_to_transform=[])),
)  # fmt: skip
def test_peft_settings_that_would_break_isolation_are_refused(case, tmp_path):
    assert_trainer_refuses(case, tmp_path / "system", case.given)


@pytest.mark.parametrize(("make", "chosen"), [(tiny_llama, {"q_proj", "v_proj"}), (tiny_bert, {"query", "value"})])
def test_without_target_modules_peft_chooses_them_and_they_are_recorded(make, chosen, tmp_path):
    given = LoraConfig(r=2)
    trainer = make_trainer(tmp_path, model=make(layers=2), peft_config=given)
    trainer.train()
    assert given.target_modules is None
    for stage in trainer.folder.stages:
        targets = LoraConfig.from_pretrained(tmp_path / stage.path).target_modules
        assert {target.rpartition(".")[2] for target in targets} == chosen
    # The same settings go on with the system.
    assert make_trainer(tmp_path, model=make(layers=2), peft_config=LoraConfig(r=2)).folder.stages


def test_where_peft_has_no_targets_they_are_asked_for(tmp_path):
    given = {"model": tiny_vit(layers=2), "peft_config": LoraConfig(r=2)}
    said = ("names no `target_modules`", "PEFT has no default for vit", 'target_modules="all-linear"')
    assert_trainer_refuses(Refusal(ConfigError, "", *said), tmp_path / "system", given)


def test_settings_refused_late_leave_the_head_of_a_classifier_as_it_was(tmp_path):
    case = Refusal(LayersNotFoundError, "", "matches nothing", "group of stage 0", "Modules there")
    given = {"model": tiny_bert(layers=2), "peft_config": LoraConfig(target_modules=["q_proj"])}
    assert_trainer_refuses(case, tmp_path / "system", given)


# What the trainer cannot share between stages


@cases(
    Refusal(ConfigError, "no model", "needs `model`", "the base that all stages share", "Give the model", model=None),
    Refusal(ConfigError, "a model per run", "`model_init` would make another one", "all stages share",
        "Give the model", model_init=tiny_llama),
    Refusal(ConfigError, "one optimizer for all", "`optimizers` would carry", "from stage to stage",
        "Give `optimizer_cls_and_kwargs`", optimizers=(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1),
        None)),
    Refusal(ConfigError, "settings of another kind", "got dict", "must be an S3TConfig", "must be",
        s3t_config={"num_slices": 2}),
    Refusal(ConfigError, "nothing to start from", "there is no `train_dataset`", "holds no system yet",
        "to make one with", train_dataset=None),
    Refusal(ConfigError, "no PEFT settings", "`peft_config` is missing", "Give a `peft.LoraConfig`", "such as",
        peft_config=None),
    Refusal(ConfigError, "a model's name", "`model` is the text 'some/model'", "expected a loaded model. Like `Tra",
        r"`AutoModelFor...\.from_pretrained\('some/model'\)`, of your task's class; .* by `S3TSFTTrainer`",
        model="some/model"),
    Refusal(ConfigError, "a model's folder", "`model` is the path 'some/folder'", "expected a loaded model",
        r"from_pretrained\('some/folder'\)", model=Path("some/folder")),
    Refusal(ConfigError, "a model's class", "`model` is the class LlamaForCausalLM", "expected a loaded model",
        r"give `LlamaForCausalLM.from_pretrained\(...\)`", model=transformers.LlamaForCausalLM),
    Refusal(ConfigError, "a model's config", "`model` is a LlamaConfig", "expected a loaded model",
        "from_pretrained", model=transformers.LlamaConfig()),
    Refusal(ConfigError, "a folder as arguments", "`args` is the text 'system'", "expected `TrainingArguments`",
        r"Give TrainingArguments\(output_dir=", args="system"),
    Refusal(ConfigError, "a dict of arguments", "`args` is a dict", "expected `TrainingArguments`", "Give Training",
        args={"output_dir": "system"}),
    Refusal(ConfigError, "a dataset's name", "`train_dataset` is the text 'some/data'", "expected a `datasets.",
        r"""Give `load_dataset\('some/data', split="train"\)`; of a file""", train_dataset="some/data"),
    Refusal(ConfigError, "a table of pandas", "`train_dataset` is a DataFrame", "expected a `datasets.Dataset`",
        r"Give `Dataset.from_pandas\(frame, preserve_index=False\)`", train_dataset=pandas.DataFrame(lm_rows(12))),
    Refusal(ConfigError, "a table to evaluate on", r"`eval_dataset\['held out'\]` is a DataFrame",
        "expected a `datasets.Dataset`", "Give `Dataset.from_pandas", eval_dataset={"held out": pandas.DataFrame()}),
    Refusal(ConfigError, "a tokenizer's name", "`processing_class` is the text 'gpt2'", "expected a tokenizer",
        r"Give what `AutoTokenizer.from_pretrained\(...\)` returns", processing_class="gpt2"),
    *(
        Refusal(ConfigError, f"a name as {name}", f"`{name}` is the text 'accuracy'", "that can be called",
            "Give a function", **{name: "accuracy"})
        for name in ("data_collator", "compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics")
    ),
    Refusal(IsolationError, "a dict of PEFT settings", "`peft_config` is a dict", "stages are LoRA adapters",
        "Use `peft.LoraConfig`", peft_config={"r": 4}),
)  # fmt: skip
def test_what_is_of_another_kind_or_missing_is_refused(case, tmp_path):
    model = tiny_llama(layers=2)
    before = digest_of(model)
    given = dict(
        model=model,
        args=training_arguments(tmp_path / "system"),
        train_dataset=Dataset.from_list(lm_rows(12)),
        peft_config=lora(model),
        s3t_config=s3t_config(),
    )
    with pytest.raises(S3TError) as caught:
        S3TTrainer(**{**given, **case.given})
    case.check(caught)
    assert not (tmp_path / "system").exists() and digest_of(model) == before


def test_a_base_without_values_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"not in memory.*`meta`.* from the disk .* Load it where"):
        make_trainer(tmp_path / "system", tiny_llama(layers=2).to("meta"))
    assert not (tmp_path / "system").exists()


def labelled(**columns) -> Dataset:
    """Rows of a classifier without its labels, and other columns."""
    rows = Dataset.from_list(classification_rows(12)).remove_columns("labels")
    for name, values in columns.items():
        rows = rows.add_column(name, values)
    return rows


@cases(
    Refusal(ConfigError, "texts that are not tokenised", "has the columns id, text, and none is an input of",
        "such as input_ids", "Tokenise it first",
        rows=Dataset.from_dict({"id": ids_of(12), "text": ["w"] * 12})),
    Refusal(ConfigError, "no answers", "has the columns id, input_ids, attention_mask, and none of labels",
        "would return no loss", r"Name the one of the answers so \(`rename_column`\), or give a `data_collator`",
        rows=labelled()),
    Refusal(ConfigError, "names of classes", "`label` of `train_dataset` holds texts", "expected the numbers",
        "by a table that is fixed beforehand", rows=labelled(label=[*"abcabcabcabc"])),
    Refusal(ConfigError, "missing answers", "2 of 12 rows of `train_dataset` have no `labels`", "Drop them",
        r"`dataset.filter\(lambda row: row\['labels'\] is not None",
        rows=labelled(labels=[0, None, 1, None, *[1] * 8])),
)  # fmt: skip
def test_rows_without_anything_to_train_on_are_refused_before_anything_is_written(case, tmp_path):
    assert_trainer_refuses(case, tmp_path / "system", {"model": tiny_bert(2), **case.given})


def test_answers_that_something_of_the_users_makes_are_not_asked_for(tmp_path):
    """A collator, a loss, a transform, or a class of its own may make answers of whatever the rows hold."""

    class Own(S3TTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return model(**inputs).logits.sum()

    chosen = labelled(labels=[0, None, 1] * 4).filter(lambda row: row["labels"] is not None)
    texts = labelled(name=[*"abc"] * 4)
    ways = [
        dict(rows=texts, data_collator=transformers.default_data_collator),
        dict(rows=texts, compute_loss_func=lambda outputs, labels, **_: outputs.logits.sum()),
        dict(rows=texts.with_transform(lambda rows: rows)),
        dict(rows=texts, cls=Own),
        dict(rows=chosen),
        # Numbers of rows that are left out do not count.
        dict(rows=labelled(labels=[0, None] * 6).select(range(0, 12, 2))),
    ]
    for number, given in enumerate(ways):
        config = s3t_config(partition="balanced")
        make_trainer(tmp_path / str(number), tiny_bert(2), config=config, **given)


@pytest.mark.parametrize(
    ("make", "task", "given"),
    [(tiny_llama, "CAUSAL_LM", True), (tiny_llama, "CAUSAL_LM", False), (tiny_bert, "SEQ_CLS", True)],
)
def test_a_model_of_peft_is_refused_with_what_to_give_instead(make, task, given, tmp_path):
    """What the message says to give is all that has to be given."""
    settings = lora(make(layers=2), task_type=task)
    model = peft.get_peft_model(make(layers=2), settings)
    rows = Dataset.from_list(rows_for(make(layers=2), 12))
    rest = dict(args=training_arguments(tmp_path / "system"), train_dataset=rows, s3t_config=s3t_config())
    with pytest.raises(IsolationError) as caught:
        S3TTrainer(model=model, peft_config=settings if given else None, **rest)
    Refusal(
        IsolationError,
        "",
        "carries adapters: it is a PeftModel",
        "Give the plain base model, `model=model.unload",
        r"`peft_config=model.peft_config\['default'\]`",
    ).check(caught)
    trainer = S3TTrainer(model=model.unload(), peft_config=model.peft_config["default"], **rest)
    S3TModel.from_pretrained(trainer.folder.path, base_model=make(layers=2))


@pytest.mark.parametrize(
    "left",
    [
        ["checkpoint-500/trainer_state.json"],
        ["adapter_model.safetensors", "adapter_config.json", "training_args.bin"],
        ["model-00001-of-00002.safetensors", "model.safetensors.index.json"],
        ["pytorch_model.bin"],
        ["trainer_state.json", "optimizer.pt"],
    ],
    ids=lambda left: left[0],
)
def test_a_folder_that_a_plain_run_left_something_in_is_no_output_dir(left, tmp_path):
    for name in left:
        (tmp_path / "system" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "system" / name).write_text("{}")
    before = files_of(tmp_path)
    with pytest.raises(ConfigError, match=r"holds what a plain run left \(.*resumes from none .* Choose another"):
        make_trainer(tmp_path / "system", tiny_llama(layers=2))
    assert files_of(tmp_path) == before


@pytest.mark.parametrize("id_column", ["id", "idx"])
def test_an_id_column_that_preparing_lost_is_asked_for_before_anything_is_written(id_column, tmp_path):
    rows = Dataset.from_list(rows_with(index=range(12))).remove_columns("id")
    with pytest.raises(ConfigError) as caught:
        make_trainer(tmp_path / "system", tiny_llama(layers=2), rows, config=s3t_config(id_column=id_column))
    meant = {"id": "Name one of them", "idx": "Did you mean 'index'"}[id_column]
    got = f"`id_column='{id_column}'` is no column of `train_dataset`, which has input_ids, labels, index"
    Refusal(ConfigError, "", got, meant, r"dropped it \(`remove_columns`, `select_columns`\), let it stay").check(
        caught
    )
    assert not (tmp_path / "system").exists()


# What is no error, and is said once


def told(caplog, **given) -> list[str]:
    """What a trainer says of its settings; that stages are short goes without saying here."""
    caplog.clear()
    model = tiny_llama(layers=4)
    rest = dict(model=model, train_dataset=Dataset.from_list(lm_rows(16)), peft_config=lora(model))
    S3TTrainer(**rest, **given)
    said = [record.getMessage() for record in caplog.records if record.name.startswith("hf_s3t")]
    return [line for line in said if "optimizer steps" not in line]


@pytest.fixture
def heard(caplog):
    """What is logged, each line as if for the first time."""
    transformers.utils.logging.warning_once.cache_clear()
    return caplog


def test_a_seed_that_decides_nothing_is_told(heard, tmp_path):
    settings = s3t_config(seed=3)
    (said,) = told(heard, args=training_arguments(tmp_path / "a", seed=7, data_seed=8), s3t_config=settings)
    assert said.startswith("`seed=7` and `data_seed=8` of the training arguments decides nothing")
    assert "`s3t_config.seed`, which is 3. Give S3TConfig(seed=...)" in said
    for number, seeds in enumerate(({}, {"seed": 3}, {"seed": 42}, {"data_seed": 3})):
        args = training_arguments(tmp_path / str(number), **seeds)
        assert told(heard, args=args, s3t_config=settings) == []
        # Of the system that is there now, the recorded seed rules.
        assert told(heard, args=args) == []


@pytest.mark.parametrize(("steps", "factor"), [({}, 8.8), ({"max_steps": 5}, 13.0)], ids=["epochs", "steps"])
def test_what_settings_cost_that_nobody_chose_is_told(steps, factor, heard, tmp_path):
    args = training_arguments(tmp_path / "system", **steps)
    (said,) = told(heard, args=args)
    # Four sequences of stages 1 to 4 deep: on so many quarters of the rows, back through so many of the four layers.
    shares = [(depth / 4 if not steps else 1) * (4 + depth) / 8 for depth in (1, 2, 3, 4)]
    assert factor == pytest.approx(4 * sum(shares), abs=0.051)
    assert f"trains 16 stages, at about {factor} times the cost of one plain run" in said
    assert "`hf-s3t plan` recommends" in said and len(SystemFolder(tmp_path / "system").plan.stages()) == 16
    # It is there now, or was chosen.
    assert told(heard, args=args) == []
    assert told(heard, args=training_arguments(tmp_path / "other"), s3t_config=S3TConfig()) == []


class Interrupting(transformers.TrainerCallback):
    """Ends the run as Ctrl-C does, in the second stage."""

    def __init__(self):
        self.stages = 0

    def on_step_end(self, args, state, control, **kwargs):
        self.stages += state.global_step == 1
        if self.stages == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("saving", "where"), [({}, "its beginning"), ({"save_strategy": "steps", "save_steps": 1}, "its last checkpoint")]
)
def test_an_interrupted_run_says_what_is_kept_and_that_it_goes_on(saving, where, heard, tmp_path):
    args = training_arguments(tmp_path / "system", **saving)
    interrupting = Interrupting()
    trainer = make_trainer(tmp_path / "system", tiny_llama(layers=2), args=args, callbacks=[interrupting])
    planned = trainer.folder.plan.stages()
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (said,) = [r.getMessage() for r in heard.records if r.getMessage().startswith("Interrupted")]
    assert said == (
        f"Interrupted: 1 stages are in {tmp_path / 'system'}, whole, and stay. Call `train()` again, here or by the "
        f"same script: it trains the {len(planned) - 1} that are missing, {planned[1]} from {where}."
    )
    kept = trainer.folder.adapter_digest(planned[0])
    trainer.remove_callback(interrupting)
    trainer.train()
    assert trainer.folder.valid_stages == set(planned) and trainer.folder.adapter_digest(planned[0]) == kept
    # The arguments are as they were given.
    assert args.seed == 42


def test_a_folder_that_is_something_else_is_no_output_dir(tmp_path):
    (tmp_path / "file").write_text("mine")
    tiny_llama(layers=2).save_pretrained(tmp_path / "base")
    before = files_of(tmp_path)
    for name, why in (("file", "is a file, expected a folder"), ("base", "holds what a plain run left .config.json,")):
        with pytest.raises(ConfigError, match=rf"{why}.* Choose another `output_dir`"):
            make_trainer(tmp_path / name, tiny_llama(layers=2))
    assert files_of(tmp_path) == before


# Models


def albert(**changes):
    settings = dict(vocab_size=60, embedding_size=8, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    return build("AlbertForSequenceClassification", "AlbertConfig", **{**settings, "num_hidden_layers": 4, **changes})


def with_batch_norm():
    model = tiny_llama(layers=2)
    model.model.layers[1].norm_of_batches = nn.BatchNorm1d(16)
    return model


def with_dynamic_rotary_embeddings():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return tiny_llama(layers=2, rope_parameters=rope)


def resnet():
    return build("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])


def t5():
    return build(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )


def bart(head="BartForSequenceClassification"):
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in BART.items()}
    return build(head, "BartConfig", vocab_size=60, d_model=16, **sizes)


BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}


def quantised(method: str):
    model = tiny_llama(layers=2)
    model.config.quantization_config = {"quant_method": method, "bits": 4}
    return model


def inactive_adapters():
    model = tiny_llama(layers=2)
    model.add_adapter(with_lora(), "old")
    model.disable_adapters()
    return model


def merged_adapters():
    model = peft.get_peft_model(tiny_llama(layers=2), with_lora())
    model.merge_adapter()
    return model.get_base_model()


def one_projection_in_two_layers():
    model = tiny_llama(layers=4)
    model.model.layers[2].mlp.up_proj = model.model.layers[0].mlp.up_proj
    return model


TIED = Refusal(
    IsolationError,
    "",
    "layers 0 and 2 of model.layers share the module 'mlp.up_proj'",
    "act in other stages",
    "Use a model with separate layers",
)


def shared(at_most: int) -> Refusal:
    got = f"The config says 4 layers, but the model holds at most {at_most} in a list"
    return Refusal(IsolationError, "", got, "shared across depth", "Use a model with separate layers")


NORMS = Refusal(IsolationError, "", "batch norms", "shared by all stages", "Use a model with layer norms")
DYNAMIC = Refusal(
    IsolationError, "", "has dynamic rotary embeddings", "the longest input that it has seen", "with a fixed scaling"
)
TWO_STACKS = Refusal(
    IsolationError, "", "is an encoder-decoder", "order is defined for one", "Use a decoder-only or encoder-only"
)
CALIBRATED = Refusal(
    IsolationError, "", "is quantised by", "cannot be unlearned", r"S3TConfig\(base_is_public=True\); otherwise"
)
CARRIES = ("carries adapters", "whose data nobody could unlearn", "Give the plain base model")
ADAPTED = Refusal(IsolationError, "", *CARRIES)


@pytest.mark.parametrize(
    ("make", "case"),
    [
        pytest.param(albert, shared(1), id="ALBERT"),
        pytest.param(partial(albert, inner_group_num=2), shared(1), id="ALBERT with two inner layers"),
        pytest.param(partial(albert, num_hidden_groups=2), shared(2), id="ALBERT with two groups"),
        pytest.param(one_projection_in_two_layers, TIED, id="one module in two layers"),
        pytest.param(with_batch_norm, NORMS, id="a batch norm in a layer"),
        pytest.param(resnet, NORMS, id="ResNet"),
        pytest.param(with_dynamic_rotary_embeddings, DYNAMIC, id="dynamic rotary embeddings"),
        pytest.param(t5, TWO_STACKS, id="T5"),
        pytest.param(bart, TWO_STACKS, id="BART"),
        pytest.param(partial(bart, "BartForConditionalGeneration"), TWO_STACKS, id="BART for generation"),
        pytest.param(partial(quantised, "gptq"), CALIBRATED, id="GPTQ"),
        pytest.param(partial(quantised, "awq"), CALIBRATED, id="AWQ"),
        pytest.param(partial(quantised, "a-new-method"), CALIBRATED, id="a method nobody knows"),
        pytest.param(lambda: peft.get_peft_model(tiny_llama(layers=2), with_lora()), ADAPTED, id="a PeftModel"),
        pytest.param(merged_adapters, ADAPTED, id="merged adapters"),
        pytest.param(inactive_adapters, ADAPTED, id="inactive adapters"),
    ],
)
def test_a_base_in_which_a_stage_could_depend_on_more_than_its_prefix_is_refused(make, case, tmp_path):
    given = {"model": make(), "rows": classification_rows(12), "peft_config": LoraConfig(target_modules="all-linear")}
    assert_trainer_refuses(case, tmp_path / "system", given)


@pytest.mark.parametrize("name", ["albert_layer_groups", "albert_layers"])
def test_naming_the_list_of_layers_does_not_make_shared_layers_separate(name, tmp_path):
    settings = LoraConfig(target_modules=["query"], layers_pattern=name, layers_to_transform=[])
    given = {"model": albert(num_hidden_groups=2), "rows": classification_rows(12), "peft_config": settings}
    assert_trainer_refuses(shared(2), tmp_path / "system", given)


def test_a_calibrated_base_is_taken_when_the_user_states_that_it_is_public(tmp_path):
    given = {"model": quantised("gptq"), "config": s3t_config(base_is_public=True)}
    trainer = make_trainer(tmp_path / "system", **given)
    assert trainer.folder.config.base_is_public and trainer.folder.plan.stages()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama saved to disk."""
    path = tmp_path_factory.mktemp("checkpoint") / "llama"
    tiny_llama(layers=2).save_pretrained(path)
    return path


def test_resized_embeddings_are_refused_and_the_resized_model_saved_is_not(checkpoint, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(70)
    case = Refusal(
        IsolationError,
        "",
        "resized from 60 to 70 rows",
        "nobody could load this base again",
        "Save the resized model .* train on that",
    )
    assert_trainer_refuses(case, tmp_path / "system", {"model": model})
    model.save_pretrained(tmp_path / "resized")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    assert make_trainer(tmp_path / "system", saved).folder.plan.stages()


def test_parameters_that_the_checkpoint_lacks_are_refused_by_name(tmp_path):
    model = build("BertForMaskedLM", "BertConfig", hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                  num_attention_heads=2, vocab_size=60)  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    classifier = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    case = Refusal(
        IsolationError, "", "has no parameters for bert.pooler.dense", "initialised at random", "Save the model once"
    )
    given = {"model": classifier, "rows": classification_rows(12)}
    assert_trainer_refuses(case, tmp_path / "system", given)


def without_a_loss():
    return build("DeiTForImageClassificationWithTeacher", "DeiTConfig", hidden_size=16, intermediate_size=32,
                 num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, num_labels=3)  # fmt: skip


def test_a_model_that_gives_no_loss_is_refused_before_anything_is_written(tmp_path):
    case = Refusal(ConfigError, "", "WithTeacher takes no labels", "no loss to train by", "Use a class that takes")
    given = {"model": without_a_loss(), "rows": image_rows(12)}
    assert_trainer_refuses(case, tmp_path / "system", given)


def test_a_model_that_gives_no_loss_is_taken_with_a_loss_of_ones_own(tmp_path):
    class Own(S3TTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model(pixel_values=inputs["pixel_values"]).logits.square().mean()

    assert make_trainer(tmp_path / "class", without_a_loss(), image_rows(12), cls=Own).folder.plan.stages()
    loss = {"compute_loss_func": lambda outputs, labels, **kwargs: outputs.logits.square().mean()}
    assert make_trainer(tmp_path / "function", without_a_loss(), image_rows(12), **loss).folder.plan.stages()


@cases(
    Refusal(ConfigError, "more slices than layers", "num_slices=3 is more than the model's 2 layers",
        "every slice needs at least one", "Use fewer slices", config=s3t_config(num_slices=3)),
    Refusal(ConfigError, "more layers than there are", "layers_per_slice=2 with num_slices=2 needs 4 layers",
        "the model has 2", "Lower one of them", config=s3t_config(layers_per_slice=2)),
    Refusal(ConfigError, "more listed layers than there are",
        r"layers_per_slice=\[2, 1\] with num_slices=2 needs 3 layers", "the model has 2", "Lower one of them",
        config=s3t_config(layers_per_slice=[2, 1])),
)  # fmt: skip
def test_slices_that_do_not_fit_the_layers_are_refused(case, tmp_path):
    assert_trainer_refuses(case, tmp_path / "system", case.given)


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
    Refusal(ContentChangedError, "content that changed", "content of 1 examples is not what it was .*'example-003'",
        "what it was at the first training", "Restore the rows", rows=rewritten(3,
        labels=[9] * 8)),
    Refusal(ContentChangedError, "a group that changed", "content of 1 examples .*'example-003'",
        "what it was at the first training", "Restore the rows", rows=rewritten(3,
        person="person-3")),
    Refusal(UnknownExampleError, "a new example", "has 1 examples that this system was not partitioned with: 'new'",
        "not partitioned with", "Leave them out, or train a new system in another `output_dir`", rows=[*PEOPLE,
        {**PEOPLE[0], "id": "new"}]),
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
    model._wait_for_cleaner()
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
        model._routing,
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
    untouched._wait_for_cleaner()
    assert state_of(untouched) == before


def test_ids_that_were_deleted_before_are_no_error_and_no_second_deletion(model):
    model.unlearn(["example-001"])
    model._wait_for_cleaner()
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
    Refusal(FormatVersionError, "an unknown version", "format version 2", "reads version 1",
        "Install the version of hf_s3t that wrote it", damage=of_version(2)),
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
        (["shard-0/1-0-2"], ConfigError, "shard-0/1-0-2 is not a valid stage of this system, which has shard-0/0"),
        (["shard-5/0"], ConfigError, "shard-5/0 is not a valid stage of this system, which has shard-0/0"),
        (["0-1"], FolderError, "is not the path of a stage, which looks like stages/shard-0/2-0-1"),
    ],
)
def test_an_audit_takes_stages_of_the_system_only(stages, error, message, trainer):
    before = files_of(trainer.folder.path)
    with pytest.raises(error, match=re.escape(message)):
        trainer.verify(stages)
    assert files_of(trainer.folder.path) == before


def test_there_is_nothing_to_audit_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"There is no valid stage to audit. Call `train\(\)` first"):
        make_trainer(tmp_path / "system", base(), ROWS).verify()


def test_a_system_can_be_opened_without_data_but_not_trained(system):
    args = training_arguments(system)
    opened = S3TTrainer(model=base(), args=args)
    with pytest.raises(ConfigError, match=r"There is no `train_dataset` to train on. Give it to the trainer"):
        opened.train()
    assert opened.s3t_model._routing.depths == [2]


# Language models on text


def tokenizer():
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{n}" for n in range(4, 60))]
    model = tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="<unk>")
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def text_rows(prompts) -> list[dict]:
    return [{"id": i, "prompt": prompt, "completion": " w5"} for i, prompt in zip(ids_of(len(prompts)), prompts)]


def sft_trainer(output_dir: Path, rows, config, model=None, processing_class=None, **changes):
    from trl import SFTConfig

    from hf_s3t import S3TSFTTrainer

    arguments = {"max_length": 12, "gradient_checkpointing": False, "bf16": False, **changes}
    model = base() if model is None else model
    return make_trainer(
        output_dir,
        model,
        rows,
        cls=S3TSFTTrainer,
        args=training_arguments(output_dir, cls=SFTConfig, **arguments),
        config=config,
        processing_class=tokenizer() if processing_class is None else processing_class or None,
        peft_config=LoraConfig(target_modules="all-linear") if not isinstance(model, nn.Module) else None,
    )


def test_a_slice_of_which_truncation_leaves_nothing_is_refused_before_anything_is_written(tmp_path):
    rows = text_rows([" ".join(f"w{n}" for n in range(4, 40)) if n % 2 else "w4" for n in range(8)])
    columns = s3t_config(partition="column", shard_column="s", slice_column="t")
    rows = [{**row, "s": 0, "t": n % 2} for n, row in enumerate(rows)]
    with pytest.raises(EmptySliceError) as caught:
        sft_trainer(tmp_path / "system", rows, columns)
    said = (r"dropped every example of the \(shard, slice\) pairs \[\(0, 1\)\]", "every example", "Raise `max_length`")
    Refusal(EmptySliceError, "", *said).check(caught)
    assert not files_of(tmp_path / "system")


def test_examples_of_which_truncation_leaves_nothing_are_no_error_where_others_remain(tmp_path):
    rows = text_rows([" ".join(f"w{n}" for n in range(4, 40)) if n == 5 else "w4" for n in range(8)])
    trainer = sft_trainer(tmp_path / "system", rows, s3t_config(partition="balanced"))
    assert len(trainer.folder.table) == 8 and trainer._stage_rows.dropped(trainer.folder.table) == 1


def test_a_slice_of_which_a_deletion_leaves_only_what_truncation_dropped_is_grown_no_more(tmp_path):
    texts = [" ".join(f"w{n}" for n in range(4, 40)), *["w4"] * 7]
    rows = [{**row, "shard": 0, "slice": int(n > 1)} for n, row in enumerate(text_rows(texts))]
    trainer = sft_trainer(
        tmp_path / "system", rows, s3t_config(partition="column", shard_column="shard", slice_column="slice")
    )
    plant_stages(trainer)
    trainer.s3t_model.unlearn([rows[1]["id"]])
    trainer.train()
    assert {str(key) for key in trainer.folder.stages} == {"shard-0/1"}


def test_a_text_trainer_refuses_what_every_trainer_refuses(tmp_path):
    rows = text_rows(["w4"] * 8)
    rows[1]["id"] = rows[0]["id"]
    with pytest.raises(ExampleIdError, match=r"more than once \(1\): 'example-000'"):
        sft_trainer(tmp_path / "system", rows, s3t_config())
    assert not (tmp_path / "system").exists()


EIGHT = ids_of(8)


@cases(
    Refusal(ConfigError, "other columns", "has the columns id, question, answer",
        "expected 'text', 'messages', or 'prompt' and 'completion'", "Rename them .* or give a `formatting_func`",
        rows=Dataset.from_dict({"id": EIGHT, "question": ["w4"] * 8, "answer": ["w5"] * 8})),
    Refusal(ConfigError, "half a pair", "has the columns id, prompt", "'prompt' and 'completion'", "Rename them",
        rows=Dataset.from_dict({"id": EIGHT, "prompt": ["w4"] * 8})),
    Refusal(ConfigError, "missing texts", "1 of 8 rows of `train_dataset` have no `text`", "Drop them",
        r"`dataset.filter\(", rows=Dataset.from_dict({"id": EIGHT, "text": ["w4"] * 7 + [None]})),
    Refusal(ConfigError, "a classifier", "BertForSequenceClassification is no language model",
        "which `S3TSFTTrainer` trains", "use `S3TTrainer`", model=tiny_bert(2)),
    Refusal(ConfigError, "no tokenizer", "`processing_class` is missing", "the model was made in memory",
        "Give the tokenizer", processing_class=False),
    Refusal(ConfigError, "a folder that is not there", "`model='nowhere/at/all'` cannot be loaded",
        "Give the folder of a model", "or its id on the Hub", model="nowhere/at/all"),
    Refusal(ConfigError, "a folder as a path", "`model` is the path 'some/folder'", "a loaded model or its name",
        "Give 'some/folder'", model=Path("some/folder")),
    Refusal(ConfigError, "a model's class", "`model` is the class LlamaForCausalLM", "a loaded model or its name",
        "from_pretrained", model=transformers.LlamaForCausalLM),
)  # fmt: skip
def test_what_a_text_trainer_would_stumble_over_is_refused_before_anything_is_written(case, tmp_path):
    given = {
        "rows": Dataset.from_list(text_rows(["w4"] * 8)),
        "config": s3t_config(partition="balanced"),
        **case.given,
    }
    with pytest.raises(S3TError) as caught:
        sft_trainer(tmp_path / "system", **given)
    case.check(caught)
    assert not (tmp_path / "system").exists()


def test_a_text_trainer_takes_no_list_of_rows(tmp_path):
    from hf_s3t import S3TSFTTrainer

    with pytest.raises(ConfigError, match=r"`train_dataset` is a list, .* Give `Dataset.from_list\(rows\)`\."):
        S3TSFTTrainer(base(), training_arguments(tmp_path / "system"), train_dataset=text_rows(["w4"] * 8))
    assert not (tmp_path / "system").exists()


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
