"""Whether a base model is the one that a system was trained on, and what is said where it is not."""

import json
import os
from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedModel

from ..errors import BaseModelMismatchError
from .base_precision import HALVES, check_precision, first_dtype, warn_of_other_rounding
from .base_record import config_of, deciding_settings, is_config
from .base_tensors import PARTS, digests_of_base


# What users set on a loaded model's config, or what shows in the tensors, and what loading by name restores.
_MAY_BE_SET = {
    "pad_token_id", "bos_token_id", "eos_token_id", "id2label", "label2id", "num_labels", "problem_type",
    "tie_word_embeddings",
}  # fmt: skip


def check_base_is(
    model: PreTrainedModel,
    record: dict[str, Any],
    layers_path: str,
    head: Sequence[str],
    for_training: bool = False,
    as_recorded: bool = False,
) -> None:
    """
    Check that a model is the recorded base, whatever precision or quantisation it was loaded in.

    Stages that are added must stand on exactly what the others stand on: `for_training` the precision and quantisation
    must be the recorded ones too. Where it was loaded `as_recorded`, and is rounded otherwise nevertheless, that is
    said.

    Raises:
        [`~hf_s3t.errors.BaseModelMismatchError`]: If a tensor differs.
    """
    now, then = _flat_settings(config_of(model)), _flat_settings(record.get("config", {}))
    other = sorted(k for k in {*now, *then} if now.get(k) != then.get(k))
    given = getattr(model.config, "_name_or_path", None)
    if then and other:
        shown = ", ".join(f"{k}={now.get(k)!r} (was {then.get(k)!r})" for k in other[:5])
        raise BaseModelMismatchError(
            f"The base model is configured otherwise than at training: {shown}. Load it with the settings that it "
            f"had. {which_base(given, record, for_training)}"
        )
    if for_training:
        check_precision(model, record)
    expected = record["digest"]
    recorded = {dtype for part, its in expected.items() if part != "quantised" for dtype in its or ()}
    found = digests_of_base(
        model, layers_path, head, sorted({first_dtype(model), record["dtype"], *HALVES, *recorded})
    )
    parts = [part for part in PARTS if found[part] and expected.get(part)]
    # One that agrees is enough: a checkpoint in one half precision that was trained on in the other is the same base.
    # Weights that were quantised in another way say nothing of it.
    differing = [
        part
        for part in parts
        if found[part].keys() & expected[part].keys() and not found[part].items() & expected[part].items()
    ]
    if differing:
        where = " and ".join(PARTS[part] for part in differing)
        raise BaseModelMismatchError(
            f"The base model is not the one these stages were trained on: {where} differ"
            f"{other_sizes(given, record)}. {which_base(given, record, for_training)}"
        )
    if as_recorded and any(set(expected[part].items()) - set(found[part].items()) for part in parts):
        warn_of_other_rounding(record)


def _flat_settings(settings: dict[str, Any], under: str = "") -> dict[str, Any]:
    """Settings that must be the same, those of a config's parts by dotted names."""
    found = {}
    for name, value in deciding_settings(settings).items():
        if is_config(value):
            found.update(_flat_settings(value, f"{under}{name}."))
        elif name not in _MAY_BE_SET:
            found[under + name] = value
    return found


def which_base(given: str | None, record: dict[str, Any], for_training: bool = False) -> str:
    """Which base was recorded, which was given, and where to give the right one."""
    name, argument = record["id"] or record.get("folder"), "model" if for_training else "base_model"
    if name and given == name:
        return (
            f"It is what {name!r} holds now: that has changed since, or the base was changed in memory before it was "
            f"trained on. Give the base as it was then as `{argument}`."
        )
    revision = f", revision {record['revision']}" if record["revision"] else ""
    got = f", got {given!r}" if given else ""
    return f"Expected {name or 'the model given at training'!r}{revision}{got}; give it as `{argument}`."


def other_sizes(name: str | os.PathLike[str] | None, record: dict[str, Any]) -> str:
    """
    How the model of a name differs in size from the recorded base, if it does: loaded by its name it gets the recorded
    size, and its weights are not for that.
    """
    if name is None:
        return ""
    try:
        found = json.loads(AutoConfig.from_pretrained(name, local_files_only=True).to_json_string(use_diff=False))
    except Exception:
        # It has no name by which anything could be told.
        return ""
    now, then = _sizes(found), _sizes(record.get("config", {}))
    other = [f"{k}={now[k]!r} (was {then[k]!r})" for k in now.keys() & then.keys() if now[k] != then[k]]
    return f", and {str(name)!r} has {', '.join(sorted(other))}" if other else ""


def _sizes(settings: dict[str, Any]) -> dict[str, int]:
    """The settings that say how many of something a model has, those of its parts included."""
    sizes: dict[str, int] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            sizes |= {f"{name}.{inner}": size for inner, size in _sizes(value).items()}
        elif type(value) is int and (name.endswith(("_size", "_dim")) or name.startswith(("n_", "num_"))):
            sizes[name] = value
    return sizes
