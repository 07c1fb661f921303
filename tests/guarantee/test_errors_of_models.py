"""Base models in which a stage would depend on more than its prefix, or that are no base at all, are refused (E6)."""

from functools import partial

import peft
import pytest
import transformers
from peft import LoraConfig
from support.refusals import CARRIES, Refusal, assert_trainer_refuses, cases, inactive_adapters, with_lora
from support.tiny import (
    build,
    classification_rows,
    image_rows,
    make_trainer,
    s3t_config,
    tiny_llama,
)
from torch import nn

from hf_s3t import S3TTrainer
from hf_s3t.errors import (
    ConfigError,
    IsolationError,
)


pytestmark = pytest.mark.usefixtures("one_thread")


# Models


def albert(**changes):
    settings = dict(vocab_size=60, embedding_size=8, hidden_size=16, intermediate_size=32, num_attention_heads=2)
    return build("AlbertForSequenceClassification", "AlbertConfig", **{**settings, "num_hidden_layers": 4, **changes})


def with_batch_norm():
    model = tiny_llama(layers=2)
    model.model.layers[1].norm_of_batches = nn.BatchNorm1d(16)
    return model


def with_dynamic_rotary_embeddings():
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    return tiny_llama(layers=2, rope_parameters=rope)


def resnet():
    return build("ResNetForImageClassification", "ResNetConfig", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])


def t5():
    return build(
        "T5ForConditionalGeneration",
        "T5Config",
        vocab_size=60,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )


def bart(head="BartForSequenceClassification"):
    sizes = {f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in BART.items()}
    return build(head, "BartConfig", vocab_size=60, d_model=16, **sizes)


BART = {"layers": 2, "attention_heads": 2, "ffn_dim": 32}


def quantised(method: str):
    model = tiny_llama(layers=2)
    model.config.quantization_config = {"quant_method": method, "bits": 4}
    return model


def merged_adapters():
    model = peft.get_peft_model(tiny_llama(layers=2), with_lora())
    model.merge_adapter()
    return model.get_base_model()


def one_projection_in_two_layers():
    model = tiny_llama(layers=4)
    model.model.layers[2].mlp.up_proj = model.model.layers[0].mlp.up_proj
    return model


TIED = Refusal(
    IsolationError,
    "",
    "layers 0 and 2 of model.layers share the module 'mlp.up_proj'",
    "act in other stages",
    "Use a model with separate layers",
)


def shared(at_most: int) -> Refusal:
    got = f"The config says 4 layers, but the model holds at most {at_most} in a list"
    return Refusal(IsolationError, "", got, "shared across depth", "Use a model with separate layers")


NORMS = Refusal(IsolationError, "", "batch norms", "shared by all stages", "Use a model with layer norms")
DYNAMIC = Refusal(
    IsolationError, "", "has dynamic rotary embeddings", "the longest input that it has seen", "with a fixed scaling"
)
TWO_STACKS = Refusal(
    IsolationError, "", "is an encoder-decoder", "order is defined for one", "Use a decoder-only or encoder-only"
)
CALIBRATED = Refusal(
    IsolationError, "", "is quantised by", "cannot be unlearned", r"S3TConfig\(base_is_public=True\); otherwise"
)
ADAPTED = Refusal(IsolationError, "", *CARRIES)


@pytest.mark.parametrize(
    ("make", "case"),
    [
        pytest.param(albert, shared(1), id="ALBERT"),
        pytest.param(partial(albert, inner_group_num=2), shared(1), id="ALBERT with two inner layers"),
        pytest.param(partial(albert, num_hidden_groups=2), shared(2), id="ALBERT with two groups"),
        pytest.param(one_projection_in_two_layers, TIED, id="one module in two layers"),
        pytest.param(with_batch_norm, NORMS, id="a batch norm in a layer"),
        pytest.param(resnet, NORMS, id="ResNet"),
        pytest.param(with_dynamic_rotary_embeddings, DYNAMIC, id="dynamic rotary embeddings"),
        pytest.param(t5, TWO_STACKS, id="T5"),
        pytest.param(bart, TWO_STACKS, id="BART"),
        pytest.param(partial(bart, "BartForConditionalGeneration"), TWO_STACKS, id="BART for generation"),
        pytest.param(partial(quantised, "gptq"), CALIBRATED, id="GPTQ"),
        pytest.param(partial(quantised, "awq"), CALIBRATED, id="AWQ"),
        pytest.param(partial(quantised, "a-new-method"), CALIBRATED, id="a method nobody knows"),
        pytest.param(lambda: peft.get_peft_model(tiny_llama(layers=2), with_lora()), ADAPTED, id="a PeftModel"),
        pytest.param(merged_adapters, ADAPTED, id="merged adapters"),
        pytest.param(inactive_adapters, ADAPTED, id="inactive adapters"),
    ],
)
def test_a_base_in_which_a_stage_could_depend_on_more_than_its_prefix_is_refused(make, case, tmp_path):
    given = {"model": make(), "rows": classification_rows(12), "peft_config": LoraConfig(target_modules="all-linear")}
    assert_trainer_refuses(case, tmp_path / "system", given)


