"""A study of files: what the stages of ViT-large take for every budget, Table 3."""

import argparse
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from studies.theory import TABLE_3_GIGABYTES_PER_BUDGET, TABLE_3_RATES, VIT_LARGE
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification

from hf_s3t import S3TConfig
from hf_s3t.analysis import deletion_rate
from hf_s3t.baselines import METHODS
from hf_s3t.errors import ConfigError
from hf_s3t.folder.layout import ADAPTER_FILE
from hf_s3t.folder.system import SystemFolder
from hf_s3t.plan import Plan


def storage(options: argparse.Namespace, others: Sequence[str]) -> dict[str, Any]:
    """Bytes of the stage folders of ViT-large, m = 5, L = 6, for every budget: files as training writes them."""
    if others:
        raise ConfigError(f"`storage` does not know {' '.join(others)}. It takes --work_dir, --output and --format.")
    path = options.work_dir / "measurements" / "storage.json"
    if not path.is_file():
        rows = measured_storage(options.work_dir / "storage", num_shards=5, num_slices=6, layers_per_slice=4)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    rows = json.loads(path.read_text(encoding="utf-8"))
    for row in rows:
        row["paper_gigabytes"] = row["budget"] * TABLE_3_GIGABYTES_PER_BUDGET
        row["paper_rate"] = TABLE_3_RATES[row["budget"] - 1]
        row["exact_rate"] = deletion_rate(5, 6, row["budget"])
    return {
        "model": "ViT-large, LoRA of rank 16 on query and value, 200 classes",
        "num_shards": 5,
        "num_slices": 6,
        "rows": rows,
        "paper": "0.21 GB per unit of B.",
    }


def measured_storage(
    folder: Path,
    *,
    num_shards: int,
    num_slices: int,
    layers_per_slice: int,
    model_settings: dict[str, Any] = VIT_LARGE,
) -> list[dict[str, Any]]:
    """
    Write the stages of the largest budget up to `num_slices`, untrained, and measure those of every budget.

    A stage's file is as large whatever it has learnt, so nothing is trained, and the base's weights are left as the
    memory they happen to be.

    Args:
        folder (`Path`): Where to write; removed afterwards.
        num_shards (`int`): Number of shards.
        num_slices (`int`): Number of slices of a shard, and the largest budget.
        layers_per_slice (`int`): Layers that a stage adapts.
        model_settings (`dict`): Fields of `ViTConfig`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    # The published plans, of which every budget has as many stages a sequence.
    shape = {"num_shards": num_shards, "num_slices": num_slices, "layers_per_slice": layers_per_slice}
    config = S3TConfig(**shape, keep_idle=True, id_column="id")
    system = _written(folder, config, model_settings)
    rows = [_sizes(system, replace(config, budget=budget)) for budget in range(1, num_slices + 1)]
    shutil.rmtree(folder)
    return rows


def _written(folder: Path, config: S3TConfig, model_settings: dict[str, Any]) -> SystemFolder:
    """A system with every planned stage, none of them trained."""
    with torch.device("meta"):
        model = ViTForImageClassification(ViTConfig(**model_settings, num_labels=200))
    model.to_empty(device="cpu")
    count = config.num_shards * config.num_slices
    method = METHODS["s3t"](
        model,
        TrainingArguments(output_dir=str(folder), report_to="none", use_cpu=True, max_steps=100),
        train_dataset=Dataset.from_dict(
            {"id": list(range(count)), "pixel_values": [[float(i)] for i in range(count)], "labels": [0] * count}
        ),
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"]),
        s3t_config=config,
    )
    system, stack = method.trainer.folder, method.model.stack
    for key in system.plan.stages():
        # Its head starts as the one of the stage before it, which is still there: the plan goes along the sequences.
        stack.drop([other for other in stack.loaded if other not in key.lineage])
        for stage in key.lineage[:-1]:
            if stage not in stack:
                stack.load(stage, system.read_adapter(stage), system.adapter_digest(stage))
        stack.add(key)
        below = system.adapter_digest(key.parent) if key.parent else None
        record = {"slices": system.slice_digests(key), "below": below, "metrics": {}}
        system.write_stage(key, record, lambda path, key=key: stack.save(key, path, None))
    return system


def _sizes(system: SystemFolder, config: S3TConfig) -> dict[str, Any]:
    """What the stages of a budget take, of a system that has them."""
    folders = [system.path / key.path for key in Plan.from_config(config).stages()]
    return {
        "budget": config.budget,
        "stages": len(folders),
        "adapter_gigabytes": sum((path / ADAPTER_FILE).stat().st_size for path in folders) / 1e9,
        "folder_gigabytes": sum(f.stat().st_size for path in folders for f in path.iterdir()) / 1e9,
    }
