"""A served model is of its base's class: it decodes as plain PEFT does, and nothing passes by the routing."""

import copy
import functools
import gc
import inspect
import io
import logging
import math
import pickle
import threading
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.utils import extract_model_from_parallel
from datasets import Dataset
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model, inject_adapter_in_model
from support.insides import routing_of
from support.tiny import (
    BOS,
    EOS,
    PAD,
    VOCABULARY,
    batch_of,
    build,
    classification_rows,
    ids_of,
    lm_rows,
    lora,
    make_trainer,
    plant_stages,
    rows_for,
    s3t_config,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_roberta,
    tiny_vit,
    training_arguments,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import (
    Cache,
    CompileConfig,
    DynamicCache,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    pipeline,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_s3t import S3TModel
from hf_s3t.baselines import METHODS
from hf_s3t.errors import ConfigError, NotServedError, S3TError, StaleCacheError
from hf_s3t.model.model_class import FROM_THE_BASE, INHERITED, model_class


pytestmark = pytest.mark.usefixtures("one_thread")


# Models


IMAGE = 6
WORDS = dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
TEXT = dict(
    **WORDS,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=64,
)
PIXELS = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4
)


def tiny_qwen3_vl(**vision):
    """It counts positions in three dimensions, and takes the patches of all images of a batch in one row."""
    seen = dict(depth=1, hidden_size=16, intermediate_size=24, out_hidden_size=16, num_heads=2, patch_size=4)
    seen.update(spatial_merge_size=2, temporal_patch_size=2, num_position_embeddings=16, deepstack_visual_indexes=[0])
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    return build(
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        vision_config={**seen, **vision},
        text_config=dict(**TEXT, head_dim=8, rope_parameters=rope),
        image_token_id=IMAGE,
        video_token_id=7,
        vision_start_token_id=8,
        vision_end_token_id=9,
    )


def tiny_paligemma():
    """It counts positions from one, and tells the picture from the text by the type of each token."""
    return build(
        "PaliGemmaForConditionalGeneration",
        "PaliGemmaConfig",
        vision_config=dict(model_type="siglip_vision_model", **PIXELS, projection_dim=16, vision_use_head=False),
        text_config=dict(model_type="gemma2", **TEXT, head_dim=8),
        image_token_id=IMAGE,
        projection_dim=16,
    )


def tiny_mamba():
    return build(
        "MambaForCausalLM", "MambaConfig", **WORDS, hidden_size=16, state_size=4, num_hidden_layers=2, expand=1
    )


def tiny_minimax():
    """It has a cache of its own, of which the first layer never holds keys."""
    kinds = ["linear_attention", "full_attention"]
    experts = dict(num_local_experts=2, num_experts_per_tok=1)
    return build("MiniMaxForCausalLM", "MiniMaxConfig", **TEXT, **experts, head_dim=8, block_size=8, layer_types=kinds)


def tiny_rwkv():
    sizes = dict(hidden_size=16, attention_hidden_size=16, num_hidden_layers=2, context_length=64)
    return build("RwkvForCausalLM", "RwkvConfig", **WORDS, **sizes)


def words(rows: int = 2) -> dict[str, torch.Tensor]:
    return {"input_ids": batch_of(lm_rows(rows))["input_ids"].clamp(min=10)}


def words_with_padding() -> dict[str, torch.Tensor]:
    ids = words()["input_ids"]
    ids[0, :3] = PAD
    return {"input_ids": ids, "attention_mask": (ids != PAD).long()}


def picture_first(rows: int, tokens: int) -> torch.Tensor:
    ids = words(rows)["input_ids"]
    ids[:, 1 : 1 + tokens] = IMAGE
    return ids


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def patches_and_words(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = picture_first(rows, 4)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": noise(16 * rows, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * rows),
        "mm_token_type_ids": (ids == IMAGE).long(),
    }


def picture_and_words(rows: int = 2) -> dict[str, torch.Tensor]:
    ids = picture_first(rows, 4)
    types = (ids == IMAGE).long()
    pixels = noise(rows, 3, 8, 8)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": types, "pixel_values": pixels}


LANGUAGE_LAYERS = r".*language_model.*\.(q_proj|v_proj|down_proj)"


@dataclass(frozen=True)
class Kind:
    """A base, what to ask it, and what of it is adapted."""

    fresh: Callable[[], PreTrainedModel]
    prompt: Callable[[], dict[str, torch.Tensor]] = words
    targets: Any = "all-linear"


KINDS = {
    "llama": Kind(partial(tiny_llama, 2), words_with_padding),
    "gpt2": Kind(partial(tiny_gpt2, 2), targets=["c_attn"]),
    "qwen3-vl": Kind(tiny_qwen3_vl, patches_and_words, LANGUAGE_LAYERS),
    "paligemma": Kind(tiny_paligemma, picture_and_words, LANGUAGE_LAYERS),
    "mamba": Kind(tiny_mamba, targets=["in_proj", "x_proj"]),
    "minimax": Kind(tiny_minimax, targets=["q_proj", "v_proj", "out_proj"]),
    # Of several rows its own implementation mixes the states.
    "rwkv": Kind(tiny_rwkv, partial(words, 1), targets=["key", "value", "receptance"]),
}


@dataclass(frozen=True)
class Made:
    """A system of planted stages that no test changes."""

    path: Path
    kind: Kind
    _made: dict = field(default_factory=dict)

    def load(self, **settings) -> S3TModel:
        return S3TModel.from_pretrained(self.path, base_model=self.kind.fresh(), **settings)

    @cached_property
    def model(self) -> S3TModel:
        return self.load()

    @cached_property
    def plain(self) -> PeftModel:
        """The first shard as plain PEFT on a base of its own."""
        return self.member(0)

    @cached_property
    def members(self) -> list[PeftModel]:
        return [self.member(shard) for shard in range(len(self.model.status()["depths"]))]

    def member(self, shard: int) -> PeftModel:
        exported = self.path.with_name(f"{self.path.name}-exported-{shard}-{len(self._made)}")
        self._made[exported] = shard
        self.model.export_adapter(shard, exported)
        return PeftModel.from_pretrained(self.kind.fresh(), exported).eval()


def make(path: Path, kind: Kind, shards: int = 1) -> Made:
    config = s3t_config(num_shards=shards, budget=1, sequence_selection=[[0, 1]], partition="balanced")
    adapters = LoraConfig(r=2, lora_alpha=16, target_modules=kind.targets)
    trainer = make_trainer(path, kind.fresh(), rows_for(kind.fresh()), config=config, peft_config=adapters)
    plant_stages(trainer)
    return Made(path, kind)


@pytest.fixture(scope="module")
def system(tmp_path_factory) -> Callable[..., Made]:
    made: dict[tuple[str, int], Made] = {}

    def get(name: str, shards: int = 1) -> Made:
        if (name, shards) not in made:
            made[name, shards] = make(tmp_path_factory.mktemp("made") / "system", KINDS[name], shards)
        return made[name, shards]

    return get


def of_the_last_stage(model: S3TModel, shard: int = 0) -> int | str:
    (tip,) = routing_of(model).served[shard]
    return model.folder.table.members(shard, tip.prefix[-1])[0]


# Decoding


def compiled() -> dict[str, Any]:
    config = CompileConfig(backend="eager", mode=None)
    config._compile_all_devices = True
    return dict(cache_implementation="static", compile_config=config)


WAYS = {
    "greedy": {},
    "greedy, without a cache": dict(use_cache=False),
    "sampling": dict(do_sample=True, temperature=0.8, top_k=20),
    "several answers": dict(do_sample=True, num_return_sequences=2),
    "beams": dict(num_beams=3, num_return_sequences=2),
    "penalties": dict(repetition_penalty=1.9, no_repeat_ngram_size=2),
    "static cache": dict(cache_implementation="static"),
    "static cache, step to compile": compiled(),
}
# What plain PEFT does not do with these: a mask by kind of layer, a state that it cannot reorder, and mixes.
NOT_PLAIN = {
    ("paligemma", "static cache"),
    ("paligemma", "static cache, step to compile"),
    ("rwkv", "beams"),
    ("rwkv", "several answers"),
}


def decoded(model, prompt: dict[str, torch.Tensor], **settings) -> torch.Tensor:
    torch.manual_seed(3)
    asked = {"do_sample": False, "max_new_tokens": 5, "eos_token_id": None, "pad_token_id": PAD, **settings}
    return model.generate(**prompt, **asked)


@pytest.mark.parametrize(
    ("name", "way"), [(name, way) for name in KINDS for way in WAYS if (name, way) not in NOT_PLAIN]
)
def test_one_shard_decodes_as_plain_peft(system, name, way):
    made = system(name)
    prompt, settings = made.kind.prompt(), WAYS[way]
    # What plain PEFT would compile it computes so too.
    plainly = {key: value for key, value in settings.items() if key != "compile_config"}
    assert torch.equal(decoded(made.model, prompt, **settings), decoded(made.plain, prompt, **plainly))


@pytest.mark.parametrize("name", KINDS)
def test_one_member_answers_with_its_own_logits(system, name):
    made = system(name)
    prompt = made.kind.prompt()
    with torch.no_grad():
        own, plain = made.model(**prompt).logits, made.plain(**prompt).logits
        bare = made.kind.fresh()(**prompt).logits
    assert torch.allclose(own, plain, atol=1e-5) and not torch.allclose(own, bare, atol=1e-3)


def test_when_one_shard_is_left_the_scale_changes_and_the_distribution_is_its_own(system, tmp_path):
    made = make(tmp_path / "system", KINDS["llama"], shards=2)
    model, prompt = made.load(), words()
    assert torch.allclose(model(**prompt).logits.logsumexp(-1), torch.zeros(2, 8), atol=1e-5)
    example = next(i for i, place in model.locate(list(model.folder.table.rows)).items() if place == (1, 0))
    assert model.unlearn([example]).depths_after == [2, 0]
    answer, plain = model(**prompt).logits, made.plain(**prompt).logits
    assert torch.allclose(answer, plain, atol=1e-5)
    assert answer.logsumexp(-1).abs().min() > 1e-2, "these logits happen to be logarithms of probabilities"
    # And so what looks at the sign of a logit chooses the same words.
    by_sign = dict(repetition_penalty=1.9, exponential_decay_length_penalty=(1, 1.5), eos_token_id=EOS)
    assert torch.equal(decoded(model, prompt, **by_sign), decoded(made.plain, prompt, **by_sign))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "minimax"])
