"""The model that a plan is made for: its layers, and the weights of adapters on them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checks import require_choice, require_int
from ..errors import ConfigError


TARGETS = ("query-value", "all-linear")
# The same setting under the names it has in the configs of Transformers.
_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads"),
}
_PARTS = ("text_config", "vision_config")


@dataclass(frozen=True)
class Backbone:
    """
    What planning needs to know of a model.

    Args:
        num_layers (`int`):
            Number of transformer layers `N`.
        adapter_weights_per_layer (`int`, *optional*):
            Number of LoRA weights in one layer; not known without the sizes of its matrices.
        head_weights (`int`, defaults to 0):
            Number of weights of the head, of which every stage keeps a copy.

    Example:

    ```python
    >>> from hf_s3t.analysis.planning import Backbone

    >>> vit = {"num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16}
    >>> Backbone.from_config(vit, rank=16, target_modules="query-value", num_labels=200)
    Backbone(num_layers=24, adapter_weights_per_layer=65536, head_weights=205000)
    ```
    """

    num_layers: int
    adapter_weights_per_layer: int | None = None
    head_weights: int = 0

    def __post_init__(self) -> None:
        require_int("num_layers", self.num_layers, 1)

    @classmethod
    def from_config(
        cls, config: Mapping[str, Any], rank: int = 16, target_modules: str | None = None, num_labels: int = 0
    ) -> "Backbone":
        """
        Read the `config.json` of a model, in the names that Transformers uses.

        Args:
            config (mapping):
                The settings of the model.
            rank (`int`, defaults to 16):
                Rank `r` of LoRA.
            target_modules (`str`, *optional*):
                `"query-value"` or `"all-linear"`: the matrices with an adapter. By default all of a causal language
                model, query and value of others.
            num_labels (`int`, defaults to 0):
                Number of classes of a classification head; 0 for a model without one of its own.

        Returns:
            [`Backbone`]: What planning needs; without the number of weights where the config has no hidden size.

        Raises:
            [`~hf_s3t.errors.ConfigError`]: If the config has no number of layers, or an argument is out of range.
        """
        require_int("rank", rank, 1)
        require_int("num_labels", num_labels, 0)
        if not isinstance(config, Mapping):
            raise ConfigError(f"A model's config is a JSON object, got {type(config).__name__}. Give --num-layers.")
        whole = config
        for part in _PARTS:
            if _setting(config, "num_layers") is None and isinstance(config.get(part), Mapping):
                config = config[part]
        layers = _setting(config, "num_layers")
        if layers is None:
            raise ConfigError(
                f"The model's config names no number of layers, expected one of {', '.join(_NAMES['num_layers'])}. "
                "Give --num-layers."
            )
        if target_modules is None:
            target_modules = targets_of(whole)
        require_choice("target_modules", target_modules, TARGETS)
        hidden = _setting(config, "hidden_size")
        if hidden is None:
            return cls(layers)
        weights = rank * sum(map(sum, _matrices(config, hidden, target_modules)))
        return cls(layers, weights, (hidden + 1) * num_labels)


def targets_of(config: Mapping[str, Any]) -> str:
    """The matrices that get an adapter by default: all of a causal language model, query and value of others."""
    names = config.get("architectures") or ()
    return "all-linear" if any("CausalLM" in str(name) for name in names) else "query-value"


# -- the model --------------------------------------------------------------------------------------------------------


def _setting(config: Mapping[str, Any], name: str) -> int | None:
    for key in _NAMES[name]:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _matrices(config: Mapping[str, Any], hidden: int, target_modules: str) -> list[tuple[int, int]]:
    """Inputs and outputs of the matrices of one layer that get an adapter."""
    heads = _setting(config, "num_heads") or 1
    own, shared = config.get("head_dim"), config.get("num_key_value_heads")
    size = own if isinstance(own, int) else hidden // heads
    query, value = heads * size, (shared if isinstance(shared, int) else heads) * size
    if target_modules == "query-value":
        return [(hidden, query), (hidden, value)]
    inner = _setting(config, "intermediate_size") or 4 * hidden
    # SiLU comes with a gate in all of Transformers' language models, and Gemma's GELU does too.
    gated = config.get("hidden_act") in ("silu", "swish") or str(config.get("model_type", "")).startswith("gemma")
    attention = [(hidden, query), (hidden, value), (hidden, value), (query, hidden)]
    return [*attention, *[(hidden, inner)] * (2 if gated else 1), (inner, hidden)]
