"""The loss of the ensemble's answer: what the base computes, of other logits than its own."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING

from ..errors import S3TError
from .caches import CACHES
from .route import Route, routed
from .uncompiled import uncompiled


# How near two ways to compute a loss come.
_NEAR = dict(rtol=1e-5, atol=1e-6)
# The label that losses ignore.
IGNORED_LABEL = -100
# What says where a span begins and ends, in the place of labels.
_SPANS = ("start_positions", "end_positions")
# What goes with labels, and with nothing else.
_BESIDE_LABELS = ("num_items_in_batch", "shift_labels")
_TARGETS = {*_SPANS, *_BESIDE_LABELS}


def take_targets(inputs: dict[str, Any], labels: torch.Tensor | None) -> dict[str, Any]:
    """Labels or spans, and what goes with them, which is taken out of the inputs; nothing if there are no such."""
    if labels is None and _TARGETS.isdisjoint(inputs):
        return {}
    others: dict[str, Any] = {name: inputs.pop(name) for name in _BESIDE_LABELS if name in inputs}
    spans = {name: inputs.pop(name) for name in _SPANS if name in inputs}
    targets = {name: value for name, value in {"labels": labels, **spans}.items() if value is not None}
    return {**targets, **others} if targets else {}


class EnsembleLoss:
    """
    The loss of logits that several members made together, as the task defines it: as the base would compute it, had
    it come to these logits by itself.

    Some bases shift labels, some weigh, cut or mask, some need lengths that only they know, and what their config
    calls their loss function is not always what they use. So the base is asked: it runs for a member, with the labels,
    and where it has made its logits, the ensemble's are put in their place. What it adds that is not of the logits
    (losses of routers) is the members' mean. Where the loss function of its config was seen to give the same, that is
    used for batches of the same kind, which saves these passes.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model.
    """

    def __init__(self, base: PreTrainedModel):
        self._base = base
        # By kind of batch: whether the config's function gives the base's loss, and whether that is of the logits.
        self._is_of_its_config: dict[tuple[Any, ...], bool] = {}
        self._is_of_its_logits: set[tuple[Any, ...]] = set()

    # Where torch compiles, calls cannot be counted.
    @uncompiled
    def __call__(
        self,
        answers: dict[str, torch.Tensor],
        targets: dict[str, Any],
        inputs: dict[str, Any],
        members: Sequence[tuple[Route, float]],
    ) -> torch.Tensor | None:
        """
        Args:
            answers (`dict` of `torch.Tensor` of shape `(rows, ..., classes)`):
                The answer: `logits`, or the two heads of question answering.
            targets (`dict`):
                `labels` of shape `(rows, ...)` or positions of shape `(rows,)`, and what else the loss alone is of.
            inputs (`dict`): What else the base was called with, tensors of shape `(rows, ...)`.
            members (sequence of routes and weights): Each member by itself.

        Returns:
            `torch.Tensor` of shape `()`, or `None` if the base makes no loss of these, as of one end of a span alone.

        Raises:
            [`~hf_s3t.errors.S3TError`]: If the base does not compute its loss from the logits that it returns.
        """
        kind = self._kind(targets, inputs)
        by_config = self._loss_by_config(answers, targets) if self._is_of_its_config.get(kind) else None
        # Where that function cannot compute it, the base says why.
        if by_config is not None:
            return by_config
        try:
            loss = self._loss_by_base(answers, targets, inputs, members, kind)
        except _NoLoss:
            return None
        same = self._loss_by_config(answers, targets) if self._has_its_own_function else None
        if same is None or not torch.isfinite(loss):
            return loss
        is_same = _is_near(same, loss) and self._is_the_same_for_others(answers, targets, inputs, members[0][0], kind)
        # Anew: with the first labels some set the kind of problem in their config.
        self._is_of_its_config[self._kind(targets, inputs)] = is_same
        return same if is_same else loss

    def _kind(self, targets: dict[str, Any], inputs: dict[str, Any]) -> tuple[Any, ...]:
        """What a base may go by when it prepares labels or logits for its loss, and how it weighs rows."""
        described = tuple((name, *_kind_of_value(value)) for name, value in sorted({**inputs, **targets}.items()))
        config, mask, labels = self._base.config, inputs.get("attention_mask"), targets.get("labels")
        is_padded = isinstance(mask, torch.Tensor) and not bool(mask.all())
        special: tuple[bool, ...] = ()
        if isinstance(labels, torch.Tensor):
            tokens = (IGNORED_LABEL, getattr(config, "pad_token_id", None))
            special = tuple(token is not None and bool(torch.eq(labels, token).any()) for token in tokens)
        lengths = {len(value) for value in targets.values() if isinstance(value, torch.Tensor) and value.dim()}
        return described, is_padded, special, getattr(config, "problem_type", None), lengths <= {1}

    @torch.no_grad()
    def _is_the_same_for_others(
        self,
        answers: dict[str, torch.Tensor],
        targets: dict[str, Any],
        inputs: dict[str, Any],
        route: Route,
        kind: tuple[Any, ...],
    ) -> bool:
        """Whether the function of the config gives the base's loss of other labels as well, of all the classes."""
        classes = next(iter(answers.values())).shape[-1]
        targets = {name: _made_up_labels(value, classes) for name, value in targets.items()}
        answers = {name: _made_up_logits(logits) for name, logits in answers.items()}
        try:
            with routed(route):
                calls = self._find_logits({**inputs, **targets}, answers, kind)
                loss = None if calls is None else self._loss_with(answers, calls, {**inputs, **targets})
        except (TypeError, ValueError, RuntimeError, IndexError):
            # Some bases take no labels but those that fit the inputs.
            return False
        same = self._loss_by_config(answers, targets)
        return loss is not None and same is not None and _is_near(same, loss)

    @property
    def _has_its_own_function(self) -> bool:
        """Whether the config names a loss function; for others Transformers falls back to one, and says so."""
        return hasattr(self._base, "_loss_function") or getattr(self._base, "loss_type", None) in LOSS_MAPPING

    def _loss_by_config(self, answers: dict[str, torch.Tensor], targets: dict[str, Any]) -> torch.Tensor | None:
        """What the loss function of the config says; `None` if it is not made for these arguments."""
        config = self._base.config
        vocabulary = getattr(config.get_text_config(), "vocab_size", None)
        others = {"pooled_logits": answers["logits"]} if "logits" in answers else {}
        try:
            loss: torch.Tensor = self._base.loss_function(
                **answers, **others, config=config, vocab_size=vocabulary, **targets
            )
            return loss
        except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
            return None

    def _loss_by_base(
        self,
        answers: dict[str, torch.Tensor],
        targets: dict[str, Any],
        inputs: dict[str, Any],
        members: Sequence[tuple[Route, float]],
        kind: tuple[Any, ...],
    ) -> torch.Tensor:
        caches = [name for name in CACHES if inputs.get(name) is not None]
        if caches:
            raise S3TError(
                f"The loss of several members is computed from the whole text, and `{caches[0]}` holds a part of it. "
                "Give `labels` with all of the text, without a cache."
            )
        given = {**inputs, **targets}
        calls: dict[str, int] | None = None
        losses = []
        for route, weight in members:
            with routed(route):
                loss = None if calls is None else self._loss_with(answers, calls, given)
                if loss is None:
                    # This member may make its logits at other calls of torch: its words went to other experts.
                    calls = self._find_logits(given, answers, kind)
                    loss = None if calls is None else self._loss_with(answers, calls, given)
            if loss is None:
                raise S3TError(
                    f"{type(self._base).__name__} does not compute its loss from the logits that it returns, so that "
                    "of several members' answer is not defined. Call without `labels` and compute it from the logits, "
                    "or look at one member at a time: `export_adapter` and plain PEFT."
                )
            losses.append(weight * loss)
        return torch.stack(losses).sum(0)

    def _find_logits(
        self, given: dict[str, Any], answers: dict[str, torch.Tensor], kind: tuple[Any, ...]
    ) -> dict[str, int] | None:
        """At which calls of torch the base makes its logits, if its loss is made of these."""
        with _Making() as making:
            outputs = self._base(**given, return_dict=True)
        if outputs.get("loss") is None:
            raise _NoLoss
        calls = {name: making.call_of(outputs[name]) for name in answers}
        if None in calls.values():
            return None
        if kind not in self._is_of_its_logits:
            # Where the base writes to its logits afterwards, it would write to the ensemble's once more.
            with_own = self._loss_with({name: outputs[name] for name in answers}, calls, given)
            if with_own is None or not _is_near(with_own, outputs.loss):
                return None
            # One that is none, or nothing at all, is so whatever the logits are.
            tells = bool(torch.isfinite(outputs.loss).all() and outputs.loss.any())
            for name in answers:
                with_others = self._loss_with({**answers, name: _made_up_logits(answers[name])}, calls, given)
                if with_others is None or (tells and torch.equal(with_others.to(outputs.loss), outputs.loss)):
                    return None
            if tells:
                self._is_of_its_logits.add(kind)
        return calls

    def _loss_with(
        self, answers: dict[str, torch.Tensor], calls: dict[str, int], given: dict[str, Any]
    ) -> torch.Tensor | None:
        """The base's loss with other logits, of their shape, for those it makes; `None` if they are not there."""
        # Copies: some bases write to their logits.
        with _Replacing({calls[name]: logits.clone() for name, logits in answers.items()}) as replacing:
            outputs = self._base(**given, return_dict=True)
        there = all(outputs[name] is replacing.replacements[call] for name, call in calls.items())
        return outputs.loss if there else None