def test_embeddings_can_be_given_to_generate(system, name):
    made = system(name)
    prompt = words()
    embeddings = {"inputs_embeds": made.kind.fresh().get_input_embeddings()(prompt["input_ids"]).detach()}
    answer = decoded(made.model, embeddings)
    assert torch.equal(answer, decoded(made.plain, embeddings))
    assert torch.equal(answer, decoded(made.model, prompt)[:, 8:])


def test_a_state_that_cannot_be_carried_costs_time_and_not_truth(system):
    made = system("rwkv")
    ids = words()["input_ids"]
    expected = decoded(made.plain, {"input_ids": ids}, use_cache=False)
    assert torch.equal(decoded(made.model, {"input_ids": ids}), expected)
    assert torch.equal(
        decoded(made.model, {"input_ids": ids}, num_beams=3),
        decoded(made.plain, {"input_ids": ids}, num_beams=3, use_cache=False),
    )
    embeddings = made.kind.fresh().get_input_embeddings()(ids).detach()
    with pytest.raises(S3TError, match=r"cannot carry from token to token.* with `input_ids`"):
        decoded(made.model, {"inputs_embeds": embeddings})


@pytest.mark.parametrize("name", ["mamba", "minimax", "rwkv"])
def test_several_members_decode_with_the_cache_as_without(system, name):
    made = system(name, 2)
    # Of beams not all models reorder all they keep.
    for settings in ({}, {"num_beams": 3})[: 1 if name == "minimax" else 2]:
        cached = decoded(made.model, words(), **settings)
        assert torch.equal(cached, decoded(made.model, words(), **settings, use_cache=False))


