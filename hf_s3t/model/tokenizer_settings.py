"""How tokenizers are set, noted and put back."""

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, ProcessorMixin

from .fresh_copies import held_as_it_is


class TokenizerSettings:
    """
    How the tokenizers of some objects are set: on which side they pad, which a callback that generates may change.

    Args:
        parts (sequence): Tokenizers, processors, and what holds them, such as collators.
    """

    def __init__(self, parts: Sequence[Any]):
        self._found: dict[int, tuple[PreTrainedTokenizerBase, dict[str, Any]]] = {}
        for part in parts:
            for one in held_as_it_is(part, {}):
                inside = vars(one).values() if isinstance(one, ProcessorMixin) else (one,)
                for tokenizer in (each for each in inside if isinstance(each, PreTrainedTokenizerBase)):
                    self._found[id(tokenizer)] = tokenizer, _plain_settings(tokenizer)

    def have_changed(self) -> bool:
        """Whether one is set otherwise than it was."""
        return any(_plain_settings(tokenizer) != settings for tokenizer, settings in self._found.values())

    def put_back(self) -> None:
        """Set all as they were."""
        for tokenizer, settings in self._found.values():
            vars(tokenizer).update(settings)


def _plain_settings(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    return {name: value for name, value in vars(tokenizer).items() if isinstance(value, (bool, int, float, str))}
