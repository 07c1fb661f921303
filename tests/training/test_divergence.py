"""A stage that is NaN or infinite is not written; where one lies on the disk, it is found, and told of in loading."""

import json
import math
import shutil

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from support.tiny import (
    image_rows,
    lm_rows,
    lora,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_llama,
    tiny_vit,
    training_arguments,
)
from transformers import TrainerCallback

from hf_s3t import S3TModel
from hf_s3t.errors import DivergedError
from hf_s3t.folder.finite import non_finite_tensors
from hf_s3t.operations.inspection import inspect
from hf_s3t.plan import StageKey
from hf_s3t.training.divergence import FiniteWatch, is_finite


pytestmark = [pytest.mark.usefixtures("one_thread", "shared_key")]

ROWS = lm_rows(16)
ONE_STAGE = s3t_config(num_slices=1, layers_per_slice=2)


def trainer_on(folder, config=ONE_STAGE, more=None, **changes):
    changes = {"per_device_train_batch_size": 2, **changes}
    args, model = training_arguments(folder, **changes), tiny_llama(2)
    # What grows out of all bounds is a product of what is trained.
    more = {"peft_config": lora(model, target_modules="all-linear"), **(more or {})}
    return make_trainer(folder, model, ROWS, args=args, config=config, **more)


# Numbers


KINDS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found_in_bytes_of_every_kind(kind, value):
    if kind == torch.float8_e4m3fn:
        # It has no infinity.
        value = math.copysign(math.nan, value)
    largest = torch.finfo(kind).max
    fine = torch.tensor([0.0, -0.0, largest, -largest, torch.finfo(kind).tiny], dtype=torch.float64).to(kind)
    spoilt = torch.cat([fine, torch.tensor([value], dtype=torch.float64).to(kind)])
    tensors = {"a fine one": fine, "b": spoilt, "c": torch.full((3,), -1), "d": fine.reshape(1, -1)[:, :0]}
    assert non_finite_tensors(safetensors.torch.save(tensors, {"format": "pt"})) == ["b"]
    if kind.itemsize > 1:
        assert is_finite({"a": fine, "d": tensors["d"]}) and not is_finite({"a": fine, "b": spoilt})


def test_it_is_found_far_inside_too():
    long = torch.zeros(2**20 + 3)
    assert non_finite_tensors(safetensors.torch.save({"long": long})) == []
    long[-1] = math.nan
    assert non_finite_tensors(safetensors.torch.save({"long": long})) == ["long"]


def test_steps_are_watched_without_waiting_for_the_device():
    watch = FiniteWatch()
    # Numbers of this device cannot be asked for.
    for step in range(1, 4):
        watch.note(torch.ones((), device="meta") * math.nan, step)
    with pytest.raises(RuntimeError):
        _ = watch.first_step


def test_the_first_step_is_the_first_of_losses_and_gradients():
    watch = FiniteWatch()
    assert watch.first_step is None
    for step, value in enumerate([1.0, torch.tensor(2.0), None, torch.tensor([1.0, math.inf]), math.nan], 1):
        watch.note(value, step)
    assert watch.first_step == 4


# Training


def test_a_stage_of_nan_is_not_written_and_the_error_says_where_since_when_and_what_to_do(tmp_path):
    rows = image_rows(16)
    rows[5]["pixel_values"][0][0][0] = math.inf
    args = training_arguments(tmp_path, per_device_train_batch_size=1)
    trainer = make_trainer(tmp_path, tiny_vit(2), rows, args=args, config=s3t_config(num_shards=2, num_slices=1))
    spoilt = trainer.folder.table.rows["example-005"].shard
    with pytest.raises(DivergedError) as told:
        trainer.train()
    place = StageKey(spoilt, (0,))
    assert str(told.value).startswith(f"{place} is NaN or infinite after")
    step = trainer._finite.first_step
    assert f"since step {step}. It is not written" in str(told.value) and "unlearn" in str(told.value)
    # The other shard is trained before, or not yet.
    assert place not in trainer.folder.stages and not (tmp_path / place.path).exists()
    assert inspect(tmp_path).problems == ()
    # The remedy.
    trainer.s3t_model.unlearn(["example-005"])
    trainer.train()
    assert len(trainer.folder.valid_stages) == 2
    for key in trainer.folder.stages:
        assert is_finite(load_file(tmp_path / key.path / "adapter_model.safetensors"))


