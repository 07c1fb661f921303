"""A batch of inputs through a classifier: each gets its own probabilities."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..model.modeling import S3TModel
from .batching import Item
from .problems import Problem


@dataclass
class Classified:
    """
    What an input is.

    Args:
        probs (`list[float]`): Of each class.
        score (`float`, *optional*): What a model with one output says, a reward or another number.
        is_last (`bool`): It is all that there is of a row.
    """

    probs: list[float]
    score: float | None = None
    is_last: bool = True


class Input(Item):
    """
    One text or image.

    Args:
        fields (mapping of `str` to lists or tensors): What the model takes, of this input alone.
        put (callable): Given the result, or the problem, from the thread of the batch.
    """

    def __init__(self, fields: Mapping[str, Any], put: Callable[[Classified | Problem], None]):
        # Images of one size fill a tensor; texts are padded.
        shapes = [(name, value.shape) for name, value in fields.items() if isinstance(value, torch.Tensor)]
        super().__init__((tuple(fields), tuple(shapes)), put)
        self.fields, self._put = fields, put

    def take(self, probs: list[float], score: float | None = None) -> None:
        """Hand out what it is."""
        self.is_ended = self.has_sent = True
        self._put(Classified(probs, score))


class Classifier:
    """
    Runs batches of inputs.

    Args:
        model ([`~hf_s3t.S3TModel`]): The model.
        processor: Its tokenizer or image processor.
    """

    def __init__(self, model: S3TModel, processor: Any):
        self._model, self._processor = model, processor
        self._is_multi_label = model.config.problem_type == "multi_label_classification"

    def run(self, inputs: Sequence[Input]) -> None:
        """
        Classify inputs of equal fields.

        Raises:
            [`~hf_s3t.errors.CallStoppedError`]: If a deletion stopped it.
            [`~hf_s3t.errors.ExhaustedError`]: If no shard is left.
        """
        lengths = {len(one.fields.get("input_ids", ())) for one in inputs}
        # A base that cannot tell padding reads texts of one length together, others one by one.
        if len(lengths) == 1 or self._model.config.get_text_config().pad_token_id is not None:
            self._run(inputs)
        else:
            for one in inputs:
                self._run([one])

    def _run(self, inputs: Sequence[Input]) -> None:
        with torch.no_grad():
            logits = self._model(**self._batch(inputs)).logits.float()
        # One output is no class beside others: of itself alone a softmax would always be sure.
        is_score = logits.shape[-1] == 1
        probs = logits.sigmoid() if self._is_multi_label or is_score else logits.softmax(-1)
        for one, row, said in zip(inputs, probs.tolist(), logits.tolist(), strict=True):
            one.take(row, said[0] if is_score else None)

    def _batch(self, inputs: Sequence[Input]) -> dict[str, torch.Tensor]:
        first = inputs[0].fields
        if all(isinstance(value, torch.Tensor) for value in first.values()):
            stacked = {name: torch.stack([one.fields[name] for one in inputs]) for name in first}
        else:
            # At the end: positions count from the beginning.
            rows = [dict(one.fields) for one in inputs]
            stacked = dict(self._processor.pad(rows, padding=True, padding_side="right", return_tensors="pt"))
        return {name: value.to(self._model.device) for name, value in stacked.items()}