def test_a_stage_in_the_encoder_acts_on_the_picture(tmp_path):
    """Pictures are encoded before the first token: there too the stages answer, not the bare encoder."""
    kind = Kind(partial(tiny_qwen3_vl, depth=2), patches_and_words)
    adapters = LoraConfig(
        r=2,
        lora_alpha=64,
        target_modules=["qkv", "proj"],
        exclude_modules=["patch_embed.proj"],
        layers_pattern="blocks",
        layers_to_transform=[],
    )
    for shards in (1, 2):
        path = tmp_path / f"{shards}"
        config = s3t_config(num_shards=shards, budget=1, sequence_selection=[[0, 1]])
        plant_stages(make_trainer(path, kind.fresh(), lm_rows(), config=config, peft_config=adapters))
    one, prompt = Made(tmp_path / "1", kind), kind.prompt()
    assert torch.equal(decoded(one.model, prompt), decoded(one.plain, prompt))
    assert not torch.equal(decoded(one.model, prompt), decoded(kind.fresh(), prompt))
    with pytest.raises(S3TError, match=r"adapt the encoder, each its own way\. .* `export_adapter`"):
        decoded(Made(tmp_path / "2", kind).model, prompt)


# Several members and pictures


def of_pictures(name: str, what: str) -> dict[str, torch.Tensor]:
    """Three rows, and pictures in them."""
    batch = KINDS[name].prompt(3)
    ids, patches = batch["input_ids"], batch["pixel_values"]
    if what == "no picture":
        ids[ids == IMAGE] = 10
        for kept in ("pixel_values", "image_grid_thw"):
            batch.pop(kept, None)
    if what in ("a row without", "two in one row"):
        ids[1][ids[1] == IMAGE] = 10
    if what == "a row without":
        batch["pixel_values"] = patches.unflatten(0, (3, -1))[[0, 2]].flatten(0, 1)
        if "image_grid_thw" in batch:
            batch["image_grid_thw"] = batch["image_grid_thw"][[0, 2]]
    if what == "two in one row":
        # As many pictures as rows, and not one each.
        batch = {
            key: torch.cat([value, value], 1) if value.dtype == ids.dtype else value for key, value in batch.items()
        }
        batch = {**batch, "image_grid_thw": batch["image_grid_thw"][:, :3]} if "image_grid_thw" in batch else batch
        ids = batch["input_ids"]
        ids[2, :8][ids[2, :8] == IMAGE] = 11
    if what == "padding":
        ids[1] = torch.cat([torch.full((2,), PAD), ids[1, :-2]])
        batch["attention_mask"][1, :2] = 0
    for kind in {"token_type_ids", "mm_token_type_ids"} & batch.keys():
        batch[kind] = (ids == IMAGE).long()
    return batch


def logits_along(member: PeftModel, prompt: dict[str, torch.Tensor], answer: torch.Tensor) -> torch.Tensor:
    """What plain PEFT makes of each step of a text that is chosen by somebody else."""

    def choose(ids, scores):
        return torch.full_like(scores, -torch.inf).scatter(1, answer[:, ids.shape[1], None], 0.0)

    return torch.stack(decoded(member, prompt, **{**SHOWN, "suppress_tokens": None}, logits_processor=[choose]).logits)


# An answer that shows a picture none was given for is an error to these bases.
SHOWN = dict(output_logits=True, return_dict_in_generate=True, suppress_tokens=[IMAGE])
PICTURES = ["one each", "a row without"] + [
    pytest.param(what, marks=pytest.mark.slow) for what in ("no picture", "two in one row", "padding")
]


def joined(each: Iterable[torch.Tensor]) -> torch.Tensor:
    each = torch.stack([logits.log_softmax(-1) for logits in each])
    return each.logsumexp(0) - math.log(len(each))


