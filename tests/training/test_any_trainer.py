"""S3T over any trainer: `class X(S3TTrainerMixin, SomeTrainer)` is all that is written."""

import copy
import inspect

import pytest
import torch
from datasets import Dataset
from support.preferences import GONE, PLANTED, differences, pairs, tokenizer
from support.refusals import files_of
from support.tiny import (
    classification_rows,
    ids_of,
    lora,
    make_trainer,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from transformers import Trainer, TrainingArguments
from trl import DPOTrainer, GRPOConfig, GRPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.trainer.callbacks import SyncRefModelCallback

from hf_s3t import S3TTrainerMixin
from hf_s3t.errors import ConfigError, IsolationError


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")


class S3TORPOTrainer(S3TTrainerMixin, ORPOTrainer):
    pass


class S3TCPOTrainer(S3TTrainerMixin, CPOTrainer):
    pass


class S3TGRPOTrainer(S3TTrainerMixin, GRPOTrainer):
    pass


SEEN: dict[str, set[int]] = {}


def likes_small_words(prompts, completions, **columns):
    """A reward that depends on the answer alone, and tells what it was shown."""
    SEEN.setdefault("columns", set()).update(columns)
    SEEN.setdefault("prompts", set()).update(prompts)
    return [
        sum(int(word[1:]) < 30 for word in text.split() if word[0] == "w") + 0.1 * len(text) for text in completions
    ]


def likes_large_words(prompts, completions, **columns):
    return [float(len(text)) for text in completions]


OF_PAIRS = {"max_length": 24, "remove_unused_columns": False, "bf16": False}
OF_PROMPTS = {"max_completion_length": 5, "num_generations": 3, "bf16": False, "learning_rate": 0.1}
TRAINERS = {
    "orpo": (S3TORPOTrainer, ORPOConfig, OF_PAIRS, {}),
    "cpo": (S3TCPOTrainer, CPOConfig, OF_PAIRS, {}),
    "grpo": (S3TGRPOTrainer, GRPOConfig, OF_PROMPTS, {"reward_funcs": [likes_small_words]}),
    # Answers are used for two steps each, and a stage ends in between: a count of steps decides when others come.
    "grpo, answers kept": (
        S3TGRPOTrainer, GRPOConfig, {**OF_PROMPTS, "num_iterations": 2, "max_steps": 3},
        {"reward_funcs": [likes_small_words]},
    ),
}  # fmt: skip


def trainer_of(name, path, rows=None, config=None, arguments=None, **given):
    cls, kind, settings, more = TRAINERS[name]
    rows = pairs() if rows is None else rows
    if kind is GRPOConfig:
        rows = [{"id": row["id"], "prompt": row["prompt"]} for row in rows]
    settings = {"per_device_train_batch_size": 3, **settings, **(arguments or {})}
    return make_trainer(
        path,
        tiny_llama(2),
        rows,
        cls=given.pop("cls", cls),
        args=training_arguments(path, kind, **settings),
        config=config or s3t_config(num_shards=2),
        **{"processing_class": tokenizer(), **more, **given},
    )


@pytest.mark.parametrize(
    "name", ["orpo", pytest.param("cpo", marks=pytest.mark.slow), pytest.param("grpo", marks=pytest.mark.slow),
             "grpo, answers kept"],
)  # fmt: skip
def test_what_is_left_and_grown_again_is_what_a_system_without_the_rows_has(tmp_path, name):
    forgot = trainer_of(name, tmp_path / "forgot")
    forgot.train()
    forgot.s3t_model.unlearn(GONE)
    assert forgot.folder.valid_stages
    forgot.train()
    rows = [row for row in reversed(pairs()) if row["id"] not in GONE]
    never = trainer_of(name, tmp_path / "never", rows)
    never.train()
    assert differences(tmp_path / "forgot" / "stages", tmp_path / "never" / "stages") == {}
    assert never.verify("sample").ok


@pytest.mark.slow
def test_stages_trained_alone_are_those_of_a_whole_run(tmp_path):
    """A count of steps, and answers generated for others, do not go from stage to stage."""
    whole = trainer_of("grpo, answers kept", tmp_path / "whole")
    whole.train()
    while trainer_of("grpo, answers kept", tmp_path / "alone").train(max_stages=1).metrics["stages_left"]:
        pass
    assert differences(tmp_path / "whole" / "stages", tmp_path / "alone" / "stages") == {}
    assert whole._step == 0 and whole._buffered_inputs is None


def test_what_is_generated_belongs_to_the_prompts_of_the_stage(tmp_path):
    trainer = trainer_of("grpo", tmp_path, config=s3t_config())
    for key in trainer.folder.missing_stages():
        SEEN.clear()
        trainer.train(max_stages=1)
        (trained,) = [one for one in trainer.folder.valid_stages if one == key]
        prompts = {row["id"]: row["prompt"] for row in pairs()}
        ids = {i for slice_ in trained.prefix for i in trainer.folder.table.ids_in(0, slice_)}
        assert SEEN["prompts"] == {prompts[i] for i in ids}
    assert not SEEN["columns"] & {"id", "__s3t_row__"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["orpo", "grpo"])
def test_a_stage_that_was_interrupted_comes_out_the_same(tmp_path, name):
    from test_preference_trainers import Dies

    given = {"config": s3t_config(), "arguments": {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 2}}
    with pytest.raises(KeyboardInterrupt):
        trainer_of(name, tmp_path / "died", callbacks=[Dies(3)], **given).train()
    trainer_of(name, tmp_path / "died", **given).train()
    trainer_of(name, tmp_path / "whole", **given).train()
    assert differences(tmp_path / "died" / "stages", tmp_path / "whole" / "stages") == {}


@pytest.mark.parametrize("name", ["orpo", pytest.param("cpo", marks=pytest.mark.slow)])
def test_they_are_evaluated_by_the_ensemble(tmp_path, name):
    rows = Dataset.from_list(pairs(16)[12:])
    trainer = trainer_of(name, tmp_path, eval_dataset=rows, arguments={"learning_rate": 0.1})
    trainer.train()
    found = trainer.evaluate()
    alone = trainer.s3t_model(input_ids=torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss
    assert torch.isfinite(alone) and 0 < found["eval_loss"] < 20
    with trainer.s3t_model.limited_to(1):
        assert trainer.evaluate()["eval_loss"] != found["eval_loss"]


def test_what_a_class_takes_besides_is_recorded(tmp_path):
    trainer_of("grpo", tmp_path, config=s3t_config()).train(max_stages=1)
    with pytest.raises(ConfigError, match=r"another recipe: .*reward_funcs"):
        trainer_of("grpo", tmp_path, config=s3t_config(), reward_funcs=[likes_large_words]).train()


@pytest.mark.parametrize(
    ("given", "error", "says"),
    [
        ({"arguments": {"beta": 0.1}}, ConfigError, r"`beta=0\.1`.*expected a recipe without.*Set `beta=0\.0`"),
        ({"arguments": {"use_vllm": True}}, IsolationError, r"`use_vllm=True` has another engine.*Leave it off"),
        ({"arguments": {"log_completions": True}}, ConfigError, r"`log_completions=True` writes.*Leave it off"),
    ],
)
def test_what_grpo_cannot_have_is_refused(tmp_path, given, error, says):
    with pytest.raises(error, match=says):
        trainer_of("grpo", tmp_path / "system", **given)
    assert not files_of(tmp_path / "system")


def test_grpo_is_not_evaluated_by_the_bare_base(tmp_path):
    trainer = trainer_of("grpo", tmp_path, eval_dataset=Dataset.from_list([{"prompt": "w5 w6"}] * 3))
    with pytest.raises(ConfigError, match=r"GRPOTrainer evaluates by what the model in training generates.*`eval_str"):
        trainer.evaluate()


# Classes of one's own


class Halved(Trainer):
    """Passes on what it does not know, as many do."""

    def __init__(self, *args, share: float = 0.5, **kwargs):
        self.share = share
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss * self.share, outputs) if return_outputs else loss * self.share


class S3THalved(S3TTrainerMixin, Halved):
    pass


def own_trainer(path, rows=None, cls=S3THalved, **given):
    return make_trainer(path, tiny_bert(2), rows or classification_rows(12), cls=cls, config=s3t_config(), **given)


def test_a_class_that_passes_on_what_it_does_not_know(tmp_path):
    taken = list(inspect.signature(Trainer).parameters)
    assert own_trainer(tmp_path / "one", share=0.25).share == 0.25
    trainer = own_trainer(tmp_path / "forgot")
    trainer.train()
    trainer.s3t_model.unlearn(ids_of(12)[:1])
    trainer.train()
    own_trainer(tmp_path / "never", classification_rows(12)[1:]).train()
    assert differences(tmp_path / "forgot" / "stages", tmp_path / "never" / "stages") == {}
    with pytest.raises(ConfigError, match=r"share=0\.25 \(was 0\.5\)"):
        own_trainer(tmp_path / "forgot", share=0.25).train()
    with pytest.raises(TypeError, match="shaer"):  # by Trainer, to which the class passes it on
        own_trainer(tmp_path / "two", shaer=0.25)
    assert taken[:2] == ["model", "args"]


def test_arguments_may_be_given_in_the_order_of_the_class(tmp_path):
    model, args = tiny_bert(2), training_arguments(tmp_path)
    rows = Dataset.from_list(classification_rows(12))
    trainer = S3THalved(model, args, None, rows, s3t_config=s3t_config(), peft_config=lora(model))
    assert trainer.args is args and len(trainer.folder.table) == 12


class ByName(Trainer):
    """Takes what it takes by name alone."""

    def __init__(self, *, model, args, train_dataset=None, share=0.5, **kwargs):
        self.share = share
        super().__init__(model=model, args=args, train_dataset=train_dataset, **kwargs)


class S3TByName(S3TTrainerMixin, ByName):
    pass


def test_what_a_class_takes_by_name_alone_is_taken_so(tmp_path):
    assert own_trainer(tmp_path, cls=S3TByName, share=0.25).share == 0.25
    with pytest.raises(TypeError, match="ByName with S3TTrainerMixin: too many positional arguments"):
        S3TByName(tiny_bert(2), training_arguments(tmp_path), Dataset.from_list(classification_rows(12)))


class Tokenises(Trainer):
    def __init__(self, model, args, train_dataset, **kwargs):
        super().__init__(model, args, train_dataset=self._prepare_dataset(train_dataset), **kwargs)

    def _prepare_dataset(self, dataset):
        def twice(rows):
            return {name: [value for value in values for _ in range(2)] for name, values in rows.items()}

        return dataset.filter(lambda row: row["labels"] != 2).map(twice, batched=True)


class Forgets(Tokenises):
    def _prepare_dataset(self, dataset):
        return dataset.map(lambda row: {"words": row["input_ids"]}, remove_columns=dataset.column_names)


class S3TTokenises(S3TTrainerMixin, Tokenises):
    pass


class S3TForgets(S3TTrainerMixin, Forgets):
    pass


def test_rows_keep_their_number_where_some_go_and_several_are_made_of_one(tmp_path):
    rows = classification_rows(24)
    trainer = own_trainer(tmp_path, rows, S3TTokenises)
    words = {row["id"]: row["input_ids"] for row in rows if row["labels"] != 2}
    table, stages = trainer.folder.table, trainer._stage_rows
    for key in trainer.folder.missing_stages():
        ids = [i for slice_ in key.prefix for i in table.members(0, slice_)]
        assert stages.select(key, table)["input_ids"][:] == [words[i] for i in ids if i in words for _ in range(2)]
    assert stages.dropped(table) == 24 - len(words)
    trainer.add_examples(Dataset.from_list([{**row, "id": f"new {n}"} for n, row in enumerate(rows[:6])]), "slices")
    trainer.train(max_stages=1)


class Followed(Trainer):
    """Has a teacher that follows what is trained, as some of TRL's do by their settings."""

    def __init__(self, model, args, train_dataset, **kwargs):
        super().__init__(model, args, train_dataset=train_dataset, **kwargs)
        self.teacher = copy.deepcopy(model)
        self.add_callback(SyncRefModelCallback(self.teacher, self.accelerator))


class S3TFollowed(S3TTrainerMixin, Followed):
    pass


def test_a_class_whose_teacher_follows_what_is_trained_is_refused(tmp_path):
    with pytest.raises(IsolationError, match=r"Followed has a SyncRefModelCallback.*bring what one stage saw.*Choose"):
        own_trainer(tmp_path / "system", cls=S3TFollowed)
    assert not files_of(tmp_path / "system")


def test_rows_that_lost_their_number_are_refused(tmp_path):
    with pytest.raises(IsolationError, match=r"Forgets made other rows .*nobody could tell.*without `remove_columns`"):
        own_trainer(tmp_path / "system", cls=S3TForgets)
    assert not files_of(tmp_path / "system")


def test_a_mixin_behind_its_class_is_refused_as_the_class_is_written():
    with pytest.raises(ConfigError, match=r"X\(DPOTrainer, S3TTrainerMixin\) trains no system.*`class X\(S3TTrainerM"):
        type("X", (DPOTrainer, S3TTrainerMixin), {})


def test_a_mixin_by_itself_is_refused():
    with pytest.raises(
        ConfigError, match=r"^S3TTrainerMixin trains no system.*`class MyTrainer\(S3TTrainerMixin, Some"
    ):
        S3TTrainerMixin(tiny_bert(2))
    with pytest.raises(ConfigError, match=r"^X\(S3TTrainerMixin\) trains no system.*`class X\(S3TTrainerMixin, Some"):
        type("X", (S3TTrainerMixin,), {})(tiny_bert(2))


def test_a_class_that_is_given_no_rows_is_refused_as_it_is_written():
    class Takes(Trainer):
        def __init__(self, model, config):
            super().__init__(model, TrainingArguments("x"))

    with pytest.raises(ConfigError, match="Takes takes no `args`, `train_dataset`, expected"):
        type("X", (S3TTrainerMixin, Takes), {})


def test_rows_of_a_class_that_cannot_prepare_them_again_do_not_come(tmp_path):
    trainer = trainer_of("orpo", tmp_path, pairs()[:10])
    with pytest.raises(ConfigError, match=r"ORPOTrainer prepares rows as it is made.*Give your class a"):
        trainer.add_examples(Dataset.from_list(pairs()[10:]))
    assert len(trainer.folder.table) == 10 and PLANTED
