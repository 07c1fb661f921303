"""Folders and a repository of format 1, as its last code wrote them: see `tests/fixtures/README.md`."""

import json
import shutil
from pathlib import Path

from transformers import AutoModelForCausalLM

from hf_s3t import S3TModel
from hf_s3t.folder.layout import CONFIG_FILE
from hf_s3t.folder.opening import ReadOnlyFolder
from hf_s3t.operations.inspection import inspect
from hf_s3t.operations.pending import PendingRequests


WRITTEN = Path(__file__).resolve().parent.parent / "fixtures" / "format-1"
# What that code said of each.
VERDICTS = json.loads((WRITTEN / "verdicts.json").read_text())
FOLDERS = sorted(VERDICTS)


def copy_of(name: str, target: Path) -> Path:
    """A copy of a folder; of the repository, without what only a repository has."""
    path = Path(shutil.copytree(WRITTEN / name, target / name))
    if name == "repository":
        for beside in ("README.md", "stacks.svg", "stages/index.json"):
            (path / beside).unlink()
    return path


def base():
    """The base of `trained` and of `repository`."""
    return AutoModelForCausalLM.from_pretrained(WRITTEN / "base")


def load(path) -> S3TModel:
    """The model of `trained` or `repository`."""
    return S3TModel.from_pretrained(path, base_model=base())


def format_of(path: Path) -> int:
    """The version of the format that a folder says it has."""
    return json.loads((path / CONFIG_FILE).read_bytes())["format_version"]


def verdict(path: Path) -> dict:
    """What is said of a folder before a process opens it to write, in the words of `write.py`."""
    seen, found = ReadOnlyFolder(path), inspect(path)
    stale = [item.path for item in found.to_remove if item.kind == "checkpoint"]
    return {
        "stages": sorted(map(str, seen.stages)),
        "valid": sorted(map(str, seen.valid_stages)),
        "condemned": sorted(map(str, seen.condemned_stages())),
        "stale": sorted(str(place.relative_to(path)) for place in stale),
        "checkpoints": sorted(str(place.relative_to(path)) for place in found.checkpoints),
        "problems": [problem.replace(f"{path}/", "") for problem in found.problems],
        "notes": [note.replace(f"{path}/", "") for note in found.notes],
        "rows": len(seen.table),
        "lines": len(seen.ledger.lines),
        "deleted": sorted(seen.ledger.deleted),
        "pending": len(PendingRequests(seen).ids()),
    }
