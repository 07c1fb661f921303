"""What was given to a trainer besides arguments is recorded, and a half-trained system does not go on with another."""

import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from datasets import Dataset
from support.folders import files_of, forge, forge_stage
from support.insides import refuse_other_recipe, rows_of_stages
from support.launched import launched
from support.tiny import (
    VOCABULARY,
    classification_rows,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import SFTConfig

from hf_s3t import S3TSFTTrainer, S3TTrainer
from hf_s3t.errors import ConfigError, IsolationError, S3TError
from hf_s3t.records.digests import DigestKey
from hf_s3t.training.circumstances import recipe_of
from hf_s3t.training.descriptions import Description
from hf_s3t.training.parts import differing_parts, parts_of


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")
CONFIG = s3t_config(budget=1)
ROWS = classification_rows(16)


# What users write


SCALE = 2.0


def scaled(loss):
    """A helper of a loss."""
    return loss * SCALE


def loss_of(outputs, labels, num_items_in_batch=None, weight=1.0):
    """A loss."""
    return scaled(nn.functional.cross_entropy(outputs.logits, labels)) * weight


def other_loss(outputs, labels, num_items_in_batch=None):
    """Another."""
    return outputs.logits.square().mean()


class ClassLoss:
    """A loss that is an object, with weights of the classes."""

    def __init__(self, weights):
        self.loss = nn.CrossEntropyLoss(weight=torch.tensor(weights))

    def __call__(self, outputs, labels, num_items_in_batch=None):
        """The loss."""
        return self.loss(outputs.logits, labels)


@dataclass
class Collator:
    """A collator with fields."""

    label: str = "labels"
    turned: bool = False
    names: list = field(default_factory=list)

    def __call__(self, rows):
        """A batch."""
        batch = {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}
        return {**batch, "input_ids": batch["input_ids"].flip(1)} if self.turned else batch


class Plain:
    """A collator with attributes."""

    def __init__(self, masked=0.0, probabilities=None):
        self.masked, self.probabilities = masked, probabilities

    def __call__(self, rows):
        """A batch."""
        return transformers.default_data_collator(rows)


def collate(rows, masked=0.0):
    """A collator that is a function."""
    return transformers.default_data_collator(rows)


class OtherSGD(torch.optim.SGD):
    """An optimizer of the user's."""


class WeightedTrainer(S3TTrainer):
    """Weighs classes in its loss, as the documentation of Transformers shows."""

    def __init__(self, *args, weights=(1.0, 1.0, 1.0), **kwargs):
        super().__init__(*args, **kwargs)
        self.weights = torch.tensor(weights)
        self.seen = 0

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """Weighted."""
        self.seen += 1
        outputs = model(**inputs)
        loss = nn.functional.cross_entropy(outputs.logits, inputs["labels"], weight=self.weights)
        return (loss, outputs) if return_outputs else loss


class LogsMore(S3TTrainer):
    """Changes what is shown, and no stage."""

    def log(self, logs, *args, **kwargs):
        """With more."""
        super().log({**logs, "more": 1}, *args, **kwargs)


class StepsTwice(S3TTrainer):
    """Overrides the step."""

    def training_step(self, *args, **kwargs):
        """With another factor."""
        return super().training_step(*args, **kwargs) * 2


class OwnOptimizer(S3TTrainer):
    """Overrides the optimizer."""

    def create_optimizer(self, model=None):
        """With other groups."""
        return super().create_optimizer(model)


class OwnLoader(S3TTrainer):
    """Overrides the loader."""

    def get_train_dataloader(self):
        """As it is."""
        return super().get_train_dataloader()


class Halves(TrainerCallback, ExportableState):
    """Scales gradients."""

    def __init__(self, factor=0.5):
        self.factor = factor

    def state(self):
        """What it is made anew from."""
        return {"args": {"factor": self.factor}, "attributes": {}}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Scale."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= self.factor


class Noise(TrainerCallback):
    """Scales gradients by numbers that it was made with, and counts."""

    def __init__(self, factor, after=0):
        self.factor, self.after, self.steps = factor, after, 0

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        """Scale."""
        self.steps += 1


class Told(S3TTrainer):
    """Keeps what its logs show, what its loss reads, and what `Trainer` reads."""

    def __init__(self, *args, started=0.0, scale=1.0, accepts=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.started, self.run, self.scale = started, f"run {started}", scale
        self.model_accepts_loss_kwargs = accepts

    def compute_loss(self, *args, **kwargs):
        """By way of a function."""
        return scale_of(self, super().compute_loss(*args, **kwargs))

    def log(self, logs, *args, **kwargs):
        """With the time."""
        super().log({**logs, "seconds": -self.started, "run": len(self.run)}, *args, **kwargs)


def scale_of(trainer, loss):
    """A helper of a loss."""
    return loss * trainer.scale


class Logs:
    """A collator that logs."""

    def __init__(self):
        self.logger, self.surroundings = logging.getLogger("hf_s3t.tests.collator"), os.environ

    def __call__(self, rows):
        """A batch."""
        self.logger.debug("%d rows", len(rows))
        return transformers.default_data_collator(rows)


class TakesTime(TrainerCallback):
    """Looks on."""

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Look."""
        self.last = state.global_step, model.training


def turned(batch):
    """A transform."""
    return {name: torch.tensor(values) for name, values in batch.items() if name != "id"}


def turned_otherwise(batch):
    """Another."""
    return {name: torch.tensor(values).flip(-1) for name, values in batch.items() if name != "id"}


TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def tokenizer(words=VOCABULARY, **changes):
    """Words by their numbers."""
    vocabulary = {"[PAD]": 0, "[UNK]": 1, "</s>": 2, **{f"w{n}": n for n in range(3, words)}}
    made = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"pad_token": "[PAD]", "eos_token": "</s>", "unk_token": "[UNK]", **changes}
    return PreTrainedTokenizerFast(tokenizer_object=made, **named)


def trainer_of(path, cls=S3TTrainer, rows=ROWS, arguments=None, **parts):
    """A trainer of a classifier."""
    args = parts.pop("args", None) or training_arguments(path, **(arguments or {}))
    return make_trainer(path, tiny_bert(2), rows, cls=cls, args=args, config=CONFIG, **parts)


@pytest.fixture(scope="module")
def planted_one(tmp_path_factory):
    """A system with a stage, not to be changed."""
    path = tmp_path_factory.mktemp("planted") / "system"
    plant_stages(trainer_of(path), limit=1)
    return path


@pytest.fixture
def system(planted_one, tmp_path):
    """A system with a stage."""
    return shutil.copytree(planted_one, tmp_path / "system")


def record_parts_of(trainer):
    """Have the stages of a system say that this trainer trained them."""
    for key in trainer.folder.stages:
        forge_stage(trainer.folder.path, str(key), **trainer._origin(key))
    return trainer


def refuses(trainer, said):
    """Whether a trainer on a system refuses to train and to audit, and nothing changes."""
    path = trainer.folder.path
    before = files_of(path)
    for call in (trainer.train, trainer.verify):
        with pytest.raises(ConfigError, match=f"by another recipe: .*{said}"):
            call()
    assert files_of(path) == before


# Refused, and accepted


def _padding(**changes):
    return {"data_collator": transformers.DataCollatorWithPadding(tokenizer(**changes))}


CHANGES = {
    "a loss is given": ({}, {"compute_loss_func": loss_of}, r"compute_loss_func=loss_of \(was None\)"),
    "another loss": (
        {"compute_loss_func": loss_of},
        {"compute_loss_func": other_loss},
        r"compute_loss_func=other_loss \(was loss_of\)",
    ),
    "another argument of a loss": (
        {"compute_loss_func": functools.partial(loss_of, weight=0.5)},
        {"compute_loss_func": functools.partial(loss_of, weight=0.25)},
        r"compute_loss_func.weight=0.25 \(was 0.5\)",
    ),
    "weights of classes": (
        {"compute_loss_func": ClassLoss([1.0, 1.0, 2.0])},
        {"compute_loss_func": ClassLoss([1.0, 1.0, 3.0])},
        "another `compute_loss_func.loss`",
    ),
    "a loss of the model": (
        {},
        {"change": lambda trainer: setattr(trainer.model, "loss_function", other_loss)},
        "model.loss_function=other_loss",
    ),
    "a field of a collator": (
        {"data_collator": Collator()},
        {"data_collator": Collator(turned=True)},
        r"data_collator.turned=True \(was False\)",
    ),
    "a text of a collator": (
        {"data_collator": Collator()},
        {"data_collator": Collator(label="label")},
        "another `data_collator.label`",
    ),
    "an attribute of a collator": (
        {"data_collator": Plain(0.1)},
        {"data_collator": Plain(0.2)},
        r"data_collator.masked=0.2 \(was 0.1\)",
    ),
    "an array of a collator": (
        {"data_collator": Plain(probabilities=np.ones(200))},
        {"data_collator": Plain(probabilities=np.eye(1, 200)[0])},
        "another `data_collator.probabilities`",
    ),
    "another collator": (
        {"data_collator": Collator()},
        {"data_collator": collate},
        r"data_collator=collate \(was Collator\)",
    ),
    "an argument of a collator": (
        {"data_collator": functools.partial(collate, masked=0.1)},
        {"data_collator": functools.partial(collate, masked=0.2)},
        r"data_collator.masked=0.2 \(was 0.1\)",
    ),
    "the padding of a collator's tokenizer": (
        _padding(padding_side="right"),
        _padding(padding_side="left"),
        r"data_collator.tokenizer.padding_side=left \(was right\)",
    ),
    "the vocabulary of a collator's tokenizer": (
        _padding(),
        _padding(words=VOCABULARY + 1),
        "another `data_collator.tokenizer.vocabulary`",
    ),
    "a chat template": (
        {"processing_class": tokenizer(chat_template=TEMPLATE), "data_collator": collate},
        {"processing_class": tokenizer(chat_template=TEMPLATE + "!"), "data_collator": collate},
        "another `processing_class.chat_template`",
    ),
    "a special token": (
        {"processing_class": tokenizer(), "data_collator": collate},
        {"processing_class": tokenizer(eos_token="w9"), "data_collator": collate},
        r"processing_class.special_tokens.eos_token=w9 \(was </s>\)",
    ),
    "an optimizer": (
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
        {"optimizer_cls_and_kwargs": (torch.optim.Adagrad, {"lr": 0.1})},
        r"optimizer_cls_and_kwargs=torch.optim.adagrad.Adagrad \(was torch.optim.sgd.SGD\)",
    ),
    "an optimizer of the user's": (
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
        {"optimizer_cls_and_kwargs": (OtherSGD, {"lr": 0.1})},
        "optimizer_cls_and_kwargs=OtherSGD",
    ),
    "an argument of an optimizer": (
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})},
        {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9})},
        r"optimizer_cls_and_kwargs.momentum=0.9 \(was None\)",
    ),
    "an overridden loss": ({}, {"cls": WeightedTrainer}, "trainer.compute_loss=WeightedTrainer.compute_loss"),
    "an overridden loss that goes": ({"cls": WeightedTrainer}, {}, "another `trainer.weights`"),
    "what an overridden loss goes by": (
        {"cls": WeightedTrainer},
        {"cls": functools.partial(WeightedTrainer, weights=(1.0, 2.0, 1.0))},
        "another `trainer.weights`",
    ),
    "an overridden step": ({}, {"cls": StepsTwice}, "trainer.training_step=StepsTwice.training_step"),
    "an overridden optimizer": ({"cls": OwnOptimizer}, {}, "trainer.create_optimizer=None"),
    "an overridden loader": ({"cls": OwnLoader}, {}, "trainer.get_train_dataloader=None"),
    "a method of the trainer itself": (
        {},
        {"change": lambda trainer: setattr(trainer, "compute_loss", loss_of)},
        "trainer.compute_loss=loss_of",
    ),
    "smoothed labels": (
        {},
        {"change": lambda trainer: setattr(trainer, "label_smoother", transformers.trainer_pt_utils.LabelSmoother())},
        "label_smoother=transformers.trainer_pt_utils.LabelSmoother",
    ),
    "a callback that scales": ({"callbacks": [Halves()]}, {}, r"callbacks=none \(was Halves\)"),
    "an argument of a callback": ({"callbacks": [Halves()]}, {"callbacks": [Halves(0.25)]}, "another `callbacks`"),
    "a number of a callback": (
        {"callbacks": [Noise(0.5)]},
        {"callbacks": [Noise(0.25)]},
        r"callbacks.factor|another `callbacks`",
    ),
    "what a helper of a loss goes by": (
        {"cls": functools.partial(Told, scale=1.0)},
        {"cls": functools.partial(Told, scale=2.0)},
        r"trainer.scale=2.0 \(was 1.0\)",
    ),
    "an attribute that `Trainer` goes by": (
        {"cls": Told},
        {"cls": functools.partial(Told, accepts=True)},
        "trainer.model_accepts_loss_kwargs=True",
    ),
    "a transform": (
        {"rows": Dataset.from_list(ROWS).with_transform(turned)},
        {"rows": Dataset.from_list(ROWS).with_transform(turned_otherwise)},
        r"train_dataset.transform=turned_otherwise \(was turned\)",
    ),
}


def made(path, cls=S3TTrainer, change=None, **parts):
    """A trainer that was changed after it was made, perhaps."""
    trainer = trainer_of(path, cls, **parts)
    if change is not None:
        change(trainer)
    return trainer


@pytest.mark.parametrize("changed", CHANGES)
def test_a_system_does_not_go_on_with_another_part_and_goes_on_with_the_same(changed, system):
    first, other, said = CHANGES[changed]
    record_parts_of(made(system, **first))
    refuse_other_recipe(made(system, **first))
    refuses(made(system, **other), said)


@pytest.mark.slow
def test_what_is_recorded_is_what_stages_are_trained_with(tmp_path):
    parts = {"data_collator": Collator(), "cls": WeightedTrainer}
    trainer_of(tmp_path, **parts).train()
    refuses(
        trainer_of(tmp_path, data_collator=Collator(turned=True), cls=WeightedTrainer), "data_collator.turned=True"
    )
    assert trainer_of(tmp_path, **parts).verify().ok


def test_what_no_stage_depends_on_may_change(system):
    collator = {"data_collator": transformers.default_data_collator, "processing_class": tokenizer()}
    changed = trainer_of(system, LogsMore, callbacks=[TakesTime()], compute_metrics=lambda prediction: {}, **collator)
    refuse_other_recipe(changed)


def test_what_only_logs_show_and_where_they_go_may_be_another_in_each_process(system, monkeypatch):
    def asked(started):
        return trainer_of(system, functools.partial(Told, started=started), data_collator=Logs())

    record_parts_of(asked(1.0))
    trainer = asked(2.0)
    trainer.data_collator([{"input_ids": [1]}])
    logging.getLogger("hf_s3t.tests.another")
    monkeypatch.setenv("HF_S3T_TESTS", "changed")
    refuse_other_recipe(trainer)


def test_what_a_callback_counts_may_change(system):
    callback = Noise(0.5)
    record_parts_of(trainer_of(system, callbacks=[callback]))
    callback.steps += 1
    refuse_other_recipe(trainer_of(system, callbacks=[callback]))


RANKS = """
import os, sys
from hf_s3t.launch import start_cpu_processes
start_cpu_processes()
from accelerate import PartialState
from transformers import TrainerCallback, default_data_collator
from support.tiny import classification_rows, make_trainer, s3t_config, tiny_bert

class Collator:
    def __init__(self):
        self.rank = PartialState().process_index

    def __call__(self, rows):
        return default_data_collator(rows)

class Ends(TrainerCallback):
    def on_train_begin(self, *args, **kwargs):
        if trainer.folder.stages:
            raise KeyboardInterrupt

def made(**parts):
    config = s3t_config(budget=1)
    return make_trainer(
        sys.argv[1], tiny_bert(2), classification_rows(16), config=config, data_collator=Collator(), **parts
    )

trainer = made(callbacks=[Ends()])
try:
    trainer.train()
except KeyboardInterrupt:
    trainer = made()
    done = trainer.train().metrics["stages_trained"], trainer.verify().ok
    os.write(1, f"rank {trainer.data_collator.rank}: {done}\\n".encode())
"""


@pytest.mark.slow
def test_parts_that_know_the_rank_of_their_process_go_on(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(RANKS)
    printed = launched(script, str(tmp_path / "system"), processes=2)
    said = sorted(line for line in printed.splitlines() if line.startswith("rank"))
    assert said == ["rank 0: (1, True)", "rank 1: (1, True)"]


def test_parts_of_a_trainer_that_were_put_in_the_place_of_others_are_seen(tmp_path):
    trainer = trainer_of(tmp_path)
    plant_stages(trainer)
    trainer.train()
    trainer.data_collator = Collator()
    with pytest.raises(ConfigError, match=r"data_collator=Collator \(was transformers.*default_data_collator\)"):
        trainer.train()


def test_where_evaluation_chooses_what_it_goes_by_is_a_part(system):
    saving = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    arguments = {"load_best_model_at_end": True, **saving}

    def asked(seed=9, patience=3, **more):
        rows = Dataset.from_list([{n: v for n, v in row.items() if n != "id"} for row in classification_rows(8, seed)])
        stopping = [transformers.EarlyStoppingCallback(patience)]
        return trainer_of(system, arguments=arguments, eval_dataset=rows, callbacks=stopping, **more)

    record_parts_of(asked())
    refuse_other_recipe(asked())
    for changes, said in (
        ({"seed": 8}, "another `eval_dataset`"),
        ({"patience": 2}, "another `callbacks`"),
        ({"compute_metrics": collate}, "compute_metrics=collate"),
    ):
        refuses(asked(**changes), said)


# Code


def written(source, name="loss"):
    """What a user's module defines."""
    module = {"__name__": "a_module_of_a_user"}
    exec(compile(source, "a_module_of_a_user.py", "exec"), module)
    return module[name]


LOSS = """
RATE = 0.5
def inner(x):
    return x + 1
def loss(outputs, labels, power=2):
    "What it says of itself."
    return inner(outputs) ** power * RATE if labels in {"a", "b"} else 0
"""


def described(part):
    """A loss, as records have it."""
    trainer = type("T", (), {})
    description = Description(DigestKey(b"a secret of these tests"), (trainer,))
    return description.of(part, "loss"), description.unstable


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("x + 1", "x + 2"),
        ("** power", "* power"),
        ("power=2", "power=3"),
        ("RATE = 0.5", "RATE = 0.6"),
        ('"b"', '"c"'),
    ],
)
def test_code_is_told_by_what_it_does_and_what_it_names(old, new):
    assert described(written(LOSS)) != described(written(LOSS.replace(old, new)))
    assert differing_parts({"loss": described(written(LOSS))[0]}, {"loss": described(written(LOSS))[0]}) == {}


