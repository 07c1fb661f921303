"""No architecture is special-cased: layers and heads are found under any name, and what cannot work is refused."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from support.plain_peft import difference, naive_ensemble, naive_member
from support.tiny import (
    BOS,
    EOS,
    IMAGE_SIZE,
    LABELS,
    PAD,
    VOCABULARY,
    batch_of,
    build,
    classification_rows,
    ids_of,
    image_rows,
    lm_rows,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_llama,
    training_arguments,
)
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from hf_s3t import S3TModel
from hf_s3t.errors import IsolationError, LayersNotFoundError, S3TError
from hf_s3t.model.head import find_head
from hf_s3t.model.layers import find_layers
from hf_s3t.model.task import find_task


# Minutes on two cores: part of `make test-slow`.
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


TOLERANCE = 1e-5


# Models


WORDS = dict(vocab_size=VOCABULARY, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2)
TEXT = {**WORDS, **SIZES, "max_position_embeddings": 64}
CLASSES = {**TEXT, "num_labels": LABELS}
IMAGES = {**SIZES, "image_size": IMAGE_SIZE, "patch_size": 4, "num_labels": LABELS}
GROUPED = {"num_key_value_heads": 1}
SPEECH = {
    **SIZES,
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 8,
    "num_labels": LABELS,
}
SPECTROGRAM = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 8, "num_mel_bins": 8}
WHISPER = dict(
    vocab_size=VOCABULARY, d_model=16, encoder_layers=4, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, num_mel_bins=8, max_source_positions=8,
    max_target_positions=16, classifier_proj_size=8, num_labels=LABELS, pad_token_id=PAD, bos_token_id=BOS,
    eos_token_id=EOS, decoder_start_token_id=BOS,
)  # fmt: skip
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 16}
SHARED_POSITIONS = {"share_att_key": True, "position_buckets": 8, "norm_rel_ebd": "layer_norm"}


@dataclass(frozen=True)
class Architecture:
    """A tiny model of a Transformers class, and what shall be found in it."""

    model: str
    config: str
    settings: dict[str, Any]
    layers: str
    head: tuple[str, ...] = ()
    targets: Any = "all-linear"
    task: str = "text-generation"
    depth: int = 4
    rows: Callable[[], list[dict[str, Any]]] = field(default=lm_rows)

    def fresh(self) -> PreTrainedModel:
        return build(self.model, self.config, **self.settings)


def text_classifier(*args, **kwargs) -> Architecture:
    return Architecture(*args, **{"task": "text-classification", "rows": classification_rows, **kwargs})


def image_classifier(*args, **kwargs) -> Architecture:
    return Architecture(*args, **{"task": "image-classification", "rows": image_rows, **kwargs})


def audio_classifier(*args, **kwargs) -> Architecture:
    return Architecture(*args, **{"task": "audio-classification", "rows": sounds, **kwargs})


def sounds(*shape: int, count: int = 16, name: str = "input_values") -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape or (200,), generator=generator).tolist() for _ in range(count)]
    return [{"id": i, name: v, "labels": n % LABELS} for n, (i, v) in enumerate(zip(ids_of(count), values))]


def tagged_rows() -> list[dict[str, Any]]:
    return [{**row, "labels": [word % LABELS for word in row["input_ids"]]} for row in classification_rows()]


GPT_2 = {**WORDS, "n_embd": 16, "n_head": 2, "n_layer": 4, "n_positions": 64}
OPT = {**WORDS, "hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_hidden_layers": 4}
DISTILBERT = dict(vocab_size=VOCABULARY, pad_token_id=PAD, dim=16, hidden_dim=32, n_layers=4, n_heads=2)
ARCHITECTURES = {
    "llama": Architecture("LlamaForCausalLM", "LlamaConfig", {**TEXT, **GROUPED}, "model.layers"),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT_2, "transformer.h"),
    "qwen2": Architecture("Qwen2ForCausalLM", "Qwen2Config", {**TEXT, **GROUPED}, "model.layers"),
    "mistral": Architecture("MistralForCausalLM", "MistralConfig", {**TEXT, **GROUPED}, "model.layers"),
    "gpt-neox": Architecture("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT, "gpt_neox.layers"),
    "opt": Architecture("OPTForCausalLM", "OPTConfig", {**OPT, "num_attention_heads": 2}, "model.decoder.layers"),
    "phi": Architecture("PhiForCausalLM", "PhiConfig", TEXT, "model.layers"),
    "gemma2": Architecture("Gemma2ForCausalLM", "Gemma2Config", {**TEXT, **GROUPED, "head_dim": 8}, "model.layers"),
    "bloom": Architecture(
        "BloomForCausalLM", "BloomConfig", {**WORDS, "hidden_size": 16, "n_layer": 4, "n_head": 2}, "transformer.h"
    ),
    "falcon": Architecture("FalconForCausalLM", "FalconConfig", TEXT, "transformer.h"),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        "MixtralConfig",
        {**TEXT, **GROUPED, "num_local_experts": 2},
        "model.layers",
        # What experts are fused into is adapted by none.
        targets=["q_proj", "k_proj", "v_proj", "o_proj"],
    ),
    "llama classifier": text_classifier(
        "LlamaForSequenceClassification", "LlamaConfig", {**CLASSES, **GROUPED}, "model.layers", ("score",)
    ),
    "gpt2 classifier": text_classifier(
        "GPT2ForSequenceClassification", "GPT2Config", {**GPT_2, "num_labels": LABELS}, "transformer.h", ("score",)
    ),
    "bert": text_classifier(
        "BertForSequenceClassification", "BertConfig", CLASSES, "bert.encoder.layer", ("classifier",)
    ),
    "roberta": text_classifier(
        "RobertaForSequenceClassification", "RobertaConfig", CLASSES, "roberta.encoder.layer", ("classifier",)
    ),
    "distilbert": text_classifier(
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {**DISTILBERT, "num_labels": LABELS, "max_position_embeddings": 64},
        "distilbert.transformer.layer",
        ("pre_classifier", "classifier"),
    ),
    "electra": text_classifier(
        "ElectraForSequenceClassification",
        "ElectraConfig",
        {**CLASSES, "embedding_size": 8},
        "electra.encoder.layer",
        ("classifier",),
    ),
    "deberta": text_classifier(
        "DebertaForSequenceClassification",
        "DebertaConfig",
        {**CLASSES, **RELATIVE},
        "deberta.encoder.layer",
        ("pooler", "classifier"),
    ),
    # Queries and keys of positions come from the layers that rows go through: one row for all members.
    "deberta-v2": text_classifier(
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        {**CLASSES, **RELATIVE, **SHARED_POSITIONS, "position_biased_input": False},
        "deberta.encoder.layer",
        ("pooler", "classifier"),
    ),
    "modernbert": text_classifier(
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        {**CLASSES, "local_attention": 4, "global_attn_every_n_layers": 2},
        "model.layers",
        ("head", "classifier"),
    ),
    "bert tagger": text_classifier(
        "BertForTokenClassification",
        "BertConfig",
        CLASSES,
        "bert.encoder.layer",
        ("classifier",),
        task="token-classification",
        rows=tagged_rows,
    ),
    # Sequences before rows: (positions, rows, features).
    "xlnet": text_classifier(
        "XLNetForSequenceClassification",
        "XLNetConfig",
        dict(vocab_size=VOCABULARY, pad_token_id=PAD, d_model=16, n_layer=4, n_head=2, d_inner=32, num_labels=LABELS),
        "transformer.layer",
        ("sequence_summary", "logits_proj"),
    ),
    "vit": image_classifier("ViTForImageClassification", "ViTConfig", IMAGES, "vit.layers", ("classifier",)),
    "deit": image_classifier("DeiTForImageClassification", "DeiTConfig", IMAGES, "deit.layers", ("classifier",)),
    "beit": image_classifier("BeitForImageClassification", "BeitConfig", IMAGES, "beit.layers", ("classifier",)),
    "dinov2": image_classifier(
        "Dinov2ForImageClassification", "Dinov2Config", IMAGES, "dinov2.encoder.layer", ("classifier",)
    ),
    # A layer is a stage of the hierarchy here; attention is over windows.
    "swin": image_classifier(
        "SwinForImageClassification",
        "SwinConfig",
        dict(image_size=8, patch_size=1, embed_dim=8, depths=[1, 2], num_heads=[2, 2], window_size=4, num_labels=3),
        "swin.encoder.layers",
        ("classifier",),
        depth=2,
    ),
    "wav2vec2": audio_classifier(
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        {**SPEECH, "mask_time_prob": 0.0},
        "wav2vec2.encoder.layers",
        ("projector", "classifier"),
    ),
    "spectrogram transformer": audio_classifier(
        "ASTForAudioClassification",
        "ASTConfig",
        {**SIZES, **SPECTROGRAM, "num_labels": LABELS},
        "audio_spectrogram_transformer.layers",
        ("classifier",),
        rows=lambda: sounds(8, 8),
    ),
    # Its config says that it is an encoder-decoder; the classifier is the encoder with a head.
    "whisper": audio_classifier(
        "WhisperForAudioClassification",
        "WhisperConfig",
        WHISPER,
        "encoder.layers",
        ("projector", "classifier"),
        rows=lambda: sounds(8, 16, name="input_features"),
    ),
    "llava, as many layers for pictures": Architecture(
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "vision_config": {**SIZES, "image_size": IMAGE_SIZE, "patch_size": 4, "model_type": "clip_vision_model"},
            "text_config": {**TEXT, **GROUPED, "model_type": "llama"},
            "image_token_id": 50,
        },
        "model.language_model.layers",
        targets=r".*language_model.*\.(q_proj|v_proj)",
    ),
}


def config(**changes):
    settings = dict(num_shards=2, budget=1, sequence_selection=[[0, 1]], partition="balanced")
    return s3t_config(**{**settings, **changes})


def lora(architecture: Architecture) -> LoraConfig:
    return LoraConfig(r=2, lora_alpha=4, target_modules=architecture.targets)


# Finding


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_layers_head_and_task_are_found(name):
    architecture = ARCHITECTURES[name]
    model = architecture.fresh()
    path, layers = find_layers(model)
    assert (path, len(layers)) == (architecture.layers, architecture.depth)
    assert find_head(model, path) == architecture.head
    assert find_task(model) == architecture.task


# The whole loop


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_trains_serves_forgets_and_is_loaded_again(tmp_path, name):
    architecture = ARCHITECTURES[name]
    rows, pristine = architecture.rows(), architecture.fresh()
    trainer = make_trainer(
        tmp_path,
        architecture.fresh(),
        rows,
        config=config(),
        peft_config=lora(architecture),
        args=training_arguments(tmp_path, max_steps=2, learning_rate=5e-2),
    )
    trainer.train()
    model = trainer.s3t_model
    layers = pristine.get_submodule(architecture.layers)
    groups = [range(len(layers) // 2, len(layers)), range(len(layers) // 2)]

    # Each stage has tensors in every one of its layers and in the head, and nowhere else.
    for depth, stage in enumerate(("0", "0-1")):
        tensors = load_file(tmp_path / "stages" / "shard-1" / stage / "adapter_model.safetensors")
        names = {name.removeprefix("base_model.model.") for name in tensors}
        places = (
            *(f"{architecture.layers}.{index}." for index in groups[depth]),
            *(f"{h}." for h in architecture.head),
        )
        assert all(name.startswith(places) for name in names)
        assert all(any(name.startswith(place) for name in names) for place in places)
        changed = [name for name, tensor in tensors.items() if "lora_B" in name and tensor.abs().max() > 0]
        assert changed, "the adapter was not trained"

    # The base is what it was.
    base = plain(trainer.model.state_dict())
    for name, tensor in pristine.state_dict().items():
        if not name.startswith(tuple(f"{h}." for h in architecture.head)):
            assert torch.equal(base[name], tensor), name

    # What serves equals plain PEFT, one shard at a time.
    batch = batch_of(rows[:4])
    labels = batch.pop("labels")
    members = [[naive_member(architecture.fresh(), tmp_path, shard, (0, 1))] for shard in range(2)]
    how = "mean_logits" if architecture.head else "mean_probabilities"
    expected = naive_ensemble(members, how, batch)
    answer = model(**batch, labels=labels)
    assert difference(answer.logits, expected) <= TOLERANCE
    one, other = (naive_ensemble([member], how, batch) for member in members)
    assert difference(one, other) > 100 * TOLERANCE
    if architecture.head:
        loss = F.cross_entropy(expected.flatten(0, -2), labels.flatten())
    else:
        loss = F.cross_entropy(expected[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert answer.loss.item() == pytest.approx(loss.item(), abs=TOLERANCE)
    evaluated = trainer.evaluate(Dataset.from_list(rows[:4]))["eval_loss"]
    if model.loss_type is None:
        # Trainer divides by the number of all labels where a class's name does not say that its loss shifts them.
        evaluated *= labels.shape[1] / (labels.shape[1] - 1)
    assert evaluated == pytest.approx(loss.item(), abs=TOLERANCE)

    # One example less: one shard is left at its first stage, here and in a copy that is loaded.
    place = {where: example for example, where in model.locate([row["id"] for row in rows]).items()}
    assert model.unlearn([place[0, 1]]).depths_after == [1, 2]
    shorter = [[naive_member(architecture.fresh(), tmp_path, 0, (0,))], members[1]]
    assert difference(model(**batch).logits, naive_ensemble(shorter, how, batch)) <= TOLERANCE
    again = S3TModel.from_pretrained(tmp_path, base_model=architecture.fresh())
    assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert again.check() == []


@pytest.mark.parametrize("name", [n for n, a in ARCHITECTURES.items() if a.task == "text-generation"])
def test_language_models_generate(tmp_path, name):
    """With the cache as without it, in every way to choose, with padding on the left."""
    architecture = ARCHITECTURES[name]
    trainer = make_trainer(tmp_path, architecture.fresh(), lm_rows(8), config=config(), peft_config=lora(architecture))
    plant_stages(trainer)
    model = trainer.s3t_model
    batch = batch_of(lm_rows(3))
    batch["input_ids"][0, :3] = PAD
    prompt = dict(inputs=batch["input_ids"], attention_mask=(batch["input_ids"] != PAD).long())
    for settings in ({"do_sample": False}, {"num_beams": 3, "do_sample": False}):
        cached = model.generate(**prompt, max_new_tokens=5, **settings)
        assert torch.equal(cached, model.generate(**prompt, max_new_tokens=5, use_cache=False, **settings))
    # Greedily, each token is the likeliest after what is before it.
    greedy = model.generate(batch["input_ids"][1:], max_new_tokens=4, do_sample=False, eos_token_id=None)
    for end in range(8, 12):
        assert torch.equal(greedy[:, end], model(input_ids=greedy[:, :end]).logits[:, -1].argmax(-1))


# Models nobody has heard of


class OwnConfig(PreTrainedConfig):
    model_type = "a model of one's own"

    def __init__(self, depth: int = 4, width: int = 16, vocab_size: int = VOCABULARY, **kwargs):
        super().__init__(**kwargs)
        self.depth = depth
        self.width = width
        self.vocab_size = vocab_size


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


class Backbone(nn.Module):
    def __init__(self, config, blocks: str = "blocks"):
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.width)
        setattr(self, blocks, nn.ModuleList(Block(config.width) for _ in range(config.depth)))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return self.norm(x).mean(1)


class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    main_input_name = "input_ids"

    def answer(self, logits, labels):
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class Nested(OwnModel):
    """A backbone whose layer list is called `blocks`, and a head called `decision`."""

    def __init__(self, config):
        super().__init__(config)
        self.trunk = Backbone(config)
        self.decision = nn.Sequential(
            nn.Linear(config.width, config.width), nn.Tanh(), nn.Linear(config.width, LABELS)
        )
        self.post_init()

    def forward(self, input_ids, labels=None, **ignored):
        return self.answer(self.decision(self.trunk(input_ids)), labels)


class Flat(OwnModel):
    """The same with all parts in the model itself, and a parameter of its own."""

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.scale = nn.Parameter(torch.full((1,), 1.5))
        self.blocks = nn.ModuleList(Block(config.width) for _ in range(config.depth))
        self.final = nn.LayerNorm(config.width)
        self.decision = nn.Linear(config.width, LABELS)
        self.post_init()

    def forward(self, input_ids, labels=None, **ignored):
        x = self.embed(input_ids) * self.scale
        for block in self.blocks:
            x = block(x)
        return self.answer(self.decision(self.final(x).mean(1)), labels)


class TwoLists(OwnModel):
    """Beside the layers another list of the same name, with modules of the same names."""

    def __init__(self, config):
        super().__init__(config)
        self.trunk = Backbone(config)
        self.trunk.before = nn.Module()
        self.trunk.before.blocks = nn.ModuleList(Block(config.width) for _ in range(2))
        self.decision = nn.Linear(config.width, LABELS)
        self.post_init()

    def forward(self, input_ids, labels=None, **ignored):
        x = self.trunk.embed(input_ids)
        for block in (*self.trunk.before.blocks, *self.trunk.blocks):
            x = block(x)
        return self.answer(self.decision(self.trunk.norm(x).mean(1)), labels)


class PositionsFirst(OwnModel):
    """Works on (positions, rows, features), and gives the head rows by name."""

    def __init__(self, config):
        super().__init__(config)
        self.trunk = Backbone(config)
        self.decision = nn.Linear(config.width, LABELS)
        self.post_init()

    def forward(self, input_ids, labels=None, **ignored):
        x = self.trunk.embed(input_ids.T)
        for block in self.trunk.blocks:
            x = block(x)
        return self.answer(self.decision(input=self.trunk.norm(x).mean(0)), labels)


def own(cls: type, **settings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(OwnConfig(num_labels=LABELS, **settings)).eval()


@pytest.mark.parametrize("cls", [Nested, Flat, TwoLists, PositionsFirst], ids=lambda cls: cls.__name__)
def test_a_model_of_ones_own(tmp_path, cls):
    model, pristine = own(cls), own(cls)
    path = "blocks" if cls is Flat else "trunk.blocks"
    assert find_layers(model)[0] == path
    assert find_head(model, path) == ("decision",)
    rows = [{k: v for k, v in row.items() if k != "attention_mask"} for row in classification_rows()]
    trainer = make_trainer(
        tmp_path,
        model,
        rows,
        config=config(),
        peft_config=LoraConfig(r=2, target_modules=r"(trunk\.)?blocks\.\d+\.(up|down)"),
        args=training_arguments(tmp_path, max_steps=2, learning_rate=5e-2),
    )
    trainer.train()
    # Nothing but the head is initialised and trained: embeddings, norms and loose parameters are the base's.
    kept = {name: tensor for name, tensor in pristine.state_dict().items() if not name.startswith("decision.")}
    assert len(kept) > 20
    for name, tensor in kept.items():
        assert torch.equal(plain(trainer.model.state_dict())[name], tensor), name
    for file in tmp_path.glob("stages/*/*/adapter_model.safetensors"):
        names = [name.removeprefix("base_model.model.") for name in load_file(file)]
        assert all(name.startswith((f"{path}.", "decision.")) for name in names)
    batch = batch_of(rows[:4])
    labels = batch.pop("labels")
    members = [[naive_member(own(cls), tmp_path, shard, (0, 1))] for shard in range(2)]
    expected = naive_ensemble(members, "mean_logits", batch)
    served = S3TModel.from_pretrained(tmp_path, base_model=own(cls))
    for candidate in (trainer.s3t_model, served):
        # Several batch sizes: also one where positions and rows cannot be told apart by their number.
        for rows_in_batch in (4, 2, 1):
            some = {name: value[:rows_in_batch] for name, value in batch.items()}
            assert difference(candidate(**some).logits, expected[:rows_in_batch]) <= TOLERANCE
        # Transformers knows no loss for this class; it is a classifier's.
        loss = candidate(**batch, labels=labels).loss
        assert loss.item() == pytest.approx(F.cross_entropy(expected, labels).item(), abs=TOLERANCE)


def plain(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a base, some of whose modules may be wrapped by PEFT, under the names they had before."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): tensor
        for name, tensor in state.items()
        if ".shard" not in name
    }


class TwinTowers(OwnModel):
    """Two lists of the same length: which one is meant?"""

    def __init__(self, config):
        super().__init__(config)
        self.trunk = Backbone(config)
        self.trunk.others = nn.ModuleList(Block(config.width) for _ in range(config.depth))
        self.decision = nn.Linear(config.width, LABELS)
        self.post_init()

    def forward(self, input_ids, labels=None, **ignored):
        x = self.trunk.embed(input_ids)
        for block in (*self.trunk.others, *self.trunk.blocks):
            x = block(x)
        return self.answer(self.decision(self.trunk.norm(x).mean(1)), labels)


def test_of_two_lists_the_user_names_one(tmp_path):
    """The error says how, and that works."""
    rows = [{k: v for k, v in row.items() if k != "attention_mask"} for row in classification_rows()]
    with pytest.raises(LayersNotFoundError, match=r"layers_pattern.*layers_to_transform") as error:
        make_trainer(tmp_path, own(TwinTowers), rows, peft_config=LoraConfig(target_modules=["up"]))
    assert "trunk.blocks" in str(error.value) and "trunk.others" in str(error.value)
    assert not list(tmp_path.iterdir())
    named = LoraConfig(
        r=2,
        target_modules=["up"],
        exclude_modules=r"trunk\.blocks\..*",
        layers_pattern="others",
        layers_to_transform=[],
    )
    trainer = make_trainer(tmp_path, own(TwinTowers), rows, peft_config=named, config=config())
    plant_stages(trainer)
    names = load_file(tmp_path / "stages/shard-0/0/adapter_model.safetensors")
    assert all("trunk.others." in name or "decision." in name for name in names)
    loaded = S3TModel.from_pretrained(tmp_path, base_model=own(TwinTowers))
    batch = batch_of(rows[:3])
    assert torch.equal(loaded(**batch).logits, trainer.s3t_model(**batch).logits)


# One pass for all members, or one each


def passes(model: S3TModel, batch: dict[str, torch.Tensor]) -> list[int]:
    """How many rows the base was given in each pass of a call."""
    rows = []
    hook = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(len(kwargs[model.main_input_name])), with_kwargs=True
    )
    model(**batch)
    hook.remove()
    return rows


@pytest.mark.parametrize(
    ("name", "tried", "expected"),
    [("bert", [4, 4], [6]), ("swin", [4, 4], [6]), ("xlnet", [], [3, 3]), ("deberta-v2", [], [3, 3])],
)
def test_members_share_a_pass_where_modules_take_rows_first(tmp_path, name, tried, expected):
    architecture = ARCHITECTURES[name]
    rows = architecture.rows()
    trainer = make_trainer(tmp_path, architecture.fresh(), rows, config=config(), peft_config=lora(architecture))
    plant_stages(trainer)
    batch = batch_of([{name: value for name, value in row.items() if name != "labels"} for row in rows[:3]])
    # The first call looks at the architecture, with one row and with two, and where members share a pass at their
    # trunk, with two rows each, in both ways; others do not.
    assert passes(trainer.s3t_model, batch) == [1, 2, *tried, *expected]
    assert passes(trainer.s3t_model, batch) == expected


def test_members_that_answer_in_turn_cannot_share_a_cache(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, tiny_llama(2), config=config())
    plant_stages(trainer)
    model, batch = trainer.s3t_model, batch_of(lm_rows(2))
    del batch["labels"]
    cache = model(**batch, use_cache=True).past_key_values
    expected = model(**batch).logits
    monkeypatch.setattr("hf_s3t.model.shared_pass.SharedPass.is_possible", lambda *given: False)
    assert difference(model(**batch).logits, expected) <= TOLERANCE
    with pytest.raises(S3TError, match="use_cache=False"):
        model(**batch, past_key_values=cache)
    assert model.generate(**batch, max_new_tokens=2, use_cache=False).shape == (2, 10)


def test_a_module_that_is_given_some_of_the_rows_is_refused(tmp_path, monkeypatch):
    """Experts are: rows of several members would be taken for one another's."""

    class Choosy(Block):
        def forward(self, x):
            chosen = x.mean((1, 2)) > x.mean()
            x = x.clone()
            x[chosen] = x[chosen] + self.down(F.gelu(self.up(self.norm(x[chosen]))))
            return x

    model = own(Nested)
    for block in model.trunk.blocks:
        block.__class__ = Choosy
    rows = [{k: v for k, v in row.items() if k != "attention_mask"} for row in classification_rows()]
    trainer = make_trainer(
        tmp_path, model, rows, config=config(), peft_config=LoraConfig(r=2, target_modules=["up", "down"])
    )
    plant_stages(trainer)
    served = trainer.s3t_model
    monkeypatch.setattr("hf_s3t.model.shared_pass.SharedPass.is_possible", lambda *given: True)
    with pytest.raises(S3TError, match="target_modules"):
        for count in range(3, 9):
            served(**batch_of(rows[:count]))


