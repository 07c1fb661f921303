"""What keeps state (a collator that draws, a callback that counts, a buffer of the base) brings none to a stage."""

import functools
import gc
import random
import shutil
import threading
import weakref

import numpy as np
import pytest
import torch
from bitsandbytes.functional import GlobalPageManager
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from support.folders import files_of
from support.insides import routing_of, stack_of
from support.tiny import (
    batch_of,
    classification_rows,
    lm_rows,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from tokenizers import Tokenizer, models
from torch import nn
from transformers import (
    BertForMaskedLM,
    DataCollatorForLanguageModeling,
    DataCollatorWithPadding,
    EarlyStoppingCallback,
    PreTrainedTokenizerFast,
    TrainerCallback,
    default_data_collator,
)
from transformers.trainer_callback import ExportableState
from trl import SFTConfig

from hf_s3t import S3TSFTTrainer, S3TTrainer
from hf_s3t.errors import ConfigError, IsolationError, S3TError
from hf_s3t.folder.layout import ADAPTER_FILE
from hf_s3t.model.tensor_files import differing_tensors
from hf_s3t.plan.partition import shards_and_slices
from hf_s3t.training.plan_run import old_objects_passed_over, pass_over_what_stays


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")

CONFIG = s3t_config(num_shards=2, budget=1, partition="balanced")
ONE_SHARD = s3t_config(budget=1, partition="balanced")
ROWS = [{"id": row["id"], "input_ids": row["input_ids"]} for row in lm_rows(16)]
MORE = Dataset.from_list([{"input_ids": row["input_ids"]} for row in lm_rows(6, seed=5)])


class LastShardFirst(S3TTrainer):
    """Trains the last shard first."""

    def _first_of_missing(self, current, behind):
        return min(self._missing(current), key=lambda key: (-key.shard, key.depth), default=None)


def masking():
    """A collator that draws from a generator of its own."""
    special = ("pad", "mask", "unk", "sep", "cls")
    words = {f"[{name.upper()}]": number for number, name in enumerate(special)} | {f"w{i}": i for i in range(5, 60)}
    named = {f"{name}_token": f"[{name.upper()}]" for name in special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), **named)
    return DataCollatorForLanguageModeling(tokenizer, mlm=True, seed=0)


def masked_trainer(path, cls=S3TTrainer, args=None, **more):
    model = BertForMaskedLM(tiny_bert(2).config)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    return make_trainer(
        path,
        model=model.eval(),
        rows=ROWS,
        cls=cls,
        args=training_arguments(path, per_device_train_batch_size=2, **(args or {})),
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules=["query", "value"]),
        config=CONFIG,
        **{"data_collator": masking(), **more},
    )


def stages_of(trainer):
    folder = trainer.folder
    return {str(key): load_file(folder.path / key.path / "adapter_model.safetensors") for key in folder.plan.stages()}


