"""
Whatever the optimizer, a stage is what plain PEFT and `Trainer` make of its examples, whether or not something is
evaluated, saved or interrupted meanwhile; one that can be no stage's own is refused.
"""

import gc
import weakref
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from support.insides import rows_of_stages
from support.tiny import (
    classification_rows,
    lm_rows,
    lora,
    make_trainer,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from torch import nn
from transformers import Trainer, TrainerCallback, set_seed
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer

from hf_s3t import S3TTrainer
from hf_s3t.errors import ConfigError
from hf_s3t.model.tensor_files import differing_tensors
from hf_s3t.plan import StageKey, stage_seed
from hf_s3t.training.optimizers import StageOptimizer


pytestmark = [pytest.mark.usefixtures("one_thread", "shared_key")]

STAGE = StageKey(0, (0,))
ROWS = lm_rows(16)
EVALUATION = lm_rows(4, seed=9)
SCHEDULE_FREE = dict(optim="schedule_free_adamw", warmup_steps=2)


def trainer_on(folder: Path, *, evaluate: bool = False, more: dict | None = None, **changes):
    args = training_arguments(folder, num_train_epochs=1, per_device_train_batch_size=2, **changes)
    given = {"eval_dataset": Dataset.from_list(EVALUATION)} if evaluate else {}
    # One stage on all that there is: what is said of one holds of each.
    config = s3t_config(num_slices=1, layers_per_slice=2)
    return make_trainer(folder, tiny_llama(2), ROWS, args=args, config=config, **given, **(more or {}))


def trained(folder: Path, **settings) -> dict[str, torch.Tensor]:
    trainer_on(folder, **settings).train()
    return stage_in(folder)


def stage_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / STAGE.path / "adapter_model.safetensors")


class Dies(TrainerCallback):
    """Ends the process, as far as a test can, in the middle of a stage."""

    def __init__(self, at: int):
        self.at = at

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.at:
            raise KeyboardInterrupt


def resumed(folder: Path, **settings) -> tuple[dict, list]:
    """A stage that is interrupted and trained on by another trainer, and the checkpoints that this one began with."""
    settings = {"save_strategy": "steps", "save_steps": 4, **settings}
    more = settings.pop("more", {})
    with pytest.raises(KeyboardInterrupt):
        trainer_on(folder, more={**more, "callbacks": [Dies(5)]}, **settings).train()
    trainer = trainer_on(folder, more=more, **settings)
    found, look = [], S3TTrainer._last_checkpoint
    # On the class: what is set on a trainer itself is of its recipe.
    with mock.patch.object(S3TTrainer, "_last_checkpoint", lambda *args: found.append(look(*args)) or found[-1]):
        trainer.train()
    return stage_in(folder), [Path(one).name for one in found if one]


# Weights that serve, and others that are trained


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_thread, shared_key) -> dict[str, torch.Tensor]:
    """A stage that schedule-free AdamW trained while nothing else happened."""
    return trained(tmp_path_factory.mktemp("undisturbed"), **SCHEDULE_FREE)


def test_a_schedule_free_stage_is_what_plain_peft_and_trainer_serve(undisturbed, tmp_path):
    trainer = trainer_on(tmp_path / "system", **SCHEDULE_FREE)
    rows = rows_of_stages(trainer).select(STAGE, trainer.folder.table)
    trainer.train()
    seed = stage_seed(trainer.s3t_config.seed, STAGE)
    set_seed(seed)
    config = LoraConfig.from_pretrained(tmp_path / "system" / STAGE.path)
    config.inference_mode = False
    model = get_peft_model(tiny_llama(2), config)
    args = training_arguments(
        tmp_path / "plain", num_train_epochs=1, per_device_train_batch_size=2, seed=seed, **SCHEDULE_FREE
    )
    plain = Trainer(model, args, train_dataset=rows)
    plain.train()
    training = {name: tensor.clone() for name, tensor in get_peft_model_state_dict(model).items()}
    plain.optimizer.eval()
    served = get_peft_model_state_dict(model)
    assert differing_tensors(training, served)
    assert not differing_tensors(stage_in(tmp_path / "system"), served)
    assert not differing_tensors(undisturbed, served)


