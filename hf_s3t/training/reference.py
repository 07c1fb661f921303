"""What trainers of preferences compare with and are evaluated by, without a second copy of the base."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..model.ensemble_loss import IGNORED_LABEL
from ..model.modeling import S3TModel
from ..model.stack import StageStack


class BaseAsReference(nn.Module):
    """
    The base with all adapters off, in the place of a reference model: also in the midst of a stage, whose adapters act
    again right after.

    It holds no tensors of its own. What a trainer of TRL's asks of a reference is the forward, or, where it scores
    tokens without making logits, the backbone and the head.

    Args:
        stack ([`~hf_s3t.model.stack.StageStack`]): The stages on the base.
    """

    def __init__(self, stack: StageStack):
        super().__init__()
        self._stack = stack
        self.config = stack.base.config

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the base says by itself."""
        with self._stack.bare():
            return self._stack.base(*args, **kwargs)

    @property
    def base_model(self) -> Callable[..., Any]:
        """The backbone of the base by itself."""
        return self._backbone

    def _backbone(self, *args: Any, **kwargs: Any) -> Any:
        with self._stack.bare():
            return self._stack.base.base_model(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The head of the base."""
        head: nn.Module = self._stack.base.get_output_embeddings()
        return head

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tensors of the base, by which values that were computed with it are told from others."""
        tensors: dict[str, Any] = self._stack.base.state_dict(*args, **kwargs)
        return tensors


class ScoringEnsemble:
    """
    The ensemble, which also answers the question that trainers of TRL's ask a policy: how likely each token of a text
    is. They ask by `fused_lm_head=True`, and get an answer from the ensemble's own logits.

    Args:
        model ([`~hf_s3t.S3TModel`]): The ensemble.
    """

    def __init__(self, model: S3TModel):
        self._model = model

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        """As the ensemble; or the scores of the tokens in `labels`."""
        if not fused_lm_head:
            return self._model(*args, **kwargs)
        labels = kwargs.pop("labels")[:, 1:]
        output = self._model(*args, **kwargs)
        logits = output.logits[:, :-1].float()
        counts = labels != IGNORED_LABEL
        likely = logits.log_softmax(-1)
        return SimpleNamespace(
            logits=output.logits,
            log_probs=_where(counts, likely.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)),
            entropy=_where(counts, -(likely.exp() * likely).sum(-1)),
            log_sum_sq_probs=_where(counts, (2 * likely).logsumexp(-1)),
            mean_logits=_where(counts, logits.mean(-1)),
            is_top1=counts & (logits.argmax(-1) == labels),
            aux_loss=getattr(output, "aux_loss", None),
        )


def _where(counts: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~counts, 0)