def test_comments_and_what_code_says_of_itself_do_not_count():
    other = LOSS.replace("What it says of itself.", "Other words.").replace(
        "return inner", "# Why.\n\n    return inner"
    )
    assert described(written(other)) == described(written(LOSS))


def test_functions_that_name_each_other_and_objects_that_hold_themselves_are_described():
    source = "def one(n):\n    return two(n)\ndef two(n):\n    return one(n)\nloss = one"
    held = Plain()
    held.masked = held
    assert described(written(source))[0]["name"] == "one"
    assert described(held)[0]["attributes"]["masked"].endswith("Plain again")


def test_code_that_another_python_compiled_is_not_compared():
    now = described(written(LOSS))[0]
    other = {**now, "code": re.sub("^[^:]*", "cpython-399", now["code"]).replace("a", "b")}
    assert differing_parts({"loss": other}, {"loss": now}) == {}
    assert differing_parts({"loss": {**other, "name": "gain"}}, {"loss": now}) == {
        "loss": ({**other, "name": "gain"}, now)
    }


def closure(weight):
    """A loss that keeps its weight in a closure."""

    def inner(outputs, labels, num_items_in_batch=None):
        return outputs.logits.mean() * weight

    return inner


class Draws:
    """A collator that draws by a generator of its own."""

    def __init__(self):
        self.generator = np.random.default_rng()

    def __call__(self, rows):
        """A batch."""
        return transformers.default_data_collator(rows)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (
            lambda: {"compute_loss_func": lambda outputs, labels, **more: outputs.logits.mean()},
            "the lambda test_parts",
        ),
        (
            lambda: {"compute_loss_func": closure(0.5)},
            "`compute_loss_func`, the closure test_parts.closure.<locals>.inner",
        ),
        (lambda: {"data_collator": functools.partial(lambda rows: rows)}, "`data_collator`, the lambda"),
        (lambda: {"data_collator": Draws()}, "`data_collator.generator`, a Generator"),
    ],
    ids=["lambda", "closure", "within", "generator"],
)
def test_what_cannot_be_told_from_another_of_its_name_is_told_by_the_name_and_said_once(
    make, said, system, monkeypatch
):
    warned = []
    record_parts_of(trainer_of(system, **make()))
    trainer = trainer_of(system, **make())
    monkeypatch.setattr("hf_s3t.training.stage_records.logger.warning_once", warned.append)
    refuse_other_recipe(trainer)
    assert len(warned) == 1 and said in warned[0] and "another of the same name would go unnoticed" in warned[0]


