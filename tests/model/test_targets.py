"""What PEFT would adapt by a config, stages adapt in their layers, or it is refused by name: nothing is left out."""

import re
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from safetensors.torch import load_file
from support.refusals import digest_of
from support.tiny import (
    build,
    classification_rows,
    lm_rows,
    lora,
    make_trainer,
    plant_stages,
    s3t_config,
    tiny_bert,
    tiny_gpt2,
    tiny_llama,
    tiny_llava,
    tiny_qwen2,
    tiny_roberta,
    tiny_vit,
)

from hf_s3t.errors import ConfigError, LayersNotFoundError


pytestmark = pytest.mark.usefixtures("one_thread")


SMALL = dict(
    vocab_size=60, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, head_dim=8,
)  # fmt: skip


def qwen3_moe(**changes):
    experts = dict(moe_intermediate_size=8, num_experts=2, num_experts_per_tok=1)
    return build("Qwen3MoeForCausalLM", "Qwen3MoeConfig", **{**SMALL, **experts, **changes})


def mixtral():
    return build("MixtralForCausalLM", "MixtralConfig", **SMALL, num_local_experts=2, num_experts_per_tok=1)


def mamba():
    return build("MambaForCausalLM", "MambaConfig", vocab_size=60, hidden_size=16, num_hidden_layers=2, state_size=4)


def plainly_adapted(make, **config) -> set[str]:
    """What plain PEFT adapts."""
    plain = get_peft_model(make(), LoraConfig(r=2, **config))
    names = {name for name, module in plain.base_model.model.named_modules() if isinstance(module, LoraLayer)}
    return {name.replace(".base_layer", "") for name in names}


def construct(tmp_path, make, **config):
    model = make()
    rows = lm_rows(12) if model.get_output_embeddings() is not None else classification_rows(12)
    if model.main_input_name == "pixel_values":
        rows = None
    return make_trainer(tmp_path / "system", model, rows, peft_config=LoraConfig(r=2, **config))


def stage_targets(trainer) -> set[str]:
    return {name for group in trainer._stack._targets for name in group}


