"""A base that is loaded by its name is the one that was trained on, to the bit, or it is said why it cannot be."""

import itertools
import logging
import re
import types
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from support.tiny import (
    IMAGE_SIZE,
    LABELS,
    PAD,
    VOCABULARY,
    build,
    classification_rows,
    image_rows,
    lm_rows,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_qwen2,
)
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from hf_s3t import S3TModel
from hf_s3t.errors import BaseModelMismatchError, IsolationError
from hf_s3t.model.base_loading import load_base
from hf_s3t.model.base_record import describe_base
from hf_s3t.model.checkpoint import check_checkpoint


pytestmark = pytest.mark.usefixtures("one_thread")

HALF = torch.bfloat16
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
TEXT = {**SIZES, "vocab_size": VOCABULARY, "max_position_embeddings": 64, "pad_token_id": PAD}
DECODER = {**TEXT, "model_type": "llama", "num_key_value_heads": 1}
PICTURES = {**SIZES, "num_hidden_layers": 1, "image_size": IMAGE_SIZE, "patch_size": 4}
IMAGE_TOKEN = 50


@pytest.fixture(autouse=True)
def warned(caplog, monkeypatch):
    """What is said, each time: `warning_once` says it once in a process."""
    monkeypatch.setattr(transformers.utils.logging.get_logger(), "propagate", True)
    transformers.utils.logging.warning_once.cache_clear()
    caplog.set_level(logging.WARNING)
    return caplog


# Kinds of bases