def test_functions_by_name_and_objects_have_nothing_said_of_them(system, monkeypatch):
    warned = []
    parts = {"compute_loss_func": loss_of, "data_collator": Collator(), "cls": WeightedTrainer}
    record_parts_of(trainer_of(system, **parts))
    trainer = trainer_of(system, **parts)
    monkeypatch.setattr("hf_s3t.training.stage_records.logger.warning_once", warned.append)
    refuse_other_recipe(trainer)
    assert not warned


def test_records_give_no_text_away_and_are_keyed(system):
    trainer = record_parts_of(trainer_of(system, data_collator=Collator(names=["Ada Lovelace"])))
    (file,) = system.glob("stages/shard-0/*/stage.json")
    assert "Lovelace" not in file.read_text() and "Collator" in file.read_text()
    one, other = (parts_of(trainer, DigestKey(secret * 16))[0]["data_collator"] for secret in (b"a", b"b"))
    assert one["attributes"]["names"] != other["attributes"]["names"]


# Other processes and other versions


def with_everything(path):
    """A trainer with a part of every kind."""
    rows = Dataset.from_list(ROWS).with_transform(turned)
    parts = {"compute_loss_func": functools.partial(loss_of, weight=0.5), "data_collator": Collator(names=["a", "b"])}
    optimizer = (OtherSGD, {"lr": 0.1, "momentum": 0.9})
    more = {"processing_class": tokenizer(chat_template=TEMPLATE), "callbacks": [Halves()]}
    weighted = functools.partial(WeightedTrainer, weights=(1.0, 2.0, 1.0))
    return trainer_of(path, weighted, rows, optimizer_cls_and_kwargs=optimizer, **parts, **more)


