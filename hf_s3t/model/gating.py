"""Which members answer which rows of a call: blocks of unequal size in one batch."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Self

import torch

from .route import Route


class Part(NamedTuple):
    """
    Rows that equally many members answer, where in the batch their answers are (`None`: it is these, in this order),
    and their weights.
    """

    rows: torch.Tensor
    entries: torch.Tensor | None
    weights: torch.Tensor


@dataclass(frozen=True, eq=False)
class Gating:
    """
    Which members answer which rows of a call. Never changed: a cache of keys and values keeps that it was filled with.

    A member that has no weight for a row does not compute it. Where rows cannot be taken apart, all members that are
    needed at all compute all rows, and the weights are applied after.

    Args:
        route ([`~hf_s3t.model.route.Route`]): All members, each with a block of all rows.
        weights (`torch.Tensor` of shape `(members, rows)`): Their weights for each row, which sum to one.
        is_apart (`bool`, defaults to `True`): Whether a member computes the rows alone for which it has a weight.

    Example:

    ```python
    >>> import torch
    >>> from hf_s3t.model.gating import Gating
    >>> from hf_s3t.model.route import Route
    >>> from hf_s3t.plan import StageKey

    >>> route = Route(tuple(StageKey(shard, (0,)) for shard in range(3)))
    >>> gating = Gating(route, torch.tensor([[1.0, 0.0], [0.0, 0.5], [0.0, 0.5]]))
    >>> gating.route_of_pass.sizes, gating.rows_of_entries.tolist()
    ((1, 1, 1), [0, 1, 1])
    ```
    """

    route: Route
    weights: torch.Tensor
    is_apart: bool = True

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        # As routes: a copied cache was filled with the same rows of the same members.
        return self

    @property
    def num_rows(self) -> int:
        """Of how many rows it says who answers."""
        return self.weights.shape[1]

    @property
    def num_entries(self) -> int:
        """How many rows the batch has, of all blocks together."""
        return int(self._computed.sum())

    @cached_property
    def is_full(self) -> bool:
        """Whether every member computes every row."""
        return self.num_entries == self.weights.numel()

    @cached_property
    def is_of_one(self) -> bool:
        """Whether one member answers all rows."""
        return len(self.route_of_pass) == 1

    @cached_property
    def route_of_pass(self) -> Route:
        """The members that are needed, and how many rows each has; what stops the whole route stops this one."""
        if self.is_full:
            return self.route
        sizes = self._computed.sum(1).tolist()
        members = tuple(tip for tip, size in zip(self.route.members, sizes, strict=True) if size)
        # Of one member, whose block is the batch, it is not asked where blocks end.
        blocks = tuple(filter(None, sizes)) if len(members) > 1 else None
        return replace(self.route, members=members, sizes=blocks, whole=self.route)

    @property
    def weights_of_pass(self) -> list[float]:
        """The mean weight over rows of each member that is needed."""
        return [float(weight) for weight in self.weights.mean(1) if weight > 0]

    def of_all_rows(self) -> "Gating":
        """The same weights, each member that is needed computing all rows."""
        return replace(self, is_apart=False)

    def expanded(self, times: int) -> "Gating":
        """For each row as many in its place, one after the other: beams of one prompt, say."""
        return self if times == 1 else replace(self, weights=self.weights.repeat_interleave(times, 1))

    @property
    def rows_of_entries(self) -> torch.Tensor:
        """Of shape `(entries,)`: of which row each entry of the batch is."""
        return self._computed.nonzero()[:, 1]

    def reordered(self, rows: torch.Tensor) -> tuple["Gating", torch.Tensor]:
        """
        What it says when each row goes on from another one, and from which entry of the batch each entry does.

        Args:
            rows (`torch.Tensor` of shape `(rows,)`): For each row the one that it goes on from.
        """
        rows = rows.to(self.weights.device)
        weights = self.weights[:, rows]
        # Beams of one prompt have the same members.
        after = self if torch.equal(weights, self.weights) else replace(self, weights=weights)
        members, of_rows = after._computed.nonzero(as_tuple=True)
        return after, self._places[members, rows[of_rows]]

    @cached_property
    def _computed(self) -> torch.Tensor:
        """Of shape `(members, rows)`: who computes what."""
        needed = self.weights > 0
        return needed if self.is_apart else needed.any(1, keepdim=True).expand_as(needed)

    @cached_property
    def _places(self) -> torch.Tensor:
        """Of shape `(members, rows)`: where in the batch a row is in a member's block, where that computes it."""
        return self._computed.flatten().cumsum(0).view_as(self._computed) - 1

    @cached_property
    def parts(self) -> list[Part]:
        """All rows, those together that equally many members answer: what these said is one tensor then."""
        needed = self.weights > 0
        counts = needed.sum(0)
        parts = []
        for count in counts.unique().tolist():
            rows = (counts == count).nonzero()[:, 0]
            # Per row, in the order of members.
            of_rows, members = needed[:, rows].t().nonzero(as_tuple=True)
            entries = self._places[members, rows[of_rows]].view(-1, count).t().flatten()
            weights = self.weights[members, rows[of_rows]].view(-1, count).t()
            is_all = len(entries) == self.num_entries and bool((entries.diff() == 1).all())
            parts.append(Part(rows, None if is_all else entries, weights))
        return parts
