"""The audit: what it repeats, what it says when bits differ, and that it leaves everything as it was."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from support.folders import apply, files_of, forge_stage
from support.receipts import public, signer
from support.tiny import (
    classification_rows,
    lm_rows,
    lora,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from transformers import TrainerCallback
from trl import SFTConfig

from hf_s3t import S3TTrainer
from hf_s3t.errors import ConfigError, FolderError, S3TError
from hf_s3t.folder.audits_file import read_audits
from hf_s3t.folder.files import file_digest
from hf_s3t.folder.system import SystemFolder
from hf_s3t.operations.signed_receipts import signed_receipt
from hf_s3t.plan.stages import StageKey
from hf_s3t.signing.keys import use_signer
from hf_s3t.signing.verification import verify
from hf_s3t.training import stage_memory
from hf_s3t.training.audit import AuditKey, keep_report, verify_stages
from hf_s3t.training.circumstances import differing, recipe_of


pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = lm_rows(12)
STAGE, ON_TOP = "shard-0/0", "shard-0/0-1"


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """A trained system; not to be changed."""
    trainer = make_trainer(tmp_path_factory.mktemp("verify") / "system", tiny_llama(2), rows=ROWS, config=s3t_config())
    trainer.train()
    return trainer.folder.path


@pytest.fixture
def system(grown, tmp_path):
    return Path(shutil.copytree(grown, tmp_path / "system"))


def trainer_of(system, rows=ROWS):
    return make_trainer(system, tiny_llama(2), rows=rows, config=s3t_config())


def record_otherwise(system, stage, **changes):
    """Have a stage say that it was trained under other circumstances."""
    recorded = trainer_of(system).folder
    key = next(key for key in recorded.stages if str(key) == stage)
    forge_stage(system, stage, circumstances={**recorded.stage_record(key)["circumstances"], **changes})


def swap_tensors(system, stage):
    """Have a stage hold other tensors than training gave it, with digests that match, and what stands on it too."""
    folder = system / "stages" / stage
    tensors = load_file(folder / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    tensors[name] = tensors[name].clone()
    tensors[name].view(torch.uint8).view(-1)[0] ^= 1
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    digest = file_digest(folder / "adapter_model.safetensors")
    files = {
        "adapter_model.safetensors": digest,
        "adapter_config.json": file_digest(folder / "adapter_config.json"),
    }
    forge_stage(system, stage, files=files)
    if stage == STAGE:
        forge_stage(system, ON_TOP, below=digest)
    return name


def test_what_was_trained_comes_out_again_and_nothing_is_left_of_it(system):
    before = files_of(system)
    trainer = trainer_of(system)
    threads, held = torch.get_num_threads(), set(trainer.s3t_model.stack.loaded)
    report = trainer.verify()
    assert report.ok and len(report.stages) == 4 and not report.circumstances
    assert str(report).endswith("bit for bit the same")
    assert files_of(system) == before
    assert torch.get_num_threads() == threads
    loaded = set(trainer.s3t_model.stack.loaded)
    assert held <= loaded and not any(isinstance(key, AuditKey) for key in loaded)


def test_after_a_deletion_the_audit_needs_only_the_data_that_is_left(system):
    gone = ROWS[0]["id"]
    trainer_of(system).s3t_model.unlearn([gone])
    report = trainer_of(system, [row for row in ROWS if row["id"] != gone]).verify()
    assert report.ok and len(report.stages) == 1
    assert re.fullmatch(r"1 stage trained again in .* s: bit for bit the same", str(report))


@pytest.mark.parametrize("stage", [STAGE, ON_TOP])
def test_a_bit_that_training_did_not_set_is_found_and_its_tensor_named(stage, system):
    name = swap_tensors(system, stage)
    report = trainer_of(system).verify([ON_TOP])
    assert not report.ok and not report.circumstances
    assert report.mismatches == {stage: [name]}
    assert str(report) == f"{stage} differs in {name}"


def test_a_mismatch_first_says_which_circumstance_is_another(system):
    swap_tensors(system, STAGE)
    record_otherwise(system, STAGE, versions={"torch": "1.0.0"}, cpu_capability="SPARC")
    report = trainer_of(system).verify([STAGE])
    lines = str(report).splitlines()
    assert lines[0].startswith("recorded cpu_capability: 'SPARC', now ")
    assert any(line.startswith("recorded versions.torch: '1.0.0', now ") for line in lines[:-1])
    assert lines[-1].startswith(f"{STAGE} differs in ")


def test_rows_that_are_prepared_otherwise_are_a_circumstance(system):
    trainer = trainer_of(system)
    # As another tokenizer would: the rows are the same, what the model is fed is not.
    trainer._stage_rows.prepared = trainer._stage_rows.prepared.map(
        lambda row: {"input_ids": row["input_ids"][::-1]}, keep_in_memory=True
    )
    report = trainer.verify([STAGE])
    assert list(report.circumstances) == ["data_digest"] and STAGE in report.mismatches
    assert str(report).startswith("recorded data_digest: ")


def test_the_recorded_number_of_threads_is_restored_for_the_audit(system, monkeypatch):
    record_otherwise(system, STAGE, threads=2)
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    report = trainer_of(system).verify([STAGE])
    assert 2 in asked and asked[-1] == 1
    assert "threads" not in report.circumstances


@pytest.mark.parametrize(("name", "value"), [("world_size", 2), ("device", "NVIDIA H100")])
def test_an_audit_that_cannot_tell_is_refused(name, value, system):
    record_otherwise(system, STAGE, **{name: value})
    before = files_of(system)
    with pytest.raises(ConfigError, match=f"was trained with {name} = .* Run the audit as the training ran"):
        trainer_of(system).verify([STAGE])
    assert files_of(system) == before


def test_an_audit_of_nothing_is_refused(system):
    with pytest.raises(ConfigError, match="`stages` is empty, and an audit of nothing finds nothing"):
        trainer_of(system).verify([])


def test_an_audit_needs_the_data(system):
    model = tiny_llama(2)
    trainer = S3TTrainer(model=model, args=training_arguments(system), peft_config=lora(model))
    with pytest.raises(ConfigError, match=r"no `train_dataset` to train stages again on. Give it to the trainer"):
        trainer.verify()


def test_where_evaluation_chooses_its_settings_are_part_of_the_recipe(tmp_path):
    """When it begins decides which step is the best, and its batches the last bits of the loss."""
    choosing = dict(
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        learning_rate=0.3,
        num_train_epochs=3,
    )

    def trainer(**changes):
        args = training_arguments(tmp_path / "system", **{**choosing, **changes})
        asked = Dataset.from_list([{k: v for k, v in row.items() if k != "id"} for row in lm_rows(8, seed=9)])
        config = s3t_config(budget=1)
        return make_trainer(
            tmp_path / "system", tiny_llama(2), rows=ROWS, args=args, eval_dataset=asked, config=config
        )

    trainer().train()
    assert trainer().verify([STAGE]).ok
    for changes in ({"eval_delay": 4}, {"per_device_eval_batch_size": 3}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))}.* Give the trainer the recorded arguments"):
            trainer(**changes).verify()


class DeletesWhileAudited(TrainerCallback):
    """Another process deletes an example in the first step of an audit."""

    def __init__(self, path, victim):
        self.path, self.victim = path, victim

    def on_step_end(self, args, state, control, **kwargs):
        """Once."""
        if self.victim is not None:
            apply(SystemFolder(self.path), [self.victim])
            self.victim = None


@pytest.mark.parametrize(
    "saving", [{}, {"save_strategy": "steps", "save_steps": 1}], ids=["plain", "with checkpoints"]
)
def test_a_deletion_while_an_audit_runs_is_named_as_such(saving, tmp_path):
    args = training_arguments(tmp_path, **saving)
    trainer = make_trainer(tmp_path, tiny_llama(2), rows=lm_rows(12), config=s3t_config(budget=1), args=args)
    plant_stages(trainer)
    first = trainer.folder.plan.stages()[0]
    trainer.add_callback(DeletesWhileAudited(tmp_path, trainer.folder.table.members(0, first.prefix[0])[0]))
    with pytest.raises(S3TError, match=f"A deletion removed {first}.* while the audit ran.* Run the audit again"):
        trainer.verify()


def test_an_evaluation_of_a_language_model_with_smoothed_labels_shifts_them(tmp_path):
    rows = Dataset.from_list([{"input_ids": r["input_ids"], "labels": r["input_ids"]} for r in lm_rows(4, seed=9)])
    args = training_arguments(tmp_path, label_smoothing_factor=1e-7)
    trainer = make_trainer(
        tmp_path, tiny_llama(2), rows=lm_rows(12), config=s3t_config(budget=1), args=args, eval_dataset=rows
    )
    trainer.train()
    with torch.no_grad():
        own = trainer.s3t_model(**{name: torch.tensor(rows[name][:]) for name in rows.column_names}).loss.item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(own, abs=1e-4)


@pytest.mark.parametrize(
    "changed", [{"dataloader_persistent_workers": True, "dataloader_num_workers": 1}, {"dataset_num_proc": 2}], ids=str
)
def test_what_decides_how_batches_come_about_is_part_of_the_recipe(changed, tmp_path):
    plain = recipe_of(training_arguments(tmp_path, SFTConfig))
    assert {*differing(plain, recipe_of(training_arguments(tmp_path, SFTConfig, **changed)))} == {*changed}


# That the compiler is reset for each is shown in `test_parts.py`; this one compiles, which takes its time.
@pytest.mark.slow
def test_every_stage_is_compiled_for_itself(tmp_path, monkeypatch):
    resets, reset = [], torch.compiler.reset
    monkeypatch.setattr(torch.compiler, "reset", lambda: (resets.append(1), reset()))
    args = training_arguments(tmp_path, torch_compile=True, torch_compile_backend="eager")
    # One layer, and all batches of one size: others would be compiled again.
    config = s3t_config(num_shards=2, num_slices=1, budget=1, partition="balanced")
    trainer = make_trainer(tmp_path, tiny_llama(1), lm_rows(8), config=config, args=args)
    trainer.train()
    assert len(resets) == len(trainer.folder.stages) == 2


SWITCHED = []


def switching_loss(outputs, labels, num_items_in_batch=None):
    """One that changes for good with its first batch, under a global name, which nothing can see."""
    loss = torch.nn.functional.cross_entropy(outputs.logits, labels)
    loss = loss if SWITCHED else loss + outputs.logits.square().mean()
    SWITCHED.append(True)
    return loss


def leaking_trainer(path):
    model = tiny_bert(2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = s3t_config(num_shards=2, num_slices=1, budget=1)
    return make_trainer(path, model, classification_rows(24), config=config, compute_loss_func=switching_loss)


def test_only_an_audit_in_a_fresh_process_finds_what_stages_left_in_theirs(tmp_path, monkeypatch):
    """The report says which stages are the process's own."""
    SWITCHED.clear()
    trainer = leaking_trainer(tmp_path)
    trainer.train()
    report = trainer.verify(["shard-1/0"])
    assert report.ok and report.trained_here == report.stages == ("shard-1/0",)
    # What a new process begins with. That the recipes audit in one is tested with them.
    SWITCHED.clear()
    monkeypatch.setattr("hf_s3t.training.stage_memory.TRAINED_HERE", set())
    report = leaking_trainer(tmp_path).verify(["shard-1/0"])
    assert not report.ok and report.trained_here == ()


