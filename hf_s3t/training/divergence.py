"""A stage in training that is no numbers any more: noticed without waiting for the device, and refused."""

import torch
from accelerate.utils import gather_object

from ..errors import DivergedError, counted
from ..folder.finite import named
from ..plan.stages import StageKey


class FiniteWatch:
    """
    Notes at which step of a stage a loss or a gradient was first no finite number.

    It computes where the numbers lie, and asks for the answer only when somebody wants it: training on a GPU waits for
    nothing.
    """

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None

    @torch.no_grad()
    def note(self, value: torch.Tensor | float | None, step: int) -> None:
        """
        Look at the loss, or the norm of the gradients, of a step.

        Args:
            value (`torch.Tensor` or `float`, *optional*): The number.
            step (`int`): The step, counted from 1.
        """
        if value is None:
            return
        value = torch.as_tensor(value).detach()
        never = torch.full((), torch.inf, device=value.device)
        found = torch.where(value.isfinite().all(), never, float(step))
        self._first = found if self._first is None else torch.minimum(self._first.to(found.device), found)

    @property
    def first_step(self) -> int | None:
        """The first of the steps, of all processes, at which something was not finite. All of them must ask."""
        own = torch.inf if self._first is None else self._first.item()
        first = min(gather_object([own]))
        return None if first == torch.inf else int(first)


def is_finite(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether all numbers of some tensors are finite, by one pass over them."""
    largest = torch.nn.utils.get_total_norm([t for t in tensors.values() if t.numel()], float("inf"))
    return bool(largest.isfinite())


def refuse_diverged(stage: StageKey, tensors: dict[str, torch.Tensor], watch: FiniteWatch, step: int) -> None:
    """
    Refuse a stage whose tensors are no finite numbers.

    Args:
        stage ([`~hf_s3t.plan.stages.StageKey`]): The stage.
        tensors (mapping from `str` to `torch.Tensor`): Its tensors, the same in all processes.
        watch ([`FiniteWatch`]): What its steps showed.
        step (`int`): How many steps it has taken.

    Raises:
        [`~hf_s3t.errors.DivergedError`]: Naming the stage, the first step that shows it, and the way out.
    """
    if is_finite(tensors):
        return
    names = sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all())
    first = watch.first_step
    when = f"The loss or its gradient is so since step {first}" if first else "No loss and no gradient was so before"
    raise DivergedError(
        f"{stage} is NaN or infinite after {counted(step, 'step')}, in {named(names)}. {when}. It is not written: it "
        "would silence its ensemble. Look through its examples for values that are not finite and for rows without a "
        "label that counts, and mend or unlearn them; or begin a system in another `output_dir` with a lower "
        "`learning_rate`, or with `max_grad_norm`."
    )
