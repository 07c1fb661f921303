"""
A server under load while its system forgets and grows: what is recorded of it, and whether each answer was allowed.

Clients ask without pause, examples are erased over HTTP and by the command line, and a trainer grows the system again.
A watcher keeps every stage that ever lay in the folder, by hard links, with the time at which it came and went. After
the load each answer is computed again by plain PEFT, one stack after the other, token by token, for the stages that
may have answered: those that were there between its request and its end, less those whose erasure was acknowledged
before its request.
"""

import contextlib
import copy
import json
import os
import random
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from hf_s3t.folder.opening import ReadOnlyFolder
from hf_s3t.plan.stages import StageKey


# A stage: its name, and the digest of its adapter.
Stage = tuple[StageKey, str]
# The folders of the stages of each stack that answers, from the base up.
Routing = tuple[tuple[Path, ...], ...]
# Seconds that a server may take to load what was grown, while older stages answer.
_LATE = 10.0
_BETWEEN_LOOKS = 0.02
# Two tokens whose probabilities are as close may change places from one order of sums to another.
_TIE = 1e-5


@dataclass
class Asked:
    """One request for an answer."""

    prompt: str
    start: float
    end: float = 0.0
    status: int = 0
    code: str | None = None
    text: str = ""


@dataclass
class Erased:
    """One erasure: how, when, and which stages went."""

    how: str
    start: float
    end: float = 0.0
    ids: list[Any] = field(default_factory=list)
    stages: list[str] = field(default_factory=list)


@dataclass
class Kept:
    """A stage that lay in the folder, from when to when, and where its files are kept."""

    stage: Stage
    path: Path
    came: float
    went: float = float("inf")


class Watcher:
    """
    Keeps every stage of a folder.

    Args:
        system (`Path`): The folder.
        archive (`Path`): Where to keep them, on the same disk.
    """

    def __init__(self, system: Path, archive: Path):
        self.kept: list[Kept] = []
        self._system, self._archive = system, archive
        self._there: dict[Path, tuple[int, Kept]] = {}
        self._end = threading.Event()
        archive.mkdir()
        self._look()
        # Those that were there before all answers.
        for kept in self.kept:
            kept.came = 0.0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @contextlib.contextmanager
    def watching(self) -> Iterator["Watcher"]:
        """Watch meanwhile."""
        self._thread.start()
        try:
            yield self
        finally:
            self._end.set()
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._end.wait(_BETWEEN_LOOKS):
            self._look()

    def _look(self) -> None:
        now, found = time.time(), dict[Path, int]()
        for path in self._system.glob("stages/shard-*/[0-9]*"):
            with contextlib.suppress(OSError):
                found[path] = os.stat(path).st_ino
        for path, (number, kept) in list(self._there.items()):
            if found.get(path) != number:
                kept.went = now
                del self._there[path]
        for path in found.keys() - self._there.keys():
            # One that goes while it is linked is looked at no more: nobody can have loaded it since.
            with contextlib.suppress(OSError, ValueError, KeyError):
                self._keep(path, found[path], now)

    def _keep(self, path: Path, number: int, now: float) -> None:
        digest = json.loads((path / "stage.json").read_bytes())["files"]["adapter_model.safetensors"]
        target = self._archive / f"{path.parent.name}-{path.name}-{digest[:16]}"
        if not target.exists():
            shutil.copytree(path, target, copy_function=os.link)
        key = StageKey.from_path(str(path.relative_to(self._system)))
        kept = Kept((key, digest), target, now)
        self.kept.append(kept)
        self._there[path] = number, kept


class Clients:
    """
    Clients that ask without pause.

    Args:
        url (`str`): The server.
        name (`str`): What it calls the model.
        prompts (sequence of `str`): What they ask, in turns.
        max_tokens (`int`): How long the answers are.
        count (`int`): How many clients; each other one has its answers streamed.
    """

    def __init__(self, url: str, name: str, prompts: Sequence[str], max_tokens: int, count: int = 8):
        self.asked: list[Asked] = []
        self._url, self._name, self._prompts, self._max_tokens = url, name, prompts, max_tokens
        self._end = threading.Event()
        self._threads = [threading.Thread(target=self._ask_on, args=(n,), daemon=True) for n in range(count)]

    @contextlib.contextmanager
    def asking(self) -> Iterator["Clients"]:
        """Have them ask meanwhile."""
        for thread in self._threads:
            thread.start()
        try:
            yield self
        finally:
            self._end.set()
            for thread in self._threads:
                thread.join()

    def _ask_on(self, number: int) -> None:
        with httpx2.Client(base_url=self._url, timeout=120) as client:
            turn = number
            while not self._end.is_set():
                asked = Asked(self._prompts[turn % len(self._prompts)], time.time())
                try:
                    (self._stream if number % 2 else self._collect)(client, asked)
                except httpx2.HTTPError as error:
                    asked.code = type(error).__name__
                asked.end = time.time()
                self.asked.append(asked)
                turn += 1

    def _body(self, asked: Asked, **more: Any) -> dict[str, Any]:
        body = {"model": self._name, "prompt": asked.prompt, "max_tokens": self._max_tokens, "temperature": 0}
        return {**body, **more}

    def _collect(self, client: httpx2.Client, asked: Asked) -> None:
        answer = client.post("/v1/completions", json=self._body(asked))
        asked.status, found = answer.status_code, answer.json()
        if "error" in found:
            asked.code = found["error"]["code"]
        else:
            asked.text = found["choices"][0]["text"]

    def _stream(self, client: httpx2.Client, asked: Asked) -> None:
        with client.stream("POST", "/v1/completions", json=self._body(asked, stream=True)) as answer:
            asked.status = answer.status_code
            if asked.status != 200:
                asked.code = json.loads(answer.read())["error"]["code"]
                return
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        asked.code = event["error"]["code"]
                    asked.text += "".join(choice["text"] for choice in event.get("choices", []))


