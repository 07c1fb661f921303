"""
Preferences to train on, each with a word that no other has, and the trainers of preferences on a tiny Llama. As a
script it trains a system, forgets and regrows: `python preferences.py METHOD FOLDER`.
"""

import random
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, KTOConfig, RewardConfig

import hf_s3t
from hf_s3t.model.tensor_files import differing_tensors
from support.tiny import (
    ids_of,
    make_trainer,
    s3t_config,
    tiny_llama,
    tokenizer_of_words,
    training_arguments,
)


# From here on each example has a word of its own.
PLANTED = 40
EXAMPLES = 12


def tokenizer():
    """Words, and a token that ends a text."""
    backend = tokenizer_of_words().backend_tokenizer
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def _words(draw: random.Random, most: int) -> list[str]:
    return [f"w{draw.randrange(5, PLANTED)}" for _ in range(draw.randint(1, most))]


def _parts(number: int) -> tuple[str, str, str]:
    draw = random.Random(number)
    prompt, liked, other = (_words(draw, most) for most in (4, 3, 5))
    for words in (prompt, liked, other):
        words.insert(draw.randint(0, len(words)), f"w{PLANTED + number}")
    return " ".join(prompt), " " + " ".join(liked), " " + " ".join(other)


def pairs(count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Pairs of answers."""
    names = ("prompt", "chosen", "rejected")
    return [{"id": i, **dict(zip(names, _parts(number), strict=True))} for number, i in enumerate(ids_of(count))]


def judged(count: int = EXAMPLES) -> list[dict[str, Any]]:
    """Answers that somebody liked or did not."""
    told = [(i, number, _parts(number)) for number, i in enumerate(ids_of(count))]
    return [{"id": i, "prompt": p[0], "completion": p[1], "label": n % 3 > 0} for i, n, p in told]


# By name: the class, its arguments, what is set besides, rows and base.
METHODS: dict[str, tuple[str, type, dict[str, Any], Any, Any]] = {
    "dpo": ("S3TDPOTrainer", DPOConfig, {}, pairs, tiny_llama),
    "dpo, precomputed": ("S3TDPOTrainer", DPOConfig, {"precompute_ref_log_probs": True}, pairs, tiny_llama),
    "dpo, bf16": ("S3TDPOTrainer", DPOConfig, {"bf16": True}, pairs, tiny_llama),
    "reward": ("S3TRewardTrainer", RewardConfig, {}, pairs, lambda layers: tiny_llama(layers, labels=1)),
    "kto": ("S3TKTOTrainer", KTOConfig, {}, judged, tiny_llama),
    "kto, of pairs": ("S3TKTOTrainer", KTOConfig, {}, pairs, tiny_llama),
    "kto, precomputed": ("S3TKTOTrainer", KTOConfig, {"precompute_ref_log_probs": True}, judged, tiny_llama),
    "kto, apo": ("S3TKTOTrainer", KTOConfig, {"loss_type": "apo_zero_unpaired"}, judged, tiny_llama),
}


def preference_trainer(method: str, path: Path, rows=None, cls: type | None = None, config=None, **given):
    """A trainer of preferences; `arguments` change those of training."""
    name, arguments, settings, make_rows, base = METHODS[method]
    settings = {"bf16": False, "max_length": 24, "per_device_train_batch_size": 3, **settings}
    return make_trainer(
        path,
        given.pop("model", None) or base(2),
        rows if rows is not None else make_rows(),
        cls=cls or getattr(hf_s3t, name),
        args=given.pop("args", None)
        or training_arguments(path, arguments, **{**settings, **given.pop("arguments", {})}),
        config=config or s3t_config(num_shards=2),
        **{"processing_class": tokenizer(), **given},
    )


def held_out(method: str) -> Dataset:
    """Preferences that are trained on by nobody."""
    return Dataset.from_list(METHODS[method][3](EXAMPLES + 4)[EXAMPLES:])


def differences(one: Path, other: Path) -> dict[str, list[str]]:
    """The stages of two systems whose tensors differ, with their names; the two have the same stages."""
    stages = [sorted(file.parent.relative_to(at) for file in at.rglob("*.safetensors")) for at in (one, other)]
    assert stages[0] == stages[1] and stages[0]
    found = {}
    for stage in stages[0]:
        tensors = [load_file(at / stage / "adapter_model.safetensors") for at in (one, other)]
        if names := differing_tensors(*tensors):
            found[str(stage)] = names
    return found


GONE = ids_of(EXAMPLES)[3:5]


def forget_and_regrow(method: str, path: Path) -> None:
    """Train on everything, forget some and train what is missing."""
    trainer = preference_trainer(method, path)
    trainer.train()
    before = trainer.folder.valid_stages
    trainer.s3t_model.unlearn(GONE)
    assert before - trainer.folder.valid_stages and trainer.folder.valid_stages
    trainer.train()


if __name__ == "__main__":
    torch.set_num_threads(1)
    forget_and_regrow(sys.argv[1], Path(sys.argv[2]))