# What stages adapt is what PEFT adapts


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (tiny_llama, {"target_modules": ["q_proj", "v_proj"]}),
        (tiny_llama, {"target_modules": r".*\.(q_proj|up_proj)"}),
        (tiny_llama, {"target_modules": "all-linear"}),
        (tiny_llama, {"target_modules": "All-Linear"}),
        (tiny_llama, {"target_modules": "all-linear", "exclude_modules": ["o_proj"]}),
        (tiny_llama, {"target_modules": ["q_proj", "lm_head"], "exclude_modules": ["lm_head"]}),
        (tiny_llama, {"target_modules": ["q_proj"], "rank_pattern": {"layers.3.self_attn.q_proj": 4}}),
        (tiny_qwen2, {"target_modules": "all-linear"}),
        (tiny_gpt2, {"target_modules": ["c_attn", "mlp.c_proj"]}),
        (tiny_gpt2, {"target_modules": None}),
        (tiny_bert, {"target_modules": ["query", "attention.output.dense"]}),
        (tiny_bert, {"target_modules": ["query", "dense"], "exclude_modules": ["pooler.dense"]}),
        (tiny_bert, {"target_modules": "all-linear", "modules_to_save": ["classifier"],
            "exclude_modules": ["pooler.dense"]}),
        (tiny_roberta, {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
        (tiny_vit, {"target_modules": "all-linear", "modules_to_save": ["classifier"]}),
        (qwen3_moe, {"target_modules": ["q_proj", "o_proj"]}),
        (mixtral, {"target_modules": ["q_proj", "v_proj"]}),
        (mamba, {"target_modules": "all-linear", "exclude_modules": ["out_proj"]}),
        (tiny_llava, {"target_modules": r".*language_model.*\.(q_proj|v_proj)"}),
        (tiny_llava, {"target_modules": ["q_proj"], "exclude_modules": r"(?!model\.language_model\.layers\.).*"}),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else value.__name__,
)  # fmt: skip
def test_stages_adapt_together_what_peft_adapts(make, config, tmp_path):
    assert stage_targets(construct(tmp_path, make, **config)) == plainly_adapted(make, **config)


# What they do not is refused


@pytest.mark.parametrize(
    ("make", "config", "left_out"),
    [
        (tiny_llama, {"target_modules": ["q_proj", "lm_head"]}, ["lm_head"]),
        (tiny_llama, {"target_modules": ["lm_head"]}, ["lm_head"]),
        (tiny_qwen2, {"target_modules": ["q_proj", "lm_head"]}, ["lm_head"]),
        (tiny_llama, {"target_modules": ["v_proj", "embed_tokens"]}, ["model.embed_tokens"]),
        (tiny_llama, {"target_modules": r".*(q_proj|lm_head)"}, ["lm_head"]),
        (tiny_gpt2, {"target_modules": ["c_attn", "wte", "wpe"]}, ["transformer.wpe", "transformer.wte"]),
        (tiny_bert, {"target_modules": ["query", "pooler.dense"]}, ["bert.pooler.dense"]),
        (tiny_bert, {"target_modules": ["query", "dense"]}, ["bert.pooler.dense"]),
        (tiny_bert, {"target_modules": ["query", "classifier"]}, ["classifier"]),
        (tiny_bert, {"target_modules": ["query", "word_embeddings"]}, ["bert.embeddings.word_embeddings"]),
        (tiny_vit, {"target_modules": ["q_proj", "patch_embeddings.projection"]},
            ["vit.embeddings.patch_embeddings.projection"]),
        (qwen3_moe, {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
            ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]),
        (qwen3_moe, {"target_modules": ["q_proj", "gate"]}, ["model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]),
        (qwen3_moe, {"target_modules": r".*\.(q_proj|gate_proj|up_proj)"}, ["model.layers.0.mlp.experts"]),
        # In a model with dense layers too, whose modules have the names of the experts.
        (lambda: qwen3_moe(mlp_only_layers=[0]), {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"]},
            ["model.layers.1.mlp.experts"]),
        (mixtral, {"target_modules": ["q_proj", "w1", "w2", "w3"]}, ["model.layers.0.mlp.experts"]),
        (mixtral, {"target_modules": "all-linear"}, ["model.layers.0.mlp.experts", "model.layers.0.mlp.gate"]),
        (qwen3_moe, {"target_modules": "all-linear"}, ["model.layers.1.mlp.experts", "model.layers.0.mlp.gate"]),
        # A tower of pictures has layers of its own, with modules of the same names.
        (
            tiny_llava,
            {"target_modules": ["q_proj", "v_proj"]},
            ["model.vision_tower.encoder.layers.0.self_attn.q_proj"],
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None) or str(value),
)  # fmt: skip
def test_what_peft_would_adapt_and_stages_do_not_is_refused_by_name(make, config, left_out, tmp_path):
    assert set(left_out) <= plainly_adapted(make, **config)
    model = make()
    before = digest_of(model)
    with pytest.raises(LayersNotFoundError) as caught:
        construct(tmp_path, lambda: model, **config)
    assert all(name in str(caught.value) for name in left_out)
    assert re.search(r"exclude_modules=|Give `target_modules=", str(caught.value))
    assert digest_of(model) == before and not (tmp_path / "system").exists()


@pytest.mark.parametrize("make", [tiny_llama, tiny_bert, qwen3_moe, tiny_llava])
def test_the_remedy_of_a_refusal_is_one(make, tmp_path):
    """What the message says to write is accepted, and adapts what PEFT adapts by it."""
    asked = {"q_proj", "lm_head", "gate_proj", "up_proj", "down_proj"} if make is not tiny_bert else {"query", "dense"}
    with pytest.raises(LayersNotFoundError) as caught:
        construct(tmp_path, make, target_modules=asked)
    said = str(caught.value)
    remedies = {
        field: re.search(rf"`{field}=(r?[\"\[].*?[\"\]])`", said)[1]
        for field in ("target_modules", "exclude_modules")
        if f"`{field}=" in said
    }
    mended: dict[str, Any] = {"target_modules": asked, **{field: eval(text) for field, text in remedies.items()}}
    assert stage_targets(construct(tmp_path, make, **mended)) == plainly_adapted(make, **mended)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        ({"target_modules": ["q_proj", "vproj"]}, "`target_modules` names 'vproj'.*nearest: v_proj"),
        ({"target_modules": ["q_proj", "query", "value"]}, "`target_modules` names 'query', 'value'"),
        ({"target_modules": ["q_proj", "w1"]}, "`target_modules` names 'w1'"),
        ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["v_prj"]}, "`exclude_modules` names 'v_prj'"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"v_proj": 4}}, "`rank_pattern` names 'v_proj'"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"qproj": 4}}, "`alpha_pattern` names 'qproj'"),
    ],
)
def test_a_name_that_matches_nothing_is_refused_though_others_match(config, wrong, tmp_path):
    with pytest.raises(LayersNotFoundError, match=wrong):
        construct(tmp_path, tiny_llama, **config)