class AsksForWhatServes(TrainerCallback):
    """As callbacks do that look at a model by hand: in the middle of accumulation, too."""

    def on_substep_end(self, args, state, control, optimizer=None, **kwargs):
        optimizer.eval()

    on_step_end = on_train_begin = on_substep_end


BY_HAND = {"callbacks": [AsksForWhatServes()]}


EVALUATED = {"evaluate": True, "eval_strategy": "steps", "eval_steps": 3}


@pytest.mark.parametrize(
    "settings",
    [
        {**EVALUATED, "eval_on_start": True, "save_strategy": "steps", "save_steps": 2, "more": BY_HAND},
        {"evaluate": True, "eval_strategy": "epoch"},
        pytest.param({"save_strategy": "steps", "save_steps": 1}, marks=pytest.mark.slow),
        pytest.param({"more": BY_HAND}, marks=pytest.mark.slow),
    ],
    ids=["everything", "an evaluation last", "checkpoints", "a callback"],
)
def test_what_happens_beside_training_leaves_no_trace_in_a_schedule_free_stage(undisturbed, settings, tmp_path):
    assert not differing_tensors(trained(tmp_path, **SCHEDULE_FREE, **settings), undisturbed)


@pytest.mark.parametrize("evaluation", [pytest.param({}, marks=pytest.mark.slow), EVALUATED], ids=["no", "yes"])
def test_a_schedule_free_stage_that_was_interrupted_is_the_same(undisturbed, evaluation, tmp_path):
    stage, checkpoints = resumed(tmp_path, **SCHEDULE_FREE, **evaluation)
    assert checkpoints == ["checkpoint-4"]
    assert not differing_tensors(stage, undisturbed)


def test_the_best_of_a_schedule_free_stage_is_what_was_evaluated(tmp_path):
    losses = iter(range(100))
    chosen = dict(
        evaluate=True,
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="worse_and_worse",
        greater_is_better=False,
        more={"compute_metrics": partial(lambda losses, predictions: {"worse_and_worse": next(losses)}, losses)},
    )
    best = trained(tmp_path / "best", **SCHEDULE_FREE, **chosen)
    assert not differing_tensors(best, trained(tmp_path / "three steps", **SCHEDULE_FREE, max_steps=3))


