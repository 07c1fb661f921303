"""What plain PEFT answers with a system's stages: the oracle of what serves."""

from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn


def naive_member(base: nn.Module, system: Path, shard: int, prefix: tuple[int, ...]) -> PeftModel:
    """The stack of some stages of one shard: their folders loaded as plain PEFT adapters, one on top of the other."""
    names, model = [], None
    for depth in range(1, len(prefix) + 1):
        folder = str(system / "stages" / f"shard-{shard}" / "-".join(map(str, prefix[:depth])))
        names.append(f"stage{depth}")
        if model is None:
            model = PeftModel.from_pretrained(base, folder, adapter_name=names[-1])
        else:
            model.load_adapter(folder, adapter_name=names[-1])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.set_adapter(names)
        # Every stage has a head, of which one can be active: the last stage's.
        if isinstance(module, ModulesToSaveWrapper):
            module.set_adapter(names[-1:])
    return model.eval().requires_grad_(False)


def naive_ensemble(members: list[list[nn.Module]], how: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """
    The mean over shards of the mean over a shard's stacks, one pass each; where there is one stack, its logits.

    Args:
        members: Per shard its stacks; shards without are left out of the mean.
        how: `"mean_logits"` or `"mean_probabilities"`.
        inputs: What the base takes.
    """
    shards = []
    with torch.no_grad():
        for stacks in members:
            answers = [stack(**inputs).logits for stack in stacks]
            if how == "mean_probabilities":
                answers = [answer.softmax(-1) for answer in answers]
            if answers:
                shards.append(sum(answers) / len(answers))
    if how == "mean_probabilities" and sum(map(len, members)) == 1:
        return answers_alone(members, inputs)
    mean = sum(shards) / len(shards)
    return mean.log() if how == "mean_probabilities" else mean


def answers_alone(members: list[list[nn.Module]], inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    ((stack,),) = [stacks for stacks in members if stacks]
    with torch.no_grad():
        return stack(**inputs).logits


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape
    return (one - other).abs().max().item()
