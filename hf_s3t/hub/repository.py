"""The repository of a system on the Hub, and what one of its commits holds."""

import itertools
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard, RepoFile, hf_hub_download
from huggingface_hub.hf_api import LFSFileInfo, RepoFolder
from yaml import YAMLError

from ..errors import FolderError, FormatVersionError, HubError
from ..folder.config_file import FORMAT_VERSION, read_record
from ..folder.files import read_checked_json
from ..folder.layout import CARD_FILE, CONFIG_FILE, LEDGER_FILE, SIGNATURES_FILE, STAGES
from ..folder.ledger_file import pin_of, read_ledger
from ..folder.signatures_file import Signatures
from ..folder.stage_record import is_stage_record
from ..plan.stages import StageKey
from ..records.examples import ExampleTable
from ..records.ledger import Ledger
from .client import call_with_retries, first_line


INDEX_FILE = f"{STAGES}/index.json"
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

    def __init__(self, repo_id: str, token: str | None = None, cache_dir: str | os.PathLike[str] | None = None):
        self.repo_id, self.token = repo_id, token
        self.cache_dir = None if cache_dir is None else os.fspath(cache_dir)
        self.api = HfApi(token=token)
        self._ledger = Ledger()

    def download(self, name: str, revision: str | None = None) -> Path:
        """A file of the repository, from the cache where it is there; see `hf_hub_download`."""

        def downloaded() -> str:
            return hf_hub_download(self.repo_id, name, revision=revision, token=self.token, cache_dir=self.cache_dir)

        return Path(call_with_retries(downloaded))

    def newest_commit(self) -> str:
        """The commit that the main branch stands at."""
        commit = call_with_retries(self.api.repo_info, self.repo_id).sha
        if commit is None:
            raise HubError(f"The Hub names no commit of {self.repo_id}, expected that of its main branch. Call again.")
        return commit

    def files(self, revision: str) -> list[RepoFile]:
        """All files of a revision."""

        def listed() -> list[RepoFile | RepoFolder]:
            return list(self.api.list_repo_tree(self.repo_id, recursive=True, revision=revision))

        return [entry for entry in call_with_retries(listed) if isinstance(entry, RepoFile)]

    def large_files(self) -> list[LFSFileInfo]:
        """All large files that the repository stores, whatever revision holds them."""
        return call_with_retries(lambda: list(self.api.list_lfs_files(self.repo_id)))

    def state(self) -> HubState:
        """What the main branch holds now."""
        commit = self.newest_commit()
        tree = {file.path: file for file in self.files(commit)}
        if CONFIG_FILE not in tree:
            return HubState(commit, tree)
        return HubState(
            commit,
            tree,
            read_record(self.download(CONFIG_FILE, commit)),
            self.ledger(commit),
            read_index(self.download(INDEX_FILE, commit))["stages"],
        )

    def ledger(self, revision: str) -> Ledger:
        """The ledger of a revision."""
        # From one revision to the next it goes on, and only the new lines are read.
        self._ledger = read_ledger(self.download(LEDGER_FILE, revision), self._ledger, advice=REMEDY)
        return self._ledger

    def signatures(self, state: HubState) -> Signatures:
        """What was signed of the lines of a state's ledger."""
        if SIGNATURES_FILE not in state.tree:
            return Signatures()
        text = self.download(SIGNATURES_FILE, state.commit).read_bytes()
        return Signatures(text.decode(errors="replace"))

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


def content_id(file: RepoFile) -> str:
    """What tells the content of a file from any other."""
    return file.lfs.sha256 if file.lfs else file.blob_id


def read_index(path: Path) -> dict[str, Any]:
    """
    The index of a repository's stages: `stages` by key, `slices` by (shard, slice), and the ledger's pin.

    The digests of slices are those of the format that its commit is of.

    Raises:
        [`~hf_s3t.errors.FormatVersionError`]: If a later version of hf_s3t wrote it.
        [`~hf_s3t.errors.FolderError`]: If it does not say of each stage what the record of a stage says.
    """
    index = read_checked_json(path)
    version = index.get("format_version", 1)
    if version not in (1, FORMAT_VERSION):
        raise FormatVersionError(
            f"{path} has format version {version!r}; this hf_s3t reads versions 1 and {FORMAT_VERSION}. Install the "
            "version of hf_s3t that wrote it."
        )
    try:
        stages = {StageKey.from_path(f"{STAGES}/{name}"): dict(record) for name, record in index["stages"].items()}
        places = {place: place.removeprefix("shard-").split("/") for place in index["slices"]}
        slices = {tuple(map(int, places[place])): str(digest) for place, digest in index["slices"].items()}
        before = {
            tuple(map(int, places[p])): tuple(map(str, ever)) for p, ever in index.get("slices_before", {}).items()
        }
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
    return {**index, "stages": stages, "slices": slices, "slices_before": before, "ledger": pin}


def stage_index(table: ExampleTable, ledger: Ledger, stages: Mapping[StageKey, Mapping[str, Any]]) -> dict[str, Any]:
    """What the index says of stages, in the newest format: releases before it cannot read the names of slices."""
    places = itertools.product(range(table.num_shards), range(table.num_slices))
    ever = {place: table.slice_digests_of(*place, ledger.generations) for place in places}
    # What the rows of slices were before others came, by which stages that serve without these are told.
    before = {f"shard-{shard}/{slice_}": list(was) for (shard, slice_), (_, *was) in ever.items() if was}
    return {
        "format_version": FORMAT_VERSION,
        "ledger": pin_of(ledger),
        "slices": {f"shard-{shard}/{slice_}": now for (shard, slice_), (now, *_) in ever.items()},
        **({"slices_before": before} if before else {}),
        "stages": {str(key): _indexed(record) for key, record in sorted(stages.items())},
    }


def _indexed(record: Mapping[str, Any]) -> dict[str, Any]:
    metrics = {name: value for name, value in record["metrics"].items() if name in _INDEXED_METRICS}
    return {**{name: record.get(name) for name in _INDEXED}, "metrics": metrics}