class _NoLoss(Exception):
    """The base makes no loss of what it was given."""


def _made_up_logits(logits: torch.Tensor) -> torch.Tensor:
    """Logits of the shape of others, `(rows, ..., classes)`, that no base comes to and that differ by class."""
    return torch.arange(logits.numel(), device=logits.device).sin().to(logits.dtype).view_as(logits)


def _made_up_labels(labels: Any, classes: int) -> Any:
    """Labels of the shape of others, of every class in turn; if some are ignored, rows have unlike many that count."""
    if not isinstance(labels, torch.Tensor) or labels.dim() == 0:
        return labels
    numbers = torch.arange(labels.numel(), device=labels.device).view_as(labels)
    if labels.is_floating_point():
        return (numbers % 2).to(labels.dtype)
    ignored = labels == IGNORED_LABEL
    varied = (numbers % classes).to(labels.dtype).masked_fill(ignored, IGNORED_LABEL)
    if ignored.any():
        varied[0].flatten()[::2] = IGNORED_LABEL
    return varied


def _is_near(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one.to(other), other, **_NEAR, equal_nan=True)


def _kind_of_value(value: Any) -> tuple[Any, ...]:
    if isinstance(value, torch.Tensor):
        return (value.dtype, value.dim())
    return (type(value), value if isinstance(value, (bool, str)) else None)


