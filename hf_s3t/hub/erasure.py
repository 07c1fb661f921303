"""Erasing from the Hub what a deletion removed: a commit that deletes files leaves them in every older one."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import GitRefInfo, RepoFile, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from ..errors import HubError
from ..folder.files import make_folders, read_checked_json, write_checked_json
from ..folder.layout import CONFIG_FILE, LEDGER_FILE, STAGES, TABLE_FILE
from .client import patiently, status_of, told
from .large_files import must_be_erasable
from .memory import remember, state_folder
from .repository import CARD_FILE, HubRepo


_PROGRESS_FILE = "erasure.json"
# Files that are looked for under their old commits at the end; all blobs are looked for in the Hub's list.
_SAMPLE = 20


@dataclass(frozen=True)
class ErasureReport:
    """
    What of a repository is gone for good, and what nobody outside the Hub can confirm.

    Args:
        repo_id (`str`): The repository.
        blobs (`int`): Number of superseded large files (adapters, tables of examples) that were erased.
        bytes (`int`): Their size.
        refs_removed (`tuple[str, ...]`): Branches and tags that held an old state and were deleted.
        confirmed (`tuple[str, ...]`): One sentence for each thing that was looked for and is gone.
        unconfirmed (`tuple[tuple[str, str], ...]`): What could not be confirmed, each with the next step.
        is_dry_run (`bool`): Whether this only says what would be done.
    """

    repo_id: str
    blobs: int
    bytes: int
    refs_removed: tuple[str, ...]
    confirmed: tuple[str, ...]
    unconfirmed: tuple[tuple[str, str], ...]
    is_dry_run: bool = False


def erase(repo: HubRepo, dry_run: bool = False) -> ErasureReport:
    """
    Erase everything that the main branch no longer holds: history, refs with an old state, and their large files.

    The new state must be on the main branch already (`push`). Every step may be repeated: where this was interrupted,
    calling it again finishes it, and remembers what it had begun to look for.

    Args:
        repo ([`~hf_s3t.hub.repository.HubRepo`]): The repository.
        dry_run (`bool`, defaults to `False`): Report what would be done, and do nothing.

    Returns:
        [`ErasureReport`]: What is gone, and what could not be confirmed.

    Raises:
        [`~hf_s3t.errors.HubError`]:
            If the Hub refuses or cannot be reached, the repository holds no system or lacks a deletion that is known
            here, or an erased file is still served.
    """
    with told(repo.repo_id, "The erasure ended"):
        record = _refuse_unpushed(repo)
        refs = patiently(repo.api.list_repo_refs, repo.repo_id, include_pull_requests=True)
        kept = _blobs(repo, "main")
        stale = [ref for ref in refs.branches if ref.name != "main" and _is_stale(repo, ref.ref, kept)]
        # A branch can be squashed; a tag keeps all that its commit stands on.
        stale += [ref for ref in refs.tags if any(_is_stale(repo, c, kept) for c in _history(repo, ref))]
        others = [ref for ref in refs.branches if ref.name != "main" and ref not in stale]
        condemned = _condemned(repo, kept, others, refs.tags, stale, refs.pull_requests or ())
        if dry_run:
            return _report(repo, condemned, stale, (), _open_questions(refs.pull_requests or (), (), ()), dry_run=True)
        progress = state_folder(repo.repo_id, record) / _PROGRESS_FILE
        seen = _remember(repo, progress, refs, condemned)
        for branch in ("main", *(ref.name for ref in others)):
            patiently(repo.api.super_squash_history, repo.repo_id, branch=branch, commit_message=_MESSAGE)
        for ref in stale:
            _delete(repo, ref, is_tag=ref in refs.tags)
        # Who pushed meanwhile is in the squashed history: what is there now stays.
        held = _held(repo, [*others, *(tag for tag in refs.tags if tag not in stale)])
        condemned = [file for file in condemned if file.file_oid not in held]
        if condemned:
            patiently(repo.api.permanently_delete_lfs_files, repo.repo_id, condemned, rewrite_history=True)
        # A push may bring back, rightly, what an interrupted erasure had begun to look for.
        seen["blobs"] = {oid: path for oid, path in seen["blobs"].items() if oid not in held}
        left = [
            f for f in patiently(lambda: list(repo.api.list_lfs_files(repo.repo_id))) if f.file_oid in seen["blobs"]
        ]
        if left:
            raise HubError(f"{len(left)} files are still listed after they were erased. Call again.")
        confirmed, served = _look(repo, seen)
        progress.unlink(missing_ok=True)
        questions = _open_questions(refs.pull_requests or (), served, seen["in_git"])
        return _report(repo, condemned, stale, confirmed, questions)


_MESSAGE = "S3T system after a deletion"


def _refuse_unpushed(repo: HubRepo) -> dict[str, Any]:
    """The config on the main branch. What that still holds cannot be erased: a deletion is pushed first."""
    state = repo.state()
    if state.record is None:
        raise HubError(
            f"{repo.repo_id} holds no S3T system: there is no {CONFIG_FILE}. Its history is left as it is; give the "
            "repository of `push_to_hub`."
        )
    published = state.ledger
    unpushed = remember(repo.repo_id, state.record, published).deleted - published.deleted
    if unpushed:
        raise HubError(
            f"This machine knows of {len(unpushed)} deleted examples that {repo.repo_id} does not. Push the deletion "
            "first: `model.push_to_hub(...)`, or `hf-s3t push` from its folder."
        )
    return state.record


def _report(repo, condemned, stale, confirmed, unconfirmed, dry_run=False) -> ErasureReport:
    return ErasureReport(
        repo.repo_id,
        len(condemned),
        sum(file.size for file in condemned),
        tuple(ref.ref for ref in stale),
        tuple(confirmed),
        tuple(unconfirmed),
        dry_run,
    )


def _files(repo: HubRepo, revision: str) -> list[RepoFile]:
    listed = patiently(lambda: list(repo.api.list_repo_tree(repo.repo_id, recursive=True, revision=revision)))
    return [entry for entry in listed if isinstance(entry, RepoFile)]


def _is_ours(path: str) -> bool:
    return path.startswith(f"{STAGES}/") or path in (TABLE_FILE, LEDGER_FILE, CONFIG_FILE, CARD_FILE)


def _blobs(repo: HubRepo, revision: str) -> set[str]:
    """The content ids of all files of a revision."""
    return {entry.lfs.sha256 if entry.lfs else entry.blob_id for entry in _files(repo, revision)}


def _history(repo: HubRepo, ref: GitRefInfo) -> list[str]:
    return [c.commit_id for c in patiently(repo.api.list_repo_commits, repo.repo_id, revision=ref.ref)]


def _is_stale(repo: HubRepo, revision: str, kept: set[str]) -> bool:
    """Whether a revision holds files of a system that the main branch does not."""
    return any(
        _is_ours(entry.path) and (entry.lfs.sha256 if entry.lfs else entry.blob_id) not in kept
        for entry in _files(repo, revision)
    )


def _condemned(repo: HubRepo, kept: set[str], others, tags, stale, pull_requests) -> list[Any]:
    """The large files to erase, by content: never one that something which stays holds too."""
    held = kept | _held(repo, [*others, *(tag for tag in tags if tag not in stale)])
    proposed = set()
    for ref in pull_requests:
        # Pull requests cannot be removed from here; what is ours in them goes all the same.
        proposed |= {f.lfs.sha256 for f in _files(repo, ref.ref) if f.lfs and not _is_ours(f.path)}
    listed = patiently(lambda: list(repo.api.list_lfs_files(repo.repo_id)))
    return [file for file in listed if file.file_oid not in held | proposed]


def _held(repo: HubRepo, refs: Iterable[GitRefInfo]) -> set[str]:
    """The content ids of what the main branch and other refs hold now."""
    return _blobs(repo, "main").union(*(_blobs(repo, ref.ref) for ref in refs))


def _delete(repo: HubRepo, ref: GitRefInfo, is_tag: bool) -> None:
    try:
        if is_tag:
            patiently(repo.api.delete_tag, repo.repo_id, tag=ref.name)
        else:
            patiently(repo.api.delete_branch, repo.repo_id, branch=ref.name)
    except HfHubHTTPError as error:
        # Gone by an attempt whose answer was lost.
        if status_of(error) != 404:
            raise


# What to look for at the end survives an interruption: after the squash nobody lists the old commits any more


def _remember(repo: HubRepo, file: Path, refs, condemned: Iterable[Any]) -> dict[str, Any]:
    known = read_checked_json(file) if file.exists() else {"commits": [], "blobs": {}, "in_git": []}
    commits = set(known["commits"])
    for ref in (*refs.branches, *refs.tags):
        commits |= set(_history(repo, ref))
    in_git = {commit for commit in commits.difference(known["commits"]) if _has_weights_or_ids_in_git(repo, commit)}
    seen = {
        "commits": sorted(commits),
        "blobs": {**known["blobs"], **{blob.file_oid: blob.filename for blob in condemned}},
        "in_git": sorted(in_git.union(known["in_git"])),
    }
    make_folders(file.parent)
    write_checked_json(file, seen)
    return seen


def _has_weights_or_ids_in_git(repo: HubRepo, commit: str) -> bool:
    """Whether somebody committed adapters or ids as small files, which are in no list of what can be erased."""
    return any(must_be_erasable(entry.path) and not entry.lfs for entry in _files(repo, commit))


def _look(repo: HubRepo, seen: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Try to fetch what was erased by the old commits, from an empty cache: what is gone, and what is still served."""
    current = patiently(repo.api.repo_info, repo.repo_id).sha
    commits = [commit for commit in seen["commits"] if commit != current]
    paths = sorted(set(seen["blobs"].values()))[:_SAMPLE]
    confirmed, served = [], []
    for commit in commits:
        fetched = [path for path in paths if _is_served(repo, path, commit, seen["blobs"])]
        if fetched:
            raise HubError(f"{fetched[0]} is still served at {commit}, after it was erased. Call again.")
        if _is_served(repo, CARD_FILE, commit) or _is_served(repo, LEDGER_FILE, commit):
            served.append(commit)
    if seen["blobs"]:
        confirmed.append(f"{len(seen['blobs'])} erased files are in the Hub's list of large files no more")
        confirmed.append(f"none of {len(paths)} of them can be fetched by any of {len(commits)} old commits")
    return confirmed, served