IN_A_FRESH_PROCESS = """
import sys
from test_parts import with_everything
trainer = with_everything(sys.argv[1])
print("trained", trainer.train().metrics["stages_trained"])
"""


@pytest.mark.slow
def test_the_same_parts_are_the_same_in_another_process(tmp_path):
    trainer = with_everything(tmp_path)
    plant_stages(trainer, limit=1)
    surroundings = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "OMP_NUM_THREADS": "1",
        "PYTHONHASHSEED": "7",
    }
    code = [sys.executable, "-c", IN_A_FRESH_PROCESS, str(tmp_path)]
    done = subprocess.run(code, capture_output=True, text=True, env=surroundings)
    assert done.stdout.splitlines()[-1:] == ["trained 1"], done.stderr
    records = [json.loads(file.read_text()) for file in sorted(tmp_path.glob("stages/*/*/stage.json"))]
    assert len(records) == 2 and records[0]["parts"] == records[1]["parts"]


def forget(path, *names):
    """Have the records of a system say no more than those of an earlier version."""
    for file in Path(path).glob("stages/shard-0/*/stage.json"):
        parts = json.loads(file.read_text())["parts"]
        forge(file, parts={n: v for n, v in parts.items() if n not in names} if names else None)


@pytest.mark.parametrize("names", [(), ("compute_loss_func",)], ids=["all", "one"])
def test_a_folder_of_an_earlier_version_goes_on_and_that_is_said_once(names, system, monkeypatch):
    forget(system, *names)
    warned = []
    trainer = trainer_of(system, compute_loss_func=loss_of)
    monkeypatch.setattr("hf_s3t.training.stage_records.logger.warning_once", warned.append)
    refuse_other_recipe(trainer)
    assert len(warned) == 1 and "cannot be compared in: " in warned[0] and "compute_loss_func" in warned[0]
    assert ("data_collator" in warned[0]) == (not names)


