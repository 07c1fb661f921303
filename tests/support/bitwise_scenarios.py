"""The two sides of the bitwise tests: a system that saw everything and forgot, and one that never saw it.

Run as a script, a side is trained in processes of its own: `python bitwise_scenarios.py SIDE FOLDER SCENARIO`.
"""

import contextlib
import itertools
import json
import os
import random
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig, TrainerCallback

from hf_s3t import S3TConfig, S3TModel
from hf_s3t.model.route import Route, routed
from hf_s3t.model.tensor_files import differing_tensors
from hf_s3t.plan import Plan, StageKey
from support import tiny
from support.insides import routing_of, wait_for_cleaner


ROWS = 36


@dataclass(frozen=True)
class Scenario:
    """One setting of everything that must not matter, or must matter on both sides alike."""

    architecture: str = "llama"
    num_shards: int = 1
    num_slices: int = 2
    budget: int = 2
    deletion: str = "one"
    dropout: bool = True
    accumulation: int = 1
    precision: str = "fp32"
    processes: int = 1
    crash: str = "none"
    order: str = "planned"
    rows: str = "as given"
    replay: float = 1.0
    oracle: str = "same process"
    afterwards: str = "nothing"

    def __str__(self):
        return " ".join(f"{name}={value}" for name, value in asdict(self).items() if value != getattr(Scenario, name))


# Every setting once with every setting of every other factor, where the two can meet.
FACTORS = {
    "architecture": ["llama", "gpt2", "bert", "roberta", "vit"],
    "num_shards": [1, 2],
    "num_slices": [2, 3, 4],
    "budget": [1, 2],
    "deletion": ["one", "one slice", "scattered"],
    "dropout": [True, False],
    "accumulation": [1, 2],
    "precision": ["fp32", "bf16", "8bit"],
    "processes": [1, 2],
    "crash": ["none", "in a stage", "between stages"],
    "order": ["planned", "other"],
    "rows": ["as given", "shuffled"],
    "replay": [1.0, 0.5],
    "oracle": ["same process", "fresh process"],
    "afterwards": ["nothing", "regrowth and another deletion"],
}