@pytest.mark.parametrize("what", PICTURES)
@pytest.mark.parametrize("name", ["qwen3-vl", "paligemma"])
@torch.no_grad()
def test_several_members_look_at_pictures_as_plain_peft(system, name, what):
    made, batch = system(name, 2), of_pictures(name, what)
    expected = joined(member(**batch).logits for member in made.members)
    assert torch.allclose(made.model(**batch).logits, expected, atol=1e-5)
    for settings in ({}, dict(use_cache=False), dict(do_sample=True)):
        answer = decoded(made.model, batch, **settings, **SHOWN)
        along = joined(logits_along(member, batch, answer.sequences) for member in made.members)
        assert torch.allclose(torch.stack(answer.logits), along, atol=1e-5)
    beams = dict(num_beams=2, num_return_sequences=2, suppress_tokens=[IMAGE])
    assert torch.equal(decoded(made.model, batch, **beams), decoded(made.model, batch, **beams, use_cache=False))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-vl", "paligemma"])
@torch.no_grad()
def test_three_members_look_at_pictures_and_when_one_is_left_it_is_plain_peft(tmp_path, name):
    made, batch = make(tmp_path / "system", KINDS[name], shards=3), KINDS[name].prompt(3)
    answer = decoded(made.model, batch, **SHOWN)
    along = joined(logits_along(member, batch, answer.sequences) for member in made.members)
    assert torch.allclose(torch.stack(answer.logits), along, atol=1e-5)
    places = made.model.locate(ids_of(24))
    made.model.unlearn([i for i, place in places.items() if place in ((1, 0), (2, 0))])
    assert torch.equal(decoded(made.model, batch), decoded(made.plain, batch))
    assert torch.allclose(made.model(**batch).logits, made.plain(**batch).logits, atol=1e-5)


def test_where_each_row_has_its_picture_members_share_a_pass(system):
    for name, what, shared in (
        ("paligemma", "one each", True),
        ("paligemma", "a row without", False),
        ("qwen3-vl", "one each", False),
        ("qwen3-vl", "no picture", True),
    ):
        model, batch = system(name, 2).model, of_pictures(name, what)
        model(**batch)
        passes = []
        hook = model.base_model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
        model(**batch)
        hook.remove()
        assert len(passes) == (1 if shared else 2), (name, what)