def recorded_class(trainer):
    """By which name records know the class of a trainer."""
    return parts_of(trainer, trainer.folder.key)[0]["trainer"]["class"]


@pytest.mark.parametrize("cls", [S3TTrainer, StepsTwice])
def test_records_name_a_trainer_by_the_module_that_it_was_in_first(cls, system):
    """By another name no folder of an earlier version could be gone on with, or audited."""
    assert recorded_class(trainer_of(system, cls)) == "hf_s3t.trainer.S3TTrainer"


def test_the_rows_of_a_folder_of_an_earlier_version_and_its_precision_are_compared(system):
    forget(system)
    trainer = trainer_of(system)
    feed_otherwise(trainer)
    with pytest.raises(ConfigError, match="was trained on rows that were fed otherwise"):
        trainer.train()
    refuses(trainer_of(system, arguments={"bf16": True}), r"bf16=True .*mixed_precision=bf16 \(was no\)")


# Checkpoints inside a stage


class Interrupts(TrainerCallback):
    """Ctrl-C in the third step of a stage."""

    def on_step_end(self, args, state, control, **kwargs):
        """Once."""
        if state.global_step == 3:
            raise KeyboardInterrupt


def begun(path, **parts):
    """A trainer that saves every step."""
    return trainer_of(path, arguments={"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 3}, **parts)


def test_a_stage_that_was_begun_does_not_go_on_with_another_part_and_can_be_begun_again(tmp_path):
    trainer = begun(tmp_path / "one", optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
    trainer.add_callback(Interrupts())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    before = files_of(tmp_path / "one")
    other = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.2})}
    with pytest.raises(ConfigError, match=r"was begun by another recipe: optimizer_cls_and_kwargs.lr=0.2 \(was 0.1\)"):
        begun(tmp_path / "one", **other).train()
    assert files_of(tmp_path / "one") == before
    with pytest.raises(ConfigError, match="was begun by another recipe: rows that were fed otherwise"):
        again = begun(tmp_path / "one", optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))
        feed_otherwise(again)
        again.train()
    assert files_of(tmp_path / "one") == before
    assert begun(tmp_path / "one", **other).train(resume_from_checkpoint=False).metrics["stages_trained"] == 2


