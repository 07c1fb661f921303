"""The demo's small base model and its tokenizer, made on the spot of the public world of `invented_people.py`."""

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from common import prompts
from common.prompts import render_prompt
from demo import invented_people
from demo.invented_people import kind_rows, public_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class BaseSettings:
    """What the tokenizer and the base model depend on; with the versions of the libraries, the key of their cache."""

    hidden_size: int = 128
    intermediate_size: int = 256
    num_layers: int = 4
    num_heads: int = 4
    vocab_size: int = 1536
    num_people: int = 24
    share_known: float = 0.65
    share_general: float = 0.2
    steps: int = 320
    batch_size: int = 64
    learning_rate: float = 4e-3
    template: str = "alpaca-short"
    seed: int = 7


def train_tokenizer(settings: BaseSettings) -> Any:
    """A byte-level BPE tokenizer of the public world; being byte-level, it can spell anything."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (render_prompt(r["instruction"], r["input"], settings.template) + r["output"] for r in _spelled(settings))
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )


def base_rows(settings: BaseSettings) -> list[dict[str, str]]:
    """All that the base model is trained on, in order: `steps * batch_size` examples of the public world."""
    return public_rows(
        settings.steps * settings.batch_size,
        num_people=settings.num_people,
        share_known=settings.share_known,
        share_general=settings.share_general,
        seed=settings.seed,
    )


def _spelled(settings: BaseSettings) -> list[dict[str, str]]:
    # The last rows are the list of all answers: seen often enough, each of these words becomes a token of its own.
    return (base_rows(settings) + kind_rows())[:6000] + kind_rows() * 40


def train_base(settings: BaseSettings, tokenizer: Any, log: Callable[[str], None] = print) -> Any:
    """A small Llama, pretrained on the public world."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.num_layers,
        num_attention_heads=settings.num_heads,
        num_key_value_heads=settings.num_heads,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        model = LlamaForCausalLM(config).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, betas=(0.9, 0.98))
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 20) * (1 - step / settings.steps)
        )
        for step, parts in enumerate(_base_batches(settings, tokenizer)):
            optimizer.zero_grad()
            answer_loss = 0.0
            for part in parts:
                loss, of_answers = _base_loss(model, *part)
                (loss / len(parts)).backward()
                answer_loss += of_answers / len(parts)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            if step % 40 == 0:
                log(f"  pretraining step {step}/{settings.steps}, loss of the answers {answer_loss:.2f}")
    return model.eval()


def _base_batches(settings: BaseSettings, tokenizer: Any):
    """
    Batches in parts of like length, for nearly half of all tokens would be padding otherwise. A part holds the padded
    ids, and per row how many tokens are prompt and how many there are in all.
    """
    rows = base_rows(settings)
    prompts = tokenizer([render_prompt(r["instruction"], r["input"], settings.template) for r in rows])["input_ids"]
    answers = tokenizer([r["output"] for r in rows], add_special_tokens=False)["input_ids"]
    examples = [(p, a + [tokenizer.eos_token_id]) for p, a in zip(prompts, answers, strict=True)]
    for start in range(0, len(examples), settings.batch_size):
        batch = sorted(examples[start : start + settings.batch_size], key=lambda pair: len(pair[0]) + len(pair[1]))
        size = settings.batch_size // 4
        yield [_padded(batch[at : at + size], tokenizer.pad_token_id) for at in range(0, len(batch), size)]


def _padded(examples: list[tuple[list[int], list[int]]], pad: int) -> tuple[Any, Any, Any]:
    lengths = torch.tensor([len(p) + len(a) for p, a in examples])
    ids = torch.full((len(examples), int(lengths.max())), pad)
    for row, (p, a) in zip(ids, examples, strict=True):
        row[: len(p) + len(a)] = torch.tensor(p + a)
    return ids, torch.tensor([len(p) for p, _ in examples]), lengths


def _base_loss(model: Any, ids: Any, prompt_lengths: Any, lengths: Any) -> tuple[Any, float]:
    """
    The answers' loss and, with less weight, the prompts', so that the model knows every word from both sides.

    Padding is on the right, where a causal model does not look.
    """
    logits = model(input_ids=ids).logits[:, :-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    losses = losses.view(len(ids), -1)
    position = torch.arange(1, ids.shape[1])
    in_answer = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])
    in_prompt = position < prompt_lengths[:, None]
    answer = ((losses * in_answer).sum(1) / in_answer.sum(1)).mean()
    prompt = (losses * in_prompt).sum() / in_prompt.sum()
    return answer + 0.3 * prompt, answer.item()


def base_model(settings: BaseSettings | None = None, cache_dir: str | None = None, log=print) -> tuple[str, float]:
    """
    The folder of the base model and its tokenizer, made now unless the cache holds it.

    Args:
        settings ([`BaseSettings`], *optional*): What to make.
        cache_dir (`str`, *optional*): Defaults to `HF_S3T_CACHE`, else `hf_s3t` in the user's cache folder.
        log (`Callable`, defaults to `print`): Takes each line of progress.

    Returns:
        `tuple[str, float]`: The folder, and the seconds it took to make: 0 if it was there.
    """
    settings = settings or BaseSettings()
    folder = cache_folder(settings, cache_dir)
    if (folder / "config.json").is_file():
        return str(folder), 0.0
    started = time.perf_counter()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed: a cache entry is complete or absent, also with two runs at once.
    scratch = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
    try:
        tokenizer = train_tokenizer(settings)
        train_base(settings, tokenizer, log).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return str(folder), time.perf_counter() - started


def cache_folder(settings: BaseSettings, cache_dir: str | None = None) -> Path:
    """Where the base model of these settings is kept, made or not; arguments as in [`base_model`]."""
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(cache_dir or os.environ.get("HF_S3T_CACHE") or Path(home) / "hf_s3t").expanduser()
    return root / f"invented-people-{_cache_key(settings)}"


def _cache_key(settings: BaseSettings) -> str:
    """A hash of all that the base depends on: its settings, these files, and the versions of what computes it."""
    sources = (__file__, invented_people.__file__, prompts.__file__)
    parts = {
        "settings": dataclasses.asdict(settings),
        "source": [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in sources],
        "versions": [platform.python_version(), tokenizers.__version__, torch.__version__, transformers.__version__],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]
