"""State that is in no parameter: what is seen of it, what a copy of it shares, and what a model may keep."""

import collections
import functools
import itertools
import logging
import random
import threading

import numpy as np
import pytest
import torch
from datasets import Dataset
from support.tiny import (
    batch_of,
    build,
    image_rows,
    lm_rows,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_llama,
    tiny_vit,
    training_arguments,
)
from torch import nn

from hf_s3t import S3TModel
from hf_s3t.errors import IsolationError
from hf_s3t.model.fresh_copies import fresh_copy, fresh_dataset
from hf_s3t.model.marks import difference, mark
from hf_s3t.model.module_state import Look


pytestmark = pytest.mark.usefixtures("one_thread")


class Holds:
    """An object with one attribute."""

    def __init__(self, value):
        self.value = value


class Slotted:
    """An object without a `__dict__`."""

    __slots__ = ("value",)

    def __init__(self, value):
        self.value = value


def closure(value):
    def act():
        return value

    return act


HOLDERS = {
    "an attribute": Holds,
    "a slot": Slotted,
    "a closure": closure,
    "a closure in a closure": lambda value: closure(closure(value)),
    "a partial": lambda value: functools.partial(print, value),
    "a method": lambda value: Holds(value).__init__,
    "a default": lambda value: lambda held=value: held,
    "an object in a dict in an object": lambda value: Holds({"one": [Holds(value)]}),
    "a transform": lambda value: Dataset.from_list([{"a": 1}]).with_transform(closure(value)),
}
STATES = {
    "a counter": (lambda: [0], lambda held: held.__setitem__(0, 1)),
    "a list that grows": (list, lambda held: held.append(1)),
    "a deque": (collections.deque, lambda held: held.append(1)),
    "a dict": (dict, lambda held: held.update(a=1)),
    "a set": (set, lambda held: held.add(1)),
    "a tensor": (lambda: torch.zeros(2), lambda held: held.add_(1)),
    "a large tensor": (lambda: torch.zeros(2**19), lambda held: held.add_(1)),
    "an array": (lambda: np.zeros(2), lambda held: held.__setitem__(0, 1)),
    "torch's generator": (torch.Generator, lambda held: torch.rand(1, generator=held)),
    "NumPy's generator": (lambda: np.random.default_rng(0), lambda held: held.random()),
    "NumPy's old generator": (lambda: np.random.RandomState(0), lambda held: held.rand()),
    "Python's generator": (lambda: random.Random(0), lambda held: held.random()),
    "a module's buffer": (lambda: nn.BatchNorm1d(2), lambda held: held(torch.ones(4, 2))),
}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("state", STATES)
def test_state_is_seen_wherever_it_is_held_and_a_copy_has_its_own(holder, state):
    make, move = STATES[state]
    held = make()
    part = HOLDERS[holder](held)
    before = mark(part)
    copied = fresh_dataset(part) if isinstance(part, Dataset) else fresh_copy(part, ())
    assert mark(part) == before == mark(copied)
    move(held)
    assert difference(before, mark(part)) is not None
    # What is large is data, and shared; what functions have as defaults is theirs, wherever they are used.
    if state != "a large tensor" and holder != "a default":
        assert mark(copied) == before


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.ones(2, 2).to_sparse_csr(),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    ],
    ids=["sparse", "compressed", "conjugate", "jagged", "nested"],
)
def test_tensors_of_every_layout_can_be_looked_at(tensor):
    assert mark(Holds(tensor)) == mark(Holds(tensor)) != mark(Holds(torch.ones(3)))


def test_a_long_text_is_not_copied_to_be_looked_at():
    text = "ab" * 1000
    seen = mark(Holds(text))
    assert seen == mark(Holds("ab" * 1000)) != mark(Holds("ba" * 1000))
    assert len(repr(seen)) < 1000


def test_a_difference_is_named():
    part = Holds({"one": [Holds(closure([0]))]})
    before = mark(part)
    part.value["one"][0].value.__closure__[0].cell_contents[0] = 1
    assert difference(before, mark(part)) == "value['one'][0].value.value[0]"


