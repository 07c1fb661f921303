"""What would come from deep inside a library, in a stage's first steps or hours later, comes at construction."""

import inspect
from functools import partial

import peft
import pytest
import tokenizers
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftConfig
from support.insides import stack_of
from support.refusals import Refusal, assert_trainer_refuses, cases
from support.tiny import (
    batch_of,
    build,
    classification_rows,
    image_rows,
    lm_rows,
    make_trainer,
    s3t_config,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_llava,
    tiny_vit,
    training_arguments,
)
from torch import nn
from transformers.debug_utils import DebugUnderflowOverflow
from trl import SFTConfig, SFTTrainer

from hf_s3t import S3TSFTTrainer, S3TTrainer
from hf_s3t.errors import ConfigError, IsolationError


pytestmark = pytest.mark.usefixtures("one_thread")


bert = partial(tiny_bert, layers=2)


def labelled(*labels, name: str = "labels"):
    """Twelve rows with these labels, again and again."""
    rows = classification_rows(12)
    for number, row in enumerate(rows):
        del row["labels"]
        row[name] = labels[number % len(labels)]
    return rows


def texts():
    return [{"id": row["id"], "text": "some words", "label": 0} for row in classification_rows(12)]


# Rows


@cases(
    Refusal(ConfigError, "a label out of range", "`labels` of `train_dataset` goes from 0 to 3", "expected 0 to 2",
        "Mend the labels, or load the model with all", rows=labelled(0, 1, 3)),
    Refusal(ConfigError, "labels counted from 1", "goes from 1 to 3", "expected 0 to 2", "Mend the labels",
        rows=labelled(1, 2, 3, name="label")),
    Refusal(ConfigError, "a label below 0", "goes from -1 to 2", "or -100 for none", "Mend the labels",
        rows=labelled(-1, 0, 2)),
    Refusal(ConfigError, "labels of words out of range", "goes from 0 to 7", "expected 0 to 2", "Mend the labels",
        rows=labelled([0, 1, -100, 7]), model=build("BertForTokenClassification", "BertConfig", vocab_size=60,
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=3)),
    Refusal(ConfigError, "labels of pictures out of range", "goes from 0 to 4", "expected 0 to 1", "Mend the labels",
        rows=image_rows(12, labels=5), model=tiny_vit(layers=2, labels=2)),
    Refusal(ConfigError, "several labels as whole numbers", "`labels` of `train_dataset` holds whole numbers",
        "with a fraction", r"List\(Value\(\"float32\"\)\)", rows=labelled([0, 1, 1]),
        model=bert(problem_type="multi_label_classification")),
    Refusal(ConfigError, "labels as texts", "`labels` of `train_dataset` holds texts", "expected the numbers",
        "Map them by a table", rows=labelled("good", "bad")),
    Refusal(ConfigError, "tokens of another vocabulary", "`input_ids` of `train_dataset` goes from .* to 60",
        "knows the tokens 0 to 59", "the model's own tokenizer", rows=[{**row, "input_ids": [5, 60]}
        for row in lm_rows(12)], model=tiny_llama(layers=2)),
    Refusal(ConfigError, "rows longer than the positions", "is up to 9 long", "the model has 8 positions",
        "Truncate when tokenising", rows=lm_rows(12, length=9), model=tiny_gpt2(layers=2, n_positions=8)),
    Refusal(ConfigError, "texts that nobody has tokenised", "has the columns id, text, label", "none is an input of",
        "Tokenise it first", rows=texts()),
    Refusal(ConfigError, "rows without labels", "has the columns id, input_ids", "none of labels",
        r"Name the one of the answers so \(`rename_column`\), or give a `data_collator`", model=tiny_llama(layers=2),
        rows=[{"id": row["id"], "input_ids": row["input_ids"]} for row in lm_rows(12)]),
    Refusal(ConfigError, "a model without a loss", "DeiTForImageClassificationWithTeacher takes no labels",
        "returns no loss to train by", "override `compute_loss`", rows=image_rows(12),
        model=build("DeiTForImageClassificationWithTeacher", "DeiTConfig", hidden_size=16, intermediate_size=32,
        num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4)),
)  # fmt: skip
def test_rows_that_the_model_has_no_place_for_are_refused(case, tmp_path):
    assert_trainer_refuses(case, tmp_path / "system", {"model": bert(), **case.given})


