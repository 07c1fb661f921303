"""Seconds of a training step, and how they grow with the layers that are trained."""

import copy
import statistics
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import ViTConfig, ViTForImageClassification


def step_seconds(image_size: int, batch_size: int, rounds: int = 3) -> list[dict[str, Any]]:
    """
    Seconds of a training step of ViT-base against the layers with adapters, counted from the top.

    Once with all of them trained, as when a whole adapter is limited to the top layers, and once with the lowest one
    trained and those above it active and frozen, as a stage of S3T with one layer a slice.

    Args:
        image_size (`int`): Height and width of the images.
        batch_size (`int`): Images in a batch.
        rounds (`int`): How often each step is timed; the median counts.
    """
    config = ViTConfig(image_size=image_size, num_labels=10)
    base = ViTForImageClassification(config)
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=["q_proj", "v_proj"])
    batch = {
        "pixel_values": torch.randn(batch_size, 3, image_size, image_size),
        "labels": torch.zeros(batch_size, dtype=torch.long),
    }
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    rows = []
    for count in range(1, config.num_hidden_layers + 1):
        lowest = config.num_hidden_layers - count
        own = copy.deepcopy(lora)
        own.layers_to_transform = list(range(lowest, config.num_hidden_layers))
        own.layers_pattern = "layers"
        model = get_peft_model(base, own).to(device).train()
        row = {"layers": count}
        for name in ("all", "lowest"):
            for parameter_name, parameter in model.named_parameters():
                parameter.requires_grad_(
                    "lora_" in parameter_name and (name == "all" or f".{lowest}." in parameter_name)
                )
            row[name] = median_step(model, batch, rounds)
        base = model.unload()
        rows.append(row)
    return rows


def median_step(model: torch.nn.Module, batch: dict[str, torch.Tensor], rounds: int) -> float:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    on_gpu = next(iter(batch.values())).is_cuda
    # Time of the processor, where it does the work: others may share the machine.
    clock = time.perf_counter if on_gpu else time.process_time
    found = []
    for _ in range(rounds + 1):
        started = clock()
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if on_gpu:
            torch.cuda.synchronize()
        found.append(clock() - started)
    # The first step allocates.
    return statistics.median(found[1:])