# Rows as they are fed


def feed_otherwise(trainer):
    """As another tokenizer would: the rows are the same, what the model is fed is not."""
    rows = rows_of_stages(trainer)
    rows.prepared = rows.prepared.map(lambda row: {"input_ids": row["input_ids"][::-1]}, keep_in_memory=True)


def test_rows_that_are_fed_otherwise_are_refused(system):
    before = files_of(system)
    trainer = trainer_of(system)
    feed_otherwise(trainer)
    with pytest.raises(ConfigError, match="was trained on rows that were fed otherwise"):
        trainer.train()
    assert files_of(system) == before


def spoken(row):
    """A formatting function."""
    return f"{row['question']} {row['answer']}"


def spoken_otherwise(row):
    """Another."""
    return f"{row['answer']} {row['question']}"


def sft_trainer(path, formatting_func=spoken, template=TEMPLATE, **arguments):
    """A trainer of a language model on texts."""
    rows = [{"id": i, "question": f"w{5 + i} w7", "answer": f"w{6 + i} w9"} for i in range(16)]
    args = training_arguments(path, SFTConfig, max_length=16, bf16=False, gradient_checkpointing=False, **arguments)
    words = tokenizer(chat_template=template)
    given = {"processing_class": words, "formatting_func": formatting_func}
    return make_trainer(
        path, tiny_llama(2), Dataset.from_list(rows), cls=S3TSFTTrainer, args=args, config=CONFIG, **given
    )