def test_a_copy_shares_data_and_what_it_is_told_to():
    rows, trainer = list(range(1000)), Holds(1)
    part = Holds([rows, trainer, torch.zeros(2**20), logging.getLogger("x"), [1]])
    copied = fresh_copy(part, (trainer,))
    same = [one is other for one, other in zip(part.value, copied.value, strict=True)]
    assert same == [True, True, True, True, False]


def test_a_function_that_holds_itself_is_copied():
    def count():
        return held, count

    held = [0]
    copied = fresh_copy(count, ())
    held.append(1)
    assert copied()[0] == [0] and copied()[1] is copied


def test_what_a_closure_holds_and_cannot_be_copied_is_shared_and_seen():
    lock = threading.Lock()
    part = closure([lock, 0])
    copied = fresh_copy(part, ())
    assert copied()[0] is lock
    before = mark(part)
    copied()[1] = 1
    assert difference(before, mark(part)) == "value[1]"


def test_a_dataset_that_cannot_be_copied_is_used_as_it_is():
    part = Holds(threading.Lock())
    assert fresh_dataset(part) is part and fresh_dataset({"one": part})["one"] is part
    with pytest.raises(IsolationError, match="Holds cannot be copied"):
        fresh_copy(part, ())


# Models


class Leaves(nn.Module):
    """A module that leaves something in itself, in each pass or only in training, around another."""

    def __init__(self, inner, leave, only_in_training=False):
        super().__init__()
        self.inner, self.only_in_training = inner, only_in_training
        self.leave = leave
        self.setting, self.seen, self.memory, self.steps = "sparse", [0], None, torch.zeros(1)

    def forward(self, x):
        """As the other, and then leave it."""
        if self.training or not self.only_in_training:
            self.leave(self, x)
        return self.inner(x)


def set_setting(layer, x):
    layer.setting = "full"


def count(layer, x):
    layer.seen[0] += 1


def remember(layer, x):
    layer.memory = x.detach()


def write(layer, x):
    layer.steps += 1


def set_config(layer, x):
    layer.config.depth_of_words = 7


LEFT = {"setting": set_setting, "seen": count, "memory": remember, "steps": write, "config": set_config}
SHAPES = {"lengths": lambda layer, x: setattr(layer, "memory", torch.ones(x.shape[1]))}


def leaving(model, leave, only_in_training=False):
    """The model, with a module that leaves something in itself."""
    owner, name = (model.vit.embeddings, "dropout") if hasattr(model, "vit") else (model.model, "norm")
    layer = Leaves(getattr(owner, name), leave, only_in_training)
    setattr(owner, name, layer)
    # As modules of Transformers hold it.
    model.config.depth_of_words = 3
    layer.config = model.config
    return model.eval()


@pytest.mark.parametrize("left", LEFT)
def test_a_language_model_that_leaves_something_in_itself_is_refused_when_it_is_given(left, tmp_path):
    model = leaving(tiny_llama(2), LEFT[left])
    before = Look(model)
    with pytest.raises(IsolationError, match=r"The forward pass of LlamaForCausalLM changes the model, in `.* Use a"):
        make_trainer(tmp_path / "system", model, lm_rows(8), config=s3t_config(budget=1))
    assert not (tmp_path / "system").exists() and not model.training
    if left in ("setting", "memory"):
        # What it tried out is put back as far as can be.
        assert Look(model).marks.keys() == before.marks.keys()


def test_an_attention_that_changes_for_good_with_a_short_batch_is_refused(tmp_path):
    """The other way round it would be seen too late: in a stage that has seen one short example."""
    settings = dict(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3
    )
    sparse = dict(attention_type="block_sparse", block_size=4, num_random_blocks=1, max_position_embeddings=256)
    for changes in (sparse, {"attention_type": "original_full"}):
        model = build("BigBirdForSequenceClassification", "BigBirdConfig", 0, **{**settings, **changes})
        if changes is sparse:
            with pytest.raises(IsolationError, match=r"attention_type` \(from 'block_sparse' to 'original_full'\)"):
                make_trainer(tmp_path, model, config=s3t_config(budget=1))
        else:
            make_trainer(tmp_path, model, config=s3t_config(budget=1))


