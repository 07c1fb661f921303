"""All that is wrong with PEFT settings, or with a base, is told at once."""

import pytest
from peft import LoraConfig
from support.tiny import tiny_llama
from torch import nn

from hf_s3t.config import S3TConfig
from hf_s3t.errors import ConfigError, IsolationError
from hf_s3t.model.refusals import check_base, check_peft_config, raise_together


def test_all_problems_of_peft_settings_are_in_one_error():
    config = LoraConfig(bias="all", init_lora_weights="pissa", modules_to_save=["lm_head"], lora_dropout=1.0)
    with pytest.raises(IsolationError) as caught:
        check_peft_config(config)
    first, *problems = str(caught.value).split("\n- ")
    assert first == "`peft_config` cannot be used, for 4 reasons:"
    named = ('bias="all"', 'init_lora_weights="pissa"', "modules_to_save` names lm_head", "lora_dropout` is 1.0")
    assert [name in problem for name, problem in zip(named, problems, strict=True)] == [True] * 4


def test_one_problem_is_told_by_itself_and_by_its_own_class():
    with pytest.raises(ConfigError, match=r"^`peft_config\.lora_dropout` is 1\.0, expected a share, .* Give 0\.05\.$"):
        check_peft_config(LoraConfig(lora_dropout=1.0))


def test_a_value_that_nothing_can_be_asked_of_does_not_hide_what_was_found():
    with pytest.raises(IsolationError, match=r'^`peft_config\.bias="all"` trains biases'):
        check_peft_config(LoraConfig(bias="all", modules_to_save=3))
    with pytest.raises(TypeError):
        check_peft_config(LoraConfig(modules_to_save=3))


def test_all_problems_of_a_base_are_in_one_error():
    model = tiny_llama(2)
    model.model.norm = nn.BatchNorm1d(4)
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(
        IsolationError, match=r"^The base model cannot be used, for 2 reasons:\n- .*batch norms"
    ) as caught:
        check_base(model, S3TConfig(num_shards=1, num_slices=2))
    assert "dynamic rotary embeddings" in str(caught.value)


def test_of_several_problems_the_one_that_breaks_isolation_decides_the_error():
    unusable, unsafe = ConfigError("Unusable. Do this."), IsolationError("Unsafe. Do that.")
    with pytest.raises(IsolationError, match=r"2 reasons:\n- Unusable\. Do this\.\n- Unsafe\. Do that\.$"):
        raise_together([unusable, unsafe], "It")
    with pytest.raises(ConfigError, match="2 reasons"):
        raise_together([unusable, unusable], "It")
