"""The task of a model, told by the class that it is of."""

from collections.abc import Mapping, Sequence

from torch import nn
from transformers.models.auto import modeling_auto


_TASKS: dict[str, Mapping[str, Sequence[str]]] = {
    "text-generation": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "text-classification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "image-classification": modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    "token-classification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "question-answering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    "audio-classification": modeling_auto.MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES,
}


def find_task(model: nn.Module) -> str:
    """The pipeline tag of the model's task, such as `text-generation`; `"other"` if it has none we know."""
    name = type(model).__name__
    for task, classes in _TASKS.items():
        # A model type may have several classes for a task.
        if any(name == known or (isinstance(known, tuple) and name in known) for known in classes.values()):
            return task
    return _guess_task(model)


def _guess_task(model: nn.Module) -> str:
    generates = getattr(model, "can_generate", lambda: False)()
    return "text-generation" if generates else "other"
