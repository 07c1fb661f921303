"""What goes through all rows does so once, however many stages there are; after a deletion, through what lost one."""

from collections import Counter

import pytest
from support.insides import rows_of_stages
from support.tiny import ids_of, lm_rows, make_trainer, s3t_config, tiny_llama, training_arguments
from transformers import LlamaForCausalLM

from hf_s3t import S3TTrainer
from hf_s3t.folder.system import SystemFolder
from hf_s3t.plan.stages import StageKey
from hf_s3t.records import examples
from hf_s3t.training import rows as rows_module


ROWS = 24
CONFIG = s3t_config(num_slices=2, budget=2)


@pytest.fixture
def ordered(monkeypatch):
    """How often an example was put in its place in the order of its slice, by its id."""
    counts = Counter()
    in_order = examples.in_order

    def counted(ids, seed):
        counts.update(ids)
        return in_order(ids, seed)

    monkeypatch.setattr(examples, "in_order", counted)
    return counts


@pytest.fixture
def digested(monkeypatch):
    """How many rows were digested as they are fed."""
    found = []
    encode_rows = rows_module.encode_rows
    monkeypatch.setattr(
        rows_module, "encode_rows", lambda *given: (found.append(row) or row for row in encode_rows(*given))
    )
    return found


def test_all_stages_together_order_and_digest_each_row_once(tmp_path, ordered, digested):
    trainer = make_trainer(tmp_path / "system", rows=lm_rows(ROWS), config=CONFIG)
    digested.clear()
    trainer.train()
    assert len(trainer.folder.valid_stages) == 4
    assert ordered == dict.fromkeys(ids_of(ROWS), 1)
    assert len(digested) == ROWS


def test_stages_that_are_grown_again_order_only_what_lost_a_row(tmp_path, ordered, digested):
    trainer = make_trainer(tmp_path / "system", rows=lm_rows(ROWS), config=CONFIG)
    trainer.train()
    table = trainer.folder.table
    deleted = next(iter(table.rows))
    shard, slice_ = next(iter(table.places([deleted])))
    left = set(table.members(shard, slice_)) - {deleted}
    trainer.s3t_model.unlearn([deleted])
    ordered.clear()
    digested.clear()
    trainer.train()
    assert ordered == dict.fromkeys(left, 1)
    assert not digested


def test_the_order_is_that_of_a_table_read_anew(tmp_path):
    """Also after a deletion, and where the table has digests in the place of ids."""
    for keep_ids in ("plain", "digest"):
        path = tmp_path / keep_ids
        config = s3t_config(num_slices=2, budget=2, keep_ids=keep_ids)
        trainer = make_trainer(path, rows=lm_rows(ROWS), config=config)
        kept = rows_of_stages(trainer)
        for gone in ([], ids_of(ROWS)[:3]):
            trainer.s3t_model.unlearn(gone)
            left = [row for row in lm_rows(ROWS) if row["id"] not in gone]
            anew = rows_of_stages(make_trainer(path, rows=left, config=config))
            for key in trainer.folder.plan.stages():
                fed = kept.select(key, trainer.folder.table)
                assert fed[:] == anew.select(key, SystemFolder(path).table)[:] and len(fed)


def test_a_slice_that_preparation_empties_is_known_as_empty_after_a_deletion(tmp_path):
    """Positions that were noted of a slice are not those of what is left of it."""
    trainer = make_trainer(tmp_path / "system", rows=lm_rows(ROWS), config=CONFIG)
    rows, place = rows_of_stages(trainer), (0, 1)
    assert rows.positions(StageKey(0, (1,)), trainer.folder.table)
    trainer.s3t_model.unlearn(trainer.folder.table.members(*place))
    assert rows.empty(trainer.folder.table) == {place} and not rows.positions(StageKey(0, (1,)), trainer.folder.table)


def test_the_table_is_read_once_to_make_a_trainer(tmp_path, monkeypatch):
    reads = []
    read_rows = SystemFolder._read_rows
    monkeypatch.setattr(SystemFolder, "_read_rows", lambda self: reads.append(self) or read_rows(self))
    for _ in ("new", "to go on with"):
        make_trainer(tmp_path / "system", rows=lm_rows(ROWS), config=CONFIG)
        assert len(reads) == 1
        reads.clear()


def test_a_deletion_that_comes_while_a_trainer_is_made_is_known_to_it(tmp_path, monkeypatch):
    path, deleted = tmp_path / "system", ids_of(ROWS)[0]
    make_trainer(path, rows=lm_rows(ROWS), config=CONFIG)

    def delete(trainer):
        folder = SystemFolder(path)
        with folder.lock():
            folder.record_deletion([deleted], [], {})

    # By then the folder was read, and the rows were matched with it.
    monkeypatch.setattr(S3TTrainer, "_align_tokens", delete)
    trainer = make_trainer(path, rows=lm_rows(ROWS), config=CONFIG)
    assert trainer.folder.table.rows.keys() == {*ids_of(ROWS)} - {deleted}


def test_parameters_are_counted_once_a_stage_and_operations_are_as_trainer_counts_them(tmp_path, monkeypatch):
    counts = []
    counted = LlamaForCausalLM.num_parameters
    monkeypatch.setattr(
        LlamaForCausalLM, "num_parameters", lambda self, **how: counts.append(counted(self, **how)) or counts[-1]
    )
    model = tiny_llama(2)
    args = training_arguments(tmp_path / "system", per_device_train_batch_size=4)
    trainer = make_trainer(tmp_path / "system", model=model, rows=lm_rows(ROWS), config=CONFIG, args=args)
    counts.clear()
    trainer.train()
    assert len(counts) == len(trainer.folder.valid_stages) == 4
    # Rows are of one length: no batch is padded.
    numbers = sum(len(row["input_ids"]) for row in lm_rows(ROWS)) * trainer.folder.table.size(0, 0) / ROWS
    recorded = trainer.folder.stage_record(StageKey(0, (0,)))["metrics"]["total_flos"]
    assert recorded == 6 * numbers * args.num_train_epochs * counts[0]