def test_positions_that_only_the_base_knows_are_asked_for(system):
    """It notes after each prompt by how much positions and tokens differ, row by row."""
    made, batch = system("qwen3-vl", 2), of_pictures("qwen3-vl", "a row without")
    more = torch.tensor([[10], [11], [12]])
    answer = decoded(made.model, batch, max_new_tokens=1, return_dict_in_generate=True)
    with pytest.raises(S3TError, match="Give `position_ids`"):
        made.model(input_ids=more, past_key_values=answer.past_key_values)
    one = {key: value[: len(value) // 3] for key, value in KINDS["qwen3-vl"].prompt(3).items()}

    def going_on(model) -> torch.Tensor:
        past = decoded(model, one, max_new_tokens=1, return_dict_in_generate=True).past_key_values
        with torch.no_grad():
            return model(input_ids=more[:1], past_key_values=past).logits

    assert torch.allclose(going_on(made.model), joined(map(going_on, made.members)), atol=1e-5)


# Assisted decoding


def test_text_can_be_drafted_from_the_prompt_or_by_another_model(system):
    model = system("llama", 2).model
    prompt = {"input_ids": torch.tensor([[10, 11, 12, 13, 10, 11, 12]])}
    expected = decoded(model, prompt)
    assert torch.equal(decoded(model, prompt, prompt_lookup_num_tokens=3), expected)
    assert torch.equal(decoded(model, prompt, assistant_model=tiny_llama(1)), expected)
    # And it can be the one that drafts.
    base = tiny_llama(2, seed=5)
    assert torch.equal(decoded(base, prompt, assistant_model=model), decoded(base, prompt))


def test_a_draft_from_parts_of_the_base_is_refused(system):
    model = system("llama", 2).model
    settings = copy.deepcopy(model.config.to_dict())
    with pytest.raises(NotServedError, match="call the model or its `generate`"):
        decoded(model, words(1), assistant_early_exit=1)
    assert model.config.to_dict() == settings


# Static caches


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("settings", [compiled(), dict(cache_implementation="static", prefill_chunk_size=3)])
def test_a_static_cache_answers_as_a_dynamic_one(system, shards, settings):
    model = system("llama", shards).model
    asked = dict(return_dict_in_generate=True, output_logits=True)
    static, dynamic = (decoded(model, words(), **asked, **more) for more in (settings, {}))
    assert torch.equal(static.sequences, dynamic.sequences)
    assert torch.allclose(torch.stack(static.logits), torch.stack(dynamic.logits), atol=1e-5)


@pytest.mark.parametrize("settings", [{}, dict(cache_implementation="static"), compiled()])
def test_no_keys_outlive_the_call(tmp_path, monkeypatch, settings):
    """At once, not when the garbage collector comes by."""
    caches, begin = [], Cache.__init__

    def noted(cache, *args, **kwargs):
        caches.append(weakref.ref(cache))
        begin(cache, *args, **kwargs)

    monkeypatch.setattr(Cache, "__init__", noted)
    made = make(tmp_path / "system", KINDS["llama"], shards=2)
    model = made.load()
    decoded(model, words(), **settings)
    assert caches and [cache() for cache in caches] == [None] * len(caches)
    model.unlearn([of_the_last_stage(model)])
    assert torch.equal(decoded(model, words(), **settings), decoded(made.load(), words()))


def test_a_step_to_compile_is_taken_as_it_is_and_that_is_said(system, monkeypatch):
    said, model = [], system("llama").model
    monkeypatch.setattr("hf_s3t.model.generating.logger.warning_once", said.append)
    decoded(model, words(), **compiled())
    assert said == [
        "The ensemble's decoding steps are not compiled, so that a static cache brings no speed. Leave out "
        "`cache_implementation` and `compile_config`."
    ]
    decoded(model, words(), cache_implementation="static")
    assert len(said) == 1 and not hasattr(model, "_compiled_call")


@pytest.mark.parametrize("name", ["minimax", "mamba"])
def test_states_of_stages_that_are_gone_are_refused(tmp_path, name):
    """Also where they lie in a store of the model's own, or come under another name."""
    made = make(tmp_path / "system", KINDS[name], shards=2)
    model = made.load()
    outputs = model(**words(), use_cache=True)
    ((under, cache),) = ((n, outputs[n]) for n in ("past_key_values", "cache_params") if n in outputs)
    step = {"input_ids": words()["input_ids"][:, -1:], under: cache}
    model(**step)
    model.unlearn([of_the_last_stage(model)])
    with pytest.raises(StaleCacheError, match="Start again without it"):
        model(**step)
    # Nor is one of the bare base's taken.
    with pytest.raises(StaleCacheError):
        model(**{**step, under: made.kind.fresh()(**words(), use_cache=True)[under]})


def test_a_state_that_is_no_cache_is_refused(system):
    made = system("rwkv")
    state = made.kind.fresh()(**words(), use_cache=True).state
    with pytest.raises(S3TError, match="`state` holds state"):
        made.model(**words(), state=state)
    llama = system("llama").model
    with pytest.raises(S3TError, match="`past_key_values` holds state"):
        llama(**words(), past_key_values=((torch.zeros(2, 1, 3, 8), torch.zeros(2, 1, 3, 8)),) * 2)
    assert llama(**words(), past_key_values=DynamicCache()).logits.shape == (2, 8, VOCABULARY)


# What is not served


BASES = {
    "LlamaForCausalLM": partial(tiny_llama, 2),
    "LlamaForSequenceClassification": partial(tiny_llama, 2, labels=3),
    "GPT2LMHeadModel": partial(tiny_gpt2, 2),
    "BertForSequenceClassification": partial(tiny_bert, 2),
    "RobertaForSequenceClassification": partial(tiny_roberta, 2),
    "ViTForImageClassification": partial(tiny_vit, 2),
    "Qwen3VLForConditionalGeneration": tiny_qwen3_vl,
    "PaliGemmaForConditionalGeneration": tiny_paligemma,
    "MambaForCausalLM": tiny_mamba,
    "MiniMaxForCausalLM": tiny_minimax,
    "RwkvForCausalLM": tiny_rwkv,
}
# What was looked at and is not served: it computes with parts, hands them out, loads, or changes the base.
PARTS = """
    get_decoder get_encoder get_image_features get_video_features get_placeholder_mask get_position_embeddings
    get_parameter_or_buffer named_non_persistent_buffers retrieve_modules_from_names
    _prepare_decoder_input_ids_for_generation _prepare_text_encoder_decoder_kwargs_for_generation
    warn_if_padding_and_no_attention_mask can_record_outputs
"""
LOADING = """
    _adjust_missing_and_unexpected_keys _dispatch_accelerate_model _finalize_model_loading _from_config
    _get_dtype_plan _initialize_missing_keys _load_and_finalize_distributed_pretrained_model _load_pretrained_model
    _move_missing_keys_from_meta_to_device adjust_generation_fn get_expanded_tied_weights_keys get_init_context
    mark_tied_weights_as_initialized maybe_distribute_model post_init prepare_distribute_model
    register_for_auto_class _preprocess_accelerate _is_overridden
"""
PUBLISHING = """
    _get_files_timestamps _upload_modified_files barrier_after_gathered_checkpoint_save
    gather_sharded_state_dict_for_save save_distributed_checkpoint should_save_on_this_rank
"""
CHANGING = """
    _activation_checkpointing_disable _activation_checkpointing_enable _adjust_bias
    _backward_compatibility_gradient_checkpointing _can_set_attn_implementation _can_set_experts_implementation
    _check_and_adjust_attn_implementation _check_and_adjust_experts_implementation
    _copy_lm_head_original_to_resized _default_compile_config _expand_parallel_plan _flash_attn_can_dispatch
    _flash_attn_import_error _flex_attn_can_dispatch _get_resized_embeddings _get_resized_lm_head
    _grouped_mm_can_dispatch _init_added_embeddings_weights_with_mean _init_added_lm_head_bias_with_mean
    _init_added_lm_head_weights_with_mean _init_weights _initialize_weights _resize_token_embeddings
    _resolve_parallel_plans _sdpa_can_dispatch _set_gradient_checkpointing _validate_parallel_plan
    activation_checkpointing_disable activation_checkpointing_enable active_adapters add_adapter delete_adapter
    dequantize destroy_cached_continuous_batching_manager disable_adapters disable_input_require_grads
    enable_adapters enable_input_require_grads enable_peft_hotswap get_adapter_state_dict
    get_correct_attn_implementation get_correct_experts_implementation gradient_checkpointing_disable
    gradient_checkpointing_enable init_parallel_plans init_weights initialize_weights load_adapter
    resize_position_embeddings resize_token_embeddings set_adapter set_attn_implementation set_decoder set_encoder
    set_experts_implementation set_input_embeddings set_output_embeddings set_use_kernels
"""
REFUSED = {*PARTS.split(), *LOADING.split(), *PUBLISHING.split(), *CHANGING.split()}


def served_without_stages(base: PreTrainedModel) -> S3TModel:
    """A served model as far as its class goes."""
    served = S3TModel.__new__(model_class(S3TModel, type(base)))
    nn.Module.__init__(served)
    served.base_model = base
    return served


def ours() -> set[str]:
    return {name for one in S3TModel.__mro__ if one not in (nn.Module, object) for name in vars(one)}


@pytest.mark.parametrize("name", BASES)
def test_everything_that_a_base_brings_was_judged(name):
    """
    A new version of a library that brings a new method fails here, and refuses it meanwhile: judge whether it may be
    inherited (it computes by calling the model), read from the base (it computes nothing that a stage adapts), or is
    to be refused, and list it.
    """
    base = BASES[name]()
    assert type(base).__name__ == name
    served = served_without_stages(base)
    unjudged = []
    for attribute in dir(type(base)):
        there = inspect.getattr_static(type(base), attribute)
        does_something = callable(there) or hasattr(there, "__get__")
        if attribute in ours() or hasattr(nn.Module, attribute):
            continue
        if attribute in REFUSED:
            with pytest.raises(NotServedError, match=rf"has no `{attribute}`"):
                getattr(served, attribute)
        elif attribute in FROM_THE_BASE:
            assert hasattr(served, attribute) == hasattr(base, attribute)
        elif does_something and attribute not in INHERITED:
            unjudged.append(attribute)
    assert unjudged == []


@pytest.mark.parametrize("name", BASES)
def test_what_is_not_judged_is_refused_and_settings_are_the_bases(name):
    base = BASES[name]()
    served = served_without_stages(base)
    settings = [n for n, value in vars(base).items() if isinstance(value, (str, int, float, bool)) and n != "training"]
    assert settings
    for attribute in settings:
        assert getattr(served, attribute) == getattr(base, attribute)
    for attribute, _ in (*base.named_children(), *base.named_parameters(recurse=False)):
        with pytest.raises(NotServedError, match=rf"`model.base_model.{attribute}`"):
            getattr(served, attribute)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_thing'"):
        served.no_such_thing  # noqa: B018


class WithItsOwnWays(LlamaForCausalLM):
    """What people add to a class of Transformers."""

    scale = torch.ones(1)
    helpers = [len]

    def __init__(self, config):
        super().__init__(config)
        self.pooled = lambda ids: self.model(ids).last_hidden_state.mean(1)
        self.blocks = [self.lm_head]
        self.limits = {"shortest": 1, "longest": [2, 3]}

    def encode(self, ids):
        return self.model(ids).last_hidden_state

    @property
    def head(self):
        return self.lm_head

    def __getitem__(self, index):
        return self.model.layers[index]

    def train(self, mode: bool = True):
        super().train(mode)
        self.model.norm.eval()
        return self

    def generate(self, *args, shout: bool = False, parts: bool = False, **kwargs):
        if parts:
            return self.model(*args)
        return super().generate(*args, **kwargs, **({"max_new_tokens": 2} if shout else {}))


def of_class(cls: type[LlamaForCausalLM]) -> LlamaForCausalLM:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(tiny_llama(2).config).eval()


def test_what_people_add_to_a_class_is_refused_or_goes_through_the_ensemble(tmp_path):
    made = make(tmp_path / "system", Kind(partial(of_class, WithItsOwnWays)), shards=2)
    model, ids = made.load(), words()["input_ids"]
    for way in (
        lambda: model.encode(ids),
        lambda: model.pooled(ids),
        lambda: model.head,
        lambda: model.blocks,
        lambda: model.scale,
        lambda: model.helpers,
        lambda: model.generate(ids, parts=True),
    ):
        with pytest.raises(NotServedError, match="past the stages that serve"):
            way()
    with pytest.raises((NotServedError, TypeError)):
        model[0]
    assert model.limits == {"shortest": 1, "longest": [2, 3]}
    # Its own way to generate comes to the ensemble, and its own way to be a module is called on the base.
    two = decoded(model, {"input_ids": ids}, max_new_tokens=2)
    assert torch.equal(model.generate(ids, shout=True, do_sample=False, eos_token_id=None, pad_token_id=PAD), two)
    assert model.train() is model and model.base_model.training and not model.base_model.model.norm.training


def test_a_classifier_says_that_it_does_not_generate(tmp_path):
    model = make_trainer(tmp_path, tiny_bert(2)).s3t_model
    with pytest.raises(ConfigError, match="BertForSequenceClassification is no model that generates"):
        model.generate(torch.tensor([[10, 11]]))


# What it is to others


def test_it_is_of_its_bases_class(system):
    one, other = system("llama").model, system("llama", 2).model
    assert isinstance(one, S3TModel) and isinstance(one, LlamaForCausalLM) and type(one) is type(other)
    assert (
        type(one).__name__ == "LlamaForCausalLM" and type(one).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    )
    assert "S3TModel" in repr(type(one)), "to people it says what it is"
    assert inspect.ismethod(one.forward) and "forward" not in vars(one)
    assert inspect.signature(one.forward) == inspect.signature(one.base_model.forward)
    assert inspect.signature(type(one).forward) == inspect.signature(LlamaForCausalLM.forward)
    assert type(system("gpt2").model) is not type(one) and not isinstance(system("gpt2").model, LlamaForCausalLM)
    # Whichever class loads a system, it is the base that decides.
    loaded = type(one).from_pretrained(system("gpt2").path, base_model=tiny_gpt2(2))
    assert type(loaded) is type(system("gpt2").model) is model_class(S3TModel, type(loaded.base_model))
    assert one.config is one.base_model.config and one.get_input_embeddings() is one.base_model.model.embed_tokens


def test_a_baselines_model_is_of_its_bases_class_too(tmp_path):
    base, data = tiny_llama(2), Dataset.from_list(lm_rows())
    arguments = training_arguments(tmp_path, max_steps=1)
    method = METHODS["sisa"](base, arguments, train_dataset=data, peft_config=lora(base), s3t_config=s3t_config())
    model = method.model
    assert type(model).__name__ == "LlamaForCausalLM" and isinstance(model, LlamaForCausalLM)
    with pytest.raises(NotServedError):
        model.lm_head  # noqa: B018


def test_model_base_and_class_are_freed(tmp_path):
    model = make(tmp_path / "system", Kind(partial(of_class, type("Rare", (LlamaForCausalLM,), {})))).load()
    decoded(model, words())
    left = [weakref.ref(thing) for thing in (model, model.base_model, type(model), model.stack)]
    del model
    gc.collect()
    assert [ref() for ref in left] == [None] * 4


@pytest.mark.parametrize(
    "copied",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda model: torch.save(model, io.BytesIO())],
    ids=["copy", "deepcopy", "pickle", "torch.save"],
)
def test_it_is_neither_copied_nor_pickled(system, copied):
    with pytest.raises(S3TError, match=r"a deletion would not reach the copy\. `save_pretrained` .* `S3TModel"):
        copied(system("llama").model)


@pytest.mark.parametrize(
    "attach",
    [
        lambda model, config: get_peft_model(model, config),
        lambda model, config: get_peft_model(model, config, mixed=True),
        lambda model, config: inject_adapter_in_model(config, model),
    ],
    ids=["get_peft_model", "mixed", "inject"],
)
@pytest.mark.filterwarnings("ignore:You are trying to modify", "ignore:Already found a `peft_config`")
def test_it_takes_no_adapter(system, attach):
    model = system("llama").model
    before, configs, answer = list(model.state_dict()), set(model.base_model.peft_config), model(**words()).logits
    with pytest.raises(ConfigError, match=r"takes no adapter .* Export a shard with `export_adapter`"):
        attach(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert list(model.state_dict()) == before and set(model.base_model.peft_config) == configs
    assert torch.equal(model(**words()).logits, answer)
    # To others than PEFT the configs are what they are.
    assert copy.deepcopy(model.peft_config) == model.base_model.peft_config


def test_a_soft_prompt_is_put_before_the_ensemble(system):
    made = system("llama")
    answers = []
    for model in (made.load(), copy.deepcopy(made.plain).merge_and_unload()):
        torch.manual_seed(0)
        prompted = get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)).eval()
        answers.append(decoded(prompted, words_with_padding()))
    assert torch.equal(*answers) and not torch.equal(answers[0], decoded(made.plain, words_with_padding()))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": PAD, "<s>": BOS, "</s>": EOS, "<unk>": 3, **{f"w{i}": i for i in range(4, VOCABULARY)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def test_a_pipeline_has_nothing_to_say(system, tokenizer, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    generator = pipeline("text-generation", model=system("llama", 2).model, tokenizer=tokenizer)
    generator("w10 w11", max_new_tokens=2, do_sample=False)
    classifier = make_trainer(tmp_path, tiny_bert(2), classification_rows())
    plant_stages(classifier)
    pipeline("text-classification", model=classifier.s3t_model, tokenizer=tokenizer)("w10 w11")
    assert not [record.getMessage()[:200] for record in caplog.records if "not supported" in record.getMessage()]