def test_another_formatting_or_special_token_or_template_of_texts_is_refused(tmp_path):
    plant_stages(sft_trainer(tmp_path, eos_token="</s>"), limit=1)
    with pytest.raises(ConfigError, match="was trained on rows that were fed otherwise"):
        sft_trainer(tmp_path, spoken_otherwise, eos_token="</s>").train()
    refuses(sft_trainer(tmp_path, eos_token="w20"), r"arguments.eos_token=w20 \(was </s>\)")
    other = sft_trainer(tmp_path, template=TEMPLATE + "!", eos_token="</s>")
    refuses(other, "another `processing_class.chat_template`")


def test_records_name_the_trainer_of_texts_by_the_module_that_it_was_in_first(tmp_path):
    assert recorded_class(sft_trainer(tmp_path)) == "hf_s3t.sft_trainer.S3TSFTTrainer"


def test_a_formatting_that_makes_the_same_rows_is_the_same(tmp_path, monkeypatch):
    plant_stages(sft_trainer(tmp_path), limit=1)
    trainer, warned = sft_trainer(tmp_path, lambda row: spoken(row)), []
    monkeypatch.setattr("hf_s3t.training.stage_records.logger.warning_once", warned.append)
    refuse_other_recipe(trainer)
    assert not warned


def test_rows_are_compared_once_whatever_the_number_of_stages(tmp_path, monkeypatch):
    config = s3t_config(num_slices=3)
    plant_stages(make_trainer(tmp_path, tiny_bert(3), ROWS, config=config))
    trainer = make_trainer(tmp_path, tiny_bert(3), ROWS, config=config)
    trainer.s3t_model.unlearn([ROWS[0]["id"]])
    asked, digest = [], rows_of_stages(trainer).digest
    monkeypatch.setattr(rows_of_stages(trainer), "digest", lambda key, *more: asked.append(key) or digest(key, *more))
    refuse_other_recipe(trainer)
    places = [(key.shard, slice_) for key in asked for slice_ in key.prefix]
    assert asked and len(asked) < len(trainer.folder.valid_stages) and len(asked) <= len(set(places))


# Accelerate


@pytest.mark.parametrize(
    ("name", "value", "argument", "said"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "`fp16=True`", "scales the loss by a factor"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "`mixed_precision: fp8`", "what earlier batches held"),
        ("ACCELERATE_USE_FSDP", "true", "FSDP and DeepSpeed", "which stages do not support"),
        ("ACCELERATE_USE_DEEPSPEED", "1", "FSDP and DeepSpeed", "which stages do not support"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "FSDP and DeepSpeed", "which stages do not support"),
    ],
)
def test_what_accelerate_was_told_meets_the_refusal_of_the_argument(
    name, value, argument, said, tmp_path, monkeypatch
):
    args = None
    if "PRECISION" not in name:
        # Without DeepSpeed, arguments themselves would refuse its environment.
        args = training_arguments(tmp_path / "system")
    monkeypatch.setenv(name, value)
    with pytest.raises((ConfigError, IsolationError), match=f"{argument}.*{said}"):
        trainer_of(tmp_path / "system", args=args)
    assert not (tmp_path / "system").exists()


