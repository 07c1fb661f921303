"""
Tokens per second that clients get over HTTP, against plain PEFT that is served one request at a time.

The same app answers in both: ours batches what eight clients ask at once; for plain PEFT each request runs alone, the
others wait, as a server without batching has it. And ours with one client, of which eight together get three times the
tokens at least. With one shard and with five, each of four stages; the demo's Llama.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import httpx2
import uvicorn
from harness import Report, Task, interleave, options
from peft import PeftModel
from systems import llama, make_system, sharing, temporary_folder
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.server.app import create_app
from hf_s3t.server.service import Service
from hf_s3t.server.settings import ServerSettings


SLICES = 4
CLIENTS = 8
LAYERS, HIDDEN, VOCABULARY = 4, 128, 4_000
PROMPT, TOKENS = 32, 64
QUICK_TOKENS = 8
TIMES_ONE = 3.0


def tokenizer() -> PreTrainedTokenizerFast:
    """A word for each token."""
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(VOCABULARY)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w3", pad_token="w0")


class PlainModel:
    """Plain PEFT in the place of a served system."""

    def __init__(self, model: PeftModel, path: Path):
        self._model = model
        self.base_model = model.get_base_model()
        self.config, self.generation_config = self.base_model.config, self.base_model.generation_config
        self.device = self.base_model.device
        self.folder = SimpleNamespace(path=path, ledger=SimpleNamespace(lines=[]))

    def can_generate(self) -> bool:
        return True

    def is_behind(self) -> bool:
        # Nobody deletes from it.
        return False

    def generate(self, **asked):
        return self._model.generate(**asked)


@contextlib.contextmanager
def served(model, **settings) -> Iterator[str]:
    """A model behind HTTP, on a port of this machine: gives the URL."""
    service = Service(model, tokenizer(), ServerSettings(**settings))
    server = uvicorn.Server(uvicorn.Config(create_app(service), port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def ask(client: httpx2.Client, url: str, number: int, tokens: int) -> int:
    """How many tokens one answer has."""
    prompt = [[4 + (number * PROMPT + place) % (VOCABULARY - 4) for place in range(PROMPT)]]
    # The end of a text is too improbable to come.
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "logit_bias": {"2": -100}}
    answer = client.post(f"{url}/v1/completions", json=body)
    return answer.json()["usage"]["completion_tokens"]


def all_ask(url: str, clients: int, requests: int, tokens: int) -> None:
    """So many requests, by so many clients at once."""
    with httpx2.Client(timeout=600) as client, ThreadPoolExecutor(clients) as pool:
        made = list(pool.map(lambda number: ask(client, url, number, tokens), range(requests)))
    if made != [tokens] * requests:
        raise RuntimeError(f"Answers have {made} tokens, and not {tokens}.")


def compare(report: Report, shards: int, folder: Path, rounds: int, tokens: int) -> None:
    """Eight clients against one, and against plain PEFT one by one."""
    base = llama(LAYERS, HIDDEN, VOCABULARY)
    make_system(folder, base, S3TConfig(num_shards=shards, num_slices=SLICES, budget=1), examples=200)
    model = S3TModel.from_pretrained(folder, base_model=sharing(base))
    exported = folder.parent / f"{folder.name}-plain"
    model.export_adapter(0, exported)
    plain = PlainModel(PeftModel.from_pretrained(sharing(base), exported).eval(), exported)
    alone = dict(max_batch_size=1, max_concurrent_batches=1, batch_wait=0)
    with served(model) as ours, served(plain, **alone) as theirs:
        eight = Task(lambda: all_ask(ours, CLIENTS, CLIENTS, tokens))
        one = Task(lambda: all_ask(ours, 1, CLIENTS, tokens))
        one_by_one = Task(lambda: all_ask(theirs, CLIENTS, CLIENTS, tokens))
        timing = interleave(one, eight, rounds=rounds)
        name = f"{shards} shard{'s' if shards > 1 else ''}"
        report.add(f"{name}: tokens/s of 8 clients, by those of 1", timing.ratio, at_least=TIMES_ONE, numbers={})
        report.add_ratio(
            f"{name}: 8 clients, against plain PEFT one by one", interleave(eight, one_by_one, rounds=rounds)
        )


def main() -> None:
    chosen = options(__doc__)
    tokens, rounds = (QUICK_TOKENS, 1) if chosen.quick else (TOKENS, 5)
    settings = {"layers": LAYERS, "hidden": HIDDEN, "prompt": PROMPT, "tokens": tokens, "clients": CLIENTS}
    report = Report("serving", chosen, settings)
    with temporary_folder() as folder:
        for shards in (1, 5):
            compare(report, shards, Path(folder) / f"system-{shards}", rounds, tokens)
    report.finish()


if __name__ == "__main__":
    main()