def test_an_audit_of_the_process_s_own_stages_warns(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_llama(2), ROWS, config=s3t_config(budget=1))
    plant_stages(trainer)
    said = []
    monkeypatch.setattr("hf_s3t.training.audit.logger.warning_once", said.append)
    first = [str(trainer.folder.plan.stages()[0])]
    assert trainer.verify(first).trained_here == () and not said
    trainer.s3t_model.unlearn(trainer.folder.table.members(0, trainer.folder.plan.stages()[0].prefix[0])[:1])
    trainer.train()
    assert trainer.verify(first).trained_here
    assert len(said) == 1 and "Make the same trainer in a fresh process and call `verify()` there" in said[0]


@pytest.fixture
def signing(monkeypatch):
    """A process that signs, and has trained nothing."""
    monkeypatch.setattr(stage_memory, "TRAINED_HERE", set())
    use_signer(signer())
    yield
    use_signer(None)


def test_an_audit_is_recorded_with_those_of_others_and_told_by_receipts(system, signing):
    trainer_of(system).s3t_model.unlearn([ROWS[0]["id"]])
    report = trainer_of(system).verify()
    (kept,) = read_audits(system)
    assert kept.key.keyid == public().keyid and kept.statement.fresh and not kept.statement.differing
    assert tuple(kept.statement.stages) == report.stages
    (told,) = verify(signed_receipt(system, 1, signer()).envelope, public()).audits
    assert (told["by"], told["equal"], told["differing"]) == (public().keyid, len(report.stages), 0)