def test_one_tensor_is_enough_though_no_loss_shows_it(tmp_path):
    class Spoils(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == state.max_steps:
                tensor = next(p for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n)
                tensor.data[0, 0] = -math.inf

    trainer = trainer_on(tmp_path, more={"callbacks": [Spoils()]})
    with pytest.raises(DivergedError, match=r"after 8 steps, in \S*lora_B\S*\. No loss and no gradient was so before"):
        trainer.train()
    assert not trainer.folder.stages


def test_nothing_of_nan_is_saved_meanwhile_and_no_more_steps_are_taken(tmp_path):
    steps = []

    class Counts(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append(state.global_step)

    # The first step is fine, and throws the weights out of what can be computed with.
    trainer = trainer_on(
        tmp_path,
        learning_rate=1e30,
        max_grad_norm=0,
        save_strategy="steps",
        save_steps=3,
        more={"callbacks": [Counts()]},
    )
    with pytest.raises(DivergedError, match=r"after 3 steps.*since step 2"):
        trainer.train()
    assert steps == [1, 2, 3]
    assert not list(tmp_path.rglob("checkpoints/**/*.safetensors"))


def test_at_a_step_that_is_logged_training_ends_too(tmp_path):
    trainer = trainer_on(tmp_path, learning_rate=1e30, max_grad_norm=0, logging_strategy="steps", logging_steps=4)
    with pytest.raises(DivergedError, match=r"after 4 steps.*since step 2"):
        trainer.train()


class Loss:
    """Its value is NaN at a time, its gradient never."""

    def __init__(self):
        self.calls = 0

    def __call__(self, outputs, labels, num_items_in_batch=None):
        self.calls += 1
        return outputs.logits.float().pow(2).mean() + (math.nan if self.calls == 3 else 0.0)


def test_a_loss_that_is_nan_and_leaves_the_weights_alone_is_told_of_and_the_stage_is_written(tmp_path, caplog):
    trainer = trainer_on(tmp_path, logging_nan_inf_filter=False, more={"compute_loss_func": Loss()})
    trainer.train()
    assert f"{StageKey(0, (0,))} is finite, though a loss or its gradient was not, first in step 3" in caplog.text
    assert len(trainer.folder.valid_stages) == 1
    # What is no number is not written down as one: it is no JSON.
    record = (tmp_path / "stages/shard-0/0/stage.json").read_text()
    assert "train_loss" not in json.loads(record, parse_constant=pytest.fail)["metrics"]


def test_a_checkpoint_of_nan_of_an_earlier_version_is_not_resumed(tmp_path, monkeypatch, caplog):
    class Dies(TrainerCallback):
        def __init__(self, version):
            self.version = version

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if self.version == "now":
                return
            if state.global_step == 3:
                # As it would be, had the checkpoint been written.
                next(p for p in model.parameters() if p.requires_grad).data.fill_(math.nan)
            if state.global_step == 5:
                raise KeyboardInterrupt

    saving = dict(save_strategy="steps", save_steps=4)
    with monkeypatch.context() as earlier:
        earlier.setattr("hf_s3t.training.stage_watch.refuse_diverged", lambda *args: None)
        with pytest.raises(KeyboardInterrupt):
            trainer_on(tmp_path / "old", more={"callbacks": [Dies("earlier")]}, **saving).train()
    # Callbacks that write to the model are of the recipe.
    trainer_on(tmp_path / "old", more={"callbacks": [Dies("now")]}, **saving).train()
    assert "checkpoint-4 is not resumed from: its weights are NaN or infinite" in caplog.text
    trainer_on(tmp_path / "new", **saving).train()
    one, other = (
        (tmp_path / name / "stages/shard-0/0/adapter_model.safetensors").read_bytes() for name in ("old", "new")
    )
    assert one == other


# On the disk


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A system as earlier versions left it: of two sequences, the first stage of one has a NaN."""
    trainer = trainer_on(tmp_path, s3t_config(layers_per_slice=1))
    draw = torch.randn
    monkeypatch.setattr(
        "support.tiny.torch.randn",
        lambda *args, **kwargs: draw(*args, **kwargs).index_fill_(0, torch.tensor([0]), math.nan),
    )
    plant_stages(trainer, limit=1)
    monkeypatch.undo()
    return trainer


def test_check_finds_it_and_names_the_stage_the_tensor_and_the_remedy(old):
    folder = old.folder.path / "stages/shard-0/0"
    (problem,) = inspect(old.folder.path).problems
    assert problem.startswith(f"{folder} is NaN or infinite, in base_model.") and "Remove the folder" in problem
    assert not inspect(old.folder.path, adapters=False).problems
    assert old.s3t_model.check() == list(inspect(old.folder.path).problems)


def test_loading_it_says_so_and_it_can_still_be_unlearned_in(old, monkeypatch):
    said = []
    monkeypatch.setattr("hf_s3t.model.stack.logger.warning_once", said.append)
    model = S3TModel.from_pretrained(old.folder.path, base_model=tiny_llama(2))
    assert [one.partition(",")[0] for one in said] == ["shard-0/0 is NaN or infinite"]
    gone = next(i for i, row in old.folder.table.rows.items() if row.slice == 0)
    assert model.unlearn([gone]).stages_removed


def test_nothing_is_trained_upon_it(old):
    with pytest.raises(DivergedError, match="shard-0/0, on which shard-0/0-1 stands, is NaN"):
        old.train()
    # The remedy.
    shutil.rmtree(old.folder.path / "stages/shard-0/0")
    old.train()
    assert len(old.folder.valid_stages) == 4 and not inspect(old.folder.path).problems
