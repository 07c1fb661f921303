"""The repository of a system on the Hub, and what one of its commits holds."""

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, RepoFile, hf_hub_download
from yaml import YAMLError

from ..errors import FolderError
from ..folder.files import read_checked_json
from ..folder.layout import CONFIG_FILE, LEDGER_FILE, STAGES
from ..folder.ledger_file import pin_of, read_ledger
from ..folder.stage_record import is_stage_record
from ..folder.system import SystemFolder
from ..plan.stages import StageKey
from ..records.ledger import Ledger
from .client import first_line, patiently


INDEX_FILE = f"{STAGES}/index.json"
CARD_FILE = "README.md"
# What to do about a file that came from the Hub, or is kept for what did.
REMEDY = "Restore it from a backup, or push the system again"
# What the index repeats of each stage's record: all that choosing and checking stages needs.
_INDEXED = ("files", "slices", "below", "recipe")
_INDEXED_METRICS = ("eval_loss", "train_runtime")


@dataclass(frozen=True)
class HubState:
    """
    A system as it stands in one commit of a repository.

    Args:
        commit (`str`): The commit.
        tree (`dict[str, RepoFile]`): All files by their paths.
        record (`dict`, *optional*): What `s3t_config.json` says; `None` where the repository holds no system.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): The ledger.
        stages (`dict`): What the index says of each stage.
    """

    commit: str
    tree: dict[str, RepoFile]
    record: dict[str, Any] | None = None
    ledger: Ledger = field(default_factory=Ledger)
    stages: dict[StageKey, dict[str, Any]] = field(default_factory=dict)


class HubRepo:
    """
    One repository, through the client of `huggingface_hub`.

    Args:
        repo_id (`str`): Such as `"me/llama-s3t"`.
        token (`str`, *optional*): The token; the one of `hf auth login` if not given.
        cache_dir (`str` or `os.PathLike`, *optional*): The Hub's cache; the usual one if not given.
    """

    def __init__(self, repo_id: str, token: str | None = None, cache_dir: str | os.PathLike | None = None):
        self.repo_id, self.token, self.cache_dir = repo_id, token, cache_dir
        self.api = HfApi(token=token)

    def download(self, name: str, revision: str | None = None) -> Path:
        """A file of the repository, from the cache where it is there; see `hf_hub_download`."""
        found = patiently(
            hf_hub_download, self.repo_id, name, revision=revision, token=self.token, cache_dir=self.cache_dir
        )
        return Path(found)

    def state(self) -> HubState:
        """What the main branch holds now."""
        commit = patiently(self.api.repo_info, self.repo_id).sha
        listed = patiently(lambda: list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=commit)))
        tree = {entry.path: entry for entry in listed if isinstance(entry, RepoFile)}
        if CONFIG_FILE not in tree:
            return HubState(commit, tree)
        return HubState(
            commit,
            tree,
            read_checked_json(self.download(CONFIG_FILE, commit)),
            self.ledger(commit),
            read_index(self.download(INDEX_FILE, commit))["stages"],
        )

    def ledger(self, revision: str) -> Ledger:
        """The ledger of a revision."""
        return read_ledger(self.download(LEDGER_FILE, revision), advice=REMEDY)

    def card(self, state: HubState) -> str | None:
        """The card of a state; `None` where none can be read, for a deletion does not wait until it is mended."""
        if CARD_FILE not in state.tree:
            return None
        try:
            text = self.download(CARD_FILE, state.commit).read_bytes().decode()
            _ = ModelCard(text, ignore_metadata_errors=True)
        except (ValueError, YAMLError) as error:
            warnings.warn(
                f"The {CARD_FILE} of {self.repo_id} cannot be read ({first_line(error)}), so what it said of "
                "datasets, licence and evaluation is not kept. Give `datasets`, `license` and `evaluation` with a "
                "push.",
                stacklevel=2,
            )
            return None
        return text


def read_index(path: Path) -> dict[str, Any]:
    """
    The index of a repository's stages: `stages` by key, `slices` by (shard, slice), and the ledger's pin.

    Raises:
        [`~hf_s3t.errors.FolderError`]: If it does not say of each stage what the record of a stage says.
    """
    index = read_checked_json(path)
    try:
        stages = {StageKey.from_path(f"{STAGES}/{name}"): dict(record) for name, record in index["stages"].items()}
        slices = {tuple(map(int, place.split("/"))): str(digest) for place, digest in index["slices"].items()}
        pin = str(index["ledger"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise FolderError(
            f"{path} is no index of a system's stages ({type(error).__name__}: {error}). Push the system again "
            "from its folder."
        ) from error
    damaged = next((key for key, record in stages.items() if not is_stage_record(record)), None)
    if damaged is not None:
        raise FolderError(
            f"{path} says of {damaged} other than files, slices, below and metrics as they were written. Push the "
            "system again from its folder."
        )
    return {**index, "stages": stages, "slices": slices, "ledger": pin}


def index_of(folder: SystemFolder, stages: Mapping[StageKey, Mapping[str, Any]]) -> dict[str, Any]:
    """What the index says of stages."""
    return {
        "ledger": pin_of(folder.ledger),
        "slices": {
            f"{shard}/{slice_}": folder.table.slice_digest(shard, slice_)
            for shard in range(folder.config.num_shards)
            for slice_ in range(folder.config.num_slices)
        },
        "stages": {str(key): _indexed(record) for key, record in sorted(stages.items())},
    }


def _indexed(record: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {name: value for name, value in record["metrics"].items() if name in _INDEXED_METRICS}
    return {**{name: record.get(name) for name in _INDEXED}, "metrics": metrics}