class Eraser:
    """
    Erases examples one after the other, none that would exhaust the system.

    Args:
        url (`str`): The server.
        ids (sequence): Examples that may go.
        by_command (callable): Erases one beside the server, as `hf-s3t unlearn` does.
        seed (`int`): Of the choice.
    """

    def __init__(self, url: str, ids: Sequence[Any], by_command: Callable[[Any], None], seed: int = 0):
        self.erased: list[Erased] = []
        self._client = httpx2.Client(base_url=url, timeout=180)
        self._random, self._by_command = random.Random(seed), by_command
        self._left = list(ids)
        self._random.shuffle(self._left)

    def erase(self) -> Erased | None:
        """Erase one more, in the way whose turn it is; `None` if each one would exhaust the system now."""
        one = self._choose()
        if one is None:
            return None
        how = ("wait", "cancel", "command")[len(self.erased) % 3]
        erased = Erased(how, time.time(), ids=[one])
        if how == "command":
            self._by_command(one)
        else:
            key = {"Idempotency-Key": f"story-{len(self.erased)}"}
            answer = self._client.post("/v1/erasures", json={"ids": [one], "on_running": how}, headers=key)
            answer.raise_for_status()
            erased.stages = answer.json()["stages_removed"]
        erased.end = time.time()
        self.erased.append(erased)
        return erased

    def _choose(self) -> Any:
        for one in list(self._left[:12]):
            found = self._client.post("/v1/erasures", json={"ids": [one]}, params={"dry_run": True}).json()
            self._left.remove(one)
            if not found["is_exhausted"] and found["depths_before"] != found["depths_after"]:
                return one
            self._left.append(one)
        return None


# Which stages may have answered


class History:
    """
    Which stages could answer when, from what a watcher kept and what the ledger says.

    Args:
        system (`Path`): The folder, after the load.
        kept (sequence of [`Kept`]): The stages.
        erased (sequence of [`Erased`]): The erasures.
    """

    def __init__(self, system: Path, kept: Sequence[Kept], erased: Sequence[Erased]):
        folder = ReadOnlyFolder(system)
        self._folder, self._kept = folder, kept
        self._paths = {item.stage: item.path for item in kept}
        # When the erasure was acknowledged that took a stage: by whoever asked for what a line of the ledger says.
        self.acknowledged: dict[Stage, float] = {}
        # When it was asked for: from then on the stage may be switched off, long before its folder goes.
        self.asked_for: dict[Stage, float] = {}
        of_id = {folder.names.id_digest(one): item for item in erased for one in item.ids}
        for entry in folder.ledger.entries:
            told = [of_id[one] for one in entry.ids if one in of_id]
            if entry.kind == "deletion" and told:
                for name, digest in entry.removed.items():
                    stage = (StageKey.from_path(f"stages/{name}"), digest)
                    self.acknowledged[stage] = min(item.end for item in told)
                    self.asked_for[stage] = min(item.start for item in told)

    def candidates(self, asked: Asked) -> list[Routing]:
        """What may have given an answer; the likely first."""
        erased = {stage for stage, when in self.acknowledged.items() if when <= asked.start}
        going = {stage for stage, when in self.asked_for.items() if when <= asked.end} - erased
        times = (asked.start - _LATE, asked.start, asked.end)
        inside = [t for item in self._kept for t in (item.came, item.went) if times[0] < t <= asked.end]
        there: list[frozenset[Stage]] = []
        for moment in sorted({*times, *inside}):
            now = frozenset(item.stage for item in self._kept if item.came <= moment < item.went) - erased
            # What is there already answers until what came with the same look is loaded.
            there += [*(before & now for before in there[-1:]), now - going, now]
        found = map(self._serving, dict.fromkeys(reversed(there)))
        return list(dict.fromkeys(routing for routing in found if routing))

    def _serving(self, stages: frozenset[Stage]) -> Routing:
        digests = dict(stages)
        whole = {key for key in digests if all(stage in digests for stage in key.lineage)}
        served = self._folder.plan.served(whole, self._folder.config.select, {})
        tips = [tip for tips in served for tip in tips]
        return tuple(tuple(self._paths[(key, digests[key])] for key in tip.lineage) for tip in tips)


