"""The numbers of a figure, kept as JSON beside its picture."""

import json
from pathlib import Path
from typing import Any

from hf_s3t.errors import ConfigError


def write_data(path: Path, data: dict[str, Any]) -> None:
    """Write the numbers of a figure; its folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def stored_data(path: Path) -> dict[str, Any]:
    """
    The numbers of a figure that were written before.

    Raises:
        [`~hf_s3t.errors.ConfigError`]: If there are none.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"There is no {path} to draw from. Run the study without --redraw.") from error
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON ({error}). Run the study without --redraw.") from error
