"""Where this machine remembers deletions of a repository, whatever revision or cache is loaded."""

import hashlib
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from filelock import FileLock
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from ..errors import FolderError
from ..folder.files import make_folders, write_atomically
from ..folder.identity import had_no_identity, identity_of
from ..folder.layout import CONFIG_FILE, LEDGER_FILE, LOCK_FILE, STAGES
from ..folder.ledger_file import read_ledger
from ..folder.signatures_file import sign_written
from ..records.ledger import Ledger
from ..signing.keys import current_signer
from .repository import REMEDY


def state_folder(repo_id: str, record: Mapping[str, Any] | None = None) -> Path:
    """
    Where this machine remembers the deletions of a repository: a folder without weights, outside the Hub's cache.

    Each system has its own: where a repository was deleted and another system pushed under its name, the deletions of
    the former stay remembered, for its revisions, and those of the two never mix.

    Args:
        repo_id (`str`): The repository, such as `"me/llama-s3t"`.
        record (mapping, *optional*):
            What `s3t_config.json` says of the system, which is known by its identity; one that was made in format 1,
            by the check of its secret, as it is remembered by older releases. Without it, the folder that holds those
            of all systems which were ever in the repository.
    """
    home = os.environ.get("HF_S3T_HOME") or Path(constants.HF_HOME) / "s3t"
    host = urlsplit(constants.ENDPOINT).netloc.replace(":", "_")
    folder = Path(home) / host / repo_folder_name(repo_id=repo_id, repo_type="model")
    if record is None:
        return folder
    check = record.get("key_check")
    if not isinstance(check, str):
        raise FolderError(
            f"{CONFIG_FILE} of {repo_id} has the key_check {check!r}, expected a digest. Push the system again from "
            "its folder."
        )
    known_by = check if had_no_identity(record) else str(record["system_id"])
    # Hashed: what comes from the Hub does not name folders here.
    return folder / hashlib.sha256(known_by.encode()).hexdigest()[:16]


def warn_of_other_systems(repo_id: str, record: Mapping[str, Any]) -> None:
    """Say where deletions are remembered of other systems that were in a repository, and that they stay theirs."""
    ours = state_folder(repo_id, record)
    for ledger in sorted(state_folder(repo_id).glob(f"*/{LEDGER_FILE}")):
        if ledger.parent != ours and read_ledger(ledger, advice=REMEDY).num_deletions:
            warnings.warn(
                f"{repo_id} held another system, of which this machine remembers deletions ({ledger.parent}). They "
                "stay in force for its revisions; of the system that is there now they delete nothing. Unlearn there "
                "what it must forget too.",
                stacklevel=2,
            )


def remember(repo_id: str, record: Mapping[str, Any], ledger: Ledger) -> Ledger:
    """
    Have every copy of a system in a repository on this machine, of whatever revision, follow a ledger's deletions.

    Args:
        repo_id (`str`): The repository.
        record (mapping): What `s3t_config.json` says of the system.
        ledger ([`~hf_s3t.records.ledger.Ledger`]): What was recorded.

    Returns:
        [`~hf_s3t.records.ledger.Ledger`]: What this machine knows now. Where it may write nothing, that is not kept.
    """
    path = state_folder(repo_id, record)
    file = path / LEDGER_FILE
    if not may_remember(path):
        return read_ledger(file, ledger, advice=REMEDY).merge(ledger) if file.exists() else ledger
    make_folders(path / STAGES)
    with FileLock(path / STAGES / LOCK_FILE, is_singleton=True):
        known = read_ledger(file, ledger, advice=REMEDY) if file.exists() else None
        merged = ledger if known is None else known.merge(ledger)
        if merged is not known:
            # Where neither has the last line, it was written here, to join them.
            is_ours = known is not None and merged.hashes[-1] not in {*known.hashes, *ledger.hashes}
            signer = current_signer() if is_ours else None
            write_atomically(file, merged.text.encode())
            sign_written(path, merged, [len(merged.lines)], str(identity_of(record)), signer)
    return merged


def may_remember(state: Path) -> bool:
    """
    Whether deletions can be written down in a state folder.

    A server whose home is read-only serves what is valid by what it reads, and refuses to delete.
    """
    there = next(folder for folder in (state / STAGES, state, *state.parents) if folder.exists())
    return os.access(there, os.W_OK)
