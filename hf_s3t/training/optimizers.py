"""Optimizers: whose parameters they train, which weights they serve, and what of them a checkpoint brings back."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from ..errors import ConfigError
from ..model.marks import Mark, mark, reached
from ..model.tensor_files import differing_tensors


# Arguments in the place of which `Trainer` puts the parameters of the model that it trains.
_OF_A_MODEL = ("params", "model", "optimizer_dict")
_PARTS_OF_TRAINING = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)
# What `torch.load(weights_only=True)`, by which checkpoints are read, makes again.
_PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.Tensor, torch.dtype, torch.device, torch.Size)
_PLAIN_CONTAINERS = (dict, list, tuple, set)


# Before training


def refuse_bound_optimizer(optimizer_cls_and_kwargs: Any, callbacks: Iterable[Any] | None = None) -> None:
    """
    Refuse an optimizer that is bound to parameters before there are those of a stage.

    Args:
        optimizer_cls_and_kwargs (`tuple[type, dict]`, *optional*): The argument of the trainer.
        callbacks (iterable, *optional*): The callbacks of the trainer.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: Naming what is bound, and the way out.
    """
    for callback in callbacks or ():
        names = [n for n, part in getattr(callback, "__dict__", {}).items() if _is_an_optimizer(part)]
        if names and not isinstance(callback, type):
            raise ConfigError(
                f"{type(callback).__name__} holds an optimizer in `{names[0]}`, and every stage makes its own. Take "
                'the one of the stage from the arguments of the event: `kwargs["optimizer"]`.'
            )
    if optimizer_cls_and_kwargs is None:
        return
    try:
        optimizer_cls, kwargs = optimizer_cls_and_kwargs
        named = dict(kwargs)
    except (TypeError, ValueError):
        raise ConfigError(
            f"`optimizer_cls_and_kwargs` is {optimizer_cls_and_kwargs!r}, expected a class and a dict of its "
            'arguments. Give one such as `(torch.optim.AdamW, {"lr": 1e-4})`.'
        ) from None
    for name, part in {"its class": optimizer_cls, **named}.items():
        if name in _OF_A_MODEL or any(map(_is_bound, reached(part, ends=_PARTS_OF_TRAINING))):
            raise ConfigError(
                f"`optimizer_cls_and_kwargs` brings parameters, a model or an optimizer of yours in "
                f"{name if part is optimizer_cls else f'`{name}`'}, and no stage would be trained by it: each trains "
                "parameters of its own, which do not exist yet. Leave it out: every stage gives its own to the class."
            )


def _is_an_optimizer(part: Any) -> bool:
    return isinstance(part, (torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, AcceleratedOptimizer))


def _is_bound(part: Any) -> bool:
    return isinstance(part, _PARTS_OF_TRAINING) or (isinstance(part, torch.Tensor) and part.requires_grad)


# In training


class StageOptimizer:
    """
    The optimizer of one stage, as `Trainer` has set it up.

    One whose `eval()` puts other weights into the model than `train()` trains with, as schedule-free optimizers have,
    rounds on the way there and back, so that every evaluation would move what is trained. From here on the weights of
    training come back as they were, bit for bit.

    Args:
        optimizer (`torch.optim.Optimizer`): The optimizer, which has taken no step yet.
        model (`nn.Module`): The model in training.
        shared (sequence): What has no state that is the optimizer's.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If it trains nothing of the stage.
    """

    def __init__(self, optimizer: Any, model: nn.Module, shared: Sequence[Any]):
        inner = optimizer.optimizer if isinstance(optimizer, AcceleratedOptimizer) else optimizer
        self._optimizer: Any = inner
        self._shared = (*shared, model)
        self._trained = [p for p in model.parameters() if p.requires_grad]
        self._refuse_idle()
        self._begun = self._own_state()
        # Weights of training, and the ones that serve, while these are in the model.
        self._aside: tuple[list[torch.Tensor], list[torch.Tensor]] | None = None
        modes: list[Any] = [getattr(inner, name, None) for name in ("train", "eval")]
        self.has_two_weights = all(map(callable, modes))
        if self.has_two_weights:
            self._to_training, self._to_serving = modes
            inner.train, inner.eval = self.train, self.serve

    def release(self) -> None:
        """Let go of the optimizer, whose tensors shall not outlive the stage."""
        if self.has_two_weights:
            # They hold each other, and would stay until garbage is collected.
            del self._optimizer.train, self._optimizer.eval, self._to_training, self._to_serving
        self._optimizer = self._aside = None
        self._trained = []

    def _refuse_idle(self) -> None:
        # Optimizers that work inside of the backward pass do it by hooks of the parameters.
        hooked = any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in self._trained)
        if self._trained and not hooked and len(self._untold()) == len(self._trained):
            raise ConfigError(
                f"The optimizer {self.name} trains no tensor of the stage: it was made for "
                "parameters of another one, or of the base. Let `optimizer_cls_and_kwargs` make a new optimizer of "
                "the parameters that it is given."
            )

    def _untold(self) -> list[nn.Parameter]:
        """The stage's parameters of which the optimizer does not say that it trains them."""
        known = {id(parameter) for group in self._optimizer.param_groups for parameter in group["params"]}
        return [parameter for parameter in self._trained if id(parameter) not in known]

    @property
    def name(self) -> str:
        """The name of its class, which libraries like to call `AdamW`, with that of its module."""
        return f"{type(self._optimizer).__module__}.{type(self._optimizer).__qualname__}"

    # Two weights

    def serve(self) -> None:
        """Put the weights that serve into the model; those are a stage's."""
        if not self.has_two_weights:
            return
        training = self._copies() if self._aside is None else None
        self._to_serving()
        if training is not None:
            self._aside = training, self._copies()

    def train(self) -> None:
        """Put the weights of training back."""
        aside, self._aside = self._aside, None
        # Where somebody wrote to the weights that serve, the optimizer makes of it what it does by itself.
        training = aside[0] if aside is not None and self._are(aside[1]) else None
        self._to_training()
        if training is not None:
            self._put(training)

    @contextmanager
    def weights_of_training(self) -> Iterator[None]:
        """Inside, the weights of training are in the model, while the optimizer goes on serving."""
        if self._aside is None:
            yield
            return
        training, serving = self._aside
        self._put(training)
        try:
            yield
        finally:
            self._put(serving)

    def put_aside(self, fill: Callable[[], None]) -> None:
        """
        Take the weights of training from elsewhere, while those that serve are in the model.

        Args:
            fill (callable): Puts the weights of training into the model.
        """
        serving = self._copies()
        fill()
        self._aside = self._copies(), serving
        self._put(serving)

    def _copies(self) -> list[torch.Tensor]:
        return [parameter.detach().clone() for parameter in self._trained]

    @torch.no_grad()
    def _put(self, tensors: list[torch.Tensor]) -> None:
        for parameter, tensor in zip(self._trained, tensors, strict=True):
            parameter.copy_(tensor)

    def _are(self, tensors: list[torch.Tensor]) -> bool:
        return not differing_tensors(_numbered(self._trained), _numbered(tensors))

    # Checkpoints

    def not_held(self) -> str | None:
        """
        What a checkpoint of the stage would not bring back, as a message names it; `None` if it brings back all.

        Told by what there is to see: that of `not_read_back`, and attributes of the optimizer's own that change.
        """
        moves = self._own_state() != self._begun
        return self.not_read_back() or ("attributes of its own change from step to step" if moves else None)

    def not_read_back(self) -> str | None:
        """
        The same of a checkpoint that was read: parameters that the optimizer does not know of (layer-wise ones have an
        optimizer for each), objects that are not read back, and state that is filed under tensors.
        """
        if self._untold():
            return "it keeps the state of parameters elsewhere (layer by layer, say)"
        return _unreadable(self._optimizer.state_dict())

    def _own_state(self) -> list[Mark]:
        """What the optimizer's attributes hold, besides what every optimizer has, and flags."""
        own = {name: part for name, part in vars(self._optimizer).items() if name not in _attributes_of_all()}
        if not own:
            return []
        known = reached((self._optimizer.state, self._optimizer.param_groups))
        around = [*self._shared, self._optimizer, *(part for part in known if isinstance(part, torch.Tensor))]
        kinds = (int, float, complex, torch.Tensor)
        held = reached(own, around, ends=(nn.Module,))
        return [mark(one) for one in held if isinstance(one, kinds) and not isinstance(one, (bool, nn.Parameter))]


def _numbered(tensors: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(number): tensor for number, tensor in enumerate(tensors)}


@functools.cache
def _attributes_of_all() -> frozenset[str]:
    # `step` is put there by schedulers, `train` and `eval` by `StageOptimizer`.
    return frozenset({*vars(torch.optim.SGD([torch.zeros(1)])), "step", "train", "eval"})


def _unreadable(value: Any) -> str | None:
    if isinstance(value, _PLAIN):
        return None
    if not isinstance(value, _PLAIN_CONTAINERS):
        return f"it keeps objects of {type(value).__name__}, which are not read back"
    if isinstance(value, dict):
        if any(isinstance(key, torch.Tensor) for key in value):
            return "it files its state under tensors of this process"
        value = [*value, *value.values()]
    return next((found for part in value if (found := _unreadable(part)) is not None), None)