class Averages(torch.optim.SGD):
    """Serves the mean of the weights that it went through, which it keeps to itself."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        self.means, self.steps, self.is_training = {}, 0, False

    def step(self, closure=None):
        super().step(closure)
        self.steps += 1
        for parameter in self.param_groups[0]["params"]:
            mean = self.means.setdefault(id(parameter), torch.zeros_like(parameter))
            mean += (parameter.detach() - mean) / self.steps

    @torch.no_grad()
    def _move(self, sign):
        # There and back again is not quite where it was.
        for parameter in self.param_groups[0]["params"]:
            mean = self.means.get(id(parameter))
            if mean is not None:
                parameter += 0.5 * (mean - parameter) if sign > 0 else mean.sub(parameter).neg()

    def train(self):
        if not self.is_training:
            self._move(-1)
        self.is_training = True

    def eval(self):
        if self.is_training:
            self._move(1)
        self.is_training = False


def test_so_it_is_of_any_optimizer_with_two_weights(tmp_path):
    by = {"more": {"optimizer_cls_and_kwargs": (Averages, {"lr": 0.1})}}
    alone = trained(tmp_path / "alone", **by)
    beside = trained(tmp_path / "beside", evaluate=True, eval_strategy="steps", eval_steps=3, **by)
    assert not differing_tensors(alone, beside)


def test_what_is_written_to_weights_that_serve_has_the_effect_that_it_always_has():
    layer = nn.Linear(2, 1)
    optimizer = Averages(layer.parameters(), lr=0.1)
    held = StageOptimizer(optimizer, layer, ())
    optimizer.train()
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    before = layer.weight.detach().clone()
    optimizer.eval()
    optimizer.train()
    assert torch.equal(layer.weight, before)
    optimizer.eval()
    layer.weight.data.zero_()
    optimizer.train()
    assert not torch.equal(layer.weight, before)
    held.release()
    assert "eval" not in vars(optimizer)


def test_the_optimizer_of_a_stage_outlives_it_by_no_garbage_collection(tmp_path):
    class Follows(TrainerCallback):
        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            self.optimizer = weakref.ref(optimizer.optimizer)

    follows = Follows()
    trainer = trainer_on(tmp_path, **SCHEDULE_FREE, more={"callbacks": [follows]})
    collect, gc.collect = gc.collect, lambda *args: 0
    gc.disable()
    try:
        trainer.train()
        assert follows.optimizer() is None
    finally:
        gc.enable()
        gc.collect = collect


# State that a checkpoint does not hold


class LayerByLayer(LayerWiseDummyOptimizer):
    """As Transformers' layer-wise optimizers: one for each parameter, that steps in the backward pass."""

    def __init__(self, params, **kwargs):
        super().__init__(**kwargs)
        parameters = [parameter for group in params for parameter in group["params"]]
        self.optimizer_dict = {parameter: torch.optim.AdamW([parameter], **kwargs) for parameter in parameters}
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter):
        self.optimizer_dict[parameter].step()
        self.optimizer_dict[parameter].zero_grad()


