"""
Stand-ins for the models and data sets that the pages name, in folders of these names.

`load_dataset("a/b")` and `from_pretrained("a/b")` take a folder `a/b` before they ask the Hub, so that the text of a
page runs as it stands.
"""

import json
import random
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Image, Value
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    RobertaConfig,
    ViTConfig,
    ViTImageProcessor,
)

from support import tiny


WORDS = "the a good bad film was is of and it who what where when ask say tell why how yes".split()
ROLES = "user assistant".split()
TEMPLATE = "{% for one in messages %}{{ one['role'] }} {{ one['content'] }} {{ eos_token }}{% endfor %}"
# What the real ones are, for commands that read a config alone.
SIZES = {
    "meta-llama/Llama-2-7b-hf": LlamaConfig(architectures=["LlamaForCausalLM"]),
    "Qwen/Qwen2.5-0.5B": Qwen2Config(
        architectures=["Qwen2ForCausalLM"],
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
    ),
    "FacebookAI/roberta-base": RobertaConfig(architectures=["RobertaForMaskedLM"]),
    "google/vit-base-patch16-224-in21k": ViTConfig(architectures=["ViTModel"]),
}


def write_configs(folder: Path) -> None:
    """The configs of the models that the pages name, in their true sizes."""
    for name, config in SIZES.items():
        config.save_pretrained(folder / name)


def write_language_models(folder: Path) -> None:
    """Two tiny language models, one with a chat template, and the data sets that they are trained on."""
    tiny.tiny_llama(layers=4, hidden_size=8, intermediate_size=8).save_pretrained(folder / "meta-llama/Llama-2-7b-hf")
    tokenizer_of_words().save_pretrained(folder / "meta-llama/Llama-2-7b-hf")
    tiny.tiny_qwen2(layers=3, hidden_size=8, intermediate_size=8).save_pretrained(folder / "Qwen/Qwen2.5-0.5B")
    tokenizer_of_words(chat_template=TEMPLATE).save_pretrained(folder / "Qwen/Qwen2.5-0.5B")
    _write_rows(folder / "tatsu-lab/alpaca/train.jsonl", [{"text": _text(number)} for number in range(60)])
    turns = [[{"role": role, "content": _text(number)} for role in ROLES] for number in range(60)]
    _write_rows(folder / "trl-lib/Capybara/train.jsonl", [{"messages": messages} for messages in turns])
    pairs = [{"chosen": turns[n], "rejected": [turns[n][0], turns[(n + 1) % 60][1]]} for n in range(60)]
    _write_rows(folder / "trl-lib/ultrafeedback_binarized/train.jsonl", pairs)


def write_adapter(folder: Path) -> None:
    """An adapter on one of the language models, which lies in `folder` under its name, and rows of ten people."""
    base = AutoModelForCausalLM.from_pretrained("Qwen/Qwen2.5-0.5B")
    get_peft_model(base, LoraConfig(target_modules="all-linear")).save_pretrained(folder / "my-lora")
    rows = [{"id": number, "user": f"user-{number % 10}", "text": _text(number)} for number in range(60)]
    _write_rows(folder / "rows.jsonl", rows)


def write_classifiers(folder: Path) -> None:
    """A tiny encoder of text and one of images, and the benchmarks that they are trained on."""
    name = folder / "FacebookAI/roberta-base"
    tiny.tiny_roberta(layers=3, hidden_size=8, intermediate_size=8).base_model.save_pretrained(name)
    tokenizer_of_words().save_pretrained(name)
    sentences = [{"sentence": _text(number), "label": number % 2, "idx": number} for number in range(60)]
    _write_rows(folder / "nyu-mll/glue/sst2/train.jsonl", sentences)
    card = "---\nconfigs:\n- config_name: sst2\n  data_files: sst2/*.jsonl\n---\n"
    (folder / "nyu-mll/glue/README.md").write_text(card)
    name = folder / "google/vit-base-patch16-224-in21k"
    tiny.tiny_vit(layers=4, hidden_size=8, intermediate_size=8).base_model.save_pretrained(name)
    side = tiny.IMAGE_SIZE
    ViTImageProcessor(size={"height": side, "width": side}).save_pretrained(name)
    pixels = np.random.default_rng(0).integers(0, 256, (60, side, side, 3), dtype=np.uint8)
    columns = {"img": list(pixels), "label": [number % 10 for number in range(60)]}
    cifar = Dataset.from_dict(columns, features=Features({"img": Image(), "label": Value("int64")}))
    cifar.to_parquet(folder / "uoft-cs/cifar10/train.parquet")


def tokenizer_of_words(**settings) -> PreTrainedTokenizerFast:
    """One that knows some words, apart by spaces."""
    vocabulary = ["<pad>", "<s>", "</s>", "<unk>", *ROLES, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict(pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, **settings)


def _text(number: int) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=6))


def _write_rows(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
