"""Gates where shards are random parts of one task: classifiers, by the mean, certainty, terms and embeddings."""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import image_task, text_task
from common.classification import Parts, make_method, quiet
from common.options import Options
from studies.runs import RESULTS, SEEDS, Run, runs
from studies.workbench import kept
from torch.utils.data import DataLoader

from hf_s3t import S3TModel
from hf_s3t.baselines import use_public_secret


# The task -> whether its rows are images, of which no terms can be had.
TASKS = {"trec": False, "sst2": False, "digits": True}
SHARDS = 5
_BATCH = 128
# Rows that vote for the shard they are in.
_NEIGHBOURS = 20
# What one LoRA on all images is trained with, where the reproduction has none: the best of these rates.
_FULL_RATES, _FULL_EPOCHS = (1e-3, 3e-3, 1e-2), 8


def classifiers(options: argparse.Namespace, others: Sequence[str]) -> list[dict[str, Any]]:
    """The accuracy of each task's system of five shards, by what weighs the members, and that of one full LoRA."""
    quiet()
    by_name = {run.name: run for run in runs()}
    found = []
    for task, is_image in TASKS.items():
        for seed in SEEDS:
            run = by_name[f"replay-{task}-m{SHARDS}-equal-seed{seed}"]
            path = options.work_dir / "measurements" / f"classifier-{task}-seed{seed}.json"
            given = _arguments(run, options)
            one = kept(path, {"run": run.name, "options": run.options}, lambda a=given, i=is_image: _accuracies(a, i))
            print(task, seed, one["accuracy"], flush=True)
            found.append(
                {
                    "task": task,
                    "seed": seed,
                    **one,
                    "full_lora": _full_lora(task, seed, given, is_image),
                    "settings": {},
                }
            )
    return found


def _arguments(run: Run, options: argparse.Namespace) -> list[str]:
    model = str(options.minilm)
    if run.recipe == "image_classification":
        from studies.runs import small_vit

        model = small_vit(options.work_dir / f"{run.config}-vit", run.config, None)
    use_public_secret(options.systems / run.name)
    return run.arguments(model, options.data, options.systems)


def _accuracies(argv: Sequence[str], is_image: bool) -> dict[str, Any]:
    recipe = image_task if is_image else text_task
    options: Options = recipe.read(argv)
    parts = recipe.prepare(options, recipe.task_of(options))
    method = make_method(options, parts)
    method.train()
    model = method.model
    batches = list(DataLoader(parts.first.dataset, _BATCH, collate_fn=parts.data_collator))
    members = np.stack([_scores(model, batches, one) for one in torch.eye(SHARDS)])
    weights: dict[str, np.ndarray] = {"mean": np.full((SHARDS, members.shape[1]), 1 / SHARDS)}
    surest = members.max(-1)
    weights["certainty"] = surest / surest.sum(0)
    weights["the surest member"] = (surest == surest.max(0)).astype(float)
    if not is_image:
        served = _with_gate(method, parts, options)
        asked = [served.gate_weights(batch["input_ids"], batch["attention_mask"]) for batch in batches]
        weights["terms"] = torch.cat(asked).T.numpy()
        weights["terms, one member"] = (weights["terms"] == weights["terms"].max(0)).astype(float)
    weights["embeddings"] = _votes(method, parts, batches)
    truth = np.asarray(parts.first.references)
    right = (members.argmax(-1) == truth).astype(float)
    accuracy = {
        name: round(float((np.einsum("sr,src->rc", share, members).argmax(-1) == truth).mean()), 4)
        for name, share in weights.items()
    }
    accuracy["one member"] = round(float(right.mean()), 4)
    # What no gate can exceed that asks one member of each row.
    accuracy["any member"] = round(float(right.max(0).mean()), 4)
    return {"accuracy": accuracy, "rows": len(truth)}


@torch.no_grad()
def _scores(model: S3TModel, batches: Sequence[Mapping[str, torch.Tensor]], weights: torch.Tensor) -> np.ndarray:
    """The probabilities of one member, `(rows, classes)`."""
    with model.weighted_by(weights[None].double()):
        answers = [
            model(**{name: value for name, value in batch.items() if name != "labels"}).logits.softmax(-1)
            for batch in batches
        ]
    return torch.cat(answers).double().numpy()


def _with_gate(method: Any, parts: Parts, options: Options) -> S3TModel:
    """The system, as it is served by terms."""
    trainer = method.trainer
    if not trainer.folder.has_gate:
        trainer.build_gate()
    return S3TModel.from_pretrained(options.training.output_dir, base_model=parts.load_model(), gate="terms")


def _votes(method: Any, parts: Parts, batches: Sequence[Mapping[str, torch.Tensor]]) -> np.ndarray:
    """The share that each shard has of the training rows nearest to a row, by the base itself: `(shards, rows)`."""
    column = method.trainer.folder.config.id_column
    # What makes pixels of images as they are read leaves the ids out.
    places = method.trainer.s3t_model.locate(parts.train.with_format(None)[column])
    shards = np.array([shard for shard, _ in places.values()])
    plain = parts.train.remove_columns(column)
    base = parts.load_model().eval()
    near = _embeddings(base, batches) @ _embeddings(base, DataLoader(plain, _BATCH, collate_fn=parts.data_collator)).T
    nearest = shards[np.argsort(-near, axis=1)[:, :_NEIGHBOURS]]
    return np.stack([(nearest == shard).mean(1) for shard in range(SHARDS)])


@torch.no_grad()
def _embeddings(base: Any, batches: Iterable[Mapping[str, torch.Tensor]]) -> np.ndarray:
    """The mean of a row's last hidden states, of length one: `(rows, hidden size)`."""
    found = []
    for batch in batches:
        given = {name: value for name, value in batch.items() if name != "labels"}
        states = base(**given, output_hidden_states=True).hidden_states[-1]
        counts = batch.get("attention_mask", torch.ones(states.shape[:2]))[..., None]
        found.append(torch.nn.functional.normalize((states * counts).sum(1) / counts.sum(1), dim=-1))
    return torch.cat(found).double().numpy()


def _full_lora(task: str, seed: int, argv: Sequence[str], is_image: bool) -> float | None:
    """The accuracy of one LoRA fine-tuned on all the rows: from the reproduction, or for images the best by rate."""
    path = RESULTS / f"{task}-full-m1-seed{seed}.json"
    if path.is_file():
        depths: dict[str, dict[str, float]] = next(iter(json.loads(path.read_text())["metrics"].values()))
        return round(depths[max(depths, key=int)]["accuracy"], 4)
    return max(_accuracy_of_full(argv, rate) for rate in _FULL_RATES) if is_image else None


def _accuracy_of_full(argv: Sequence[str], rate: float) -> float:
    folder = Path(argv[argv.index("--output_dir") + 1])
    given = {
        "method": "full",
        "num_shards": 1,
        "max_steps": -1,
        "num_train_epochs": _FULL_EPOCHS,
        "learning_rate": rate,
        "output_dir": folder.with_name(f"{folder.name}-full-{rate:g}"),
    }
    options = image_task.read([*argv, *(text for name, value in given.items() for text in (f"--{name}", str(value)))])
    parts = image_task.prepare(options, image_task.task_of(options))
    method = make_method(options, parts)
    method.train()
    with torch.no_grad():
        batches = DataLoader(parts.first.dataset, _BATCH, collate_fn=parts.data_collator)
        answers = [method.model(pixel_values=batch["pixel_values"]).logits.argmax(-1) for batch in batches]
    return round(float((torch.cat(answers).numpy() == np.asarray(parts.first.references)).mean()), 4)