def test_trainer_evaluates_with_the_ensembles_labels_and_loss(system, tmp_path):
    model = system("llama").model
    trainer = Trainer(model=model, args=training_arguments(tmp_path))
    assert trainer.label_names == ["labels"] and trainer.can_return_loss is False
    rows = [{k: v for k, v in row.items() if k != "id"} for row in lm_rows(4)]
    loss = trainer.evaluate(Dataset.from_list(rows))["eval_loss"]
    assert loss == pytest.approx(model(**batch_of(lm_rows(4))).loss.item(), abs=1e-5)


def test_models_in_threads_answer_as_alone(system):
    """Two of one class and one of another, on bases of their own, all at once."""
    made = [system("llama"), system("llama", 2), system("gpt2")]
    ways = [{}, dict(num_beams=2), dict(cache_implementation="static")]
    alone = [[decoded(one.model, words(), **way) for way in ways] for one in made]
    together: dict[tuple[int, int], torch.Tensor] = {}

    def work(number: int, way: int) -> None:
        together[number, way] = made[number].model.generate(
            **words(), do_sample=False, max_new_tokens=5, eos_token_id=None, pad_token_id=PAD, **ways[way]
        )

    threads = [threading.Thread(target=work, args=(n, w)) for n in range(3) for w in range(3) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(together) == 9
    assert all(torch.equal(answer, alone[number][way]) for (number, way), answer in together.items())


@pytest.mark.slow
def test_a_compiled_model_follows_deletions(tmp_path):
    model = make(tmp_path / "system", KINDS["llama"], shards=2).load()
    compiled = torch.compile(model, backend="eager")
    tensors = {key: [weakref.ref(t) for t in model.stack.tensors(key).values()] for key in model.stack.loaded}
    with torch.no_grad():
        first = compiled(**words()).logits
        assert torch.equal(first, model(**words()).logits)
        removed = model.unlearn([of_the_last_stage(model)]).stages_removed
        assert torch.equal(compiled(**words()).logits, model(**words()).logits)
        assert not torch.allclose(compiled(**words()).logits, first, atol=1e-4)
    gone = [key for key in tensors if str(key) in removed]
    assert gone and all(ref() is None for key in gone for ref in tensors[key])


class ByItsBase(LlamaForCausalLM):
    """Of a class of Transformers, `base_model` is its decoder."""

    def generate(self, ids, **kwargs):
        return self.base_model(ids)[0]


class ByItsChildren(LlamaForCausalLM):
    def _sample(self, input_ids, **kwargs):
        return next(self.children())(input_ids)[0].argmax(-1)


class ByAFirstPass(LlamaForCausalLM):
    def prepare_inputs_for_generation(self, input_ids, **kwargs):
        self(input_ids, use_cache=False)
        return super().prepare_inputs_for_generation(input_ids, **kwargs)


@pytest.mark.parametrize("cls", [ByItsBase, ByItsChildren, ByAFirstPass])
def test_code_that_came_with_the_base_does_not_generate_by_the_base_alone(tmp_path, cls):
    model, ids = make(tmp_path / "system", Kind(partial(of_class, cls)), shards=2).load(), words()["input_ids"]
    with pytest.raises(NotServedError, match="own way to generate computes with the base alone"):
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=PAD)
    assert model.base_model(ids).logits.shape == model(ids).logits.shape == (2, 8, VOCABULARY)


