"""
Settings and what a trainer is given (E6): bad input gets an error that says what was got, what was expected and what
to do, before any training; and a refused call changes nothing, in memory or on disk.
"""

import math
import re
from pathlib import Path

import numpy as np
import pandas
import peft
import pytest
import torch
import transformers
from datasets import Dataset, DatasetDict, IterableDataset
from peft import LoraConfig
from support.refusals import TARGETS, Refusal, assert_trainer_refuses, cases, digest_of, files_of, with_lora
from support.tiny import (
    build,
    classification_rows,
    ids_of,
    lm_rows,
    lora,
    make_trainer,
    rows_for,
    s3t_config,
    tiny_bert,
    tiny_llama,
    tiny_vit,
    training_arguments,
)

from hf_s3t import S3TConfig, S3TModel, S3TTrainer
from hf_s3t.errors import (
    ConfigError,
    EmptySliceError,
    ExampleIdError,
    FormatVersionError,
    IsolationError,
    LayersNotFoundError,
    S3TError,
)
from hf_s3t.folder.system import SystemFolder
from hf_s3t.training.refusals import check_arguments


pytestmark = pytest.mark.usefixtures("one_thread")


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
    Refusal(ConfigError, "prior of a wrong length", "has 3 values", "expected num_slices=2",
        "Give one probability per slice", num_slices=2, deletion_prior=[0.5, 0.25, 0.25]),
    Refusal(ConfigError, "prior of a wrong length in one shard", "has 1 value", "expected num_slices=2",
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
    Refusal(ConfigError, "prior in an array of a wrong length", "has 2 values", "expected num_slices=4", "Give one",
        deletion_prior=np.array([0.5, 0.5])),
    Refusal(ConfigError, "unknown selection", "got 'best'",
        "must be one of cyclic, cyclic-paper, bms, conditional, random, sorted-cyclic", "one of",
        sequence_selection="best"),
    Refusal(ConfigError, "selection that is neither a name nor a list", "got 5", "must be one of cyclic",
        "or a list of sequences of slices", sequence_selection=5),
    Refusal(ConfigError, "sequence that repeats a slice", r"holds \[0, 1, 0\]", "which repeats a slice",
        "name each once; not every slice has to be named", num_slices=2, sequence_selection=[[0, 1, 0]]),
    Refusal(ConfigError, "prefix that repeats a slice in one shard", r"holds \[1, 1\]", "which repeats a slice",
        "name each once", num_shards=2, num_slices=3, sequence_selection=[[[0, 1]], [[2], [1, 1]]]),
    Refusal(ConfigError, "sequence of a slice that is none", r"holds \[0, 2\]", r"expected slices out of 0..1",
        "num_slices=2", num_slices=2, sequence_selection=[[0, 2]]),
    Refusal(ConfigError, "sequence of nothing", r"holds \[\]", r"expected slices out of 0..1", "Name at least one",
        num_slices=2, sequence_selection=[[0, 1], []]),
    Refusal(ConfigError, "sequence listed twice", "lists a sequence twice", "must be distinct", "must be distinct",
        num_slices=2, sequence_selection=[[0, 1], [0, 1]]),
    Refusal(ConfigError, "no sequence", "is empty", "at least one sequence", "List at least one",
        sequence_selection=[]),
    Refusal(ConfigError, "sequences for other shards", "for 2 shards", "num_shards=1", "num_shards=1", num_slices=2,
        sequence_selection=[[[0, 1]], [[1, 0]]]),
    Refusal(ConfigError, "budget beside listed sequences", "budget=3", "lists for a shard is 2", "Leave `budget` out",
        num_slices=2, budget=3, sequence_selection=[[0, 1], [1, 0]]),
    Refusal(ConfigError, "budget beside other numbers of sequences", "budget=2", "lists for a shard is 1 or 2",
        "Leave `budget` out", num_shards=2, num_slices=2, budget=2, sequence_selection=[[[0, 1]], [[1, 0], [0, 1]]]),
    Refusal(ConfigError, "both budgets", "work_budget=6.0 beside budget=4", "expected one of them",
        "Leave out the other, or `work_budget`", budget=4, work_budget=6.0),
    Refusal(ConfigError, "a work budget beside a rule", "work_budget=6.0 beside sequence_selection='cyclic'",
        "expected one of them", "Leave out the other", sequence_selection="cyclic", work_budget=6.0),
    Refusal(ConfigError, "a work budget beside both", "beside budget=2 and sequence_selection='bms'",
        "expected one of them", "Leave out the other", budget=2, sequence_selection="bms", work_budget=6.0),
    Refusal(ConfigError, "a work budget for less than one chain", "work_budget=2",
        "one chain of stages with num_slices=4 costs 2.1875 at replay=1", "Give at least so much, or lower `replay`",
        num_slices=4, work_budget=2),
    Refusal(ConfigError, "a work budget for less than one chain that replays less", "work_budget=0.8",
        "costs 1.1563 at replay=0.25", "Give at least so much", num_slices=4, work_budget=0.8, replay=0.25),
    Refusal(ConfigError, "a work budget that is no number", "got 'much'", "`work_budget` must be a number above 0",
        "must be", work_budget="much"),
    Refusal(ConfigError, "a work budget for a truth", "got True", "`work_budget` must be a number above 0", "must be",
        work_budget=True),
    Refusal(ConfigError, "a work budget beyond the search", "num_slices=11", "at most 10 slices",
        "Lower `num_slices`, or give `budget`", num_slices=11, work_budget=20.0),
    Refusal(ConfigError, "a lattice of too many slices", "got num_slices=9: 511 stages a shard", "at most 8 slices",
        "Lower `num_slices`, or give `work_budget`", num_slices=9, sequence_selection="lattice"),
    Refusal(ConfigError, "a lattice with a budget", "budget=4", "one stage for each set of slices",
        "Leave `budget` out, or give `work_budget`", budget=4, sequence_selection="lattice"),
    Refusal(ConfigError, "a text as keep_idle", "got 'no'", "`keep_idle` must be True or False", "must be",
        keep_idle="no"),
    Refusal(ConfigError, "a number as keep_idle", "got 1", "`keep_idle` must be True or False", "must be",
        keep_idle=1),
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
    Refusal(ConfigError, "unknown gate", "got 'who'", "`gate` must be one of terms", "one of", gate="who"),
    Refusal(ConfigError, "no member that answers", "got 0", "`gate_top_k` must be an integer", "of at least 1",
        gate="terms", gate_top_k=0),
    Refusal(ConfigError, "more members that answer than shards", "gate_top_k=3", "more than num_shards=2",
        "Lower it, or leave it out", num_shards=2, gate="terms", gate_top_k=3),
    Refusal(ConfigError, "members that answer, and no gate to name them", "gate_top_k=1 without a gate",
        "whose weights name the members", 'Give gate="terms", or leave out `gate_top_k`', gate_top_k=1),
    Refusal(ConfigError, "a gate as cold as nothing", "got 0", "`gate_temperature` must be a number", "above 0",
        gate="terms", gate_temperature=0),
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
    Refusal(ConfigError, "layers for other slices", "has 2 values", "num_slices=4",
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
        "3 examples cannot fill num_shards=4 times num_slices=2 slices", "expected at least 8",
        "Lower `num_shards` or `num_slices`", rows=lm_rows(3), config=s3t_config(num_shards=4, partition="balanced")),
    Refusal(EmptySliceError, "fewer groups than slices", "1 group cannot fill", "expected at least 2",
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
        "`eval_dataset` holds 2 training examples", "evaluation chooses the model",
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
    Refusal(ConfigError, "layers that stay in the base", "`use_liger_kernel=True`", "stages that serve would stand",
        "Leave it off", use_liger_kernel=True),
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
    assert first == "These training arguments cannot be used, for 2 reasons:"
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
    Refusal(ConfigError, "missing answers", "`train_dataset` lacks `labels` in 2 of 12 rows", "Drop them",
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


@pytest.mark.parametrize(("steps", "factor"), [({}, 6.5), ({"max_steps": 5}, 11.5)], ids=["epochs", "steps"])
def test_what_settings_cost_that_nobody_chose_is_told(steps, factor, heard, tmp_path):
    args = training_arguments(tmp_path / "system", **steps)
    (said,) = told(heard, args=args)
    # One stage for each set of slices: on so many quarters of the rows, back through so many of the four layers.
    shares = [(depth / 4 if not steps else 1) * (4 + depth) / 8 for depth in (1, 2, 3, 4)]
    assert factor == sum(math.comb(4, depth) * share for depth, share in enumerate(shares, start=1))
    assert f"trains 15 stages, one for each set of slices, at about {factor} times the cost of one plain run" in said
    assert "`hf-s3t plan` recommends" in said and len(SystemFolder(tmp_path / "system").plan.stages()) == 15
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
        f"same script, for the {len(planned) - 1} that are missing, {planned[1]} from {where}."
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
