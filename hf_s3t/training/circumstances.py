"""The recipe and the circumstances of a stage: what must be the same for it to be trained again bit for bit (E3)."""

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import TrainingArguments

from ..folder.versions import library_versions


# Arguments that cannot change a stage's tensors: where things go, what is shown, who is asked.
_IRRELEVANT = {
    "output_dir", "run_name", "report_to", "project", "trackio_space_id", "log_level", "log_level_replica",
    "log_on_each_node", "logging_dir", "disable_tqdm", "seed", "data_seed", "do_train", "do_eval", "do_predict",
    "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision", "push_to_hub",
    "resume_from_checkpoint", "skip_memory_metrics", "logging_strategy", "logging_first_step", "logging_steps",
    "save_strategy", "save_steps", "save_total_limit", "save_on_each_node", "enable_jit_checkpoint",
    "per_device_eval_batch_size", "eval_accumulation_steps", "eval_delay", "eval_on_start", "prediction_loss_only",
    "eval_strategy", "eval_steps", "dataloader_pin_memory", "local_rank",
    "use_cpu", "ddp_timeout", "ddp_backend", "logging_nan_inf_filter", "batch_eval_metrics",
    "include_for_metrics", "include_num_input_tokens_seen", "remove_unused_columns", "debug",
    "dataloader_prefetch_factor", "torch_empty_cache_steps", "restore_callback_states_from_checkpoint",
}  # fmt: skip
# Persistent workers keep their random states from epoch to epoch, and processes that prepare pack rows among
# themselves. Where an argument is not set it changes nothing, and earlier records do not have it.
_ONLY_WHERE_SET = {"dataloader_persistent_workers", "dataset_num_proc"}
# Which evaluations there are, and what may move the last bits of their losses.
_CHOOSING = (
    "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps",
    "per_device_eval_batch_size",
)  # fmt: skip


def recipe_of(args: TrainingArguments) -> dict[str, Any]:
    """The training arguments that a stage's tensors depend on, as JSON types."""
    kept = {name: value for name, value in args.to_dict().items() if name not in _IRRELEVANT}
    kept = {name: value for name, value in kept.items() if value or name not in _ONLY_WHERE_SET}
    if evaluation_trains(args):
        kept.update({name: getattr(args, name) for name in _CHOOSING})
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=_same_in_every_process))
    return plain


def evaluation_trains(args: TrainingArguments) -> bool:
    """Whether evaluation decides with which step's tensors a stage ends, or how fast it learns."""
    return args.load_best_model_at_end or args.lr_scheduler_type in ("reduce_lr_on_plateau", "greedy")


def _same_in_every_process(value: Any) -> Any:
    """What JSON has no type for, the same in every process: no addresses, sets in one order."""
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def circumstances(model: nn.Module, accelerator: Accelerator | None = None) -> dict[str, Any]:
    """
    What besides recipe, seed and data decides a stage's bits.

    Args:
        model ([`~transformers.PreTrainedModel`]): The base model.
        accelerator ([`~accelerate.Accelerator`], *optional*): For the number of processes.
    """
    device = next(model.parameters()).device
    return {
        "versions": library_versions(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "attn_implementation": getattr(model.config, "_attn_implementation", None),
        "dtype": str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch."),
        "quantization": str(getattr(getattr(model.config, "quantization_config", None), "quant_method", None)),
        "mixed_precision": accelerator.mixed_precision if accelerator is not None else "no",
        "world_size": accelerator.num_processes if accelerator is not None else 1,
        "threads": torch.get_num_threads(),
    }


def differing(recorded: dict[str, Any], present: dict[str, Any], prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The circumstances that differ, by name, as (recorded, present)."""
    found = {}
    for name in sorted({*recorded, *present}):
        then, now = recorded.get(name), present.get(name)
        if isinstance(then, dict) and isinstance(now, dict):
            found.update(differing(then, now, f"{prefix}{name}."))
        elif then != now:
            found[prefix + name] = (then, now)
    return found


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with a number of threads, which changes the order of float sums."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