def test_a_processor_of_logits_may_ask_the_bare_base(system):
    """Of a class of Transformers nothing else does, and who writes `model.base_model` means it."""
    model = system("llama", 2).model
    away = [lambda ids, scores: scores - model.base_model(ids).logits[:, -1]]
    assert not torch.equal(decoded(model, words(), logits_processor=away), decoded(model, words()))


class HandsOnToItsBase(LlamaForCausalLM):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base_model, name)


class HandsOnToItsDecoder(LlamaForCausalLM):
    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._modules["model"], name)

    def __getattribute__(self, name):
        return super().__getattribute__(name)


@pytest.mark.parametrize("cls", [HandsOnToItsBase, HandsOnToItsDecoder])
def test_a_bases_own_look_up_of_attributes_is_the_bases(cls):
    model = served_without_stages(of_class(cls))
    for part in ("model", "lm_head", "layers", "embed_tokens"):
        with pytest.raises(NotServedError):
            getattr(model, part)
    assert model.vocab_size == VOCABULARY and not hasattr(model, "no_such_thing")


def test_mixed_precision_is_taken_away_again(system):
    """As Accelerate does: it unwraps the forward until nothing is wrapped."""
    model = system("llama", 2).load()
    expected = model(**words()).logits
    plain = model.forward
    model._original_forward = plain

    @functools.wraps(plain.__func__)
    def in_mixed_precision(self, *args, **kwargs):
        return plain(*args, **kwargs)

    model.forward = MethodType(in_mixed_precision, model)
    unwrapped = extract_model_from_parallel(model, keep_fp32_wrapper=False)
    assert torch.equal(unwrapped(**words()).logits, expected)


@pytest.mark.parametrize("shards", [1, 2])
def test_labels_may_be_given_by_position(system, shards):
    model, ids = system("llama", shards).model, words()["input_ids"]
    names = list(inspect.signature(model.forward).parameters)
    by_position = [ids, *[None] * (names.index("labels") - 1), ids]
    assert torch.equal(model(*by_position).loss, model(ids, labels=ids).loss)


def test_a_trainer_is_told_that_a_served_model_is_no_checkpoint(system, tmp_path):
    trainer = Trainer(model=system("llama").model, args=training_arguments(tmp_path))
    with pytest.raises(ConfigError, match=r"takes no `state_dict`\. .* instead of a trainer's `save_model`"):
        trainer.save_model(tmp_path / "saved")


@pytest.mark.slow
def test_a_model_is_compiled_while_it_is_watched(system):
    """What a call leaves in the modules is looked for at the second, fourth, eighth ... call."""
    model = system("llama").load()
    model(**words())
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        assert torch.allclose(compiled(**words()).logits, model(**words()).logits, atol=1e-5)