def _is_served(repo: HubRepo, path: str, commit: str, condemned: Iterable[str] | None = None) -> bool:
    with tempfile.TemporaryDirectory() as empty:
        try:
            found = hf_hub_download(repo.repo_id, path, revision=commit, token=repo.token, cache_dir=empty)
        except LocalEntryNotFoundError:
            # The Hub did not answer: that is no word that the file is gone.
            raise
        except (EntryNotFoundError, RevisionNotFoundError):
            return False
        except HfHubHTTPError as error:
            if not isinstance(error, RepositoryNotFoundError) and status_of(error) in (404, 410):
                return False
            raise
        # Under an old commit the path may hold a blob that a surviving stage has too.
        return condemned is None or Path(found).resolve().name in condemned


def _open_questions(pull_requests, served, in_git) -> list[tuple[str, str]]:
    questions = [
        (
            f"{len(in_git)} old commits hold adapters or the table of ids as small files in git, which cannot be "
            "erased; they are served to who knows the commit id until the Hub collects garbage",
            "delete the repository and push to a new one, or ask the Hub's support to collect garbage for it",
        )
    ] * bool(in_git)
    questions += [
        (
            f"small files of {len(served)} old commits (stage records, cards, ledgers; no weights, no ids) are served "
            "to who knows the commit id until the Hub collects garbage",
            "wait, or ask the Hub's support to collect garbage for the repository",
        )
    ] * bool(served)
    questions += [
        (
            f"{ref.ref} may hold an old state",
            "close the pull request on the website and ask the Hub's support to remove its ref",
        )
        for ref in pull_requests
    ]
    questions.append(
        (
            "copies that a CDN, mirrors or other people's caches keep",
            "wait for the CDN to expire; tell those who downloaded it; `hf-s3t purge --repo-id` lists this machine's",
        )
    )
    return questions