@pytest.mark.parametrize("left", LEFT)
@pytest.mark.parametrize("kind", ["words, in training only", "images"])
def test_a_stage_that_left_something_in_the_base_is_not_written(left, kind, tmp_path):
    if kind == "images":
        model, rows, remains = leaving(tiny_vit(2), LEFT[left]), image_rows(16), {"memory"}
    else:
        model, rows, remains = leaving(tiny_llama(2), LEFT[left], only_in_training=True), lm_rows(16), {"memory"}
    trainer = make_trainer(tmp_path, model, rows, config=s3t_config(budget=1))
    with pytest.raises(IsolationError, match=r"Training shard-0/\S+ changed `\S+`.* of the base model, on which all"):
        trainer.train()
    assert not trainer.folder.valid_stages
    for name in remains:
        assert not any(getattr(module, name, None) is not None for module in model.modules())


@pytest.mark.parametrize("given", ["words", "images"])
def test_what_each_pass_makes_from_the_shape_of_its_input_is_no_state(given, tmp_path):
    model = leaving(tiny_vit(2) if given == "images" else tiny_llama(2), SHAPES["lengths"])
    rows = (
        image_rows(8)
        if given == "images"
        else lm_rows(4) + [{**r, "id": f"long-{r['id']}"} for r in lm_rows(4, 1, 12)]
    )
    args = training_arguments(tmp_path, per_device_train_batch_size=1)
    trainer = make_trainer(tmp_path, model, rows, config=s3t_config(budget=1), args=args)
    trainer.train()
    assert trainer.folder.valid_stages == set(trainer.folder.plan.stages())
    live = trainer.s3t_model
    for count in (1, 2, 3, 2, 1):
        batch = batch_of(image_rows(count) if given == "images" else lm_rows(2, length=3 + count))
        live(**{name: value for name, value in batch.items() if name != "labels"})


def test_the_kind_of_problem_that_a_first_batch_settles_is_settled_by_each_stage_anew(tmp_path):
    trainer = make_trainer(tmp_path, tiny_vit(2), image_rows(12), config=s3t_config(budget=1))
    trainer.model.config.problem_type = None
    trainer.train()
    # As in a process that loads the system.
    assert trainer.model.config.problem_type is None


def test_a_model_that_moves_between_two_forms_is_taken(tmp_path):
    """One whose weights are rescaled to answer, and back to be trained, as RWKV's are."""

    def flip(layer, x):
        layer.setting = "sparse" if layer.training else "rescaled"

    trainer = make_trainer(tmp_path, leaving(tiny_llama(2), flip), lm_rows(8), config=s3t_config(budget=1))
    trainer.s3t_model  # noqa: B018
    trainer.train()
    for _ in range(5):
        trainer.s3t_model(input_ids=batch_of(lm_rows(1))["input_ids"])


@pytest.mark.parametrize("left", LEFT)
def test_a_call_that_leaves_something_in_the_base_is_refused_and_all_after_it(left, tmp_path):
    base = leaving(tiny_vit(2), lambda layer, x: None)
    plant_stages(make_trainer(tmp_path, base, image_rows(8), config=s3t_config(budget=1)))
    served = S3TModel.from_pretrained(tmp_path, base_model=leaving(tiny_vit(2), lambda layer, x: None))
    layer = served.base_model.vit.embeddings.dropout
    batches = [{"pixel_values": batch_of(image_rows(2, seed=n))["pixel_values"]} for n in range(9)]
    served(**batches[0])
    layer.leave = LEFT[left]
    with pytest.raises(IsolationError, match="A call left something in the modules of ViTForImageClassification"):
        for batch in batches[1:]:
            served(**batch)
    with pytest.raises(IsolationError):
        served(**batches[0])


def test_looking_costs_few_calls(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_vit(2), image_rows(8), config=s3t_config(budget=1))
    plant_stages(trainer)
    served = S3TModel.from_pretrained(tmp_path, base_model=tiny_vit(2))
    looks = []
    monkeypatch.setattr("hf_s3t.model.call_watch.Look", lambda model: looks.append(1) or Look(model))
    for _, batch in zip(range(40), itertools.repeat({"pixel_values": batch_of(image_rows(1))["pixel_values"]})):
        served(**batch)
    # Before and after the second, the fourth, ... the thirty-second.
    assert len(looks) == 10