class Momentum(torch.optim.SGD):
    """Keeps a momentum where it likes."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    momentum = self.momentum_of(group, parameter)
                    momentum.mul_(0.9).add_(parameter.grad)
                    parameter.grad.copy_(momentum)
        super().step(closure)


class Projector:
    def __init__(self, parameter):
        self.momentum = torch.zeros_like(parameter)


class InObjects(Momentum):
    """As GaLore."""

    def momentum_of(self, group, parameter):
        return self.state[parameter].setdefault("projector", Projector(parameter)).momentum


class UnderTensors(Momentum):
    """As GrokAdamW."""

    def momentum_of(self, group, parameter):
        return group.setdefault("state", {}).setdefault(parameter, torch.zeros_like(parameter))


class InAttributes(Momentum):
    """As AdaLomo; by more than a handful of names."""

    def __init__(self, params, **kwargs):
        super().__init__(params, **kwargs)
        self.momenta = {f"unused {number}": torch.zeros(1) for number in range(100)}

    def momentum_of(self, group, parameter):
        number = next(n for n, p in enumerate(group["params"]) if p is parameter)
        return self.momenta.setdefault((number, parameter.shape), torch.zeros_like(parameter))


class Inside(torch.optim.Optimizer):
    """As wrappers of another optimizer, whose state is not theirs."""

    def __init__(self, params, **kwargs):
        super().__init__(params, kwargs)
        self.inner = torch.optim.AdamW(self.param_groups, **kwargs)

    def step(self, closure=None):
        self.inner.step(closure)


NOT_HELD = [LayerByLayer, InObjects, UnderTensors, InAttributes, Inside]


@pytest.mark.parametrize("cls", NOT_HELD, ids=lambda cls: cls.__name__)
def test_what_a_checkpoint_does_not_hold_is_seen(cls):
    layer = nn.Linear(2, 1)
    optimizer = cls([{"params": list(layer.parameters())}], lr=0.1)
    held = StageOptimizer(optimizer, layer, ())
    for _ in range(2):
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    assert held.not_held() is not None


def slow_but(cls, *others):
    return [cls, *(pytest.param(other, marks=pytest.mark.slow) for other in others)]


@pytest.mark.parametrize(
    "cls", slow_but(InObjects, LayerByLayer, UnderTensors, InAttributes, Inside), ids=lambda cls: cls.__name__
)
def test_where_checkpoints_do_not_hold_an_optimizer_a_stage_begins_anew_and_that_is_said(cls, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_s3t.training.checkpoints.logger.warning_once", said.append)
    by = {"more": {"optimizer_cls_and_kwargs": (cls, {"lr": 0.05})}}
    stage, checkpoints = resumed(tmp_path / "resumed", **by)
    assert checkpoints == []
    assert any(cls.__name__ in one and "from its beginning" in one for one in said)
    assert not differing_tensors(stage, trained(tmp_path / "whole", **by))


@pytest.mark.parametrize(
    "settings",
    [
        {"optim": "adamw_torch"},
        *(
            pytest.param(settings, marks=pytest.mark.slow)
            for settings in (
                {"optim": "adafactor"},
                {"optim": "paged_adamw_8bit"},
                {"more": {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9})}},
            )
        ),
    ],
    ids=["AdamW", "Adafactor", "paged 8-bit AdamW", "SGD"],
)
def test_where_they_do_nothing_is_said_and_a_stage_goes_on(settings, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr("hf_s3t.training.checkpoints.logger.warning_once", said.append)
    stage, checkpoints = resumed(tmp_path / "resumed", **settings)
    assert checkpoints == ["checkpoint-4"]
    assert not [one for one in said if "checkpoint" in one.lower()]
    assert not differing_tensors(stage, trained(tmp_path / "whole", **settings))


@pytest.mark.parametrize(
    "cls", slow_but(Averages, LayerByLayer, InObjects, UnderTensors), ids=lambda cls: cls.__name__
)
def test_a_checkpoint_of_an_earlier_version_that_does_not_hold_it_is_not_resumed(cls, tmp_path, monkeypatch, caplog):
    # Earlier versions recorded it as one that is, and nothing of training beside.
    by = {"more": {"optimizer_cls_and_kwargs": (cls, {"lr": 0.05})}}
    with monkeypatch.context() as patch:
        patch.setattr(StageOptimizer, "not_held", lambda self: None)
        patch.setattr("hf_s3t.training.checkpoints.save_file", lambda *args: None)
        with pytest.raises(KeyboardInterrupt):
            more = {**by["more"], "callbacks": [Dies(5)]}
            trainer_on(tmp_path / "old", save_strategy="steps", save_steps=4, more=more).train()
    again = trained(tmp_path / "old", save_strategy="steps", save_steps=4, **by)
    assert "trained again from its beginning: checkpoint-4 is not resumed from" in caplog.text
    assert not differing_tensors(again, trained(tmp_path / "whole", **by))


# Optimizers that are bound to parameters


def of_a_model(name):
    model = tiny_llama(1)
    return {
        "params": lambda: {"params": [{"params": list(model.parameters())}]},
        "model": lambda: {"model": model},
        "optimizer_dict": lambda: {"optimizer_dict": {}},
        "slow": lambda: {"slow": list(model.parameters())},
        "base": lambda: {"base": torch.optim.SGD(model.parameters(), lr=0.1)},
    }[name]()


@pytest.mark.parametrize("name", ["params", "model", "optimizer_dict", "slow", "base"])
def test_arguments_of_an_optimizer_that_name_parameters_are_refused(name, tmp_path):
    with pytest.raises(ConfigError, match=rf"`optimizer_cls_and_kwargs`.*`{name}`.*Leave it out"):
        trainer_on(tmp_path, more={"optimizer_cls_and_kwargs": (torch.optim.AdamW, of_a_model(name))})
    assert not list(tmp_path.iterdir())


def test_so_are_classes_that_hold_some_callbacks_that_do_and_what_is_no_pair(tmp_path):
    optimizer = torch.optim.SGD(tiny_llama(1).parameters(), lr=0.1)

    class Steps(TrainerCallback):
        def __init__(self):
            self.mine = optimizer

    for more, words in (
        ({"optimizer_cls_and_kwargs": (lambda: lambda model, **kwargs: optimizer, {})}, "its class"),
        ({"optimizer_cls_and_kwargs": (partial(torch.optim.SGD, tiny_llama(1).parameters()), {})}, "its class"),
        ({"optimizer_cls_and_kwargs": torch.optim.SGD}, "expected a class and a dict"),
        ({"callbacks": [Steps()]}, "Steps holds an optimizer in `mine`"),
    ):
        with pytest.raises(ConfigError, match=words):
            trainer_on(tmp_path, more=more)
    assert not list(tmp_path.iterdir())


CACHED: list[torch.optim.Optimizer] = []


class ForTheFirst:
    """A factory that remembers, where nobody sees it, what it made for the first stage."""

    def __call__(self, model, lr):
        if not CACHED:
            CACHED.append(torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr))
        return CACHED[0]


def test_an_optimizer_that_trains_nothing_of_a_stage_is_refused(tmp_path):
    CACHED.clear()
    args = training_arguments(tmp_path)
    trainer = make_trainer(
        tmp_path, tiny_llama(2), ROWS, args=args, optimizer_cls_and_kwargs=(ForTheFirst, {"lr": 0.1})
    )
    with pytest.raises(ConfigError, match="SGD trains no tensor of the stage"):
        trainer.train()
    assert len(trainer.folder.stages) == 1


def test_arguments_of_an_optimizer_are_every_stage_s_own(tmp_path):
    def stages_by(folder, rate):
        args = training_arguments(folder, lr_scheduler_type="linear")
        by = torch.optim.SGD, {"lr": rate}
        trainer = make_trainer(
            folder, tiny_llama(2), ROWS, args=args, config=s3t_config(budget=1), optimizer_cls_and_kwargs=by
        )
        trainer.train()
        files = sorted((folder / "stages").rglob("adapter_model.safetensors"))
        return {f"{number} {name}": t for number, file in enumerate(files) for name, t in load_file(file).items()}

    # Schedulers write to a rate that is a tensor.
    rate = torch.tensor(0.125)
    assert not differing_tensors(stages_by(tmp_path / "tensor", rate), stages_by(tmp_path / "number", 0.125))
    assert rate.item() == 0.125


class Groups(TrainerCallback):
    """Keeps the names of what the optimizer of each stage has, by group, and of what plain `Trainer` would give it."""

    def __init__(self):
        self.trainer, self.seen = None, []

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Once for each stage."""
        decaying = set(Trainer.get_decay_parameter_names(self.trainer, model))
        names = {parameter: name for name, parameter in model.named_parameters()}
        trained = [name for parameter, name in names.items() if parameter.requires_grad]
        given = [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]
        wanted = [[n for n in trained if n in decaying], [n for n in trained if n not in decaying]]
        self.seen.append((given, wanted))


@pytest.mark.parametrize(
    ("make", "changes", "rows"),
    [(tiny_llama, {"use_dora": True}, lm_rows(16)), (tiny_bert, {}, classification_rows(16))],
    ids=["llama, DoRA", "bert, a head"],
)
def test_weights_decay_as_with_plain_trainer(tmp_path, make, changes, rows):
    groups, model = Groups(), make(2)
    args = training_arguments(tmp_path, max_steps=1, weight_decay=0.1)
    config = s3t_config(num_shards=1, num_slices=2)
    groups.trainer = make_trainer(
        tmp_path, model, rows, args=args, peft_config=lora(model, **changes), config=config, callbacks=[groups]
    )
    groups.trainer.train()
    assert len(groups.seen) >= 2 and all(given == wanted for given, wanted in groups.seen)
    # Biases of a head are no weights.
    assert all(bool(group) for given, _ in groups.seen for group in given[: 2 if make is tiny_bert else 1])