@pytest.mark.parametrize("name", ["albert_layer_groups", "albert_layers"])
def test_naming_the_list_of_layers_does_not_make_shared_layers_separate(name, tmp_path):
    settings = LoraConfig(target_modules=["query"], layers_pattern=name, layers_to_transform=[])
    given = {"model": albert(num_hidden_groups=2), "rows": classification_rows(12), "peft_config": settings}
    assert_trainer_refuses(shared(2), tmp_path / "system", given)


def test_a_calibrated_base_is_taken_when_the_user_states_that_it_is_public(tmp_path):
    given = {"model": quantised("gptq"), "config": s3t_config(base_is_public=True)}
    trainer = make_trainer(tmp_path / "system", **given)
    assert trainer.folder.config.base_is_public and trainer.folder.plan.stages()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama saved to disk."""
    path = tmp_path_factory.mktemp("checkpoint") / "llama"
    tiny_llama(layers=2).save_pretrained(path)
    return path


def test_resized_embeddings_are_refused_and_the_resized_model_saved_is_not(checkpoint, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint)
    model.resize_token_embeddings(70)
    case = Refusal(
        IsolationError,
        "",
        "resized from 60 to 70 rows",
        "nobody could load this base again",
        "Save the resized model .* train on that",
    )
    assert_trainer_refuses(case, tmp_path / "system", {"model": model})
    model.save_pretrained(tmp_path / "resized")
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "resized")
    assert make_trainer(tmp_path / "system", saved).folder.plan.stages()


def test_parameters_that_the_checkpoint_lacks_are_refused_by_name(tmp_path):
    model = build("BertForMaskedLM", "BertConfig", hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                  num_attention_heads=2, vocab_size=60)  # fmt: skip
    model.save_pretrained(tmp_path / "base")
    classifier = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    case = Refusal(
        IsolationError, "", "has no parameters for bert.pooler.dense", "initialised at random", "Save the model once"
    )
    given = {"model": classifier, "rows": classification_rows(12)}
    assert_trainer_refuses(case, tmp_path / "system", given)


def without_a_loss():
    return build("DeiTForImageClassificationWithTeacher", "DeiTConfig", hidden_size=16, intermediate_size=32,
                 num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4, num_labels=3)  # fmt: skip


def test_a_model_that_gives_no_loss_is_refused_before_anything_is_written(tmp_path):
    case = Refusal(ConfigError, "", "WithTeacher takes no labels", "no loss to train by", "Use a class that takes")
    given = {"model": without_a_loss(), "rows": image_rows(12)}
    assert_trainer_refuses(case, tmp_path / "system", given)


def test_a_model_that_gives_no_loss_is_taken_with_a_loss_of_ones_own(tmp_path):
    class Own(S3TTrainer):
        def compute_loss(self, model, inputs, **kwargs):
            return model(pixel_values=inputs["pixel_values"]).logits.square().mean()

    assert make_trainer(tmp_path / "class", without_a_loss(), image_rows(12), cls=Own).folder.plan.stages()
    loss = {"compute_loss_func": lambda outputs, labels, **kwargs: outputs.logits.square().mean()}
    assert make_trainer(tmp_path / "function", without_a_loss(), image_rows(12), **loss).folder.plan.stages()


@cases(
    Refusal(ConfigError, "more slices than layers", "num_slices=3 is more than the model's 2 layers",
        "every slice needs at least one", "Use fewer slices", config=s3t_config(num_slices=3)),
    Refusal(ConfigError, "more layers than there are", "layers_per_slice=2 with num_slices=2 needs 4 layers",
        "the model has 2", "Lower one of them", config=s3t_config(layers_per_slice=2)),
    Refusal(ConfigError, "more listed layers than there are",
        r"layers_per_slice=\[2, 1\] with num_slices=2 needs 3 layers", "the model has 2", "Lower one of them",
        config=s3t_config(layers_per_slice=[2, 1])),
)  # fmt: skip
def test_slices_that_do_not_fit_the_layers_are_refused(case, tmp_path):
    assert_trainer_refuses(case, tmp_path / "system", case.given)