def same(one, other):
    return one.keys() == other.keys() and not any(differing_tensors(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    trainer = masked_trainer(tmp_path_factory.mktemp("undisturbed") / "system")
    trainer.train()
    return stages_of(trainer)


@pytest.mark.parametrize(
    "disturbed",
    [
        {"cls": LastShardFirst},
        {"eval_dataset": MORE, "args": {"eval_strategy": "steps", "eval_steps": 1}},
    ],
    ids=["the order of stages", "evaluation"],
)
def test_a_collator_that_draws_begins_every_stage_as_it_was_given(disturbed, undisturbed, tmp_path):
    trainer = masked_trainer(tmp_path / "system", **disturbed)
    trainer.train()
    assert same(stages_of(trainer), undisturbed)
    assert trainer.verify(trainer.folder.plan.stages()[-1:]).ok
    assert trainer.data_collator.generator is None  # the one that was given has drawn nothing


def test_without_a_copy_the_order_of_stages_would_show(tmp_path, undisturbed, monkeypatch):
    monkeypatch.setattr(S3TTrainer, "_copy", lambda self, part: part)
    trainer = masked_trainer(tmp_path / "system", LastShardFirst)
    trainer.train()
    assert not same(stages_of(trainer), undisturbed)


class Stops(TrainerCallback):
    """Ends the process, as it were, after some steps."""

    def __init__(self, after):
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        """Count down."""
        self.after -= 1

    def on_step_begin(self, args, state, control, **kwargs):
        """Die."""
        if self.after == 0:
            raise KeyboardInterrupt


def test_a_stage_whose_collator_draws_is_not_resumed_but_begun_again(tmp_path, undisturbed):
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = masked_trainer(tmp_path / "system", args=saving, callbacks=[Stops(after=1)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (checkpoint,) = (trainer.folder.path / "checkpoints").glob("*/*/checkpoint-*")
    assert trainer.folder.read_checkpoint_record(checkpoint)["resumes_exactly"] is False
    again = masked_trainer(tmp_path / "system", args=saving)
    again.train()
    assert same(stages_of(again), undisturbed)


def test_a_collator_that_cannot_be_copied_is_refused(tmp_path):
    collator = masking()
    collator.lock = threading.Lock()
    with pytest.raises(IsolationError, match=r"DataCollatorForLanguageModeling cannot be copied .* each stage needs"):
        masked_trainer(tmp_path / "system", data_collator=collator)
    assert not (tmp_path / "system").exists()


class Counts(TrainerCallback, ExportableState):
    """Counts steps, in all."""

    def __init__(self, name, begun):
        self.name, self.begun, self.steps = name, begun, 0

    def on_train_begin(self, args, state, control, **kwargs):
        """Note how far it has counted."""
        self.begun.append((self.name, self.steps))

    def on_step_end(self, args, state, control, **kwargs):
        """Count."""
        self.steps += 1

    def state(self):
        """What Trainer keeps in checkpoints."""
        return {"args": {"name": self.name, "begun": []}, "attributes": {"steps": self.steps}}

    def __deepcopy__(self, memo):
        """Copies note in the same list."""
        copied = Counts(self.name, self.begun)
        copied.steps = self.steps
        return copied


def test_callbacks_begin_every_stage_as_they_were_given(tmp_path):
    begun = []
    one, other, late = Counts("one", begun), Counts("other", begun), Counts("late", begun)
    trainer = make_trainer(tmp_path / "system", tiny_llama(2), rows=lm_rows(16), config=CONFIG, callbacks=[one, other])
    trainer.add_callback(late)
    trainer.train()
    assert begun == [("one", 0), ("other", 0), ("late", 0)] * 4
    # What was given can be taken away again, and has counted nothing.
    assert [one.steps, other.steps, late.steps] == [0, 0, 0]
    for callback in (one, other, late):
        trainer.remove_callback(callback)
    trainer.s3t_model.unlearn(["example-000"])
    trainer.train()
    assert len(begun) == 12 and all(trainer.folder.valid_stages)


def keeping(model):
    """Have a layer keep the mean of what it saw."""
    layer = model.model.layers[0].mlp
    layer.register_buffer("seen", torch.zeros(()))
    layer.register_forward_hook(lambda module, inputs, output: module.seen.add_(output.detach().mean()))
    return model


def test_a_base_that_keeps_what_it_saw_is_found_out_before_a_stage_is_written(tmp_path):
    trainer = make_trainer(tmp_path / "system", model=keeping(tiny_llama(2)), rows=lm_rows(16), config=CONFIG)
    with pytest.raises(IsolationError, match=r"shard-0/0 changed buffers of the base .* Use a model whose forward"):
        trainer.train()
    assert trainer.folder.stages == [] and stack_of(trainer).loaded == []


class Remembers(TrainerCallback):
    """Asks for gradients at the input, as TRL does, and keeps weak references to what optimizes each stage."""

    def __init__(self):
        self.optimizers, self.gradients = [], []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Ask, and keep."""
        model.enable_input_require_grads()
        self.optimizers.append(weakref.ref(optimizer))

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """What an optimizer steps on."""
        self.gradients += [weakref.ref(p.grad) for p in model.parameters() if p.grad is not None]


def test_training_leaves_the_base_as_it_was_and_keeps_nothing_of_what_it_trained_with(tmp_path):
    def answers():
        with torch.no_grad():
            return trainer.model(**batch_of(lm_rows(2))).logits

    remembers, args = Remembers(), training_arguments(tmp_path / "system", bf16=True)
    trainer = make_trainer(
        tmp_path / "system", tiny_llama(2), rows=lm_rows(16), config=CONFIG, args=args, callbacks=[remembers]
    )
    before = answers()
    trainer.train()
    assert torch.equal(answers(), before)
    assert "forward" not in vars(trainer.model), "mixed precision wraps it"
    assert not trainer.model.training and not trainer.model.get_input_embeddings()._forward_hooks
    assert not any(parameter.requires_grad for parameter in trainer.model.parameters())
    gc.collect()
    assert len(remembers.optimizers) == 4 and not any(optimizer() for optimizer in remembers.optimizers)
    assert remembers.gradients and not any(gradient() is not None for gradient in remembers.gradients)


class WritesBelow(TrainerCallback):
    """Changes a tensor of the stage that the one in training stands on."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_step_end(self, args, state, control, **kwargs):
        """By one element."""
        parent = stack_of(self.trainer).in_training.parent
        if parent is not None:
            next(iter(stack_of(self.trainer).tensors(parent).values())).data.view(-1)[0] += 1


def test_a_stage_below_that_something_changes_is_found_out_and_nothing_is_built_upon_it(tmp_path):
    trainer = make_trainer(tmp_path / "system", tiny_llama(2), rows=lm_rows(16), config=ONE_SHARD)
    trainer.add_callback(WritesBelow(trainer))
    with pytest.raises(S3TError, match=r"Training shard-\d/\d-\d changed a stage below it, which must be frozen"):
        trainer.train()
    assert {key.depth for key in trainer.folder.stages} == {1}
    trainer.pop_callback(WritesBelow)
    trainer.train()
    assert trainer.verify().ok


def test_a_live_model_does_not_answer_with_what_training_changed_before_it_was_stopped(tmp_path):
    trainer = make_trainer(tmp_path / "system", tiny_llama(2), rows=lm_rows(16), config=ONE_SHARD)
    plant_stages(trainer, limit=1)
    live, batch = trainer.s3t_model, batch_of(lm_rows(1))
    before = live(**batch).logits
    trainer.add_callback(WritesBelow(trainer))
    with pytest.raises(S3TError, match="changed a stage below it"):
        trainer.train()
    assert routing_of(live).depths == [1] and torch.equal(live(**batch).logits, before)


class WritesBetween(S3TTrainer):
    """Changes a tensor of a finished stage before one that stands on it is begun."""

    def _next_stage(self):
        key = super()._next_stage()
        if key is not None and key.parent is not None:
            next(iter(stack_of(self).tensors(key.parent).values())).view(-1)[0] += 1
        return key


@pytest.mark.parametrize("is_live", [True, False], ids=["beside a live model", "alone"])
def test_what_changes_a_stage_between_two_others_reaches_none_that_stands_on_it(tmp_path, caplog, is_live):
    made = {}
    for cls in (S3TTrainer, WritesBetween):
        trainer = make_trainer(tmp_path / cls.__name__, tiny_llama(2), lm_rows(16), cls=cls, config=ONE_SHARD)
        if is_live:
            plant_stages(trainer, limit=1)
            # It loads what it serves, not the trainer.
            assert routing_of(trainer.s3t_model).depths == [1]
        trainer.train()
        made[cls] = {key: load_file(trainer.folder.path / key.path / ADAPTER_FILE) for key in trainer.folder.stages}
    (first, second) = made.values()
    assert first.keys() == second.keys() and {key.depth for key in first} == {1, 2}
    assert [key for key in first if differing_tensors(first[key], second[key])] == []
    assert "was written to in memory" in caplog.text


def test_what_stays_of_a_stage_is_passed_over_by_later_collections_unless_the_process_has_frozen_objects(monkeypatch):
    done = []
    monkeypatch.setattr(gc, "freeze", lambda: done.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: done.append("unfreeze"))
    for count, expected in ((0, ["freeze", "freeze", "unfreeze"]), (1, [])):
        monkeypatch.setattr(gc, "get_freeze_count", lambda count=count: count)
        done.clear()
        with old_objects_passed_over():
            pass_over_what_stays()
        pass_over_what_stays()
        assert done == expected


@pytest.mark.parametrize("dora", [False, True], ids=["LoRA", "DoRA"])
def test_a_stage_that_is_dropped_is_gone_without_a_collection_of_garbage(tmp_path, dora):
    model = tiny_bert(2)
    config = LoraConfig(r=2, target_modules=["query"], use_dora=dora)
    trainer = make_trainer(tmp_path, model, classification_rows(16), peft_config=config, config=ONE_SHARD)
    trainer.train()
    stack = stack_of(trainer)
    kept = [weakref.ref(p) for n, p in model.named_parameters() if any(k.adapter_name in n for k in stack.loaded)]
    assert len(kept) > 4 and all(parameter() is not None for parameter in kept)
    gc.disable()
    try:
        stack.drop(stack.loaded)
        assert [parameter() for parameter in kept if parameter() is not None] == []
    finally:
        gc.enable()


class PagedSGD(torch.optim.SGD):
    """Keeps its state where bitsandbytes keeps that of paged optimizers: for as long as the process lives."""

    def __init__(self, params, **settings):
        super().__init__(params, **settings)
        self.state_of_a_stage = torch.zeros(3)
        GlobalPageManager.get_instance().paged_tensors.append(self.state_of_a_stage)


def test_what_bitsandbytes_keeps_of_a_paged_optimizer_goes_with_its_stage(tmp_path, monkeypatch):
    of_another_model, seen = torch.zeros(2), []
    monkeypatch.setattr(GlobalPageManager.get_instance(), "paged_tensors", [of_another_model])

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(len(GlobalPageManager.get_instance().paged_tensors))

    paged = {"optimizer_cls_and_kwargs": (PagedSGD, {"lr": 0.1}), "callbacks": [Looks()]}
    trainer = make_trainer(tmp_path / "system", tiny_llama(2), rows=lm_rows(16), config=CONFIG, **paged)
    trainer.train()
    assert set(seen) == {2}, "one stage's at a time"
    (kept,) = GlobalPageManager.get_instance().paged_tensors
    assert kept is of_another_model


def test_the_rows_of_a_system_that_is_made_are_placed_once(tmp_path, monkeypatch):
    placed = []
    monkeypatch.setattr(
        "hf_s3t.training.rows.shards_and_slices",
        lambda *args, **how: placed.append(1) or shards_and_slices(*args, **how),
    )
    make_trainer(tmp_path / "system", tiny_llama(2), config=s3t_config(num_slices=2))
    assert placed == [1]


def test_the_shortest_stage_is_the_one_with_the_fewest_examples_to_train_on(tmp_path, monkeypatch):
    """One slice at a time, the deeper stage may be the shorter one."""
    rows = [{**row, "shard": 0, "slice": int(number >= 22)} for number, row in enumerate(lm_rows(24))]
    config = s3t_config(
        partition="column", shard_column="shard", slice_column="slice", stage_data="slice", sequence_selection=[[0, 1]]
    )
    args = training_arguments(tmp_path / "system", per_device_train_batch_size=1)
    said = []
    monkeypatch.setattr("hf_s3t.training.trainer.logger.warning_once", said.append)
    make_trainer(tmp_path / "system", rows=rows, config=config, args=args)
    assert [text for text in said if text.startswith("The shortest stage gets 2 optimizer steps")]


class Ends(TrainerCallback):
    """Ends a stage in its second step."""

    def on_step_end(self, args, state, control, **kwargs):
        """As a signal handler or a clock would."""
        if state.global_step == 2:
            control.should_training_stop = True


def test_a_stage_that_something_ends_before_its_last_step_is_none(tmp_path):
    args = training_arguments(tmp_path, max_steps=3)
    trainer = make_trainer(tmp_path, tiny_llama(2), rows=lm_rows(16), config=ONE_SHARD, callbacks=[Ends()], args=args)
    with pytest.raises(IsolationError, match=r"shard-0/\d was ended after 2 of 3 steps, and is discarded"):
        trainer.train()
    assert not trainer.folder.stages and not stack_of(trainer).loaded
    trainer.pop_callback(Ends)
    trainer.train()
    assert trainer.verify().ok


def test_a_stage_that_an_evaluation_ends_is_one_and_comes_out_again(tmp_path):
    at_every_step = dict(eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1)
    args = training_arguments(tmp_path, load_best_model_at_end=True, learning_rate=1.0, max_steps=12, **at_every_step)
    rows = [{name: value for name, value in row.items() if name != "id"} for row in lm_rows(6, seed=5)]
    patience = {"eval_dataset": Dataset.from_list(rows), "callbacks": [EarlyStoppingCallback(1)]}
    trainer = make_trainer(tmp_path, tiny_llama(2), rows=lm_rows(16), config=ONE_SHARD, args=args, **patience)
    steps = trainer.train().global_step
    assert 2 <= steps < 24 and trainer.folder.valid_stages == set(trainer.folder.plan.stages())
    assert trainer.verify().ok


class Interrupts(TrainerCallback):
    """Ctrl-C in the third step of a stage."""

    def on_step_end(self, args, state, control, **kwargs):
        """Once."""
        if state.global_step == 3:
            raise KeyboardInterrupt


def test_noise_for_embeddings_is_not_doubled_by_an_interrupted_training(tmp_path):
    noisy = {"neftune_noise_alpha": 5.0, "num_train_epochs": 3}
    trainers = [
        make_trainer(
            tmp_path / name,
            tiny_llama(2),
            rows=lm_rows(16),
            config=CONFIG,
            args=training_arguments(tmp_path / name, **noisy),
        )
        for name in ("interrupted", "undisturbed")
    ]
    trainers[0].add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainers[0].train()
    assert not trainers[0].model.get_input_embeddings()._forward_hooks
    trainers[0].pop_callback(Interrupts)
    for trainer in trainers:
        trainer.train()
    assert same(*map(stages_of, trainers))


def test_training_does_not_go_on_by_another_recipe(tmp_path):
    trainer = make_trainer(tmp_path, tiny_llama(2), rows=lm_rows(16), config=ONE_SHARD)
    plant_stages(trainer, limit=1)
    other = make_trainer(
        tmp_path,
        tiny_llama(2),
        rows=lm_rows(16),
        config=ONE_SHARD,
        args=training_arguments(tmp_path, learning_rate=0.5),
    )
    with pytest.raises(ConfigError, match=r"by another recipe: learning_rate=0.5 \(was 0.01\)"):
        other.train()
    assert len(other.folder.stages) == 1 and stack_of(other).loaded == []
    trainer.train()
    assert trainer.folder.valid_stages == set(trainer.folder.plan.stages())


def test_a_checkpoint_of_another_recipe_is_not_resumed(tmp_path):
    def trainer_of(name, **recipe):
        saving = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3, **recipe}
        args = training_arguments(tmp_path / name, **saving)
        return make_trainer(tmp_path / name, tiny_llama(2), rows=lm_rows(16), config=ONE_SHARD, args=args)

    interrupted = trainer_of("system", learning_rate=1e-2)
    interrupted.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        interrupted.train()
    assert list((tmp_path / "system").glob("checkpoints/*/*/checkpoint-2"))
    trainers = [trainer_of(name, learning_rate=1e-3) for name in ("system", "undisturbed")]
    before = files_of(tmp_path / "system")
    with pytest.raises(
        ConfigError, match=r"begun by another recipe: learning_rate=0.001 \(was 0.01\).*begin it again"
    ):
        trainers[0].train()
    assert files_of(tmp_path / "system") == before
    for trainer in trainers:
        trainer.train(resume_from_checkpoint=False)
    assert same(*map(stages_of, trainers))


class HalvesTheRate(TrainerCallback, ExportableState):
    """Scales every gradient by a half to the power of the steps it has seen; its state is in checkpoints."""

    def __init__(self, steps=0):
        self.steps = steps

    def state(self):
        """What it is made anew from."""
        return {"args": {"steps": self.steps}, "attributes": {}}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Count, and scale."""
        self.steps += 1
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= 0.5**self.steps


def test_a_callback_that_counts_goes_on_where_its_checkpoint_was_and_begins_anew_with_the_next_stage(tmp_path):
    args = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3, "optim": "sgd", "learning_rate": 1.0}
    trainers = [
        make_trainer(
            tmp_path / name,
            tiny_llama(2),
            rows=lm_rows(16),
            config=CONFIG,
            args=training_arguments(tmp_path / name, **args),
            callbacks=[HalvesTheRate()],
        )
        for name in ("interrupted", "undisturbed")
    ]
    trainers[0].add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainers[0].train()
    trainers[0].pop_callback(Interrupts)
    for trainer in trainers:
        trainer.train()
        (counts,) = (c for c in trainer.callback_handler.callbacks if isinstance(c, HalvesTheRate))
        assert counts.steps == 0
    assert same(*map(stages_of, trainers))


# Parts that draw or count: each stage begins with them as they were given


class Augmented(torch.utils.data.Dataset):
    """Turns rows round, by a generator of its own."""

    def __init__(self, rows):
        self.rows, self.generator = rows, np.random.default_rng(0)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        row = {name: torch.tensor(value) for name, value in self.rows[index].items() if name != "id"}
        if self.generator.random() < 0.5:
            row["input_ids"] = row["input_ids"].flip(0)
        return row


class Running:
    """A loss that is measured by its running mean."""

    def __init__(self):
        self.mean = None

    def __call__(self, outputs, labels, num_items_in_batch=None):
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        self.mean = loss.item() if self.mean is None else 0.9 * self.mean + 0.1 * loss.item()
        return loss / self.mean


def running():
    """The same as a closure."""
    mean = None

    def loss_of(outputs, labels, num_items_in_batch=None):
        nonlocal mean
        loss = nn.functional.cross_entropy(outputs.logits, labels)
        mean = loss.item() if mean is None else 0.9 * mean + 0.1 * loss.item()
        return loss / mean

    return loss_of


def turning(generator):
    """A transform that draws from a generator in its closure."""

    def turn(batch):
        shown = {name: [torch.tensor(v) for v in values] for name, values in batch.items() if name != "id"}
        shown["input_ids"] = [v.flip(0) if generator.random() < 0.5 else v for v in shown["input_ids"]]
        return shown

    return turn


def growing():
    """A collator that weighs labels by how many batches there were."""
    batches = 0

    def collate(rows):
        nonlocal batches
        batches += 1
        batch = default_data_collator(rows)
        return {**batch, "input_ids": batch["input_ids"].roll(batches, 1)}

    return collate


def forgetful(memory=True):
    """A metric that prefers later evaluations, whatever they say."""
    asked = 0

    def metrics(prediction):
        nonlocal asked
        asked += memory
        return {"score": asked % 3}

    return metrics


LABELLED = classification_rows(20)
PLAIN = s3t_config(num_shards=2, budget=1, id_column=None)
CHOOSES = dict(
    load_best_model_at_end=True, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
    metric_for_best_model="score",
)  # fmt: skip
HELD_OUT = [{k: v for k, v in row.items() if k != "id"} for row in classification_rows(6, seed=5)]
PARTS = {
    "a dataset": lambda: dict(rows=Augmented(LABELLED), config=PLAIN),
    "a transform": lambda: dict(
        rows=Dataset.from_list(LABELLED).with_transform(turning(np.random.default_rng(0))),
        args=dict(remove_unused_columns=False),
    ),
    "a loss": lambda: dict(compute_loss_func=Running()),
    "a loss in a closure": lambda: dict(compute_loss_func=running()),
    "a partial": lambda: dict(compute_loss_func=functools.partial(Running())),
    "a collator in a closure": lambda: dict(data_collator=growing()),
    "a metric where evaluation chooses": lambda: dict(
        compute_metrics=forgetful(), eval_dataset=Dataset.from_list(HELD_OUT), args=CHOOSES
    ),
    "an evaluation set where evaluation chooses": lambda: dict(
        compute_metrics=lambda given: {"score": float(given.predictions.sum())},
        eval_dataset=Augmented(HELD_OUT),
        args=CHOOSES,
    ),
    "what is shown to the metric": lambda: dict(
        compute_metrics=lambda given: {"score": float(given.predictions.sum())},
        preprocess_logits_for_metrics=scaling(),
        eval_dataset=Dataset.from_list(HELD_OUT),
        args=CHOOSES,
    ),
}


def scaling():
    """Weighs what it is shown by how often it was asked."""
    asked = [0]

    def preprocess(logits, labels):
        asked[0] += 1
        return logits * (asked[0] % 5 - 2)

    return preprocess


def labelled_trainer(path, cls=S3TTrainer, rows=None, args=None, **more):
    model = tiny_bert(2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = dict(per_device_train_batch_size=2, num_train_epochs=2)
    return make_trainer(
        path,
        model=model,
        rows=rows if rows is not None else LABELLED,
        cls=cls,
        args=training_arguments(path, **{**settings, **(args or {})}),
        **{"config": s3t_config(num_shards=2, budget=1), **more},
    )


# Every part once; what goes from one stage into another shows in their bits, whichever of two it comes from.
TOGETHER = [
    ("a dataset", "a loss in a closure"),
    ("a transform", "a partial"),
    ("a loss", "a collator in a closure"),
    *((part,) for part in PARTS if "evaluation chooses" in part or "metric" in part),
]


@pytest.mark.parametrize("parts", TOGETHER, ids=" and ".join)
def test_what_draws_or_counts_begins_every_stage_as_it_was_given(parts, tmp_path):
    """Each stage is then the same whatever was trained before it: here, the other shard."""
    trainers = []
    for cls in (S3TTrainer, LastShardFirst):
        given = {name: value for part in parts for name, value in PARTS[part]().items()}
        trainers.append(labelled_trainer(tmp_path / cls.__name__, cls, **given))
    for trainer in trainers:
        trainer.train()
    assert same(*map(stages_of, trainers))


def test_a_dataset_that_draws_is_one_thing_whoever_else_is_in_it(tmp_path):
    """The digest of a row is of what it shows first of all, not after the rows before it were shown."""
    whole = labelled_trainer(tmp_path / "whole", rows=Augmented(LABELLED), config=PLAIN)
    less = labelled_trainer(tmp_path / "less", rows=Augmented(LABELLED[:1] * 4 + LABELLED[4:]), config=PLAIN)
    one, other = (trainer.folder.table.rows for trainer in (whole, less))
    key, other_key = whole.folder.key, less.folder.key
    shown = dict(Augmented(LABELLED)[5])
    assert one[5].digest == key.of_content(shown) and other[5].digest == other_key.of_content(shown)
    assert whole.train_dataset.generator.random() == np.random.default_rng(0).random()


@pytest.mark.parametrize("part", ["a dataset", "a loss", "a collator in a closure"])
def test_a_stage_whose_parts_have_moved_is_not_resumed_but_begun_again(part, tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    undisturbed = labelled_trainer(tmp_path / "undisturbed", **PARTS[part]())
    undisturbed.train()
    given = PARTS[part]()
    trainer = labelled_trainer(tmp_path / "system", args=saving, callbacks=[Stops(after=3)], **given)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (checkpoint,) = (trainer.folder.path / "checkpoints").glob("*/*/checkpoint-*")
    assert trainer.folder.read_checkpoint_record(checkpoint)["resumes_exactly"] is False
    again = labelled_trainer(tmp_path / "system", args=saving, **PARTS[part]())
    again.train()
    assert same(stages_of(again), stages_of(undisturbed))


def test_a_stage_whose_parts_keep_still_is_resumed(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = labelled_trainer(tmp_path / "system", args=saving, callbacks=[Stops(after=3)])
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    (checkpoint,) = (trainer.folder.path / "checkpoints").glob("*/*/checkpoint-*")
    assert trainer.folder.read_checkpoint_record(checkpoint)["resumes_exactly"] is True


class Locked(Augmented):
    """One that cannot be copied."""

    def __init__(self, rows):
        super().__init__(rows)
        self.lock = threading.Lock()


class Still(Locked):
    """One that cannot be copied, and needs not."""

    def __getitem__(self, index):
        return default_data_collator([self.rows[index]]) | {"input_ids": torch.tensor(self.rows[index]["input_ids"])}


def test_a_dataset_that_cannot_be_copied_is_taken_as_long_as_it_keeps_still(tmp_path):
    trainer = labelled_trainer(tmp_path / "draws", rows=Locked(LABELLED), config=PLAIN)
    with pytest.raises(IsolationError, match=r"shard-0/\d changed `train_dataset` in `generator`, which all stages"):
        trainer.train()
    assert not trainer.folder.valid_stages
    rows = [{k: v for k, v in row.items() if k != "id"} for row in LABELLED]
    trainer = labelled_trainer(tmp_path / "still", rows=Still(rows), config=PLAIN)
    trainer.train()
    assert len(trainer.folder.valid_stages) == 4


def test_a_part_that_is_reached_around_its_copies_is_found_out(tmp_path):
    loss = Running()

    class Sets(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            loss.mean = 2.0

    trainer = labelled_trainer(tmp_path / "system", compute_loss_func=loss, callbacks=[Sets()])
    with pytest.raises(IsolationError, match=r"changed `compute_loss_func` in `mean`, which all stages share"):
        trainer.train()
    assert not trainer.folder.valid_stages


def test_a_loss_that_cannot_be_copied_is_refused_before_anything_is_written(tmp_path):
    loss = Running()
    loss.lock = threading.Lock()
    with pytest.raises(IsolationError, match=r"Running cannot be copied .* each stage needs its own"):
        labelled_trainer(tmp_path / "system", compute_loss_func=loss)
    assert not (tmp_path / "system").exists()


def counting_format():
    shown = 0

    def text_of(row):
        nonlocal shown
        shown += 1
        return f"{shown} {row['text']}"

    return text_of


def drawing_format(row):
    return f"{random.random()} {row['text']}"


@pytest.mark.parametrize("processes", [None, 2])
@pytest.mark.parametrize("form", [counting_format(), drawing_format], ids=["counts", "draws"])
def test_a_formatting_function_that_counts_or_draws_is_refused_before_anything_is_written(form, processes, tmp_path):
    words = {"[PAD]": 0, "[UNK]": 1, "</s>": 2, **{f"w{number}": number for number in range(3, 60)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), pad_token="[PAD]", eos_token="</s>"
    )
    args = training_arguments(tmp_path / "system", SFTConfig, bf16=False, max_length=8, dataset_num_proc=processes)
    with pytest.raises(IsolationError, match="what one row became depends on the rows before it"):
        make_trainer(
            tmp_path / "system",
            tiny_llama(2),
            [{"id": f"row-{number}", "text": f"w{number + 3} w5"} for number in range(8)],
            cls=S3TSFTTrainer,
            args=args,
            config=s3t_config(budget=1),
            processing_class=tokenizer,
            formatting_func=form,
        )
    assert not (tmp_path / "system").exists()


# Tokenizers, which all stages share


class PadsLeft(TrainerCallback):
    """Has a tokenizer pad on the other side from the second step on, as for texts that it generates."""

    def __init__(self, tokenizer, interrupts=False):
        self.tokenizer, self.interrupts = tokenizer, interrupts

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.tokenizer.padding_side = "left"
        if state.global_step == 3 and self.interrupts:
            raise KeyboardInterrupt


def padding_trainer(path, interrupts=False):
    words = {"[PAD]": 0, "[UNK]": 1, **{f"w{number}": number for number in range(2, 60)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "[UNK]")), pad_token="[PAD]"
    )
    rows = [
        {"id": row["id"], "input_ids": row["input_ids"][: 3 + number % 5], "labels": row["labels"]}
        for number, row in enumerate(classification_rows(32))
    ]
    args = training_arguments(path, save_strategy="steps", save_steps=1)
    callback = PadsLeft(tokenizer, interrupts)
    parts = {"data_collator": DataCollatorWithPadding(tokenizer), "callbacks": [callback]}
    return make_trainer(path, tiny_bert(2), rows, config=ONE_SHARD, args=args, **parts)


def test_how_a_tokenizer_was_set_in_one_stage_does_not_reach_the_next(tmp_path):
    trainer = padding_trainer(tmp_path / "system")
    trainer.train()
    assert trainer.data_collator.tokenizer.padding_side == "right"
    assert trainer.train().metrics["stages_trained"] == 0
    deepest = max(trainer.folder.valid_stages, key=lambda key: key.depth)
    there = load_file(trainer.folder.path / "stages" / str(deepest) / "adapter_model.safetensors")
    shutil.rmtree(trainer.folder.path / "stages" / str(deepest))
    again = padding_trainer(tmp_path / "system")
    assert again.train().metrics["stages_trained"] == 1
    now = load_file(trainer.folder.path / "stages" / str(deepest) / "adapter_model.safetensors")
    assert not differing_tensors(there, now)


def test_a_stage_is_not_resumed_where_a_tokenizer_is_set_otherwise_than_it_began(tmp_path):
    whole = padding_trainer(tmp_path / "whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        padding_trainer(tmp_path / "system", interrupts=True).train()
    again = padding_trainer(tmp_path / "system")
    again.train()
    for key in whole.folder.valid_stages:
        one, other = (trainer.folder.path / "stages" / str(key) for trainer in (whole, again))
        files = [load_file(path / "adapter_model.safetensors") for path in (one, other)]
        assert not differing_tensors(*files)