def test_what_differs_is_recorded_and_what_says_too_little_is_not(system, signing, monkeypatch):
    swap_tensors(system, STAGE)
    assert not trainer_of(system).verify([STAGE]).ok
    assert [kept.statement.differing for kept in read_audits(system)] == [(STAGE,)]
    trainer = trainer_of(system)
    digests = {trainer.folder.adapter_digest(key) for key in trainer.folder.stages}
    monkeypatch.setattr(stage_memory, "TRAINED_HERE", digests)
    other = str(next(key for key in trainer.folder.valid_stages if str(key) not in (STAGE, ON_TOP) and key.depth == 1))
    assert trainer.verify([other]).trained_here
    assert len(read_audits(system)) == 1


def test_a_stage_that_is_grown_again_before_its_audit_is_recorded_is_another_and_not_told_of(
    system, signing, monkeypatch
):
    report = verify_stages(trainer_of(system), [STAGE])
    assert report.ok and report.adapters == {
        STAGE: SystemFolder(system).adapter_digest(StageKey.from_path(f"stages/{STAGE}"))
    }
    swap_tensors(system, STAGE)
    said = []
    monkeypatch.setattr("hf_s3t.training.audit.logger.warning", said.append)
    keep_report(SystemFolder(system), report)
    assert not read_audits(system) and f"{STAGE} as it is not any more" in said[0]


def test_without_a_key_nothing_is_recorded_and_where_nothing_can_be_that_is_said(system, signing, monkeypatch):
    def only_read(self):
        raise FolderError("It may only be read.")

    said = []
    monkeypatch.setattr("hf_s3t.training.audit.logger.warning", said.append)
    with monkeypatch.context() as patch:
        patch.setattr(SystemFolder, "writing", only_read)
        assert trainer_of(system).verify([STAGE]).ok
    assert len(said) == 1 and "The audit is not recorded" in said[0] and "only be read" in said[0]
    use_signer(None)
    assert trainer_of(system).verify([STAGE]).ok and not read_audits(system)