# What must be refused


SHARED = {**CLASSES, "embedding_size": 8}
CONVOLUTIONS = dict(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=LABELS)
T5 = dict(vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
BART = dict(
    d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, **WORDS
)
FUNNEL = dict(vocab_size=VOCABULARY, block_sizes=[2, 2], d_model=16, n_head=2, d_head=8, d_inner=32, num_labels=LABELS)


class Sequence(OwnModel):
    """Layers that are in no list."""

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.Sequential(*(Block(config.width) for _ in range(config.depth)))
        self.decision = nn.Linear(config.width, LABELS)
        self.post_init()

    def forward(self, input_ids, labels=None, **ignored):
        return self.answer(self.decision(self.layers(self.embed(input_ids)).mean(1)), labels)


class LooseHead(Nested):
    """A head that is a parameter of the model itself."""

    def __init__(self, config):
        super().__init__(config)
        self.bias = nn.Parameter(torch.zeros(LABELS))


class Namesake(Nested):
    """A module inside a layer with the name of the head."""

    def __init__(self, config):
        super().__init__(config)
        self.trunk.blocks[0].decision = nn.Linear(config.width, config.width)


class Attention(Nested):
    """A layer with attention of PyTorch, which is no linear layer."""

    def __init__(self, config):
        super().__init__(config)
        for block in self.trunk.blocks:
            block.attention = nn.MultiheadAttention(config.width, 2)


def carrying(model: nn.Module, merged: bool = False) -> nn.Module:
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
    if merged:
        adapted.merge_adapter()
    return adapted if merged else adapted.base_model.model


REFUSED = {
    "layers shared across depth": (
        lambda: build("AlbertForSequenceClassification", "AlbertConfig", **SHARED),
        {},
        IsolationError,
        "shared across depth",
    ),
    "encoder-decoder": (
        lambda: build("T5ForConditionalGeneration", "T5Config", **T5),
        {},
        IsolationError,
        "encoder-decoder",
    ),
    "encoder-decoder classifier": (
        lambda: build("BartForSequenceClassification", "BartConfig", **BART, num_labels=LABELS),
        {},
        IsolationError,
        "encoder-decoder",
    ),
    "batch norm": (
        lambda: build("ResNetForImageClassification", "ResNetConfig", **CONVOLUTIONS),
        {},
        IsolationError,
        "batch norm",
    ),
    "lists of lists": (
        lambda: build("FunnelForSequenceClassification", "FunnelConfig", **FUNNEL),
        {},
        LayersNotFoundError,
        "encoder.blocks",
    ),
    "layers in no list": (lambda: own(Sequence), {}, LayersNotFoundError, "no list of transformer layers"),
    "a head outside any module": (lambda: own(LooseHead), {}, LayersNotFoundError, "bias"),
    "a layer's module named like the head": (lambda: own(Namesake), {}, LayersNotFoundError, "blocks.0.decision"),
    "attention that is no linear layer": (
        lambda: own(Attention),
        {"target_modules": ["up", "attention"]},
        LayersNotFoundError,
        "MultiheadAttention",
    ),
    "targets that match nothing": (
        lambda: tiny_bert(2),
        {"target_modules": ["q_proj"]},
        LayersNotFoundError,
        r"matches nothing in layers \(1,\).*attention.self.query",
    ),
    "targets that match nothing in one group": (
        lambda: tiny_bert(2),
        {"target_modules": r".*layer\.1\.attention\.self\.query"},
        LayersNotFoundError,
        r"matches nothing in layers \(0,\)",
    ),
    "embeddings as a target": (
        lambda: tiny_bert(2),
        {"target_modules": ["word_embeddings"]},
        LayersNotFoundError,
        "matches bert.embeddings.word_embeddings outside the transformer layers",
    ),
    "adapters on the base": (lambda: carrying(tiny_bert(2)), {}, IsolationError, "adapters"),
    "adapters merged into the base": (lambda: carrying(tiny_bert(2), merged=True), {}, IsolationError, "adapters"),
    "another part trained in full": (
        lambda: tiny_bert(2),
        {"target_modules": ["query"], "modules_to_save": ["pooler"]},
        IsolationError,
        "pooler",
    ),
    "trainable biases": (
        lambda: tiny_bert(2),
        {"target_modules": ["query"], "bias": "lora_only"},
        IsolationError,
        "bias",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(tmp_path, name):
    make, peft, error, match = REFUSED[name]
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(error, match=match):
        make_trainer(
            tmp_path,
            model,
            classification_rows(),
            peft_config=LoraConfig(**{"r": 2, "target_modules": "all-linear", **peft}),
        )
    assert not list(tmp_path.iterdir())
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert trainable == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_a_head_named_in_modules_to_save_is_no_mistake(tmp_path):
    """It is trained anyway."""
    peft = LoraConfig(r=2, target_modules=["query"], modules_to_save=["classifier"])
    trainer = make_trainer(tmp_path, tiny_bert(2), config=config(), peft_config=peft)
    plant_stages(trainer)
    names = load_file(tmp_path / "stages/shard-0/0/adapter_model.safetensors")
    assert {name for name in names if "classifier" in name} == {
        "base_model.model.classifier.weight",
        "base_model.model.classifier.bias",
    }


def test_another_architecture_is_no_base_of_a_system(tmp_path):
    architecture, other = ARCHITECTURES["bert"], ARCHITECTURES["roberta"]
    trainer = make_trainer(tmp_path, architecture.fresh(), config=config(), peft_config=lora(architecture))
    plant_stages(trainer)
    with pytest.raises(S3TError):
        S3TModel.from_pretrained(tmp_path, base_model=other.fresh())
    # The same architecture with other weights is told apart by its digest.
    weights = build(architecture.model, architecture.config, seed=1, **architecture.settings)
    with pytest.raises(S3TError, match="not the one"):
        S3TModel.from_pretrained(tmp_path, base_model=weights)


def test_many_slices_keep_their_adapters_apart(tmp_path):
    """Slices 1 and 10, stages 1 and 1-0: names that contain each other."""
    sequence = [1, 0, 10, *range(2, 10)]
    trainer = make_trainer(
        tmp_path,
        tiny_bert(11),
        classification_rows(33),
        config=config(
            num_shards=1, num_slices=11, budget=2, sequence_selection=[sequence, [10, *sequence[:2], *range(2, 10)]]
        ),
        peft_config=LoraConfig(r=2, target_modules=["query"]),
    )
    plant_stages(trainer, limit=14)
    model = S3TModel.from_pretrained(tmp_path, base_model=tiny_bert(11), preload="all")
    assert len(model.stack.loaded) == 14
    for key in model.stack.loaded:
        written = load_file(Path(tmp_path) / key.path / "adapter_model.safetensors")
        held = model.stack.tensors(key)
        assert held.keys() == written.keys() and all(torch.equal(held[name], written[name]) for name in written)
    inputs = batch_of(classification_rows(2))
    del inputs["labels"]
    expected = naive_member(tiny_bert(11), tmp_path, 0, tuple(sequence))(**inputs).logits
    assert difference(model(**inputs).logits, expected) <= TOLERANCE


# Answers that are spans


def spans(count: int = 16) -> list[dict[str, Any]]:
    rows = [{n: v for n, v in row.items() if n != "labels"} for row in classification_rows(count)]
    return [{**row, "start_positions": n % 7, "end_positions": n % 7 + 1} for n, row in enumerate(rows)]


QUESTIONS = {
    "bert": ("BertForQuestionAnswering", "BertConfig", TEXT),
    "distilbert": (
        "DistilBertForQuestionAnswering",
        "DistilBertConfig",
        {**DISTILBERT, "max_position_embeddings": 64},
    ),
}


@pytest.mark.parametrize("aggregation", ["mean_logits", "mean_probabilities"])
@pytest.mark.parametrize("name", QUESTIONS)
def test_where_an_answer_begins_and_where_it_ends_are_aggregated_each_by_itself(tmp_path, name, aggregation):
    make, rows = partial(build, QUESTIONS[name][0], QUESTIONS[name][1], **QUESTIONS[name][2]), spans()
    trainer = make_trainer(
        tmp_path / "system",
        make(),
        rows,
        config=config(aggregation=aggregation),
        peft_config=LoraConfig(r=2, lora_alpha=4, target_modules="all-linear"),
        args=training_arguments(tmp_path / "system", max_steps=2, learning_rate=5e-2),
    )
    trainer.train()
    model = trainer.s3t_model
    assert find_task(model.base_model) == "question-answering" and model.stack.head == ("qa_outputs",)
    batch = batch_of(rows[:4])
    asked = {name: value for name, value in batch.items() if not name.endswith("_positions")}

    def expected(answers, field: str) -> torch.Tensor:
        stacked = torch.stack([answer[field] for answer in answers])
        if aggregation == "mean_logits" or len(answers) == 1:
            return stacked.mean(0)
        return stacked.softmax(-1).mean(0).log()

    def check(depths) -> None:
        # Not told which is which: plain PEFT on each exported shard.
        answers = []
        for shard, depth in enumerate(depths):
            if depth:
                folder = tmp_path / f"depths {depths}" / f"{shard}"
                model.export_adapter(shard, folder)
                with torch.no_grad():
                    answers.append(PeftModel.from_pretrained(make(), folder).eval()(**asked))
        answer = model(**batch)
        start, end = expected(answers, "start_logits"), expected(answers, "end_logits")
        assert difference(answer.start_logits, start) <= TOLERANCE and difference(answer.end_logits, end) <= TOLERANCE
        wanted = [F.cross_entropy(start, batch["start_positions"]), F.cross_entropy(end, batch["end_positions"])]
        assert answer.loss.item() == pytest.approx(sum(wanted).item() / 2, abs=TOLERANCE)
        assert model(**asked).loss is None
        assert trainer.evaluate(Dataset.from_list(rows[:4]))["eval_loss"] == pytest.approx(
            answer.loss.item(), abs=1e-5
        )

    check([2, 2])
    predicted = trainer.predict(Dataset.from_list(rows[:4])).predictions
    assert [part.shape for part in predicted] == [(4, 8), (4, 8)]
    place = {where: example for example, where in model.locate([row["id"] for row in rows]).items()}
    assert model.unlearn([place[0, 1]]).depths_after == [1, 2]
    check([1, 2])
    assert model.unlearn([place[1, 0]]).depths_after == [1, 0]
    check([1, 0])
    again = S3TModel.from_pretrained(tmp_path / "system", base_model=make())
    assert torch.equal(again(**asked).end_logits, model(**asked).end_logits)
