"""Erasing from the Hub what a deletion removed: a commit that deletes files leaves them in every older one."""

import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec

from huggingface_hub import GitRefInfo, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import LFSFileInfo

from ..errors import HubError
from ..folder.files import make_folders, read_checked_json, write_checked_json
from ..folder.layout import CARD_FILE, CONFIG_FILE, GATE_FILE, LEDGER_FILE, STAGES, TABLE_FILE
from .client import call_with_retries, http_status, hub_errors_as_sentences
from .large_files import must_be_erasable
from .memory import remember, state_folder
from .repository import HubRepo, content_id


_PROGRESS_FILE = "erasure.json"
_MESSAGE = "S3T system after a deletion"
# Files that are looked for under their old commits at the end; all blobs are looked for in the Hub's list.
_SAMPLE = 20
_Parameters = ParamSpec("_Parameters")


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
    with hub_errors_as_sentences(repo.repo_id, "The erasure ended"):
        record = _refuse_unpushed(repo)
        refs = _refs(repo)
        condemned = _condemned(repo, refs)
        if dry_run:
            return _report(repo, condemned, refs, (), _open_questions(refs, (), ()), dry_run=True)
        progress = state_folder(repo.repo_id, record) / _PROGRESS_FILE
        seen = _remember(repo, progress, refs, condemned)
        _rewrite_history(repo, refs)
        erased = _erase_files(repo, refs, condemned, seen)
        confirmed, served = _look(repo, seen)
        progress.unlink(missing_ok=True)
        return _report(repo, erased, refs, confirmed, _open_questions(refs, served, seen["in_git"]))


@dataclass(frozen=True)
class _Refs:
    """
    The branches, tags and pull requests of a repository, by what becomes of them.

    Args:
        on_main (`set[str]`): The content ids of what the main branch holds.
        everything (`list[GitRefInfo]`): All branches and tags, the main branch among them.
        branches (`list[GitRefInfo]`): Branches beside the main one that stay.
        tags (`list[GitRefInfo]`): Tags that stay.
        stale_branches (`list[GitRefInfo]`): Branches that hold an old state and go.
        stale_tags (`list[GitRefInfo]`): Tags that hold an old state and go.
        pull_requests (`list[GitRefInfo]`): Pull requests, which cannot be removed from here.
    """

    on_main: set[str]
    everything: list[GitRefInfo]
    branches: list[GitRefInfo]
    tags: list[GitRefInfo]
    stale_branches: list[GitRefInfo]
    stale_tags: list[GitRefInfo]
    pull_requests: list[GitRefInfo]

    @property
    def staying(self) -> list[GitRefInfo]:
        return self.branches + self.tags

    @property
    def stale(self) -> list[GitRefInfo]:
        return self.stale_branches + self.stale_tags


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


def _report(
    repo: HubRepo,
    erased: Collection[LFSFileInfo],
    refs: _Refs,
    confirmed: Iterable[str],
    unconfirmed: Iterable[tuple[str, str]],
    dry_run: bool = False,
) -> ErasureReport:
    return ErasureReport(
        repo.repo_id,
        len(erased),
        sum(file.size for file in erased),
        tuple(ref.ref for ref in refs.stale),
        tuple(confirmed),
        tuple(unconfirmed),
        dry_run,
    )


# What goes


def _refs(repo: HubRepo) -> _Refs:
    found = call_with_retries(repo.api.list_repo_refs, repo.repo_id, include_pull_requests=True)
    on_main = _contents(repo, "main")
    branches = [ref for ref in found.branches if ref.name != "main"]
    stale_branches = [ref for ref in branches if _is_stale(repo, ref.ref, on_main)]
    # A branch can be squashed; a tag keeps all that its commit stands on.
    stale_tags = [ref for ref in found.tags if any(_is_stale(repo, commit, on_main) for commit in _history(repo, ref))]
    return _Refs(
        on_main,
        [*found.branches, *found.tags],
        [ref for ref in branches if ref not in stale_branches],
        [ref for ref in found.tags if ref not in stale_tags],
        stale_branches,
        stale_tags,
        found.pull_requests or [],
    )


def _is_ours(path: str) -> bool:
    return path.startswith(f"{STAGES}/") or path in (TABLE_FILE, GATE_FILE, LEDGER_FILE, CONFIG_FILE, CARD_FILE)


def _contents(repo: HubRepo, revision: str) -> set[str]:
    """The content ids of all files of a revision."""
    return {content_id(file) for file in repo.files(revision)}


def _history(repo: HubRepo, ref: GitRefInfo) -> list[str]:
    commits = call_with_retries(repo.api.list_repo_commits, repo.repo_id, revision=ref.ref)
    return [commit.commit_id for commit in commits]