@dataclass(frozen=True)
class Kind:
    """A tiny model of a Transformers class, and what it reads."""

    model: str
    config: str
    settings: dict[str, Any]
    targets: Any
    rows: Callable[[], list[dict]] = lm_rows
    pictures: bool = False
    loading: dict[str, Any] = field(default_factory=dict)

    def saved(self, folder) -> type[PreTrainedModel]:
        model = build(self.model, self.config, **self.settings)
        model.save_pretrained(folder)
        return type(model)

    def inputs(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        words = torch.tensor([[IMAGE_TOKEN] * 4 + [7, 8, 9], [IMAGE_TOKEN] * 4 + [9, 7, 6]])
        picture = torch.linspace(-1, 1, 2 * 3 * IMAGE_SIZE**2).reshape(2, 3, IMAGE_SIZE, IMAGE_SIZE).to(dtype)
        if self.rows is image_rows:
            return {"pixel_values": picture}
        # Two patches by two are the four words of a picture.
        return {"input_ids": words, **({"pixel_values": picture} if self.pictures else {})}


OF_THE_TEXT = r".*language_model.*\.(q_proj|v_proj)"
BLIP_2 = {
    "vision_config": PICTURES,
    "qformer_config": {**TEXT, "num_hidden_layers": 1, "encoder_hidden_size": 16, "cross_attention_frequency": 1},
    "text_config": {**DECODER, "model_type": "opt", "ffn_dim": 32, "word_embed_proj_dim": 16},
    "num_query_tokens": 4,
    "image_token_index": IMAGE_TOKEN,
    "image_token_id": IMAGE_TOKEN,
}
LLAVA = {
    "vision_config": {**PICTURES, "model_type": "clip_vision_model", "projection_dim": 16},
    "text_config": DECODER,
    "image_token_id": IMAGE_TOKEN,
    "image_token_index": IMAGE_TOKEN,
    "image_seq_length": 4,
}
MOE = {**TEXT, "num_key_value_heads": 1, "num_local_experts": 2, "num_experts_per_tok": 1}
KINDS = {
    "a config of a part": Kind(
        "MptForCausalLM",
        "MptConfig",
        dict(vocab_size=VOCABULARY, d_model=16, n_layers=2, n_heads=2, max_seq_len=64),
        ["Wqkv"],
    ),
    "a part that is not in use": Kind(
        "SiglipForImageClassification",
        "SiglipConfig",
        {"vision_config": {**PICTURES, "num_hidden_layers": 2}, "text_config": TEXT, "num_labels": LABELS},
        ["q_proj"],
        image_rows,
    ),
    "parts whose keys are renamed": Kind(
        "LlavaForConditionalGeneration", "LlavaConfig", LLAVA, OF_THE_TEXT, pictures=True
    ),
    "parts that compute each its own way": Kind(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        LLAVA,
        OF_THE_TEXT,
        pictures=True,
        loading={"attn_implementation": {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"}},
    ),
    "a parameter outside all modules, some kept in full": Kind(
        "Blip2ForConditionalGeneration", "Blip2Config", BLIP_2, OF_THE_TEXT, pictures=True
    ),
    "embeddings that are tied and renamed": Kind(
        "T5ForTokenClassification",
        "T5Config",
        dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, num_labels=LABELS),
        ["q", "v"],
        classification_rows,
    ),
    "experts, merged and in a way that was asked for": Kind(
        "MixtralForCausalLM", "MixtralConfig", MOE, ["q_proj"], loading={"experts_implementation": "eager"}
    ),
}
LOADINGS = {
    "in full": lambda cls, folder, settings: cls.from_pretrained(folder, **settings),
    "in half": lambda cls, folder, settings: cls.from_pretrained(folder, dtype=HALF, **settings),
    # Which casts more than a load in half precision does: what the class keeps in full, and computed buffers.
    "cast": lambda cls, folder, settings: cls.from_pretrained(folder, **settings).to(HALF),
}


def system_on(folder, model: nn.Module, rows: list[dict] | None = None, targets: Any = "all-linear"):
    """A system on a base, with stages that are not trained but act."""
    from peft import LoraConfig

    lora = LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    trainer = make_trainer(folder, model, rows, peft_config=lora, config=s3t_config(budget=1))
    plant_stages(trainer)
    return trainer.folder.path


@torch.no_grad()
def answer(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


def ways_of(config) -> list[tuple]:
    """By what a base and each of its parts computes."""
    parts = [getattr(config, name) for name in config.sub_configs]
    return [(c._attn_implementation, c._experts_implementation) for c in (config, *parts)]


# What is common, and what each kind is about; the rest of the matrix is slow by its number.
QUICK = {
    *((name, "in full") for name in KINDS),
    ("parts whose keys are renamed", "cast"),
    ("a parameter outside all modules, some kept in full", "in half"),
    ("a parameter outside all modules, some kept in full", "cast"),
}


@pytest.mark.parametrize(
    "name, loading",
    [
        pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.slow)
        for cell in itertools.product(KINDS, LOADINGS)
    ],
)
def test_it_answers_as_the_module_that_was_trained_on(name, loading, tmp_path, warned):
    kind = KINDS[name]
    cls = kind.saved(tmp_path / "base")

    def base():
        return LOADINGS[loading](cls, tmp_path / "base", kind.loading)

    path = system_on(tmp_path / "system", base(), kind.rows(), kind.targets)
    given = S3TModel.from_pretrained(path, base_model=base())
    inputs = kind.inputs(given.dtype)
    expected = answer(given, inputs)
    for name_given in (None, str(tmp_path / "base")):
        found = S3TModel.from_pretrained(path, base_model=name_given)
        assert torch.equal(answer(found, inputs), expected)
        assert found.check() == []
        assert describe_base(found.base_model, "", ()) == describe_base(given.base_model, "", ())
    assert {t.dtype for t in found.base_model.buffers()} == {t.dtype for t in given.base_model.buffers()}
    assert "rounded" not in warned.text


# What was set when it was loaded


def llava() -> PreTrainedModel:
    return build("LlavaForConditionalGeneration", "LlavaConfig", **LLAVA)


CHANGES = {
    "a setting": (partial(tiny_llama, 2), {"rms_norm_eps": 0.3}),
    "a setting of a part": (llava, {"text_config": {"rms_norm_eps": 0.3}}),
    "fewer layers": (partial(tiny_llama, 3), {"num_hidden_layers": 2}),
    "names of labels": (
        partial(tiny_bert, 2),
        {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}},
    ),
    "another number of labels": (partial(tiny_bert, 2), {"num_labels": 5, "ignore_mismatched_sizes": True}),
    "what labels are": (partial(tiny_bert, 2), {"problem_type": "regression"}),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_was_set_at_loading_is_set_again(what, tmp_path):
    make, settings = CHANGES[what]
    model = make()
    model.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base", **settings)
    expected = base.config.to_dict()
    path = system_on(tmp_path / "system", base, lm_rows() if make is llava else None)
    found = S3TModel.from_pretrained(path)
    assert found.config.to_dict() == expected
    assert all(
        isinstance(getattr(found.config, part), type(getattr(base.config, part))) for part in base.config.sub_configs
    )


def test_embeddings_that_were_tied_at_loading_are_tied_again(tmp_path):
    model = tiny_qwen2(2)
    model.save_pretrained(tmp_path / "base")
    model.config.tie_word_embeddings = False
    model.config.save_pretrained(tmp_path / "base")
    base = type(model).from_pretrained(tmp_path / "base", tie_word_embeddings=True)
    found = S3TModel.from_pretrained(system_on(tmp_path / "system", base))
    assert found.base_model.lm_head.weight is found.base_model.model.embed_tokens.weight


# What was cast


def uneven(folder) -> type[PreTrainedModel]:
    """A checkpoint none of whose tensors can be rounded for nothing."""
    model = tiny_bert(2)
    for parameter in model.parameters():
        parameter.data += torch.linspace(0, 0.1, parameter.numel()).view_as(parameter)
    model.save_pretrained(folder)
    return type(model)


def norms_in_full(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm):
            module.float()
    return model


def test_norms_that_were_cast_after_loading_are_cast_again(tmp_path, warned):
    cls = uneven(tmp_path / "base")

    def base():
        return norms_in_full(cls.from_pretrained(tmp_path / "base", dtype=HALF))

    path = system_on(tmp_path / "system", base())
    found, given = (
        S3TModel.from_pretrained(path).base_model,
        S3TModel.from_pretrained(path, base_model=base()).base_model,
    )
    for name, tensor in given.state_dict().items():
        assert found.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(found.state_dict()[name], tensor)
    assert "rounded" not in warned.text


@pytest.mark.parametrize("where", ["in half beside norms in full", "in full"])
def test_it_is_said_where_tensors_were_rounded_in_a_way_that_is_not_on_record(where, tmp_path, warned):
    cls = uneven(tmp_path / "base")
    if where == "in full":
        base = cls.from_pretrained(tmp_path / "base", dtype=HALF).float()
    else:
        base = cls.from_pretrained(tmp_path / "base")
        for name, parameter in base.named_parameters():
            parameter.data = parameter.data if "LayerNorm" in name else parameter.data.to(HALF)
    path = system_on(tmp_path / "system", base)
    assert "rounded" not in warned.text
    S3TModel.from_pretrained(path)
    assert "answers are rounded otherwise" in warned.text


def test_no_stage_is_grown_on_computed_buffers_in_another_precision(tmp_path):
    model = tiny_llama(2)
    model.save_pretrained(tmp_path / "base")
    load = type(model).from_pretrained
    path = system_on(tmp_path / "system", load(tmp_path / "base").to(HALF))
    with pytest.raises(BaseModelMismatchError, match=r"rotary_emb\.inv_freq in bfloat16"):
        system_on(path, load(tmp_path / "base", dtype=HALF))


# What its checkpoint lacks


def refused(model: nn.Module, head: tuple[str, ...] = ()) -> str:
    with pytest.raises(IsolationError) as caught:
        check_checkpoint(model, head)
    return str(caught.value)


def test_a_language_model_without_its_head_is_refused(tmp_path):
    tiny_llama(2).model.save_pretrained(tmp_path / "base")
    said = refused(LlamaForCausalLM.from_pretrained(tmp_path / "base"))
    assert "has no parameters for lm_head.weight" in said
    assert "take the checkpoint of a LlamaForCausalLM" in said


def test_a_checkpoint_that_is_quantised_lacks_nothing(tmp_path):
    tiny_llama(2, hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")
    settings = transformers.BitsAndBytesConfig(load_in_4bit=True)
    load = LlamaForCausalLM.from_pretrained
    load(tmp_path / "base", quantization_config=settings).save_pretrained(tmp_path / "quantised")
    check_checkpoint(load(tmp_path / "quantised"), ())


def test_layers_that_the_checkpoint_does_not_have_are_refused(tmp_path):
    tiny_llama(2).save_pretrained(tmp_path / "base")
    said = refused(LlamaForCausalLM.from_pretrained(tmp_path / "base", num_hidden_layers=3))
    assert "has no parameters for model.layers.2." in said
    assert "and others, 9 in all" in said


def test_embeddings_of_positions_that_did_not_fit_are_refused(tmp_path):
    tiny_bert(2).save_pretrained(tmp_path / "base")
    load = transformers.BertForSequenceClassification.from_pretrained
    longer = load(tmp_path / "base", max_position_embeddings=256, num_labels=7, ignore_mismatched_sizes=True)
    said = refused(longer, ("classifier",))
    assert "has no parameters for bert.embeddings.position_embeddings.weight in that size" in said


@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2, tiny_bert, llava])
def test_doing_as_the_message_says_is_enough(make, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "once")
    cls = type(model)
    again = cls.from_pretrained(tmp_path / "once")
    again.config.architectures = None
    check_checkpoint(again, ())
    again.save_pretrained(tmp_path / "twice")
    check_checkpoint(cls.from_pretrained(tmp_path / "twice"), ())


def test_what_a_class_does_not_save_is_not_told_to_be_saved(tmp_path):
    class Forgetful(LlamaForCausalLM):
        _keys_to_ignore_on_save = ["model.norm.weight"]

    Forgetful(tiny_llama(2).config).save_pretrained(tmp_path / "base")
    assert "`_keys_to_ignore_on_save`): set that to None" in refused(Forgetful.from_pretrained(tmp_path / "base"))


def test_looking_draws_nothing_shows_nothing_and_changes_nothing(tmp_path, warned, capfd):
    tiny_bert(2).bert.save_pretrained(tmp_path / "base")
    model = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base")
    before, config, _ = torch.get_rng_state(), model.config.to_dict(), (warned.clear(), capfd.readouterr())
    check_checkpoint(model, ("classifier",))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.config.to_dict() == config
    assert not warned.text
    assert "".join(capfd.readouterr()) == ""


# What is not the base


@pytest.fixture(scope="module")
def on_a_folder(tmp_path_factory):
    """A system on a Llama that lies in a folder, which is there twice."""
    folder = tmp_path_factory.mktemp("on a folder")
    for name in ("base", "other"):
        tiny_llama(2).save_pretrained(folder / name)
    return system_on(folder / "system", LlamaForCausalLM.from_pretrained(folder / "base"))


@pytest.mark.parametrize("changes", [{"hidden_size": 32}, {"intermediate_size": 48}, {"vocab_size": 90}])
def test_a_checkpoint_of_another_size_is_another_base(changes, on_a_folder, tmp_path):
    tiny_llama(2, **changes).save_pretrained(tmp_path / "larger")
    said = "has them in another size, and .*larger' has .* Expected .*base'.*; give it as `base_model`"
    with pytest.raises(BaseModelMismatchError, match=said):
        S3TModel.from_pretrained(on_a_folder, base_model=str(tmp_path / "larger"))


def test_who_gave_what_was_asked_for_is_not_asked_for_it_again(on_a_folder):
    tiny_llama(2, seed=1).save_pretrained(on_a_folder.parent / "base")
    try:
        with pytest.raises(
            BaseModelMismatchError, match="has changed since, or the base was changed in memory"
        ) as caught:
            S3TModel.from_pretrained(on_a_folder)
        assert "give it as" not in str(caught.value)
    finally:
        tiny_llama(2).save_pretrained(on_a_folder.parent / "base")


@pytest.mark.parametrize(
    ("name", "left"), [("model.safetensors", 0), ("model.safetensors", 999), ("pytorch_model.bin", 0)]
)
def test_a_file_that_ends_too_early_is_named_in_a_sentence(name, left, on_a_folder, tmp_path):
    tiny_llama(2).save_pretrained(tmp_path / "base")
    whole = (tmp_path / "base/model.safetensors").read_bytes()
    (tmp_path / "base/model.safetensors").unlink()
    (tmp_path / "base" / name).write_bytes(whole[:left])
    with pytest.raises(BaseModelMismatchError, match=r"base model cannot be loaded from .*base'"):
        S3TModel.from_pretrained(on_a_folder, base_model=str(tmp_path / "base"))


def test_a_folder_with_an_adapter_is_no_base(on_a_folder, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = LlamaForCausalLM.from_pretrained(on_a_folder.parent / "base")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(IsolationError, match="carries adapters"):
        S3TModel.from_pretrained(on_a_folder, base_model=str(tmp_path / "adapter"))


# Whose class it is


def of_module(module: str) -> type[PreTrainedModel]:
    """A class of one's own by the name of one of Transformers, which answers otherwise."""

    def body(namespace):
        namespace["__module__"] = module
        namespace["forward"] = lambda self, *args, **kwargs: LlamaForCausalLM.forward(self, *args, **kwargs)

    return types.new_class("LlamaForCausalLM", (LlamaForCausalLM,), exec_body=body)


@pytest.mark.parametrize(
    "module, remedy",
    [
        ("mine.models", r"was a mine\.models\.LlamaForCausalLM.* Load it with that class"),
        ("transformers_modules.repo.modeling", "came with its checkpoint.* `trust_remote_code=True`, as at training"),
    ],
)
def test_another_class_of_the_same_name_is_not_loaded_for_it(module, remedy, tmp_path):
    tiny_llama(2).save_pretrained(tmp_path / "base")
    cls = of_module(module)
    path = system_on(tmp_path / "system", cls.from_pretrained(tmp_path / "base"))
    with pytest.raises(BaseModelMismatchError, match=remedy):
        S3TModel.from_pretrained(path)
    assert S3TModel.from_pretrained(path, base_model=cls.from_pretrained(tmp_path / "base")).check() == []


# What this machine cannot


def recorded(folder, **changes) -> dict[str, Any]:
    model = LlamaForCausalLM.from_pretrained(folder)
    return {**describe_base(model, "model.layers", ()), **changes}


def test_an_implementation_that_this_machine_lacks_is_replaced_and_that_is_said(on_a_folder, warned):
    record = recorded(on_a_folder.parent / "base", attn_implementation="flash_attention_2")
    assert load_base(record).config._attn_implementation == "sdpa"
    said = "attn_implementation='flash_attention_2', which cannot be had here .* and is loaded with 'sdpa'"
    assert re.search(said, warned.text, re.DOTALL)


def test_a_quantisation_that_this_machine_lacks_is_refused_in_a_sentence(on_a_folder):
    record = recorded(on_a_folder.parent / "base", quantization={"quant_method": "aqlm"})
    with pytest.raises(BaseModelMismatchError, match=r"cannot be loaded from .* as it was at training: .*AQLM"):
        load_base(record)


def test_a_record_of_before_says_less_and_loads(on_a_folder):
    new = ("module", "main_dtype", "computed_dtypes", "experts_implementation")
    record = recorded(on_a_folder.parent / "base")
    assert {*new} <= record.keys()
    assert load_base({k: v for k, v in record.items() if k not in new}).dtype == torch.float32
