"""Contract E6: a base that keeps state from one pass to the next is found by trying, and refused."""

import contextlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import IsolationError
from .marks import Mark
from .modes import modes_kept
from .module_state import Derived, Look, shown
from .randomness import preserved_randomness


logger = logging.get_logger(__name__)


# The kinds of models that were tried out and found to keep no state, and what each pass makes for itself.
_KNOWN_KINDS: dict[tuple[Any, ...], Derived] = {}


def check_keeps_no_state(model: PreTrainedModel) -> None:
    """
    Refuse base models whose forward pass leaves in their modules what a later pass could read.

    A few passes over three words tell, once for every kind of model. Models of other inputs than words, and quantised
    ones, whose passes are not for trying, are watched while stages train and calls run.

    Raises:
        [`~hf_s3t.errors.IsolationError`]: Naming what changed and the way out.
    """
    _settle_on_pictures(model)
    kind = _kind_of(model)
    if kind is None:
        return
    if kind in _KNOWN_KINDS:
        _KNOWN_KINDS[kind].hold_for(model)
        return
    words = getattr(model.config.get_text_config(), "vocab_size", 0)
    one, other = [words // 5, words // 3, words // 2], [words // 2, words // 5, words // 3]
    before = Look(model)
    try:
        with modes_kept(model), preserved_randomness():
            looks = [_look_after_reading(model, those) for those in (one, other, [*one, *other], one)]
            left = looks[1].changed(looks[0]) or changed_for_good(model, before, looks[1])
    except Exception as error:
        # It needs something else than words.
        logger.debug(f"{type(model).__name__} cannot be tried out on words alone: {error}")
        return
    finally:
        before.put_back()
    if left:
        raise IsolationError(
            f"The forward pass of {type(model).__name__} changes the model, in {shown(left)}: what one batch was "
            "would reach into the next, from stage to stage and from answer to answer. Use a model whose forward pass "
            "leaves nothing behind; if it is a setting, load the model with what it changes to."
        )
    _KNOWN_KINDS[kind] = Derived.of(looks[0], looks[2], looks[3])
    _KNOWN_KINDS[kind].hold_for(model)


def _settle_on_pictures(model: PreTrainedModel) -> None:
    """
    Show a model of pictures one of the size that it is configured for.

    Some set for good, by the first picture, what follows from its size. They shall have done so before it counts:
    what pictures of another size would change is then found.
    """
    config = getattr(model, "config", None)
    size = getattr(config, "image_size", None)
    height_width = (size, size) if isinstance(size, int) else size
    is_whole = not any(parameter.is_meta for parameter in model.parameters())
    if getattr(model, "main_input_name", None) != "pixel_values" or not height_width or not is_whole:
        return
    shape = (1, getattr(config, "num_channels", 3), *height_width)
    before = Look(model)
    try:
        with modes_kept(model), preserved_randomness(), torch.no_grad():
            model.eval()(pixel_values=torch.zeros(shape, dtype=model.dtype, device=model.device))
    except Exception as error:
        # It needs something else than pictures.
        logger.debug(f"{type(model).__name__} cannot be tried out on a picture alone: {error}")
    finally:
        only_sizes = all(_is_a_size(model, name) for name in Look(model).changed(before))
        before.put_back(settings=not only_sizes)


def _is_a_size(model: nn.Module, attribute: str) -> bool:
    """Whether an attribute of a module of the model is a whole number."""
    path, _, name = attribute.rpartition(".")
    try:
        return type(getattr(model.get_submodule(path), name)) is int
    except AttributeError:
        return False


def _look_after_reading(model: nn.Module, words: Sequence[int]) -> Look:
    _read_words(model, words)
    return Look(model)


def changed_for_good(model: nn.Module, before: Look, after: Look) -> dict[str, tuple[Mark, Mark]]:
    """What changed between two looks, and does not come back by a pass in training mode, as in some models it does."""
    left = after.changed(before)
    words = getattr(getattr(model, "config", None), "vocab_size", None)
    if left and isinstance(words, int):
        with contextlib.suppress(Exception):
            _read_words(model, [words // 5, words // 3, words // 2], training=True)
            left = Look(model).changed(before)
    return left


@torch.no_grad()
def _read_words(model: nn.Module, words: Sequence[int], training: bool = False) -> None:
    """Have a model read a few words."""
    model.train(training)
    model(input_ids=torch.tensor([list(words)], device=next(model.parameters()).device))


def _kind_of(model: nn.Module) -> tuple[Any, ...] | None:
    """What decides whether a model keeps state: models of one kind need to be tried out once. `None`: never."""
    config = getattr(model, "config", None)
    if getattr(model, "main_input_name", None) != "input_ids" or getattr(model, "is_quantized", False):
        return None
    if config is None or any(parameter.is_meta for parameter in model.parameters()):
        return None
    kinds = tuple((type(module), "forward" in vars(module)) for module in model.modules())
    return type(model), config.to_json_string(), kinds