def _is_stale(repo: HubRepo, revision: str, on_main: set[str]) -> bool:
    """Whether a revision holds files of a system that the main branch does not."""
    return any(_is_ours(file.path) and content_id(file) not in on_main for file in repo.files(revision))


def _condemned(repo: HubRepo, refs: _Refs) -> list[LFSFileInfo]:
    """The large files to erase, by content: never one that something which stays holds too."""
    held = refs.on_main | _held(repo, refs)
    proposed: set[str] = set()
    for ref in refs.pull_requests:
        # Pull requests cannot be removed from here; what is ours in them goes all the same.
        proposed |= {file.lfs.sha256 for file in repo.files(ref.ref) if file.lfs and not _is_ours(file.path)}
    return [file for file in repo.large_files() if file.file_oid not in held | proposed]


def _held(repo: HubRepo, refs: _Refs) -> set[str]:
    """The content ids of what the main branch and the refs that stay hold now."""
    return _contents(repo, "main").union(*(_contents(repo, ref.ref) for ref in refs.staying))


def _rewrite_history(repo: HubRepo, refs: _Refs) -> None:
    """Make one commit of each branch that stays, and delete the refs that hold an old state."""
    for branch in ("main", *(ref.name for ref in refs.branches)):
        call_with_retries(repo.api.super_squash_history, repo.repo_id, branch=branch, commit_message=_MESSAGE)
    for ref in refs.stale_branches:
        _delete(repo.api.delete_branch, repo.repo_id, branch=ref.name)
    for ref in refs.stale_tags:
        _delete(repo.api.delete_tag, repo.repo_id, tag=ref.name)


def _delete(delete: Callable[_Parameters, None], *args: _Parameters.args, **kwargs: _Parameters.kwargs) -> None:
    try:
        call_with_retries(delete, *args, **kwargs)
    except HfHubHTTPError as error:
        # Gone by an attempt whose answer was lost.
        if http_status(error) != 404:
            raise


def _erase_files(
    repo: HubRepo, refs: _Refs, condemned: Iterable[LFSFileInfo], seen: dict[str, Any]
) -> list[LFSFileInfo]:
    """Erase large files but for those that are held now; `seen` is left with those that must be gone."""
    # Who pushed meanwhile is in the squashed history: what is there now stays.
    held = _held(repo, refs)
    erased = [file for file in condemned if file.file_oid not in held]
    if erased:
        call_with_retries(repo.api.permanently_delete_lfs_files, repo.repo_id, erased, rewrite_history=True)
    # A push may bring back, rightly, what an interrupted erasure had begun to look for.
    seen["blobs"] = {oid: path for oid, path in seen["blobs"].items() if oid not in held}
    left = [file for file in repo.large_files() if file.file_oid in seen["blobs"]]
    if left:
        raise HubError(f"{len(left)} files are still listed after they were erased. Call again.")
    return erased


# What to look for at the end survives an interruption: after the squash nobody lists the old commits any more


def _remember(repo: HubRepo, file: Path, refs: _Refs, condemned: Iterable[LFSFileInfo]) -> dict[str, Any]:
    known = read_checked_json(file) if file.exists() else {"commits": [], "blobs": {}, "in_git": []}
    commits = set(known["commits"])
    for ref in refs.everything:
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
    return any(must_be_erasable(file.path) and not file.lfs for file in repo.files(commit))


def _look(repo: HubRepo, seen: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Try to fetch what was erased by the old commits, from an empty cache: what is gone, and what is still served."""
    current = repo.newest_commit()
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
            if not isinstance(error, RepositoryNotFoundError) and http_status(error) in (404, 410):
                return False
            raise
        # Under an old commit the path may hold a blob that a surviving stage has too.
        return condemned is None or Path(found).resolve().name in condemned


def _open_questions(refs: _Refs, served: Collection[str], in_git: Collection[str]) -> list[tuple[str, str]]:
    questions = []
    if in_git:
        questions.append(
            (
                f"{len(in_git)} old commits hold adapters or the table of ids as small files in git, which cannot be "
                "erased; they are served to who knows the commit id until the Hub collects garbage",
                "delete the repository and push to a new one, or ask the Hub's support to collect garbage for it",
            )
        )
    if served:
        questions.append(
            (
                f"small files of {len(served)} old commits (stage records, cards, ledgers; no weights, no ids) are "
                "served to who knows the commit id until the Hub collects garbage",
                "wait, or ask the Hub's support to collect garbage for the repository",
            )
        )
    questions += [
        (
            f"{ref.ref} may hold an old state",
            "close the pull request on the website and ask the Hub's support to remove its ref",
        )
        for ref in refs.pull_requests
    ]
    questions.append(
        (
            "copies that a CDN, mirrors or other people's caches keep",
            "wait for the CDN to expire; tell those who downloaded it; `hf-s3t purge --repo-id` lists this machine's",
        )
    )
    return questions
