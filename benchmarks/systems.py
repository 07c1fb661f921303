"""Systems to measure: Llama bases with random weights, and stages attached and written without training."""

import copy
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments, logging

from hf_s3t import S3TConfig, S3TTrainer
from hf_s3t.baselines import use_public_secret
from hf_s3t.folder.system import SystemFolder
from hf_s3t.model.layers import group_layers
from hf_s3t.plan import stage_seed


# How stages are trained where that is measured.
BATCH = 8
LEARNING_RATE = 1e-3
SEVEN_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

# A bar per loaded checkpoint, or warnings on models made in memory, would hide the results.
logging.set_verbosity_error()
logging.disable_progress_bar()


def llama(layers: int, hidden: int, vocabulary: int = 32_000) -> LlamaForCausalLM:
    """A Llama with random weights and the proportions of Llama2-7B, in eval mode."""
    torch.manual_seed(0)
    heads = max(1, hidden // 64)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=-(-hidden * 43 // 16 // 8) * 8,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
    )
    return LlamaForCausalLM(config).eval()


def lora(rank: int = 16) -> LoraConfig:
    """Adapters on all seven projections, without dropout."""
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(SEVEN_PROJECTIONS))


def make_system(path: Path, base: nn.Module, config: S3TConfig, examples: int, rank: int = 16) -> SystemFolder:
    """
    A system with every planned stage, none of them trained: random adapters of the right shapes.

    Args:
        path (`Path`): Its folder.
        base (`nn.Module`): The bare base model. It is left as it is.
        config ([`~hf_s3t.S3TConfig`]): The system.
        examples (`int`): Number of examples in its table.
        rank (`int`, defaults to 16): Rank of the adapters.
    """
    tokens = [[number % 100] for number in range(examples)]
    rows = Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    # Every run deletes from the same places.
    use_public_secret(path)
    trainer = S3TTrainer(
        model=copy.deepcopy(base),
        args=TrainingArguments(output_dir=str(path), report_to="none", use_cpu=True, disable_tqdm=True),
        train_dataset=rows,
        peft_config=lora(rank),
        s3t_config=config,
    )
    stack, folder = trainer.s3t_model.stack, trainer.folder
    for key in folder.plan.stages():
        torch.manual_seed(stage_seed(config.seed, key))
        stack.add(key)
        with torch.no_grad():
            for name, tensor in stack.tensors(key).items():
                if ".lora_B." in name:
                    tensor.normal_(0.0, 0.02)
        below = folder.stage_record(key.parent)["files"]["adapter_model.safetensors"] if key.parent else None
        record = {"slices": folder.slice_digests(key), "below": below, "metrics": {}}
        folder.write_stage(key, record, lambda path, key=key: stack.save(key, path, None))
        stack.drop([key])
    return folder


def sharing(base: nn.Module) -> nn.Module:
    """Another model with the tensors of `base`, so that several need the memory of one."""
    memo = {id(tensor): tensor for tensor in [*base.parameters(), *base.buffers()]}
    return copy.deepcopy(base, memo)


def plain_peft(base: nn.Module, adapters: Mapping[str, Path]) -> PeftModel:
    """Plain PEFT on a base in memory: adapters loaded from disk, by their names, as quickly as it can."""
    model = None
    for name, path in adapters.items():
        if model is None:
            model = PeftModel.from_pretrained(base, path, adapter_name=name, low_cpu_mem_usage=True)
        else:
            model.load_adapter(path, adapter_name=name, low_cpu_mem_usage=True)
    return model


def by_hand_model(base: nn.Module, lora_config: LoraConfig, stage: int, num_slices: int) -> PeftModel:
    """The base with LoRA on all layers, of which a stage trains its own group's; inputs have gradients."""
    model = get_peft_model(base, lora_config)
    group = group_layers(model.config.num_hidden_layers, num_slices, None)[stage]
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "lora_" in name and any(f".layers.{layer}." in name for layer in group)
    model.enable_input_require_grads()
    return model


def temporary_folder() -> tempfile.TemporaryDirectory:
    """A folder for systems, removed at the end."""
    return tempfile.TemporaryDirectory(prefix="hf_s3t_bench_")


def arguments(folder: Path, gradient_checkpointing: bool) -> TrainingArguments:
    """The recipe of a stage."""
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=LEARNING_RATE,
        gradient_checkpointing=gradient_checkpointing,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )


def make_rows(rows: int, tokens: int, vocabulary: int) -> Dataset:
    """Random rows with labels and ids."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (rows, tokens), generator=generator).tolist()
    return Dataset.from_dict({"input_ids": ids, "labels": ids, "id": list(range(rows))})