@pytest.mark.parametrize("excluded", [False, True])
def test_all_linear_says_what_it_leaves_out_unless_it_is_told_to(excluded, tmp_path, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr("hf_s3t.model.targets._KNOWN", set())
    monkeypatch.setattr("hf_s3t.model.targets.logger.warning_once", said.append)
    more = {"exclude_modules": ["pooler.dense"]} if excluded else {}
    trainer = construct(tmp_path, tiny_bert, target_modules="all-linear", **more)
    assert len(said) == (0 if excluded else 1)
    assert all("bert.pooler.dense" in message and "classifier" not in message for message in said)
    assert not any("pooler" in name or "classifier" in name for name in stage_targets(trainer))


def test_a_default_of_pefts_may_be_an_expression(tmp_path, monkeypatch):
    default = r".*self_attn\.(q_proj|v_proj)"
    monkeypatch.setitem(DEFAULT_TARGETS, "llama", default)
    trainer = construct(tmp_path, tiny_llama)
    assert stage_targets(trainer) == plainly_adapted(tiny_llama, target_modules=default)


# What PEFT refuses comes before anything is written


@pytest.mark.parametrize(
    ("make", "config", "said"),
    [
        (mamba, {"target_modules": "all-linear"}, "out_proj.*incompatible"),
        (mamba, {"target_modules": ["in_proj", "out_proj"]}, "out_proj.*incompatible"),
        (mamba, {"target_modules": ["in_proj", "conv1d"]}, "conv1d.*incompatible"),
        (qwen3_moe, {"target_modules": ["q_proj", "gate_proj"]}, "without also targeting up_proj"),
        (tiny_llama, {"target_modules": ["q_proj", "input_layernorm"]}, "is not supported"),
        (tiny_llama, {"target_modules": "["}, "unterminated character set"),
    ],
)
def test_what_peft_refuses_is_refused_at_construction(make, config, said, tmp_path):
    model = make()
    before = digest_of(model)
    with pytest.raises(ConfigError, match=f"PEFT refuses `peft_config` on {type(model).__name__}: .*{said}"):
        construct(tmp_path, lambda: model, **config)
    assert digest_of(model) == before and not (tmp_path / "system").exists()


def test_dropout_on_experts_is_refused_at_construction(tmp_path):
    with pytest.raises(LayersNotFoundError, match=r"mlp\.experts.*routed per ensemble member"):
        construct(tmp_path, mixtral, target_modules=["q_proj", "w1", "w2", "w3"], lora_dropout=0.1)


def test_the_look_at_targets_leaves_the_model_as_it_is(tmp_path):
    """Also parameters that were frozen before, and trainable ones."""
    model = tiny_llama()
    model.model.embed_tokens.requires_grad_(False)
    before = digest_of(model)
    config = LoraConfig(r=2, target_modules=["q_proj", "vproj"])
    with pytest.raises(LayersNotFoundError):
        make_trainer(tmp_path / "system", model, lm_rows(12), peft_config=config, config=s3t_config())
    assert digest_of(model) == before
    assert config.to_dict() == LoraConfig(r=2, target_modules=["q_proj", "vproj"]).to_dict()


def test_ranks_of_one_layer_are_none_that_other_stages_lack(tmp_path):
    """Of a key that means a module of one stage alone, PEFT has nothing to say to the others."""
    patterns = {"rank_pattern": {"^model.layers.3.self_attn.q_proj": 4}, "alpha_pattern": {"layers.0.*.q_proj": 8}}
    model = tiny_llama()
    trainer = make_trainer(tmp_path, model, peft_config=lora(model, target_modules=["q_proj"], **patterns))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plant_stages(trainer)
    assert {2, 4} == {
        tensor.shape[0]
        for file in tmp_path.glob("stages/*/*/adapter_model.safetensors")
        for name, tensor in load_file(file).items()
        if "lora_A" in name
    }


class InPairs(torch.nn.Linear):
    """Linear by its type, and not by what it returns, as some routers are."""

    def forward(self, x):
        return super().forward(x), None


class Routed(torch.nn.Module):
    def __init__(self, mlp, width):
        super().__init__()
        self.router, self.mlp = InPairs(width, 1), mlp

    def forward(self, x):
        return self.mlp(x) * self.router(x)[0].sigmoid()


def routed():
    model = tiny_llama(2)
    for layer in model.model.layers:
        layer.mlp = Routed(layer.mlp, model.config.hidden_size)
    return model


def test_an_adapter_that_does_not_fit_its_module_is_named_in_the_first_step(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "router"])
    trainer = make_trainer(tmp_path / "system", routed(), lm_rows(12), peft_config=config, config=s3t_config())
    with pytest.raises(ConfigError, match=r"adapter on `model\.layers\..\.mlp\.router` failed.*`exclude_modules`"):
        trainer.train()
    assert not trainer.folder.stages
    config = LoraConfig(r=2, target_modules=["q_proj", "router"], exclude_modules=["router"])
    make_trainer(tmp_path / "other", routed(), lm_rows(12), peft_config=config, config=s3t_config()).train()
