"""One answer from the members of an ensemble: in one pass of their base or in one each; with none, the base alone."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from transformers import Cache, PreTrainedModel
from transformers.utils.generic import ModelOutput

from ..errors import S3TError
from .aggregation import answer_of, answers_of, check_is_no_set, fields_of_sets, logit_fields
from .batches import can_be_selected, num_rows, refuse_unknown_positions, repeat_rows
from .caches import CACHES, cache_of, caches_in, check_cache, forget_rows, refuse_other_state, stamp_cache
from .calls import Routing
from .ensemble_loss import EnsembleLoss
from .gated_pass import answer_by, batch_for
from .gating import Gating
from .route import BASE_ALONE, Route, routed
from .shared_pass import SharedPass
from .trunk import Trunks


class Ensemble:
    """
    The members that answer on one base, whichever they are: a call's routing says so.

    Args:
        base ([`~transformers.PreTrainedModel`]): The base model.
    """

    def __init__(self, base: PreTrainedModel):
        self._base = base
        self._shared_pass = SharedPass(base)
        self._trunks = Trunks(base)
        self._loss_of_several = EnsembleLoss(base)

    def check(self, inputs: dict[str, Any], route: Route | None) -> None:
        """
        Refuse inputs that no ensemble can answer, and caches that another one made.

        Args:
            inputs (`dict`): The inputs of a call by name.
            route ([`~hf_s3t.model.route.Route`], *optional*): The members that are to answer; `None` for the base.

        Raises:
            [`~hf_s3t.errors.StaleCacheError`]: If a cache was made with other members.
            [`~hf_s3t.errors.S3TError`]: With what to do instead.
        """
        if inputs.get("output_hidden_states") or inputs.get("output_attentions"):
            raise S3TError(
                "An ensemble has no single set of hidden states or attentions. Export a shard with `export_adapter` "
                "and look at it with plain PEFT."
            )
        refuse_other_state(inputs)
        check_cache(cache_of(inputs), route or BASE_ALONE)

    def answer(
        self,
        routing: Routing,
        inputs: dict[str, Any],
        targets: dict[str, Any],
        how: str,
        gating: Gating | None = None,
    ) -> ModelOutput:
        """
        What the members of a routing answer together; without any, what the base answers.

        Args:
            routing ([`~hf_s3t.model.calls.Routing`]): Which members, and their weights.
            inputs (`dict`): The inputs of the base by name, tensors of shape `(rows, ...)`.
            targets (`dict`): Labels and what goes with them; see [`~hf_s3t.model.ensemble_loss.take_targets`].
            how (`str`): See [`~hf_s3t.model.aggregation.aggregate`].
            gating ([`~hf_s3t.model.gating.Gating`], *optional*):
                Which of the members answer which rows; all of them answer all if not given.

        Returns:
            The base's output class with logits of shape `(rows, ..., classes)`, and the loss if there are targets.
        """
        if routing.route is None:
            return self._answer_as_base(inputs, targets)
        members = len(routing.route)
        rows = num_rows(inputs, self._base.main_input_name)
        if gating is not None:
            return self._answer_gated(routing, routing.route, inputs, targets, how, gating)
        make = partial(answer_of, weights=routing.weights, how=how)
        if members == 1:
            return self._answer_of_one(routing.route, routing.route, {**inputs, **targets}, make)
        if not self._shared_pass.is_possible(inputs, rows):
            return self._answer_in_turn(routing, routing.route, inputs, targets, make)
        refuse_unknown_positions(self._base, inputs, rows)
        with self._trunks.shared(routing.route, inputs, rows), routed(routing.route):
            outputs = self._base(**repeat_rows(inputs, rows, members), return_dict=True)
        stamp_cache(cache_of(inputs), routing.route)
        stamp_cache(cache_of(outputs), routing.route)
        answers = answers_of([outputs], make)
        return self.output(outputs, answers, self.loss(routing, answers, targets, inputs), members)

    def _answer_gated(
        self,
        routing: Routing,
        whole: Route,
        inputs: dict[str, Any],
        targets: dict[str, Any],
        how: str,
        gating: Gating,
    ) -> ModelOutput:
        """In one pass, of each member only the rows that it is to answer; where these cannot be told apart, of all."""
        cache, rows = cache_of(inputs), gating.num_rows
        forget_rows(cache)
        if gating.is_of_one:
            make = partial(answer_by, gating, how=how)
            return self._answer_of_one(gating.route_of_pass, whole, {**inputs, **targets}, make, gating)
        is_shared = self._shared_pass.is_possible(inputs, rows)
        if not (is_shared and can_be_selected(inputs)):
            gating = gating.of_all_rows()
        route, make = gating.route_of_pass, partial(answer_by, gating, how=how)
        if not is_shared:
            return self._answer_in_turn(routing, route, inputs, targets, make, gating)
        refuse_unknown_positions(self._base, inputs, rows)
        shared = self._trunks.shared(route, inputs, rows) if gating.is_full else contextlib.nullcontext()
        with shared, routed(route):
            outputs = self._base(**batch_for(gating, inputs), return_dict=True)
        stamp_cache(cache, whole, gating)
        stamp_cache(cache_of(outputs), whole, gating)
        answers = answers_of([outputs], make)
        return self.output(outputs, answers, self.loss(routing, answers, targets, inputs, gating), len(route))

    def _answer_of_one(
        self,
        route: Route,
        whole: Route,
        given: dict[str, Any],
        make: Callable[[torch.Tensor], torch.Tensor],
        gating: Gating | None = None,
    ) -> ModelOutput:
        """What the base answers with one member, and its loss."""
        with routed(route):
            outputs = self._base(**given, return_dict=True)
        stamp_cache(cache_of(given), whole, gating)
        stamp_cache(cache_of(outputs), whole, gating)
        answers = answers_of([outputs], make)
        return outputs if _says_only(outputs, answers) else self.output(outputs, answers, outputs.get("loss"))

    def _answer_in_turn(
        self,
        routing: Routing,
        route: Route,
        inputs: dict[str, Any],
        targets: dict[str, Any],
        make: Callable[[torch.Tensor], torch.Tensor],
        gating: Gating | None = None,
    ) -> ModelOutput:
        """One pass per member."""
        if caches_in(inputs):
            raise S3TError(
                f"{type(self._base).__name__} does not keep rows in the first dimension, or some input has not "
                "one entry per row, so the members of the ensemble answer one after the other and cannot share "
                f"`{next(iter(caches_in(inputs)))}`. Call with use_cache=False."
            )
        each = []
        for member in _members_alone(route):
            with routed(member):
                outputs = self._base(**inputs, return_dict=True)
            each.append(outputs)
        for name in caches_in(outputs):
            outputs[name] = None
        answers = answers_of(each, make)
        loss = self.loss(routing, answers, targets, inputs, gating)
        return self.output(outputs, answers, loss, len(each))

    def _answer_as_base(self, inputs: dict[str, Any], targets: dict[str, Any]) -> ModelOutput:
        # A route of no members keeps the adapters of a stage in training from acting.
        with routed(BASE_ALONE):
            outputs = self._base(**inputs, **targets, return_dict=True)
        stamp_cache(cache_of(inputs), BASE_ALONE)
        stamp_cache(cache_of(outputs), BASE_ALONE)
        answers = {name: outputs[name] for name in logit_fields(outputs.keys())}
        return self.output(outputs, answers, outputs.get("loss"))

    def output(
        self, outputs: ModelOutput, answers: dict[str, torch.Tensor], loss: torch.Tensor | None, members: int = 1
    ) -> ModelOutput:
        """
        An output of the base's class, with the ensemble's answers in it.

        Args:
            outputs (`ModelOutput`): What the base answered last.
            answers (`dict` of `torch.Tensor` of shape `(rows, ..., classes)`): The ensemble's logits by field.
            loss (`torch.Tensor` of shape `()`, *optional*): Their loss.
            members (`int`, defaults to 1): How many members answered.
        """
        check_is_no_set(outputs, type(self._base), members)
        # What comes with the logits of a set of predictions is of one member: several are refused.
        kept: dict[str, Any] = dict(outputs) if fields_of_sets(outputs) else dict(caches_in(outputs))
        kept = {**kept, "loss": loss, **answers}
        return type(outputs)(**{k: v for k, v in kept.items() if v is not None})

    def loss(
        self,
        routing: Routing,
        answers: dict[str, torch.Tensor],
        targets: dict[str, Any],
        inputs: dict[str, Any],
        gating: Gating | None = None,
    ) -> torch.Tensor | None:
        """
        The loss of an answer that is not the base's own; `None` without targets.

        Args:
            routing ([`~hf_s3t.model.calls.Routing`]): The members that answered.
            answers (`dict` of `torch.Tensor` of shape `(rows, ..., classes)`): Their logits by field.
            targets (`dict`): Labels and what goes with them.
            inputs (`dict`): What else the base was called with.
            gating ([`~hf_s3t.model.gating.Gating`], *optional*): Which of the members answered which rows.
        """
        if not targets:
            return None
        if routing.route is None:
            return self._loss_of_several(answers, targets, inputs, [(BASE_ALONE, 1.0)])
        if gating is not None:
            members = zip(_members_alone(gating.route_of_pass), gating.weights_of_pass, strict=True)
        else:
            members = zip(_members_alone(routing.route), routing.weights.tolist(), strict=True)
        return self._loss_of_several(answers, targets, inputs, list(members))


def _says_only(outputs: ModelOutput, answers: dict[str, torch.Tensor]) -> bool:
    """Whether a base answered with these logits, and beside them with nothing but a cache."""
    for name, value in outputs.items():
        if value is not answers.get(name) and not (name in CACHES and isinstance(value, Cache)):
            return False
    return True


def _members_alone(route: Route) -> list[Route]:
    """The members of a route by themselves; what stops the one stops them too."""
    return [replace(route, members=(tip,), sizes=None) for tip in route.members]