@pytest.mark.parametrize(
    ("rows", "model"),
    [
        (labelled(0, 1, 2), bert),
        (labelled(0, 2, -100), bert),
        (labelled(0.5, 3.0), partial(bert, labels=1)),
        (labelled(1, 5), partial(bert, labels=1)),
        (labelled([0.0, 1.0, 1.0]), partial(bert, problem_type="multi_label_classification")),
        (lm_rows(12, length=8), partial(tiny_gpt2, layers=2, n_positions=8)),
        ([{**row, "labels": [-100, *row["input_ids"][1:]]} for row in lm_rows(12)], partial(tiny_llama, layers=2)),
    ],
)
def test_rows_that_it_has_a_place_for_are_not(rows, model, tmp_path):
    model = model()
    batch = batch_of(rows[:4])
    assert torch.isfinite(model(**batch).loss)
    make_trainer(tmp_path, model, rows)


def test_the_positions_of_a_tower_of_pictures_are_none_of_words(tmp_path):
    """It has five of them here."""
    trainer = make_trainer(
        tmp_path, tiny_llava(), lm_rows(12), peft_config=LoraConfig(r=2, target_modules=r".*language_model.*q_proj")
    )
    assert trainer.model.main_input_name == "input_ids"


@pytest.mark.parametrize("label", [3, [14, 15]])
def test_labels_that_are_no_classes_are_not_judged_by_the_number_of_classes(label, tmp_path):
    """The number of a choice, of which there are as many as a row has; characters, of a vocabulary."""
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=60)
    speech = dict(conv_dim=(8,), conv_stride=(4,), conv_kernel=(4,), num_feat_extract_layers=1)
    groups = dict(num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    if isinstance(label, list):
        model = build("Wav2Vec2ForCTC", "Wav2Vec2Config", **small, **speech, **groups)
        rows = [{"id": row["id"], "input_values": [0.5] * 40, "labels": label} for row in lm_rows(12)]
    else:
        model = build("BertForMultipleChoice", "BertConfig", **small)
        rows = [{"id": row["id"], "input_ids": [row["input_ids"]] * 4, "labels": label} for row in lm_rows(12)]
    make_trainer(tmp_path, model, rows)


def test_what_a_collator_makes_of_rows_is_not_judged_beforehand(tmp_path):
    """Rows without an input, texts and all, are nothing to refuse where something of the user's own reads them."""

    def collate(rows):
        ids = torch.tensor([[len(row["text"]), 6, 7] for row in rows])
        return {"input_ids": ids, "labels": torch.tensor([row["label"] for row in rows])}

    args = training_arguments(tmp_path, remove_unused_columns=False, max_steps=1)
    make_trainer(tmp_path, bert(), texts(), args=args, data_collator=collate).train()


class AsClasses:
    """Makes classes of names, of numbers that are counted from 1, and of too many."""

    def __call__(self, rows):
        labels = [{"good": 0, "bad": 1}.get(row.pop("labels"), 2) for row in rows]
        return {**transformers.default_data_collator(rows), "labels": torch.tensor(labels)}


class Ordinal(S3TTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        above = inputs.pop("labels")[:, None] > torch.arange(3)
        return nn.functional.binary_cross_entropy_with_logits(model(**inputs).logits, above.float())


def no_classes(outputs, labels, num_items_in_batch=None):
    return outputs.logits.sum() * labels.float().mean()


@pytest.mark.parametrize(
    ("labels", "given"),
    [
        (["good", "bad"], {"data_collator": AsClasses()}),
        ([1, 2, 3], {"data_collator": AsClasses()}),
        ([0, 1, 2, 3], {"cls": Ordinal}),
        ([-1, 1], {"compute_loss_func": no_classes}),
    ],
    ids=["names", "counted from 1", "an ordinal loss", "a loss of no classes"],
)
def test_labels_that_a_collator_or_loss_of_the_users_reads_are_not_judged_beforehand(labels, given, tmp_path):
    args = training_arguments(tmp_path, max_steps=1)
    make_trainer(tmp_path, bert(), labelled(*labels), args=args, **given).train()


def test_columns_that_a_trainer_class_keeps_for_its_collator_are_not_asked_for_inputs(tmp_path):
    class Keeps(S3TTrainer):
        def _set_signature_columns_if_needed(self):
            self._signature_columns = ["text", "label"]

    make_trainer(tmp_path, bert(), texts(), cls=Keeps, data_collator=transformers.default_data_collator)


@pytest.mark.parametrize("packing", [False, True], ids=["row by row", "packed"])
def test_rows_that_trl_cuts_may_be_longer_than_the_positions(packing, tmp_path):
    args = training_arguments(tmp_path, SFTConfig, bf16=False, max_length=8, packing=packing, max_steps=1)
    rows = [{"id": row["id"], "input_ids": row["input_ids"]} for row in lm_rows(12, length=9)]
    given = dict(cls=S3TSFTTrainer, args=args, processing_class=words_tokenizer())
    make_trainer(tmp_path, tiny_gpt2(2, n_positions=8), rows, **given).train()


def test_gaps_in_a_column_that_trl_does_not_read_are_none(tmp_path):
    chat = [{"role": "user", "content": "w5"}, {"role": "assistant", "content": "w6"}]
    rows = [{"id": row["id"], "messages": chat, "text": None if n % 2 else "w7"} for n, row in enumerate(lm_rows(12))]
    tokenizer = words_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
    args = training_arguments(tmp_path, SFTConfig, bf16=False, max_length=8)
    make_trainer(tmp_path, tiny_llama(2), rows, cls=S3TSFTTrainer, args=args, processing_class=tokenizer)


# Columns


COLUMNS = ["id_column", "group_column", "shard_column", "slice_column"]
PLACES = {"partition": "column", "shard_column": "s", "slice_column": "t"}


@pytest.mark.parametrize("setting", COLUMNS)
@pytest.mark.parametrize("column", ["labels", "input_ids"])
def test_a_column_that_the_model_is_trained_on_is_none_of_ids_groups_or_places(setting, column, tmp_path):
    rows = [{**row, "s": 0, "t": number % 2} for number, row in enumerate(classification_rows(12))]
    settings = {**(PLACES if setting in PLACES else {}), setting: column}
    case = Refusal(
        ConfigError, "", f"`{setting}='{column}'` names a column that the model is trained on",
        "it would be taken away", f"another name.*dataset.add_column.*as `{setting}`",
    )  # fmt: skip
    assert_trainer_refuses(
        case, tmp_path / "system", {"model": bert(), "rows": rows, "config": s3t_config(**settings)}
    )


def test_a_label_under_another_name_is_no_group_either(tmp_path):
    config = s3t_config(group_column="label")
    case = Refusal(ConfigError, "", "`group_column='label'` names", "it would be taken away", "as `group_column`")
    assert_trainer_refuses(
        case, tmp_path / "system", {"model": bert(), "rows": labelled(0, 1, 2, name="label"), "config": config}
    )


# Arguments


BEST = dict(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="epoch")
HELD_OUT = Dataset.from_list(lm_rows(4, seed=9))


@cases(
    Refusal(ConfigError, "evaluations of no set", "`eval_strategy=steps`", "there is no `eval_dataset`", "Give one",
        arguments={"eval_strategy": "steps"}),
    Refusal(ConfigError, "a metric that nobody computes", "`metric_for_best_model='accuracy'` shall choose",
        "has the loss alone", "Give `compute_metrics`", arguments={**BEST, "metric_for_best_model": "accuracy"},
        eval_dataset=HELD_OUT),
    Refusal(ConfigError, "a metric that nobody computes, of a rate that goes by it", "shall choose",
        "has the loss alone", "Give `compute_metrics`", eval_dataset=HELD_OUT,
        arguments={"lr_scheduler_type": "greedy", "eval_strategy": "epoch", "metric_for_best_model": "accuracy"}),
    Refusal(ConfigError, "a metric of no set among several", "`metric_for_best_model='loss'` is a number of no",
        "is a dict of one, other", "metric_for_best_model='eval_one_loss'", arguments=BEST,
        eval_dataset={"one": HELD_OUT, "other": HELD_OUT}),
    Refusal(ConfigError, "an optimizer whose library is not there", "`optim='lomo'` cannot be made", "ImportError",
        "choose another optimizer", arguments={"optim": "lomo"}),
    Refusal(ConfigError, "a schedule without what it needs", "`lr_scheduler_type='cosine_with_min_lr'`",
        "makes no schedule: ValueError", "Mend these settings", arguments={"lr_scheduler_type": "cosine_with_min_lr"}),
    Refusal(ConfigError, "settings that a schedule does not know", "`lr_scheduler_kwargs={'powr': 2}`", "TypeError",
        "Mend these settings", arguments={"lr_scheduler_type": "polynomial", "lr_scheduler_kwargs": {"powr": 2}}),
)  # fmt: skip
def test_arguments_that_would_end_a_stage_later_are_refused(case, tmp_path):
    assert_trainer_refuses(case, tmp_path / "system", {"rows": lm_rows(12), **case.given})


def test_a_stage_without_a_batch_is_refused_before_the_folder_is_made(tmp_path):
    args = training_arguments(tmp_path / "system", per_device_train_batch_size=8, dataloader_drop_last=True)
    with pytest.raises(ConfigError, match=r"leaves shard-0/\d \(2 stages in all\) without a batch.*6 .*a batch 8"):
        make_trainer(tmp_path / "system", rows=lm_rows(12), config=s3t_config(partition="balanced"), args=args)
    assert not list(tmp_path.glob("system/*"))


def test_a_stage_that_deletions_leave_without_a_batch_is_refused_before_any_is_trained(tmp_path, shared_key):
    args = training_arguments(tmp_path, per_device_train_batch_size=6, dataloader_drop_last=True)
    trainer = make_trainer(tmp_path, rows=lm_rows(12), config=s3t_config(partition="balanced"), args=args)
    trainer.s3t_model.unlearn(list(trainer.folder.table.members(0, 0))[:1])
    with pytest.raises(ConfigError, match=r"leaves shard-0/0 \(1 stage in all\) without a batch: it has 5 examples"):
        trainer.train()
    assert not trainer.folder.stages


# PEFT settings


def _made(config_type: type[PeftConfig]) -> PeftConfig | None:
    """A config of this kind, if it is made by little."""
    for settings in ({"target_modules": ["q_proj"]}, {}, {"num_virtual_tokens": 2}, {"token_indices": [1]}):
        known = inspect.signature(config_type).parameters
        if set(settings) <= set(known):
            try:
                return config_type(**settings)
            except (TypeError, ValueError):
                continue
    return None


MADE = {kind: _made(config_type) for kind, config_type in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
OTHERS = {kind: config for kind, config in MADE.items() if config is not None and kind != "LORA"}


@pytest.mark.parametrize("kind", OTHERS, ids=str)
def test_every_other_method_of_peft_is_refused_by_its_name(kind, tmp_path):
    with pytest.raises(IsolationError, match=f"`peft_config` is a {getattr(kind, 'value', kind)}; stages are LoRA"):
        make_trainer(tmp_path / "system", tiny_llama(layers=2), lm_rows(12), peft_config=OTHERS[kind])
    assert not (tmp_path / "system").exists()


def test_nearly_every_method_of_peft_was_tried():
    assert "TRAINABLE_TOKENS" in OTHERS and len(OTHERS) > len(MADE) // 2


@pytest.mark.parametrize("given", [{"r": 2}, "lora", [LoraConfig(r=2)], LoraConfig])
def test_what_is_no_peft_config_is_refused_by_its_kind(given, tmp_path):
    with pytest.raises(IsolationError, match=f"`peft_config` is a {type(given).__name__}; stages are LoRA adapters"):
        make_trainer(tmp_path / "system", tiny_llama(layers=2), lm_rows(12), peft_config=given)


@pytest.mark.slow
def test_settings_that_say_nothing_of_a_stage_do_not_change_it(tmp_path):
    stages = []
    for name, more in (("with", {"inference_mode": True, "task_type": "SEQ_CLS"}), ("without", {})):
        config = LoraConfig(r=2, target_modules=["q_proj"], **more)
        args = training_arguments(tmp_path / name, max_steps=1)
        settings = {"args": args, "peft_config": config, "config": s3t_config(budget=1)}
        trainer = make_trainer(tmp_path / name, tiny_llama(layers=2), lm_rows(12), **settings)
        trainer.train()
        stages.append(
            [stack_of(trainer).digest([stage]) for stage in trainer.folder.plan.stages() if stage.depth == 2]
        )
    assert stages[0] == stages[1]


# Hooks that training leaves


def watched(model: nn.Module) -> int:
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return sum(isinstance(getattr(hook, "__self__", None), DebugUnderflowOverflow) for hook in hooks)


@pytest.mark.slow
def test_looking_for_overflows_leaves_no_hook_on_the_base(tmp_path):
    args = partial(training_arguments, max_steps=1)
    one = {"rows": lm_rows(12), "config": s3t_config(budget=1)}
    plain = make_trainer(tmp_path / "plain", tiny_llama(2), args=args(tmp_path / "plain"), **one)
    plain.train()
    arguments = args(tmp_path / "looked", debug="underflow_overflow")
    looked = make_trainer(tmp_path / "looked", tiny_llama(2), args=arguments, **one)
    seen = []

    class Looks(transformers.TrainerCallback):
        """How many hooks there are in a step."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            """Count."""
            seen.append(watched(model))

    looked.add_callback(Looks())
    looked.train()
    assert watched(looked.model) == 0
    # And one look at a time while a stage trains.
    assert min(seen) > 0 and max(seen) < 2 * min(seen)
    digests = [[stack_of(t).digest([s]) for s in t.folder.plan.stages() if s in stack_of(t)] for t in (plain, looked)]
    assert digests[0] == digests[1] != []


# What TRL prepares


def words_tokenizer(words: int = 60) -> transformers.PreTrainedTokenizerFast:
    known = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, **{f"w{number}": number for number in range(4, words)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")


def written(count: int, first: int = 4, length: int = 12) -> Dataset:
    return Dataset.from_list(
        [
            {"id": f"r{number}", "text": " ".join(f"w{first + (number + place) % 50}" for place in range(length))}
            for number in range(count)
        ]
    )


def sft(output_dir, train_dataset, tokenizer=None, eval_dataset=None, **changes):
    args = training_arguments(output_dir, SFTConfig, **{"bf16": False, "max_length": 9, **changes})
    return make_trainer(
        output_dir,
        tiny_llama(2),
        train_dataset,
        cls=S3TSFTTrainer,
        args=args,
        processing_class=tokenizer or words_tokenizer(),
        eval_dataset=eval_dataset,
    )


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("is_the_training_set", [False, True])
def test_an_evaluation_set_called_train_is_prepared_as_any_other(packing, is_the_training_set, tmp_path):
    train_dataset = written(8)
    evaluated = train_dataset if is_the_training_set else written(6)
    sets = {"train": evaluated, "other": evaluated}
    trainer = sft(tmp_path, train_dataset, packing=packing, eval_dataset=sets)
    plain = SFTTrainer(
        model=tiny_llama(2),
        args=training_arguments(tmp_path / "plain", SFTConfig, bf16=False, max_length=9, packing=packing),
        train_dataset=train_dataset,
        eval_dataset=sets,
        processing_class=words_tokenizer(),
    )
    for name in sets:
        assert trainer.eval_dataset[name].column_names == plain.eval_dataset[name].column_names
        assert trainer.eval_dataset[name].to_list() == plain.eval_dataset[name].to_list()
    # And one that is given later.
    again = trainer._prepare_dataset(evaluated, trainer.processing_class, trainer.args, packing, None, "train")
    assert again.to_list() == plain.eval_dataset["train"].to_list()


def test_tokens_of_another_tokenizer_are_refused_when_they_are_made(tmp_path):
    with pytest.raises(ConfigError, match=r"`input_ids` of `train_dataset` goes from 60 to 75, .* the tokens 0 to 59"):
        sft(tmp_path / "system", written(8, first=60), words_tokenizer(110))
    assert not list(tmp_path.glob("system/*"))


@pytest.mark.parametrize("column", ["text", "input_ids"])
def test_what_trl_reads_is_no_column_of_groups(column, tmp_path):
    rows = written(8) if column == "text" else Dataset.from_list(lm_rows(8))
    with pytest.raises(ConfigError, match=f"`group_column='{column}'` names a column that the model is trained on"):
        make_trainer(
            tmp_path / "system",
            tiny_llama(2),
            rows,
            cls=S3TSFTTrainer,
            args=training_arguments(tmp_path / "system", SFTConfig, bf16=False),
            processing_class=words_tokenizer(),
            config=s3t_config(group_column=column),
        )