class Naive:
    """
    What plain PEFT answers: a copy of the base for each stack, and a pass through each for every token.

    Args:
        base (callable): Loads the base.
        tokenizer: The tokenizer.
        max_tokens (`int`): How long answers are.
    """

    def __init__(self, base: Callable[[], Any], tokenizer: Any, max_tokens: int):
        self._base, self._tokenizer, self._max_tokens = base(), tokenizer, max_tokens
        self._stacks: dict[tuple[Path, ...], Any] = {}
        self._answers: dict[Any, tuple[str, bool]] = {}
        ends = self._base.generation_config.eos_token_id
        self._ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}

    def answer(self, prompt: str, routing: Routing) -> tuple[str, bool]:
        """The greedy answer, and whether somewhere two tokens were too close to tell."""
        asked = (prompt, routing)
        if asked not in self._answers:
            self._answers[asked] = self._compute(prompt, [self._stack(folders) for folders in routing])
        return self._answers[asked]

    @torch.no_grad()
    def _compute(self, prompt: str, stacks: Sequence[Any]) -> tuple[str, bool]:
        ids = self._tokenizer(prompt, return_tensors="pt")["input_ids"]
        length, is_close = ids.shape[1], False
        for _ in range(self._max_tokens):
            probabilities = sum(stack(input_ids=ids).logits[0, -1].float().softmax(-1) for stack in stacks)
            first, second = torch.topk(probabilities / len(stacks), 2).values.tolist()
            is_close |= first - second < _TIE
            chosen = int(probabilities.argmax())
            # What ends an answer is no part of it, also where the tokenizer does not call it special.
            if chosen in self._ends:
                break
            ids = torch.cat([ids, torch.tensor([[chosen]])], dim=1)
        return self._tokenizer.decode(ids[0, length:], skip_special_tokens=True), is_close

    def _stack(self, folders: tuple[Path, ...]) -> Any:
        if folders not in self._stacks:
            model: Any = None
            names = [f"stage{depth}" for depth in range(len(folders))]
            for name, folder in zip(names, folders, strict=True):
                if model is None:
                    model = PeftModel.from_pretrained(copy.deepcopy(self._base), str(folder), adapter_name=name)
                else:
                    model.load_adapter(str(folder), adapter_name=name)
            for module in model.modules():
                if isinstance(module, LoraLayer):
                    module.set_adapter(names)
            self._stacks[folders] = model.eval().requires_grad_(False)
        return self._stacks[folders]


@dataclass
class Verdict:
    """What became of all answers."""

    answers: int = 0
    cancelled: int = 0
    too_close: int = 0
    failed: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)


def judge(history: History, naive: Naive, asked: Sequence[Asked], erased: Sequence[Erased]) -> Verdict:
    """
    Compare each answer with what the stages that may have given it answer.

    Args:
        history ([`History`]): Which stages those are.
        naive ([`Naive`]): What they answer.
        asked (sequence of [`Asked`]): The answers.
        erased (sequence of [`Erased`]): The erasures; only one that cancels may have stopped an answer.
    """
    verdict = Verdict()
    cancels = [(item.start, item.end) for item in erased if item.how == "cancel"]
    for one in asked:
        if one.code == "stopped_by_erasure":
            verdict.cancelled += 1
            if not any(start <= one.end and one.start <= end for start, end in cancels):
                verdict.failed.append("stopped, and no erasure cancelled anything")
        elif one.code is not None or one.status != 200:
            verdict.failed.append(f"{one.status} {one.code}")
        else:
            verdict.answers += 1
            _compare(history, naive, one, verdict)
    return verdict


def _compare(history: History, naive: Naive, one: Asked, verdict: Verdict) -> None:
    is_close, given = False, []
    for routing in history.candidates(one):
        text, close = naive.answer(one.prompt, routing)
        if text.split() == one.text.split():
            return
        is_close |= close
        given.append(text)
    if is_close:
        verdict.too_close += 1
    else:
        asked = f"{one.prompt!r}, asked at {one.start:.3f} and answered at {one.end:.3f},"
        verdict.wrong.append(f"{asked} gave {one.text!r}, expected one of {given}")


def memory_of(pid: int) -> float:
    """The resident memory of a process, in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
