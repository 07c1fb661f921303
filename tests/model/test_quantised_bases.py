"""Bases whose weights are tensors of a kind of their own (torchao, quanto): recognised by what these consist of."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from support.tiny import lm_rows, make_trainer, s3t_config, tiny_llama
from torch import nn
from transformers import AutoModelForCausalLM, QuantoConfig, TorchAoConfig
from transformers.utils import is_optimum_quanto_available, is_torchao_available

from hf_s3t import S3TModel
from hf_s3t.errors import BaseModelMismatchError
from hf_s3t.model.base_recognition import check_base_is
from hf_s3t.model.base_record import describe_base


pytestmark = pytest.mark.usefixtures("one_thread")


# A quantised tensor as libraries make them: it computes as what it stands for, and has no bytes of its own


class Eighths(torch.Tensor):
    """A matrix in bytes with a scale per row, in the protocol of PyTorch's tensor subclasses."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=scale.dtype, device=data.device)

    def __init__(self, data, scale):
        self.data8, self.scale, self.zero = data, scale, None

    def __tensor_flatten__(self):
        return ["data8", "scale", "zero"], None

    @staticmethod
    def __tensor_unflatten__(parts, context, size, stride):
        return Eighths(parts["data8"], parts["scale"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return cls(args[0].data8, args[0].scale)
        raise NotImplementedError(f"{func} of quantised weights")


def eighths(matrix: torch.Tensor) -> Eighths:
    scale = matrix.abs().amax(1, keepdim=True) / 127
    return Eighths((matrix / scale).round().to(torch.int8), scale)


def quantised(seed: int = 0):
    """A Llama whose projections are quantised, nested in one."""
    model = tiny_llama(2, seed)
    model.config.quantization_config = {"quant_method": "torchao", "bits": 8}
    for layer in model.model.layers:
        layer.mlp.up_proj.weight = nn.Parameter(eighths(layer.mlp.up_proj.weight.data), requires_grad=False)
    return model


def described(model) -> dict:
    return describe_base(model, "model.layers", ())


def test_the_digest_of_a_quantised_base_is_of_all_that_its_tensors_consist_of():
    was = described(quantised())
    assert described(quantised())["digest"] == was["digest"]
    for part in ("data8", "scale"):
        other = quantised()
        tensor = getattr(other.model.layers[1].mlp.up_proj.weight.data, part)
        tensor[-1, -1] += 1
        found = described(other)["digest"]
        assert found["quantised"] != was["digest"]["quantised"] and found["rest"] == was["digest"]["rest"]
        with pytest.raises(BaseModelMismatchError, match="its quantised weights differ"):
            check_base_is(other, {**was, "config": {}}, "model.layers", ())


@pytest.mark.slow
@pytest.mark.long
def test_the_digest_is_the_same_in_another_process():
    script = (
        "from test_quantised_bases import described, quantised; import json; "
        "print('digest', json.dumps(described(quantised())['digest']['quantised'], sort_keys=True))"
    )
    here = str(Path(__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([here, str(Path(here).parent)]), "PYTHONHASHSEED": "5"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    (digest,) = [line for line in done.stdout.splitlines() if line.startswith("digest")]
    assert all(value in digest for value in described(quantised())["digest"]["quantised"].values())


def test_a_base_is_recognised_whether_or_how_it_is_quantised():
    """Only what was quantised in the same way can be compared by its bits; for all, embeddings and norms are."""
    otherwise = quantised()
    otherwise.config.quantization_config = {"quant_method": "torchao", "bits": 4}
    with torch.no_grad():
        otherwise.model.layers[0].mlp.up_proj.weight.data.data8.add_(1)
    for one, other in ((quantised(), tiny_llama(2)), (tiny_llama(2), quantised()), (quantised(), otherwise)):
        check_base_is(other, {**described(one), "config": {}}, "model.layers", ())
    # What an older hf_s3t wrote says nothing of quantised weights.
    record = described(quantised())
    del record["digest"]["quantised"]
    check_base_is(quantised(), {**record, "config": {}}, "model.layers", ())
    with pytest.raises(BaseModelMismatchError, match="embeddings, norms or biases differ"):
        check_base_is(tiny_llama(2, seed=1), {**record, "config": {}}, "model.layers", ())


# The libraries themselves


def torchao_weights():
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def torchao_dynamic():
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig

    return TorchAoConfig(Int8DynamicActivationInt8WeightConfig())


def quanto():
    return QuantoConfig(weights="int8")


needs_torchao = pytest.mark.skipif(not is_torchao_available(), reason="needs torchao, which is not installed")
needs_quanto = pytest.mark.skipif(
    not is_optimum_quanto_available(), reason="needs optimum-quanto, which is not installed"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(torchao_weights, marks=needs_torchao),
        pytest.param(torchao_dynamic, marks=needs_torchao),
        pytest.param(quanto, marks=needs_quanto),
    ],
)
def test_a_system_on_a_quantised_base_is_trained_deleted_from_and_loaded_again(settings, tmp_path):
    wide = {"hidden_size": 64, "intermediate_size": 128}
    tiny_llama(2, **wide).save_pretrained(tmp_path / "base")
    tiny_llama(2, seed=1, **wide).save_pretrained(tmp_path / "other")

    def load(name: str = "base"):
        return AutoModelForCausalLM.from_pretrained(tmp_path / name, quantization_config=settings()).eval()

    def train(name: str, rows):
        trainer = make_trainer(tmp_path / name, load(), rows, config=s3t_config(budget=1))
        trainer.train()
        return trainer

    rows = lm_rows(16)
    model = train("system", rows).s3t_model
    gone = [i for i, place in model.locate([row["id"] for row in rows]).items() if place == (0, 1)][:1]
    assert model.unlearn(gone).depths_after == [1]
    without = train("without", [row for row in rows if row["id"] not in gone]).folder.path
    files = list((tmp_path / "system" / "stages").rglob("adapter_model.safetensors"))
    assert len(files) == 1
    for file in files:
        ours, theirs = load_file(file), load_file(without / file.relative_to(tmp_path / "system"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    words = torch.tensor([row["input_ids"] for row in rows[:3]])
    again = S3TModel.from_pretrained(tmp_path / "system")
    assert again.check() == []
    again.export_adapter(0, tmp_path / "plain")
    plain = PeftModel.from_pretrained(load(), tmp_path / "plain").eval()
    with torch.no_grad():
        expected = plain(input_ids=words).logits
        assert torch.equal(model(input_ids=words).logits, expected)
        assert torch.equal(again(input_ids=words).logits, expected)
        assert not torch.equal(load()(input_ids=words).logits, expected)
    with pytest.raises(BaseModelMismatchError, match="differ"):
        S3TModel.from_pretrained(tmp_path / "system", base_model=load("other"))
