"""Which system a config is of: by its identity all copies of a system, and its repositories, know each other."""

import hashlib
import json
import secrets
from collections.abc import Mapping
from typing import Any


# What two copies of a system had in common before systems had an identity; of the base, what its tensors are.
_PARTS = ("key_check", "s3t_config", "base_model", "peft_config", "layers", "head")
# Those of them in which two copies of one system never differ, whatever a later version adds or changes.
_OF_THE_ADAPTERS = ("base_model", "peft_config", "layers", "head")


def new_identity() -> str:
    """The identity of a system that is to be made."""
    return secrets.token_hex(16)


def identity_of(record: Mapping[str, Any]) -> Any:
    """
    The identity of a system.

    Where it was made before systems had one, it follows from what they were told apart by then, and is the same in
    every copy.

    Args:
        record (mapping): What `s3t_config.json` says, of whatever format.
    """
    if "system_id" in record:
        return record["system_id"]
    parts = {name: _part(record, name) for name in _PARTS}
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def had_no_identity(record: Mapping[str, Any]) -> bool:
    """Whether a system was made in format 1, which its config may still have."""
    return "system_id" not in record or "earlier_slices" in record


def is_same_system(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two configs are of copies of one system."""
    return bool(identity_of(one) == identity_of(other))


def differing_parts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """What tells two systems apart besides their identities; where nothing does, these."""
    return [name for name in _PARTS if _part(one, name) != _part(other, name)] or ["system_id"]


def damaged_parts(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """In which two configs of one system differ though copies of it never do; nothing where both are as written."""
    return [name for name in _OF_THE_ADAPTERS if _part(one, name) != _part(other, name)]


def _part(record: Mapping[str, Any], name: str) -> Any:
    value = record.get(name)
    return value.get("digest") if name == "base_model" and isinstance(value, Mapping) else value