def covering_scenarios(seed: int = 0, tries: int = 60) -> list[Scenario]:
    """A greedy covering array of strength two: few scenarios in which every pair of settings meets."""
    rng = random.Random(seed)
    names = list(FACTORS)
    missing = {((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in FACTORS[a] for y in FACTORS[b]}
    scenarios = []
    while missing:
        candidates = []
        for _ in range(tries):
            # Start from a pair that has not met, so that every round makes progress.
            chosen = dict(rng.choice(sorted(missing, key=repr)))
            for name in rng.sample(names, len(names)):
                if name not in chosen:
                    # Of equals the first listed: the cheapest to run.
                    chosen[name] = max(FACTORS[name], key=lambda v, n=name: _met(chosen, n, v, missing))
            candidates.append(Scenario(**chosen))
        best = max(candidates, key=lambda s: len(pairs_of(s) & missing))
        missing -= pairs_of(best)
        scenarios.append(best)
    return scenarios


def _met(chosen: dict, name: str, value, missing: set) -> int:
    order = list(FACTORS)
    return sum(
        (tuple(sorted([(other, v), (name, value)], key=lambda p: order.index(p[0])))) in missing
        for other, v in chosen.items()
    )


def pairs_of(scenario: Scenario) -> set:
    """The pairs of settings that meet in a scenario."""
    return set(itertools.combinations(((name, getattr(scenario, name)) for name in FACTORS), 2))


# A side


@dataclass
class Crash(TrainerCallback):
    """Dies once: in the middle of a stage, or as a stage begins."""

    where: str
    stages_begun: int = field(default=0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.stages_begun += 1
        if self.where == "between stages" and self.stages_begun == 2:
            raise KeyboardInterrupt

    def on_step_end(self, args, state, control, **kwargs):
        if self.where == "in a stage" and self.stages_begun == 2 and state.global_step == 2:
            raise KeyboardInterrupt


def config_of(scenario: Scenario) -> S3TConfig:
    """The system of a scenario, with a seed under which no slice is ever empty."""
    for seed in range(1000):
        config = tiny.s3t_config(
            num_shards=scenario.num_shards,
            num_slices=scenario.num_slices,
            budget=scenario.budget,
            replay=scenario.replay,
            seed=seed,
        )
        sizes = {place: len(ids) for place, ids in placed(config).items()}
        if len(sizes) == scenario.num_shards * scenario.num_slices and min(sizes.values()) >= 3:
            return config
    raise ValueError("no seed fills every slice")


def placed(config: S3TConfig) -> dict[tuple[int, int], list[str]]:
    """The ids of every (shard, slice)."""
    from hf_s3t.plan.partition import assign

    ids = tiny.ids_of(ROWS)
    places = assign(ids, num_shards=config.num_shards, num_slices=config.num_slices, method="hashed", seed=config.seed)
    members: dict[tuple[int, int], list[str]] = {}
    for example_id, place in zip(ids, places, strict=True):
        members.setdefault(place, []).append(example_id)
    return members


def deletions_of(scenario: Scenario) -> list[list[str]]:
    """The requests, one after the other; each leaves something of every slice."""
    config = config_of(scenario)
    members = placed(config)
    first = Plan.from_config(config).sequences[0][0]
    last = members[0, first[-1]]
    requests = {
        "one": [last[0]],
        "one slice": last[:2],
        "scattered": [ids[0] for place, ids in sorted(members.items()) if place[1] in first[1:]],
    }
    asked = [requests[scenario.deletion]]
    if scenario.afterwards != "nothing":
        asked.append([next(i for i in reversed(last) if i not in asked[0])])
    return asked


def base_of(scenario: Scenario, folder: Path):
    """The scenario's base model; an 8-bit one is saved once and loaded quantised, as a user would."""
    rate = 0.1 if scenario.dropout else 0.0
    make = getattr(tiny, f"tiny_{scenario.architecture}")
    dropouts = {
        "llama": {"attention_dropout": rate},
        "gpt2": {"resid_pdrop": rate, "attn_pdrop": rate, "embd_pdrop": rate},
    }.get(scenario.architecture, {"hidden_dropout_prob": rate, "attention_probs_dropout_prob": rate})
    # bitsandbytes' kernels want rows of at least this many columns.
    width = {"n_embd": 32} if scenario.architecture == "gpt2" else {"hidden_size": 32}
    model = make(**dropouts, **width)
    if scenario.precision != "8bit":
        return model
    path = folder / "base"
    if not path.exists():
        # Another process may be doing the same: each writes its own, and whoever is second finds the name taken.
        written = folder / f"base-of-{os.getpid()}"
        model.save_pretrained(written)
        with contextlib.suppress(OSError):
            written.rename(path)
    head = ["classifier"] if scenario.architecture in ("bert", "roberta", "vit") else ["lm_head"]
    quantization = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0, llm_int8_skip_modules=head)
    return getattr(transformers, type(model).__name__).from_pretrained(path, quantization_config=quantization)


def make_trainer(scenario: Scenario, folder: Path, side: str, callbacks=None):
    """The trainer of one side."""
    model = base_of(scenario, folder)
    rows = tiny.rows_for(model, ROWS)
    if scenario.rows == "shuffled" and side == "never":
        random.Random(7).shuffle(rows)
    gone = {i for request in deletions_of(scenario) for i in request}
    if side == "never":
        rows = [row for row in rows if row["id"] not in gone]
    args = tiny.training_arguments(
        folder / side,
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=scenario.accumulation,
        bf16=scenario.precision == "bf16",
        save_strategy="steps" if scenario.crash != "none" and side == "saw" else "no",
        save_steps=1,
        lr_scheduler_type="linear",
    )
    peft_config = tiny.lora(model, lora_dropout=0.1 if scenario.dropout else 0.0)
    trainer = tiny.make_trainer(
        folder / side, model, rows, args=args, peft_config=peft_config, config=config_of(scenario), callbacks=callbacks
    )
    if scenario.order == "other" and side == "never":
        trainer._first_of_missing = lambda current, behind: min(
            trainer._missing(current), key=lambda k: (k.depth, -k.shard, k.prefix[::-1]), default=None
        )
    return trainer


def train_side(scenario: Scenario, folder: Path, side: str) -> None:
    """Train one side to its end: the one that saw everything then forgets."""
    torch.set_num_threads(1)
    if side == "never":
        make_trainer(scenario, folder, side).train()
        return
    if scenario.crash != "none":
        try:
            make_trainer(scenario, folder, side, [Crash(scenario.crash)]).train()
        except KeyboardInterrupt:
            pass
        else:
            raise AssertionError("the crash did not happen")
    trainer = make_trainer(scenario, folder, side)
    trainer.train()
    for number, request in enumerate(deletions_of(scenario)):
        if number:
            trainer.train()
        if trainer.is_world_process_zero():
            trainer.s3t_model.unlearn(request)
            wait_for_cleaner(trainer.s3t_model)
        trainer.accelerator.wait_for_everyone()


# The comparison


def differences(saw: Path, never: Path) -> tuple[int, dict[str, list[str]]]:
    """How many stages survived, and per stage the tensors in which the sides differ."""
    survivors = S3TModelFolder(saw)
    found = {}
    for key in survivors:
        adapter = f"{key.path}/adapter_model.safetensors"
        unequal = differing_tensors(load_file(saw / adapter), load_file(never / adapter))
        if unequal:
            found[str(key)] = unequal
    return len(survivors), found


def S3TModelFolder(folder: Path) -> list[StageKey]:
    """The valid stages of a folder."""
    from hf_s3t.folder.system import SystemFolder

    return sorted(SystemFolder(folder).valid_stages)


def truncated_logits(scenario: Scenario, folder: Path) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Per served stack of the side that forgot: its logits, and those of the same stages of the other side."""
    models = {
        side: S3TModel.from_pretrained(folder / side, base_model=base_of(scenario, folder), preload="all")
        for side in ("saw", "never")
    }
    rows = tiny.rows_for(models["saw"].base_model, 4, seed=5)
    inputs = {name: t for name, t in tiny.batch_of(rows).items() if name != "labels"}
    answers = []
    for tips in routing_of(models["saw"]).served:
        for tip in tips:
            logits = []
            for model in models.values():
                with torch.no_grad(), routed(Route((tip,))):
                    logits.append(model.base_model(**inputs).logits)
            answers.append(tuple(logits))
    return answers


if __name__ == "__main__":
    train_side(Scenario(**json.loads(sys.argv[3])), Path(sys.argv[2]), sys.argv[1])