class ScalesTheLoss(S3TTrainer):
    """Makes an accelerator of its own."""

    def _build_accelerator_args(self, **kwargs):
        return {**super()._build_accelerator_args(**kwargs), "mixed_precision": "fp16"}


class DrawsByWhatRan(S3TTrainer):
    """Makes an accelerator of its own."""

    def _build_accelerator_args(self, **kwargs):
        given = super()._build_accelerator_args(**kwargs)
        given["dataloader_config"].use_seedable_sampler = False
        return given


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (ScalesTheLoss, "`fp16=True`"),
        (DrawsByWhatRan, "use_seedable_sampler"),
    ],
    ids=["fp16", "sampler"],
)
def test_the_accelerator_is_looked_at_whoever_made_it(cls, said, tmp_path):
    with pytest.raises(IsolationError, match=said):
        trainer_of(tmp_path / "system", cls)
    assert not (tmp_path / "system").exists()


@pytest.mark.parametrize(
    ("argument", "environment", "said"),
    [
        ({"bf16": True}, {"ACCELERATE_MIXED_PRECISION": "bf16"}, r"accelerator.mixed_precision=bf16 \(was no\)"),
        (
            {"torch_compile": True, "torch_compile_backend": "eager"},
            {"ACCELERATE_DYNAMO_BACKEND": "eager"},
            r"accelerator.dynamo=eager \(was None\)",
        ),
    ],
    ids=["bf16", "dynamo"],
)
def test_a_system_does_not_go_on_as_accelerate_was_told_since(argument, environment, said, system, monkeypatch):
    refuses(trainer_of(system, arguments=argument), said)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    refuses(trainer_of(system), said)


def test_every_stage_is_compiled_for_itself_also_where_accelerate_was_told_to(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "eager")
    compiled, resets = [], []
    monkeypatch.setattr(torch, "compile", lambda model, **settings: compiled.append(settings["backend"]) or model)
    monkeypatch.setattr(torch.compiler, "reset", lambda: resets.append(len(compiled)))
    trainer_of(tmp_path).train()
    assert compiled == ["eager", "eager"] and resets == [0, 1]


def test_a_trainer_whose_accelerator_another_one_set_up_anew_trains_no_more(tmp_path):
    trainer = trainer_of(tmp_path / "one")
    training_arguments(tmp_path / "two")
    with pytest.raises(S3TError, match="Make this trainer again, with its arguments, after the others"):
        trainer.train()
    trainer_of(tmp_path / "two", arguments={"bf16": True})
    for call in (trainer.train, trainer.verify):
        with pytest.raises(S3TError, match=r"set Accelerate up anew \(mixed_precision\)"):
            call()
    assert not trainer.folder.stages


# Arguments


def test_arguments_are_told_the_same_in_every_process(tmp_path):
    """Nothing of them tells where an object lay in memory, or in which order a set came."""

    def told(**scheduler):
        return recipe_of(training_arguments(tmp_path, lr_scheduler_kwargs=scheduler))["lr_scheduler_kwargs"]

    assert told(rate=Plain()) == told(rate=Plain())
    assert told(names={"b", "a", "c"}) == {"names": ["a", "b", "c"]}


def needs(what: Any) -> Any:
    """For `functools.partial` over a function of the user's that is decorated."""
    return what


@torch.no_grad()
def decorated(outputs, labels, num_items_in_batch=None):
    """A loss in a decorator."""
    return needs(outputs.logits.mean())


class Descends(torch.optim.Optimizer):
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])


class DescendsFaster(Descends):
    def __init__(self, params, lr):
        super().__init__(params, 2 * lr)


@pytest.mark.parametrize("kind", [DescendsFaster, Descends])
def test_an_optimizer_is_told_the_same_before_and_after_the_first_of_its_class(kind):
    """By then torch has put a wrapped `step` into the class."""
    before, step = described(kind), vars(kind).get("step")
    kind([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    assert vars(kind)["step"] is not step and described(kind) == before


def test_a_decorated_function_is_told_by_what_is_inside(tmp_path):
    description, unstable = described(decorated)
    assert not unstable and description["name"] == "decorated" and "code" in description


class OfPatches(transformers.ProcessorMixin):
    def __init__(self, patch_size=14):
        super().__init__()
        self.patch_size = patch_size


def test_a_processor_is_told_by_its_own_settings_too():
    assert described(OfPatches()) == described(OfPatches(14)) != described(OfPatches(28))
