"""
What users of the libraries beneath reported, tried on this package (E1, E3, E6); `docs/public_reports.md` has the
verdicts.
"""

import copy
import gc
import inspect
import json
import uuid
from pathlib import Path

import pytest
import torch
from accelerate.state import GradientState
from datasets import Dataset
from peft import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForSequenceClassification,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from support.insides import rows_of_stages
from support.tiny import (
    batch_of,
    build,
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
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    DataCollatorForSeq2Seq,
    EarlyStoppingCallback,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from hf_s3t import S3TModel
from hf_s3t.errors import BaseModelMismatchError, ConfigError, StaleCacheError
from hf_s3t.model.tensor_files import read_tensors


pytestmark = pytest.mark.usefixtures("one_thread", "shared_key")

ONE_STAGE = s3t_config(num_slices=1, budget=1)
ONE_SEQUENCE = s3t_config(budget=1)


def tokenizer(pad: int = 0, eos: int = 2) -> PreTrainedTokenizerFast:
    """One word per token of the tiny models."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(60)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=f"w{pad}", eos_token=f"w{eos}", bos_token="w1", unk_token="w3"
    )


@pytest.fixture
def saved(tmp_path):
    """A model as it comes from a checkpoint, by the name of which it is found again."""

    def save(model):
        folder = tmp_path / f"base-{uuid.uuid4().hex[:8]}"
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder)

    return save


def bytes_of(trainer) -> dict:
    """The adapter files of a system."""
    return {key: trainer.folder.read_adapter(key) for key in trainer.folder.valid_stages}


class KilledAt(TrainerCallback):
    """Dies when the checkpoint of a step is written."""

    def __init__(self, step: int):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


# Loading what was trained


# https://github.com/huggingface/transformers/issues/34055, https://github.com/huggingface/peft/issues/876
@pytest.mark.parametrize("given", ["name", "module"])
def test_a_classifier_is_loaded_with_the_padding_token_that_training_took_from_the_tokenizer(given, saved, tmp_path):
    base = saved(tiny_llama(2, labels=3, pad_token_id=None))
    trainer = make_trainer(tmp_path / "s", base, classification_rows(16), processing_class=tokenizer(pad=4))
    trainer.train()
    padded = {"input_ids": torch.tensor([[7, 8, 9, 4, 4], [7, 8, 9, 10, 11]])}
    expected = trainer.s3t_model(**padded).logits
    module = AutoModelForSequenceClassification.from_pretrained(base.config._name_or_path, num_labels=3)
    assert module.config.pad_token_id is None
    loaded = S3TModel.from_pretrained(tmp_path / "s", **({"base_model": module} if given == "module" else {}))
    assert torch.equal(loaded(**padded).logits, expected)
    # One row alone would be answered without, by a look at its padding.
    one = {"input_ids": padded["input_ids"][:1]}
    assert torch.equal(loaded(**one).logits, trainer.s3t_model(**one).logits)


# https://github.com/huggingface/open-r1/pull/663, https://github.com/hiyouga/LlamaFactory/issues/7943
def test_a_loaded_model_ends_its_texts_where_the_trained_one_does(saved, tmp_path):
    base = saved(tiny_llama(2))
    base.generation_config.max_new_tokens = 9
    trainer = make_trainer(tmp_path / "s", base, config=ONE_SEQUENCE, processing_class=tokenizer(eos=30))
    trainer.train()
    live, prompt = trainer.s3t_model, torch.tensor([[7, 8, 9]])
    loaded = S3TModel.from_pretrained(tmp_path / "s")
    assert loaded.generation_config.eos_token_id == live.generation_config.eos_token_id == [30, 2]
    assert loaded.generation_config.max_new_tokens == 9
    assert torch.equal(loaded.generate(prompt), live.generate(prompt))


def test_a_base_is_recognised_before_the_tokens_of_a_config_inside_its_own_are_aligned(tmp_path):
    text = LlamaConfig(
        vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
    )

    def make(**changes):
        settings = {**text.to_dict(), **changes}
        return build("LlavaForConditionalGeneration", "LlavaConfig", text_config=settings, vision_config=vision)

    settings = dict(
        rows=lm_rows(12),
        peft_config=LoraConfig(r=2, target_modules=["q_proj"], exclude_modules=".*vision.*"),
        config=ONE_STAGE,
        processing_class=tokenizer(pad=4),
    )
    trainer = make_trainer(tmp_path / "s", make(), **settings)
    plant_stages(trainer)
    assert trainer.model.config.text_config.pad_token_id == 4
    make_trainer(tmp_path / "s", make(), **settings)
    S3TModel.from_pretrained(tmp_path / "s", base_model=make())
    # What else the config inside says decides what the base computes.
    with pytest.raises(BaseModelMismatchError, match="text_config"):
        S3TModel.from_pretrained(tmp_path / "s", base_model=make(rms_norm_eps=0.1))


# Adapters for other tools


# https://github.com/huggingface/peft/issues/1744
@pytest.mark.parametrize("make, auto", [
    (tiny_llama, AutoPeftModelForCausalLM), (tiny_bert, AutoPeftModelForSequenceClassification),
])  # fmt: skip
def test_peft_finds_the_base_of_an_export_by_itself(make, auto, saved, tmp_path):
    trainer = make_trainer(tmp_path / "s", saved(make()), config=ONE_SEQUENCE)
    plant_stages(trainer)
    trainer.s3t_model.export_adapter(0, tmp_path / "export")
    # A base on this machine is no name for others.
    config = json.loads((tmp_path / "export" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == trainer.folder.base_id
    config["base_model_name_or_path"] = trainer.model.config._name_or_path
    (tmp_path / "export" / "adapter_config.json").write_text(json.dumps(config))
    labels = {} if auto is AutoPeftModelForCausalLM else {"num_labels": 3}
    plain = auto.from_pretrained(tmp_path / "export", **labels).eval()
    inputs = batch_of(trainer.train_dataset.to_list()[:4])
    assert torch.equal(plain(**inputs).logits, trainer.s3t_model(**inputs).logits)


# https://github.com/huggingface/peft/issues/1567
def test_adapters_name_the_revision_of_their_base(saved, tmp_path):
    base = saved(tiny_llama(2))
    base.config._commit_hash = "a" * 40
    trainer = make_trainer(tmp_path / "s", base, config=ONE_STAGE)
    trainer.train()
    trainer.s3t_model.export_adapter(0, tmp_path / "export")
    for folder in (tmp_path / "export", *(tmp_path / "s").glob("stages/*/*")):
        config = json.loads((folder / "adapter_config.json").read_text())
        assert (config["base_model_name_or_path"], config["revision"]) == (trainer.folder.base_id, "a" * 40)


# https://github.com/huggingface/peft/issues/472, https://github.com/huggingface/peft/issues/2840
def test_settings_read_from_an_adapter_are_those_it_was_trained_with(tmp_path):
    settings = lora(tiny_llama(2), rank_pattern={"q_proj": 3})
    trainer = make_trainer(tmp_path / "s", tiny_llama(2), peft_config=settings, config=ONE_STAGE)
    trainer.train()
    settings.base_model_name_or_path, settings.inference_mode = "me/base", True
    settings.save_pretrained(tmp_path / "settings")
    read = LoraConfig.from_pretrained(tmp_path / "settings")
    assert read.inference_mode
    # Frozen on load, as PEFT means it, they train here: to the bit as before.
    make_trainer(tmp_path / "s", tiny_llama(2), peft_config=read, config=ONE_STAGE)
    again = make_trainer(tmp_path / "again", tiny_llama(2), peft_config=read, config=ONE_STAGE)
    again.train()
    assert bytes_of(again) == bytes_of(trainer)


# What decides a stage


# https://github.com/huggingface/transformers/issues/10290, https://github.com/verl-project/verl/pull/6232
def test_a_stage_that_died_after_its_last_step_takes_no_step_more(tmp_path):
    """The last of 3 steps is inside an epoch of 2."""

    def trainer(name, *callbacks):
        settings = dict(max_steps=3, per_device_train_batch_size=6, save_strategy="steps", save_steps=3)
        args = training_arguments(tmp_path / name, **settings)
        return make_trainer(
            tmp_path / name, tiny_llama(2), rows=lm_rows(12), args=args, config=ONE_STAGE, callbacks=list(callbacks)
        )

    whole = trainer("whole")
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer("died", KilledAt(3)).train()
    resumed = trainer("died")
    assert resumed.train().global_step == 3
    assert bytes_of(resumed) == bytes_of(whole)


# https://github.com/huggingface/transformers/issues/10290
def test_a_stage_that_died_after_an_evaluation_had_ended_it_is_not_trained_on(tmp_path):
    """Later steps would be better ones."""
    rows = Dataset.from_list(lm_rows(4, seed=9)).remove_columns("id")

    def trainer(name, *callbacks):
        settings = dict(
            num_train_epochs=2, learning_rate=0.3, save_strategy="steps", save_steps=1, eval_strategy="steps",
            eval_steps=1, load_best_model_at_end=True,
        )  # fmt: skip
        return make_trainer(
            tmp_path / name,
            rows=lm_rows(12),
            args=training_arguments(tmp_path / name, **settings),
            config=ONE_STAGE,
            eval_dataset=rows,
            callbacks=[EarlyStoppingCallback(1), *callbacks],
        )

    whole = trainer("whole")
    whole.train()
    ended = whole.state.global_step
    assert ended < 6
    with pytest.raises(KeyboardInterrupt):
        trainer("died", KilledAt(ended)).train()
    resumed = trainer("died")
    assert resumed.train().global_step == ended
    assert bytes_of(resumed) == bytes_of(whole)


# https://github.com/huggingface/transformers/issues/38939
def test_a_stage_resumed_before_a_short_window_of_accumulation_is_the_same(tmp_path):
    """Five batches an epoch in windows of three: the last window of each is short."""

    def trainer(name, *callbacks):
        settings = dict(
            num_train_epochs=2, per_device_train_batch_size=2, gradient_accumulation_steps=3, save_strategy="steps",
            save_steps=3,
        )  # fmt: skip
        args = training_arguments(tmp_path / name, **settings)
        model = tiny_llama(2, attention_dropout=0.1)
        return make_trainer(
            tmp_path / name, model, lm_rows(10), args=args, config=ONE_STAGE, callbacks=list(callbacks)
        )

    whole = trainer("whole")
    whole.train()
    assert whole.state.max_steps == 4
    with pytest.raises(KeyboardInterrupt):
        trainer("died", KilledAt(3)).train()
    resumed = trainer("died")
    resumed.train()
    assert bytes_of(resumed) == bytes_of(whole)


# https://github.com/huggingface/transformers/pull/35438, https://github.com/huggingface/transformers/issues/34242
def test_accumulated_batches_of_unequal_length_weigh_as_in_plain_peft(tmp_path):
    rows = [
        {**row, **{name: row[name][: 2 + i % 6] for name in ("input_ids", "labels")}}
        for i, row in enumerate(lm_rows(11))
    ]
    collator = DataCollatorForSeq2Seq(tokenizer(), label_pad_token_id=-100)
    settings = dict(gradient_accumulation_steps=3, per_device_train_batch_size=2)
    args = training_arguments(tmp_path / "s", **settings)
    trainer = make_trainer(
        tmp_path / "s", tiny_llama(2), rows=rows, args=args, config=ONE_STAGE, data_collator=collator
    )
    trainer.train()
    (key,) = trainer.folder.valid_stages
    seed = trainer.folder.stage_record(key)["seed"]
    base = tiny_llama(2)
    torch.manual_seed(seed)
    plain = get_peft_model(base, lora(base))
    Trainer(
        plain,
        training_arguments(tmp_path / "plain", seed=seed, **settings),
        train_dataset=rows_of_stages(trainer).select(key, trainer.folder.table),
        data_collator=collator,
    ).train()
    expected = {n.replace(".default", ""): t for n, t in plain.state_dict().items() if "lora_" in n}
    ours = read_tensors(trainer.folder.read_adapter(key), str(key))
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)


# https://github.com/huggingface/accelerate/pull/3391
def test_no_loader_with_a_stages_rows_outlives_its_stage(tmp_path):
    # The last step is inside an epoch, so that the loader is left in the middle.
    args = training_arguments(tmp_path / "s", max_steps=4)
    trainer = make_trainer(tmp_path / "s", tiny_llama(2), args=args, config=ONE_STAGE)
    trainer.train()
    gc.collect()
    assert [loader for loader in GradientState().dataloader_references if loader is not None] == []


# The base


# https://github.com/huggingface/peft/issues/2957, https://github.com/huggingface/peft/issues/114
@pytest.mark.parametrize("around", ["compiled", "data parallel", "compiled in place"])
def test_a_wrapped_base_is_refused_by_what_it_is(around, tmp_path):
    model = tiny_llama(2)
    settings = dict(rows=lm_rows(8), peft_config=lora(model), config=ONE_STAGE)
    if around == "compiled in place":
        model.compile(backend="eager")
        why = "compiled in place"
    else:
        wrap = torch.nn.DataParallel if around == "data parallel" else lambda m: torch.compile(m, backend="eager")
        model, why = wrap(model), "around a LlamaForCausalLM, expected the latter by itself"
    with pytest.raises(ConfigError, match=why):
        make_trainer(tmp_path / "s", model, **settings)
    assert not (tmp_path / "s").exists()


# https://github.com/huggingface/accelerate/issues/1711, https://github.com/tloen/alpaca-lora/issues/368
@pytest.mark.parametrize("use", ["train", "serve"])
def test_a_base_whose_tensors_are_elsewhere_is_refused(use, saved, tmp_path):
    trainer = make_trainer(tmp_path / "s", saved(tiny_llama(2)), config=ONE_STAGE)
    plant_stages(trainer)
    parts = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.0"]
    base = AutoModelForCausalLM.from_pretrained(
        trainer.model.config._name_or_path,
        device_map={**dict.fromkeys(parts, "cpu"), "model.layers.1": "disk"},
        offload_folder=str(tmp_path / "elsewhere"),
    )
    with pytest.raises(ConfigError, match=r"model\.layers\.1\..* not in memory"):
        if use == "train":
            make_trainer(tmp_path / "new", base, config=ONE_STAGE)
        else:
            S3TModel.from_pretrained(tmp_path / "s", base_model=base)


# https://github.com/huggingface/peft/issues/1598, https://github.com/vllm-project/vllm/issues/10590
def test_a_4_bit_base_may_be_stored_in_floating_point_numbers(tmp_path):
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16, bnb_4bit_compute_dtype=torch.bfloat16
    )
    tiny_llama(2, hidden_size=64, intermediate_size=64).save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=settings, dtype=torch.bfloat16)
    trainer = make_trainer(tmp_path / "s", base, config=ONE_SEQUENCE)
    trainer.train()
    inputs = batch_of(lm_rows(4))
    assert torch.equal(S3TModel.from_pretrained(tmp_path / "s")(**inputs).logits, trainer.s3t_model(**inputs).logits)


# Serving


# https://github.com/huggingface/peft/issues/2421, https://github.com/huggingface/peft/issues/1090
@pytest.mark.parametrize("cast", ["half", "bfloat16", "double", "to"])
def test_a_served_model_is_not_cast(cast, tmp_path):
    trainer = make_trainer(tmp_path / "s", tiny_llama(2), config=ONE_SEQUENCE)
    plant_stages(trainer, limit=1)
    model, inputs = trainer.s3t_model, batch_of(lm_rows(4))
    before = model(**inputs).logits
    with pytest.raises(ConfigError, match=r"not cast, here from float32 to .*from_pretrained\(\.\.\., dtype"):
        getattr(model, cast)(*([torch.bfloat16] if cast == "to" else []))
    # What changes no precision is as ever.
    assert model.to("cpu") is model and model.float() is model and model.to(torch.float32) is model
    assert torch.equal(model(**inputs).logits, before)


# https://github.com/huggingface/transformers/pull/10268, https://github.com/huggingface/transformers/pull/44356
@pytest.mark.parametrize("argument", ["bf16_full_eval", "fp16_full_eval"])
def test_an_evaluation_that_would_cast_a_served_model_is_refused(argument, tmp_path):
    trainer = make_trainer(tmp_path / "s", tiny_llama(2), config=ONE_SEQUENCE)
    plant_stages(trainer)
    model, inputs = trainer.s3t_model, batch_of(lm_rows(4))
    before = model(**inputs).logits
    rows = Dataset.from_list(lm_rows(4)).remove_columns("id")
    evaluate = Trainer(model, training_arguments(tmp_path / "e", **{argument: True}), eval_dataset=rows).evaluate
    with pytest.raises(ConfigError, match=argument):
        evaluate()
    assert torch.equal(model(**inputs).logits, before)
    # In the mixed precision that casts nothing it is evaluated.
    Trainer(model, training_arguments(tmp_path / "e", bf16=True), eval_dataset=rows).evaluate()
    assert torch.equal(model(**inputs).logits, before)


def test_stages_are_not_grown_on_a_base_that_was_cast_meanwhile(tmp_path):
    trainer = make_trainer(tmp_path / "s", tiny_llama(2), config=ONE_SEQUENCE)
    plant_stages(trainer, limit=1)
    trainer.model.half()
    with pytest.raises(BaseModelMismatchError, match="dtype float32, and this one has float16"):
        trainer.train()
    assert len(trainer.folder.valid_stages) == 1


# https://github.com/unslothai/unsloth/issues/2434, https://github.com/snowflakedb/ArcticTraining/pull/265
def test_stages_may_be_loaded_by_a_call_in_inference_mode(tmp_path):
    settings = dict(config=s3t_config(budget=1, partition="balanced"), rows=lm_rows(12))
    trainer = make_trainer(tmp_path / "s", **settings)
    plant_stages(trainer, limit=1)
    plain = make_trainer(tmp_path / "plain", **settings)
    plant_stages(plain, limit=1)
    with torch.inference_mode():
        trainer.s3t_model(**batch_of(lm_rows(4)))
    trainer.train()
    plain.train()
    assert bytes_of(trainer) == bytes_of(plain)
    # Gradients to the inputs go through it, too.
    words = trainer.s3t_model.get_input_embeddings()(torch.tensor([[7, 8, 9]])).detach().requires_grad_()
    trainer.s3t_model(inputs_embeds=words).logits.sum().backward()
    assert words.grad.abs().sum() > 0


# https://github.com/vllm-project/vllm/issues/30931, https://github.com/vllm-project/vllm/issues/42125
def test_a_cache_of_a_stage_is_no_cache_of_one_grown_again_under_its_name(tmp_path):
    rows = lm_rows(12)
    trainer = make_trainer(tmp_path / "s", tiny_llama(2), rows=rows, config=ONE_STAGE)
    plant_stages(trainer)
    model, prompt = trainer.s3t_model, torch.tensor([[7, 8, 9]])
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    (key,) = trainer.folder.valid_stages
    model.unlearn([rows[0]["id"]])
    plant_stages(trainer, seed=1)
    model.refresh()
    assert trainer.folder.valid_stages == {key}
    longer = torch.cat([prompt, torch.tensor([[10]])], 1)
    for kept in (cache, copy.deepcopy(cache)):
        with pytest.raises(StaleCacheError):
            model.generate(longer, past_key_values=kept, max_new_tokens=2)


# https://github.com/huggingface/huggingface-llama-recipes/issues/33
def test_the_cache_of_a_prompt_may_be_copied_and_used_again(tmp_path):
    trainer = make_trainer(tmp_path / "s", tiny_llama(2), rows=lm_rows(40), config=s3t_config(num_shards=2, budget=1))
    plant_stages(trainer)
    model, prompt = trainer.s3t_model, torch.tensor([[7, 8, 9]])
    cache = model(input_ids=prompt, use_cache=True).past_key_values
    for end in (10, 11):
        text = torch.cat([prompt, torch.tensor([[end, 12]])], 1)
        expected = model.generate(text, max_new_tokens=4)
        assert torch.equal(model.generate(text, max_new_tokens=4, past_key_values=copy.deepcopy(cache)), expected)


# https://github.com/huggingface/transformers/issues/27161
def test_smoothed_labels_are_shifted_in_evaluation_as_in_plain_peft(tmp_path):
    rows = Dataset.from_list(lm_rows(8, seed=5)).remove_columns("id")
    args = training_arguments(tmp_path / "s", label_smoothing_factor=0.3)
    trainer = make_trainer(tmp_path / "s", tiny_llama(2), args=args, config=ONE_SEQUENCE, eval_dataset=rows)
    plant_stages(trainer)
    trainer.s3t_model.export_adapter(0, tmp_path / "export")
    plain = PeftModel.from_pretrained(tiny_llama(2), tmp_path / "export")
    other = training_arguments(tmp_path / "plain", label_smoothing_factor=0.3)
    expected = Trainer(plain, other, eval_dataset=rows).evaluate()["eval_loss"]
    assert trainer.evaluate()["eval_loss"] == expected
    assert Trainer(trainer.s3t_model, other, eval_dataset=rows).evaluate()["eval_loss"] == expected


# The list


def test_every_report_is_in_the_list_with_its_test():
    listed = (Path(__file__).parents[2] / "docs" / "public_reports.md").read_text()
    here = [line[2:].split(", ") for line in Path(__file__).read_text().splitlines() if line.startswith("# https://")]
    assert [link for links in here for link in links if link not in listed] == []
    named = [name for name, value in globals().items() if name.startswith("test_") and inspect.isfunction(value)]
    assert [name for name in named[:-1] if name not in listed] == []
