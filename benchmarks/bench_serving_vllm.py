"""
vLLM behind the server: tokens per second of eight clients at once, against plain PEFT that answers one by one.

Both answer the same prompts greedily, with the adapter of one stack on one base: plain PEFT by `generate` in this
process, vLLM in its own, asked over HTTP through the server. The environment variable HF_S3T_VLLM names a Python that
has vLLM; without it nothing is measured.
"""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import torch
import uvicorn
from harness import Report, Task, interleave, options
from peft import PeftModel
from systems import llama, make_system, temporary_folder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.server.app import create_app
from hf_s3t.server.keys import Keys
from hf_s3t.server.running import service_behind_engine
from hf_s3t.server.service import Service
from hf_s3t.server.settings import ServerSettings


CLIENTS = 8
VOCABULARY = 2_000
END = 2


@contextlib.contextmanager
def vllm(python: str, base: Path) -> Iterator[str]:
    """VLLM with runtime updating, on a free port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--host", "127.0.0.1", "--port",
        str(port), "--enable-lora", "--max-lora-rank", "16", "--max-loras", "1", "--enforce-eager", "--dtype",
        "float32", "--max-model-len", "256",
    ]  # fmt: skip
    own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with subprocess.Popen(
        command, env={**own, **settings}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            while not _is_healthy(f"http://127.0.0.1:{port}/health"):
                if process.poll() is not None:
                    raise RuntimeError("vLLM ended. Start it by hand to see why.")
                time.sleep(1)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def _is_healthy(url: str) -> bool:
    try:
        return httpx2.get(url, timeout=5).is_success
    except httpx2.TransportError:
        return False


@contextlib.contextmanager
def listening(service: Service) -> Iterator[str]:
    """The server on a free port, in a thread."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(create_app(service), log_level="error", access_log=False))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


def tokenizer() -> PreTrainedTokenizerFast:
    """Every token is a word."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    made = Tokenizer(models.WordLevel(words, unk_token="w3"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="w3", pad_token="w0", eos_token=f"w{END}")


def main() -> None:
    """Measure, and write what was measured."""
    asked = options(__doc__)
    python = os.environ.get("HF_S3T_VLLM")
    if not python:
        print("HF_S3T_VLLM names no Python that has vLLM: nothing is measured.")
        return
    layers, hidden, tokens, rounds = (4, 128, 16, 2) if asked.quick else (8, 512, 32, 3)
    settings = {"layers": layers, "hidden": hidden, "tokens": tokens, "clients": CLIENTS, "prompt_tokens": 16}
    report = Report("serving_vllm", asked, settings)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, VOCABULARY, (2 * CLIENTS, 16), generator=generator).tolist()
    with temporary_folder() as scratch:
        base, system = Path(scratch, "base"), Path(scratch, "system")
        bare = llama(layers, hidden, VOCABULARY)
        bare.save_pretrained(base)
        for folder in (base, system):
            tokenizer().save_pretrained(folder)
        make_system(system, bare, S3TConfig(num_shards=1, num_slices=4, budget=1), 100)
        S3TModel.from_pretrained(system, base_model=bare).export_adapter(0, Path(scratch, "adapter"))
        plain = PeftModel.from_pretrained(llama(layers, hidden, VOCABULARY), Path(scratch, "adapter")).eval()
        with vllm(python, base) as engine:
            service = service_behind_engine(system, ServerSettings(), Keys({}), engine, base_model=str(base))
            with listening(service) as url:
                timing = interleave(
                    Task(lambda: ask_all(url, prompts, tokens)),
                    Task(lambda: one_by_one(plain, prompts, tokens)),
                    rounds=rounds,
                )
                alone = interleave(
                    Task(lambda: ask(url, prompts[0], tokens)),
                    Task(lambda: one_by_one(plain, prompts[:1], tokens)),
                    rounds=rounds,
                )
    made = len(prompts) * tokens
    report.add("tokens per second, vLLM behind the server", made / timing.numbers()["ours_seconds"], "tokens/s")
    report.add("tokens per second, plain PEFT one by one", made / timing.numbers()["theirs_seconds"], "tokens/s")
    report.add_ratio(f"time of {CLIENTS} clients at once, against one by one", timing)
    report.add_ratio("time of one client alone, against plain PEFT", alone)
    report.finish()


def ask_all(url: str, prompts: list[list[int]], tokens: int) -> None:
    """All prompts, by as many clients as there are."""
    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(lambda prompt: ask(url, prompt, tokens), prompts))


def ask(url: str, prompt: list[int], tokens: int) -> None:
    """One prompt. The token that ends a text is left out, so that all answers are of one length."""
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logit_bias": {str(END): -100}}
    answer = httpx2.post(f"{url}/v1/completions", json=body, timeout=600)
    answer.raise_for_status()
    if answer.json()["usage"]["completion_tokens"] != tokens:
        raise RuntimeError(f"An answer has {answer.json()['usage']}, expected {tokens} tokens.")


def one_by_one(model: PeftModel, prompts: list[list[int]], tokens: int) -> None:
    """All prompts by plain PEFT, each by itself."""
    for prompt in prompts:
        ids = torch.tensor([prompt])
        model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )


if __name__ == "__main__":
    main()
