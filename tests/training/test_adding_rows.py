"""`add_examples` and `replace_examples`: a system that grew is, to the bit, one that had the rows from the start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from support.folders import add, apply, gate_says, stored_gate
from support.tiny import (
    make_trainer,
    plant_stages,
    rows_for,
    s3t_config,
    tiny_bert,
    tiny_llama,
    tokenizer_of_words,
    training_arguments,
)
from trl import SFTConfig

from hf_s3t import S3TModel, S3TSFTTrainer, S3TTrainer
from hf_s3t.errors import (
    ConfigError,
    ContentChangedError,
    EmptySliceError,
    ExampleIdError,
    UnknownExampleError,
)
from hf_s3t.folder.layout import GATE_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model.tensor_files import differing_tensors, read_tensors
from hf_s3t.operations.inspection import inspect
from hf_s3t.training import additions
from hf_s3t.training.gate_rows import gate_of


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")

ROWS = rows_for(tiny_llama(), 40)
FIRST, MORE = ROWS[:24], ROWS[24:]
BALANCED = {"num_shards": 2, "partition": "balanced"}


def data(rows) -> Dataset:
    return Dataset.from_list([dict(row) for row in rows])


def trainer_of(path, rows=FIRST, model=None, **settings):
    return make_trainer(path, model, rows=rows, config=s3t_config(**{**BALANCED, **settings}))


def planted(path, rows=FIRST, **settings):
    trainer = trainer_of(path, rows, **settings)
    plant_stages(trainer)
    return trainer


def with_slices(rows, folder) -> list[dict]:
    """The rows with columns that say where a system has them."""
    places = folder.table.places_of([row["id"] for row in rows])
    return [{**row, "shard": place[0], "slice": place[1]} for row, place in zip(rows, places, strict=True)]


def from_the_start(path, rows, folder, model=None):
    """A system of the same table, trained at once."""
    placed = {"partition": "column", "shard_column": "shard", "slice_column": "slice"}
    trainer = trainer_of(path, with_slices(rows, folder), model, num_shards=folder.config.num_shards, **placed)
    trainer.train()
    return trainer.folder


def assert_equal_stages(grown: SystemFolder, fresh: SystemFolder) -> None:
    common = grown.current_stages & fresh.current_stages
    assert {key.slices for key in grown.current_stages} == {key.slices for key in fresh.current_stages}
    assert len(common) >= len(grown.current_stages) - 2
    for key in common:
        mine, other = (read_tensors(folder.read_adapter(key), str(key)) for folder in (grown, fresh))
        assert not differing_tensors(mine, other), key


# What it says and does


def test_new_shards_hold_the_rows_and_nothing_else_changes(tmp_path):
    trainer = planted(tmp_path)
    before, valid = trainer.s3t_model.status()["depths"], trainer.folder.valid_stages
    report = trainer.add_examples(data(MORE[:12]), into="new_shards")
    assert (report.added, report.new_shards, report.known, report.weights) == (12, 1, 0, "equal")
    assert set(report.slices) == {"shard-2/0", "shard-2/1"} and sum(report.slices.values()) == 12
    assert all(stage.startswith("shard-2/") for stage in report.stages) and report.work > 0
    assert trainer.folder.current_stages == valid
    assert trainer.s3t_model.status()["depths"] == [*before, 0]
    assert trainer.s3t_config.num_shards == 2 and trainer.folder.config.num_shards == 3
    assert not inspect(tmp_path).problems


def test_a_dry_run_says_what_the_addition_then_does_and_writes_nothing(tmp_path):
    trainer = planted(tmp_path)
    lines, missing = trainer.folder.ledger.text, trainer.folder.missing_stages()
    preview = trainer.add_examples(data(MORE[:3]), into="slices", dry_run=True)
    assert preview.is_dry_run and trainer.folder.ledger.text == lines and not missing
    report = trainer.add_examples(data(MORE[:3]), into="slices")
    assert preview.stages == report.stages and preview.work == report.work and preview.slices == report.slices
    assert {key.slices for key in trainer.folder.missing_stages()} == {
        key.slices for key in trainer.folder.valid_stages - trainer.folder.current_stages
    }
    assert len(report.slices) == 1, "so few rows cost one slice"


def test_rows_go_to_the_slice_whose_stages_are_missing_anyway(tmp_path):
    trainer = planted(tmp_path)
    victim = trainer.folder.table.ids_in(1, 1)[0]
    trainer.s3t_model.unlearn([victim])
    report = trainer.add_examples(data(MORE[:2]), into="slices", dry_run=True)
    assert list(report.slices) == ["shard-1/1"] and report.stages == () and report.work == 0


def test_adding_lowers_no_answer_and_live_models_follow(tmp_path):
    trainer = planted(tmp_path)
    served, other = trainer.s3t_model, S3TModel.from_pretrained(tmp_path, base_model=tiny_llama())
    inputs = {"input_ids": torch.tensor([FIRST[0]["input_ids"]])}
    before = served(**inputs).logits
    trainer.add_examples(data(MORE[:4]), into="slices")
    for model in (served, other):
        assert torch.equal(model(**inputs).logits, before)
        assert model.status()["stages_behind"] > 0 and model.status()["additions"] == 1
    trainer.add_examples(data(MORE[4:]), into="new_shards")
    trainer.train()
    assert len(other.status()["depths"]) == 3 and not torch.equal(other(**inputs).logits, before)
    assert torch.equal(other(**inputs).logits, served(**inputs).logits)


def test_members_weigh_by_the_rows_that_are_in_where_that_is_asked_for(tmp_path):
    trainer = planted(tmp_path)
    trainer.add_examples(data(MORE[:4]), into="new_shards", weights="size")
    plant_stages(trainer)
    model = S3TModel.from_pretrained(tmp_path, base_model=tiny_llama())
    table = model.folder.table
    sizes = [sum(table.size(shard, s) for s in range(2)) for shard in range(3)]
    given = torch.tensor(sizes, dtype=torch.float64)
    inputs = {"input_ids": torch.tensor([FIRST[0]["input_ids"]])}
    with model.weighted_by(given):
        expected = model(**inputs).logits
    assert sizes[2] == 4 and torch.equal(model(**inputs).logits, expected)
    assert trainer.add_examples(data(MORE[:4]), weights="size").added == 0
    trainer.add_examples(data(MORE[:4]), weights="equal")
    with model.weighted_by(torch.ones(3, dtype=torch.float64)):
        equal = model(**inputs).logits
    model.refresh()
    assert torch.allclose(model(**inputs).logits, equal) and not torch.equal(equal, expected)


def test_a_trainer_that_is_made_anew_needs_the_rows_that_came(tmp_path):
    trainer = planted(tmp_path)
    trainer.add_examples(data(MORE[:3]), into="slices")
    with pytest.raises(ExampleIdError, match="lacks 3 examples"):
        trainer_of(tmp_path, FIRST)
    with pytest.raises(UnknownExampleError, match=r"add them by `trainer.add_examples` \(`--add_file`"):
        trainer_of(tmp_path, ROWS)
    assert trainer_of(tmp_path, [*MORE[:3], *FIRST]).folder.valid_stages == trainer.folder.valid_stages


def test_a_trainer_at_work_is_told_of_rows_that_another_process_adds_and_nothing_is_lost(tmp_path):
    trainer, other = trainer_of(tmp_path), trainer_of(tmp_path)
    trainer.train(max_stages=2)
    there = trainer.folder.valid_stages
    other.add_examples(data(MORE[:12]), into="new_shards")
    with pytest.raises(ExampleIdError, match=r"12 examples came to .* that `train_dataset` lacks"):
        trainer.train()
    assert trainer.folder.valid_stages == there
    other.train()
    assert other.folder.current_stages > there and not other.folder.missing_stages()


def test_rows_that_come_while_a_stage_trains_leave_it_what_it_saw(tmp_path):
    """It is written, serves, and is grown again with the rows."""
    from transformers import TrainerCallback

    class Adds(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if not other.folder.ledger.additions:
                other.add_examples(data(MORE[:2]), into="slices")

    other = trainer_of(tmp_path / "system", num_shards=1)
    trainer = make_trainer(
        tmp_path / "system", rows=FIRST, config=s3t_config(partition="balanced"), callbacks=[Adds()]
    )
    with pytest.raises(ExampleIdError, match="2 examples came"):
        trainer.train()
    folder = SystemFolder(tmp_path / "system")
    assert folder.valid_stages and not inspect(tmp_path / "system").problems
    written = next(iter(folder.valid_stages))
    assert sum(folder.stage_record(written)["counts"]) == len(FIRST) // 2
    other.train()
    assert_equal_stages(other.folder, from_the_start(tmp_path / "fresh", [*FIRST, *MORE[:2]], other.folder))


# To the bit


@pytest.mark.parametrize("into", ["slices", "new_shards"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_system_that_grew_equals_one_that_had_the_rows_from_the_start(tmp_path, into, dtype):
    rows = MORE[:3] if into == "slices" else MORE[:12]
    trainer = trainer_of(tmp_path / "grown", model=tiny_llama().to(dtype))
    trainer.train()
    trainer.add_examples(data(rows), into=into)
    trainer.train()
    fresh = from_the_start(tmp_path / "fresh", [*FIRST, *rows], trainer.folder, tiny_llama().to(dtype))
    assert_equal_stages(trainer.folder, fresh)


def test_a_row_that_comes_back_as_a_stage_begins_is_in_what_it_says_that_it_saw(tmp_path):
    """It may lie in the trainer's dataset: seen and not told of, its next deletion would leave the stage."""
    path = tmp_path / "system"

    class ComesBack(S3TTrainer):
        written, came = [], False

        def _bring_in(self, key):
            frozen = super()._bring_in(key)
            if not self.came and place[1] in key.prefix:
                self.came = True
                add(SystemFolder(path), {gone: place}, contents={gone: content}, again=[gone])
                self.folder.refresh_ledger()
            return frozen

        def _write(self, key, record):
            self.written.append((len(self.train_dataset), sum(record["counts"]), record["slices"]))
            return super()._write(key, record)

    first = trainer_of(path, num_shards=1)
    place = (0, first.folder.plan.stages()[0].prefix[0])
    gone = first.folder.table.ids_in(*place)[0]
    content = first.folder.table.examples([gone])[0].digest
    first.s3t_model.unlearn([gone])
    trainer = make_trainer(path, rows=FIRST, config=s3t_config(**{**BALANCED, "num_shards": 1}), cls=ComesBack)
    trainer.train()
    assert all(saw == told for saw, told, _ in trainer.written) and len(trainer.written) == len(trainer.folder.stages)
    assert trainer.folder.current_stages == trainer.folder.valid_stages
    assert trainer.s3t_model.unlearn([gone]).stages_removed