class _Counting(TorchFunctionMode):
    """Counts the calls of torch in this thread, inside."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self.calls += 1
        return self.see(result, getattr(func, "__name__", ""))

    def see(self, result: Any, name: str) -> Any:
        """What the caller shall get for a result."""
        raise NotImplementedError


class _Making(_Counting):
    """Notes at which call each tensor was made."""

    def __init__(self) -> None:
        super().__init__()
        self._made: dict[int, tuple[weakref.ref[torch.Tensor], int]] = {}

    def see(self, result: Any, name: str) -> Any:
        # Some calls give what they were given: the first one made it, or the last that wrote to it. What is gone may
        # have had the same address.
        if isinstance(result, torch.Tensor) and (self.call_of(result) is None or _writes(name)):
            self._made[id(result)] = weakref.ref(result), self.calls
        return result

    def call_of(self, tensor: torch.Tensor) -> int | None:
        made, call = self._made.get(id(tensor), (None, None))
        return call if made is not None and made() is tensor else None


def _writes(name: str) -> bool:
    """Whether a function of torch writes to what it gives, by its name: `div_`, `__itruediv__`."""
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


class _Replacing(_Counting):
    """Gives other tensors for those that are made at some calls, if they have their shapes."""

    def __init__(self, replacements: dict[int, torch.Tensor]):
        super().__init__()
        self.replacements = replacements

    def see(self, result: Any, name: str) -> Any:
        other = self.replacements.get(self.calls)
        fits = other is not None and isinstance(result, torch.Tensor) and result.shape == other.shape
        return other if fits else result
