"""The head of a model: found by structure, and started from a seed."""

from collections.abc import Sequence

import torch
from torch import nn

from ..errors import LayersNotFoundError


def find_head(model: nn.Module, layers_path: str) -> tuple[str, ...]:
    """
    Names of the modules that turn the backbone's output into a classification; empty for a language model.

    Everything with parameters outside the backbone (the child that holds the layers) is the head, whatever it is
    called. In a model that holds its layers itself, it is what comes after them, less embeddings and norms.

    Args:
        model ([`~transformers.PreTrainedModel`]): The model.
        layers_path (`str`): Name of the list of transformer layers.

    Raises:
        [`~hf_s3t.errors.LayersNotFoundError`]:
            If a head's parameters are quantised or belong to no module that could be trained by itself.
    """
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        return ()
    backbone = layers_path.partition(".")[0]
    is_flat = backbone == layers_path
    own = [name for name, _ in model.named_parameters(recurse=False)]
    if own and not is_flat:
        raise LayersNotFoundError(
            f"{type(model).__name__} holds the parameters {', '.join(own)} itself, outside any module: they cannot be "
            "kept per stage. Put them into a module of their own."
        )
    children = [(n, m) for n, m in model.named_children() if next(m.parameters(), None) is not None]
    if is_flat:
        after = children[[n for n, _ in children].index(backbone) :]
        children = [(n, m) for n, m in after if not isinstance(m, nn.Embedding) and not is_norm(m)]
    head = tuple(n for n, _ in children if n != backbone)
    _refuse_namesakes(model, head)
    quantised = [n for n in head for p in model.get_submodule(n).parameters() if not p.is_floating_point()]
    if quantised:
        raise LayersNotFoundError(
            f"The head {', '.join(sorted(set(quantised)))} is quantised and cannot be trained. Load the base with "
            f"`llm_int8_skip_modules={sorted(set(quantised))}` in its BitsAndBytesConfig."
        )
    return head


def is_norm(module: nn.Module) -> bool:
    """Whether a module is a norm layer, by its class or the name of its class."""
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)) or "norm" in type(module).__name__.lower()


def _refuse_namesakes(model: nn.Module, head: Sequence[str]) -> None:
    """PEFT finds modules to train in full by the ends of their names: others that match would be trained too."""
    for name, _ in model.named_modules():
        namesakes = [h for h in head if name.endswith(h) and name not in head]
        if namesakes:
            raise LayersNotFoundError(
                f"PEFT would take {name} for the head {namesakes[0]}, because its name ends the same, and train it in "
                "every stage. Give one of them another name."
            )


def seed_head(base: nn.Module, head: Sequence[str], seed: int) -> None:
    """Initialise the base's head from a seed and nothing else: where every first stage starts (section 5)."""
    std = getattr(getattr(base, "config", None), "initializer_range", None) or 0.02
    # Not the process's random states: a stage in another thread may be drawing from them.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in (m for name in head for m in base.get_submodule(name).modules()):
            own = list(module.parameters(recurse=False))
            if is_norm(module):
                for name, parameter in module.named_parameters(recurse=False):
                    parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            for parameter in own:
                values = torch.zeros(parameter.shape, dtype=torch.float32)
                if parameter.dim() > 1:
                    values.normal_(0.0, std, generator=generator)
                parameter.copy_(values)