def test_a_shard_much_smaller_than_the_others_is_warned_of_where_members_weigh_alike(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_s3t.training.additions.logger.warning", said.append)
    trainer = trainer_of(tmp_path / "system")
    trainer.add_examples(data(MORE[:4]), dry_run=True, weights="size")
    trainer.add_examples(data(MORE[:8]), dry_run=True)
    assert not said
    trainer.add_examples(data(MORE[:4]), dry_run=True)
    assert len(said) == 1 and "has 4 rows, the others 12 on average" in said[0] and 'weights="size"' in said[0]


def test_adding_and_then_deleting_leaves_everything_as_if_the_row_had_never_come(tmp_path):
    never = trainer_of(tmp_path / "never")
    never.train()
    shutil.copytree(tmp_path / "never", tmp_path / "came")
    trainer = trainer_of(tmp_path / "came")
    trainer.add_examples(data(MORE[:3]), into="slices")
    trainer.train()
    trainer.s3t_model.unlearn([row["id"] for row in MORE[:3]])
    trainer.train()
    assert_equal_stages(trainer.folder, never.folder)
    untouched = never.folder.valid_stages & trainer.folder.valid_stages
    assert untouched and all(
        trainer.folder.table.slice_digest(*place) == never.folder.table.slice_digest(*place)
        for place in never.folder.table.sizes_of_slices
    )


def test_an_audit_finds_what_grew_as_it_is_recorded(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    trainer.add_examples(data(MORE[:3]), into="slices")
    behind = trainer.folder.valid_stages - trainer.folder.current_stages
    assert not set(trainer.verify().stages) & set(map(str, behind))
    with pytest.raises(ConfigError, match="lacks rows that came since"):
        trainer.verify([next(iter(behind))])
    trainer.train()
    assert trainer_of(tmp_path, [*FIRST, *MORE[:3]]).verify().mismatches == {}


# Edited rows


def test_an_edited_row_is_a_deletion_and_an_addition_in_one(tmp_path):
    trainer = trainer_of(tmp_path / "edited")
    trainer.train()
    old = FIRST[5]
    new = {**old, "input_ids": MORE[0]["input_ids"], "labels": MORE[0]["labels"]}
    place = trainer.folder.table.places_of([old["id"]])[0]
    preview = trainer.replace_examples(data([new, FIRST[6]]), dry_run=True)
    assert (preview.replaced, preview.known, preview.added) == (1, 1, 1)
    report = trainer.replace_examples(data([new, FIRST[6]]))
    assert report.stages_removed == preview.stages_removed != () and report.slices == preview.slices
    assert trainer.folder.table.places_of([old["id"]]) == [place] and not trainer.folder.is_deleted(old["id"])
    assert [entry.kind for entry in trainer.folder.ledger.entries] == ["replacement"]
    assert trainer.folder.ledger.num_deletions == 1 and not inspect(tmp_path / "edited").problems
    trainer.train()
    rows = [new if row is old else row for row in FIRST]
    assert_equal_stages(trainer.folder, from_the_start(tmp_path / "fresh", rows, trainer.folder))
    assert trainer_of(tmp_path / "edited", rows).folder.valid_stages == trainer.folder.valid_stages


def test_a_trainer_at_work_never_trains_on_what_another_process_replaced(tmp_path):
    """Its row of that id is what somebody had deleted: no stage may say that it saw the other one."""
    trainer, other = trainer_of(tmp_path), trainer_of(tmp_path)
    new = {**FIRST[5], "input_ids": MORE[0]["input_ids"], "labels": MORE[0]["labels"]}
    other.replace_examples(data([new]))
    with pytest.raises(ExampleIdError, match=r"1 example came to .* or has as they were before \('example-005'\)"):
        trainer.train()
    assert trainer.folder.valid_stages == frozenset()
    other.train()
    saw = [key for key in other.folder.plan.stages() if key.saw(set(other.folder.table.places_of([new["id"]])))]
    with pytest.raises(ExampleIdError, match=r"stages that are to be audited saw them"):
        trainer.verify(saw[:1])
    assert trainer.verify([key for key in other.folder.plan.stages() if key not in saw][:1]).ok
    assert trainer.replace_examples(data([new])).known == 1
    assert trainer.verify(saw[:1]).ok


def test_an_id_that_comes_back_with_another_content_is_not_what_a_trainer_at_work_has(tmp_path):
    trainer, other = trainer_of(tmp_path), trainer_of(tmp_path)
    other.s3t_model.unlearn([FIRST[5]["id"]])
    new = {**FIRST[5], "input_ids": MORE[0]["input_ids"], "labels": MORE[0]["labels"]}
    other.add_examples(data([new]), into="slices", again=[new["id"]])
    with pytest.raises(ExampleIdError, match="or has as they were before"):
        trainer.train()
    other.s3t_model.unlearn([new["id"]])
    assert trainer.train(max_stages=1).metrics["stages_trained"] == 1


# What is refused, and changes nothing


def edited(row, **changes) -> dict:
    return {**row, **changes}


REFUSED = {
    "an id in use": (lambda: [edited(MORE[0], id=FIRST[0]["id"])], {}, ContentChangedError, "1 id in use by other"),
    "too few": (lambda: MORE[:1], {}, EmptySliceError, 'cannot fill the 2 slices of a new shard.*into="slices"'),
    "other columns": (
        lambda: [edited(row, more=1) for row in MORE[:4]], {}, ConfigError, "has the columns .*expected those of",
    ),
    "no such way": (lambda: MORE[:4], {"into": "shards"}, ConfigError, "into"),
    "no such weights": (lambda: MORE[:4], {"weights": "loss"}, ConfigError, "weights"),
    "an idle word": (lambda: MORE[:4], {"again": ["nobody"]}, ExampleIdError, "`again` names 'nobody'"),
    "a token that is none": (
        lambda: [edited(row, input_ids=[999] * 8, labels=[999] * 8) for row in MORE[:4]], {}, ConfigError, "input_ids",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_addition_changes_nothing(tmp_path, name):
    rows, how, error, says = REFUSED[name]
    trainer = planted(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    with pytest.raises(error, match=says):
        trainer.add_examples(data(rows()), **how)
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != ".lock"}
    assert after == before
    assert trainer.folder.table.rows.keys() == {row["id"] for row in FIRST}


def test_an_unknown_label_is_refused(tmp_path):
    model = tiny_bert()
    rows = rows_for(model, 28)
    trainer = make_trainer(tmp_path, model, rows=rows[:24], config=s3t_config(**BALANCED))
    with pytest.raises(ConfigError, match="`labels` of `train_dataset` goes from 7 to 7"):
        trainer.add_examples(data([{**row, "labels": 7} for row in rows[24:]]))
    with pytest.raises(ConfigError, match="lacks `labels` in 1 of 4 rows"):
        trainer.add_examples(data([{**rows[24], "labels": None}, *rows[25:]]))
    with pytest.raises(ConfigError, match="lacks `labels` in 1 of 1 row"):
        trainer.replace_examples(data([{**rows[0], "labels": None}]))
    assert not trainer.folder.ledger.lines


def test_hashed_places_take_rows_into_slices_and_no_new_shards(tmp_path):
    trainer = planted(tmp_path, partition="hashed")
    with pytest.raises(ConfigError, match=r'into="new_shards" with partition="hashed".*into="slices"'):
        trainer.add_examples(data(MORE))
    trainer.add_examples(data(MORE), into="slices")
    whole = trainer_of(tmp_path / "whole", ROWS, partition="hashed")
    ids = [row["id"] for row in ROWS]
    assert trainer.folder.table.places_of(ids) == whole.folder.table.places_of(ids)


def test_what_was_deleted_comes_back_only_by_an_explicit_word(tmp_path):
    trainer = planted(tmp_path)
    gone = FIRST[3]
    trainer.s3t_model.unlearn([gone["id"]])
    fresh = trainer_of(tmp_path, [row for row in FIRST if row is not gone])
    with pytest.raises(
        ExampleIdError, match=r"1 example that somebody had deleted .*'example-003'.*name them in `again`"
    ):
        fresh.add_examples(data([gone]), into="slices")
    report = fresh.add_examples(data([gone]), into="slices", again=[gone["id"]])
    assert report.added == 1 and not fresh.folder.is_deleted(gone["id"])
    # Who gives the whole dataset brings nothing back by it.
    fresh.s3t_model.unlearn([gone["id"]])
    report = fresh.add_examples(data([*FIRST, *MORE[:2]]), into="slices")
    assert (report.added, report.passed_over, report.known) == (2, 1, 23)


def grouped(rows, groups) -> list[dict]:
    return [{**row, "user": user} for row, user in zip(rows, groups, strict=True)]


USERS = [f"user-{number // 2}" for number in range(24)]


def test_a_row_of_a_known_group_goes_where_its_group_is(tmp_path):
    trainer = planted(tmp_path, grouped(FIRST, USERS), group_column="user")
    place = trainer.folder.table.places_of([FIRST[6]["id"]])[0]
    rows = grouped(MORE[:3], ["user-3", "user-3", "someone else"])
    with pytest.raises(ConfigError, match=r'Got 2 rows of groups.*into="slices"'):
        trainer.add_examples(data([*rows, *grouped(MORE[3:6], ["x", "y", "z"])]), into="new_shards")
    trainer.add_examples(data(rows), into="slices")
    assert trainer.folder.table.places_of([row["id"] for row in MORE[:2]]) == [place, place]
    trainer.s3t_model.unlearn(groups=["user-3"])
    assert not set(trainer.folder.table.rows) & {MORE[0]["id"], MORE[1]["id"], FIRST[6]["id"]}
    with pytest.raises(ExampleIdError, match=r"1 group that somebody had deleted .*'user-3'.*name them in `again`"):
        trainer.add_examples(data(grouped(MORE[6:7], ["user-3"])), into="slices")
    trainer.add_examples(data(grouped(MORE[6:7], ["user-3"])), into="slices", again=["user-3"])
    assert "user-3" in trainer.folder.table.groups


def test_a_group_that_waits_to_be_deleted_gets_no_rows(tmp_path):
    trainer = planted(tmp_path, grouped(FIRST, USERS), group_column="user")
    trainer.s3t_model.unlearn_later(groups=["user-3"])
    with pytest.raises(ExampleIdError, match="was asked for and waits: 'user-3'"):
        trainer.add_examples(data(grouped(MORE[:1], ["user-3"])), into="slices")


def test_an_equal_row_goes_where_its_like_is(tmp_path):
    trainer = planted(tmp_path, colocate_duplicates=True)
    like = {**FIRST[9], "id": "like"}
    trainer.add_examples(data([like]), into="slices")
    assert len({*trainer.folder.table.places_of([FIRST[9]["id"], "like"])}) == 1


def test_rows_by_number_are_added_behind_the_others(tmp_path):
    bare = [{name: value for name, value in row.items() if name != "id"} for row in ROWS]
    trainer = planted(tmp_path, bare[:24], id_column=None)
    with pytest.raises((ContentChangedError, ConfigError), match=r"[gG]ive the whole dataset"):
        trainer.add_examples(data(bare[24:]))
    report = trainer.add_examples(data(bare))
    assert (report.added, report.known) == (16, 24)


def test_columns_say_where_rows_go(tmp_path):
    placed = [{**row, "shard": n % 2, "slice": n // 2 % 2} for n, row in enumerate(FIRST)]
    columns = {"partition": "column", "shard_column": "shard", "slice_column": "slice"}
    trainer = planted(tmp_path, placed, **columns)
    new = [{**row, "shard": 2, "slice": n % 2} for n, row in enumerate(MORE[:4])]
    with pytest.raises(ConfigError, match="with a shard or slice that into='slices' does not allow"):
        trainer.add_examples(data(new), into="slices")
    trainer.add_examples(data(new), into="new_shards")
    assert trainer.folder.table.places_of([MORE[1]["id"]]) == [(2, 1)]


def test_digests_stand_for_new_ids_where_they_stand_for_the_others(tmp_path):
    trainer = planted(tmp_path, keep_ids="digest")
    trainer.add_examples(data(MORE[:4]), into="slices")
    trainer.train()
    assert not any(MORE[0]["id"].encode() in path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    assert trainer.s3t_model.unlearn([MORE[0]["id"]]).deleted == 1


def test_a_row_to_replace_must_be_in(tmp_path):
    trainer = planted(tmp_path)
    with pytest.raises(UnknownExampleError, match=r"1 row of ids that are not in.*add_examples"):
        trainer.replace_examples(data(MORE[:1]))
    assert not trainer.folder.ledger.lines


# Other trainers, gates, processes


def spoken(rows) -> list[dict]:
    return [{"id": row["id"], "text": " ".join(f"w{token}" for token in row["input_ids"])} for row in rows]


def words():
    tokenizer = tokenizer_of_words()
    tokenizer.add_special_tokens({"eos_token": "</s>"})
    return tokenizer


def sft(path, rows, **settings):
    args = training_arguments(path, SFTConfig, bf16=False, max_length=16)
    config = s3t_config(**{**BALANCED, **settings})
    return make_trainer(path, rows=rows, cls=S3TSFTTrainer, args=args, processing_class=words(), config=config)


def test_texts_that_come_are_prepared_as_the_others(tmp_path):
    trainer = sft(tmp_path / "grown", spoken(FIRST))
    trainer.train()
    trainer.add_examples(data(spoken(MORE[:4])), into="slices")
    trainer.train()
    rows = with_slices(spoken([*FIRST, *MORE[:4]]), trainer.folder)
    fresh = sft(tmp_path / "fresh", rows, partition="column", shard_column="shard", slice_column="slice")
    fresh.train()
    assert_equal_stages(trainer.folder, fresh.folder)


def test_texts_that_are_none_are_refused_as_in_the_first_dataset(tmp_path):
    trainer = sft(tmp_path, spoken(FIRST))
    with pytest.raises(ConfigError, match="lacks `text` in 1 of 4 rows"):
        trainer.add_examples(data([{**spoken(MORE)[0], "text": None}, *spoken(MORE)[1:4]]), into="slices")
    assert not trainer.folder.ledger.lines


def test_a_gate_knows_the_rows_that_came_and_the_shards(tmp_path):
    trainer = make_trainer(tmp_path, rows=FIRST, processing_class=words(), config=s3t_config(**BALANCED, gate="terms"))
    plant_stages(trainer)
    trainer.add_examples(data(MORE[:4]), into="new_shards")
    plant_stages(trainer)
    folder = SystemFolder(tmp_path)
    gate = folder.load_gate()
    assert gate.counts.num_shards == 3 and len(gate.rows) == len(folder.table) and gate.is_counted
    model = S3TModel.from_pretrained(tmp_path, base_model=tiny_llama())
    asked = torch.tensor([MORE[0]["input_ids"]])
    (shard, _) = folder.table.places_of([MORE[0]["id"]])[0]
    assert model.gate_weights(asked)[0].argmax() == shard == 2
    model.unlearn([MORE[0]["id"]])
    assert len(SystemFolder(tmp_path).load_gate().rows) == len(folder.table) - 1


def test_a_model_with_a_gate_answers_while_the_gate_does_not_know_new_shards_yet(tmp_path):
    """Another process is between the rows and the gate."""
    trainer = make_trainer(tmp_path, rows=FIRST, processing_class=words(), config=s3t_config(**BALANCED, gate="terms"))
    plant_stages(trainer)
    model = S3TModel.from_pretrained(tmp_path, base_model=tiny_llama())
    asked = torch.tensor([FIRST[0]["input_ids"]])
    before = model(input_ids=asked).logits
    add(SystemFolder(tmp_path), {f"new-{number}": (2, number % 2) for number in range(4)})
    assert torch.equal(model(input_ids=asked).logits, before)


def gated(path, rows):
    return make_trainer(path, rows=rows, processing_class=words(), config=s3t_config(**BALANCED, gate="terms"))


def gate_of_who_has(path, rows) -> list[list]:
    """What a trainer with all rows of a system makes its gate of."""
    trainer = gated(path, rows)
    return gate_says(gate_of(trainer._rows_of_stages, trainer.folder.table, trainer.folder.key, words()))


@pytest.mark.parametrize("written_by", ["an addition", "build_gate"])
def test_a_gate_keeps_the_words_of_rows_that_another_trainer_brought(tmp_path, written_by):
    first = gated(tmp_path, FIRST)
    plant_stages(first)
    gated(tmp_path, FIRST).add_examples(data(MORE[:4]), into="new_shards")
    rows = [*FIRST, *MORE[:4]]
    if written_by == "build_gate":
        first.build_gate()
    else:
        first.add_examples(data(MORE[4:6]), into="slices")
        rows += MORE[4:6]
    assert stored_gate(SystemFolder(tmp_path)) == gate_of_who_has(tmp_path, rows)


def while_texts_are_read(monkeypatch, act) -> None:
    """Have another process act once while a trainer makes its gate, which takes long."""

    def read(*given):
        gate = gate_of(*given)
        monkeypatch.setattr(additions, "gate_of", gate_of)
        act()
        return gate

    monkeypatch.setattr(additions, "gate_of", read)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_gate_has_no_words_of_a_row_that_another_trainer_replaced(tmp_path, monkeypatch, when):
    first, second = gated(tmp_path, FIRST), gated(tmp_path, FIRST)
    plant_stages(first)
    edited = {**FIRST[0], "input_ids": MORE[0]["input_ids"]}
    if when == "before":
        second.replace_examples(data([edited]))
    else:
        while_texts_are_read(monkeypatch, lambda: second.replace_examples(data([edited])))
    first.build_gate()
    assert stored_gate(SystemFolder(tmp_path)) == gate_of_who_has(tmp_path, [edited, *FIRST[1:]])


def test_a_first_gate_has_none_of_what_another_trainer_replaced_before_and_that_is_told(tmp_path):
    first, second = gated(tmp_path, FIRST), gated(tmp_path, FIRST)
    (tmp_path / GATE_FILE).unlink()
    edited = {**FIRST[0], "input_ids": MORE[0]["input_ids"]}
    second.replace_examples(data([edited]))
    with pytest.warns(UserWarning, match="lacks the words of 1 row that another .*no gate"):
        first.build_gate()
    assert len(SystemFolder(tmp_path).load_gate().rows) == len(FIRST) - 1
    gated(tmp_path, [edited, *FIRST[1:]]).build_gate()
    assert stored_gate(SystemFolder(tmp_path)) == gate_of_who_has(tmp_path, [edited, *FIRST[1:]])


@pytest.mark.parametrize("deleted", ["before", "meanwhile"])
def test_a_gate_has_a_row_that_comes_back_while_it_is_made_where_it_is_now(tmp_path, monkeypatch, deleted):
    first, second = gated(tmp_path, FIRST), gated(tmp_path, FIRST)
    plant_stages(first)
    back = FIRST[0]["id"]
    place = first.folder.table.places_of([back])
    if deleted == "before":
        apply(first.folder, [back])

    def come_back():
        if deleted == "meanwhile":
            apply(second.folder, [back])
        # Among others it does not come to where it was.
        second.add_examples(data([FIRST[0], *MORE[:3]]), again=[back])

    while_texts_are_read(monkeypatch, come_back)
    first.build_gate()
    folder = SystemFolder(tmp_path)
    assert stored_gate(folder) == gate_of_who_has(tmp_path, [*FIRST, *MORE[:3]])
    assert folder.table.places_of([back]) != place


@pytest.mark.parametrize("why", ["another tokenizer", "was altered"])
def test_who_makes_a_gate_is_told_where_the_words_of_others_rows_are_lost(tmp_path, why):
    first, second = gated(tmp_path, FIRST), gated(tmp_path, FIRST)
    second.add_examples(data(MORE[:2]), into="slices")
    if why == "was altered":
        gate = tmp_path / GATE_FILE
        gate.write_bytes(gate.read_bytes()[:-1] + b"?")
    else:
        first.processing_class = tokenizer_of_words(more=60)
    with pytest.warns(UserWarning, match=rf"lacks the words of 2 rows that another .*{why}.*build_gate"):
        first.build_gate()
    assert len(SystemFolder(tmp_path).load_gate().rows) == len(FIRST)


@pytest.mark.parametrize("then", ["the call is made again", "a trainer has all rows"])
def test_a_gate_gets_the_words_of_rows_whose_trainer_died_before_it_was_written(tmp_path, monkeypatch, caplog, then):
    trainer, rows = gated(tmp_path, FIRST), [*FIRST, *MORE[:3]]

    def dies(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(SystemFolder, "put_gate", dies)
        trainer.add_examples(data(MORE[:3]), into="slices")
    if then == "the call is made again":
        assert trainer.add_examples(data(MORE[:3]), into="slices").known == 3
    else:
        again = gated(tmp_path, rows)
        assert "lacks the words of 3 of 27 examples" in caplog.text
        again.build_gate()
    assert stored_gate(SystemFolder(tmp_path)) == gate_of_who_has(tmp_path, rows)


@pytest.mark.slow
def test_an_audit_in_a_fresh_process_finds_a_grown_system_as_it_is_recorded(tmp_path):
    script = tmp_path / "grows.py"
    script.write_text(
        "import sys\n"
        "from training.test_adding_rows import FIRST, MORE, data, trainer_of\n"
        "rows = [*FIRST, *MORE[:3]] if sys.argv[2] == 'audit' else FIRST\n"
        "trainer = trainer_of(sys.argv[1], rows)\n"
        "if sys.argv[2] == 'audit':\n"
        "    report = trainer.verify()\n"
        "    sys.exit(0 if report.ok and not report.trained_here and len(report.stages) >= 6 else 1)\n"
        "trainer.train()\n"
        "trainer.add_examples(data(MORE[:3]), into='slices')\n"
        "trainer.train()\n"
    )
    tests = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(tests), *sys.path])}
    for what in ("grow", "audit"):
        command = [sys.executable, str(script), str(tmp_path / "system"), what]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert not done.returncode, done.stderr[-2000:]
